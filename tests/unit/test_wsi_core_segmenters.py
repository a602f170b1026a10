"""wsi_core/segmenters.py and glass.py: synthetic slides with known tissue, and real overviews."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.slides import tissue_image
from utils.errors import Refused
from wsi_core.glass import closed, glass_colour
from wsi_core.segmenters import SEGMENTERS

NAMES = ("entropy", "otsu", "stain")
GLASS = 243  # of tissue_image


def segment(name: str, rgb: np.ndarray, mpp_um: float | None = 8.0) -> np.ndarray:
    return SEGMENTERS.get(name)(rgb, mpp_um=mpp_um) >= 0.5


def truth(rgb: np.ndarray) -> np.ndarray:
    """Where ``tissue_image`` drew tissue."""
    drawn = np.where((rgb != GLASS).any(2), np.uint8(255), np.uint8(0))
    return np.asarray(cv2.morphologyEx(drawn, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8)) > 0)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union."""
    return float((first & second).sum() / (first | second).sum())


def paled(rgb: np.ndarray, strength: float, glass: tuple[int, int, int], noise: float = 1.5
          ) -> np.ndarray:
    """The picture with so much of its stain, on other glass, with a camera's noise."""
    light = 1 - strength * (1 - rgb / float(GLASS))
    shot = np.random.default_rng(1).normal(0, noise, rgb.shape)
    return np.clip(light * glass + shot, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return tissue_image(1024, 1024, seed=3)


def test_the_registry_names_them_and_refuses_others() -> None:
    assert tuple(SEGMENTERS) == NAMES
    with pytest.raises(Refused, match="unknown segmenter 'stian': did you mean 'stain'"):
        SEGMENTERS.get("stian")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mpp_um", [8.0, None])
def test_tissue_is_found_to_the_pixel(name: str, mpp_um: float | None, image: np.ndarray) -> None:
    before = image.copy()
    sure = SEGMENTERS.get(name)(image, mpp_um=mpp_um)
    assert sure.shape == image.shape[:2] and sure.dtype == np.float32
    assert sure.min() >= 0 and sure.max() <= 1
    assert overlap(sure >= 0.5, truth(image)) > 0.97
    assert np.array_equal(sure, SEGMENTERS.get(name)(image, mpp_um=mpp_um)), "deterministic"
    assert np.array_equal(image, before)


def test_an_unknown_scale_is_taken_for_8_um(image: np.ndarray) -> None:
    for name in NAMES:
        known = SEGMENTERS.get(name)(image, mpp_um=8.0)
        assert np.array_equal(SEGMENTERS.get(name)(image, mpp_um=None), known)
        assert not np.array_equal(SEGMENTERS.get(name)(image, mpp_um=20.0), known)


@pytest.mark.parametrize("glass", [(243, 243, 243), (215, 213, 218), (240, 232, 200)])
@pytest.mark.parametrize(("name", "strength"), [("otsu", 0.3), ("entropy", 0.2), ("stain", 0.15)])
def test_faint_stain_on_any_glass(name: str, strength: float, glass: tuple[int, int, int],
                                  image: np.ndarray) -> None:
    assert overlap(segment(name, paled(image, strength, glass)), truth(image)) > 0.95


def test_our_best_sees_fainter_stain_than_otsu(image: np.ndarray) -> None:
    """Stain of an eighth of the usual strength: the tissue is 10 grey levels below the glass."""
    faint = paled(image, 0.12, (243, 243, 243))
    assert overlap(segment("stain", faint), truth(image)) > 0.9
    assert overlap(segment("otsu", faint), truth(image)) < 0.5


@pytest.mark.parametrize(("name", "noise"), [
    *((name, noise) for name in NAMES for noise in (0, 2, 5)), ("stain", 8)])
@pytest.mark.parametrize("colour", [(243, 243, 243), (255, 255, 255), (215, 213, 218),
                                    (240, 232, 200), (0, 0, 0), (14, 12, 15)])
def test_a_blank_slide_is_empty(name: str, colour: tuple[int, int, int], noise: float) -> None:
    shot = np.random.default_rng(0).normal(0, noise, (300, 400, 3))
    blank = np.clip(np.array(colour) + shot, 0, 255).astype(np.uint8)
    assert not segment(name, blank).any()


@pytest.mark.parametrize("name", NAMES)
def test_uneven_light_is_no_tissue(name: str) -> None:
    falling = np.linspace(244, 205, 600).astype(np.uint8)
    blank = np.repeat(np.repeat(falling[None, :, None], 400, 0), 3, 2)
    assert segment(name, blank).mean() < (0.02 if name == "stain" else 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_black_borders_and_unscanned_white_are_no_tissue(name: str, image: np.ndarray) -> None:
    """As MIRAX slides have: a grey field of scanned glass in what the file fills."""
    grey = paled(image, 1.0, (222, 220, 226))
    for fill in (0, 255):
        framed = cv2.copyMakeBorder(grey, 200, 200, 200, 200, cv2.BORDER_CONSTANT,
                                    value=(fill,) * 3)
        found = segment(name, framed)
        assert overlap(found[200:-200, 200:-200], truth(image)) > 0.93
        found[200:-200, 200:-200] = False
        assert found.mean() < 0.001


@pytest.mark.parametrize("name", ["otsu", "stain"])
def test_a_field_full_of_tissue_is_all_tissue(name: str) -> None:
    grain = np.random.default_rng(0).integers(0, 60, (100, 100, 3)).repeat(4, 0).repeat(4, 1)
    assert segment(name, (np.array([170, 90, 160]) + grain).astype(np.uint8)).mean() > 0.99


def test_fat_is_tissue_for_our_best() -> None:
    """Thin pale walls around clear cells of 64 um, which a threshold of colour cannot fill."""
    walls = np.full((400, 400, 3), GLASS, np.uint8)
    for x in range(100, 301, 8):
        cv2.line(walls, (x, 100), (x, 300), (226, 196, 216), 1)
        cv2.line(walls, (100, x), (300, x), (226, 196, 216), 1)
    assert segment("stain", walls)[100:301, 100:301].mean() > 0.97
    assert segment("stain", walls).sum() < 1.15 * 201 ** 2
    assert segment("otsu", walls)[100:301, 100:301].mean() < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_a_higher_threshold_finds_less(name: str, image: np.ndarray) -> None:
    sure = SEGMENTERS.get(name)(paled(image, 0.25, (243, 243, 243)), mpp_um=8.0)
    found = [int((sure >= threshold).sum()) for threshold in (0.1, 0.5, 0.9)]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("name", NAMES)
def test_every_scale_finds_the_same(name: str, image: np.ndarray) -> None:
    fine = tissue_image(2048, 2048, seed=3)
    masks = []
    for mpp_um in (2.0, 4.0, 8.0, 16.0):
        side = round(2048 * 4 / mpp_um)
        rgb = cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA)
        mask = segment(name, rgb, mpp_um).astype(np.uint8)
        assert mask.shape == (side, side)
        masks.append(cv2.resize(mask, (2048, 2048), interpolation=cv2.INTER_NEAREST) > 0)
    assert all(overlap(*pair) > 0.95 for pair in combinations(masks, 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 7), (2, 2000)])
