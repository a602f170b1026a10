"""What can go wrong, and the exit code that says so.

A message is one line for a person: what, which slide, what was expected, what to type next.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

EXIT_OK = 0  # everything done, or done before
EXIT_REFUSED = 2  # refused before any work
EXIT_FAILED = 3  # finished, some items failed: each is in the report with its reason

EXIT_UNREAD = 141  # the reader of our output is gone, as a shell says it (128 + SIGPIPE)

# What a disk or network can do to any script, as against a file we forgot to check
_SURROUNDINGS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}


class MilwrightError(Exception):
    """Base of every error this toolkit raises on purpose."""


class Refused(MilwrightError):
    """Bad input found before the work began; the script prints the message and exits with 2."""


class ItemFailed(MilwrightError):
    """One item (slide, fold) cannot be done; it goes into the report, the others go on."""


class SlideError(ItemFailed):
    """A slide that cannot be opened or read. The message names the slide."""


class BrokenFile(ItemFailed):
    """A result file of ours that is truncated, altered or not what its name says."""


class Terminated(BaseException):
    """SIGTERM arrived (scheduler pre-emption): unwinds like Ctrl-C, exit code 143."""


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def run_script(main: Callable[[], int]) -> int:
    """Run a script's ``main`` and turn what it raises into one line and an exit code.

    0 done, 2 refused before work, 3 finished with failures, 130 Ctrl-C, 143 SIGTERM,
    141 when nothing reads the output any more.
    Anything else is a bug of ours and keeps its trace.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        code = main()
        sys.stdout.flush()
        return code
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except ItemFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # "| head" has seen enough; what is still buffered has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("interrupted: nothing reads the output any more; what was finished is kept, run the "
              "same command again to go on", file=sys.stderr)
        return EXIT_UNREAD
    except OSError as error:
        if error.errno not in _SURROUNDINGS:
            raise
        from utils.parallel import describe_os_error

        print(f"failed: {describe_os_error(error)}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, run the same command again to go on",
              file=sys.stderr)
        return 130
    except Terminated:
        print("terminated: what was finished is kept, run the same command again to go on",
              file=sys.stderr)
        return 143
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # while Python shuts down nobody catches it
