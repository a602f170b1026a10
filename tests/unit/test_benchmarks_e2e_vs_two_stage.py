"""The comparison of end-to-end and two-stage models: its figures, its seconds, its refusals."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks import e2e_vs_two_stage as benchmark
from utils.errors import Refused
from utils.metrics import binary_auc

N = 60


def scores_of(signal: float, *, seeds: int = 2) -> benchmark.Scores:
    """Two slides a patient; the higher the signal, the surer the probabilities."""
    labels = np.arange(N) // 2 % 2
    found = []
    for seed in range(seeds):
        p = 1 / (1 + np.exp(-(np.random.default_rng(seed).normal(size=N)
                              + signal * (2 * labels - 1))))
        found.append(np.stack([1 - p, p], axis=1))
    return benchmark.Scores([f"p{index // 2}" for index in range(N)], labels, found)


def test_figures_are_means_over_seeds_and_differences_are_paired() -> None:
    scores = {"weak": scores_of(0.5), "same": scores_of(1.5), "strong": scores_of(1.5)}
    found = benchmark.compare(scores)
    mean = np.mean([binary_auc(p[:, 1], scores["weak"].labels) for p in scores["weak"].seeds])
    assert found["weak auc"].value == pytest.approx(mean)
    assert found["weak auc"].low < mean < found["weak auc"].high
    same = found["strong - same auc"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = found["strong - weak auc"]
    assert 0 < better.low < better.value < better.high
    assert better.value == pytest.approx(found["strong auc"].value - mean)


def write_rows(path: Path, *rows: tuple[object, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_predictions_of_the_folds_are_joined_in_the_order_of_slides(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "t.csv", ("case_id", "slide_id", "label"), ("x", "b", 1),
                       ("y", "a", 0), ("y", "c", 1))
    head = ("slide_id", "Y", "Y_hat", "p_0", "p_1")
    folders = []
    for seed, p in enumerate((0.75, 0.25)):
        folder = tmp_path / f"seed_{seed}"
        write_rows(folder / "fold_0.csv", head, ("c", 1.0, 1.0, 1 - p, p))
        write_rows(folder / "fold_1.csv", head, ("a", 0.0, 0.0, 1, 0), ("b", 1.0, 1.0, 0, 1))
        folders.append(folder)
    found = benchmark.gather(folders, 2, table=table)
    assert found.patients == ["y", "x", "y"] and found.labels.tolist() == [0, 1, 1]
    assert [each[2].tolist() for each in found.seeds] == [[0.25, 0.75], [0.75, 0.25]]


def test_seconds_add_up_over_reruns(tmp_path: Path) -> None:
    assert benchmark.all_seconds(2.5, tmp_path / "s.json") == 2.5
    assert benchmark.all_seconds(0, tmp_path / "s.json") == 2.5
    assert benchmark.all_seconds(4, tmp_path / "s.json") == 6.5


@pytest.mark.parametrize(("name", "flag", "remedy"), [("colon", "--data", "give its folder"),
                                                      ("demo", "--demo", "run make demo")])
def test_a_set_that_is_not_there_says_what_to_do(tmp_path: Path, name: str, flag: str,
                                                 remedy: str) -> None:
    with pytest.raises(Refused, match=remedy):
        benchmark.main(["--sets", name, flag, str(tmp_path), "--out", str(tmp_path / "out")])


def test_the_table_has_a_line_a_model_and_a_line_a_difference() -> None:
    options = benchmark.Options(models=("abmil", "e2e_abmilx"), seeds=(1,))
    scores = {"abmil": scores_of(0.5), "e2e_abmilx": scores_of(1.5)}
    lines = benchmark.table_lines("colon", {
        "seconds": {"abmil": 12.0, "e2e_abmilx": 345.0}, "features_seconds": 67.0,
        "figures": {key: vars(value) for key, value in benchmark.compare(scores).items()}}, options)
    assert lines[0].strip() == "colon: 5 folds, seeds 1"
    assert lines[3].startswith("e2e_abmilx ") and lines[3].endswith(" 345")
    assert lines[4].startswith("e2e_abmilx - abmil ") and "+0." in lines[4]
    assert lines[5].endswith("67 s")
