"""Locks of items: held, taken over, lost, and file systems that have none."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import SoftFileLock

from tests.conftest import ROOT
from utils.errors import ItemFailed
from utils.locks import claim, holder, lock_path

CLAIM = "import os, signal, sys; from pathlib import Path; from utils.locks import claim\n"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The file that a lock is for."""
    return tmp_path / "slide.h5"


def elsewhere(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CLAIM + code, *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)


def test_a_held_lock_is_busy_says_whose_it_is_and_is_released(target: Path) -> None:
    with claim(target) as mine:
        assert mine and mine.still_mine()
        mine.confirm()
        other = elsewhere("from utils.locks import holder\npath = Path(sys.argv[1])\n"
                          "with claim(path) as mine:\n"
                          "    print(holder(path)); sys.exit(10 if mine else 11)", target)
        assert other.returncode == 11
        assert other.stdout == f"process {os.getpid()} on host {socket.gethostname()}\n"
        with claim(target) as again:
            assert not again and not again.still_mine()
            with pytest.raises(ItemFailed):
                again.confirm()
    assert list(target.parent.iterdir()) == []


def test_a_dead_owners_lock_is_taken_over_another_hosts_is_kept(target: Path) -> None:
    elsewhere("with claim(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)", target)
    lock = lock_path(target)
    record = lock.read_text()
    with claim(target) as mine:
        assert mine and mine.still_mine()
    lock.write_text(foreign := record.replace(socket.gethostname(), "node7"))
    old = time.time() - 3600
    os.utime(lock, (old, old))
    with claim(target) as mine:
        assert not mine
    assert holder(target) == f"process {record.split()[0]} on host node7"
    assert lock.read_text() == foreign


def test_a_pid_that_was_given_to_another_process_is_no_owner(target: Path) -> None:
    """The record holds the start of the process, so a reused number keeps nobody out."""
    with claim(target):
        record = lock_path(target).read_text().splitlines()
    record[2] = str(int(record[2]) - 1)  # this process's number, an earlier start
    lock_path(target).write_text("\n".join(record) + "\n")
    with claim(target) as mine:
        assert mine


def test_a_lock_deleted_by_hand_is_noticed_before_the_final_write(target: Path) -> None:
    with claim(target) as mine:
        lock_path(target).unlink()
        assert mine and not mine.still_mine()
        with pytest.raises(ItemFailed, match=r"slide\.h5\.lock was deleted.*nothing was written"):
            mine.confirm()
        with claim(target) as second:  # of the same process even
            assert second.still_mine() and not mine.still_mine()
            with pytest.raises(ItemFailed, match=rf"now process {os.getpid()} on host .* has it"):
                mine.confirm()
    assert list(target.parent.iterdir()) == []


def test_the_loser_of_a_lock_does_not_take_its_successors_away(target: Path) -> None:
    with claim(target):
        lock_path(target).unlink()
        lock_path(target).write_text("4711\nnode7\n")
    assert lock_path(target).read_text() == "4711\nnode7\n"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_once(
        code: int, target: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    def fail(self: SoftFileLock) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(SoftFileLock, "_acquire", fail)
    for path in (target, target.with_name("other.h5")):
        with claim(path) as mine:
            assert mine and mine.still_mine()
            mine.confirm()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "no locks" in warnings[0] and "one at a time" in warnings[0]


def test_other_errors_of_a_disk_are_not_taken_for_missing_locks(
        target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SoftFileLock) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(SoftFileLock, "_acquire", fail)
    with pytest.raises(OSError, match="full"), claim(target):
        pass


def test_an_unreadable_lock_names_its_file(target: Path) -> None:
    lock_path(target).write_text("")
    with claim(target) as mine:
        assert not mine
    assert str(lock_path(target)) in holder(target)
