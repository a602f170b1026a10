"""Regions put together from tiles, with a cache of decoded ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from wsi_core.slide import Colour, compose


class TileCache:
    """Decoded tiles by (level, column, row), least recently used out first."""

    def __init__(self, limit_bytes: int) -> None:
        self._tiles: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._bytes, self._limit = 0, limit_bytes

    def get(self, level: int, column: int, row: int) -> np.ndarray | None:
        """The tile, or None when it is not kept."""
        tile = self._tiles.get((level, column, row))
        if tile is not None:
            self._tiles.move_to_end((level, column, row))
        return tile

    def put(self, level: int, column: int, row: int, tile: np.ndarray) -> None:
        """Keep a tile; others go until the limit holds, but never this one."""
        self._tiles[level, column, row] = tile
        self._bytes += tile.nbytes
        while self._bytes > self._limit and len(self._tiles) > 1:
            self._bytes -= self._tiles.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all tiles."""
        self._tiles.clear()
        self._bytes = 0


def assemble(tile_at: Callable[[int, int], np.ndarray | None], *, corner: tuple[int, int],
             size: tuple[int, int], level_size: tuple[int, int], tile_size: tuple[int, int],
             background: Colour) -> np.ndarray:
    """A region of one level, (h, w, 3) uint8 RGB; all lengths in px of the level.

    tile_at(column, row): (h, w, 3) RGB or (h, w, 4) RGBA of that tile, at least what of it lies
    inside the level; None for one that is not stored. Outside the level, where no tile is stored
    and where it is transparent, the region has the colour ``background``.
    """
    (x, y), (width, height), (tile_width, tile_height) = corner, size, tile_size
    left, right = max(0, x), min(x + width, level_size[0])
    top, bottom = max(0, y), min(y + height, level_size[1])
    out = np.empty((height, width, 3), np.uint8)
    if (right - left, bottom - top) != size:
        out[:] = background
    if right <= left or bottom <= top:
        return out
    for row in range(top // tile_height, (bottom - 1) // tile_height + 1):
        y0, y1 = max(top, row * tile_height), min(bottom, (row + 1) * tile_height)
        for column in range(left // tile_width, (right - 1) // tile_width + 1):
            x0, x1 = max(left, column * tile_width), min(right, (column + 1) * tile_width)
            target = out[y0 - y:y1 - y, x0 - x:x1 - x]
            tile = tile_at(column, row)
            if tile is None:
                target[:] = background
                continue
            part = tile[y0 - row * tile_height:y1 - row * tile_height,
                        x0 - column * tile_width:x1 - column * tile_width]
            target[:] = part if part.shape[2] == 3 else compose(part, background)
    return out
