"""Finer levels of a slide's grid: every patch of a coarse level is tiled by r x r children.

Names of folders, order of children and row algebra are those of HAG-MIL (IJCAI 2023,
arXiv 2301.08125): the children of row p are the rows p * r * r ..., column after column. The ratio
r comes from the slide's real downsamples, not from an assumed factor of two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import ItemFailed, Refused
from wsi_core.coords import Descent, PatchCoords, coords_digest
from wsi_core.scale import MPP_TOLERANCE
from wsi_core.slide import LEVEL_TOLERANCE, Slide, best_level, nominal_downsample


@dataclass(frozen=True)
class Child:
    """A finer level, as the user names it: a pyramid level, or um per pixel."""

    level: int | None = None
    mpp_um: float | None = None

    @property
    def name(self) -> str:
        """``level_1`` or ``mpp_0.5``, as in names of folders."""
        return f"mpp_{self.mpp_um:g}" if self.level is None else f"level_{self.level}"


def wanted_children(child_levels: Sequence[int], child_mpp: Sequence[float]) -> tuple[Child, ...]:
    """The finer levels of ``--child_levels`` or ``--child_mpp``, coarse to fine.

    ``Refused`` when both are given, or the order is another.
    """
    if child_levels and child_mpp:
        raise Refused("--child_levels and --child_mpp name the finer levels in two ways: give one")
    for flag, values in (("--child_levels", child_levels), ("--child_mpp", child_mpp)):
        if list(values) != sorted(set(values), reverse=True):
            raise Refused(f"{flag} {' '.join(f'{value:g}' for value in values)}: expected coarse "
                          "to fine, each once, e.g. "
                          f"{' '.join(f'{value:g}' for value in sorted(set(values))[::-1])}")
    return (*(Child(level=level) for level in child_levels),
            *(Child(mpp_um=mpp_um) for mpp_um in child_mpp))


def level_folder(root: Path, child: Child) -> Path:
    """The folder of a finer level beside that of the coarse one.

    ``X_level_2`` and ``X`` both have ``X_level_1_corresponding``.
    """
    root = Path(root)
    if root.name in ("", ".."):
        root = root.resolve()
    return root.with_name(f"{re.sub(r'_level_[0-9]+$', '', root.name)}_{child.name}_corresponding")


def child_coords(parents: np.ndarray, *, ratio: int, step_px_l0: tuple[int, int]) -> np.ndarray:
    """(N * r * r, 2) corners of the children of (N, 2) parents, x outer and y inner.

    For r = 2: (x, y), (x, y + s), (x + s, y), (x + s, y + s). Level-0 px.
    """
    offsets = np.indices((ratio, ratio)).reshape(2, -1).T * np.asarray(step_px_l0, np.int64)
    children = np.asarray(parents, np.int64)[:, None, :] + offsets
    return children.reshape(-1, 2)


def derive(slide: Slide, parent: PatchCoords, child: Child, *,
           parameters: dict[str, Any]) -> PatchCoords:
    """The children of a slide's patches: they tile each parent exactly.

    What a child covers is read at its level (of ``--child_mpp``: the coarsest that is fine enough)
    and resized to the parent's ``output_size``. parameters: for the record of the file.
    Raises ``ItemFailed`` with the remedy when the slide has no such level, the ratio is no whole
    number, or parents cannot be divided.
    """
    if parent.parameters and parent.slide_size != slide.level_dimensions[0]:
        raise ItemFailed(f"{slide.path}: has {slide.level_dimensions[0]} px, but its coarse "
                         f"coordinates are of {parent.slide_size} px: make them anew with "
                         "--no_auto_skip")
    ratio = (_ratio_of_mpp if child.level is None else _ratio_of_levels)(slide, parent, child)
    step = _divided(slide, parent, ratio)
    level = _read_level(slide, parent, step) if child.level is None else child.level
    scale = tuple(map(nominal_downsample, slide.level_downsamples[level]))
    read_x, read_y = (round(side / factor) for side, factor in zip(step, scale, strict=True))
    if read_x != read_y:
        raise ItemFailed(f"{slide.path}: {child.name} would be read as {read_x} x {read_y} px, as "
                         "the axes of its levels differ in scale: use another level")
    coords = child_coords(parent.coords, ratio=ratio, step_px_l0=step)
    inside = np.all((coords < slide.level_dimensions[0]) & (coords + step > 0), axis=1)
    return PatchCoords(
        slide_id=parent.slide_id, coords=coords, patch_size=read_x, patch_level=level,
        output_size=parent.output_size, level_downsample=slide.level_downsamples[level],
        level_size=slide.level_dimensions[level], slide_size=slide.level_dimensions[0],
        footprint_px_l0=step, step_px_l0=step,
        mpp_um=None if parent.mpp_um is None else parent.mpp_um / ratio,
        slide_mpp_um=parent.slide_mpp_um, background=parent.background, parameters=parameters,
        descent=Descent(ratio=ratio, valid=inside,
                        parent_sha256=coords_digest(parent.coords)))


def _ratio_of_levels(slide: Slide, parent: PatchCoords, child: Child) -> int:
    level = child.level or 0
    if level >= len(slide.level_dimensions):
        raise ItemFailed(f"{slide.path}: has no level {level}, only 0 to "
                         f"{len(slide.level_dimensions) - 1}: choose other --child_levels")
    coarse, fine = parent.level_downsample, slide.level_downsamples[level]
    found = [nominal_downsample(above) / nominal_downsample(below)
             for above, below in zip(coarse, fine, strict=True)]
    ratio = round(found[0])
    if ratio < 2 or any(abs(value - ratio) > LEVEL_TOLERANCE * ratio for value in found):
        raise ItemFailed(
            f"{slide.path}: downsample {coarse[0]:.4g} x {coarse[1]:.4g} is {found[0]:.4g} x "
            f"{found[1]:.4g} times that of level {level}, expected a whole number from 2: choose "
            "other --child_levels or give --child_mpp")
    return ratio


def _ratio_of_mpp(slide: Slide, parent: PatchCoords, child: Child) -> int:
    asked = child.mpp_um or 0.0
    if parent.mpp_um is None:
        raise ItemFailed(f"{slide.path}: pixel size unknown, so --child_mpp cannot be met: put um "
                         "per pixel into a column 'mpp' of the process list (with --no_auto_skip), "
                         "or give --child_levels")
    found = parent.mpp_um / asked
    ratio = round(found)
    if ratio < 2 or abs(found - ratio) > MPP_TOLERANCE * ratio:
        raise ItemFailed(
            f"{slide.path}: the level above has {parent.mpp_um:.4g} um per px, {found:.4g} times "
            f"the {asked:g} of --child_mpp, expected a whole number from 2, give or take "
            f"{MPP_TOLERANCE:.0%}: choose such as {parent.mpp_um / max(2, ratio):.3g}")
    return ratio


def _divided(slide: Slide, parent: PatchCoords, ratio: int) -> tuple[int, int]:
    """(x, y) side of a child in level-0 px."""
    width, height = parent.footprint_px_l0
    if width % ratio or height % ratio:
        raise ItemFailed(f"{slide.path}: patches of {width} x {height} level-0 px cannot be "
                         f"divided into {ratio} x {ratio} equal children: choose a --patch_size "
                         f"that is a multiple of {ratio}")
    return width // ratio, height // ratio


def _read_level(slide: Slide, parent: PatchCoords, step_px_l0: tuple[int, int]) -> int:
    """The coarsest level that has at least as many pixels in a child as its output."""
    needed = sum(step_px_l0) / 2 / parent.output_size
    if needed < 1 - MPP_TOLERANCE:
        raise ItemFailed(f"{slide.path}: level 0 has pixels {1 / needed:.3g} times as large as "
                         "the finest --child_mpp asks for: leave that one out")
    return best_level(slide, needed)
