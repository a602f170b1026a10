"""Items on the workers of a Dask cluster: ``--scheduler tcp://host:port``.

A worker runs each item in a child process of its own (``utils.children``), in the folder the run
was started in: a crash, a hang or a library that keeps the interpreter lock never takes the worker
along, and code is imported afresh for each run. When a worker itself is lost (preempted, its node
down), the scheduler gives its items to others, as often as its setting
``distributed.scheduler.allowed-failures`` says.

Workers need the same Python packages, this checkout on their path (start them with
``PYTHONPATH=<checkout>``), and the same paths to slides and results; all three are checked before
the work. ``scripts/cluster/slurm_dask.sh`` starts such a cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import utils
from utils.children import Child, allow_children, pack
from utils.errors import ItemFailed, Refused
from utils.temporaries import temp_prefix

if TYPE_CHECKING:
    from distributed import Client

    from utils.parallel import Answer

CONNECT_S = 5.0  # to reach the scheduler
WORKERS_S = 60.0  # for the first worker to join it
COUNT_S = 5.0  # between looks at how many threads the cluster has
CODE_ROOT = Path(utils.__file__).resolve().parents[1]


# ---------------------------------------------------------------------------- before the work

@contextlib.contextmanager
def connect(scheduler: str) -> Iterator[Client]:
    """A client of the scheduler, which has workers.

    Raises Refused: ``distributed`` is not installed, no such address, nobody answers there, no
    worker joins within a minute.
    """
    try:
        from distributed import Client
    except ImportError:
        raise Refused("--scheduler needs Dask: pip install 'dask[distributed]'") from None
    for name in ("distributed", "distributed.client"):  # we say it in one line, without traces
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not scheduler.startswith(("tcp://", "tls://")):
        raise Refused(f"--scheduler {scheduler}: an address like tcp://host:8786 was expected")
    try:
        client = Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError):
        raise Refused(f"--scheduler {scheduler}: no Dask scheduler answers there within "
                      f"{CONNECT_S:g} s: start one (dask scheduler), or check host and port"
                      ) from None
    with client:
        if not client.nthreads():
            print(f"waiting for workers of {scheduler}", file=sys.stderr)
        try:
            client.wait_for_workers(1, timeout=WORKERS_S)
        except TimeoutError:
            raise Refused(f"--scheduler {scheduler}: has no workers: start some, with PYTHONPATH="
                          f"{CODE_ROOT} dask worker {scheduler}") from None
        yield client


def check_workers(scheduler: str, folders: Sequence[Path]) -> None:
    """Raise Refused unless every worker has our code and sees these folders as we do.

    A folder that we can write is proven to be the same one by a file that we put there for a
    moment, and must be writable for the workers too; of others only the existence is checked.
    """
    with connect(scheduler) as client:
        _check(client, folders)


Probe = tuple[str, str, bool]  # folder, what a worker must find, must it be able to write there


def _check(client: Client, folders: Sequence[Path]) -> None:
    with contextlib.ExitStack() as stack:
        probes = [_probe(folder.resolve(), stack) for folder in (Path.cwd(), *folders)]
        answers = client.run(_inspection(probes), on_error="return")
    for worker, answer in sorted(answers.items()):
        if isinstance(answer, BaseException):
            raise Refused(f"worker {worker} could not be checked ({type(answer).__name__}: "
                          f"{answer}): it needs the same Python packages as this machine")
        version, problem = answer
        if problem:
            raise Refused(f"worker {worker} {problem}")
        if version != utils.__version__:
            raise Refused(f"worker {worker} has version {version} of this toolkit, this is "
                          f"{utils.__version__}: start it with PYTHONPATH={CODE_ROOT}")


def _probe(folder: Path, stack: contextlib.ExitStack) -> Probe:
    """The folder, and a file in it for as long as the stack is open, where that can be made."""
    try:
        handle, path = tempfile.mkstemp(dir=folder, prefix=temp_prefix())
    except OSError:
        return str(folder), str(folder), False
    os.close(handle)
    stack.callback(os.unlink, path)
    return str(folder), path, True


def _inspection(probes: Sequence[Probe]) -> Callable[[], tuple[str, str]]:
    """A function that travels by its code, as a worker may not have this module."""
    root = str(CODE_ROOT)

    def inspect() -> tuple[str, str]:
        import importlib
        import os

        try:
            importlib.import_module("utils.dask_cluster")
            from utils import __version__
        except ImportError as error:
            return "", f"cannot import this toolkit ({error}): start it with PYTHONPATH={root}"
        for folder, path, write in probes:
            if not os.path.exists(path):
                return "", (f"does not see the folder {folder} of this machine: use one that all "
                            "of them share, by the same path")
            if write and not os.access(folder, os.W_OK):
                return "", f"may not write in {folder}: change its permissions"
        return __version__, ""

    return inspect


# ---------------------------------------------------------------------------- the pool

class DaskPool:
    """A ``parallel.Pool`` of a Dask cluster. A context manager; raises Refused as ``connect``."""

    def __init__(self, scheduler: str) -> None:
        self._scheduler = scheduler
        self._run = uuid.uuid4().hex
        self._stack = contextlib.ExitStack()
        self._counted_at = -COUNT_S
        self._threads = 1
        self._warned = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._client = stack.enter_context(connect(self._scheduler))
            _check(self._client, ())
            self._executor = self._client.get_executor(pure=False)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if self._client.status != "running":
                return
            self._executor.shutdown(wait=False)  # takes back what has not begun
            self._client.run(end_children, self._run, at_once=kind is not None, on_error="ignore")

    @property
    def in_flight(self) -> int:
        """Twice the threads of the cluster, as it is now: workers may come and go."""
        if time.monotonic() - self._counted_at > COUNT_S and self._client.status == "running":
            self._threads = sum(self._client.nthreads().values())
            self._counted_at = time.monotonic()
        return 2 * max(1, self._threads)

    def submit(self, function: Callable[[], Answer], deadline_s: float | None
               ) -> Future[Answer | ItemFailed]:
        """See ``parallel.Pool``."""
        # It comes with Dask, and takes functions of a script as well.
        from cloudpickle import dumps  # type: ignore[import-untyped]

        if self._client.status != "running":  # its scheduler is gone: nothing would come back
            gone: Future[Answer | ItemFailed] = Future()
            gone.cancel()
            gone.set_running_or_notify_cancel()
            return gone
        payload = pack(function, deadline_s=deadline_s, dumps=dumps)
        future: Future[Answer | ItemFailed] = self._executor.submit(
            perform, self._run, payload, os.getcwd(), deadline_s)
        return future

    def check(self) -> None:
        """Say once that the cluster has no workers left; the scheduler keeps their items."""
        if not self._warned and self._client.status == "running" and not self._client.nthreads():
            self._warned = True
            print(f"warning: {self._scheduler} has no workers left: waiting for new ones "
                  "(Ctrl-C ends the run, what was finished is kept)", file=sys.stderr)


# ---------------------------------------------------------------------------- in the worker

_children: dict[tuple[str, int], Child] = {}  # of a run and a thread of this worker


def perform(run: str, payload: bytes, folder: str, deadline_s: float | None) -> Any:
    """Run a packed call in this thread's child process; why it failed is returned, not raised."""
    allow_children()
    child = _children.setdefault((run, threading.get_ident()), Child(Path(folder)))
    try:
        return child.call(payload, deadline_s=deadline_s)
    except ItemFailed as error:
        return error


def end_children(run: str, *, at_once: bool) -> None:
    """End the child processes of a run in this worker; does not wait for them."""
    for key in [key for key in _children if key[0] == run]:
        child = _children.pop(key)
        if at_once:
            child.stop()
        else:
            child.hang_up()
