"""How sure one may be of a metric: bootstrap intervals over patients, DeLong's for an AUC.

Patients are drawn, not slides: slides of one patient resemble each other, and an interval that
ignores it is too narrow. A draw is a row of slide weights (how often each slide counts), and
every metric of ``utils.metrics`` is computed for many rows of weights at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from utils.metrics import (
    CALIBRATION_BINS,
    average_precision,
    binary_auc,
    calibration_bin,
    slide_metrics,
)

LEVEL = 0.95  # of every interval
METRICS = ("auc", "accuracy", "balanced_accuracy", "macro_f1", "average_precision", "brier", "ece")

# Weights (R, n) >= 0 of the slides -> each metric for every weighting, (R,), NaN where undefined
Weigher = Callable[[np.ndarray], dict[str, np.ndarray]]

_CHUNK_CELLS = 1 << 20  # weights held at once: 8 MiB, so that the passes stay in the cache's reach


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its bootstrap percentile interval.

    value: NaN when undefined. low, high: NaN when there is no interval.
    valid: resamples in which the figure is defined, out of ``resamples``.
    reason: why value or interval is missing; empty otherwise.
    """

    value: float
    low: float = float("nan")
    high: float = float("nan")
    valid: int = 0
    resamples: int = 0
    reason: str = ""


# ---------------------------------------------------------------------------- many weightings

def weighted_metrics(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, *,
                     micro_average: bool = False) -> dict[str, np.ndarray]:
    """Each of ``METRICS`` for every weighting of the slides; weights of one give the plain value.

    probabilities (n, C), labels (n,) class indices, weights (R, n) >= 0; n >= 1. Arrays (R,),
    NaN where a metric is undefined.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    classes = p.shape[1]
    total = weights.sum(axis=1)
    cell = labels * classes + p.argmax(axis=1)
    confusion = (weights @ np.eye(classes * classes)[cell]).reshape(-1, classes, classes)
    hits, support = np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2)
    auc, precision = _rank_metrics(p, labels, weights, micro_average=micro_average)
    return {
        "auc": auc,
        "accuracy": ratio(hits.sum(axis=1), total),
        "balanced_accuracy": mean_defined(ratio(hits, support)),
        "macro_f1": mean_defined(ratio(2 * hits, support + confusion.sum(axis=1))),
        "average_precision": precision,
        "brier": ratio(weights @ _brier_terms(p, labels), total),
        "ece": _calibration_error(p, labels, weights),
    }


def _rank_metrics(p: np.ndarray, labels: np.ndarray, weights: np.ndarray, *,
                  micro_average: bool) -> tuple[np.ndarray, np.ndarray]:
    """(R,) AUC and (R,) average precision; NaN where fewer than two classes have weight."""
    classes = p.shape[1]
    one_hot = np.eye(classes)[labels]
    wanted = [1] if classes == 2 else range(classes)
    areas = [binary_auc(p[:, c], one_hot[:, c], weights=weights) for c in wanted]
    precisions = [average_precision(p[:, c], one_hot[:, c], weights=weights) for c in wanted]
    auc = mean_defined(np.stack(areas, axis=1))
    precision = np.where(np.isnan(auc), np.nan, mean_defined(np.stack(precisions, axis=1)))
    if micro_average and classes > 2:
        micro = binary_auc(p.ravel(), one_hot.ravel(), weights=np.repeat(weights, classes, axis=1))
        auc = np.where(np.isnan(auc), np.nan, micro)
    return auc, precision


def _brier_terms(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    squares: np.ndarray = (p - np.eye(p.shape[1])[labels]) ** 2
    return squares[:, 1] if p.shape[1] == 2 else squares.sum(axis=1)


def _calibration_error(p: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    confidence = p.max(axis=1)
    gap = (p.argmax(axis=1) == labels) - confidence
    in_bin = np.eye(CALIBRATION_BINS)[calibration_bin(confidence)]
    return ratio(np.abs(weights @ (in_bin * gap[:, None])).sum(axis=1), weights.sum(axis=1))


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where bottom is not above 0."""
    ratio = np.full(np.broadcast_shapes(top.shape, bottom.shape), np.nan)
    np.divide(top, bottom, out=ratio, where=bottom > 0)
    return ratio


