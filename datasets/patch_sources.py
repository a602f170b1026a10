"""Where the patches of one magnification are: in an LMDB, or in the slides themselves.

A source says what it has of a slide, and lends a function that reads one patch in any thread.
Slide ids match exactly: ``a-1`` is never a part of ``a-10``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.errors import BrokenFile, ItemFailed, Refused
from utils.storage import safe_id
from wsi_core.coords import PatchCoords, read_coords_inside
from wsi_core.layouts import TRIDENT_FOLDERS, find_coords, list_coords
from wsi_core.patch_images import CACHE_MB, SlideHandles
from wsi_core.patch_lmdb_reader import PatchLmdbReader
from wsi_core.patching import check_made_from
from wsi_core.slide import stamp

ReadPatch = Callable[[int], np.ndarray]  # row -> (h, w, 3) uint8 RGB; ItemFailed; any thread

_LEAST_CACHE_MB = 64  # of decoded tiles, each thread


@dataclass(frozen=True, kw_only=True)
class SlideFacts:
    """What is known of a slide's patches without reading one.

    count: how many; px: side of one as it is handed out; mpp_um: um per px of that;
    footprint_px_l0: side of what it shows, level-0 px; None when unknown
    encoding: how they were stored, e.g. "jpeg 90"; "" where they are read from the slide
    """

    count: int
    px: int | None = None
    mpp_um: float | None = None
    footprint_px_l0: int | None = None
    encoding: str = ""


class PatchSource(Protocol):
    """Patches of slides at one magnification. Pickled without anything open."""

    @property
    def root(self) -> Path:
        """The file or folder."""
        ...

    @property
    def kind(self) -> str:
        """One of "lmdb", "abmilx lmdb", "coordinates"."""
        ...

    def slides(self) -> list[str]:
        """Ids of the slides that are there."""
        ...

    def lacks(self, slide_id: str) -> str:
        """The file or record of the slide that is missing; "" when it has all."""
        ...

    def facts(self, slide_id: str) -> SlideFacts:
        """``ItemFailed`` where what is there cannot be used."""
        ...

    def coords(self, slide_id: str) -> np.ndarray | None:
        """(N, 2) int64 top-left x, y in level-0 px, None when unknown; errors as ``facts``."""
        ...

    def reading(self, slide_id: str, *, threads: int) -> AbstractContextManager[ReadPatch]:
        """A function that reads patches by row, for up to so many threads; errors as ``facts``."""
        ...

    def stamps(self, slide_id: str) -> list[tuple[int, int]]:
        """Bytes and newest change (ns) of each of the slide's files."""
        ...


def open_source(text: str, *, flag: str, slide_dir: Path | None, slide_ext: str) -> PatchSource:
    """The source that a flag names: ``x.lmdb``, ``x.lmdb#level``, or a folder of coordinates.

    ``Refused`` when it is not there, is something else, or a folder comes without ``slide_dir``.
    """
    name, _, level = (text, "", "") if Path(text).exists() else text.rpartition("#")
    path = Path(name or text)
    if not path.exists():
        raise Refused(f"{flag}: there is no {path}: give an LMDB of create_patches_fp.py "
                      "--save_lmdb, or its folder of coordinates")
    if path.is_file() or (path / "data.mdb").is_file():
        return LmdbSource.open(path, level=level if name != text else None, flag=flag)
    if level:
        raise Refused(f"{flag} {text}: {path} is a folder of coordinates, which has no levels "
                      "inside: give the folder of the level")
    if not any(any(path.glob(pattern)) for pattern in ("patches/", f"{TRIDENT_FOLDERS}/patches/")):
        raise Refused(f"{flag}: {path} has no folder 'patches': give the --save_dir of "
                      "create_patches_fp.py")
    if slide_dir is None:
        raise Refused(f"{flag}: {path} is a folder of coordinates, their pixels are in the slides: "
                      "give --data_slide_dir too")
    if not slide_dir.is_dir():
        raise Refused(f"--data_slide_dir: there is no folder {slide_dir}")
    dotted = slide_ext if slide_ext.startswith(".") or not slide_ext else f".{slide_ext}"
    return SlideSource(root=path, slide_dir=slide_dir, slide_ext=dotted)


# ---------------------------------------------------------------------------- an LMDB

