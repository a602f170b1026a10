"""Folds side by side: what a failure costs; and what a fold of another task leaves behind.

The work on one fold of a classification: tests/cli/test_main.py.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.training import COX, ToyModel, make_bag, make_task_bag
from tests.unit.test_utils_tracking import read_scalars
from utils.cross_validation import Environment, run_folds, train_and_test
from utils.distributed import ALONE, Group
from utils.engine import FitFailed
from utils.errors import BrokenFile, ItemFailed, Refused
from utils.fit_options import FitOptions
from utils.folds import FoldFiles, FoldState, fold_state, write_summary
from utils.storage import file_sha256, read_json


def test_in_a_group_only_a_shared_failure_costs_just_the_fold() -> None:
    def work(fold: int, *, error: Exception) -> int:
        if fold == 1:
            raise error
        return fold

    def run(error: Exception) -> list[tuple[int | None, str | None]]:
        return [(one.result, one.error) for one in run_folds(
            work, [0, 1, 2], workers=1, group=Group(rank=0, size=2), arguments={"error": error})]

    assert run(FitFailed("diverged")) == [(0, None), (None, "diverged"), (2, None)]
    with pytest.raises(ItemFailed, match="fold 1: no space left"):
        run(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(BrokenFile):  # this process alone met it: the others wait elsewhere
        run(BrokenFile("damaged"))


def test_a_fold_of_survival(tmp_path: Path) -> None:
    files = FoldFiles(tmp_path / "run_s1", 0)
    files.work.mkdir(parents=True)
    files.split.write_text("")
    bags = [make_task_bag(index, "survival") for index in range(24)]
    train_and_test(
        ToyModel(objective=COX), {"train": bags[:12], "val": bags[12:18], "test": bags[18:]},
        files=files, options=FitOptions(max_epochs=2, accumulate=4), facts={}, description={},
        where=Environment(device=torch.device("cpu"), group=ALONE, threads=1, log_data=True,
                          side_by_side=2, log_dir=tmp_path / "logs"))
    record = read_json(files.record)
    assert record["task_type"] == "survival"
    assert set(record["headline"]["test"]) == {"c_index"}
    table = pd.read_csv(files.results[1])
    assert table.columns.tolist() == ["slide_id", "time", "event", "risk"]
    assert table["time"].tolist() == [bag.target[0] for bag in bags[18:] if bag.target]
    assert not files.results[0].exists()
    write_summary(files.folder, folds=range(1), k=1)
    summary = pd.read_csv(files.folder / "summary.csv", index_col=0)
    assert summary.columns.tolist() == ["folds", "test_c_index", "val_c_index"]
    assert summary["test_c_index"][0] == record["headline"]["test"]["c_index"]
    assert {"train/loss", "val/c_index", "final/test_c_index"} <= set(
        read_scalars(tmp_path / "logs" / "run_s1" / "0"))


def test_weights_and_their_mean_are_both_tested_and_recorded(tmp_path: Path) -> None:
    files = FoldFiles(tmp_path / "run_s1", 0)
    files.work.mkdir(parents=True)
    files.split.write_text("")
    bags = [make_bag(index) for index in range(24)]
    torch.manual_seed(0)
    train_and_test(
        ToyModel(), {"train": bags[:12], "val": bags[12:18], "test": bags[18:]},
        files=files, options=FitOptions(max_epochs=3, lr=0.1, ema=0.9, test_type="both"),
        facts={"encoder": "x"}, description={"spec": {"a": 1}}, where=Environment(
            device=torch.device("cpu"), group=ALONE, threads=1, log_data=True, side_by_side=2))
    record, mean = read_json(files.record), read_json(files.of_mean.record)
    assert files.of_mean.checkpoint.name == "s_0_ema_checkpoint.pt"
    assert set(record["metrics"]) == set(record["headline"]) == {
        "val", "test", "val_ema", "test_ema"}
    assert mean["headline"] == {part: record["headline"][f"{part}_ema"] for part in ("val", "test")}
    for name in ("spec", "settings", "fold", "task_type"):
        assert mean[name] == record[name]
    assert mean["checkpoint_sha256"] == file_sha256(files.of_mean.checkpoint)
    tables = [pd.read_csv(one.results[1]) for one in (files, files.of_mean)]
    assert tables[0]["slide_id"].tolist() == tables[1]["slide_id"].tolist()
    assert not (tables[0]["p_1"] - tables[1]["p_1"]).abs().lt(1e-4).any()
    found = read_scalars(files.work)
    for part, stage in (("final", ""), ("final_ema", "_ema")):
        error = 1 - record["headline"][f"test{stage}"]["acc"]
        assert [value for _, value in found[f"{part}/test_error"]] == pytest.approx([error])
    write_summary(files.folder, folds=range(1), k=1)
    summary = pd.read_csv(files.folder / "summary.csv", index_col=0)
    assert summary["test_acc"][0] == record["headline"]["test"]["acc"]

    def state() -> FoldState:
        return fold_state(files, record["settings"], overwrite=False, readable=lambda slide: False)

    assert state() is FoldState.DONE
    files.of_mean.results[1].rename(tmp_path / "away")
    with pytest.raises(Refused, match="missing or were altered"):
        state()
    files.clear()
    assert state() is FoldState.NEW
    assert sorted(path.name for path in files.folder.iterdir()) == ["0", "summary.csv"]
