"""eval.py with streaming models: the figures of main.py, every flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import eval as script
import main
from tests.cli.test_main_streaming import LABELS, flags, predictions
from tests.slide_image_cohort import IMAGE_MPP_UM, write_slide_images
from tests.unit.test_utils_distributed import torchrun
from utils.errors import Refused
from utils.storage import read_json


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight slides and a model of theirs, trained on crops of 320 px."""
    root = write_slide_images(tmp_path_factory.mktemp("cohort"))
    assert main.main(flags(root, root / "results", "--head", "gated_attention")) == 0
    return root


def told(cohort: Path, out: Path, *more: object, **instead: object) -> list[str]:
    """Flags of eval.py; ``instead`` replaces a value, None takes the flag out."""
    values = {"csv_path": cohort / "cohort.csv", "label_dict": LABELS,
              "slide_images": cohort / "images" / "slide_images", "k": 1,
              "results_dir": cohort / "results", "models_exp_code": "run_s1",
              "save_exp_code": "e", "output_root": out, "n_bootstrap": 20, "device": "cpu",
              **instead}
    given = [str(part) for name, value in values.items() if value is not None
             for part in (f"--{name}", value)]
    return [*given, "--no_report", *map(str, more)]


def evaluate(cohort: Path, out: Path, *more: object, **instead: object) -> Path:
    """Evaluate in this process; returns the folder."""
    assert script.main(told(cohort, out, *more, **instead)) == 0
    return out / "EVAL_e"


def scores(folder: Path) -> np.ndarray:
    return pd.read_csv(folder / "fold_0.csv", index_col="slide_id")[["p_0", "p_1"]].to_numpy()


def test_figures_are_those_of_the_training(cohort: Path, tmp_path: Path) -> None:
    """The size of the crops is known from the checkpoint."""
    folder = evaluate(cohort, tmp_path)
    trained = cohort / "results" / "run_s1"
    assert np.allclose(scores(folder), predictions(trained), atol=1e-6)
    told_then = read_json(trained / "s_0_checkpoint.json")["metrics"]["test"]
    assert read_json(folder / "metrics.json")["folds"]["0"]["metrics"]["auc"]["value"] == \
        told_then["auc"]


@pytest.mark.parametrize("more", [("--image_size", 256), ("--whole_images",)], ids=str)
def test_other_sizes_give_other_scores(cohort: Path, tmp_path: Path, more: tuple[Any, ...]) -> None:
    assert not np.allclose(scores(evaluate(cohort, tmp_path, *more)),
                           scores(evaluate(cohort, tmp_path / "as_trained")), atol=1e-7)


def test_slides_are_read_without_preparation(cohort: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    direct = {"slide_images": None, "data_slide_dir": cohort / "slides", "slide_ext": ".tif"}
    evaluate(cohort, tmp_path / "same", image_mpp=IMAGE_MPP_UM, **direct)
    assert "other images" not in capsys.readouterr().out
    evaluate(cohort, tmp_path / "other", image_mpp=2.0, **direct)
    assert "other images than in training: mpp_um" in capsys.readouterr().out


def test_two_processes_give_the_same_scores(cohort: Path, tmp_path: Path) -> None:
    torchrun("eval.py", *told(cohort, tmp_path / "two"))
    assert np.allclose(scores(tmp_path / "two" / "EVAL_e"), scores(evaluate(cohort, tmp_path)),
                       atol=1e-6)


@pytest.mark.parametrize(("more", "instead", "message"), [
    ((), {"slide_images": None}, "--slide_images is missing"),
    (("--patches", "p.lmdb"), {}, "--patches has no effect"),
    ((), {"slide_images": "nowhere"}, "nowhere")], ids=str)
def test_contradictions_are_refused(cohort: Path, tmp_path: Path, more: tuple[Any, ...],
                                    instead: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        script.main(told(cohort, tmp_path, *more, **instead))
