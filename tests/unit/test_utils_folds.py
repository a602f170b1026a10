"""Which folds are finished, begun, foreign or of other settings; and the files of a fold."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from utils.engine import Predictions
from utils.errors import Refused
from utils.folds import (
    FoldFiles,
    FoldState,
    check_other_folds,
    finish_fold,
    fold_range,
    fold_rows,
    fold_state,
    write_results,
    write_settings,
    write_summary,
)
from utils.objectives import TaskType
from utils.report import Status
from utils.storage import save_torch, write_text
from utils.training_state import EarlyStopping, TrainingState, save_state

SETTINGS = {"lr": 0.1, "slides": "abc", "left_out": []}
ANSWERS = Predictions(["0001", "b"], np.array([[1.0], [0.0]]),
                      np.array([[0.25, 0.75], [0.4, 0.6]], np.float32), [])


def make_fold(folder: Path, fold: int = 0, *, failures: dict[str, str] | None = None,
              settings: dict[str, Any] = SETTINGS, task_type: TaskType = "classification",
              headline: dict[str, dict[str, float | None]] | None = None) -> FoldFiles:
    files = FoldFiles(folder, fold)
    files.work.mkdir()
    save_torch(files.checkpoint, {"w": torch.ones(2)})
    write_text(files.split, ",train,val,test\n")
    write_results(files, ANSWERS, task_type=task_type)
    finish_fold(files, {
        "settings": settings, "failures": failures or {}, "task_type": task_type,
        "headline": headline or {"test": {"auc": 0.9, "acc": 0.8},
                                 "val": {"auc": None, "acc": 0.5}}})
    return files


def begin_fold(folder: Path, settings: dict[str, Any] = SETTINGS) -> FoldFiles:
    files = FoldFiles(folder, 0)
    files.work.mkdir()
    save_state(files.work, TrainingState(parameters=settings, next_epoch=1, model={}, optimiser={},
                                         scaler={}, stopping=EarlyStopping()))
    return files


def state(files: FoldFiles, *, overwrite: bool = False, readable: bool = False,
          settings: dict[str, Any] = SETTINGS) -> FoldState:
    return fold_state(files, settings, overwrite=overwrite, readable=lambda slide: readable)


@pytest.mark.parametrize(("start", "end", "expected"), [
    (-1, -1, range(5)), (2, -1, range(2, 5)), (-1, 3, range(3)), (1, 2, range(1, 2))])
def test_fold_range(start: int, end: int, expected: range) -> None:
    assert fold_range(5, k_start=start, k_end=end) == expected


@pytest.mark.parametrize(("start", "end"), [(3, 3), (0, 6), (5, -1), (4, 2)])
def test_fold_range_refuses_what_is_none(start: int, end: int) -> None:
    with pytest.raises(Refused, match="k_end is not included"):
        fold_range(5, k_start=start, k_end=end)


def test_states_of_a_fold(tmp_path: Path) -> None:
    assert state(FoldFiles(tmp_path, 7)) is FoldState.NEW
    files = begin_fold(tmp_path)
    assert state(files) is FoldState.STARTED
    files.work.joinpath("state.pt").unlink()
    files.work.rmdir()
    assert state(make_fold(tmp_path)) is FoldState.DONE


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    files = make_fold(tmp_path)
    other = {**SETTINGS, "lr": 0.2}
    with pytest.raises(Refused, match=r"lr: file has 0.1, you ask 0.2.*--overwrite"):
        state(files, settings=other)
    assert state(files, settings=other, overwrite=True) is FoldState.REPLACED
    assert state(files, overwrite=True) is FoldState.DONE  # equal ones are kept


def test_a_begun_fold_of_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="was begun with other settings"):
        state(begin_fold(tmp_path), settings={**SETTINGS, "lr": 0.2})


@pytest.mark.parametrize("damage", ["alter", "truncate", "lose results", "lose split"])
def test_altered_files_do_not_count_as_finished(tmp_path: Path, damage: str) -> None:
    files = make_fold(tmp_path)
    if damage == "alter":
        save_torch(files.checkpoint, {"w": torch.zeros(2)})
    elif damage == "truncate":
        files.checkpoint.write_bytes(files.checkpoint.read_bytes()[:100])
    else:
        (files.results[1] if damage == "lose results" else files.split).unlink()
    with pytest.raises(Refused, match="missing or were altered"):
        state(files)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    files = make_fold(tmp_path)
    files.record.write_text('{"settings": ')
    with pytest.raises(Refused, match="damaged record"):
        state(files)


def test_a_checkpoint_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    files = FoldFiles(tmp_path, 0)
    save_torch(files.checkpoint, {})
    with pytest.raises(Refused, match="unknown origin"):
        state(files)
    assert state(files, overwrite=True) is FoldState.REPLACED


def test_a_slide_that_can_be_read_again_asks_for_retraining(tmp_path: Path) -> None:
    files = make_fold(tmp_path, failures={"s1": "damaged"})
    assert state(files) is FoldState.DONE
    with pytest.raises(Refused, match="without s1, which can be read now"):
        state(files, readable=True)


def test_clear_removes_everything_of_the_fold(tmp_path: Path) -> None:
    files = make_fold(tmp_path)
    make_fold(tmp_path, 1)
    for one in (files, files.of_mean):  # of --test_type both and --save_top_k
        for path in (one.checkpoint, one.record, *one.results,
                     one.checkpoint.with_name(f"{one.checkpoint.stem}_epoch_3.pt")):
            path.touch()
    files.clear()
    assert state(files) is FoldState.NEW
    assert not list(tmp_path.glob("s*_0_*"))
    assert state(FoldFiles(tmp_path, 1)) is FoldState.DONE


def test_folds_outside_the_run_must_have_equal_settings(tmp_path: Path) -> None:
    make_fold(tmp_path, 3, settings={
        **SETTINGS, "slides": "another split", "left_out": ["x"], "class_weights": [1, 2],
        "bin_edges": [0, 1], "target_mean": [3], "target_std": [4]})
    check_other_folds(tmp_path, range(2), {**SETTINGS, "class_weights": [2, 1]})
    check_other_folds(tmp_path, range(4), {**SETTINGS, "lr": 0.2})  # fold 3 is in the run
    with pytest.raises(Refused, match="fold 3 .*lr: file has 0.1"):
        check_other_folds(tmp_path, range(2), {**SETTINGS, "lr": 0.2})


def test_results_in_both_forms(tmp_path: Path) -> None:
    files = FoldFiles(tmp_path, 4)
    write_results(files, ANSWERS)
    assert [path.name for path in files.results] == ["split_4_results.pkl", "split_4_results.csv"]
    stored = pickle.loads(files.results[0].read_bytes())  # noqa: S301 (our own, just written)
    assert list(stored) == ["0001", "b"]
    entry = stored["0001"]
    assert set(entry) == {"slide_id", "prob", "label"}
    assert entry["slide_id"].shape == ()
    assert entry["slide_id"].item() == "0001"
    assert (entry["prob"].shape, entry["prob"].dtype) == ((1, 2), np.float32)
    assert type(entry["label"]) is int
    assert files.results[1].read_text() == (
        "slide_id,Y,Y_hat,p_0,p_1\n0001,1,1,0.25,0.75\nb,0,1,0.4,0.6\n")


def test_results_of_an_empty_test_split(tmp_path: Path) -> None:
    files = FoldFiles(tmp_path, 0)
    write_results(files, Predictions([], np.zeros((0, 1)), np.zeros((0, 2), np.float32), []))
    assert files.results[1].read_text() == "slide_id,Y,Y_hat,p_0,p_1\n"


@pytest.mark.parametrize(("task_type", "truths", "scores", "names", "expected"), [
    ("multilabel", [[1, np.nan]], [[0.5, 0.25]], ["a", "b"],
     "slide_id,y_a,y_b,p_0,p_1\ns,1.0,,0.5,0.25\n"),
    ("multilabel", [[1, 0]], [[0.5, 0.25]], [], "slide_id,y_0,y_1,p_0,p_1\ns,1.0,0.0,0.5,0.25\n"),
    ("regression", [[3]], [[2.5]], ["size"], "slide_id,y_0,yhat_0\ns,3.0,2.5\n"),
    ("survival", [[12, 1]], [[-1.5, 0.75, 0.5]], [],
     "slide_id,time,event,risk,S_1,S_2\ns,12.0,1.0,-1.5,0.75,0.5\n")])
def test_results_of_other_tasks(tmp_path: Path, task_type: TaskType, truths: list[list[float]],
                                scores: list[list[float]], names: list[str], expected: str) -> None:
    files = FoldFiles(tmp_path, 0)
    write_results(files, Predictions(["s"], np.array(truths, np.float64),
                                     np.array(scores, np.float32), []),
                  task_type=task_type, names=names)
    as_pickle, as_csv = files.results
    assert as_csv.read_text() == expected
    assert not as_pickle.exists()


def test_a_fold_of_another_task_needs_no_pickle_and_has_its_own_columns(tmp_path: Path) -> None:
    files = make_fold(tmp_path, task_type="regression", headline={
        "test": {"r2": 0.5, "mae": 2.0}, "val": {"r2": None, "mae": 3.0}})
    assert state(files) is FoldState.DONE
    write_summary(tmp_path, folds=range(1), k=1)
    assert (tmp_path / "summary.csv").read_text().splitlines() == [
        ",folds,test_r2,val_r2,test_mae,val_mae", "0,0,0.5,,2.0,3.0"]


def test_summary_without_any_finished_fold(tmp_path: Path) -> None:
    write_summary(tmp_path, folds=range(2), k=2)
    assert (tmp_path / "summary.csv").read_text().splitlines() == [",folds", "0,0", "1,1"]

def test_summary_names_columns_and_gaps(tmp_path: Path) -> None:
    make_fold(tmp_path, 0)
    make_fold(tmp_path, 1)
    text = write_summary(tmp_path, folds=range(2), k=2)
    assert (tmp_path / "summary.csv").read_text().splitlines() == [
        ",folds,test_auc,val_auc,test_acc,val_acc", "0,0,0.9,,0.8,0.5", "1,1,0.9,,0.8,0.5"]
    assert "0.9000 ± 0.0000" in text
    assert "not defined" in text  # no validation AUC anywhere
    write_summary(tmp_path, folds=range(1, 3), k=5)
    table = pd.read_csv(tmp_path / "summary_partial_1_3.csv", index_col=0)
    assert table["folds"].tolist() == [1, 2]
    assert np.isnan(table["test_auc"][1])  # fold 2 failed, or is yet to come


def test_rows_say_what_a_fold_had_to_do_without(tmp_path: Path) -> None:
    files = make_fold(tmp_path, failures={"s1": "damaged"})
    first, second = fold_rows(files, status=Status.SKIPPED)
    assert (first.item, first.status, first.numbers["test_auc"]) == ("fold 0", Status.SKIPPED, 0.9)
    assert (second.item, second.status, second.reason) == ("s1", Status.FAILED, "damaged")


def test_settings_file_is_a_python_dictionary_with_clams_keys(tmp_path: Path) -> None:
    options = dict.fromkeys((
        "k", "k_start", "k_end", "max_epochs", "results_dir", "lr", "reg", "label_frac",
        "bag_loss", "seed", "model_size", "drop_out", "weighted_sample", "opt", "embed_dim",
        "early_stopping", "subtyping", "no_inst_cluster", "bag_weight", "inst_loss", "B"), 1)
    common = {"num_splits", "k_start", "k_end", "task", "max_epochs", "results_dir", "lr",
              "experiment", "reg", "label_frac", "bag_loss", "seed", "model_type", "model_size",
              "use_drop_out", "weighted_sample", "opt", "split_dir", "embed_dim",
              "early_stopping", "subtyping", "no_inst_cluster"}
    for model, extra in (("clam_sb", {"bag_weight", "inst_loss", "B"}), ("mil", set())):
        write_settings(tmp_path, model, {**options, "model_type": model}, task="t",
                       split_dir=Path("splits/t_100"))
        found = ast.literal_eval((tmp_path / f"experiment_{model}.txt").read_text())
        assert set(found) == common | extra
        assert found["split_dir"] == "splits/t_100"
    for task_type, expected in ((None, "ce"), ("survival", "nll_surv")):
        write_settings(tmp_path, "x", {**options, "model_type": "abmil", "bag_loss": None,
                                       "task_type": task_type}, task="t", split_dir=Path("s"))
        found = ast.literal_eval((tmp_path / "experiment_x.txt").read_text())
        assert found["bag_loss"] == expected
