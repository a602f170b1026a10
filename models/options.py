"""Flags of the slide models, one frozen dataclass a family; main.py inherits them all.

A field of the same name in two families means the same. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from models.model_names import is_end_to_end, is_streaming, mil_name
from utils.errors import Refused
from utils.options import build, from_mapping, load_yaml, option, pick


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Models that need no more than what all have."""


@dataclass(frozen=True, kw_only=True)
class AbmilxOptions:
    """ABMILX (spec abmilx.md 6.2); published defaults but for A+, which is on."""

    inner_dim: int = option(512, help="width of the embedding (abmilx, transmil)", low=1)
    n_heads: int = option(8, help="attention heads (abmilx, transmil)", low=1)
    act: Literal["gelu", "relu", "none"] = option(
        "gelu", help="activation after the first layer (abmilx)")
    mil_norm: Literal["none", "ln", "bn"] = option(
        "none", help="normalisation of the features and of the slide vector (abmilx)")
    mil_bias: bool = option(False, help="biases in the linear layers (abmilx)")
    abx_attn_bias: bool = option(False, help="biases in the attention layers (abmilx)")
    abx_attn_plus: bool = option(True, help="abmilx without A+, the spread of attention between "
                                 "similar patches")
    abx_attn_type: Literal["mlp", "mlp_gated"] = option("mlp", help="attention layers (abmilx)")
    abx_D: int | None = option(None, help="width of the attention: above 10 for all heads "
                               "together, else a divisor of the head's width (abmilx)", low=1)
    abx_embed_new: bool = option(False, help="attention from the whole embedding instead of one "
                                 "set of weights shared by the heads (abmilx)")
    abx_alpha: float = option(1.0, help="weight of A+ at the start, which is learnt (abmilx)")
    legacy_alpha: bool = option(False, help="draw that weight from N(0, 1), as published (abmilx)")
    ffn: bool = option(False, help="feed-forward layer on the slide vector (abmilx)")
    proj_drop: float = option(0.0, help="dropout of the slide vector (abmilx)", low=0, high=0.99)
    sdpa_type: Literal["auto", "blocks", "fused"] = option(
        "auto", help="how A+ is computed (abmilx): blocks of patches, or torch's fused attention; "
        "same numbers, other time and memory; auto: fused on CUDA, else blocks")


@dataclass(frozen=True, kw_only=True)
class TransmilOptions:
    """TransMIL (Shao et al. 2021); ``attention_dropout`` is 0.1 there unless given."""

    inner_dim: int = option(512, help="width of the embedding (abmilx, transmil)", low=1)
    n_heads: int = option(8, help="attention heads (abmilx, transmil)", low=1)
    landmarks: int | None = option(None, help="landmarks of the Nystrom attention (transmil, "
                                   "hag_mil; default: half of the width)", low=1)
    legacy_padding: bool = option(False, help="zero rows in front take part in the attention, as "
                                  "published (transmil, hag_mil)")


