"""The encoder inside an end-to-end model: a timm network, and the blocks that it is made of.

The blocks, run one after another, are the network: whoever trains it can freeze the first ones,
or hold only what lies between them (gradient checkpointing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.encoder_families import CLASS_AND_MEAN, class_and_mean_of
from models.encoder_transforms import Triple

Run = Callable[[nn.Module, Tensor], Tensor]

# What the forward pass of a timm class runs, in its order, by the names of its parts: blocks of one
# or more of them (joined by +), and "*" for each part of a list. What is left of the class, the
# pooling of ``forward_head`` with its norm, belongs to the last block.
_ORDERS: dict[str, str] = {
    "resnet.ResNet": "conv1+bn1+act1+maxpool layer1 layer2 layer3 layer4",
    "efficientnet.EfficientNet": "conv_stem+bn1 blocks* conv_head+bn2",
    "mobilenetv3.MobileNetV3": "conv_stem+bn1 blocks*",
    "convnext.ConvNeXt": "stem stages* +norm_pre",
    "regnet.RegNet": "stem s1 s2 s3 s4 +final_conv",
    "byobnet.ByobNet": "stem stages* +final_conv",
    "vision_transformer.VisionTransformer":
        "patch_embed+_pos_embed+patch_drop+norm_pre blocks* +norm",
    "swin_transformer.SwinTransformer": "patch_embed layers* +norm"}


class Block(nn.Module):
    """Some steps of a network, one after another; it holds their modules and parameters too.

    steps: modules or methods of ``network``; own: modules that belong here; direct: the parameters
    and buffers that are ``network``'s own, not those of its parts, do as well
    """

    def __init__(self, network: nn.Module, steps: Sequence[Callable[[Tensor], Tensor]],
                 own: Sequence[nn.Module], *, direct: bool) -> None:
        super().__init__()
        self.steps = list(steps)
        self.own = nn.ModuleList(own)
        if direct:
            for name, parameter in network.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
            for name, buffer in network.named_buffers(recurse=False):
                self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        """What the steps make of ``x``, which may have no rows."""
        rows = len(x)
        if not rows and not any(isinstance(one, _BatchNorm) for one in self.modules()):
            # transformers cannot reshape nothing; where no statistics see it, a row of zeros helps
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        for step in self.steps:
            x = step(x)
        return x if rows else x[:0]


class PatchNetwork(nn.Module):
    """Pixels to features: (n, 3, h, w) normalised float -> (n, dim); n may be 0.

    model: a timm network without classifier; keys of the state dict are ``model.`` and timm's
    dim: width of the features; mean, std: of the RGB channels in 0..1, to normalise with
    output: ``CLASS_AND_MEAN`` for a ViT whose features are both; else what the network gives
    """

    def __init__(self, model: nn.Module, *, dim: int, mean: Triple, std: Triple,
                 output: str = "") -> None:
        super().__init__()
        self.model = model
        self.dim, self.mean, self.std = dim, mean, std
        self._output = output

    def forward(self, images: Tensor, run: Run = lambda block, x: block(x)) -> Tensor:
        """``run(block, x)`` computes a block, for callers that freeze or checkpoint some."""
        x = images
        for block in self.blocks():
            x = run(block, x)
        return x

    def blocks(self) -> list[nn.Module]:
        """The stem, then each stage of a CNN (block of a transformer), in order.

        Norm and pooling at the end belong to the last one. A network of a kind not known here is
        a single block. Made anew each time, of the modules that the network has at that moment:
        no other copies, so that what is done to a block is done to the network.
        """
        orders = [order for kind, order in _ORDERS.items() if _runs_as(self.model, kind)]
        if not orders:
            return [Block(self.model, [self.model], [self.model], direct=False)]
        groups = list(_groups(self.model, orders[0]))
        taken = {id(part) for group in groups for part in group}
        rest = [part for part in self.model.children()
                if not any(id(inner) in taken for inner in (part, *part.children()))]
        blocks: list[nn.Module] = []
        for number, steps in enumerate(groups):
            last = number == len(groups) - 1
            own = [step for step in steps if isinstance(step, nn.Module)] + (rest if last else [])
            head = [self._head] if last else []
            blocks.append(Block(self.model, [*steps, *head], own, direct=number == 0))
        return blocks

    def _head(self, x: Tensor) -> Tensor:
        network: Any = self.model
        if self._output == CLASS_AND_MEAN:
            return class_and_mean_of(x, network.num_prefix_tokens)
        return network.forward_head(x)  # type: ignore[no-any-return]


def _runs_as(network: nn.Module, kind: str) -> bool:
    """Is this network of timm's class ``kind``, with the forward pass of that class?"""
    for base in type(network).__mro__:
        if f"{base.__module__}.{base.__name__}" == f"timm.models.{kind}":
            ours: Any = type(network)
            theirs: Any = base
            return (ours.forward is theirs.forward
                    and ours.forward_features is theirs.forward_features)
    return False


def _groups(network: nn.Module, order: str) -> Iterator[list[Callable[[Tensor], Tensor]]]:
    """The steps of each block. A part that was taken out (an identity) makes no block."""
    found: list[list[Callable[[Tensor], Tensor]]] = []
    for word in order.split():
        names = word.removeprefix("+").removesuffix("*").split("+")
        parts: list[Any] = [getattr(network, name) for name in names]
        groups = [[part] for part in parts[0]] if word.endswith("*") else [parts]
        if word.startswith("+"):  # closes the block before it
            found[-1] += parts
        else:
            found += [group for group in groups if not _is_identity(group)]
    yield from found


def _is_identity(group: Sequence[object]) -> bool:
    return all(isinstance(part, nn.Identity) for part in group)
