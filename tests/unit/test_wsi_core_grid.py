"""The patch grid on a square of tissue: rules, order, borders, fractions, regions."""

from __future__ import annotations

import numpy as np
import pytest

import wsi_core.grid
from wsi_core.grid import patch_grid, points_in_polygon
from wsi_core.tissue import Tissue


def square(left: int, top: int, side: int) -> np.ndarray:
    return np.array([[left, top], [left + side, top], [left + side, top + side],
                     [left, top + side]], np.int32)


BLOCK = Tissue([square(100, 200, 100)], [[]])
GRID = {"patch_px_l0": 40, "step_px_l0": 40, "slide_size": (1000, 1000)}


def grid(tissue: Tissue = BLOCK, **changes: object) -> list[list[int]]:
    return patch_grid(tissue, **{**GRID, **changes}).tolist()  # type: ignore[arg-type]


def test_x_is_the_outer_loop_and_starts_at_the_bounding_box() -> None:
    xs, ys = [100, 140, 180], [200, 240, 280]
    assert grid(contour_fn="basic") == [[x, y] for x in xs for y in ys]


def test_rules_differ_where_a_patch_straddles_the_border() -> None:
    # the third column starts at 180: its centre lies on 200 (the edge), its right points on 210
    counts = {rule: len(grid(contour_fn=rule, patch_px_l0=41))
              for rule in ("basic", "center", "four_pt", "four_pt_hard")}
    assert counts == {"basic": 9, "center": 9, "four_pt": 9, "four_pt_hard": 4}
    counts = {rule: len(grid(contour_fn=rule, patch_px_l0=60))
              for rule in ("basic", "center", "four_pt", "four_pt_hard")}
    assert counts == {"basic": 9, "center": 4, "four_pt": 9, "four_pt_hard": 4}


def test_center_shift_widens_the_hard_rule() -> None:
    hard = {"contour_fn": "four_pt_hard", "patch_px_l0": 40}
    assert len(grid(**hard, center_shift=0)) == 9  # the centre only, on the edge
    assert len(grid(**hard)) == 4  # a quarter side
    assert len(grid(**hard, step_px_l0=20, center_shift=0.5)) == 16
    assert len(grid(**hard, step_px_l0=20, center_shift=1)) == 16  # half a side: x up to 160


def test_holes_take_away_patches_whose_centre_is_strictly_inside() -> None:
    assert [140, 240] not in grid(Tissue([square(100, 200, 100)], [[square(150, 250, 20)]]))
    on_edge = Tissue([square(100, 200, 100)], [[square(160, 250, 20)]])
    assert [140, 240] in grid(on_edge)  # centre (160, 260) lies on the hole's edge
    odd = grid(on_edge, patch_px_l0=41)  # centre (160.5, 260.5)
    assert [140, 240] not in odd


def test_padding_only_matters_at_the_right_and_lower_border() -> None:
    size = (210, 1000)
    assert {x for x, _ in grid(contour_fn="basic", slide_size=size)} == {100, 140, 180}
    kept = grid(contour_fn="basic", slide_size=size, use_padding=False)
    assert {x for x, _ in kept} == {100, 140}
    fits = grid(contour_fn="basic", slide_size=(220, 1000), use_padding=False)
    assert {x for x, _ in fits} == {100, 140, 180}


def test_patch_larger_than_the_slide() -> None:
    tissue = Tissue([square(0, 0, 100)], [[]])
    small = {"patch_px_l0": 256, "step_px_l0": 256, "slide_size": (100, 100)}
    assert grid(tissue, **small, contour_fn="basic") == [[0, 0]]
    assert grid(tissue, **small, contour_fn="basic", use_padding=False) == []


def test_fractions_do_not_drift() -> None:
    tissue = Tissue([square(0, 0, 5000)], [[]])
    ticks = np.unique(patch_grid(tissue, patch_px_l0=100.4, step_px_l0=100.4,
                                 slide_size=(5001, 5001), contour_fn="basic")[:, 0])
    assert np.array_equal(ticks, np.rint(np.arange(50) * 100.4))


def test_x_and_y_may_differ() -> None:
    assert grid(contour_fn="basic", step_px_l0=(50, 100)) == [
        [x, y] for x in (100, 150, 200) for y in (200, 300)]


def test_roi_moves_the_start_and_bounds_the_corners() -> None:
    assert grid(contour_fn="basic", roi=(130, 0, 175, 240)) == [[130, 200], [170, 200]]
    assert grid(contour_fn="basic", roi=(300, 300, 400, 400)) == []


def test_every_contour_has_its_own_grid_in_turn() -> None:
    both = Tissue([square(500, 500, 10), square(7, 9, 10)], [[], []])
    assert grid(both, contour_fn="basic") == [[500, 500], [7, 9]]


def test_no_tissue_no_patches() -> None:
    nothing = patch_grid(Tissue(), **GRID)  # type: ignore[arg-type]
    assert nothing.shape == (0, 2) and nothing.dtype == np.int64


def test_slabs_give_the_same_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = np.random.default_rng(0).integers(0, 900, (60, 2)).astype(np.int32)
    tissue = Tissue([ragged], [[square(400, 400, 99)]])
    whole = grid(tissue, step_px_l0=7)
    monkeypatch.setattr(wsi_core.grid, "_MAX_CANDIDATES", 500)
    assert grid(tissue, step_px_l0=7) == whole
    assert len(whole) > 500


def test_too_small_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one level-0 pixel"):
        grid(patch_px_l0=0)


def test_points_on_vertices_edges_and_in_half_pixels() -> None:
    points = np.array([[100, 200], [150, 200], [100.5, 200.5], [99.5, 250], [200, 300], [201, 300]])
    polygon = square(100, 200, 100)
    assert points_in_polygon(points, polygon).tolist() == [True, True, True, False, True, False]
    assert points_in_polygon(points, polygon, boundary=False).tolist() == [
        False, False, True, False, False, False]
