"""Patches of many slides in one LMDB file, for end-to-end learning (``--save_lmdb``).

Workers, on any number of machines, read and encode; each slide becomes a part, a zip of encoded
patches beside the database that appears whole or not at all. One process then takes the parts in,
one transaction a slide, so that a killed run goes on with the next slide and no writer ever waits
for pixels. The database holds raw JPEG, PNG or WebP values under integer keys and everything else
as json, nothing that could run code:

    b"meta"                     schema, tool version, encoding, quality, channel order, next index,
                                complete, slides that are missing
    b"slide/<level>/<slide>"    count, first index, sizes, um per px, sha256 of the values
    b"coords/<level>/<slide>"   [[x, y], ...] level-0 px, one pair a patch
    b"patch" + 8 bytes          the patch of that index (big-endian)

``level`` names a magnification where there are several, else it is empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from utils import __version__
from utils.errors import BrokenFile, ItemFailed, Refused, SlideError
from utils.faults import fault_point
from utils.storage import atomic_file, canonical, inside, safe_id
from wsi_core.coords import PatchCoords, coords_digest
from wsi_core.patch_images import Encoding, encode_image, keep_by_pixels
from wsi_core.slide import Slide, stamp

SCHEMA = 1
META = b"meta"
CHANNELS = "RGB"
_SPARE_BYTES = 64 * 2**20  # of the map beyond what the next slide takes
_RECORD = "part.json"  # of a part, written last


def patch_key(index: int) -> bytes:
    """Key of the patch with this index."""
    return b"patch" + index.to_bytes(8, "big")


def record_key(kind: str, level: str, slide_id: str) -> bytes:
    """Key of the ``slide`` or ``coords`` record of a slide."""
    return f"{kind}/{level}/{slide_id}".encode()


def lmdb_path(folder: Path, name: str) -> Path:
    """Where ``--save_lmdb name`` goes: ``<folder>/<name>.lmdb``. Refused: not a plain name."""
    return inside(folder, f"{safe_id(name.removesuffix('.lmdb'), what='--save_lmdb')}.lmdb")


def part_path(database: Path, slide_id: str, *, level: str = "") -> Path:
    """Where the part of a slide waits: ``<name>.lmdb.parts/[<level>/]<slide>.zip``."""
    folder = database.with_name(database.name + ".parts")
    return inside(folder, level, f"{safe_id(slide_id)}.zip")


def import_lmdb() -> ModuleType:
    """The lmdb package, or ``Refused`` with the command that installs it."""
    try:
        import lmdb
    except ImportError:
        raise Refused("an LMDB needs the package lmdb: pip install lmdb") from None
    module: ModuleType = lmdb
    return module


def origin(patches: PatchCoords, coords: np.ndarray, *, encoding: Encoding, quality: int
           ) -> dict[str, Any]:
    """What the stored pixels of a slide depend on; equal origins need not be encoded again."""
    return {"coords_sha256": coords_digest(coords), "patch_level": patches.patch_level,
            "patch_px": patches.patch_size, "output_px": patches.output_size,
            "background": list(patches.background), "encoding": encoding,
            "quality": quality if encoding.startswith("jpeg") else None,
            "slide_bytes": patches.parameters.get("slide_bytes")}


# ---------------------------------------------------------------------------- parts

class PartSink:
    """A sink (see ``patch_images``) that stores patches in a part; made by ``write_part``."""

    def __init__(self, archive: zipfile.ZipFile, *, encoding: Encoding, quality: int) -> None:
        self._archive, self.encoding, self.quality = archive, encoding, quality
        self.coords: list[tuple[int, int]] = []

    def encode(self, patch: np.ndarray) -> bytes:
        """See ``Sink``."""
        return encode_image(patch, self.encoding, quality=self.quality)

    def put(self, x: int, y: int, data: bytes) -> None:
        """See ``Sink``."""
        self._archive.writestr(zipfile.ZipInfo(str(len(self.coords))), data)
        self.coords.append((x, y))


@contextlib.contextmanager
def write_part(path: Path, patches: PatchCoords, *, level: str = "", encoding: Encoding = "jpeg",
               quality: int = 90) -> Iterator[PartSink]:
    """A sink whose patches become the part ``path`` when the block ends well.

    ``patches`` tells sizes and scale; rows and coordinates are those put into the sink, so it may
    stand behind a filter. level: name of the magnification, "" when there is one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        sink = PartSink(archive, encoding=encoding, quality=quality)
        yield sink
        coords = np.array(sink.coords, np.int64).reshape(-1, 2)
        record = {
            "slide_id": patches.slide_id, "level": level, "count": len(coords),
            "output_px": patches.output_size, "mpp_um": patches.mpp_um,
            "slide_mpp_um": patches.slide_mpp_um, "slide_size": patches.slide_size,
            "footprint_px_l0": patches.footprint_px_l0, "step_px_l0": patches.step_px_l0,
            "origin": origin(patches, coords, encoding=encoding, quality=quality),
            "coords": coords.tolist()}
        archive.writestr(zipfile.ZipInfo(_RECORD), canonical(record))


def pack_part(slide: Slide, patches: PatchCoords, path: Path, *, level: str = "",
              encoding: Encoding = "jpeg", quality: int = 90, threads: int = 1) -> None:
    """Read and encode all ``patches`` of a slide into the part ``path``. SlideError, OSError."""
    before = stamp(slide.path)
    with write_part(path, patches, level=level, encoding=encoding, quality=quality) as sink:
        keep_by_pixels(slide, patches, sinks=[sink], threads=threads)
        if stamp(slide.path) != before:
            raise SlideError(f"{slide.path}: was replaced while it was read: run the same command "
                             "again")


