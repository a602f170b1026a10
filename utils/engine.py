"""One way to train and one way to predict, for every slide model.

The engine knows bags, losses and outputs (``utils.contracts``), nothing of pathology; how an epoch
goes is in ``utils.training_loop``. Import this module late: it needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from utils.contracts import Bag, SlideModel
from utils.devices import Precision, autocast, check_precision
from utils.distributed import ALONE, Group
from utils.errors import Refused
from utils.feeding import Missing, feed
from utils.fit_options import FitOptions, check_fit
from utils.objectives import Objective, TaskMetrics
from utils.report import Row, Status
from utils.seeding import class_balanced_weights, epoch_order
from utils.step_gradients import BAG_ERRORS, why_unusable
from utils.tracking import Tracker
from utils.training_loop import FitFailed, TrainingLoop

__all__ = ["FitFailed", "FitOptions", "FitResult", "Predictions", "fit", "predict",
           "run_settings"]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How training ended; the model holds the weights of the checkpoint.

    epochs: epochs done; best_epoch, best_val_loss: of the best epoch (-1, inf: none)
    failures: a row for each bag that could not be used
    """

    epochs: int
    best_epoch: int
    best_val_loss: float
    failures: list[Row]


@dataclass(frozen=True)
class Predictions:
    """Slide-level answers, row-aligned, in the order of the bags.

    truths: (n, T) float64 as ``Bag.truth`` gives them, NaN where unknown
    scores: (n, K) float32, see the model's objective
    failures: a row for each bag that has no answer
    """

    slide_ids: list[str]
    truths: np.ndarray
    scores: np.ndarray
    failures: list[Row]

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64 classes of a classification, -1 where unknown."""
        column = self.truths[:, 0]
        return np.where(np.isnan(column), -1, column).astype(np.int64)

    @property
    def probabilities(self) -> np.ndarray:
        """The scores, by the name they have in a classification."""
        return self.scores

    def metrics(self, objective: Objective) -> TaskMetrics:
        """Figures of the answers whose truth is known, also when there are none."""
        known = ~np.isnan(self.truths).all(axis=1)
        return objective.metrics(self.scores[known], self.truths[known])


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
    """The scores of every bag; one that cannot be read or does not fit is a failure.

    With several processes each takes its share and all get everything, in order.
    """
    check_precision(precision, device)
    model.to(device).eval()
    slide_model = cast(SlideModel, model)
    seen: list[tuple[int, str, tuple[float, ...] | None]] = []
    logits: list[torch.Tensor] = []  # brought from the device all at once
    failures: dict[str, str] = {}
    share = group.share(range(len(bags)))
    for position, item in zip(share, feed(bags, share, device=device), strict=True):
        if isinstance(item, Missing):
            failures[item.slide_id] = item.reason
            continue
        try:
            with autocast(precision, device):
                logits.append(slide_model(item).logits)
        except BAG_ERRORS as error:
            failures[item.slide_id] = why_unusable(item, error)
            continue
        seen.append((position, item.slide_id, item.truth))
    rows = torch.cat(logits).float().tolist() if logits else []
    mine = [_Answer(*one, row) for one, row in zip(seen, rows, strict=True)]
    answers = sorted((one for part in group.gather(mine) for one in part),
                     key=lambda one: one.position)
    return _predictions(answers, slide_model.objective, _merged(failures, group))


class _Answer(NamedTuple):
    position: int
    slide_id: str
    truth: tuple[float, ...] | None
    logits: list[float]


def _predictions(answers: Sequence[_Answer], objective: Objective, failures: list[Row]
                 ) -> Predictions:
    width = max((len(one.truth) for one in answers if one.truth), default=1)
    unknown = (float("nan"),) * width
    logits = torch.tensor([one.logits for one in answers]).reshape(-1, objective.n_outputs)
    return Predictions(
        slide_ids=[one.slide_id for one in answers],
        truths=np.array([one.truth or unknown for one in answers], np.float64).reshape(-1, width),
        scores=objective.scores(logits).numpy(), failures=failures)


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
    mean_checkpoint: Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    train_labels: Sequence[int] | np.ndarray | None = None,
    tracker: Tracker | None = None,
    group: Group = ALONE,
    title: str = "",
    progress: bool = True,
) -> FitResult:
    """Train ``model`` and write its state dict to ``checkpoint``; the model ends with it loaded.

    The checkpoint is that of the best validation loss (or metric, ``monitor``) with early stopping,
    written at every improvement, else that of the last epoch; with ``ema`` or ``swa`` it holds the
    running mean of the weights, which is also what is validated (``test_type`` of both: the
    weights, and ``mean_checkpoint`` the mean of that epoch). ``folder`` holds ``state.pt``, which
    the caller removes: a run that was killed goes on from there to the same result (equal bits on
    a CPU).

    parameters: further facts that must be equal for a resume; ``Refused`` when they are not
    title, progress: what to call the run in its lines; show a bar on a terminal
    train_labels: (n,) classes (or strata) of the training bags, needed for ``weighted_sample``
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
    check_fit(options, model, processes=group.size)
    loop = TrainingLoop(
        model, options=options, device=device, group=group, folder=folder, title=title,
        progress=progress and group.is_main,
        checkpoints=[checkpoint, mean_checkpoint] if mean_checkpoint else [checkpoint],
        parameters=run_settings(options, parameters or {}, ranks=group.size))
    tracker = tracker or Tracker()
    tracker.start(loop.resume())
    while loop.epoch < options.max_epochs and not loop.stopped():
        order = epoch_order(len(train), seed=options.seed, epoch=loop.epoch, weights=weights)
        try:
            trained = loop.train_epoch(train, order)
        except FitFailed:
            loop.keep_last_good()
            raise
        validated = loop.validate(val) if len(val) else {}
        loop.finish_epoch(trained, validated, tracker)
    loop.finish()
    return FitResult(epochs=loop.epoch, best_epoch=loop.stopping.best_epoch,
                     best_val_loss=loop.stopping.best_loss,
                     failures=_merged(loop.failures, group))
