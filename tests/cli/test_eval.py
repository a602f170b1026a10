"""eval.py: every flag has its effect, the files are CLAM's, the figures those of the models."""

from __future__ import annotations

import ast
import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import eval as script
from datasets.extraction import Extraction, Shard, _extract_shard
from datasets.extraction_plan import list_levels, plan_works
from models.encoders import encoder_record, load_encoder
from tests.conftest import ROOT
from tests.feature_inputs import CHILDREN, Inputs, make_levels, save_network
from tests.html_pages import read
from tests.trained import Cohort, make_cohort, spec_of, write_model
from tests.unit.test_utils_distributed import torchrun
from utils.contracts import Bag
from utils.errors import Refused
from utils.evaluation_tasks import VIEWS
from utils.metrics import slide_metrics
from utils.report import RunReport
from utils.storage import read_h5


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Two classes, two folds; no test changes it."""
    return make_cohort(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Three classes."""
    return make_cohort(tmp_path_factory.mktemp("three"), n_classes=3, slides=45)


Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Evaluate in this process, without report unless asked; returns the folder."""

    def evaluate(cohort: Cohort, code: int = 0, **flags: Any) -> Path:
        flags = {"output_root": tmp_path / "out", "no_report": True, **flags}
        assert script.main(cohort.flags(**flags)) == code
        return Path(flags["output_root"]) / f"EVAL_{flags.get('save_exp_code', 'e')}"

    return evaluate


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def slides(folder: Path, fold: int = 0) -> list[str]:
    return [row["slide_id"] for row in rows(folder / f"fold_{fold}.csv")]


def figures(folder: Path, name: str = "metrics.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def split_column(cohort: Cohort, part: str, fold: int = 0) -> list[str]:
    found = {row[part] for row in rows(cohort.models / f"splits_{fold}.csv")}
    return [slide for slide in cohort.table.slide_ids if slide in found]


# ---------------------------------------------------------------------------- the files

def test_predictions_are_those_of_the_models(cohort: Cohort, run: Run) -> None:
    from models.slide_models import build_slide_model

    folder = run(cohort)
    for fold in (0, 1):
        model = build_slide_model(cohort.spec)
        model.load_state_dict(torch.load(cohort.models / f"s_{fold}_checkpoint.pt",
                                         weights_only=True))
        model.eval()
        found = rows(folder / f"fold_{fold}.csv")
        assert [row["slide_id"] for row in found] == split_column(cohort, "test", fold)
        for row in found:
            features = read_h5(cohort.features / f"{row['slide_id']}.h5").arrays["features"]
            with torch.inference_mode():
                p = model(Bag(slide_id="x", features=torch.from_numpy(features))).probabilities[0]
            assert float(row["p_1"]) == pytest.approx(float(p[1]), abs=1e-6)
            assert row["Y_hat"] == ("1.0" if p[1] > p[0] else "0.0")
            label = cohort.table.labels[cohort.table.row_of[row["slide_id"]]]
            assert row["Y"] == f"{label}.0"


def test_all_files_and_their_agreement(cohort: Cohort, run: Run) -> None:
    folder = run(cohort, no_report=None)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        "eval_experiment_e.txt", "fold_0.csv", "fold_1.csv", "metrics.json",
        "plots/calibration.png", "plots/confusion.png", "plots/pr.png", "plots/roc.png",
        "report.html", "report_eval.csv", "report_eval.json", "summary.csv"]
    record, summary = figures(folder), rows(folder / "summary.csv")
    assert list(summary[0]) == ["", "folds", "test_auc", "test_acc"]
    for row in summary:
        fold = record["folds"][row["folds"]]
        table = rows(folder / f"fold_{row['folds']}.csv")
        p = np.array([[float(line["p_0"]), float(line["p_1"])] for line in table])
        plain = slide_metrics(p, np.array([int(float(line["Y"])) for line in table]))
        assert float(row["test_auc"]) == pytest.approx(plain.auc)
        assert fold["metrics"]["auc"]["value"] == pytest.approx(plain.auc)
        assert float(row["test_acc"]) == fold["metrics"]["accuracy"]["value"] == plain.accuracy
        assert fold["confusion"] == plain.confusion
        for item in fold["metrics"].values():
            assert 0 < item["valid"] <= item["resamples"] == 50
            assert item["low"] <= item["high"]
    assert record["pooled"]["slides"] == len({slide for fold in (0, 1)
                                              for slide in slides(folder, fold)})
    assert set(record["pooled"]["metrics"]) == {"auc", "accuracy", "balanced_accuracy", "macro_f1",
                                                "average_precision", "brier", "ece"}
    for name in ("roc", "pr", "confusion", "calibration"):
        assert cv2.imread(str(folder / "plots" / f"{name}.png")) is not None
    settings = ast.literal_eval((folder / "eval_experiment_e.txt").read_text())
    assert settings == {"task": "cohort", "split": "test", "save_dir": str(folder),
                        "models_dir": str(cohort.models), "model_type": "clam_sb",
                        "drop_out": 0.25, "model_size": "small"}
    assert [row["status"] for row in rows(folder / "report_eval.csv")] == ["done", "done"]


def test_the_report_shows_figures_errors_and_versions(cohort: Cohort, run: Run) -> None:
    folder = run(cohort, no_report=None)
    reader = read((folder / "report.html").read_text(encoding="utf-8"))
    text = "".join(reader.text)
    auc = figures(folder)["pooled"]["metrics"]["auc"]
    assert f"{auc['value']:.3f}" in text and f"{auc['low']:.3f}–{auc['high']:.3f}" in text
    wrong = [row["slide_id"] for fold in (0, 1) for row in rows(folder / f"fold_{fold}.csv")
             if row["Y"] != row["Y_hat"]]
    assert wrong and all(slide in text for slide in wrong)
    assert metadata.version("torch") in text and "n_bootstrap" in text
    assert reader.tags.count("img") == 4


def test_the_second_run_is_done_already(cohort: Cohort, run: Run,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(cohort, no_report=None)
    first = capsys.readouterr().out
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.*")}
    run(cohort, no_report=None)
    second = capsys.readouterr().out
    assert "already done" in second and "already done" not in first
    assert "pooled: " in second and second.splitlines()[0] in first
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes())
                      for path in folder.rglob("*.*")}


def test_as_a_process(cohort: Cohort, tmp_path: Path,
                      run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_script("eval.py", *cohort.flags(output_root=tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"open {tmp_path / 'EVAL_e' / 'report.html'}" in done.stdout
    assert "fold 1: " in done.stdout and done.stderr == ""
    refused = run_script("eval.py", *cohort.flags(output_root=tmp_path, models_exp_code="absent"))
    assert refused.returncode == 2 and refused.stderr.startswith("error: checkpoint ")
    assert refused.stderr.count("\n") == 1 and "Traceback" not in refused.stderr


# ---------------------------------------------------------------------------- folds and slides

@pytest.mark.parametrize(("flags", "folds", "suffix"), [
    ({"k": 2}, [0, 1], ""),
    ({"k": 2, "k_start": 1}, [1], "_partial_1_1"),
    ({"k": 2, "k_end": 1}, [0], "_partial_0_0"),
    ({"k": 2, "fold": 1}, [1], "_partial_1_1"),
    ({"k": 10, "k_end": 2}, [0, 1], "_partial_0_1"),
    ({"k": 1}, [0], ""),
])
def test_folds(cohort: Cohort, run: Run, flags: dict[str, int], folds: list[int],
               suffix: str) -> None:
    folder = run(cohort, **flags)
    assert sorted(path.name for path in folder.glob("fold_*")) == [f"fold_{k}.csv" for k in folds]
    assert [int(row["folds"]) for row in rows(folder / f"summary{suffix}.csv")] == folds
    assert list(figures(folder, f"metrics{suffix}.json")["folds"]) == [str(k) for k in folds]
    assert (folder / f"report_eval{suffix}.csv").exists()


def test_folds_one_by_one_share_a_folder(cohort: Cohort, run: Run) -> None:
    both = run(cohort, save_exp_code="both")
    for fold in (0, 1):
        folder = run(cohort, fold=fold)
    for fold in (0, 1):
        assert (folder / f"fold_{fold}.csv").read_bytes() == (
            both / f"fold_{fold}.csv").read_bytes()
    assert len(list(folder.glob("summary_partial_*"))) == 2


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_split(cohort: Cohort, run: Run, part: str) -> None:
    folder = run(cohort, split=part)
    assert slides(folder) == split_column(cohort, part)
    assert (figures(folder)["pooled"] is not None) == (part == "test")
    assert f"'split': '{part}'" in (folder / "eval_experiment_e.txt").read_text()


def test_split_all_needs_no_split_files(cohort: Cohort, run: Run, tmp_path: Path) -> None:
    folder = run(cohort, split="all", splits_dir=tmp_path / "nowhere")
    assert slides(folder, 0) == slides(folder, 1) == list(cohort.table.slide_ids)
    assert "'all'" in figures(folder)["pooled_note"]


def test_splits_dir(cohort: Cohort, run: Run, tmp_path: Path) -> None:
    other = tmp_path / "splits"
    other.mkdir()
    for fold in (0, 1):
        shutil.copy(cohort.models / f"splits_{1 - fold}.csv", other / f"splits_{fold}.csv")
    assert slides(run(cohort, splits_dir=other), 0) == split_column(cohort, "test", 1)


# ---------------------------------------------------------------------------- table and features

def test_task_and_tasks_file(cohort: Cohort, run: Run, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(f"mine:\n  csv_path: {cohort.root / 'cohort.csv'}\n"
                     "  label_dict: {benign: 0, cancer: 1}\n")
    folder = run(cohort, task="mine", tasks_file=tasks, csv_path=None, label_dict=None)
    assert "'task': 'mine'" in (folder / "eval_experiment_e.txt").read_text()
    assert slides(folder) == split_column(cohort, "test")


def test_label_col_and_label_dict(cohort: Cohort, run: Run, tmp_path: Path) -> None:
    table = tmp_path / "other.csv"
    table.write_text((cohort.root / "cohort.csv").read_text().replace("label", "grade", 1))
    with pytest.raises(Refused, match="label_col"):
        run(cohort, csv_path=table)
    same = run(cohort, csv_path=table, label_col="grade")
    table.write_text(table.read_text().replace("benign", "x").replace("cancer", "benign"
                                                                      ).replace("x", "cancer"))
    other = run(cohort, csv_path=table, label_col="grade", save_exp_code="flipped")
    accuracies = [figures(folder)["folds"]["0"]["metrics"]["accuracy"]["value"]
                  for folder in (same, other)]
    assert sum(accuracies) == pytest.approx(1)
    with pytest.raises(Refused, match="knows the classes benign, cancer"):
        run(cohort, label_dict="cancer:0,benign:1", save_exp_code="other map")


def test_data_root_dir_and_feature_dir(cohort: Cohort, run: Run) -> None:
    with pytest.raises(Refused, match="have no features"):
        run(cohort, data_root_dir=cohort.root)
    folder = run(cohort, data_root_dir=cohort.root, feature_dir="features")
    assert slides(folder) == split_column(cohort, "test")


def test_feature_encoder_chooses_among_several(tmp_path: Path, run: Run) -> None:
    cohort = make_cohort(tmp_path / "cohort")
    several = tmp_path / "several"
    for name in ("other", "test_encoder"):
        shutil.copytree(cohort.root / "features", several / name)
    with pytest.raises(Refused, match="other.*test_encoder.*--feature_encoder"):
        run(cohort, data_root_dir=several, feature_dir=".")
    folder = run(cohort, data_root_dir=several, feature_dir=".", feature_encoder="test_encoder")
    assert slides(folder) == split_column(cohort, "test")


def test_allow_missing(tmp_path: Path, run: Run) -> None:
    cohort = make_cohort(tmp_path / "cohort")
    gone, kept = split_column(cohort, "test")[:2]
    (cohort.features / f"{gone}.h5").unlink()
    with pytest.raises(Refused, match=f"'{gone}'.*--allow_missing"):
        run(cohort, fold=0)
    folder = run(cohort, fold=0, allow_missing=True)
    assert gone not in slides(folder) and kept in slides(folder)
    assert gone in figures(folder, "metrics_partial_0_0.json")["left_out"]
    (row,) = (row for row in rows(folder / "report_eval_partial_0_0.csv") if row["item"] == gone)
    assert row["status"] == "empty" and "--allow_missing" in row["reason"]


def test_allow_shared_patients(cohort: Cohort, run: Run, tmp_path: Path) -> None:
    pair = [slide for slide, case in zip(cohort.table.slide_ids, cohort.table.case_ids, strict=True)
            if cohort.table.case_ids.count(case) == 2][:2]
    others = [slide for slide in cohort.table.slide_ids if slide not in pair]
    table = [("", "train", "val", "test"), (0, pair[0], "", pair[1]),
             *((number + 1, slide, "", "") for number, slide in enumerate(others))]
    with (tmp_path / "splits_0.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    with pytest.raises(Refused, match="patients in two parts"):
        run(cohort, k=1, splits_dir=tmp_path)
    folder = run(cohort, k=1, splits_dir=tmp_path, allow_shared_patients=True)
    assert slides(folder) == [pair[1]]


# ---------------------------------------------------------------------------- the model

def foreign(root: Path, cohort: Cohort, **spec: Any) -> Path:
    """The cohort's models anew, without json, in ``root/results/foreign_s1``."""
    folder = root / "results" / "foreign_s1"
    for fold in (0, 1):
        write_model(folder, fold, spec_of(**spec), described=False)
        shutil.copy(cohort.models / f"splits_{fold}.csv", folder)
    return folder


