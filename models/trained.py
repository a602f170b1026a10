"""A trained slide model as it lies on disk: a state dict, and beside it a json that describes it.

``s_{k}_checkpoint.pt`` holds tensors only (CLAM reads it); ``s_{k}_checkpoint.json`` holds the
model's spec, the classes and the encoder of the features. Checkpoints of the published programs
have no json: what their weights tell is read from them, and flags say the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.model_names import is_end_to_end, is_streaming, known_name, material_of
from models.options import COSTS_ONLY, options_of, read_model_options
from models.slide_models import SlideModelSpec, build_slide_model
from utils.contracts import Material
from utils.errors import BrokenFile, Refused
from utils.objectives import TaskType
from utils.options import from_mapping, option
from utils.storage import file_sha256, load_torch, read_json
from utils.training_state import STATE_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_MODEL = {"model_type": "clam_sb", "embed_dim": 1024}  # where neither weights nor flags tell
AVERAGED = "_ema_"  # in the file names of checkpoints whose weights are a running mean
_FLAG_OF = {"dropout": "drop_out"}  # where a field of the spec and its flag differ in name


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Flags that say which checkpoints, and what their weights do not tell."""

    weights: Literal["main", "ema"] = option("main", help="which weights of a training with "
                                             "--test_type both or both_ema")
    model_type: str | None = option(
        None, help="this and the next four are read from s_{k}_checkpoint.json where it exists, "
        "else from the weights as far as they tell")
    model_size: Literal["small", "big"] | None = option(None, help="width of the attention")
    drop_out: float | None = option(None, help="dropout of the training", low=0, high=0.99,
                                    bare=0.25)
    embed_dim: int | None = option(None, help="width of the features", low=1)
    model_options: Path | None = option(None, help="yaml file with options of the model, for "
                                        "example its preset; of a described one those that change "
                                        "memory alone, stream_memory for example", metavar="YAML")


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A checkpoint that was read and fits its spec.

    state: tensors under the names of our model; encoder: record of the features it was trained
    on, None when unknown; described: whether a json lay beside it; record: that json, else empty;
    notes: what was converted.
    """

    path: Path
    spec: SlideModelSpec
    state: Mapping[str, Tensor]
    sha256: str
    encoder: dict[str, Any] | None
    described: bool
    notes: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model with its weights, on the CPU."""
        model = build_slide_model(self.spec)
        model.load_state_dict(dict(self.state))
        return model

    @property
    def val_is_test(self) -> bool:
        """Were the test slides the validation slides of its training?"""
        return bool(self.record.get("settings", {}).get("val_is_test"))

    def with_options(self, **options: Any) -> TrainedModel:
        """The same weights with other options of its family; ``Refused`` for foreign ones."""
        return replace(self, spec=replace(self.spec, options={**self.spec.options, **options}))

    def finer_levels(self, given: Sequence[int], *, dirs: int = 0) -> tuple[int, ...]:
        """The finer levels as given, or as in training; () when ``dirs`` folders are given.

        ``Refused`` when there are not as many as the model has.
        """
        found = tuple(given or (() if dirs else self.record.get("child_levels", ())))
        wanted, number = self.spec.n_levels - 1, len(found) + dirs
        if number != wanted:
            raise Refused(f"checkpoint {self.path} ({self.spec.model_type}) takes {wanted} finer "
                          f"levels, found {number}: " + (
                              "give them with --child_levels or --child_dirs" if wanted else
                              "leave --child_levels and --child_dirs out"))
        return found

    @property
    def end_to_end(self) -> bool:
        """Does it make its features itself, of patches?"""
        return is_end_to_end(self.spec.model_type)

    @property
    def material(self) -> Material:
        """What it learned from."""
        return material_of(self.spec.model_type)

    @property
    def trained_on(self) -> Mapping[str, Any]:
        """What the patches or images of its training were; empty where that is unknown."""
        return self.record.get(self.material) or {}

    def pixel_notes(self, pixels: Mapping[str, Any] | None) -> list[str]:
        """A line when patches or images are of sizes or scales that the training did not have.

        pixels: px, mpp_um: lists of what there is, as the stores in ``datasets`` tell
        """
        trained, found = self.trained_on, pixels or {}
        others = [f"{key} {found[key]} (training: {trained[key]})" for key in ("mpp_um", "px")
                  if key in trained and not set(found.get(key, ())) <= set(trained[key])]
        return [f"{self.path.name}: other {self.material} than in training: {', '.join(others)}"
                ] if others else []

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

    class_names: the classes (or labels, or values) of the task at hand, none for survival
    fold: the fold it must belong to
    flags: fields of ``SlideModelSpec`` that the user gave (``options``: only those given, those of
    other families are left out); None = not given. Without a json they win over what the weights
    tell
    Raises ``Refused`` when it is missing, damaged, holds objects, contradicts a flag, or was made
    for other classes, another fold or another model.
    """
    from models.checkpoints import clean_state_dict, state_dict_in

    given = {name: value for name, value in flags.items() if value is not None}
    beside = path.with_suffix(".json")
    try:
        saved, sha256 = load_torch(path), file_sha256(path)
        record = read_json(beside) if beside.exists() else None
    except BrokenFile as error:
        raise Refused(f"checkpoint {error}") from None
    if not isinstance(saved, Mapping):
        raise Refused(f"checkpoint {path} holds a {type(saved).__name__}, expected a state dict")
    state, notes = state_dict_in(saved, averaged=AVERAGED in path.name)
    if record is None:
        _require_finished(path, fold)
        spec = _inferred_spec(state, class_names, given)
    else:
        spec = _described_spec(beside, record, class_names, fold, given)
        if record.get("checkpoint_sha256") not in (None, sha256):
            raise Refused(f"checkpoint {path} was altered after training (its checksum is not that "
                          f"in {beside}): restore it or train the fold again")
    try:
        clean, converted = clean_state_dict(state, build_slide_model(spec))
    except Refused as error:
        remedy = "" if record else ": give model_type, model_size and embed_dim as in training"
        raise Refused(f"checkpoint {path}: {str(error).removeprefix('checkpoint: ')}{remedy}"
                      ) from None
    if record is None:
        notes = [*notes, *_taken_for_granted(spec, given)]
    return TrainedModel(path=path, spec=spec, state=clean, sha256=sha256,
                        encoder=(record or {}).get("encoder"), described=record is not None,
                        record=record or {},
                        notes=tuple(f"{path.name}: {note}" for note in [*notes, *converted]))


def load_folds(folder: Path, folds: Sequence[int], *, class_names: Sequence[str],
               task_type: TaskType, weights: str = "main", drop_out: float | None = None,
               model_options: Path | None = None, v_patch: tuple[float, ...] = (), **flags: Any
               ) -> dict[int, TrainedModel]:
    """The checkpoint of each fold of a training; arguments as ``CheckpointOptions``.

    v_patch: of hag_mil, other than in training. ``Refused`` as ``load_trained``.
    """
    middle = "" if weights == "main" else f"{weights}_"
    options = model_options and read_model_options(model_options)
    models = {fold: load_trained(
        folder / f"s_{fold}_{middle}checkpoint.pt", fold=fold, class_names=class_names,
        task_type=task_type, dropout=drop_out, options=options, **flags) for fold in folds}
    if v_patch:
        models = {fold: model.with_options(v_patch=v_patch) for fold, model in models.items()}
    return models


def load_as_described(path: Path) -> TrainedModel:
    """A checkpoint that nothing is asked of but what it says itself; see ``load_trained``."""
    beside = path.with_suffix(".json")
    try:
        names = output_names(read_json(beside)) if beside.exists() else ()
    except BrokenFile as error:
        raise Refused(f"checkpoint {error}") from None
    return load_trained(path, class_names=names)


def _inferred_spec(state: Mapping[Any, Any], class_names: Sequence[str],
                   given: Mapping[str, Any]) -> SlideModelSpec:
    """The spec of a model without a json: from flags, then its weights, then ``DEFAULT_MODEL``."""
    from models.checkpoints import plain_names
    from models.infer import infer_spec, model_type_of

    weights = plain_names(state)
    told = model_type_of(weights)
    kind = str(given.get("model_type") or (told if told and known_name(told) else None)
               or DEFAULT_MODEL["model_type"])
    found = {**DEFAULT_MODEL, **infer_spec(kind, weights), "model_type": kind}
    if class_names:
        found["n_classes"] = len(class_names)
    own = options_of(kind, {}, source=kind)
    options = {**found.pop("options", {}), **{
        name: value for name, value in given.get("options", {}).items() if name in own}}
    found.setdefault("n_classes", 0)  # refused, with its limit
    return SlideModelSpec(**{**found, **given, "options": options})


def _taken_for_granted(spec: SlideModelSpec, given: Mapping[str, Any]) -> Iterator[str]:
    """What no weight tells and no flag has said."""
    if is_end_to_end(spec.model_type) and spec.options["channels"] == "RGB":
        yield ("taken to be trained on RGB; ABMILX's own programs train on BGR: give those of them "
               "model_options with channels: BGR")
    if is_streaming(spec.model_type) and spec.options["head"] == "max" and (
            "head" not in given.get("options", {})):
        yield ("taken to pool the maximum of each channel: give one that pools the mean "
               "model_options with head: mean")


def _described_spec(path: Path, record: Any, class_names: Sequence[str], fold: int | None,
                    given: Mapping[str, Any]) -> SlideModelSpec:
    if not isinstance(record, Mapping) or not isinstance(record.get("spec"), Mapping):
        raise Refused(f"{path} does not describe a checkpoint (no 'spec'): restore it, or remove "
                      "it and say with flags what the model is")
    values = from_mapping(SlideModelSpec, record["spec"], source=f"{path}: spec")
    missing = {"model_type", "embed_dim", "n_classes"} - set(values)
    if missing:
        raise Refused(f"{path}: spec has no {', '.join(sorted(missing))}")
    asked, was = given.get("options", {}), dict(values.get("options", {}))
    costs = {name: asked[name] for name in COSTS_ONLY if name in asked and name in was}
    values["options"] = {**was, **costs}
    wrong = [f"{_FLAG_OF.get(name, name)} is {value}, but the checkpoint was trained with {was}"
             for name, value, was in _both(given, values) if value != was]
    if wrong:
        raise Refused(f"{'; '.join(wrong)} (says {path}): leave it out")
    if fold is not None and record.get("fold") not in (None, fold):
        raise Refused(f"{path} belongs to fold {record['fold']}, expected fold {fold}: files were "
                      "renamed or mixed")
    trained = list(output_names(record))
    other_names = bool(trained) and trained != list(class_names)
    if other_names or (class_names and values["n_classes"] != len(class_names)):
        raise Refused(f"{path}: the model knows the classes {', '.join(trained) or '?'} "
                      f"({values['n_classes']}), the task has {', '.join(class_names)} "
                      f"({len(class_names)}): evaluate with the label map it was trained with")
    return SlideModelSpec(**values)


def _both(given: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, flag, record) of every field and model option that both sides tell."""
    given = {**given, **given.get("options", {})}
    told = {"task_type": "classification", **values, **values.get("options", {})}
    for name, value in given.items():
        if name in told and name != "options":
            yield name, value, told[name]


def output_names(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes, labels or values that a checkpoint's json names; none for survival.

    Of tasks other than classification its ``class_names`` are strata of slides, where it has
    ``target_names`` too.
    """
    task_type = record.get("spec", {}).get("task_type", "classification")
    if task_type == "survival":
        return ()
    own = "class_names" if task_type == "classification" else "target_names"
    return tuple(map(str, record.get(own) or record.get("class_names") or ()))


def _require_finished(path: Path, fold: int | None) -> None:
    """``Refused`` for a fold of ours that is still in training: it has a state, no json yet."""
    if fold is not None and (path.parent / str(fold) / STATE_FILE).exists():
        raise Refused(f"checkpoint {path} belongs to a fold whose training is not finished: run "
                      "the same main.py command again")
