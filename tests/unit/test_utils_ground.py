"""The small rooms of the ground floor: registry, report, errors."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.errors import EXIT_FAILED, ItemFailed, Refused, run_script
from utils.parallel import Outcome
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


def test_sigterm_while_python_shuts_down_shows_no_trace() -> None:
    """An exit handler stands for what a library does at the end of the interpreter."""
    code = ("import atexit, os, signal, sys\nfrom utils.errors import run_script\n"
            "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
            "sys.exit(run_script(lambda: 0))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == -signal.SIGTERM
    assert run.stderr == ""
