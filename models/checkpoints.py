"""Checkpoints of every age into the key names of today's models.

Published and user-made checkpoints differ in packing and naming only: a state dict inside a
dictionary of the training, wrapped for several GPUs, an encoder beside the slide model, an
attention one place earlier, a loss buffer, older baselines. Each is renamed by rule, what was done
is told, and what still does not fit is refused by what it is ("expected ..., found ...").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from models.infer import infer_spec, model_type_of
from utils.errors import Refused

State = dict[str, torch.Tensor]

# DistributedDataParallel, torch.compile, a Lightning module around the model
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# Where a training program keeps the weights: Lightning; ABMILX, whose teacher is their mean
_WEIGHTS = ("state_dict", "model", "teacher")
_SHOWN = 4  # keys named in a message


def state_dict_in(
    saved: Mapping[Any, Any], *, averaged: bool = False
) -> tuple[Mapping[Any, Any], list[str]]:
    """The state dict inside what a training program saved, and a note if it was packed.

    averaged: take the running mean of the weights where both are there
    """
    order = sorted(_WEIGHTS, key=lambda name: name != "teacher") if averaged else _WEIGHTS
    for name in order:
        inner = saved.get(name)
        if isinstance(inner, Mapping) and inner:
            return inner, [f"took '{name}' out of the checkpoint of a training program"]
    return saved, []


def plain_names(state: Mapping[str, torch.Tensor]) -> State:
    """``state`` under today's names as far as they can be told without the model.

    Of an end-to-end model: the slide model's names, and its encoder's with ``encoder.`` in front.
    """
    cleaned = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    encoder = {name: value for name, value in _unwrap(cleaned, {})[0].items()
               if name.startswith("encoder.")}
    for convert in _CONVERSIONS:
        cleaned, _ = convert(cleaned, {})
    return {**encoder, **cleaned}


def clean_state_dict(
    state: Mapping[str, torch.Tensor], model: nn.Module
) -> tuple[State, list[str]]:
    """``state`` under the keys of ``model``, and one note for each thing that was converted.

    The result loads strictly. Raises ``Refused`` when it cannot: another model type, number of
    classes, size or feature width, missing or unknown keys.
    """
    foreign = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if foreign or not state:
        found = f"an entry '{foreign[0]}' that is no tensor" if foreign else "nothing"
        raise Refused(f"checkpoint: expected a state dict of tensors, found {found}")
    wanted: State = model.state_dict()
    cleaned, notes = dict(state), []
    for convert in _CONVERSIONS:
        converted, note = convert(cleaned, wanted)
        if list(converted) != list(cleaned):
            notes.append(note)
        cleaned = converted
    _require_fit(cleaned, wanted)
    return {name: cleaned[name] for name in wanted}, notes


# ---------------------------------------------------------------------------- conversions

def _rename(state: State, pattern: str, replacement: str) -> State:
    return {re.sub(pattern, replacement, name): value for name, value in state.items()}


def _drop_loss(state: State, wanted: State) -> tuple[State, str]:
    kept = {name: value for name, value in state.items() if "instance_loss_fn." not in name}
    return kept, "left out the buffer of the instance loss (instance_loss_fn)"


def _unwrap(state: State, wanted: State) -> tuple[State, str]:
    for prefix in _WRAPPERS * 2:  # each may lie around another
        if all(name.startswith(prefix) for name in state) and not any(
                name.startswith(prefix) for name in wanted):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state, f"removed the prefix of a wrapped model ({' or '.join(_WRAPPERS)})"


def _without_encoder(state: State, wanted: State) -> tuple[State, str]:
    inside = {name.removeprefix("mil."): value for name, value in state.items()
              if name.startswith("mil.")}
    encoder = sum(name.startswith("encoder.") for name in state)
    note = (f"took the slide model out of an end-to-end checkpoint (mil.) and left out its patch "
            f"encoder ({encoder} entries)")
    if not inside or any(name.startswith("mil.") for name in wanted):
        return state, note
    others = {name: value for name, value in state.items()
              if not name.startswith(("mil.", "encoder."))}
    return {**others, **inside}, note


def _unparallel(state: State, wanted: State) -> tuple[State, str]:
    # only straight after these names: an ungated attention has a 'module' of its own
    parts = r"^(attention_net|fc|classifiers?|instance_classifiers)\.module\."
    return _rename(state, parts, r"\1."), "removed the names of DataParallel (.module)"


def _move_attention(state: State, wanted: State) -> tuple[State, str]:
    note = "moved the attention from place 2 to 3 (a model of old made without dropout)"
    if any(name.startswith("attention_net.3.") for name in state):
        return state, note
    return _rename(state, r"^attention_net\.2\.", "attention_net.3."), note


def _ungated(state: State, wanted: State) -> tuple[State, str]:
    state = _rename(state, r"^attention_net\.3\.([0-3])\.", r"attention_net.3.module.\1.")
    last = next((place for place in "23" if f"attention_net.3.module.{place}.weight" in wanted), "")
    if last:
        state = _rename(state, r"^(attention_net\.3\.module)\.[23]\.", rf"\1.{last}.")
    return state, "renumbered the layers of the ungated attention"


def _old_mil(state: State, wanted: State) -> tuple[State, str]:
    note = "renamed the layers of an early MIL_fc (classifier.0, classifier.3)"
    if "classifier.0.weight" not in state:
        return state, note
    state = _rename(state, r"^classifier\.0\.", "fc.0.")
    return _rename(state, r"^classifier\.[23]\.", "classifier."), note


def _old_mil_mc(state: State, wanted: State) -> tuple[State, str]:
    note = "joined the classifiers of an early MIL_fc_mc into one"
    if "fc.0.weight" not in state or "classifiers.0.weight" not in state:
        return state, note
    joined = {name: value for name, value in state.items() if not name.startswith("classifiers.")}
    count = sum(bool(re.fullmatch(r"classifiers\.\d+\.weight", name)) for name in state)
    for part in ("weight", "bias"):
        pieces = [state.get(f"classifiers.{c}.{part}") for c in range(count)]
        joined[f"classifiers.{part}"] = torch.cat([p for p in pieces if p is not None])
    return joined, note


def _old_dsmil(state: State, wanted: State) -> tuple[State, str]:
    state = _rename(state, r"^i_classifier\.fc\.(weight|bias)$", r"i_classifier.fc.0.\1")
    return state, "renamed the instance classifier of an early DSMIL (i_classifier.fc)"


_CONVERSIONS: tuple[Callable[[State, State], tuple[State, str]], ...] = (
    _drop_loss, _unwrap, _without_encoder, _unparallel, _move_attention, _ungated, _old_mil,
    _old_mil_mc, _old_dsmil)


# ---------------------------------------------------------------------------- what fits

def _require_fit(state: State, wanted: State) -> None:
    ours, theirs = _describe(wanted), _describe(state)
    if ours and theirs:
        differing = [name for name in ours if ours[name] != theirs.get(name, ours[name])]
        if differing:
            expected = ", ".join(f"{name} {ours[name]}" for name in differing)
            found = ", ".join(f"{name} {theirs[name]}" for name in differing)
            raise Refused(f"checkpoint: expected {expected}, found {found}")
    problems = list(_key_problems(state, wanted))
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise Refused(f"checkpoint: {'; '.join(problems[:_SHOWN])}{more}")


def _key_problems(state: State, wanted: State) -> Iterator[str]:
    for name, value in wanted.items():
        if name not in state:
            yield f"expected '{name}', found no such entry"
        elif state[name].shape != value.shape:
            yield (f"expected '{name}' of shape {tuple(value.shape)}, "
                   f"found {tuple(state[name].shape)}")
    for name in state:
        if name not in wanted:
            yield f"found '{name}', which the model does not have"


def _describe(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What a state dict of one of our models is, in words; empty for a model not known here."""
    kind = model_type_of(state)
    state = {name.removeprefix("mil."): value for name, value in state.items()}
    if kind is None:
        return {}
    found = infer_spec(kind, state)
    words = {"model type": kind}
    for name, title in (("embed_dim", "feature width"), ("n_classes", "number of classes"),
                        ("n_levels", "number of levels")):
        if name in found:
            words[title] = str(found[name])
    for name, attention in (("attention_a.0", "gated"), ("module.0", "ungated")):
        weight = state.get(f"attention_net.3.{name}.weight")
        if weight is not None:
            words["attention"] = attention
            words["attention width"] = str(weight.shape[0])
    return {**words, **{name: str(value) for name, value in found.get("options", {}).items()}}
