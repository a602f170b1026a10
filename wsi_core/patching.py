"""One slide from file to coordinates, mask and stitch: the work that a patching run spreads out.

The h5 is written last: it is the commit mark, so a slide whose h5 is complete has its pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils.errors import BrokenFile, ItemFailed, SlideError
from utils.faults import fault_point
from utils.locks import Claim, claim, holder
from utils.report import Row, Status
from utils.storage import canonical, differences
from wsi_core.coords import PatchCoords, read_coords, write_coords
from wsi_core.drawing import draw_mask
from wsi_core.find_tissue import Overviews, TissueSearch, automatic_level, find_tissue
from wsi_core.grid import patch_grid
from wsi_core.lattice import enough_tissue, global_lattice
from wsi_core.layouts import Layout, coords_path
from wsi_core.outputs import OutputPlan, write_picture
from wsi_core.presets import SEGMENTATION_NAMES, PatchingParameters
from wsi_core.scale import PatchScale, Reading, objective_mpp, plan_reading, unknown_mpp
from wsi_core.slide import (
    BLACK,
    WHITE,
    Colour,
    Slide,
    fingerprint,
    objective_disagrees,
    open_slide,
    stamp,
)
from wsi_core.tissue import Tissue

# What decides coordinates; levels and thicknesses of pictures do not.
_DECISIVE = (*SEGMENTATION_NAMES, "use_padding", "contour_fn")


@dataclass(frozen=True, kw_only=True)
class PatchPlan:
    """What all slides of a run share.

    patch_size, step_size: px of ``patch_level`` after the custom downsample, or of ``patch_mpp``
    custom_downsample: read this many times larger patches and shrink them
    patch_mpp: um per px of a patch; None = patches are taken from ``patch_level``
    divide_by: with patch_mpp, its level-0 side is a multiple of this, for finer levels
    lattice: a grid for each piece of tissue (CLAM), or one for the slide
    min_tissue: share of a patch that must be tissue; 0 = as the contour rule says
    white_thresh, black_thresh: leave out patches that are glass or black, see pixel_filters
    background: RGB of what lies outside the slide
    require_mpp: fail slides whose pixel size is unknown; mpp_from_objective: take 10 / objective
        power for it then
    segment, make_patches: write ``masks/``, ``patches/``; patches need ``segment``
    search: how tissue is found; outputs: what is made beside; layout: of the h5
    redo: write again what is there
    single_thread: keep OpenCV to one thread, for several workers
    """

    save_dir: Path
    patch_size: int = 256
    step_size: int = 256
    patch_level: int = 0
    custom_downsample: int = 1
    patch_mpp: float | None = None
    divide_by: int = 1
    lattice: Literal["contour", "global"] = "contour"
    min_tissue: float = 0.0
    white_thresh: int | None = None
    black_thresh: int | None = None
    background: Colour = BLACK
    require_mpp: bool = False
    mpp_from_objective: bool = False
    segment: bool = True
    make_patches: bool = True
    search: TissueSearch = TissueSearch()
    outputs: OutputPlan | None = None
    layout: Layout = "clam"
    redo: bool = False
    single_thread: bool = False

    @property
    def scale(self) -> PatchScale:
        """How patches are wanted."""
        return PatchScale(patch_px=self.patch_size, step_px=self.step_size,
                          patch_level=self.patch_level, mpp_um=self.patch_mpp,
                          divide_by=self.divide_by, custom_downsample=self.custom_downsample)

    @property
    def beside(self) -> OutputPlan:
        """The outputs beside the coordinates, possibly none."""
        return self.outputs or OutputPlan(save_dir=self.save_dir)

    def coords_path(self, slide_id: str) -> Path:
        """Where a slide's coordinates go."""
        return coords_path(self.save_dir, slide_id, self.layout, mpp_um=self.patch_mpp,
                           patch_px=self.patch_size, patch_level=self.patch_level,
                           custom_downsample=self.custom_downsample,
                           overlap_px=max(0, self.patch_size - self.step_size))


