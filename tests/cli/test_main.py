"""main.py: every flag has its effect, and the files are CLAM's."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

import main
from datasets.bags import BagDataset
from tests.conftest import ROOT
from tests.training import WIDTH, write_cohort
from tests.unit.test_utils_distributed import torchrun
from tests.unit.test_utils_tracking import read_scalars
from utils.errors import Refused

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features, table and splits; do not change."""
    root = tmp_path_factory.mktemp("cohort")
    write_cohort(root, slides=16)
    return root


def flags(cohort: Path, results: Path, *more: object, **instead: object) -> list[str]:
    """One fold of one epoch; ``instead`` replaces a flag's value, None takes the flag out."""
    labels = "class_0:0,class_1:1"
    values = {"csv_path": cohort / "cohort.csv", "label_dict": labels,
              "data_root_dir": cohort / "features", "splits_root": cohort / "splits",
              "embed_dim": WIDTH, "k": 2, "k_end": 1, "max_epochs": 1, "results_dir": results,
              "exp_code": "run", "device": "cpu", **instead}
    given = [str(part) for name, value in values.items() if value is not None
             for part in (f"--{name}", value)]
    return [*given, *map(str, more)]


def run(cohort: Path, results: Path, *more: object, **instead: object) -> Path:
    """Train and return the experiment's folder."""
    assert main.main(flags(cohort, results, *more, **instead)) == 0
    seed = instead.get("seed", 1)
    return results / f"{instead.get('exp_code', 'run')}_s{seed}"


def weights(folder: Path, fold: int = 0) -> Weights:
    return torch.load(folder / f"s_{fold}_checkpoint.pt", weights_only=True)


def record(folder: Path, fold: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"s_{fold}_checkpoint.json").read_text())


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and torch.equal(one[name], other[name])
        for name in one)


