"""A loss that compares the slides of a step (Cox), at the memory cost of one slide's graph.

First every bag is passed through the model without a graph. The loss of all their logits together
gives the gradient by each logit, and that is all a bag needs to know of the others: it is passed
again with a graph, under the same random numbers, and back-propagates logit x gradient. The sum
over the bags is the exact gradient of the loss. Import late: it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from utils.contracts import Bag, SlideModel, SlideOutput
from utils.devices import Precision, autocast
from utils.distributed import Group
from utils.errors import ItemFailed
from utils.objectives import Objective
from utils.replay import RandomState, kept_buffers


class JointObjective(Objective, Protocol):
    """An objective with ``needs_batch``."""

    def joint_gradient(self, logits: torch.Tensor, truths: torch.Tensor
                       ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scalar loss of n slides' logits (n, 1) and its gradient by them (n, 1)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Glimpse:
    """A bag after the first pass.

    logit: its number; truth: of the bag; random: the generators before the pass
    """

    logit: float
    truth: tuple[float, ...]
    random: RandomState


@torch.no_grad()
def glimpse(model: torch.nn.Module, bag: Bag, *, precision: Precision, device: torch.device
            ) -> tuple[Glimpse, SlideOutput]:
    """The first pass of a bag; leaves the model's buffers (running statistics) as they were.

    Raises ``ItemFailed`` for a bag without a truth.
    """
    if bag.truth is None:
        raise ItemFailed(f"{bag.slide_id}: there is no truth to learn from")
    random = RandomState.capture(device)
    with kept_buffers(model):
        output = _forward(model, bag, precision=precision, device=device)
    return Glimpse(logit=float(output.logits), truth=bag.truth, random=random), output


def joint_gradients(objective: Objective, glimpses: Sequence[Glimpse], group: Group
                    ) -> list[float] | None:
    """The gradient by the logit of each of this rank's bags, times the bags of all ranks.

    So ``Group.average_gradients`` makes the gradient of the joint loss of the sum. Every rank must
    call this. None when there is nothing to learn on any: no event among the slides.
    """
    every = group.gather([(one.logit, one.truth) for one in glimpses])
    rows = [row for part in every for row in part]
    if not rows:
        return None
    _, gradient = _compare(objective, [logit for logit, _ in rows], [truth for _, truth in rows])
    if not gradient.any():
        return None
    start = sum(len(part) for part in every[:group.rank])
    mine = gradient[start:start + len(glimpses), 0] * len(rows)
    return cast(list[float], mine.tolist())


def joint_loss(objective: Objective, logits: Sequence[float],
               truths: Sequence[tuple[float, ...]]) -> float:
    """The loss of these slides together; NaN when nothing in it depends on them (no event)."""
    loss, gradient = _compare(objective, logits, truths)
    return float(loss) if gradient.any() else float("nan")


def pass_again(model: torch.nn.Module, bag: Bag, seen: Glimpse, gradient: float, *,
               precision: Precision, device: torch.device) -> torch.Tensor:
    """The second pass: a scalar with graph whose gradient is the bag's share of the joint one."""
    seen.random.restore()
    output = _forward(model, bag, precision=precision, device=device)
    return output.logits.float().sum() * gradient


def _compare(objective: Objective, logits: Sequence[float], truths: Sequence[tuple[float, ...]]
             ) -> tuple[torch.Tensor, torch.Tensor]:
    return cast(JointObjective, objective).joint_gradient(
        torch.tensor(logits, dtype=torch.float32)[:, None],
        torch.tensor(truths, dtype=torch.float64))


def _forward(model: torch.nn.Module, bag: Bag, *, precision: Precision, device: torch.device
             ) -> SlideOutput:
    with autocast(precision, device):
        return cast(SlideModel, model)(bag)
