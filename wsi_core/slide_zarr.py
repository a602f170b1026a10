"""OME-Zarr folders (NGFF 0.4 and 0.5) through the optional package ``zarr``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import SlideError
from wsi_core.slide import Backend, Slide
from wsi_core.slide_files import is_zarr_folder
from wsi_core.slide_mpp import Claim, first_believable, length_claim
from wsi_core.slide_tiled import TiledSlide, one_line


def open_with(path: Path, *, backend: Backend, cache_mb: int) -> Slide | None:
    """See ``wsi_core.slide.Reader``."""
    return ZarrSlide(path, cache_mb=cache_mb) if is_zarr_folder(path) else None


class ZarrSlide(TiledSlide):
    """The first multiscale picture of an OME-Zarr: 8 bits, RGB or grey, one plane."""

    backend = "zarr"

    def __init__(self, path: Path, *, cache_mb: int = 256) -> None:
        """Read the metadata. Raises SlideError: no OME-Zarr, not 8-bit RGB or grey, no package."""
        try:
            import zarr
        except ImportError:
            raise SlideError(f"{path}: reading OME-Zarr needs a package that is not installed: "
                             "pip install zarr") from None
        try:
            group, picture = _multiscale(zarr.open_group(path, mode="r"))
            axes = [str(axis["name"]).lower() for axis in picture["axes"]]
            grids = [ZarrGrid(group[str(level["path"])], axes) for level in picture["datasets"]]
            claim = _pixel_size(picture)
            if not grids:
                raise ValueError("it lists no levels")
        except Exception as error:  # whatever is missing or of another kind in the metadata
            raise SlideError(f"{path}: cannot be read as an OME-Zarr picture of NGFF 0.4 or 0.5: "
                             f"{one_line(error)}") from None
        super().__init__(path, grids, first_believable([claim]), objective_power=None,
                         cache_mb=cache_mb)


class ZarrGrid:
    """One level, its chunks being the tiles.

    A chunk that is not stored has the array's fill value; where that is 0, which is also what
    writers put without thinking, it counts as not scanned.
    """

    def __init__(self, array: Any, axes: Sequence[str]) -> None:
        """axes: the names of the array's dimensions. Raises ValueError for other pictures."""
        sizes = dict(zip(axes, array.shape, strict=True))
        chunks = dict(zip(axes, array.chunks, strict=True))
        channels = sizes.get("c", 1)
        planes = [name for name in axes if name not in "cyx" and sizes[name] != 1]
        if array.dtype != np.uint8 or channels not in (1, 3) or planes:
            raise ValueError(f"pixels {array.dtype} with axes {sizes}: uint8, 1 or 3 channels and "
                             "one plane were expected")
        self._array, self._axes = array, axes
        self.size = (int(sizes["x"]), int(sizes["y"]))
        self.tile_size = (int(chunks["x"]), int(chunks["y"]))

    def read(self, column: int, row: int) -> np.ndarray | None:
        """See ``TileGrid.read``."""
        (width, height), (x, y) = self.tile_size, (column, row)
        window = {"x": slice(x * width, (x + 1) * width), "y": slice(y * height, (y + 1) * height)}
        index = tuple(window.get(name, slice(None)) for name in self._axes)
        if not self._array.fill_value and not self._is_stored(index):
            return None
        pixels = np.asarray(self._array[index])
        order = [self._axes.index(name) for name in ("y", "x", "c") if name in self._axes]
        others = [axis for axis in range(pixels.ndim) if axis not in order]
        pixels = pixels.transpose(*order, *others)
        pixels = pixels.reshape(*pixels.shape[:2], -1)  # the others have a length of 1
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))

    def _is_stored(self, index: tuple[slice, ...]) -> bool:
        """Whether any file of the chunks in a window is there."""
        stored = self._array.shards or self._array.chunks
        folder = Path(self._array.store.root) / self._array.path
        first = [(part.start or 0) // length for part, length in zip(index, stored, strict=True)]
        last = [(min(part.stop or side, side) - 1) // length for part, length, side in
                zip(index, stored, self._array.shape, strict=True)]
        spans = [range(low, high + 1) for low, high in zip(first, last, strict=True)]
        return any((folder / self._array.metadata.encode_chunk_key(
            tuple(low + int(step) for low, step in zip(first, steps, strict=True)))).exists()
            for steps in np.ndindex(*map(len, spans)))


def _multiscale(group: Any) -> tuple[Any, Mapping[str, Any]]:
    """The group with the first picture, and its entry in the metadata.

    What bioformats2raw writes has a folder for each picture: the first one, "0".
    """
    attributes = group.attrs.asdict()
    ome = attributes.get("ome", attributes)
    if "multiscales" not in ome and "bioformats2raw.layout" in ome:
        return _multiscale(group["0"])
    if not ome.get("multiscales"):
        raise ValueError("no 'multiscales' in its metadata")
    picture: Mapping[str, Any] = ome["multiscales"][0]
    return group, picture


def _pixel_size(picture: Mapping[str, Any]) -> Claim:
    """The pixel size of level 0, from the scales of the level and of the whole picture."""
    names = [str(axis["name"]).lower() for axis in picture["axes"]]
    units = {name: axis.get("unit") for name, axis in zip(names, picture["axes"], strict=True)}
    product, said = np.ones(len(names)), False
    for owner in (picture["datasets"][0], picture):
        for one in owner.get("coordinateTransformations", ()):
            if one.get("type") == "scale":
                product, said = product * np.asarray(one["scale"], float), True
    if not said:
        return Claim("ome-zarr", None, None)
    scale = dict(zip(names, product.tolist(), strict=True))
    return length_claim("ome-zarr", repr(scale["x"]), repr(scale["y"]), units["x"], units["y"])
