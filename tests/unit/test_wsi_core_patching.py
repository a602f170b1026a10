"""One slide's work: how it stands before, what the record holds, and how it ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from utils.errors import ItemFailed
from utils.report import Status
from wsi_core.find_tissue import automatic_level
from wsi_core.outputs import OutputPlan
from wsi_core.patch_plan import Left, PatchJob, PatchPlan, find_standing
from wsi_core.patching import patch_slide
from wsi_core.presets import PatchingParameters
from wsi_core.slide import open_slide

PARAMETERS = PatchingParameters(a_t=1, a_h=1)


@pytest.fixture
def job(slide_folder: Path) -> PatchJob:
    return PatchJob(slide_path=slide_folder / "slide_0.tif", parameters=PARAMETERS)


@pytest.fixture
def plan(tmp_path: Path) -> PatchPlan:
    for name in ("patches", "masks", "stitches"):
        (tmp_path / name).mkdir()
    return PatchPlan(save_dir=tmp_path)


def test_standing_before_and_after(job: PatchJob, plan: PatchPlan) -> None:
    assert find_standing(job, plan).left is Left.EVERYTHING
    assert find_standing(job, replace(plan, segment=False, make_patches=False,
                                      outputs=OutputPlan(save_dir=plan.save_dir, stitch=True))
                         ).left is Left.EXTRAS
    result = patch_slide(job, plan=plan)
    assert result.status is Status.DONE
    standing = find_standing(job, plan)
    assert standing.left is Left.NOTHING
    assert standing.numbers == {name: result.numbers[name] for name in ("n_patches", "n_contours")}
    stitch = OutputPlan(save_dir=plan.save_dir, stitch=True)
    assert find_standing(job, replace(plan, outputs=stitch)).left is Left.EXTRAS
    assert find_standing(job, replace(plan, redo=True)).left is Left.EVERYTHING
    assert patch_slide(job, plan=plan).status is Status.SKIPPED


@pytest.mark.parametrize("changes", [
    {"sthresh": 9}, {"mthresh": 5}, {"close": 3}, {"use_otsu": True}, {"keep_ids": (0,)},
    {"exclude_ids": (0,)}, {"a_t": 1.5}, {"a_h": 2.0}, {"max_n_holes": 1}, {"use_padding": False},
    {"contour_fn": "basic"}, {"seg_level": 0}])
def test_whatever_decides_coordinates_is_compared(changes: dict[str, Any], job: PatchJob,
                                                  plan: PatchPlan) -> None:
    patch_slide(job, plan=plan)
    other = replace(job, parameters=replace(PARAMETERS, **changes))
    standing = find_standing(other, plan)
    assert standing.left is Left.CONFLICT and f"{next(iter(changes))}: file has" in standing.why
    with pytest.raises(ItemFailed, match="was just made with other parameters"):
        patch_slide(other, plan=plan)


@pytest.mark.parametrize("changes", [
    {"vis_level": 1}, {"line_thickness": 9}, {"white_thresh": 9}, {"black_thresh": 9},
    {"seg_level": 2}])  # 2 is what "automatic" means on this slide
def test_whatever_does_not_is_not(changes: dict[str, Any], job: PatchJob, plan: PatchPlan) -> None:
    patch_slide(job, plan=plan)
    other = replace(job, parameters=replace(PARAMETERS, **changes))
    assert find_standing(other, plan).left is Left.NOTHING


def test_segmenting_alone_looks_at_no_parameters_and_leaves_the_h5(job: PatchJob, plan: PatchPlan
                                                                   ) -> None:
    patch_slide(job, plan=plan)
    raw = plan.coords_path(job.slide_id).read_bytes()
    masks_only = replace(plan, make_patches=False, patch_size=999)
    assert find_standing(job, masks_only).left is Left.NOTHING
    again = patch_slide(job, plan=replace(masks_only, redo=True, outputs=OutputPlan(
        save_dir=plan.save_dir, stitch=True)))
    assert again.status is Status.DONE and plan.coords_path(job.slide_id).read_bytes() == raw
    assert (plan.save_dir / "stitches/slide_0.jpg").exists()


def test_single_thread_changes_no_coordinate(job: PatchJob, plan: PatchPlan) -> None:
    import cv2

    patch_slide(job, plan=plan)
    raw = plan.coords_path(job.slide_id).read_bytes()
    threads = cv2.getNumThreads()
    try:
        patch_slide(job, plan=replace(plan, single_thread=True, redo=True))
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(threads)
    assert plan.coords_path(job.slide_id).read_bytes() == raw


def test_automatic_level_is_the_coarsest_up_to_64(job: PatchJob) -> None:
    with open_slide(job.slide_path) as slide:
        assert automatic_level(slide, -1) == 2 and automatic_level(slide, 0) == 0
