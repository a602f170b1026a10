"""Items on a real Dask scheduler with two workers: equal results, lost workers, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import utils
from tests.unit.test_utils_parallel import alive, double, hang
from utils import dask_cluster
from utils.dask_cluster import check_workers
from utils.errors import Refused
from utils.parallel import Outcome, run_items

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes that are started again when they die."""
    import dask

    settings = {"distributed.scheduler.allowed-failures": 1,
                "distributed.scheduler.worker-saturation": 1.0}  # as scripts/cluster sets them
    with dask.config.set(settings), distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture
def address(cluster: Any) -> str:
    """The scheduler's, with both workers there."""
    with distributed.Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=30)
    return str(cluster.scheduler_address)


def outcomes(work: Any, items: Any, **options: Any) -> dict[Any, Outcome[Any, Any]]:
    found = {outcome.item: outcome for outcome in run_items(work, items, workers=0, **options)}
    assert set(found) == set(items)
    return found


def test_results_equal_local_ones(address: str) -> None:
    """Failures too, a death of the process that has the item among them."""
    items = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    spread = outcomes(double, items, scheduler=address, arguments={"extra": 1})
    local = {one.item: one for one in run_items(double, items, workers=4, arguments={"extra": 1})}
    assert {item: (one.result, one.error) for item, one in spread.items()} == {
        item: (one.result, one.error) for item, one in local.items()}


def slow(item: int) -> tuple[int, int, int]:
    time.sleep(0.05)
    return item * item, os.getpid(), os.getppid()


def test_a_worker_killed_in_the_middle_costs_nothing(address: str) -> None:
    results, workers, children = {}, set(), set()
    killed = 0
    for outcome in run_items(slow, range(20), workers=0, scheduler=address):
        assert outcome.error is None
        results[outcome.item], child, worker = outcome.result or (0, 0, 0)
        children.add(child)
        workers.add(worker)
        if not killed:
            killed = worker
            os.kill(worker, signal.SIGKILL)
    assert results == {item: item * item for item in range(20)}
    assert workers - {killed}  # the others did the rest
    end = time.monotonic() + 5
    while any(map(alive, children)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(alive, children))  # none waits in a worker for a run that is over


def kill_worker(item: int) -> int:
    if item == 1:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(10)
    return item


def test_an_item_that_takes_its_worker_along_fails_alone(address: str) -> None:
    """The scheduler's setting allows one loss; the second one is the item's end."""
    found = outcomes(kill_worker, [0, 1], scheduler=address)
    assert "every worker that took it was lost" in str(found[1].error)
    assert found[0].result == 0


def test_deadline(address: str) -> None:
    found = outcomes(hang, ["a", "lock held", "b"], scheduler=address, deadline_s=0.5)
    assert "took longer than 0.5 s" in str(found["lock held"].error)
    assert found["a"].result == "a" and found["b"].result == "b"


class Counted(list[int]):
    """A list that knows how far it was read."""

    taken = 0

    def __iter__(self) -> Iterator[int]:
        for item in super().__iter__():
            self.taken += 1
            yield item


def test_only_so_many_items_are_under_way(address: str) -> None:
    items = Counted(range(12))
    for number, _ in enumerate(run_items(slow, items, workers=0, scheduler=address)):
        assert items.taken - number <= 2 * 2


def where(item: str) -> str:
    return str(Path(item).resolve())


