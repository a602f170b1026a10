"""The work of a cross-validation: a fold trained, tested and recorded, and folds side by side.

Where the files of a fold lie and how far it is: ``utils.folds``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from utils.contracts import Bag, SlideModel
from utils.devices import Precision
from utils.distributed import Group
from utils.errors import ItemFailed
from utils.folds import FoldFiles, finish_fold, write_record, write_results
from utils.memory import share_memory
from utils.metrics import SlideMetrics
from utils.objectives import Objective, TaskMetrics
from utils.parallel import Outcome, describe_os_error, run_items
from utils.report import Row
from utils.storage import load_torch
from utils.tracking import TensorBoardTracker, Tracker

if TYPE_CHECKING:
    import numpy as np
    import torch

    from utils.engine import FitResult, Predictions
    from utils.fit_options import FitOptions

Result = TypeVar("Result")


def run_folds(
    work: Callable[..., Result], folds: Sequence[int], *, workers: int, group: Group,
    arguments: dict[str, Any],
) -> Iterator[Outcome[int, Result]]:
    """``work(fold, **arguments)`` for each fold; one that fails does not stop the others.

    One worker is this process itself.

    In a group of processes only a failure that all of them share costs just the fold: any other
    leaves the group out of step, so it ends the run.
    """
    if group.size == 1:
        yield from run_items(work, folds, workers=workers if workers > 1 else 0,
                             arguments=arguments)
        return
    from utils.training_loop import FitFailed

    for fold in folds:
        try:
            yield Outcome(fold, work(fold, **arguments), None, 0.0)
        except FitFailed as error:
            yield Outcome(fold, None, str(error), 0.0)
        except OSError as error:
            raise ItemFailed(f"fold {fold}: {describe_os_error(error)}") from None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where folds are trained; what does not decide their result.

    threads: CPU threads of a fold; log_data: TensorBoard curves, in the fold's own folder or, by
    experiment and fold, in ``log_dir``; side_by_side: folds trained at once, which share the
    memory (and leave no room for a bar of progress)
    """

    device: torch.device
    group: Group
    threads: int
    log_data: bool
    side_by_side: int = 1
    log_dir: Path | None = None

    def tracker(self, files: FoldFiles) -> Tracker:
        """What takes the curves of a fold in this process."""
        if not (self.log_data and self.group.is_main):
            return Tracker()
        if self.log_dir is None:
            return TensorBoardTracker(files.work)
        return TensorBoardTracker(self.log_dir / files.folder.name / str(files.fold))


def train_and_test(
    model: torch.nn.Module,
    bags: Mapping[str, Sequence[Bag]],
    *,
    files: FoldFiles,
    options: FitOptions,
    facts: Mapping[str, Any],
    description: Mapping[str, Any],
    where: Environment,
    train_labels: np.ndarray | None = None,
) -> None:
    """Train on ``bags["train"]``, predict ``val`` and ``test``, write results and the record.

    facts: what decides the result beside ``options``, see ``engine.run_settings``
    description: further keys of the record, e.g. ``spec``; ``target_names`` of them name the labels
    in the csv
    train_labels: (n,) classes (or strata) of the training bags, needed for ``weighted_sample``
    Raises ``FitFailed`` (see ``engine.fit``); then there is no record.
    """
    from utils.engine import fit

    share_memory(where.side_by_side)
    tracker = where.tracker(files)
    mean = [files.of_mean] if options.tests_both else []
    try:
        fitted = fit(model, bags["train"], bags["val"], options=options, folder=files.work,
                     checkpoint=files.checkpoint, device=where.device, parameters=facts,
                     mean_checkpoint=mean[0].checkpoint if mean else None,
                     train_labels=train_labels, tracker=tracker, group=where.group,
                     title=f"fold {files.fold}", progress=where.side_by_side == 1)
        tested = [_test(model, bags, one, where=where, precision=options.precision)
                  for one in (files, *mean)]
        for one in tested:
            tracker.scalars(one.scalars(), 0)
    finally:
        tracker.close()
    if where.group.is_main:
        _write(tested, fitted, {**description, "settings": _settings(options, facts, where.group)})
    where.group.wait()  # nobody asks for the record before it is there


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The answers of one checkpoint of a fold and their figures, by part (val, test)."""

    files: FoldFiles
    answers: dict[str, Predictions]
    metrics: dict[str, TaskMetrics]
    objective: Objective

    def scalars(self) -> dict[str, float | None]:
        """The summary after training, of the mean under ``final_ema``."""
        found = _final_scalars(self.metrics)
        if not self.files.averaged:
            return found
        return {tag.replace("final", "final_ema", 1): value for tag, value in found.items()}


def _test(model: torch.nn.Module, bags: Mapping[str, Sequence[Bag]], files: FoldFiles, *,
          where: Environment, precision: Precision) -> Tested:
    """Validation and test slides as the checkpoint sees them; ``model`` is left with it."""
    from utils.engine import predict

    model.load_state_dict(load_torch(files.checkpoint))
    objective = cast(SlideModel, model).objective
    answers = {part: predict(model, bags[part], device=where.device, group=where.group,
                             precision=precision) for part in ("val", "test")}
    return Tested(files=files, answers=answers, objective=objective,
                  metrics={part: one.metrics(objective) for part, one in answers.items()})


def _write(tested: Sequence[Tested], fitted: FitResult, description: Mapping[str, Any]) -> None:
    """Results of every checkpoint, and a record; that of the fold last, with the figures of all."""
    for one in tested:
        write_results(one.files, one.answers["test"], task_type=one.objective.task_type,
                      names=description.get("target_names", ()))
    common = {**description, "task_type": tested[0].objective.task_type}
    for one in tested[1:]:
        write_record(one.files, {**common, **_record(fitted, [one])})
    finish_fold(tested[0].files, {**common, **_record(fitted, tested)})


def _settings(options: FitOptions, facts: Mapping[str, Any], group: Group) -> dict[str, Any]:
    from utils.engine import run_settings

    return run_settings(options, facts, ranks=group.size)


def _record(fitted: FitResult, tested: Sequence[Tested]) -> dict[str, Any]:
    """How training went, and the figures by part; ``<part>_ema`` of the mean beside others."""
    unused: list[Row] = [*fitted.failures, *(row for one in tested
                                             for answers in one.answers.values()
                                             for row in answers.failures)]
    metrics = {f"{part}_ema" if len(tested) > 1 and one.files.averaged else part: found
               for one in tested for part, found in one.metrics.items()}
    return {"epochs": fitted.epochs, "best_epoch": fitted.best_epoch,
            "best_val_loss": fitted.best_val_loss,
            "metrics": {name: one.as_dict() for name, one in metrics.items()},
            "headline": {name: one.headline() for name, one in metrics.items()},
            "failures": {row.item: row.reason for row in unused}}


def _final_scalars(metrics: Mapping[str, TaskMetrics]) -> dict[str, float | None]:
    """The summary after training: CLAM's tags, or ``final/<part>_<figure>`` of other tasks."""
    val, test = metrics["val"], metrics["test"]
    if isinstance(val, SlideMetrics) and isinstance(test, SlideMetrics):
        return {"final/val_error": val.error, "final/val_auc": val.auc,
                "final/test_error": test.error, "final/test_auc": test.auc,
                **{f"final/test_class_{index}_acc": accuracy
                   for index, accuracy in enumerate(test.class_accuracy)}}
    return {f"final/{part}_{key}": value for part, one in metrics.items()
            for key, value in one.headline().items()}