@dataclass(frozen=True, kw_only=True)
class PatchJob:
    """One slide of a run. ``mpp_um`` is the user's word on the pixel size of level 0.

    name: the slide as the process list calls it, "" = its file name
    """

    slide_path: Path
    parameters: PatchingParameters
    mpp_um: float | None = None
    name: str = ""

    @property
    def listed_as(self) -> str:
        """The slide's name in the process list and the report."""
        return self.name or self.slide_path.name

    @property
    def slide_id(self) -> str:
        """That name without its last extension; names the slide's files."""
        return Path(self.listed_as).stem


class Left(Enum):
    """What is left to do on a slide."""

    EVERYTHING = "everything"
    EXTRAS = "pictures and exports"
    NOTHING = "nothing"
    CONFLICT = "made with other parameters"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a slide stands: what is left, why, and what its h5 tells for the process list."""

    left: Left
    why: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------- what is there

def wanted_parameters(
    job: PatchJob, plan: PatchPlan, *, seg_level: int, seg_level_auto: int
) -> dict[str, Any]:
    """Everything that determines the coordinates of a slide, for the record in its h5.

    ``seg_level`` is the level used, ``seg_level_auto`` the one that -1 stands for on this slide.
    What goes beyond CLAM's settings is there only when it is used. Raises SlideError when the
    slide is not there.
    """
    plain = PatchPlan(save_dir=plan.save_dir)
    beyond = ("patch_mpp", "divide_by", "lattice", "min_tissue", "white_thresh", "black_thresh",
              "mpp_from_objective", "layout")
    return {
        "stage": "patches", **fingerprint(job.slide_path),
        "patch_size": plan.patch_size, "step_size": plan.step_size,
        "patch_level": plan.patch_level, "custom_downsample": plan.custom_downsample,
        "background": plan.background, "mpp_override": job.mpp_um,
        "seg_level": seg_level, "seg_level_auto": seg_level_auto,
        **{name: getattr(job.parameters, name) for name in _DECISIVE},
        **{name: getattr(plan, name) for name in beyond
           if getattr(plan, name) != getattr(plain, name)},
        **plan.search.parameters(job.slide_id),
    }


def find_standing(job: PatchJob, plan: PatchPlan) -> Standing:
    """What is left to do on a slide. It is not opened: its h5 says what "automatic" was."""
    path = plan.coords_path(job.slide_id)
    if plan.redo or not path.exists():
        return Standing(left=Left.EVERYTHING if plan.segment else Left.EXTRAS)
    try:
        found = read_coords(path)
    except BrokenFile as error:
        left = Left.EVERYTHING if plan.segment else Left.EXTRAS
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
    left = Left.EXTRAS if plan.beside.missing(job.slide_id, found) else Left.NOTHING
    return Standing(left=left, numbers=numbers)


# ---------------------------------------------------------------------------- the work

def patch_slide(job: PatchJob, *, plan: PatchPlan) -> Row:
    """Do what the plan asks of one slide.

    Raises ItemFailed (SlideError, BrokenFile) with one line that names the slide.
    """
    import cv2

    if plan.single_thread:
        cv2.setNumThreads(1)
    path = plan.coords_path(job.slide_id)
    with claim(path) as mine:
        if not mine:
            return Row(item=job.listed_as, status=Status.BUSY,
                       reason=f"{holder(path)} works on it")
        standing = find_standing(job, plan)  # another process may have been here since
        if standing.left is Left.NOTHING:
            return Row(item=job.listed_as, status=Status.SKIPPED, numbers=standing.numbers)
        if standing.left is Left.CONFLICT:
            raise ItemFailed(f"{path} was just made with other parameters: {standing.why}")
        fault_point(f"patching.open.{job.slide_id}")
        with open_slide(job.slide_path) as slide:
            if standing.left is Left.EXTRAS:
                return _extras_only(slide, job, plan)
            return _process(slide, job, plan, mine)


def _process(slide: Slide, job: PatchJob, plan: PatchPlan, mine: Claim) -> Row:
    before = stamp(job.slide_path)
    slide_mpp, note = pixel_size(slide, job, plan)
    reading = plan_reading(slide, plan.scale, slide_mpp)
    overviews = Overviews(slide)
    tissue = find_tissue(overviews, job.slide_id, job.parameters, plan.search,
                         slide_mpp=slide_mpp)
    vis_level = automatic_level(slide, job.parameters.vis_level)
    write_picture(plan.save_dir / "masks" / f"{job.slide_id}.jpg", draw_mask(
        *overviews.level(vis_level), tissue, line_thickness=job.parameters.line_thickness))
    numbers = {"seg_level": automatic_level(slide, job.parameters.seg_level),
               "vis_level": vis_level, "n_contours": len(tissue.contours), "n_patches": "",
               "mpp_used": f"{sum(slide_mpp) / 2:.6g}" if slide_mpp else ""}
    drawn = plan.search.contours_path(job.slide_id)
    if not plan.make_patches:
        if not plan.coords_path(job.slide_id).exists():
            bare = place_patches(slide, Tissue(), reading, slide_mpp, job, plan)
            plan.beside.make(overviews, replace(bare, tissue=tissue), plan.beside.outlines(
                job.slide_id, redo=plan.redo, drawn=drawn))
        elif plan.beside.pictures:
            _extras_only(slide, job, plan)
        return _result(tissue, numbers, None, job, note)
    patches = place_patches(slide, tissue, reading, slide_mpp, job, plan)
    plan.beside.clear(job.slide_id, drawn=drawn)
    plan.beside.make(overviews, patches, plan.beside.missing(job.slide_id, patches))
    if stamp(job.slide_path) != before:
        raise SlideError(f"{job.slide_path}: was replaced while it was read: run the same command "
                         "again")
    mine.confirm()
    write_coords(plan.coords_path(job.slide_id), patches, layout=plan.layout,
                 slide_path=job.slide_path)
    return _result(tissue, {**numbers, "n_patches": len(patches)}, patches, job, note)


def pixel_size(slide: Slide, job: PatchJob, plan: PatchPlan
               ) -> tuple[tuple[float, float] | None, str]:
    """(x, y) um per level-0 px and a note for the report.

    The user's word, else the slide's own, else that of its objective if the plan says so, else
    None. Raises ItemFailed when it is needed and unknown.
    """
    if job.mpp_um is not None:
        mpp: tuple[float, float] | None = (job.mpp_um, job.mpp_um)
    elif slide.mpp_um is None and plan.mpp_from_objective and slide.objective_power:
        mpp_um = objective_mpp(slide.objective_power)
        return (mpp_um, mpp_um), (f"pixel size taken for {mpp_um:g} um, as the objective is "
                                  f"{slide.objective_power:g}x")
    else:
        mpp = slide.mpp_um
    if mpp is None:
        if plan.require_mpp or plan.patch_mpp is not None:
            raise ItemFailed(unknown_mpp(slide))
        return None, ""
    return mpp, objective_disagrees(slide, sum(mpp) / 2)


def place_patches(slide: Slide, tissue: Tissue, reading: Reading,
                  slide_mpp: tuple[float, float] | None, job: PatchJob, plan: PatchPlan, *,
                  by_pixels: bool = True) -> PatchCoords:
    """The slide's patches, with everything later stages want to know of them.

    by_pixels: read them where the plan leaves out white or black ones
    """
    footprint = (round(reading.footprint_px_l0[0]), round(reading.footprint_px_l0[1]))
    patches = PatchCoords(
        slide_id=job.slide_id, coords=_corners(slide, tissue, reading, job, plan),
        patch_size=reading.read_px, patch_level=reading.level, output_size=reading.output_px,
        level_downsample=slide.level_downsamples[reading.level],
        level_size=slide.level_dimensions[reading.level], slide_size=slide.level_dimensions[0],
        footprint_px_l0=footprint,
        step_px_l0=(round(reading.step_px_l0[0]), round(reading.step_px_l0[1])),
        mpp_um=reading.mpp_um, slide_mpp_um=slide_mpp, background=plan.background,
        objective_power=slide.objective_power,
        parameters=wanted_parameters(
            job, plan, seg_level=automatic_level(slide, job.parameters.seg_level),
            seg_level_auto=automatic_level(slide, -1)),
        tissue=tissue)
    if not by_pixels or (plan.white_thresh is None and plan.black_thresh is None):
        return patches
    from wsi_core.patch_images import keep_by_pixels

    keep = keep_by_pixels(slide, patches, white_thresh=plan.white_thresh,
                          black_thresh=plan.black_thresh)
    return replace(patches, coords=patches.coords[keep])


def _corners(slide: Slide, tissue: Tissue, reading: Reading, job: PatchJob, plan: PatchPlan
             ) -> np.ndarray:
    """(N, 2) level-0 px by the lattice that the plan asks for."""
    size = slide.level_dimensions[0]
    if plan.lattice == "global":
        return global_lattice(
            tissue, patch_px_l0=reading.footprint_px_l0, step_px_l0=reading.step_px_l0,
            slide_size=size, min_tissue=plan.min_tissue, pad=plan.background == WHITE)
    coords = patch_grid(
        tissue, patch_px_l0=reading.footprint_px_l0, step_px_l0=reading.step_px_l0,
        slide_size=size, contour_fn=job.parameters.contour_fn,
        use_padding=job.parameters.use_padding)
    if plan.min_tissue <= 0:
        return coords
    dense: np.ndarray = coords[enough_tissue(
        coords, tissue, patch_px_l0=reading.footprint_px_l0, slide_size=size,
        min_tissue=plan.min_tissue)]
    return dense


def check_made_from(slide_path: Path, patches: PatchCoords, coords_path: Path) -> None:
    """Raise ItemFailed when the coordinates are of another slide than the one that lies there now;
    a file of CLAM's does not say."""
    record = patches.parameters
    if any(record.get(name, value) != value for name, value in fingerprint(slide_path).items()):
        raise ItemFailed(f"{slide_path}: is not the slide that {coords_path} was made from: run "
                         "with --seg --patch --no_auto_skip")


