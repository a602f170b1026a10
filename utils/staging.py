"""Copies of slides on a fast local disk, made ahead of their use: ``--cache_dir``.

A thread copies slide after slide in the order of use, a few ahead; a reader fetches the path of the
copy and releases it when done, which removes it. What cannot be copied (no space, a format whose
files cannot be told apart) is read where it is, with one line on stderr. A copy keeps the name and
the bytes of its slide; what is recorded of a slide should still be taken from the original.

Each process has a folder of its own in the cache folder, so any number may share it; what killed
ones left behind is removed at the next start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Self

from utils.errors import ItemFailed
from utils.storage import free_bytes, writable_folder
from utils.temporaries import temp_prefix

CHUNK_BYTES = 16 << 20  # of a copy, between looks at whether it is still wanted
END_S = 5.0  # to wait for the copy in hand, which sees after a chunk that the run ends
RESERVE_BYTES = 64 << 20  # left free for what else is written to that disk

# Formats of several files that do not name each other in a way we can follow: any DICOM file of the
# folder may belong to the slide; Olympus and OME-XML refer to files by rules of their own.
UNFOLLOWED = (".dcm", ".vsi", ".companion.ome")
MAX_INDEX_BYTES = 1 << 20  # of a .vms or .vmu file, which lists its companions


class _State(Enum):
    WAITING = "waiting"
    COPYING = "copying"
    COPIED = "copied"
    IN_PLACE = "in place"


@dataclass
class _Entry:
    state: _State = _State.WAITING
    place: Path | None = None  # the copy
    users: int = 0
    wanted: bool = False  # somebody waits for it or has it
    dropped: bool = False  # released while it was being copied


class Staging:
    """Local copies of ``paths``; a context manager whose methods any thread may call.

    cache_dir: a folder on a fast disk, made if need be; None: everything is read in place
    paths: slide files (or folders) in the order of use; others may be fetched too
    ahead: how many copies to make that nobody has fetched yet
    patience_s: how long a ``fetch`` waits for a copy before the slide is read in place, None = as
        long as it takes; until the copy at hand has ended, nobody waits any more then

        with Staging(cache_dir, paths) as staging:
            local = staging.fetch(path)
            ...
            staging.release(path)

    Raises Refused when the cache folder cannot be written.
    """

    def __init__(self, cache_dir: Path | None, paths: Iterable[Path], *, ahead: int = 2,
                 patience_s: float | None = None) -> None:
        self._cache_dir = cache_dir
        self._patience_s = patience_s
        self._stalled = False
        self._ahead = ahead
        self._entries = {Path(path): _Entry() for path in paths}
        self._changed = threading.Condition()
        self._closed = False
        self._copies = 0

    def __enter__(self) -> Self:
        if self._cache_dir is not None:
            writable_folder(self._cache_dir, what="--cache_dir")  # sweeps what dead ones left
            self._folder = Path(tempfile.mkdtemp(dir=self._cache_dir, prefix=temp_prefix()))
            self._thread = threading.Thread(target=self._copy_all, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cache_dir is None:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(END_S)  # a read that hangs is left alone: the next start sweeps
        shutil.rmtree(self._folder, ignore_errors=True)

    def fetch(self, path: Path) -> Path:
        """The slide's copy, waited for, or ``path`` itself where there is none.

        It stays until every ``fetch`` of the path has had its ``release``.
        """
        if self._cache_dir is None:
            return path
        with self._changed:
            entry = self._entries.setdefault(path, _Entry())
            entry.users += 1
            entry.wanted, entry.dropped = True, False
            self._changed.notify_all()
            ended = (_State.COPIED, _State.IN_PLACE)
            self._stalled |= not self._changed.wait_for(
                lambda: self._closed or self._stalled or entry.state in ended, self._patience_s)
            return entry.place or path

    def release(self, path: Path) -> None:
        """The slide is done with, or (never fetched) not needed after all: its copy goes."""
        with self._changed:
            entry = self._entries.get(path)
            if entry is None:
                return
            entry.users = max(0, entry.users - 1)
            if entry.users:
                return
            if entry.state is _State.COPYING:
                entry.dropped = True
                return
            del self._entries[path]
            self._changed.notify_all()
        _remove(entry.place)

    # ------------------------------------------------------------------------ the copying thread

    def _copy_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                path = self._next()
                if self._closed or path is None:
                    return
                entry = self._entries[path]
                entry.state = _State.COPYING
                self._copies += 1
                place = self._folder / str(self._copies)
            copy = self._try_copy(path, place)
            with self._changed:
                self._stalled = False
                entry.place = copy
                entry.state = _State.IN_PLACE if copy is None else _State.COPIED
                unused = copy is None or entry.dropped
                if entry.dropped:
                    del self._entries[path]
                self._changed.notify_all()
            if unused:
                shutil.rmtree(place, ignore_errors=True)

    def _next(self) -> Path | None:
        """What to copy now: what somebody waits for, else the next one, up to ``ahead``."""
        waiting = [path for path, entry in self._entries.items() if entry.state is _State.WAITING]
        for path in waiting:
            if self._entries[path].wanted:
                return path
        unused = sum(entry.state is _State.COPIED and not entry.wanted
                     for entry in self._entries.values())
        return waiting[0] if waiting and unused < self._ahead else None

    def _try_copy(self, path: Path, place: Path) -> Path | None:
        """The copy in the new folder ``place``, or None with a line that says why not."""
        try:
            sources = companions(path)
            need, free = sum(map(_bytes, sources)), free_bytes(self._folder)
            if need + RESERVE_BYTES > free:
                raise ItemFailed(f"no space (needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB free)")
            place.mkdir(parents=True)
            for source in sources:
                self._copy(source, place / source.name)
        except _Unwanted:
            return None
        except Exception as error:  # whatever a disk can raise: nobody may wait here for ever
            why = getattr(error, "strerror", None) or error
            print(f"warning: {path}: not copied to {self._cache_dir} ({why}): it is read where it "
                  "is", file=sys.stderr)
            return None
        return place / path.name

    def _copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            target.mkdir()
            for inner in source.iterdir():
                self._copy(inner, target / inner.name)
            return
        with source.open("rb") as reading, target.open("xb") as writing:
            while chunk := reading.read(CHUNK_BYTES):
                if self._closed:
                    raise _Unwanted
                writing.write(chunk)
            if writing.tell() != os.fstat(reading.fileno()).st_size:
                raise ItemFailed("it changed while it was copied")


class _Unwanted(Exception):
    """The run ends in the middle of a copy."""


def companions(path: Path) -> list[Path]:
    """The slide and the files or folders without which it is incomplete.

    MIRAX has its data in a folder of the same stem; a Hamamatsu .vms or .vmu names its files; a
    folder (DICOM, Zarr) is a whole. Raises ItemFailed for formats that cannot be followed.
    """
    name = path.name.lower()
    if name.endswith(UNFOLLOWED) and path.is_file():
        raise ItemFailed("a format of several files that do not all name each other")
    if name.endswith(".mrxs"):
        return [path, path.with_suffix("")]
    if name.endswith((".vms", ".vmu")):
        with path.open(encoding="latin-1") as file:
            text = file.read(MAX_INDEX_BYTES)
        values = [line.partition("=")[2].strip() for line in text.splitlines()]
        names = dict.fromkeys(value for value in values if value and "/" not in value)
        return [path, *(path.parent / one for one in names if (path.parent / one).is_file())]
    return [path]


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
    return path.stat().st_size


def _remove(place: Path | None) -> None:
    if place is not None:
        with contextlib.suppress(OSError):
            shutil.rmtree(place.parent)
