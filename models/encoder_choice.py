"""The encoders of one run, as flags name them: their descriptions, records and loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from models.encoders import AnyPrecision, Encoder, EncoderSpec, encoder_record, encoder_spec
from models.encoders import load_encoder as load
from utils.errors import Refused


@dataclass(frozen=True)
class ChosenEncoder:
    """An encoder whose weights were found. load: called with ``device=``"""

    spec: EncoderSpec
    record: dict[str, Any]
    load: Callable[..., Encoder]


def choose_encoders(
    names: Sequence[str], checkpoints: Sequence[str], *, target_px: int | None,
    precision: AnyPrecision, device: str, plugins: Sequence[Path], trust_remote_code: bool,
) -> dict[str, ChosenEncoder]:
    """Each encoder by its name, or by "" where there is only one.

    checkpoints: the weight file of the only encoder, or ``name=PATH``; the rest: ``load_encoder``
    ``Refused``: unknown, twice the same, no weights, a weight file of none of them.
    """
    files = _weight_files(names, checkpoints)
    chosen: dict[str, ChosenEncoder] = {}
    for name in names:
        settings: dict[str, Any] = {
            "checkpoint": files.get(name), "target_px": target_px, "plugins": tuple(plugins),
            "trust_remote_code": trust_remote_code}
        record = encoder_record(name, precision=precision, device=device, **settings)
        if record["name"] in chosen:
            raise Refused(f"--model_name: '{name}' and another name are the same encoder "
                          f"{record['name']}: give it once")
        # a format that was chosen here holds on every machine of the run
        settings["precision"] = record["precision"]
        chosen[record["name"]] = ChosenEncoder(encoder_spec(name), record,
                                               partial(load, name, **settings))
    return chosen if len(chosen) > 1 else dict(zip([""], chosen.values(), strict=True))


def _weight_files(names: Sequence[str], texts: Sequence[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or name not in names:
            if len(names) > 1:
                raise Refused(f"--encoder_ckpt {text}: with several encoders give name=PATH, where "
                              f"name is one of {', '.join(names)}")
            name, path = names[0], text
        if name in files:
            raise Refused(f"--encoder_ckpt: {name} has two weight files, {files[name]} and {path}: "
                          "give one")
        files[name] = Path(path)
    return files
