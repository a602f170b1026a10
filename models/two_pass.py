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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    work = _Work(parts=parts, compute=compute, replay=Replay(module=module, device=device))
    weights = [one for one in module.parameters() if one.requires_grad]
    if not (torch.is_grad_enabled() and weights):
        with torch.no_grad():
            return tuple(work.first_pass())
    results: tuple[torch.Tensor, ...] = _TwoPass.apply(work, *weights)
    return results


@dataclass(kw_only=True)
class Replay:
    """What a second pass needs to give the answers of the first. Made at the call it is to repeat.

    module: its buffers (running statistics) move in the first pass only
    device: of its computing; random numbers come from torch's global generators of it and the CPU
    precision: autocast of the call (device type, number format, on or off)
    """

    module: nn.Module
    device: torch.device
    precision: list[tuple[str, torch.dtype, bool]] = field(init=False)

    def __post_init__(self) -> None:
        self.precision = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                          for kind in sorted({"cpu", self.device.type})]

    def now(self) -> RandomState:
        """The generators as they are, to note before a part is computed."""
        return RandomState.capture(self.device)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the computing of a part: autocast as at the call.

        Without its cache: a weight cast in one pass is no good in the other.
        """
        with ExitStack() as stack:
            for kind, number_format, enabled in self.precision:
                stack.enter_context(torch.autocast(
                    kind, dtype=number_format, enabled=enabled, cache_enabled=False))
            yield

    @contextmanager
    def again(self, state: RandomState | None) -> Iterator[None]:
        """The same with a graph, and with the random numbers that followed ``state``."""
        if state is not None:
            state.restore()
        with torch.enable_grad(), self.first():
            yield

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Around the whole second pass: generators and buffers are left as they were."""
        with kept_random(self.device), kept_buffers(self.module):
            yield


class GradientSums:
    """The gradient of each weight, summed over parts in place.

    Half-precision weights have their sums in float32: hundreds of parts may be added.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._weights = weights
        self._sums: list[torch.Tensor | None] = [None] * len(weights)

    def add(self, found: Sequence[torch.Tensor | None], *, times: float = 1) -> None:
        """Add a part's gradients; None where it has none. They are not kept, nor written to:
        two weights' gradients may be one tensor."""
        old, more = [], []
        for place, one in enumerate(found):
            if one is None:
                continue
            total = self._sums[place]
            if total is None:
                weight = self._weights[place]
                wide = torch.promote_types(weight.dtype, torch.float32)
                self._sums[place] = one.to(wide, copy=True).mul_(times)
            else:
                old.append(total)
                more.append(one)
        if old:
            torch._foreach_add_(old, more, alpha=times)

    def totals(self) -> list[torch.Tensor | None]:
        """In the number format of the weights; None for a weight that no part used."""
        return [None if total is None else total.to(weight.dtype)
                for total, weight in zip(self._sums, self._weights, strict=True)]


@dataclass(kw_only=True)
class _Work:
    """The two passes over the parts. states: the generators before each."""

    parts: Callable[[], Iterable[Any]]
    compute: Callable[[Any], torch.Tensor]
    replay: Replay
    states: list[RandomState] = field(default_factory=list)

    def first_pass(self) -> Iterator[torch.Tensor]:
        """The result of each part; notes what the generators were before it."""
        for part in self.parts():
            self.states.append(self.replay.now())
            with self.replay.first():
                result = self.compute(part)
            del part  # while the next one is made
            yield result

    def second_pass(
        self, weights: list[nn.Parameter], gradients: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """The gradient of each weight; a part whose result was not used is not computed."""
        sums = GradientSums(weights)
        left = deque(zip(self.states, gradients, strict=True))
        with self.replay.second_pass():
            for part in self.parts():
                if not left:
                    raise RuntimeError("two_pass: the second pass has more parts than the first")
                state, gradient = left.popleft()
                result = None if gradient is None else self._again(part, state)
                del part
                if result is not None and result.requires_grad:
                    sums.add(torch.autograd.grad(result, weights, gradient, allow_unused=True))
                del result
        if left:
            raise RuntimeError("two_pass: the second pass has fewer parts than the first")
        return sums.totals()

    def _again(self, part: Any, state: RandomState) -> torch.Tensor:
        with self.replay.again(state):
            return self.compute(part)


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
