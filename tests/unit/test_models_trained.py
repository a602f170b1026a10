"""Checkpoints on disk: described by a json, or by what their weights tell; flags; packings."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from models.infer import infer_spec, model_type_of
from models.slide_models import SLIDE_MODELS, SlideModelSpec, build_slide_model
from models.trained import TrainedModel, load_trained
from utils.errors import Refused

CLASSES = ("normal", "tumor")
HAG = {"model_type": "hag_mil", "options": {"hidden_dims": (16, 24)}}
ABMILX_OPTIONS: list[dict[str, Any]] = [
    {}, {"n_heads": 4}, {"n_heads": 1}, {"inner_dim": 24}, {"mil_norm": "ln"},
    {"mil_norm": "ln", "mil_bias": True}, {"mil_norm": "bn"}, {"mil_bias": True},
    {"abx_attn_bias": True}, {"abx_attn_plus": False}, {"abx_attn_type": "mlp_gated"},
    {"abx_D": 2}, {"abx_D": 3}, {"abx_D": 24}, {"abx_D": 12, "n_heads": 4}, {"ffn": True},
    {"abx_embed_new": True}, {"abx_embed_new": True, "abx_D": 16},
    {"abx_embed_new": True, "abx_attn_type": "mlp_gated", "abx_D": 4},
    {"abx_D": 2, "n_heads": 1}, {"ffn": True, "mil_norm": "ln", "abx_attn_type": "mlp_gated"}]
SPECS: list[dict[str, Any]] = [
    {"model_type": "clam_sb"}, {"model_type": "clam_sb", "gated": False, "model_size": "big"},
    {"model_type": "clam_mb", "model_size": "big"}, {"model_type": "abmil"},
    {"model_type": "mil"}, {"model_type": "mil", "n_classes": 3}, {"model_type": "dsmil"},
    {"model_type": "dsmil", "options": {"linear_query": True, "query_dim": 5}},
    {"model_type": "dsmil", "options": {"passing_v": True}}, {"model_type": "transmil"},
    {"model_type": "transmil", "options": {"inner_dim": 24, "n_heads": 2}},
    *({"model_type": "abmilx", "options": {"inner_dim": 48, **options}}
      for options in ABMILX_OPTIONS),
    HAG, {**HAG, "n_levels": 3}, {**HAG, "n_levels": 2, "gated": False}]


def spec_of(**changes: Any) -> SlideModelSpec:
    return SlideModelSpec(**{"model_type": "clam_sb", "embed_dim": 11, "n_classes": 2, **changes})


def state_of(**changes: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_slide_model(spec_of(**changes)).state_dict()


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return list(found) == list(state) and all(
        torch.equal(found[name], value) for name, value in state.items())


# ---------------------------------------------------------------------------- without a json

@pytest.mark.parametrize("changes", SPECS, ids=[str(spec) for spec in SPECS])
def test_weights_tell_what_the_model_is(changes: dict[str, Any], tmp_path: Path) -> None:
    state = state_of(**changes)
    assert model_type_of(state) == changes["model_type"]
    names = ("a", "b", "c") if changes.get("n_classes") == 3 else CLASSES
    trained = load_trained(saved(tmp_path / "m.pt", state), class_names=names)
    assert same(trained.build(), state)
    wanted = spec_of(**changes)
    for name in ("model_type", "embed_dim", "n_classes", "gated", "n_levels"):
        assert getattr(trained.spec, name) == getattr(wanted, name), name
    for name, value in changes.get("options", {}).items():
        found = trained.spec.options[name]
        assert found == value or name == "abx_D", name  # several D give one width
    assert not trained.described and trained.notes == ()


def test_every_model_is_recognised() -> None:
    assert set(SLIDE_MODELS) == {spec["model_type"] for spec in SPECS} | {"mean", "max"}


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_twins_need_their_name(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", state_of(model_type=kind))
    with pytest.raises(Refused, match="expected model type clam_sb.* found model type mean or max"):
        load_trained(path, class_names=CLASSES)
    trained = load_trained(path, class_names=CLASSES, model_type=kind)
    assert (trained.spec.model_type, trained.spec.embed_dim) == (kind, 11)


@pytest.mark.parametrize(("flags", "message"), [
    ({"model_type": "clam_sb"}, "expected model type clam_sb.*found model type transmil"),
    ({"model_type": "abmilx"}, "expected model type abmilx.*found model type transmil"),
    ({"embed_dim": 12}, "expected feature width 12, found feature width 11"),
    ({"options": {"n_heads": 4}}, "expected n_heads 4, found n_heads 2"),
    ({"options": {"inner_dim": 32}}, "expected inner_dim 32, found inner_dim 16"),
])
def test_flags_win_over_the_weights(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = state_of(model_type="transmil", options={"inner_dim": 16, "n_heads": 2})
    path = saved(tmp_path / "m.pt", state)
    with pytest.raises(Refused, match=message):
        load_trained(path, class_names=CLASSES, **flags)


def test_flags_say_what_weights_do_not(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", state_of(
        model_type="transmil", options={"inner_dim": 16, "n_heads": 2}))
    trained = load_trained(path, class_names=CLASSES, dropout=0.0,
                           options={"landmarks": 4, "legacy_padding": True})
    assert trained.spec.dropout == 0.0
    assert trained.spec.options == {"inner_dim": 16, "n_heads": 2, "landmarks": 4,
                                    "legacy_padding": True}


def test_other_classes_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", state_of(model_type="dsmil"))
    with pytest.raises(Refused, match="expected number of classes 3, found number of classes 2"):
        load_trained(path, class_names=("a", "b", "c"))


def test_bins_of_survival_are_counted_in_the_weights(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", state_of(
        model_type="abmil", n_classes=5, task_type="survival",
        bin_edges=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0)))
    trained = load_trained(path, class_names=(), task_type="survival")
    assert trained.spec.n_classes == 5


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", torch.nn.Linear(2, 2).state_dict())
    assert model_type_of(torch.nn.Linear(2, 2).state_dict()) is None
    with pytest.raises(Refused, match="found no such entry.*give model_type"):
        load_trained(path, class_names=CLASSES)


def test_half_a_state_dict_tells_what_it_can() -> None:
    state = state_of(model_type="abmilx", options={"inner_dim": 16})
    state.pop("attention.fc2.weight")
    found = infer_spec("abmilx", state)
    assert found["embed_dim"] == 11 and found["options"]["inner_dim"] == 16
    assert "n_heads" not in found["options"]
    assert infer_spec("a plug-in", state) == {}


# ---------------------------------------------------------------------------- packings

@pytest.mark.parametrize(("name", "pack", "note"), [
    ("IAT-epoch=12.ckpt", lambda state: {
        "epoch": 12, "global_step": 9, "pytorch-lightning_version": "1.5.10",
        "state_dict": {f"model.{name}": value for name, value in state.items()},
        "optimizer_states": [{"state": {0: {"step": 9, "exp_avg": torch.zeros(2)}},
                              "param_groups": [{"lr": 1e-4, "params": [0]}]}]}, "'state_dict'"),
    ("fold_0_model_best.pt", lambda state: {"model": state, "teacher": None, "epoch": 3},
     "'model'"),
    ("fold_0_model_best.pt", lambda state: {
        "model": state, "teacher": {name: value + 1 for name, value in state.items()},
        "epoch": 3}, "'model'"),
    ("fold_0_ema_model_best.pt", lambda state: {
        "teacher": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
     "'teacher'"),
    ("fold_0_ema_model_best.pt", lambda state: {
        "model": {name: value + 1 for name, value in state.items()}, "teacher": state},
     "'teacher'"),
    ("fold_0_model_best.pt", lambda state: {"model": {
        **{f"module.mil.{name}": value for name, value in state.items()},
        "module.encoder.model.conv1.weight": torch.zeros(3)}, "epoch": 3}, "encoder (1 entries)"),
])
def test_what_training_programs_save(name: str, pack: Any, note: str, tmp_path: Path) -> None:
    state = state_of(model_type="abmilx", options={"inner_dim": 16})
    trained = load_trained(saved(tmp_path / name, pack(state)), class_names=CLASSES)
    assert same(trained.build(), state)
    assert any(note in one and one.startswith(name) for one in trained.notes), trained.notes


def test_a_checkpoint_with_objects_is_refused_in_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.ckpt", {"state_dict": state_of(), "hyper_parameters":
                                       argparse.Namespace(lr=1.0)})
    with pytest.raises(Refused, match="x.ckpt holds objects that could run code") as refused:
        load_trained(path, class_names=CLASSES)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------- with a json

def described(folder: Path, spec: SlideModelSpec, **more: Any) -> Path:
    path = saved(folder / "s_0_checkpoint.pt", state_of(**asdict(spec)))
    path.with_suffix(".json").write_text(json.dumps({"spec": asdict(spec), **more}))
    return path


def test_the_json_keeps_options_and_task(tmp_path: Path) -> None:
    spec = spec_of(model_type="abmilx", task_type="regression", n_classes=2,
                   target_mean=(1.0, 2.0), target_std=(1.0, 3.0),
                   options={"inner_dim": 16, "abx_alpha": 0.5, "act": "relu"})
    path = described(tmp_path, spec, class_names=["age", "size"])
    trained = load_trained(path, class_names=("age", "size"), task_type="regression",
                           options={"inner_dim": 16})
    assert trained.spec == spec and trained.described
    with pytest.raises(Refused, match="task_type is classification, but .* with regression"):
        load_trained(path, class_names=("age", "size"), task_type="classification")
    with pytest.raises(Refused, match="act is gelu, but the checkpoint was trained with relu"):
        load_trained(path, class_names=("age", "size"), options={"act": "gelu"})
    with pytest.raises(Refused, match=r"knows the classes age, size \(2\), the task has size, age"):
        load_trained(path, class_names=("size", "age"))


def test_a_survival_model_has_no_classes_to_compare(tmp_path: Path) -> None:
    spec = spec_of(model_type="abmil", n_classes=4, task_type="survival",
                   bin_edges=(0.0, 1.0, 2.0, 3.0, 4.0))
    trained = load_trained(described(tmp_path, spec, class_names=[]), class_names=(),
                           task_type="survival")
    assert trained.spec == spec


def test_what_changes_memory_alone_may_be_other_than_in_training(tmp_path: Path) -> None:
    spec = spec_of(model_type="streaming_test_resnet", embed_dim=96,
                   options={"stream_memory": 60.0, "head": "mean"})
    path = described(tmp_path, spec)
    trained = load_trained(path, class_names=("a", "b"),
                           options={"stream_memory": 2.0, "tile_size": 512})
    assert trained.spec.options["stream_memory"] == 2.0
    assert (trained.spec.options["tile_size"], trained.spec.options["head"]) == (512, "mean")
    with pytest.raises(Refused, match="head is max, but the checkpoint was trained with mean"):
        load_trained(path, class_names=("a", "b"), options={"head": "max"})


def test_patches_of_other_sizes_than_in_training_are_told(tmp_path: Path) -> None:
    trained = TrainedModel(
        path=tmp_path / "s_0_checkpoint.pt", spec=spec_of(model_type="e2e_r18_abmil"), state={},
        sha256="", encoder=None, described=True, notes=(),
        record={"patches": {"px": [256], "mpp_um": [0.5, 0.25]}})
    assert trained.pixel_notes({"px": [256], "mpp_um": [0.25]}) == []  # fewer slides
    assert trained.pixel_notes(None) == []
    (note,) = trained.pixel_notes({"px": [256], "mpp_um": [1.0]})
    assert "mpp_um [1.0] (training: [0.5, 0.25])" in note
