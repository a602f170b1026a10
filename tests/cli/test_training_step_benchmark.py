"""The benchmark of the training step runs from its one command and prints what it promises."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.training_step import Figure, describe, growth

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def figure(rows: int, cpu_ms: float) -> Figure:
    return Figure(model="clam_sb", rows=rows, precision="fp32", wall_ms=2 * cpu_ms, cpu_ms=cpu_ms,
                  floor_ms=cpu_ms / 4, memory_mb=10.0)


def test_all_flags(run_script: Run, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = run_script(
        "benchmarks/training_step.py", "--models", "mil", "abmil", "--rows", 40, 80,
        "--precisions", "fp32", "--repeats", 1, "--threads", 1, "--json", out)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert [(one["model"], one["rows"], one["precision"]) for one in figures] == [
        ("mil", 40, "fp32"), ("mil", 80, "fp32"), ("abmil", 40, "fp32"), ("abmil", 80, "fp32")]
    assert all(one["cpu_ms"] > one["floor_ms"] > 0 for one in figures)
    assert done.stdout.count("grows as rows^") == 2


def test_unknown_model_is_refused(run_script: Run) -> None:
    done = run_script("benchmarks/training_step.py", "--models", "clamm")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_growth_and_line() -> None:
    assert growth([figure(1000, 10.0), figure(4000, 20.0), figure(100_000, 1000.0)]) == \
        pytest.approx(1.0)
    line = describe(figure(10_000, 400.0))
    assert "25%" in line
    assert line.endswith("458, 271")
