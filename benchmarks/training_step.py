"""What one training step costs: forward, loss, backward and Adam on one bag, on the CPU.

    python benchmarks/training_step.py                                  # all, about three minutes
    python benchmarks/training_step.py --models clam_sb --rows 1000 10000 --precisions fp32

Each line is measured in a process of its own, on one thread unless told otherwise, features of
width 1024, model size small, dropout 0.25. "floor" is the CPU time of the matrix products that the
step cannot do without, alone, in the same process, and "share" what part of the step's CPU time
they are; "memory" is what the steps add to the resident memory at their peak, bag included. The
last column is the figure of the reference on one thread of a quiet core with fp32 products at
150 GFLOP/s, where CLAM_SB on 10,000 rows spends 53 % of its time in them.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._measure import in_new_process, peak_mb
from models.slide_models import SLIDE_MODELS, SlideModelSpec, build_slide_model
from utils.contracts import Bag, SlideModel
from utils.errors import EXIT_OK, run_script
from utils.options import option, parse
from utils.storage import write_json

if TYPE_CHECKING:
    import torch

WIDTH, HIDDEN, ATTENTION = 1024, 512, 256
# anchors, ms and MB: CLAM 53e2409, and for abmil torchmil's gated ABMIL
REFERENCE = {
    ("clam_sb", 1_000, "fp32"): (55, 52), ("clam_sb", 10_000, "fp32"): (458, 271),
    ("clam_sb", 50_000, "fp32"): (3090, 858), ("clam_sb", 1_000, "bf16"): (37, 59),
    ("clam_sb", 10_000, "bf16"): (269, 185), ("clam_sb", 50_000, "bf16"): (1522, 708),
    ("clam_mb", 1_000, "fp32"): (56, 55), ("clam_mb", 10_000, "fp32"): (528, 310),
    ("abmil", 10_000, "fp32"): (628, 254)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    models: tuple[str, ...] = option(("clam_sb", "clam_mb", "abmil", "mil"), metavar="NAME",
                                     choices=tuple(SLIDE_MODELS), help="models to train")
    rows: tuple[int, ...] = option((1_000, 10_000, 50_000), low=1, help="patches in the bag")
    precisions: tuple[str, ...] = option(("fp32", "bf16"), choices=("fp32", "bf16"),
                                         help="bf16 is autocast, as main.py --precision bf16")
    repeats: int = option(5, low=1, help="steps timed; the median counts")
    threads: int = option(1, low=1, help="threads of torch")
    json: Path | None = option(None, help="also write the figures to this file")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table: medians of wall and CPU time a step, peak over the start."""

    model: str
    rows: int
    precision: str
    wall_ms: float
    cpu_ms: float
    floor_ms: float
    memory_mb: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every combination and print the table and the growth with the bag."""
    options = parse(Options, prog="benchmarks/training_step.py", description=__doc__ or "",
                    argv=argv, config_flag=False)
    print(f"{'model':8} {'rows':>6} {'prec':4} {'ms/step':>8} {'CPU ms':>7} {'floor ms':>8} "
          f"{'share':>6} {'memory MB':>9}   reference ms, MB")
    figures = []
    for model in options.models:
        for precision in options.precisions:
            lines = [measure_alone(model, rows, precision, options.repeats, options.threads)
                     for rows in options.rows]
            for line in lines:
                print(describe(line), flush=True)
            if len(lines) > 1:
                print(f"{'':8} grows as rows^{growth(lines):.2f}")
            figures += lines
    if options.json:
        write_json(options.json, [asdict(figure) for figure in figures])
    return EXIT_OK


def describe(figure: Figure) -> str:
    """One line of the table."""
    known = REFERENCE.get((figure.model, figure.rows, figure.precision))
    reference = f"{known[0]:,}, {known[1]:,}" if known else "-"
    share = figure.floor_ms / figure.cpu_ms
    return (f"{figure.model:8} {figure.rows:6d} {figure.precision:4} {figure.wall_ms:8.1f} "
            f"{figure.cpu_ms:7.1f} {figure.floor_ms:8.1f} {share:6.0%} {figure.memory_mb:9.0f}"
            f"   {reference}")


def growth(figures: Sequence[Figure]) -> float:
    """Exponent of CPU time over rows, from the smallest to the largest bag; 1 is linear."""
    small, *_, large = sorted(figures, key=lambda figure: figure.rows)
    if small.rows == large.rows:
        return float("nan")
    return math.log(large.cpu_ms / small.cpu_ms) / math.log(large.rows / small.rows)


# ---------------------------------------------------------------------------- one measurement

def measure_alone(model: str, rows: int, precision: str, repeats: int, threads: int) -> Figure:
    """``measure`` in a fresh process, so that its peak of memory is its own."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return in_new_process(measure, model, rows, precision, repeats, threads)


def measure(model: str, rows: int, precision: str, repeats: int, threads: int) -> Figure:
    """Time whole training steps of one model, then the matrix products alone."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = build_slide_model(SlideModelSpec(model_type=model, embed_dim=WIDTH, n_classes=2))
    optimizer = torch.optim.Adam(module.train().parameters(), lr=1e-4, weight_decay=1e-5)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    step = partial(_train_step, cast(SlideModel, module), optimizer, dtype)
    step(Bag(slide_id="small", features=torch.zeros(16, WIDTH), label=1))
    start_mb = peak_mb()
    bag = Bag(slide_id="bench", features=torch.randn(rows, WIDTH), label=1)
    wall, cpu = _median_ms(lambda: step(bag), repeats)
    memory = peak_mb() - start_mb
    products = list(_products(model, rows, dtype))
    _, floor = _median_ms(lambda: [a @ b for a, b in products], repeats)
    return Figure(model=model, rows=rows, precision=precision, wall_ms=wall, cpu_ms=cpu,
                  floor_ms=floor, memory_mb=memory)


def _train_step(
    model: SlideModel, optimizer: torch.optim.Optimizer, dtype: torch.dtype, bag: Bag
) -> None:
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        for step in model.losses(bag):
            step.value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _products(
    model: str, rows: int, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The products of a step: trunk forward, its weight gradient; two gates and both gradients.

    ``mil`` has no attention, and only one patch carries gradient: its floor is the trunk forward.
    """
    import torch

    x, w = torch.randn(rows, WIDTH).to(dtype), torch.randn(WIDTH, HIDDEN).to(dtype)
    yield x, w
    if model == "mil":
        return
    h, v = torch.randn(rows, HIDDEN).to(dtype), torch.randn(HIDDEN, ATTENTION).to(dtype)
    gate = torch.randn(rows, ATTENTION).to(dtype)
    yield h.T, x
    for _ in range(2):
        yield h, v
        yield gate, v.T
        yield gate.T, h


def _median_ms(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median wall and CPU time of one call, after one to warm up."""
    work()
    wall, cpu = [], []
    for _ in range(repeats):
        start_wall, start_cpu = time.perf_counter(), time.process_time()
        work()
        cpu.append(time.process_time() - start_cpu)
        wall.append(time.perf_counter() - start_wall)
    return statistics.median(wall) * 1e3, statistics.median(cpu) * 1e3


if __name__ == "__main__":
    sys.exit(run_script(main))
