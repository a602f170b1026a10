"""What an extraction run has to do: the slides of each level under each encoder, and which of them
are done before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets.extraction import Work, labelled
from datasets.feature_files import (
    StorageType,
    feature_parameters,
    inspect_features,
    mend_pt,
)
from datasets.feature_layouts import encoder_label
from datasets.patches import SlidePatches, item_name
from utils.errors import ItemFailed, Refused
from utils.parallel import available_cpus, run_items
from utils.report import Row, RunReport, Status
from utils.storage import State, differences
from wsi_core.coords import PatchCoords, coords_digest, read_coords
from wsi_core.hierarchy import Child, level_folder
from wsi_core.layouts import Layout, find_coords, with_best_level
from wsi_core.slide import Backend, fingerprint, open_slide


@dataclass(frozen=True, kw_only=True)
class Level:
    """The folders of one level. name: "" for the coarse (or only) one, else ``level_1``

    coords_root: as ``--data_h5_dir``
    """

    name: str
    coords_root: Path
    feat_dir: Path

    def encoder_dir(self, encoder: str, layout: Layout) -> Path:
        """Where features go: of several encoders (``encoder`` is not "") in CLAM's layout, which
        has no place for names, each has a folder."""
        return self.feat_dir / encoder_label(encoder) if layout == "clam" else self.feat_dir


def list_levels(data_h5_dir: Path, feat_dir: Path, children: Sequence[Child]) -> list[Level]:
    """The coarse level and its finer ones, by the names of their folders.

    ``Refused`` when the coordinates of a finer level were never made.
    """
    levels = [Level(name="", coords_root=data_h5_dir, feat_dir=feat_dir)]
    for child in children:
        folder = level_folder(data_h5_dir, child)
        if not (folder / "patches").is_dir():
            flag, value = (("child_mpp", f"{child.mpp_um:g}") if child.level is None else
                           ("child_levels", child.level))
            raise Refused(f"there is no folder {folder / 'patches'}: run create_patches_fp.py "
                          f"--seg --patch --save_dir {data_h5_dir} with --{flag} {value}")
        levels.append(Level(name=child.name, coords_root=folder,
                            feat_dir=level_folder(feat_dir, child)))
    return levels


def report_order(slides: Sequence[str], levels: Sequence[Level], encoders: Sequence[str]
                 ) -> dict[str, int]:
    """Name of an item in the report -> its place: by level, then slide, then encoder."""
    names = (labelled(item_name(slide_id, level.name), encoder)
             for level in levels for slide_id in slides for encoder in encoders)
    return {name: place for place, name in enumerate(names)}


def plan_works(
    slides: Mapping[str, Path], levels: Sequence[Level], report: RunReport, *,
    encoders: Mapping[str, Mapping[str, Any]], backend: Backend, redo: bool, allow_dropped: bool,
    layout: Layout = "clam", storage_dtype: StorageType = "float32",
) -> list[Work]:
    """What is to be encoded, slide by slide; the rest goes into the report at once.

    slides: id -> file; encoders: name ("" for the only one) -> its record
    ``Refused`` when finished features were made with other settings.
    """
    works, clashes = [], []
    for slide_id, level, found in _read_all(slides, levels, backend):
        name = item_name(slide_id, level.name)
        if isinstance(found, str):
            report.extend(Row(item=labelled(name, encoder), status=Status.FAILED, reason=found)
                          for encoder in encoders)
            continue
        base = _work(found, slide_id, slides[slide_id], level, backend)
        for encoder, record in encoders.items():
            work = replace(
                base, encoder=encoder, layout=layout, feat_dir=level.encoder_dir(encoder, layout),
                parameters=feature_parameters(found.coords, encoder=record, slide=found.slide,
                                              storage_dtype=storage_dtype))
            if redo or (settled := _settle(work, allow_dropped=allow_dropped)) is None:
                works.append(work)
            elif isinstance(settled, Row):
                report.add(settled)
            else:
                clashes.append(f"{work.feat_dir} holds other features, {slide_id}: {settled}")
    if clashes:
        more = f" (and {len(clashes) - 1} more)" if len(clashes) > 1 else ""
        raise Refused(f"{clashes[0]}{more}: give another --feat_dir, or --no_auto_skip to make "
                      "them anew")
    return works


@dataclass(frozen=True)
class _Found:
    """Coordinates of a slide on a level, their file, and the slide's fingerprint."""

    coords: PatchCoords
    path: Path
    slide: dict[str, Any]


