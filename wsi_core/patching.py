"""One slide from file to coordinates, mask and stitch: the work that a patching run spreads out.

The h5 is written last: it is the commit mark, so a slide whose h5 is complete has its pictures.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import ItemFailed, SlideError
from utils.faults import fault_point
from utils.locks import Claim, claim, holder
from utils.report import Row, Status
from wsi_core.coords import PatchCoords, read_coords, write_coords
from wsi_core.drawing import draw_mask
from wsi_core.find_tissue import (
    Overviews,
    automatic_level,
    find_tissue,
)
from wsi_core.grid import patch_grid
from wsi_core.lattice import enough_tissue, global_lattice
from wsi_core.outputs import write_picture
from wsi_core.patch_plan import (
    Left,
    PatchJob,
    PatchPlan,
    find_standing,
    wanted_image,
    wanted_parameters,
)
from wsi_core.scale import Reading, objective_mpp, plan_reading, unknown_mpp
from wsi_core.slide import (
    WHITE,
    Slide,
    fingerprint,
    objective_disagrees,
    open_slide,
    stamp,
)
from wsi_core.tissue import Tissue

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
            raise ItemFailed(f"{standing.what} of {job.slide_id} was just made with other "
                             f"parameters: {standing.why}")
        fault_point(f"patching.open.{job.slide_id}")
        with open_slide(job.slide_path) as slide:
            if standing.left is Left.EXTRAS:
                return _extras_only(Overviews(slide), job, plan)
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
            numbers |= _make_image(overviews, tissue, job, plan)
        elif plan.beside.pictures:
            numbers |= _extras_only(overviews, job, plan, tissue=tissue).numbers
        return _result(tissue, numbers, None, job, note)
    patches = place_patches(slide, tissue, reading, slide_mpp, job, plan)
    plan.beside.clear(job.slide_id, drawn=drawn)
    plan.beside.make(overviews, patches, plan.beside.missing(job.slide_id, patches))
    numbers |= _make_image(overviews, tissue, job, plan)
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
        if (plan.require_mpp or plan.patch_mpp is not None
                or plan.beside.slide_image is not None):
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


def _extras_only(overviews: Overviews, job: PatchJob, plan: PatchPlan, *,
                 tissue: Tissue | None = None) -> Row:
    """What is missing beside the coordinates; tissue: as found in this run, if it was."""
    path = plan.coords_path(job.slide_id)
    if not path.exists():
        raise ItemFailed(f"{path} is not there to draw: run with --seg --patch first")
    patches = read_coords(path)
    check_made_from(job.slide_path, patches, path)
    if plan.redo:
        plan.beside.clear(job.slide_id, drawn=plan.search.contours_path(job.slide_id))
    plan.beside.make(overviews, patches, plan.beside.missing(job.slide_id, patches))
    image = _make_image(overviews, tissue, job, plan)
    return Row(item=job.listed_as, status=Status.DONE if len(patches) else Status.EMPTY,
               reason="" if len(patches) else "the coordinates file has no patches",
               numbers={"n_patches": len(patches), **image})


def _make_image(overviews: Overviews, tissue: Tissue | None, job: PatchJob, plan: PatchPlan
                ) -> dict[str, Any]:
    """The image of the slide where it is asked for and not there; its size for the report.

    Its tissue is that of this run's parameters, found now unless it was before.
    """
    images, slide = plan.beside.slide_image, overviews.slide
    if images is None:
        return {}
    slide_mpp, _ = pixel_size(slide, job, plan)
    assert slide_mpp is not None
    parameters = wanted_image(job, plan, automatic_level(slide, -1))
    record = None if plan.redo else images.found(job.slide_id)
    if record is None:
        if tissue is None:
            tissue = find_tissue(overviews, job.slide_id, job.parameters, plan.search,
                                 slide_mpp=slide_mpp)
        record = images.make(slide, job.slide_id, tissue, slide_mpp=slide_mpp,
                             parameters=parameters)
    return {} if record is None else {"image_px": "{}x{}".format(*record.size_px)}


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
