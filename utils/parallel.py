"""Work over slides: items on a ``concurrent.futures`` executor, a failure costing one item.

Local processes are spawned (never forked: a slide handle must not be inherited). A worker that
dies (out of memory, a crash in a C library) breaks its pool; the items then in flight are tried
once more, each alone, and only the one that kills its worker again is failed.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Generic, TypeVar

from utils.errors import MilwrightError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """One item's result, or why there is none."""

    item: Item
    result: Result | None
    error: str | None
    seconds: float


def available_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_items(
    work: Callable[..., Result],
    items: Sequence[Item],
    *,
    workers: int,
    arguments: dict[str, Any] | None = None,
) -> Iterator[Outcome[Item, Result]]:
    """Yield an ``Outcome`` for each item as it ends; order is that of completion.

    ``work(item, **arguments)`` must be importable and its arguments picklable. ``workers`` 0
    runs everything in this process. An exception in ``work`` fails that item alone.
    """
    arguments = arguments or {}
    if workers <= 0:
        for item in items:
            yield _outcome(item, _timed(work, item, arguments))
        return
    suspects: list[Item] = []
    yield from _run_pool(work, items, min(workers, max(1, len(items))), arguments, suspects)
    for item in suspects:  # alone, so that only the guilty one is failed
        again: list[Item] = []
        yield from _run_pool(work, [item], 1, arguments, again)
        if again:
            yield Outcome(item, None, "its worker process died (out of memory, or a crash in a "
                          "library): try fewer workers or a smaller batch", 0.0)


def _run_pool(
    work: Callable[..., Result], items: Sequence[Item], workers: int,
    arguments: dict[str, Any], suspects: list[Item],
) -> Iterator[Outcome[Item, Result]]:
    waiting = list(items)
    context = multiprocessing.get_context("spawn")
    while waiting:
        pool = ProcessPoolExecutor(
            max_workers=workers, mp_context=context, initializer=_follow_parent)
        running: dict[Future[tuple[Result | None, str | None, float]], Item] = {}
        broken = False
        try:
            while (waiting or running) and not broken:
                while waiting and len(running) < workers + 1:
                    item = waiting.pop(0)
                    running[pool.submit(_timed, work, item, arguments)] = item
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    item = running.pop(future)
                    try:
                        answer = future.result()
                    except BrokenProcessPool:
                        suspects.append(item)
                        broken = True
                    else:
                        yield _outcome(item, answer)
            suspects.extend(running.values())
        except BaseException:
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """End this worker when its parent is gone: a killed run leaves nobody at work."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _timed(
    work: Callable[..., Result], item: Item, arguments: dict[str, Any]
) -> tuple[Result | None, str | None, float]:
    start = time.monotonic()
    try:
        return work(item, **arguments), None, time.monotonic() - start
    except MilwrightError as error:
        return None, str(error), time.monotonic() - start
    except OSError as error:
        return None, describe_os_error(error), time.monotonic() - start
    except MemoryError:
        return None, "out of memory: try fewer workers or a smaller batch", \
            time.monotonic() - start
    except Exception as error:  # the one place where an item's failure becomes a row
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None, reason, time.monotonic() - start


def describe_os_error(error: OSError) -> str:
    """One line for a person; a full disk says how to go on."""
    import errno

    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC or error.errno == errno.EFBIG:
        return f"no space left to write{where}: free some and run the same command again"
    return f"{error.strerror or error}{where}"


def _outcome(
    item: Item, answer: tuple[Result | None, str | None, float]
) -> Outcome[Item, Result]:
    result, error, seconds = answer
    return Outcome(item, result, error, seconds)