def test_relative_paths_mean_what_they_mean_here(address: str, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert outcomes(where, ["out"], scheduler=address)["out"].result == str(tmp_path / "out")


def test_leaving_the_loop_ends_the_work_in_hand(address: str, tmp_path: Path) -> None:
    running = run_items(note_and_wait, [str(tmp_path / "quick"), str(tmp_path / "last")],
                        workers=0, scheduler=address)
    next(running)
    while not (tmp_path / "last").exists() or not (tmp_path / "last").read_text():
        time.sleep(0.01)
    child = int((tmp_path / "last").read_text())
    running.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 5
    while alive(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(child)


def note_and_wait(item: str) -> None:
    Path(item).write_text(str(os.getpid()))
    if item.endswith("last"):
        time.sleep(60)


# ---------------------------------------------------------------------------- before the work

def test_folders_are_the_same_for_workers(address: str, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    check_workers(address, [tmp_path])
    assert list(tmp_path.iterdir()) == []
    real = dask_cluster._probe

    def elsewhere(folder: Path, stack: Any) -> dask_cluster.Probe:
        """A folder of that name is on the worker's machine as well, but another one."""
        name, path, write = real(folder, stack)
        return name, path + ("-of-another-disk" if folder == tmp_path else ""), write

    monkeypatch.setattr(dask_cluster, "_probe", elsewhere)
    with pytest.raises(Refused, match=f"worker tcp://.* does not see the folder {tmp_path} "):
        check_workers(address, [Path("/"), tmp_path])


def test_a_folder_that_is_read_only_here_needs_only_be_there(address: str) -> None:
    check_workers(address, [Path("/proc")])


def test_another_version_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "__version__", "99.0")
    with pytest.raises(Refused, match=r"has version .* this is 99\.0: start it with PYTHONPATH="):
        list(run_items(double, [1], workers=0, scheduler=address))


@pytest.mark.parametrize("given", ["tcp://127.0.0.1:9", "127.0.0.1:8786", "tcp://nowhere:x"])
def test_an_address_without_a_scheduler_is_refused_in_seconds(
        given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "CONNECT_S", 0.5)
    start = time.monotonic()
    with pytest.raises(Refused, match=f"--scheduler {given}"):
        list(run_items(double, [1], workers=0, scheduler=given))
    assert time.monotonic() - start < 5


def test_a_missing_library_is_refused_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(Refused, match=r"pip install 'dask\[distributed\]'"):
        check_workers("tcp://127.0.0.1:8786", [])


def test_workers_that_are_absent_or_without_our_code_are_refused(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "WORKERS_S", 0.2)
    with distributed.LocalCluster(
            n_workers=0, processes=True, dashboard_address=":0") as empty:
        address = str(empty.scheduler_address)
        with pytest.raises(Refused, match="has no workers: start some, with PYTHONPATH="):
            check_workers(address, [])
        monkeypatch.setattr(dask_cluster, "WORKERS_S", 30)
        bare = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny",
             "--no-dashboard", "--nthreads", "1"], cwd=tmp_path, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": ""})
        try:
            with pytest.raises(Refused, match="cannot import this toolkit.*PYTHONPATH="):
                list(run_items(double, [1], workers=0, scheduler=address))
        finally:
            bare.terminate()
            bare.wait(10)


def test_a_scheduler_that_dies_ends_the_run_with_reasons(tmp_path: Path) -> None:
    """And hangs nowhere: what was under way and what was not begun fail in one line each."""
    script = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0",
              "--host", "127.0.0.1", "--dashboard-address", ":0",
              "--scheduler-file", str(tmp_path / "s.json")]
    scheduler = subprocess.Popen(script, stderr=subprocess.DEVNULL)
    while not (tmp_path / "s.json").exists():
        time.sleep(0.02)
    import json

    address = json.loads((tmp_path / "s.json").read_text())["address"]
    worker = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny",
         "--no-dashboard", "--nthreads", "1"], stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(dask_cluster.CODE_ROOT)}, cwd=tmp_path)
    try:
        errors = []
        for outcome in run_items(slow, range(8), workers=0, scheduler=address):
            errors.append(outcome.error)
            scheduler.kill()
        assert errors[0] is None and len(errors) == 8
        assert errors[-1] == "the scheduler is gone: start it and run the same command again"
    finally:
        scheduler.kill()
        worker.terminate()
        worker.wait(10)
        scheduler.wait(10)
