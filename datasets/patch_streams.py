"""Pixels of a bag's patches (``utils.contracts.PatchImages``): read when asked for, or held.

Decoders of JPEG and of slides let go of the interpreter lock, so threads of this process read. A
chunk is one tensor that they fill; while a caller works on it they fill the next, and no more:
memory does not grow with the bag.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datasets.patch_sources import PatchSource, ReadPatch
from utils.errors import ItemFailed
from utils.parallel import describe_os_error

if TYPE_CHECKING:
    import torch

_BLOCK = 32  # patches of one thread's task: neighbours, which share the tiles of a slide


@dataclass(frozen=True, kw_only=True)
class PatchRows:
    """Some patches of a slide at one magnification: rows of its source, in this order."""

    source: PatchSource
    slide_id: str
    rows: np.ndarray

    def chunks(self, most: int, *, threads: int, pin: bool) -> Iterator[torch.Tensor]:
        """The patches as (n, h, w, 3) uint8 tensors, n at most ``most``; see ``PatchImages``."""
        n_blocks = -(-min(most, len(self.rows)) // _BLOCK)
        threads = max(1, min(threads, n_blocks))
        ahead: deque[tuple[_Chunk, list[Future[None]]]] = deque()
        with self.source.reading(self.slide_id, threads=threads) as read:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="patches")
            try:
                for start in range(0, len(self.rows), most):
                    chunk = _Chunk(self, self.rows[start:start + most], pin=pin)
                    ahead.append((chunk, [pool.submit(chunk.fill, read, first)
                                          for first in range(0, len(chunk.rows), _BLOCK)]))
                    if len(ahead) > 1:
                        yield _filled(*ahead.popleft())
                while ahead:
                    yield _filled(*ahead.popleft())
            finally:  # also when the caller wants no more
                pool.shutdown(wait=True, cancel_futures=True)


def _filled(chunk: _Chunk, tasks: Sequence[Future[None]]) -> torch.Tensor:
    for task in tasks:
        task.result()
    return chunk.tensor


class _Chunk:
    """A tensor that several threads fill; made when the first patch tells its size."""

    tensor: torch.Tensor

    def __init__(self, part: PatchRows, rows: np.ndarray, *, pin: bool) -> None:
        self.rows = rows
        self._part, self._pin = part, pin
        self._lock = threading.Lock()
        self._pixels: np.ndarray | None = None

    def fill(self, read: ReadPatch, first: int) -> None:
        """Read a block; ``ItemFailed`` naming slide and patch."""
        for place in range(first, min(first + _BLOCK, len(self.rows))):
            row = int(self.rows[place])
            try:
                patch = read(row)
                target = self._target(patch.shape)
                if patch.shape != target.shape[1:]:
                    raise ItemFailed(f"in {self._part.source.root} it has {patch.shape[1]} x "
                                     f"{patch.shape[0]} px, another {target.shape[2]} x "
                                     f"{target.shape[1]}")
            except (ItemFailed, OSError) as error:
                why = describe_os_error(error) if isinstance(error, OSError) else str(error)
                raise ItemFailed(f"{self._part.slide_id}: patch {row} cannot be used: {why}"
                                 ) from None
            target[place] = patch

    def _target(self, shape: tuple[int, ...]) -> np.ndarray:
        import torch

        with self._lock:
            if self._pixels is None:
                self.tensor = torch.empty((len(self.rows), *shape), dtype=torch.uint8,
                                          pin_memory=self._pin)
                self._pixels = self.tensor.numpy()
            return self._pixels


# ---------------------------------------------------------------------------- of a bag

@dataclass(frozen=True, kw_only=True)
class StreamedPatches:
    """Patches that are read whenever they are asked for, part after part.

    Chunks never reach from one part into the next: sizes of patches may differ.
    """

    parts: tuple[PatchRows, ...]
    threads: int
    pin: bool = False

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    def stream(self, most: int) -> Iterator[torch.Tensor]:
        """See ``PatchImages``."""
        for part in self.parts:
            yield from part.chunks(most, threads=self.threads, pin=self.pin)

    def held(self) -> HeldPatches:
        """The same with all pixels in memory, read now; errors as ``stream``."""
        return HeldPatches(tuple(self.stream(max(1, len(self)))))


@dataclass(frozen=True)
class HeldPatches:
    """Patches in memory. parts: (n, h, w, 3) uint8 tensors, one a magnification."""

    parts: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def stream(self, most: int) -> Iterator[torch.Tensor]:
        """See ``PatchImages``."""
        for part in self.parts:
            yield from part.split(most)
