"""Items on local processes: what fails, fails alone; deadlines; nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from utils.errors import ItemFailed
from utils.parallel import Outcome, available_cpus, run_items


def outcomes(work: Any, items: Any, **options: Any) -> dict[Any, Outcome[Any, Any]]:
    found = {outcome.item: outcome for outcome in run_items(work, items, **options)}
    assert set(found) == set(items)
    assert not multiprocessing.active_children()
    return found


def double(item: int, *, extra: int = 0) -> int:
    if item == 3:
        raise ItemFailed("three is bad")
    if item == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 5:
        raise OSError(28, "No space left on device", "x.h5")
    if item == 6:
        raise ValueError("odd\nthing")
    if item == 7:
        raise MemoryError
    return 2 * item + extra


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_items_fail_alone(workers: int) -> None:
    items = [1, 2, 3, 5, 6, 7] + ([4] if workers else [])
    found = outcomes(double, items, workers=workers, arguments={"extra": 1})
    assert found[1].result == 3 and found[2].result == 5 and found[1].error is None
    assert found[3].error == "three is bad"
    assert "no space left" in str(found[5].error)
    assert found[6].error == "ValueError: odd thing"
    assert "out of memory" in str(found[7].error)
    if workers:
        assert "worker process died" in str(found[4].error)


def test_cpus() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


def note(item: int, *, folder: Path, killer: int, deaths: int) -> int:
    log = folder / f"{item}"
    with log.open("a") as file:
        file.write("x")
    if item == killer and len(log.read_text()) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize(("deaths", "fails"), [(1, False), (2, True)])
def test_a_death_costs_its_item_only(deaths: int, fails: bool, tmp_path: Path) -> None:
    """The others run once; the one that died runs once more, alone."""
    found = outcomes(note, range(6), workers=2,
                     arguments={"folder": tmp_path, "killer": 2, "deaths": deaths})
    assert [item for item in range(6) if found[item].error] == ([2] if fails else [])
    assert [len((tmp_path / str(item)).read_text()) for item in range(6)] == [1, 1, 2, 1, 1, 1]


def hang(item: str) -> str:
    if item == "asleep":
        time.sleep(60)
    if item == "lock held":  # a search that takes years and keeps the interpreter to itself
        re.match(r"(a+)+$", "a" * 60 + "b")
    return item


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_past_its_deadline_fails_alone(workers: int,
                                               capfd: pytest.CaptureFixture[str]) -> None:
    items = ["a", "asleep", "b", "lock held", "c", "d"]
    start = time.monotonic()
    found = outcomes(hang, items, workers=workers, deadline_s=0.5)
    assert time.monotonic() - start < 10
    for item in items:
        if item in ("asleep", "lock held"):
            assert "took longer than 0.5 s (--slide_timeout)" in str(found[item].error)
            assert found[item].seconds == 0.5
        else:
            assert found[item].result == item
    stacks = capfd.readouterr().err
    if workers == 0:  # two at a time write into each other's lines
        assert stacks.count("Timeout (0:00:00.5") == 2
        assert stacks.count("in hang\n") == 2


def test_the_clock_does_not_run_while_the_work_is_imported(tmp_path: Path) -> None:
    """Imports from a slow disk are not the slide's fault."""
    (tmp_path / "slow_work.py").write_text("import time\ntime.sleep(0.6)\n"
                                           "def work(item): return item\n")
    sys.path.insert(0, str(tmp_path))
    try:
        from slow_work import work  # type: ignore[import-not-found]

        assert outcomes(work, [1], workers=1, deadline_s=0.3)[1].result == 1
    finally:
        sys.path.remove(str(tmp_path))


def give_function(item: int) -> Any:
    return (lambda: item) if item == 0 else item


def test_a_result_that_cannot_travel_is_one_line() -> None:
    found = outcomes(give_function, [0, 1], workers=1)
    assert "result cannot be sent" in str(found[0].error) and found[1].result == 1


def grandchildren(item: int) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return int(pool.apply(abs, (-item,)))


def test_work_may_have_processes_of_its_own() -> None:
    """Folds in workers read their bags with processes."""
    assert outcomes(grandchildren, [3], workers=1)[3].result == 3


def tidy(item: str) -> None:
    path = Path(item)
    try:
        path.write_text(str(os.getpid()))
        time.sleep(60)
    finally:
        path.unlink()


def test_leaving_the_loop_ends_the_work_in_hand_cleanly(tmp_path: Path) -> None:
    first, last = str(tmp_path / "first"), str(tmp_path / "last")
    running = run_items(first_or_tidy, [first, last], workers=2)
    assert next(running).item == first
    while not (tmp_path / "last").exists():
        time.sleep(0.01)
    start = time.monotonic()
    running.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 4
    assert not (tmp_path / "last").exists()  # its `finally` ran
    assert not multiprocessing.active_children()


def first_or_tidy(item: str) -> None:
    if not item.endswith("first"):
        tidy(item)


def linger(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(120)


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = tmp_path / "run.py"
    script.write_text("from tests.unit.test_utils_parallel import linger\n"
                      "from utils.parallel import run_items\n"
                      f"if __name__ == '__main__': list(run_items(linger, [{str(pids)!r}], "
                      "workers=1))")
    parent = subprocess.Popen([sys.executable, str(script)], cwd=ROOT,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(pids.read_text())
    parent.kill()
    parent.wait()
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether it runs; one that only waits to be reaped does not."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
