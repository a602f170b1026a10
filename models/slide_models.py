"""The slide models by name, and the one description from which each is built.

A checkpoint's neighbour (``s_{k}_checkpoint.json``) holds this description, so that evaluation
and heat-maps rebuild the model without flags. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from models.model_names import mil_name, split_name
from models.options import E2EOptions, options_of
from utils.errors import Refused
from utils.objectives import TASK_LOSSES, Objective, TaskType, build_objective
from utils.registry import Registry

if TYPE_CHECKING:
    from torch import nn

CLAM_ATTENTION_DROPOUT = 0.25
TRANSMIL_DROPOUT = 0.1  # after its attention
# Models that learn from a class beside the slide's own loss, and so know no other task with it
CLASSES_ONLY = ("mil",)
CLASSES_WITH_CLUSTERING = ("clam_sb", "clam_mb", "hag_mil")
# Models with several losses a bag: Cox compares one logit a slide
NO_COX = (*CLASSES_ONLY, "dsmil", "hag_mil")


@dataclass(frozen=True, kw_only=True)
class SlideModelSpec:
    """What a slide model is made of; ``Refused`` at once when a value makes no sense.

    model_type: a name in ``SLIDE_MODELS``, or ``e2e_<encoder>_<one of them>``, which makes its
    features itself, or ``streaming_<network>``, which takes slides whole;
    embed_dim: width of the features (of the network's map, for a streaming model);
    n_classes: outputs: classes, or labels, values, bins of time (Cox: 1) of another task;
    model_size: width of the attention, small 256 or big 384 (``mil`` has none);
    dropout: after the trunk; attention_dropout: in the attention, None = as CLAM does, 0.25
    (transmil 0.1) whenever ``dropout`` is not 0; gated: sigmoid gate in the attention;
    k_sample to instance_clustering: see ``models.clam.CLAM_SB``;
    task_type to nll_alpha: what is learnt, see ``utils.objectives.build_objective``; what comes
    from training slides (weights, edges, mean) differs between folds;
    n_levels: magnifications; options: the model family's own, see ``models.options``.
    """

    model_type: str
    embed_dim: int
    n_classes: int
    model_size: str = "small"
    dropout: float = 0.25
    gated: bool = True
    k_sample: int = 8
    subtyping: bool = False
    bag_loss: str | None = None
    inst_loss: str = "ce"
    bag_weight: float = 0.7
    instance_clustering: bool = True
    attention_dropout: float | None = None
    task_type: TaskType = "classification"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    bin_edges: tuple[float, ...] = ()
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()
    nll_alpha: float = 0.0
    n_levels: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = 2 if self.task_type == "classification" else 1
        limits = [
            ("embed_dim", self.embed_dim >= 1, "at least 1"),
            ("n_classes", self.n_classes >= least, f"at least {least}"),
            ("model_size", self.model_size in ("small", "big"), "small or big"),
            ("dropout", 0.0 <= self.dropout < 1.0, "from 0 to below 1"),
            ("k_sample", self.k_sample >= 1, "at least 1"),
            ("bag_weight", 0.0 <= self.bag_weight <= 1.0, "from 0 to 1"),
            ("attention_dropout", 0.0 <= self.attention_rate < 1.0, "from 0 to below 1"),
            ("n_levels", self.n_levels == 1 or self.model_type == "hag_mil",
             "1: only hag_mil takes several magnifications"),
        ]
        for name, fine, expected in limits:
            if not fine:
                raise Refused(f"model: {name} is {getattr(self, name)!r}, expected {expected}")
        complete = {"bag_loss": self.bag_loss or TASK_LOSSES[self.task_type][0],
                    "options": options_of(self.model_type, self.options,
                                          source=f"options of {self.model_type}")}
        for name, value in complete.items():
            object.__setattr__(self, name, value)
        self._check_task()

    def _check_task(self) -> None:
        """``Refused`` where the model cannot learn this task."""
        mil = mil_name(self.model_type)
        if self.task_type != "classification":
            if mil in CLASSES_ONLY:
                raise Refused(f"model: {self.model_type} tells classes apart, it knows no "
                              f"{self.task_type}: choose another --model_type")
            if mil in CLASSES_WITH_CLUSTERING and self.instance_clustering:
                raise Refused(f"model: the instance clustering of {self.model_type} needs classes, "
                              f"not {self.task_type}: give --no_inst_cluster")
        if self.bag_loss == "cox" and mil in NO_COX:
            raise Refused(f"model: {self.model_type} has several losses a slide, Cox needs one "
                          "number a slide: choose --bag_loss nll_surv or another --model_type")

    def objective(self) -> Objective:
        """What the model learns."""
        return build_objective(
            task_type=self.task_type, loss=self.bag_loss, n_outputs=self.n_classes,
            label_smoothing=self.label_smoothing, class_weights=self.class_weights,
            bin_edges=self.bin_edges, target_mean=self.target_mean, target_std=self.target_std,
            nll_alpha=self.nll_alpha)

    @property
    def attention_rate(self) -> float:
        """Dropout probability in the attention."""
        if self.attention_dropout is not None:
            return self.attention_dropout
        return CLAM_ATTENTION_DROPOUT if self.dropout > 0.0 else 0.0


SLIDE_MODELS: Registry[Callable[[SlideModelSpec], nn.Module]] = Registry("slide model")


def build_slide_model(spec: SlideModelSpec) -> nn.Module:
    """A fresh model (``utils.contracts.SlideModel``) with PyTorch's default initialisation.

    The encoder of an end-to-end model has no trained weights yet: ``load_pretrained`` in
    ``models.e2e_encoders``. Under one ``torch.manual_seed`` equal specs give equal weights.
    ``Refused`` for unknown names.
    """
    encoder, mil = split_name(spec.model_type)
    if encoder and not mil:
        from models.streaming_cnn import build_streaming

        return build_streaming(encoder, spec)
    build = SLIDE_MODELS.get(mil)
    if not encoder:
        return build(spec)
    from models.e2e import EndToEnd
    from models.e2e_encoders import build_encoder

    own = {item.name for item in fields(E2EOptions)}
    options = {name: value for name, value in spec.options.items() if name in own}
    aggregator = build(replace(spec, model_type=mil, options={
        name: value for name, value in spec.options.items() if name not in own}))
    return EndToEnd(build_encoder(encoder), aggregator, **options)


@SLIDE_MODELS.register("clam_sb")
def _clam_sb(spec: SlideModelSpec) -> nn.Module:
    from models.clam import CLAM_SB

    return CLAM_SB(**_attention_options(spec), **_clustering_options(spec))


@SLIDE_MODELS.register("clam_mb")
def _clam_mb(spec: SlideModelSpec) -> nn.Module:
    from models.clam import CLAM_MB

    return CLAM_MB(**_attention_options(spec), **_clustering_options(spec))


@SLIDE_MODELS.register("abmil")
def _abmil(spec: SlideModelSpec) -> nn.Module:
    from models.abmil import ABMIL

    return ABMIL(**_attention_options(spec))


@SLIDE_MODELS.register("abmilx")
def _abmilx(spec: SlideModelSpec) -> nn.Module:
    from models.abmilx import ABMILX

    return ABMILX(n_classes=spec.n_classes, embed_dim=spec.embed_dim, dropout=spec.dropout,
                  attention_dropout=spec.attention_rate, objective=spec.objective(),
                  **spec.options)


@SLIDE_MODELS.register("mil")
def _mil(spec: SlideModelSpec) -> nn.Module:
    from models.mil_fc import MIL_fc, MIL_fc_mc

    options: dict[str, Any] = {"embed_dim": spec.embed_dim, "dropout": spec.dropout,
                               "objective": spec.objective()}
    return MIL_fc(**options) if spec.n_classes == 2 else MIL_fc_mc(
        n_classes=spec.n_classes, **options)


@SLIDE_MODELS.register("transmil")
def _transmil(spec: SlideModelSpec) -> nn.Module:
    from models.transmil import TransMIL

    rate = spec.attention_dropout
    if rate is None:
        rate = TRANSMIL_DROPOUT if spec.dropout > 0.0 else 0.0
    return TransMIL(**_common(spec), **spec.options, dropout=rate)


@SLIDE_MODELS.register("dsmil")
def _dsmil(spec: SlideModelSpec) -> nn.Module:
    from models.dsmil import DSMIL

    return DSMIL(**_common(spec), **spec.options)


@SLIDE_MODELS.register("mean")
def _mean(spec: SlideModelSpec) -> nn.Module:
    from models.pooling import MeanPooling

    return MeanPooling(**_common(spec), dropout=spec.dropout)


@SLIDE_MODELS.register("max")
def _max(spec: SlideModelSpec) -> nn.Module:
    from models.pooling import MaxPooling

    return MaxPooling(**_common(spec), dropout=spec.dropout)


@SLIDE_MODELS.register("hag_mil")
def _hag_mil(spec: SlideModelSpec) -> nn.Module:
    from models.hag_mil import HAGMIL

    if spec.label_smoothing:
        raise Refused("model: hag_mil smooths each level by itself: give --level_smoothing "
                      "instead of --label_smoothing")
    clustering = _clustering_options(spec)
    return HAGMIL(**_common(spec), **clustering, **spec.options, n_levels=spec.n_levels,
                  gated=spec.gated, dropout=spec.dropout, attention_dropout=spec.attention_rate)


def _common(spec: SlideModelSpec) -> dict[str, Any]:
    return {"n_classes": spec.n_classes, "embed_dim": spec.embed_dim,
            "objective": spec.objective()}


def _attention_options(spec: SlideModelSpec) -> dict[str, Any]:
    return {**_common(spec), "model_size": spec.model_size, "gated": spec.gated,
            "dropout": spec.dropout, "attention_dropout": spec.attention_rate}


def _clustering_options(spec: SlideModelSpec) -> dict[str, Any]:
    return {"k_sample": spec.k_sample, "subtyping": spec.subtyping, "inst_loss": spec.inst_loss,
            "bag_weight": spec.bag_weight, "instance_clustering": spec.instance_clustering}
