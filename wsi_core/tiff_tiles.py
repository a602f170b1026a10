"""The fast path: stored JPEG tiles of TIFF and SVS slides, decoded without OpenSlide's compositing.

It answers only where its pixels are OpenSlide's, bit by bit; every other read goes to an
OpenSlide handle that is held beside it: levels that are not 8-bit three-channel JPEG tiles, levels
whose downsample is no whole number (OpenSlide interpolates there), tiles that are missing, unusual
or damaged (OpenSlide's error is the one that counts then). Before a level is used, samples of it
are compared with OpenSlide; one difference and the level is OpenSlide's.
"""

from __future__ import annotations

import os

import numpy as np

from utils.errors import SlideError
from wsi_core.jpeg_tiles import (
    PHOTOMETRIC_RGB,
    PHOTOMETRIC_YCBCR,
    JpegTileDecoder,
    decoder_notices_short_data,
)
from wsi_core.slide import BLACK, Colour, Slide, check_request
from wsi_core.slide_openslide import OpenSlideSlide
from wsi_core.tiff_directory import Directory
from wsi_core.tile_assembly import TileCache, assemble

VENDORS = ("aperio", "generic-tiff")  # plain grids; others overlap, or join several areas
SAMPLE_PX = 64
MAX_TILE_PIXELS = 2**22

_COMPRESSION_JPEG = 7


class Unsuitable(Exception):
    """Why a slide or level is left to OpenSlide; never leaves wsi_core."""


class _OnlyOpenSlide(Exception):
    """A tile is missing, unusual or damaged: the whole read goes to OpenSlide."""


