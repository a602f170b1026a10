"""What a training run must remember: early stopping, and the state file that lets it go on.

``state.pt`` holds tensors and plain values only and is replaced whole after every epoch. Random
generators are not in it: each epoch is seeded anew (``utils.seeding``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.storage import canonical, load_torch, save_torch

STATE_FILE = "state.pt"


@dataclass(kw_only=True)
class EarlyStopping:
    """CLAM's rule, made safe against NaN.

    A validation loss not above the best so far (ties count) is an improvement; training stops
    when there was none for ``patience`` epochs and the epoch index is above ``stop_epoch``.
    A NaN or infinite loss never improves (in the original it did, and overwrote the best model).
    """

    patience: int = 20
    stop_epoch: int = 50
    best_loss: float = math.inf
    best_epoch: int = -1
    waited: int = 0

    def update(self, epoch: int, loss: float) -> bool:
        """Take the loss of an epoch (counted from 0); is it an improvement?"""
        if math.isfinite(loss) and loss <= self.best_loss:
            self.best_loss, self.best_epoch, self.waited = loss, epoch, 0
            return True
        self.waited += 1
        return False

    def should_stop(self, epoch: int) -> bool:
        """Is training over after this epoch?"""
        return self.waited >= self.patience and epoch > self.stop_epoch


@dataclass(kw_only=True)
class TrainingState:
    """Where a run stands between two epochs.

    parameters: what the run was started with; a run started with others must not go on from here
    next_epoch: index of the first epoch not yet done
    failures:   slide id to reason, for bags that could not be used
    """

    parameters: dict[str, Any]
    next_epoch: int
    model: dict[str, Any]
    optimiser: dict[str, Any]
    scaler: dict[str, Any]
    stopping: EarlyStopping
    failures: dict[str, str] = field(default_factory=dict)


def save_state(folder: Path, state: TrainingState) -> None:
    """Replace ``folder/state.pt``, whole or not at all."""
    names = ("next_epoch", "model", "optimiser", "scaler", "failures")
    save_torch(folder / STATE_FILE, {
        **{name: getattr(state, name) for name in names},
        "parameters": canonical(state.parameters), "stopping": asdict(state.stopping)})


def load_state(folder: Path) -> TrainingState | None:
    """The state in ``folder``, or None when there is none. ``BrokenFile`` when it is damaged."""
    import json

    path = folder / STATE_FILE
    if not path.exists():
        return None
    raw = load_torch(path)
    return TrainingState(**{**raw, "parameters": json.loads(raw["parameters"]),
                            "stopping": EarlyStopping(**raw["stopping"])})


def same_parameters(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Were both made by equal settings?"""
    return canonical(found) == canonical(wanted)


def discard_state(folder: Path) -> None:
    """Remove the state file: its run is finished, or to be started anew."""
    with contextlib.suppress(FileNotFoundError):
        (folder / STATE_FILE).unlink()