def test_models_of_clam_need_no_flags(cohort: Cohort, run: Run, tmp_path: Path) -> None:
    foreign(tmp_path, cohort)
    where = {"results_dir": tmp_path / "results", "models_exp_code": "foreign_s1"}
    with pytest.raises(Refused, match="expected feature width 1024, found feature width 12"):
        run(cohort, **where, embed_dim=1024)
    folder = run(cohort, **where)
    assert (folder / "fold_0.csv").read_bytes() == (
        run(cohort, save_exp_code="ours") / "fold_0.csv").read_bytes()


@pytest.mark.parametrize(("spec", "flag", "found"), [
    ({"model_type": "clam_mb"}, {"model_type": "clam_sb"}, "clam_mb"),
    ({"model_type": "mil"}, {"model_type": "clam_sb"}, "mil"),
    ({"model_type": "abmil"}, {"model_type": "clam_sb"}, "abmil"),
    ({"model_size": "big"}, {"model_size": "small"}, "384"),
    ({"gated": False, "dropout": 0.0}, {}, ""),
])
def test_a_foreign_model_says_what_it_is(cohort: Cohort, run: Run, tmp_path: Path,
                                         spec: dict[str, Any], flag: dict[str, str],
                                         found: str) -> None:
    foreign(tmp_path, cohort, **spec)
    where = {"results_dir": tmp_path / "results", "models_exp_code": "foreign_s1"}
    if flag:
        with pytest.raises(Refused, match=f"found .*{found}"):
            run(cohort, **where, **flag)
    folder = run(cohort, **where, drop_out=spec.get("dropout", 0.5))
    settings = ast.literal_eval((folder / "eval_experiment_e.txt").read_text())
    assert settings["model_type"] == spec.get("model_type", "clam_sb")
    assert settings["model_size"] == spec.get("model_size", "small")
    assert settings["drop_out"] == spec.get("dropout", 0.5)


