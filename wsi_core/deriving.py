"""Finer levels of many slides: what is there, what is made, a process list for each level.

The coarse grid of a slide is in ``save_dir/patches``; level after level goes into a folder beside
``save_dir`` (``hierarchy.level_folder``), each a normal folder of coordinates. A finished child
counts only if it was made from this very parent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.errors import BrokenFile, ItemFailed, Refused
from utils.locks import claim, holder, sweep_locks
from utils.parallel import run_items
from utils.report import Row, RunReport, Status
from utils.storage import canonical, differences, writable_folder
from wsi_core.coords import (
    PatchCoords,
    coords_digest,
    read_coords,
    recorded_parameters,
    write_coords,
)
from wsi_core.hierarchy import Child, derive, level_folder
from wsi_core.patch_plan import PatchPlan
from wsi_core.process_list import AUTOGEN, ProcessList
from wsi_core.slide import Colour, Slide, fingerprint, open_slide
from wsi_core.slide_listing import slide_file

# The user's choices; the other parameters of a level are the input files.
_SETTINGS = ("stage", "levels", "patch_mpp", "patch_level", "patch_size", "output_size",
             "background")


@dataclass(frozen=True, kw_only=True)
class DerivePlan:
    """What all slides of a run share.

    save_dir: of the coarse grid; children: coarse to fine; redo: write again what is there
    """

    save_dir: Path
    children: tuple[Child, ...]
    redo: bool = False

    def folder(self, child: Child) -> Path:
        """Where a level goes."""
        return level_folder(self.save_dir, child)

    def h5_path(self, child: Child | None, slide_id: str) -> Path:
        """The coordinates of a level; of the coarse one for None."""
        folder = self.save_dir if child is None else self.folder(child)
        return folder / "patches" / f"{slide_id}.h5"


# ---------------------------------------------------------------------------- before the work

def prepare(plan: DerivePlan, names: Sequence[str], patching: PatchPlan) -> None:
    """Make the folders; ``Refused`` when one cannot be written, or holds a level made otherwise.

    names: slide files; patching: how the coarse grid of this run is made
    """
    coarse = _coarse(patching.patch_level, patching.patch_size * patching.custom_downsample,
                     patching.patch_size, patching.background, patching.patch_mpp)
    conflicts = []
    for index, child in enumerate(plan.children):
        for name in names if not plan.redo else ():
            path = plan.h5_path(child, Path(name).stem)
            found = recorded_parameters(path)
            wanted = _settings(plan.children[:index + 1], coarse)
            if found and _clash(found, wanted) and not _is_foreign(plan, Path(name).stem):
                conflicts.append(f"{path} made with other parameters: {_clash(found, wanted)}")
    if conflicts:
        more = f" ({len(conflicts) - 1} more files differ as well)" if len(conflicts) > 1 else ""
        raise Refused(f"there is {conflicts[0]}{more}. Give --no_auto_skip to redo them, or "
                      "another --save_dir")
    for child in plan.children:
        for folder in (plan.folder(child), plan.folder(child) / "patches"):
            writable_folder(folder, what="the folder of a finer level,")
        sweep_locks(plan.folder(child) / "patches")


def _coarse(patch_level: int, patch_size: int, output_size: int, background: Colour,
            patch_mpp: float | None) -> dict[str, Any]:
    """What the user chose for the coarse grid, which its finer levels record.

    By um per px, level and size read are the slide's affair.
    """
    chosen = {"output_size": output_size, "background": background}
    if patch_mpp is not None:
        return {"patch_mpp": patch_mpp, **chosen}
    return {"patch_level": patch_level, "patch_size": patch_size, **chosen}


def _settings(children: Sequence[Child], coarse: dict[str, Any]) -> dict[str, Any]:
    return {"stage": "child patches", "levels": [child.name for child in children], **coarse}


def _clash(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What the user chose differently then; "" when only the input files may have changed."""
    old, new = ({name: record.get(name) for name in _SETTINGS} for record in (found, wanted))
    return "" if canonical(old) == canonical(new) else differences(old, new)


def _is_foreign(plan: DerivePlan, slide_id: str) -> bool:
    """A coarse file of CLAM's is kept as it is, whatever this run's settings are."""
    path = plan.h5_path(None, slide_id)
    return path.exists() and not recorded_parameters(path)


# ---------------------------------------------------------------------------- the work