def test_any_size_and_scale(name: str, shape: tuple[int, int]) -> None:
    for mpp_um in (None, 0.25, 8.0, 250.0):
        for colour in (GLASS, 0):
            sure = SEGMENTERS.get(name)(np.full((*shape, 3), colour, np.uint8), mpp_um=mpp_um)
            assert sure.shape == shape and not sure.any()


def test_a_view_that_cannot_be_written_or_is_not_contiguous_will_do(image: np.ndarray) -> None:
    view = np.ascontiguousarray(image[:, :, ::-1])[:, ::-1, ::-1]
    view.flags.writeable = False
    for name in NAMES:
        assert np.array_equal(segment(name, view), segment(name, image[:, ::-1].copy()))


# ---------------------------------------------------------------------------- the glass

def test_glass_is_the_brightest_common_grey(image: np.ndarray) -> None:
    assert np.allclose(glass_colour(image), GLASS, atol=1)
    assert np.allclose(glass_colour(paled(image, 1, (222, 220, 226))), (222, 220, 226), atol=2)
    assert np.allclose(glass_colour(paled(image, 1, (240, 232, 200))), (240, 232, 200), atol=3)
    pale = np.full((200, 200, 3), (225, 214, 222), np.uint8)
    pale[:, :60] = (241, 240, 242)  # less than the tissue
    assert np.allclose(glass_colour(pale), (241, 240, 242), atol=1)
    pale[:, :10] = 255  # filled by the scanner's file
    assert np.allclose(glass_colour(pale), (241, 240, 242), atol=1)
    assert np.allclose(glass_colour(np.full((9, 9, 3), 255, np.uint8)), 255)


def test_a_gap_at_the_border_is_no_gap() -> None:
    mask = np.zeros((60, 60), np.uint8)
    mask[10:50, 3:20] = mask[10:50, 25:40] = 255
    filled = closed(mask, 72.0, 8.0)
    assert (filled[16:44, 20:25] == 255).all() and not filled[:, :3].any()


# ---------------------------------------------------------------------------- real overviews

@pytest.mark.parametrize(("file", "mpp_um", "least", "most"), [
    ("rat_kidney_he.jpg", 10.0, 0.60, 0.69), ("he_two_pieces.jpg", 12.0, 0.39, 0.46),
    ("tma_spots.jpg", 10.0, 0.07, 0.11)])
def test_real_overviews(file: str, mpp_um: float, least: float, most: float, shared: Path) -> None:
    """Shares of tissue that drawing by hand allows; three ways of looking agree about it."""
    bgr = cv2.imread(str(shared / "data/overviews" / file))
    assert bgr is not None
    rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    found = {name: segment(name, rgb, mpp_um) for name in NAMES}
    assert least < found["stain"].mean() < most
    assert overlap(found["stain"], found["entropy"]) > 0.6
    assert overlap(found["stain"], found["otsu"]) > 0.6


def test_a_cleft_that_opens_to_the_glass_stays_open() -> None:
    """48 um wide, so the closing bridges it; colourless, so it is given back."""
    slabs = np.full((300, 300, 3), GLASS, np.uint8)
    slabs[50:250, 60:140] = slabs[50:250, 146:240] = (200, 120, 170)
    found = segment("stain", slabs)
    assert found[60:240, 70:130].all() and found[60:240, 156:230].all()
    assert not found[60:240, 142:144].any()
