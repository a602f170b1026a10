"""A model in training, step by step: the part of the engine that changes with time.

For each bag, every loss that ``model.losses(bag)`` yields is back-propagated as it comes (so only
one graph is alive), and the optimiser steps once after ``accumulate`` bags. Import late: it needs
torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tqdm import tqdm

from utils.contracts import Bag, SlideModel, StepLoss
from utils.devices import Precision, autocast, check_precision
from utils.distributed import Group
from utils.epoch_log import EpochLog, EpochResult
from utils.errors import ItemFailed, Refused
from utils.faults import fault_point
from utils.feeding import Missing, feed
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


class FitFailed(ItemFailed):
    """Training cannot go on, and every process of the group knows it."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to train. Everything here may change the result, so all of it is compared on resume.

    reg: weight decay. patience, stop_epoch: see ``EarlyStopping``, used with ``early_stopping``.
    weighted_sample: draw bags with replacement, classes balanced.
    accumulate: bags (of each process) per optimiser step, whose gradient is their mean.
    clip_grad: largest norm of that gradient; None leaves it alone.
    """

    max_epochs: int = 200
    lr: float = 1e-4
    reg: float = 1e-5
    opt: Literal["adam", "adamw", "sgd"] = "adam"
    early_stopping: bool = False
    patience: int = 20
    stop_epoch: int = 50
    weighted_sample: bool = False
    precision: Precision = "fp32"
    accumulate: int = 1
    clip_grad: float | None = None
    seed: int = 1


def too_large(bag: Bag) -> str:
    """Why a bag that exhausts the GPU is a failure."""
    return (f"{bag.slide_id}: {len(bag)} patches do not fit in the memory of the GPU: try "
            "--precision bf16, or --device cpu")


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
        self.weights = [one for one in model.parameters() if one.requires_grad]
        self.optimiser = _build_optimiser(self.weights, options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self.stopping = EarlyStopping(patience=options.patience, stop_epoch=options.stop_epoch)
        self.epoch = 0
        self.failures: dict[str, str] = {}

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
                scaler=self.scaler.state_dict(), stopping=self.stopping, failures=self.failures))

    def keep_last_good(self, checkpoint: Path) -> None:
        """After a failure: without early stopping, the weights after the last whole epoch."""
        state = load_state(self.folder)
        if self.group.is_main and not self.options.early_stopping and state and state.next_epoch:
            save_torch(checkpoint, state.model)

    # ------------------------------------------------------------------------ one epoch

    def train_epoch(self, bags: Sequence[Bag], order: Sequence[int]) -> EpochResult:
        """One pass over the bags ``order``, with an optimiser step every ``accumulate`` bags."""
        seed_everything(derive_seed(self.options.seed, self.epoch, self.group.rank))
        self.model.train()
        log = EpochLog()
        places = self.group.share(range(len(order)))
        stream = zip(places, feed(bags, [order[place] for place in places], device=self.device),
                     strict=True)
        most = -(-len(order) // self.group.size)  # of the rank with the largest share
        steps = range(-(-most // self.options.accumulate))
        bar = tqdm(steps, desc=f"{self.title} epoch {self.epoch}", leave=False,
                   disable=None if self.progress else True)
        for step in bar:
            self._step(self._sum_gradients(islice(stream, self.options.accumulate), log))
            if step % _CHECK_EVERY == _CHECK_EVERY - 1:
                self._check_losses(log)
                if not bar.disable:
                    bar.set_postfix(loss=f"{log.running_loss():.4f}")
        self._check_losses(log)
        self._check_weights(log)
        result = log.result(self.group)
        if result is None:
            reasons = [reason for part in self.group.gather(self.failures)
                       for reason in part.values()]
            raise FitFailed(f"no training bag could be used: {(reasons or ['there is none'])[0]}")
        return result

    def _sum_gradients(self, part: Iterator[tuple[int, Bag | Missing]], log: EpochLog) -> int:
        """Add up the gradients of a few bags; returns how many bags."""
        self.optimiser.zero_grad(set_to_none=True)
        bags = 0
        for place, item in part:
            fault_point("train.bag")
            if isinstance(item, Missing):
                self.failures.setdefault(item.slide_id, item.reason)
                continue
            try:
                value, last = self._backward(item)
            except torch.OutOfMemoryError:
                self.failures.setdefault(item.slide_id, too_large(item))
                self.optimiser.zero_grad(set_to_none=True)  # half of a bag may be in them
                bags = 0
                continue
            log.add(item, value, last, position=place)
            bags += 1
        return bags

    def _backward(self, bag: Bag) -> tuple[torch.Tensor, StepLoss]:
        """Back-propagate each loss as the model yields it; returns their sum and the last one."""
        total: torch.Tensor | None = None
        last: StepLoss | None = None
        for loss in _each_loss(self.model, bag, self.options.precision, self.device):
            if loss.value.requires_grad:
                self.scaler.scale(loss.value).backward()
            value = loss.value.detach()
            total, last = value if total is None else total + value, loss
        if total is None or last is None:
            raise ValueError(f"{bag.slide_id}: the model yielded no loss")
        return total, last

    def _step(self, bags: int) -> None:
        if self.group.average_gradients(self.weights, bags) == 0:
            return
        if self.options.clip_grad is not None:
            self.scaler.unscale_(self.optimiser)
            torch.nn.utils.clip_grad_norm_(self.weights, self.options.clip_grad)
        self.scaler.step(self.optimiser)
        self.scaler.update()

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

    @torch.inference_mode()
    def validate(self, bags: Sequence[Bag]) -> EpochResult | None:
        """Losses and predictions of the validation bags, shared out over the processes."""
        self.model.eval()
        log = EpochLog()
        places = self.group.share(range(len(bags)))
        for place, item in zip(places, feed(bags, places, device=self.device), strict=True):
            if isinstance(item, Missing):
                self.failures.setdefault(item.slide_id, item.reason)
                continue
            try:
                every = _each_loss(self.model, item, self.options.precision, self.device)
                last = deque(every, maxlen=1).pop()  # it carries the prediction
            except torch.OutOfMemoryError:
                self.failures.setdefault(item.slide_id, too_large(item))
                continue
            log.add(item, last.value, last, position=place)
        return log.result(self.group)

    # ------------------------------------------------------------------------ ends

    def finish_epoch(self, trained: EpochResult, validated: EpochResult | None, checkpoint: Path,
                     tracker: Tracker) -> None:
        """Judge the epoch, then write checkpoint and state, in this order.

        Killed between the two, the epoch is done again, to the same weights.
        """
        improved = self.stopping.update(
            self.epoch, validated.loss if validated else float("nan"))
        if self.group.is_main:
            if improved and self.options.early_stopping:
                save_torch(checkpoint, self._cpu_weights())
            fault_point("train.epoch")
            tracker.scalars(trained.scalars("train"), self.epoch)
            if validated:
                tracker.scalars(validated.scalars("val"), self.epoch)
            print(f"{self.title} epoch {self.epoch}: {_epoch_line(trained, validated)}"
                  f"{', best so far' if improved else ''}", flush=True)
        self.failures = {slide: reason for part in self.group.gather(self.failures)
                         for slide, reason in part.items()}
        self.epoch += 1
        self.save()

    def _cpu_weights(self) -> dict[str, torch.Tensor]:
        """A state dict that loads on any machine, also by programs that map no devices."""
        return {name: value.cpu() for name, value in self.model.state_dict().items()}

    def finish(self, checkpoint: Path) -> None:
        """Write the last weights, or with early stopping take the best ones back."""
        if not self.options.early_stopping:
            if self.group.is_main:
                save_torch(checkpoint, self._cpu_weights())
            return
        if self.stopping.best_epoch < 0:
            raise FitFailed("the validation loss was never finite, so there is no best epoch; "
                            + _REMEDY)
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


def _build_optimiser(weights: Sequence[torch.nn.Parameter], options: FitOptions
                     ) -> torch.optim.Optimizer:
    if options.opt == "sgd":
        return torch.optim.SGD(weights, lr=options.lr, momentum=0.9, weight_decay=options.reg)
    kind = torch.optim.AdamW if options.opt == "adamw" else torch.optim.Adam
    return kind(weights, lr=options.lr, weight_decay=options.reg, fused=True)


def _epoch_line(trained: EpochResult, validated: EpochResult | None) -> str:
    text = f"train loss {trained.loss:.4f} error {trained.metrics.error:.4f}"
    for name, value in trained.parts.items():
        text += f" {name} {value:.4f}"
    if trained.clustering:
        shares = " ".join(f"{target}: {share:.2f}" for target, share in trained.clustering.items())
        text += f" clustering accuracy {shares}"
    if validated:
        text += (f", val loss {validated.loss:.4f} error {validated.metrics.error:.4f} "
                 f"auc {validated.metrics.auc:.4f}")
    return text
