"""Tiles of a map or of an image that is read window by window, as the first step takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from models.stream_tiles import TilePlan

Window = tuple[slice, slice]


class ImageTiles(Protocol):
    """An image that is read window by window. size: (height, width) in px."""

    size: tuple[int, int]
    channels: int

    def read(self, window: Window) -> torch.Tensor:
        """(h, w, C) on the CPU, of any number format. Called from one other thread, twice a tile
        when there is something to learn: the same answer each time. Its errors come out."""
        ...

    def prepare(self, raw: torch.Tensor) -> torch.Tensor:
        """(h, w, C) as read, pinned where the network is on a GPU, to (1, C, h, w) floats on its
        device, in memory of their own; pixel by pixel. Called in the caller's thread."""
        ...


Source = torch.Tensor | ImageTiles


@dataclass(frozen=True, kw_only=True)
class RawTile:
    """pixels: (..., C, h, w) as read. is_constant: one value per channel, nowhere at a side of the
    source; False where nobody asked."""

    number: int
    pixels: torch.Tensor
    is_constant: bool


@dataclass(frozen=True, kw_only=True)
class TileReader:
    """Reads the tiles of a plan. device: where ``source`` prepares them, if it is an image."""

    source: Source
    plan: TilePlan
    device: torch.device

    def tiles(self, numbers: Iterable[int], *, look: bool) -> Generator[RawTile, None, None]:
        """These tiles in order, an image's read one ahead. look: find the constant ones."""
        if isinstance(self.source, torch.Tensor):
            for number in numbers:
                yield self._read(number, look)
            return
        ahead: deque[Future[RawTile]] = deque()
        pool = ThreadPoolExecutor(1, thread_name_prefix="tiles")
        try:
            for number in numbers:
                ahead.append(pool.submit(self._read, number, look))
                if len(ahead) > 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # also when the caller wants no more
            pool.shutdown(wait=True, cancel_futures=True)

    def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) of what was read, in memory of its own: a step may write into it."""
        if isinstance(self.source, torch.Tensor):
            return pixels.clone(memory_format=layout_of(self.source))
        return self.source.prepare(pixels.movedim(0, -1).contiguous())

    def _read(self, number: int, look: bool) -> RawTile:
        window = self.plan.tiles[number].window
        if isinstance(self.source, torch.Tensor):
            pixels = self.source.detach()[(..., *window)]
        else:
            pixels = self.source.read(window)
            if self.device.type == "cuda" and not pixels.is_pinned():
                pixels = pixels.contiguous().pin_memory()  # of a view, all that lies in between
            pixels = pixels.movedim(-1, 0)
        inside = all(part.start > 0 and part.stop < size
                     for part, size in zip(window, self.plan.in_size, strict=True))
        return RawTile(number=number, pixels=pixels,
                       is_constant=look and inside and _is_constant(pixels))


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """Channels last or first, of a (B, C, h, w) map or a part cut out of one."""
    last = x.stride(1) == 1 and x.stride(3) == x.shape[1]
    return torch.channels_last if last else torch.contiguous_format


def _is_constant(pixels: torch.Tensor) -> bool:
    """Is each channel one value? A look at a few pixels settles most tiles."""
    first = pixels[..., :1, :1]
    return all(torch.equal(some, first.expand_as(some))
               for some in (pixels[..., ::61, ::67], pixels))