@pytest.mark.parametrize(("flag", "value"), [("model_type", "clam_mb"), ("model_size", "big"),
                                             ("drop_out", 0.5), ("embed_dim", 1024)])
def test_a_flag_against_the_record_is_refused(cohort: Cohort, run: Run, flag: str,
                                              value: Any) -> None:
    with pytest.raises(Refused, match=f"{flag} is {value}, but the checkpoint was trained with"):
        run(cohort, **{flag: value})


def test_flags_that_agree_with_the_record_are_fine(cohort: Cohort, run: Run) -> None:
    flags = cohort.flags(model_type="clam_sb", model_size="small", embed_dim=12, no_report=True,
                         output_root=run(cohort).parent, save_exp_code="bare")
    assert script.main([*flags, "--drop_out"]) == 0


# ---------------------------------------------------------------------------- figures

def test_micro_average(three: Cohort, run: Run) -> None:
    for micro in (None, True):
        folder = run(three, micro_average=micro, save_exp_code=f"micro{micro}")
        table = rows(folder / "fold_0.csv")
        p = np.array([[float(row[f"p_{c}"]) for c in range(3)] for row in table])
        expected = slide_metrics(p, np.array([int(float(row["Y"])) for row in table]),
                                 micro_average=bool(micro)).auc
        assert float(rows(folder / "summary.csv")[0]["test_auc"]) == pytest.approx(expected)
    aucs = {rows(run(three, micro_average=micro, save_exp_code=f"micro{micro}") / "summary.csv"
                 )[0]["test_auc"] for micro in (None, True)}
    assert len(aucs) == 2


