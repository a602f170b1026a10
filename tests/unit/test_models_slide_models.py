"""The registry of slide models and the description they are built from."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from models.slide_models import SLIDE_MODELS, SlideModelSpec, build_slide_model
from tests.conftest import ROOT
from utils.contracts import Bag
from utils.errors import Refused
from utils.options import from_mapping


def spec(**changes: Any) -> SlideModelSpec:
    return SlideModelSpec(**{"model_type": "clam_sb", "embed_dim": 16, "n_classes": 2, **changes})


@pytest.mark.parametrize(("model_type", "n_classes", "parameters"), [
    ("clam_sb", 2, 790_791), ("clam_sb", 3, 792_330), ("clam_mb", 2, 791_048),
    ("clam_mb", 3, 792_844), ("mil", 2, 525_826), ("mil", 3, 526_339), ("abmil", 2, 788_739)])
def test_sizes_are_the_published_ones(model_type: str, n_classes: int, parameters: int) -> None:
    model = build_slide_model(spec(model_type=model_type, n_classes=n_classes, embed_dim=1024))
    assert sum(value.numel() for value in model.parameters()) == parameters


@pytest.mark.parametrize("model_type", list(SLIDE_MODELS))
@pytest.mark.parametrize("n_classes", [2, 4])
def test_every_model_keeps_the_contract(model_type: str, n_classes: int) -> None:
    model = build_slide_model(spec(model_type=model_type, n_classes=n_classes)).eval()
    bag = Bag(slide_id="s", features=torch.randn(30, 16), label=n_classes - 1)
    steps = list(model.losses(bag))  # type: ignore[operator]
    output = steps[-1].output
    assert output.logits.shape == (1, n_classes)
    assert float(output.probabilities.sum()) == pytest.approx(1.0)
    assert all(step.value.requires_grad and step.value.ndim == 0 for step in steps)
    assert not any(step.slide_loss.requires_grad for step in steps)
    if model_type in ("mil", "mean", "max"):
        assert output.attention is None
        assert output.instances.shape == (30, n_classes)
    else:
        assert output.attention.shape[1] == 30
        assert output.attention_of(n_classes - 1).shape == (30,)


@pytest.mark.parametrize("model_type", list(SLIDE_MODELS))
def test_equal_seeds_give_equal_weights(model_type: str) -> None:
    built = []
    for _ in range(2):
        torch.manual_seed(4)
        built.append(build_slide_model(spec(model_type=model_type)).state_dict())
    assert all(torch.equal(value, built[1][name]) for name, value in built[0].items())


@pytest.mark.parametrize(("changes", "drop"), [
    ({}, 0.25), ({"dropout": 0.5}, 0.25), ({"dropout": 0.0}, 0.0),
    ({"attention_dropout": 0.1}, 0.1), ({"dropout": 0.0, "attention_dropout": 0.4}, 0.4),
    ({"attention_dropout": 0.0}, 0.0)])
def test_attention_dropout_is_clams_unless_given(changes: dict[str, float], drop: float) -> None:
    assert spec(**changes).attention_rate == drop
    model: Any = build_slide_model(spec(gated=False, **changes))
    layers = model.attention_net[3].module
    assert len(layers) == (4 if drop else 3)
    if drop:
        assert layers[2].drop == drop


@pytest.mark.parametrize(("changes", "message"), [
    ({"embed_dim": 0}, "embed_dim is 0, expected at least 1"),
    ({"n_classes": 1}, "n_classes is 1, expected at least 2"),
    ({"model_size": "medium"}, "model_size is 'medium', expected small or big"),
    ({"dropout": 1.0}, "dropout is 1.0"), ({"k_sample": 0}, "k_sample is 0"),
    ({"bag_weight": 1.5}, "bag_weight is 1.5"), ({"attention_dropout": -0.1}, "dropout is -0.1")])
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        spec(**changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "clam"}, "unknown slide model 'clam'"),
    ({"bag_loss": "sv"}, "bag_loss sv is none for classification: expected ce or svm"),
    ({"inst_loss": "hinge"}, "unknown loss 'hinge'")])
def test_unknown_names_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        build_slide_model(spec(**changes))


def test_description_survives_json() -> None:
    made = spec(model_type="clam_mb", attention_dropout=0.1, subtyping=True)
    values = from_mapping(SlideModelSpec, dataclasses.asdict(made), source="json")
    assert SlideModelSpec(**values) == made


def test_names_are_known_without_torch() -> None:
    code = ("import sys; from models.slide_models import SLIDE_MODELS; "
            "assert 'clam_sb' in SLIDE_MODELS; assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(("head", "keys"), [
    ("max", {"linear"}), ("mean", {"linear"}),
    ("gated_attention", {"attention_net", "classifiers"})])
def test_streaming_models_are_built_by_name_and_described(head: str, keys: set[str]) -> None:
    found = spec(model_type="streaming_test_resnet", embed_dim=96, options={"head": head})
    assert found.options["train_part"] == "all"
    assert from_mapping(SlideModelSpec, dataclasses.asdict(found), source="json") == (
        dataclasses.asdict(found))
    names = [name.split(".") for name in build_slide_model(found).state_dict()]
    assert {name[1] for name in names if name[0] == "mil"} == keys
    assert {name[0] for name in names} == {"encoder", "mil"}
    with pytest.raises(Refused, match="options of streaming_test_resnet"):
        spec(model_type="streaming_test_resnet", embed_dim=96, options={"inner_dim": 3})
