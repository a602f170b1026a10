"""What a step of a network computes and holds: looked up once, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from models.locality import Step

_COSTS: WeakKeyDictionary[nn.Module, StepCost] = WeakKeyDictionary()


@dataclass(frozen=True)
class StepCost:
    """What a step takes, for each position of its input.

    flops: of its forward pass; saved_values: numbers that autograd holds, its result included, its
    input not; saved_bytes: what autograd holds that is no floating-point number (places of maxima);
    largest_values: numbers in its largest tensor
    """

    flops: float
    saved_values: float
    saved_bytes: float
    largest_values: float


def cost_of(step: Step) -> StepCost:
    """Measured once for each module, on an input so large that borders do not count."""
    cost = _COSTS.get(step.module)
    if cost is None:
        rows, columns = (max(256, 64 * axis.stride)
                         for axis in (step.locality.rows, step.locality.columns))
        cost = _COSTS[step.module] = measure(step, (rows, columns))
    return cost


@torch.inference_mode(mode=False)  # the first image may be one of evaluation
def measure(step: Step, size: tuple[int, int]) -> StepCost:
    """For one input of ``size`` (h, w), as if every weight and the input got gradient."""
    weights = {name: torch.empty_like(one, device="meta", requires_grad=one.is_floating_point())
               for name, one in step.module.named_parameters()}
    weights |= {name: torch.empty_like(one, device="meta")
                for name, one in step.module.named_buffers()}
    number = next((one.dtype for one in weights.values() if one.is_floating_point()), None)
    x = torch.empty((1, step.locality.in_channels, *size), device="meta", dtype=number,
                    requires_grad=True)
    others = {_storage(one) for one in (*weights.values(), x)}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[_storage(tensor)] = tensor
        return tensor

    with (FlopCounterMode(display=False) as counter, torch.enable_grad(),
          saved_tensors_hooks(keep, lambda tensor: tensor)):
        result = functional_call(step.module, weights, (x,))
    saved[_storage(result)] = result
    own = [tensor for place, tensor in saved.items() if place not in others]
    numbers = [_values(tensor) for tensor in own if tensor.is_floating_point()]
    positions = size[0] * size[1]
    return StepCost(
        flops=counter.get_total_flops() / positions, saved_values=sum(numbers) / positions,
        saved_bytes=sum(tensor.untyped_storage().nbytes() for tensor in own
                        if not tensor.is_floating_point()) / positions,
        largest_values=max(x.numel(), *numbers) / positions)


def _values(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor is in; on the meta device there are no addresses."""
    place: int = tensor.untyped_storage()._cdata
    return place
