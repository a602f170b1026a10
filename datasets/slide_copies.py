"""Copies of slides on a faster disk while several reading threads and levels need them."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Self

from utils.staging import Staging


class SlideCopies:
    """A context manager. uses: how often each slide will be ``done``, in the order of use

    cache_dir: None = slides are read where they are
    deadline_s: how long reading a slide may take; half of it is waited for its copy
    """

    def __init__(self, cache_dir: Path | None, uses: Counter[Path], *,
                 deadline_s: float | None) -> None:
        self._left = Counter(uses)
        self._fetched: Counter[Path] = Counter()
        self._staging = Staging(cache_dir, list(self._left),
                                patience_s=None if deadline_s is None else deadline_s / 2)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._staging.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._staging.__exit__()

    def fetch(self, path: Path) -> Path:
        """The file to open for a slide, from any thread."""
        with self._lock:
            self._fetched[path] += 1
        return self._staging.fetch(path)

    def done(self, path: Path) -> None:
        """A slide, or one level of it, is finished."""
        self._left[path] -= 1
        if self._left[path] == 0:
            for _ in range(max(1, self._fetched.pop(path, 0))):
                self._staging.release(path)
