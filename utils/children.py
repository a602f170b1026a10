"""A child process that does one call after the other, and whose death costs that call alone.

Spawned, never forked (a slide handle must not be inherited), and ended with its parent. A call may
have a deadline: then a watchdog inside the child, which no hanging library can hold up, writes the
stacks of all its threads to stderr and ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType
from typing import Any

from utils.errors import ItemFailed, Terminated

GRACE_S = 5.0  # after a deadline, for the child's own watchdog; after a SIGTERM, before a SIGKILL
IDLE_S = 60.0  # after which a child is not used again; it ends by itself after twice this


class WorkerDied(ItemFailed):
    """The process that worked on an item is gone."""


class TookTooLong(ItemFailed):
    """An item was not done at its deadline; its process was ended."""


def pack(function: Callable[[], Any], *, deadline_s: float | None,
         dumps: Callable[[Any], Any] = ForkingPickler.dumps) -> bytes:
    """A call as the bytes that ``Child.call`` takes; ``dumps`` pickles it."""
    return bytes(dumps((function, deadline_s)))


def allow_children() -> None:
    """Let this process have child processes though it is a daemon, as Dask's workers are."""
    process = multiprocessing.current_process()
    if process.daemon:
        process.daemon = False


class Child:
    """One child process, started when first needed and again after a death.

    folder: its working directory, None = ours. One thread calls; any may ``stop``.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._last_used = 0.0
        self._stopping = False

    def call(self, payload: bytes, *, deadline_s: float | None = None) -> Any:
        """What the packed function returns.

        The clock of the deadline runs from when the child has read and imported the call.
        Raises WorkerDied, TookTooLong, ItemFailed (the call could not be read, or it raised).
        """
        link = self._ready()
        begun: float | None = None
        try:
            link.send_bytes(payload)
            link.recv_bytes()
            begun = time.monotonic()
            if not link.poll(None if deadline_s is None else deadline_s + GRACE_S):
                raise TimeoutError  # its watchdog failed: it hangs inside the kernel
            fine, answer = link.recv()
        except (EOFError, OSError):
            self.end(at_once=True)
            if deadline_s is not None and begun and time.monotonic() - begun >= deadline_s:
                raise TookTooLong(f"took longer than {deadline_s:g} s (--slide_timeout): its "
                                  "process was ended, its stack is on stderr") from None
            raise WorkerDied("its worker process died (out of memory, or a crash in a library): "
                             "try fewer workers or a smaller batch") from None
        self._last_used = time.monotonic()
        if not fine:
            raise ItemFailed(answer)
        return answer

    def hang_up(self) -> None:
        """Let an idle child end."""
        if self._connection is not None:
            self._connection.close()

    def stop(self) -> None:
        """End the child in the middle of what it does, and start none any more. Does not wait.

        SIGTERM lets it unwind; one that hangs is killed after the grace.
        """
        self._stopping = True
        process = self._process
        if process is not None:
            _signal(process.terminate)
            killer = threading.Timer(GRACE_S, _signal, [process.kill])
            killer.daemon = True
            killer.start()

    def end(self, *, at_once: bool = False) -> None:
        """Wait for the child's end; ``at_once``, or when it lingers, it is ended by signals."""
        self.hang_up()
        process, self._process, self._connection = self._process, None, None
        if process is None:
            return
        process.join(0 if at_once else GRACE_S)
        for send in (process.terminate, process.kill):
            if process.is_alive():
                _signal(send)
                process.join(GRACE_S)

    def _ready(self) -> Connection:
        if self._process is not None and (time.monotonic() - self._last_used > IDLE_S
                                          or not self._process.is_alive()):
            self.end()
        if self._process is None:
            self._start()
        if self._stopping or self._connection is None:
            self.end(at_once=True)
            raise WorkerDied("was stopped")
        return self._connection

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # A daemon is ended when this process exits, whatever it does then.
        process = context.Process(target=_serve, args=(theirs, self._folder), daemon=True)
        try:
            process.start()
        except OSError as error:
            raise ItemFailed(f"its worker process could not be started ({error.strerror}): try "
                             "fewer workers") from None
        finally:
            theirs.close()
        self._process, self._connection = process, ours
        self._last_used = time.monotonic()


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(OSError, ValueError):  # it may be gone, or its record closed
        send()


# ---------------------------------------------------------------------------- in the child

def _serve(link: Connection, folder: Path | None) -> None:
    """Do what arrives until the other end hangs up, stays silent for long, or dies."""
    _follow_parent()
    allow_children()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, _unwind)  # so that locks and temporaries go
    with contextlib.suppress(EOFError, OSError, Terminated):
        if folder is not None:
            os.chdir(folder)
        while link.poll(2 * IDLE_S):
            answer = _answer(link)
            try:
                link.send(answer)
            except OSError:
                raise
            except Exception as error:  # whatever pickling it can raise
                link.send((False, f"its result cannot be sent ({error})"))


def _unwind(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _answer(link: Connection) -> tuple[bool, Any]:
    try:
        function, deadline_s = link.recv()
    except (EOFError, OSError):
        raise
    except Exception as error:  # whatever importing the work can raise
        link.send_bytes(b"")
        return False, f"its worker process cannot import the work ({type(error).__name__}: {error})"
    link.send_bytes(b"")  # the clock starts
    if deadline_s is not None:
        faulthandler.dump_traceback_later(deadline_s, exit=True)
    try:
        return True, function()
    except Exception as error:
        return False, f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        faulthandler.cancel_dump_traceback_later()


def _follow_parent() -> None:
    """End this process when its parent is gone: a killed run leaves nobody at work."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
