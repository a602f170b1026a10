"""What an extraction run has to do: the slides of each level, and which of them are done before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.extraction import Work
from datasets.feature_files import feature_parameters, inspect_features, mend_pt
from datasets.patches import SlidePatches, item_name
from utils.errors import ItemFailed, Refused
from utils.report import Row, RunReport, Status
from utils.storage import State, differences
from wsi_core.coords import read_coords
from wsi_core.hierarchy import Child, level_folder
from wsi_core.slide import Backend, fingerprint


@dataclass(frozen=True, kw_only=True)
class Level:
    """The folders of one level. name: "" for the coarse (or only) one, else ``level_1``"""

    name: str
    coords_dir: Path
    feat_dir: Path


def list_levels(data_h5_dir: Path, feat_dir: Path, children: Sequence[Child]) -> list[Level]:
    """The coarse level and its finer ones, by the names of their folders.

    ``Refused`` when the coordinates of a finer level were never made.
    """
    levels = [Level(name="", coords_dir=data_h5_dir / "patches", feat_dir=feat_dir)]
    for child in children:
        folder = level_folder(data_h5_dir, child)
        if not (folder / "patches").is_dir():
            flag, value = (("child_mpp", f"{child.mpp_um:g}") if child.level is None else
                           ("child_levels", child.level))
            raise Refused(f"there is no folder {folder / 'patches'}: run create_patches_fp.py "
                          f"--seg --patch --save_dir {data_h5_dir} with --{flag} {value}")
        levels.append(Level(name=child.name, coords_dir=folder / "patches",
                            feat_dir=level_folder(feat_dir, child)))
    return levels


def plan_works(
    slides: Mapping[str, Path], levels: Sequence[Level], report: RunReport, *,
    encoder: Mapping[str, Any], backend: Backend, redo: bool, allow_dropped: bool,
) -> list[Work]:
    """What is to be encoded, slide by slide; the rest goes into the report at once.

    slides: id -> file. ``Refused`` when finished features were made with other settings.
    """
    works, clashes = [], []
    for slide_id, path in slides.items():
        above = ""
        for level in levels:
            try:
                work = _plan_slide(slide_id, path, level, encoder=encoder, backend=backend,
                                   above=above)
            except ItemFailed as error:
                report.add(Row(item=item_name(slide_id, level.name), status=Status.FAILED,
                               reason=str(error)))
                above = ""
                continue
            above = work.parameters["coords_sha256"]
            if redo or (settled := _settle(work, allow_dropped=allow_dropped)) is None:
                works.append(work)
            elif isinstance(settled, Row):
                report.add(settled)
            else:
                clashes.append(f"{level.feat_dir} holds other features, {slide_id}: {settled}")
    if clashes:
        more = f" (and {len(clashes) - 1} more)" if len(clashes) > 1 else ""
        raise Refused(f"{clashes[0]}{more}: give another --feat_dir, or --no_auto_skip to make "
                      "them anew")
    return works


def _plan_slide(slide_id: str, slide_path: Path, level: Level, *, encoder: Mapping[str, Any],
                backend: Backend, above: str) -> Work:
    """One slide's work on one level; ``ItemFailed`` without usable coordinates or slide file.

    above: digest of the coordinates of the level above; "" when there is none to compare with
    """
    path = level.coords_dir / f"{slide_id}.h5"
    if not path.exists():
        raise ItemFailed(f"{path} is missing: run create_patches_fp.py --seg --patch"
                         + (" with the same finer levels" if level.name else ""))
    coords = read_coords(path)
    if above and (coords.descent is None or coords.descent.parent_sha256 != above):
        raise ItemFailed(f"{path} does not come from the coordinates of the level above: run "
                         "create_patches_fp.py again with the same finer levels")
    patches = SlidePatches(
        slide_id=slide_id, slide_path=slide_path, coords=coords.coords,
        patch_level=coords.patch_level, patch_size=coords.patch_size,
        output_size=coords.output_size, background=coords.background, backend=backend,
        level=level.name)
    return Work(patches=patches, feat_dir=level.feat_dir, mpp_um=coords.mpp_um,
                footprint_px_l0=coords.footprint_px_l0, descent=coords.descent,
                parameters=feature_parameters(coords, encoder=encoder,
                                              slide=fingerprint(slide_path)))


def _settle(work: Work, *, allow_dropped: bool) -> Row | str | None:
    """None: to be encoded. A row: done before (a lost pt is mended). A text: made otherwise."""
    finding = inspect_features(work.feat_dir, work.slide_id, work.parameters,
                               allow_dropped=allow_dropped)
    if finding.state is State.FOREIGN:
        return "not made by this toolkit, so it is unknown with which encoder"
    if finding.state is State.OTHER and finding.other_settings:
        return differences(finding.found, finding.changed)
    if finding.state is not State.DONE:
        return None  # missing, broken, or the slide or its coordinates have changed since
    if not finding.pt_sound:
        mend_pt(work.feat_dir, work.slide_id)
    empty = finding.rows == 0
    return Row(item=work.patches.name, status=Status.EMPTY if empty else Status.SKIPPED,
               reason="no patches" if empty else "" if finding.pt_sound else
               "pt file made anew from the h5", numbers={"n_patches": finding.rows, "n_dropped": 0})
