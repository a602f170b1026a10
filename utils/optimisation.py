"""How weights move: the optimiser, its learning rate over the epochs, and a running mean of them.

Import late: it needs torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch

from utils.fit_options import FitOptions

_STEP_FACTOR = 0.2  # of the schedule "step", from half of the epochs on
_MOMENTUM = 0.9  # of sgd


def build_optimiser(weights: Sequence[torch.nn.Parameter], options: FitOptions
                    ) -> torch.optim.Optimizer:
    """The optimiser ``options.opt`` of these weights.

    adam and sgd decay all of them, as CLAM does; adamw only matrices, not the norms, biases and
    other parameters of fewer than two dimensions.
    """
    if options.opt == "sgd":
        return torch.optim.SGD(weights, lr=options.lr, momentum=_MOMENTUM,
                               weight_decay=options.reg)
    if options.opt == "adam":
        return torch.optim.Adam(weights, lr=options.lr, weight_decay=options.reg, fused=True)
    groups = [{"params": [one for one in weights if one.ndim >= 2], "weight_decay": options.reg},
              {"params": [one for one in weights if one.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr,
                             fused=True)


def learning_rate(options: FitOptions, epoch: int) -> float:
    """The learning rate of an epoch (counted from 0); a pure function, so a resume needs no more.

    Warm-up is linear from ``warmup_lr`` in epoch 0 to ``lr`` in epoch ``warmup_epochs``. After
    it, cosine falls from ``lr`` in epoch 0 to ``min_lr`` in epoch ``max_epochs`` (the warm-up
    covers its beginning), and step takes a fifth from half of the epochs on.
    """
    if epoch < options.warmup_epochs:
        share = epoch / options.warmup_epochs
        return options.warmup_lr + (options.lr - options.warmup_lr) * share
    if options.schedule == "cosine":
        share = (1 + math.cos(math.pi * epoch / options.max_epochs)) / 2
        return options.min_lr + (options.lr - options.min_lr) * share
    late = options.schedule == "step" and 2 * epoch >= options.max_epochs
    return options.lr * (_STEP_FACTOR if late else 1.0)


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Let every group of the optimiser step with this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = value


def share_of_epoch(swa: int, *, epoch: int, max_epochs: int) -> float:
    """The share of an epoch's weights (epoch counted from 0) in the equal mean of the last ``swa``.

    1, 1/2, 1/3, ... from epoch ``max_epochs - swa`` on, and 1 before it, where the mean is the
    weights as they are. A pure function, as ``learning_rate``. Source: Izmailov et al., "Averaging
    Weights Leads to Wider Optima and Better Generalization", 2018.
    """
    return 1.0 / max(1, epoch - (max_epochs - swa) + 1)


class MeanModel:
    """A copy of a model whose weights are a running mean of those of the original.

    Parameters and floating-point buffers are averaged; other buffers are copied.
    """

    def __init__(self, original: torch.nn.Module) -> None:
        self.model = copy.deepcopy(original).requires_grad_(False)
        pairs = [*zip(self.model.parameters(), original.parameters(), strict=True),
                 *zip(self.model.buffers(), original.buffers(), strict=True)]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, share: float) -> None:
        """mean = (1 - share) * mean + share * the weights as they are now."""
        if self._averaged:
            means, values = zip(*self._averaged, strict=True)
            torch._foreach_lerp_(list(means), list(values), share)
        for mean, value in self._copied:
            mean.copy_(value)