def _read_all(slides: Mapping[str, Path], levels: Sequence[Level], backend: Backend
              ) -> Iterator[tuple[str, Level, _Found | str]]:
    """Every slide and level with its coordinates, or why they cannot be used."""
    found: list[tuple[str, Level, _Found | str]] = []
    for slide_id, path in slides.items():
        above = ""
        for level in levels:
            try:
                here = _read(slide_id, path, level, above=above)
                above = coords_digest(here.coords.coords)
                found.append((slide_id, level, here))
            except ItemFailed as error:
                above = ""
                found.append((slide_id, level, str(error)))
    free = [(index, slides[slide_id], one.coords) for index, (slide_id, _, one) in enumerate(found)
            if not isinstance(one, str) and one.coords.level_free]
    for outcome in run_items(_choose_level, free, workers=min(available_cpus(), 8),
                             arguments={"backend": backend}):
        slide_id, level, one = found[outcome.item[0]]
        assert isinstance(one, _Found)
        found[outcome.item[0]] = (slide_id, level, outcome.error or "" if outcome.result is None
                                  else replace(one, coords=outcome.result))
    return iter(found)


def _read(slide_id: str, slide_path: Path, level: Level, *, above: str) -> _Found:
    """``ItemFailed`` without usable coordinates or slide file.

    above: digest of the coordinates of the level above; "" when there is none to compare with
    """
    path = find_coords(level.coords_root, slide_id)
    if not path.exists():
        raise ItemFailed(f"{path} is missing: run create_patches_fp.py --seg --patch"
                         + (" with the same finer levels" if level.name else ""))
    coords = read_coords(path)
    if above and (coords.descent is None or coords.descent.parent_sha256 != above):
        raise ItemFailed(f"{path} does not come from the coordinates of the level above: run "
                         "create_patches_fp.py again with the same finer levels")
    return _Found(coords, path, fingerprint(slide_path))


def _choose_level(item: tuple[int, Path, PatchCoords], *, backend: Backend) -> PatchCoords:
    """Coordinates of another tool that name no level to read, with one (in a child process)."""
    _, path, coords = item
    with open_slide(path, backend=backend) as slide:
        return with_best_level(coords, slide)


def _work(found: _Found, slide_id: str, slide_path: Path, level: Level, backend: Backend) -> Work:
    """What is the same for every encoder."""
    coords = found.coords
    patches = SlidePatches(
        slide_id=slide_id, slide_path=slide_path, coords=coords.coords,
        patch_level=coords.patch_level, patch_size=coords.patch_size,
        output_size=coords.output_size, background=coords.background, backend=backend,
        level=level.name)
    return Work(patches=patches, feat_dir=level.feat_dir, mpp_um=coords.mpp_um, parameters={},
                footprint_px_l0=coords.footprint_px_l0, descent=coords.descent,
                coords_path=found.path)


def _settle(work: Work, *, allow_dropped: bool) -> Row | str | None:
    """None: to be encoded. A row: done before (a lost pt is mended). A text: made otherwise."""
    finding = inspect_features(work.feat_dir, work.slide_id, work.parameters,
                               allow_dropped=allow_dropped, layout=work.layout)
    if finding.state is State.FOREIGN:
        return "not made by this toolkit, so it is unknown with which encoder"
    if finding.state is State.OTHER and finding.other_settings:
        return differences(finding.found, finding.changed)
    if finding.state is not State.DONE:
        return None  # missing, broken, or the slide or its coordinates have changed since
    if not finding.pt_sound:
        mend_pt(work.feat_dir, work.slide_id)
    empty = finding.rows == 0
    return Row(item=work.name, status=Status.EMPTY if empty else Status.SKIPPED,
               reason="no patches" if empty else "" if finding.pt_sound else
               "pt file made anew from the h5", numbers={"n_patches": finding.rows, "n_dropped": 0})
