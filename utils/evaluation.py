"""What an evaluation is made of: predictions of folds, pooled over folds, and their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.metrics import SlideMetrics, slide_metrics
from utils.statistics import METRICS, Estimate, delong_interval, estimate_metrics

if TYPE_CHECKING:
    import torch

    from utils.contracts import Bag
    from utils.devices import Precision


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How figures are computed: resamples of patients for the intervals, their seed, which AUC."""

    resamples: int = 1000
    seed: int = 1
    micro_average: bool = False


@dataclass(frozen=True, kw_only=True)
class FoldPredictions:
    """Predictions for the slides of one fold, or pooled over folds.

    name: ``fold 0`` or ``pooled``; labels (n,) int64; probabilities (n, C) float32
    folds: (n,) how many folds predicted each slide (1 in a fold)
    """

    name: str
    slide_ids: tuple[str, ...]
    case_ids: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    folds: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """(n,) most probable class; ties go to the lower index."""
        best: np.ndarray = self.probabilities.argmax(axis=1)
        return best


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Predictions with what was computed of them."""

    predictions: FoldPredictions
    plain: SlideMetrics
    estimates: Mapping[str, Estimate]
    delong: tuple[float, float] | None

    def record(self) -> dict[str, Any]:
        """Plain values for ``metrics.json``."""
        return {
            "name": self.predictions.name,
            "slides": self.plain.n, "patients": len(set(self.predictions.case_ids)),
            "class_counts": self.plain.class_counts,
            "metrics": {name: asdict(self.estimates[name]) for name in METRICS},
            "auc_delong_over_slides": self.delong,
            "class_auc": self.plain.class_auc, "class_accuracy": self.plain.class_accuracy,
            "confusion": self.plain.confusion,
        }


def predict_fold(name: str, model: torch.nn.Module, bags: Sequence[Bag], *,
                 case_of: Mapping[str, str], n_classes: int, device: torch.device,
                 precision: Precision) -> tuple[FoldPredictions, dict[str, str]]:
    """Predictions for the bags, and slide -> reason for those without one.

    case_of: slide -> patient. A probability that is not finite is a failure, never a figure.
    """
    from utils.engine import predict

    found = predict(model, bags, device=device, precision=precision)
    p = found.probabilities.reshape(-1, n_classes)
    good = np.isfinite(p).all(axis=1)
    failed = {row.item: row.reason for row in found.failures}
    failed.update({slide: f"{slide}: the prediction of {name} is not finite"
                   for slide, fine in zip(found.slide_ids, good, strict=True) if not fine})
    slides = tuple(slide for slide, fine in zip(found.slide_ids, good, strict=True) if fine)
    return FoldPredictions(name=name, slide_ids=slides,
                           case_ids=tuple(case_of[slide] for slide in slides),
                           labels=found.labels[good], probabilities=p[good],
                           folds=np.ones(len(slides), np.int64)), failed


def evaluate_predictions(predictions: FoldPredictions, how: Measuring) -> Evaluation:
    """All figures of one set of predictions, intervals by resampling its patients."""
    p, labels = predictions.probabilities, predictions.labels
    return Evaluation(
        predictions=predictions,
        plain=slide_metrics(p, labels, micro_average=how.micro_average),
        estimates=estimate_metrics(p, labels, predictions.case_ids, resamples=how.resamples,
                                   seed=how.seed, micro_average=how.micro_average),
        delong=delong_interval(p[:, 1], labels == 1) if p.shape[1] == 2 else None)


def pool_folds(folds: Sequence[FoldPredictions]) -> FoldPredictions:
    """One row a slide, in order of first appearance; a slide's probabilities are averaged over
    the folds that predicted it (CLAM's splits test a slide several times, or never)."""
    slides = list(dict.fromkeys(slide for fold in folds for slide in fold.slide_ids))
    row_of = {slide: row for row, slide in enumerate(slides)}
    classes = folds[0].probabilities.shape[1]
    total = np.zeros((len(slides), classes))
    times = np.zeros(len(slides), dtype=np.int64)
    labels = np.zeros(len(slides), dtype=np.int64)
    cases = [""] * len(slides)
    for fold in folds:
        rows = np.array([row_of[slide] for slide in fold.slide_ids], dtype=np.int64)
        total[rows] += fold.probabilities
        times[rows] += 1
        labels[rows] = fold.labels
        for row, case in zip(rows, fold.case_ids, strict=True):
            cases[row] = case
    return FoldPredictions(name="pooled", slide_ids=tuple(slides), case_ids=tuple(cases),
                           labels=labels, folds=times,
                           probabilities=total / np.maximum(times, 1)[:, None])


def pool_tests(folds: Mapping[int, Evaluation], part: str,
               how: Measuring) -> tuple[Evaluation | None, str]:
    """Figures over the test slides of all folds, and a sentence that says how they were pooled.

    part: the split that was evaluated; of others nothing is pooled (a fold's training slides are
    another fold's test slides).
    """
    if part != "test":
        return None, f"Nothing is pooled over folds: only test slides are, this is '{part}'."
    if len(folds) < 2:
        return None, "One fold, so there is nothing to pool."
    pooled = pool_folds([item.predictions for item in folds.values()])
    again = int((pooled.folds > 1).sum())
    note = (f"Pooled: the {len(pooled.slide_ids)} test slides of {len(folds)} folds. " + (
        f"{again} of them were tested in several folds; their probabilities are averaged."
        if again else "Each was tested in one fold."))
    return evaluate_predictions(pooled, how), note


def wrong_slides(predictions: FoldPredictions, *, most: int = 20) -> list[int]:
    """Rows of the wrong predictions, the surest first, at most ``most``."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    sureness = predictions.probabilities.max(axis=1)[wrong]
    return [int(row) for row in wrong[np.argsort(-sureness, kind="stable")][:most]]
