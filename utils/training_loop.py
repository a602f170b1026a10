"""A model in training, step by step: the part of the engine that changes with time.

For each bag, every loss that ``model.losses(bag)`` yields is back-propagated as it comes (so only
one graph is alive), and the optimiser steps once after ``accumulate`` bags. Import late: it needs
torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from utils.contracts import Bag, SlideModel, StepLoss
from utils.devices import Precision, autocast, check_precision
from utils.distributed import Group
from utils.epoch_log import EpochLog, EpochResult
from utils.errors import ItemFailed, Refused
from utils.faults import fault_point
from utils.feeding import Missing, feed
from utils.fit_options import FitOptions
from utils.joint_loss import Glimpse, glimpse, joint_gradients, pass_again
from utils.optimisation import MeanModel, build_optimiser, learning_rate, set_learning_rate
from utils.seeding import derive_seed, seed_everything
from utils.storage import differences, load_torch, save_torch
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

# What one bag can bring about without harm to the others
BAG_ERRORS = (torch.OutOfMemoryError, ItemFailed, OSError)

_Part = Iterator[tuple[int, Bag | Missing]]  # a few bags with their places in the epoch


class FitFailed(ItemFailed):
    """Training cannot go on, and every process of the group knows it."""


def why_unusable(bag: Bag, error: Exception) -> str:
    """Why a bag that brought about one of ``BAG_ERRORS`` has no answer."""
    if not isinstance(error, torch.OutOfMemoryError):
        return str(error)
    fewer = ", a lower --t_patch" if bag.children else ""
    return (f"{bag.slide_id}: {len(bag)} patches do not fit in the memory of the GPU: try "
            f"--precision bf16{fewer}, or --device cpu")


class TrainingLoop:
    """A model in training: everything that changes from epoch to epoch."""

    def __init__(self, model: torch.nn.Module, *, options: FitOptions, device: torch.device,
                 group: Group, folder: Path, parameters: dict[str, Any], title: str = "",
                 progress: bool = True) -> None:
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
        self.mean = None if options.ema is None else MeanModel(self.model, decay=options.ema)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self.stopping = EarlyStopping(patience=options.patience, stop_epoch=options.stop_epoch,
                                      monitor=options.monitor)
        self.epoch = 0
        self.failures: dict[str, str] = {}

    @property
    def judged(self) -> torch.nn.Module:
        """The model that is validated and saved: the running mean where there is one."""
        return self.mean.model if self.mean else self.model

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
            self.failures = state.failures
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

    def keep_last_good(self, checkpoint: Path) -> None:
        """After a failure: without early stopping, the weights after the last whole epoch."""
        state = load_state(self.folder)
        if self.group.is_main and not self.options.early_stopping and state and state.next_epoch:
            save_torch(checkpoint, state.mean or state.model)

    # ------------------------------------------------------------------------ one epoch

    def train_epoch(self, bags: Sequence[Bag], order: Sequence[int]) -> EpochResult:
        """One pass over the bags ``order``, with an optimiser step every ``accumulate`` bags."""
        seed_everything(derive_seed(self.options.seed, self.epoch, self.group.rank))
        set_learning_rate(self.optimiser, learning_rate(self.options, self.epoch))
        self.model.train()
        log = EpochLog(self.objective)
        bar = tqdm(self._steps(bags, order), desc=f"{self.title} epoch {self.epoch}", leave=False,
                   total=self._n_steps(order), disable=None if self.progress else True)
        for step, passes in enumerate(bar):
            self._step(self._sum_gradients(passes, log))
            if step % _CHECK_EVERY == _CHECK_EVERY - 1:
                self._check_losses(log)
                if not bar.disable:
                    bar.set_postfix(loss=f"{log.running_loss():.4f}")
        self._check_losses(log)
        self._check_weights(log)
        self.group.average([buffer for model in dict.fromkeys((self.model, self.judged))
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

    def _steps(self, bags: Sequence[Bag], order: Sequence[int]) -> Iterator[list[_Part]]:
        """For each step this rank's bags: once, or twice for a loss that compares them."""
        share, size = self.group.share(range(len(order))), self.options.accumulate
        parts = [share[step * size:(step + 1) * size] for step in range(self._n_steps(order))]
        repeats = 2 if self.objective.needs_batch else 1
        places = [place for part in parts for _ in range(repeats) for place in part]
        stream = zip(places, feed(bags, [order[place] for place in places], device=self.device),
                     strict=True)
        for part in parts:
            yield [islice(stream, len(part)) for _ in range(repeats)]

    def _sum_gradients(self, passes: list[_Part], log: EpochLog) -> int:
        """Add up the gradients of a step's bags; returns how many bags are to be stepped for."""
        self._clear_gradients()
        if self.objective.needs_batch:
            first, second = passes
            return self._sum_joint_gradients(first, second, log)
        bags = 0
        for place, bag in self._usable(passes[0]):
            fault_point("train.bag")
            try:
                value, last = self._backward(bag)
            except BAG_ERRORS as error:
                self._give_up(bag, error)
                bags = 0
                continue
            log.add(bag, value, last, position=place)
            bags += 1
        return 0 if self.options.step_per_loss else bags

    def _usable(self, part: _Part) -> Iterator[tuple[int, Bag]]:
        """The bags that could be read; the others are noted as failures."""
        for place, item in part:
            if isinstance(item, Missing):
                self.failures.setdefault(item.slide_id, item.reason)
            else:
                yield place, item

    def _give_up(self, bag: Bag, error: Exception) -> None:
        """Do without the bag, and without the step's gradients: half of a bag may be in them."""
        self.failures.setdefault(bag.slide_id, why_unusable(bag, error))
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        """Before the next sum; a step a loss leaves zeros, as HAG-MIL's version of torch did: its
        steps then move the models of the other levels too, by momentum and weight decay."""
        self.optimiser.zero_grad(set_to_none=not self.options.step_per_loss)

    def _backward(self, bag: Bag) -> tuple[torch.Tensor, StepLoss]:
        """Back-propagate each loss as the model yields it; returns their sum and the last one."""
        total: torch.Tensor | None = None
        last: StepLoss | None = None
        for loss in _each_loss(self.model, bag, self.options.precision, self.device):
            if loss.value.requires_grad:
                self.scaler.scale(loss.value).backward()
            if self.options.step_per_loss:
                self._step(1)
                self._clear_gradients()
            value = loss.value.detach()
            total, last = value if total is None else total + value, loss
        if total is None or last is None:
            raise ValueError(f"{bag.slide_id}: the model yielded no loss")
        return total, last

    def _sum_joint_gradients(self, first: _Part, second: _Part, log: EpochLog) -> int:
        """The same for a loss that compares the bags of all ranks, see ``utils.joint_loss``."""
        how: dict[str, Any] = {"precision": self.options.precision, "device": self.device}
        seen: dict[int, Glimpse] = {}
        for place, bag in self._usable(first):
            fault_point("train.bag")
            try:
                seen[place], output = glimpse(self.model, bag, **how)
            except BAG_ERRORS as error:
                self._give_up(bag, error)
                continue
            log.add_prediction(bag, output, position=place)
        found = joint_gradients(self.objective, list(seen.values()), self.group)
        gradients = dict(zip(seen, found, strict=True)) if found else {}
        bags = 0
        for place, bag in self._usable(second):
            if place not in gradients:
                continue
            try:
                loss = pass_again(self.model, bag, seen[place], gradients[place], **how)
                self.scaler.scale(loss).backward()
            except BAG_ERRORS as error:
                self._give_up(bag, error)
                bags = 0
                continue
            bags += 1
        return bags

    def _step(self, bags: int) -> None:
        if self.group.average_gradients(self.weights, bags) == 0:
            return
        if self.options.clip_grad is not None:
            self.scaler.unscale_(self.optimiser)
            torch.nn.utils.clip_grad_norm_(self.weights, self.options.clip_grad)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.mean:
            self.mean.update()

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

    def validate(self, bags: Sequence[Bag]) -> EpochResult | None:
        """Losses and predictions of the validation bags, shared out over the processes."""
        self.judged.eval()
        log = EpochLog(self.objective)
        places = self.group.share(range(len(bags)))
        with torch.inference_mode():
            for place, bag in self._usable(zip(
                    places, feed(bags, places, device=self.device), strict=True)):
                try:
                    self._judge(bag, log, place)
                except BAG_ERRORS as error:
                    self.failures.setdefault(bag.slide_id, why_unusable(bag, error))
        return log.result(self.group)

    def _judge(self, bag: Bag, log: EpochLog, place: int) -> None:
        if self.objective.needs_batch:
            with autocast(self.options.precision, self.device):
                output = cast(SlideModel, self.judged)(bag)
            log.add_prediction(bag, output, position=place)
            return
        every = _each_loss(self.judged, bag, self.options.precision, self.device)
        last = deque(every, maxlen=1).pop()  # it carries the prediction
        log.add(bag, last.value, last, position=place)

    # ------------------------------------------------------------------------ ends

    def finish_epoch(self, trained: EpochResult, validated: EpochResult | None, checkpoint: Path,
                     tracker: Tracker) -> None:
        """Judge the epoch, then write checkpoint and state, in this order.

        Killed between the two, the epoch is done again, to the same weights.
        """
        improved = self._improved(validated)
        if self.group.is_main:
            if improved and self.options.early_stopping:
                save_torch(checkpoint, self._cpu_weights())
            if validated and self.options.early_stopping and self.options.save_top_k > 1:
                self._keep_best_epochs(validated, checkpoint)
            fault_point("train.epoch")
            tracker.scalars({**trained.scalars("train"), **self._moving_rate()}, self.epoch)
            if validated:
                tracker.scalars(validated.scalars("val"), self.epoch)
            print(f"{self.title} epoch {self.epoch}: {trained.line('train')}"
                  f"{', ' + validated.line('val') if validated else ''}"
                  f"{', best so far' if improved else ''}", flush=True)
        self.failures = {slide: reason for part in self.group.gather(self.failures)
                         for slide, reason in part.items()}
        self.epoch += 1
        self.save()

    def _keep_best_epochs(self, validated: EpochResult, checkpoint: Path) -> None:
        """The weights of the best few epochs, each in ``<checkpoint>_epoch_<n>.pt``."""
        for epoch in self.stopping.rank(self.epoch, validated.loss, metric=validated.headline[1],
                                        most=self.options.save_top_k):
            path = checkpoint.with_name(f"{checkpoint.stem}_epoch_{epoch}.pt")
            if epoch == self.epoch:
                save_torch(path, self._cpu_weights())
            else:
                path.unlink(missing_ok=True)

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

    def _cpu_weights(self) -> dict[str, torch.Tensor]:
        """A state dict that loads on any machine, also by programs that map no devices."""
        return {name: value.cpu() for name, value in self.judged.state_dict().items()}

    def finish(self, checkpoint: Path) -> None:
        """Write the last weights, or with early stopping take the best ones back."""
        if not self.options.early_stopping:
            if self.group.is_main:
                save_torch(checkpoint, self._cpu_weights())
            self.model.load_state_dict(self.judged.state_dict())
            return
        if self.stopping.best_epoch < 0:
            why = ("Cox needs validation slides with an event" if self.objective.needs_batch
                   else _REMEDY)
            raise FitFailed("the validation loss was never finite, so there is no best epoch; "
                            + why)
        self.group.wait()
        self.model.load_state_dict(load_torch(checkpoint))


def _each_loss(
    model: torch.nn.Module, bag: Bag, precision: Precision, device: torch.device
) -> Iterator[StepLoss]:
    """The losses of a bag; the model computes each under autocast, its consumer works without."""
    losses = iter(cast(SlideModel, model).losses(bag))
    while True:
        with autocast(precision, device):
            loss = next(losses, None)
        if loss is None:
            return
        yield loss
