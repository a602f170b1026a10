"""Settings files of other programs as flags of main.py, so that their users bring theirs along.

HAG-MIL's YAML has four sections; every key does what its documentation says (in the published
program ten of them did nothing). Key names: https://github.com/BearCleverProud/HAG-MIL. ABMILX's
flat files: ``utils.legacy_abmilx``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import Refused
from utils.legacy_abmilx import is_abmilx, translate_abmilx

Flags = dict[str, Any]


def translate_config(mapping: Mapping[str, Any], source: str) -> Flags:
    """Flags of main.py: ABMILX's options and HAG-MIL's four sections translated, else as they are.

    ``Refused`` for an unknown section or key.
    """
    if not any(str(key).endswith("_arguments") for key in mapping):
        return translate_abmilx(mapping, source) if is_abmilx(mapping) else dict(mapping)
    flags: Flags = {"model_type": "hag_mil", "k": 1, "log_data": True}
    for section, values in mapping.items():
        known = _SECTIONS.get(section)
        if known is None:
            raise Refused(f"{source}: unknown section '{section}'{_near(section, _SECTIONS)}")
        if not isinstance(values, Mapping):
            raise Refused(f"{source}: {section} is {values!r}, expected 'key: value' lines")
        for key, value in values.items():
            if key not in known:
                raise Refused(f"{source}: {section}: unknown key '{key}'{_near(key, known)}")
            flags.update(known[key](value))
    return _placed(flags, source)


def _placed(flags: Flags, source: str) -> Flags:
    """Folders put together from their parts, and what two keys decide together."""
    root = Path(flags.pop("_result_dir", "results")) / str(flags.pop("_task", ""))
    experiment = str(flags.get("exp_code", "hag_mil")).strip("/")
    flags["exp_code"] = experiment
    flags["results_dir"] = str(root / str(flags.pop("_model_dir", "")))
    flags["log_dir"] = str(root / str(flags.pop("_log_dir", "")) / experiment)
    n_classes, labels = flags.pop("_n_classes", None), flags.get("label_dict")
    if n_classes is not None and labels and len(set(labels.values())) != n_classes:
        raise Refused(f"{source}: n_classes is {n_classes}, but label_dict names "
                      f"{len(set(labels.values()))} classes")
    return flags


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean '{near[0]}'?" if near else f", known: {', '.join(known)}"


def _as(flag: str) -> Callable[[Any], Flags]:
    return lambda value: {flag: value}


def _unless(flag: str) -> Callable[[Any], Flags]:
    return lambda value: {flag: not value}


def _early_stop(value: Any) -> Flags:
    return {"early_stopping": True, "patience": value, "stop_epoch": 0}


def _gpus(value: Any) -> Flags:
    devices = value if isinstance(value, list) else [value]
    if not devices:
        return {"device": "cpu"}
    return {"device": f"cuda:{devices[0]}" if len(devices) == 1 else "cuda"}


def _data_dir(value: Any) -> Flags:
    print(f"note: data_dir: training reads features only; eval.py --lazy_children takes the "
          f"slides with --data_slide_dir {value}")
    return {}


def _shuffle_data(value: Any) -> Flags:
    print(f"note: shuffle_data {str(value).lower()}: training slides are drawn in a new order in "
          "every epoch, whatever the order of the table")
    return {}


def _feature_dir(value: Any) -> Flags:
    """The coarse folder; the number at the end of its name says how many finer levels there are."""
    name = str(value).rstrip("/")
    coarse = name.rpartition("_level_")[2]
    finer = range(int(coarse) - 1, -1, -1) if "_level_" in name and coarse.isdigit() else ()
    return {"data_root_dir": name, "child_levels": list(finer)}


def _model_type(value: Any) -> Flags:
    if str(value) not in ("IAT", "hag_mil"):
        raise Refused(f"model_type is {value!r}, expected IAT")
    return {"model_type": "hag_mil"}


_SECTIONS: dict[str, dict[str, Callable[[Any], Flags]]] = {
    "storage_arguments": {
        "result_dir": _as("_result_dir"), "task": _as("_task"), "model_dir": _as("_model_dir"),
        "log_dir": _as("_log_dir"), "exp_code": _as("exp_code"),
        "save_top_k": _as("save_top_k")},
    "hyperparams_arguments": {
        "seed": _as("seed"), "lr": _as("lr"), "reg": _as("reg"), "max_epoch": _as("max_epochs"),
        "early_stop": _early_stop, "gpus": _gpus, "t_patch": _as("t_patch"),
        "v_patch": _as("v_patch")},
    "data_arguments": {
        "data_dir": _data_dir, "feature_dir": _feature_dir,
        "ground_truth_csv": _as("csv_path"), "split_dir": _as("split_dir"),
        "shuffle_data": _shuffle_data, "print_info": _as("print_info"),
        "patient_strat": _unless("allow_shared_patients"), "label_dict": _as("label_dict")},
    "model_arguments": {
        "model_type": _model_type, "gate": _unless("ungated"), "hidden_dims": _as("hidden_dims"),
        "dropout": _as("drop_out"), "k_sample": _as("B"), "n_classes": _as("_n_classes"),
        "feat_in": _as("embed_dim"), "inst_cluster": _unless("no_inst_cluster"),
        "inst_weight": _as("inst_weight"), "bag_weight": _as("bag_weight"),
        "bag_loss": _as("bag_loss"), "inst_loss": _as("inst_loss"),
        "subtyping": _as("subtyping")},
}
