"""The batch scripts of scripts/cluster: they parse, their flags exist, and they do their work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_documentation import flags_of
from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / "scripts" / "cluster").glob("*.sh"))
SRUN = """#!/usr/bin/env bash
# srun of one machine: its own flags, then the command
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
PYTHON = """#!/usr/bin/env bash
# Python that says what it was asked for, of scripts only
[[ $1 != *.py ]] || printf '%s\\037' "$@"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables a job has, and an ``srun``."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("echo_python", PYTHON)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT), "SLIDES": "/the slides", "OUT": str(tmp_path / "out"),
            "HOST": "127.0.0.1", "PORT": str(port), "SCRATCH": str(tmp_path),
            "TMPDIR": str(tmp_path)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_set_up_alike(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    assert "set -euo pipefail" in text
    above = text[:text.index("set -euo pipefail")].splitlines()
    assert all(line.startswith("#") for line in above)  # SLURM stops looking at the first command


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_flags_they_use_exist(script: Path, environment: dict[str, str]) -> None:
    """What listens on the scheduler's port is the test."""
    with socket.create_server(("127.0.0.1", int(environment["PORT"]))):
        run = subprocess.run(
            ["bash", str(script), "--extra"], cwd="/", capture_output=True, text=True,
            env={**environment, "PYTHON": "echo_python", "SLURM_CPUS_PER_TASK": "3"})
    assert run.returncode == 0, run.stderr
    words = run.stdout.split("\037")
    (name,) = [word for word in words if word.endswith(".py")]
    words = words[words.index(name):]
    assert words[:-1][-1] == "--extra"  # what is added goes to the script
    assert "/the slides" in words
    flags = {word for word in words if word.startswith("--")} - {"--extra"}
    assert flags and flags <= flags_of(name), flags - flags_of(name)


def test_a_job_without_its_folders_says_what_is_missing(environment: dict[str, str]) -> None:
    del environment["SLIDES"]
    for script in SCRIPTS:
        run = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment)
        assert run.returncode != 0 and "SLIDES: folder with the slides" in run.stderr


def test_the_dask_job_patches_slides(environment: dict[str, str], slide_folder: Path,
                                     tmp_path: Path) -> None:
    """A scheduler, a worker and the run, as in the job; nothing of it stays."""
    pytest.importorskip("distributed")
    run = subprocess.run(
        ["bash", str(ROOT / "scripts/cluster/slurm_dask.sh"), "--preset", "bwh_biopsy.csv"],
        cwd="/", capture_output=True, text=True, timeout=120,
        env={**environment, "PYTHON": sys.executable, "WORKERS": "1", "SLIDES": str(slide_folder)})
    assert run.returncode == 0, run.stderr[-2000:]
    assert "patches: 3 done" in run.stdout
    assert len(list((tmp_path / "out" / "patches").glob("*.h5"))) == 3
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(environment["PORT"]))) != 0
