"""Memory: what this process could still take, and what it need not keep."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

# of a control group, by version (2, 1): its limit, what it takes, and the line of memory.stat with
# the pages of files in that, which the system drops as soon as somebody needs the memory
_FILES = (("memory.max", "memory.current", "inactive_file"),
          ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


_sharing = 1  # processes like this one on this machine


def share_memory(processes: int) -> None:
    """Say that so many processes do the like of this one side by side."""
    global _sharing
    _sharing = max(1, processes)


def sharers() -> int:
    """What ``share_memory`` was told; 1 before."""
    return _sharing


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory this process could take now: what the machine, and its containers, have left.

    A container (a batch system's job) is a control group of Linux, or one above it.
    """
    left = []
    if "MemAvailable:" in (machine := _fields(root / "proc/meminfo")):
        left.append(machine["MemAvailable:"] * 1024)
    for group in _control_groups(root):
        for limit, used, files in _FILES:
            if (group / limit).exists() and (group / limit).read_text().strip() != "max":
                taken = int((group / used).read_text())
                dropped = _fields(group / "memory.stat").get(files, 0)
                left.append(int((group / limit).read_text()) - taken + dropped)
    if not left:
        left.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(0, min(left))


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders of the groups this process is in, each with those above it."""
    own = root / "proc/self/cgroup"
    lines = own.read_text().splitlines() if own.exists() else []
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controllers in ("", "memory"):  # version 2, version 1
        top = root / "sys/fs/cgroup" / controllers
        group = top / paths.get(controllers, "").strip("/")  # in a container, top may be all of it
        yield from (group, *(one for one in group.parents if one.is_relative_to(top)))


def _fields(file: Path) -> dict[str, int]:
    """The number of each line, by its first word; nothing where there is no such file."""
    if not file.exists():
        return {}
    return {words[0]: int(words[1]) for words in map(str.split, file.read_text().splitlines())}


def give_back_freed_memory() -> None:
    """Hand the system the pieces that ``utils.devices.keep_freed_memory`` has left between blocks
    in use, before blocks of other sizes are asked for. Nothing where the library is not glibc."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
