"""benchmarks/e2e.py: every way is measured or skipped with an estimate, evaluation too."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.e2e import (
    EVALUATION,
    WAYS,
    Figure,
    Footprint,
    MadePatches,
    Setup,
    describe,
    evaluate,
    footprint_of,
    measure_if_it_fits,
    train,
)
from utils.errors import Refused

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SETUP = Setup(encoder="r18", mil="abmil", img_size=32, img_transform="strong", p_batch_size=3,
              p_batch_size_v=4, precision="fp32", device="cpu", threads=1, repeats=1)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def line(way: str, patches: int = 8, **changes: float) -> Figure:
    return replace(Figure(encoder="r18", way=way, patches=patches), **changes)  # type: ignore[arg-type]


def test_the_command(run_script: Run, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = run_script(
        "benchmarks/e2e.py", "--encoders", "r18", "--mil", "mean", "--img_size", 32, "--patches", 5,
        "--ways", "cached", "--eval_patches", 6, "--img_transform", "weak", "--p_batch_size", 2,
        "--p_batch_size_v", 4, "--precision", "bf16", "--threads", 1, "--repeats", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert [(one["way"], one["patches"]) for one in figures] == [("cached", 5), ("evaluation", 6)]
    assert all(one["seconds"] > 0 and one["cpu_seconds"] > 0 for one in figures)
    assert "e2e_r18_mean, 256 px to 32 (weak), bf16, cpu, 1 thread(s), chunks of 2" in done.stdout
    assert "MB of features" in done.stdout


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(Refused, match="r19"):
        footprint_of(replace(SETUP, encoder="r19"))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_takes_a_step(way: str) -> None:
    found = train(SETUP, line(way, 5))
    assert found.seconds and found.cpu_seconds and found.extra_mb is not None


def test_evaluation_of_more_patches_than_a_chunk() -> None:
    found = evaluate(SETUP, line(EVALUATION, 9))
    assert found.seconds and found.features_mb == pytest.approx(9 * 256 * 4 / 2**20)
    assert "aggregator" in describe(found, None)


def test_patches_are_made_in_chunks_and_always_the_same() -> None:
    patches = MadePatches(70)
    assert len(patches) == 70
    chunks = list(patches.stream(32))
    assert [len(chunk) for chunk in chunks] == [32, 32, 6]
    assert chunks[0].dtype == torch.uint8 and chunks[0].shape[1:] == (256, 256, 3)
    assert torch.equal(torch.cat(chunks), torch.cat(list(patches.stream(7))))


def test_the_footprint_is_what_the_network_saves() -> None:
    small, large = (footprint_of(replace(SETUP, img_size=size)) for size in (64, 128))
    for one in (small, large):
        assert one.held > one.largest > 0 and one.held > one.between > 0
    assert large.held / small.held == pytest.approx(4, rel=0.05), "by area"
    # in MB: the image; 64 channels at a quarter of its side twice, 128 at an eighth
    between = (3 * 128**2 + 2 * 64 * 32**2 + 128 * 16**2) * 4 / 2**20
    assert large.between == pytest.approx(between)


def test_what_would_not_fit_is_skipped_with_its_estimate() -> None:
    huge = Footprint(held=2.0**30, between=2.0**20, largest=2.0**29)
    for way in (*WAYS, EVALUATION):
        found = measure_if_it_fits(SETUP, huge, way, 8)
        assert found.seconds is None and "GB expected" in found.note
        assert found.note in describe(found, None)


def test_estimates_grow_as_each_way_does() -> None:
    footprint = Footprint(held=20.0, between=2.0, largest=8.0)

    def growth(way: str) -> float:
        few, many = (footprint.expected_mb(way, patches, 32) for patches in (64, 128))
        return (many - few) / 64 / 1.25

    assert [growth(way) for way in WAYS] == pytest.approx([20, 20, 0, 2])
    assert growth(EVALUATION) == pytest.approx(0)
    assert footprint.expected_mb("cached", 16, 32) < footprint.expected_mb("cached", 64, 32)


def test_ratios_are_to_plain() -> None:
    plain = line("plain", seconds=2.0, cpu_seconds=2.0, extra_mb=1000.0)
    cached = line("cached", seconds=3.0, cpu_seconds=3.0, extra_mb=250.0)
    assert describe(cached, plain).split()[-2:] == ["1.50", "0.25"]
    assert describe(cached, line("plain")).split()[-2:] == ["-", "-"]
