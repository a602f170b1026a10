"""Names of temporary files, and the clearing away of those that a killed run left behind."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from pathlib import Path

_TEMP_PREFIX = ".mw-tmp-"  # then host, process and a random part, divided by "~"
_TEMP_MAX_AGE_S = 24 * 3600


def sweep_temporaries(folder: Path) -> int:
    """Remove our temporaries (files and folders) in ``folder`` that are a day old or whose process
    on this host is dead; returns how many."""
    swept = 0
    for path in folder.glob(_TEMP_PREFIX + "*"):
        with contextlib.suppress(OSError):
            if _is_orphan(path) or time.time() - path.stat().st_mtime > _TEMP_MAX_AGE_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                swept += 1
    return swept


def temp_prefix() -> str:
    """What the name of a temporary of this process begins with."""
    return f"{_TEMP_PREFIX}{platform.node()}~{os.getpid()}~"


def umask() -> int:
    """Permissions that this process takes off new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_orphan(temp: Path) -> bool:
    host, _, rest = temp.name.removeprefix(_TEMP_PREFIX).partition("~")
    number = rest.partition("~")[0]
    if host != platform.node() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:  # alive, but not ours
        return False
    return False
