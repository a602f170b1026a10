"""What readers of tiled formats share: a level is a grid of tiles, decoded when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from utils.errors import SlideError
from wsi_core.slide import BLACK, Colour, Slide, check_dimensions, check_request
from wsi_core.slide_mpp import PixelSize
from wsi_core.tile_assembly import TileCache, assemble

MAX_TILE_PIXELS = 178_956_970  # a tile is decoded whole; as for a flat picture


class TileGrid(Protocol):
    """One level. size, tile_size: (w, h) in px of the level."""

    size: tuple[int, int]
    tile_size: tuple[int, int]

    def read(self, column: int, row: int) -> np.ndarray | None:
        """(h, w, 3) RGB or (h, w, 4) RGBA, not premultiplied; None when the tile is not stored.

        May raise anything when the stored data is damaged.
        """
        ...


class TiledSlide(Slide):
    """A slide of such grids. Up to ``cache_mb`` of decoded tiles are kept.

    Places are rounded to whole pixels of the level: unlike OpenSlide nothing is interpolated.
    """

    def __init__(self, path: Path, grids: Sequence[TileGrid], pixel_size: PixelSize, *,
                 objective_power: float | None, cache_mb: int) -> None:
        """Raises SlideError for sizes that no slide can have, or tiles too large to decode."""
        self.path = path
        self._grids, self._cache = tuple(grids), TileCache(cache_mb * 2**20)
        self._closed = False
        self.level_dimensions = tuple(grid.size for grid in grids)
        check_dimensions(path, self.level_dimensions[0])
        for grid in grids:
            if grid.tile_size[0] * grid.tile_size[1] > MAX_TILE_PIXELS:
                raise SlideError(
                    f"{path}: is stored in tiles of {grid.tile_size[0]} x {grid.tile_size[1]} px, "
                    f"over the ceiling of {MAX_TILE_PIXELS} px: convert it to a tiled pyramidal "
                    "TIFF (vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg)")
        width, height = self.level_dimensions[0]
        self.level_downsamples = tuple((width / w, height / h) for w, h in self.level_dimensions)
        self.mpp_um, self.mpp_problem, self.mpp_source = pixel_size
        self.objective_power = objective_power

    def read_region(self, location_l0: tuple[int, int], level: int, size: tuple[int, int], *,
                    background: Colour = BLACK) -> np.ndarray:
        """See ``Slide.read_region``."""
        check_request(self, level, size)
        if self._closed:
            raise SlideError(f"{self.path}: was closed")
        scale = sum(self.level_downsamples[level]) / 2  # the same for both axes, as OpenSlide's
        x, y = (level_place(int(place), scale) for place in location_l0)
        grid = self._grids[level]

        def tile_at(column: int, row: int) -> np.ndarray | None:
            tile = self._cache.get(level, column, row)
            if tile is None:
                tile = grid.read(column, row)
                if tile is not None:
                    self._cache.put(level, column, row, tile)
            return tile

        try:
            return assemble(tile_at, corner=(x, y), size=(int(size[0]), int(size[1])),
                            level_size=grid.size, tile_size=grid.tile_size, background=background)
        except Exception as error:  # a codec's word on damaged data can be of any kind
            raise SlideError(f"{self.path}: cannot read {size[0]} x {size[1]} px at level-0 "
                             f"position {tuple(map(int, location_l0))} of level {level}: "
                             f"{one_line(error)}") from None

    def close(self) -> None:
        """See ``Slide.close``."""
        self._closed = True
        self._cache.clear()


def one_line(error: Exception) -> str:
    """What a library's error says, for the end of a line of ours."""
    text = " ".join(str(error).split())
    return f"no {text} in it" if isinstance(error, KeyError) else text or type(error).__name__


def level_place(place_l0: int, scale: float) -> int:
    """The pixel of a level at a place of level 0, ``scale`` being the level's downsample.

    A place that is a whole pixel of the level, cut to whole level-0 pixels, is that pixel, so that
    blocks of a level join; any other goes to the nearest.
    """
    above = int(np.ceil(place_l0 / scale - 1e-9))
    return above if int(above * scale) == place_l0 else round(place_l0 / scale)
