"""Metrics of multi-label, regression and survival models against scikit-learn and by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sk

from utils.task_metrics import multilabel_metrics, regression_metrics, survival_metrics

NAN = float("nan")


def test_multilabel_figures_are_those_of_scikit_learn_over_known_labels() -> None:
    random = np.random.default_rng(0)
    p, truths = random.random((40, 3)), random.integers(0, 2, (40, 3)).astype(float)
    truths[:7, 1] = NAN
    found = multilabel_metrics(p, truths)
    known = ~np.isnan(truths)
    areas = [sk.roc_auc_score(truths[known[:, t], t], p[known[:, t], t]) for t in range(3)]
    precisions = [sk.average_precision_score(truths[known[:, t], t], p[known[:, t], t])
                  for t in range(3)]
    assert found.label_auc == pytest.approx(areas) and found.auc == pytest.approx(np.mean(areas))
    assert found.label_average_precision == pytest.approx(precisions)
    assert found.average_precision == pytest.approx(np.mean(precisions))
    assert found.accuracy == pytest.approx(((p > 0.5) == truths)[known].mean())
    assert (found.n, found.n_labels, found.label_known) == (40, 3, [40, 33, 40])
    assert found.label_positives == np.nansum(truths, axis=0).astype(int).tolist()
    assert found.headline() == {"auc": found.auc, "acc": found.accuracy}
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_label_of_one_kind_has_no_auc_and_stays_out_of_the_mean() -> None:
    truths = np.array([[1, 1.0], [1, 0], [1, NAN]])
    found = multilabel_metrics(np.array([[0.9, 0.8], [0.2, 0.1], [0.6, 0.3]]), truths)
    assert math.isnan(found.label_auc[0]) and found.auc == found.label_auc[1] == 1.0
    assert found.label_accuracy == pytest.approx([2 / 3, 1.0])
    assert found.accuracy == pytest.approx(4 / 5)


@pytest.mark.parametrize(("p", "truths", "reason"), [
    (np.zeros((0, 2)), np.zeros((0, 2)), "no slides"),
    (np.ones((2, 2)), np.ones((2, 2)), "no label has both"),
    (np.array([[NAN], [0.1]]), np.array([[1.0], [0.0]]), "a probability is NaN")])
def test_multilabel_without_an_auc_says_why(
        p: np.ndarray, truths: np.ndarray, reason: str) -> None:
    found = multilabel_metrics(p, truths)
    assert math.isnan(found.auc) and reason in found.auc_reason


def test_regression_figures_are_those_of_the_libraries() -> None:
    random = np.random.default_rng(1)
    truths = random.normal(size=(30, 2)) * [1, 100]
    values = np.round(truths + random.normal(size=(30, 2)) * [0.5, 80], 1)  # with ties
    found = regression_metrics(values, truths)
    for t in range(2):
        assert found.value_r2[t] == pytest.approx(sk.r2_score(truths[:, t], values[:, t]))
        assert found.value_pearson[t] == pytest.approx(pearsonr(truths[:, t], values[:, t])[0])
        assert found.value_spearman[t] == pytest.approx(spearmanr(truths[:, t], values[:, t])[0])
        assert found.value_mae[t] == pytest.approx(np.abs(truths - values)[:, t].mean())
        assert found.value_rmse[t] == pytest.approx(
            sk.mean_squared_error(truths[:, t], values[:, t]) ** 0.5)
    assert found.r2 == pytest.approx(np.mean(found.value_r2))
    assert found.headline() == {"r2": found.r2, "mae": pytest.approx(np.mean(found.value_mae))}
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize(("values", "truths", "reason", "mae"), [
    ([], [], "no slides", NAN), ([1.0, 2.0], [3.0, 3.0], "same true value", 1.5),
    ([NAN, 2.0], [1.0, 3.0], "a prediction is NaN", NAN), ([1.0], [3.0], "same true value", 2.0)])
def test_regression_without_r2_says_why(
        values: list[float], truths: list[float], reason: str, mae: float) -> None:
    found = regression_metrics(np.array(values).reshape(-1, 1), np.array(truths).reshape(-1, 1))
    assert math.isnan(found.r2) and math.isnan(found.pearson) and reason in found.r2_reason
    assert found.mae == pytest.approx(mae, nan_ok=True)


def test_survival_counts_pairs_and_events() -> None:
    truths = np.array([[1.0, 1], [2.0, 0], [3.0, 1]])
    found = survival_metrics(np.array([0.9, 0.1, 0.95]), truths)
    assert (found.n, found.n_events, found.c_index) == (3, 2, 0.5)
    assert (found.concordant, found.discordant) == (1, 1)
    assert found.headline() == {"c_index": 0.5}
    empty = survival_metrics(np.zeros(0), np.zeros((0, 2)))
    assert math.isnan(empty.c_index) and empty.c_index_reason == "there are no slides"
