"""How good slide-level probabilities are: CLAM's numbers by CLAM's conventions, and a few more.

NumPy only, and safe on folds that lack a class: what is not defined is NaN (or None for the
accuracy of a class without slides) and says why, it never raises.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CALIBRATION_BINS = 15


@dataclass(frozen=True, kw_only=True)
class SlideMetrics:
    """Metrics of n slides and C classes; see ``slide_metrics``.

    auc:               C = 2: ROC AUC of class 1; C > 2: mean one-vs-rest AUC of the classes that
                       have slides, or the micro average; NaN when undefined, ``auc_reason`` why
    class_auc:         one-vs-rest AUC of each class, NaN where undefined
    accuracy, error:   share of slides predicted right / wrong (equal probabilities: lower index)
    class_accuracy:    recall of each class, None without slides; ``class_correct`` of
                       ``class_counts`` slides
    confusion:         C rows (true) of C counts (predicted)
    balanced_accuracy: mean recall of the classes that have slides
    macro_f1:          mean F1 of the classes that occur among labels or predictions
    average_precision: C = 2: of class 1; C > 2: mean one-vs-rest of the classes with slides;
                       NaN when the AUC is
    brier:             C = 2: mean squared error of p_1; C > 2: summed over the classes
    ece:               expected calibration error of the top probability, 15 equal bins
    """

    n: int
    n_classes: int
    auc: float
    auc_reason: str
    class_auc: list[float]
    accuracy: float
    error: float
    class_accuracy: list[float | None]
    class_correct: list[int]
    class_counts: list[int]
    confusion: list[list[int]]
    balanced_accuracy: float
    macro_f1: float
    average_precision: float
    brier: float
    ece: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return asdict(self)

    def headline(self) -> dict[str, float]:
        """AUC and accuracy."""
        return {"auc": self.auc, "acc": self.accuracy}


def slide_metrics(
    probabilities: np.ndarray, labels: np.ndarray, *, micro_average: bool = False
) -> SlideMetrics:
    """Metrics of probabilities (n, C) against class indices (n,).

    micro_average: for C > 2, one AUC over all n * C (one-hot label, probability) pairs.
    Raises ValueError when the shapes do not belong together or a label is no class.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    labels = np.asarray(labels, dtype=np.int64)
    _check(probabilities, labels)
    n, n_classes = probabilities.shape
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (labels, probabilities.argmax(axis=1)), 1)
    counts, correct = confusion.sum(axis=1), confusion.diagonal()
    one_hot = np.eye(n_classes, dtype=np.int64)[labels]
    reason = _why_undefined(probabilities, counts)
    class_auc = _each_class(binary_auc, probabilities, one_hot)
    auc = _summary_auc(probabilities, one_hot, class_auc, micro_average)
    precision = _summary(_each_class(average_precision, probabilities, one_hot))
    accuracy = float(correct.sum() / n) if n else float("nan")
    return SlideMetrics(
        n=n, n_classes=n_classes, class_auc=class_auc, accuracy=accuracy, error=1.0 - accuracy,
        auc=float("nan") if reason else auc, auc_reason=reason,
        class_accuracy=[float(hit / all_) if all_ else None
                        for hit, all_ in zip(correct, counts, strict=True)],
        class_correct=correct.tolist(), class_counts=counts.tolist(), confusion=confusion.tolist(),
        balanced_accuracy=_mean((correct / np.maximum(counts, 1))[counts > 0]),
        macro_f1=_macro_f1(confusion),
        average_precision=float("nan") if reason else precision,
        brier=_brier(probabilities, one_hot), ece=calibration_error(probabilities, labels))


def _check(probabilities: np.ndarray, labels: np.ndarray) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(f"expected probabilities (n, C >= 2), found {probabilities.shape}")
    if labels.shape != probabilities.shape[:1]:
        raise ValueError(f"expected {len(probabilities)} labels, found shape {labels.shape}")
    if labels.size and not 0 <= labels.min() <= labels.max() < probabilities.shape[1]:
        raise ValueError(f"expected labels 0 to {probabilities.shape[1] - 1}, "
                         f"found {labels.min()} to {labels.max()}")


