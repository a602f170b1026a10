"""Patches of many slides through one or several encoders: read once, batched across slide borders.

Reading threads (patch_readers.py) bring the pixels, prepared for each encoder; every encoder has
its own batches. A crash inside a C library ends the process; extract_features_fp.py runs this in
a supervised child for that reason.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from datasets.patch_readers import (
    Chunk,
    Reading,
    SlidePatches,
    Underway,
    item_name,
    read_patches,
)
from utils.errors import SlideError

__all__ = ["BadTiles", "EncodedSlide", "PatchEncoder", "SlidePatches", "encode_slide",
           "encode_slides", "item_name"]

if TYPE_CHECKING:
    import torch

BadTiles = Literal["fail", "drop"]


class Pending(Protocol):
    """Features on their way from a device; a tensor is one."""

    def cpu(self) -> torch.Tensor:
        """Wait for them: (B, D) float32."""
        ...


class PatchEncoder(Protocol):
    """What is needed of ``models.encoders.Encoder``."""

    dim: int
    device: torch.device

    def prepare(self, patch: np.ndarray) -> np.ndarray:
        """What batches are stacked from, of one (H, W, 3) uint8 patch; from reading threads.

        ``ItemFailed`` costs the patch's slide.
        """
        ...

    def launch(self, batch: np.ndarray) -> Pending:
        """A batch of prepared patches -> (B, D) float32 features, not waited for."""
        ...


@dataclass(kw_only=True)
class EncodedSlide:
    """Features of one slide by one encoder, or why there are none.

    features: (M, D) float32; rows: (M,) the rows of ``patches.coords`` they belong to, ascending;
    M < N only with unreadable patches left out. unreadable: row -> reason. error: "" or the reason
    encoder: its name, as in ``encode_slides``
    """

    patches: SlidePatches
    features: np.ndarray
    rows: np.ndarray
    unreadable: dict[int, str] = field(default_factory=dict)
    error: str = ""
    encoder: str = ""


def encode_slides(
    slides: Iterable[SlidePatches],
    *,
    encoders: Mapping[str, PatchEncoder],
    batch_size: int,
    workers: int = 1,
    bad_tiles: BadTiles = "fail",
    deadline_s: float | None = None,
    fetch: Callable[[Path], Path] = Path,
    progress: Callable[[int], object] = lambda patches: None,
) -> Iterator[EncodedSlide]:
    """Yield each slide's features by each encoder, by its name, as soon as they are complete.

    A bad slide costs itself alone, a batch that an encoder cannot do costs the slides of the batch
    under that encoder. ``slides`` may be a generator: it is advanced only as far as the workers
    read ahead, and a slide may want some of the encoders only.
    bad_tiles: a patch that cannot be read fails its slide, or ("drop") is left out and listed;
    more than half unreadable fails the slide in any case.
    workers: reading threads, at least one. deadline_s, fetch: see ``Reading``.
    progress: called with numbers of patches, each counted once an encoder.
    """
    desk = _Desk(encoders, batch_size=batch_size, progress=progress)
    reading = Reading(workers=max(1, workers), drop=bad_tiles == "drop", deadline_s=deadline_s,
                      prepare={name: encoder.prepare for name, encoder in encoders.items()},
                      fetch=fetch)
    with contextlib.closing(read_patches(map(desk.begin, slides), reading)) as chunks:
        for slide, chunk in chunks:
            desk.take(slide, chunk)
            yield from desk.finished()
        desk.flush()
        yield from desk.finished()


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
    (done,) = encode_slides([slide], encoders={"": encoder}, batch_size=batch_size,
                            workers=workers)
    if done.error:
        raise SlideError(done.error)
    return done.features


@dataclass(kw_only=True, eq=False)
class _Progress:
    """A slide on its way to one encoder: ``left`` patches are still to be read or encoded."""

    slide: SlidePatches
    encoder: str
    wanted: set[str]
    features: np.ndarray
    left: int
    unreadable: dict[int, str] = field(default_factory=dict)
    error: str = ""

    def fail(self, error: str) -> None:
        """Give this slide up under this encoder; its pixels are no longer wanted."""
        self.error = self.error or error
        self.wanted.discard(self.encoder)


@dataclass(kw_only=True, eq=False)
class _Slide(Underway):
    states: list[_Progress]


class _Desk:
    """Gives each encoder its patches, and collects what is complete."""

    def __init__(self, encoders: Mapping[str, PatchEncoder], *, batch_size: int,
                 progress: Callable[[int], object]) -> None:
        self._done: deque[_Progress] = deque()
        self._lines = {name: _Line(encoder, batch_size=batch_size, progress=progress,
                                   done=self._done)
                       for name, encoder in encoders.items()}

    def begin(self, slide: SlidePatches) -> _Slide:
        """Make room for a slide's features; an empty slide is finished at once."""
        wanted = set(slide.encoders or self._lines)
        states = [_Progress(slide=slide, encoder=name, wanted=wanted, left=len(slide),
                            features=np.zeros((len(slide), line.dim), np.float32))
                  for name, line in self._lines.items() if name in wanted]
        if not len(slide):
            self._done.extend(states)
        return _Slide(slide=slide, wanted=wanted, states=states)

    def take(self, slide: _Slide, chunk: Chunk) -> None:
        """Queue the patches of one chunk with every encoder that wants them."""
        for state in slide.states:
            self._lines[state.encoder].take(state, chunk)

    def flush(self) -> None:
        """Encode what is left and collect everything."""
        for line in self._lines.values():
            line.flush()

    def finished(self) -> Iterator[EncodedSlide]:
        """What was completed since the last call."""
        while self._done:
            yield _result(self._done.popleft())


