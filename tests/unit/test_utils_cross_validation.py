"""Folds side by side: what a failure costs; and what a fold of another task leaves behind.

The work on one fold of a classification: tests/cli/test_main.py.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.training import COX, ToyModel, make_task_bag
from tests.unit.test_utils_tracking import read_scalars
from utils.cross_validation import Environment, run_folds, train_and_test
from utils.distributed import ALONE, Group
from utils.engine import FitFailed
from utils.errors import BrokenFile, ItemFailed
from utils.fit_options import FitOptions
from utils.folds import FoldFiles, write_summary
from utils.storage import read_json


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
                          progress=False, log_dir=tmp_path / "logs"))
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
