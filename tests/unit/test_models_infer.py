"""Published end-to-end checkpoints without a description: their weights tell what they are.

Layout: spec abmilx.md 6.2 and 10: ``fold_k_model_best.pt`` holds {model, teacher, epoch},
``encoder.model.*`` and ``mil.*``, with ``module.`` in front when trained on several GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoints import plain_names
from models.infer import infer_spec, model_type_of
from models.slide_models import SlideModelSpec, build_slide_model
from models.trained import load_trained
from utils.errors import Refused

State = dict[str, torch.Tensor]
# The released configuration of BRCA (spec 13.1), that of survival, and that of PANDA
BRCA = {"inner_dim": 256, "n_heads": 8, "mil_norm": "ln"}
SURVIVAL = {**BRCA, "abx_attn_bias": True}
PANDA = {"inner_dim": 512, "n_heads": 4, "mil_norm": "ln", "ffn": True}


def built(model_type: str, embed_dim: int, options: dict[str, Any], n_classes: int = 2) -> State:
    torch.manual_seed(0)
    model = build_slide_model(SlideModelSpec(
        model_type=model_type, embed_dim=embed_dim, n_classes=n_classes, options=options))
    return dict(model.state_dict())


def on_several_gpus(state: State) -> State:
    return {f"module.{name}": value for name, value in state.items()}


def published(state: State) -> dict[str, Any]:
    return {"model": state, "teacher": None, "epoch": 3}


def mean_alone(state: State) -> dict[str, Any]:
    return {"teacher": on_several_gpus(state), "epoch": 3}


@pytest.mark.parametrize(("model_type", "embed_dim", "options", "pack", "name"), [
    ("e2e_r18_abmilx", 256, BRCA, published, "fold_0_model_best.pt"),
    ("e2e_r18_abmilx", 256, SURVIVAL, lambda s: published(on_several_gpus(s)), "x.pt"),
    ("e2e_r18a_abmilx", 512, BRCA, dict, "x.pt"),
    ("e2e_r50v2_abmilx", 1024, PANDA, mean_alone, "fold_0_ema_model_best.pt"),
    ("e2e_r18_clam_sb", 256, {}, on_several_gpus, "x.pt")])
def test_published_checkpoints_load(
    model_type: str, embed_dim: int, options: dict[str, Any], pack: Callable[[State], Any],
    name: str, tmp_path: Path,
) -> None:
    state = built(model_type, embed_dim, options)
    assert {key.split(".")[0] for key in state} == {"encoder", "mil"}
    torch.save(pack(state), tmp_path / name)
    trained = load_trained(tmp_path / name, class_names=("a", "b"))
    assert (trained.spec.model_type, trained.spec.embed_dim) == (model_type, embed_dim)
    found = {key: trained.spec.options[key] for key in options}
    assert found == options
    assert any("BGR" in note for note in trained.notes)
    model = trained.build().state_dict()
    assert list(model) == list(state)
    assert all(torch.equal(model[key], value) for key, value in state.items())


def test_flags_tell_twins_apart(tmp_path: Path) -> None:
    """r50 and r50v2 have the same weights; they differ in what they started from."""
    path = tmp_path / "x.pt"
    torch.save(published(built("e2e_r50_abmilx", 1024, BRCA)), path)
    trained = load_trained(path, class_names=("a", "b"), model_type="e2e_r50_abmilx")
    assert trained.spec.model_type == "e2e_r50_abmilx"
    assert trained.spec.options["mil_norm"] == "ln"


def test_the_slide_model_alone_may_be_asked_for(tmp_path: Path) -> None:
    path, state = tmp_path / "x.pt", built("e2e_r18_abmilx", 256, BRCA)
    torch.save(published(state), path)
    trained = load_trained(path, class_names=("a", "b"), model_type="abmilx")
    assert (trained.spec.model_type, trained.spec.embed_dim) == ("abmilx", 256)
    assert torch.equal(trained.state["classifier.weight"], state["mil.classifier.weight"])
    assert any("left out its patch encoder" in note for note in trained.notes)


def test_encoders_that_are_not_published_ones_are_left_open() -> None:
    state = built("abmilx", 16, {"inner_dim": 16})
    inside = {f"mil.{name}": value for name, value in state.items()}
    stages = {f"encoder.model.layer{stage}.{block}.conv1.weight": torch.ones(1)
              for stage, depth in enumerate((3, 4, 6, 3), 1) for block in range(depth)}
    for encoder in ({}, stages, {"encoder.model.blocks.0.norm1.weight": torch.ones(2)}):
        names = plain_names(on_several_gpus({**encoder, **inside}))
        assert model_type_of(names) == "abmilx"
        found = infer_spec("e2e_resnet34_abmilx", names)
        assert found == infer_spec("abmilx", state) and found["embed_dim"] == 16


@pytest.mark.parametrize(("saved", "flags", "says"), [
    (("e2e_r18_abmilx", 256), {"embed_dim": 512}, "feature width 512, found feature width 256"),
    (("e2e_r18_abmilx", 256), {"options": {"n_heads": 4}}, "expected n_heads 4, found n_heads 8"),
    (("e2e_r18a_abmilx", 512), {"model_type": "e2e_r18_abmilx", "embed_dim": 256},
     "expected model type e2e_r18_abmilx, feature width 256, found model type e2e_r18a_abmilx"),
    (("e2e_r18_abmilx", 256), {"model_type": "e2e_r18_clam_sb"},
     "expected model type e2e_r18_clam_sb.*found model type e2e_r18_abmilx"),
    (("abmilx", 256), {"model_type": "e2e_r18_abmilx"},
     "expected model type e2e_r18_abmilx, found model type abmilx")])
def test_what_does_not_fit_is_refused_by_what_it_is(
    saved: tuple[str, int], flags: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    torch.save(built(*saved, BRCA), path)
    with pytest.raises(Refused, match=says):
        load_trained(path, class_names=("a", "b"), **flags)


def test_half_an_encoder_is_refused(tmp_path: Path) -> None:
    state = built("e2e_r18_abmilx", 256, BRCA)
    state.pop("encoder.model.layer1.0.bn1.weight")
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(Refused, match="expected 'encoder.model.layer1.0.bn1.weight', found no"):
        load_trained(tmp_path / "x.pt", class_names=("a", "b"))


def test_state_names_are_those_of_the_paper() -> None:
    state = built("e2e_r18_abmilx", 256, BRCA)
    for name in ("encoder.model.conv1.weight", "encoder.model.layer1.0.conv1.weight",
                 "encoder.model.layer3.1.bn2.running_var", "mil.attention.fc1.weight",
                 "mil.attn_plus_fn.qk.weight", "mil.classifier.weight"):
        assert name in state
    assert not any(name.startswith("encoder.model.layer4") for name in state)


def test_streaming_checkpoints_need_their_name(tmp_path: Path) -> None:
    """A pooled map is known for what it is, its network is not; maximum and mean share weights."""
    path, state = tmp_path / "x.pt", built("streaming_test_resnet", 96, {"head": "mean"}, 3)
    torch.save(state, path)
    names = ("a", "b", "c")
    with pytest.raises(Refused, match="found model type streaming.*: give model_type"):
        load_trained(path, class_names=names)
    flags: dict[str, Any] = {"class_names": names, "model_type": "streaming_test_resnet"}
    trained = load_trained(path, **flags)
    assert (trained.spec.embed_dim, trained.spec.options["head"]) == (96, "max")
    assert any("head: mean" in note for note in trained.notes)
    trained = load_trained(path, **flags, options={"head": "mean"})
    assert not trained.notes
    assert all(torch.equal(value, state[name])
               for name, value in trained.build().state_dict().items())
    with pytest.raises(Refused, match="number of classes 2, found number of classes 3"):
        load_trained(path, **{**flags, "class_names": names[:2]})
    with pytest.raises(Refused, match="embed_dim|conv1"):
        load_trained(path, class_names=names, model_type="streaming_resnet18")


def test_attention_over_a_map_is_read_from_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(built("streaming_test_resnet", 96, {"head": "gated_attention"}), path)
    trained = load_trained(path, class_names=("a", "b"), model_type="streaming_test_resnet")
    assert trained.spec.options["head"] == "gated_attention"
    assert trained.spec.model_size == "small"
    assert not trained.notes
