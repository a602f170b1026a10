"""Every known naming of old checkpoints loads; what does not fit is refused by what it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.checkpoints import clean_state_dict
from models.slide_models import SlideModelSpec, build_slide_model
from utils.errors import Refused

State = dict[str, torch.Tensor]


def make(model_type: str = "clam_sb", **changes: Any) -> torch.nn.Module:
    return build_slide_model(SlideModelSpec(
        **{"model_type": model_type, "embed_dim": 16, "n_classes": 2, **changes}))


def rename(state: State, pattern: str, replacement: str) -> State:
    return {re.sub(pattern, replacement, name): value for name, value in state.items()}


def data_parallel(state: State) -> State:
    return rename(state, r"^attention_net\.", "attention_net.module.")


def with_loss_buffer(state: State) -> State:
    return {**state, "instance_loss_fn.labels": torch.arange(2)}


def head_at_two(state: State) -> State:
    return rename(state, r"^attention_net\.3\.", "attention_net.2.")


def end_to_end(state: State) -> State:
    return {"encoder.model.conv1.weight": torch.zeros(2), "encoder.model.bn1.bias": torch.ones(2),
            **rename(state, "^", "mil.")}


def old_mil(state: State) -> State:
    return rename(rename(state, r"^classifier\.", "classifier.3."), r"^fc\.", "classifier.")


def old_mil_two(state: State) -> State:
    return rename(old_mil(state), r"^classifier\.3\.", "classifier.2.")


def old_mil_parallel(state: State) -> State:
    return rename(old_mil(state), r"^classifier\.", "classifier.module.")


def old_mil_mc(state: State) -> State:
    state = dict(state)
    weight, bias = state.pop("classifiers.weight"), state.pop("classifiers.bias")
    for c in range(len(weight)):
        state[f"classifiers.{c}.weight"] = weight[c : c + 1]
        state[f"classifiers.{c}.bias"] = bias[c : c + 1]
    return state


SB: dict[str, Any] = {}
MB, MIL, MIL3 = {"model_type": "clam_mb"}, {"model_type": "mil"}, {
    "model_type": "mil", "n_classes": 3}
UNGATED = {"gated": False}
ABMILX = {"model_type": "abmilx", "options": {"inner_dim": 16}}
DSMIL = {"model_type": "dsmil"}
TRANSMIL = {"model_type": "transmil", "options": {"inner_dim": 16}}
HAG = {"model_type": "hag_mil", "n_levels": 3, "options": {"hidden_dims": (16,)}}
VARIANTS: list[tuple[str, dict[str, Any], Callable[[State], State], str | None]] = [
    ("as it is", SB, dict, None),
    ("the CLAM class of 2020", MB, dict, None),
    ("DataParallel", SB, data_parallel, "DataParallel"),
    ("published demo", SB, lambda s: with_loss_buffer(data_parallel(s)), "DataParallel"),
    ("loss buffer", MB, with_loss_buffer, "instance_loss_fn"),
    ("head at place 2", SB, head_at_two, "place 2"),
    ("head at place 2, parallel", MB, lambda s: data_parallel(head_at_two(s)), "place 2"),
    ("ungated", UNGATED, dict, None),
    ("ungated, parallel", UNGATED, data_parallel, "DataParallel"),
    ("ungated, .module deleted by the original", UNGATED,
     lambda s: rename(s, r"\.3\.module\.", ".3."), "ungated"),
    ("ungated, trained without dropout", UNGATED,
     lambda s: rename(s, r"\.module\.3\.", ".module.2."), "ungated"),
    ("ungated, trained with dropout", {"gated": False, "dropout": 0.0},
     lambda s: rename(s, r"\.module\.2\.", ".module.3."), "ungated"),
    ("DistributedDataParallel", SB, lambda s: rename(s, "^", "module."), "wrapped"),
    ("compiled", {"model_type": "abmil"}, lambda s: rename(s, "^", "_orig_mod."), "wrapped"),
    ("both", SB, lambda s: rename(s, "^", "module._orig_mod."), "wrapped"),
    ("both, the other way", SB, lambda s: rename(s, "^", "_orig_mod.module."), "wrapped"),
    ("MIL_fc", MIL, dict, None),
    ("early MIL_fc", MIL, old_mil, "early MIL_fc"),
    ("early MIL_fc without dropout", MIL, old_mil_two, "early MIL_fc"),
    ("early MIL_fc, parallel", MIL, old_mil_parallel, "early MIL_fc"),
    ("MIL_fc, parallel", MIL, lambda s: rename(s, r"^fc\.", "fc.module."), "DataParallel"),
    ("MIL_fc_mc", MIL3, dict, None),
    ("early MIL_fc_mc", MIL3, old_mil_mc, "early MIL_fc_mc"),
    ("end to end", ABMILX, end_to_end, "patch encoder (2 entries)"),
    ("end to end, CLAM", SB, end_to_end, "patch encoder (2 entries)"),
    ("end to end, several GPUs", ABMILX, lambda s: rename(end_to_end(s), "^", "module."),
     "patch encoder (2 entries)"),
    ("mil. without an encoder", ABMILX, lambda s: rename(s, "^", "mil."), "(0 entries)"),
    ("TransMIL in Lightning", TRANSMIL, lambda s: rename(s, "^", "model."), "wrapped"),
    ("HAG-MIL as published", HAG, dict, None),
    ("HAG-MIL with its loss", HAG, lambda s: {
        **s, "model2.instance_loss_fn.labels": torch.arange(2)}, "instance_loss_fn"),
    ("HAG-MIL in Lightning", HAG, lambda s: rename(s, "^", "model."), "wrapped"),
    ("DSMIL", DSMIL, dict, None),
    ("early DSMIL", DSMIL, lambda s: rename(s, r"^i_classifier\.fc\.0", "i_classifier.fc"),
     "early DSMIL"),
    ("DSMIL, several GPUs", DSMIL, lambda s: rename(s, "^", "module."), "wrapped"),
]


@pytest.mark.parametrize(("changes", "variant", "note"), [case[1:] for case in VARIANTS],
                         ids=[case[0] for case in VARIANTS])
def test_variant_loads(
    changes: dict[str, Any], variant: Callable[[State], State], note: str | None
) -> None:
    torch.manual_seed(0)
    original, model = make(**changes).state_dict(), make(**changes)
    cleaned, notes = clean_state_dict(variant(dict(original)), model)
    model.load_state_dict(cleaned, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, original[name]), name
    if note is None:
        assert notes == []
    else:
        assert any(note in one for one in notes), notes


@pytest.mark.parametrize(("saved", "asked", "message"), [
    (MB, SB, "expected model type clam_sb, found model type clam_mb"),
    (SB, MB, "expected model type clam_mb, found model type clam_sb"),
    (SB, {"model_type": "abmil"}, "expected model type abmil, found model type clam_sb"),
    ({"model_type": "abmil"}, SB, "expected model type clam_sb, found model type abmil"),
    (MIL, SB, "expected model type clam_sb, found model type mil"),
    ({"n_classes": 3}, SB, "expected number of classes 2, found number of classes 3"),
    (MIL3, MIL, "expected number of classes 2, found number of classes 3"),
    ({"model_type": "clam_mb", "n_classes": 3}, MB, "expected number of classes 2, found .* 3"),
    ({"embed_dim": 20}, SB, "expected feature width 16, found feature width 20"),
    ({"model_size": "big"}, SB, "expected attention width 256, found attention width 384"),
    ({"gated": False}, SB, "expected attention gated, found attention ungated"),
    ({"model_type": "clam_mb", "embed_dim": 20}, SB,
     "expected model type clam_sb, feature width 16, found model type clam_mb, feature width 20"),
    (SB, ABMILX, "expected model type abmilx, found model type clam_sb"),
    (ABMILX, SB, "expected model type clam_sb, found model type abmilx"),
    (TRANSMIL, DSMIL, "expected model type dsmil, found model type transmil"),
    (DSMIL, TRANSMIL, "expected model type transmil, found model type dsmil"),
    (DSMIL, HAG, "expected model type hag_mil, .*found model type dsmil"),
    ({"model_type": "max"}, SB, "expected model type clam_sb, found model type mean or max"),
    ({**HAG, "n_levels": 2}, HAG, "expected number of levels 3, found number of levels 2"),
    ({**DSMIL, "n_classes": 3}, DSMIL, "expected number of classes 2, found number of classes 3"),
    ({**ABMILX, "options": {"inner_dim": 16, "n_heads": 4}}, ABMILX,
     "expected n_heads 8, found n_heads 4"),
    ({**ABMILX, "options": {"inner_dim": 16, "abx_attn_plus": False}}, ABMILX,
     "expected abx_attn_plus True, found abx_attn_plus False"),
])
def test_another_model_is_refused_by_what_it_is(
    saved: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        clean_state_dict(make(**saved).state_dict(), make(**asked))


def test_missing_unknown_and_misshapen_entries_are_named() -> None:
    state = make().state_dict()
    state.pop("attention_net.3.attention_c.bias")
    state["surplus"] = torch.zeros(1)
    state["attention_net.0.bias"] = torch.zeros(3)
    with pytest.raises(Refused) as refused:
        clean_state_dict(state, make())
    text = str(refused.value)
    assert "expected 'attention_net.3.attention_c.bias', found no such entry" in text
    assert "found 'surplus', which the model does not have" in text
    assert "expected 'attention_net.0.bias' of shape (512,), found (3,)" in text


@pytest.mark.parametrize("state", [{}, {"epoch": 3}, {"model": {"a": torch.zeros(1)}}])
def test_other_contents_are_refused(state: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="expected a state dict of tensors"):
        clean_state_dict(state, make())


def test_models_of_plug_ins_are_compared_key_by_key() -> None:
    layer = torch.nn.Linear(3, 2)
    cleaned, notes = clean_state_dict(layer.state_dict(), layer)
    assert list(cleaned) == ["weight", "bias"]
    assert notes == []
    with pytest.raises(Refused, match=r"expected 'weight' of shape \(2, 3\), found \(2, 4\)"):
        clean_state_dict(torch.nn.Linear(4, 2).state_dict(), layer)
    wrapped = torch.nn.ModuleDict({"module": layer})  # a name of its own, no wrapper
    assert list(clean_state_dict(wrapped.state_dict(), wrapped)[0]) == [
        "module.weight", "module.bias"]