def _extras_only(slide: Slide, job: PatchJob, plan: PatchPlan) -> Row:
    path = plan.coords_path(job.slide_id)
    if not path.exists():
        raise ItemFailed(f"{path} is not there to draw: run with --seg --patch first")
    patches = read_coords(path)
    check_made_from(job.slide_path, patches, path)
    if plan.redo:
        plan.beside.clear(job.slide_id, drawn=plan.search.contours_path(job.slide_id))
    plan.beside.make(Overviews(slide), patches, plan.beside.missing(job.slide_id, patches))
    return Row(item=job.listed_as, status=Status.DONE if len(patches) else Status.EMPTY,
               reason="" if len(patches) else "the coordinates file has no patches",
               numbers={"n_patches": len(patches)})


def _result(tissue: Tissue, numbers: dict[str, Any], patches: PatchCoords | None,
            job: PatchJob, note: str) -> Row:
    """Done, or empty with the reason why."""
    if tissue.contours and (patches is None or len(patches)):
        return Row(item=job.listed_as, status=Status.DONE, numbers=numbers, reason=note)
    if tissue.contours:
        reason = (f"{len(tissue.contours)} pieces of tissue, but no patch lies in them: "
                  "try a smaller --patch_size, another contour_fn or a smaller --min_tissue")
    elif tissue.n_too_small:
        reason = (f"no tissue: all {tissue.n_too_small} pieces are smaller than a_t "
                  f"({job.parameters.a_t:g} x 512 x 512 px) or --min_area_um2: give a smaller one "
                  "in a preset or the process list")
    else:
        reason = "no tissue: nothing on the slide is coloured enough"
    return Row(item=job.listed_as, status=Status.EMPTY, reason=reason, numbers=numbers)
