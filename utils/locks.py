"""Who works on which item, when several processes share an output folder.

Correctness never rests on a lock (files appear whole, and equal work gives equal files); it only
saves doing a slide twice. ``filelock``'s soft lock records host and process: a lock whose owner is
provably dead on this host is taken over, one of another host is respected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Try to hold ``<path>.lock`` for the block; yields False when another live owner has it."""
    lock = SoftFileLock(str(path) + ".lock", timeout=0.2, poll_interval=0.05)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def sweep_locks(folder: Path) -> None:
    """Remove locks in ``folder`` whose owners are provably dead; those of live ones stay."""
    for path in folder.glob("*.lock"):
        with claim(path.with_suffix("")):
            pass
