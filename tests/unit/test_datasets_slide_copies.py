"""Copies of slides while several threads and levels need them, and a copy that hangs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from datasets.slide_copies import SlideCopies
from utils.staging import Staging


def test_a_copy_stays_until_the_last_level_is_done(tmp_path: Path) -> None:
    slide = tmp_path / "a.tif"
    slide.write_bytes(b"pixels")
    with SlideCopies(tmp_path / "cache", Counter({slide: 2}), deadline_s=None) as copies:
        first, second = copies.fetch(slide), copies.fetch(slide)  # two threads
        assert first == second != slide and first.read_bytes() == b"pixels"
        copies.done(slide)
        assert copies.fetch(slide) == first and first.exists()
        copies.done(slide)
        assert not first.exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_slides_are_read_in_place_while_a_copy_hangs(tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A16: half the deadline is waited once, not for every slide after it."""
    paths = [tmp_path / f"{name}.tif" for name in "abcd"]
    over = threading.Event()
    monkeypatch.setattr(Staging, "_try_copy", lambda *given: over.wait(30) and None)
    try:
        with SlideCopies(tmp_path / "cache", Counter(paths), deadline_s=1.0) as copies:
            start = time.monotonic()
            assert [copies.fetch(path) for path in paths] == paths
            assert 0.4 < time.monotonic() - start < 1.5
    finally:
        over.set()
