"""A slide at any scale, read window by window.

The slide at the wanted scale is a picture of whole pixels, cut into a fixed lattice of cells. Each
cell is read from the best pyramid level and resized alone, from the level's pixels nearest to its
edges, so where a pixel lies depends on its place in the picture only: windows agree on every pixel
they share, and nothing drifts, whatever the ratio (spec streaming.md, defect 22).
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from wsi_core.slide import BLOCK_PX, WHITE, Slide, best_level

CELL_PX = 512
BLACK_BELOW = 30  # sum of R, G and B of what a scanner left out (spec streaming.md 9, step 7)


class ScaledSlide:
    """The whole of an open slide as a picture of ``size_px`` (w, h).

    gap_px_l0: what the scanner left black becomes white, before resizing: squares of that side,
        level-0 px, that are black all over (dark nuclei have none); 0 = nothing
    cell_px: side of a cell, made smaller where its pixels of the level would be too many to read
    cache_mb: of finished cells that are kept

    ``read`` may be called from several threads, which then take turns. The slide stays the
    caller's to close.
    """

    def __init__(self, slide: Slide, size_px: tuple[int, int], *, gap_px_l0: float = 0.0,
                 cell_px: int = CELL_PX, cache_mb: float = 128) -> None:
        full = slide.level_dimensions[0]
        downsample = sum(side / out for side, out in zip(full, size_px, strict=True)) / 2
        self.slide, self.size_px, self._gap_px_l0 = slide, size_px, gap_px_l0
        self.level = best_level(slide, downsample)
        level_size = slide.level_dimensions[self.level]
        self._level_downsample = sum(slide.level_downsamples[self.level]) / 2  # as OpenSlide counts
        self._factors = [side / out for side, out in zip(level_size, size_px, strict=True)]
        while cell_px > 1 and cell_px * max(self._factors) > BLOCK_PX:
            cell_px //= 2
        self.cell_px = cell_px
        self._cells: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._most_cells = max(1, int(cache_mb * 2**20 / (3 * cell_px**2)))
        self._turn = threading.Lock()

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB from (x, y), px of this picture; white outside of it.

        Raises SlideError.
        """
        out = np.full((height, width, 3), WHITE, np.uint8)
        side = self.cell_px
        left, right = max(x, 0), min(x + width, self.size_px[0])
        top, bottom = max(y, 0), min(y + height, self.size_px[1])
        if left >= right or top >= bottom:
            return out
        with self._turn:
            for row in range(top // side, -(-bottom // side)):
                for column in range(left // side, -(-right // side)):
                    cell = self._cell(column, row)
                    x_from, y_from = max(left, column * side), max(top, row * side)
                    x_to, y_to = min(right, (column + 1) * side), min(bottom, (row + 1) * side)
                    out[y_from - y:y_to - y, x_from - x:x_to - x] = cell[
                        y_from - row * side:y_to - row * side,
                        x_from - column * side:x_to - column * side]
        return out

    def _cell(self, column: int, row: int) -> np.ndarray:
        """A finished cell, the one used longest ago making room for it."""
        cell = self._cells.get((column, row))
        if cell is None:
            cell = self._cells[column, row] = self._make_cell(column, row)
            if len(self._cells) > self._most_cells:
                self._cells.popitem(last=False)
        self._cells.move_to_end((column, row))
        return cell

    def _make_cell(self, column: int, row: int) -> np.ndarray:
        import cv2

        edges = [(start * self.cell_px, min((start + 1) * self.cell_px, side))
                 for start, side in zip((column, row), self.size_px, strict=True)]
        width, height = (end - start for start, end in edges)
        (x, x_end), (y, y_end) = ([round(edge * factor) for edge in pair]
                                  for pair, factor in zip(edges, self._factors, strict=True))
        block = self._read_level(x, y, max(x + 1, x_end), max(y + 1, y_end))
        if self._gap_px_l0 and is_black(block).any():
            self._whiten_gaps(block, x, y)
        if block.shape[:2] == (height, width):
            return block
        return np.asarray(cv2.resize(block, (width, height), interpolation=cv2.INTER_AREA))


    def _read_level(self, x: int, y: int, x_end: int, y_end: int) -> np.ndarray:
        """Pixels of the level from (x, y) to before (x_end, y_end), px of it."""
        location_l0 = int(x * self._level_downsample), int(y * self._level_downsample)
        return self.slide.read_region(location_l0, self.level, (x_end - x, y_end - y),
                                      background=WHITE)

    def _whiten_gaps(self, block: np.ndarray, x: int, y: int) -> None:
        """Make white, in place, what of a block at (x, y) of the level was not scanned.

        As much is read around it as decides on its pixels, so that blocks agree.
        """
        import cv2

        side = round(self._gap_px_l0 / self._level_downsample) | 1  # odd, so that it has a middle
        height, width = block.shape[:2]
        full_width, full_height = self.slide.level_dimensions[self.level]
        left, top = max(0, x - side + 1), max(0, y - side + 1)
        around = self._read_level(left, top, min(full_width, x + width + side - 1),
                                  min(full_height, y + height + side - 1))
        gaps = cv2.morphologyEx(is_black(around).astype(np.uint8), cv2.MORPH_OPEN,
                                np.ones((side, side), np.uint8))
        block[gaps[y - top:y - top + height, x - left:x - left + width] > 0] = WHITE


def sweep_cache_mb(width_px: int) -> float:
    """``cache_mb`` of three rows of cells: a picture that is read row by row, from top to bottom,
    in windows that lie askew to its cells, makes each of them once."""
    return 3 * CELL_PX * width_px * 3 / 2**20


def is_black(rgb: np.ndarray) -> np.ndarray:
    """(h, w) bool: R, G and B add up to less than ``BLACK_BELOW``."""
    import cv2

    total = cv2.transform(rgb, np.ones((1, 3), np.float32))  # up to 255, which is enough
    return np.asarray(total < BLACK_BELOW)
