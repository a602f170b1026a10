"""Overlays: right places at any scale, AtlasPatch's colours, size limits."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from wsi_core.coords import PatchCoords
from wsi_core.overlays import (
    CONTOUR_COLOUR,
    HOLE_COLOUR,
    draw_contours,
    draw_grid,
    draw_mask_bw,
    draw_mask_overlay,
    grid_facts,
    shrink,
)
from wsi_core.tissue import Tissue

SLIDE = (10_007, 6_011)  # (w, h): no downsample below is a whole number
BOX = np.array([[2000, 1500], [8000, 1500], [8000, 5000], [2000, 5000]], np.int32)
HOLE = np.array([[4000, 2500], [6000, 2500], [6000, 4000], [4000, 4000]], np.int32)
TISSUE = Tissue([BOX], [[HOLE]])


def overview(width: int, height: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Grey, the whole slide."""
    return (np.full((height, width, 3), 200, np.uint8),
            (SLIDE[0] / width, SLIDE[1] / height))


def grid(coords: list[tuple[int, int]], side: int = 512) -> PatchCoords:
    return PatchCoords(
        slide_id="s", coords=np.array(coords, np.int64).reshape(-1, 2), patch_size=side,
        patch_level=0, output_size=256, level_downsample=(1.0, 1.0), level_size=SLIDE,
        slide_size=SLIDE, footprint_px_l0=(side, side), step_px_l0=(side, side), mpp_um=0.5)


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    y, x = np.nonzero(mask)
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


@pytest.mark.parametrize("size", [(625, 375), (641, 388), (1301, 780), (5003, 3005)])
def test_mask_is_where_the_tissue_is_at_any_scale(size: tuple[int, int]) -> None:
    """Not a pixel off, also after the picture was made smaller (AtlasPatch's request 21)."""
    mask = draw_mask_bw(*overview(*size), TISSUE)
    height, width = mask.shape
    assert max(width, height) == min(1024, max(size))
    scale = np.array([SLIDE[0] / width, SLIDE[1] / height])
    corners = np.floor(np.array([[2000, 1500], [8000, 5000]]) / scale).astype(int)
    assert bounds(mask > 0) == (*corners[0], *corners[1])
    inside = (np.array([5000, 3200]) / scale).astype(int)
    assert mask[inside[1], inside[0]] == 0 and set(np.unique(mask)) == {0, 255}


def test_contours_are_red_and_holes_blue_with_their_widths() -> None:
    picture = draw_contours(*overview(1001, 601), TISSUE)
    red, blue = ((picture == colour).all(axis=2) for colour in (CONTOUR_COLOUR, HOLE_COLOUR))
    assert CONTOUR_COLOUR == (255, 0, 0) and HOLE_COLOUR == (0, 0, 255)
    x0, y0, x1, y1 = bounds(blue)
    assert (x0, y0, x1, y1) == (400, 249, 600, 399)  # 4000 / 9.997 and so on
    assert blue[300].sum() == 2 and 4 <= red[300].sum() <= 6  # 1 px and 2 px wide, twice
    assert (picture[300, 300] == 200).all() and (picture[50, 50] == 200).all()


def test_mask_overlay_tints_tissue_and_nothing_else() -> None:
    image, downsample = overview(1001, 601)
    picture = draw_mask_overlay(image, downsample, TISSUE)
    changed = (picture != image).any(axis=2)
    assert np.array_equal(changed, draw_mask_bw(image, downsample, TISSUE) > 0)
    alpha = 80 / 255
    assert picture[300, 300].tolist() == [round(200 * (1 - alpha)),
                                          round(200 * (1 - alpha) + 255 * alpha),
                                          round(200 * (1 - alpha))]
    assert (image == 200).all()  # a copy


def test_piece_inside_a_hole_of_another_piece_is_tissue() -> None:
    island = np.array([[4800, 3000], [5200, 3000], [5200, 3500], [4800, 3500]], np.int32)
    for order in (1, -1):
        tissue = Tissue([BOX, island][::order], [[HOLE], []][::order])
        assert draw_mask_bw(*overview(1001, 601), tissue)[325, 500] == 255


def test_rectangles_lie_on_the_patches_also_on_fractional_scales() -> None:
    """Dark pixels of the picture are just those that cover borders of patches."""
    image, downsample = overview(611, 367)  # 16.4 times smaller
    coords = [(5000, 3000), (5512, 3000), (9800, 5700)]  # the last one leaves the slide
    picture = draw_grid(image, downsample, grid(coords))
    dark = (picture[:len(image)] == 0).all(axis=2)  # below it is the text
    expected = np.zeros_like(dark)
    for x, y in coords:
        x0, x1 = (int(value / downsample[0]) for value in (x, x + 511))
        y0, y1 = (int(value / downsample[1]) for value in (y, y + 511))
        ring = np.zeros((y1 + 1, x1 + 1), np.uint8)
        cv2.rectangle(ring, (x0, y0), (x1, y1), 1, 1)
        part = expected[:y1 + 1, :x1 + 1]
        part |= ring[:part.shape[0], :part.shape[1]] > 0
    assert expected.sum() > 150 and np.array_equal(dark, expected)


def test_text_below_says_what_the_grid_is() -> None:
    patches = grid([(5000, 3000)] * 7)
    assert grid_facts(patches) == [
        "patches: 7", "slide: 10007 x 6011 px", "patch: 256 px at 0.5 um/px",
        "on level 0: 512 x 512 px", "step: 512 x 512 px"]
    text = draw_grid(*overview(1001, 601), patches)[601:]
    _, y0, x1, y1 = bounds((text < 60).any(axis=2))
    assert 100 < x1 <= 501 and 0 < y0 < y1 < len(text) < 140


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (40, 1000)])
def test_tiny_and_narrow_pictures_are_drawn(size: tuple[int, int]) -> None:
    image = overview(*size)
    for picture in (draw_grid(*image, grid([(0, 0)])), draw_contours(*image, TISSUE),
                    draw_mask_overlay(*image, Tissue())):
        assert picture.shape[1:] == (size[0], 3) and len(picture) >= size[1]


def test_longer_side_is_limited_and_nothing_is_enlarged() -> None:
    image, downsample = overview(3000, 1803)
    for longest, expected in ((1024, (615, 1024)), (300, (180, 300)), (9000, (1803, 3000))):
        small, scale = shrink(image, downsample, longest_px=longest)
        assert small.shape[:2] == expected
        assert scale == pytest.approx((SLIDE[0] / expected[1], SLIDE[1] / expected[0]))
        drawn = draw_grid(image, downsample, grid([]), longest_px=longest).shape
        assert drawn[1] == expected[1] and drawn[0] > expected[0]  # the text stands below
