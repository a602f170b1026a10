"""TIFFs that OpenSlide does not know, or reads in part, through the optional ``tifffile``.

OME-TIFF with its levels in SubIFDs or its channels one by one, stored in tiles or strips, with the
compressions of ``imagecodecs``. Read are 8 bits a channel: grey, RGB (interleaved, planar or as
three pictures), RGBA that is not premultiplied. JPEG is decoded by our own ``jpeg_tiles``, because
the other decoders fill up what is missing of a truncated tile.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import SlideError
from wsi_core.jpeg_tiles import JpegTileDecoder, decoder_notices_short_data
from wsi_core.slide import TIFF_MAGIC, Backend, Slide
from wsi_core.slide_mpp import (
    PixelSize,
    first_believable,
    ome_elements,
    ome_xml_claim,
    resolution_claim,
    text_claim,
)
from wsi_core.slide_tiled import TiledSlide, one_line
from wsi_core.tiff_directory import TiffProblem, read_directories

MAX_ASPECT_ERROR_PX = 2.0  # by which a level may miss the shape of level 0, rounding included
MAX_STORED_RATIO = 2  # a tile's stored bytes over its decoded ones; more is damage

_JPEG, _MINIWHITE, _RGB, _YCBCR = 7, 0, 2, 6
_GREY = (0, 1)
_UNASSOCIATED_ALPHA = 2
# None, LZW, deflate, PackBits, JPEG 2000, LZMA, zstd, WebP, JPEG XL: decoders that report data
# which ends early
_COMPRESSIONS = frozenset((1, 5, 8, 32946, 32773, 33004, 33005, 34712, 34925, 34926, 34927, 50000,
                           50001, 50002, 52546))
_SILENCE = logging.NullHandler()


def open_with(path: Path, *, backend: Backend, cache_mb: int) -> Slide | None:
    """See ``wsi_core.slide.Reader``."""
    if path.is_dir():
        return None
    with path.open("rb") as file:
        if file.read(4) not in TIFF_MAGIC:
            return None
    return TiffSlide(path, cache_mb=cache_mb)


class TiffSlide(TiledSlide):
    """The largest picture of a TIFF, with the levels that belong to it."""

    backend = "tiff"

    def __init__(self, path: Path, *, cache_mb: int = 256) -> None:
        """Read the directories. Raises SlideError: truncated, damaged, other pixels, no package."""
        try:
            read_directories(path)  # tifffile goes on without what a truncated file has lost
        except TiffProblem as problem:
            raise SlideError(f"{path}: a TIFF that OpenSlide cannot open: truncated or "
                             f"damaged ({problem}): copy the slide again") from None
        try:
            import tifffile
        except ImportError:
            raise SlideError(f"{path}: OpenSlide does not read this TIFF as a whole; reading it "
                             "needs packages that are not installed: pip install tifffile "
                             "imagecodecs") from None
        logging.getLogger("tifffile").addHandler(_SILENCE)  # its asides do not belong on stderr
        self._file: Any = None
        try:
            self._file = tifffile.TiffFile(path, _multifile=False)
            index, levels = _picture(self._file)
            grids = [TiffGrid(level, self._file.filehandle) for level in levels]
            super().__init__(path, grids, _pixel_size(self._file, index, grids[0].page),
                             objective_power=_objective(self._file), cache_mb=cache_mb)
        except SlideError:
            self._file.close()
            raise
        except Exception as error:  # a damaged directory can fail in any way
            if self._file is not None:
                self._file.close()
            raise SlideError(f"{path}: a TIFF that neither OpenSlide nor tifffile can open as a "
                             f"whole: {one_line(error)}") from None

    def close(self) -> None:
        """See ``Slide.close``."""
        super().close()
        self._file.close()


class TiffGrid:
    """One level: the tiles, or the strips, of one page or of a page for each channel."""

    def __init__(self, pages: list[Any], file: Any) -> None:
        """pages: tifffile's, one, or three of one channel each; file: its handle.

        Raises ValueError for pixels of another kind, or tiles that lie beyond the file's end.
        """
        self.page = page = pages[0].keyframe
        unusual = _unusual(page, len(pages))
        if unusual:
            raise ValueError(unusual)
        self._file = file
        self.size = (int(page.imagewidth), int(page.imagelength))
        self.tile_size = ((int(page.tilewidth), int(page.tilelength)) if page.is_tiled else
                          (self.size[0], min(int(page.rowsperstrip), self.size[1])))
        (width, height), (tile_width, tile_height) = self.size, self.tile_size
        self._columns = -(-width // tile_width)
        per_plane = self._columns * -(-height // tile_height)
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self._planes = [(one, plane * per_plane) for one in pages for plane in range(planes)]
        for one in pages:
            if not len(one.dataoffsets) == len(one.databytecounts) == planes * per_plane:
                raise ValueError(f"lists {len(one.dataoffsets)} tiles, {planes * per_plane} were "
                                 "expected")
            counts = np.asarray(one.databytecounts, np.int64)
            ends = np.asarray(one.dataoffsets, np.int64) + counts
            end = int(ends[counts > 0].max(initial=0))
            if end > file.size:
                raise ValueError(f"truncated (its tiles reach to byte {end}, the file has "
                                 f"{file.size}): copy the slide again")

    def read(self, column: int, row: int) -> np.ndarray | None:
        """See ``TileGrid.read``."""
        index = row * self._columns + column
        stored = [self._stored(page, first + index) for page, first in self._planes]
        if not any(stored):
            return None
        if not all(stored):
            raise ValueError("a channel is not stored")
        parts = [self._decode(data, first + index, row)
                 for data, (_, first) in zip(stored, self._planes, strict=True)]
        tile = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        if self.page.photometric == _MINIWHITE:
            tile = 255 - tile
        if tile.shape[2] == 1:
            tile = np.broadcast_to(tile, (*tile.shape[:2], 3))
        return np.ascontiguousarray(tile)

    def _stored(self, page: Any, index: int) -> bytes:
        """The bytes of a tile as they lie in the file; b"" when it is not stored."""
        count = int(page.databytecounts[index])
        decoded = self.tile_size[0] * self.tile_size[1] * self.page.samplesperpixel
        if count > MAX_STORED_RATIO * decoded + 2**16:
            raise ValueError(f"a tile of {count} stored bytes: the file is damaged")
        if not count:
            return b""
        self._file.seek(int(page.dataoffsets[index]))
        data: bytes = self._file.read(count)
        if len(data) != count:
            raise ValueError("the file ends before the tile does: it is truncated")
        return data

    def _decode(self, data: bytes, index: int, row: int) -> np.ndarray:
        """(h, w, channels) uint8 of one tile or strip of a plane."""
        page = self.page
        if page.compression != _JPEG:
            decoded, _, _ = page.decode(data, index)
            return np.asarray(decoded[0])
        width, height = self.tile_size
        if not page.is_tiled:
            height = min(height, self.size[1] - row * height)
        decoder = JpegTileDecoder(tables=page.jpegtables or b"", size=(width, height),
                                  photometric=int(page.photometric))
        pixels = decoder.decode(data)
        if pixels is None:
            raise ValueError("a JPEG tile is damaged, or of a kind that is not read here")
        return pixels


def _picture(file: Any) -> tuple[int, list[list[Any]]]:
    """The largest picture: its place among the file's, and the pages of each of its levels."""
    series = list(file.series)
    index = max(range(len(series)), key=lambda one: _area(series[one]))
    levels = list(series[index].levels)
    if len(levels) == 1:  # levels that are pictures of their own
        levels += [one for one in series if one is not series[index] and _reduces(one, levels[0])]
    levels.sort(key=_area, reverse=True)
    found = []
    for level in levels:
        pages = list(level.pages)
        sizes = {name: size for name, size in zip(level.axes, level.shape, strict=True)
                 if size > 1 and name not in "YXS"}
        if any(page is None for page in pages):
            raise ValueError("a part of the picture is in other files, which is not read")
        if sizes not in ({}, {"C": 3}, {"I": 3}, {"Q": 3}) or len(pages) not in (1, 3):
            raise ValueError(f"is a stack of {len(pages)} pictures (axes {level.axes}, "
                             f"{'x'.join(map(str, level.shape))}), one plane was expected")
        if len(pages) == 3 and "C" not in sizes:
            raise ValueError("holds 3 pictures of the same size, one was expected")
        found.append(pages)
    return index, found


