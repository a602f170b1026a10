"""One way to train and one way to predict, for every slide model.

The engine knows bags, losses and outputs (``utils.contracts``), nothing of pathology; how a step is
made is in ``utils.training_loop``. Import this module late: it needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from utils.contracts import Bag, SlideOutput
from utils.devices import Precision, autocast, check_precision
from utils.distributed import ALONE, Group
from utils.errors import Refused
from utils.feeding import Missing, feed
from utils.metrics import SlideMetrics, slide_metrics
from utils.report import Row, Status
from utils.seeding import class_balanced_weights, epoch_order
from utils.tracking import Tracker
from utils.training_loop import FitFailed, FitOptions, TrainingLoop, too_large

__all__ = ["FitFailed", "FitOptions", "FitResult", "Predictions", "fit", "predict",
           "run_settings"]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How training ended; the model holds the weights of the checkpoint.

    epochs: epochs done; best_epoch, best_val_loss: of the lowest validation loss (-1, inf: none)
    failures: a row for each bag that could not be used
    """

    epochs: int
    best_epoch: int
    best_val_loss: float
    failures: list[Row]


@dataclass(frozen=True)
class Predictions:
    """Slide-level answers, row-aligned, in the order of the bags.

    labels: (n,) int64, -1 where unknown; probabilities: (n, C) float32
    failures: a row for each bag that has no answer
    """

    slide_ids: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    failures: list[Row]

    def metrics(self, n_classes: int) -> SlideMetrics:
        """Metrics of these answers, also when there are none."""
        shaped = self.probabilities.reshape(len(self.slide_ids), n_classes)
        return slide_metrics(shaped, self.labels)


# ---------------------------------------------------------------------------- inference

@torch.inference_mode()
def predict(
    model: torch.nn.Module,
    bags: Sequence[Bag],
    *,
    device: torch.device,
    precision: Precision = "fp32",
    group: Group = ALONE,
) -> Predictions:
    """Class probabilities of every bag; one that cannot be read or does not fit is a failure.

    With several processes each takes its share and all get everything, in order.
    """
    check_precision(precision, device)
    model.to(device).eval()
    found: list[tuple[int, str, int, torch.Tensor]] = []
    failures: dict[str, str] = {}
    share = group.share(range(len(bags)))
    for position, item in zip(share, feed(bags, share, device=device), strict=True):
        if isinstance(item, Missing):
            failures[item.slide_id] = item.reason
            continue
        try:
            with autocast(precision, device):
                output = cast(SlideOutput, model(item))
        except torch.OutOfMemoryError:
            failures[item.slide_id] = too_large(item)
            continue
        label = -1 if item.label is None else item.label
        found.append((position, item.slide_id, label, output.probabilities[0]))
    mine = [_Answer(position, slide_id, label, row.cpu().numpy())
            for position, slide_id, label, row in found]
    answers = sorted((one for part in group.gather(mine) for one in part),
                     key=lambda one: one.position)
    return Predictions(
        slide_ids=[one.slide_id for one in answers],
        labels=np.array([one.label for one in answers], np.int64),
        probabilities=(np.stack([one.probabilities for one in answers]) if answers
                       else np.zeros((0, 0), np.float32)),
        failures=_merged(failures, group))


class _Answer(NamedTuple):
    position: int
    slide_id: str
    label: int
    probabilities: np.ndarray  # (C,) float32


def _merged(failures: dict[str, str], group: Group) -> list[Row]:
    """One row a slide, whichever process met it."""
    every = {slide: reason for part in group.gather(failures) for slide, reason in part.items()}
    return [Row(item=slide, status=Status.FAILED, reason=reason)
            for slide, reason in sorted(every.items())]


# ---------------------------------------------------------------------------- training

def run_settings(options: FitOptions, facts: Mapping[str, Any], *, ranks: int) -> dict[str, Any]:
    """All that decides what a run computes: ``facts`` of the caller, the options, the processes.

    A state file or a finished fold counts as this run's only when these are equal.
    """
    return {**facts, **asdict(options), "ranks": ranks}


def fit(
    model: torch.nn.Module,
    train: Sequence[Bag],
    val: Sequence[Bag],
    *,
    options: FitOptions,
    folder: Path,
    checkpoint: Path,
    device: torch.device,
    parameters: Mapping[str, Any] | None = None,
    train_labels: Sequence[int] | np.ndarray | None = None,
    tracker: Tracker | None = None,
    group: Group = ALONE,
    title: str = "",
    progress: bool = True,
) -> FitResult:
    """Train ``model`` and write its state dict to ``checkpoint``; the model ends with it loaded.

    The checkpoint is that of the best validation loss with early stopping (written at every
    improvement), else that of the last epoch. ``folder`` holds ``state.pt``: a run that was killed
    goes on from there to the same result (equal bits on a CPU); the caller removes it.

    parameters: further facts that must be equal for a resume; ``Refused`` when they are not
    title, progress: what to call the run in its lines; show a bar on a terminal
    train_labels: (n,) classes of the training bags, needed for ``weighted_sample``
    Raises ``FitFailed`` when a loss or weight is no longer finite (naming the slides; the
    checkpoint is the last good one), or when no bag can be used.
    """
    weights = None
    if options.weighted_sample:
        if train_labels is None:
            raise ValueError("weighted_sample needs train_labels")
        weights = class_balanced_weights(train_labels)
    if options.early_stopping and not len(val):
        raise Refused("--early_stopping needs validation slides: this split has none")
    loop = TrainingLoop(
        model, options=options, device=device, group=group, folder=folder, title=title,
        progress=progress and group.is_main,
        parameters=run_settings(options, parameters or {}, ranks=group.size))
    tracker = tracker or Tracker()
    tracker.start(loop.resume())
    while loop.epoch < options.max_epochs and not loop.stopped():
        order = epoch_order(len(train), seed=options.seed, epoch=loop.epoch, weights=weights)
        try:
            trained = loop.train_epoch(train, order)
        except FitFailed:
            loop.keep_last_good(checkpoint)
            raise
        validated = loop.validate(val) if len(val) else None
        loop.finish_epoch(trained, validated, checkpoint, tracker)
    loop.finish(checkpoint)
    return FitResult(epochs=loop.epoch, best_epoch=loop.stopping.best_epoch,
                     best_val_loss=loop.stopping.best_loss,
                     failures=_merged(loop.failures, group))
