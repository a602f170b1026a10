"""Figures of labels, values and survival: those of the plain metrics, for every weighting."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sksurv.metrics import concordance_index_censored

from utils.evaluation import (
    Evaluation,
    FoldPredictions,
    Measuring,
    Results,
    evaluate_predictions,
    join_folds,
    pool_tests,
)
from utils.evaluation_survival import group_patients, most_discordant
from utils.evaluation_tasks import VIEWS
from utils.evaluation_values import largest_errors
from utils.folds import FoldFiles, write_results
from utils.objectives import TaskType, build_objective
from utils.task_metrics import multilabel_metrics, regression_metrics
from utils.task_statistics import (
    concordant_pairs,
    of_each,
    weighted_concordance,
    weighted_multilabel,
    weighted_regression,
)

OTHERS: tuple[TaskType, ...] = ("multilabel", "regression", "survival")
NAMES = {"multilabel": ("grade", "edge"), "regression": ("size", "age"),
         "survival": ("months", "death")}


def made_up(task_type: str, n: int = 24, *, seed: int = 0, name: str = "fold 0",
            stem: str = "s") -> FoldPredictions:
    """Two slides a patient; scores that know something, some of them tied."""
    rng = np.random.default_rng(seed)
    ids = tuple(f"{stem}{number}" for number in range(n))
    if task_type == "multilabel":
        truths = (rng.random((n, 2)) < 0.5).astype(float)
        truths[rng.random((n, 2)) < 0.2] = np.nan
        scores = (np.nan_to_num(truths, nan=0.5) * 0.4 + rng.random((n, 2)) * 0.6).round(1)
    elif task_type == "regression":
        truths = rng.normal(size=(n, 2)).round(1) * (1, 10)
        scores = truths + rng.normal(size=(n, 2)).round(1)
    else:
        times = np.repeat(rng.integers(1, 12, n // 2), 2).astype(float)
        truths = np.stack([times, np.repeat(rng.random(n // 2) < 0.6, 2)], axis=1)
        scores = np.stack([(-times + rng.normal(0, 4, n)).round(), rng.random(n)], axis=1)
    return FoldPredictions(
        name=name, slide_ids=ids, case_ids=tuple(f"p{number // 2}" for number in range(n)),
        truths=truths, scores=scores.astype(np.float32), names=NAMES[task_type],
        strata=np.zeros(n, int), folds=np.ones(n, int))


def evaluated(part: FoldPredictions, task_type: TaskType, resamples: int = 40) -> Evaluation:
    return evaluate_predictions(part, VIEWS[task_type], Measuring(resamples=resamples))


def counts(n: int, rows: int = 25) -> np.ndarray:
    weights = np.random.default_rng(1).integers(0, 4, (rows, n))
    weights[0] = 1
    return weights


# ---------------------------------------------------------------------------- weightings

def test_labels_count_as_often_as_they_say() -> None:
    part = made_up("multilabel")
    weights = counts(24)
    found = weighted_multilabel(part.scores, part.truths, weights.astype(float), names=part.names)
    for row, often in enumerate(weights):
        plain = multilabel_metrics(np.repeat(part.scores, often, axis=0),
                                   np.repeat(part.truths, often, axis=0))
        for figure in ("auc", "average_precision", "accuracy"):
            assert found[figure][row] == pytest.approx(getattr(plain, figure), nan_ok=True)
            for index, name in enumerate(part.names):
                assert found[of_each(figure, name)][row] == pytest.approx(
                    getattr(plain, f"label_{figure}")[index], nan_ok=True)


def test_values_count_as_often_as_they_say() -> None:
    part = made_up("regression")
    weights = counts(24)
    weights[1:3] = 0
    weights[1, 5], weights[2, :2] = 3, 1  # one slide only, then two
    found = weighted_regression(part.scores, part.truths, weights.astype(float), names=part.names)
    for row, often in enumerate(weights):
        plain = regression_metrics(np.repeat(part.scores, often, axis=0),
                                   np.repeat(part.truths, often, axis=0))
        for figure in ("r2", "pearson", "spearman", "mae", "rmse"):
            assert found[figure][row] == pytest.approx(getattr(plain, figure), nan_ok=True), figure
            assert found[of_each(figure, "age")][row] == pytest.approx(
                getattr(plain, f"value_{figure}")[1], nan_ok=True)
    assert np.isnan(found["r2"][1]) and np.isnan(found["pearson"][1])


def test_a_constant_prediction_has_no_correlation() -> None:
    truths = np.arange(6.0)[:, None] + 0.1
    found = weighted_regression(np.full((6, 1), 0.3), truths, np.ones((1, 6)), names=["a"])
    assert np.isnan(found["pearson"][0]) and np.isnan(found["spearman"][0])
    assert set(found) == {"r2", "pearson", "spearman", "mae", "rmse"}  # one value: no second set
    part = replace(made_up("regression", 6), truths=np.repeat(truths, 2, axis=1),
                   scores=np.full((6, 2), 0.3, np.float32))
    assert evaluated(part, "regression").estimates["pearson"].reason == "all predictions are equal"


@pytest.mark.parametrize("seed", range(6))
def test_concordance_is_that_of_scikit_survival(seed: int) -> None:
    part = made_up("survival", 30, seed=seed)
    weights = counts(30)
    found = weighted_concordance(part.scores[:, 0], part.truths, weights.astype(float),
                                 strata=part.strata)
    for row, often in enumerate(weights):
        risks, (times, events) = np.repeat(part.scores[:, 0], often), np.repeat(
            part.truths, often, axis=0).T
        expected = concordance_index_censored(events == 1, times, risks)[0]
        assert found[row] == pytest.approx(expected, abs=1e-12)


def test_only_slides_of_one_fold_are_compared() -> None:
    """A shift of one fold's risks changes nothing; over all pairs it would."""
    one, two = made_up("survival"), made_up("survival", seed=1, stem="t")
    shifted = replace(two, scores=two.scores + 100)
    both, moved = (join_folds([one, part], name="pooled") for part in (two, shifted))
    values = [evaluated(part, "survival").estimates["c_index"] for part in (both, moved)]
    assert values[0] == values[1]
    risks, (times, events) = moved.scores[:, 0], moved.truths.T
    everyone = concordance_index_censored(events == 1, times, risks)[0]
    assert abs(everyone - values[1].value) > 0.01
    alone = [sum(pairs.sum() for _, _, pairs in concordant_pairs(
        part.scores[:, 0], part.truths, part.strata)) for part in (one, two)]
    record = pool_tests({0: evaluated(one, "survival"), 1: evaluated(two, "survival")}, "test",
                        VIEWS["survival"], Measuring(resamples=0))
    assert record.pooled is not None
    assert record.pooled.details["comparable_pairs"] == sum(alone)
    assert "within each fold only" in record.note


