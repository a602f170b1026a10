"""Metrics against scikit-learn, and on folds where something is undefined."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from utils.metrics import (
    average_precision,
    binary_auc,
    calibration_error,
    slide_metrics,
)


def made_up(n: int, n_classes: int, seed: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    raw = rng.integers(1, 5, (n, n_classes)) if ties else rng.random((n, n_classes)) + 0.05
    labels = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, n - n_classes)])
    return raw / raw.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_equal_to_scikit_learn(seed: int, n_classes: int, ties: bool) -> None:
    probabilities, labels = made_up(30, n_classes, seed, ties=ties)
    found = slide_metrics(probabilities, labels)
    predicted = probabilities.argmax(axis=1)
    if n_classes == 2:
        auc = sk.roc_auc_score(labels, probabilities[:, 1])
        precision = sk.average_precision_score(labels, probabilities[:, 1])
        brier = sk.brier_score_loss(labels, probabilities[:, 1])
        assert found.brier == pytest.approx(brier, abs=1e-12)
    else:
        auc = sk.roc_auc_score(labels, probabilities, multi_class="ovr")
        precision = sk.average_precision_score(np.eye(n_classes)[labels], probabilities)
        micro = slide_metrics(probabilities, labels, micro_average=True).auc
        assert micro == pytest.approx(sk.roc_auc_score(
            np.eye(n_classes)[labels].ravel(), probabilities.ravel()), abs=1e-12)
    assert found.auc == pytest.approx(auc, abs=1e-12)
    assert found.average_precision == pytest.approx(precision, abs=1e-12)
    assert found.accuracy == pytest.approx(sk.accuracy_score(labels, predicted))
    assert found.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert found.macro_f1 == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert found.confusion == sk.confusion_matrix(
        labels, predicted, labels=range(n_classes)).tolist()


@pytest.mark.parametrize("metric", [binary_auc, average_precision])
def test_weights_are_repeats(metric: object) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 25) / 5, rng.integers(0, 2, 25)
    counts = rng.multinomial(25, np.full(25, 1 / 25), size=50)
    found = metric(scores, labels, weights=counts)  # type: ignore[operator]
    assert found.shape == (50,)
    for row, value in zip(counts, found, strict=True):
        taken = np.repeat(np.arange(25), row)
        again = metric(scores[taken], labels[taken])  # type: ignore[operator]
        assert value == pytest.approx(again, abs=1e-12, nan_ok=True)


def test_resamples_of_one_class_are_nan() -> None:
    found = binary_auc(np.array([0.1, 0.9]), np.array([0, 1]), weights=np.array([[2, 0], [1, 1]]))
    assert math.isnan(found[0])
    assert found[1] == 1.0


@pytest.mark.parametrize(("probabilities", "labels", "reason"), [
    (np.zeros((0, 2)), [], "there are no slides"),
    (np.full((3, 2), 0.5), [1, 1, 1], "only class 1 has slides"),
    (np.full((3, 4), 0.25), [2, 2, 2], "only class 2 has slides"),
    (np.array([[np.nan, np.nan], [0.2, 0.8]]), [0, 1], "a probability is NaN"),
])
def test_undefined_auc_says_why(
    probabilities: np.ndarray, labels: list[int], reason: str
) -> None:
    for micro in (False, True):
        found = slide_metrics(probabilities, np.array(labels, int), micro_average=micro)
        assert math.isnan(found.auc)
        assert found.auc_reason == reason
        json.dumps(found.as_dict())


def test_no_slides_at_all() -> None:
    found = slide_metrics(np.zeros((0, 3)), np.zeros(0, int))
    assert found.class_accuracy == [None, None, None]
    for value in (found.accuracy, found.error, found.balanced_accuracy, found.macro_f1,
                  found.average_precision, found.brier, found.ece):
        assert math.isnan(value)


def test_a_class_without_slides_is_left_out() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1]])
    found = slide_metrics(probabilities, np.array([0, 2, 0]))
    assert found.auc == 1.0
    assert math.isnan(found.class_auc[1])
    assert found.class_accuracy == [1.0, None, 1.0]
    assert found.class_counts == [2, 0, 1]


def test_calibration_error_by_hand() -> None:
    # two bins: 0.9 confident and right half the time; 0.6 confident and always right
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = np.array([0, 1, 0, 1])
    assert calibration_error(probabilities, labels) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
    assert calibration_error(np.eye(2), np.array([0, 1])) == 0.0


@pytest.mark.parametrize(("shape", "labels", "message"), [
    ((3, 1), [0, 0, 0], "expected probabilities"), ((3,), [0, 0, 0], "expected probabilities"),
    ((3, 2), [0, 1], "expected 3 labels"), ((2, 2), [0, 2], "expected labels 0 to 1"),
    ((2, 2), [-1, 0], "found -1 to 0")])
def test_shapes_and_labels_are_checked(
    shape: tuple[int, ...], labels: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        slide_metrics(np.full(shape, 0.5), np.array(labels))