def part_done(path: Path, patches: PatchCoords, *, encoding: Encoding, quality: int) -> bool:
    """Is ``path`` a whole part of just these patches, encoded so?"""
    try:
        with _open_part(path) as (_, record):
            return bool(record["origin"] == origin(patches, patches.coords, encoding=encoding,
                                                   quality=quality))
    except BrokenFile:
        return False


@contextlib.contextmanager
def _open_part(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, Any]]]:
    """A part and its record, or ``BrokenFile``, also when a value fails its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive, json.loads(archive.read(_RECORD))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise BrokenFile(f"{path} is no whole part of a patch database ({error}): delete it and "
                         "run the same command again") from None


# ---------------------------------------------------------------------------- the database

class PatchLmdb:
    """The one writer of a patch database; a context manager.

    Opened again it goes on: ``holds`` says which slides are in. Refused: lmdb is not installed,
    the file is another tool's, or holds patches of another encoding or quality.
    """

    def __init__(self, path: Path, *, encoding: Encoding = "jpeg", quality: int = 90) -> None:
        self._lmdb = import_lmdb()
        self.path = path
        wanted = {"schema": SCHEMA, "encoding": encoding, "channel_order": CHANNELS,
                  "quality": quality if encoding.startswith("jpeg") else None}
        try:
            self._env = self._lmdb.open(str(path), subdir=False, map_size=_SPARE_BYTES,
                                        meminit=False)
        except self._lmdb.Error as error:
            raise Refused(f"{path} cannot be opened as an LMDB ({error}): choose another name, or "
                          "delete the file") from None
        try:
            self._claim(wanted)
        except BaseException:
            self.close()
            raise

    def _claim(self, wanted: dict[str, Any]) -> None:
        """Write the meta record of a new file; compare that of an old one."""
        with self._env.begin() as txn:
            text, entries = txn.get(META), txn.stat()["entries"]
        if text is None and entries:
            raise Refused(f"{self.path} was not written by this toolkit: choose another name")
        if text is None:
            with self._env.begin(write=True) as txn:
                self._put(txn, META, {**wanted, "tool_version": __version__, "next": 0,
                                      "complete": False, "missing": []})
            return
        found = json.loads(text)
        for name, value in wanted.items():
            if found.get(name) != value:
                raise Refused(f"{self.path} holds patches with {name} {found.get(name)}, you ask "
                              f"{value}: choose another name, or delete the file")

    def holds(self, patches: PatchCoords, *, level: str = "") -> bool:
        """Are just these patches of the slide in already?"""
        with self._env.begin() as txn:
            text = txn.get(record_key("slide", level, patches.slide_id))
            meta = json.loads(txn.get(META))
        return text is not None and bool(json.loads(text)["origin"] == origin(
            patches, patches.coords, encoding=meta["encoding"], quality=meta["quality"]))

    def add(self, part: Path) -> int:
        """Take a part in, in place of an older one of its slide and level; returns its patches.

        Raises BrokenFile for a damaged part, ItemFailed when the database cannot be written; the
        slides that are in stay in. The part is left for the caller to delete.
        """
        with _open_part(part) as (archive, record):
            self._make_room(part.stat().st_size)
            while True:
                try:
                    with self._env.begin(write=True) as txn:
                        self._store(txn, archive, record)
                        fault_point("lmdb.commit")
                    return int(record["count"])
                except self._lmdb.MapFullError:  # rolled back as a whole
                    self._env.set_mapsize(2 * self._env.info()["map_size"])
                except self._lmdb.MapResizedError:  # by another process
                    self._env.set_mapsize(0)
                except self._lmdb.Error as error:
                    raise ItemFailed(f"{self.path} cannot be written ({error}): what is in it is "
                                     "kept, run the same command again to go on") from None

    def finish(self, *, missing: Sequence[str] = ()) -> None:
        """Say that the database is complete but for the slides ``missing``: readers open it now."""
        with self._env.begin() as txn:
            meta = json.loads(txn.get(META))
        finished = {**meta, "complete": True, "missing": sorted(missing)}
        if finished != meta:  # a file that is complete is not touched
            with self._env.begin(write=True) as txn:
                self._put(txn, META, finished)

    def close(self) -> None:
        """Give the file back; without ``finish`` readers refuse it."""
        self._env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _make_room(self, part_bytes: int) -> None:
        """Grow the map ahead of a slide; values fill whole pages, hence twice its bytes."""
        used = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if (needed := used + 2 * part_bytes + _SPARE_BYTES) > self._env.info()["map_size"]:
            self._env.set_mapsize(needed)

    def _store(self, txn: Any, archive: zipfile.ZipFile, record: dict[str, Any]) -> None:
        meta = json.loads(txn.get(META))
        record = dict(record)
        coords = record.pop("coords")
        where = (record["level"], record["slide_id"])
        if (older := txn.get(record_key("slide", *where))) is not None:
            first, count = (json.loads(older)[name] for name in ("first", "count"))
            for index in range(first, first + count):
                txn.delete(patch_key(index))
        sha256 = hashlib.sha256()
        for row in range(record["count"]):
            data = archive.read(str(row))
            sha256.update(data)
            txn.put(patch_key(meta["next"] + row), data)
        self._put(txn, record_key("slide", *where),
                  {**record, "first": meta["next"], "sha256": sha256.hexdigest()})
        self._put(txn, record_key("coords", *where), coords)
        self._put(txn, META, {**meta, "next": meta["next"] + record["count"], "complete": False})

    def _put(self, txn: Any, key: bytes, value: Any) -> None:
        txn.put(key, json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
