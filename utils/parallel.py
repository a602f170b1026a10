"""Work over slides: items on a pool of processes, a failure costing one item.

The pool is of this machine, or a Dask cluster (``utils.dask_cluster``): either way an item runs in
a child process (``utils.children``), so a crash in a C library or a hang costs that item alone. An
item whose process died is tried once more, when nothing else runs, as others may have used up the
memory; it fails when that process dies too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from queue import LifoQueue
from typing import Any, Generic, Protocol, Self, TypeVar

from utils.children import Child, TookTooLong, WorkerDied, pack
from utils.errors import ItemFailed, MilwrightError

Item = TypeVar("Item")
Result = TypeVar("Result")
Answer = tuple[Any, str | None, float]  # result, error, seconds

CHECK_S = 20.0  # between looks at a pool that returns nothing


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
    scheduler: str | None = None,
    deadline_s: float | None = None,
) -> Iterator[Outcome[Item, Result]]:
    """Yield an ``Outcome`` for each item as it ends; order is that of completion.

    ``work(item, **arguments)`` must be importable and its arguments picklable. ``workers`` 0
    runs everything in this process. An exception in ``work`` fails that item alone.
    scheduler: address of a Dask scheduler (``tcp://host:port``), whose workers do the items then;
    paths must mean the same there (see ``dask_cluster.check_workers``). Raises Refused when it
    cannot be reached, has no workers, or they have other code.
    deadline_s: seconds an item may take. One that takes longer fails, and its process ends after
    writing its stacks to stderr; the others go on. ``workers`` 0 then means one child process.
    """
    arguments = arguments or {}
    if scheduler is not None:
        from utils.dask_cluster import DaskPool

        with DaskPool(scheduler) as cluster:
            yield from _run_pool(cluster, work, items, arguments, deadline_s)
    elif workers > 0 or deadline_s is not None:
        with LocalPool(max(1, min(workers, len(items)))) as pool:
            yield from _run_pool(pool, work, items, arguments, deadline_s)
    else:
        for item in items:
            yield Outcome(item, *_timed(work, item, arguments))


# ---------------------------------------------------------------------------- pools

class Pool(Protocol):
    """Where calls run: on ``concurrent.futures`` of an executor."""

    @property
    def in_flight(self) -> int:
        """How many calls to submit before waiting for one."""
        ...

    def submit(self, function: Callable[[], Answer], deadline_s: float | None
               ) -> Future[Answer | ItemFailed]:
        """Run the function in a child process; why it did not come to an end is a result too."""
        ...

    def check(self) -> None:
        """Called when nothing has ended for a while: tell the user what is amiss."""
        ...


class LocalPool:
    """Child processes of this machine, each held by a thread. A context manager.

    Left by an exception (Ctrl-C, SIGTERM, an abandoned loop), it ends the children at once.
    """

    def __init__(self, workers: int) -> None:
        self.in_flight = workers + 1
        self._children = [Child() for _ in range(workers)]
        self._free: LifoQueue[Child] = LifoQueue()
        for child in self._children:
            self._free.put(child)
        self._threads = ThreadPoolExecutor(workers)

    def submit(self, function: Callable[[], Answer], deadline_s: float | None
               ) -> Future[Answer | ItemFailed]:
        """See ``Pool``."""
        return self._threads.submit(self._call, pack(function, deadline_s=deadline_s), deadline_s)

    def _call(self, payload: bytes, deadline_s: float | None) -> Answer | ItemFailed:
        child = self._free.get()
        try:
            answer: Answer = child.call(payload, deadline_s=deadline_s)
        except ItemFailed as error:
            return error
        finally:
            self._free.put(child)
        return answer

    def check(self) -> None:
        """Children are watched all the time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for child in self._children:
                child.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for child in self._children:
            child.hang_up()
        for child in self._children:
            child.end()


def _run_pool(
    pool: Pool, work: Callable[..., Result], items: Sequence[Item], arguments: dict[str, Any],
    deadline_s: float | None,
) -> Iterator[Outcome[Item, Result]]:
    suspects: list[Item] = []
    for item, answer in _answers(pool, work, items, arguments, deadline_s):
        if isinstance(answer, WorkerDied):
            suspects.append(item)
        else:
            yield _outcome(item, answer, deadline_s)
    for suspect in suspects:  # alone
        for item, answer in _answers(pool, work, [suspect], arguments, deadline_s):
            yield _outcome(item, answer, deadline_s)


def _answers(
    pool: Pool, work: Callable[..., Result], items: Sequence[Item], arguments: dict[str, Any],
    deadline_s: float | None,
) -> Iterator[tuple[Item, Answer | ItemFailed]]:
    """Each item and what became of it, with a bounded number of them handed out."""
    waiting = iter(items)
    running: dict[Future[Answer | ItemFailed], Item] = {}
    while True:
        for item in islice(waiting, max(0, pool.in_flight - len(running))):
            running[pool.submit(partial(_timed, work, item, arguments), deadline_s)] = item
        if not running:
            return
        ended, _ = wait(running, timeout=CHECK_S, return_when=FIRST_COMPLETED)
        if not ended:
            pool.check()
        for future in ended:
            yield running.pop(future), _settled(future)


def _settled(future: Future[Answer | ItemFailed]) -> Answer | ItemFailed:
    try:
        return future.result()
    except CancelledError:
        return ItemFailed("the scheduler is gone: start it and run the same command again")
    except Exception as error:  # a cluster's
        if type(error).__name__ == "KilledWorker":
            return ItemFailed("every worker that took it was lost (out of memory, or its node "
                              "went down): see the logs of the workers")
        return ItemFailed(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _outcome(item: Item, answer: Answer | ItemFailed, deadline_s: float | None
             ) -> Outcome[Item, Any]:
    if isinstance(answer, ItemFailed):
        seconds = deadline_s if isinstance(answer, TookTooLong) else None
        return Outcome(item, None, str(answer), seconds or 0.0)
    return Outcome(item, *answer)


# ---------------------------------------------------------------------------- in the worker

def _timed(work: Callable[..., Result], item: Item, arguments: dict[str, Any]) -> Answer:
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
