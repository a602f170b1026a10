"""White and black patches, by AtlasPatch's definitions."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_core.pixel_filters import is_black, is_white

PINK = (200, 60, 150)


def patch(share: float, colour: tuple[int, int, int], rest: tuple[int, int, int] = PINK
          ) -> np.ndarray:
    """1,000 pixels, a share of them of one colour."""
    pixels = np.full((1000, 3), rest, np.uint8)
    pixels[:round(1000 * share)] = colour
    return pixels.reshape(20, 50, 3)


@pytest.mark.parametrize(("grey", "white"), [(255, True), (230, True), (200, True), (199, False),
                                             (190, False)])
def test_uniform_grey_is_white_from_a_value_of_200(grey: int, white: bool) -> None:
    assert is_white(np.full((32, 32, 3), grey, np.uint8), 15) is white


@pytest.mark.parametrize(("share", "white"), [(0.695, False), (0.699, False), (0.7, True),
                                              (0.703, True)])
def test_seventy_percent_decide(share: float, white: bool) -> None:
    assert is_white(patch(share, (255, 255, 255)), 15) is white
    assert is_black(patch(share, (0, 0, 0)), 50) is white


def test_thresholds_are_limits_that_do_not_belong() -> None:
    """Saturation 26 of 255 (255, 229, 229) and grey 50."""
    pale = np.full((8, 8, 3), (255, 229, 229), np.uint8)
    assert not is_white(pale, 26) and is_white(pale, 27) and not is_white(pale, 0)
    dark = np.full((8, 8, 3), 50, np.uint8)
    assert not is_black(dark, 50) and is_black(dark, 51)


def test_colours_are_red_green_blue() -> None:
    """Pure blue is dark in grey (29), pure red is not (76)."""
    assert is_black(np.full((8, 8, 3), (0, 0, 255), np.uint8), 50)
    assert not is_black(np.full((8, 8, 3), (255, 0, 0), np.uint8), 50)
