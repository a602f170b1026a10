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

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from models.layers import Dropout
from models.linear import Linear, bmm

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
        self.to_qkv = Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(Linear(inner, dim), Dropout(dropout))
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
        between = _softmax_scores(q_mean, k_mean)  # (1, H, m, m)
        mixed = pseudo_inverse_times(between, summary, iterations=self.iterations)
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
            between, torch.eye(between.shape[-1]).to(between).expand_as(between),
            iterations=self.iterations)
        with torch.autocast(q.device.type, enabled=False):
            weights = _softmax_scores(q, k_mean) @ inverse  # (H, R, m)
            attention = weights.new_zeros(*q.shape[:2], k.shape[1])
            for start in range(0, weights.shape[2], _ROWS_AT_ONCE):
                piece = slice(start, start + _ROWS_AT_ONCE)
                attention += weights[:, :, piece] @ _softmax_scores(q_mean[:, piece], k)
        return attention


def segment_means(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Means of ``count`` consecutive segments, at most N, of rows (..., N, d): (..., count, d).

    The first N % count segments are one row longer than the rest.
    """
    n, d = rows.shape[-2:]
    length, longer = divmod(n, count)
    if longer == 0:
        means: torch.Tensor = rows.unflatten(-2, (count, length)).mean(dim=-2)
        return means
    head, tail = rows.split([longer * (length + 1), (count - longer) * length], dim=-2)
    return torch.cat([head.unflatten(-2, (longer, length + 1)).mean(dim=-2),
                      tail.unflatten(-2, (count - longer, length)).mean(dim=-2)], dim=-2)


def pseudo_inverse_times(x: torch.Tensor, w: torch.Tensor, *, iterations: int) -> torch.Tensor:
    """Z w for matrices x (..., m, m), w (..., m, d), where Z approximates the pseudo-inverse of x.

    Z_0 = x^T / c with c = (largest row sum) * (largest column sum) of |x| over all matrices
    together; Z_{k+1} = Z_k (13 - x Z_k (15 - x Z_k (7 - x Z_k))) / 4. Computed in the precision
    of x, whatever autocast says.
    """
    with torch.autocast(x.device.type, enabled=False):
        size = x.abs()
        scale = size.sum(dim=-1).amax() * size.sum(dim=-2).amax()
        flat = x.flatten(0, -3), w.to(x.dtype).flatten(0, -3)
        product: torch.Tensor = _PseudoInverseTimes.apply(*flat, scale, iterations)
        return product.view_as(w)


class _PseudoInverseTimes(torch.autograd.Function):
    """``pseudo_inverse_times`` in little more than half the work of the written-out iteration.

    With Y_k = x Z_k the iteration reads Z_{k+1} = Z_k p(Y_k) and Y_{k+1} = Y_k p(Y_k) = q(Y_k),
    so Z = x^T/c p(Y_0) p(Y_1) ... : the narrow w is multiplied from the right and Z is never
    formed. Y_0 = x x^T / c is symmetric, and so are all Y_k. With S = Y^2 - 7/2 Y, in squares:
    q(Y) = -1/4 S^2 - 11/16 S + 27/32 Y and p(Y) w = 13/4 w + 7/8 S w - 1/4 Y (11/4 w + S w).
    The way back takes one product for each square, as the gradient of a symmetric square is
    Y G + (Y G)^T. Held for it: Y_k, and the right-hand sides.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, iterations: int
    ) -> torch.Tensor:
        # torch.bmm: rounding adds up over the steps, and oneDNN's sums are less exact than MKL's
        ys = [torch.bmm(x, x.mT).div_(scale)]
        squares = [_square(ys[0])]
        for _ in range(iterations - 1):
            y, s = ys[-1], squares[-1]
            ys.append((y * (27 / 32)).sub_(s, alpha=11 / 16).sub_(torch.bmm(s, s), alpha=1 / 4))
            squares.append(_square(ys[-1]))
        sides = []  # right-hand side of each step, last to first
        for y, s in zip(reversed(ys), reversed(squares), strict=True):
            sw = torch.bmm(s, w)
            sides.append(w)
            yt = torch.bmm(y, torch.add(sw, w, alpha=11 / 4))
            w = (w * (13 / 4)).add_(sw, alpha=7 / 8).sub_(yt, alpha=1 / 4)
        product = torch.bmm(x.mT, w).div_(scale)
        ctx.iterations = iterations
        ctx.save_for_backward(x, scale, product, w, *ys, *sides)
        return product

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x, scale, product, w, *saved = ctx.saved_tensors
        ys, sides = saved[:ctx.iterations], saved[ctx.iterations:]
        grad_scale = -(grad * product).sum() / scale
        grad_x = bmm(w, grad.mT).div_(scale)
        g = bmm(x, grad).div_(scale)
        squares = [bmm(y, y).sub_(y, alpha=7 / 2) for y in ys]
        outer = []  # of each step, first to last: gradients and their partners in Y and in S
        for y, s, w in zip(ys, squares, reversed(sides), strict=True):
            g_t = bmm(y, g).mul_(-1 / 4)
            g_s = torch.add(g_t, g, alpha=7 / 8)
            outer.append((g, bmm(s, w).add_(w, alpha=11 / 4), g_s, w))
            g = bmm(s, g_s).add_(g, alpha=13 / 4).add_(g_t, alpha=11 / 4)
        above: torch.Tensor | None = None  # gradient of Y_{k+1}
        while squares:
            y, s, (g_y, t, g_s, w) = ys.pop(), squares.pop(), outer.pop()
            half = bmm(g_s, w.mT).mul_(1 / 2)
            if above is not None:
                half.sub_(bmm(s, above), alpha=1 / 4).sub_(above, alpha=11 / 32)
            of_square = half + half.mT
            half = bmm(g_y, t.mT).mul_(-1 / 8).add_(bmm(y, of_square))
            half.sub_(of_square, alpha=7 / 4)
            if above is not None:
                half.add_(above, alpha=27 / 64)
            above = half + half.mT
        assert above is not None
        grad_scale = grad_scale - (above * y).sum() / scale
        return grad_x.add_(bmm(above, x / scale), alpha=2), g, grad_scale, None


def _square(y: torch.Tensor) -> torch.Tensor:
    """y y - 7/2 y."""
    return torch.bmm(y, y).sub_(y, alpha=7 / 2)


def _softmax_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) in float32 or better: (..., n, d), (..., m, d) to (..., n, m)."""
    precise = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores: torch.Tensor = q.to(precise) @ k.to(precise).mT * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1)
