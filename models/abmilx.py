"""ABMILX: attention of several heads, spread between similar patches (A+).

Source: Tang et al., "Revisiting End-to-End Learning with Slide-level Supervision in Computational
Pathology", NeurIPS 2025, arXiv 2506.02408. State-dict keys are the published ones:
``feature.{0,1}`` (without layer norm the linear layer is ``feature.0``), ``attention.{fc1,fc2}``
or ``attention.attention_{a.0,b.0,c}``, ``attn_plus_fn.{qk,v,norm_x}``, ``proj``, ``norm``,
``norm1``, ``norm_ffn``, ``mlp.{fc1,fc2}``, ``classifier``.

Shapes below: B bags, N patches, D features, C = inner_dim, H heads of width d = C / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from models.layers import Dropout, features_of, slide_step
from models.spread import Kernel, spread
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.errors import Refused
from utils.objectives import Classification, Objective

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU, "relu": nn.ReLU, "none": nn.Identity}
_D_IS_A_DIVISOR_TO = 10  # abx_D up to here divides the width, above it is one


@dataclass(frozen=True, kw_only=True)
class BatchOutput:
    """What ABMILX says of B bags of equal size.

    logits (B, classes); log_weights (B, H, N) float32, logarithm of each head's attention, which
    sums to 1; embedding (B, C) before the classifier; instances (B, N, C) embeddings of the patches
    """

    logits: torch.Tensor
    log_weights: torch.Tensor
    embedding: torch.Tensor
    instances: torch.Tensor


class ABMILX(nn.Module):
    """Each head weighs the patches by itself; their averages together are the slide.

    dropout: after the first layer; attention_dropout: of both factors of a gated attention;
    act: after the first layer. mil_bias: biases of first layer, projection, classifier, layer norm.
    mil_norm: ``ln`` over the features of each patch and over the slide vector; ``bn`` the same two
    places over the patches of a batch and over its slides, see ``BagNorm``.
    abx_attn_bias, abx_attn_type, abx_D: biases, kind and width (``attention_width``) of the
    attention. abx_attn_plus: refine it by A+; abx_alpha: weight of A+ at the start (learnt);
    legacy_alpha: drawn from N(0, 1) as published, so that half of all models start below 0.
    abx_embed_new: attention and A+ see all C columns instead of each head's own d.
    ffn: residual layer on the slide vector; proj_drop: dropout of the slide vector.
    sdpa_type: how A+ is computed, see ``models.spread``; no numbers depend on it.
    Raises ``Refused`` when the heads do not divide inner_dim.
    """

    def __init__(
        self,
        *,
        n_classes: int = 2,
        embed_dim: int = 1024,
        dropout: float = 0.25,
        attention_dropout: float = 0.25,
        objective: Objective | None = None,
        inner_dim: int = 512,
        n_heads: int = 8,
        act: Literal["gelu", "relu", "none"] = "gelu",
        mil_norm: Literal["none", "ln", "bn"] = "none",
        mil_bias: bool = False,
        abx_attn_bias: bool = False,
        abx_attn_plus: bool = True,
        abx_attn_type: Literal["mlp", "mlp_gated"] = "mlp",
        abx_D: int | None = None,
        abx_embed_new: bool = False,
        abx_alpha: float = 1.0,
        legacy_alpha: bool = False,
        ffn: bool = False,
        proj_drop: float = 0.0,
        sdpa_type: Kernel = "auto",
    ) -> None:
        super().__init__()
        if inner_dim % n_heads:
            fitting = ", ".join(str(h) for h in (1, 2, 4, 8, 16) if inner_dim % h == 0)
            raise Refused(f"abmilx: {n_heads} heads do not divide inner_dim {inner_dim}: "
                          f"give --n_heads {fitting} or another --inner_dim")
        self.embed_dim, self.n_heads = embed_dim, n_heads
        self.objective = objective or Classification(n_classes=n_classes)
        self.contextual = abx_attn_plus
        self.parts = 1 if abx_embed_new else n_heads  # what the attention sees at a time
        width = inner_dim // self.parts

        self.norm = BagNorm(embed_dim) if mil_norm == "bn" else nn.Identity()
        first = [nn.LayerNorm(embed_dim, bias=mil_bias)] if mil_norm == "ln" else []
        self.feature = nn.Sequential(
            *first, nn.Linear(embed_dim, inner_dim, bias=mil_bias), _ACTIVATIONS[act](),
            Dropout(dropout))
        sizes = {"width": width, "outputs": n_heads // self.parts,
                 "hidden": attention_width(width, abx_D, heads=self.parts)}
        self.attention = (
            GatedMlp(**sizes, bias=abx_attn_bias, drop=attention_dropout)
            if abx_attn_type == "mlp_gated" else Mlp(**sizes, bias=abx_attn_bias))
        self.attn_plus_fn = AttentionPlus(width, sdpa_type) if abx_attn_plus else None
        self.proj = nn.Linear(inner_dim, inner_dim, bias=mil_bias)
        self.proj_drop = Dropout(proj_drop)
        self.norm_ffn = (nn.LayerNorm(inner_dim) if ffn and mil_norm == "none" else nn.Identity())
        self.mlp = (Mlp(width=inner_dim, hidden=4 * inner_dim, outputs=inner_dim, bias=True)
                    if ffn else None)
        self.norm1 = _norm(mil_norm, inner_dim, bias=mil_bias)
        self.classifier = nn.Linear(inner_dim, n_classes, bias=mil_bias)
        self.apply(_initialise)
        if self.attn_plus_fn is not None and not legacy_alpha:
            nn.init.constant_(self.attn_plus_fn.v.weight, abx_alpha)

    def forward(self, bag: Bag) -> SlideOutput:
        """Logits (1, C), attention (1, N), weights of the heads (H, N), embedding (1, inner_dim).

        The softmax of ``attention`` is the mean of the heads' weights.
        """
        found = self.batch(features_of(bag, self.embed_dim)[None])
        log_weights = found.log_weights[0]
        mean = log_weights.logsumexp(dim=0, keepdim=True) - math.log(self.n_heads)
        return SlideOutput(logits=found.logits, attention=mean, embedding=found.embedding,
                           heads=log_weights.exp())

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """The slide loss, once."""
        yield slide_step(self(bag), bag, self.objective)

    def batch(self, features: torch.Tensor) -> BatchOutput:
        """Bags of equal size, (B, N, D), which stay as they are; their order of rows is free."""
        instances = self.feature(self.norm(features))  # (B, N, C)
        seen = instances.unflatten(-1, (self.parts, -1))  # (B, N, parts, C / parts)
        scores = self.attention(seen).flatten(2).transpose(1, 2)  # (B, H, N)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.attn_plus_fn is not None:
            scores = self.attn_plus_fn(seen, scores)
        log_weights = scores.log_softmax(dim=-1)
        slide = self.proj_drop(self.proj(self._pool(instances, log_weights.exp())))
        if self.mlp is not None:
            slide = slide + self.mlp(self.norm_ffn(slide))
        slide = self.norm1(slide)
        return BatchOutput(logits=self.classifier(slide), log_weights=log_weights,
                           embedding=slide, instances=instances)

    def _pool(self, instances: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(B, N, C) averaged under each head's weights (B, H, N), head by head: (B, C).

        In float32: the weights of a large bag are too small for a half.
        """
        with torch.autocast(instances.device.type, enabled=False):
            heads = instances.to(weights.dtype).unflatten(-1, (self.n_heads, -1))
            return torch.einsum("bhn,bnhd->bhd", weights, heads).flatten(1)


