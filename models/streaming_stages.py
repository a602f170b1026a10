"""A timm network laid out for streaming: which stages are streamed, which see the whole map.

Source: spec streaming.md 6 (what is local), 7 (the cut).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from models.locality import Step, make_steps
from models.patch_network import Stage
from utils.errors import Refused


def split_stages(stages: Sequence[Stage], cut: str | None) -> tuple[list[list[Step]], list[Stage]]:
    """The steps of each streamed stage, those to ``cut`` (None = all), and the stages after them.

    Batch norms have to be in eval mode. ``Refused`` for a cut that is no stage, and for a streamed
    layer that is not local, with the last cut before it.
    """
    names = [name for name, _ in stages]
    if cut is not None and cut not in names:
        raise Refused(f"--cut {cut} is no stage of the network, which has {', '.join(names)}")
    last = len(names) if cut is None else names.index(cut) + 1
    streamed: list[list[Step]] = []
    channels = 3
    for number, (_, parts) in enumerate(stages[:last]):
        try:
            streamed.append(make_steps(parts, channels=channels))
        except Refused as error:
            if not number:
                raise
            raise Refused(f"{error}: the last cut that goes is --cut {names[number - 1]}, the "
                          "stages after it see the whole map") from None
        channels = streamed[-1][-1].locality.out_channels
    return streamed, list(stages[last:])


def modules_of(stages: Sequence[Stage]) -> list[nn.Module]:
    """The modules of stages, one after another."""
    return [module for _, parts in stages for _, module in parts]


def ends(groups: Sequence[Sequence[Step]]) -> tuple[int, ...]:
    """After how many steps each stage ends."""
    return tuple(accumulate(len(group) for group in groups))


class AlignedConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow does it ("same"), always as for sides that the stride
    divides.

    TensorFlow's padding depends on the remainder of the side: so would the grid of positions, and a
    tile would not have that of its image. For sides that the stride divides this is the same
    function; others are continued by zeros at their end. ceil(side / stride) positions.
    """

    def __init__(self, same: nn.Conv2d) -> None:
        super().__init__(
            same.in_channels, same.out_channels, cast(tuple[int, int], same.kernel_size),
            stride=cast(tuple[int, int], same.stride), dilation=cast(
                tuple[int, int], same.dilation), groups=same.groups, bias=same.bias is not None,
            device="meta")
        self.weight, self.bias = same.weight, same.bias
        spans = [around * (size - 1) + 1 for size, around in zip(
            self.kernel_size, self.dilation, strict=True)]
        beside = [(max(span - step, 0), step) for span, step in zip(
            spans, self.stride, strict=True)]
        self.pads = tuple(side for both, step in reversed(beside)
                          for side in (both // 2, both - both // 2 + step - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) to (n, C', ceil(h / stride), ceil(w / stride))."""
        return F.conv2d(F.pad(x, self.pads), self.weight, self.bias, self.stride, 0, self.dilation,
                        self.groups)


def align_padding(network: nn.Module) -> None:
    """Every convolution of timm's with TensorFlow's padding becomes an ``AlignedConv2d``; the
    parameters, their names and their values stay."""
    same = [name for name, module in network.named_modules() if isinstance(module, Conv2dSame)]
    for name in same:
        parent, _, last = name.rpartition(".")
        conv = cast(nn.Conv2d, network.get_submodule(name))
        setattr(network.get_submodule(parent), last, AlignedConv2d(conv))


def crashes_on_cpu(network: nn.Module) -> bool:
    """Has it a convolution that takes PyTorch (2.15) down with it, in the backward pass on a CPU
    with channels last: 1 x 1, with a stride, of three channels (RepVGG's first)?"""
    return any(isinstance(module, nn.Conv2d) and module.in_channels == 3
               and module.kernel_size == (1, 1) and module.stride != (1, 1)
               for module in network.modules())


def freeze_norms(network: nn.Module) -> None:
    """Batch norms keep their statistics, whatever the mode of the network."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.training = False  # of the norm alone: timm's hold dropout as well


def map_size(parts: Sequence[nn.Module], size: tuple[int, int], *, channels: int
             ) -> tuple[int, int]:
    """(h, w) of what ``parts``, one after another, make of (h, w) inputs; computed without memory.

    ``ValueError`` when the input is too small for them.
    """
    whole = nn.Sequential(*parts)
    weights = {name: torch.empty_like(one, device="meta")
               for name, one in (*whole.named_parameters(), *whole.named_buffers())}
    kind = next((one.dtype for one in weights.values() if one.is_floating_point()), None)
    x = torch.empty((1, channels, *size), device="meta", dtype=kind)
    try:
        with torch.no_grad():
            found = functional_call(whole, weights, (x,))
    except (RuntimeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())[:100]) from None
    if not found.numel():
        raise ValueError("nothing is left of it")
    return int(found.shape[-2]), int(found.shape[-1])
