"""The patches of several slides in chunks of nearly equal size, across the borders of slides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from utils.contracts import Bag, PatchImages
from utils.errors import ItemFailed

Part = list[torch.Tensor]  # (n, h, w, 3) uint8 each, of one size each


def patches_of(bag: Bag) -> PatchImages:
    """The pixels of a bag; ``ItemFailed`` when it has none."""
    if bag.patches is None:
        raise ItemFailed(f"{bag.slide_id}: the bag has no pixels, which an end-to-end model needs")
    return bag.patches


def share_out(total: int, n_parts: int) -> list[int]:
    """``total`` patches in ``n_parts`` chunks that differ by one at most; some may be empty."""
    ends = [total * number // max(n_parts, 1) for number in range(n_parts + 1)]
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


class PatchParts:
    """Every call goes through the patches of ``bags`` once, in chunks of ``sizes``.

    shared: other processes wait for as many chunks. So one that cannot be read in the first call
    is noted in ``error``, and it and all after it are empty, in that call and in later ones.
    Otherwise, and later, ``ItemFailed`` and ``OSError`` come out.
    """

    def __init__(self, bags: Sequence[Bag], sizes: list[int], *, shared: bool) -> None:
        self.bags = bags
        self.sizes = sizes
        self.shared = shared
        self.error: ItemFailed | OSError | None = None
        self._readable = len(sizes)
        self._first = True

    def __call__(self) -> Iterator[Part]:
        """The chunks; one that spans slides or scales has a tensor of each."""
        parts = self._read()
        for number in range(len(self.sizes)):
            try:
                part = next(parts) if number < self._readable else []
            except (ItemFailed, OSError) as error:
                if not (self.shared and self._first):
                    raise
                self.error, self._readable, part = error, number, []
            yield part
            del part  # while the next one is read
        self._first = False

    def _read(self) -> Iterator[Part]:
        pieces = self._pieces()
        rest: torch.Tensor | None = None
        for size in self.sizes:
            part: Part = []
            while size:
                rest = next(pieces) if rest is None else rest
                part.append(rest[:size])
                size -= len(part[-1])
                rest = rest[len(part[-1]):] if len(rest) > len(part[-1]) else None
            yield part

    def _pieces(self) -> Iterator[torch.Tensor]:
        """What the bags stream; ``ItemFailed`` when that is less than they said."""
        for bag in self.bags:
            patches = patches_of(bag)
            left = len(patches)
            for piece in patches.stream(max(self.sizes)):
                left -= len(piece)
                yield piece
            if left:
                raise ItemFailed(f"{bag.slide_id}: {len(patches)} patches were to be read, "
                                 f"{len(patches) - left} came")