def test_nothing_to_compare_says_so() -> None:
    part = made_up("survival")
    censored = replace(part, truths=part.truths * (1, 0))
    found = evaluated(censored, "survival")
    assert np.isnan(found.estimates["c_index"].value)
    assert found.estimates["c_index"].reason == "no slide has an event"
    assert found.details["log_rank"]["reason"] == "no slide has an event"
    part = replace(part, truths=np.stack([part.truths[:, 0], np.ones(24)], axis=1))
    singles = [evaluated(replace(part, slide_ids=(f"x{row}",), case_ids=(f"p{row}",),
                                 truths=part.truths[row:row + 1], scores=part.scores[row:row + 1],
                                 strata=np.zeros(1, int), folds=np.ones(1, int)), "survival")
               for row in (0, 4, 8)]
    pooled = pool_tests(dict(enumerate(singles)), "test", VIEWS["survival"], Measuring()).pooled
    assert pooled is not None
    assert pooled.estimates["c_index"].reason == "no two slides of a fold can be compared"


# ---------------------------------------------------------------------------- groups of patients

def test_each_patient_is_in_one_group_by_the_median_of_his_fold() -> None:
    one, two = made_up("survival"), made_up("survival", seed=1, stem="t")
    risks = np.repeat(np.arange(12.0), 2)  # patient number is the risk; two slides each
    one = replace(one, scores=risks[:, None])
    two = replace(two, scores=1000 + risks[:, None], case_ids=tuple(f"q{c[1:]}"
                                                                    for c in two.case_ids))
    found = group_patients(join_folds([one, two], name="pooled"))
    assert len(found.times) == 24 and found.high.sum() == 12
    names = sorted({*one.case_ids}) + sorted({*two.case_ids})
    assert [name for name, high in zip(names, found.high, strict=True) if high] == [
        f"{stem}{number}" for stem in "pq" for number in (10, 11, 6, 7, 8, 9)]
    assert [(group.name, len(group.times)) for group in found.groups()] == [
        ("Low risk", 12), ("High risk", 12)]


