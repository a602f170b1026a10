"""Reading patches from an LMDB: ours (``patch_lmdb.py``) and the layout ABMILX publishes.

Patches have indices 0 .. N - 1 over all slides and levels, a slide's in one row, so sampling needs
integers and no list of keys. The published files hold pickles; they go through an unpickler that
refuses every class, so nothing in them can run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from utils.errors import BrokenFile, ItemFailed
from wsi_core.patch_lmdb import META, SCHEMA, import_lmdb, patch_key, record_key

Channels = Literal["RGB", "BGR"]

_SLIDES, _COUNTS = b"__slide__", b"__pn__"  # of the published layout
_MAX_PICKLE_BYTES = 64 * 2**20  # patches and lists of slides are far below


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A slide at one level: its patches have the keys ``first``, ``first + 1`` ..., or, in the
    published layout (``first`` None), ``<slide>-0``, ``<slide>-1`` ..."""

    slide_id: str
    level: str
    count: int
    first: int | None

    def key(self, row: int) -> bytes:
        """The key of one of its patches."""
        return f"{self.slide_id}-{row}".encode() if self.first is None else patch_key(
            self.first + row)


class _Environment:
    """An open LMDB of this process; closed when the last reader that uses it lets go."""

    def __init__(self, path: Path) -> None:
        lmdb = import_lmdb()
        try:
            self.env = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False,
                                 readahead=False)
        except (lmdb.Error, OSError) as error:
            raise BrokenFile(f"{path} cannot be opened as an LMDB ({error})") from None
        self.pid = os.getpid()
        file = path / "data.mdb" if path.is_dir() else path
        needed = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        if file.stat().st_size < needed:  # reading beyond the end would kill the process
            raise BrokenFile(f"{path} is truncated: {file.stat().st_size} of {needed} bytes")


# A process may open an LMDB once, but training and validation read the same one.
_environments: weakref.WeakValueDictionary[tuple[int, ...], _Environment]
_environments = weakref.WeakValueDictionary()
_opening = threading.Lock()  # reading threads that begin at once share one


def _environment(path: Path) -> _Environment:
    import_lmdb()
    with _opening:
        return _shared_environment(path)


def _shared_environment(path: Path) -> _Environment:
    try:
        status = path.stat()
    except OSError:
        raise BrokenFile(f"{path} is missing") from None
    for inherited in list(_environments.values()):
        if inherited.pid != os.getpid():  # from before a fork; it would count as open here
            inherited.env.close()
    key = (os.getpid(), status.st_dev, status.st_ino)
    found = _environments.get(key)
    if found is None:
        found = _environments[key] = _Environment(path)
    return found


