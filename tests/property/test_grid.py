"""The scan-line test against OpenCV, point by point; the grid against its definition."""

from __future__ import annotations

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_core.grid import patch_grid, points_in_polygon
from wsi_core.presets import CONTOUR_RULES
from wsi_core.tissue import Tissue

SMALL = st.integers(0, 12)
LARGE = st.integers(0, 150_000)
POLYGONS = st.one_of(
    st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=12),
    st.lists(st.tuples(LARGE, LARGE), min_size=3, max_size=12),
).map(lambda points: np.array(points, np.int32))


def verdicts(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """+1 inside, 0 on the edge, -1 outside, as OpenCV says."""
    return np.array([cv2.pointPolygonTest(polygon.reshape(-1, 1, 2), (float(x), float(y)), False)
                     for x, y in points])


@given(polygon=POLYGONS, data=st.data())
@settings(max_examples=300, deadline=None)
def test_points_in_polygon_is_opencvs(polygon: np.ndarray, data: st.DataObject) -> None:
    halves = st.integers(-4, 2 * int(polygon.max()) + 4)
    drawn = data.draw(st.lists(st.tuples(halves, halves), min_size=1, max_size=60))
    points = np.concatenate([np.array(drawn) / 2, polygon])  # vertices are the hard cases
    expected = verdicts(points, polygon)
    assert np.array_equal(points_in_polygon(points, polygon), expected >= 0)
    assert np.array_equal(points_in_polygon(points, polygon, boundary=False), expected > 0)


def expected_grid(tissue: Tissue, patch: int, step: int, size: tuple[int, int], rule: str,
                  use_padding: bool) -> list[tuple[int, int]]:
    """The definition, candidate by candidate."""
    found = []
    shift = int(patch // 2 * 0.5)
    for contour, holes in zip(tissue.contours, tissue.holes, strict=True):
        start, stop = contour.min(axis=0), contour.max(axis=0) + 1
        if not use_padding:
            stop = np.minimum(stop, np.array(size) - patch + 1)
        for x in range(start[0], stop[0], step):
            for y in range(start[1], stop[1], step):
                centre = (x + patch // 2, y + patch // 2)
                corners = [(centre[0] + a * shift, centre[1] + b * shift)
                           for a in (-1, 1) for b in (-1, 1)]
                points = {"basic": [(x, y)], "center": [centre]}.get(rule, corners)
                inside = verdicts(np.array(points), contour) >= 0
                middle = np.array([[x + patch / 2, y + patch / 2]])
                if (inside.all() if rule == "four_pt_hard" else inside.any()) and not any(
                        verdicts(middle, hole)[0] > 0 for hole in holes):
                    found.append((x, y))
    return found


@given(contours=st.lists(st.lists(st.tuples(SMALL, SMALL), min_size=3, max_size=8).map(
           lambda points: np.array(points, np.int32)), max_size=3),
       hole=st.lists(st.tuples(SMALL, SMALL), min_size=3, max_size=5).map(
           lambda points: np.array(points, np.int32)),
       patch=st.integers(1, 9), step=st.integers(1, 5), rule=st.sampled_from(CONTOUR_RULES),
       use_padding=st.booleans())
@settings(max_examples=150, deadline=None)
def test_grid_is_its_definition(contours: list[np.ndarray], hole: np.ndarray, patch: int,
                                step: int, rule: str, use_padding: bool) -> None:
    tissue = Tissue(contours, [[hole] for _ in contours])
    grid = patch_grid(tissue, patch_px_l0=patch, step_px_l0=step, slide_size=(14, 13),
                      contour_fn=rule, use_padding=use_padding)  # type: ignore[arg-type]
    assert list(map(tuple, grid.tolist())) == expected_grid(tissue, patch, step, (14, 13), rule,
                                                            use_padding)


@given(width=st.integers(50, 400), height=st.integers(50, 400),
       patch=st.floats(1, 80), step=st.floats(1, 80))
@settings(max_examples=100, deadline=None)
def test_grid_covers_a_rectangle_without_repeats(width: int, height: int, patch: float,
                                                 step: float) -> None:
    rectangle = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.int32)
    grid = patch_grid(Tissue([rectangle], [[]]), patch_px_l0=patch, step_px_l0=step,
                      slide_size=(width, height), contour_fn="basic")
    assert len(np.unique(grid, axis=0)) == len(grid)
    columns, rows = np.unique(grid[:, 0]), np.unique(grid[:, 1])
    assert len(grid) == len(columns) * len(rows)
    for ticks, side in ((columns, width), (rows, height)):
        assert np.allclose(ticks, np.arange(len(ticks)) * step, atol=0.5)  # rounded, no drift
        assert ticks[0] == 0
        assert ticks[-1] + step >= side