class _Line:
    """Collects patches of any slide into batches of one encoder, and features back into slides."""

    def __init__(self, encoder: PatchEncoder, *, batch_size: int,
                 progress: Callable[[int], object], done: deque[_Progress]) -> None:
        self.dim = encoder.dim
        self._encoder = encoder
        self._batch_size = batch_size
        self._progress = progress
        self._done = done
        self._waiting: list[tuple[_Progress, int, np.ndarray]] = []
        self._launched: tuple[list[tuple[_Progress, int]], Pending] | None = None

    def take(self, state: _Progress, chunk: Chunk) -> None:
        """Queue the patches of one chunk, and encode when a batch is full."""
        if error := chunk.error or chunk.errors.get(state.encoder):
            state.fail(error)
        state.unreadable.update(chunk.reasons)
        if 2 * len(state.unreadable) > len(state.slide):
            state.fail(f"{state.slide.slide_path}: {len(state.unreadable)} of {len(state.slide)} "
                       "patches cannot be read, the first: "
                       f"{next(iter(state.unreadable.values()))}")
        if state.error:
            self._settle(state, len(chunk.rows))
            return
        self._settle(state, len(chunk.reasons))
        for row, patch in zip(chunk.rows, chunk.patches[state.encoder], strict=True):
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

    def _encode(self) -> None:
        """Launch the waiting batch, then collect the one before: a GPU is kept busy."""
        if not self._waiting:
            return
        owners = [(state, row) for state, row, _ in self._waiting]
        batch = np.stack([patch for _, _, patch in self._waiting])
        self._waiting = []
        launched = None
        try:
            launched = self._encoder.launch(batch)
        except RuntimeError as error:
            _give_up(owners, error)
        self._collect()
        if launched is None:
            self._share_out(owners, None)
        else:
            self._launched = owners, launched

    def _collect(self) -> None:
        if self._launched is None:
            return
        owners, launched = self._launched
        self._launched = None
        values = None
        try:
            values = launched.cpu().numpy()
        except RuntimeError as error:
            _give_up(owners, error)
        self._share_out(owners, values)

    def _share_out(self, owners: Sequence[tuple[_Progress, int]], values: np.ndarray | None
                   ) -> None:
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


def _give_up(owners: Sequence[tuple[_Progress, int]], error: RuntimeError) -> None:
    """Out of memory even in small batches, or a CUDA fault."""
    for state, _ in owners:
        state.fail(f"{state.slide.slide_id}: encoding failed ("
                   f"{' '.join(str(error).split())[:200]}): try a smaller batch_size")


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
    return EncodedSlide(patches=slide, features=features, rows=rows, encoder=state.encoder,
                        unreadable=dict(sorted(state.unreadable.items())), error=error)
