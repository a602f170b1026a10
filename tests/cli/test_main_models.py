"""main.py with every model, every task type and every option of theirs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import main
from models.options import MODEL_OPTIONS
from models.slide_models import SLIDE_MODELS
from tests.cli.test_main import equal, flags, record, run, weights
from tests.training import WIDTH, make_bag, write_cohort
from utils.errors import Refused

NARROW = {  # small enough for a test
    "abmilx": ("--inner_dim", 16, "--n_heads", 4),
    "transmil": ("--inner_dim", 16, "--n_heads", 4),
    "hag_mil": ("--hidden_dims", 16, 8),
    "dsmil": ("--query_dim", 8)}
SLIDES = 16


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of three levels, a table with every kind of truth, and splits; do not change."""
    root = tmp_path_factory.mktemp("cohort")
    write_cohort(root, slides=SLIDES)
    rng = np.random.default_rng(0)
    bags = [make_bag(index) for index in range(SLIDES)]
    for level, ratio in ((1, 4), (0, 16)):
        folder = root / f"features_level_{level}_corresponding" / "pt_files"
        folder.mkdir(parents=True)
        for bag in bags:
            noise = torch.from_numpy(rng.normal(size=(ratio * len(bag), WIDTH)).astype(np.float32))
            torch.save(bag.features.repeat_interleave(ratio, dim=0) + noise,
                       folder / f"{bag.slide_id}.pt")
    (root / "features_level_2").symlink_to(root / "features")
    with (root / "truths.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case_id", "slide_id", "a", "b", "score", "months", "dead"), *(
            (bag.case_id, bag.slide_id, bag.label, index // 2 % 2, 3.0 * (bag.label or 0) + index,
             50 - 20 * (bag.label or 0) + index, int(index % 4 != 3))
            for index, bag in enumerate(bags))])
    return root


def train(cohort: Path, results: Path, model_type: str, *more: object, **instead: object) -> Path:
    """One fold of one epoch of a narrow model."""
    return run(cohort, results, "--model_type", model_type, *NARROW.get(model_type, ()), *more,
               **{"exp_code": model_type, **instead})