def test_three_classes_make_a_report(three: Cohort, run: Run) -> None:
    folder = run(three, no_report=None, split="val")
    reader = read((folder / "report.html").read_text(encoding="utf-8"))
    assert "other" in "".join(reader.text) and reader.tags.count("img") == 4
    assert figures(folder)["folds"]["0"]["auc_delong_over_slides"] is None


def test_n_bootstrap_and_seed(cohort: Cohort, run: Run) -> None:
    found = {}
    for code, flags in {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"n_bootstrap": 60},
                        "none": {"n_bootstrap": 0}}.items():
        brier = figures(run(cohort, save_exp_code=code, **flags))["pooled"]["metrics"]["brier"]
        found[code] = (brier["low"], brier["high"], brier["resamples"], brier["reason"])
    assert found["a"][:2] != found["b"][:2] and found["a"][2] == 50
    assert found["c"][2] == 60
    assert found["none"] == (None, None, 0, "no resampling was asked for")


def test_precision(cohort: Cohort, run: Run) -> None:
    exact, rough = (np.array([float(row["p_1"]) for row in rows(
        run(cohort, precision=precision, save_exp_code=precision) / "fold_0.csv")])
        for precision in ("fp32", "bf16"))
    assert (exact != rough).any()
    np.testing.assert_allclose(exact, rough, atol=0.02)
    with pytest.raises(Refused, match="fp16"):
        run(cohort, precision="fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_is_never_changed_silently(cohort: Cohort, run: Run) -> None:
    with pytest.raises(Refused, match="--device cpu"):
        run(cohort, device="cuda")
    with pytest.raises(Refused, match="gpu"):
        run(cohort, device="gpu")


# ---------------------------------------------------------------------------- other tasks

OTHERS = ("multilabel", "regression", "survival")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cohort]:
    """A cohort for each task type but classification; no test changes them."""
    return {task_type: make_cohort(tmp_path_factory.mktemp(task_type), task_type=task_type)
            for task_type in OTHERS}


