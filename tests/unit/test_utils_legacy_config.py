"""HAG-MIL's own settings file: every key of it becomes the flag that does what it says."""

from __future__ import annotations

from typing import Any

import pytest

from utils.errors import Refused
from utils.legacy_config import translate_config

PUBLISHED: dict[str, dict[str, Any]] = {
    "storage_arguments": {
        "result_dir": "out", "task": "camelyon16", "model_dir": "models/", "log_dir": "logs/",
        "exp_code": "IAT_experiments/", "save_top_k": 1},
    "hyperparams_arguments": {
        "seed": 6, "lr": 1e-5, "reg": 1e-5, "max_epoch": 200, "early_stop": 20,
        "gpus": [0, 1, 2, 3], "t_patch": 7000, "v_patch": 10000},
    "data_arguments": {
        "data_dir": "slides", "feature_dir": "/f/camelyon_level_2",
        "ground_truth_csv": "csvs/camelyon16.csv", "split_dir": "splits/camelyon16/",
        "shuffle_data": False, "print_info": True, "patient_strat": False,
        "label_dict": {"normal": 0, "tumor": 1}},
    "model_arguments": {
        "model_type": "IAT", "gate": True, "hidden_dims": [1024, 1536, 512, 1024],
        "dropout": 0.25, "k_sample": 8, "n_classes": 2, "feat_in": 1024, "inst_cluster": True,
        "inst_weight": 0.5, "bag_weight": 0.5, "bag_loss": "ce", "inst_loss": "svm",
        "subtyping": False}}


def translated(**changes: Any) -> dict[str, Any]:
    """Flags for the published file with some keys replaced."""
    tree = {section: {key: changes.get(key, value) for key, value in keys.items()}
            for section, keys in PUBLISHED.items()}
    return translate_config(tree, "camelyon.yaml")


def test_the_published_file() -> None:
    assert translated() == {
        "model_type": "hag_mil", "k": 1, "log_data": True, "exp_code": "IAT_experiments",
        "results_dir": "out/camelyon16/models", "log_dir": "out/camelyon16/logs/IAT_experiments",
        "save_top_k": 1, "seed": 6, "lr": 1e-5, "reg": 1e-5, "max_epochs": 200,
        "early_stopping": True, "patience": 20, "stop_epoch": 0, "device": "cuda",
        "t_patch": 7000, "v_patch": 10000, "data_root_dir": "/f/camelyon_level_2",
        "child_levels": [1, 0], "csv_path": "csvs/camelyon16.csv",
        "split_dir": "splits/camelyon16/", "print_info": True, "allow_shared_patients": True,
        "label_dict": {"normal": 0, "tumor": 1}, "ungated": False,
        "hidden_dims": [1024, 1536, 512, 1024], "drop_out": 0.25, "B": 8, "embed_dim": 1024,
        "no_inst_cluster": False, "inst_weight": 0.5, "bag_weight": 0.5, "bag_loss": "ce",
        "inst_loss": "svm", "subtyping": False}


@pytest.mark.parametrize(("key", "value", "flag", "expected"), [
    ("result_dir", "other", "results_dir", "other/camelyon16/models"),
    ("task", "t", "results_dir", "out/t/models"), ("model_dir", "m", "results_dir",
                                                   "out/camelyon16/m"),
    ("log_dir", "l", "log_dir", "out/camelyon16/l/IAT_experiments"),
    ("exp_code", "e", "exp_code", "e"), ("save_top_k", 3, "save_top_k", 3),
    ("seed", 1, "seed", 1), ("lr", 0.1, "lr", 0.1), ("reg", 0.2, "reg", 0.2),
    ("max_epoch", 5, "max_epochs", 5), ("early_stop", 4, "patience", 4),
    ("gpus", [2], "device", "cuda:2"), ("gpus", [], "device", "cpu"),
    ("t_patch", 5, "t_patch", 5), ("v_patch", 6, "v_patch", 6),
    ("feature_dir", "/f/x_level_1", "child_levels", [0]),
    ("feature_dir", "/f/x", "child_levels", []),
    ("ground_truth_csv", "a.csv", "csv_path", "a.csv"), ("split_dir", "s", "split_dir", "s"),
    ("print_info", False, "print_info", False),
    ("patient_strat", True, "allow_shared_patients", False),
    ("label_dict", {"a": 0, "b": 1}, "label_dict", {"a": 0, "b": 1}),
    ("model_type", "hag_mil", "model_type", "hag_mil"), ("gate", False, "ungated", True),
    ("hidden_dims", [8], "hidden_dims", [8]), ("dropout", 0.0, "drop_out", 0.0),
    ("k_sample", 2, "B", 2), ("feat_in", 64, "embed_dim", 64),
    ("inst_cluster", False, "no_inst_cluster", True), ("inst_weight", 1.0, "inst_weight", 1.0),
    ("bag_weight", 1.0, "bag_weight", 1.0), ("bag_loss", "svm", "bag_loss", "svm"),
    ("inst_loss", "ce", "inst_loss", "ce"), ("subtyping", True, "subtyping", True)])
def test_every_key_changes_its_flag(key: str, value: Any, flag: str, expected: Any) -> None:
    assert translated(**{key: value})[flag] == expected


@pytest.mark.parametrize(("changes", "message"), [
    ({"n_classes": 5}, "n_classes is 5, but label_dict names 2"),
    ({"model_type": "CLAM"}, "model_type is 'CLAM', expected IAT")])
def test_what_contradicts_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        translated(**changes)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(Refused, match="unknown section 'model_argument', did you mean 'model_arg"):
        translate_config({"model_argument": {}, "data_arguments": {}}, "x.yaml")
    with pytest.raises(Refused, match="unknown key 'tpatch', did you mean 't_patch'"):
        translate_config({"hyperparams_arguments": {"tpatch": 1}}, "x.yaml")
    with pytest.raises(Refused, match="expected 'key: value' lines"):
        translate_config({"model_arguments": 3}, "x.yaml")


def test_keys_without_an_effect_in_training_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    translated(data_dir="/slides", shuffle_data=True)
    said = capsys.readouterr().out
    assert "--data_slide_dir /slides" in said and "new order in every epoch" in said


def test_flat_files_stay_as_they_are() -> None:
    assert translate_config({"lr": 1}, "x.yaml") == {"lr": 1}
