"""ABMILX's own settings files (``-c a.yaml`` of E2E-WSI-ABMILX) as flags of main.py.

What a file leaves out has the published default, so that the same file trains the same way; where
it does not, a printed line says so. The options: ``utils.legacy_abmilx_options``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import Refused
from utils.legacy_abmilx_options import DEFAULTS, DROPPED, E2E, KEPT, MAPPED, MARKS
from utils.options import convert

Flags = dict[str, Any]

# published slide model -> (ours, without the gate)
_SLIDE_MODELS = {"abmil": ("abmil", True), "gabmil": ("abmil", False), "meanmil": ("mean", False),
                 "maxmil": ("max", False), "meanP": ("mean", False),
                 **{name: (name, False) for name in ("abmilx", "clam_sb", "clam_mb", "transmil",
                                                     "dsmil")}}
_TRANSFORMERS = {"uni": "uni_v1", "gigap": "prov_gigapath"}  # their names here; no batch norms
_LABELS = {"panda": {str(grade): grade for grade in range(6)}, "brca": {"IDC": 0, "ILC": 1},
           "nsclc": {"LUAD": 0, "LUSC": 1}, "call": {"normal": 0, "tumor": 1}}
_TRANSFORMS = ("none", "weak", "weak_strong", "strong", "strong_v2")  # any other word is weak
_STORED_PX, _SEEN_PX = 256, 224  # of published patches: in training, and as the encoder sees them


def is_abmilx(mapping: Mapping[str, Any]) -> bool:
    """Is this flat settings file one of ABMILX's?"""
    return not MARKS.isdisjoint(mapping)


def translate_abmilx(mapping: Mapping[str, Any], source: str) -> Flags:
    """Flags of main.py for a file of ABMILX; prints what is left out and what it means.

    ``Refused`` for an unknown option, and for one without which another model would be trained.
    """
    given = {str(key).replace("-", "_"): value for key, value in mapping.items()}
    _check_names(given, source)
    old = {name: _read(name, given.get(name, default), source)
           for name, default in DEFAULTS.items()}
    encoder, mil, ungated = _parts(old, source)
    has = {mil, E2E} if encoder else {mil}
    flags = {name: old[name] for name, row in KEPT.items()
             if (not row.of or has.intersection(row.of)) and old[name] is not None}
    flags["model_type"] = f"e2e_{encoder}_{mil}" if encoder else mil
    flags |= {**_training(old, source), **_place(old, given), **_task(old, source)}
    if mil == "abmil":
        flags["ungated"] = ungated
    if mil == "abmilx":
        flags |= _abmilx(old, source)
    if encoder:
        flags |= {**_encoder(old, source, encoder=encoder), **_draws(old, source),
                  **_patches(old, source)}
        if not old["mul_scale_input"]:
            del flags["mul_scale_ratio"]
    else:
        flags |= _features(old)
    foreign = [name for name, row in KEPT.items() if row.of and not has.intersection(row.of)]
    _say_dropped(given, source, foreign=foreign, model_type=flags["model_type"])
    return flags


def _check_names(given: Flags, source: str) -> None:
    for key in given:
        if key not in DEFAULTS:
            near = difflib.get_close_matches(key, DEFAULTS, n=1)
            mark = next(iter(sorted(MARKS.intersection(given))))
            raise Refused(f"{source}: unknown key '{key}'" + (
                f", did you mean '{near[0]}'?" if near else "") +
                f" (as it has '{mark}', the file is taken for one of ABMILX's own programs)")


def _read(name: str, value: Any, source: str) -> Any:
    """A value, of mapped options as their type; where it says nothing the default."""
    default = DEFAULTS[name]
    if name in DROPPED:
        return value
    if value is None or (value == "none" and default is None):
        return default
    if name in KEPT:
        return value
    return convert(value, MAPPED[name].kind or type(default), where=f"{source}: {name}")


