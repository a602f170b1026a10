"""A folder of .dcm files as one slide: which of its files OpenSlide is to open.

OpenSlide opens one file of a series and finds the others beside it by their series UID. Only the
head of each file is read here, for the two UIDs that say what it is (DICOM PS3.5 section 7, PS3.10
section 7.1).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from utils.errors import SlideError
from wsi_core.slide_files import DICOM_SUFFIXES

WHOLE_SLIDE_IMAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
_HEAD_BYTES = 2**18  # both UIDs stand before anything large
_SOP_CLASS, _SERIES = (0x0008, 0x0016), (0x0020, 0x000E)
_ITEM_GROUP, _SEQUENCE_END = 0xFFFE, (0xFFFE, 0xE0DD)
_UNDEFINED = 0xFFFFFFFF
_LONG_LENGTH = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN",
                          b"UR", b"UT", b"UV"))


def file_to_open(folder: Path) -> Path | None:
    """A file of the folder's only series of whole-slide images; None when there is none.

    Raises SlideError when the folder mixes two slides.
    """
    series: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in DICOM_SUFFIXES and path.is_file():
            uid = slide_series(path)
            if uid:
                series.setdefault(uid, path)
    if len(series) > 1:
        raise SlideError(f"{folder}: mixes {len(series)} DICOM series (one is that of "
                         + ", another that of ".join(path.name for path in
                                                     list(series.values())[:2])
                         + "): give each series a folder of its own")
    return next(iter(series.values()), None)


def slide_series(path: Path) -> str:
    """The series UID of a whole-slide image; "" for any other file."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head[128:132] != b"DICM":
        return ""
    try:
        uids = _Head(head).uids()
    except struct.error:  # damaged, or nothing of what is looked for in the head
        return ""
    return uids.get(_SERIES, "") if uids.get(_SOP_CLASS) == WHOLE_SLIDE_IMAGE else ""


class _Element(NamedTuple):
    tag: tuple[int, int]
    start: int  # of the value
    length: int


class _Head:
    """Walks the data elements at the start of a file with explicit lengths and VRs.

    OpenSlide reads no other transfer syntaxes than little endian ones.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data

    def uids(self) -> dict[tuple[int, int], str]:
        """SOP class and series of the data set, as far as they are there."""
        found: dict[tuple[int, int], str] = {}
        at = 132
        while _SERIES not in found:
            element = self._element(at)
            if element.tag > _SERIES:
                break
            if element.tag in (_SOP_CLASS, _SERIES):
                value = self._data[element.start:element.start + element.length]
                found[element.tag] = value.decode("latin-1").rstrip("\0 ")
            at = self._end(element)
        return found

    def _element(self, at: int) -> _Element:
        group, number = struct.unpack_from("<HH", self._data, at)
        if group == _ITEM_GROUP:  # delimiters have no VR
            return _Element((group, number), at + 8, *struct.unpack_from("<I", self._data, at + 4))
        kind = self._data[at + 4:at + 6]
        if kind in _LONG_LENGTH:
            return _Element((group, number), at + 12, *struct.unpack_from("<I", self._data, at + 8))
        return _Element((group, number), at + 8, *struct.unpack_from("<H", self._data, at + 6))

    def _end(self, element: _Element) -> int:
        """Where the next element starts; goes through sequences and items without a length."""
        if element.length != _UNDEFINED:
            return element.start + element.length
        depth, at = 1, element.start
        while depth:
            inner = self._element(at)
            if inner.tag[0] == _ITEM_GROUP and inner.length != _UNDEFINED and inner.length:
                at = inner.start + inner.length  # an item whose length is known
                continue
            ends = inner.tag in (_SEQUENCE_END, (_ITEM_GROUP, 0xE00D))
            depth += -1 if ends else int(inner.length == _UNDEFINED)
            at = inner.start if ends or inner.length == _UNDEFINED else inner.start + inner.length
        return at
