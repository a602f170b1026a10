"""Tissue segmentation: each parameter's effect, and images with nothing on them."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from utils.errors import ItemFailed
from wsi_core.presets import DEFAULTS, PatchingParameters
from wsi_core.tissue import Tissue, segment_image, tissue_mask

PLAIN = replace(DEFAULTS, mthresh=1, close=0, a_t=0, a_h=0)
SCALE = (32.0, 32.0)  # one unit of area is 256 px of the image
PINK, WHITE = (200, 100, 160), (240, 240, 240)


def picture(*boxes: tuple[int, int, int, int, tuple[int, int, int]]) -> np.ndarray:
    """Glass of 200 x 120 px with filled boxes (left, top, right, bottom, colour)."""
    image = np.full((120, 200, 3), WHITE, np.uint8)
    for left, top, right, bottom, colour in boxes:
        image[top:bottom, left:right] = colour
    return image


def segment(image: np.ndarray, **changes: object) -> Tissue:
    return segment_image(image, SCALE, replace(PLAIN, **changes))  # type: ignore[arg-type]


RING = picture((20, 20, 100, 90, PINK), (40, 40, 60, 60, WHITE), (70, 40, 80, 50, WHITE))


def test_outlines_and_holes_are_level_0_pixels() -> None:
    tissue = segment(RING)
    (contour,), (holes,) = tissue.contours, tissue.holes
    assert contour.dtype == np.int32
    assert contour.min(axis=0).tolist() == [20 * 32, 20 * 32]
    assert contour.max(axis=0).tolist() == [99 * 32, 89 * 32]
    assert [cv2.contourArea(hole) for hole in holes] == sorted(
        (cv2.contourArea(hole) for hole in holes), reverse=True)
    assert tissue.n_holes == 2 and tissue


def test_x_and_y_scale_apart() -> None:
    (contour,) = segment_image(RING, (32.5, 16.25), PLAIN).contours
    assert contour.min(axis=0).tolist() == [650, 325]


@pytest.mark.parametrize("image", [picture(), picture((0, 0, 200, 120, (0, 0, 0))),
                                   picture((0, 0, 200, 120, (90, 90, 90)))])
def test_blank_black_and_grey_have_no_tissue(image: np.ndarray) -> None:
    tissue = segment(image)
    assert not tissue and tissue.n_holes == 0 and tissue.n_too_small == 0


def test_sthresh() -> None:
    pale = picture((20, 20, 100, 90, (240, 228, 240)))  # saturation 255 * 12 / 240 = 13
    assert segment(pale, sthresh=12) and not segment(pale, sthresh=13)


def test_use_otsu_ignores_sthresh() -> None:
    pale = picture((20, 20, 100, 90, (240, 228, 240)))
    assert segment(pale, sthresh=200, use_otsu=True)


def test_mthresh_removes_specks() -> None:
    speck = picture((20, 20, 100, 90, PINK), (150, 50, 152, 52, PINK))
    assert len(segment(speck).contours) == 2
    assert len(segment(speck, mthresh=7).contours) == 1


def test_close_joins_neighbours() -> None:
    pair = picture((20, 20, 60, 90, PINK), (62, 20, 100, 90, PINK))
    assert len(segment(pair).contours) == 2
    assert len(segment(pair, close=4).contours) == 1


def test_a_t_is_the_net_area_in_units_of_512_squared() -> None:
    # outline 79 x 69 px; its holes' outlines run outside: 21 x 21 and 11 x 11 px less the corners
    net = cv2.contourArea(segment(RING).contours[0]) - sum(
        cv2.contourArea(hole) for hole in segment(RING).holes[0])
    units = net / (512 * 512)
    assert segment(RING, a_t=units - 0.01)
    dropped = segment(RING, a_t=units)  # strictly larger
    assert not dropped and dropped.n_too_small == 1


def test_fractions_of_a_unit_count() -> None:
    small = picture((20, 20, 31, 31, PINK))  # 100 px = 0.39 units
    assert segment(small, a_t=0.3) and not segment(small, a_t=0.5)


def test_a_unit_smaller_than_a_pixel_still_filters() -> None:
    box = picture((20, 20, 31, 31, PINK))
    far = (1024.0, 1024.0)  # a unit is a quarter pixel; the box has 400 of them
    assert segment_image(box, far, replace(PLAIN, a_t=399))
    assert not segment_image(box, far, replace(PLAIN, a_t=400))


def test_a_h_and_max_n_holes() -> None:
    assert segment(RING, a_h=1).n_holes == 1
    assert segment(RING, a_h=2).n_holes == 0
    (kept,) = segment(RING, max_n_holes=1).holes[0]
    assert cv2.contourArea(kept) > 300 * 32 * 32
    assert segment(RING, max_n_holes=0).n_holes == 0


THREE = picture((10, 10, 30, 30, PINK), (60, 40, 90, 60, PINK), (120, 80, 150, 110, PINK))


def test_order_is_that_of_opencv_lowest_first() -> None:
    assert [int(contour[:, 1].min()) // 32 for contour in segment(THREE).contours] == [80, 40, 10]


@pytest.mark.parametrize(("changes", "tops"), [
    ({"keep_ids": (0,)}, [80]), ({"keep_ids": (0, 2)}, [80, 10]),
    ({"exclude_ids": (1,)}, [80, 10]), ({"keep_ids": (0, 1), "exclude_ids": (0,)}, [40])])
def test_keep_and_exclude_ids(changes: dict[str, object], tops: list[int]) -> None:
    assert [int(contour[:, 1].min()) // 32
            for contour in segment(THREE, **changes).contours] == tops


@pytest.mark.parametrize("name", ["keep_ids", "exclude_ids"])
def test_ids_that_do_not_exist_are_named(name: str) -> None:
    with pytest.raises(ItemFailed, match=rf"{name} names contour 3, but the slide has 3 \(0 to 2"):
        segment(THREE, **{name: (3,)})
    with pytest.raises(ItemFailed, match=r"has 0 \(none\)"):
        segment(picture(), **{name: (0,)})


def test_mask_is_binary_and_of_the_images_size() -> None:
    mask = tissue_mask(RING, PatchingParameters())
    assert mask.shape == (120, 200) and set(np.unique(mask)) == {0, 255}
