"""Masks of a learned segmenter, one a slide, made before patching reads them.

Overviews are read ahead by threads and predicted in batches. A mask is a PNG that carries what it
was made with, so a killed run goes on where it stopped, and several processes may share a folder.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.contracts import TissuePredictor
from utils.errors import ItemFailed, MilwrightError
from utils.locks import claim
from utils.parallel import describe_os_error
from utils.report import Row, Status
from utils.staging import Staging
from utils.storage import State, differences, writable_folder
from wsi_core.mask_files import mask_state, read_mask, write_mask
from wsi_core.slide import WHITE, Slide, fingerprint, open_slide, read_overview

MAX_OVERVIEW_PIXELS = 50_000_000
UNKNOWN_MPP_UM = 0.25  # what a slide of unknown pixel size is taken for: 40x
MAX_ENLARGING = 1.05  # a slide this much coarser than wanted is taken as it is


@dataclass(frozen=True, kw_only=True)
class TissueSlide:
    """A slide to segment. ``mpp_um`` is the user's word on the pixel size of level 0."""

    slide_id: str
    slide_path: Path
    mpp_um: float | None = None


@dataclass(frozen=True)
class _Held:
    """A slide that is ours: locked, its overview being read."""

    slide: TissueSlide
    lock: contextlib.ExitStack
    start: float
    overview: Future[np.ndarray]


def mask_path(folder: Path, slide: TissueSlide) -> Path:
    """Where the slide's mask goes."""
    return folder / f"{slide.slide_id}.png"


def mask_parameters(slide: TissueSlide, predictor: TissuePredictor) -> dict[str, Any]:
    """Everything that determines a slide's mask, for its record. SlideError: slide not there."""
    return {"stage": "tissue mask", **fingerprint(slide.slide_path),
            "mpp_override": slide.mpp_um, "segmenter": predictor.record()}


def predict_masks(
    slides: Sequence[TissueSlide], predictor: TissuePredictor, *, folder: Path,
    batch_size: int = 1, reading_threads: int = 2, redo: bool = False,
    staging: Staging | None = None,
) -> Iterator[Row]:
    """Write ``<folder>/<slide_id>.png`` for all slides; one row a slide, in the end all of them.

    batch_size: overviews predicted together, which does not change the masks
    redo: also make those anew that are there, whatever they were made with
    staging: copies of the slides to read, each released when its overview is read
    A mask of the same parameters is kept; one of others, or of another program, fails its slide.
    A slide that cannot be read or predicted is a failed row, the others go on.
    Raises Refused when the folder cannot be written.
    """
    writable_folder(folder, what="folder of tissue masks")
    run = _Run(predictor, folder=folder, batch_size=batch_size, redo=redo, staging=staging,
               threads=reading_threads)
    return run.rows(slides)


