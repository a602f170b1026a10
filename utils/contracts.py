"""What a data set yields and a slide model eats, and what it answers.

These two shapes are the only thing the engine, the models and the data sets share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Bag:
    """One slide (or patient) as a bag of instances.

    features: (N, D) float tensor, rows in the order of ``coords``
    coords:   (N, 2) integers, top-left x, y of each patch in level-0 pixels; None when unknown
    label:    class index; None when there is none (inference)
    """

    slide_id: str
    features: torch.Tensor
    coords: np.ndarray | None = None
    label: int | None = None
    case_id: str = ""

    def __len__(self) -> int:
        return int(self.features.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Bag:
        """The same bag with its tensors on ``device``."""
        return replace(self, features=self.features.to(device, non_blocking=non_blocking))


@dataclass(kw_only=True)
class SlideOutput:
    """What a slide model says of one bag.

    logits:    (1, C)
    attention: (K, N) raw scores before the softmax; K = 1, or C for one row a class; None
               for models without attention
    embedding: (K, H) slide representation; None when there is none
    instances: (N, C) probabilities of each instance; None for attention models
    """

    logits: torch.Tensor
    attention: torch.Tensor | None = None
    embedding: torch.Tensor | None = None
    instances: torch.Tensor | None = None

    @property
    def probabilities(self) -> torch.Tensor:
        """(1, C) softmax of the logits, in float32."""
        return self.logits.float().softmax(dim=1)

    @property
    def predicted(self) -> int:
        """Index of the most probable class; ties go to the lower index."""
        return int(self.probabilities.argmax(dim=1).item())

    def attention_of(self, class_index: int) -> torch.Tensor | None:
        """(N,) raw scores of one class; models with a single row give that row for every class."""
        if self.attention is None:
            return None
        return self.attention[class_index if self.attention.shape[0] > 1 else 0]


@dataclass(kw_only=True)
class StepLoss:
    """One scalar to back-propagate, and what the log wants to know about it.

    value:      scalar tensor with graph; what the optimiser sees
    slide_loss: detached scalar, the slide-level part alone (validation watches its mean)
    parts:      further detached scalars by name, e.g. ``instance_loss``
    output:     the slide's prediction; set on the last loss that a model yields for a bag
    targets, predictions: (M,) instance labels and guesses of the clustering branch, or None
    """

    value: torch.Tensor
    slide_loss: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    output: SlideOutput | None = None
    targets: torch.Tensor | None = None
    predictions: torch.Tensor | None = None


class SlideModel(Protocol):
    """A torch module with these two methods; ``state_dict`` keys are the published ones."""

    def __call__(self, bag: Bag) -> SlideOutput: ...

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """Yield scalar losses one at a time; the engine back-propagates each as it comes."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
