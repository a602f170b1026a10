"""The gradients of one optimiser step, added up bag by bag.

Each loss that ``model.losses(bag)`` yields is back-propagated as it comes, so only one graph is
alive. Models with an encoder of their own (``utils.contracts.JointEncoder``) first make the
features of a few bags together. A bag that fails costs itself, and what the step had summed.
Import late: it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch

from utils.contracts import Bag, JointEncoder, SlideModel, StepLoss
from utils.devices import Precision, autocast
from utils.distributed import Group, PeerLost
from utils.epoch_log import EpochLog
from utils.errors import ItemFailed
from utils.faults import fault_point
from utils.feeding import Missing
from utils.fit_options import FitOptions
from utils.joint_loss import Glimpse, glimpse, joint_gradients, pass_again

# What one bag can bring about without harm to the others
BAG_ERRORS = (torch.OutOfMemoryError, ItemFailed, OSError)

Part = Iterator[tuple[int, Bag | Missing]]  # a few bags with their places in the epoch


def why_unusable(bag: Bag, error: Exception) -> str:
    """Why a bag that brought about one of ``BAG_ERRORS`` has no answer."""
    if not isinstance(error, torch.OutOfMemoryError):
        return str(error)
    what = f"{len(bag)} patches do"
    fewer = ", a lower --t_patch" if bag.children else ""
    if bag.patches is not None:
        fewer = (", --enc_grad cached, a lower --p_batch_size (in evaluation --p_batch_size_v), "
                 "--batch_size or --same_psize")
    if bag.image is not None:
        what = "an image of {} x {} px does".format(*bag.image.size_px)
        fewer = ", a smaller --stream_memory or --tile_size"
    return (f"{bag.slide_id}: {what} not fit in the memory of the GPU: try "
            f"--precision bf16{fewer}, or --device cpu")


def usable(part: Part, failures: dict[str, str]) -> Iterator[tuple[int, Bag]]:
    """The bags that could be read; the others are noted in ``failures`` with the reason."""
    for place, item in part:
        if isinstance(item, Missing):
            failures.setdefault(item.slide_id, item.reason)
        else:
            yield place, item


class StepGradients:
    """Adds up the gradients of the bags of a step, in the ``grad`` of the model's parameters.

    step: takes a step with the gradients as they are, of so many bags (``step_per_loss`` alone)
    failures: slide id to reason; takes in the bags that could not be used
    """

    def __init__(self, model: torch.nn.Module, *, options: FitOptions, device: torch.device,
                 group: Group, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                 step: Callable[[int], None], failures: dict[str, str]) -> None:
        self.model = model
        self.objective = cast(SlideModel, model).objective
        self.encoder = cast(JointEncoder, model) if hasattr(model, "encode") else None
        self.options = options
        self.group = group
        self.optimiser = optimiser
        self.scaler = scaler
        self.step = step
        self.failures = failures
        self._how: dict[str, Any] = {"precision": options.precision, "device": device}

    def add_up(self, passes: list[Part], log: EpochLog) -> int:
        """Add up the gradients of a step's bags; returns how many bags are to be stepped for."""
        self._clear_gradients()
        if self.objective.needs_batch:
            first, second = passes
            return self._sum_joint_gradients(first, second, log)
        if self.encoder:
            return self._sum_encoded_gradients(self.encoder, passes[0], log)
        bags = 0
        for place, bag in usable(passes[0], self.failures):
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
        for loss in each_loss(self.model, bag, **self._how):
            if loss.value.requires_grad:
                self.scaler.scale(loss.value).backward()
            if self.options.step_per_loss:
                self.step(1)
                self._clear_gradients()
            value = loss.value.detach()
            total, last = value if total is None else total + value, loss
        if total is None or last is None:
            raise ValueError(f"{bag.slide_id}: the model yielded no loss")
        return total, last

    def _sum_encoded_gradients(self, encoder: JointEncoder, part: Part, log: EpochLog) -> int:
        """The same for bags that are encoded together, in groups of the model's ``batch_size``.

        All ranks encode equally many groups, if need be empty ones: they may share statistics.
        """
        readable, bags = usable(part, self.failures), 0
        for _ in range(self.options.accumulate // encoder.batch_size):
            members = list(islice(readable, encoder.batch_size))
            encoded = encoder.encode([bag for _, bag in members])
            try:
                for place, bag in members:
                    fault_point("train.bag")
                    value, last = self._backward(self._resume(encoded))
                    log.add(bag, value, last, position=place)
                self._resume(encoded)  # back through the encoder
            except PeerLost:  # nobody to go on with, whatever the bags
                raise
            except BAG_ERRORS as error:
                encoded.close()
                for bag in _blamed([bag for _, bag in members], error):
                    self._give_up(bag, error)
                bags = 0
            else:
                bags += len(members)
        return bags

    def _resume(self, encoded: Generator[Bag, None, None]) -> Any:
        """The next bag with its features, made under autocast; None after the last."""
        with autocast(**self._how):
            return next(encoded, None)

    def _sum_joint_gradients(self, first: Part, second: Part, log: EpochLog) -> int:
        """The same for a loss that compares the bags of all ranks, see ``utils.joint_loss``."""
        seen: dict[int, Glimpse] = {}
        for place, bag in usable(first, self.failures):
            fault_point("train.bag")
            try:
                seen[place], output = glimpse(self.model, bag, **self._how)
            except BAG_ERRORS as error:
                self._give_up(bag, error)
                continue
            log.add_prediction(bag, output, position=place)
        found = joint_gradients(self.objective, list(seen.values()), self.group)
        gradients = dict(zip(seen, found, strict=True)) if found else {}
        bags = 0
        for place, bag in usable(second, self.failures):
            if place not in gradients:
                continue
            try:
                loss = pass_again(self.model, bag, seen[place], gradients[place], **self._how)
                self.scaler.scale(loss).backward()
            except BAG_ERRORS as error:
                self._give_up(bag, error)
                bags = 0
                continue
            bags += 1
        return bags


def _blamed(members: Sequence[Bag], error: Exception) -> Sequence[Bag]:
    """Of bags that were encoded together the one that the error names, or all."""
    return [bag for bag in members if str(error).startswith(f"{bag.slide_id}:")] or members


def each_loss(
    model: torch.nn.Module, bag: Bag, *, precision: Precision, device: torch.device
) -> Iterator[StepLoss]:
    """The losses of a bag; the model computes each under autocast, its consumer works without."""
    losses = iter(cast(SlideModel, model).losses(bag))
    while True:
        with autocast(precision, device):
            loss = next(losses, None)
        if loss is None:
            return
        yield loss
