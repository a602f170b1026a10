"""Which patches of a slide are used in an epoch: rows drawn without replacement, and the scales'
shares.

Rows are integers, never lists of keys, so a draw costs the same whatever a data set holds.
Source: spec abmilx.md 4 (multi-scale random instance sampling; arXiv 2506.02408).
"""

from __future__ import annotations

from math import floor
from typing import Literal

import numpy as np

Sampling = Literal["random", "intervals", "grid"]


def scale_shares(same_psize: int, ratio: float) -> tuple[int, int]:
    """(low, high): of ``same_psize`` patches, floor(same_psize / ratio) are of the low scale."""
    low = floor(same_psize / ratio)
    return low, same_psize - low


def draw_rows(n_rows: int, count: int, *, rng: np.random.Generator, pad: bool = True,
              kind: Sampling = "random", coords: np.ndarray | None = None,
              cells: int = 8) -> np.ndarray:
    """Ascending int64 rows, ``count`` of 0 .. n_rows - 1, each at most once.

    Where there are fewer than ``count``, all of them; with ``pad`` then also random repeats of
    them up to ``count``, each row as often as any other give or take one. Nothing of nothing.
    kind: "random"; "intervals": one of each of ``count`` equal intervals of the row order;
    "grid": see ``_draw_from_cells``, which needs coords (n_rows, 2), level-0 px
    """
    if count >= n_rows:
        rows = np.arange(n_rows)
        if not pad or not n_rows:
            return rows
        whole, rest = divmod(count, n_rows)
        return np.sort(np.concatenate([*[rows] * whole, _choose(n_rows, rest, rng)]))
    if kind == "random":
        return np.sort(_choose(n_rows, count, rng))
    if kind == "intervals":
        edges = np.arange(count + 1) * n_rows // max(1, count)
        return rng.integers(edges[:-1], edges[1:])
    assert coords is not None, "drawing from a grid needs coordinates"
    return np.sort(_draw_from_cells(coords, count, rng=rng, cells=cells))


def _choose(n_rows: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(n_rows, count, replace=False, shuffle=False)


def _draw_from_cells(coords: np.ndarray, count: int, *, rng: np.random.Generator, cells: int
                     ) -> np.ndarray:
    """(count,) rows, count <= N: the cells of a ``cells`` x ``cells`` grid over the bounding box
    of ``coords`` (N, 2) take turns in an order that is random in each round; whose turn it is
    gives a random patch of those it has left."""
    low = coords.min(axis=0)
    side = np.maximum(coords.max(axis=0) - low, 1)
    column, row = np.minimum((coords - low) * cells // side, cells - 1).T
    cell = row * cells + column
    shuffled = rng.permutation(len(coords))
    by_cell = shuffled[np.argsort(cell[shuffled], kind="stable")]  # random within each cell
    _, starts, sizes = np.unique(cell[by_cell], return_index=True, return_counts=True)
    turn = np.arange(len(coords)) - np.repeat(starts, sizes)
    order = np.lexsort((rng.random(len(coords)), turn))
    rows: np.ndarray = by_cell[order[:count]]
    return rows
