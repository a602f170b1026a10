"""Small layers the slide models share: cheap dropout, checks of what enters, the plain loss.

Dropout on a CPU spends most of its time drawing one random number an element. Here eight (or
four) elements share one 64-bit draw of torch's generator, so ``torch.manual_seed`` still decides
every mask; on other devices the native draw is fast and is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from utils.contracts import Bag, SlideOutput, StepLoss
from utils.errors import ItemFailed
from utils.objectives import Objective


def features_of(bag: Bag, width: int) -> torch.Tensor:
    """The (N, width) features of a bag; ``ItemFailed`` when it is empty or of another width."""
    features = bag.features
    if features.ndim != 2 or features.shape[1] != width:
        raise ItemFailed(f"{bag.slide_id}: features have shape {tuple(features.shape)}, "
                         f"the model expects (patches, {width})")
    if features.shape[0] == 0:
        raise ItemFailed(f"{bag.slide_id}: the bag has no patches")
    return features


def slide_step(output: SlideOutput, bag: Bag, objective: Objective) -> StepLoss:
    """The one loss of a model that learns from the slide's truth alone."""
    value = objective.loss(output.logits, bag)
    return StepLoss(value=value, slide_loss=value.detach(), output=output)


def stack_linears(linears: Iterable[nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (G, out, in) and biases (G, out) of G ``nn.Linear`` of one shape."""
    layers = [cast(nn.Linear, layer) for layer in linears]
    return (torch.stack([layer.weight for layer in layers]),
            torch.stack([layer.bias for layer in layers]))


def keep_mask(like: torch.Tensor, drop: float) -> torch.Tensor:
    """A bool mask shaped as ``like``, False with probability ``drop``.

    On a CPU that probability is exact where it is a multiple of 1/256 (all of CLAM's are), and
    else rounded to a multiple of 1/65536.
    """
    if like.device.type != "cpu":
        return torch.rand(like.shape, device=like.device) >= drop
    kind, bits = (torch.int8, 8) if (drop * 256).is_integer() else (torch.int16, 16)
    words = torch.empty(-(-like.numel() * bits // 64), dtype=torch.int64).random_(-(2**63), None)
    values = words.view(kind)[: like.numel()].view(like.shape)
    return values.ge(round(drop * 2**bits) - 2 ** (bits - 1))


class _Masked(torch.autograd.Function):
    """``where(keep, x * scale, 0)``; holds one byte an element for the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * scale).mul_(keep)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (grads[0] * ctx.scale).mul_(keep), None, None


class _ReluMasked(torch.autograd.Function):
    """``where(keep, relu(x) * scale, 0)``, written over ``x``.

    Gradient flows exactly where the result is positive, so the mask itself is not held.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
        x.relu_().mul_(keep).mul_(scale)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (result,) = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grads[0], result, 0.0)
        return grad.mul_(ctx.scale), None, None


class Dropout(nn.Module):
    """Inverted dropout with the meaning of ``nn.Dropout`` and cheap masks on the CPU."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.scale = 1.0 / (1.0 - drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of any shape; unchanged outside training."""
        if not self.training or self.drop == 0.0:
            return x
        masked: torch.Tensor = _Masked.apply(x, keep_mask(x, self.drop), self.scale)
        return masked


class ReluDropout(Dropout):
    """ReLU, then dropout, in one pass over the memory of its input (a fresh linear output)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of any shape, overwritten."""
        if not self.training or self.drop == 0.0:
            return x.relu_()
        masked: torch.Tensor = _ReluMasked.apply(x, keep_mask(x, self.drop), self.scale)
        return masked


def redo_rows(trunk: nn.Sequential, features: torch.Tensor, h: torch.Tensor,
              rows: torch.Tensor) -> torch.Tensor:
    """Embeddings (n, H) of a few ``rows`` (n,) with a graph, of ``h`` (N, H) made without one.

    trunk: a linear layer and its ``ReluDropout``, of which h is the result on ``features``; the
    rows keep the dropout masks they have there. So a model that listens to a few patches only pays
    for the gradient of these.
    """
    if not torch.is_grad_enabled():
        return h[rows]
    torch.clear_autocast_cache()  # older torch would reuse weights cast without a graph
    linear, activation = cast(nn.Linear, trunk[0]), cast(ReluDropout, trunk[1])
    scale = activation.scale if activation.training else 1.0
    embedding: torch.Tensor = linear(features[rows]) * (h[rows] > 0) * scale
    return embedding
