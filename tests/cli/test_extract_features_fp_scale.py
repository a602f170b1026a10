"""extract_features_fp.py on several processes and machines: torchrun and a Dask cluster.

All are real processes; the features are those of one process, bit for bit.
"""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

import extract_features_fp
from tests.conftest import ROOT
from tests.feature_inputs import Inputs, make_inputs, write_tiny_encoder
from tests.unit.test_utils_distributed import torchrun
from utils.storage import read_h5

Run = Callable[..., CompletedProcess[str]]
SCRIPT = "extract_features_fp.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs") / "cohort", (20, 7, 0, 13))


@pytest.fixture(scope="module")
def encoder_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tiny_encoder(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="module")
def wanted(inputs: Inputs, encoder_flags: list[str], tmp_path_factory: pytest.TempPathFactory
           ) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("wanted")
    assert extract_features_fp.main([*inputs.arguments(folder), *encoder_flags]) == 0
    return matrices(folder)


def matrices(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: read_h5(path).arrays["features"]
            for path in sorted(folder.glob("h5_files/*.h5"))}


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def report(folder: Path, stage: str = "features") -> list[tuple[str, str]]:
    with (folder / f"report_{stage}.csv").open(encoding="utf-8", newline="") as file:
        return [(row["item"], row["status"]) for row in csv.DictReader(file)]


def test_under_torchrun(inputs: Inputs, encoder_flags: list[str], wanted: dict[str, np.ndarray],
                        tmp_path: Path) -> None:
    """Slides are shared out by rank; one report and one table; a failure of any rank is told."""
    command = [ROOT / SCRIPT, *inputs.arguments(tmp_path), *encoder_flags, "--device", "cpu",
               "--slide_encoder", "mean"]
    done = torchrun(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("4 slides to do (40 patches), 0 settled before") == 1
    assert_equal(matrices(tmp_path), wanted)
    assert report(tmp_path) == [("slide_0", "done"), ("slide_1", "done"), ("slide_2", "empty"),
                                ("slide_3", "done")]
    assert [item for item, _ in report(tmp_path, "slide_features")] == [
        f"slide_{number} mean" for number in range(4)]
    assert len((tmp_path / "slide_features/mean.csv").read_text().splitlines()) == 4


def test_a_failure_of_the_other_rank_is_told(inputs: Inputs, encoder_flags: list[str],
                                             tmp_path: Path) -> None:
    """Slide 1 is of rank 1: its file is gone. Rank 0 does its share and lists it."""
    slides = tmp_path / "slides"
    slides.mkdir()
    for number in (0, 2, 3):
        (slides / f"slide_{number}.tif").symlink_to(inputs.slides / f"slide_{number}.tif")
    moved = Inputs(slides, inputs.patches_root, inputs.csv)
    done = torchrun(ROOT / SCRIPT, *moved.arguments(tmp_path / "f"), *encoder_flags)
    assert done.returncode != 0 and "error:" not in done.stderr
    assert done.stdout.count("failed  slide_1: ") == 1
    assert dict(report(tmp_path / "f")) == {
        "slide_0": "done", "slide_1": "failed", "slide_2": "empty", "slide_3": "done"}
    assert "exitcode  : 3" in done.stderr or "exitcode: 3" in done.stderr


def test_on_a_dask_cluster_one_of_whose_workers_dies(
        inputs: Inputs, encoder_flags: list[str], wanted: dict[str, np.ndarray], tmp_path: Path,
        run_script: Run) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True,
                                  dashboard_address=None) as cluster:
        with distributed.Client(cluster, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            before = set(client.run(os.getpid).values())
        killer = threading.Thread(target=_kill_at_work, args=(tmp_path,))
        killer.start()
        run = run_script(SCRIPT, *inputs.arguments(tmp_path), *encoder_flags, "--scheduler",
                         cluster.scheduler_address)
        killer.join()
        with distributed.Client(cluster, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            assert len(before - set(client.run(os.getpid).values())) == 1
    assert run.returncode == 0, run.stdout + run.stderr
    assert_equal(matrices(tmp_path), wanted)
    assert not list(tmp_path.rglob("*.lock"))


def _kill_at_work(folder: Path) -> None:
    """Kill the worker whose child process holds a slide, once there is one."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        time.sleep(0.005)
        with contextlib.suppress(OSError, ValueError, IndexError):
            lock = next(iter(folder.glob("h5_files/*.lock")), folder)
            child = int(lock.read_text(encoding="utf-8").splitlines()[0])
            status = Path(f"/proc/{child}/status").read_text(encoding="utf-8")
            (line,) = [line for line in status.splitlines() if line.startswith("PPid:")]
            os.kill(int(line.split()[1]), signal.SIGKILL)
            return
