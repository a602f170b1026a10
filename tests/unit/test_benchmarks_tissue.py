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
    filtered,
    left_out,
    load_case,
    scores,
)

PLAIN = Way(name="plain", sureness=lambda rgb, mpp_um: rgb[:, :, 0] / 255)


def test_every_image_has_its_mask_of_known_labels() -> None:
    assert {path.stem for path in TRUTH.glob("*.png")} == set(IMAGES)
    for name in IMAGES:
        drawn = cv2.imread(str(TRUTH / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        assert drawn is not None and drawn.ndim == 2, name
        labels = set(np.unique(drawn).tolist())
        assert labels <= {GLASS, INK, DOUBTFUL, INK_ON_TISSUE, TISSUE} and TISSUE in labels, name


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