def test_a_patient_of_several_folds_is_where_most_put_him() -> None:
    parts = []
    for number in range(3):
        part = made_up("survival", seed=5)  # the same patients thrice
        risk = np.repeat(np.arange(12.0), 2) * (1 if number < 2 else -1)
        parts.append(replace(part, scores=risk[:, None]))
    found = group_patients(join_folds(parts, name="pooled"))
    assert len(found.times) == 12  # nobody counts twice
    assert found.high.tolist() == group_patients(parts[0]).high.tolist()


def test_the_worst_come_first() -> None:
    part = made_up("regression")
    scores = part.truths.astype(np.float32)
    scores[3, 1] += 50
    assert largest_errors(replace(part, scores=scores))[0][:2] == (3, 1)
    times = np.arange(1.0, 11)
    risks = -times
    risks[0] = -99  # the first event at the lowest risk
    part = replace(made_up("survival", 10), scores=risks[:, None],
                   truths=np.stack([times, np.ones(10)], axis=1))
    assert most_discordant(part)[0] == (0, 1.0, 9)
    assert most_discordant(replace(part, scores=-times[:, None])) == []


# ---------------------------------------------------------------------------- the table of views

@pytest.mark.parametrize("task_type", OTHERS)
def test_the_headline_is_that_of_training(task_type: TaskType) -> None:
    part, view = made_up(task_type), VIEWS[task_type]
    objective = build_objective(task_type=task_type, n_outputs=2)
    plain = objective.metrics(part.scores, part.truths).headline()
    estimates = evaluated(part, task_type).estimates
    assert {key: estimates[figure].value for key, figure in view.headline.items()} == (
        pytest.approx(plain))
    for figure in view.large:
        assert estimates[figure].low < estimates[figure].value < estimates[figure].high


@pytest.mark.parametrize("task_type", OTHERS)
def test_columns_are_those_of_the_results_of_training(task_type: TaskType, tmp_path: Path) -> None:
    part = made_up(task_type)
    files = FoldFiles(tmp_path, 0)
    write_results(files, SimpleNamespace(  # type: ignore[arg-type]
        slide_ids=part.slide_ids, truths=part.truths, scores=part.scores), task_type=task_type,
        names=part.names)
    header = next(csv.reader(files.results[1].open()))
    assert header == ["slide_id", *VIEWS[task_type].columns(part)]


@pytest.mark.parametrize("task_type", OTHERS)
@pytest.mark.parametrize("pooled", [True, False])
def test_pictures_and_tables(task_type: TaskType, pooled: bool) -> None:
    view = VIEWS[task_type]
    folds = {number: evaluated(made_up(task_type, seed=number, stem=f"f{number}_",
                                       name=f"fold {number}"), task_type) for number in range(2)}
    results = (pool_tests(folds, "test", view, Measuring(resamples=9)) if pooled else
               Results(folds=folds, pooled=None, note=""))
    assert list(view.draw(results)) == list(view.pictures)
    for section in view.sections(results):
        assert all(len(row) == len(table.columns) for table in section.tables
                   for row in table.rows)
    text = str(view.sections(results))
    assert all(name in text for name in part_names(task_type))
    single = evaluated(replace(made_up(task_type, 2), slide_ids=("a", "a")), task_type)
    view.draw(Results(folds={0: single}, pooled=None, note=""))  # one patient


def part_names(task_type: str) -> tuple[str, ...]:
    return ("Low risk", "High risk") if task_type == "survival" else NAMES[task_type]


@pytest.mark.parametrize("task_type", OTHERS)
def test_no_slide_at_all(task_type: TaskType) -> None:
    part = made_up(task_type)
    empty = replace(part, slide_ids=(), case_ids=(), truths=part.truths[:0],
                    scores=part.scores[:0], strata=part.strata[:0], folds=part.folds[:0])
    found = evaluated(empty, task_type)
    assert found.record()["slides"] == 0
    assert {item.reason for item in found.estimates.values()} == {"no slide was evaluated"}
    results = pool_tests({0: found, 1: evaluated(part, task_type)}, "test", VIEWS[task_type],
                         Measuring(resamples=5))
    assert results.pooled is not None and results.pooled.predictions.n_slides == 24
    VIEWS[task_type].sections(results)
