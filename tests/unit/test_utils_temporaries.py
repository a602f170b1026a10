"""Left-overs of killed runs go, those of running ones stay."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from filelock import SoftFileLock

from utils.locks import sweep_locks
from utils.temporaries import sweep_temporaries, temp_prefix


def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_temporaries_of_dead_processes_on_this_host_go(tmp_path: Path) -> None:
    stays = [f"{temp_prefix()}a", f".mw-tmp-{platform.node()}~1~b", ".mw-tmp-elsewhere~1~c",
             f".mw-tmp-elsewhere~{dead_pid()}~d", ".mw-tmp-old-style", "result.h5"]
    goes = [f".mw-tmp-{platform.node()}~{dead_pid()}~e"]
    for name in (*stays, *goes):
        (tmp_path / name).touch()
    assert sweep_temporaries(tmp_path) == len(goes)
    assert sorted(os.listdir(tmp_path)) == sorted(stays)


def test_locks_of_dead_processes_go(tmp_path: Path) -> None:
    code = ("import os, sys; from filelock import SoftFileLock\n"
            "lock = SoftFileLock(sys.argv[1]); lock.acquire(); os._exit(0)")
    subprocess.run([sys.executable, "-c", code, tmp_path / "dead.h5.lock"], check=True)
    with SoftFileLock(str(tmp_path / "live.h5.lock")):
        sweep_locks(tmp_path)
        assert os.listdir(tmp_path) == ["live.h5.lock"]