@pytest.fixture(scope="module")
def trained(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An experiment folder a model."""
    root = tmp_path_factory.mktemp("trained")
    found = {name: train(cohort, root, name) for name in SLIDE_MODELS}
    found["levels"] = train(cohort, root, "hag_mil", "--child_levels", 1, 0, "--t_patch", 5,
                            "--v_patch", 5, exp_code="levels",
                            data_root_dir=cohort / "features_level_2")
    return found


@pytest.mark.parametrize("name", list(SLIDE_MODELS))
def test_every_model_trains_and_its_record_rebuilds_it(
    trained: dict[str, Path], name: str
) -> None:
    found = record(trained[name])
    assert found["spec"]["model_type"] == name
    assert np.isfinite(found["metrics"]["test"]["auc"])
    assert all(value.isfinite().all() for value in weights(trained[name]).values())


# ---------------------------------------------------------------------------- options of models

@pytest.mark.parametrize(("name", "given"), [
    *(("abmilx", given) for given in (
        ("--n_heads", 2), ("--inner_dim", 8), ("--act", "relu"), ("--mil_norm", "ln"),
        ("--mil_bias",), ("--abx_attn_bias",), ("--no_abx_attn_plus",),
        ("--abx_attn_type", "mlp_gated"), ("--abx_D", 2), ("--abx_embed_new",),
        ("--abx_alpha", 0.1), ("--legacy_alpha",), ("--ffn",), ("--proj_drop", 0.5))),
    *(("transmil", given) for given in (
        ("--inner_dim", 8), ("--n_heads", 2), ("--landmarks", 4), ("--legacy_padding",),
        ("--attention_dropout", 0.5))),
    *(("dsmil", given) for given in (
        ("--query_dim", 4), ("--passing_v",), ("--linear_query",), ("--value_dropout", 0.5),
        ("--max_weight", 0.1))),
    *(("levels", given) for given in (
        ("--hidden_dims", 8, 8), ("--t_patch", 3), ("--t_patch", 0.5), ("--inst_weight", 0.1),
        ("--level_smoothing", 0.3, 0.1), ("--landmarks", 4), ("--legacy_padding",),
        ("--legacy_order",), ("--step_per_loss",), ("--no_inst_cluster",),
        ("--child_levels", 1)))], ids=str)
def test_option_changes_the_trained_weights(
    cohort: Path, trained: dict[str, Path], tmp_path: Path, name: str, given: tuple[Any, ...]
) -> None:
    base: tuple[Any, ...] = ()
    instead: dict[str, object] = {}
    if name == "levels":
        base = ("--child_levels", 1, 0, "--t_patch", 5, "--v_patch", 5)
        instead = {"data_root_dir": cohort / "features_level_2"}
    model_type = "hag_mil" if name == "levels" else name
    folder = train(cohort, tmp_path, model_type, *base, *given, **instead)
    assert not equal(weights(folder), weights(trained[name]))


def test_parents_kept_in_evaluation_change_the_predictions(
    cohort: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    folder = train(cohort, tmp_path, "hag_mil", "--child_levels", 1, 0, "--t_patch", 5,
                   "--v_patch", 2, data_root_dir=cohort / "features_level_2")
    assert equal(weights(folder), weights(trained["levels"]))
    name = "split_0_results.csv"
    assert (folder / name).read_text() != (trained["levels"] / name).read_text()


@pytest.mark.parametrize(("name", "given"), [
    ("abmilx", ("--sdpa_type", "fused")), ("hag_mil", ("--checkpoint_above", 3))], ids=str)
def test_ways_to_compute_the_same(
    cohort: Path, trained: dict[str, Path], tmp_path: Path, name: str, given: tuple[Any, ...]
) -> None:
    folder = train(cohort, tmp_path, name, *given)
    for key, value in weights(folder).items():
        torch.testing.assert_close(value, weights(trained[name])[key], atol=1e-4, rtol=1e-3)


def test_levels_from_folders_named_one_by_one(
    cohort: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    folder = train(cohort, tmp_path, "hag_mil", "--t_patch", 5, "--v_patch", 5, "--child_dirs",
                   *(cohort / f"features_level_{level}_corresponding" for level in (1, 0)))
    assert equal(weights(folder), weights(trained["levels"]))


def test_only_hag_mil_takes_levels(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="only hag_mil takes several magnifications"):
        train(cohort, tmp_path, "abmil", "--child_levels", 1,
              data_root_dir=cohort / "features_level_2")


def test_missing_level_names_the_commands(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="level_3_corresponding.*create_patches_fp.py"):
        train(cohort, tmp_path, "hag_mil", "--child_levels", 3, 1,
              data_root_dir=cohort, feature_dir="features")


def test_heads_must_divide_the_width(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="16"):
        train(cohort, tmp_path, "abmilx", "--n_heads", 3)
    assert not list(tmp_path.glob("*/0"))  # refused before any fold


def test_an_option_of_another_model_is_refused(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--ffn belongs to abmilx, it has no effect on clam_sb"):
        train(cohort, tmp_path, "clam_sb", "--ffn")


def test_every_option_of_every_model_is_here() -> None:
    text = Path(__file__).read_text()
    names = {item for kind in MODEL_OPTIONS.values() for item in kind.__dataclass_fields__}
    assert {name for name in names if f"--{name}" not in text and f"--no_{name}" not in text} \
        == set()


# ---------------------------------------------------------------------------- training

@pytest.mark.parametrize("given", [
    ("--schedule", "cosine"), ("--schedule", "step"), ("--ema", 0.9), ("--label_smoothing", 0.2),
    ("--warmup_epochs", 2), ("--schedule", "cosine", "--min_lr", 5e-5),
    ("--warmup_epochs", 2, "--warmup_lr", 5e-5)], ids=str)
def test_engine_flag_changes_the_weights(
    cohort: Path, tmp_path: Path, given: tuple[Any, ...]
) -> None:
    plain = train(cohort, tmp_path, "abmil", max_epochs=3)
    other = train(cohort, tmp_path, "abmil", *given, max_epochs=3, exp_code="other")
    assert not equal(weights(plain), weights(other))
    if len(given) == 4:  # the last flag apart from the one before it
        before = train(cohort, tmp_path, "abmil", *given[:2], max_epochs=3, exp_code="before")
        assert not equal(weights(before), weights(other))


def test_class_weights_balance_an_uneven_cohort(tmp_path: Path) -> None:
    write_cohort(tmp_path, slides=24, n_classes=3)
    names = {"label_dict": "class_0:0,class_1:1,class_2:1"}
    plain = train(tmp_path, tmp_path / "r", "abmil", **names)
    other = train(tmp_path, tmp_path / "r", "abmil", "--class_weights", "balanced",
                  exp_code="balanced", **names)
    low, high = record(other)["spec"]["class_weights"][::-1]
    assert low < 1 < high
    assert not equal(weights(plain), weights(other))


def test_monitor_metric_keeps_another_epoch(tmp_path: Path) -> None:
    """On noise the validation loss soon only rises, while the AUC goes up and down."""
    write_cohort(tmp_path, slides=24)
    for index, path in enumerate(sorted((tmp_path / "features" / "pt_files").glob("*.pt"))):
        torch.save(torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(index)), path)
    loss, metric = (record(train(tmp_path, tmp_path / "r", "abmil", "--early_stopping",
                                 "--monitor", what, exp_code=what, max_epochs=12, lr=1e-3, seed=3))
                    for what in ("loss", "metric"))
    assert metric["best_epoch"] != loss["best_epoch"]
    assert metric["metrics"]["val"]["auc"] > loss["metrics"]["val"]["auc"]


def test_further_checkpoints_of_the_best_epochs(cohort: Path, tmp_path: Path) -> None:
    folder = train(cohort, tmp_path, "abmil", "--early_stopping", "--save_top_k", 2, max_epochs=4)
    found = sorted(folder.glob("s_0_checkpoint_epoch_*.pt"))
    assert len(found) == 2
    best = folder / f"s_0_checkpoint_epoch_{record(folder)['best_epoch']}.pt"
    assert equal(torch.load(best, weights_only=True), weights(folder))


# ---------------------------------------------------------------------------- tasks

def truths(cohort: Path, **columns: object) -> dict[str, object]:
    """Flags of a task over the table of all truths."""
    return {"csv_path": cohort / "truths.csv", "label_dict": None, "split_dir": "cohort_100",
            **columns}


@pytest.mark.parametrize("name", ["abmil", "abmilx", "transmil", "dsmil", "mean", "max"])
def test_survival(cohort: Path, tmp_path: Path, name: str) -> None:
    folder = train(cohort, tmp_path, name, "--n_bins", 3, **truths(
        cohort, task_type="survival", time_col="months", event_col="dead"))
    table = pd.read_csv(folder / "split_0_results.csv")
    assert list(table) == ["slide_id", "time", "event", "risk", "S_1", "S_2", "S_3"]
    found = record(folder)
    assert found["task_type"] == "survival" and len(found["spec"]["bin_edges"]) == 4
    assert list(pd.read_csv(folder / "summary_partial_0_1.csv"))[2:] == [
        "test_c_index", "val_c_index"]


def test_survival_loss_options(cohort: Path, tmp_path: Path) -> None:
    columns = truths(cohort, task_type="survival", time_col="months", event_col="dead")
    found = [weights(train(cohort, tmp_path, "abmil", *given, exp_code=f"e{number}", **columns))
             for number, given in enumerate(((), ("--nll_alpha", 0.5), ("--n_bins", 2)))]
    assert not equal(found[0], found[1]) and not equal(found[0], found[2])
    cox = train(cohort, tmp_path, "abmil", "--bag_loss", "cox", "--accumulate", 4, exp_code="cox",
                **columns)
    assert list(pd.read_csv(cox / "split_0_results.csv")) == ["slide_id", "time", "event", "risk"]
    with pytest.raises(Refused, match="--accumulate 16"):
        train(cohort, tmp_path, "abmil", "--bag_loss", "cox", exp_code="one", **columns)


def test_multilabel_and_regression(cohort: Path, tmp_path: Path) -> None:
    both = train(cohort, tmp_path, "abmil", "--label_cols", "a", "b", exp_code="both",
                 **truths(cohort, task_type="multilabel"))
    assert list(pd.read_csv(both / "split_0_results.csv")) == [
        "slide_id", "y_a", "y_b", "p_0", "p_1"]
    score = train(cohort, tmp_path, "abmil", "--label_cols", "score", exp_code="score",
                  **truths(cohort, task_type="regression"))
    found = record(score)
    assert len(found["spec"]["target_mean"]) == 1
    assert set(found["headline"]["test"]) == {"r2", "mae"}


def test_a_model_refuses_a_task_it_cannot_learn(cohort: Path, tmp_path: Path) -> None:
    columns = truths(cohort, task_type="survival", time_col="months", event_col="dead")
    with pytest.raises(Refused, match="give --no_inst_cluster"):
        train(cohort, tmp_path, "clam_sb", **columns)
    train(cohort, tmp_path, "clam_sb", "--no_inst_cluster", **columns)


# ---------------------------------------------------------------------------- the run

def test_legacy_protocol_is_said(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(cohort, tmp_path, "abmil", "--val_is_test", "--early_stopping")
    found = record(folder)
    assert found["settings"]["val_is_test"] is True
    assert found["metrics"]["val"] == found["metrics"]["test"]
    assert "all figures are optimistic" in capsys.readouterr().out
    split = pd.read_csv(folder / "splits_0.csv")
    assert not set(split["val"].dropna()) & set(split["test"].dropna())


def test_shared_patients_by_permission_only(tmp_path: Path) -> None:
    write_cohort(tmp_path, slides=16)
    path = tmp_path / "cohort.csv"
    path.write_text(path.read_text().replace("case_00", "one").replace("case_15", "one"))
    with pytest.raises(Refused, match="patients in two parts"):
        train(tmp_path, tmp_path / "r", "abmil")
    train(tmp_path, tmp_path / "r", "abmil", "--allow_shared_patients")


def test_table_of_slides_by_part(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(cohort, tmp_path, "abmil")
    assert "fold 0: train 8 (class_0 4, class_1 4); val 4" in capsys.readouterr().out
    train(cohort, tmp_path, "abmil", "--no_print_info", exp_code="quiet")
    assert "fold 0: train 8" not in capsys.readouterr().out


def test_logs_in_a_folder_of_their_own(cohort: Path, tmp_path: Path) -> None:
    folder = train(cohort, tmp_path, "abmil", "--log_data", "--log_dir", tmp_path / "logs")
    assert list((tmp_path / "logs").rglob("events.*"))
    assert not list(folder.rglob("events.*"))


def test_hag_mils_own_settings_file(cohort: Path, tmp_path: Path) -> None:
    """The published layout of sections, as --config; flags win over it."""
    path = tmp_path / "camelyon.yaml"
    path.write_text(yaml.safe_dump({
        "storage_arguments": {"result_dir": str(tmp_path / "out"), "task": "c16",
                              "model_dir": "models/", "exp_code": "IAT/"},
        "hyperparams_arguments": {"seed": 3, "lr": 1e-4, "reg": 1e-5, "max_epoch": 1,
                                  "early_stop": 2, "gpus": [], "t_patch": 5, "v_patch": 5},
        "data_arguments": {
            "feature_dir": str(cohort / "features_level_2"),
            "ground_truth_csv": str(cohort / "cohort.csv"),
            "split_dir": str(cohort / "splits" / "cohort_100"), "patient_strat": False,
            "label_dict": {"class_0": 0, "class_1": 1}},
        "model_arguments": {"model_type": "IAT", "hidden_dims": [16, 8], "feat_in": WIDTH,
                            "n_classes": 2, "inst_loss": "svm"}}))
    assert main.main(["--config", str(path)]) == 0
    found = record(tmp_path / "out" / "c16" / "models" / "IAT_s3")
    assert found["spec"]["options"]["hidden_dims"] == [16, 8]
    assert found["spec"]["n_levels"] == 3 and found["child_levels"] == [1, 0]
    assert found["settings"]["early_stopping"] is True


def test_flags_of_helper_reach_main(cohort: Path, tmp_path: Path) -> None:
    """``flags`` takes a flag out when it is None; the table then needs a task."""
    with pytest.raises(Refused, match="--label_dict"):
        main.main(flags(cohort, tmp_path, label_dict=None))
