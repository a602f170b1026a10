"""Several processes training one model: who am I, and what do we all agree on.

Started by ``torchrun`` (gloo on CPUs, NCCL on GPUs); without it there is one process and every
operation here is free. Nothing wraps the model: gradients are summed over the ranks once per
optimiser step, so several losses a bag, unused parameters and uneven shares need no special case.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from utils import __version__
from utils.errors import ItemFailed, Refused

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

PEER_TIMEOUT_S = 300  # how long a rank waits for one that does not answer

# gloo's threads outlive the group and free the tensors of the last exchange under the interpreter
# lock; when the interpreter ends before they come to it, the process aborts (seen 1 time in 15)
_LAST_BREATH_S = 0.3


class PeerLost(ItemFailed):
    """Another process of the group died or hangs: this one cannot go on."""


@dataclass(frozen=True)
class Group:
    """The processes that train together; ``rank`` 0 writes the files."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Is this the process that prints and writes?"""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part: every ``size``-th item, each item in exactly one part."""
        return items[self.rank::self.size]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        answers: list[Any] = [None] * self.size
        with _losing_peers():
            dist.all_gather_object(answers, value)
        return answers

    def from_main(self, value: T) -> T:
        """Rank 0's value on every rank; also a meeting point."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.gather(None)

    def average_gradients(self, parameters: Sequence[torch.nn.Parameter], bags: int) -> int:
        """Turn summed gradients into the mean over all bags of all ranks, in place.

        ``bags`` is how many this rank summed. Returns the number over all ranks; 0 means that
        there is no gradient to step with. A parameter that no rank used keeps ``grad None``.
        """
        if self.size > 1:
            bags = self._sum_gradients(parameters, bags)
        if bags > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(bags)
        return bags

    def add_up(self, tensor: torch.Tensor) -> None:
        """Make the tensor (contiguous, of equal shape on all ranks) the sum over them, in place."""
        if self.size > 1:
            import torch.distributed as dist

            with _losing_peers():
                dist.all_reduce(tensor)

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make the tensors (of one device, floating point) the mean over the ranks, in place."""
        if self.size == 1 or not tensors:
            return
        import torch
        import torch.distributed as dist

        flat = torch.cat([_wide(one).flatten() for one in tensors])
        with _losing_peers():
            dist.all_reduce(flat)
        parts = (flat / self.size).split([one.numel() for one in tensors])
        for one, mean in zip(tensors, parts, strict=True):
            one.copy_(mean.view_as(one))

    def _sum_gradients(self, parameters: Sequence[torch.nn.Parameter], bags: int) -> int:
        """One all-reduce of every gradient, which parameters have one, and the number of bags."""
        import torch
        import torch.distributed as dist

        used = [float(parameter.grad is not None) for parameter in parameters]
        device = parameters[0].device
        flat = torch.cat([
            *(_wide(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
              .flatten() for parameter in parameters),
            torch.tensor([*used, float(bags)], device=device)])
        with _losing_peers():
            dist.all_reduce(flat)
        *anyone, total = flat[-len(used) - 1:].tolist()
        place = 0
        for parameter, count in zip(parameters, anyone, strict=True):
            part = flat[place:place + parameter.numel()]
            place += parameter.numel()
            parameter.grad = part.view_as(parameter).to(parameter.dtype) if count else None
        return int(total)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In a number format that sums lose little in: float32, or float64 where it is that."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


ALONE = Group()


def current_group() -> Group:
    """The group that this process is in right now, for what is not handed one."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Group(rank=dist.get_rank(), size=dist.get_world_size())


def local_processes() -> int:
    """How many processes ``torchrun`` started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def process_group(device: torch.device | None, *, timeout_s: float = PEER_TIMEOUT_S
                  ) -> Iterator[Group]:
    """The group that ``torchrun`` started this process in, or ``ALONE``.

    device: what tensors are exchanged from, None = only plain values are; timeout_s: how long a
    rank waits for one that does not answer (one that dies is noticed at once)
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    with _losing_peers():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        group = Group(rank=dist.get_rank(), size=dist.get_world_size())
        if len(versions := set(group.gather(__version__))) > 1:
            raise Refused(f"the processes run different versions of MILwright: {versions}")
        yield group
        with _losing_peers():
            dist.barrier()
    finally:
        dist.destroy_process_group()
        time.sleep(_LAST_BREATH_S)


@contextlib.contextmanager
def _losing_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch reports a closed connection or a time-out as this
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise PeerLost(f"another process of the group died or hangs ({first}): see its own message "
                       "above; the same command goes on from what is finished") from None