@pytest.mark.parametrize(("task_type", "columns", "figures_"), [
    ("multilabel", ["y_necrosis", "y_invasion", "p_0", "p_1"], {"auc": "auc", "acc": "accuracy"}),
    ("regression", ["y_0", "y_1", "yhat_0", "yhat_1"], {"r2": "r2", "mae": "mae"}),
    ("survival", ["time", "event", "risk", "S_1", "S_2", "S_3", "S_4"], {"c_index": "c_index"}),
])
def test_other_tasks(others: dict[str, Cohort], run: Run, task_type: str, columns: list[str],
                     figures_: dict[str, str]) -> None:
    cohort = others[task_type]
    folder = run(cohort, no_report=None)
    record = figures(folder)
    assert record["task_type"] == task_type and record["pooled"]["slides"] > 0
    table = rows(folder / "fold_1.csv")
    assert list(table[0]) == ["slide_id", *columns]
    assert [row["slide_id"] for row in table] == split_column(cohort, "test", 1)
    for row in table:
        truth = cohort.table.target_of(cohort.table.row_of[row["slide_id"]]) or ()
        shown = [float(row[name] or "nan") for name in columns[:len(truth)]]
        assert shown == pytest.approx(list(truth), nan_ok=True)
    summary = rows(folder / "summary.csv")
    assert list(summary[0]) == ["", "folds", *(f"test_{key}" for key in figures_)]
    for key, figure in figures_.items():
        for line in summary:
            found = record["folds"][line["folds"]]["metrics"][figure]
            assert float(line[f"test_{key}"]) == pytest.approx(found["value"])
            assert found["low"] <= found["value"] <= found["high"]
    plots = {path.name for path in (folder / "plots").iterdir()}
    assert plots == set(VIEWS[task_type].pictures)  # type: ignore[index]
    text = "".join(read((folder / "report.html").read_text(encoding="utf-8")).text)
    assert all(title in text for title in VIEWS[task_type].titles.values())  # type: ignore[index]


