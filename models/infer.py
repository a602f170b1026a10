"""What a slide model's weights say about it: its type, widths and options, by names and shapes.

For checkpoints without a description (those of the published originals). What leaves no trace in
the weights cannot be told: dropout rates, activations, landmarks, loss weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from models.attention import ATTENTION_WIDTH
from models.model_names import E2E, is_end_to_end, is_streaming, mil_name

Weights = Mapping[str, torch.Tensor]
POOLING = "mean or max"  # they have the same weights
STREAMING = "streaming"  # a pooled map: which network, and which pooling, no weight tells


def model_type_of(state: Weights) -> str | None:
    """The ``model_type`` that has weights of these names, ``POOLING`` for two that share them.

    End to end (``encoder.`` and ``mil.``) it is ``e2e_<encoder>_<slide model>`` where the encoder
    is a published one, else that of the slide model alone; ``STREAMING`` for a streaming model
    with a pooled head (one with attention has the weights of an end-to-end ``abmil``). None for a
    model not known here.
    """
    slide = _slide_part(state)
    for model_type, names in _SIGNS:
        if all(any(re.match(name, found) for found in slide) for name in names):
            encoder = "" if model_type == STREAMING else _encoder_of(state)
            return f"{E2E}{encoder}_{model_type}" if encoder else model_type
    return None


def infer_spec(model_type: str, state: Weights) -> dict[str, Any]:
    """Fields of ``SlideModelSpec`` that the weights of such a model tell; ``options`` among them.

    state: tensors under the names of our model. What the weights do not tell is left out; of an
    end-to-end model only the slide model's part is asked.
    """
    kind = mil_name(model_type) if is_end_to_end(model_type) else model_type
    read = _READERS.get(STREAMING if is_streaming(model_type) else kind)
    found = read(_slide_part(state)) if read else {}
    if "options" in found:
        found["options"] = _known(found["options"])
    return _known(found)


# Names (as regular expressions) that only this model has; the first that fits counts
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hag_mil", (r"model\d+\.layers\.0\.fc\.0\.weight$", r"model\d+\.fc5\.weight$")),
    ("transmil", (r"cls_token$", r"_fc1\.0\.weight$")),
    ("dsmil", (r"i_classifier\.fc\.0\.weight$", r"b_classifier\.fcc\.weight$")),
    ("abmilx", (r"feature\.[01]\.weight$", r"attention\.", r"proj\.weight$")),
    ("mil", (r"fc\.0\.weight$", r"classifiers?\.weight$")),
    ("clam_mb", (r"attention_net\.0\.weight$", r"classifiers\.0\.weight$")),
    ("clam_sb", (r"attention_net\.0\.weight$", r"instance_classifiers\.0\.weight$")),
    ("abmil", (r"attention_net\.0\.weight$",)),
    (POOLING, (r"head\.0\.weight$", r"head\.3\.weight$")),
    (STREAMING, (r"linear\.weight$",)),
)


def _slide_part(state: Weights) -> dict[str, torch.Tensor]:
    """The slide model inside an end-to-end model; of any other all there is."""
    return {name.removeprefix("mil."): value for name, value in state.items()
            if not name.startswith("encoder.")}


def _encoder_of(state: Weights) -> str | None:
    """The published encoder beside a slide model; r50 and r50v2 differ in their start alone."""
    bottleneck = "encoder.model.layer1.0.conv3.weight" in state
    depths = tuple(_count(state, rf"encoder\.model\.layer{stage}\.(\d+)\.") or 0
                   for stage in range(1, 5))
    return _RESNETS.get((bottleneck, depths))


_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {  # bottlenecks?, blocks of each stage
    (False, (2, 2, 2, 0)): "r18", (False, (2, 2, 2, 2)): "r18a", (True, (3, 4, 6, 0)): "r50v2"}


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _size(state: Weights, name: str, axis: int) -> int | None:
    """Length of an axis of an entry; None when there is none."""
    value = state.get(name)
    return None if value is None or value.ndim <= axis else int(value.shape[axis])


def _count(state: Weights, pattern: str) -> int | None:
    return len({match.group(1) for name in state if (match := re.match(pattern, name))}) or None


def _attention(state: Weights) -> dict[str, Any]:
    """CLAM and ABMIL."""
    part = "attention_net.3."
    gated = f"{part}attention_a.0.weight" in state
    width = _size(state, part + ("attention_a.0.weight" if gated else "module.0.weight"), 0)
    sizes = {value: name for name, value in ATTENTION_WIDTH.items()}
    return {
        "embed_dim": _size(state, "attention_net.0.weight", 1), "gated": gated,
        "model_size": sizes.get(width or 0),
        "n_classes": _size(state, "classifiers.weight", 0)
        or _count(state, r"classifiers\.(\d+)\.weight$")}


def _mil(state: Weights) -> dict[str, Any]:
    return {"embed_dim": _size(state, "fc.0.weight", 1),
            "n_classes": _size(state, "classifier.weight", 0)
            or _size(state, "classifiers.weight", 0)}


def _pooling(state: Weights) -> dict[str, Any]:
    return {"embed_dim": _size(state, "head.0.weight", 1),
            "n_classes": _size(state, "head.3.weight", 0)}


def _streaming(state: Weights) -> dict[str, Any]:
    if "attention_net.0.weight" in state:
        return {**_attention(state), "options": {"head": "gated_attention"}}
    return {"embed_dim": _size(state, "linear.weight", 1),
            "n_classes": _size(state, "linear.weight", 0)}


def _transmil(state: Weights) -> dict[str, Any]:
    return {"embed_dim": _size(state, "_fc1.0.weight", 1),
            "n_classes": _size(state, "_fc2.weight", 0),
            "options": {"inner_dim": _size(state, "_fc1.0.weight", 0),
                        "n_heads": _size(state, "layer1.attn.res_conv.weight", 0)}}


def _dsmil(state: Weights) -> dict[str, Any]:
    linear = "b_classifier.q.weight" in state
    return {"embed_dim": _size(state, "i_classifier.fc.0.weight", 1),
            "n_classes": _size(state, "i_classifier.fc.0.weight", 0),
            "options": {
                "linear_query": linear,
                "query_dim": _size(state, "b_classifier.q." + ("" if linear else "0.") + "weight",
                                   0),
                "passing_v": "b_classifier.v.1.weight" in state}}


def _abmilx(state: Weights) -> dict[str, Any]:
    normed = _size(state, "feature.1.weight", 1)  # the linear layer stands behind a norm
    batch = "norm.running_mean" in state
    return {
        "embed_dim": normed or _size(state, "feature.0.weight", 1),
        "n_classes": _size(state, "classifier.weight", 0),
        "options": {
            "inner_dim": _size(state, "classifier.weight", 1),
            "mil_norm": "ln" if normed else "bn" if batch else "none",
            "mil_bias": "classifier.bias" in state,
            "abx_attn_plus": "attn_plus_fn.qk.weight" in state,
            "ffn": "mlp.fc1.weight" in state,
            **_abmilx_attention(state)}}


def _abmilx_attention(state: Weights) -> dict[str, Any]:
    """Heads and layers of the attention, from the shapes of its first and last layer."""
    gated = "attention.attention_a.0.weight" in state
    first, last = ("attention_a.0", "attention_c") if gated else ("fc1", "fc2")
    inner = _size(state, "classifier.weight", 1)
    taken = _size(state, f"attention.{first}.weight", 1)
    width = _size(state, f"attention.{first}.weight", 0)
    rows = _size(state, f"attention.{last}.weight", 0)
    found: dict[str, Any] = {
        "abx_attn_type": "mlp_gated" if gated else "mlp",
        "abx_attn_bias": f"attention.{first}.bias" in state}
    if not inner or not taken or not width or not rows:
        return found
    whole = rows > 1  # the whole embedding goes in, and a score for each head comes out
    return {**found, "abx_embed_new": whole, "n_heads": rows if whole else inner // taken,
            "abx_D": _abmilx_width(width, taken, copies=1 if whole else inner // taken)}


def _abmilx_width(width: int, taken: int, *, copies: int) -> int | None:
    """The option D that gives an attention of this width: None = as wide as what goes in.

    copies: heads that share one set of weights (D above 10 counts them all)
    """
    if width == taken:
        return None
    if width * copies > 10:
        return width * copies
    return next((divisor for divisor in range(1, 11) if taken // divisor == width), None)


def _hag_mil(state: Weights) -> dict[str, Any]:
    level = r"model\d+\."
    top = next((match.group() for name in state if (match := re.match(level, name))), "")
    blocks = _count(state, re.escape(top) + r"layers\.(\d+)\.fc\.0\.weight$") or 0
    return {
        "embed_dim": _size(state, f"{top}layers.0.fc.0.weight", 1),
        "n_classes": _size(state, f"{top}fc5.weight", 0),
        "gated": f"{top}layers.0.attention_net.3.attention_a.0.weight" in state,
        "n_levels": _count(state, r"model(\d+)\."),
        "options": {"hidden_dims": tuple(
            _size(state, f"{top}layers.{block}.fc.0.weight", 0) or 0
            for block in range(blocks)) or None}}


_READERS: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "clam_sb": _attention, "clam_mb": _attention, "abmil": _attention, "mil": _mil,
    "mean": _pooling, "max": _pooling, POOLING: _pooling, "transmil": _transmil, "dsmil": _dsmil,
    "abmilx": _abmilx, "hag_mil": _hag_mil, STREAMING: _streaming}
