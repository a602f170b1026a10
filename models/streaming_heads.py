"""What follows a streamed network: the maximum or the mean of each channel, and a linear layer.

``max`` is the published head: the average pool of a ResNet replaced by a maximum over the whole
slide, Xavier-normal weights, zero bias (spec streaming.md 7; Pinckaers, van Ginneken, Litjens,
"Streaming convolutional neural networks for end-to-end learning with multi-megapixel images",
IEEE TPAMI 2022). State-dict keys: ``linear`` (C, D). Gated attention is ``models.abmil``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import nn

from models.layers import Dropout, features_of, slide_step
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.objectives import Classification, Objective


class PooledHead(nn.Module):
    """A slide model over the positions of a map: each channel pooled, then one linear layer.

    dropout: of the pooled channels (the published head has none: 0)
    """

    contextual: ClassVar[bool] = False

    def __init__(self, *, pool: Literal["max", "mean"], n_classes: int, embed_dim: int,
                 dropout: float = 0.0, objective: Objective | None = None) -> None:
        super().__init__()
        self.pool = pool
        self.embed_dim = embed_dim
        self.objective = objective or Classification(n_classes=n_classes)
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(embed_dim, n_classes)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, bag: Bag) -> SlideOutput:
        """Logits (1, C), embedding (1, D) of features (N, D), a row a position.

        Of equal maxima one position alone gets the gradient, as in a pooling layer.
        """
        features = features_of(bag, self.embed_dim)
        pooled = (features.max(dim=0, keepdim=True).values if self.pool == "max"
                  else features.mean(dim=0, keepdim=True))
        return SlideOutput(logits=self.linear(self.dropout(pooled)), embedding=pooled)

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """The slide loss, once."""
        yield slide_step(self(bag), bag, self.objective)
