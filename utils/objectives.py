"""What a slide model learns: a loss on its logits, the scores they mean, and how good these are.

An objective is the only thing in which a classifier, a multi-label model, a regression and a
survival model differ; models, engine and evaluation ask it. Importing this module does not import
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from utils.errors import ItemFailed, Refused
from utils.losses import LOSSES
from utils.metrics import slide_metrics

if TYPE_CHECKING:
    import torch

    from utils.contracts import Bag

TaskType = Literal["classification", "multilabel", "regression", "survival"]

# loss names of each task type, the default first
TASK_LOSSES: dict[TaskType, tuple[str, ...]] = {
    "classification": ("ce", "svm"), "multilabel": ("bce",), "regression": ("mse", "huber"),
    "survival": ("nll_surv", "cox")}


class TaskMetrics(Protocol):
    """Figures of n slides."""

    @property
    def n(self) -> int: ...

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        ...

    def headline(self) -> dict[str, float]:
        """The few figures for a table, e.g. ``auc`` and ``acc``; NaN where undefined."""
        ...


class Objective(Protocol):
    """What a model learns.

    n_outputs:   how many logits the model gives
    needs_batch: the loss compares the slides of an optimiser step (Cox)
    """

    @property
    def task_type(self) -> TaskType: ...
    @property
    def needs_batch(self) -> bool: ...
    @property
    def n_outputs(self) -> int: ...

    def loss(self, logits: torch.Tensor, bag: Bag) -> torch.Tensor:
        """Scalar loss, float32, of one bag's logits (1, C); ``ItemFailed`` without a truth."""
        ...

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(n, K) float32 scores of logits (n, C), see the class for their meaning."""
        ...

    def metrics(self, scores: np.ndarray, truths: np.ndarray) -> TaskMetrics:
        """Figures of scores (n, K) against truths (n, T) as ``Bag.truth`` gives them."""
        ...

    def with_smoothing(self, smoothing: float) -> Objective:
        """The same with another label smoothing, where labels can be smoothed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One class of several. Scores (n, C) are the class probabilities, truths (n, 1) the classes.

    loss_name: "ce" or "svm"; label_smoothing: share of the target spread over all classes (ce)
    class_weights: (C,) weight of a slide of each class in the loss; empty = all 1
    """

    n_classes: int
    loss_name: str = "ce"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()

    task_type: ClassVar[TaskType] = "classification"
    needs_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        LOSSES.get(self.loss_name)
        if self.label_smoothing and self.loss_name != "ce":
            raise Refused(f"label smoothing goes with bag_loss ce, not {self.loss_name}")
        if self.class_weights and len(self.class_weights) != self.n_classes:
            raise Refused(f"{len(self.class_weights)} class weights for {self.n_classes} classes")

    @property
    def n_outputs(self) -> int:
        """One logit a class."""
        return self.n_classes

    def loss(self, logits: torch.Tensor, bag: Bag) -> torch.Tensor:
        """Cross entropy or smooth top-1 SVM of one bag, times the weight of its class."""
        import torch

        label = self.label_of(bag)
        target = torch.tensor([label], device=logits.device)
        loss: Callable[..., torch.Tensor] = LOSSES.get(self.loss_name)
        more = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        value = loss(logits, target, **more)
        return value * self.class_weights[label] if self.class_weights else value

    def label_of(self, bag: Bag) -> int:
        """The bag's class; ``ItemFailed`` when it has none or one that does not exist."""
        if bag.label is None or not 0 <= bag.label < self.n_classes:
            raise ItemFailed(f"{bag.slide_id}: label is {bag.label}, "
                             f"the model expects 0 to {self.n_classes - 1}")
        return bag.label

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(n, C) probabilities."""
        return logits.float().softmax(dim=1)

    def metrics(self, scores: np.ndarray, truths: np.ndarray) -> TaskMetrics:
        """See ``utils.metrics.slide_metrics``."""
        return slide_metrics(scores.reshape(len(truths), self.n_classes),
                             np.asarray(truths).reshape(-1).astype(np.int64))

    def with_smoothing(self, smoothing: float) -> Classification:
        """The same with this label smoothing."""
        return replace(self, label_smoothing=smoothing)


def build_objective(
    *, task_type: TaskType, n_outputs: int, loss: str | None = None, label_smoothing: float = 0.0,
    class_weights: Sequence[float] = (), bin_edges: Sequence[float] = (),
    target_mean: Sequence[float] = (), target_std: Sequence[float] = (), nll_alpha: float = 0.0,
) -> Objective:
    """The objective of a task; ``loss`` None is the task's usual one (``TASK_LOSSES``).

    n_outputs: classes, labels, values, or bins of time (Cox: 1)
    bin_edges, nll_alpha: survival; target_mean, target_std: regression, of the training slides
    Raises ``Refused`` for a loss of another task.
    """
    loss = loss or TASK_LOSSES[task_type][0]
    if loss not in TASK_LOSSES[task_type]:
        raise Refused(f"bag_loss {loss} is none for {task_type}: expected "
                      f"{' or '.join(TASK_LOSSES[task_type])}")
    return Classification(n_classes=n_outputs, loss_name=loss, label_smoothing=label_smoothing,
                          class_weights=tuple(class_weights))
