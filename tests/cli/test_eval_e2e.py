"""eval.py with end-to-end models: all patches of a slide, the figures of main.py, every flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import eval as script
import main
from tests.cli.test_main_e2e import LABELS, flags, predictions, write_slides
from tests.conftest import ROOT
from tests.patch_cohort import LOW, database, write_patch_cohort
from tests.unit.test_utils_distributed import torchrun
from utils.errors import Refused
from utils.storage import read_json


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen slides, and a model of theirs and its running mean, trained at two scales."""
    root = write_patch_cohort(tmp_path_factory.mktemp("cohort"), slides=13)
    more = ("--patches_low", database(root, LOW), "--ema", 0.8, "--test_type", "both")
    assert main.main(flags(root, root / "results", *more, max_epochs=4, lr=2e-3)) == 0
    return root


def evaluate(cohort: Path, out: Path, *more: object, code: int = 0, **instead: object) -> Path:
    """Evaluate in this process; returns the folder."""
    assert script.main(told(cohort, out, *more, **instead)) == code
    return out / "EVAL_e"


def told(cohort: Path, out: Path, *more: object, **instead: object) -> list[str]:
    """Flags of eval.py; ``instead`` replaces a value, None takes the flag out."""
    values = {"csv_path": cohort / "cohort.csv", "label_dict": LABELS,
              "patches": database(cohort), "k": 1, "results_dir": cohort / "results",
              "models_exp_code": "run_s1", "save_exp_code": "e", "output_root": out,
              "n_bootstrap": 20, "device": "cpu", **instead}
    given = [str(part) for name, value in values.items() if value is not None
             for part in (f"--{name}", value)]
    return [*given, "--no_report", *map(str, more)]


def scores(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "fold_0.csv", index_col="slide_id")[["p_0", "p_1"]]


def test_figures_are_those_of_the_training(cohort: Path, tmp_path: Path) -> None:
    folder = evaluate(cohort, tmp_path)
    trained = cohort / "results" / "run_s1"
    assert np.allclose(scores(folder).to_numpy(), predictions(trained), atol=1e-6)
    told_then = read_json(trained / "s_0_checkpoint.json")["metrics"]["test"]
    found = read_json(folder / "metrics.json")["folds"]["0"]["metrics"]
    assert found["auc"]["value"] == told_then["auc"]
    assert found["accuracy"]["value"] == told_then["accuracy"]


def test_the_running_mean_is_evaluated_when_asked_for(cohort: Path, tmp_path: Path) -> None:
    own = scores(evaluate(cohort, tmp_path / "own", "--weights", "main"))
    assert np.array_equal(own, scores(evaluate(cohort, tmp_path / "base")))
    mean = scores(evaluate(cohort, tmp_path / "mean", "--weights", "ema"))
    told_then = pd.read_csv(cohort / "results/run_s1/split_0_ema_results.csv")[["p_0", "p_1"]]
    assert np.allclose(mean, told_then, atol=1e-6)
    assert not np.allclose(mean, own, atol=1e-6)


def test_two_processes_evaluate_thirteen_slides_as_one_does(cohort: Path, tmp_path: Path) -> None:
    alone = evaluate(cohort, tmp_path / "alone", "--split", "all")
    done = torchrun(ROOT / "eval.py", *told(cohort, tmp_path / "two", "--split", "all"))
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two" / "EVAL_e"
    assert len(scores(alone)) == 13
    assert (two / "fold_0.csv").read_text() == (alone / "fold_0.csv").read_text()
    figures = [read_json(folder / "metrics.json") for folder in (alone, two)]
    assert figures[0]["folds"] == figures[1]["folds"]
    assert figures[0]["pooled"] == figures[1]["pooled"]


def test_both_scales_and_threads(cohort: Path, tmp_path: Path) -> None:
    low = ("--patches_low", database(cohort, LOW))
    one = scores(evaluate(cohort, tmp_path / "one", "--num_workers", 1))
    assert np.allclose(one, scores(evaluate(cohort, tmp_path / "two", "--num_workers", 2)))
    both = scores(evaluate(cohort, tmp_path / "both", *low, "--test_scales", "both"))
    assert not np.allclose(one, both, atol=1e-6)


def test_patches_of_another_source(cohort: Path, tmp_path: Path) -> None:
    """Straight from slides, which are others than those of the training."""
    (tmp_path / "slides").mkdir()
    write_slides(tmp_path, cohort)
    straight: dict[str, Any] = {"patches": tmp_path / "patches",
                                "data_slide_dir": tmp_path / "slides"}
    found = scores(evaluate(cohort, tmp_path / "out", **straight, slide_ext=".tif"))
    assert not np.allclose(found, scores(evaluate(cohort, tmp_path / "base")), atol=1e-6)
    with pytest.raises(Refused, match=r"slide_"):  # there is no .svs
        evaluate(cohort, tmp_path / "no", **straight)


@pytest.mark.parametrize(("more", "instead", "message"), [
    ((), {"patches": None}, "--patches"),
    ((), {"patches": "nowhere.lmdb"}, "nowhere.lmdb"),
    (("--test_scales", "both"), {}, "--patches_low"),
    (("--data_root_dir", "features"), {}, "--data_root_dir"),
    (("--data_slide_dir", "."), {}, "--data_slide_dir")], ids=str)
def test_contradictions_are_one_line(
    cohort: Path, tmp_path: Path, more: tuple[Any, ...], instead: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message) as caught:
        evaluate(cohort, tmp_path, *more, **instead)
    assert "\n" not in str(caught.value)