def test_the_pooled_c_index_compares_within_folds(others: dict[str, Cohort], run: Run) -> None:
    folder = run(others["survival"])
    right = pairs = 0.0
    for fold in (0, 1):
        table = [{name: float(row[name]) for name in ("time", "event", "risk")}
                 for row in rows(folder / f"fold_{fold}.csv")]
        for one in table:
            for two in table:
                if one["event"] and (one["time"] < two["time"] or (
                        one["time"] == two["time"] and not two["event"])):
                    pairs += 1
                    right += (one["risk"] > two["risk"]) + 0.5 * (one["risk"] == two["risk"])
    pooled = figures(folder)["pooled"]
    assert pooled["metrics"]["c_index"]["value"] == pytest.approx(right / pairs)
    assert pooled["comparable_pairs"] == pairs
    assert "within each fold" in figures(folder)["pooled_note"]


def test_label_cols_time_col_and_event_col(others: dict[str, Cohort], run: Run) -> None:
    with pytest.raises(Refused, match="knows the classes necrosis, invasion"):
        run(others["multilabel"], label_cols=("invasion", "necrosis"))
    with pytest.raises(Refused, match="task_type is regression.*trained with multilabel"):
        run(others["multilabel"], task_type="regression", label_cols=("size", "age"))
    swapped = run(others["survival"], time_col="weeks", event_col="relapse")
    found = rows(swapped / "fold_0.csv")[0]
    table = {row["slide_id"]: row for row in rows(others["survival"].root / "cohort.csv")}
    assert float(found["time"]) == float(table[found["slide_id"]]["weeks"])
    assert float(found["event"]) == float(table[found["slide_id"]]["relapse"])


def test_the_legacy_protocol_is_repeated(tmp_path: Path, run: Run,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    cohort = make_cohort(tmp_path / "cohort")
    write_model(cohort.models, 1, cohort.spec, settings={"val_is_test": True})
    folder = run(cohort, no_report=None)
    said = ("fold 1: the validation slides were the test slides: early stopping and the best epoch "
            "were chosen on them, so these figures are optimistic")
    assert figures(folder)["warnings"] == [said]
    assert f"warning: {said}" in capsys.readouterr().out
    text = "".join(read((folder / "report.html").read_text(encoding="utf-8")).text)
    assert text.index(said) < text.index("What was evaluated")
    run(cohort, no_report=None)
    assert f"warning: {said}" in capsys.readouterr().out  # also when it is done already
    write_model(cohort.models, 0, cohort.spec, settings={"val_is_test": True})
    folder = run(cohort, save_exp_code="both")
    assert figures(folder)["warnings"] == [said.removeprefix("fold 1: ")]


def test_under_torchrun(tmp_path: Path, run: Run) -> None:
    """Two processes, an odd number of slides, one of them unreadable: the numbers of one."""
    cohort = make_cohort(tmp_path / "cohort", slides=23)
    (cohort.features / "s05.h5").write_bytes(b"\x89HDF")
    flags: dict[str, Any] = {"split": "all", "output_root": tmp_path / "two"}
    done = torchrun(ROOT / "eval.py", *cohort.flags(**flags))
    assert "1 failed" in done.stdout and done.stdout.count("fold 0: ") == 1, done.stderr
    one, two = run(cohort, code=3, split="all"), tmp_path / "two" / "EVAL_e"
    for fold in (0, 1):
        assert slides(one, fold) == slides(two, fold) and len(slides(one, fold)) == 22
        for alone, shared in zip(rows(one / f"fold_{fold}.csv"), rows(two / f"fold_{fold}.csv"),
                                 strict=True):
            assert float(alone["p_1"]) == pytest.approx(float(shared["p_1"]), rel=1e-6)
    plain, both = figures(one), figures(two)
    assert plain["failed"] == both["failed"] and set(plain["failed"]) == {"s05"}
    for fold in ("0", "1"):
        for name, found in plain["folds"][fold]["metrics"].items():
            assert both["folds"][fold]["metrics"][name] == pytest.approx(found)


# ---------------------------------------------------------------------------- hierarchies

def extract_levels(inputs: Inputs, feat_dir: Path, weights: Path) -> dict[str, Any]:
    """Features of every slide and level by a tiny network, in this process; its record."""
    settings: dict[str, Any] = {"checkpoint": weights, "target_px": 32}
    found = list_levels(inputs.patches_root, feat_dir, CHILDREN)
    for level in found:
        for name in ("h5_files", "pt_files"):
            (level.feat_dir / name).mkdir(parents=True)
    record = encoder_record("timm:test_resnet", **settings)
    works = plan_works({path.stem: path for path in sorted(inputs.slides.iterdir())}, found,
                       RunReport("features"), encoders={"": record}, backend="auto", redo=False,
                       allow_dropped=False)
    _extract_shard(Shard(tuple(works), "cpu"), extraction=Extraction(
        load={"": lambda device: load_encoder("timm:test_resnet", **settings)}, batch_size=64,
        workers=1, bad_tiles="fail", redo=False))
    return record


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cohort, Inputs]:
    """Six slides of three magnifications, their features, and a HAG-MIL model of two folds."""
    root = tmp_path_factory.mktemp("levels")
    inputs = make_levels(root / "slides", (3, 4, 2, 5, 3, 4))
    cohort = make_cohort(root, names=[f"slide_{n}" for n in range(6)], folds=0)
    shutil.rmtree(root / "features")
    encoder = extract_levels(inputs, root / "features", save_network(root / "tiny.pth"))
    cohort = replace(cohort, spec=spec_of(model_type="hag_mil", embed_dim=96, n_levels=3,
                                          options={"hidden_dims": (16, 8), "v_patch": (1.0,)}))
    for fold in (0, 1):
        write_model(cohort.models, fold, cohort.spec, encoder=encoder, child_levels=[1, 0])
    return cohort, inputs