class PatchLmdbReader:
    """Patches by index; a context manager that may be pickled and used in any process.

    channels: order of what is returned. Files hold true colours; ABMILX's own programs decode to
        BGR, and networks trained by them expect that
    Raises BrokenFile: missing, truncated, no patch database, not finished; Refused: no lmdb.
    """

    def __init__(self, path: Path, *, channels: Channels = "RGB") -> None:
        self.path, self.channels = Path(path), channels
        self._open: _Environment | None = None
        with self._environment().begin() as txn:
            self.published = txn.get(META) is None
            entries = self._published(txn) if self.published else self._ours(txn)
        self._entries = entries
        self._ends = np.cumsum([entry.count for entry in entries], dtype=np.int64)
        self._places = {(entry.level, entry.slide_id): number
                        for number, entry in enumerate(entries)}

    # ------------------------------------------------------------------ what there is

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def levels(self) -> list[str]:
        """Names of the magnifications; [""] when there is one without a name."""
        return sorted({entry.level for entry in self._entries})

    def slides(self, *, level: str = "") -> list[str]:
        """Ids of the slides at a level."""
        return [entry.slide_id for entry in self._entries if entry.level == level]

    def rows(self, slide_id: str, *, level: str = "") -> range:
        """Indices of a slide's patches, in the order of its coordinates. ItemFailed: not here."""
        number = self._place(slide_id, level)
        end = int(self._ends[number])
        return range(end - self._entries[number].count, end)

    def facts(self, slide_id: str, *, level: str = "") -> dict[str, Any]:
        """The record of a slide: count, output_px, mpp_um, footprint_px_l0 ...; {} if published."""
        self._place(slide_id, level)
        if self.published:
            return {}
        facts: dict[str, Any] = json.loads(self._get(record_key("slide", level, slide_id)))
        return facts

    def coords(self, slide_id: str, *, level: str = "") -> np.ndarray:
        """(n, 2) int64 top-left corners in level-0 px, rows as ``rows``.

        ItemFailed for the published layout, which holds none.
        """
        self._place(slide_id, level)
        if self.published:
            raise ItemFailed(f"{self.path} holds no coordinates (published layout): take them from "
                             "the slide's h5")
        text = self._get(record_key("coords", level, slide_id))
        return np.array(json.loads(text), np.int64).reshape(-1, 2)

    def verify(self, slide_id: str, *, level: str = "") -> None:
        """Raise BrokenFile when a slide's patches are not those that were stored."""
        expected = self.facts(slide_id, level=level).get("sha256")
        found = hashlib.sha256()
        for index in self.rows(slide_id, level=level):
            found.update(self.encoded(index))
        if expected is not None and found.hexdigest() != expected:
            raise BrokenFile(f"{self.path}: the patches of {slide_id} fail their checksum: the "
                             "file was altered, write it again")

    # ------------------------------------------------------------------ patches

    def __getitem__(self, index: int) -> np.ndarray:
        """The patch as (h, w, 3) uint8 in the order ``channels``. IndexError, BrokenFile."""
        import cv2

        data = np.frombuffer(self.encoded(index), np.uint8)
        try:
            patch = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:  # no bytes at all
            patch = None
        if patch is None:
            raise BrokenFile(f"{self.path}: patch {index} is no picture: write the file again")
        return patch if self.channels == "BGR" else cv2.cvtColor(patch, cv2.COLOR_BGR2RGB)

    def encoded(self, index: int) -> bytes:
        """The stored JPEG, PNG or WebP of a patch."""
        if not 0 <= index < len(self):
            raise IndexError(f"patch {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        entry = self._entries[number]
        row = index - int(self._ends[number]) + entry.count
        data = self._get(entry.key(row))
        if not self.published:
            return data
        value = self._plain(data)
        if not isinstance(value, bytes):
            raise BrokenFile(f"{self.path}: patch {index} is a {type(value).__name__}, bytes were "
                             "expected")
        return value

    def close(self) -> None:
        """Give the file back once no other reader uses it; the next read opens it again."""
        self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    # ------------------------------------------------------------------ the file

    def _environment(self) -> Any:
        """This process's own handle: one inherited by a fork is not used."""
        if self._open is None or self._open.pid != os.getpid():
            self._open = _environment(self.path)
        return self._open.env

    def _get(self, key: bytes) -> bytes:
        with self._environment().begin() as txn:
            value = txn.get(key)
        if value is None:
            raise BrokenFile(f"{self.path} lacks the record {key!r}: write the file again")
        return bytes(value)

    def _place(self, slide_id: str, level: str) -> int:
        try:
            return self._places[level, slide_id]
        except KeyError:
            where = f" at level '{level}'" if level else ""
            raise ItemFailed(f"{self.path} holds no slide '{slide_id}'{where}") from None

    def _ours(self, txn: Any) -> list[_Entry]:
        try:
            meta = json.loads(txn.get(META))
            if meta["schema"] != SCHEMA:
                raise BrokenFile(f"{self.path} has schema {meta['schema']}, this version reads "
                                 f"{SCHEMA}")
            if not meta["complete"]:
                raise BrokenFile(f"{self.path} was never finished: run the command that writes it "
                                 "again")
            entries = []
            cursor = txn.cursor()
            if cursor.set_range(b"slide/"):
                for key, text in cursor:
                    if not key.startswith(b"slide/"):
                        break
                    record = json.loads(text)
                    entries.append(_Entry(slide_id=record["slide_id"], level=record["level"],
                                          count=record["count"], first=record["first"]))
            return entries
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenFile(f"{self.path} has records that make no sense ({error})") from None

    # ------------------------------------------------------------------ the published layout

    def _published(self, txn: Any) -> list[_Entry]:
        """Slides and counts of ABMILX's files; their list of all keys is not read."""
        slides, counts = txn.get(_SLIDES), txn.get(_COUNTS)
        if slides is None or counts is None:
            raise BrokenFile(f"{self.path} is no patch database: neither ours nor ABMILX's")
        names, numbers = self._plain(slides), self._plain(counts)
        if not (isinstance(names, list) and isinstance(numbers, dict)
                and all(isinstance(name, str) and isinstance(numbers.get(name), int)
                        and numbers[name] >= 0 for name in names)):
            raise BrokenFile(f"{self.path}: __slide__ and __pn__ are no list of names and their "
                             "counts")
        return [_Entry(slide_id=name, level="", count=numbers[name], first=None)
                for name in dict.fromkeys(names)]

    def _plain(self, data: bytes) -> Any:
        """A pickle of plain containers, text, bytes and numbers; anything else is refused."""
        if len(data) > _MAX_PICKLE_BYTES:
            raise BrokenFile(f"{self.path} has a record of {len(data)} bytes, over the ceiling of "
                             f"{_MAX_PICKLE_BYTES}")
        try:
            return _PlainUnpickler(io.BytesIO(data)).load()
        except Exception as error:  # a damaged pickle raises nearly anything
            raise BrokenFile(f"{self.path} holds a pickle that is refused: {error}") from None


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, text, bytes and numbers; whatever names a class or function is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which could run code")
