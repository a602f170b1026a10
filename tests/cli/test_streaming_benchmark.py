"""benchmarks/streaming.py: every way takes the same step, measured or skipped with the reason."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks.streaming
from benchmarks.streaming import (
    Figure,
    MadeImage,
    Setup,
    count_tiles,
    describe,
    lines_of,
    train,
)
from utils.errors import Refused

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SETUP = Setup(network="resnet18", head="mean", precision="fp32", device="cpu", threads=1, repeats=1)
PLENTY_MB = 2.0**20


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_command(run_script: Run, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = run_script(
        "benchmarks/streaming.py", "--network", "resnet18", "--sizes", 160, "--ways", "auto",
        "ordinary", "--budget_gb", 0.08, "--head", "max", "--threads", 1, "--repeats", 1, "--out",
        out)
    assert done.returncode == 0, done.stderr
    ordinary, auto = json.loads(out.read_text())
    assert [ordinary["way"], auto["way"]] == ["ordinary", "auto"]
    assert all(one["seconds"] > 0 and one["cpu_seconds"] > 0 for one in (ordinary, auto))
    assert auto["gradient"] == pytest.approx(ordinary["gradient"], rel=1e-4)
    assert auto["groups"] in done.stdout and "layer4" in auto["groups"]
    assert "resnet18, max of the map, fp32, cpu, 1 thread(s)" in done.stdout
    assert "layer4       2048    16384    196\n" in done.stdout, "the table of spec 6"


def test_all_ways_take_the_same_step() -> None:
    torch.manual_seed(0)
    lines = lines_of(480, ("flat", "ordinary", "auto"), (0.08, 1.0))
    assert [(line.way, line.budget_gb) for line in lines] == [
        ("ordinary", None), ("auto", 0.08), ("auto", 1.0), ("flat", 1.0)]
    found = [train(SETUP, line, PLENTY_MB) for line in lines]
    assert all(one.seconds and one.extra_mb is not None for one in found)
    assert [one.gradient for one in found[1:]] == pytest.approx([found[0].gradient] * 3, rel=1e-4)
    assert found[2].groups == "stem..layer4.1: held" and found[2].expected_x == 1
    assert " tiles of " in found[1].groups and found[1].expected_x > 1.1  # type: ignore[operator]


@pytest.mark.parametrize(("line", "free_mb", "reason"), [
    (Figure(way="ordinary", size_px=8192), 1000.0, "GB expected, 1.0 GB free"),
    (Figure(way="auto", size_px=64, budget_gb=2.0), 1000.0, "1.0 GB free"),
    (Figure(way="flat", size_px=8192, budget_gb=0.01), PLENTY_MB, "MB at least")])
def test_what_would_not_fit_is_not_tried(line: Figure, free_mb: float, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        train(SETUP, line, free_mb)


def test_ratios_are_to_ordinary() -> None:
    ordinary = Figure(way="ordinary", size_px=1000, seconds=2.0, cpu_seconds=4.0, extra_mb=1000.0,
                      gradient=1.0)
    auto = replace(ordinary, way="auto", budget_gb=0.5, seconds=3.0, extra_mb=250.0,
                   expected_x=1.4, expected_mb=240.0, groups="all: held")
    assert describe(auto, ordinary).split() == [
        "auto", "1000", "0.5", "3.00", "4.00", "3.00", "250", "240", "1.50", "1.40", "0.250", "1",
        "all:", "held"]
    skipped = replace(auto, seconds=None, note="skipped: too large")
    assert describe(skipped, ordinary).endswith("0.5 skipped: too large")
    assert describe(auto, skipped).count(" - ") == 2


def test_a_wrong_count_of_tiles_is_an_error(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmarks.streaming, "TILE_COUNTS", (("layer4.0", 5120, 16384, 17),))
    assert not count_tiles()
    assert "16  but 17 expected" in capsys.readouterr().out


def test_the_image_is_the_same_however_it_is_read() -> None:
    image = MadeImage(700, "cpu")
    whole = image.read((slice(0, 700), slice(0, 700)))
    assert whole.shape == (700, 700, 3) and whole.dtype == torch.uint8
    part = image.read((slice(300, 420), slice(650, 700)))
    assert torch.equal(part, whole[300:420, 650:700])
    assert image.prepare(part).shape == (1, 3, 120, 50)
