"""A model in training, epoch by epoch: the part of the engine that changes with time.

The optimiser steps once after ``accumulate`` bags, whose gradients ``utils.step_gradients`` adds
up. Import late: it needs torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, tee
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from utils.contracts import Bag, SlideModel
from utils.devices import autocast, check_precision
from utils.distributed import Group
from utils.epoch_log import EpochLog, EpochResult
from utils.errors import ItemFailed, Refused
from utils.faults import fault_point
from utils.feeding import feed
from utils.fit_options import FitOptions
from utils.kept_weights import KeptWeights
from utils.optimisation import (
    MeanModel,
    build_optimiser,
    learning_rate,
    set_learning_rate,
    share_of_epoch,
)
from utils.seeding import derive_seed, seed_everything, turns_of
from utils.step_gradients import BAG_ERRORS, Part, StepGradients, each_loss, usable, why_unusable
from utils.storage import differences, load_torch
from utils.tracking import Tracker
from utils.training_state import (
    EarlyStopping,
    TrainingState,
    load_state,
    same_parameters,
    save_state,
)

_CHECK_EVERY = 20  # steps between two looks at the losses; each look waits for the device
_REMEDY = "try a lower --lr, --clip_grad 1, or --precision fp32"

class FitFailed(ItemFailed):
    """Training cannot go on, and every process of the group knows it."""


class TrainingLoop:
    """A model in training: everything that changes from epoch to epoch."""

    def __init__(self, model: torch.nn.Module, *, options: FitOptions, device: torch.device,
                 group: Group, folder: Path, parameters: dict[str, Any],
                 checkpoints: Sequence[Path] = (), title: str = "", progress: bool = True) -> None:
        check_precision(options.precision, device)
        self.model = model.to(device)
        self.options = options
        self.device = device
        self.group = group
        self.folder = folder
        self.parameters = parameters
        self.title = title
        self.progress = progress
        self.objective = cast(SlideModel, model).objective
        self.weights = [one for one in model.parameters() if one.requires_grad]
        self.optimiser = build_optimiser(self.weights, options)
        self.mean = MeanModel(self.model) if options.averages else None
        self.kept = KeptWeights(self.model, self.mean.model if self.mean else None,
                                options=options, checkpoints=checkpoints)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self.stopping = EarlyStopping(patience=options.patience, stop_epoch=options.stop_epoch,
                                      monitor=options.monitor)
        self.epoch = 0
        self.failures: dict[str, str] = {}
        self.gradients = StepGradients(
            self.model, options=options, device=device, group=group, optimiser=self.optimiser,
            scaler=self.scaler, step=self._step, failures=self.failures)

    @property
    def judged(self) -> torch.nn.Module:
        """The model that early stopping goes by: the running mean where that is tested."""
        return self.kept.models[self.kept.followed]

    def stopped(self) -> bool:
        """Did early stopping end the run after the epoch before?"""
        return self.options.early_stopping and self.stopping.should_stop(self.epoch - 1)

    # ------------------------------------------------------------------------ going on

    def resume(self) -> int:
        """Take up the saved state if there is one; returns the first epoch to do."""
        state = load_state(self.folder)
        if state is not None:
            if not same_parameters(state.parameters, self.parameters):
                raise Refused(f"{self.folder} holds a run with other settings ("
                              f"{differences(state.parameters, self.parameters)})")
            self.model.load_state_dict(state.model)
            if self.mean:
                self.mean.model.load_state_dict(state.mean)
            self.optimiser.load_state_dict(state.optimiser)
            self.scaler.load_state_dict(state.scaler)
            self.stopping, self.epoch = state.stopping, state.next_epoch
            self.failures.update(state.failures)
        self.group.wait()  # nobody replaces the file before all have read it
        if state is None:
            self.save()
        return self.epoch

    def save(self) -> None:
        """Replace the state file (first process only)."""
        if self.group.is_main:
            save_state(self.folder, TrainingState(
                parameters=self.parameters, next_epoch=self.epoch,
                model=self.model.state_dict(), optimiser=self.optimiser.state_dict(),
                scaler=self.scaler.state_dict(), stopping=self.stopping, failures=self.failures,
                mean=self.mean.model.state_dict() if self.mean else {}))

    def keep_last_good(self) -> None:
        """After a failure: without early stopping, the weights after the last whole epoch."""
        state = load_state(self.folder)
        if self.group.is_main and not self.options.early_stopping and state and state.next_epoch:
            self.kept.write_state(state)

    # ------------------------------------------------------------------------ one epoch

    def train_epoch(self, bags: Sequence[Bag], order: Sequence[int]) -> EpochResult:
        """One pass over the bags ``order``, with an optimiser step every ``accumulate`` bags.

        Bags that are drawn anew in each epoch are told which one begins, and for how manieth time
        each of those that are read here comes in it.
        """
        if hasattr(bags, "begin_epoch"):
            bags.begin_epoch(seed=self.options.seed, epoch=self.epoch,
                             turns=turns_of(order, self.group.share(range(len(order)))))
        seed_everything(derive_seed(self.options.seed, self.epoch, self.group.rank))
        set_learning_rate(self.optimiser, learning_rate(self.options, self.epoch))
        if hasattr(self.model, "rest"):
            cast(Any, self.model).rest(self.epoch < self.options.freeze_epochs)
        self.model.train()
        log = EpochLog(self.objective)
        bar = tqdm(self._steps(bags, order), desc=f"{self.title} epoch {self.epoch}", leave=False,
                   total=self._n_steps(order), disable=None if self.progress else True)
        for step, passes in enumerate(bar):
            self._step(self.gradients.add_up(passes, log))
            if step % _CHECK_EVERY == _CHECK_EVERY - 1:
                self._check_losses(log)
                if not bar.disable:
                    bar.set_postfix(loss=f"{log.running_loss():.4f}")
        self._check_losses(log)
        self._check_weights(log)
        if self.mean and self.options.swa is not None:
            self.mean.update(share_of_epoch(self.options.swa, epoch=self.epoch,
                                            max_epochs=self.options.max_epochs))
        models = dict.fromkeys((self.model, *self.kept.models.values()))
        self.group.average([buffer for model in models
                            for buffer in model.buffers() if buffer.is_floating_point()])
        result = log.result(self.group)
        if result is None:
            reasons = [reason for part in self.group.gather(self.failures)
                       for reason in part.values()]
            raise FitFailed(f"no training bag could be used: {(reasons or ['there is none'])[0]}")
        return result

    def _n_steps(self, order: Sequence[int]) -> int:
        """Steps of an epoch, equal on all ranks: those of the rank with the largest share."""
        most = -(-len(order) // self.group.size)
        return -(-most // self.options.accumulate)

    def _steps(self, bags: Sequence[Bag], order: Sequence[int]) -> Iterator[list[Part]]:
        """For each step this rank's bags: once, or twice for a loss that compares them.

        They are then read twice too, as they may be large; but not where they are drawn anew.
        """
        share, size = self.group.share(range(len(order))), self.options.accumulate
        parts = [share[step * size:(step + 1) * size] for step in range(self._n_steps(order))]
        passes = 2 if self.objective.needs_batch else 1
        reads = 1 if hasattr(bags, "begin_epoch") else passes
        places = [place for part in parts for _ in range(reads) for place in part]
        encoder = self.gradients.encoder
        stream = zip(places, feed(bags, [order[place] for place in places], device=self.device,
                                  at_once=encoder.batch_size if encoder else 1), strict=True)
        for part in parts:
            read: list[Part] = [islice(stream, len(part)) for _ in range(reads)]
            yield read if reads == passes else list(tee(read[0], passes))

    def _step(self, bags: int) -> None:
        if self.group.average_gradients(self.weights, bags) == 0:
            return
        if self.options.clip_grad is not None:
            self.scaler.unscale_(self.optimiser)
            torch.nn.utils.clip_grad_norm_(self.weights, self.options.clip_grad)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.mean and self.options.ema is not None:
            self.mean.update(1.0 - self.options.ema)

    def _check_losses(self, log: EpochLog) -> None:
        bad = [slide for part in self.group.gather(log.not_finite()) for slide in part]
        if bad:
            raise FitFailed(f"the training loss is not finite in epoch {self.epoch}, first at "
                            f"slide {bad[0]}; {_REMEDY}")

    def _check_weights(self, log: EpochLog) -> None:
        """A step with an infinite gradient shows in the weights before it shows in a loss."""
        good = torch.stack([one.detach().isfinite().all() for one in self.weights]).all()
        if not good:
            latest = ", ".join(log.slide_ids[-_CHECK_EVERY:])
            raise FitFailed(f"the weights are not finite after epoch {self.epoch}, whose last "
                            f"slides were {latest}; {_REMEDY}")

    def validate(self, bags: Sequence[Bag]) -> dict[str, EpochResult]:
        """Losses and predictions of the validation bags, shared out over the processes.

        By stage of the log, one for each judged model; without those that saw no bag.
        """
        logs = {stage: EpochLog(self.objective) for stage in self.kept.models}
        places = self.group.share(range(len(bags)))
        for model in self.kept.models.values():
            model.eval()
        with torch.inference_mode():
            for place, bag in usable(zip(
                    places, feed(bags, places, device=self.device), strict=True), self.failures):
                try:
                    for stage, log in logs.items():
                        self._judge(self.kept.models[stage], bag, log, place)
                except BAG_ERRORS as error:
                    self.failures.setdefault(bag.slide_id, why_unusable(bag, error))
        results = {stage: log.result(self.group) for stage, log in logs.items()}
        return {stage: result for stage, result in results.items() if result}

    def _judge(self, model: torch.nn.Module, bag: Bag, log: EpochLog, place: int) -> None:
        if self.objective.needs_batch:
            with autocast(self.options.precision, self.device):
                output = cast(SlideModel, model)(bag)
            log.add_prediction(bag, output, position=place)
            return
        every = each_loss(model, bag, precision=self.options.precision, device=self.device)
        last = deque(every, maxlen=1).pop()  # it carries the prediction
        log.add(bag, last.value, last, position=place)

    # ------------------------------------------------------------------------ ends

    def finish_epoch(self, trained: EpochResult, validated: Mapping[str, EpochResult],
                     tracker: Tracker) -> None:
        """Judge the epoch, then write checkpoints and state, in this order.

        Killed between the two, the epoch is done again, to the same weights.
        """
        followed = validated.get(self.kept.followed)
        improved = self._improved(followed)
        if self.group.is_main:
            if improved and self.options.early_stopping:
                self.kept.write()
            if followed and self.options.early_stopping and self.options.save_top_k > 1:
                self._keep_best_epochs(followed)
            fault_point("train.epoch")
            tracker.scalars({**trained.scalars("train"), **self._moving_rate()}, self.epoch)
            for stage, result in validated.items():
                tracker.scalars({tag.replace("val", stage, 1): value
                                 for tag, value in result.scalars("val").items()}, self.epoch)
            lines = [trained.line("train"), *(result.line("val").replace("val", stage, 1)
                                              for stage, result in validated.items())]
            print(f"{self.title} epoch {self.epoch}: {', '.join(lines)}"
                  f"{', best so far' if improved else ''}", flush=True)
        for part in self.group.gather(self.failures):
            self.failures.update(part)
        self.epoch += 1
        self.save()

    def _keep_best_epochs(self, validated: EpochResult) -> None:
        """The weights of the best few epochs, each in ``<checkpoint>_epoch_<n>.pt``."""
        changed = self.stopping.rank(self.epoch, validated.loss, metric=validated.headline[1],
                                     most=self.options.save_top_k)
        if self.epoch in changed:
            self.kept.write(epoch=self.epoch)
        self.kept.remove(epoch for epoch in changed if epoch != self.epoch)

    def _improved(self, validated: EpochResult | None) -> bool:
        """Is this epoch the best so far? ``FitFailed`` when none can ever be."""
        if validated is None:
            return self.stopping.update(self.epoch, math.nan)
        loss, (name, metric) = validated.loss, validated.headline
        if (self.options.early_stopping and self.options.monitor == "metric"
                and math.isfinite(loss) and math.isnan(metric)):
            raise FitFailed(f"--monitor metric: the validation slides do not define {name} (too "
                            "few, or all alike): choose --monitor loss or make other splits")
        return self.stopping.update(self.epoch, loss, metric=metric)

    def _moving_rate(self) -> dict[str, float]:
        """The learning rate for the log, where it changes."""
        constant = self.options.schedule == "constant" and not self.options.warmup_epochs
        return {} if constant else {"train/lr": learning_rate(self.options, self.epoch)}

    def finish(self) -> None:
        """Write the last weights, or with early stopping take the best ones back."""
        if not self.options.early_stopping:
            if self.group.is_main:
                self.kept.write()
        elif self.stopping.best_epoch < 0:
            why = ("Cox needs validation slides with an event" if self.objective.needs_batch
                   else _REMEDY)
            raise FitFailed("the validation loss was never finite, so there is no best epoch; "
                            + why)
        self.group.wait()
        self.model.load_state_dict(load_torch(next(iter(self.kept.checkpoints.values()))))
