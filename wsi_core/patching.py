"""One slide from file to coordinates, mask and stitch: the work that a patching run spreads out.

The h5 is written last: it is the commit mark, so a slide whose h5 is complete has its pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import BrokenFile, ItemFailed, Refused
from utils.locks import claim
from utils.report import Row, Status
from utils.storage import canonical, differences, write_image
from wsi_core.coords import PatchCoords, read_coords, write_coords
from wsi_core.drawing import draw_mask, draw_stitch
from wsi_core.grid import patch_grid
from wsi_core.presets import SEGMENTATION_NAMES, PatchingParameters
from wsi_core.slide import (
    BLACK,
    Colour,
    Slide,
    best_level,
    fingerprint,
    nominal_downsample,
    open_slide,
    read_level,
)
from wsi_core.tissue import Tissue, segment_image

OVERVIEW_DOWNSAMPLE = 64.0  # automatic levels: the coarsest at most this far below level 0

# What decides coordinates; levels and thicknesses of pictures do not.
_DECISIVE = (*SEGMENTATION_NAMES, "use_padding", "contour_fn")


@dataclass(frozen=True, kw_only=True)
class PatchPlan:
    """What all slides of a run share.

    patch_size, step_size: px of ``patch_level`` after the custom downsample
    custom_downsample: read this many times larger patches and shrink them
    background: RGB of what lies outside the slide
    require_mpp: fail slides whose pixel size is unknown
    segment, make_patches, make_stitch: write ``masks/``, ``patches/``, ``stitches/``; patches
        need ``segment``
    redo: write again what is there
    single_thread: keep OpenCV to one thread, for several workers
    """

    save_dir: Path
    patch_size: int = 256
    step_size: int = 256
    patch_level: int = 0
    custom_downsample: int = 1
    background: Colour = BLACK
    require_mpp: bool = False
    segment: bool = True
    make_patches: bool = True
    make_stitch: bool = False
    redo: bool = False
    single_thread: bool = False


@dataclass(frozen=True, kw_only=True)
class PatchJob:
    """One slide of a run. ``mpp_um`` is the user's word on the pixel size of level 0."""

    slide_path: Path
    parameters: PatchingParameters
    mpp_um: float | None = None

    @property
    def slide_id(self) -> str:
        """File name without its last extension."""
        return self.slide_path.stem


class Left(Enum):
    """What is left to do on a slide."""

    EVERYTHING = "everything"
    STITCH = "the stitch"
    NOTHING = "nothing"
    CONFLICT = "made with other parameters"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a slide stands: what is left, why, and what its h5 tells for the process list."""

    left: Left
    why: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------- what is there

def h5_path(job: PatchJob, plan: PatchPlan) -> Path:
    """Where the slide's coordinates go."""
    return plan.save_dir / "patches" / f"{job.slide_id}.h5"


def wanted_parameters(
    job: PatchJob, plan: PatchPlan, *, seg_level: int, seg_level_auto: int
) -> dict[str, Any]:
    """Everything that determines the coordinates of a slide, for the record in its h5.

    ``seg_level`` is the level used, ``seg_level_auto`` the one that -1 stands for on this slide.
    Raises SlideError when the slide is not there.
    """
    return {
        "stage": "patches", **fingerprint(job.slide_path),
        "patch_size": plan.patch_size, "step_size": plan.step_size,
        "patch_level": plan.patch_level, "custom_downsample": plan.custom_downsample,
        "background": plan.background, "mpp_override": job.mpp_um,
        "seg_level": seg_level, "seg_level_auto": seg_level_auto,
        **{name: getattr(job.parameters, name) for name in _DECISIVE},
    }


