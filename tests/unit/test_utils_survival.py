"""Bins of time, Cox's likelihood, Kaplan-Meier, groups of risk, log-rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from utils.errors import Refused
from utils.survival import (
    concordance,
    cox_loss,
    kaplan_meier,
    log_rank,
    risk_groups,
    survival_bins,
    time_bins,
)


def test_bins_come_from_events_alone_and_are_open_on_the_right() -> None:
    times = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 400.0, 0.1])
    events = np.array([1, 1, 1, 1, 1, 0, 0])
    edges = survival_bins(times, events, 2)
    assert edges == (1.0, 3.0, 5.0)
    assert time_bins(np.array([0.0, 1.0, 2.999, 3.0, 5.0, 400.0]), edges).tolist() == [
        0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("times", "events", "message"), [
    ([1.0, 2.0, 3.0], [0, 0, 0], "no training slide has an event"),
    ([1.0, 1.0, 1.0, 9.0], [1, 1, 1, 0], "3 events have 1 distinct times.*--n_bins"),
    ([1.0, 2.0], [1, 1], "2 distinct times.*--n_bins"),
    ([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0], [1] * 8, "4 distinct times"),
])
def test_too_few_events_for_the_bins_are_refused(
        times: list[float], events: list[int], message: str) -> None:
    with pytest.raises(Refused, match=message):
        survival_bins(np.array(times), np.array(events), 4)


def partial_likelihood(risks: np.ndarray, times: np.ndarray, events: np.ndarray) -> float:
    """The definition, pair by pair."""
    terms = [math.log(sum(math.exp(risks[j]) for j in range(len(risks)) if times[j] >= times[i]))
             - risks[i] for i in range(len(risks)) if events[i]]
    return float(np.mean(terms))


@pytest.mark.parametrize("seed", range(3))
def test_cox_is_its_definition_with_ties_in_any_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    risks, times = random.normal(size=12), random.integers(1, 5, 12).astype(float)
    events = random.integers(0, 2, 12)
    events[0] = 1
    found = cox_loss(*(torch.tensor(part) for part in (risks, times, events)))
    assert float(found) == pytest.approx(partial_likelihood(risks, times, events), abs=1e-6)


def test_kaplan_meier_of_a_worked_example() -> None:
    """Times 6, 6, 6+, 7, 9+, 10: 1 - 2/6, then times 1 - 1/3, then to 0."""
    curve = kaplan_meier(np.array([6, 6, 6, 7, 9, 10.0]), np.array([1, 1, 0, 1, 0, 1]))
    assert curve.times.tolist() == [6, 7, 9, 10]
    assert curve.survival == pytest.approx([4 / 6, 4 / 9, 4 / 9, 0])
    assert curve.at_risk.tolist() == [6, 3, 2, 1]
    assert (curve.n, curve.n_events) == (6, 4)
    assert (curve.low <= curve.survival).all() and (curve.survival <= curve.high).all()
    alone = kaplan_meier(np.array([3.0]), np.array([0]))
    assert (alone.survival.tolist(), alone.n_events) == ([1.0], 0)


def test_risk_groups_are_cut_at_quantiles_and_keep_equal_risks_together() -> None:
    assert risk_groups(np.array([4.0, 1.0, 3.0, 2.0])).tolist() == [1, 0, 1, 0]
    assert risk_groups(np.array([0.0, 5.0, 1.0, 9.0, 2.0, 7.0]), n_groups=3).tolist() == [
        0, 1, 0, 2, 1, 2]
    assert risk_groups(np.full(5, 2.0)).tolist() == [0] * 5


def test_log_rank_tells_groups_apart_by_hand() -> None:
    """Two groups of two, events at 1 and 2 in one, 3 and 4 in the other."""
    found = log_rank(np.array([1.0, 2, 3, 4]), np.ones(4), np.array([0, 0, 1, 1]))
    observed, expected = 2, 2 / 4 + 1 / 3
    variance = (2 / 4) * (2 / 4) + (1 / 3) * (2 / 3)
    assert found.statistic == pytest.approx((observed - expected) ** 2 / variance)
    assert 0 < found.p_value < 0.1 and found.reason == ""


@pytest.mark.parametrize(("events", "groups", "reason"), [
    ([1, 1, 1], [0, 0, 0], "one group only"), ([0, 0, 0], [0, 1, 1], "no slide has an event"),
    ([0, 0, 1], [0, 0, 1], "no event leaves slides of two groups")])
def test_log_rank_without_an_answer_says_why(
        events: list[int], groups: list[int], reason: str) -> None:
    found = log_rank(np.array([1.0, 2.0, 3.0]), np.array(events), np.array(groups))
    assert math.isnan(found.statistic) and math.isnan(found.p_value) and reason in found.reason


@pytest.mark.parametrize(("risks", "reason"), [
    ([], "there are no slides"), ([1.0], "one slide only"), ([1.0, float("nan")], "not finite")])
def test_concordance_without_an_answer_says_why(risks: list[float], reason: str) -> None:
    found = concordance(np.array(risks), np.arange(len(risks)) + 1.0, np.ones(len(risks)))
    assert math.isnan(found.c_index) and reason in found.reason
