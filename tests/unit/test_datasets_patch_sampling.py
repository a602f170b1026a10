"""Rows of an epoch: shares of the scales, draws without replacement, repeats, three ways."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from datasets.patch_sampling import draw_rows, scale_shares

KINDS: tuple[Literal["random", "intervals", "grid"], ...] = ("random", "intervals", "grid")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def lattice(columns: int, rows: int, step: int = 256) -> np.ndarray:
    """Column after column, as CLAM orders patches."""
    x, y = np.divmod(np.arange(columns * rows), rows)
    return np.stack([x, y], axis=1) * step


@pytest.mark.parametrize(("same_psize", "ratio", "low", "high"), [
    (128, 4, 32, 96), (512, 4, 128, 384), (128, 3, 42, 86), (768, 10, 76, 692)])
def test_shares_are_those_of_the_released_configurations(same_psize: int, ratio: float, low: int,
                                                         high: int) -> None:
    """The table of spec abmilx.md 4: PANDA, BRCA sub-typing R18 and R50, BRCA survival."""
    assert scale_shares(same_psize, ratio) == (low, high)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_other_rows_each_time_and_the_same_of_one_seed(
        kind: Literal["random", "intervals", "grid"]) -> None:
    coords = lattice(20, 15)
    one, other, again = (draw_rows(300, 40, rng=rng(seed), kind=kind, coords=coords)
                         for seed in (0, 1, 0))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert len(set(one.tolist())) == 40


def test_every_row_is_as_likely() -> None:
    drawn = np.concatenate([draw_rows(20, 5, rng=rng(seed)) for seed in range(2000)])
    counts = np.bincount(drawn, minlength=20)
    assert counts.sum() == 10_000 and abs(counts - 500).max() < 5 * np.sqrt(500 * 0.75)


def test_few_patches_are_repeated_evenly_or_not_at_all() -> None:
    assert draw_rows(3, 8, rng=rng(), pad=False).tolist() == [0, 1, 2]
    assert draw_rows(8, 8, rng=rng(), pad=False).tolist() == list(range(8))
    seen = set()
    for seed in range(20):
        rows = draw_rows(3, 8, rng=rng(seed))
        counts = np.bincount(rows)
        assert len(rows) == 8 and sorted(counts) == [2, 3, 3]
        seen.add(tuple(counts))
    assert len(seen) == 3  # which row is repeated less is drawn
    assert draw_rows(0, 8, rng=rng()).tolist() == []


def test_intervals_give_one_row_each() -> None:
    for seed in range(10):
        rows = draw_rows(103, 10, rng=rng(seed), kind="intervals")
        edges = np.arange(11) * 103 // 10
        assert ((rows >= edges[:-1]) & (rows < edges[1:])).all()


def test_a_grid_spreads_draws_over_the_slide_whatever_lies_where() -> None:
    """Nine patches in ten lie in one corner; each other cell still gives as many as that one."""
    crowd = np.random.default_rng(1).integers(0, 500, (900, 2))
    thin = np.random.default_rng(2).integers(1000, 4000, (100, 2))
    coords = np.concatenate([crowd, thin, [[0, 0], [4000, 4000]]])
    rows = draw_rows(len(coords), 16, rng=rng(), kind="grid", coords=coords, cells=4)
    cells = {tuple(cell) for cell in (coords * 4 // 4001).tolist()}
    drawn = [tuple(cell) for cell in (coords[rows] * 4 // 4001).tolist()]
    assert set(drawn) == cells  # there are fewer than 16, so all have had a turn
    assert max(map(drawn.count, cells)) <= -(-16 // len(cells)) + 1
    uniform = draw_rows(len(coords), 16, rng=rng(), kind="random")
    assert (rows >= 900).sum() > 2 * (uniform >= 900).sum()


def test_cells_take_turns_in_random_order() -> None:
    """Fewer patches wanted than there are cells: other cells each time, never one twice."""
    coords = lattice(8, 8)
    chosen = [draw_rows(64, 10, rng=rng(seed), kind="grid", coords=coords, cells=4)
              for seed in range(30)]
    cells = [[tuple(cell) for cell in (coords[rows] // 512).tolist()] for rows in chosen]
    assert all(len(set(one)) == 10 for one in cells)
    assert len({cell for one in cells for cell in one}) == 16
    one_cell = draw_rows(64, 64 - 1, rng=rng(), kind="grid", coords=coords, cells=1)
    assert len(set(one_cell.tolist())) == 63


def test_patches_on_a_line_or_at_one_place_can_be_drawn_from_a_grid() -> None:
    for coords in (lattice(1, 30), lattice(30, 1), np.zeros((30, 2), np.int64)):
        rows = draw_rows(30, 12, rng=rng(), kind="grid", coords=coords)
        assert len(set(rows.tolist())) == 12
