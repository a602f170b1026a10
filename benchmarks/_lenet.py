"""A LeNet on 28 x 28 px digits, and a slide model that learns together with it; needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from torch import nn

from utils.contracts import Bag, SlideModel, SlideOutput, StepLoss

DIGIT_PX = 28  # width and height
EMBEDDING = 500  # numbers that LeNet makes of a digit


def lenet() -> nn.Sequential:
    """Pixels (N, 784) to embeddings (N, 500); Ilse, Tomczak, Welling 2018, appendix (MNIST)."""
    return nn.Sequential(
        nn.Unflatten(1, (1, DIGIT_PX, DIGIT_PX)),
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(50 * 4 * 4, EMBEDDING), nn.ReLU())


class EndToEnd(nn.Module):
    """A slide model that sees what a LeNet makes of a bag's pixels (``features``, (N, 784))."""

    def __init__(self, slide_model: nn.Module) -> None:
        super().__init__()
        self.encoder = lenet()
        self.slide_model = slide_model
        self.objective = cast(SlideModel, slide_model).objective

    def forward(self, bag: Bag) -> SlideOutput:
        """What the slide model says."""
        output: SlideOutput = self.slide_model(self._encoded(bag))
        return output

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """Those of the slide model."""
        yield from cast(SlideModel, self.slide_model).losses(self._encoded(bag))

    def _encoded(self, bag: Bag) -> Bag:
        return replace(bag, features=self.encoder(bag.features))
