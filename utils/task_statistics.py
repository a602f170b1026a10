"""Figures of multi-label, regression and survival scores for many weightings of the slides.

The counterparts of ``statistics.weighted_metrics``: arguments (n, ...) and weights (R, n) >= 0, how
often each slide counts; results (R,), NaN where a figure is undefined. Weights of one give the
figures of ``utils.task_metrics``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from utils.metrics import average_precision, binary_auc
from utils.statistics import mean_defined, ratio
from utils.survival import TIED_RISK

_SPREAD_MIN = 1e-12  # of a variance relative to that of all slides; below it values are constant
_BLOCK_CELLS = 1 << 22  # pairs of slides held at once: 32 MiB an array


def of_each(figure: str, name: str) -> str:
    """What a figure of one label or value is called, e.g. ``auc[grade]``."""
    return f"{figure}[{name}]"


def _with_means(by_figure: Mapping[str, Sequence[np.ndarray]], names: Sequence[str]
                ) -> dict[str, np.ndarray]:
    """Each figure's mean over the labels or values, and where there are several, each one's."""
    found = {figure: mean_defined(np.stack(each, axis=1)) for figure, each in by_figure.items()}
    if len(names) > 1:
        found.update({of_each(figure, name): one for figure, each in by_figure.items()
                      for name, one in zip(names, each, strict=True)})
    return found


# ---------------------------------------------------------------------------- several labels

def weighted_multilabel(probabilities: np.ndarray, truths: np.ndarray, weights: np.ndarray, *,
                        names: Sequence[str]) -> dict[str, np.ndarray]:
    """Figures of probabilities (n, T) against truths (n, T) of 0, 1 and NaN (unknown)."""
    by_figure: dict[str, list[np.ndarray]] = {
        "auc": [], "average_precision": [], "accuracy": []}
    hits, counts = np.zeros(len(weights)), np.zeros(len(weights))
    for scores, truth in zip(np.asarray(probabilities, np.float64).T, truths.T, strict=True):
        known = ~np.isnan(truth)
        scores, positive, part = scores[known], truth[known] == 1, weights[:, known]
        auc = binary_auc(scores, positive, weights=part)
        precision = average_precision(scores, positive, weights=part)
        right, total = part @ ((scores > 0.5) == positive), part.sum(axis=1)
        by_figure["auc"].append(auc)
        by_figure["average_precision"].append(np.where(np.isnan(auc), np.nan, precision))
        by_figure["accuracy"].append(ratio(right, total))
        hits, counts = hits + right, counts + total
    return {**_with_means(by_figure, names), "accuracy": ratio(hits, counts)}


# ---------------------------------------------------------------------------- values

def weighted_regression(values: np.ndarray, truths: np.ndarray, weights: np.ndarray, *,
                        names: Sequence[str]) -> dict[str, np.ndarray]:
    """Figures of predicted values (n, T) against truths (n, T), in the values' own units."""
    by_figure: dict[str, list[np.ndarray]] = {
        "r2": [], "pearson": [], "spearman": [], "mae": [], "rmse": []}
    total = weights.sum(axis=1)
    for found, true in zip(np.asarray(values, np.float64).T, truths.T, strict=True):
        error = found - true
        squared = weights @ error**2
        fixed = np.broadcast_to(true, weights.shape)
        by_figure["r2"].append(1 - _ratio_of_spread(squared, _moment(fixed, fixed, weights), true))
        by_figure["pearson"].append(
            _correlation(np.broadcast_to(found, weights.shape), fixed, weights))
        by_figure["spearman"].append(_correlation(
            _weighted_ranks(found, weights), _weighted_ranks(true, weights), weights))
        by_figure["mae"].append(ratio(weights @ np.abs(error), total))
        by_figure["rmse"].append(np.sqrt(ratio(squared, total)))
    return _with_means(by_figure, names)


def _moment(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) weighted sums of the products of a and b (R, n), each less its weighted mean."""
    total = weights.sum(axis=1)
    a, b = (x - ratio((x * weights).sum(axis=1), total)[:, None] for x in (a, b))
    product: np.ndarray = (a * b * weights).sum(axis=1)
    return product


def _ratio_of_spread(top: np.ndarray, spread: np.ndarray, true: np.ndarray) -> np.ndarray:
    """top / spread, NaN where the resample's true values are constant but for rounding."""
    least = _SPREAD_MIN * max(float(((true - true.mean()) ** 2).sum()), np.finfo(float).tiny)
    return ratio(top, np.where(spread > least, spread, 0.0))


def _correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) weighted correlation of a and b (R, n)."""
    spreads = [_moment(x, x, weights) for x in (a, b)]
    least = [_SPREAD_MIN * (x**2 * weights).sum(axis=1) for x in (a, b)]
    defined = np.logical_and(*(spread > low for spread, low in zip(spreads, least, strict=True)))
    size = np.sqrt(np.where(defined, spreads[0] * spreads[1], 0.0))
    return ratio(_moment(a, b, weights), size)


def _weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R, n) mean rank of each value (n,) among its weighted copies; ties share theirs."""
    order = np.argsort(values, kind="stable")
    _, starts, group = np.unique(values[order], return_index=True, return_inverse=True)
    group = group[np.argsort(order)]
    copies = np.add.reduceat(weights[:, order], starts, axis=1)
    middle: np.ndarray = copies.cumsum(axis=1) - (copies - 1) / 2
    return middle[:, group]


# ---------------------------------------------------------------------------- survival

def weighted_concordance(risks: np.ndarray, truths: np.ndarray, weights: np.ndarray, *,
                         strata: np.ndarray) -> np.ndarray:
    """(R,) Harrell's c-index of risks (n,) against truths (n, 2), time and event.

    strata: (n,) only slides of one stratum are compared: risks of different models are not on one
    scale. With a single stratum that is scikit-survival's ``concordance_index_censored``.
    """
    hits, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for rows, right, comparable in concordant_pairs(risks, truths, strata):
        hits += ((weights @ right.T) * weights[:, rows]).sum(axis=1)
        pairs += ((weights @ comparable.T) * weights[:, rows]).sum(axis=1)
    return ratio(hits, pairs)


def concordant_pairs(risks: np.ndarray, truths: np.ndarray, strata: np.ndarray
                     ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of slides with an event against all: rows (b,), right (b, n), pairs (b, n).

    pairs: 1 where the other slide is known to have gone longer without an event (a censoring at
    the time of the event counts as later); right: of those, 1 where the row's risk is the higher
    one, 0.5 where both are equal (within 1e-8).
    """
    risks, (times, events) = np.asarray(risks, np.float64), truths.T
    seen = np.flatnonzero(events == 1)
    for block in np.array_split(seen, 1 + len(seen) * len(risks) // _BLOCK_CELLS):
        later = (times > times[block, None]) | (
            (times == times[block, None]) & (events != 1))
        pairs = (later & (strata == strata[block, None])).astype(np.float64)
        gap = risks[block, None] - risks
        yield block, pairs * np.where(np.abs(gap) <= TIED_RISK, 0.5, gap > 0), pairs
