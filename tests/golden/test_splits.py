"""Splits equal to the original's: ids, order, and the bytes of every file.

``splits.json`` holds numbers made by running the original (see the golden README); the tables that
it ran on lie beside the checkout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from datasets.splits import Drawing, Split, draw_clam, make_splits, read_split, split_files
from datasets.table import SlideTable, load_table
from datasets.tasks import Task, load_task
from tests.conftest import GOLDEN, ROOT

FACTS = json.loads((GOLDEN / "splits.json").read_text())
RUNS = [pytest.param(run, id=run["folder"]) for run in FACTS["runs"]]


def task_of(run: dict[str, Any], shared: Path) -> Task:
    return load_task(run["task"], csv_path=shared / "data" / "csv" / f"clam_{run['csv']}",
                     tasks_file=ROOT / "dataset_csv" / "tasks.yaml")


@pytest.mark.parametrize("case", FACTS["generator"],
                         ids=lambda case: f"seed{case['seed']}-frac{case['label_frac']}")
def test_the_generator_draws_the_same_ids_in_the_same_order(case: dict[str, Any]) -> None:
    draws = draw_clam(
        [np.array(ids) for ids in case["class_ids"]], val_num=case["val_num"],
        test_num=case["test_num"], n_splits=case["n_splits"], seed=case["seed"],
        label_frac=case["label_frac"], custom_test_ids=case["custom_test_ids"])
    assert [[part.tolist() for part in draw] for draw in draws] == case["splits"]


@pytest.mark.parametrize("run", RUNS)
def test_splits_and_files_of_both_tasks(run: dict[str, Any], shared: Path) -> None:
    task = task_of(run, shared)
    table = load_table(task)
    splits = make_splits(table, Drawing(
        n_splits=run["k"], seed=run["seed"], val_frac=run["val_frac"],
        test_frac=run["test_frac"], label_frac=run["label_frac"],
        patient_voting=task.patient_voting))
    assert len(splits) == len(run["splits"]) == 3
    for fold, (split, expected) in enumerate(zip(splits, run["splits"], strict=True)):
        for part, ids in split.parts().items():
            assert list(ids) == expected[part]["slide_ids"]
        for form, sha256 in expected["sha256"].items():
            text = split_files(fold, split, table)[f"splits_{fold}{form}.csv"]
            assert hashlib.sha256(text.encode()).hexdigest() == sha256


def test_the_script_writes_the_same_bytes(
        shared: Path, tmp_path: Path, run_script: Callable[..., CompletedProcess[str]]) -> None:
    run = FACTS["runs"][4]
    done = run_script("create_splits_seq.py", "--task", run["task"], "--label_frac",
                      run["label_frac"], "--seed", run["seed"], "--k", run["k"], "--splits_root",
                      tmp_path, "--csv_path", shared / "data" / "csv" / f"clam_{run['csv']}")
    assert done.returncode == 0, done.stderr
    for fold, expected in enumerate(run["splits"]):
        for form, sha256 in expected["sha256"].items():
            data = (tmp_path / run["folder"] / f"splits_{fold}{form}.csv").read_bytes()
            assert hashlib.sha256(data).hexdigest() == sha256


def test_a_shipped_split_file_of_the_original_reads(shared: Path) -> None:
    table = load_table(task_of(FACTS["runs"][1], shared))
    expected = FACTS["runs"][1]["splits"][0]
    for form in ("", "_bool"):
        found = read_split(shared / "data" / "csv" / f"clam_task1_splits_0{form}.csv", table)
        for part, ids in found.parts().items():
            assert set(ids) == set(expected[part]["slide_ids"])
            assert list(ids) == sorted(ids, key=table.row_of.__getitem__)


def test_the_descriptor_counts_right_where_the_original_shifts() -> None:
    """Class B has no validation slide; the original wrote C's number in B's place."""
    case = FACTS["descriptor_defect"][0]
    labels, ids, parts = [], [], {}
    for part, counts in case["true_counts"].items():
        parts[part] = []
        for name, count in counts.items():
            for number in range(count):
                parts[part].append(f"{part}_{name}_{number}")
                labels.append("ABC".index(name))
        ids += parts[part]
    table = SlideTable(tuple(ids), tuple(ids), np.array(labels), ("A", "B", "C"))
    split = Split(*(tuple(parts[part]) for part in ("train", "val", "test")))
    rows = split_files(0, split, table)["splits_0_descriptor.csv"].splitlines()[1:]
    found = {row.split(",")[0]: [int(cell) for cell in row.split(",")[1:]] for row in rows}
    assert found == {name: [case["true_counts"][part].get(name, 0)
                            for part in ("train", "val", "test")] for name in "ABC"}
    wrong = case["original_descriptor (wrong, do not copy)"]["val"]
    assert {name: numbers[1] for name, numbers in found.items()} != wrong
