from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from utils.errors import BrokenFile
from utils.training_state import (
    STATE_FILE,
    EarlyStopping,
    TrainingState,
    discard_state,
    load_state,
    save_state,
)


def test_nan_and_infinity_never_improve() -> None:
    stopping = EarlyStopping(patience=2, stop_epoch=0)
    assert not stopping.update(0, math.nan)
    assert stopping.best_epoch == -1
    assert not stopping.update(1, math.inf)
    assert stopping.should_stop(1)
    assert stopping.update(2, 0.5)
    assert not stopping.update(3, math.nan)
    assert not stopping.update(4, 0.7)  # in the original a NaN lets any loss improve
    assert (stopping.best_epoch, stopping.best_loss, stopping.waited) == (2, 0.5, 2)


def test_ties_improve() -> None:
    stopping = EarlyStopping()
    assert [stopping.update(epoch, 0.5) for epoch in range(3)] == [True] * 3
    assert stopping.best_epoch == 2


def make_state() -> TrainingState:
    layer = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return TrainingState(
        parameters={"lr": 0.1, "names": ["a", None]}, next_epoch=3, model=layer.state_dict(),
        optimiser=optimiser.state_dict(), scaler={},
        stopping=EarlyStopping(best_loss=0.25, best_epoch=1, waited=1),
        failures={"slide": "why"})


def test_state_comes_back_equal(tmp_path: Path) -> None:
    state = make_state()
    save_state(tmp_path, state)
    found = load_state(tmp_path)
    assert found is not None
    assert (found.parameters, found.next_epoch, found.failures, found.stopping) == (
        state.parameters, 3, state.failures, state.stopping)
    torch.testing.assert_close(found.model, state.model, rtol=0, atol=0)
    torch.testing.assert_close(found.optimiser["state"], state.optimiser["state"], rtol=0, atol=0)
    discard_state(tmp_path)
    discard_state(tmp_path)
    assert load_state(tmp_path) is None


def test_damaged_state_is_said_to_be(tmp_path: Path) -> None:
    save_state(tmp_path, make_state())
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BrokenFile, match=STATE_FILE):
        load_state(tmp_path)
