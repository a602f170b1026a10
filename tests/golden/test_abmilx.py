"""ABMILX against numbers of the original program (golden/README.md, section 4)."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from models.abmilx import ABMILX
from models.checkpoints import clean_state_dict
from models.slide_models import SlideModelSpec, build_slide_model
from tests.conftest import GOLDEN
from tests.golden import fill
from tests.golden.arrays import assert_values
from utils.contracts import Bag

TOLERANCE = 3e-5
ABMILX_JSON = json.loads((GOLDEN / "abmilx.json").read_text())
CASES = {str(case["fill_seed"]): case for case in ABMILX_JSON["cases"]}


def build(case: dict[str, Any], kernel: str = "auto") -> ABMILX:
    """The model of a golden case, with its weights; the original's ways to pad are all one."""
    args = case["args"]
    model = build_slide_model(SlideModelSpec(
        model_type="abmilx", embed_dim=args["input_dim"], n_classes=args["n_classes"],
        dropout=args["dropout"], options={
            "inner_dim": args["inner_dim"], "n_heads": args["n_heads"], "act": args["act"],
            "mil_norm": args["mil_norm"] or "none", "mil_bias": args["mil_bias"],
            "abx_attn_bias": args["attn_bias"], "abx_attn_plus": args["attn_plus"],
            "abx_attn_type": args["attn_type"], "abx_D": args["D"],
            "abx_embed_new": args["attn_plus_embed_new"], "ffn": args["ffn"],
            "sdpa_type": kernel}))
    assert isinstance(model, ABMILX)
    fill.fill_torch(model, case["fill_seed"])
    if "alpha_set_to" in case:
        assert model.attn_plus_fn is not None
        torch.nn.init.constant_(model.attn_plus_fn.v.weight, case["alpha_set_to"])
    return model


assert_array = partial(assert_values, tolerance=TOLERANCE)


@pytest.mark.parametrize("kernel", ["blocks", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_original(name: str, kernel: str) -> None:
    case = CASES[name]
    model = build(case, kernel)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == \
        case["state_dict"]
    assert sum(value.numel() for value in model.parameters()) == case["n_params"]
    for run in case["runs"]:
        bags = [fill.bag(run["N"], case["args"]["input_dim"], seed) for seed in run["input_seeds"]]
        with torch.no_grad():
            found = model.batch(torch.from_numpy(np.stack(bags)))
        np.testing.assert_allclose(
            found.logits.flatten(), np.ravel(run["logits"]), atol=TOLERANCE)
        assert_array(found.log_weights.exp(), run["attention"])
        assert_array(found.embedding, run["bag_vector"])
        assert_array(found.instances, run["embeddings"])


@pytest.mark.parametrize("kernel", ["blocks", "fused"])
@pytest.mark.parametrize("golden", ABMILX_JSON["gradients"], ids=["plus", "no_plus"])
def test_gradients_equal_the_original(golden: dict[str, Any], kernel: str) -> None:
    model = build(golden, kernel)
    features = torch.from_numpy(
        fill.bag(golden["N"], golden["args"]["input_dim"], golden["input_seed"])).requires_grad_()
    (step,) = model.losses(Bag(slide_id="golden", features=features, label=golden["label"]))
    assert step.value.item() == pytest.approx(golden["cross_entropy"], abs=TOLERANCE)
    step.value.backward()
    norms = {name: float(value.grad.norm())
             for name, value in model.named_parameters() if value.grad is not None}
    assert norms == pytest.approx(golden["grad_norms"], rel=TOLERANCE, abs=TOLERANCE)
    assert features.grad is not None
    assert_array(features.grad, golden["input_grad"])


@pytest.mark.parametrize("prefix", ["", "module.", "mil.", "module.mil."])
def test_checkpoints_load_with_any_prefix(prefix: str) -> None:
    case = CASES["1"]
    state = build(case).state_dict()
    named = {prefix + name: value for name, value in state.items()}
    if "mil." in prefix:
        named[prefix.replace("mil.", "encoder.model.conv1.weight")] = torch.zeros(2, 2)
    cleaned, _ = clean_state_dict(named, build(case))
    assert all(torch.equal(cleaned[name], value) for name, value in state.items())
    assert cleaned.keys() == state.keys()
