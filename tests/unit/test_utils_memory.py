"""How much memory is left: that of the machine, or of the container or job that has less."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils.memory import available_memory_bytes

GROUPS = {  # version 2; version 1; a container that sees itself at the top; nothing in /proc
    "2": ("0::/slurm/job\n", "slurm/job", ("memory.max", "memory.current", "inactive_file")),
    "1": ("7:cpu:/a\n4:memory:/slurm/job\n0::/\n", "memory/slurm/job",
          ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    "docker": ("4:memory:/docker/abc\n", "memory",
               ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    "none": ("", "", ("memory.max", "memory.current", "inactive_file"))}


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:   8000 kB\n",
                       **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_of_this_machine() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 20 < available_memory_bytes() < total


@pytest.mark.parametrize("kind", GROUPS)
def test_of_the_group_that_has_less(tmp_path: Path, kind: str) -> None:
    own, folder, (limit, used, files) = GROUPS[kind]
    group = f"sys/fs/cgroup/{folder}"
    root = machine(tmp_path, {"proc/self/cgroup": own, f"{group}/{limit}": "5000000\n",
                              f"{group}/{used}": "3000000\n"})
    assert available_memory_bytes(root) == 2_000_000
    # of what it takes, pages of slides that were read are dropped on demand
    machine(tmp_path, {f"{group}/memory.stat": f"anon 1\n{files} 1500000\n"})
    assert available_memory_bytes(root) == 3_500_000
    machine(tmp_path, {f"{group}/{limit}": "90000000000\n"})
    assert available_memory_bytes(root) == 8000 * 1024


def test_without_a_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max":
                              "max\n", "sys/fs/cgroup/job/memory.current": "5\n"})
    assert available_memory_bytes(root) == 8000 * 1024
    (root / "proc/meminfo").unlink()
    assert available_memory_bytes(root) > 1 << 20
