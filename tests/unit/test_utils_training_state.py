from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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


def test_a_metric_is_watched_on_request() -> None:
    """Higher is better; of equal ones the lower loss; NaN never improves."""
    stopping = EarlyStopping(monitor="metric", patience=2, stop_epoch=0)
    script = [(math.nan, 1.0, False), (0.5, 1.0, True), (0.5, 2.0, False), (0.5, 0.9, True),
              (0.5, 0.9, True), (0.9, 5.0, True), (math.nan, 0.1, False), (0.95, math.nan, False)]
    for epoch, (metric, loss, improves) in enumerate(script):
        assert stopping.update(epoch, loss, metric=metric) is improves
    assert (stopping.best_epoch, stopping.best_metric, stopping.best_loss) == (5, 0.9, 5.0)
    assert stopping.should_stop(7)


def make_state() -> TrainingState:
    layer = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return TrainingState(
        parameters={"lr": 0.1, "names": ["a", None]}, next_epoch=3, model=layer.state_dict(),
        optimiser=optimiser.state_dict(), scaler={},
        stopping=EarlyStopping(best_loss=0.25, best_epoch=1, waited=1),
        failures={"slide": "why"}, mean={"weight": torch.ones(2)})


def test_state_comes_back_equal(tmp_path: Path) -> None:
    state = make_state()
    save_state(tmp_path, state)
    found = load_state(tmp_path)
    assert found is not None
    assert (found.parameters, found.next_epoch, found.failures, found.stopping) == (
        state.parameters, 3, state.failures, state.stopping)
    torch.testing.assert_close(found.model, state.model, rtol=0, atol=0)
    torch.testing.assert_close(found.mean, state.mean, rtol=0, atol=0)
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


@pytest.mark.parametrize(("monitor", "kept"), [("loss", {1, 3}), ("metric", {2, 3})])
def test_the_best_few_epochs(monitor: Any, kept: set[int]) -> None:
    stopping, files = EarlyStopping(monitor=monitor), set()
    for epoch, (loss, metric) in enumerate([(3, 0.5), (1, 0.5), (4, 0.9), (2, 0.8), (9, 0.1),
                                            (math.nan, 1.0)]):
        for changed in stopping.rank(epoch, loss, metric=metric, most=2):
            files ^= {changed}
    assert files == kept
