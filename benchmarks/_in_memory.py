"""Training and testing a slide model on bags that are in memory, in seconds and without files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.contracts import Bag
from utils.errors import ItemFailed
from utils.fit_options import FitOptions
from utils.seeding import epoch_order

if TYPE_CHECKING:
    from torch import nn


def train_and_test(
    model: nn.Module, train: Sequence[Bag], test: Sequence[Bag], options: FitOptions
) -> np.ndarray:
    """The model's scores of the test bags, (n, classes), after ``max_epochs`` on the training bags.

    The engine's loop less its checkpoints: nothing is resumed within such a run, and nothing is
    validated, so the last epoch counts. ``ItemFailed`` when a bag cannot be used.
    """
    import torch

    from utils.distributed import ALONE
    from utils.engine import predict
    from utils.training_loop import TrainingLoop

    device = torch.device("cpu")
    loop = TrainingLoop(model, options=options, device=device, group=ALONE, folder=Path(),
                        parameters={}, progress=False)
    while loop.epoch < options.max_epochs:
        loop.train_epoch(train, epoch_order(len(train), seed=options.seed, epoch=loop.epoch))
        loop.epoch += 1
    answers = predict(loop.judged, test, device=device)
    for reason in [*loop.failures.values(), *(row.reason for row in answers.failures)]:
        raise ItemFailed(reason)
    return answers.scores