def derive_slides(plan: DerivePlan, listing: ProcessList, source: Path, report: RunReport, *,
                  workers: int, scheduler: str | None = None, deadline_s: float | None = None
                  ) -> None:
    """Make every level of every listed slide whose coarse coordinates are there.

    One row a slide and level goes into the report, and each level gets its process list.
    """
    if not plan.children:
        return
    lists = {child: listing.copy("no coordinates on the coarse level")
             for child in plan.children}
    failed = {row.item for row in report.rows if row.status in (Status.FAILED, Status.BUSY)}
    slides = [(name, slide_file(source, name, row)) for name, row in listing.rows.items()
              if name not in failed and plan.h5_path(None, Path(name).stem).exists()]
    try:
        for outcome in run_items(_derive_listed, slides, workers=workers, scheduler=scheduler,
                                 deadline_s=deadline_s, arguments={"plan": plan}):
            rows = outcome.result or [Row(item="", status=Status.FAILED, reason=outcome.error or "")
                                      for _ in plan.children]
            for child, row in zip(plan.children, rows, strict=True):
                name = outcome.item[0]
                lists[child].settle(name, row)
                report.add(Row(item=f"{name} [{child.name}]", status=row.status,
                               reason=row.reason, numbers=row.numbers,
                               seconds=outcome.seconds / len(rows)))
    finally:
        for child, derived in lists.items():
            derived.save(plan.folder(child) / AUTOGEN)


def _derive_listed(listed: tuple[str, Path], *, plan: DerivePlan) -> list[Row]:
    name, path = listed
    return derive_slide(path, plan=plan, name=name)


def derive_slide(slide_path: Path, *, plan: DerivePlan, name: str = "") -> list[Row]:
    """All levels of one slide, coarse to fine; a level that fails takes the finer ones along.

    name: the slide in the process list, "" = its file name
    Raises ``BrokenFile`` without usable coarse coordinates, SlideError without the slide.
    """
    name = name or slide_path.name
    slide_id = Path(name).stem
    parent = read_coords(plan.h5_path(None, slide_id))
    coarse = _coarse(parent.patch_level, parent.patch_size, parent.output_size, parent.background,
                     parent.parameters.get("patch_mpp"))
    rows: list[Row] = []
    with _Opened(slide_path) as slide:
        for index, child in enumerate(plan.children):
            wanted = {**_settings(plan.children[:index + 1], coarse), **fingerprint(slide_path),
                      "parent_sha256": coords_digest(parent.coords),
                      "parent_mpp_um": parent.mpp_um}
            try:
                row, parent = _level(slide, parent, child, wanted, plan.h5_path(child, slide_id),
                                     redo=plan.redo)
            except (ItemFailed, _Busy) as error:
                status = Status.BUSY if isinstance(error, _Busy) else Status.FAILED
                rows.append(Row(item=name, status=status, reason=str(error)))
                rows += [Row(item=name, status=status, reason=f"needs {child.name}, "
                             "which was not made") for _ in plan.children[index + 1:]]
                break
            rows.append(replace(row, item=name))
    return rows


class _Busy(Exception):
    """Another process works on the file."""


class _Opened(contextlib.ExitStack):
    """A slide that is opened when it is first needed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._slide: Slide | None = None

    def get(self) -> Slide:
        if self._slide is None:
            self._slide = self.enter_context(open_slide(self.path))
        return self._slide


def _level(slide: _Opened, parent: PatchCoords, child: Child, wanted: dict[str, Any],
           path: Path, *, redo: bool) -> tuple[Row, PatchCoords]:
    """Find or make one level of a slide, at ``path``."""
    with claim(path) as mine:
        if not mine:
            raise _Busy(f"{holder(path)} works on it")
        made = None if redo else _standing(path, wanted)
        status = Status.SKIPPED
        if made is None:
            made, status = derive(slide.get(), parent, child, parameters=wanted), Status.DONE
            mine.confirm()
            write_coords(path, made, save_path=str(path.parent))
    empty = not len(made)
    return Row(item=slide.path.name, status=Status.EMPTY if empty else status,
               reason="no patches on the coarse level" if empty else "",
               numbers={"n_patches": len(made)}), made


def _standing(path: Path, wanted: dict[str, Any]) -> PatchCoords | None:
    """The finished level, or None when it has to be made (anew, from changed files)."""
    if not path.exists():
        return None
    try:
        found = read_coords(path)
    except BrokenFile:
        return None
    if canonical(found.parameters) == canonical(wanted):
        return found
    if not found.parameters:
        raise ItemFailed(f"{path} was not made by this toolkit: give --no_auto_skip to replace it")
    if clash := _clash(found.parameters, wanted):
        raise ItemFailed(f"{path} was made with other parameters: {clash}: give --no_auto_skip to "
                         "redo it")
    return None
