"""DSMIL: the critical patch of each class by an instance classifier, attention around it.

Source: Li, Li, Eliceiri, "Dual-stream Multiple Instance Learning Network for Whole Slide Image
Classification with Self-supervised Contrastive Learning", CVPR 2021, section 3.2, eq. 5-8.
State-dict keys are the published ones: ``i_classifier.fc.0`` (C, D), ``b_classifier.q.{0,2}`` (or
``q`` when linear), ``b_classifier.v.1`` (D, D) if values have a layer, ``b_classifier.fcc``
(C, C, D). A model of one output learns with a multi-label, regression or survival objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn

from models.layers import Dropout, features_of
from models.linear import Linear
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.objectives import Classification, Objective


class InstanceStream(nn.Module):
    """Scores of each patch alone: (N, D) to (N, C)."""

    def __init__(self, embed_dim: int, n_classes: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(embed_dim, n_classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.fc(features)
        return scores


class BagStream(nn.Module):
    """Attention of all patches to the critical patch of each class, and the slide's logits."""

    def __init__(self, *, embed_dim: int, n_classes: int, query_dim: int, linear_query: bool,
                 passing_v: bool, dropout: float) -> None:
        super().__init__()
        first = Linear(embed_dim, query_dim)
        self.q: nn.Module = first if linear_query else nn.Sequential(
            first, nn.ReLU(), Linear(query_dim, query_dim), nn.Tanh())
        layer = (Linear(embed_dim, embed_dim), nn.ReLU()) if passing_v else ()
        self.v = nn.Sequential(Dropout(dropout), *layer)
        self.fcc = nn.Conv1d(n_classes, n_classes, kernel_size=embed_dim)

    def forward(
        self, features: torch.Tensor, critical: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (1, C), raw attention (C, N) and embeddings (C, D).

        features: (N, D); critical: (C,) row of each class's critical patch
        """
        queries = self.q(features)
        attention = queries[critical] @ queries.mT * queries.shape[1] ** -0.5
        embedding = attention.softmax(dim=1) @ self.v(features)
        return self.fcc(embedding[None]).flatten(1), attention, embedding


class DSMIL(nn.Module):
    """Slide logits from the bag stream; both streams learn.

    query_dim: width of the queries. linear_query: one linear layer makes them, not two.
    passing_v: a linear layer and ReLU on the values. value_dropout: of the values.
    max_weight: share of the highest instance scores' loss in the total, the rest is the slide's.
    """

    contextual: ClassVar[bool] = True

    def __init__(
        self,
        *,
        n_classes: int = 2,
        embed_dim: int = 1024,
        query_dim: int = 128,
        linear_query: bool = False,
        passing_v: bool = False,
        value_dropout: float = 0.0,
        max_weight: float = 0.5,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.max_weight = max_weight
        self.objective = objective or Classification(n_classes=n_classes)
        self.i_classifier = InstanceStream(embed_dim, n_classes)
        self.b_classifier = BagStream(
            embed_dim=embed_dim, n_classes=n_classes, query_dim=query_dim,
            linear_query=linear_query, passing_v=passing_v, dropout=value_dropout)

    def forward(self, bag: Bag) -> SlideOutput:
        """Logits (1, C), attention (C, N) before the softmax, embedding (C, D)."""
        return self._streams(bag)[0]

    def _streams(self, bag: Bag) -> tuple[SlideOutput, torch.Tensor]:
        """The answer of the bag stream, and the highest instance scores (1, C)."""
        features = features_of(bag, self.embed_dim)
        highest, critical = self.i_classifier(features).max(dim=0)
        logits, attention, embedding = self.b_classifier(features, critical)
        output = SlideOutput(logits=logits, attention=attention, embedding=embedding)
        return output, highest[None]

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """One loss: (1 - max_weight) * slide + max_weight * highest instances."""
        output, highest = self._streams(bag)
        slide = self.objective.loss(output.logits, bag)
        instance = self.objective.loss(highest, bag)
        yield StepLoss(
            value=(1.0 - self.max_weight) * slide + self.max_weight * instance,
            slide_loss=slide.detach(), parts={"max_instance_loss": instance.detach()},
            output=output)
