"""How to train: one frozen dataclass whose fields are flags of main.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from utils.contracts import SlideModel
from utils.devices import Precision
from utils.errors import Refused
from utils.options import option

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Everything that may change what training computes, so all of it is compared on resume."""

    max_epochs: int = option(200, help="most epochs to train", low=1)
    lr: float = option(1e-4, help="learning rate", low=0)
    reg: float = option(1e-5, help="weight decay", low=0)
    opt: Literal["adam", "adamw", "sgd"] = option(
        "adam", help="optimiser (sgd: momentum 0.9; adamw: no decay of norms and biases)")
    early_stopping: bool = option(False, help="stop on the validation set, keep the best epoch")
    monitor: Literal["loss", "metric"] = option(
        "loss", help="what early stopping watches: the validation loss, or the AUC, c-index or "
        "R2 of the validation slides")
    patience: int = option(20, help="epochs without improvement before stopping", low=1)
    stop_epoch: int = option(50, help="never stop at or before this epoch (from 0)", low=0)
    save_top_k: int = option(1, help="with early stopping: further checkpoints of the best epochs, "
                             "so many in all", low=1)
    weighted_sample: bool = option(False, help="draw slides so that classes (or the strata of "
                                   "another task) are balanced")
    precision: Precision = option("fp32", help="number format of the forward pass")
    accumulate: int = option(1, help="slides per optimiser step (of each process)", low=1)
    clip_grad: float | None = option(None, help="largest gradient norm", low=1e-6)
    schedule: Literal["constant", "cosine", "step"] = option(
        "constant", help="learning rate over the epochs; cosine: down to --min_lr; step: a fifth "
        "from half of the epochs on")
    min_lr: float = option(1e-7, help="learning rate at the end of the cosine", low=0)
    warmup_epochs: int = option(0, help="epochs of linear warm-up from --warmup_lr", low=0)
    warmup_lr: float = option(1e-6, help="learning rate at the start of the warm-up", low=0)
    freeze_epochs: int = option(
        0, help="first epochs in which the encoder of an end-to-end or streaming model rests: "
        "attention that has learnt nothing yet would spoil it", low=0)
    ema: float | None = option(
        None, help="decay of a running mean of the weights, which is validated, tested and saved",
        low=0, high=0.999999)
    swa: int | None = option(
        None, help="instead of --ema: the equal mean of the weights at the ends of the last so "
        "many epochs, which is validated, tested and saved (before them: the weights)", low=1)
    test_type: Literal["main", "ema", "both", "both_ema"] | None = option(
        None, help="weights that are validated, tested and saved: the model's own, their running "
        "mean (ema: that of --ema or --swa), or both, where early stopping goes by the first "
        "(both) or the mean (both_ema); default: the mean where there is one")
    step_per_loss: bool = option(
        False, help="an optimiser step after each loss of a bag (HAG-MIL as published: one a "
        "level) instead of one after all")
    seed: int = option(1, help="seed of everything random, set again for each fold",
                       low=0, high=2**32 - 1)

    @property
    def averages(self) -> bool:
        """Is there a running mean of the weights?"""
        return self.ema is not None or self.swa is not None

    @property
    def tests_both(self) -> bool:
        """Are the weights and their running mean both validated, tested and saved?"""
        return self.test_type in ("both", "both_ema")


def check_fit(options: FitOptions, model: torch.nn.Module, *, processes: int = 1) -> None:
    """``Refused`` when the options contradict each other, the slide model or the processes."""
    objective = cast(SlideModel, model).objective
    encodes, rests = hasattr(model, "encode"), hasattr(model, "rest")
    together: int = getattr(model, "batch_size", 1)
    wants_mean = options.test_type not in (None, "main")
    swa = options.swa or 0
    rules = [
        (options.accumulate % together != 0,
         f"--batch_size {together} slides are encoded together, so --accumulate must be a multiple "
         f"of it, not {options.accumulate}: give --accumulate {together}"),
        (objective.needs_batch and together > 1,
         "Cox passes one slide at a time through the encoder: leave --batch_size out"),
        (options.step_per_loss and encodes,
         "--step_per_loss would step before the losses have gone back through the encoder of an "
         "end-to-end model: leave it out"),
        (options.freeze_epochs > 0 and not rests,
         "--freeze_epochs lets the encoder of an end-to-end or streaming model rest, this model "
         "has none: leave it out"),
        (options.freeze_epochs >= options.max_epochs,
         f"--freeze_epochs {options.freeze_epochs} of --max_epochs {options.max_epochs} leave none "
         "in which the encoder learns: give --train_blocks 0 (streaming: --train_part head) for "
         "that, or more epochs"),
        (wants_mean and not options.averages,
         f"--test_type {options.test_type} tests a running mean of the weights: give its decay, "
         "--ema 0.9997, or --swa 5"),
        (options.test_type == "main" and options.averages,
         "--test_type main would make nothing of the running mean: leave --ema and --swa out, or "
         "choose --test_type both"),
        (options.ema is not None and swa > 0,
         "--ema and --swa are two means of the weights, of which one is saved: choose one"),
        (swa > options.max_epochs,
         f"--swa {swa} averages more epochs than --max_epochs {options.max_epochs}: give at most "
         "as many"),
        (swa > 0 and options.early_stopping,
         "--swa averages the last epochs, and --early_stopping leaves open which they are: leave "
         "one out, or give --ema instead"),
        (objective.needs_batch and options.accumulate < 2,
         "Cox compares the slides of a step: give --accumulate 16"),
        (options.step_per_loss and options.accumulate > 1,
         f"--step_per_loss steps several times a slide, --accumulate {options.accumulate} once "
         "in several slides: choose one"),
        (options.step_per_loss and processes > 1,
         "--step_per_loss goes with one process, torchrun started "
         f"{processes}: leave one of them out"),
        (options.schedule == "cosine" and options.min_lr > options.lr,
         f"--min_lr {options.min_lr} is above --lr {options.lr}"),
        (options.warmup_epochs > 0 and options.warmup_lr > options.lr,
         f"--warmup_lr {options.warmup_lr} is above --lr {options.lr}"),
    ]
    for wrong, message in rules:
        if wrong:
            raise Refused(message)
