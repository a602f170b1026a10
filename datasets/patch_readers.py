"""Reading workers: patches of many slides as pixels, prepared for every encoder that wants them.

Each worker is a thread with its own slide handle and its own contiguous part of every slide, so
tiles that neighbouring patches share are decoded once. Threads, because OpenSlide, the JPEG
decoders and Pillow let go of the interpreter lock (2 threads read 2.1 times as fast as one, like
2 processes) and share memory with the encoder. A read that never comes back costs its slide and
its thread: another thread takes the place, the lost one ends with the process.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np

from utils.errors import ItemFailed, SlideError
from utils.faults import fault_point
from utils.parallel import describe_os_error
from utils.resize import resize_shorter_side
from wsi_core.slide import Backend, Slide, open_slide

Prepare = Callable[[np.ndarray], np.ndarray]

CHUNK = 32  # patches of one reading task
CHUNKS_AHEAD = 3  # per worker: bounds the memory to workers * 3 * 32 patches for each encoder
CACHE_MB = 256  # of decoded tiles, shared out over the workers
STOP_S = 5.0  # that a worker is waited for at the end
GRACE_S = 5.0  # after a deadline, for a worker to notice it between two reads


@dataclass(frozen=True, kw_only=True)
class SlidePatches:
    """The patches of one slide that are to be encoded.

    coords: (N, 2) top-left corners in level-0 px
    patch_size: px of ``patch_level`` to read; output_size: px to resize to before anything else
    background: RGB of what lies outside the slide
    level: name of the level in a hierarchy, "" for the coarse or only one
    encoders: names of the encoders that want them, () = all
    """

    slide_id: str
    slide_path: Path
    coords: np.ndarray
    patch_level: int
    patch_size: int
    output_size: int
    background: tuple[int, int, int] = (0, 0, 0)
    backend: Backend = "auto"
    level: str = ""
    encoders: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def name(self) -> str:
        """The slide and its level, as in reports."""
        return item_name(self.slide_id, self.level)


def item_name(slide_id: str, level: str) -> str:
    """``slide``, or ``slide [level_1]`` for a finer level."""
    return f"{slide_id} [{level}]" if level else slide_id


@dataclass(kw_only=True, eq=False)
class Underway:
    """A slide being read. wanted: names of the encoders that still want its pixels"""

    slide: SlidePatches
    wanted: set[str]


U = TypeVar("U", bound=Underway)


@dataclass
class Chunk:
    """Some rows of a slide as read.

    patches: encoder -> one prepared patch a row, None where it cannot be read; reasons: row -> why
    error: why the slide cannot be read at all, else ""; errors: the same for one encoder
    """

    rows: Sequence[int]
    patches: dict[str, list[np.ndarray | None]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    error: str = ""
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How patches are read.

    prepare: encoder -> what it makes of a patch, called in the reading threads
    drop: a patch that cannot be read is left out, not the end of its slide
    deadline_s: seconds that a worker may spend reading one slide; None = any
    fetch: gives the file to open for a slide (a copy on a faster disk)
    """

    workers: int
    prepare: Mapping[str, Prepare]
    drop: bool = False
    deadline_s: float | None = None
    fetch: Callable[[Path], Path] = Path


def read_patches(slides: Iterable[U], how: Reading) -> Generator[tuple[U, Chunk], None, None]:
    """Chunks of all slides, one slide after the other, in the order of their places.

    ``slides`` is advanced only as far as the workers read ahead.
    """
    readers = [_Reader(how) for _ in range(how.workers)]
    chunks = _chunks(slides, how.workers)
    ahead: deque[_Task[U]] = deque()
    try:
        while True:
            while len(ahead) < CHUNKS_AHEAD * how.workers:
                if (task := next(chunks, None)) is None:
                    break
                readers[task.reader].submit(task)
                ahead.append(task)
            if not ahead:
                return
            task = ahead.popleft()
            chunk = readers[task.reader].result(task)
            if chunk is None:
                readers[task.reader].abandon()
                readers[task.reader] = _Reader(how)
                for later in ahead:
                    if later.reader == task.reader:
                        readers[task.reader].submit(later)
                chunk = Chunk(task.rows, error=_overdue(task.underway.slide, how))
            yield task.underway, chunk
    finally:
        for reader in readers:
            reader.stop()


@dataclass(kw_only=True, eq=False)
class _Task(Generic[U]):
    underway: U
    reader: int
    rows: Sequence[int]
    future: Future[Chunk] = field(default_factory=Future)


def _chunks(slides: Iterable[U], workers: int) -> Iterator[_Task[U]]:
    """Reading tasks, slide after slide, dealt out in turn.

    Rows go from top to bottom of the slide, one band of it to each reader: a patch's tiles are
    still in that reader's cache when the next row of patches touches them.
    """
    for underway in slides:
        coords = underway.slide.coords
        order = np.lexsort((coords[:, 0], coords[:, 1]))
        bands = [band.tolist() for band in np.array_split(order, workers)]
        for start in range(0, max(map(len, bands)), CHUNK):
            for reader, band in enumerate(bands):
                if rows := band[start:start + CHUNK]:
                    yield _Task(underway=underway, reader=reader, rows=rows)


