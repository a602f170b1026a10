from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.devices import autocast, check_precision, pick_device
from utils.errors import Refused

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize(("name", "count", "expected"), [
    ("auto", 0, "cpu"), ("cpu", 2, "cpu"), ("auto", 1, "cuda:0"), ("cuda", 2, "cuda:0"),
    ("cuda:1", 2, "cuda:1")])
def test_device_that_is_there(gpus, name: str, count: int, expected: str) -> None:  # type: ignore[no-untyped-def]
    gpus(count)
    assert str(pick_device(name)) == expected


@pytest.mark.parametrize(("name", "count", "message"), [
    ("cuda", 0, "use --device cpu"), ("cuda:2", 2, "GPU 2 was asked for, 2 found"),
    ("cuda:x", 1, "expected auto, cpu, cuda"), ("gpu", 1, "expected auto"),
    ("cpu:1", 1, "expected auto")])
def test_device_that_is_not_there(gpus, name: str, count: int, message: str) -> None:  # type: ignore[no-untyped-def]
    gpus(count)
    with pytest.raises(Refused, match=message):
        pick_device(name)


def test_local_rank_chooses_the_gpu(gpus, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    gpus(4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(pick_device("cuda")) == "cuda:3"
    assert str(pick_device("cuda:1")) == "cuda:1"


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(Refused, match="use bf16 or fp32"):
        check_precision("fp16", torch.device("cpu"))
    check_precision("bf16", torch.device("cpu"))


def test_bf16_refused_by_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(Refused, match="use fp16 or fp32"):
        check_precision("bf16", torch.device("cuda"))


def test_autocast_changes_what_a_linear_layer_gives() -> None:
    layer, rows = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with autocast("bf16", torch.device("cpu")):
        assert layer(rows).dtype is torch.bfloat16
    with autocast("fp32", torch.device("cpu")):
        assert layer(rows).dtype is torch.float32


def test_freed_memory_is_kept_when_asked_to() -> None:
    program = """
import resource, sys, torch
from utils.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**20 * size) for size in (1, 4, 2, 8, 3)]  # MB x 4
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([faults() for step in range(14)][6:]))  # in the steady state
"""
    kept, given_back = (int(subprocess.run(
        [sys.executable, "-c", program, how], cwd=ROOT, capture_output=True, text=True,
        check=True).stdout) for how in ("keep", "default"))
    assert kept < given_back / 3