@dataclass(frozen=True, kw_only=True)
class DsmilOptions:
    """DSMIL (Li et al. 2021), published defaults; ``dropout`` has no layer to follow there."""

    query_dim: int = option(128, help="width of the queries (dsmil)", low=1)
    passing_v: bool = option(False, help="a layer on the values (dsmil)")
    linear_query: bool = option(False, help="one linear layer for the queries (dsmil)")
    value_dropout: float = option(0.0, help="dropout of the values (dsmil)", low=0, high=0.99)
    max_weight: float = option(0.5, help="share of the highest instance's loss (dsmil)",
                               low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class HagOptions:
    """HAG-MIL (spec hagmil.md 4); published defaults."""

    hidden_dims: tuple[int, ...] = option((1024, 1536, 512, 1024), low=1,
                                          help="widths of the blocks (hag_mil)")
    t_patch: tuple[float, ...] = option(
        (7000.0,), help="parents kept in training, a number or (below 1) a fraction; one value, or "
        "one for each level but the finest (hag_mil)", low=0)
    v_patch: tuple[float, ...] = option(
        (10000.0,), help="parents kept in validation and evaluation (hag_mil)", low=0)
    inst_weight: float = option(0.5, help="weight of the instance loss (hag_mil)", low=0)
    level_smoothing: tuple[float, ...] | None = option(
        None, help="label smoothing of each level, coarse to fine; two values: all but the finest, "
        "the finest (hag_mil; default: 0.1 0 with bag_loss ce, else none)", low=0, high=0.99)
    landmarks: int | None = option(None, help="landmarks of the Nystrom attention (transmil, "
                                   "hag_mil; default: half of the width)", low=1)
    legacy_padding: bool = option(False, help="zero rows in front take part in the attention, as "
                                  "published (transmil, hag_mil)")
    legacy_order: bool = option(False, help="children in the order of their parents' attention, "
                                "as published, not in that of the slide (hag_mil)")
    checkpoint_above: int = option(
        4096, help="patches of a level above which training computes the inside of a block again "
        "instead of holding it: less memory, a third more time (hag_mil)", low=0)


@dataclass(frozen=True, kw_only=True)
class E2EOptions:
    """Encoder and augmentation of an end-to-end model (spec abmilx.md 4, 5, 7)."""

    train_blocks: int | None = option(
        None, help="train only the last so many blocks of the encoder (stages of a CNN, blocks of "
        "a transformer), 0 = none (e2e; default: all)", low=0)
    enc_bn: Literal["frozen", "batch", "sync"] = option(
        "frozen", help="batch norms of the encoder (e2e): with the statistics of its weights, of "
        "the patches encoded together, or of those of all processes")
    enc_grad: Literal["auto", "graph", "cached", "checkpointed"] = option(
        "auto", help="memory of training (e2e): hold everything (graph), encode each chunk again "
        "in the backward pass (cached), each block of the encoder (checkpointed); the gradient is "
        "the same; auto: graph for one chunk, else cached")
    batch_size: int = option(1, help="slides encoded together (e2e); --accumulate slides make a "
                             "step", low=1)
    p_batch_size: int = option(128, help="patches in a chunk of the encoder in training (e2e)",
                               low=1)
    p_batch_size_v: int = option(256, help="the same in evaluation (e2e)", low=1)
    img_size: int = option(224, help="px of a patch as the encoder sees it (e2e)", low=16)
    img_transform: Literal["none", "weak", "weak_strong", "strong", "strong_v2"] = option(
        "none", help="augmentation (e2e): weak: a crop of each patch; weak_strong: moved by up to "
        "100/256, then a crop; strong: flips and a crop; strong_v2: flips, moved by up to half, a "
        "crop")
    crop_scale: float = option(0.08, help="smallest share of a patch's area in a crop (e2e)",
                               low=0.001, high=1)
    channels: Literal["RGB", "BGR"] = option(
        "RGB", help="order of the channels (e2e): BGR for weights of ABMILX's own programs")


@dataclass(frozen=True, kw_only=True)
class StreamingOptions:
    """A network over whole slides (spec streaming.md 6, 7). Where the network is cut, tiles and
    memory change time and memory only, never the result."""

    head: Literal["max", "mean", "gated_attention"] = option(
        "max", help="what follows the network (streaming): the maximum (as published) or mean of "
        "each channel and a linear layer; or attention over the positions, which heatmaps show")
    train_part: Literal["head", "last_stage", "all"] = option(
        "all", help="what is trained (streaming): the head, the last stage of the network as well, "
        "or everything; the rest runs once, without a graph")
    cut: str | None = option(
        None, help="last stage of the network that is streamed, by its name in timm, layer3 for "
        "example (streaming); later ones see the whole map at once (default: all are streamed)")
    tile_size: int = option(
        0, help="side of a tile of the image in px (streaming), rounded up to a legal one; 0 = by "
        "the memory there is", low=0)
    store_maps: Literal["auto", "none", "all"] = option(
        "auto", help="maps between the stages (streaming): held as far as memory goes (auto), at "
        "each stage (all: the borders of tiles are computed again least), or not at all (none: "
        "memory does not grow with the image)")
    stream_memory: float = option(
        0.0, help="memory for a training step in GB (streaming), of each fold with --fold_workers; "
        "0 = of what is free, half on a CPU, four fifths on a GPU", low=0)
    skip_constant: bool = option(
        True, help="compute every tile of one colour, instead of one for all (streaming); slower, "
        "the same result")


@dataclass(frozen=True, kw_only=True)
class PretrainedOptions:
    """Where weights start; of training alone."""

    enc_init: Path | None = option(
        None, help="weight file of the encoder (e2e, streaming), or a folder with one a fold "
        "(s_{k}_checkpoint.pt or ABMILX's fold_{k}_model_best.pt); default: ImageNet weights, "
        "looked for as extract_features_fp.py does")
    no_enc_pt: bool = option(False, help="start the encoder (e2e, streaming) from random weights")
    mil_init: Path | None = option(
        None, help="checkpoint that the slide model starts from, or a folder with one a fold: a "
        "two-stage training on the same splits, for an e2e model of the same kind; for a streaming "
        "model its head")


# What changes time and memory and no result, so that an evaluation may have its own
COSTS_ONLY = ("tile_size", "store_maps", "stream_memory", "skip_constant", "p_batch_size_v")
MODEL_OPTIONS: dict[str, type] = {
    "abmilx": AbmilxOptions, "transmil": TransmilOptions, "dsmil": DsmilOptions,
    "hag_mil": HagOptions}


@cache
def options_kind(model_type: str) -> type:
    """The dataclass of a model's options; of an end-to-end model those of both its parts."""
    if is_streaming(model_type):
        return StreamingOptions
    if not is_end_to_end(model_type):
        return MODEL_OPTIONS.get(model_type, NoOptions)
    kind = MODEL_OPTIONS.get(mil_name(model_type), NoOptions)
    both = type(kind.__name__, (E2EOptions, kind), {"__doc__": E2EOptions.__doc__})
    return dataclass(frozen=True, kw_only=True)(both)


def options_of(model_type: str, values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """All options of a model, from some or none of them; ``Refused`` for unknown or bad ones."""
    kind = options_kind(model_type)
    found: Any = build(kind, from_mapping(kind, values, source=source), prefix=f"{source}: ")
    return {item.name: getattr(found, item.name) for item in fields(found)}


def pick_options(model_type: str, flags: object) -> dict[str, Any]:
    """The options of a model out of an object that has those of all."""
    return pick(options_kind(model_type), flags)


def read_model_options(path: Path) -> dict[str, Any]:
    """Options of any model family out of a YAML file, a preset for example; what else it holds is
    left out. ``Refused`` for bad values, and for a file without any."""
    hints = {item.name: kind for kind in (*MODEL_OPTIONS.values(), E2EOptions, StreamingOptions)
             for item in fields(kind)}
    found = {}
    for key, value in load_yaml(path).items():
        if key in hints:
            found.update(from_mapping(hints[key], {key: value}, source=str(path)))
    if not found:
        raise Refused(f"{path} holds no option of a model: expected some of "
                      f"{', '.join(sorted(hints))}")
    return found
