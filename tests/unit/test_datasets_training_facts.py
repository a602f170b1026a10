"""Weights, scale and bins come from the training slides of a fold."""

from __future__ import annotations

import numpy as np
import pytest

from datasets.table import SlideTable
from datasets.training_facts import training_facts
from utils.errors import Refused
from utils.objectives import TaskType

NAN = float("nan")


def table(task_type: TaskType, targets: list[list[float]]) -> SlideTable:
    n = len(targets)
    return SlideTable(tuple(f"s{row}" for row in range(n)), tuple(f"p{row}" for row in range(n)),
                      np.zeros(n, np.int64), ("x",), task_type=task_type,
                      targets=np.array(targets, np.float64), target_names=("u", "v"))


def test_classes_weigh_the_same_together() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    classes = SlideTable(tuple("abcdef"), tuple("abcdef"), labels, ("x", "y", "z"))
    facts = training_facts(classes, n_bins=4, bag_loss="ce", balanced=True)
    assert facts == {"class_weights": (6 / 9, 6 / 6, 6 / 3)}
    weights = np.array(facts["class_weights"])[labels]
    assert weights.mean() == pytest.approx(1.0) and weights[labels == 2].sum() == pytest.approx(2.0)
    assert training_facts(classes, n_bins=4, bag_loss="ce", balanced=False) == {}


def test_positives_of_a_label_weigh_as_its_negatives() -> None:
    labels = table("multilabel", [[1, 0], [0, 1], [0, 1], [0, NAN], [NAN, 1]])
    assert training_facts(labels, n_bins=4, bag_loss="bce", balanced=True) == {
        "class_weights": (3.0, 1 / 3)}
    assert training_facts(labels, n_bins=4, bag_loss="bce", balanced=False) == {}


def test_values_bring_their_mean_and_deviation() -> None:
    values = table("regression", [[1, 10], [3, 30], [5, 20]])
    facts = training_facts(values, n_bins=4, bag_loss="mse", balanced=False)
    assert facts["target_mean"] == (3.0, 20.0)
    assert facts["target_std"] == pytest.approx((np.std([1, 3, 5]), np.std([10, 30, 20])))


def test_bins_come_from_the_events_of_these_slides() -> None:
    slides = table("survival", [[1, 1], [2, 1], [3, 1], [100, 0]])
    assert training_facts(slides, n_bins=2, bag_loss="nll_surv", balanced=False) == {
        "bin_edges": (1.0, 2.0, 3.0)}
    assert training_facts(slides, n_bins=1, bag_loss="cox", balanced=False) == {}


@pytest.mark.parametrize(("slides", "bag_loss", "balanced", "message"), [
    (table("survival", [[1, 1], [2, 0]]), "nll_surv", False, "--n_bins"),
    (table("survival", [[1, 0], [2, 0]]), "nll_surv", False, "no training slide has an event"),
    (table("survival", [[1, 1], [2, 0]]), "cox", True, "needs classes or labels"),
    (table("regression", [[1, 2], [1, 3]]), "mse", False, "same value"),
    (table("regression", [[1, 2], [2, 3]]), "mse", True, "needs classes or labels"),
    (table("multilabel", [[1, 0], [1, 1]]), "bce", True, "no positive or no negative"),
    (SlideTable(("a",), ("p",), np.array([0]), ("x", "y")), "ce", True, "no training slide")])
def test_what_training_slides_cannot_give_is_refused(
        slides: SlideTable, bag_loss: str, balanced: bool, message: str) -> None:
    with pytest.raises(Refused, match=message):
        training_facts(slides, n_bins=4, bag_loss=bag_loss, balanced=balanced)
