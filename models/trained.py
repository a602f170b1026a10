"""A trained slide model as it lies on disk: a state dict, and beside it a json that describes it.

``s_{k}_checkpoint.pt`` holds tensors only (CLAM reads it); ``s_{k}_checkpoint.json`` holds the
model's spec, the classes and the encoder of the features. CLAM's own checkpoints have no json:
then flags say what the model is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.slide_models import SlideModelSpec, build_slide_model
from utils.errors import BrokenFile, Refused
from utils.options import from_mapping
from utils.storage import file_sha256, load_torch, read_json
from utils.training_state import STATE_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_MODEL = {"model_type": "clam_sb", "embed_dim": 1024}  # of a checkpoint without json
_FLAG_OF = {"dropout": "drop_out"}  # where a field of the spec and its flag differ in name


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A checkpoint that was read and fits its spec.

    state: tensors under the names of our model; encoder: record of the features it was trained
    on, None when unknown; described: whether a json lay beside it; notes: what was converted.
    """

    path: Path
    spec: SlideModelSpec
    state: Mapping[str, Tensor]
    sha256: str
    encoder: dict[str, Any] | None
    described: bool
    notes: tuple[str, ...]

    def build(self) -> nn.Module:
        """The model with its weights, on the CPU."""
        model = build_slide_model(self.spec)
        model.load_state_dict(dict(self.state))
        return model

    def check_features(self, width: int, encoder: Mapping[str, Any] | None) -> None:
        """``Refused`` when features have another width, or come from another encoder.

        Encoders are compared by name and weights, where both sides know them.
        """
        if width != self.spec.embed_dim:
            remedy = "" if self.described else f", or give embed_dim {width}"
            raise Refused(f"checkpoint {self.path} expects features of width "
                          f"{self.spec.embed_dim}, found {width}: use the features of the "
                          f"training{remedy}")
        for key in ("name", "weights_sha256"):
            expected, found = (self.encoder or {}).get(key), (encoder or {}).get(key)
            if expected is not None and found is not None and expected != found:
                raise Refused(f"checkpoint {self.path} was trained on features of encoder {key} "
                              f"{expected}, found {found}: extract the features with the encoder "
                              "of the training")


def load_trained(path: Path, *, class_names: Sequence[str], fold: int | None = None,
                 **flags: Any) -> TrainedModel:
    """Read a checkpoint; tensors only, nothing in it can run.

    class_names: the classes of the task at hand; fold: the fold it must belong to
    flags: fields of ``SlideModelSpec`` that the user gave; None = not given
    Raises ``Refused`` when it is missing, damaged, holds objects, contradicts a flag, or was made
    for other classes, another fold or another model.
    """
    from models.checkpoints import clean_state_dict

    given = {name: value for name, value in flags.items() if value is not None}
    beside = path.with_suffix(".json")
    try:
        state, sha256 = load_torch(path), file_sha256(path)
        record = read_json(beside) if beside.exists() else None
    except BrokenFile as error:
        raise Refused(f"checkpoint {error}") from None
    if not isinstance(state, Mapping):
        raise Refused(f"checkpoint {path} holds a {type(state).__name__}, expected a state dict")
    if record is None:
        _require_finished(path, fold)
        spec = SlideModelSpec(**{**DEFAULT_MODEL, **given, "n_classes": len(class_names),
                                 "gated": _is_gated(state)})
    else:
        spec = _described_spec(beside, record, class_names, fold, given)
        if record.get("checkpoint_sha256") not in (None, sha256):
            raise Refused(f"checkpoint {path} was altered after training (its checksum is not that "
                          f"in {beside}): restore it or train the fold again")
    try:
        clean, notes = clean_state_dict(state, build_slide_model(spec))
    except Refused as error:
        remedy = "" if record else ": give model_type, model_size and embed_dim as in training"
        raise Refused(f"checkpoint {path}: {str(error).removeprefix('checkpoint: ')}{remedy}"
                      ) from None
    return TrainedModel(path=path, spec=spec, state=clean, sha256=sha256,
                        encoder=(record or {}).get("encoder"), described=record is not None,
                        notes=tuple(f"{path.name}: {note}" for note in notes))


def _described_spec(path: Path, record: Any, class_names: Sequence[str], fold: int | None,
                    given: Mapping[str, Any]) -> SlideModelSpec:
    if not isinstance(record, Mapping) or not isinstance(record.get("spec"), Mapping):
        raise Refused(f"{path} does not describe a checkpoint (no 'spec'): restore it, or remove "
                      "it and say with flags what the model is")
    values = from_mapping(SlideModelSpec, record["spec"], source=f"{path}: spec")
    missing = {"model_type", "embed_dim", "n_classes"} - set(values)
    if missing:
        raise Refused(f"{path}: spec has no {', '.join(sorted(missing))}")
    wrong = [f"{_FLAG_OF.get(name, name)} is {value}, but the checkpoint was trained with "
             f"{values[name]}" for name, value in given.items()
             if name in values and values[name] != value]
    if wrong:
        raise Refused(f"{'; '.join(wrong)} (says {path}): leave it out")
    if fold is not None and record.get("fold") not in (None, fold):
        raise Refused(f"{path} belongs to fold {record['fold']}, expected fold {fold}: files were "
                      "renamed or mixed")
    trained = [str(name) for name in record.get("class_names") or []]
    if values["n_classes"] != len(class_names) or (trained and trained != list(class_names)):
        raise Refused(f"{path}: the model knows the classes {', '.join(trained) or '?'} "
                      f"({values['n_classes']}), the task has {', '.join(class_names)} "
                      f"({len(class_names)}): evaluate with the label map it was trained with")
    return SlideModelSpec(**values)


def _require_finished(path: Path, fold: int | None) -> None:
    """``Refused`` for a fold of ours that is still in training: it has a state, no json yet."""
    if fold is not None and (path.parent / str(fold) / STATE_FILE).exists():
        raise Refused(f"checkpoint {path} belongs to a fold whose training is not finished: run "
                      "the same main.py command again")


def _is_gated(state: Mapping[str, Any]) -> bool:
    """Does the attention have a gate? Models without attention count as gated (it is unused)."""
    names = [str(name) for name in state if "attention" in str(name)]
    return not names or any("attention_b" in name for name in names)
