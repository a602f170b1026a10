"""A forward pass done twice, with the same answer: random numbers and running statistics.

What first runs without a graph and then again with one must draw the same dropout masks and crops,
and must not move running statistics twice. Import late: it needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """Torch's global generators at one moment. cuda: that of ``device``, None for a CPU."""

    device: torch.device
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """The generators as they are now, of the CPU and of ``device``."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device=device, cpu=torch.get_rng_state(), cuda=cuda)

    def restore(self) -> None:
        """Set the generators back, so that what was drawn since is drawn again."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@contextmanager
def kept_random(device: torch.device) -> Iterator[None]:
    """What is drawn inside leaves the generators as they were."""
    before = RandomState.capture(device)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def kept_buffers(module: torch.nn.Module) -> Iterator[None]:
    """What a forward pass inside does to buffers (running statistics) is undone.

    Those that it leaves as they are, as batch norms in eval mode do, are not written to: a graph
    that has saved them is still good.
    """
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
