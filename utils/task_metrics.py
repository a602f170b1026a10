"""How good the scores of multi-label, regression and survival models are.

As in ``utils.metrics``: what is not defined is NaN and says why, it never raises.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from utils.metrics import average_precision, binary_auc
from utils.survival import concordance


class _AsDict:
    """``as_dict`` of a dataclass."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]


def _mean(values: list[float]) -> float:
    """Mean of what is defined."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


# ---------------------------------------------------------------------------- several labels

@dataclass(frozen=True, kw_only=True)
class MultiLabelMetrics(_AsDict):
    """Metrics of n slides and T labels; unknown truths count nowhere.

    auc, average_precision: mean over the labels with positives and negatives; NaN when there is
                       none, ``auc_reason`` why
    accuracy:          share of right answers over all known labels of all slides (1 - Hamming
                       loss); a label is predicted when its probability is above 0.5
    label_*:           the same of each label; NaN where undefined
    label_positives, label_known: slides that have the label, and slides of which it is known
    """

    n: int
    n_labels: int
    auc: float
    auc_reason: str
    average_precision: float
    accuracy: float
    label_auc: list[float]
    label_average_precision: list[float]
    label_accuracy: list[float]
    label_positives: list[int]
    label_known: list[int]

    def headline(self) -> dict[str, float]:
        """Mean AUC and the share of right answers."""
        return {"auc": self.auc, "acc": self.accuracy}


def multilabel_metrics(probabilities: np.ndarray, truths: np.ndarray) -> MultiLabelMetrics:
    """Metrics of probabilities (n, T) against truths (n, T) of 0, 1 and NaN (unknown)."""
    probabilities = np.asarray(probabilities, np.float64)
    truths = np.asarray(truths, np.float64)
    known, positive = ~np.isnan(truths), truths == 1
    right = ((probabilities > 0.5) == positive) & known & ~np.isnan(probabilities)
    areas, precisions = [], []
    for scores, hits, given in zip(probabilities.T, positive.T, known.T, strict=True):
        both = 0 < hits.sum() < given.sum()
        areas.append(float(binary_auc(scores[given], hits[given])) if both else float("nan"))
        precisions.append(float(average_precision(scores[given], hits[given])) if both
                          else float("nan"))
    counts = known.sum(axis=0)
    reason = ("there are no slides" if not len(truths) else
              "a probability is NaN" if np.isnan(probabilities).any() else
              "no label has both positive and negative slides" if np.isnan(areas).all() else "")
    return MultiLabelMetrics(
        n=len(truths), n_labels=truths.shape[1], auc_reason=reason,
        auc=float("nan") if reason else _mean(areas),
        average_precision=float("nan") if reason else _mean(precisions),
        accuracy=_ratio(right.sum(), known.sum()),
        label_auc=areas, label_average_precision=precisions,
        label_accuracy=[_ratio(hits, all_) for hits, all_ in
                        zip(right.sum(axis=0), counts, strict=True)],
        label_positives=positive.sum(axis=0).tolist(), label_known=counts.tolist())


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else float("nan")


# ---------------------------------------------------------------------------- values

@dataclass(frozen=True, kw_only=True)
class RegressionMetrics(_AsDict):
    """Metrics of n slides and T values, in the values' own units.

    r2:   share of the variance explained (below 0: worse than the mean of these slides)
    pearson, spearman: correlation of the values and of their ranks
    mae, rmse: mean absolute error, root of the mean squared error
    Each is the mean over the values (of little meaning for errors in different units), ``value_*``
    lists each; NaN where not defined (no slides, a
    constant, a prediction that is NaN), ``r2_reason`` why.
    """

    n: int
    r2: float
    r2_reason: str
    pearson: float
    spearman: float
    mae: float
    rmse: float
    value_r2: list[float]
    value_pearson: list[float]
    value_spearman: list[float]
    value_mae: list[float]
    value_rmse: list[float]

    def headline(self) -> dict[str, float]:
        """R2 and the mean absolute error."""
        return {"r2": self.r2, "mae": self.mae}


def regression_metrics(values: np.ndarray, truths: np.ndarray) -> RegressionMetrics:
    """Metrics of predicted values (n, T) against truths (n, T)."""
    from scipy.stats import rankdata

    values, truths = np.asarray(values, np.float64), np.asarray(truths, np.float64)
    by_value: dict[str, list[float]] = {
        name: [] for name in ("r2", "pearson", "spearman", "mae", "rmse")}
    for found, true in zip(values.T, truths.T, strict=True):
        error = found - true
        spread = ((true - true.mean()) ** 2).sum() if len(true) else 0.0
        by_value["r2"].append(float(1 - (error**2).sum() / spread) if spread > 0 else float("nan"))
        by_value["pearson"].append(_correlation(found, true))
        by_value["spearman"].append(
            float("nan") if np.isnan(found).any() else
            _correlation(rankdata(found), rankdata(true)))
        by_value["mae"].append(_ratio(np.abs(error).sum(), len(error)))
        by_value["rmse"].append(_ratio((error**2).sum(), len(error)) ** 0.5)
    broken = bool(np.isnan(values).any())
    reason = ("there are no slides" if not len(truths) else
              "a prediction is NaN" if broken else
              "all slides have the same true value" if np.isnan(by_value["r2"]).all() else "")
    figures: dict[str, Any] = {f"value_{name}": each for name, each in by_value.items()}
    for name, each in by_value.items():
        figures[name] = float("nan") if broken else _mean(each)
    return RegressionMetrics(n=len(truths), r2_reason=reason, **figures)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / size) if size > 0 else float("nan")


# ---------------------------------------------------------------------------- survival

@dataclass(frozen=True, kw_only=True)
class SurvivalMetrics(_AsDict):
    """Concordance of n slides, ``n_events`` of them with an event; see ``utils.survival``."""

    n: int
    n_events: int
    c_index: float
    c_index_reason: str
    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int

    def headline(self) -> dict[str, float]:
        """The c-index."""
        return {"c_index": self.c_index}


def survival_metrics(risks: np.ndarray, truths: np.ndarray) -> SurvivalMetrics:
    """Metrics of risks (n,) against truths (n, 2): time and event (1 seen, 0 censored)."""
    truths = np.asarray(truths, np.float64).reshape(-1, 2)
    found = concordance(np.asarray(risks, np.float64), truths[:, 0], truths[:, 1])
    return SurvivalMetrics(
        n=len(truths), n_events=int((truths[:, 1] == 1).sum()), c_index=found.c_index,
        c_index_reason=found.reason, concordant=found.concordant, discordant=found.discordant,
        tied_risk=found.tied_risk, tied_time=found.tied_time)
