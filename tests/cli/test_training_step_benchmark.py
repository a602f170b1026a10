"""The benchmarks of training steps run from their one command and print what they promise."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import model_scaling
from benchmarks._measure import growth
from benchmarks._steps import training_step
from benchmarks.training_step import Figure, describe

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def figure(rows: int, cpu_ms: float, threads: int = 1) -> Figure:
    return Figure(model="clam_sb", rows=rows, precision="fp32", threads=threads,
                  wall_ms=2 * cpu_ms, cpu_ms=cpu_ms, floor_ms=cpu_ms / 4, memory_mb=10.0)


def test_all_flags(run_script: Run, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = run_script(
        "benchmarks/training_step.py", "--models", "abmil", "--rows", 40, 80,
        "--precisions", "fp32", "--repeats", 1, "--threads", 1, "--json", out)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert [(one["model"], one["rows"], one["precision"]) for one in figures] == [
        ("abmil", 40, "fp32"), ("abmil", 80, "fp32")]
    assert all(one["cpu_ms"] > one["floor_ms"] > 0 for one in figures)
    assert done.stdout.count("grows as rows^") == 1


def test_unknown_model_is_refused(run_script: Run) -> None:
    done = run_script("benchmarks/training_step.py", "--models", "clamm")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_threads_are_those_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            training_step("mean", precision="fp32", threads=threads)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_growth_and_line() -> None:
    assert growth([1000, 4000, 100_000], [10.0, 40.0, 1000.0]) == pytest.approx(1.0)
    assert growth([10, 20, 40, 80], [1.0, 4.0, 16.0, 64.0]) == pytest.approx(2.0)
    assert math.isnan(growth([10, 10], [1.0, 2.0]))
    line = describe(figure(10_000, 400.0))
    assert "25%" in line
    assert line.endswith("458, 271")
    assert describe(figure(10_000, 400.0, threads=2)).endswith("-")  # the reference had one


# ---------------------------------------------------------------------------- model_scaling.py

def scaled(rows: int, cpu_ms: float | None, extra_mb: float = 1024.0) -> model_scaling.Figure:
    return model_scaling.Figure(model="abmilx", rows=rows, precision="fp32", threads=1,
                                wall_ms=cpu_ms, cpu_ms=cpu_ms, extra_mb=extra_mb)


def test_scaling_of_the_models(run_script: Run, tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    done = run_script(
        "benchmarks/model_scaling.py", "--models", "mean", "--rows", 80, 40, "--precision",
        "bf16", "--repeats", 1, "--threads", 1, "--max_seconds", 30, "--max_gb", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [(one["rows"], one["precision"], one["note"]) for one in found["figures"]] == [
        (40, "bf16", ""), (80, "bf16", "")]
    assert all(one["cpu_ms"] > 0 and one["wall_ms"] > 0 for one in found["figures"])
    assert len(found["exponents"]["mean"]) == 2
    assert "in bf16 on 1 thread(s)" in done.stdout and "grows as rows^" in done.stdout


def test_what_would_be_too_much_is_not_started() -> None:
    def note(*smaller: model_scaling.Figure, **limits: float) -> str:
        options = model_scaling.Options(**limits)  # type: ignore[arg-type]
        return model_scaling.measure_within("abmilx", 50_000, smaller, options).note

    lines = scaled(1000, 100.0), scaled(10_000, 10_000.0)
    assert note(*lines) == "skipped: about 250 s and 1.0 GB expected"
    wide = scaled(1000, 1.0, 204.8), scaled(2000, 1.0, 409.6)
    assert note(*wide, max_gb=9.9) == "skipped: about 0 s and 10.0 GB expected"
    assert note(scaled(1000, None)) == "skipped: a smaller bag was too much already"


def test_what_is_too_much_is_stopped(run_script: Run) -> None:
    """Without a smaller bag there is no estimate: the kernel holds the limit."""
    done = run_script("benchmarks/model_scaling.py", "--models", "mean", "--rows", 20_000,
                      "--repeats", 1, "--max_gb", 0.01)
    assert done.returncode == 0, done.stderr
    assert "20000 stopped: more than 0.01 GB" in done.stdout


def test_estimates_follow_the_growth() -> None:
    small, large = scaled(1000, 100.0, 10.0), scaled(2000, 400.0, 20.0)
    assert model_scaling.expected([], 4000) is None
    assert model_scaling.expected([small], 4000) is None  # all of it may be a fixed cost
    assert model_scaling.expected([small, large], 4000) == pytest.approx((1.6, 40 / 1024))
    assert model_scaling.exponents([small, large, scaled(4000, None)]) == pytest.approx((2.0, 1.0))
