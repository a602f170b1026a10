"""The benchmark on the classical MIL sets: its files, folds, standardisation, results, table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import mil_datasets
from benchmarks._mil_sets import CLIP, MilSet, find_sets, read_set, standardised, stratified_folds
from models.slide_models import SlideModelSpec, build_slide_model
from utils.errors import EXIT_FAILED, EXIT_OK, Refused
from utils.storage import read_json


def toy_set(path: Path, *, bags: int = 12, signal: float = 6.0) -> Path:
    """Bags of 1 to 4 instances of width 5; the first of label 1 stand out by ``signal``."""
    random = np.random.default_rng(0)
    sizes = random.integers(1, 5, bags)
    ids = np.repeat(np.arange(bags), sizes)
    y = np.arange(bags) % 2
    x = random.normal(size=(len(ids), 5))
    x[np.searchsorted(ids, np.flatnonzero(y))] += signal
    np.savez(path, X=x.astype(np.float32), bag=ids, y=y)
    return path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe with two epochs."""
    monkeypatch.setitem(mil_datasets.RECIPE, "max_epochs", 2)


# ---------------------------------------------------------------------------- sets

def test_labels_belong_to_the_ids_in_order_wherever_their_rows_are(tmp_path: Path) -> None:
    rows = np.arange(10.0).reshape(5, 2)
    np.savez(tmp_path / "fox.npz", X=rows, bag=[30, 10, 30, 20, 10], y=[1, -1, 1])
    found = read_set(tmp_path / "fox.npz")
    assert (found.name, found.n_classes, found.dims) == ("fox", 2, 2)
    assert found.labels.tolist() == [1, 0, 1]
    assert [bag[:, 0].tolist() for bag in found.bags] == [[2, 8], [6], [0, 4]]
    assert found.bags[0].dtype == np.float32


@pytest.mark.parametrize(("change", "message"), [
    ({"X": None}, "not a MIL set"),
    ({"y": np.array([0, 1])}, "12 ids, y (2,)"),
    ({"bag": np.arange(3)}, "bag (3,)"),
    ({"X": np.zeros(4)}, "X (4,)"),
    ({"X": "nan"}, "not finite, first in row 1"),
    ({"y": np.zeros(12)}, "one label only"),
    ({"y": np.array([{}] * 12)}, "not a MIL set"),
    ({"X": "text"}, "expected X (instances, dims)"),
])
def test_another_layout_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with np.load(toy_set(tmp_path / "toy.npz")) as file:
        content = dict(file)
    for key, value in change.items():
        if isinstance(value, str) and value == "nan":
            content[key][1, 2] = np.nan
        else:
            content[key] = np.full(content[key].shape, "a") if isinstance(value, str) else value
    np.savez(tmp_path / "bad.npz", **{key: value for key, value in content.items()
                                      if value is not None})
    with pytest.raises(Refused) as refused:
        read_set(tmp_path / "bad.npz")
    assert message in str(refused.value)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("text", b"hello"), ("cut", b"PK\x03\x04broken")):
        (tmp_path / f"{name}.npz").write_bytes(data)
        with pytest.raises(Refused, match="not a MIL set"):
            read_set(tmp_path / f"{name}.npz")


def test_sets_are_all_files_or_those_asked_for(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"holds no \.npz file"):
        find_sets(tmp_path, ())
    for name in ("b", "a"):
        toy_set(tmp_path / f"{name}.npz")
    assert [path.stem for path in find_sets(tmp_path, ())] == ["a", "b"]
    assert [path.stem for path in find_sets(tmp_path, ("b",))] == ["b"]
    with pytest.raises(Refused, match="holds a, b"):
        find_sets(tmp_path, ("c",))


def test_every_bag_is_tested_once_and_labels_are_spread_evenly() -> None:
    labels = np.array([0] * 23 + [1] * 17)
    parts = list(stratified_folds(labels, 10, seed=3))
    assert sorted(np.concatenate([test for _, test in parts])) == list(range(40))
    for train, test in parts:
        assert sorted([*train, *test]) == list(range(40))
        assert 1 <= labels[test].sum() <= 2
    others = stratified_folds(labels, 10, seed=4)
    assert any(set(test) != set(other) for (_, test), (_, other) in zip(parts, others, strict=True))


def test_standardisation_sees_training_bags_only_and_is_cut_off() -> None:
    random = np.random.default_rng(0)
    bags = [random.normal(3, 2, size=(50, 4)).astype(np.float32) for _ in range(6)]
    for bag in bags:
        bag[:, 3] = 7
    bags[5][0] = [100, -100, 3, 8]
    made = standardised(MilSet("toy", bags, np.arange(6) % 2), np.arange(5))
    seen = np.concatenate([bag.features.numpy() for bag in made[:5]])[:, :3]
    assert abs(seen.mean()) < 0.02 and abs(seen.std() - 1) < 0.05
    tested = made[5].features.numpy()
    assert tested[0, :2].tolist() == [CLIP, -CLIP] and abs(tested[1:, :3]).max() <= CLIP
    assert (tested[0, 3], tested[1, 3]) == (1, 0)  # constant in training: only centred
    assert [bag.label for bag in made] == [0, 1, 0, 1, 0, 1]


# ---------------------------------------------------------------------------- runs

def test_the_recipe_learns(tmp_path: Path) -> None:
    job = mil_datasets.Job(toy_set(tmp_path / "toy.npz", bags=16), "abmil", 0)
    found = mil_datasets.cross_validate(job, folds=2, seed=1)
    assert len(found["accuracy"]) == 2 and np.mean(found["accuracy"]) >= 0.8
    assert found["auc"] >= 0.9


