"""Attention-based MIL without an instance branch (Ilse, Tomczak, Welling, ICML 2018).

State-dict keys are those of CLAM_SB less the instance classifiers: ``attention_net.0``,
``attention_net.3...`` (see ``models.attention``) and ``classifiers`` (C, 512).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from models.attention import HIDDEN, AttentionNet, pool
from models.layers import features_of, slide_step
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.objectives import Classification, Objective


class ABMIL(nn.Module):
    """One attention row, one linear classifier on the slide embedding."""

    contextual: ClassVar[bool] = False

    def __init__(
        self,
        *,
        n_classes: int = 2,
        embed_dim: int = 1024,
        model_size: str = "small",
        gated: bool = True,
        dropout: float = 0.25,
        attention_dropout: float = 0.25,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.objective = objective or Classification(n_classes=n_classes)
        self.attention_net = AttentionNet(
            embed_dim=embed_dim, model_size=model_size, gated=gated, rows=1,
            dropout=dropout, attention_dropout=attention_dropout)
        self.classifiers = nn.Linear(HIDDEN, n_classes)

    def forward(self, bag: Bag) -> SlideOutput:
        """Logits (1, C), attention (1, N) before the softmax, embedding (1, 512)."""
        h, scores = self.attention_net(features_of(bag, self.embed_dim))
        embedding = pool(h, scores)
        return SlideOutput(
            logits=self.classifiers(embedding), attention=scores, embedding=embedding)

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """The slide loss, once."""
        yield slide_step(self(bag), bag, self.objective)
