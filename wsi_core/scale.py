"""Physical scale: what is read from a slide so that a patch has the wanted um per pixel.

Geometry comes from the pixel size of level 0, never from a nominal magnification: slides of
0.25 and 0.274 um are both called "40x", and patches of equal pixels then differ by 10 % in side.
``10 / magnification`` is only a shorthand for um per px, as microscopes count it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from utils.errors import ItemFailed
from wsi_core.slide import Slide, nominal_downsample

MPP_TOLERANCE = 0.05  # by which a level may be coarser than asked for: it is enlarged by so much
UM_PER_MAGNIFICATION = 10.0  # um per px at 1x

Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class PatchScale:
    """How the user wants patches: by pyramid level (CLAM), or by um per px when that is given.

    patch_px, step_px: of the patch as it comes out; custom_downsample: read so many times larger
    patches of ``patch_level`` and shrink them
    divide_by: the footprint is so many times a whole number of level-0 px, for finer levels
    """

    patch_px: int = 256
    step_px: int = 256
    patch_level: int = 0
    custom_downsample: int = 1
    mpp_um: float | None = None
    divide_by: int = 1


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the patches of one slide are read.

    level, read_px: pyramid level and side of the square read there; output_px: after resizing
    footprint_px_l0, step_px_l0: (x, y) side and step in level-0 px, not rounded
    mpp_um: of the output as it really is (whole pixels are read), None when unknown
    """

    level: int
    read_px: int
    output_px: int
    footprint_px_l0: Pair
    step_px_l0: Pair
    mpp_um: float | None


def plan_reading(slide: Slide, scale: PatchScale, slide_mpp: Pair | None) -> Reading:
    """The level, and what is read of it. slide_mpp: (x, y) um per level-0 px, None when unknown.

    Raises ItemFailed: no such level, unknown pixel size, or a slide that is too coarse.
    """
    if scale.mpp_um is None:
        return _by_level(slide, scale, slide_mpp)
    if slide_mpp is None:
        raise ItemFailed(unknown_mpp(slide))
    own_mpp = sum(slide_mpp) / 2
    side_l0 = scale.mpp_um / own_mpp  # level-0 px of one px of the output
    if side_l0 < 1 - MPP_TOLERANCE:
        raise ItemFailed(
            f"{slide.path}: has {own_mpp:.4g} um per pixel, too coarse for patches of "
            f"{scale.mpp_um:.4g} um (more than {MPP_TOLERANCE:.0%} enlarging): leave it out of the "
            "process list, or ask for a larger --patch_mpp")
    factors = [sum(map(nominal_downsample, pair)) / 2 for pair in slide.level_downsamples]
    fine_enough = [level for level, factor in enumerate(factors)
                   if factor <= side_l0 * (1 + MPP_TOLERANCE)]
    level = max(fine_enough, key=factors.__getitem__, default=0)
    unit = _unit(factors[level], scale.divide_by)
    read_px = max(1, round(scale.patch_px * side_l0 / factors[level] / unit)) * unit
    footprint = read_px * factors[level]
    step = scale.step_px * side_l0
    return Reading(level=level, read_px=read_px, output_px=scale.patch_px,
                   footprint_px_l0=(footprint, footprint), step_px_l0=(step, step),
                   mpp_um=footprint * own_mpp / scale.patch_px)


def _unit(factor: float, divide_by: int) -> int:
    """The smallest number of pixels of a level whose side at level 0 is a multiple."""
    return divide_by // gcd(int(factor), divide_by) if factor == int(factor) else 1


def _by_level(slide: Slide, scale: PatchScale, slide_mpp: Pair | None) -> Reading:
    if scale.patch_level >= len(slide.level_dimensions):
        raise ItemFailed(f"{slide.path}: has no level {scale.patch_level} to take patches from, "
                         f"only 0 to {len(slide.level_dimensions) - 1}: choose --patch_level")
    x, y = map(nominal_downsample, slide.level_downsamples[scale.patch_level])
    read, step = (side * scale.custom_downsample for side in (scale.patch_px, scale.step_px))
    return Reading(
        level=scale.patch_level, read_px=read, output_px=scale.patch_px,
        footprint_px_l0=(read * x, read * y), step_px_l0=(step * x, step * y),
        mpp_um=None if slide_mpp is None else
        sum(slide_mpp) / 2 * (x + y) / 2 * scale.custom_downsample)


def unknown_mpp(slide: Slide) -> str:
    """The line for a slide that must have a pixel size and has none."""
    return (f"{slide.path}: pixel size unknown ({slide.mpp_problem or 'the file gives none'}): put "
            "um per pixel into a column 'mpp' of the process list or into --mpp_csv"
            + (f", or give --mpp_from_objective ({slide.objective_power:g}x)"
               if slide.objective_power else ""))


def objective_mpp(power: float) -> float:
    """um per px of a nominal magnification: 0.25 for 40x."""
    return UM_PER_MAGNIFICATION / power
