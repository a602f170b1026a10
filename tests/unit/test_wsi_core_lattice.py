"""The global lattice: unique cells on the slide, and the exact share of tissue in each."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_core.lattice import TissueArea, enough_tissue, global_lattice
from wsi_core.tissue import Tissue


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], np.int32)


SQUARE = Tissue([box(100, 100, 499, 499)], [[]])


def test_cells_are_multiples_of_the_step_row_after_row() -> None:
    cells = global_lattice(SQUARE, patch_px_l0=(64, 64), step_px_l0=(64, 64),
                           slide_size=(640, 640))
    assert cells.dtype == np.int64 and not (cells % 64).any()
    assert cells.tolist() == sorted(cells.tolist(), key=lambda cell: (cell[1], cell[0]))
    assert cells.min() == 64 and cells.max() == 448 and len(cells) == 7 * 7


def test_pieces_that_share_a_cell_give_it_once() -> None:
    halves = Tissue([box(0, 0, 99, 299), box(110, 0, 299, 299)], [[], []])
    cells = global_lattice(halves, patch_px_l0=(100, 100), step_px_l0=(100, 100),
                           slide_size=(300, 300))
    assert len(np.unique(cells, axis=0)) == len(cells) == 9


@pytest.mark.parametrize(("pad", "count"), [(False, 2 * 2), (True, 3 * 3)])
def test_cells_beyond_the_edge_only_with_padding(pad: bool, count: int) -> None:
    whole = Tissue([box(0, 0, 249, 249)], [[]])
    cells = global_lattice(whole, patch_px_l0=(100, 100), step_px_l0=(100, 100),
                           slide_size=(250, 250), pad=pad)
    assert len(cells) == count


@pytest.mark.parametrize("pad", [False, True])
def test_a_patch_larger_than_the_slide(pad: bool) -> None:
    whole = Tissue([box(0, 0, 49, 49)], [[]])
    cells = global_lattice(whole, patch_px_l0=(100, 100), step_px_l0=(100, 100),
                           slide_size=(50, 50), pad=pad)
    assert cells.tolist() == ([[0, 0]] if pad else [])


def test_a_step_of_fractions_does_not_drift() -> None:
    whole = Tissue([box(0, 0, 100_000, 600)], [[]])
    step = 547.4453
    cells = global_lattice(whole, patch_px_l0=(547, 547), step_px_l0=(step, step),
                           slide_size=(100_000, 600))
    assert cells[:, 0].tolist() == [round(step * index) for index in range(182)]


def test_share_of_tissue_is_exact_between_pixels() -> None:
    area = TissueArea.of(SQUARE, slide_size=(640, 640), cell_px_l0=(8, 8))
    assert area.downsample == (1.0, 1.0)
    corners = np.array([(100, 100), (0, 0), (60, 200), (468, 468), (600, 600)])
    assert area.fraction(corners, (64.0, 64.0)) == pytest.approx(
        [1.0, 0.0, 24 / 64, (32 / 64) ** 2, 0.0])
    assert area.fraction(np.array([(99.5, 200)]), (1.0, 1.0)) == pytest.approx([0.5])


def test_share_is_that_of_counted_pixels_on_a_coarse_raster() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 4000, (200, 2)) * 10
    large = Tissue([box(10_000, 10_000, 30_000, 20_000)], [[box(15_000, 12_000, 16_000, 13_000)]])
    area = TissueArea.of(large, slide_size=(40_000, 40_000), cell_px_l0=(512, 512))
    exact = np.array([_overlap(corner, (10_000, 10_000, 30_000, 20_000))
                      - _overlap(corner, (15_000, 12_000, 16_000, 13_000)) for corner in corners])
    assert np.abs(area.fraction(corners, (512.0, 512.0)) - exact).max() < 2 * 64 / 512


def _overlap(corner: np.ndarray, rectangle: tuple[int, int, int, int]) -> float:
    x, y = corner.tolist()
    left, top, right, bottom = rectangle
    width = max(0, min(x + 512, right) - max(x, left))
    return width * max(0, min(y + 512, bottom) - max(y, top)) / 512**2


def test_tissue_inside_a_hole_counts_whatever_comes_first() -> None:
    ring, hole, island = box(0, 0, 499, 499), box(100, 100, 399, 399), box(200, 200, 299, 299)
    for order in (Tissue([ring, island], [[hole], []]), Tissue([island, ring], [[], [hole]])):
        share = TissueArea.of(order, slide_size=(500, 500), cell_px_l0=(8, 8)).fraction(
            np.array([(240, 240), (140, 240), (20, 20)]), (20.0, 20.0))
        assert share.tolist() == [1.0, 0.0, 1.0]


def test_least_share_is_a_limit_and_zero_means_any() -> None:
    cells = np.array([(60, 200), (92, 200), (100, 200), (0, 0)])
    for least, kept in ((0.0, [True, True, True, False]), (0.5, [False, True, True, False]),
                        (0.875, [False, True, True, False]), (1.0, [False, False, True, False])):
        assert enough_tissue(cells, SQUARE, patch_px_l0=(64.0, 64.0), slide_size=(640, 640),
                             min_tissue=least).tolist() == kept
    assert not enough_tissue(cells, Tissue(), patch_px_l0=(64.0, 64.0), slide_size=(640, 640),
                             min_tissue=0).any()


def test_rounding_of_sums_is_no_tissue() -> None:
    """Between pixels the table's four sums cancel but for 1e-14: such cells were taken."""
    corner = Tissue([box(0, 0, 38, 19)], [[]])
    cells = global_lattice(corner, patch_px_l0=(34, 34), step_px_l0=(30, 30),
                           slide_size=(600, 600))
    assert cells.tolist() == [[0, 0], [30, 0]]
