"""Bags for a loop: read one ahead in a thread, and brought to the device without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from utils.contracts import Bag
from utils.errors import ItemFailed

if TYPE_CHECKING:
    import torch

_AHEAD = 2  # bags in flight; a bag may be hundreds of MB


@dataclass(frozen=True)
class Missing:
    """A bag that could not be read, and why."""

    slide_id: str
    reason: str


def feed(
    bags: Sequence[Bag], order: Iterable[int], *, device: torch.device, at_once: int = 1
) -> Iterator[Bag | Missing]:
    """The bags at the indices ``order``, on ``device``; reading overlaps with what the caller does.

    at_once: how many bags the caller takes before it is busy; as many are read meanwhile
    A bag that raises ``ItemFailed`` or ``OSError`` comes out as ``Missing`` and the others go on.
    Bags in a list are in memory, with nothing to read: they come without a thread.
    On CUDA the tensors are pinned by the reading thread and copied without blocking.
    """
    if isinstance(bags, list):
        yield from (_place(_read(bags, index, device.type == "cuda"), device) for index in order)
        return
    waiting: deque[Future[Bag | Missing]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="bags") as reader:
        for index in order:
            waiting.append(reader.submit(_read, bags, index, device.type == "cuda"))
            if len(waiting) > max(_AHEAD, at_once):
                yield _place(waiting.popleft().result(), device)
        while waiting:
            yield _place(waiting.popleft().result(), device)


def _read(bags: Sequence[Bag], index: int, pin: bool) -> Bag | Missing:
    try:
        bag = bags[index]
    except (ItemFailed, OSError) as error:
        names = getattr(bags, "slide_ids", None)
        return Missing(f"bag {index}" if names is None else names[index], str(error))
    if pin and not bag.features.is_cuda and not bag.features.is_pinned():
        return replace(bag, features=bag.features.pin_memory())
    return bag


def _place(item: Bag | Missing, device: torch.device) -> Bag | Missing:
    if isinstance(item, Missing) or device.type == "cpu":
        return item
    return item.to(device, non_blocking=True)