class _Run:
    def __init__(self, predictor: TissuePredictor, *, folder: Path, batch_size: int, threads: int,
                 redo: bool, staging: Staging | None) -> None:
        self._predictor, self._folder = predictor, folder
        self._batch_size, self._threads = max(1, batch_size), max(1, threads)
        self._redo, self._staging = redo, staging
        self._ahead: deque[_Held] = deque()

    def rows(self, slides: Sequence[TissueSlide]) -> Iterator[Row]:
        waiting = deque(slides)
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                while waiting or self._ahead:
                    yield from self._read_ahead(waiting, pool)
                    yield from self._next_batch()
            finally:
                for held in self._ahead:
                    held.overview.cancel()
                    held.lock.close()

    def _read_ahead(self, waiting: deque[TissueSlide], pool: ThreadPoolExecutor) -> Iterator[Row]:
        """Lock slides and start to read them, until a batch and a slide a thread are under way."""
        while waiting and len(self._ahead) < self._batch_size + self._threads:
            slide = waiting.popleft()
            lock, start = contextlib.ExitStack(), time.monotonic()
            settled = None
            with _as_row(slide, start) as problem:
                settled = self._settled(slide, lock)
            if settled or problem:
                lock.close()
                if self._staging:
                    self._staging.release(slide.slide_path)
                yield settled or problem[0]
            else:
                self._ahead.append(_Held(slide, lock, start, pool.submit(self._read, slide)))

    def _settled(self, slide: TissueSlide, lock: contextlib.ExitStack) -> Row | None:
        """The row of a slide that is not ours, or whose mask is there; else it is locked.

        Raises ItemFailed when another mask is there.
        """
        path = mask_path(self._folder, slide)
        if not lock.enter_context(claim(path)):
            return Row(item=slide.slide_id, status=Status.BUSY,
                       reason="another process works on it")
        wanted = mask_parameters(slide, self._predictor)
        state = State.MISSING if self._redo else mask_state(path, wanted)
        if state is State.DONE:
            return Row(item=slide.slide_id, status=Status.SKIPPED)
        if state in (State.OTHER, State.FOREIGN):
            found = read_mask(path).parameters
            why = ("is not one of ours" if found is None else
                   f"was made with other parameters ({differences(found, wanted)})")
            raise ItemFailed(f"{path} {why}: give another folder, or --no_auto_skip to replace it")
        return None

    def _read(self, slide: TissueSlide) -> np.ndarray:
        path = self._staging.fetch(slide.slide_path) if self._staging else slide.slide_path
        try:
            with open_slide(path) as opened:
                return read_scaled(opened, self._predictor.mpp_um, slide_mpp=slide.mpp_um,
                                   max_side_px=self._predictor.max_side_px)
        finally:
            if self._staging:
                self._staging.release(slide.slide_path)

    def _next_batch(self) -> Iterator[Row]:
        batch = [self._ahead.popleft()
                 for _ in range(min(self._batch_size, len(self._ahead)))]
        try:
            read: list[tuple[_Held, np.ndarray]] = []
            for held in batch:
                with _as_row(held.slide, held.start) as problem:
                    read.append((held, held.overview.result()))
                yield from problem
            masks = self._predict([image for _, image in read])
            for (held, image), mask in zip(read, masks, strict=True):
                with _as_row(held.slide, held.start) as problem:
                    row = self._write(held, mask if mask is not None else
                                      self._predictor.predict([image])[0])
                held.lock.close()
                yield from problem or [row]
        finally:
            for held in batch:
                held.lock.close()

    def _predict(self, images: list[np.ndarray]) -> Sequence[np.ndarray | None]:
        """Probabilities, or None for each when the batch failed: then each is tried alone."""
        try:
            return self._predictor.predict(images) if images else []
        except Exception:  # out of memory, mostly; a slide that fails alone says why
            return [None] * len(images)

    def _write(self, held: _Held, probability: np.ndarray) -> Row:
        if not np.isfinite(probability).all():
            raise ItemFailed(f"{held.slide.slide_path}: the segmenter's answer is not finite: use "
                             "fp32, or another checkpoint")
        mask = probability >= self._predictor.threshold
        write_mask(mask_path(self._folder, held.slide), mask,
                   parameters=mask_parameters(held.slide, self._predictor))
        return Row(item=held.slide.slide_id, status=Status.DONE,
                   seconds=time.monotonic() - held.start,
                   numbers={"tissue_frac": round(float(mask.mean()), 4)})


@contextlib.contextmanager
def _as_row(slide: TissueSlide, start: float) -> Iterator[list[Row]]:
    """Turn what goes wrong with one slide into its row, in the list that the block gets."""
    problem: list[Row] = []
    try:
        yield problem
    except Exception as error:  # whatever it is, it costs this slide alone
        problem.append(Row(item=slide.slide_id, status=Status.FAILED, reason=_why(slide, error),
                           seconds=time.monotonic() - start))


def _why(slide: TissueSlide, error: Exception) -> str:
    if isinstance(error, MilwrightError):
        return str(error)
    if isinstance(error, OSError):
        return describe_os_error(error)
    text = " ".join(str(error).split())[:200]
    hint = (": try a smaller --seg_batch_size or --device cpu"
            if isinstance(error, RuntimeError | MemoryError) else "")
    return f"{slide.slide_path}: could not be segmented ({type(error).__name__}: {text}){hint}"


def read_scaled(
    slide: Slide, mpp_um: float, *, slide_mpp: float | None = None, max_side_px: int | None = None,
) -> np.ndarray:
    """The whole slide on white at ``mpp_um`` as (h, w, 3) uint8, the longer side limited.

    slide_mpp: um per level-0 px instead of the file's; unknown to both, 0.25 is assumed. A slide
    that is coarser is enlarged, unless only a limited side is wanted anyway. Raises SlideError.
    """
    import cv2

    own = slide_mpp or (sum(slide.mpp_um) / 2 if slide.mpp_um else UNKNOWN_MPP_UM)
    downsample = mpp_um / own
    if max_side_px is not None:
        downsample = max(downsample, max(slide.level_dimensions[0]) / max_side_px)
    rgb, _ = read_overview(slide, max(1.0, downsample), max_pixels=MAX_OVERVIEW_PIXELS,
                           background=WHITE)
    enlarging = min(1 / downsample, (MAX_OVERVIEW_PIXELS / (rgb.shape[0] * rgb.shape[1])) ** 0.5)
    if max_side_px is None and enlarging > MAX_ENLARGING:
        rgb = np.asarray(cv2.resize(rgb, None, fx=enlarging, fy=enlarging,
                                    interpolation=cv2.INTER_LINEAR))
    return rgb