def mean_defined(table: np.ndarray) -> np.ndarray:
    """(R,) means of the rows of (R, C) without their NaNs; NaN where all are."""
    defined = np.isfinite(table)
    return ratio(np.where(defined, table, 0.0).sum(axis=1), defined.sum(axis=1))


# ---------------------------------------------------------------------------- intervals

def estimate_metrics(
    probabilities: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 1,
    micro_average: bool = False,
) -> dict[str, Estimate]:
    """Every one of ``METRICS`` with its interval; see ``estimate_weighted``.

    probabilities (n, C), labels (n,), patients: n ids.
    """
    labels = np.asarray(labels, dtype=np.int64)
    return estimate_weighted(
        lambda weights: weighted_metrics(probabilities, labels, weights,
                                         micro_average=micro_average),
        patients, names=METRICS, resamples=resamples, seed=seed,
        undefined=slide_metrics(probabilities, labels).auc_reason if len(labels) else "")


def estimate_weighted(weigh: Weigher, patients: Sequence[str], *, names: Sequence[str],
                      resamples: int = 1000, seed: int = 1, undefined: str = ""
                      ) -> dict[str, Estimate]:
    """Every metric with its 95 % percentile interval over patients drawn with replacement.

    weigh: see ``Weigher``; patients: n ids; undefined: why a metric of all slides may be NaN
    names: metrics to list when there is no slide
    A resample in which a metric is undefined (one class only) is left out of that metric's
    interval and shows in ``valid``. Equal seeds give equal intervals (Efron & Tibshirani 1993,
    section 13.3).
    """
    if len(patients) == 0:
        return {name: Estimate(value=float("nan"), reason="no slide was evaluated")
                for name in names}
    values = weigh(np.ones((1, len(patients))))
    _, patient = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    draws = _bootstrap(weigh, patient, resamples, seed) if patient.any() else {}
    return {name: _estimate(float(value[0]), draws.get(name), resamples=resamples,
                            undefined=undefined) for name, value in values.items()}


def _bootstrap(weigh: Weigher, patient: np.ndarray, resamples: int, seed: int
               ) -> dict[str, np.ndarray]:
    """Metrics of ``resamples`` draws of all patients, in chunks of bounded memory."""
    rng = np.random.default_rng(seed)
    number = int(patient.max()) + 1
    rows = max(1, _CHUNK_CELLS // len(patient))
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = rng.integers(0, number, (size, number)) + np.arange(size)[:, None] * number
        counts = np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number)
        for name, chunk in weigh(counts[:, patient].astype(np.float64)).items():
            parts.setdefault(name, []).append(chunk)
    return {name: np.concatenate(chunks) for name, chunks in parts.items()}


def _estimate(value: float, draws: np.ndarray | None, *, resamples: int, undefined: str
              ) -> Estimate:
    if np.isnan(value):
        return Estimate(value=value, resamples=resamples, reason=undefined)
    if draws is None:
        reason = "no resampling was asked for" if resamples == 0 else "one patient: no interval"
        return Estimate(value=value, resamples=resamples, reason=reason)
    defined = draws[np.isfinite(draws)]
    if len(defined) == 0:
        return Estimate(value=value, resamples=resamples, reason="undefined in every resample")
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=value, low=float(low), high=float(high), valid=len(defined),
                    resamples=resamples, reason="")


def delong_interval(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of a two-class AUC by DeLong's variance, clipped to [0, 1].

    scores (n,), positive (n,) bool. Slides count as independent, unlike in the bootstrap.
    None when a class has fewer than two slides or the classes are perfectly separated (the
    variance is then 0, which is no certainty). DeLong et al. 1988; ranks as Sun & Xu 2014.
    """
    from scipy.stats import rankdata

    cases, controls = scores[positive], scores[~positive]
    m, n = len(cases), len(controls)
    if m < 2 or n < 2:
        return None
    ranks = rankdata(np.concatenate([cases, controls]))
    beaten = (ranks[:m] - rankdata(cases)) / n  # share of controls below each case
    above = 1 - (ranks[m:] - rankdata(controls)) / m  # share of cases above each control
    variance = beaten.var(ddof=1) / m + above.var(ddof=1) / n
    if variance <= 0:
        return None
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * float(np.sqrt(variance))
    auc = float(beaten.mean())
    return max(0.0, auc - half), min(1.0, auc + half)
