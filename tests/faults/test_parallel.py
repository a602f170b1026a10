"""Faults A10 to A17 of work over slides, by real processes; what concerns one lock alone is in
tests/unit/test_utils_locks.py (A11 to A13), one deadline in test_utils_parallel.py."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.unit.test_utils_parallel import alive
from utils.locks import claim, holder
from utils.parallel import Outcome, run_items
from utils.storage import write_text
from wsi_core.slide import open_slide, read_level

SCRIPT = """
import sys
from pathlib import Path
from tests.faults import test_parallel as work
from utils.errors import run_script
from utils.parallel import run_items

def main():
    folder = Path(sys.argv[3])
    (folder / f"ready-{sys.argv[4]}").touch()
    while not (folder / "go").exists():
        pass
    for outcome in run_items(getattr(work, sys.argv[1]), range(int(sys.argv[2])), workers=2,
                             arguments={"folder": folder}):
        print(outcome.item, outcome.result or outcome.error, flush=True)
    return 0

if __name__ == "__main__":
    sys.exit(run_script(main))
"""


def start(work: str, items: int, folder: Path, name: str) -> subprocess.Popen[str]:
    """A run of ``work`` over ``range(items)`` in two processes, that waits for a file ``go``."""
    script = folder.parent / f"run-{name}.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), work, str(items), str(folder), name], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The output folder that runs share."""
    path = tmp_path / "out"
    path.mkdir()
    return path


def make(item: int, *, folder: Path, pause_s: float = 0.02) -> str:
    """One slide's work as the scripts do it: claim, look whether it is done, write."""
    path = folder / f"{item}.txt"
    with claim(path) as mine:
        if not mine:
            return f"busy: {holder(path)}"
        if path.exists():
            return "already done"
        with (folder / "log").open("a") as log:
            log.write(f"{item}\n")
        time.sleep(pause_s)
        mine.confirm()
        write_text(path, f"result {item}")
        return "done"


def test_two_runs_at_once_do_each_item_once(folder: Path) -> None:
    """A10. What one has in hand, the other lists as busy and says with whom."""
    runs = [start("make", 30, folder, name) for name in ("a", "b")]
    while not all((folder / f"ready-{name}").exists() for name in ("a", "b")):
        time.sleep(0.01)
    (folder / "go").touch()
    said = [run.communicate(timeout=60)[0].splitlines() for run in runs]
    assert [len(lines) for lines in said] == [30, 30]
    assert sorted(map(int, (folder / "log").read_text().split())) == list(range(30))
    assert all((folder / f"{item}.txt").read_text() == f"result {item}" for item in range(30))
    assert not list(folder.glob("*.lock"))
    ends = [line.split(" ", 1)[1] for lines in said for line in lines]
    assert ends.count("done") == 30
    assert all(end in ("done", "already done") or end.startswith("busy: process ") for end in ends)


def lose_lock(item: int, *, folder: Path) -> None:
    path = folder / f"{item}.txt"
    with claim(path) as mine:
        if item == 1:
            Path(f"{path}.lock").unlink()  # by hand
            with claim(path) as other:  # and another run begins
                other.confirm()
                write_text(path, "the other's")
                mine.confirm()
        write_text(path, "ours")


def test_a_lost_lock_fails_its_item_and_overwrites_nothing(folder: Path) -> None:
    """A12."""
    found = {one.item: one for one in run_items(lose_lock, [0, 1], workers=1,
                                                arguments={"folder": folder})}
    assert found[0].error is None
    assert "was deleted while we worked" in str(found[1].error)
    assert (folder / "1.txt").read_text() == "the other's"


def long(item: int, *, folder: Path) -> None:
    with claim(folder / f"{item}.txt"):
        (folder / f"pid-{item}").write_text(str(os.getpid()))
        time.sleep(60)


@pytest.mark.parametrize(("number", "code", "word"), [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
@pytest.mark.parametrize("whole_group", [False, True])
def test_an_interrupted_run_leaves_nothing(number: int, code: int, word: str, whole_group: bool,
                                           folder: Path) -> None:
    """A14. By a terminal or a batch system the signal reaches the workers as well."""
    (folder / "go").touch()
    run = start("long", 4, folder, "a")
    while len(pids := list(folder.glob("pid-*"))) < 2 or not all(p.read_text() for p in pids):
        assert run.poll() is None
        time.sleep(0.02)
    workers = [int(path.read_text()) for path in pids]
    if whole_group:
        os.killpg(run.pid, number)
    else:
        run.send_signal(number)
    _, err = run.communicate(timeout=20)
    assert run.returncode == code
    assert err.startswith(word) and len(err.splitlines()) == 1  # no trace of a worker either
    assert not any(map(alive, workers))
    assert not list(folder.glob("*.lock"))


def hang_once(item: int, *, folder: Path) -> str:
    if item == 2 and not (folder / "hung").exists():
        (folder / "hung").touch()
        with claim(folder / "2.txt"):
            time.sleep(60)
    return make(item, folder=folder)


def test_a_hanging_item_is_done_by_the_next_run(folder: Path,
                                                capfd: pytest.CaptureFixture[str]) -> None:
    """A16: it fails alone, its stack is on stderr, and the lock that it left bars nobody."""
    def run() -> dict[int, Outcome[int, str]]:
        return {one.item: one for one in run_items(
            hang_once, range(4), workers=2, arguments={"folder": folder}, deadline_s=1)}

    first = run()
    assert [item for item in range(4) if first[item].error] == [2]
    assert "took longer than 1 s" in str(first[2].error)
    assert "in hang_once" in capfd.readouterr().err
    assert {item: one.result for item, one in run().items()} == {
        0: "already done", 1: "already done", 2: "done", 3: "already done"}


def footprint(item: int) -> tuple[int, int]:
    """Open files and resident bytes of this process, after the work."""
    Path(__file__).read_bytes()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")


def test_two_thousand_items_take_no_more_than_a_hundred() -> None:
    """A17, for the worker and for us."""
    theirs, ours = {}, {}
    for number, outcome in enumerate(run_items(footprint, range(2000), workers=1,
                                               deadline_s=60)):
        if number in (100, 1999):
            assert outcome.result is not None
            theirs[number], ours[number] = outcome.result, footprint(0)
    for files_and_bytes in (theirs, ours):
        assert files_and_bytes[1999][0] <= files_and_bytes[100][0]
        assert files_and_bytes[1999][1] <= 1.05 * files_and_bytes[100][1]


def digest_of_overview(name: str, *, folder: Path) -> str:
    with open_slide(folder / name) as slide:
        image, _ = read_level(slide, len(slide.level_dimensions) - 1)
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_the_same_results_here_and_on_a_cluster(slide_folder: Path) -> None:
    """Whatever does the work: none, one or four processes, or the workers of a scheduler."""
    distributed = pytest.importorskip("distributed")
    names = [f"slide_{index}.tif" for index in range(3)] + ["absent.tif"]

    def found(**how: Any) -> dict[str, tuple[str | None, str | None]]:
        return {one.item: (one.result, one.error) for one in run_items(
            digest_of_overview, names, arguments={"folder": slide_folder}, **how)}

    alone = found(workers=0)
    assert len({result for result, _ in alone.values()}) == 4
    assert "no such file" in str(alone["absent.tif"][1])
    assert found(workers=1) == alone and found(workers=4) == alone
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True,
                                  dashboard_address=":0") as cluster:
        assert found(workers=0, scheduler=cluster.scheduler_address) == alone
