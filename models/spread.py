"""Averages of one number a patch over similar patches, softmax(q k^T) a, never holding N x N.

ABMILX's A+ (models.abmilx) needs them for every head. A plain ``scaled_dot_product_attention``
with a value one column wide forms N x N, and on a CPU so does a value of any width but that of the
keys. Two exact ways out, equal to rounding:

* ``blocks``: some queries at a time, all keys, and the same again on the way back. There is no
  product with a padded value, so it takes about half of the arithmetic of the other way, and the
  same bits each time. Under a half-precision autocast the products are halves, the softmax, the
  average and all sums float32.
* ``fused``: torch's kernel, with the value padded to the width of the keys and all to a multiple
  of 8, so that each of its kernels can take it.

Measured on a CPU with 1 thread, 8 heads of width 64, N = 5,000, forward and backward, seconds:
N x N 3.2, fused 2.0 (bf16 1.5), blocks 1.4 (bf16 0.6).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

Kernel = Literal["auto", "blocks", "fused"]

# Scores held at once: what stays in a CPU's cache, what keeps another device busy
_SCORES_AT_ONCE = {"cpu": 2**20}
_SCORES_AT_ONCE_ELSEWHERE = 2**26
_ROWS_AT_LEAST = 16  # fewer make poor matrix products


def spread(
    q: torch.Tensor, k: torch.Tensor, a: torch.Tensor, *, kernel: Kernel = "auto"
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) a for q, k (B, H, N, d) and a (B, H, N): (B, H, N) as ``a``.

    kernel: see the module; auto is fused on CUDA devices and blocks elsewhere
    """
    scale = q.shape[-1] ** -0.5
    if kernel == "fused" or (kernel == "auto" and q.device.type == "cuda"):
        return _fused(q, k, a, scale)
    with torch.autocast(q.device.type, enabled=False):
        out: torch.Tensor = _Blocks.apply(
            (q * scale).flatten(0, 1), k.flatten(0, 1), a.flatten(0, 1))
    return out.view_as(a)


def _fused(q: torch.Tensor, k: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    spare = -q.shape[-1] % 8
    if spare:
        q, k = F.pad(q, (0, spare)), F.pad(k, (0, spare))
    value = F.pad(a[..., None].to(q.dtype), (0, q.shape[-1] - 1))
    return F.scaled_dot_product_attention(q, k, value, scale=scale)[..., 0].to(a.dtype)


class _Blocks(torch.autograd.Function):
    """softmax(q k^T) a of q, k (G, N, d) and a (G, N), group by group, block by block.

    With P the softmax and g the gradient of the result o, E = P (a_j - o_i) gives
    dq_i = g_i (E k)_i, dk = E^T (g q), da = P^T g: P is made again, block by block.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(a)
        block = _block(q, a)
        for group in range(len(a)):
            keys = k[group].contiguous()
            for rows in _rows(a, len(block)):
                weights = _weights(q[group, rows], keys, block)
                torch.mv(weights, a[group], out=out[group, rows])
        ctx.save_for_backward(q, k, a, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, a, out = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            return _backward(q, k, a, out, grads[0])


def _backward(
    q: torch.Tensor, k: torch.Tensor, a: torch.Tensor, out: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, da = torch.empty_like(q), torch.empty_like(k), torch.zeros_like(a)
    block, other = _block(q, a), _block(q, a)
    sums = a.new_empty(k.shape[1:])  # dk of one group, as precise as a
    for group in range(len(a)):
        keys, pulled = k[group].contiguous(), q[group] * grad[group, :, None].to(q.dtype)
        sums.zero_()
        for rows in _rows(a, len(block)):
            g, o = grad[group, rows], out[group, rows]
            weights = _weights(q[group, rows], keys, block)
            da[group].addmv_(weights.t(), g)
            pull = torch.sub(a[group], o[:, None], out=other[: len(o)])
            pull = pull.mul_(weights).to(q.dtype)
            dq[group, rows] = (pull @ keys) * g[:, None]
            if pull.dtype == sums.dtype:
                sums.addmm_(pull.t(), pulled[rows])
            else:
                sums.add_(pull.t() @ pulled[rows])
        dk[group] = sums
    return dq, dk, da


def _block(q: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Room for the scores of some queries against all keys, in the precision of ``a``."""
    n = a.shape[1]
    budget = _SCORES_AT_ONCE.get(q.device.type, _SCORES_AT_ONCE_ELSEWHERE)
    return a.new_empty(min(n, max(_ROWS_AT_LEAST, budget // n)), n)


def _rows(a: torch.Tensor, count: int) -> list[slice]:
    return [slice(start, min(start + count, a.shape[1]))
            for start in range(0, a.shape[1], count)]


def _weights(q: torch.Tensor, keys: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """softmax(q keys^T) of some queries (b, d), written into ``block``: (b, N)."""
    scores = block[: len(q)]
    if q.dtype == scores.dtype:
        torch.mm(q, keys.t(), out=scores)
    else:
        scores.copy_(q @ keys.t())
    return torch.softmax(scores, dim=1, out=scores)
