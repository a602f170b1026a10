"""Which weights of a run are judged after each epoch, and the checkpoints they are kept in.

The model's own, their running mean, or both (``FitOptions.test_type``). Import late: it needs
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.fit_options import FitOptions
from utils.storage import save_torch
from utils.training_state import TrainingState

MAIN, MEAN = "val", "val_ema"  # how the log calls the validation of the first and the second


class KeptWeights:
    """The judged models by their stage in the log, each with its checkpoint.

    models:   ``val``: the model, or its running mean where only that is tested; ``val_ema``: the
              running mean, where both are
    followed: the stage that early stopping goes by
    checkpoints: a file for each of ``models``; none where nothing is to be written
    """

    def __init__(self, model: torch.nn.Module, mean: torch.nn.Module | None, *,
                 options: FitOptions, checkpoints: Sequence[Path]) -> None:
        self._mean = mean
        self.models: dict[str, torch.nn.Module] = {MAIN: mean or model}
        if mean is not None and options.tests_both:
            self.models = {MAIN: model, MEAN: mean}
        self.followed = MEAN if options.test_type == "both_ema" else MAIN
        if checkpoints and len(checkpoints) != len(self.models):
            raise ValueError(f"{len(checkpoints)} checkpoints for {len(self.models)} models")
        self.checkpoints = dict(zip(self.models, checkpoints, strict=False))

    def write(self, *, epoch: int | None = None) -> None:
        """Write the weights as they are now; of an ``epoch``, beside the checkpoints."""
        for stage, path in self.checkpoints.items():
            save_torch(_of_epoch(path, epoch), _on_cpu(self.models[stage]))

    def remove(self, epochs: Iterable[int]) -> None:
        """Remove the files of these epochs."""
        for epoch in epochs:
            for path in self.checkpoints.values():
                _of_epoch(path, epoch).unlink(missing_ok=True)

    def write_state(self, state: TrainingState) -> None:
        """Write the weights that the state of a run holds."""
        for stage, path in self.checkpoints.items():
            own = self.models[stage] is self._mean
            save_torch(path, state.mean if own else state.model)


def _of_epoch(path: Path, epoch: int | None) -> Path:
    return path if epoch is None else path.with_name(f"{path.stem}_epoch_{epoch}.pt")


def _on_cpu(model: torch.nn.Module) -> dict[str, Any]:
    """A state dict that loads on any machine, also by programs that map no devices."""
    return {name: value.cpu() for name, value in model.state_dict().items()}
