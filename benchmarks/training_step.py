"""What one training step costs: forward, loss, backward and Adam on one bag, on the CPU.

    python benchmarks/training_step.py                                  # all, about five minutes
    python benchmarks/training_step.py --models clam_sb --rows 10000 --precisions fp32 --threads 2

Each line is measured in a process of its own, on one and on two threads, features of
width 1024, model size small, dropout 0.25. "floor" is the CPU time of the matrix products that the
step cannot do without, alone, in the same process, and "share" what part of the step's CPU time
they are; "memory" is what the steps add to the resident memory at their peak, bag included. The
last column is the figure of the reference on one thread of a quiet core with fp32 products at
150 GFLOP/s, where CLAM_SB on 10,000 rows spends 53 % of its time in them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._measure import growth, in_new_process, median_ms, peak_mb
from benchmarks._steps import WIDTH, bag_of, training_step
from utils.errors import EXIT_OK, run_script
from utils.options import option, parse
from utils.storage import write_json

if TYPE_CHECKING:
    import torch

HIDDEN, ATTENTION = 512, 256
MODELS = ("clam_sb", "clam_mb", "abmil", "mil")  # those whose products are known here
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

    models: tuple[str, ...] = option(MODELS, choices=MODELS, help="models to train")
    rows: tuple[int, ...] = option((1_000, 10_000, 50_000), low=1, help="patches in the bag")
    precisions: tuple[str, ...] = option(("fp32", "bf16"), choices=("fp32", "bf16"),
                                         help="bf16 is autocast, as main.py --precision bf16")
    repeats: int = option(5, low=1, help="steps timed; the median counts")
    threads: tuple[int, ...] = option((1, 2), low=1, help="threads of torch")
    json: Path | None = option(None, help="also write the figures to this file")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table: medians of wall and CPU time a step, peak over the start."""

    model: str
    rows: int
    precision: str
    threads: int
    wall_ms: float
    cpu_ms: float
    floor_ms: float
    memory_mb: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every combination and print the table and the growth with the bag."""
    options = parse(Options, prog="benchmarks/training_step.py", description=__doc__ or "",
                    argv=argv, config_flag=False)
    print(f"{'model':8} {'rows':>6} {'prec':4} {'threads':>7} {'ms/step':>8} {'CPU ms':>7} "
          f"{'floor ms':>8} {'share':>6} {'memory MB':>9}   reference ms, MB")
    figures = []
    for model, precision, threads in product(options.models, options.precisions, options.threads):
        lines = []
        for rows in options.rows:
            lines.append(measure_alone(model, rows, precision, options.repeats, threads))
            print(describe(lines[-1]), flush=True)
        if len(lines) > 1:
            exponent = growth([line.rows for line in lines], [line.cpu_ms for line in lines])
            print(f"{'':8} grows as rows^{exponent:.2f}")
        figures += lines
    if options.json:
        write_json(options.json, [asdict(figure) for figure in figures])
    return EXIT_OK


def describe(figure: Figure) -> str:
    """One line of the table."""
    known = REFERENCE.get((figure.model, figure.rows, figure.precision))
    reference = f"{known[0]:,}, {known[1]:,}" if known and figure.threads == 1 else "-"
    share = figure.floor_ms / figure.cpu_ms
    return (f"{figure.model:8} {figure.rows:6d} {figure.precision:4} {figure.threads:7d} "
            f"{figure.wall_ms:8.1f} {figure.cpu_ms:7.1f} {figure.floor_ms:8.1f} {share:6.0%} "
            f"{figure.memory_mb:9.0f}   {reference}")


# ---------------------------------------------------------------------------- one measurement

def measure_alone(model: str, rows: int, precision: str, repeats: int, threads: int) -> Figure:
    """``measure`` in a fresh process, so that its peak of memory is its own."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return in_new_process(measure, model, rows, precision, repeats, threads)


def measure(model: str, rows: int, precision: str, repeats: int, threads: int) -> Figure:
    """Time whole training steps of one model, then the matrix products alone."""
    import torch
    from torch.nn.functional import linear

    step = training_step(model, precision=precision, threads=threads)
    start_mb = peak_mb()
    bag = bag_of(torch.randn(rows, WIDTH))
    wall, cpu = median_ms(lambda: step(bag), repeats)
    memory = peak_mb() - start_mb
    products = [(x.bfloat16(), w.bfloat16()) if precision == "bf16" else (x.to_mkldnn(), w)
                for x, w in _products(model, rows)]  # oneDNN is the fastest for either
    _, floor = median_ms(lambda: [linear(x, w) for x, w in products], repeats)
    return Figure(model=model, rows=rows, precision=precision, threads=threads, wall_ms=wall,
                  cpu_ms=cpu, floor_ms=floor, memory_mb=memory)


def _products(model: str, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows (n, k) and weights (m, k) of the products of a step.

    Trunk forward, its weight gradient; two gates and both gradients. ``mil`` has no attention, and
    only one patch carries gradient: its floor is the trunk forward.
    """
    import torch

    yield torch.randn(rows, WIDTH), torch.randn(HIDDEN, WIDTH)
    if model == "mil":
        return
    yield torch.randn(HIDDEN, rows), torch.randn(WIDTH, rows)
    for _ in range(2):
        yield torch.randn(rows, HIDDEN), torch.randn(ATTENTION, HIDDEN)
        yield torch.randn(rows, ATTENTION), torch.randn(HIDDEN, ATTENTION)
        yield torch.randn(ATTENTION, rows), torch.randn(HIDDEN, rows)


if __name__ == "__main__":
    sys.exit(run_script(main))
