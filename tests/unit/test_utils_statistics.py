"""Intervals: equal to the plain metrics, over patients, honest about what is not defined."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from tests.conftest import GOLDEN
from utils.metrics import slide_metrics
from utils.statistics import METRICS, delong_interval, estimate_metrics, weighted_metrics

CASES = json.loads((GOLDEN / "metrics.json").read_text())["cases"]


def made_up(n: int, classes: int, seed: int, *,
            ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    raw = rng.integers(1, 5, (n, classes)) if ties else rng.random((n, classes)) + 0.02
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    raw[np.arange(n), labels] *= 1.5 if not ties else 1
    return raw / raw.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("micro", [False, True])
def test_weights_count_slides_as_often_as_they_say(classes: int, ties: bool, micro: bool) -> None:
    p, labels = made_up(20, classes, seed=classes, ties=ties)
    weights = np.random.default_rng(1).integers(0, 4, (30, 20)).astype(float)
    weights[0] = 1
    found = weighted_metrics(p, labels, weights, micro_average=micro)
    for row, counts in enumerate(weights.astype(int)):
        plain = slide_metrics(np.repeat(p, counts, axis=0), np.repeat(labels, counts),
                              micro_average=micro)
        for name in METRICS:
            expected = getattr(plain, name)
            if name == "average_precision" and math.isnan(plain.auc):
                expected = math.nan
            assert found[name][row] == pytest.approx(expected, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_auc_of_the_original(case: dict) -> None:
    p, labels = np.array(case["probs"]), np.array(case["labels"])
    for summary, micro in (("eval_py_summary", False), ("eval_py_summary_micro", True)):
        found = estimate_metrics(p, labels, range(len(labels)), resamples=20, micro_average=micro)
        expected = case[summary]["auc"]
        if expected == -1:
            assert math.isnan(found["auc"].value) and "only class 1" in found["auc"].reason
            assert found["auc"].valid == 0
        else:
            assert found["auc"].value == pytest.approx(expected, abs=1e-12)


def test_patients_are_drawn_not_slides() -> None:
    """Copies of a slide in the same patient are no new evidence; in new patients they are."""
    p, labels = made_up(40, 2, seed=3)
    once = estimate_metrics(p, labels, [f"p{i}" for i in range(40)], resamples=300)
    p4, labels4 = np.tile(p, (4, 1)), np.tile(labels, 4)
    same = estimate_metrics(p4, labels4, [f"p{i % 40}" for i in range(160)], resamples=300)
    other = estimate_metrics(p4, labels4, [f"p{i}" for i in range(160)], resamples=300)
    for name in METRICS:
        assert (same[name].low, same[name].high) == pytest.approx((once[name].low,
                                                                   once[name].high))
    width = {key: item["auc"].high - item["auc"].low
             for key, item in (("same", same), ("other", other))}
    assert width["other"] < 0.7 * width["same"]


def test_the_seed_decides() -> None:
    p, labels = made_up(30, 2, seed=0)
    first, again, other = (estimate_metrics(p, labels, range(30), resamples=99, seed=seed)["auc"]
                           for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert first.low < first.value < first.high


def test_intervals_cover() -> None:
    """95 % intervals of the accuracy hold the truth in about 95 % of samples."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        labels = rng.integers(0, 2, 80)
        right = rng.random(80) < 0.7
        p = np.eye(2)[np.where(right, labels, 1 - labels)] * 0.8 + 0.1
        found = estimate_metrics(p, labels, range(80), resamples=200, seed=trial)["accuracy"]
        held += found.low <= 0.7 <= found.high
    assert 0.89 <= held / 200 <= 0.99


def test_one_class_resamples_are_left_out_and_counted() -> None:
    """One patient of ten is positive: a resample misses it with probability 0.9^10 = 0.349."""
    labels = np.array([1] + [0] * 9)
    p1 = np.linspace(0.9, 0.1, 10)
    found = estimate_metrics(np.c_[1 - p1, p1], labels, range(10), resamples=2000)
    assert 0.60 < found["auc"].valid / 2000 < 0.70
    assert found["auc"].valid == found["average_precision"].valid
    assert found["accuracy"].valid == 2000
    assert np.isfinite(found["auc"].low)


@pytest.mark.parametrize(("labels", "patients", "resamples", "reason"), [
    ([0, 0, 0], "abc", 10, "only class 0"),
    ([0, 1, 1], "aaa", 10, "one patient"),
    ([0, 1, 1], "abc", 0, "no resampling"),
    ([], "", 10, "no slide"),
])
def test_no_interval_without_a_reason(labels: list[int], patients: str, resamples: int,
                                      reason: str) -> None:
    p = np.full((len(labels), 2), 0.5)
    auc = estimate_metrics(p, np.array(labels, int), list(patients), resamples=resamples)["auc"]
    assert math.isnan(auc.low) and math.isnan(auc.high) and auc.valid == 0
    assert reason in auc.reason


def test_ten_thousand_slides_take_seconds() -> None:
    p, labels = made_up(10_000, 2, seed=0)
    start = time.process_time()
    found = estimate_metrics(p, labels, [f"p{i // 2}" for i in range(10_000)], resamples=1000)
    assert time.process_time() - start < 8  # 0.6 s when measured alone
    assert found["auc"].valid == 1000


def by_pairs(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """AUC and DeLong's variance from their definition: every case against every control."""
    case, control = scores[positive][:, None], scores[~positive][None, :]
    wins = (case > control) + 0.5 * (case == control)
    return wins.mean(), (wins.mean(axis=1).var(ddof=1) / len(case)
                         + wins.mean(axis=0).var(ddof=1) / control.shape[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_delong_by_ranks_equals_delong_by_pairs(seed: int, ties: bool) -> None:
    p, labels = made_up(40, 2, seed, ties=ties)
    auc, variance = by_pairs(p[:, 1], labels == 1)
    low, high = delong_interval(p[:, 1], labels == 1) or (0, 0)
    assert low == pytest.approx(max(0, auc - 1.959963985 * variance**0.5), abs=1e-8)
    assert high == pytest.approx(min(1, auc + 1.959963985 * variance**0.5), abs=1e-8)


def test_delong_claims_nothing_it_cannot_know() -> None:
    assert delong_interval(np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1], bool)) is None
    assert delong_interval(np.array([0.1, 0.2, 0.8]), np.array([0, 0, 1], bool)) is None