def _parts(old: Flags, source: str) -> tuple[str, str, bool]:
    """(encoder or "", slide model, without the gate) of ABMILX's model name."""
    name: str = old["model"]
    rest = name.removeprefix("e2e_")
    fitting = [mil for mil in _SLIDE_MODELS if rest == mil or rest.endswith(f"_{mil}")]
    mil = max(fitting, key=len, default="")
    encoder = rest.removesuffix(mil).rstrip("_")
    if not mil or bool(encoder) != name.startswith("e2e_"):
        raise Refused(f"{source}: model is {name!r}, expected one of {', '.join(_SLIDE_MODELS)}, "
                      "or e2e_<encoder>_<one of them>: write one of them there")
    ours, ungated = _SLIDE_MODELS[mil]
    return _TRANSFORMERS.get(encoder, encoder), ours, ungated and not old["da_gated"]


def _training(old: Flags, source: str) -> Flags:
    schedules = {"cosine": "cosine", "step": "step", "const": "constant"}
    if old["lr_sche"] not in schedules:
        raise Refused(f"{source}: lr_sche is {old['lr_sche']!r}, expected {', '.join(schedules)}")
    if old["early_stopping"] and old["n_classes"] > 2 and old["loss"] != "nll_surv":
        print(f"note: {source}: the best epoch is that of the highest AUC; the original took the "
              "macro accuracy where there are more than two classes")
    return {
        "max_epochs": old["num_epoch"], "patience": old["patient"],
        "stop_epoch": max(0, old["max_epoch"] - 1),  # ours is the last, counted from 0, never
        "monitor": "metric", "reg": old["weight_decay"], "schedule": schedules[old["lr_sche"]],
        "accumulate": old["batch_size"] * old["accumulation_steps"],
        "precision": "fp16" if old["amp"] else "fp32", "drop_out": old["dropout"],
        **({"ema": old["mm"]} if old["test_type"] != "main" else {})}


def _place(old: Flags, given: Flags) -> Flags:
    """Folds, and where results go."""
    flags: Flags = {"k": old["cv_fold"], "k_start": old["fold_start"]}
    if old["val2test"]:
        flags["val_is_test"] = True
    if "title" in given:
        flags["exp_code"] = old["title"]
    if {"output_path", "project"} & set(given):
        flags["results_dir"] = str(Path(old["output_path"] or "results") / old["project"])
    return flags


def _task(old: Flags, source: str) -> Flags:
    """What is predicted, as far as the name of the data and the loss say so."""
    if old["loss"] not in ("ce", "bce", "nll_surv"):
        raise Refused(f"{source}: loss is {old['loss']!r}, expected ce, bce or nll_surv"
                      + (" (asl failed in the original too)" if old["loss"] == "asl" else ""))
    flags: Flags = {"bag_loss": old["loss"]}
    if old["loss"] == "bce":
        return {**flags, "task_type": "multilabel"}
    if old["loss"] == "nll_surv" or old["datasets"].startswith("surv"):
        return {**flags, "task_type": "survival", "n_bins": old["n_classes"],
                "time_col": "Event", "event_col": "Status"}
    name = next((name for name in _LABELS if old["datasets"].startswith(name)), None)
    if name is None:
        return flags
    labels = _LABELS[name]
    if name != "panda" and old["n_classes"] != len(labels):
        raise Refused(f"{source}: n_classes is {old['n_classes']}, but {old['datasets']} has the "
                      f"classes {', '.join(labels)}")
    return {**flags, "label_dict": labels}


def _abmilx(old: Flags, source: str) -> Flags:
    plus = old["abx_attn_plus"]
    if plus is None:
        print(f"note: {source}: A+ is on, which makes it ABMILX; the original leaves it off where "
              "a file says nothing: --no_abx_attn_plus")
    return {"act": old["act"] if old["act"] in ("relu", "gelu") else "none",
            "mil_bias": not old["no_mil_bias"], "abx_attn_plus": plus is not False,
            "abx_embed_new": old["abx_attn_plus_embed_new"]}