def test_finer_levels_as_in_training_or_as_given(levels: tuple[Cohort, Inputs], run: Run) -> None:
    cohort, _ = levels
    plain = run(cohort, split="all")
    dirs = tuple(cohort.root / f"features_level_{n}_corresponding" for n in (1, 0))
    for code, flags in {"dirs": {"child_dirs": dirs}, "levels": {"child_levels": (1, 0)}}.items():
        folder = run(cohort, split="all", save_exp_code=code, **flags)
        assert (folder / "fold_0.csv").read_bytes() == (plain / "fold_0.csv").read_bytes()
    with pytest.raises(Refused, match="takes 2 finer levels, found 1"):
        run(cohort, split="all", child_levels=(1,))
    with pytest.raises(Refused, match="no folder"):
        run(cohort, split="all", child_dirs=(*dirs[:1], cohort.root / "absent"))
    with pytest.raises(Refused, match="goes with --lazy_children"):
        run(cohort, split="all", slide_ext=".tif")


def test_v_patch(levels: tuple[Cohort, Inputs], cohort: Cohort, run: Run) -> None:
    one, half = (run(levels[0], split="all", save_exp_code=f"v{number}", v_patch=number)
                 for number in (1, 0.5))
    assert (one / "fold_0.csv").read_bytes() == (
        run(levels[0], split="all", save_exp_code="plain") / "fold_0.csv").read_bytes()
    assert (one / "fold_0.csv").read_bytes() != (half / "fold_0.csv").read_bytes()
    with pytest.raises(Refused, match="v_patch"):
        run(cohort, v_patch=3)


def test_lazy_children(levels: tuple[Cohort, Inputs], run: Run, tmp_path: Path,
                       capsys: pytest.CaptureFixture[str]) -> None:
    """Equal numbers without any stored feature of a finer level, and few patches encoded."""
    cohort, inputs = levels
    plain = run(cohort, split="all", save_exp_code="plain")
    bare = tmp_path / "bare"
    shutil.copytree(cohort.root / "features", bare)
    where: dict[str, Any] = {
        "split": "all", "lazy_children": True, "data_root_dir": bare, "k": 2,
        "data_h5_dir": inputs.patches_root, "data_slide_dir": inputs.slides, "slide_ext": ".tif",
        "encoder_ckpt": cohort.root / "tiny.pth"}
    lazy = run(cohort, save_exp_code="lazy", **where)
    for alone, stored in zip(rows(lazy / "fold_0.csv"), rows(plain / "fold_0.csv"), strict=True):
        assert float(alone["p_1"]) == pytest.approx(float(stored["p_1"]), abs=1e-5)
    cost = figures(lazy)["lazy_children"]
    assert cost["patches"] == 21 * (4 + 16)  # of 21 coarse patches
    assert 6 * 8 <= cost["encoded"] == cost["looked_at"] <= 2 * 6 * 8  # 4 + 4 a slide and fold
    assert cost["seconds"] > 0 and "patches looked at" in capsys.readouterr().out
    run(cohort, save_exp_code="lazy", overwrite=True, **where)
    assert figures(lazy)["lazy_children"]["encoded"] == 0  # kept from the first run
    others = tmp_path / "other.pth"
    torch.save({name: value + 1 for name, value in torch.load(
        cohort.root / "tiny.pth", weights_only=True).items()}, others)
    for flags, words in (({"encoder_ckpt": others}, "not the one that made the features"),
                         ({"data_slide_dir": None}, "give --data_h5_dir and --data_slide_dir"),
                         ({"slide_ext": ".svs"}, "6 files are missing"),
                         ({"child_dirs": (bare, bare)}, "needs .* --child_levels")):
        with pytest.raises(Refused, match=words):
            run(cohort, save_exp_code="wrong", **{**where, **flags})


