"""Patches of many slides through one encoder: read by workers, batched across slide borders.

Each reading worker is a thread with its own slide handle and its own contiguous part of every
slide, so tiles that neighbouring patches share are decoded once. Threads, because OpenSlide, the
JPEG decoders and Pillow let go of the interpreter lock (2 threads read 2.1 times as fast as one,
like 2 processes) and share memory with the encoder. A crash inside a C library therefore ends the
process; extract_features_fp.py runs this in a supervised child for that reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from utils.errors import SlideError
from utils.faults import fault_point
from utils.resize import resize_shorter_side
from wsi_core.slide import Backend, Slide, open_slide

if TYPE_CHECKING:
    import torch

BadTiles = Literal["fail", "drop"]

CHUNK = 32  # patches of one reading task
CHUNKS_AHEAD = 3  # per worker: bounds the memory to workers * 3 * 32 patches
CACHE_MB = 256  # of decoded tiles, shared out over the workers


class PatchEncoder(Protocol):
    """What is needed of ``models.encoders.Encoder``."""

    dim: int
    device: torch.device

    def prepare(self, patch: np.ndarray) -> np.ndarray:
        """Resize one (H, W, 3) uint8 patch; called in the reading threads."""
        ...

    def launch(self, batch: np.ndarray) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, D) float32 on the encoder's device, not waited for."""
        ...