def _encoder(old: Flags, source: str, *, encoder: str) -> Flags:
    flags: Flags = {"batch_size": old["batch_size"], "img_size": _SEEN_PX,
                    "img_transform": (old["img_transform"] if old["img_transform"] in _TRANSFORMS
                                      else "weak"),
                    # patches stored as the encoder sees them were not cropped
                    "crop_scale": 1.0 if old["img_size"] == _SEEN_PX else old["crop_scale"]}
    if old["enc_init"] is not None:
        print(f"note: {source}: enc_init: weights of ABMILX's own programs need --channels BGR")
    if old["freeze_enc"]:
        return {**flags, "train_blocks": 0, "enc_bn": "frozen"}
    if encoder not in _TRANSFORMERS.values():
        flags["enc_bn"] = "sync" if old["sync_bn"] else "batch"
    return flags


def _draws(old: Flags, source: str) -> Flags:
    """How many patches are drawn of a slide, and how."""
    flags: Flags = {}
    alone, lines, cells = old["batch_size"] == 1, old["num_group_1d"], old["num_group_2d"]
    count = (old["max_patch_train"] if alone else None) or old["same_psize"]
    if lines and cells:
        raise Refused(f"{source}: num_group_1d and num_group_2d are two ways to draw: remove one")
    if lines:
        flags["sampling"], count = "intervals", count or lines
        if count != lines:
            print(f"note: {source}: num_group_1d {lines}: one patch is drawn of each of "
                  f"same_psize = {count} intervals")
    if cells:
        flags |= {"sampling": "grid", "num_group_2d": cells}
        count = count or cells**2
    if count:  # repeats in a slide alone were taken out again, unless all patches were asked for
        flags["pad_enc_bs"] = old["pad_enc_bs"] and (old["all_patch_train"] or not alone)
    return {**flags, "same_psize": count}


def _patches(old: Flags, source: str) -> Flags:
    """Where patches are. Files of both sizes were needed; ours are made smaller for evaluation."""
    flags: Flags = {}
    places = {"patches": old["dataset_root"],
              "patches_low": old["dataset_sub_root"] if old["mul_scale_input"] else None}
    for flag, place in places.items():
        if place is None:
            continue
        path = Path(place)
        if old["img_size"] == _STORED_PX and str(_SEEN_PX) in path.name:
            path = path.with_name(path.name.replace(str(_SEEN_PX), str(_STORED_PX)))
            print(f"note: {source}: img_size {_STORED_PX}: {flag} is {path}, for evaluation too")
        flags[flag] = str(path)
    return flags


def _features(old: Flags) -> Flags:
    flags: Flags = {"embed_dim": old["input_dim"]}
    if old["dataset_root"] is not None:
        flags["data_root_dir"] = old["dataset_root"]
    return flags


def _say_dropped(given: Flags, source: str, *, foreign: list[str], model_type: str) -> None:
    """Refuse or print what the file asks for in vain."""
    changed = {name: row for name, row in DROPPED.items()
               if name in given and given[name] not in (row.default, None, "none")}
    for name, row in changed.items():
        if row.weight == "refused":
            raise Refused(f"{source}: {name} {given[name]}: {row.reason}: remove the line")
        if row.weight == "said":
            print(f"note: {source}: {name} {given[name]}: {row.reason}")
    if given.get("val_ratio", 0) == 0 and not given.get("val2test"):
        print(f"note: {source}: without val_ratio the original validated on the test slides; here "
              "the split files decide (--val_is_test repeats it)")
    quiet = [name for name, row in changed.items() if row.weight == "harmless"]
    if quiet:
        print(f"note: {source}: not needed here (docs/end_to_end.md says why): {', '.join(quiet)}")
    others = [name for name in foreign if name in given]
    if others:
        print(f"note: {source}: no options of {model_type}, left out: {', '.join(others)}")
