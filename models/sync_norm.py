"""Batch norm with the statistics of the patches of all processes, on CPUs (gloo) and GPUs (NCCL).

PyTorch's own ``SyncBatchNorm`` runs on GPUs only. This one gathers the number, mean and variance
of each process in one exchange and merges them as Chan, Golub and LeVeque do ("Algorithms for
computing the sample variance", 1983), so nothing cancels out; the gradient takes a second exchange.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from utils.distributed import Group, current_group
from utils.errors import Refused

_OVER = (0, 2, 3)  # of (n, C, h, w): all but the channels


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, state-dict keys included, over the batches of all processes.

    In training every process must call it equally often, if need be with no rows. In eval mode,
    and in a single process, it is ``nn.BatchNorm2d``.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, C, h, w) to the same; n may be 0 while another process has rows."""
        group = current_group()
        if not self.training or group.size == 1:
            return super().forward(x)
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps, group)
        if self.running_mean is not None and self.running_var is not None:
            self._move(mean, var, count)
        return cast(torch.Tensor, y)

    @torch.no_grad()
    def _move(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> None:
        """Running statistics towards those of a batch of ``count`` values a channel."""
        tracked = cast(torch.Tensor, self.num_batches_tracked)
        tracked += 1
        share = 1.0 / float(tracked) if self.momentum is None else self.momentum
        unbiased = var * count / (count - 1).clamp(min=1)
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None
            running.lerp_(batch.to(running.dtype), share)


class SyncBatchNormAct2d(SyncBatchNorm2d):
    """The same for timm's norms that have dropout and an activation inside."""

    def __init__(self, *args: Any, drop: nn.Module, act: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop, self.act = drop, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, C, h, w) to the same."""
        result: torch.Tensor = self.act(self.drop(super().forward(x)))
        return result


def convert(module: nn.Module) -> nn.Module:
    """Every batch norm in ``module`` replaced, in place, keeping weights and statistics.

    Returns the module, or its replacement where it is a norm itself. ``Refused`` for batch norms
    of another kind.
    """
    from timm.layers.norm_act import BatchNormAct2d

    if isinstance(module, SyncBatchNorm2d):
        return module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if type(module) not in (nn.BatchNorm2d, BatchNormAct2d):
            raise Refused(f"--enc_bn sync: the encoder has batch norms of the kind "
                          f"{type(module).__name__}, which cannot be shared: choose another "
                          "--enc_bn")
        return _replacement(module)
    for name, child in module.named_children():
        setattr(module, name, convert(child))
    return module


def _replacement(norm: Any) -> SyncBatchNorm2d:
    options: dict[str, Any] = {
        "num_features": norm.num_features, "eps": norm.eps, "momentum": norm.momentum,
        "affine": norm.affine, "track_running_stats": norm.track_running_stats, "device": "meta"}
    new = (SyncBatchNorm2d(**options) if type(norm) is nn.BatchNorm2d else
           SyncBatchNormAct2d(**options, drop=norm.drop, act=norm.act))
    new._parameters.update(norm._parameters)  # the same tensors: an optimiser may hold them
    new._buffers.update(norm._buffers)
    return new.train(norm.training)


class _Normalise(torch.autograd.Function):
    """x (n, C, h, w) to (y, mean (C,), variance (C,), values a channel) over all processes.

    The gradients of weight and bias are those of this process's rows: whoever steps adds them up.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
        eps: float, group: Group,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, var, count = _statistics(x, group)
        y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.group = group
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        normal = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        grad = grad.to(mean.dtype)
        sums = torch.stack([grad.sum(_OVER), (grad * normal).sum(_OVER)])
        by_bias, by_weight = sums.clone()
        ctx.group.add_up(sums)
        means = (sums / count).view(2, *shape)
        if weight is not None:
            scale = scale * weight
        by_x = (grad - means[0] - normal * means[1]) * scale.view(shape)
        affine = weight is not None
        return (by_x.to(x.dtype), by_weight if affine else None, by_bias if affine else None,
                None, None)


def _statistics(x: torch.Tensor, group: Group
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (C,), biased variance (C,) and number of values a channel, at least 1, of all ranks."""
    number_format = torch.promote_types(x.dtype, torch.float32)
    width = x.shape[1]
    rows = torch.zeros(group.size, 2 * width + 1, dtype=number_format, device=x.device)
    if x.numel():
        rows[group.rank, 0] = x.numel() // width
        rows[group.rank, width + 1:], rows[group.rank, 1:width + 1] = torch.var_mean(
            x.to(number_format), _OVER, correction=0)
    group.add_up(rows)  # each rank has filled its own row
    counts, means, variances = rows.split([1, width, width], dim=1)
    count = counts.sum().clamp(min=1)
    mean = (counts * means).sum(dim=0) / count
    return mean, (counts * (variances + (means - mean).square())).sum(dim=0) / count, count
