"""What the benchmarks share: times of several runs, peak memory, a process of its own, a growth."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def best_of(repeats: int, work: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds of the fastest of several runs."""
    runs = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        runs.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(runs)


def median_ms(work: Callable[[], object], repeats: int, *, warm_up: bool = True
              ) -> tuple[float, float]:
    """Median (wall, CPU) milliseconds of one call, after one to warm up unless there was one."""
    if warm_up:
        work()
    wall, cpu = [], []
    for _ in range(repeats):
        start_wall, start_cpu = time.perf_counter(), time.process_time()
        work()
        cpu.append(time.process_time() - start_cpu)
        wall.append(time.perf_counter() - start_wall)
    return statistics.median(wall) * 1e3, statistics.median(cpu) * 1e3


def growth(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The e of cost = c * size^e that fits best (least squares of the logarithms).

    1 is linear; NaN with fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        return float("nan")
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


def forget_peak() -> None:
    """Let ``peak_mb`` count from now on (Linux; elsewhere it counts from the start)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Largest resident memory of this process, in MB (not, as rusage may, of its parent too)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def gpu_mb() -> float:
    """Memory of the GPU that is free now; asking takes some, so in a process of its own."""
    import torch

    return torch.cuda.mem_get_info()[0] / 2**20


class Meter:
    """Peak of memory from here on, over what is in use now."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda if device == "cuda" else None
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        forget_peak()
        self._before = self._peak()

    def _peak(self) -> float:
        return self._cuda.max_memory_allocated() / 2**20 if self._cuda else peak_mb()

    def extra_mb(self) -> float:
        """MB."""
        return self._peak() - self._before

    def waited(self, work: Callable[[], object]) -> Callable[[], None]:
        """``work``, done when the device is done."""
        def done() -> None:
            work()
            if self._cuda:
                self._cuda.synchronize()
        return done


def in_new_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """What ``work`` returns, run where no earlier measurement has left memory behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()
