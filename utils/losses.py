"""Classification losses of the slide and the instance branch, chosen by name.

Each takes scores (n, C) and labels (n,) and gives the mean over rows, or one value a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from utils.registry import Registry

if TYPE_CHECKING:
    import torch

Reduction = Literal["mean", "none"]

LOSSES: Registry[Callable[..., torch.Tensor]] = Registry("loss")

_HARD_GAP = math.log(1000.0)  # in units of tau; from here on the smooth form adds < 0.1 % of tau


@LOSSES.register("ce")
def cross_entropy(
    scores: torch.Tensor, labels: torch.Tensor, *, reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Softmax cross entropy of scores (n, C) against class indices (n,), in float32.

    label_smoothing: share of the target that is spread evenly over all classes.
    """
    from torch.nn import functional

    return functional.cross_entropy(scores.float(), labels, reduction=reduction,
                                    label_smoothing=label_smoothing)


@LOSSES.register("svm")
def smooth_top1_svm(
    scores: torch.Tensor,
    labels: torch.Tensor,
    *,
    alpha: float = 1.0,
    tau: float = 1.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Smooth top-1 SVM of scores (n, C) against class indices (n,), in float32.

    With m_j = s_j + alpha [j != y] - s_y a row costs tau * logsumexp(m / tau); where the two
    largest scores lie tau * ln(1000) or more apart it costs max(m), the form without smoothing.
    alpha: margin; tau: temperature, both in units of the scores.
    Source: Berrada, Zisserman, Kumar, "Smooth Loss Functions for Deep Top-k Classification",
    ICLR 2018, eq. 4 and 6 with k = 1.
    """
    import torch

    scores = scores.float()
    own = scores.gather(1, labels[:, None])
    margins = (scores + alpha - own).scatter(1, labels[:, None], 0.0)
    top = scores.detach().topk(2, dim=1).values
    hard = top[:, 0] - top[:, 1] >= tau * _HARD_GAP
    smooth = tau * (margins / tau).logsumexp(dim=1)
    losses = torch.where(hard, margins.amax(dim=1), smooth)
    return losses.mean() if reduction == "mean" else losses
