"""The training of a tissue network: BCE + Dice, AdamW, cosine, the best epoch on held-out slides.

AtlasPatch's segmenter was trained with such a loss too (BCE + 0.65 Dice).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.tissue_networks import NetworkCard, NetworkPredictor, normalised
from utils.contracts import TissuePredictor
from utils.devices import Precision, autocast

WARM_STEPS = 10  # of linear warm-up, so that the first steps do not wreck a trained encoder


@dataclass(frozen=True, kw_only=True)
class TissueFit:
    """How long and how fast to train. steps: of an epoch; lr, reg: of AdamW."""

    max_epochs: int
    steps: int
    patience: int
    lr: float
    reg: float
    precision: Precision = "fp32"


@dataclass(frozen=True)
class TissueEpoch:
    """What one epoch came to. score: what the caller's judge said; best: so far."""

    epoch: int
    loss: float
    score: float
    best: bool


def tissue_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy + (1 - soft Dice of the batch); logits and truth (B, H, W)."""
    chance = logits.sigmoid()
    dice = (2 * (chance * truth).sum() + 1) / (chance.sum() + truth.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, truth) + 1 - dice


def fit_tissue_network(
    network: nn.Module, card: NetworkCard, fit: TissueFit, *,
    batches: Callable[[int], Iterable[tuple[np.ndarray, np.ndarray]]],
    judge: Callable[[TissuePredictor], float], device: torch.device,
) -> Iterator[TissueEpoch]:
    """Train in place, an epoch at a time; at the end the network has the best epoch's weights.

    batches: (epoch) -> tiles (B, t, t, 3) uint8 and truth (B, t, t) float32
    judge: a predictor as users will have it -> score, the higher the better; ``patience`` epochs
        without a better one end the training
    """
    network.to(device)
    predictor = NetworkPredictor(network, card, sha256="", device=device, precision=fit.precision)
    optimiser = torch.optim.AdamW(network.parameters(), lr=fit.lr, weight_decay=fit.reg)
    total = fit.max_epochs * fit.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(
        (step + 1) / WARM_STEPS, 0.5 * (1 + math.cos(math.pi * step / total))))
    scaler = torch.amp.GradScaler(device.type, enabled=fit.precision == "fp16")
    best, best_epoch, best_state = -math.inf, 0, copy.deepcopy(network.state_dict())
    for epoch in range(fit.max_epochs):
        network.train()
        losses = [_step(network, card, tiles, truth, optimiser=optimiser, scaler=scaler,
                        schedule=schedule, device=device, precision=fit.precision)
                  for tiles, truth in batches(epoch)]
        network.eval()
        score = judge(predictor)
        better = score > best
        if better:
            best, best_epoch, best_state = score, epoch, copy.deepcopy(network.state_dict())
        yield TissueEpoch(epoch, float(np.mean(losses)), score, better)
        if epoch - best_epoch >= fit.patience:
            break
    network.load_state_dict(best_state)


def _step(
    network: nn.Module, card: NetworkCard, tiles: np.ndarray, truth: np.ndarray, *,
    optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    schedule: torch.optim.lr_scheduler.LRScheduler, device: torch.device, precision: Precision,
) -> float:
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1)
                 for values in (card.mean, card.std))
    pixels = normalised(torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2), mean, std)
    with autocast(precision, device):
        logits = network(pixels)[:, 0]
    loss = tissue_loss(logits.float(), torch.from_numpy(truth).to(device))
    optimiser.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    scaler.step(optimiser)
    scaler.update()
    schedule.step()
    return float(loss.detach())
