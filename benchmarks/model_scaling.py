"""How the cost of training on one bag grows with its patches, for every slide model, on the CPU.

    python benchmarks/model_scaling.py                                  # all, about half an hour
    python benchmarks/model_scaling.py --models transmil abmilx --rows 1000 10000 --precision bf16

A step is forward, losses, backward and Adam with each model's default options and features of
width 1024 (hag_mil with one magnification, which is the whole bag). Each line is measured in a
process of its own; "extra MB" is what the step adds to the resident memory at its peak, beyond
features, weights, gradients and Adam's moments. "grows as" gives the exponents of CPU time and
extra memory over the rows that fit all lines best: 1 is linear, 2 quadratic. A line that would
take more than --max_seconds or --max_gb, judged by two smaller bags of the model, is skipped with
its estimate; one that exceeds them all the same is stopped.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._measure import best_of, forget_peak, growth, in_new_process, median_ms, peak_mb
from benchmarks._steps import WIDTH, bag_of, training_step
from models.slide_models import SLIDE_MODELS
from utils.errors import EXIT_OK, run_script
from utils.options import option, parse
from utils.storage import write_json

_START_SECONDS = 60  # of CPU, for imports, building the model and its first small step
_LONG_SECONDS = 10  # a step of this length is timed once, its warm-up does not matter
_LEAST_MB = 1.0  # less extra memory than this is noise


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    models: tuple[str, ...] = option(tuple(SLIDE_MODELS), choices=tuple(SLIDE_MODELS),
                                     help="models to train")
    rows: tuple[int, ...] = option((1_000, 10_000, 50_000), low=1, help="patches in the bag")
    precision: Literal["fp32", "bf16"] = option(
        "fp32", help="bf16 is autocast, as main.py --precision bf16")
    repeats: int = option(3, low=1, help="steps timed, after one to warm up; the median counts "
                          "(a first step of 10 CPU seconds is the only one)")
    threads: int = option(1, low=1, help="threads of torch")
    max_seconds: float = option(240.0, low=0, help="most CPU seconds of a step")
    max_gb: float = option(6.0, low=0, help="most extra memory of a step")
    out: Path | None = option(None, help="also write the figures to this json file")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table; without times it was skipped or stopped, for the reason in ``note``.

    wall_ms, cpu_ms: medians of a step; extra_mb: peak over what was there before
    """

    model: str
    rows: int
    precision: str
    threads: int
    wall_ms: float | None = None
    cpu_ms: float | None = None
    extra_mb: float | None = None
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every model on every bag; print the table and write the json."""
    options = parse(Options, prog="benchmarks/model_scaling.py", description=__doc__ or "",
                    argv=argv, config_flag=False)
    print(f"a training step in {options.precision} on {options.threads} thread(s)\n"
          f"{'model':9} {'rows':>7} {'ms/step':>9} {'CPU ms':>9} {'extra MB':>9}")
    figures: list[Figure] = []
    growths = {}
    for model in options.models:
        lines: list[Figure] = []
        for rows in sorted(options.rows):
            lines.append(measure_within(model, rows, lines, options))
            print(describe(lines[-1]), flush=True)
        growths[model] = exponents(lines)
        time_growth, memory_growth = growths[model]
        if len(options.rows) > 1:
            print(f"{'':9} grows as rows^{time_growth:.2f} (time), rows^{memory_growth:.2f} "
                  "(memory)")
        figures += lines
    if options.out:
        write_json(options.out, {"figures": [asdict(figure) for figure in figures],
                                 "exponents": growths})
    return EXIT_OK


def describe(figure: Figure) -> str:
    """One line of the table."""
    if figure.wall_ms is None or figure.cpu_ms is None:
        return f"{figure.model:9} {figure.rows:7d} {figure.note}"
    return (f"{figure.model:9} {figure.rows:7d} {figure.wall_ms:9.1f} {figure.cpu_ms:9.1f} "
            f"{figure.extra_mb:9.0f}")


# ---------------------------------------------------------------------------- growth

def exponents(lines: Sequence[Figure]) -> tuple[float, float]:
    """How CPU time and extra memory grow with the rows; NaN with fewer than two measured bags."""
    done = [line for line in lines if line.cpu_ms is not None]
    rows = [line.rows for line in done]
    return (growth(rows, [line.cpu_ms or 0.0 for line in done]),
            growth(rows, [max(_LEAST_MB, line.extra_mb or 0.0) for line in done]))


def expected(lines: Sequence[Figure], rows: int) -> tuple[float, float] | None:
    """(CPU s, extra GB) of a step on a larger bag, by the two largest measured.

    None after fewer: a model's fixed cost (30 M parameters, say) would be taken for growth.
    """
    done = [line for line in lines if line.cpu_ms is not None][-2:]
    if len(done) < 2:
        return None
    last = done[-1]
    time_growth, memory_growth = exponents(done)
    factor = rows / last.rows
    return ((last.cpu_ms or 0.0) / 1e3 * factor ** time_growth,
            (last.extra_mb or 0.0) / 1024 * factor ** memory_growth)


# ---------------------------------------------------------------------------- one measurement

def measure_within(model: str, rows: int, smaller: Sequence[Figure], options: Options) -> Figure:
    """``measure`` in a fresh process, unless it is expected to break the limits, or breaks them."""
    here = Figure(model=model, rows=rows, precision=options.precision, threads=options.threads)
    if any(line.cpu_ms is None for line in smaller):
        return replace(here, note="skipped: a smaller bag was too much already")
    guess = expected(smaller, rows)
    if guess is not None and (guess[0] > options.max_seconds or guess[1] > options.max_gb):
        return replace(here, note=f"skipped: about {guess[0]:,.0f} s and {guess[1]:.1f} GB "
                                  "expected")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        wall, cpu, extra = in_new_process(
            measure, model, rows, options.precision, options.threads, options.repeats,
            options.max_seconds, options.max_gb)
    except BrokenProcessPool:
        return replace(here, note=f"stopped: more than {options.max_seconds:g} s a step")
    except MemoryError:
        return replace(here, note=f"stopped: more than {options.max_gb:g} GB")
    return replace(here, wall_ms=wall, cpu_ms=cpu, extra_mb=extra)


def measure(model: str, rows: int, precision: str, threads: int, repeats: int,
            max_seconds: float, max_gb: float) -> tuple[float, float, float]:
    """Median (wall ms, CPU ms) of a step and its extra memory in MB; for a process of its own.

    The kernel ends the process when it uses more CPU than all steps may; ``MemoryError`` when it
    asks for more memory than allowed.
    """
    import torch

    step = training_step(model, precision=precision, threads=threads)
    bag = bag_of(torch.randn(rows, WIDTH))
    seconds = time.process_time() + _START_SECONDS + max_seconds + _LONG_SECONDS * repeats
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), resource.RLIM_INFINITY))
    forget_peak()
    before = peak_mb()
    limit = int(_private_bytes() + max_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        wall, cpu = (1e3 * taken for taken in best_of(1, lambda: step(bag)))
        if cpu < 1e3 * _LONG_SECONDS:
            wall, cpu = median_ms(lambda: step(bag), repeats, warm_up=False)
    except RuntimeError as error:  # torch's own for memory that it does not get
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from None
        raise
    return wall, cpu, peak_mb() - before


def _private_bytes() -> int:
    """What the kernel counts against RLIMIT_DATA."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
