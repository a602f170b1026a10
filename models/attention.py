"""The trunk and attention shared by CLAM and ABMIL, with the published state-dict keys.

``attention_net.0`` is the trunk's linear layer, ``attention_net.3`` the attention:
gated ``attention_a.0``, ``attention_b.0``, ``attention_c``; ungated ``module.0`` and the last
linear layer, ``module.3`` with dropout in the attention and ``module.2`` without.
Source: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018,
eq. 7-9; widths of Lu et al., "Data-efficient and weakly supervised computational pathology on
whole-slide images", Nature BME 2021.
"""

from __future__ import annotations

import torch
from torch import nn

from models.layers import Dropout, ReluDropout
from models.linear import Linear

HIDDEN = 512  # width of the embedding of an instance
ATTENTION_WIDTH = {"small": 256, "big": 384}


class GatedAttention(nn.Module):
    """score_k = w_k . (tanh(V h) * sigmoid(U h)): (N, 512) to (N, K).

    CLAM drops out both factors with p each. They only meet in the product, where an element
    survives with (1 - p)^2: one mask of that probability is the same distribution at half the cost.
    """

    def __init__(self, *, width: int, rows: int, drop: float) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(Linear(HIDDEN, width), nn.Tanh())
        self.attention_b = nn.Sequential(Linear(HIDDEN, width), nn.Sigmoid())
        self.attention_c = nn.Linear(width, rows)
        self.dropout = Dropout(1.0 - (1.0 - drop) ** 2)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        gated = self.attention_a(h) * self.attention_b(h)  # (N, A)
        scores: torch.Tensor = self.attention_c(self.dropout(gated))
        return scores


class PlainAttention(nn.Module):
    """score_k = w_k . tanh(V h): (N, 512) to (N, K)."""

    def __init__(self, *, width: int, rows: int, drop: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [Linear(HIDDEN, width), nn.Tanh()]
        if drop > 0.0:
            layers.append(Dropout(drop))
        self.module = nn.Sequential(*layers, nn.Linear(width, rows))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.module(h)
        return scores


class AttentionNet(nn.Sequential):
    """Features (N, D) to instance embeddings (N, 512) and raw attention scores (K, N)."""

    def __init__(
        self, *, embed_dim: int, model_size: str, gated: bool, rows: int,
        dropout: float, attention_dropout: float,
    ) -> None:
        attention = GatedAttention if gated else PlainAttention
        super().__init__(
            Linear(embed_dim, HIDDEN), ReluDropout(dropout),
            nn.Identity(),  # keeps the attention at its published place
            attention(width=ATTENTION_WIDTH[model_size], rows=rows, drop=attention_dropout))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        linear, activation, _, attention = self
        h = activation(linear(features))
        return h, attention(h).transpose(0, 1)


def pool(h: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Slide embeddings (K, 512): instances (N, 512) weighted by the softmax of scores (K, N)."""
    return scores.softmax(dim=1) @ h
