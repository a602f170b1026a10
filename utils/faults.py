"""Named points at which a test can break the program: ``MILWRIGHT_FAULT=site:action[:nth]``.

Child processes of a test read the variable, so faults need no monkey-patching. Actions: ``kill``
(SIGKILL to ourselves), ``enospc`` (no space left), ``eio`` (input/output error), ``sleep``.
Unset, a fault point costs one dictionary look-up. ``MILWRIGHT_FAULT_LOG=file`` writes down the
sites passed and by which process, so a sweep can kill at each of them in turn.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

_passed: Counter[str] = Counter()


def fault_point(site: str) -> None:
    """Do what ``MILWRIGHT_FAULT`` asks for at this site, or nothing."""
    log = os.environ.get("MILWRIGHT_FAULT_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{site} {os.getpid()}\n")
    wanted = os.environ.get("MILWRIGHT_FAULT")
    if not wanted:
        return
    name, action, *nth = wanted.split(":")
    if name != site:
        return
    _passed[site] += 1
    if nth and _passed[site] != int(nth[0]):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "eio":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    elif action == "sleep":
        time.sleep(30)
    else:
        raise ValueError(f"MILWRIGHT_FAULT: unknown action '{action}'")
