"""Pooling, the order of errors, and the two tables that CLAM's readers expect."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import GOLDEN
from utils.errors import Refused
from utils.evaluation import (
    Evaluation,
    FoldPredictions,
    Measuring,
    Results,
    average_folds,
    evaluate_predictions,
    pool_tests,
)
from utils.evaluation_classes import CLASSIFICATION, wrong_slides
from utils.evaluation_files import (
    EvaluationFiles,
    find_finished,
    name_files,
    remove_replaced,
    remove_run,
    write_fold_table,
    write_summary,
)
from utils.storage import write_json, write_text

CASES = {case["name"]: case for case in json.loads((GOLDEN / "metrics.json").read_text())["cases"]}


def fold(slides: str, labels: list[int], p1: list[float], name: str = "fold 0") -> FoldPredictions:
    p = np.array(p1, np.float32)
    return predictions(name, tuple(slides), labels, np.stack([1 - p, p], axis=1).reshape(-1, 2))


def predictions(name: str, ids: tuple[str, ...], labels: list[int], p: np.ndarray
                ) -> FoldPredictions:
    return FoldPredictions(
        name=name, slide_ids=ids, case_ids=tuple(slide.upper() for slide in ids),
        truths=np.array(labels, float).reshape(-1, 1), scores=p,
        names=tuple(f"class {index}" for index in range(p.shape[1])),
        strata=np.zeros(len(ids), int), folds=np.ones(len(ids), int))


def golden_fold(name: str) -> FoldPredictions:
    case = CASES[name]
    ids = tuple(f"slide_{number}" for number in range(len(case["labels"])))
    return predictions("fold 0", ids, case["labels"], np.array(case["probs"], np.float32))


def measured(one: FoldPredictions) -> Evaluation:
    return evaluate_predictions(one, CLASSIFICATION, Measuring(resamples=20))


def test_pooling_averages_slides_tested_several_times() -> None:
    pooled, _ = average_folds(
        [fold("ab", [0, 1], [0.2, 0.6]), fold("bc", [1, 0], [0.8, 0.1], "fold 1")])
    assert pooled.slide_ids == ("a", "b", "c") and pooled.case_ids == ("A", "B", "C")
    assert pooled.folds.tolist() == [1, 2, 1] and pooled.truths.tolist() == [[0], [1], [0]]
    np.testing.assert_allclose(pooled.scores[:, 1], [0.2, 0.7, 0.1], atol=1e-7)


def test_only_test_slides_of_several_folds_are_pooled() -> None:
    two = {0: measured(fold("ab", [0, 1], [0.2, 0.6])), 1: measured(fold("bc", [1, 0], [0.8, 0.1]))}
    results = pool_tests(two, "test", CLASSIFICATION, Measuring(resamples=0))
    assert results.pooled is not None and results.pooled.predictions.n_slides == 3
    assert "1 of them" in results.note and len(results.shown) == 3
    for part in ("train", "val", "all"):
        results = pool_tests(two, part, CLASSIFICATION, Measuring())
        assert results.pooled is None and f"'{part}'" in results.note
    single = pool_tests({0: two[0]}, "test", CLASSIFICATION, Measuring())
    assert single == Results(folds={0: two[0]}, pooled=None,
                             note="One fold, so there is nothing to pool.")


def test_surest_errors_come_first() -> None:
    found = fold("abcd", [0, 0, 1, 1], [0.6, 0.9, 0.3, 0.9])
    assert wrong_slides(found) == [1, 2, 0]
    assert wrong_slides(found, most=1) == [1]


@pytest.mark.parametrize("name", ["binary", "binary with tied probabilities", "three classes",
                                  "binary, only class 1 present"])
def test_tables_are_those_of_the_original(tmp_path: Path, name: str) -> None:
    expected, one = CASES[name]["eval_py_summary"], golden_fold(name)
    write_fold_table(tmp_path / "fold_0.csv", one, CLASSIFICATION)
    rows = list(csv.reader((tmp_path / "fold_0.csv").open()))
    assert rows[0] == expected["csv_columns"]
    assert rows[1] == expected["csv_first_row"]
    results = Results(folds={3: measured(one)}, pooled=None, note="")
    write_summary(tmp_path / "summary.csv", results, CLASSIFICATION)
    rows = list(csv.reader((tmp_path / "summary.csv").open()))
    assert rows[0] == ["", "folds", "test_auc", "test_acc"]
    assert rows[1][:2] == ["0", "3"]
    assert float(rows[1][2]) == pytest.approx(expected["auc"], abs=1e-12)
    assert float(rows[1][3]) == pytest.approx(1 - expected["test_error"], abs=1e-12)


def test_the_record_says_why_a_figure_is_missing() -> None:
    record = measured(golden_fold("binary, only class 1 present")).record()
    auc = record["metrics"]["auc"]
    assert math.isnan(auc["value"]) and auc["reason"] == "only class 1 has slides"
    assert record["class_accuracy"][0] is None and record["auc_delong_over_slides"] is None


def test_no_prediction_at_all_is_no_crash() -> None:
    empty = measured(fold("", [], []))
    assert empty.record()["slides"] == 0
    assert empty.estimates["auc"].reason == "no slide was evaluated"


# ---------------------------------------------------------------------------- finished runs

IDENTITY = {"settings": {"split": "test"}, "models": {"0": {"sha256": "x"}}, "inputs": {"0": "i"}}


def finished(folder: Path, identity: dict = IDENTITY, k: int = 1) -> EvaluationFiles:
    from utils.storage import file_sha256

    files = name_files(folder, "e", [0], k=k, plots=(), with_report=False)
    for name in files.names():
        write_text(folder / name, name)
    write_json(files.metrics, {"identity": identity, "failed": {}, "files": {
        name: file_sha256(folder / name) for name in files.names()}})
    return files


def test_finished_means_equal_and_intact(tmp_path: Path) -> None:
    files = finished(tmp_path)
    assert find_finished(files, IDENTITY, overwrite=False) is not None
    assert find_finished(files, {**IDENTITY, "inputs": {"0": "changed"}}, overwrite=False) is None
    (tmp_path / "fold_0.csv").write_text("altered")
    assert find_finished(files, IDENTITY, overwrite=False) is None
    finished(tmp_path)
    (tmp_path / "summary.csv").unlink()
    assert find_finished(files, IDENTITY, overwrite=False) is None


@pytest.mark.parametrize(("part", "value"), [("settings", {"split": "val"}),
                                             ("models", {"0": {"sha256": "y"}})])
def test_another_evaluation_is_kept_unless_overwritten(tmp_path: Path, part: str,
                                                       value: dict) -> None:
    files = finished(tmp_path)
    (tmp_path / "notes of mine.txt").write_text("keep")
    with pytest.raises(Refused, match="--overwrite"):
        find_finished(files, {**IDENTITY, part: value}, overwrite=False)
    assert files.metrics.exists()
    assert find_finished(files, {**IDENTITY, part: value}, overwrite=True) is None
    assert files.metrics.exists()
    remove_replaced(files, {**IDENTITY, part: value})
    assert [path.name for path in tmp_path.iterdir()] == ["notes of mine.txt"]


def test_ranges_of_folds_share_a_folder_of_equal_settings(tmp_path: Path) -> None:
    first = finished(tmp_path, k=2)
    assert first.metrics.name == "metrics_partial_0_0.json"
    second = name_files(tmp_path, "e", [1], k=2, plots=["roc.png"], with_report=True)
    assert "plots_partial_1_1/roc.png" in second.names()
    models = {"1": {"sha256": "z"}}
    assert find_finished(second, {**IDENTITY, "models": models}, overwrite=False) is None
    with pytest.raises(Refused, match="metrics_partial_0_0.json"):
        find_finished(second, {**IDENTITY, "settings": {}, "models": models}, overwrite=False)


def test_a_record_cannot_remove_files_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "precious").write_text("keep")
    outside = {"../precious": "", str(tmp_path / "precious"): ""}
    write_json(folder / "metrics.json", {"files": outside})
    remove_run(folder / "metrics.json")
    assert (tmp_path / "precious").exists() and not (folder / "metrics.json").exists()