def _why_undefined(probabilities: np.ndarray, counts: np.ndarray) -> str:
    present = np.flatnonzero(counts)
    if present.size == 0:
        return "there are no slides"
    if present.size == 1:
        return f"only class {present[0]} has slides"
    if np.isnan(probabilities).any():
        return "a probability is NaN"
    return ""


def _summary_auc(
    probabilities: np.ndarray, one_hot: np.ndarray, class_auc: list[float], micro_average: bool
) -> float:
    if micro_average and len(class_auc) > 2:
        return float(binary_auc(probabilities.ravel(), one_hot.ravel()))
    return _summary(class_auc)


def _each_class(metric: Any, probabilities: np.ndarray, one_hot: np.ndarray) -> list[float]:
    return [float(metric(scores, hits))
            for scores, hits in zip(probabilities.T, one_hot.T, strict=True)]


def _summary(by_class: list[float]) -> float:
    return by_class[1] if len(by_class) == 2 else _mean(np.array(by_class))


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


# ---------------------------------------------------------------------------- one class against all

def binary_auc(
    scores: np.ndarray, labels: np.ndarray, *, weights: np.ndarray | None = None
) -> Any:
    """Area under the ROC curve of scores (n,) for labels (n,) of 0 and 1; ties count half.

    weights: (n,) or (R, n), how often each item counts. R rows of bootstrap counts give R areas
    for one sort. Returns a float, or (R,) floats; NaN where a class has no weight or a score is
    NaN.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    if len(scores) == 0 or np.isnan(scores).any():
        return _scalar(np.full(weights.shape[:-1], np.nan))
    positive, negative = tie_groups(scores, labels, weights)
    below = negative.cumsum(axis=-1) - negative
    wins = (positive * (below + negative / 2)).sum(axis=-1)
    pairs = positive.sum(axis=-1) * negative.sum(axis=-1)
    return _scalar(np.divide(wins, pairs, out=np.full_like(pairs, np.nan), where=pairs > 0))


def average_precision(
    scores: np.ndarray, labels: np.ndarray, *, weights: np.ndarray | None = None
) -> Any:
    """Mean precision over the recall steps, sum of (R_t - R_t-1) P_t; arguments as ``binary_auc``.

    NaN without positives (or when a score is NaN).
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    if len(scores) == 0 or np.isnan(scores).any():
        return _scalar(np.full(weights.shape[:-1], np.nan))
    positive, negative = (part[..., ::-1] for part in tie_groups(scores, labels, weights))
    hits, taken = positive.cumsum(axis=-1), (positive + negative).cumsum(axis=-1)
    precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
    total = positive.sum(axis=-1)
    area = (positive * precision).sum(axis=-1)
    return _scalar(np.divide(area, total, out=np.full_like(total, np.nan), where=total > 0))


def tie_groups(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at each distinct score, ascending: (..., groups)."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    weights, labels = weights[..., order], labels[order]
    return (np.add.reduceat(weights * labels, starts, axis=-1),
            np.add.reduceat(weights * (1 - labels), starts, axis=-1))


def _scalar(values: np.ndarray) -> Any:
    return float(values) if np.ndim(values) == 0 else values


# ---------------------------------------------------------------------------- the rest

def _macro_f1(confusion: np.ndarray) -> float:
    found = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2 TP + FP + FN
    occurs = found > 0
    return _mean(2 * confusion.diagonal()[occurs] / found[occurs])


def _brier(probabilities: np.ndarray, one_hot: np.ndarray) -> float:
    if not len(probabilities):
        return float("nan")
    squares = (probabilities - one_hot) ** 2
    return float(squares[:, 1].mean() if squares.shape[1] == 2 else squares.sum(axis=1).mean())


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error of the top probability of (n, C), in 15 bins of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
    """
    if not len(probabilities) or np.isnan(probabilities).any():
        return float("nan")
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    sums = np.bincount(calibration_bin(confidence), weights=gap, minlength=CALIBRATION_BINS)
    return float(np.abs(sums).sum() / len(labels))


def calibration_bin(confidence: np.ndarray) -> np.ndarray:
    """(n,) index b of the bin (b / 15, (b + 1) / 15] that each probability lies in."""
    bins: np.ndarray = np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1
    return bins.clip(0, CALIBRATION_BINS - 1)