@dataclass(frozen=True, kw_only=True)
class SlidePatches:
    """The patches of one slide that are to be encoded.

    coords: (N, 2) top-left corners in level-0 px
    patch_size: px of ``patch_level`` to read; output_size: px to shrink to before anything else
    background: RGB of what lies outside the slide
    level: name of the level in a hierarchy, "" for the coarse or only one
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

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def name(self) -> str:
        """The slide and its level, as in reports."""
        return item_name(self.slide_id, self.level)


def item_name(slide_id: str, level: str) -> str:
    """``slide``, or ``slide [level_1]`` for a finer level."""
    return f"{slide_id} [{level}]" if level else slide_id


@dataclass(kw_only=True)
class EncodedSlide:
    """Features of one slide, or why there are none.

    features: (M, D) float32; rows: (M,) the rows of ``patches.coords`` they belong to, ascending;
    M < N only with unreadable patches left out. unreadable: row -> reason. error: "" or the reason
    """

    patches: SlidePatches
    features: np.ndarray
    rows: np.ndarray
    unreadable: dict[int, str] = field(default_factory=dict)
    error: str = ""


def encode_slides(
    slides: Iterable[SlidePatches],
    *,
    encoder: PatchEncoder,
    batch_size: int,
    workers: int = 1,
    bad_tiles: BadTiles = "fail",
    progress: Callable[[int], object] = lambda patches: None,
) -> Iterator[EncodedSlide]:
    """Yield each slide's features as soon as they are complete; a bad slide costs itself alone.

    ``slides`` may be a generator: it is advanced only as far as the workers read ahead.
    bad_tiles: a patch that cannot be read fails its slide, or ("drop") is left out and listed;
    more than half unreadable fails the slide in any case.
    workers: reading threads, at least one. progress: called with numbers of patches.
    """
    line = _Line(encoder=encoder, batch_size=batch_size, progress=progress)
    readers = [_Reader(cache_mb=max(64, CACHE_MB // max(1, workers)), drop=bad_tiles == "drop",
                       prepare=encoder.prepare) for _ in range(max(1, workers))]
    chunks = _chunks(slides, readers, line.begin)
    ahead: deque[tuple[_Progress, Future[_Chunk]]] = deque()
    try:
        while True:
            while len(ahead) < CHUNKS_AHEAD * len(readers):
                if (task := next(chunks, None)) is None:
                    break
                state, reader, rows = task
                ahead.append((state, reader.submit(state, rows)))
            if not ahead:
                break
            state, future = ahead.popleft()
            line.take(state, future.result())
            yield from line.finished()
        line.flush()
        yield from line.finished()
    finally:
        for reader in readers:
            reader.stop()


def encode_slide(
    slide_path: Path,
    coords: np.ndarray,
    *,
    patch_level: int,
    patch_size: int,
    output_size: int,
    encoder: PatchEncoder,
    batch_size: int,
    workers: int = 1,
    background: tuple[int, int, int] = (0, 0, 0),
) -> np.ndarray:
    """Features (N, D) float32 of one slide, rows as ``coords`` (N, 2; level-0 px).

    Raises SlideError when the slide or any of its patches cannot be read or encoded.
    """
    slide = SlidePatches(
        slide_id=Path(slide_path).stem, slide_path=Path(slide_path), coords=coords,
        patch_level=patch_level, patch_size=patch_size, output_size=output_size,
        background=background)
    (done,) = encode_slides([slide], encoder=encoder, batch_size=batch_size, workers=workers)
    if done.error:
        raise SlideError(done.error)
    return done.features


# ---------------------------------------------------------------------------- reading

@dataclass(kw_only=True, eq=False)
class _Progress:
    """A slide on its way: ``left`` patches are still to be read or encoded."""

    slide: SlidePatches
    features: np.ndarray
    left: int
    unreadable: dict[int, str] = field(default_factory=dict)
    error: str = ""


@dataclass
class _Chunk:
    rows: Sequence[int]
    patches: list[np.ndarray | None]  # None: unreadable
    reasons: dict[int, str]
    error: str = ""


class _Reader:
    """One thread with one open slide at a time."""

    def __init__(self, *, cache_mb: int, drop: bool,
                 prepare: Callable[[np.ndarray], np.ndarray]) -> None:
        self._cache_mb = cache_mb
        self._drop = drop
        self._prepare = prepare
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="patch-reader")
        self._slide: Slide | None = None
        self._of: SlidePatches | None = None

    def submit(self, state: _Progress, rows: Sequence[int]) -> Future[_Chunk]:
        """Read these rows in the reader's thread."""
        return self._thread.submit(self._read, state, rows)

    def stop(self) -> None:
        """Drop what was not begun, wait for what was, close the slide."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._close()

    def _close(self) -> None:
        if self._slide is not None:
            self._slide.close()
        self._slide = self._of = None

    def _open(self, patches: SlidePatches) -> Slide:
        if self._slide is None or self._of is not patches:
            self._close()
            fault_point(f"patches.open.{patches.slide_id}")
            self._slide = open_slide(patches.slide_path, backend=patches.backend,
                                     cache_mb=self._cache_mb)
            self._of = patches
        return self._slide

    def _read(self, state: _Progress, rows: Sequence[int]) -> _Chunk:
        chunk = _Chunk(rows, [], {})
        if state.error:  # of an earlier chunk: nobody wants these pixels any more
            return chunk
        try:
            slide = self._open(state.slide)
        except SlideError as error:
            chunk.error = str(error)
            return chunk
        for row in rows:
            try:
                chunk.patches.append(self._patch(slide, state.slide, row))
            except SlideError as error:
                if not self._drop:
                    chunk.error = str(error)
                    return chunk
                chunk.patches.append(None)
                chunk.reasons[row] = str(error)
        return chunk

    def _patch(self, slide: Slide, patches: SlidePatches, row: int) -> np.ndarray:
        x, y = (int(value) for value in patches.coords[row])
        side = patches.patch_size
        patch = slide.read_region((x, y), patches.patch_level, (side, side),
                                  background=patches.background)
        if patches.output_size != side:
            patch = resize_shorter_side(patch, patches.output_size)
        return self._prepare(patch)


def _chunks(
    slides: Iterable[SlidePatches], readers: Sequence[_Reader],
    begin: Callable[[SlidePatches], _Progress],
) -> Iterator[tuple[_Progress, _Reader, Sequence[int]]]:
    """Reading tasks, slide after slide, dealt out in turn.

    Rows go from top to bottom of the slide, one band of it to each reader: a patch's tiles are
    still in that reader's cache when the next row of patches touches them.
    """
    for patches in slides:
        state = begin(patches)
        order = np.lexsort((patches.coords[:, 0], patches.coords[:, 1]))
        bands = [band.tolist() for band in np.array_split(order, len(readers))]
        for start in range(0, max(map(len, bands)), CHUNK):
            for reader, band in zip(readers, bands, strict=True):
                if rows := band[start:start + CHUNK]:
                    yield state, reader, rows


# ---------------------------------------------------------------------------- encoding

class _Line:
    """Collects patches of any slide into batches, and features back into their slides."""

    def __init__(self, *, encoder: PatchEncoder, batch_size: int,
                 progress: Callable[[int], object]) -> None:
        self._encoder = encoder
        self._batch_size = batch_size
        self._progress = progress
        self._waiting: list[tuple[_Progress, int, np.ndarray]] = []
        self._launched: tuple[list[tuple[_Progress, int]], torch.Tensor] | None = None
        self._done: deque[_Progress] = deque()

    def begin(self, slide: SlidePatches) -> _Progress:
        """Make room for a slide's features; an empty slide is finished at once."""
        state = _Progress(slide=slide, left=len(slide),
                          features=np.zeros((len(slide), self._encoder.dim), np.float32))
        if not len(slide):
            self._done.append(state)
        return state

    def take(self, state: _Progress, chunk: _Chunk) -> None:
        """Queue the patches of one chunk, and encode when a batch is full."""
        state.error = state.error or chunk.error
        state.unreadable.update(chunk.reasons)
        if 2 * len(state.unreadable) > len(state.slide):
            state.error = state.error or (
                f"{state.slide.slide_path}: {len(state.unreadable)} of {len(state.slide)} patches "
                f"cannot be read, the first: {next(iter(state.unreadable.values()))}")
        if state.error:
            self._settle(state, len(chunk.rows))
            return
        self._settle(state, len(chunk.reasons))
        for row, patch in zip(chunk.rows, chunk.patches, strict=True):
            if patch is None:
                continue
            if self._waiting and self._waiting[0][2].shape != patch.shape:
                self._encode()
            self._waiting.append((state, row, patch))
            if len(self._waiting) == self._batch_size:
                self._encode()

    def flush(self) -> None:
        """Encode what is left and collect everything."""
        self._encode()
        self._collect()

    def finished(self) -> Iterator[EncodedSlide]:
        """The slides completed since the last call."""
        while self._done:
            yield _result(self._done.popleft())

    def _encode(self) -> None:
        """Launch the waiting batch, then collect the one before: a GPU is kept busy."""
        if not self._waiting:
            return
        owners = [(state, row) for state, row, _ in self._waiting]
        batch = np.stack([patch for _, _, patch in self._waiting])
        self._waiting = []
        try:
            features = self._encoder.launch(batch)
        except RuntimeError as error:  # out of memory even in small batches, or a CUDA fault
            for state, _ in owners:
                state.error = state.error or (f"{state.slide.slide_id}: encoding failed ("
                                              f"{' '.join(str(error).split())[:200]}): try a "
                                              "smaller batch_size")
            self._collect()
            self._share_out(owners, None)
            return
        self._collect()
        self._launched = owners, features

    def _collect(self) -> None:
        if self._launched is None:
            return
        owners, features = self._launched
        self._launched = None
        self._share_out(owners, features.cpu().numpy())

    def _share_out(self, owners: list[tuple[_Progress, int]], values: np.ndarray | None) -> None:
        for index, (state, row) in enumerate(owners):
            if values is not None:
                state.features[row] = values[index]
            self._settle(state, 1)

    def _settle(self, state: _Progress, patches: int) -> None:
        if patches == 0:
            return
        state.left -= patches
        self._progress(patches)
        if state.left == 0:
            self._done.append(state)


def _result(state: _Progress) -> EncodedSlide:
    slide, features = state.slide, state.features
    rows = np.setdiff1d(np.arange(len(slide)), list(state.unreadable))
    features = features if len(rows) == len(features) else features[rows]
    error = state.error
    if not error and not np.isfinite(features).all():
        bad = rows[~np.isfinite(features).all(axis=1)]
        error = (f"{slide.slide_id}: {len(bad)} of {len(rows)} feature rows are not finite (first: "
                 f"row {bad[0]}): float16 overflows with some networks, use --precision bf16 or "
                 "fp32")
    return EncodedSlide(patches=slide, features=features, rows=rows,
                        unreadable=dict(sorted(state.unreadable.items())), error=error)
