"""CLAM's baselines: each patch is classified alone, the most convincing one speaks for the slide.

State-dict keys: ``fc.0`` (512, D), then ``classifier`` (2, 512) in ``MIL_fc`` and
``classifiers`` (C, 512) in ``MIL_fc_mc``.
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


class MIL_fc_mc(nn.Module):
    """For more than two classes: the largest of all N x C probabilities picks the patch."""

    head_name = "classifiers"  # the published key
    contextual: ClassVar[bool] = False

    def __init__(
        self, *, n_classes: int, embed_dim: int = 1024, dropout: float = 0.25,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.objective = objective or Classification(n_classes=n_classes)
        self.fc = nn.Sequential(Linear(embed_dim, HIDDEN), ReluDropout(dropout))
        self.add_module(self.head_name, nn.Linear(HIDDEN, n_classes))

    def choose(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Index (scalar) of the patch that speaks, from patch probabilities (N, C)."""
        return probabilities.amax(dim=1).argmax()

    def forward(self, bag: Bag) -> SlideOutput:
        """Logits (1, C) and embedding (1, 512) of the chosen patch; instances (N, C).

        Only that patch carries gradient, so all others are computed without a graph and its own
        row is then redone with one, under the dropout mask it had.
        """
        features = features_of(bag, self.embed_dim)
        head = getattr(self, self.head_name)
        with torch.no_grad():
            h = self.fc(features)
            probabilities = head(h).float().softmax(dim=1)
            row = self.choose(probabilities)
        embedding = redo_rows(self.fc, features, h, row[None])
        return SlideOutput(logits=head(embedding), embedding=embedding, instances=probabilities)

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """The slide loss, once."""
        yield slide_step(self(bag), bag, self.objective)


class MIL_fc(MIL_fc_mc):
    """For two classes: the patch with the highest probability of class 1 speaks."""

    head_name = "classifier"

    def __init__(
        self, *, embed_dim: int = 1024, dropout: float = 0.25, objective: Objective | None = None
    ) -> None:
        super().__init__(n_classes=2, embed_dim=embed_dim, dropout=dropout, objective=objective)

    def choose(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Index (scalar) of the patch that speaks, from patch probabilities (N, 2)."""
        return probabilities[:, 1].argmax()
