"""wsi_core/artefacts.py: pens of several inks and colourless dirt, on synthetic and real slides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.slides import tissue_image
from wsi_core.artefacts import reject_artefacts, reject_pen
from wsi_core.segmenters import SEGMENTERS

INKS = {"green": (20, 110, 40), "pale green": (120, 190, 150), "teal": (30, 120, 110),
        "blue": (30, 50, 160), "bright blue": (60, 120, 220), "red": (200, 20, 30),
        "black": (25, 22, 28)}
# what haematoxylin, eosin and DAB look like at 8 um per px
STAINS = {"H&E": (170, 90, 160), "haematoxylin": (110, 115, 165),
          "dark haematoxylin": (75, 65, 135), "lymph node": (105, 75, 160),
          "eosin": (225, 120, 165), "blood": (190, 70, 90), "DAB": (140, 90, 60),
          "dark DAB": (95, 60, 40), "dense DAB": (60, 42, 30), "fold": (85, 40, 95)}
REAL = [("rat_kidney_he.jpg", 10.0), ("he_two_pieces.jpg", 12.0), ("tma_spots.jpg", 10.0)]


def draw_stroke(rgb: np.ndarray, colour: tuple[int, int, int], *, width_px: int = 30
                ) -> tuple[np.ndarray, np.ndarray]:
    """The image with a bent, opaque stroke of a pen across it, and where that is."""
    height, width = rgb.shape[:2]
    bends = np.array([(0.1, 0.2), (0.45, 0.5), (0.6, 0.35), (0.9, 0.85)]) * (width, height)
    mask = np.zeros((height, width), np.uint8)
    cv2.polylines(mask, [bends.astype(np.int32)], False, 1, width_px)
    inked = rgb.astype(float)
    inked[mask > 0] = colour
    inked += np.random.default_rng(0).normal(0, 2, rgb.shape)
    return np.clip(inked, 0, 255).astype(np.uint8), mask > 0


def stained(colour: tuple[int, int, int]) -> np.ndarray:
    """Coarse-grained tissue of a colour on glass, 600 x 600 px."""
    rng = np.random.default_rng(2)
    grain = cv2.resize(rng.normal(1, 0.1, (200, 200)), (600, 600), interpolation=cv2.INTER_CUBIC)
    image = np.full((600, 600, 3), 243.0)
    image[80:520, 80:520] = np.array(colour) * grain[80:520, 80:520, None]
    return np.clip(image, 0, 255).astype(np.uint8)


def real(shared: Path, file: str) -> np.ndarray:
    bgr = cv2.imread(str(shared / "data/overviews" / file))
    assert bgr is not None
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB))


def near(mask: np.ndarray, by_px: int = 12) -> np.ndarray:
    return np.asarray(cv2.dilate(mask.astype(np.uint8), np.ones((2 * by_px + 1,) * 2)) > 0)


# ---------------------------------------------------------------------------- pens

@pytest.mark.parametrize("ink", INKS)
def test_a_stroke_is_taken_off_and_the_tissue_stays(ink: str) -> None:
    rgb, stroke = draw_stroke(tissue_image(1024, 1024, seed=3), INKS[ink])
    found = reject_pen(rgb, mpp_um=8.0)
    assert found.dtype == bool and found.shape == stroke.shape
    assert found[stroke].mean() > 0.9
    assert found[~near(stroke)].mean() < 0.001


@pytest.mark.parametrize("ink", ["green", "blue", "red"])
def test_thin_ink_that_tissue_shines_through(ink: str) -> None:
    """Where the pen lifts, a stroke is pale; it goes with the part that is surely ink."""
    image = tissue_image(1024, 1024, seed=3)
    light = np.power(np.array(INKS[ink]) / 255, 0.6)  # what a thin film of it lets through
    thin = (image * light).astype(np.uint8)
    inked, stroke = draw_stroke(image, INKS[ink])
    rgb = np.where(stroke[..., None], thin, image)
    rgb = np.where((np.arange(1024) // 100 % 2 == 0)[None, :, None], inked, rgb)
    found = reject_pen(rgb, mpp_um=8.0)
    assert found[stroke].mean() > 0.85 and found[~near(stroke)].mean() < 0.01
    assert reject_pen(inked, mpp_um=8.0)[stroke].mean() > 0.95


def test_a_streaky_stroke_goes_whole() -> None:
    image = tissue_image(1024, 1024, seed=3)
    rgb, stroke = draw_stroke(image, INKS["black"])
    rgb[np.arange(1024) % 40 < 8] = image[np.arange(1024) % 40 < 8]
    assert reject_pen(rgb, mpp_um=8.0)[stroke].mean() > 0.93


@pytest.mark.parametrize("stain", STAINS)
def test_no_stain_is_taken_for_ink_or_dirt(stain: str) -> None:
    rgb = stained(STAINS[stain])
    for reject in (reject_pen, reject_artefacts):
        assert reject(rgb, mpp_um=8.0)[80:520, 80:520].mean() < 0.01, reject.__name__


@pytest.mark.parametrize(("file", "mpp_um"), REAL)
def test_real_tissue_without_pen_stays(file: str, mpp_um: float, shared: Path) -> None:
    rgb = real(shared, file)
    tissue = SEGMENTERS.get("stain")(rgb, mpp_um=mpp_um) >= 0.5
    assert reject_pen(rgb, mpp_um=mpp_um)[tissue].mean() < 0.01
    assert reject_artefacts(rgb, mpp_um=mpp_um)[tissue].mean() < 0.01


@pytest.mark.parametrize("ink", ["green", "blue", "red", "black"])
def test_strokes_over_a_real_overview(ink: str, shared: Path) -> None:
    rgb, stroke = draw_stroke(real(shared, "rat_kidney_he.jpg"), INKS[ink], width_px=24)
    found = reject_pen(rgb, mpp_um=10.0)
    assert found[stroke].mean() > 0.9 and found[~near(stroke)].mean() < 0.01


def test_real_pens(shared: Path) -> None:
    """A thumbnail full of green, red and black strokes, and a field with a thick red one."""
    rgb = real(shared, "diagnostic_thumb.png")
    found = reject_pen(rgb, mpp_um=40.0)
    red, green, blue = (rgb[:, :, channel].astype(int) for channel in range(3))
    assert found[green > red + 25].mean() > 0.9
    assert found[(red > 180) & (green < 60)].mean() > 0.9
    assert found[np.maximum(red, blue) < 60].mean() > 0.8
    assert found[250:300, 300:340].mean() < 0.2, "tissue between the strokes"
    found = reject_pen(real(shared, "tcga_red_pen.png"), mpp_um=4.0)
    assert found[150:300, 30:120].mean() > 0.95 and found[100:, 300:].mean() < 0.01


# ---------------------------------------------------------------------------- dirt

def test_dark_and_grey_without_stain_goes() -> None:
    clean = tissue_image(1024, 1024, seed=3)
    rgb = clean.copy()
    rgb[:, :40] = (6, 10, 26)  # a black border, tinted
    cv2.line(rgb, (60, 980), (1000, 960), (120, 122, 121), 5)  # the edge of a cover slip
    cv2.circle(rgb, (930, 90), 60, (95, 96, 98), 6)  # the rim of a bubble
    cv2.circle(rgb, (80, 80), 8, (60, 58, 60), -1)  # dust
    drawn = (rgb != clean).any(2)
    found = reject_artefacts(rgb, mpp_um=8.0)
    assert found.dtype == bool and found[drawn].mean() > 0.97
    assert found[~near(drawn, 6)].mean() < 0.001
    assert not reject_artefacts(clean, mpp_um=8.0).any()


def test_pens_are_no_dirt_and_dirt_is_no_pen() -> None:
    rgb, stroke = draw_stroke(tissue_image(1024, 1024, seed=3), INKS["green"])
    assert reject_artefacts(rgb, mpp_um=8.0)[stroke].mean() < 0.1
    rgb, stroke = draw_stroke(tissue_image(1024, 1024, seed=3), (150, 150, 150), width_px=8)
    assert reject_pen(rgb, mpp_um=8.0)[stroke].mean() < 0.1
    assert reject_artefacts(rgb, mpp_um=8.0)[stroke].mean() > 0.9


# ---------------------------------------------------------------------------- both

@pytest.mark.parametrize("reject", [reject_pen, reject_artefacts])
def test_any_scale_finds_the_same(reject: Callable[..., np.ndarray]) -> None:
    rgb, _ = draw_stroke(tissue_image(2048, 2048, seed=3), INKS["black"], width_px=60)
    masks = []
    for mpp_um in (2.0, 4.0, 8.0, 16.0):
        side = round(2048 * 4 / mpp_um)
        found = reject(cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA), mpp_um=mpp_um)
        masks.append(cv2.resize(found.astype(np.uint8), (2048, 2048),
                                interpolation=cv2.INTER_NEAREST) > 0)
    for mask in masks[1:]:
        assert (mask & masks[0]).sum() > 0.85 * (mask | masks[0]).sum()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 7)])
def test_any_size(shape: tuple[int, int]) -> None:
    for mpp_um in (None, 0.25, 8.0, 250.0):
        blank = np.full((*shape, 3), 243, np.uint8)
        for reject in (reject_pen, reject_artefacts):
            found = reject(blank, mpp_um=mpp_um)
            assert found.shape == shape and not found.any()
            assert reject(blank * 0, mpp_um=mpp_um).all()
