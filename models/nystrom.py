"""Nyström self-attention: every patch attends to every other through landmark rows.

softmax(Q K^T) V is replaced by softmax(Q Kl^T) Z softmax(Ql K^T) V, where the rows of Ql and Kl
are means of consecutive queries and keys and Z is the iterative pseudo-inverse of
softmax(Ql Kl^T): cost and memory grow with N, never with N x N. A depth-wise convolution of the
values along the sequence is added. Source: Xiong et al., "Nyströmformer: a Nyström-based algorithm
for approximating self-attention", AAAI 2021, eq. 14 (the pseudo-inverse) and section 3.2; names
of the weights and ``legacy_padding`` as in the package nystrom-attention 0.0.11, which TransMIL
and HAG-MIL use.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import Dropout

_ROWS_AT_ONCE = 32  # landmarks of one piece of an attention map: bounds its (H, piece, N) scores


class NystromAttention(nn.Module):
    """(1, N, dim) to (1, N, dim).

    landmarks: rows that summarise the sequence (all of them when it is shorter).
    iterations: steps of the pseudo-inverse. residual_kernel: length of the convolution, odd.
    legacy_padding: put zero rows before the sequence until its length is a multiple of
    ``landmarks`` and let them take part like patches, as the package does; otherwise landmarks
    are means of segments whose lengths differ by at most one, and nothing is padded.
    """

    def __init__(
        self, dim: int, *, heads: int = 8, head_dim: int = 64, landmarks: int = 256,
        iterations: int = 6, residual_kernel: int = 33, dropout: float = 0.0,
        legacy_padding: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.landmarks = heads, head_dim, landmarks
        self.iterations = iterations
        self.legacy_padding = legacy_padding
        inner = heads * head_dim
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), Dropout(dropout))
        self.res_conv = nn.Conv2d(
            heads, heads, (residual_kernel, 1), padding=(residual_kernel // 2, 0),
            groups=heads, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, N, dim) to (1, N, dim)."""
        return self._attend(x, None)[0]

    def with_attention(
        self, x: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, and the attention (H, R, N) that the R query rows pay to every row.

        Rows of the map sum to about 1; single weights can be slightly negative, as the map is a
        product with a pseudo-inverse. It carries no gradient.
        """
        out, attention = self._attend(x, rows)
        return out, cast(torch.Tensor, attention)

    def _attend(
        self, x: torch.Tensor, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        n = x.shape[1]
        padding = -n % self.landmarks if self.legacy_padding else 0
        qkv = self.to_qkv(F.pad(x, (0, 0, padding, 0)) if padding else x)
        q, k, v = qkv.view(1, n + padding, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        count = min(self.landmarks, n + padding)
        q_mean, k_mean = segment_means(q, count), segment_means(k, count)
        q = q[:, :, padding:]
        summary = F.scaled_dot_product_attention(q_mean, k, v)  # (1, H, m, d)
        between = _softmax_scores(q_mean, k_mean)  # (1, H, m, m) float32
        mixed = pseudo_inverse_times(between, summary.float(), iterations=self.iterations)
        out = F.scaled_dot_product_attention(q, k_mean, mixed.to(v.dtype))
        out = out + self.res_conv(v)[:, :, padding:]
        attention = None
        if rows is not None:
            with torch.no_grad():
                attention = self._map(q[0, :, rows], q_mean[0], k[0], k_mean[0], between[0])
                attention = attention[:, :, padding:]
        return self.to_out(out.transpose(1, 2).flatten(2)), attention

    def _map(
        self, q: torch.Tensor, q_mean: torch.Tensor, k: torch.Tensor, k_mean: torch.Tensor,
        between: torch.Tensor,
    ) -> torch.Tensor:
        """softmax(q k_mean^T) Z softmax(q_mean k^T) of a few queries (H, R, d): (H, R, N)."""
        inverse = pseudo_inverse_times(  # Z itself
            between, torch.eye(between.shape[-1], device=between.device).expand_as(between),
            iterations=self.iterations)
        weights = _softmax_scores(q, k_mean) @ inverse  # (H, R, m)
        attention = torch.zeros(*q.shape[:2], k.shape[1], device=q.device)
        for start in range(0, weights.shape[2], _ROWS_AT_ONCE):
            piece = slice(start, start + _ROWS_AT_ONCE)
            attention += weights[:, :, piece] @ _softmax_scores(q_mean[:, piece], k)
        return attention


def segment_means(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Means of ``count`` consecutive segments of rows (..., N, d): (..., count, d), 1 <= count <= N.

    The first N % count segments are one row longer than the rest.
    """
    n, d = rows.shape[-2:]
    length, longer = divmod(n, count)
    if longer == 0:
        return rows.unflatten(-2, (count, length)).mean(dim=-2)
    head, tail = rows.split([longer * (length + 1), (count - longer) * length], dim=-2)
    return torch.cat([head.unflatten(-2, (longer, length + 1)).mean(dim=-2),
                      tail.unflatten(-2, (count - longer, length)).mean(dim=-2)], dim=-2)


def pseudo_inverse_times(x: torch.Tensor, w: torch.Tensor, *, iterations: int) -> torch.Tensor:
    """Z w for matrices x (..., m, m), w (..., m, d), where Z approximates the pseudo-inverse of x.

    Z_0 = x^T / c with c = (largest row sum) * (largest column sum) of |x| over all matrices
    together; Z_{k+1} = Z_k (13 - x Z_k (15 - x Z_k (7 - x Z_k))) / 4. Computed in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        size = x.detach().abs()
        scale = size.sum(dim=-1).amax() * size.sum(dim=-2).amax()
        z = x.mT / scale
        eye = torch.eye(x.shape[-1], device=x.device)
        for _ in range(iterations):
            xz = x @ z
            z = 0.25 * z @ (13 * eye - xz @ (15 * eye - xz @ (7 * eye - xz)))
        return z @ w


def _softmax_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) in float32: (..., n, d), (..., m, d) to (..., n, m)."""
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(dim=-1)
