"""HAG-MIL against numbers of the original program (golden/README.md, section 4)."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from models.hag_mil import HAGMIL
from models.iat import IAT
from models.instance_loss import cluster_instances
from models.slide_models import SlideModelSpec, build_slide_model
from tests.conftest import GOLDEN
from tests.golden import fill
from tests.golden.arrays import assert_values
from utils.contracts import Bag
from utils.losses import LOSSES

TOLERANCE = 3e-5
BLOCK = ("h", "raw_scores", "slide_vector", "instance_embedding")  # what a block returns
HAGMIL_JSON = json.loads((GOLDEN / "hagmil.json").read_text())
CASES = {f"{case['fill_seed']}": case for case in HAGMIL_JSON["cases"]}
WALKS = {f"{walk['k_parents']}-{walk['fill_seed']['2']}": walk
         for walk in HAGMIL_JSON["three_level"]}


def build(args: dict[str, Any], **more: Any) -> HAGMIL:
    """A model from the original's constructor arguments, in its legacy modes."""
    model = build_slide_model(SlideModelSpec(
        model_type="hag_mil", embed_dim=args.get("feat_in", 1024),
        n_classes=args.get("n_classes", 2), gated=args.get("gate", True),
        dropout=args.get("dropout", 0.25), k_sample=args.get("k_sample", 8),
        bag_weight=0.5, n_levels=more.pop("n_levels", 1),
        options={"legacy_padding": True, "legacy_order": True,
                 "hidden_dims": args.get("hidden_dims", [1024, 1536, 512, 1024]), **more}))
    assert isinstance(model, HAGMIL)
    return model.eval()


def features(run: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(fill.bag(run["N"], 1024, run["input_seed"]))


assert_array = partial(assert_values, tolerance=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_one_level_equals_the_original(name: str) -> None:
    case = CASES[name]
    model = build(case["args"])
    network = model.model0
    assert isinstance(network, IAT)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == \
        case["state_dict"]
    assert sum(value.numel() for value in network.parameters()) == case["n_params"]
    fill.fill_torch(network, case["fill_seed"])
    blocks: list[tuple[torch.Tensor, ...]] = []
    for block in network.layers:
        block.register_forward_hook(lambda *call: blocks.append(call[2]))
    for run in case["runs"]:
        blocks.clear()
        with torch.no_grad():
            output = model(Bag(slide_id="golden", features=features(run)))
        if "error" in run:  # the original raises on a bag of one
            assert torch.isfinite(output.logits).all()
            continue
        np.testing.assert_allclose(output.logits[0], run["logits"], atol=TOLERANCE)
        np.testing.assert_allclose(output.probabilities[0], run["Y_prob"], atol=TOLERANCE)
        assert [output.predicted] == run["Y_hat"]
        assert_array(output.attention, run["A_raw"])
        for found, golden in zip(blocks, run["blocks"], strict=True):
            for part, key in zip(found, BLOCK, strict=True):
                assert_array(part, golden[key])
        check_instances(network, blocks[-1], case, run)


def check_instances(network: IAT, block: tuple[torch.Tensor, ...], case: dict[str, Any],
                    run: dict[str, Any]) -> None:
    _, scores, _, instances = block
    for golden in run["instance"]:
        with torch.no_grad():
            found = cluster_instances(
                instances, scores, golden["label"], network.instance_classifiers,
                k_sample=case["args"].get("k_sample", 8), subtyping=golden["subtyping"],
                loss=LOSSES.get(golden["loss"]))
        if "error" in golden:  # the original raises on bags smaller than k
            assert torch.isfinite(found.value)
            continue
        assert float(found.value) == pytest.approx(golden["instance_loss"], abs=TOLERANCE)
        assert found.targets.tolist() == golden["inst_labels"]
        assert found.predictions.tolist() == golden["inst_preds"]


class Rows:
    """A finer level in memory."""

    branching = 4
    coords: np.ndarray | None = None
    valid: np.ndarray | None = None

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: np.ndarray) -> torch.Tensor:
        return self.rows[torch.from_numpy(rows)]


@pytest.mark.parametrize("name", WALKS)
def test_three_levels_follow_the_original(name: str) -> None:
    """Selection, order of the children, logits, and the smoothed losses of every level."""
    walk = WALKS[name]
    model = build(walk["args"], n_levels=3, v_patch=[walk["k_parents"]])
    levels = ("2", "1", "0")
    for level in levels:
        fill.fill_torch(getattr(model, f"model{level}"), walk["fill_seed"][level])
    coarse, *finer = (features(walk["input"][level]) for level in levels)
    bag = Bag(slide_id="golden", features=coarse, label=walk["label"],
              children=tuple(Rows(rows) for rows in finer))
    with torch.no_grad():
        output = model(bag)
        steps = list(model.losses(bag))
    np.testing.assert_allclose(output.probabilities[0], walk["final_prob"], atol=TOLERANCE)
    for level, record, step in zip(levels, output.levels, steps, strict=True):
        golden = walk["levels"][level]
        assert len(record.rows) == golden["n_rows"]
        assert_array(record.attention, golden["A_raw"])
        np.testing.assert_allclose(record.logits[0], golden["logits"], atol=TOLERANCE)
        assert record.selected.tolist() == golden.get("chosen_parent_rows", [])
        assert float(step.slide_loss) == pytest.approx(walk["bag_loss"][level], abs=TOLERANCE)
        assert float(step.parts["instance_loss"]) == pytest.approx(
            golden["instance_loss_ce"], abs=TOLERANCE)
    for above, record in zip(levels, output.levels[1:], strict=False):
        assert record.rows.tolist() == walk["levels"][above]["child_rows"]