@pytest.fixture(scope="module")
def baseline(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(cohort, tmp_path_factory.mktemp("baseline"))


# ---------------------------------------------------------------------------- what training does

@pytest.mark.parametrize(("given", "settings"), [
    (("--lr", "0.01"), {"lr": 0.01}),
    (("--reg", "0.5"), {"reg": 0.5}),
    (("--seed", "2"), {"seed": 2}),
    (("--max_epochs", "2"), {"max_epochs": 2}),
    (("--opt", "sgd"), {"opt": "sgd"}),
    (("--opt", "adamw", "--reg", "0.5"), {"opt": "adamw"}),
    (("--drop_out", "0.5"), {"dropout": 0.5}),
    (("--bag_loss", "svm"), {"bag_loss": "svm"}),
    (("--inst_loss", "svm"), {"inst_loss": "svm"}),
    (("--bag_weight", "0.2"), {"bag_weight": 0.2}),
    (("--B", "2"), {"k_sample": 2}),
    (("--no_inst_cluster",), {"instance_clustering": False}),
    (("--subtyping",), {"subtyping": True}),
    (("--weighted_sample",), {"weighted_sample": True}),
    (("--accumulate", "3"), {"accumulate": 3}),
    (("--clip_grad", "0.01", "--opt", "sgd"), {"clip_grad": 0.01}),
    (("--precision", "bf16"), {"precision": "bf16"}),
    (("--attention_dropout", "0.7"), {"attention_dropout": 0.7}),
    (("--ungated",), {"gated": False}),
    (("--model_size", "big"), {"model_size": "big"}),
    (("--model_type", "clam_mb"), {"model_type": "clam_mb"}),
    (("--model_type", "mil"), {"model_type": "mil"}),
    (("--model_type", "abmil"), {"model_type": "abmil"}),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else None)
def test_flag_changes_the_trained_weights(
    cohort: Path, baseline: Path, tmp_path: Path, given: tuple[str, ...],
    settings: dict[str, object],
) -> None:
    folder = run(cohort, tmp_path, *given, **({"seed": 2} if "--seed" in given else {}))
    assert settings.items() <= record(folder)["settings"].items()
    assert not equal(weights(folder), weights(baseline))


def test_adamw_is_not_adam_and_clipping_is_not_sgd(cohort: Path, tmp_path: Path) -> None:
    """Flags that were given together with another above, apart from it."""
    found = [weights(run(cohort, tmp_path, *given, exp_code=f"e{number}"))
             for number, given in enumerate((
                 ("--opt", "adamw", "--reg", "0.5"), ("--opt", "adam", "--reg", "0.5"),
                 ("--opt", "sgd", "--clip_grad", "0.01"), ("--opt", "sgd")))]
    assert not equal(found[0], found[1])
    assert not equal(found[2], found[3])


@pytest.mark.parametrize("given", [
    ("--drop_out",), ("--drop_out", "0.25"), ("--inst_loss", "None"), ("--inst_loss", "ce"),
    ("--B", "0"), ("--B", "-1"), ("--cache", "none"), ("--cache", "ram")], ids=" ".join)
def test_flag_that_says_the_default_changes_nothing(
    cohort: Path, baseline: Path, tmp_path: Path, given: tuple[str, ...]
) -> None:
    assert equal(weights(run(cohort, tmp_path, *given)), weights(baseline))


def test_three_classes_and_multi_class_mil(tmp_path: Path) -> None:
    write_cohort(tmp_path, slides=24, n_classes=3)
    folder = run(tmp_path, tmp_path / "results", model_type="mil",
                 label_dict="class_0:0,class_1:1,class_2:2")
    assert weights(folder)["classifiers.weight"].shape == (3, 512)
    assert list(pd.read_csv(folder / "split_0_results.csv")) == [
        "slide_id", "Y", "Y_hat", "p_0", "p_1", "p_2"]


def test_bags_smaller_than_b_and_bags_of_one(tmp_path: Path) -> None:
    write_cohort(tmp_path, slides=16, rows=3)
    torch.save(torch.ones(1, WIDTH), tmp_path / "features" / "pt_files" / "slide_15.pt")
    folder = run(tmp_path, tmp_path / "results")
    assert all(value.isfinite().all() for value in weights(folder).values())


def test_early_stopping_patience_and_stop_epoch(cohort: Path, tmp_path: Path) -> None:
    """A step far too large spoils the model at once: the best epoch is an early one."""
    wild = {"max_epochs": 12, "lr": 0.5, "opt": "sgd"}
    stopped = record(run(cohort, tmp_path, "--early_stopping", "--patience", 2, "--stop_epoch", 3,
                         **wild))
    later = record(run(cohort, tmp_path, "--early_stopping", "--patience", 2, "--stop_epoch", 7,
                       exp_code="later", **wild))
    patient = record(run(cohort, tmp_path, "--early_stopping", "--patience", 9,
                         "--stop_epoch", 3, exp_code="patient", **wild))
    never = record(run(cohort, tmp_path, exp_code="never", **wild))
    assert stopped["epochs"] < never["epochs"] == 12
    assert 4 < stopped["epochs"] < later["epochs"]
    assert stopped["epochs"] < patient["epochs"]
    best = weights(tmp_path / "run_s1")
    assert not equal(best, weights(tmp_path / "never_s1"))


# ---------------------------------------------------------------------------- what it reads

def test_named_task_with_its_feature_folder_and_subtyping(cohort: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(yaml.safe_dump({"mine": {
        "csv_path": str(cohort / "cohort.csv"), "label_dict": {"class_0": 0, "class_1": 1},
        "feature_dir": "features", "subtyping_required": True}}))
    shutil.copytree(cohort / "splits" / "cohort_100", tmp_path / "mine_100")
    named = {"csv_path": None, "label_dict": None, "data_root_dir": cohort, "task": "mine",
             "tasks_file": tasks, "splits_root": tmp_path, "exp_code": None}
    with pytest.raises(Refused, match="CLAM models need --subtyping"):
        main.main(flags(cohort, tmp_path, **named))
    assert main.main(flags(cohort, tmp_path, "--subtyping", **named)) == 0
    assert (tmp_path / "mine_clam_sb_s1" / "s_0_checkpoint.pt").exists()
    assert main.main(flags(cohort, tmp_path, model_type="mil", **named)) == 0  # needs none


def test_feature_dir_and_label_col(cohort: Path, baseline: Path, tmp_path: Path) -> None:
    table = pd.read_csv(cohort / "cohort.csv", dtype=str).rename(columns={"label": "grade"})
    table.to_csv(tmp_path / "cohort.csv", index=False)
    folder = run(cohort, tmp_path, "--label_col", "grade", "--feature_dir", "features",
                 data_root_dir=cohort, csv_path=tmp_path / "cohort.csv")
    assert equal(weights(folder), weights(baseline))
    with pytest.raises(Refused, match="no column 'label'"):
        run(cohort, tmp_path / "a", csv_path=tmp_path / "cohort.csv")


def test_label_frac_chooses_the_split_folder_and_split_dir_wins(
    cohort: Path, baseline: Path, tmp_path: Path
) -> None:
    shutil.copytree(cohort / "splits" / "cohort_100", tmp_path / "cohort_50")
    assert equal(weights(run(cohort, tmp_path, label_frac=0.5, splits_root=tmp_path)),
                 weights(baseline))
    shutil.move(tmp_path / "cohort_50", tmp_path / "elsewhere")
    with pytest.raises(Refused, match="cohort_50 does not exist"):
        run(cohort, tmp_path, label_frac=0.5, splits_root=tmp_path, exp_code="b")
    for number, name in enumerate(("elsewhere", tmp_path / "elsewhere")):
        folder = run(cohort, tmp_path, label_frac=0.5, splits_root=tmp_path, split_dir=name,
                     exp_code=f"c{number}")
        assert equal(weights(folder), weights(baseline))


def test_testing_uses_a_tenth(cohort: Path, tmp_path: Path) -> None:
    folder = run(cohort, tmp_path, "--testing")
    split = pd.read_csv(folder / "splits_0.csv", index_col=0)
    assert split.notna().sum().to_dict() == {"train": 2, "val": 2, "test": 2}


def test_wrong_embed_dim_names_the_right_one(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=f"give --embed_dim {WIDTH}"):
        run(cohort, tmp_path, embed_dim=1024)


def test_allow_missing(cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort / "features", tmp_path / "features")
    (tmp_path / "features" / "pt_files" / "slide_15.pt").unlink()
    with pytest.raises(Refused, match="slide_15"):
        run(cohort, tmp_path, data_root_dir=tmp_path / "features")
    folder = run(cohort, tmp_path, "--allow_missing", data_root_dir=tmp_path / "features")
    assert "slide_15" not in (folder / "splits_0.csv").read_text()
    report = pd.read_csv(folder / "report_train.csv", index_col="item")
    assert report["status"]["slide_15"] == "empty"


def test_feature_encoder_chooses_among_several(cohort: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(cohort / "features", tmp_path / "features" / name)
    with pytest.raises(Refused, match="one.*two.*--feature_encoder"):
        run(cohort, tmp_path, data_root_dir=tmp_path / "features")
    folder = run(cohort, tmp_path, "--feature_encoder", "two",
                 data_root_dir=tmp_path / "features", max_epochs=1)
    assert any(folder.glob("summary*.csv"))


@pytest.mark.parametrize(("cache", "kept"), [("ram", True), ("auto", True), ("none", False)])
def test_cache_decides_what_stays_in_memory(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, kept: bool
) -> None:
    reads = []
    whole = BagDataset._read
    monkeypatch.setattr(BagDataset, "_read",
                        lambda self, slide: reads.append(slide) or whole(self, slide))
    run(cohort, tmp_path, "--cache", cache, max_epochs=2)
    assert (len(reads) == len(set(reads))) is kept


# ---------------------------------------------------------------------------- what it writes

def test_output_files_are_those_of_clam(cohort: Path, tmp_path: Path) -> None:
    folder = run(cohort, tmp_path / "deep" / "er", "--log_data", k_end=-1, max_epochs=2)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "experiment_run.txt", "options.yaml", "summary.csv", "report_train.csv",
        "report_train.json", "0", "1", *(name.format(fold) for fold in (0, 1) for name in (
            "s_{}_checkpoint.pt", "s_{}_checkpoint.json", "splits_{}.csv",
            "split_{}_results.pkl", "split_{}_results.csv"))}
    assert ast.literal_eval((folder / "experiment_run.txt").read_text())["num_splits"] == 2
    summary = pd.read_csv(folder / "summary.csv", index_col=0)
    assert list(summary) == ["folds", "test_auc", "val_auc", "test_acc", "val_acc"]
    assert summary["folds"].tolist() == [0, 1]
    tags = read_scalars(folder / "0")
    assert set(tags) == {
        "train/loss", "train/error", "train/class_0_acc", "train/class_1_acc",
        "train/clustering_loss", "val/loss", "val/auc", "val/error", "val/inst_loss",
        "val/class_0_acc", "val/class_1_acc", "final/test_class_0_acc", "final/test_class_1_acc",
        "final/val_error", "final/val_auc", "final/test_error", "final/test_auc"}
    assert [step for step, _ in tags["train/loss"]] == [0, 1]
    assert summary["test_auc"][0] == pytest.approx(tags["final/test_auc"][0][1])


def test_the_record_describes_the_checkpoint(baseline: Path) -> None:
    found = record(baseline)
    assert found["fold"] == 0
    assert found["class_names"] == ["class_0", "class_1"]
    assert found["spec"]["embed_dim"] == WIDTH
    assert found["encoder"] is None
    from models.slide_models import SlideModelSpec, build_slide_model

    build_slide_model(SlideModelSpec(**found["spec"])).load_state_dict(weights(baseline))


def test_without_log_data_the_folder_of_the_log_is_empty(baseline: Path) -> None:
    assert list((baseline / "0").iterdir()) == []


def test_fold_range_and_partial_summary(cohort: Path, tmp_path: Path) -> None:
    folder = run(cohort, tmp_path, k=2, k_start=1, k_end=-1)
    assert (folder / "summary_partial_1_2.csv").exists()
    assert not (folder / "s_0_checkpoint.pt").exists()
    run(cohort, tmp_path, k=2, k_end=-1)  # the other fold, and all of them in the summary
    assert len(pd.read_csv(folder / "summary.csv")) == 2


def test_saved_options_give_the_same_run(cohort: Path, baseline: Path, tmp_path: Path) -> None:
    assert main.main(["--config", str(baseline / "options.yaml"),
                      "--results_dir", str(tmp_path)]) == 0
    assert equal(weights(tmp_path / "run_s1"), weights(baseline))


# ---------------------------------------------------------------------------- again, and elsewhere

def test_a_second_run_does_nothing_and_says_so(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(cohort, tmp_path)
    before = (folder / "s_0_checkpoint.pt").stat().st_mtime_ns
    capsys.readouterr()
    run(cohort, tmp_path)
    assert (folder / "s_0_checkpoint.pt").stat().st_mtime_ns == before
    assert "1 already done" in capsys.readouterr().out


def test_other_settings_need_overwrite(cohort: Path, tmp_path: Path) -> None:
    folder = run(cohort, tmp_path)
    before = weights(folder)
    with pytest.raises(Refused, match=r"lr: file has 0.0001, you ask 0.001.*--overwrite"):
        run(cohort, tmp_path, lr=0.001)
    assert equal(weights(folder), before)
    run(cohort, tmp_path, "--overwrite", lr=0.001)
    assert not equal(weights(folder), before)


def test_folds_of_one_experiment_share_their_settings(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path)
    with pytest.raises(Refused, match="fold 0 .* was trained with other settings"):
        run(cohort, tmp_path, "--overwrite", k_start=1, k_end=2, lr=0.001)


def test_num_threads(cohort: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        run(cohort, tmp_path, num_threads=2)
        assert torch.get_num_threads() == 2
        run(cohort, tmp_path, num_threads=1, exp_code="b")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "message"), [
    (("--k_start", "3"), "no range of folds"), (("--k", "0"), "--k is 0"),
    (("--lr", "nan"), "--lr is nan"), (("--seed", "4294967296"), "--seed is"),
    (("--bag_weight", "1.5"), "from 0 to 1"),
    (("--drop_out", "1"), "from 0 to 0.99"), (("--exp_code", "../x"), "no slash"),
    (("--device", "tpu"), "expected auto, cpu"), (("--precision", "fp16"), "fp16 needs CUDA"),
    (("--k_end", "2", "--k", "9", "--k_start", "1", "--splits_root", "nowhere"), "does not exist"),
    (("--task", "task_9"), "unknown task")], ids=lambda value: value[0])
def test_bad_flags_are_refused_before_work(
    cohort: Path, tmp_path: Path, given: tuple[str, ...], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        main.main([*flags(cohort, tmp_path), *given])
    assert not list(tmp_path.glob("*/s_*"))


def test_cuda_that_is_not_there_is_refused(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refused, match="use --device cpu"):
        run(cohort, tmp_path, device="cuda")


def test_fold_workers_share_the_threads(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run_folds = main.run_folds

    def watching(*given: Any, workers: int, arguments: dict[str, Any], **more: Any) -> Any:
        seen.append((workers, arguments["job"].where.threads))
        return run_folds(*given, workers=1, arguments=arguments, **more)

    monkeypatch.setattr(main, "run_folds", watching)
    before = torch.get_num_threads()
    try:
        for workers in (1, 2):
            run(cohort, tmp_path / str(workers), "--fold_workers", workers, "--num_threads", 4)
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, 4), (2, 2)]


def test_as_a_process_folds_side_by_side(
    cohort: Path, tmp_path: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Two worker processes give the checkpoints of one, and the exit code is 0."""
    done = run_script("main.py", *flags(cohort, tmp_path, "--fold_workers", 2, k_end=-1))
    assert done.returncode == 0, done.stderr
    assert "2 done" in done.stdout
    one = run(cohort, tmp_path / "one", "--num_threads", 1, k_end=-1)
    for fold in (0, 1):
        assert equal(weights(tmp_path / "run_s1", fold), weights(one, fold))


def test_under_torchrun(cohort: Path, tmp_path: Path) -> None:
    command = [ROOT / "main.py", *flags(cohort, tmp_path, "--early_stopping", "--log_data",
                                        k_end=-1)]
    first = torchrun(*command)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("epoch 0:") == 2  # one line a fold: rank 0 speaks
    folder = tmp_path / "run_s1"
    assert record(folder)["settings"]["ranks"] == 2
    assert len(pd.read_csv(folder / "split_0_results.csv")) == 4
    assert not list(folder.rglob("state.pt"))
    with pytest.raises(Refused, match="ranks: file has 2, you ask 1"):
        run(cohort, tmp_path, "--early_stopping", k_end=-1)
    mixed = torchrun(*command, "--fold_workers", 2)
    assert mixed.returncode != 0
    assert "choose one" in mixed.stderr
