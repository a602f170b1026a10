from __future__ import annotations

import sys
from pathlib import Path

import pytest

from utils.tracking import TensorBoardTracker


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}


def test_none_and_nan_are_left_out(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    tracker.start(0)
    tracker.scalars({"a": 0.5, "b": None, "c": float("nan"), "d": float("inf")}, 0)
    tracker.close()
    assert read_scalars(tmp_path) == {"a": [(0, 0.5)]}


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    first = TensorBoardTracker(tmp_path)
    first.start(0)
    for step in range(3):
        first.scalars({"a": float(step)}, step)
    second = TensorBoardTracker(tmp_path)  # the first was killed, its run goes on from step 2
    second.start(2)
    second.scalars({"a": 20.0}, 2)
    first.close()
    second.close()
    assert read_scalars(tmp_path) == {"a": [(0, 0.0), (1, 1.0), (2, 20.0)]}


def test_without_tensorboard_one_warning_and_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tracker = TensorBoardTracker(tmp_path)
    tracker.start(0)
    for step in range(3):
        tracker.scalars({"a": 1.0}, step)
    tracker.close()
    assert capsys.readouterr().err.count("warning: no TensorBoard log") == 1
