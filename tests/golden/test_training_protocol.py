"""Early stopping as the original does it, from its own trace (tests/golden/metrics.json)."""

from __future__ import annotations

import json
import math

import pytest

from tests.conftest import GOLDEN
from utils.training_state import EarlyStopping

CASES = json.loads((GOLDEN / "metrics.json").read_text())["early_stopping"]


@pytest.mark.parametrize("case", CASES)
def test_early_stopping_saves_and_stops_as_the_original(case: dict[str, object]) -> None:
    losses = [math.nan if loss is None else float(loss)
              for loss in case["val_losses"]]  # type: ignore[attr-defined]
    stopping = EarlyStopping()
    saved, stopped = [], None
    for epoch, loss in enumerate(losses):
        if stopping.update(epoch, loss):
            saved.append(epoch)
        if stopping.should_stop(epoch):
            stopped = epoch
            break
    assert saved == case["saved_after_epoch"]
    assert stopped == case["stopped_at_epoch"]
