"""CLAM and its baselines against numbers of the original program (golden/README.md, section 4)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoints import clean_state_dict
from models.slide_models import SlideModelSpec, build_slide_model
from tests.conftest import GOLDEN
from tests.golden import fill
from tests.golden.arrays import assert_values
from utils.contracts import Bag

TOLERANCE = 1e-5
CLAM = json.loads((GOLDEN / "clam.json").read_text())
CASES = {f"{case['model']}-{case['fill_seed']}": case for case in CLAM["cases"]}


def build(model: str, args: dict[str, Any], **more: Any) -> Any:
    """A model from the constructor arguments that the golden files use."""
    return build_slide_model(SlideModelSpec(
        model_type=model.lower().split("_fc")[0], embed_dim=args.get("embed_dim", 1024),
        n_classes=args["n_classes"], model_size=args.get("size_arg", "small"),
        dropout=args["dropout"], gated=args.get("gate", True), k_sample=args.get("k_sample", 8),
        **more))


def make_bag(run: dict[str, Any], width: int, label: int | None = None) -> Bag:
    features = torch.from_numpy(fill.bag(run["N"], width, run["input_seed"]))
    return Bag(slide_id="golden", features=features, label=label)


def assert_array(found: torch.Tensor, golden: dict[str, Any]) -> None:
    """The very shape, and the values."""
    assert list(found.shape) == golden["shape"]
    assert_values(found, golden, tolerance=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_original(name: str) -> None:
    case = CASES[name]
    model = build(case["model"], case["args"])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == \
        case["state_dict"]
    assert sum(value.numel() for value in model.parameters()) == case["n_params"]
    fill.fill_torch(model, case["fill_seed"])
    for run in case["runs"]:
        with torch.no_grad():
            output = model(make_bag(run, case["args"].get("embed_dim", 1024)))
        np.testing.assert_allclose(output.logits[0], run["logits"], atol=TOLERANCE)
        np.testing.assert_allclose(output.probabilities[0], run["Y_prob"], atol=TOLERANCE)
        assert output.predicted == run["Y_hat"]
        assert_array(output.attention, run["A_raw"])
        assert_array(output.embedding, run["features"])
        if run["N"] >= case["args"]["k_sample"]:
            for sign, ids in ((1, run["top_ids"]), (-1, run["low_ids"])):
                picked = (sign * output.attention).topk(case["args"]["k_sample"], dim=1).indices
                assert picked.tolist() == ids


@pytest.mark.parametrize("name", CASES)
def test_instance_losses_equal_the_original(name: str) -> None:
    case = CASES[name]
    for subtyping in (False, True):
        for loss in ("ce", "svm"):
            model = build(case["model"], case["args"], subtyping=subtyping, inst_loss=loss)
            fill.fill_torch(model, case["fill_seed"])
            for run in case["runs"]:
                for golden in run["instance"]:
                    if (golden["subtyping"], golden["loss"]) == (subtyping, loss):
                        check_instances(model, case, run, golden)


def check_instances(
    model: Any, case: dict[str, Any], run: dict[str, Any], golden: dict[str, Any]
) -> None:
    bag = make_bag(run, case["args"].get("embed_dim", 1024), golden["label"])
    with torch.no_grad():
        (step,) = model.losses(bag)
    found = float(step.parts["instance_loss"])
    if "error" in golden:  # the original raises on bags smaller than k_sample
        assert found == 0.0
        assert torch.isfinite(step.value)
        return
    assert found == pytest.approx(golden["instance_loss"], abs=TOLERANCE)
    assert step.targets.tolist() == golden["inst_labels"]
    assert step.predictions.tolist() == golden["inst_preds"]


@pytest.mark.parametrize("case", CLAM["mil"], ids=lambda case: case["model"])
@pytest.mark.parametrize("grad", [False, True])
def test_baselines_equal_the_original(case: dict[str, Any], grad: bool) -> None:
    model = build(case["model"], case["args"])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == \
        case["state_dict"]
    fill.fill_torch(model, case["fill_seed"])
    for run in case["runs"]:
        with torch.set_grad_enabled(grad):
            output = model(make_bag(run, 1024))
        np.testing.assert_allclose(output.logits.detach()[0], run["logits"], atol=TOLERANCE)
        assert [output.predicted] == run["Y_hat"]
        assert_array(output.instances, run["patch_probs"])
        assert_array(output.embedding.detach(), run["features"])


@pytest.mark.parametrize("trace", CLAM["train_traces"],
                         ids=lambda trace: f"{trace['model']}-{trace['opt']}")
def test_training_follows_the_original(trace: dict[str, Any]) -> None:
    """Twelve optimiser steps of one bag each: every loss, and all weights at the end."""
    model = build(trace["model"], trace["args"], subtyping=trace["args"]["subtyping"],
                  bag_loss=trace["bag_loss"], inst_loss=trace["inst_loss"],
                  bag_weight=trace["bag_weight"])
    fill.fill_torch(model, trace["fill_seed"]).train()
    keywords = {"lr": trace["lr"], "weight_decay": trace["weight_decay"]}
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(model.parameters(), **keywords) if trace["opt"] == "adam"
        else torch.optim.SGD(model.parameters(), momentum=0.9, **keywords))
    bags = [make_bag(bag, trace["D"], bag["label"]) for bag in trace["bags"]]
    for index, golden in enumerate(trace["steps"]):
        optimizer.zero_grad(set_to_none=True)
        for step in model.losses(bags[index % len(bags)]):
            step.value.backward()
        assert float(step.slide_loss) == pytest.approx(golden["bag_loss"], abs=2e-5)
        assert float(step.parts["instance_loss"]) == pytest.approx(
            golden["instance_loss"], abs=2e-5)
        assert float(step.value.detach()) == pytest.approx(golden["total"], abs=2e-5)
        if "grad_norms" in golden:
            check_gradients(model, golden["grad_norms"])
        optimizer.step()
    for name, value in model.state_dict().items():
        assert float(value.double().abs().sum()) == pytest.approx(
            trace["params_after"][name], rel=1e-5, abs=1e-3), name
    model.eval()
    np.testing.assert_allclose(model(bags[0]).probabilities[0].detach(),
                               trace["final_prob_bag0"], atol=TOLERANCE)


def check_gradients(model: Any, golden: dict[str, float | None]) -> None:
    for name, parameter in model.named_parameters():
        if golden[name] is None:  # skipped by the optimiser, so no weight decay either
            assert parameter.grad is None, name
        else:
            assert float(parameter.grad.norm()) == pytest.approx(
                golden[name], rel=1e-4, abs=1e-6), name


def test_demo_checkpoint_of_the_original_loads() -> None:
    demo = CLAM["demo_checkpoint"]
    stored = {key: torch.full(entry["shape"], float(i)).to(
                  getattr(torch, entry["dtype"].removeprefix("torch.")))
              for i, (key, entry) in enumerate(demo["keys_as_stored"].items())}
    model = build_slide_model(SlideModelSpec(model_type="clam_sb", embed_dim=1024, n_classes=2))
    cleaned, notes = clean_state_dict(stored, model)
    assert {key: list(value.shape) for key, value in cleaned.items()} == demo["keys_after_cleaning"]
    model.load_state_dict(cleaned, strict=True)
    for key, value in cleaned.items():
        old = key.replace("attention_net.", "attention_net.module.", 1)
        assert torch.equal(value, stored[old if old in stored else key])
    assert len(notes) == 2