def _overdue(slide: SlidePatches, how: Reading) -> str:
    return (f"timeout: reading {slide.slide_path} took longer than {how.deadline_s:g} s: look at "
            "its disk, or give a longer --slide_timeout")


class _Reader:
    """One thread with one open slide at a time."""

    def __init__(self, how: Reading) -> None:
        self._how = how
        self._cache_mb = max(64, CACHE_MB // how.workers)
        self._tasks: SimpleQueue[_Task[Any] | None] = SimpleQueue()
        self._stopped = False
        self._slide: Slide | None = None
        self._of: SlidePatches | None = None
        self._spent_s = 0.0  # on this slide, in tasks that have ended
        self._since: float | None = None  # when the task at hand began
        self._thread = threading.Thread(target=self._serve, name="patch-reader", daemon=True)
        self._thread.start()

    def submit(self, task: _Task[Any]) -> None:
        """Read these rows in the reader's thread, after what it has been given before."""
        task.future = Future()
        self._tasks.put(task)

    def result(self, task: _Task[Any]) -> Chunk | None:
        """The chunk, waited for; None when its slide is overdue (the stacks go to stderr)."""
        limit = self._how.deadline_s
        while limit is not None and not wait([task.future], timeout=min(1.0, limit / 4)).done:
            if self._seconds() > limit + min(GRACE_S, limit / 2):  # so it cannot stop by itself
                print(f"{_overdue(task.underway.slide, self._how)}; the threads are at:",
                      file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.__stderr__ or 2)
                return None
        return task.future.result()

    def abandon(self) -> None:
        """Leave the thread where it hangs; should it come back, it stops."""
        self._stopped = True
        self._tasks.put(None)

    def stop(self) -> None:
        """Drop what was not begun, wait for what was, close the slide."""
        self.abandon()
        self._thread.join(STOP_S)

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None and not self._stopped:
            future = task.future
            try:
                future.set_result(self._timed(task))
            except BaseException as error:  # goes to whoever waits for the chunk
                future.set_exception(error)
        self._close()

    def _seconds(self) -> float:
        since = self._since
        return self._spent_s + (0.0 if since is None else time.monotonic() - since)

    def _timed(self, task: _Task[Any]) -> Chunk:
        if self._of is not task.underway.slide:
            self._close()
            self._of, self._spent_s = task.underway.slide, 0.0
        self._since = time.monotonic()
        chunk = self._read(task)
        self._spent_s, self._since = self._seconds(), None
        return chunk

    def _close(self) -> None:
        if self._slide is not None:
            self._slide.close()
        self._slide = self._of = None

    def _open(self, patches: SlidePatches) -> Slide:
        if self._slide is None:
            fault_point(f"patches.open.{patches.slide_id}")
            self._slide = open_slide(self._how.fetch(patches.slide_path), backend=patches.backend,
                                     cache_mb=self._cache_mb)
        return self._slide

    def _read(self, task: _Task[Any]) -> Chunk:
        wanted = sorted(task.underway.wanted)
        chunk = Chunk(task.rows, {name: [] for name in wanted})
        if not wanted:  # an earlier chunk failed: nobody wants these pixels any more
            return chunk
        patches = task.underway.slide
        try:
            slide = self._open(patches)
            for row in task.rows:
                if self._how.deadline_s is not None and self._seconds() > self._how.deadline_s:
                    raise ItemFailed(_overdue(patches, self._how))
                self._read_row(slide, patches, row, chunk)
        except ItemFailed as error:
            chunk.error = str(error)
        except OSError as error:  # while it was copied to a faster disk
            chunk.error = f"{patches.slide_path}: {describe_os_error(error)}"
        return chunk

    def _read_row(self, slide: Slide, patches: SlidePatches, row: int, chunk: Chunk) -> None:
        try:
            pixels = _pixels(slide, patches, row)
        except SlideError as error:
            if not self._how.drop:
                raise
            chunk.reasons[row] = str(error)
            for column in chunk.patches.values():
                column.append(None)
            return
        for name, column in chunk.patches.items():
            try:
                column.append(None if name in chunk.errors else self._how.prepare[name](pixels))
            except ItemFailed as error:
                chunk.errors[name] = f"{patches.slide_id}: {error}"


def _pixels(slide: Slide, patches: SlidePatches, row: int) -> np.ndarray:
    """(output_size, output_size, 3) uint8; ``SlideError`` when the place cannot be read."""
    x, y = (int(value) for value in patches.coords[row])
    side = patches.patch_size
    patch = slide.read_region((x, y), patches.patch_level, (side, side),
                              background=patches.background)
    return patch if patches.output_size == side else resize_shorter_side(patch, patches.output_size)
