"""benchmarks/tissue.py: the drawn masks are what their README says, and the scores are right."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.tissue import (
    DOUBTFUL,
    GLASS,
    IMAGES,
    INK,
    INK_ON_TISSUE,
    TISSUE,
    TRUTH,
    Way,
    agreement,
    at_scale,
    filtered,
    left_out,
    load_case,
    scores,
    ways,
)
from tests.tissue_models import SIDE, save_tiny_sam2

PLAIN = Way(name="plain", sureness=lambda rgb, mpp_um: rgb[:, :, 0] / 255)


def test_every_image_has_its_mask_of_known_labels() -> None:
    assert {path.stem for path in TRUTH.glob("*.png")} == set(IMAGES)
    for name in IMAGES:
        drawn = cv2.imread(str(TRUTH / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        assert drawn is not None and drawn.ndim == 2, name
        labels = set(np.unique(drawn).tolist())
        assert labels <= {GLASS, INK, DOUBTFUL, INK_ON_TISSUE, TISSUE} and TISSUE in labels, name


def test_the_second_drawing_fits_the_first() -> None:
    again = sorted((TRUTH / "second").glob("*.png"))
    assert {path.stem for path in again} == set(IMAGES) - {"cmu_1_macro"}
    for path in again:
        first, second = (cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
                         for file in (TRUTH / path.name, path))
        assert first is not None and second is not None
        assert first.shape == second.shape, path.stem
        assert (first != second).any() and agreement(first, second)[0] > 0.9, path.stem


@pytest.mark.parametrize("name", IMAGES)
def test_masks_have_the_shape_of_their_images(name: str, shared: Path) -> None:
    case = load_case(name, shared / "data")
    assert case.rgb.shape[:2] == case.truth.shape
    glass, tissue = (case.rgb[case.truth == label].mean() if (case.truth == label).any() else None
                     for label in (GLASS, TISSUE))
    assert tissue is not None
    if glass is not None and name != "cmu_1_macro":  # black holder
        assert tissue < glass - 5  # aligned: what was drawn is the darker part


def test_scores_leave_doubt_and_ink_on_tissue_out() -> None:
    truth = np.array([[TISSUE, TISSUE, GLASS, INK, DOUBTFUL, INK_ON_TISSUE]], np.uint8)
    found = np.array([[True, False, True, True, True, True]])
    assert scores(found, truth) == pytest.approx(
        {"IoU": 1 / 4, "F1": 2 / 5, "precision": 1 / 3, "recall": 1 / 2})
    assert scores(truth == TISSUE, truth)["F1"] == 1.0
    assert scores(np.zeros_like(found), truth)["F1"] == 0.0


def test_the_filter_drops_specks_and_keeps_islands_in_holes() -> None:
    mask = np.zeros((100, 100), bool)
    mask[10:90, 10:90] = True
    mask[20:80, 20:80] = False
    mask[40:60, 40:60] = True  # an island in the hole
    speck = mask.copy()
    speck[2:6, 2:6] = True
    speck[85:88, 85:88] = False  # too small a hole
    for given in (mask, speck):
        assert (filtered(given, PLAIN, None) != mask).mean() < 0.001


def test_left_out_takes_the_best_cut_of_the_others() -> None:
    # images 0, 1, 2 are cut at the second, first, first cut: 0.0, 0.9 and 0.2
    assert left_out([[1.0, 0.0], [0.9, 0.5], [0.2, 0.8]]) == "0.367"
    assert left_out([[], []]) == "-"


def test_agreement_counts_what_both_are_sure_of() -> None:
    first = np.array([[TISSUE, TISSUE, TISSUE, GLASS, TISSUE]], np.uint8)
    second = np.array([[TISSUE, GLASS, DOUBTFUL, INK, INK_ON_TISSUE]], np.uint8)
    assert agreement(first, second) == pytest.approx((2 / 3, 2 / 4))
    assert agreement(first, first) == (1.0, 0.0)


def test_a_known_finer_image_is_segmented_at_the_scale_asked_for() -> None:
    seen = []

    def note(rgb: np.ndarray, mpp_um: float | None) -> np.ndarray:
        seen.append((rgb.shape, mpp_um))
        return (rgb[:, :, 0] / 255).astype(np.float32)

    rgb = np.zeros((40, 80, 3), np.uint8)
    rgb[:, 40:] = 255
    for mpp_um in (2.0, 16.0, None):  # finer, coarser, unknown
        found = at_scale(note, 8.0)(rgb, mpp_um)
        assert found.shape == (40, 80) and (found == rgb[:, :, 0] / 255).all()
    assert seen == [((10, 20, 3), 8.0), ((40, 80, 3), 16.0), ((40, 80, 3), None)]


def test_sam2_is_scored_when_its_weights_are_given(tmp_path: Path) -> None:
    save_tiny_sam2(tmp_path)
    plain = {way.name for way in ways()}
    found = {way.name: way for way in ways(tmp_path)}
    assert set(found) - plain == {"sam2", "sam2 - pen", "sam2 - pen, artefacts"}
    sure = found["sam2"].sureness(np.full((SIDE, 2 * SIDE, 3), 200, np.uint8), None)
    assert sure.shape == (SIDE, 2 * SIDE) and 0 <= sure.min() <= sure.max() <= 1
