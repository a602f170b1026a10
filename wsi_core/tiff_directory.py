"""The directories of a TIFF or BigTIFF: where the tiles lie and how they are stored.

Only what reading tiles needs; pixels are not touched.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_DIRECTORIES = 1000

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_DESCRIPTION, _SUB_DIRECTORIES = 270, 330
_ORIENTATION, _SAMPLES, _PLANAR = 274, 277, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS = 322, 323, 324, 325
_JPEG_TABLES, _TILE_DEPTH = 347, 32998
_WANTED = frozenset((_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES,
                     _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS,
                     _JPEG_TABLES, _TILE_DEPTH, _DESCRIPTION, _SUB_DIRECTORIES))
# TIFF type: numpy
_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 7: "u1", 13: "u4", 16: "u8", 18: "u8"}


class TiffProblem(ValueError):
    """Not a TIFF, or a directory that cannot be made out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Directory:
    """One image of the file; tile fields are empty when it is stored in strips.

    offsets, counts: (tiles,) int64, byte position and length of each tile, row by row; a length
    of 0 means that the tile is not stored
    tables:          the JPEG tables all tiles share, a JPEG stream of its own, or b""
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    compression: int
    photometric: int
    bits: tuple[int, ...]
    samples: int
    planar: int
    orientation: int
    tile_depth: int
    tables: bytes
    offsets: np.ndarray
    counts: np.ndarray
    description: str = ""
    has_sub_directories: bool = False

    @property
    def is_tiled(self) -> bool:
        """Whether the image is stored in tiles, with one entry for each of them."""
        return self.tile_width > 0 and self.tile_height > 0 and (
            len(self.offsets) == len(self.counts) == self.columns * self.rows)

    @property
    def columns(self) -> int:
        """Tiles side by side."""
        return -(-self.width // self.tile_width)

    @property
    def rows(self) -> int:
        """Tiles one above the other."""
        return -(-self.height // self.tile_height)

    @property
    def end(self) -> int:
        """The byte after the last stored tile; 0 when none is stored."""
        stored = self.counts > 0
        return int((self.offsets[stored] + self.counts[stored]).max(initial=0))


def read_directories(path: Path) -> list[Directory]:
    """All top-level directories of a TIFF, in file order.

    Raises TiffProblem when the file is no TIFF or a directory points nowhere; OSError as usual.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        return _Reader(handle, os.fstat(handle).st_size).directories()
    finally:
        os.close(handle)


def missing_end(path: Path, directories: list[Directory]) -> str:
    """ "", or how far the stored tiles reach beyond the end of a truncated file."""
    end = max((one.end for one in directories if one.is_tiled), default=0)
    size = path.stat().st_size
    return "" if end <= size else f"its tiles reach to byte {end}, the file has {size}"


class _Reader:
    """Walks the chain of directories of one open file."""

    def __init__(self, handle: int, size: int) -> None:
        self._handle, self._size = handle, size
        head = self._bytes(0, 8)
        self._order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        magic = struct.unpack(self._order + "H", head[2:4])[0] if self._order else 0
        if magic not in (42, 43):
            raise TiffProblem("not a TIFF")
        self._big = magic == 43
        self._first = (self._number("Q", 8) if self._big
                       else struct.unpack(self._order + "I", head[4:])[0])

    def _bytes(self, offset: int, count: int) -> bytes:
        if offset < 0 or count < 0 or offset + count > self._size:
            raise TiffProblem(f"points at bytes {offset} to {offset + count} of {self._size}")
        os.lseek(self._handle, offset, os.SEEK_SET)
        return os.read(self._handle, count)

    def _number(self, code: str, offset: int) -> int:
        data = self._bytes(offset, struct.calcsize("=" + code))
        return int(struct.unpack(self._order + code, data)[0])

    def directories(self) -> list[Directory]:
        """See ``read_directories``."""
        found: list[Directory] = []
        seen: set[int] = set()
        offset = self._first
        while offset:
            if offset in seen or len(found) >= MAX_DIRECTORIES:
                raise TiffProblem("its directories run in a circle")
            seen.add(offset)
            tags, offset = self._tags(offset)
            found.append(_directory(tags))
        return found

    def _tags(self, offset: int) -> tuple[dict[int, np.ndarray], int]:
        """The wanted tags of the directory at ``offset``, and the offset of the next one."""
        head, entry, word = ("Q", 20, "Q") if self._big else ("H", 12, "I")
        count = self._number(head, offset)
        start = offset + struct.calcsize("=" + head)
        block = self._bytes(start, count * entry)
        tags = {}
        for place in range(0, len(block), entry):
            tag, kind, length = struct.unpack_from(self._order + "HH" + word, block, place)
            if tag not in _WANTED or kind not in _TYPES:
                continue
            dtype = np.dtype(self._order + _TYPES[kind])
            size, inline = length * dtype.itemsize, struct.calcsize("=" + word)
            at = place + entry - inline
            data = (block[at:at + size] if size <= inline else
                    self._bytes(struct.unpack_from(self._order + word, block, at)[0], size))
            tags[tag] = np.frombuffer(data, dtype)
        return tags, self._number(word, start + count * entry)


def _directory(tags: dict[int, np.ndarray]) -> Directory:
    def one(tag: int, default: int) -> int:
        values = tags.get(tag)
        return default if values is None or not len(values) else int(values[0])

    none = np.zeros(0, np.int64)
    return Directory(
        width=one(_WIDTH, 0), height=one(_HEIGHT, 0), tile_width=one(_TILE_WIDTH, 0),
        tile_height=one(_TILE_HEIGHT, 0), compression=one(_COMPRESSION, 1),
        photometric=one(_PHOTOMETRIC, -1),
        bits=tuple(int(b) for b in tags.get(_BITS, np.ones(1))), samples=one(_SAMPLES, 1),
        planar=one(_PLANAR, 1), orientation=one(_ORIENTATION, 1), tile_depth=one(_TILE_DEPTH, 1),
        tables=tags.get(_JPEG_TABLES, np.zeros(0, np.uint8)).tobytes(),
        offsets=tags.get(_TILE_OFFSETS, none).astype(np.int64),
        counts=tags.get(_TILE_COUNTS, none).astype(np.int64),
        description=tags.get(_DESCRIPTION, np.zeros(0, np.uint8)).tobytes().decode("latin-1"),
        has_sub_directories=len(tags.get(_SUB_DIRECTORIES, none)) > 0)
