"""The integrated attention transformer (IAT): HAG-MIL's model of one magnification.

Source: Xiong et al., "Diagnose Like a Pathologist: Transformer-Enabled Hierarchical
Attention-Guided Multiple Instance Learning for Whole Slide Image Classification", IJCAI 2023;
attention pooling of Ilse et al. 2018, Nyström attention of Xiong et al. 2021
(``models.nystrom``). State-dict keys are the published ones (github.com/BearCleverProud/HAG-MIL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.attention import ATTENTION_WIDTH, HIDDEN, GatedAttention, PlainAttention
from models.layers import Dropout
from models.linear import Linear
from models.nystrom import NystromAttention
from utils.errors import Refused

HEADS = 8
ATTENTION_OUTPUT_DROPOUT = 0.3
# "Admin" weight of the residual connection for 8 layers (Liu et al., EMNLP 2020)
OMEGA = sqrt(9 / log(9) - 1)


@dataclass(kw_only=True)
class Blocks:
    """What the blocks of an IAT make of a bag.

    logits: (1, C); embedding: (1, F); of the last block: scores (1, N), the raw attention,
    and instances (N, 512)
    """

    logits: torch.Tensor
    embedding: torch.Tensor
    scores: torch.Tensor
    instances: torch.Tensor


class _Residual(nn.Module):
    """The constant weight of a residual connection, in the state dict as published."""

    omega: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("omega", torch.tensor([OMEGA]))


class TransformerLayer(nn.Module):
    """h to omega * h + attention(LayerNorm(h)), (1, N, D) to (1, N, D); no feed-forward part."""

    def __init__(
        self, width: int, *, landmarks: int | None, dropout: float, legacy_padding: bool
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = NystromAttention(
            width, heads=HEADS, head_dim=width // HEADS, landmarks=landmarks or width // 2,
            dropout=dropout, legacy_padding=legacy_padding)
        self.residual_attn = _Residual()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.attn(self.norm(h))
        return update.addcmul(h, self.residual_attn.omega)


class IntegratedAttention(nn.Module):
    """One block: rows (N, D_in) to rows (N, D), and the bag as it pools them.

    Returns the rows h (N, D), raw scores (1, N), the slide vector (1, F) and the instance
    embeddings (N, 512). The scores are made of LayerNorm(h); they weigh h itself, whose mean then
    passes the same LayerNorm.
    """

    def __init__(
        self, width_in: int, width: int, width_final: int, *, gated: bool, dropout: float,
        attention_dropout: float, landmarks: int | None, legacy_padding: bool,
    ) -> None:
        super().__init__()
        self.fc = nn.Sequential(Linear(width_in, width), nn.LayerNorm(width), nn.GELU())
        self.layer = TransformerLayer(
            width, landmarks=landmarks, legacy_padding=legacy_padding,
            dropout=ATTENTION_OUTPUT_DROPOUT if dropout > 0.0 else 0.0)
        self.norm = nn.LayerNorm(width)
        attention = GatedAttention if gated else PlainAttention
        embed: list[nn.Module] = [Linear(width, HIDDEN), nn.GELU()]
        if dropout > 0.0:  # the place of the attention in the sequence is part of its names
            embed.append(Dropout(dropout))
        self.attention_net = nn.Sequential(*embed, attention(
            width=ATTENTION_WIDTH["small"], rows=1, drop=attention_dropout))
        self.layer_map_to_final = nn.Sequential(
            Linear(width, width_final), nn.LayerNorm(width_final), nn.GELU())

    def forward(
        self, h: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        linear, *rest = self.fc
        h = _not_held(linear(h), *rest)
        h = self.layer(h[None])[0]
        embed, *rest, attention = self.attention_net
        instances = _not_held(h, self.norm, embed)
        for layer in rest:
            instances = layer(instances)
        scores = attention(instances).transpose(0, 1)
        pooled = scores.float().softmax(dim=1).to(h.dtype) @ h  # (1, D)
        return h, scores, self.layer_map_to_final(self.norm(pooled)), instances


def _not_held(x: torch.Tensor, *layers: nn.Module) -> torch.Tensor:
    """x through layers that draw no random numbers; what lies between is computed again.

    For LayerNorm's results: as large as any, and cheap.
    """
    result = checkpoint(nn.Sequential(*layers), x, use_reentrant=False, preserve_rng_state=False)
    return cast(torch.Tensor, result)


class IAT(nn.Module):
    """Patch features (N, D) of one magnification to the logits of the slide.

    hidden_dims: width of each block, at least 8; the last is that of the slide vectors.
    dropout: of the instance embeddings; 0 also switches off that of the transformer (0.3).
    attention_dropout: in the pooling attention. gated: sigmoid gate in it.
    landmarks, legacy_padding: see ``models.nystrom``; None = half of each block's width.
    checkpoint_above: bags of more rows compute the inside of a block again on the way back
    instead of holding it (it is about 11 rows of width D a patch).
    ``instance_classifiers.{c}`` (2, 512) belong to ``models.instance_loss``.
    """

    def __init__(
        self, *, embed_dim: int = 1024, n_outputs: int = 2,
        hidden_dims: Sequence[int] = (1024, 1536, 512, 1024), gated: bool = True,
        dropout: float = 0.25, attention_dropout: float = 0.25, landmarks: int | None = None,
        legacy_padding: bool = False, checkpoint_above: int = 4096,
    ) -> None:
        super().__init__()
        if not hidden_dims or min(hidden_dims) < HEADS:
            raise Refused(f"model: hidden_dims is {list(hidden_dims)}, expected one width or more, "
                          f"each at least {HEADS}")
        self.embed_dim = embed_dim
        self.checkpoint_above = checkpoint_above
        widths = [embed_dim, *hidden_dims]
        self.layers = nn.ModuleList(
            IntegratedAttention(
                width_in, width, widths[-1], gated=gated, dropout=dropout,
                attention_dropout=attention_dropout, landmarks=landmarks,
                legacy_padding=legacy_padding)
            for width_in, width in zip(widths[:-1], widths[1:], strict=True))
        self.weights = nn.Linear(len(hidden_dims), 1)
        self.fc5 = nn.Linear(widths[-1], n_outputs)
        self.instance_classifiers = nn.ModuleList(
            nn.Linear(HIDDEN, 2) for _ in range(n_outputs))

    def forward(self, features: torch.Tensor) -> Blocks:
        """(N, D) features, N at least 1."""
        h, again = features, torch.is_grad_enabled() and len(features) > self.checkpoint_above
        vectors = []
        for block in self.layers:
            h, scores, vector, instances = cast(
                tuple[torch.Tensor, ...],
                checkpoint(block, h, use_reentrant=False) if again else block(h))
            vectors.append(vector)
        mixed = self.weights(torch.cat(vectors).T).T  # (F, blocks) to (1, F)
        return Blocks(logits=self.fc5(mixed), embedding=mixed, scores=scores, instances=instances)
