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
from typing import Any, Literal

from utils.storage import canonical, load_torch, save_torch

STATE_FILE = "state.pt"


@dataclass(kw_only=True)
class EarlyStopping:
    """CLAM's rule, made safe against NaN.

    A validation loss not above the best so far (ties count) is an improvement; training stops
    when there was none for ``patience`` epochs and the epoch index is above ``stop_epoch``.
    A NaN or infinite loss never improves (in the original it did, and overwrote the best model).
    monitor "metric" instead takes the highest metric and, among equal ones, the lowest loss: an
    AUC of few slides is often the same in many epochs. A NaN metric never improves.
    """

    patience: int = 20
    stop_epoch: int = 50
    monitor: Literal["loss", "metric"] = "loss"
    best_loss: float = math.inf
    best_metric: float = -math.inf
    best_epoch: int = -1
    waited: int = 0
    ranked: list[list[float]] = field(default_factory=list)  # of ``rank``: figures and epoch

    def update(self, epoch: int, loss: float, *, metric: float = math.nan) -> bool:
        """Take the figures of an epoch (counted from 0); are they an improvement?"""
        if self._improves(loss, metric):
            self.best_loss, self.best_metric = loss, metric
            self.best_epoch, self.waited = epoch, 0
            return True
        self.waited += 1
        return False

    def _improves(self, loss: float, metric: float) -> bool:
        if not math.isfinite(loss):
            return False
        if self.monitor == "loss":
            return loss <= self.best_loss
        return math.isfinite(metric) and (-metric, loss) <= (-self.best_metric, self.best_loss)

    def rank(self, epoch: int, loss: float, *, metric: float, most: int) -> list[int]:
        """Take the epoch among the ``most`` best; returns those whose standing changes.

        The epoch itself when it is one of them now, and then the one that it pushes out. Among
        equals the later is the better, as in ``update``.
        """
        figure = loss if self.monitor == "loss" else -metric
        if not (math.isfinite(loss) and math.isfinite(figure)):
            return []
        self.ranked = sorted([*self.ranked, [figure, loss, -epoch]])
        pushed_out = [-int(last) for *_, last in self.ranked[most:]]
        self.ranked = self.ranked[:most]
        return [] if epoch in pushed_out else [epoch, *pushed_out]

    def should_stop(self, epoch: int) -> bool:
        """Is training over after this epoch?"""
        return self.waited >= self.patience and epoch > self.stop_epoch


@dataclass(kw_only=True)
class TrainingState:
    """Where a run stands between two epochs.

    parameters: what the run was started with; a run started with others must not go on from here
    next_epoch: index of the first epoch not yet done
    failures:   slide id to reason, for bags that could not be used
    mean:       running mean of the model's weights; empty without one
    """

    parameters: dict[str, Any]
    next_epoch: int
    model: dict[str, Any]
    optimiser: dict[str, Any]
    scaler: dict[str, Any]
    stopping: EarlyStopping
    failures: dict[str, str] = field(default_factory=dict)
    mean: dict[str, Any] = field(default_factory=dict)


def save_state(folder: Path, state: TrainingState) -> None:
    """Replace ``folder/state.pt``, whole or not at all."""
    names = ("next_epoch", "model", "optimiser", "scaler", "failures", "mean")
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
