"""Which square of a slide's image is looked at: where there is tissue.

Squares are tried around the middle of each cell of the tissue map and moved to lie inside the
image; where that is smaller, it lies in the middle of the square. All in px of the image.
"""

from __future__ import annotations

import numpy as np

_SAME = 1e-9  # shares that differ by less are the same, rounded


def crop_shares(tissue: np.ndarray, *, cell_px: int, size_px: tuple[int, int], side_px: int
                ) -> np.ndarray:
    """(h, w) share of tissue in the square around each cell.

    tissue: (h, w) share in each cell of ``cell_px`` px; size_px: (width, height) of the image;
    side_px: of the square
    """
    sums: np.ndarray = np.asarray(tissue, dtype=np.float64)
    for axis, full_px in ((0, size_px[1]), (1, size_px[0])):
        starts = _starts(np.arange(sums.shape[axis]) + 0.5, cell_px, full_px, side_px)
        ends = np.clip(np.stack([starts, starts + side_px]), 0, full_px) / cell_px
        sums = np.moveaxis(_sums(np.moveaxis(sums, axis, 0), *ends), 0, axis)
    shares: np.ndarray = sums * (cell_px / side_px) ** 2
    return shares


def most_tissue(tissue: np.ndarray, *, cell_px: int, size_px: tuple[int, int], side_px: int
                ) -> tuple[int, int]:
    """x, y of the square with most tissue; of several, of the most central among them."""
    shares = crop_shares(tissue, cell_px=cell_px, size_px=size_px, side_px=side_px)
    rows, columns = np.nonzero(shares >= shares.max() - _SAME)
    found = np.unique(np.stack([
        _starts(cells + 0.5, cell_px, full_px, side_px)
        for cells, full_px in zip((columns, rows), size_px, strict=True)], axis=1), axis=0)
    x, y = found[((found - found.mean(axis=0)) ** 2).sum(axis=1).argmin()].tolist()
    return x, y


def draw_crop(tissue: np.ndarray, *, cell_px: int, size_px: tuple[int, int], side_px: int,
              rng: np.random.Generator) -> tuple[int, int]:
    """x, y of a square drawn with a probability that goes with its squared share of tissue (spec
    streaming.md 9 and 10; any square where there is no tissue)."""
    shares = crop_shares(tissue, cell_px=cell_px, size_px=size_px, side_px=side_px)
    weights = shares.ravel() ** 2
    if not weights.any():
        weights = np.ones(shares.size)
    drawn = rng.choice(shares.size, p=weights / weights.sum())
    row, column = np.unravel_index(int(drawn), shares.shape)
    x, y = (int(_starts(np.array(cell + rng.random()), cell_px, full_px, side_px))
            for cell, full_px in zip((column, row), size_px, strict=True))
    return x, y


def _starts(centres: np.ndarray, cell_px: int, full_px: int, side_px: int) -> np.ndarray:
    """Whole px at which squares around ``centres``, in cells, begin along one axis."""
    if full_px <= side_px:
        return np.full_like(centres, -((side_px - full_px) // 2), dtype=np.int64)
    starts = np.floor(centres * cell_px - side_px / 2)
    return np.asarray(np.clip(starts, 0, full_px - side_px), dtype=np.int64)


def _sums(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Of each stretch [start, end) along the first axis, fractions of its first and last value."""
    total = np.concatenate([np.zeros((1, *values.shape[1:])), values.cumsum(axis=0)])

    def until(places: np.ndarray) -> np.ndarray:
        whole = np.minimum(places.astype(np.int64), len(values) - 1)
        part: np.ndarray = total[whole] + (places - whole)[:, None] * values[whole]
        return part

    sums: np.ndarray = until(ends) - until(starts)
    return sums
