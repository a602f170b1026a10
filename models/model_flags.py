"""The flags of main.py that say what model is trained, and the description made of them.

CLAM's flags keep CLAM's names and meanings. Importing this module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from models.model_names import MIL_NAMES, is_streaming, split_name
from models.options import (
    MODEL_OPTIONS,
    AbmilxOptions,
    DsmilOptions,
    E2EOptions,
    HagOptions,
    StreamingOptions,
    TransmilOptions,
    options_kind,
    pick_options,
)
from models.slide_models import SlideModelSpec
from utils.errors import Refused
from utils.objectives import TASK_LOSSES, TaskType
from utils.options import option

LOSS_NAMES = [name for names in TASK_LOSSES.values() for name in names]
DEFAULT_BAG_WEIGHT = {"hag_mil": 0.5}
CLAM_BAG_WEIGHT = 0.7
DEFAULT_WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class ModelFlags(AbmilxOptions, TransmilOptions, DsmilOptions, HagOptions, E2EOptions,
                 StreamingOptions):
    """What all models share, then what single families add."""

    model_type: str = option("clam_sb", help=f"slide model: {', '.join(MIL_NAMES)}; or "
                             "e2e_<encoder>_<one of them>, trained from patches, encoder: r18, "
                             "r18a, r50, r50v2, efficientnet_lite0 or any timm model; or "
                             "streaming_<network>, over whole slide images: resnet34 or any CNN "
                             "of timm with stages")
    embed_dim: int | None = option(None, help="width of the features (default: 1024; that of its "
                                   "network for an e2e or streaming model)", low=1)
    bag_loss: str | None = option(
        None, choices=LOSS_NAMES, help="slide loss (default: ce, bce, mse or nll_surv by the task)")
    label_smoothing: float = option(0.0, low=0, high=0.99, help="share of the target spread over "
                                    "all classes (ce, bce)")
    class_weights: Literal["none", "balanced"] = option(
        "none", help="weigh the slides' losses so that all classes count the same")
    n_bins: int = option(4, help="survival: bins of time, by the quantiles of the training events",
                         low=2, high=100)
    nll_alpha: float = option(0.0, help="survival: extra weight of slides with an event",
                              low=0, high=0.99)
    model_size: Literal["small", "big"] = option("small", help="width of the attention (CLAM)")
    drop_out: float = option(0.25, help="dropout after the first layer", bare=0.25,
                             low=0, high=0.99)
    attention_dropout: float | None = option(
        None, help="dropout in the attention (default: 0.25, none with --drop_out 0)",
        low=0, high=0.99)
    ungated: bool = option(False, help="attention without the sigmoid gate")
    no_inst_cluster: bool = option(False, help="CLAM and HAG-MIL without instance clustering")
    inst_loss: Literal["svm", "ce", "None"] | None = option(None, help="instance loss (None: ce)")
    subtyping: bool = option(False, help="classes exclude each other (CLAM models, HAG-MIL)")
    bag_weight: float | None = option(
        None, help="share of the slide loss in the total (default: 0.7, hag_mil 0.5)",
        low=0, high=1)
    B: int = option(8, help="instances sampled from each end; 0 or less = 8")


def describe_model(flags: ModelFlags, *, task_type: TaskType, n_classes: int,
                   n_levels: int = 1) -> SlideModelSpec:
    """The model that the flags ask for; ``Refused`` when they contradict each other.

    n_classes: classes, labels or values of the task; for survival the bins decide
    """
    encoder, mil = split_name(flags.model_type)
    _refuse_foreign(flags)
    loss = flags.bag_loss or TASK_LOSSES[task_type][0]
    if task_type == "survival":
        n_classes = 1 if loss == "cox" else flags.n_bins
    weight = flags.bag_weight
    if weight is None:
        weight = DEFAULT_BAG_WEIGHT.get(mil, CLAM_BAG_WEIGHT)
    return SlideModelSpec(
        model_type=flags.model_type, embed_dim=_width(flags, encoder), n_classes=n_classes,
        model_size=flags.model_size, dropout=flags.drop_out, gated=not flags.ungated,
        k_sample=flags.B if flags.B > 0 else 8, subtyping=flags.subtyping, bag_loss=loss,
        inst_loss="svm" if flags.inst_loss == "svm" else "ce", bag_weight=weight,
        instance_clustering=not flags.no_inst_cluster, attention_dropout=flags.attention_dropout,
        task_type=task_type, label_smoothing=flags.label_smoothing, nll_alpha=flags.nll_alpha,
        n_levels=n_levels, options=pick_options(flags.model_type, flags))


def _width(flags: ModelFlags, encoder: str) -> int:
    """Width of the features; ``Refused`` when an encoder has another one than was given."""
    if not encoder:
        return flags.embed_dim or DEFAULT_WIDTH
    if is_streaming(flags.model_type):
        from models.streaming_cnn import map_width

        width = map_width(encoder)
    else:
        from models.e2e_encoders import encoder_width

        width = encoder_width(encoder, img_size=flags.img_size)
    if flags.embed_dim not in (None, width):
        raise Refused(f"--embed_dim is {flags.embed_dim}, but {encoder} gives {width} numbers "
                      "a patch (or position): leave it out")
    return width


def _refuse_foreign(flags: ModelFlags) -> None:
    """``Refused`` for a changed flag of another model family: it would do nothing."""
    own = {item.name for item in fields(options_kind(flags.model_type))}
    for family, kind in {**MODEL_OPTIONS, "e2e models": E2EOptions,
                         "streaming models": StreamingOptions}.items():
        for item in fields(kind):
            if item.name not in own and getattr(flags, item.name) != item.default:
                raise Refused(f"--{item.name} belongs to {family}, it has no effect on "
                              f"{flags.model_type}: leave it out")