class AttentionPlus(nn.Module):
    """A+: a + alpha U a, with U the attention of patches to similar ones, for each head.

    x = LN(h), (q, k) = W x, U = softmax(q k^T / sqrt(d)): one W and one alpha for all heads.
    """

    def __init__(self, width: int, kernel: Kernel) -> None:
        super().__init__()
        self.norm_x = nn.LayerNorm(width)
        self.qk = nn.Linear(width, 2 * width, bias=False)
        self.v = nn.Linear(1, 1, bias=False)  # alpha, under its published name
        self.kernel: Kernel = kernel

    def forward(self, seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, H, N), refined; seen: (B, N, H, d), or (B, N, 1, C) for all heads."""
        q, k = (half.flatten(2).unflatten(-1, (scores.shape[1], -1)).transpose(1, 2)
                for half in self.qk(self.norm_x(seen)).chunk(2, dim=-1))  # (B, H, N, d) each
        return scores + self.v.weight.view(()) * spread(q, k, scores, kernel=self.kernel)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on the last axis."""

    def __init__(self, *, width: int, hidden: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, outputs, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class GatedMlp(nn.Module):
    """W_c (GELU(W_a x) * sigmoid(W_b x)), on the last axis.

    Published, each factor is dropped out with p; they only meet in the product, where an element
    survives with (1 - p)^2: one mask of that probability is the same distribution.
    """

    def __init__(
        self, *, width: int, hidden: int, outputs: int, bias: bool, drop: float
    ) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.GELU())
        self.attention_b = nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.Sigmoid())
        self.attention_c = nn.Linear(hidden, outputs, bias=bias)
        self.dropout = Dropout(1.0 - (1.0 - drop) ** 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = self.dropout(self.attention_a(x) * self.attention_b(x))
        out: torch.Tensor = self.attention_c(gated)
        return out


class BagNorm(nn.BatchNorm1d):
    """Batch norm over all rows of (..., width): the patches of a batch, or its slides.

    A single row (a bag of one patch; the slide vector, as long as a step sees one slide) has no
    variance. In training it is normalised by the running statistics, which then move by
    ``momentum`` towards it and its squared distance from their mean. (As published, the norm of
    the slide vector has the width of a head, and fails for more than one.)
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if not self.training or len(rows) > 1:
            return super().forward(rows).view_as(x)
        mean = cast(torch.Tensor, self.running_mean)
        var = cast(torch.Tensor, self.running_var)
        out = nn.functional.batch_norm(  # of copies: the way back needs them unchanged
            rows, mean.clone(), var.clone(), self.weight, self.bias, eps=self.eps)
        with torch.no_grad():
            row = rows[0].to(mean.dtype)
            var.lerp_((row - mean).square(), cast(float, self.momentum))
            mean.lerp_(row, cast(float, self.momentum))
        return out.view_as(x)


def attention_width(width: int, D: int | None, *, heads: int) -> int:
    """Hidden width of an attention on ``width`` columns, for each of ``heads`` that share it.

    D None: ``width``; above 10: D over the heads; else ``width`` over D. ``Refused`` below 1.
    """
    if D is None:
        return width
    hidden = D // heads if D > _D_IS_A_DIVISOR_TO else width // D
    if hidden < 1:
        raise Refused(f"abmilx: --abx_D {D} leaves no column to a head of width {width}: "
                      f"give one up to {min(width, _D_IS_A_DIVISOR_TO)}, or at least "
                      f"{max(heads, _D_IS_A_DIVISOR_TO + 1)}")
    return hidden


def _norm(kind: str, width: int, *, bias: bool) -> nn.Module:
    if kind == "ln":
        return nn.LayerNorm(width, bias=bias)
    return BagNorm(width) if kind == "bn" else nn.Identity()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
