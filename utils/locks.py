"""Who works on which item, when several processes share an output folder.

Correctness never rests on a lock (files appear whole, and equal work gives equal files); it only
saves doing a slide twice. ``filelock``'s soft lock records process, host and the process's start: a
lock whose owner is provably dead on this host is taken over, one of another host is respected.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

from utils.errors import ItemFailed

# What a file system says that cannot create a file exclusively, or link and rename as a lock needs
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class Claim:
    """Whether we hold an item; true when we do.

    exclusive: False on a file system without locks, where nobody can be kept out
    """

    def __init__(self, path: Path, *, held: bool, exclusive: bool = True) -> None:
        self._path = path
        self._held = held
        self._mark = _mark(path) if held and exclusive else None

    def __bool__(self) -> bool:
        return self._held

    def still_mine(self) -> bool:
        """False when the lock was deleted, or deleted and taken by another, since we got it."""
        return self._held and (self._mark is None or _mark(self._path) == self._mark)

    def confirm(self) -> None:
        """Raise ItemFailed unless the item is still ours: to be called before a final write."""
        if not self.still_mine():
            by = f", now {holder(self._path)} has it" if lock_path(self._path).exists() else ""
            raise ItemFailed(f"{lock_path(self._path)} was deleted while we worked{by}: nothing "
                             "was written; run the same command again")


@contextlib.contextmanager
def claim(path: Path) -> Iterator[Claim]:
    """Try to hold ``<path>.lock`` for the block; the claim is false when another live owner has it.

    On a file system that cannot lock, the claim is true and a warning says what that means.
    """
    lock = SoftFileLock(lock_path(path), timeout=0.2, poll_interval=0.05)
    try:
        lock.acquire()
    except Timeout:
        yield Claim(path, held=False)
        return
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_no_locks(path.parent, error.strerror or str(error))
        yield Claim(path, held=True, exclusive=False)
        return
    try:
        yield Claim(path, held=True)
    finally:
        lock.release()


def lock_path(path: Path) -> Path:
    """The lock file of an item's file."""
    return Path(f"{path}.lock")


def holder(path: Path) -> str:
    """Who holds ``<path>.lock``, for a message: "process 4711 on host node7"."""
    with contextlib.suppress(OSError, ValueError):
        process, host = lock_path(path).read_text(encoding="utf-8").splitlines()[:2]
        return f"process {int(process)} on host {host}"
    return f"another process (delete {lock_path(path)} if none is at work)"


def sweep_locks(folder: Path) -> None:
    """Remove locks in ``folder`` whose owners are provably dead; those of live ones stay."""
    for path in folder.glob("*.lock"):
        with claim(path.with_suffix("")):
            pass


def _mark(path: Path) -> tuple[int, str] | None:
    """What tells this lock file from one made later, even by the same process."""
    try:
        with lock_path(path).open(encoding="utf-8") as file:
            return os.fstat(file.fileno()).st_ino, file.read()
    except OSError:
        return None


@functools.cache  # once a folder and process
def _warn_no_locks(folder: Path, why: str) -> None:
    print(f"warning: {folder}: this file system has no locks ({why}). Results stay right, but two "
          "runs at a time would do the same slides twice: run one at a time here, or choose an "
          "output folder on another disk", file=sys.stderr)