def list_slides(source: Path) -> list[str]:
    """Names of the files directly in a folder, hidden ones left out; ``Refused`` when none."""
    try:
        names = sorted(path.name for path in source.iterdir()
                       if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise Refused(f"--source {source} cannot be read ({error.strerror}): give the folder "
                      "with the slides") from None
    if not names:
        raise Refused(f"--source {source} has no files: give the folder that holds the slides "
                      "themselves (sub-folders are not searched)")
    return names


def find_standing(job: PatchJob, plan: PatchPlan) -> Standing:
    """What is left to do on a slide. It is not opened: its h5 says what "automatic" was."""
    path = h5_path(job, plan)
    if plan.redo or not path.exists():
        return Standing(left=Left.EVERYTHING if plan.segment else Left.STITCH)
    try:
        found = read_coords(path)
    except BrokenFile as error:
        left = Left.EVERYTHING if plan.segment else Left.STITCH
        return Standing(left=left, why=str(error))
    if plan.make_patches and found.parameters:  # a CLAM file has none and counts as done
        automatic = int(found.parameters.get("seg_level_auto", -1))
        asked = job.parameters.seg_level
        wanted = wanted_parameters(job, plan, seg_level=asked if asked >= 0 else automatic,
                                   seg_level_auto=automatic)
        if canonical(found.parameters) != canonical(wanted):
            return Standing(left=Left.CONFLICT, why=differences(found.parameters, wanted))
    numbers: dict[str, Any] = {"n_patches": len(found)}
    if found.tissue is not None:
        numbers["n_contours"] = len(found.tissue.contours)
    picture = _stitch_path(job, plan)
    drawn = picture.exists() or picture.with_suffix(".png").exists()
    left = Left.STITCH if plan.make_stitch and len(found) and not drawn else Left.NOTHING
    return Standing(left=left, numbers=numbers)


def _stitch_path(job: PatchJob, plan: PatchPlan) -> Path:
    return plan.save_dir / "stitches" / f"{job.slide_id}.jpg"


# ---------------------------------------------------------------------------- the work

def patch_slide(job: PatchJob, *, plan: PatchPlan) -> Row:
    """Do what the plan asks of one slide.

    Raises ItemFailed (SlideError, BrokenFile) with one line that names the slide.
    """
    import cv2

    if plan.single_thread:
        cv2.setNumThreads(1)
    with claim(h5_path(job, plan)) as mine:
        if not mine:
            return Row(item=job.slide_path.name, status=Status.BUSY,
                       reason="another process works on it")
        standing = find_standing(job, plan)  # another process may have been here since
        if standing.left is Left.NOTHING:
            return Row(item=job.slide_path.name, status=Status.SKIPPED, numbers=standing.numbers)
        if standing.left is Left.CONFLICT:
            raise ItemFailed(f"{h5_path(job, plan)} was just made with other parameters: "
                             f"{standing.why}")
        with open_slide(job.slide_path) as slide:
            if standing.left is Left.STITCH:
                return _stitch_only(slide, job, plan)
            return _process(slide, job, plan)


def automatic_level(slide: Slide, level: int) -> int:
    """``level``, or for a negative one the coarsest level at most 64 times below level 0."""
    return level if level >= 0 else best_level(slide, OVERVIEW_DOWNSAMPLE)


class _Overviews:
    """Whole levels of a slide, each read once."""

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self._read: dict[int, tuple[np.ndarray, tuple[float, float]]] = {}

    def __getitem__(self, level: int) -> tuple[np.ndarray, tuple[float, float]]:
        if level not in self._read:
            self._read[level] = read_level(self.slide, level)
        return self._read[level]


def _process(slide: Slide, job: PatchJob, plan: PatchPlan) -> Row:
    slide_mpp = _pixel_size(slide, job, plan)
    seg_level = automatic_level(slide, job.parameters.seg_level)
    vis_level = automatic_level(slide, job.parameters.vis_level)
    if plan.patch_level >= len(slide.level_dimensions):
        raise ItemFailed(f"{slide.path}: has no level {plan.patch_level} to take patches from, "
                         f"only 0 to {len(slide.level_dimensions) - 1}: choose --patch_level")
    overviews = _Overviews(slide)
    tissue = segment_image(*overviews[seg_level], job.parameters)
    mask = draw_mask(*overviews[vis_level], tissue,
                     line_thickness=job.parameters.line_thickness)
    _write_picture(plan.save_dir / "masks" / f"{job.slide_id}.jpg", mask)
    numbers = {"seg_level": seg_level, "vis_level": vis_level,
             "n_contours": len(tissue.contours), "n_patches": "",
             "mpp_used": f"{sum(slide_mpp) / 2:.6g}" if slide_mpp else ""}
    if not plan.make_patches:
        if plan.make_stitch and h5_path(job, plan).exists():
            _stitch_only(slide, job, plan)
        return _result(tissue, numbers, None, job)
    patches = _grid(slide, tissue, slide_mpp, seg_level, job, plan)
    _stitch(overviews, patches, job, plan)
    write_coords(h5_path(job, plan), patches, save_path=str(plan.save_dir / "patches"))
    return _result(tissue, {**numbers, "n_patches": len(patches)}, patches, job)


def _pixel_size(slide: Slide, job: PatchJob, plan: PatchPlan) -> tuple[float, float] | None:
    """(x, y) um per level-0 px: the user's word, else the slide's own, else None."""
    if job.mpp_um is not None:
        return job.mpp_um, job.mpp_um
    if slide.mpp_um is None and plan.require_mpp:
        raise ItemFailed(f"{slide.path}: pixel size unknown "
                         f"({slide.mpp_problem or 'the file gives none'}): put um per pixel into "
                         "a column 'mpp' of the process list, or leave --require_mpp out")
    return slide.mpp_um


def _grid(slide: Slide, tissue: Tissue, slide_mpp: tuple[float, float] | None, seg_level: int,
          job: PatchJob, plan: PatchPlan) -> PatchCoords:
    """The slide's patches, with everything later stages want to know of them."""
    scale = tuple(map(nominal_downsample, slide.level_downsamples[plan.patch_level]))
    read_size = plan.patch_size * plan.custom_downsample
    step_size = plan.step_size * plan.custom_downsample
    coords = patch_grid(
        tissue, patch_px_l0=(read_size * scale[0], read_size * scale[1]),
        step_px_l0=(step_size * scale[0], step_size * scale[1]),
        slide_size=slide.level_dimensions[0], contour_fn=job.parameters.contour_fn,
        use_padding=job.parameters.use_padding)
    return PatchCoords(
        slide_id=job.slide_id, coords=coords, patch_size=read_size, patch_level=plan.patch_level,
        output_size=plan.patch_size,
        level_downsample=slide.level_downsamples[plan.patch_level],
        level_size=slide.level_dimensions[plan.patch_level],
        slide_size=slide.level_dimensions[0],
        footprint_px_l0=(round(read_size * scale[0]), round(read_size * scale[1])),
        step_px_l0=(round(step_size * scale[0]), round(step_size * scale[1])),
        mpp_um=None if slide_mpp is None else
        sum(slide_mpp) / 2 * sum(scale) / 2 * plan.custom_downsample,
        slide_mpp_um=slide_mpp, background=plan.background,
        parameters=wanted_parameters(job, plan, seg_level=seg_level,
                                     seg_level_auto=automatic_level(slide, -1)),
        tissue=tissue)


def _stitch(overviews: _Overviews, patches: PatchCoords, job: PatchJob, plan: PatchPlan) -> None:
    """Write the stitch, or take away one that shows coordinates which are now replaced."""
    path = _stitch_path(job, plan)
    if plan.make_stitch and len(patches):
        overview = overviews[best_level(overviews.slide, OVERVIEW_DOWNSAMPLE)]
        _write_picture(path, draw_stitch(*overview, patches.coords, patches.footprint_px_l0))
    else:
        path.unlink(missing_ok=True)
        path.with_suffix(".png").unlink(missing_ok=True)


def _write_picture(path: Path, image: np.ndarray) -> None:
    """Write a .jpg, or a .png where it is too large; an older one of the other kind goes."""
    written = write_image(path, image)
    for suffix in (".jpg", ".png"):
        if path.with_suffix(suffix) != written:
            path.with_suffix(suffix).unlink(missing_ok=True)


def _stitch_only(slide: Slide, job: PatchJob, plan: PatchPlan) -> Row:
    path = h5_path(job, plan)
    if not path.exists():
        raise ItemFailed(f"{path} is not there to stitch: run with --seg --patch first")
    patches = read_coords(path)
    _stitch(_Overviews(slide), patches, job, plan)
    return Row(item=job.slide_path.name, status=Status.DONE if len(patches) else Status.EMPTY,
               reason="" if len(patches) else "the coordinates file has no patches",
               numbers={"n_patches": len(patches)})


def _result(tissue: Tissue, numbers: dict[str, Any], patches: PatchCoords | None,
            job: PatchJob) -> Row:
    """Done, or empty with the reason why."""
    if tissue.contours and (patches is None or len(patches)):
        return Row(item=job.slide_path.name, status=Status.DONE, numbers=numbers)
    if tissue.contours:
        reason = (f"{len(tissue.contours)} pieces of tissue, but no patch lies in them: "
                  "try a smaller --patch_size or another contour_fn")
    elif tissue.n_too_small:
        reason = (f"no tissue: all {tissue.n_too_small} pieces are smaller than a_t "
                  f"({job.parameters.a_t:g} x 512 x 512 px): give a smaller a_t in a preset or the "
                  "process list")
    else:
        reason = "no tissue: nothing on the slide is coloured enough"
    return Row(item=job.slide_path.name, status=Status.EMPTY, reason=reason, numbers=numbers)
