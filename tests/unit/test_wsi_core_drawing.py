"""Masks and stitches, looked at pixel by pixel."""

from __future__ import annotations

import numpy as np

from wsi_core.drawing import HOLE_COLOUR, TISSUE_COLOUR, draw_mask, draw_stitch
from wsi_core.tissue import Tissue

IMAGE = np.full((100, 150, 3), 200, np.uint8)
BOX = np.array([[160, 160], [1200, 160], [1200, 1200], [160, 1200]], np.int32)
HOLE = np.array([[480, 480], [800, 480], [800, 800], [480, 800]], np.int32)
TISSUE = Tissue([BOX], [[HOLE]])
SCALE = (16.0, 16.0)


def test_mask_outlines_tissue_green_and_holes_blue() -> None:
    mask = draw_mask(IMAGE, SCALE, TISSUE, line_thickness=16)
    assert tuple(mask[10, 40]) == TISSUE_COLOUR and tuple(mask[30, 40]) == HOLE_COLOUR
    assert tuple(mask[20, 20]) == tuple(mask[40, 40]) == (200, 200, 200)  # nothing is filled
    assert (IMAGE == 200).all()  # a copy


def test_line_thickness_is_level_0_pixels_and_at_least_one_pixel() -> None:
    def painted(thickness: int) -> int:
        mask = draw_mask(IMAGE, SCALE, Tissue([BOX], [[]]), line_thickness=thickness)
        return int((mask == TISSUE_COLOUR).all(axis=2).sum())

    assert painted(0) == painted(1) == painted(16) == 4 * 65
    assert painted(80) > 4 * painted(16)


def test_numbers_are_written_in_red() -> None:
    def red(number: bool) -> int:
        mask = draw_mask(IMAGE, SCALE, TISSUE, number=number)
        return int((mask == (255, 0, 0)).all(axis=2).sum())

    assert red(True) > 0 == red(False)


def test_stitch_shows_patches_alone_and_stops_at_the_border() -> None:
    image = np.arange(100 * 150 * 3, dtype=np.uint32).reshape(100, 150, 3).astype(np.uint8) | 1
    coords = np.array([[160, 320], [2300, 1500], [33, 0]])
    stitch = draw_stitch(image, SCALE, coords, (256, 160))
    shown = np.zeros((100, 150), bool)
    shown[20:30, 10:26] = True
    shown[94:, 144:] = True  # reaches beyond the slide
    shown[0:10, 3:19] = True  # 33 / 16 is rounded up
    assert np.array_equal(stitch.any(axis=2), shown)
    assert np.array_equal(stitch[shown], image[shown])
