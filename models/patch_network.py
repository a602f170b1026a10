"""The encoder inside an end-to-end or streaming model: a timm network, and what it is made of.

Its blocks, run one after another, are the network: whoever trains it can freeze the first ones,
or hold only what lies between them (gradient checkpointing). Its stages are the same up to the last
map, without the pooling, in steps as small as a residual block: those can be streamed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.encoder_families import CLASS_AND_MEAN, class_and_mean_of
from models.encoder_transforms import Triple
from utils.errors import Refused

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
_TOKENS = ("vision_transformer.VisionTransformer", "swin_transformer.SwinTransformer")
Stage = tuple[str, list[tuple[str, nn.Module]]]  # its name, and (name, module) of its parts


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

    def stages(self) -> list[Stage]:
        """The stem and each stage of a CNN under timm's names, as modules one after another.

        Run in order they make (n, C, h', w') maps of (n, 3, h, w) images; pooling is in none of
        them. The first is "stem", one module; the others are of residual blocks. A norm that timm
        applies to the pooled features (ConvNeXt) stands at the end of the last, for each position
        alone, as in timm's variants that norm first. Modules and parameters are the network's own.
        ``Refused`` for a network that has no stages of maps: a transformer, or a kind not known.
        """
        orders = [order for kind, order in _ORDERS.items()
                  if kind not in _TOKENS and _runs_as(self.model, kind)]
        if not orders:
            known = ", ".join(kind.split(".")[1] for kind in _ORDERS if kind not in _TOKENS)
            raise Refused(f"{type(self.model).__name__} is no network of convolutions in stages: "
                          f"take one of timm's {known}, resnet34 or convnext_tiny for example")
        stem, *others = _named_groups(self.model, orders[0])
        one = stem[0][1] if len(stem) == 1 else nn.Sequential(OrderedDict(stem))
        found: list[Stage] = [("stem", [("stem", one)])]
        for group in others:
            parts = [inner for name, part in group for inner in _in_a_row(name, part)]
            found.append((group[0][0], [(name, part) for name, part in parts
                                        if not isinstance(part, nn.Identity)]))
        last_norm = getattr(getattr(self.model, "head", None), "norm", None)
        if isinstance(last_norm, nn.LayerNorm):
            found[-1][1].append(("head.norm", last_norm))
        return found

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
    for group in _named_groups(network, order):
        yield [part for _, part in group]


def _named_groups(network: nn.Module, order: str) -> list[list[tuple[str, Any]]]:
    """The same with the name of each."""
    found: list[list[tuple[str, Any]]] = []
    for word in order.split():
        names = word.removeprefix("+").removesuffix("*").split("+")
        parts = [(name, getattr(network, name)) for name in names]
        groups = [parts]
        if word.endswith("*"):
            groups = [[(f"{names[0]}.{number}", part)] for number, part in enumerate(parts[0][1])]
        if word.startswith("+"):  # closes the block before it
            found[-1] += parts
        else:
            found += [group for group in groups if not _is_identity(group)]
    return found


def _in_a_row(name: str, part: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that a stage runs one after another; itself, where that is not known."""
    inside: list[tuple[str, nn.Module]] = list(part.named_children())
    if type(part).__name__ == "ConvNeXtStage":
        inside = [inside[0], *((f"blocks.{key}", block)
                               for key, block in inside[1][1].named_children())]
    elif not (isinstance(part, nn.Sequential) or type(part).__name__ == "RegStage"):
        return [(name, part)]
    return [(f"{name}.{key}", module) for key, module in inside]


def _is_identity(group: Sequence[tuple[str, object]]) -> bool:
    return all(isinstance(part, nn.Identity) for _, part in group)
