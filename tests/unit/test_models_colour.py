"""Colours changed in CIE LCh: against OpenCV's conversions, and what must stay as it is."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch

from models.colour import change_colour


def lab(rgb: torch.Tensor) -> np.ndarray:
    """(n, 3) L, a, b of (n, 3) sRGB values."""
    found: np.ndarray = cv2.cvtColor(rgb.float().numpy()[None], cv2.COLOR_RGB2Lab)[0]
    return found


def angle_between(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of the hues, from ``one`` to ``other``."""
    turn = np.arctan2(other[:, 2], other[:, 1]) - np.arctan2(one[:, 2], one[:, 1])
    return np.asarray((turn + math.pi) % (2 * math.pi) - math.pi)


def test_a_change_is_that_of_the_cylinder_coordinates() -> None:
    """Within the colours that sRGB has. A hue moves as far wherever it is: a factor would hardly
    move one near 0 (defect 24 of the specification)."""
    rgb = 0.3 + 0.4 * torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    before, after = lab(rgb), lab(change_colour(rgb, (1.04, 0.9, 0.2)))
    chroma = np.hypot(before[:, 1], before[:, 2])
    assert np.allclose(after[:, 0], 1.04 * before[:, 0], atol=0.3)  # its tables are coarse
    assert np.allclose(np.hypot(after[:, 1], after[:, 2]), 0.9 * chroma, atol=1)
    coloured = chroma > 10
    assert coloured.sum() > 1000
    assert np.allclose(angle_between(before[coloured], after[coloured]), 0.2, atol=0.05)


@pytest.mark.parametrize("colour", [(1.0, 1.0, 0.0), (1.0, 1.05, 0.3), (1.0, 0.0, math.pi)])
def test_greys_and_white_glass_stay(colour: tuple[float, float, float]) -> None:
    greys = torch.linspace(0, 1, 256)[:, None].expand(256, 3)
    torch.testing.assert_close(change_colour(greys, colour), greys, rtol=0, atol=2e-6)


def test_nothing_changes_without_a_change() -> None:
    rgb = torch.rand(50, 40, 3, dtype=torch.float64)
    torch.testing.assert_close(change_colour(rgb, (1, 1, 0)), rgb, rtol=0, atol=1e-12)


def test_lightness_alone_darkens_greys_and_no_colour_leaves_the_range() -> None:
    grey = torch.full((1, 3), 0.5, dtype=torch.float64)
    darker = change_colour(grey, (0.9, 1, 0))
    assert (darker < grey).all()
    torch.testing.assert_close(darker, darker[:, :1].expand(1, 3), rtol=0, atol=1e-12)
    rgb = torch.rand(1000, 3)
    for colour in ((1.5, 1, 0), (1, 3, 1), (0.5, 2, -1)):
        found = change_colour(rgb, colour)
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1


def test_each_pixel_is_changed_alone_and_opposite_turns_cancel_out() -> None:
    rgb = 0.4 + 0.2 * torch.rand(7, 9, 3, dtype=torch.float64)
    colour = (1.02, 1.1, 0.4)
    found = change_colour(rgb, colour)
    assert found.shape == rgb.shape
    assert torch.allclose(change_colour(rgb[2:5, 3:4], colour), found[2:5, 3:4], atol=1e-15)
    back = change_colour(found, (1 / 1.02, 1 / 1.1, -0.4))
    torch.testing.assert_close(back, rgb, rtol=0, atol=1e-12)
