"""The small rooms of the ground floor: registry, report, parallel work, locks, errors."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.errors import EXIT_FAILED, ItemFailed, Refused, run_script
from utils.locks import claim
from utils.parallel import Outcome, available_cpus, run_items
from utils.registry import Registry
from utils.report import Row, RunReport, Status, outcome_row


def test_registry() -> None:
    things: Registry[int] = Registry("thing")
    things.register("alpha")(1)
    assert things.get("alpha") == 1 and "alpha" in things and list(things) == ["alpha"]
    with pytest.raises(Refused, match="did you mean 'alpha'"):
        things.get("alhpa")
    with pytest.raises(ValueError, match="twice"):
        things.register("alpha")(2)


def test_row_of_an_outcome() -> None:
    told = Row(item="a", status=Status.EMPTY, reason="no tissue", numbers={"n_patches": 0})
    assert outcome_row("a", Outcome("a", told, None, 1.5)) == replace(told, seconds=1.5)
    assert outcome_row("a", Outcome("a", None, "truncated", 2.0)) == Row(
        item="a", status=Status.FAILED, reason="truncated", seconds=2.0)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = RunReport("patches")
    report.add(Row(item="a", status=Status.DONE, numbers={"patches": 3}))
    assert report.exit_code == 0
    report.extend([Row(item="=b", status=Status.FAILED, reason="no such file"),
                   Row(item="c", status=Status.EMPTY, reason="no tissue")])
    assert report.exit_code == EXIT_FAILED
    report.write(tmp_path, options={"x": 1})
    rows = list(csv.DictReader((tmp_path / "report_patches.csv").open()))
    assert [row["patches"] for row in rows] == ["3", "", ""]
    assert rows[1]["item"] == "'=b"  # no spreadsheet formula
    record = json.loads((tmp_path / "report_patches.json").read_text())
    assert record["counts"] == {"done": 1, "failed": 1, "empty": 1}
    assert record["options"] == {"x": 1}
    report.print_summary(tmp_path)
    out = capsys.readouterr().out
    assert "1 failed" in out and "no such file" in out and "no tissue" in out


def double(item: int, *, extra: int = 0) -> int:
    if item == 3:
        raise ItemFailed("three is bad")
    if item == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 5:
        raise OSError(28, "No space left on device", "x.h5")
    if item == 6:
        raise ValueError("odd\nthing")
    return 2 * item + extra


@pytest.mark.parametrize("workers", [0, 2])
def test_items_fail_alone(workers: int) -> None:
    items = [1, 2, 3, 5, 6] + ([4] if workers else [])
    found = {o.item: o for o in run_items(double, items, workers=workers, arguments={"extra": 1})}
    assert set(found) == set(items)
    assert found[1].result == 3 and found[2].result == 5 and found[1].error is None
    assert found[3].error == "three is bad"
    assert "no space left" in str(found[5].error)
    assert found[6].error == "ValueError: odd thing"
    if workers:
        assert "worker process died" in str(found[4].error)


def test_cpus() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


def test_a_held_lock_is_busy_and_is_released(tmp_path: Path) -> None:
    target = tmp_path / "slide.h5"
    with claim(target) as mine:
        assert mine
        code = ("from pathlib import Path; from utils.locks import claim\n"
                f"with claim(Path({str(target)!r})) as mine: raise SystemExit(10 if mine else 11)")
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 11
    assert os.listdir(tmp_path) == []


def test_a_dead_owners_lock_is_taken_over_another_hosts_is_not(tmp_path: Path) -> None:
    target = tmp_path / "slide.h5"
    code = ("import os, signal; from pathlib import Path; from utils.locks import claim\n"
            f"with claim(Path({str(target)!r})): os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    lock = tmp_path / "slide.h5.lock"
    assert lock.exists()
    record = lock.read_text()
    with claim(target) as mine:
        assert mine
    lock.write_text(record.replace(socket.gethostname(), "another-host"))
    old = time.time() - 3600
    os.utime(lock, (old, old))
    with claim(target) as mine:
        assert not mine


def refuse() -> int:
    raise Refused("x is y")


def fail() -> int:
    raise ItemFailed("slide a: broken")


def interrupt() -> int:
    raise KeyboardInterrupt


def terminate() -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    return 0


@pytest.mark.parametrize(("main", "code", "text"), [
    (refuse, 2, "error: x is y"), (fail, 3, "failed: slide a"), (interrupt, 130, "interrupted"),
    (terminate, 143, "terminated"), (lambda: 0, 0, "")])
def test_exit_codes(main, code: int, text: str,  # type: ignore[no-untyped-def]
                    capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_script(main) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert text in capsys.readouterr().err


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (f"from pathlib import Path; from tests.unit.test_utils_ground import linger\n"
            "from utils.parallel import run_items\n"
            f"if __name__ == '__main__': list(run_items(linger, [{str(pids)!r}], workers=1))")
    script = tmp_path / "run.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], cwd=ROOT,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(pids.read_text())
    parent.kill()
    parent.wait()
    while Path(f"/proc/{worker}/stat").exists() and time.monotonic() < deadline:
        if ") Z " in Path(f"/proc/{worker}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{worker}").exists()


def linger(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(120)


def test_sigterm_while_python_shuts_down_shows_no_trace() -> None:
    """An exit handler stands for what a library does at the end of the interpreter."""
    code = ("import atexit, os, signal, sys\nfrom utils.errors import run_script\n"
            "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
            "sys.exit(run_script(lambda: 0))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == -signal.SIGTERM
    assert run.stderr == ""