# ---------------------------------------------------------------------------- options of a model

def test_model_options(cohort: Cohort, run: Run, tmp_path: Path) -> None:
    """An activation leaves no trace in the weights: only the file can tell it."""
    heads = {"inner_dim": 16, "n_heads": 4}
    foreign(tmp_path, cohort, model_type="abmilx", options={**heads, "act": "relu"})
    where = {"results_dir": tmp_path / "results", "models_exp_code": "foreign_s1"}
    preset = tmp_path / "preset.yaml"
    preset.write_text("model_type: abmilx\nn_heads: 4\nact: relu\nlr: 1.0e-4\nv_patch: [3]\n")
    found = run(cohort, save_exp_code="told", model_options=preset, **where)
    for fold in (0, 1):
        write_model(tmp_path / "results" / "ours_s1", fold, spec_of(
            model_type="abmilx", options={**heads, "act": "relu"}))
        shutil.copy(cohort.models / f"splits_{fold}.csv", tmp_path / "results" / "ours_s1")
    ours = run(cohort, save_exp_code="ours", **{**where, "models_exp_code": "ours_s1"})
    assert (found / "fold_0.csv").read_bytes() == (ours / "fold_0.csv").read_bytes()
    preset.write_text("n_heads: 4\nact: gelu\n")
    other = run(cohort, save_exp_code="other", model_options=preset, **where)
    assert (other / "fold_0.csv").read_bytes() != (ours / "fold_0.csv").read_bytes()
    with pytest.raises(Refused, match="act is gelu, but the checkpoint was trained with relu"):
        run(cohort, save_exp_code="x", model_options=preset, **{**where,
                                                               "models_exp_code": "ours_s1"})
    preset.write_text("act: tanh\n")
    with pytest.raises(Refused, match="act is 'tanh'"):
        run(cohort, model_options=preset, **where)
    preset.write_text("lr: 1\n")
    with pytest.raises(Refused, match="holds no option of a model"):
        run(cohort, model_options=preset, **where)


# ---------------------------------------------------------------------------- where and again

def test_names_of_the_output(cohort: Cohort, run: Run, tmp_path: Path) -> None:
    folder = run(cohort, output_root=tmp_path / "a" / "b", save_exp_code="my code")
    assert folder == tmp_path / "a" / "b" / "EVAL_my code"
    assert (folder / "eval_experiment_my code.txt").exists()


def test_no_report(cohort: Cohort, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(cohort)
    assert not (folder / "report.html").exists() and not (folder / "plots").exists()
    run(cohort, no_report=None)  # asked for later: made
    assert (folder / "report.html").exists() and "open" in capsys.readouterr().out


def test_overwrite(cohort: Cohort, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(cohort, no_report=None)
    with pytest.raises(Refused, match="split: file has 'test', you ask 'val'.*--overwrite"):
        run(cohort, split="val")
    assert slides(folder) == split_column(cohort, "test")
    run(cohort, split="val", k=1, overwrite=True)
    assert slides(folder) == split_column(cohort, "val")
    left = {path.name for path in folder.rglob("*.*")}  # nothing of the first evaluation
    assert not {"fold_1.csv", "report.html", "roc.png"} & left
    capsys.readouterr()
    run(cohort, split="val", k=1, overwrite=True)
    assert "already done" not in capsys.readouterr().out
