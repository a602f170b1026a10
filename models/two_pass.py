"""The exact gradient of a network that works part by part, in the memory of one part.

Patches of a slide in chunks, tiles of a huge image: each part is computed without a graph, and what
comes after sees all results together. On the way back each part is computed again, this time with
a graph, which lives only until it has carried the gradient of its result to the parameters. The
price is one more forward pass. Source: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup", 2021 (gradient caching); Chen et al., "Training Deep Nets
with Sublinear Memory Cost", 2016.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from utils.replay import RandomState, kept_buffers, kept_random

T = TypeVar("T")


def two_pass(
    parts: Callable[[], Iterable[T]], compute: Callable[[T], torch.Tensor], *, module: nn.Module,
    device: torch.device,
) -> tuple[torch.Tensor, ...]:
    """``compute(part)`` of every part; its gradient by the parameters of ``module`` is exact.

    parts: called once now and once in the backward pass, with the same answer; a part is dropped
           before the next one is asked for
    compute: draws from torch's global generators only, those of the CPU and of ``device``; nothing
           but the parameters of ``module`` gets gradient through it, and no buffer of ``module``
           that the first pass changes may change the result (batch statistics are fine)
    Both passes run under the autocast of this call. Running statistics move in the first only.
    The results carry gradient if grad mode is on and a parameter wants it. There are no second
    derivatives, and hooks of a parameter run for each part and for the sum. What a part raises
    comes out as it is, in the backward pass before any gradient was added; so does the error of
    torch for a parameter changed in between.
    """
    work = _Work(parts=parts, compute=compute, module=module, device=device)
    weights = [one for one in module.parameters() if one.requires_grad]
    if not (torch.is_grad_enabled() and weights):
        with torch.no_grad():
            return tuple(work.first_pass())
    results: tuple[torch.Tensor, ...] = _TwoPass.apply(work, *weights)
    return results


@dataclass(kw_only=True)
class _Work:
    """What the second pass needs. precision: autocast (device type, number format, on or off)."""

    parts: Callable[[], Iterable[Any]]
    compute: Callable[[Any], torch.Tensor]
    module: nn.Module
    device: torch.device
    states: list[RandomState] = field(default_factory=list)
    precision: list[tuple[str, torch.dtype, bool]] = field(init=False)

    def __post_init__(self) -> None:
        self.precision = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                          for kind in sorted({"cpu", self.device.type})]

    def first_pass(self) -> Iterator[torch.Tensor]:
        """The result of each part; notes what the generators were before it."""
        for part in self.parts():
            self.states.append(RandomState.capture(self.device))
            with self._autocast():
                result = self.compute(part)
            del part  # while the next one is made
            yield result

    def second_pass(
        self, weights: list[nn.Parameter], gradients: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """The gradient of each weight; a part whose result was not used is not computed."""
        total: list[torch.Tensor | None] = [None] * len(weights)
        left = deque(zip(self.states, gradients, strict=True))
        with kept_random(self.device), kept_buffers(self.module):
            for part in self.parts():
                if not left:
                    raise RuntimeError("two_pass: the second pass has more parts than the first")
                state, gradient = left.popleft()
                result = None if gradient is None else self._again(part, state)
                del part
                if result is not None and result.requires_grad:
                    found = torch.autograd.grad(result, weights, gradient, allow_unused=True)
                    total = [_sum(one, more) for one, more in zip(total, found, strict=True)]
                del result
        if left:
            raise RuntimeError("two_pass: the second pass has fewer parts than the first")
        return total

    def _again(self, part: Any, state: RandomState) -> torch.Tensor:
        state.restore()
        with torch.enable_grad(), self._autocast():
            return self.compute(part)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """As at the call. Without its cache: a weight cast in one pass is no good in the other."""
        with ExitStack() as stack:
            for kind, number_format, enabled in self.precision:
                stack.enter_context(torch.autocast(
                    kind, dtype=number_format, enabled=enabled, cache_enabled=False))
            yield


class _TwoPass(torch.autograd.Function):
    """Weights to results. They are saved only so that torch notices when they were changed."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.work = work
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights)
        return tuple(work.first_pass())

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.work.second_pass(list(ctx.saved_tensors), gradients)


def _sum(one: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    """Into new memory: two weights' gradients may be one tensor."""
    if one is None or more is None:
        return more if one is None else one
    return one + more