def _area(series: Any) -> int:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    return int(sizes.get("X", 0)) * int(sizes.get("Y", 0))


def _reduces(series: Any, full: Any) -> bool:
    """Whether a picture is a smaller version of another one, by its sides and kind of pixels."""
    page, top = series.keyframe, full.keyframe
    ratio = top.imagewidth / page.imagewidth
    return bool(ratio > 1 and page.samplesperpixel == top.samplesperpixel
                and page.dtype == top.dtype and page.is_reduced
                and abs(top.imagelength / ratio - page.imagelength) <= MAX_ASPECT_ERROR_PX)


def _unusual(page: Any, n_pages: int) -> str:
    """ "", or what of a page's pixels is not read here."""
    samples, photometric = int(page.samplesperpixel), int(page.photometric)
    bits = page.bitspersample
    if page.dtype != np.uint8 or bits != 8:
        return f"has pixels of kind '{page.dtype}' ({bits} bits), 8 bits were expected"
    alpha = tuple(map(int, page.extrasamples))
    orientation = int(page.tags.valueof(274, 1))
    if page.compression == _JPEG:
        known = (samples == 3 and page.planarconfig == 1 and photometric in (_RGB, _YCBCR)
                 and decoder_notices_short_data())
    else:
        colours = (photometric in _GREY and samples == 1) or (photometric == _RGB and (
            samples == 3 or (samples == 4 and alpha == (_UNASSOCIATED_ALPHA,))))
        known = colours and int(page.compression) in _COMPRESSIONS
    if known and (n_pages == 1 or samples == 1) and page.imagedepth == 1 and orientation == 1:
        return ""
    return (f"has {samples} channels of photometric kind {photometric}, extra {alpha}, compression "
            f"{int(page.compression)}, orientation {orientation}: grey, RGB or RGBA was expected")


def _pixel_size(file: Any, index: int, page: Any) -> PixelSize:
    """From the OME-XML, the description or the resolution of level 0."""
    units = {2: "inch", 3: "centimeter"}
    x, y = (_ratio(page, tag) for tag in (282, 283))
    return first_believable([
        ome_xml_claim(file.ome_metadata or "", index), text_claim(page.description),
        resolution_claim("tiff resolution", x, y, units.get(int(page.tags.valueof(296, 2))))])


def _ratio(page: Any, tag: int) -> str | None:
    """A rational tag as text."""
    value = page.tags.valueof(tag)
    if value is None:
        return None
    return repr(value[0] / value[1]) if value[1] else "inf"


def _objective(file: Any) -> float | None:
    """The nominal magnification of the first objective of the OME-XML."""
    for objective in ome_elements(file.ome_metadata or "", "Objective"):
        power = objective.get("NominalMagnification", "")
        if power.replace(".", "", 1).isdigit() and float(power) > 0:
            return float(power)
    return None
