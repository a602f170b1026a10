"""TransMIL: class token and patches in two Nyström attention layers, positions by convolution.

Source: Shao, Bian, Chen, Wang, Zhang, Ji, Zhang, "TransMIL: Transformer based Correlated Multiple
Instance Learning for Whole Slide Image Classification", NeurIPS 2021, algorithms 2 and 3.
State-dict keys are the published ones: ``_fc1.0``, ``cls_token``, ``layer{1,2}.norm``,
``layer{1,2}.attn.{to_qkv, to_out.0, res_conv}``, ``pos_layer.{proj, proj1, proj2}``, ``norm``,
``_fc2``. Patches are laid out row by row on a square whatever their coordinates, as published, so
the answer depends on the order of the patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import features_of, slide_step
from models.linear import Linear
from models.nystrom import NystromAttention
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.errors import Refused
from utils.objectives import Classification, Objective

_LEAST_SHARE = 1e-4  # of the mean attention: less than this is the error of the approximation


class TransLayer(nn.Module):
    """x + attention(norm(x)) on tokens (1, S, D)."""

    def __init__(self, attention: NystromAttention, *, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (1, S, D) to (1, S, D)."""
        result: torch.Tensor = x + self.attn(self.norm(x))
        return result

    def with_attention(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens, and the attention (H, S) of the first token to all of them."""
        first = torch.zeros(1, dtype=torch.long, device=x.device)
        result, attention = self.attn.with_attention(self.norm(x), first)
        return x + result, attention[:, 0]


class PositionLayer(nn.Module):
    """PPEG: depth-wise convolutions of sizes 7, 5 and 3 over the square of patches, and itself.

    All four are linear and zero-padded, so their sum is one convolution with the sum of the
    kernels: a third of the memory.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.proj1, self.proj2 = (
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in (7, 5, 3))

    def forward(self, square: torch.Tensor) -> torch.Tensor:
        """Tokens (1, side, side, D) to the same shape."""
        itself = torch.zeros(7, 7, device=square.device)
        itself[3, 3] = 1.0
        kernel = (self.proj.weight + F.pad(self.proj1.weight, (1, 1, 1, 1))
                  + F.pad(self.proj2.weight, (2, 2, 2, 2)) + itself)
        biases = [layer.bias for layer in (self.proj, self.proj1, self.proj2)
                  if layer.bias is not None]
        mixed = F.conv2d(square.permute(0, 3, 1, 2), kernel, torch.stack(biases).sum(dim=0),
                         padding=3, groups=len(kernel))
        return mixed.permute(0, 2, 3, 1)


class TransMIL(nn.Module):
    """Class token and N patches, filled up to a square by repeating the first patches.

    inner_dim: width of the tokens; n_heads must divide it. landmarks: of the attention, None is
    half of the width. dropout: after the attention.
    legacy_padding: zero rows take part in the attention, as published, see ``models.nystrom``.
    """

    contextual: ClassVar[bool] = True

    def __init__(
        self,
        *,
        n_classes: int = 2,
        embed_dim: int = 1024,
        inner_dim: int = 512,
        n_heads: int = 8,
        landmarks: int | None = None,
        dropout: float = 0.1,
        legacy_padding: bool = False,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        if inner_dim % n_heads:
            raise Refused(f"model: inner_dim is {inner_dim}, expected a multiple of n_heads "
                          f"({n_heads})")
        self.embed_dim = embed_dim
        self.objective = objective or Classification(n_classes=n_classes)
        self.pos_layer = PositionLayer(inner_dim)
        self._fc1 = nn.Sequential(Linear(embed_dim, inner_dim), nn.ReLU(inplace=True))
        self.cls_token = nn.Parameter(torch.randn(1, 1, inner_dim))
        self.layer1, self.layer2 = (
            TransLayer(NystromAttention(
                inner_dim, heads=n_heads, head_dim=inner_dim // n_heads,
                landmarks=landmarks or max(1, inner_dim // 2), dropout=dropout,
                legacy_padding=legacy_padding), width=inner_dim) for _ in range(2))
        self.norm = nn.LayerNorm(inner_dim)
        self._fc2 = nn.Linear(inner_dim, n_classes)

    def forward(self, bag: Bag) -> SlideOutput:
        """Logits (1, C), embedding (1, D); outside training the class token's attention too.

        heads (H, N): what the class token of the last layer pays to each patch, copies of a patch
        counted with it. attention (1, N): the log of their mean, so that its softmax is that mean.
        """
        features = features_of(bag, self.embed_dim)
        n = len(features)
        side = math.isqrt(n - 1) + 1
        patches = self._fc1(features)
        patches = torch.cat([patches, patches[: side * side - n]])[None]
        tokens = self.layer1(torch.cat([self.cls_token.to(patches.dtype), patches], dim=1))
        square = self.pos_layer(tokens[:, 1:].unflatten(1, (side, side)))
        tokens = torch.cat([tokens[:, :1], square.flatten(1, 2)], dim=1)
        if self.training:  # nobody looks at it, and it costs
            return self._output(self.layer2(tokens), None)
        tokens, attention = self.layer2.with_attention(tokens)
        return self._output(tokens, _of_patches(attention[:, 1:], n))

    def _output(self, tokens: torch.Tensor, heads: torch.Tensor | None) -> SlideOutput:
        embedding = self.norm(tokens[:, 0])
        attention = None if heads is None else heads.mean(dim=0, keepdim=True).log()
        return SlideOutput(logits=self._fc2(embedding), embedding=embedding, attention=attention,
                           heads=heads)

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """The slide loss, once."""
        yield slide_step(self(bag), bag, self.objective)


def _of_patches(weights: torch.Tensor, n: int) -> torch.Tensor:
    """Attention (H, S) to the filled square as a distribution (H, n) over the patches."""
    patches = weights[:, :n].clone()
    copies = weights[:, n:]
    patches[:, : copies.shape[1]] += copies
    patches = patches.clamp(min=_LEAST_SHARE / n)
    return patches / patches.sum(dim=1, keepdim=True)