@dataclass(kw_only=True)
class LmdbSource:
    """One level of an LMDB, ours or ABMILX's."""

    reader: PatchLmdbReader
    level: str

    @classmethod
    def open(cls, path: Path, *, level: str | None, flag: str) -> LmdbSource:
        """``level`` None: the one there is, or the coarse one of a hierarchy. ``Refused``."""
        try:
            reader = PatchLmdbReader(path)
        except BrokenFile as error:
            raise Refused(f"{flag}: {error}") from None
        levels = reader.levels()
        if level is None:
            level = levels[0] if len(levels) == 1 else ""
        if level not in levels:
            names = ", ".join(f"{path.name}#{name}" if name else path.name for name in levels)
            raise Refused(f"{flag}: {path} has no level '{level}': give one of "
                          f"{names or 'another file, this one is empty'}")
        return cls(reader=reader, level=level)

    @property
    def root(self) -> Path:
        """The file."""
        return self.reader.path

    @property
    def kind(self) -> str:
        """Whose layout it has."""
        return "abmilx lmdb" if self.reader.published else "lmdb"

    def slides(self) -> list[str]:
        """See ``PatchSource``."""
        return self.reader.slides(level=self.level)

    def lacks(self, slide_id: str) -> str:
        """See ``PatchSource``."""
        try:
            self.reader.rows(slide_id, level=self.level)
        except ItemFailed:
            return f"{slide_id} in {self._name}"
        return ""

    @property
    def _name(self) -> str:
        return f"{self.root}#{self.level}" if self.level else str(self.root)

    def facts(self, slide_id: str) -> SlideFacts:
        """See ``PatchSource``; of ABMILX's files only the count is known."""
        record = self.reader.facts(slide_id, level=self.level)
        if not record:
            return SlideFacts(count=len(self.reader.rows(slide_id, level=self.level)))
        try:
            origin = record["origin"]
            quality = "" if origin["quality"] is None else f" {origin['quality']}"
            return SlideFacts(
                count=int(record["count"]), px=int(record["output_px"]),
                mpp_um=record["mpp_um"] and float(record["mpp_um"]),
                footprint_px_l0=int(record["footprint_px_l0"][0]),
                encoding=f"{origin['encoding']}{quality}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BrokenFile(f"{self.root}: the record of {slide_id} makes no sense ({error}): "
                             "write the file again") from None

    def coords(self, slide_id: str) -> np.ndarray | None:
        """See ``PatchSource``."""
        if self.reader.published:
            return None
        coords = self.reader.coords(slide_id, level=self.level)
        if len(coords) != (count := len(self.reader.rows(slide_id, level=self.level))):
            raise BrokenFile(f"{self.root}: {slide_id} has {len(coords)} coordinates for {count} "
                             "patches: write the file again")
        return coords

    @contextlib.contextmanager
    def reading(self, slide_id: str, *, threads: int) -> Iterator[ReadPatch]:
        """See ``PatchSource``; threads share the one open file."""
        first = self.reader.rows(slide_id, level=self.level).start

        def read(row: int) -> np.ndarray:
            return self.reader[first + row]

        yield read

    def stamps(self, slide_id: str) -> list[tuple[int, int]]:
        """See ``PatchSource``."""
        file = self.root / "data.mdb" if self.root.is_dir() else self.root
        status = file.stat()
        return [(status.st_size, status.st_mtime_ns)]


# ---------------------------------------------------------------------------- the slides

@dataclass(kw_only=True)
class SlideSource:
    """Coordinates of any of the layouts in ``root``, pixels in slides ``<id><slide_ext>``."""

    root: Path
    slide_dir: Path
    slide_ext: str
    kind: str = field(default="coordinates", init=False)

    def slides(self) -> list[str]:
        """See ``PatchSource``."""
        return list(list_coords(self.root))

    def lacks(self, slide_id: str) -> str:
        """See ``PatchSource``."""
        paths = self._files(slide_id)
        return next((str(path) for path in paths if not path.exists()), "")

    def facts(self, slide_id: str) -> SlideFacts:
        """See ``PatchSource``."""
        patches = self._patches(slide_id)
        return SlideFacts(count=len(patches), px=patches.output_size, mpp_um=patches.mpp_um,
                          footprint_px_l0=patches.footprint_px_l0[0])

    def coords(self, slide_id: str) -> np.ndarray:
        """See ``PatchSource``."""
        return self._patches(slide_id).coords

    @contextlib.contextmanager
    def reading(self, slide_id: str, *, threads: int) -> Iterator[ReadPatch]:
        """See ``PatchSource``; each thread has its own handle until the block ends."""
        handles = SlideHandles(self._files(slide_id)[1], self._patches(slide_id),
                               cache_mb=max(_LEAST_CACHE_MB, CACHE_MB // threads))

        def read(row: int) -> np.ndarray:
            return handles.reader()(row)

        try:
            yield read
        finally:
            handles.close()

    def stamps(self, slide_id: str) -> list[tuple[int, int]]:
        """See ``PatchSource``."""
        return [(found.n_bytes, found.changed_ns)
                for found in map(stamp, self._files(slide_id))]

    def _files(self, slide_id: str) -> tuple[Path, Path]:
        """Coordinates and slide."""
        return (find_coords(self.root, safe_id(slide_id)),
                self.slide_dir / f"{slide_id}{self.slide_ext}")

    def _patches(self, slide_id: str) -> PatchCoords:
        """Those inside the slide; in a finer level of a hierarchy some may lie beyond."""
        coords_path, slide_path = self._files(slide_id)
        patches = read_coords_inside(coords_path)
        check_made_from(slide_path, patches, coords_path)
        return patches


def shared_facts(found: list[SlideFacts]) -> dict[str, Any]:
    """What the patches of several slides have in common, sorted; mpp_um to two digits, as grids of
    whole pixels meet a wanted scale only about."""
    return {"px": sorted({one.px for one in found if one.px is not None}),
            "mpp_um": sorted({float(f"{one.mpp_um:.2g}") for one in found
                              if one.mpp_um is not None}),
            "encoding": sorted({one.encoding for one in found if one.encoding})}