class TileLevel:
    """The stored tiles of one level."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.decoder = JpegTileDecoder(
            tables=directory.tables, size=(directory.tile_width, directory.tile_height),
            photometric=directory.photometric)


class TiffTilesSlide(Slide):
    """A slide whose tiles are decoded directly; see the module.

    Not thread-safe, and not to be pickled: one handle a worker. Up to ``cache_mb`` of decoded
    tiles are kept, least recently used out first (256 MB: two tile columns of any slide), and as
    much again by OpenSlide when reads go there.
    """

    backend = "tiff-tiles"

    def __init__(self, reference: OpenSlideSlide, *, cache_mb: int = 256) -> None:
        """Take over ``reference``; raises Unsuitable when level 0 must be left to it."""
        self._reference = reference
        self.path = reference.path
        self.level_dimensions = reference.level_dimensions
        self.level_downsamples = reference.level_downsamples
        self.mpp_um, self.mpp_problem = reference.mpp_um, reference.mpp_problem
        self.mpp_source = reference.mpp_source
        self.objective_power = reference.objective_power
        self.level_problems: dict[int, str] = {}  # why a level is left to OpenSlide
        self._levels = _match_levels(reference, self.level_problems)
        self._verified: set[int] = set()
        self._cache = TileCache(cache_mb * 2**20)
        self._file: int | None = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        if not self._usable(0):
            os.close(self._file)
            raise Unsuitable(self.level_problems[0])

    def read_region(self, location_l0: tuple[int, int], level: int, size: tuple[int, int], *,
                    background: Colour = BLACK) -> np.ndarray:
        """See ``Slide.read_region``."""
        check_request(self, level, size)
        pixels = None
        if self._usable(level):
            scale = int(self._reference.openslide_downsamples[level])
            (x, x_rest), (y, y_rest) = (divmod(int(place), scale) for place in location_l0)
            if x_rest == 0 and y_rest == 0:
                pixels = self._assemble(level, (x, y), (int(size[0]), int(size[1])), background)
        if pixels is None:
            return self._reference.read_region(location_l0, level, size, background=background)
        return pixels

    def close(self) -> None:
        """See ``Slide.close``."""
        self._reference.close()
        self._cache.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _assemble(self, level: int, corner: tuple[int, int], size: tuple[int, int],
                  background: Colour) -> np.ndarray | None:
        """The region at ``corner`` (level px) from its tiles; None when OpenSlide must answer."""
        directory = self._levels[level].directory
        try:
            return assemble(
                lambda column, row: self._tile(level, column, row), corner=corner, size=size,
                level_size=self.level_dimensions[level],
                tile_size=(directory.tile_width, directory.tile_height), background=background)
        except _OnlyOpenSlide:
            return None

    def _tile(self, level: int, column: int, row: int) -> np.ndarray:
        """Pixels of a whole tile, from the cache or the file."""
        tile = self._cache.get(level, column, row)
        if tile is not None:
            return tile
        source = self._levels[level]
        tile = source.decoder.decode(
            self._stored(source.directory, row * source.directory.columns + column))
        if tile is None:
            raise _OnlyOpenSlide
        self._cache.put(level, column, row, tile)
        return tile

    def _stored(self, directory: Directory, index: int) -> bytes:
        """The bytes of a tile as they lie in the file; b"" when it is not stored."""
        if self._file is None:
            raise SlideError(f"{self.path}: was closed")
        try:
            os.lseek(self._file, int(directory.offsets[index]), os.SEEK_SET)
            return os.read(self._file, int(directory.counts[index]))
        except OSError as error:
            raise SlideError(f"{self.path}: cannot be read ({error.strerror})") from None

    # ------------------------------------------------------------------------ verification

    def _usable(self, level: int) -> bool:
        """Whether the level can be read here; compares samples of it with OpenSlide once."""
        if level in self._verified:
            return True
        if level not in self.level_problems:
            problem = self._compare(level)
            if problem:
                self.level_problems[level] = problem
            else:
                self._verified.add(level)
        return level in self._verified

    def _compare(self, level: int) -> str:
        """ "", or how samples of the level differ from OpenSlide's pixels."""
        compared = 0
        scale = int(self._reference.openslide_downsamples[level])
        for corner in self._sample_corners(level):
            place = (corner[0] * scale, corner[1] * scale)
            size = (SAMPLE_PX, SAMPLE_PX)
            ours = self._assemble(level, corner, size, BLACK)
            if ours is None:
                continue
            try:
                theirs = self._reference.read_region(place, level, size)
            except SlideError:
                continue  # a damaged tile says nothing of the others
            if not np.array_equal(ours, theirs):
                return f"level {level}: other pixels than OpenSlide's at {place}"
            compared += 1
        return "" if compared else f"level {level}: no tile could be compared with OpenSlide's"

    def _sample_corners(self, level: int) -> list[tuple[int, int]]:
        """Corners (level px) of the samples: round the busiest tiles, and beyond the border."""
        directory = self._levels[level].directory
        width, height = self.level_dimensions[level]
        order = np.argsort(directory.counts)[::-1]
        corners = [(width - SAMPLE_PX // 2, height - SAMPLE_PX // 2)]
        for index in order[[0, len(order) // 8, len(order) // 2]]:
            row, column = divmod(int(index), directory.columns)
            corners.append((column * directory.tile_width - SAMPLE_PX // 2,
                            row * directory.tile_height - SAMPLE_PX // 2))
        return corners


def _match_levels(reference: OpenSlideSlide, problems: dict[int, str]) -> dict[int, TileLevel]:
    """The directory of each of OpenSlide's levels that can be read here; the others' problems."""
    if reference.vendor not in VENDORS:
        raise Unsuitable(f"format {reference.vendor}: only {' and '.join(VENDORS)} are read here")
    if not decoder_notices_short_data():
        raise Unsuitable("this OpenCV does not notice JPEG data that ends early")
    directories = [one for one in reference.tiff_directories if one.is_tiled]
    levels = {}
    for level, size in enumerate(reference.level_dimensions):
        fitting = [one for one in directories if (one.width, one.height) == size]
        problem = (f"{len(fitting)} directories of {size[0]} x {size[1]} px"
                   if len(fitting) != 1 else _unusual(fitting[0]))
        scale = reference.openslide_downsamples[level]
        if not problem and not scale.is_integer():
            problem = f"downsample {scale:g} is no whole number: OpenSlide interpolates"
        if problem:
            problems[level] = f"level {level}: {problem}"
        else:
            levels[level] = TileLevel(fitting[0])
    return levels


def _unusual(directory: Directory) -> str:
    """ "", or what keeps the tiles of a directory from being decoded here."""
    if directory.compression != _COMPRESSION_JPEG:
        return f"compression {directory.compression}, JPEG (7) is read here"
    if directory.tile_width * directory.tile_height > MAX_TILE_PIXELS:
        return f"tiles of {directory.tile_width} x {directory.tile_height} px"
    expected = {
        "samples": (directory.samples, (3,)), "bits": (directory.bits, ((8, 8, 8),)),
        "planar configuration": (directory.planar, (1,)),
        "orientation": (directory.orientation, (1,)), "tile depth": (directory.tile_depth, (1,)),
        "photometric": (directory.photometric, (PHOTOMETRIC_RGB, PHOTOMETRIC_YCBCR))}
    return "; ".join(f"{name} {value}" for name, (value, known) in expected.items()
                     if value not in known)