@pytest.mark.usefixtures("short")
def test_equal_seeds_give_equal_numbers_and_a_repeat_has_others(tmp_path: Path) -> None:
    job = mil_datasets.Job(toy_set(tmp_path / "toy.npz", signal=0.0), "abmil", 0)
    first, again, repeat, seed = (
        (found["accuracy"], found["auc"]) for found in (
            mil_datasets.cross_validate(which, folds=2, seed=seed)
            for which, seed in ((job, 1), (job, 1), (job._replace(repeat=1), 1), (job, 2))))
    assert first == again
    assert first != repeat != seed != first


@pytest.mark.usefixtures("short")
def test_results_are_kept_until_their_settings_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_set(tmp_path / "musk1.npz")
    done: list[mil_datasets.Job] = []
    original = mil_datasets.cross_validate

    def counted(job: mil_datasets.Job, **keywords: int) -> dict[str, Any]:
        done.append(job)
        return original(job, **keywords)

    monkeypatch.setattr(mil_datasets, "cross_validate", counted)
    out = tmp_path / "results.json"

    def run(*more: str) -> int:
        done.clear()
        return mil_datasets.main(["--data", str(tmp_path), "--folds", "2", "--workers", "0",
                                  "--out", str(out), *more])

    assert run("--models", "abmil", "mean", "--repeats", "2") == EXIT_OK
    assert len(done) == len(read_json(out)) == 4
    assert "0.900 +- 0.050" in capsys.readouterr().out
    assert run("--models", "abmil", "max", "--repeats", "2") == EXIT_OK
    assert [job.model for job in done] == ["max", "max"] and len(read_json(out)) == 6
    capsys.readouterr()
    assert run("--models", "abmil", "--repeats", "1", "--seed", "2") == EXIT_OK
    assert len(done) == 1 and len(read_json(out)) == 6
    said = capsys.readouterr().out
    assert "1 results of" in said and "(seed: file has 1, you ask 2)" in said
    assert run("--models", "max", "--repeats", "2") == EXIT_OK and not done
    with np.load(toy_set(tmp_path / "other.npz", signal=1.0)) as file:
        np.savez(tmp_path / "musk1.npz", **file)  # other data under the same name
    (tmp_path / "other.npz").unlink()
    assert run("--models", "max", "--repeats", "1") == EXIT_OK and len(done) == 1


def test_an_out_file_of_something_else_is_refused(tmp_path: Path) -> None:
    toy_set(tmp_path / "toy.npz", bags=24)
    for content in ("{", '[{"set": 1}]', "[3]"):
        (tmp_path / "out.json").write_text(content)
        with pytest.raises(Refused, match="give another --out"):
            mil_datasets.main(["--data", str(tmp_path), "--folds", "2", "--workers", "0",
                               "--out", str(tmp_path / "out.json")])
        assert (tmp_path / "out.json").read_text() == content


@pytest.mark.usefixtures("short")
def test_a_failing_model_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_set(tmp_path / "toy.npz")
    monkeypatch.setitem(mil_datasets.MODELS, "mean", {"model_type": "transmil",
                                                      "options": {"inner_dim": 7}})
    code = mil_datasets.main(["--data", str(tmp_path), "--folds", "2", "--workers", "0", "--models",
                              "mean", "max", "--repeats", "1", "--out", str(tmp_path / "r.json")])
    assert code == EXIT_FAILED
    said = capsys.readouterr()
    assert "toy mean repeat 0: failed: model: inner_dim is 7" in said.err
    assert [record["model"] for record in read_json(tmp_path / "r.json")] == ["max"]


def test_more_folds_than_bags_of_a_label_are_refused(tmp_path: Path) -> None:
    toy_set(tmp_path / "toy.npz", bags=12)
    with pytest.raises(Refused, match="only 6 bags of one label: give --folds 6"):
        mil_datasets.main(["--data", str(tmp_path), "--workers", "0"])


@pytest.mark.parametrize("name", mil_datasets.MODELS)
def test_every_model_of_the_table_can_be_built(name: str) -> None:
    build_slide_model(SlideModelSpec(embed_dim=166, n_classes=2, **mil_datasets.MODELS[name]))


def test_the_help_names_every_flag(run_script: Callable[..., Any]) -> None:
    said = run_script("benchmarks/mil_datasets.py", "--help").stdout
    assert all(f"--{flag}" in said for flag in (
        "data", "models", "sets", "repeats", "folds", "seed", "workers", "out"))


# ---------------------------------------------------------------------------- the table

def records(accuracy: list[list[float]]) -> list[dict[str, Any]]:
    return [{"accuracy": folds, "auc": 0.9} for folds in accuracy]


def test_a_line_has_both_standard_errors_and_the_papers_figure() -> None:
    line = mil_datasets.line_of("elephant", "abmil", records([[0.8, 0.9], [0.7, 0.8]]))
    # repeats 0.85 and 0.75: sd 0.0707 / sqrt 2; folds: sd 0.0816 / sqrt 4
    assert "0.800 +- 0.050 (2) / 0.041 (4)" in line
    assert line.endswith("0.857 +- 0.027: BELOW its error")
    better = mil_datasets.line_of("Elephant", "abmil", records([[0.831, 0.831]]))
    assert better.endswith("0.857 +- 0.027: within its error")


def test_sets_and_models_that_are_not_in_the_paper_have_no_verdict() -> None:
    for name, model in (("elephant", "dsmil"), ("web", "abmil")):
        assert "its error" not in mil_datasets.line_of(name, model, records([[0.5, 0.5]]))
    assert set(mil_datasets.PAPER) <= set(mil_datasets.MODELS)
