"""What a slide model learns: a loss on its logits, the scores they mean, and how good these are.

An objective is the only thing in which a classifier, a multi-label model, a regression and a
survival model differ; models, engine and evaluation ask it. Importing this module does not import
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np

from utils.errors import ItemFailed, Refused
from utils.losses import LOSSES
from utils.metrics import slide_metrics
from utils.survival import cox_loss, nll_survival, survival_curve, time_bins
from utils.task_metrics import multilabel_metrics, regression_metrics, survival_metrics

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


def _target_of(bag: Bag, n: int, *, what: str, unknown: bool = False) -> tuple[float, ...]:
    """The bag's n target numbers; ``ItemFailed`` when they are missing, or NaN but not to be."""
    target = bag.target
    if target is None or len(target) != n or (not unknown and not np.isfinite(target).all()):
        raise ItemFailed(f"{bag.slide_id}: target is {target}, the model expects {what}")
    return target


@dataclass(frozen=True, kw_only=True)
class MultiLabel:
    """T labels, each there or not. Scores (n, T) are their probabilities, truths (n, T) 0, 1, NaN.

    The loss is the binary cross entropy, the mean over the labels that are known (not NaN).
    label_smoothing: share of the targets moved half way to 1/2
    class_weights: (T,) weight of the positives of each label in the loss; empty = all 1
    """

    n_labels: int
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()

    task_type: ClassVar[TaskType] = "multilabel"
    needs_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.class_weights and len(self.class_weights) != self.n_labels:
            raise Refused(f"{len(self.class_weights)} class weights for {self.n_labels} labels")

    @property
    def n_outputs(self) -> int:
        """One logit a label."""
        return self.n_labels

    def loss(self, logits: torch.Tensor, bag: Bag) -> torch.Tensor:
        """Binary cross entropy of one bag's known labels."""
        import torch
        from torch.nn import functional

        target = _target_of(bag, self.n_labels, what=f"{self.n_labels} labels", unknown=True)
        truth = torch.tensor(target, device=logits.device)
        known = ~truth.isnan()
        if not known.any():
            raise ItemFailed(f"{bag.slide_id}: no label is known, so there is nothing to learn")
        smooth = truth * (1.0 - self.label_smoothing) + self.label_smoothing / 2
        weights = (torch.tensor(self.class_weights, device=logits.device)[known]
                   if self.class_weights else None)
        return functional.binary_cross_entropy_with_logits(
            logits.float()[0, known], smooth[known], pos_weight=weights)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(n, T) probabilities."""
        return logits.float().sigmoid()

    def metrics(self, scores: np.ndarray, truths: np.ndarray) -> TaskMetrics:
        """See ``utils.task_metrics.multilabel_metrics``."""
        return multilabel_metrics(scores.reshape(-1, self.n_labels),
                                  truths.reshape(-1, self.n_labels))

    def with_smoothing(self, smoothing: float) -> MultiLabel:
        """The same with this label smoothing."""
        return replace(self, label_smoothing=smoothing)


class _NoLabels:
    """What objectives without labels share."""

    def with_smoothing(self, smoothing: float) -> Self:
        """Itself: there is nothing to smooth."""
        return self


@dataclass(frozen=True, kw_only=True)
class Regression(_NoLabels):
    """T values. Scores (n, T) are in the values' own units, as are truths (n, T).

    The loss compares the logits with the values less ``target_mean`` over ``target_std`` (of the
    training slides; empty = 0 and 1), the mean over the values.
    loss_name: "mse" or "huber" (linear from one standard deviation on)
    """

    n_values: int
    loss_name: str = "mse"
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()

    task_type: ClassVar[TaskType] = "regression"
    needs_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if {len(self.target_mean), len(self.target_std)} not in ({0}, {self.n_values}):
            raise Refused(f"{len(self.target_mean)} means and {len(self.target_std)} deviations "
                          f"for {self.n_values} values")
        if not all(deviation > 0 for deviation in self.target_std):
            raise Refused(f"target_std is {self.target_std}, expected numbers above 0")

    @property
    def n_outputs(self) -> int:
        """One logit a value."""
        return self.n_values

    def loss(self, logits: torch.Tensor, bag: Bag) -> torch.Tensor:
        """Mean squared error or Huber loss of one bag's standardised values."""
        import torch
        from torch.nn import functional

        target = _target_of(bag, self.n_values, what=f"{self.n_values} numbers")
        mean, deviation = self._scale()
        truth = torch.tensor((np.array([target]) - mean) / deviation, device=logits.device)
        loss = functional.huber_loss if self.loss_name == "huber" else functional.mse_loss
        return loss(logits.float(), truth.float())

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """(T,) mean and standard deviation."""
        n = self.n_values
        return np.array(self.target_mean or (0.0,) * n), np.array(self.target_std or (1.0,) * n)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(n, T) values in their own units."""
        import torch

        mean, deviation = (logits.new_tensor(part, dtype=torch.float32) for part in self._scale())
        return logits.float() * deviation + mean

    def metrics(self, scores: np.ndarray, truths: np.ndarray) -> TaskMetrics:
        """See ``utils.task_metrics.regression_metrics``."""
        return regression_metrics(scores.reshape(-1, self.n_values),
                                  truths.reshape(-1, self.n_values))


class _Survival(_NoLabels):
    """What both objectives of survival share: truths (n, 2) are time and event."""

    task_type: ClassVar[TaskType] = "survival"

    def metrics(self, scores: np.ndarray, truths: np.ndarray) -> TaskMetrics:
        """Of column 0 of the scores, the risk; see ``utils.task_metrics.survival_metrics``."""
        return survival_metrics(scores[:, 0] if len(truths) else np.zeros(0), truths)


def _time_and_event(bag: Bag) -> tuple[float, float]:
    time, event = _target_of(bag, 2, what="a time and an event")
    if event not in (0.0, 1.0):
        raise ItemFailed(f"{bag.slide_id}: event is {event}, expected 1 (seen) or 0 (censored)")
    return time, event


@dataclass(frozen=True, kw_only=True)
class DiscreteSurvival(_Survival):
    """The bin of time in which the event comes; see ``utils.survival.nll_survival``.

    Scores (n, 1 + T): the risk, minus the sum of S_t, then S_t of each bin.
    bin_edges: (T + 1) edges, of the training events; without them there are scores but no loss
    alpha: a censored slide counts 1 - alpha
    """

    n_bins: int
    bin_edges: tuple[float, ...] = ()
    alpha: float = 0.0

    needs_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bin_edges and len(self.bin_edges) != self.n_bins + 1:
            raise Refused(f"{len(self.bin_edges)} edges for {self.n_bins} bins of time: expected "
                          f"{self.n_bins + 1}")
        if not 0.0 <= self.alpha < 1.0:
            raise Refused(f"nll_alpha is {self.alpha}, expected from 0 to below 1")

    @property
    def n_outputs(self) -> int:
        """One logit a bin of time."""
        return self.n_bins

    def loss(self, logits: torch.Tensor, bag: Bag) -> torch.Tensor:
        """Negative log-likelihood of one bag's time."""
        import torch

        if not self.bin_edges:
            raise Refused("a survival loss needs bin_edges, the bins of time of the training set")
        time, event = _time_and_event(bag)
        own = torch.tensor(time_bins(np.array([time]), self.bin_edges), device=logits.device)
        return nll_survival(logits, own, torch.tensor([event], device=logits.device),
                            alpha=self.alpha)[0]

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(n, 1 + T) risk, and survival until the end of each bin."""
        import torch

        curve = survival_curve(logits)
        return torch.cat([-curve.sum(dim=1, keepdim=True), curve], dim=1)


@dataclass(frozen=True, kw_only=True)
class CoxSurvival(_Survival):
    """One log-risk a slide, learnt from the order of events. Scores (n, 1) are the logits."""

    needs_batch: ClassVar[bool] = True
    n_outputs: ClassVar[int] = 1

    def loss(self, logits: torch.Tensor, bag: Bag) -> torch.Tensor:
        """0: a slide alone has no rivals; what is learnt comes from ``joint_gradient``."""
        _time_and_event(bag)
        return logits.float().sum() * 0.0

    def joint_gradient(
        self, logits: torch.Tensor, truths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (scalar) and its gradient (B, 1) by the logits (B, 1) of slides seen together.

        truths: (B, 2) time and event. Both results are float32 without a graph; see
        ``utils.survival.cox_loss``.
        """
        import torch

        with torch.inference_mode(False), torch.enable_grad():
            truths, risks = truths.clone(), logits.detach().clone().float().requires_grad_()
            loss = cox_loss(risks[:, 0], truths[:, 0], truths[:, 1])
            gradient, = torch.autograd.grad(loss, risks)
        return loss.detach(), gradient

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(n, 1) log-risks."""
        return logits.float()


def build_objective(
    *, task_type: TaskType, n_outputs: int, loss: str | None = None, label_smoothing: float = 0.0,
    class_weights: Sequence[float] = (), bin_edges: Sequence[float] = (),
    target_mean: Sequence[float] = (), target_std: Sequence[float] = (), nll_alpha: float = 0.0,
) -> Objective:
    """The objective of a task; ``loss`` None is the task's usual one (``TASK_LOSSES``).

    n_outputs: classes, labels, values, or bins of time (Cox: 1)
    bin_edges, nll_alpha: survival; target_mean, target_std: regression, of the training slides
    Raises ``Refused`` for a loss of another task, and for what the task's loss would not use.
    """
    loss = loss or TASK_LOSSES[task_type][0]
    if loss not in TASK_LOSSES[task_type]:
        raise Refused(f"bag_loss {loss} is none for {task_type}: expected "
                      f"{' or '.join(TASK_LOSSES[task_type])}")
    if task_type in ("regression", "survival") and (label_smoothing or class_weights):
        raise Refused(f"label smoothing and class weights need labels, {task_type} has none")
    if nll_alpha and loss != "nll_surv":
        raise Refused(f"nll_alpha goes with bag_loss nll_surv, not {loss}")
    if loss == "cox" and n_outputs != 1:
        raise Refused(f"bag_loss cox takes one number a slide, not {n_outputs}")
    if task_type == "multilabel":
        return MultiLabel(n_labels=n_outputs, label_smoothing=label_smoothing,
                          class_weights=tuple(class_weights))
    if task_type == "regression":
        return Regression(n_values=n_outputs, loss_name=loss, target_mean=tuple(target_mean),
                          target_std=tuple(target_std))
    if task_type == "survival":
        return CoxSurvival() if loss == "cox" else DiscreteSurvival(
            n_bins=n_outputs, bin_edges=tuple(bin_edges), alpha=nll_alpha)
    return Classification(n_classes=n_outputs, loss_name=loss, label_smoothing=label_smoothing,
                          class_weights=tuple(class_weights))
