"""Memory: what this process could still take, and what it need not keep."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path


def available_memory_bytes() -> int:
    """Memory this process could take now: what the machine, and its container, have left."""
    left = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        left.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        group = Path("/sys/fs/cgroup")
        if (group / limit).exists() and (group / limit).read_text().strip() != "max":
            left.append(int((group / limit).read_text()) - int((group / used).read_text()))
    if not left:
        left.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(0, min(left))


def give_back_freed_memory() -> None:
    """Hand the system the pieces that ``utils.devices.keep_freed_memory`` has left between blocks
    in use, before blocks of other sizes are asked for. Nothing where the library is not glibc."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
