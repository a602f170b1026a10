"""The two plainest slide models: every patch is scored alone, the slide's logits are their mean
or their maximum.

``mean``: logits_c = mean_n s_nc; ``max``: logits_c = max_n s_nc, of patch scores
s = W2 . dropout(relu(W1 x)). Unlike CLAM's ``mil`` the maximum is taken for each output on its own
and there is no softmax, so both learn any task. State-dict keys: ``head.0`` (512, D) and
``head.3`` (C, 512). Baselines of Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance
Learning", ICML 2018, table 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn

from models.attention import HIDDEN
from models.layers import ReluDropout, features_of, redo_rows, slide_step
from models.linear import Linear
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.objectives import Classification, Objective


class MeanPooling(nn.Module):
    """Logits are the mean of the patches' (equally: the scores of the mean embedding)."""

    contextual: ClassVar[bool] = False

    def __init__(
        self, *, n_classes: int = 2, embed_dim: int = 1024, dropout: float = 0.25,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.objective = objective or Classification(n_classes=n_classes)
        self.head = nn.Sequential(
            Linear(embed_dim, HIDDEN), ReluDropout(dropout),
            nn.Identity(),  # keeps the last layer at the place it has with a dropout of its own
            nn.Linear(HIDDEN, n_classes))

    def forward(self, bag: Bag) -> SlideOutput:
        """Logits (1, C), embedding (1, 512), instances (N, C) as the objective's scores."""
        h = self.head[:2](features_of(bag, self.embed_dim))
        embedding = h.mean(dim=0, keepdim=True)
        with torch.no_grad():
            instances = self.objective.scores(self.head[3](h))
        return SlideOutput(
            logits=self.head[3](embedding), embedding=embedding, instances=instances)

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """The slide loss, once."""
        yield slide_step(self(bag), bag, self.objective)


class MaxPooling(MeanPooling):
    """Each logit is the highest of all patches, so only these C patches carry gradient."""

    def forward(self, bag: Bag) -> SlideOutput:
        """Logits (1, C), embedding (C, 512) of the highest patch of each output, instances."""
        features = features_of(bag, self.embed_dim)
        trunk, last = self.head[:2], self.head[3]
        with torch.no_grad():
            h = trunk(features)
            patch_logits = last(h)
            rows = patch_logits.argmax(dim=0)
        embedding = redo_rows(trunk, features, h, rows)
        return SlideOutput(logits=last(embedding).diagonal()[None], embedding=embedding,
                           instances=self.objective.scores(patch_logits))
