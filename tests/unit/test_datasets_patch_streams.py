"""Streams of patches: chunks, order, threads, memory that does not grow, and clean ends."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.patch_sources import ReadPatch, SlideFacts
from datasets.patch_streams import PatchRows, StreamedPatches
from utils.errors import ItemFailed


@dataclass(eq=False)
class Counted:
    """A source of one-coloured patches that counts what is read and by whom."""

    count: int = 100
    side_px: int = 4
    bad: dict[int, Exception] = field(default_factory=dict)
    large: frozenset[int] = frozenset()
    root: Path = Path("counted")
    kind: str = "lmdb"
    read: list[int] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    is_open: bool = False

    def slides(self) -> list[str]:
        return ["s"]

    def lacks(self, slide_id: str) -> str:
        return ""

    def facts(self, slide_id: str) -> SlideFacts:
        return SlideFacts(count=self.count)

    def coords(self, slide_id: str) -> None:
        return None

    def stamps(self, slide_id: str) -> list[tuple[int, int]]:
        return []

    @contextmanager
    def reading(self, slide_id: str, *, threads: int) -> Iterator[ReadPatch]:
        self.is_open = True
        try:
            yield self._one
        finally:
            self.is_open = False

    def _one(self, row: int) -> np.ndarray:
        assert self.is_open
        if row in self.bad:
            raise self.bad[row]
        self.read.append(row)
        self.threads.add(threading.get_ident())
        side = self.side_px + (row in self.large)
        return np.full((side, side, 3), row % 256, np.uint8)


def part(source: Counted, rows: np.ndarray | None = None) -> PatchRows:
    return PatchRows(source=source, slide_id="s",
                     rows=np.arange(source.count) if rows is None else rows)


def test_chunks_are_in_order_and_of_one_part_each() -> None:
    low, high = Counted(37, side_px=6), Counted(150)
    patches = StreamedPatches(parts=(part(low), part(high, np.arange(150)[::-1])), threads=3)
    assert len(patches) == 187
    for most in (1, 16, 50, 64, 1000):
        sizes = [min(most, count - start) for count in (37, 150)
                 for start in range(0, count, most)]
        for _ in range(2):  # the same answer again
            chunks = list(patches.stream(most))
            assert [len(chunk) for chunk in chunks] == sizes
            assert all(chunk.dtype == torch.uint8 and chunk.is_contiguous() for chunk in chunks)
            assert {tuple(chunk.shape[1:]) for chunk in chunks} == {(6, 6, 3), (4, 4, 3)}
            values = torch.cat([chunk[:, 0, 0, 0] for chunk in chunks]).tolist()
            assert values == [*range(37), *range(150)[::-1]]
    held = patches.held()
    assert len(held) == 187
    for most in (16, 1000):
        for one, other in zip(held.stream(most), patches.stream(most), strict=True):
            assert torch.equal(one, other)


def test_no_patches_give_no_chunks() -> None:
    patches = StreamedPatches(parts=(), threads=2)
    assert len(patches) == 0 and list(patches.stream(8)) == []
    assert list(patches.held().stream(8)) == []


def test_threads_share_the_reading() -> None:
    source = Counted(128)
    original = source._one

    def slow(row: int) -> np.ndarray:
        time.sleep(0.0005)
        return original(row)

    source._one = slow  # type: ignore[method-assign]
    list(StreamedPatches(parts=(part(source),), threads=2).stream(128))
    assert len(source.threads) == 2
    source.threads.clear()
    list(StreamedPatches(parts=(part(source),), threads=1).stream(128))
    assert len(source.threads) == 1


def test_reading_ahead_is_bounded_and_ends_with_the_caller() -> None:
    """While a chunk is looked at, the next is read and no more; closing the stream ends all."""
    source = Counted(1000)
    stream = part(source).chunks(50, threads=2, pin=False)
    assert isinstance(stream, Generator)
    for number in range(1, 4):
        next(stream)
        deadline = time.monotonic() + 5
        while len(source.read) < 50 * (number + 1) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.01)
        assert len(source.read) == 50 * (number + 1)
    before = threading.active_count()
    stream.close()
    assert not source.is_open and threading.active_count() <= before - 1
    assert len(source.read) == 200


def test_a_large_bag_takes_the_memory_of_a_few_chunks() -> None:
    """10,000 patches: no more than two chunks beyond those handed out, which nothing keeps."""
    source = Counted(10_000, side_px=16)
    seen, last = 0, None
    for chunk in StreamedPatches(parts=(part(source),), threads=2).stream(128):
        seen += len(chunk)
        assert len(source.read) - seen <= 128
        assert last is None or last() is None
        last = weakref.ref(chunk)
        del chunk
    assert seen == len(source.read) == 10_000


@pytest.mark.parametrize("problem", [ItemFailed("no picture"), OSError(5, "Input/output error")])
def test_a_bad_patch_ends_the_stream_with_slide_and_patch(problem: Exception) -> None:
    source = Counted(100, bad={77: problem})
    stream = StreamedPatches(parts=(part(source),), threads=2).stream(20)
    assert [len(next(stream)) for _ in range(3)] == [20] * 3
    with pytest.raises(ItemFailed, match=r"^s: patch 77 cannot be used: (no|Input)"):
        next(stream)
    assert not [one for one in threading.enumerate() if one.name.startswith("patches")]
    with pytest.raises(ItemFailed, match="patch 77"):
        StreamedPatches(parts=(part(source),), threads=2).held()


def test_patches_of_several_sizes_in_a_chunk_are_told() -> None:
    source = Counted(40, large=frozenset({9}))
    with pytest.raises(ItemFailed, match=r"s: patch \d+ .*in counted it has \d x \d px"):
        list(StreamedPatches(parts=(part(source),), threads=1).stream(40))
