"""From flags to the description of a model, and the settings files that ship."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from main import Options
from models.model_flags import ModelFlags, describe_model
from models.slide_models import build_slide_model
from tests.conftest import ROOT
from utils.errors import Refused
from utils.legacy_config import translate_config
from utils.options import from_mapping, load_yaml

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


def describe(**flags: Any) -> Any:
    return describe_model(ModelFlags(**flags), task_type=flags.pop("_task", "classification"),
                          n_classes=2)


@pytest.mark.parametrize(("flags", "field", "expected"), [
    ({"drop_out": 0.1}, "dropout", 0.1), ({"ungated": True}, "gated", False),
    ({"B": 3}, "k_sample", 3), ({"B": 0}, "k_sample", 8),
    ({"inst_loss": "None"}, "inst_loss", "ce"),
    ({"inst_loss": "svm"}, "inst_loss", "svm"), ({}, "bag_weight", 0.7),
    ({"model_type": "hag_mil"}, "bag_weight", 0.5),
    ({"model_type": "hag_mil", "bag_weight": 0.9}, "bag_weight", 0.9),
    ({"no_inst_cluster": True}, "instance_clustering", False), ({}, "bag_loss", "ce"),
    ({"bag_loss": "svm"}, "bag_loss", "svm"), ({"label_smoothing": 0.1}, "label_smoothing", 0.1),
    ({"embed_dim": 7}, "embed_dim", 7), ({"nll_alpha": 0.3}, "nll_alpha", 0.3)])
def test_flags_reach_the_description(flags: dict[str, Any], field: str, expected: Any) -> None:
    assert getattr(describe(**flags), field) == expected


def test_survival_has_an_output_a_bin_and_cox_one() -> None:
    for flags, outputs in (({"n_bins": 6}, 6), ({"bag_loss": "cox"}, 1)):
        found = describe_model(ModelFlags(model_type="abmil", **flags), task_type="survival",
                               n_classes=2)
        assert found.n_classes == outputs


def test_a_flag_of_another_family_is_refused() -> None:
    with pytest.raises(Refused, match="--abx_D belongs to abmilx, it has no effect on clam_sb"):
        describe(abx_D=64)
    assert describe(model_type="transmil", inner_dim=64).options["inner_dim"] == 64


def test_a_streaming_model_has_the_width_of_its_network_and_options_of_its_own() -> None:
    spec = describe(model_type="streaming_resnet34", head="gated_attention", cut="layer3")
    assert spec.embed_dim == 512
    assert (spec.options["head"], spec.options["cut"]) == ("gated_attention", "layer3")
    for flags, message in (
            ({"embed_dim": 1024}, "resnet34 gives 512 numbers"),
            ({"train_blocks": 1}, "--train_blocks belongs to e2e models"),
            ({"abx_D": 64}, "--abx_D belongs to abmilx")):
        with pytest.raises(Refused, match=message):
            describe(model_type="streaming_resnet34", **flags)
    with pytest.raises(Refused, match="--tile_size belongs to streaming models"):
        describe(tile_size=64)


@pytest.mark.parametrize(("flags", "task", "message"), [
    ({"model_type": "mil"}, "survival", "mil tells classes apart"),
    ({"model_type": "clam_sb"}, "regression", "instance clustering of clam_sb needs classes"),
    ({"model_type": "dsmil", "bag_loss": "cox"}, "survival", "Cox needs one"),
    ({"model_type": "abmil", "bag_loss": "ce"}, "survival", "bag_loss ce is none for survival"),
    ({"model_type": "abmil", "n_levels": 3}, "classification", "only hag_mil takes several")])
def test_models_refuse_what_they_cannot_learn(
    flags: dict[str, Any], task: Any, message: str
) -> None:
    levels = flags.pop("n_levels", 1)
    with pytest.raises(Refused, match=message):
        describe_model(ModelFlags(**flags), task_type=task, n_classes=2,
                       n_levels=levels).objective()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_settings_files_build_their_model(path: Any) -> None:
    keys = translate_config(load_yaml(path), str(path))
    values = from_mapping(Options, keys, source=str(path))
    flags = Options(data_root_dir=path, **values)
    spec = describe_model(flags, task_type=flags.task_type or "classification", n_classes=2,
                          n_levels=1 + len(flags.child_levels))
    with torch.device("meta"):
        model = build_slide_model(spec)
    assert sum(one.numel() for one in model.parameters()) > 100_000
