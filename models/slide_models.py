"""The slide models by name, and the one description from which each is built.

A checkpoint's neighbour (``s_{k}_checkpoint.json``) holds this description, so that evaluation
and heat-maps rebuild the model without flags. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.errors import Refused
from utils.registry import Registry

if TYPE_CHECKING:
    from torch import nn

CLAM_ATTENTION_DROPOUT = 0.25


@dataclass(frozen=True, kw_only=True)
class SlideModelSpec:
    """What a slide model is made of; ``Refused`` at once when a value makes no sense.

    model_type: a name in ``SLIDE_MODELS``; embed_dim: width of the features;
    model_size: width of the attention, small 256 or big 384 (``mil`` has none);
    dropout: after the trunk; attention_dropout: in the attention, None = as CLAM does, 0.25
    whenever ``dropout`` is not 0; gated: sigmoid gate in the attention;
    the rest: see ``models.clam.CLAM_SB`` (``mil`` and ``abmil`` only use ``bag_loss``).
    """

    model_type: str
    embed_dim: int
    n_classes: int
    model_size: str = "small"
    dropout: float = 0.25
    gated: bool = True
    k_sample: int = 8
    subtyping: bool = False
    bag_loss: str = "ce"
    inst_loss: str = "ce"
    bag_weight: float = 0.7
    instance_clustering: bool = True
    attention_dropout: float | None = None

    def __post_init__(self) -> None:
        limits = [
            ("embed_dim", self.embed_dim >= 1, "at least 1"),
            ("n_classes", self.n_classes >= 2, "at least 2"),
            ("model_size", self.model_size in ("small", "big"), "small or big"),
            ("dropout", 0.0 <= self.dropout < 1.0, "from 0 to below 1"),
            ("k_sample", self.k_sample >= 1, "at least 1"),
            ("bag_weight", 0.0 <= self.bag_weight <= 1.0, "from 0 to 1"),
            ("attention_dropout", 0.0 <= self.attention_rate < 1.0, "from 0 to below 1"),
        ]
        for name, fine, expected in limits:
            if not fine:
                raise Refused(f"model: {name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def attention_rate(self) -> float:
        """Dropout probability in the attention."""
        if self.attention_dropout is not None:
            return self.attention_dropout
        return CLAM_ATTENTION_DROPOUT if self.dropout > 0.0 else 0.0


SLIDE_MODELS: Registry[Callable[[SlideModelSpec], nn.Module]] = Registry("slide model")


def build_slide_model(spec: SlideModelSpec) -> nn.Module:
    """A fresh model (``utils.contracts.SlideModel``) with PyTorch's default initialisation.

    Under one ``torch.manual_seed`` equal specs give equal weights. ``Refused`` for unknown names.
    """
    return SLIDE_MODELS.get(spec.model_type)(spec)


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


@SLIDE_MODELS.register("mil")
def _mil(spec: SlideModelSpec) -> nn.Module:
    from models.mil_fc import MIL_fc, MIL_fc_mc

    options: dict[str, Any] = {"embed_dim": spec.embed_dim, "dropout": spec.dropout,
                               "bag_loss": spec.bag_loss}
    return MIL_fc(**options) if spec.n_classes == 2 else MIL_fc_mc(
        n_classes=spec.n_classes, **options)


def _attention_options(spec: SlideModelSpec) -> dict[str, Any]:
    return {"n_classes": spec.n_classes, "embed_dim": spec.embed_dim,
            "model_size": spec.model_size, "gated": spec.gated, "dropout": spec.dropout,
            "attention_dropout": spec.attention_rate, "bag_loss": spec.bag_loss}


def _clustering_options(spec: SlideModelSpec) -> dict[str, Any]:
    return {"k_sample": spec.k_sample, "subtyping": spec.subtyping, "inst_loss": spec.inst_loss,
            "bag_weight": spec.bag_weight, "instance_clustering": spec.instance_clustering}
