"""What streaming a whole image through a network costs, beside ordinary autograd.

    python benchmarks/streaming.py                                      # ResNet-34, some 7 minutes
    python benchmarks/streaming.py --sizes 8192 --ways auto --budget_gb 3            # 5 minutes
    python benchmarks/streaming.py --sizes 512 1024 --budget_gb 0.3 0.5              # a quick look
    python benchmarks/streaming.py --device cuda --precision bf16 --sizes 4096 16384 --budget_gb 8

A step is one square image of noise: the network up to its last map, the mean (or maximum) over the
map, a linear layer, cross entropy, backward, SGD with momentum. All ways give the same gradient
(tests/unit/test_models_stream_budget.py); its norm is printed. With --head max most tiles have no
gradient in the second pass and are left out there, so mean, the default, is the worst case.
    ordinary  the network on the whole image, every activation held
    auto      groups and tiles as models/stream_budget.py chooses them for each of --budget_gb
    flat      one group of tiles, no map but the last held, for the last of --budget_gb: memory does
              not grow with the image
Each line is measured in a process of its own, the fastest of --repeats steps (one, where a step
takes a minute). "extra MB" is the peak of resident (on a GPU: allocated) memory beyond weights,
gradients and momentum; the image is read window by window and is never in memory as a whole, but
for ordinary. "expected" is what the choice was made by: memory of tensors, and time as a multiple
of an ordinary step; resident memory is more by the pieces that the C library keeps between blocks.
"x time" and "x MB" are ratios to ordinary. Lines that would not fit in the free memory are skipped.
First the tiles of an image are counted, for the table of the specification (streaming.md 6): other
counts are an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._measure import Meter, best_of, gpu_mb, in_new_process
from utils.devices import autocast, keep_freed_memory
from utils.errors import EXIT_FAILED, EXIT_OK, Refused, run_script
from utils.memory import available_memory_bytes
from utils.options import option, parse
from utils.storage import write_json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from models.locality import Step
    from models.stream_budget import Group

WAYS = ("ordinary", "auto", "flat")
_LONG_SECONDS = 60.0  # a step of this length is timed once
_WARM_UP_PX = 256
# Tiles of an image of so many px, ResNet-34 up to a part of it: (end, tile px, image px, tiles).
TILE_COUNTS = (
    ("layer3", 2048, 16384, 121), ("layer3", 5120, 16384, 16), ("layer4.0", 2048, 16384, 144),
    ("layer4.0", 5120, 16384, 16), ("layer4", 2048, 16384, 196), ("layer4", 3584, 16384, 36),
    ("layer4", 5120, 16384, 16), ("layer4", 2048, 8192, 49))


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a line of the table shares with its neighbours; see ``Options``."""

    network: str
    head: str
    precision: Literal["fp32", "bf16"]
    device: str
    threads: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    network: str = option("resnet34", help="resnet34 or any CNN of timm with stages")
    sizes: tuple[int, ...] = option((1024, 2048, 4096), low=32, help="sides of the images in px")
    ways: tuple[str, ...] = option(WAYS, choices=WAYS, help="ways to compute a step")
    budget_gb: tuple[float, ...] = option((1.0, 2.0), low=0.0, help="memory for auto, in GB; "
                                          "flat has the last")
    head: Literal["mean", "max"] = option("mean", help="what is made of the map")
    precision: Literal["fp32", "bf16"] = option(
        "fp32", help="bf16 is autocast, as main.py --precision bf16")
    device: Literal["cpu", "cuda"] = option("cpu", help="where to measure")
    threads: int = option(2, low=1, help="threads of torch")
    repeats: int = option(2, low=1, help="steps timed, after one on a small image; the fastest "
                          "counts (one of a minute is the only one)")
    out: Path | None = option(None, help="also write the figures to this json file")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table; without times it was skipped, for the reason in ``note``.

    budget_gb: what the choice had; groups: what was chosen; expected_x, expected_mb: its time (1 =
    an ordinary step) and memory as expected; gradient: norm over all parameters of the network
    """

    way: str
    size_px: int
    budget_gb: float | None = None
    groups: str = ""
    expected_x: float | None = None
    expected_mb: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    extra_mb: float | None = None
    gradient: float | None = None
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Count tiles, measure every way at every size; print the table and write the json."""
    options = parse(Options, prog="benchmarks/streaming.py", description=__doc__ or "", argv=argv,
                    config_flag=False)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    right = count_tiles()
    setup = Setup(**{name: getattr(options, name) for name in (
        "network", "head", "precision", "device", "threads", "repeats")})
    print(f"\n{setup.network}, {setup.head} of the map, {setup.precision}, {setup.device}, "
          f"{setup.threads} thread(s)\n{'':8} {'px':>6} {'GB':>5} {'s/step':>8} {'CPU s':>8} "
          f"{'s/MP':>6} {'extra MB':>9} {'expected':>8} {'x time':>6} {'expected':>8} {'x MB':>6} "
          f"{'gradient':>10}", flush=True)
    figures = []
    for size_px in sorted(options.sizes):
        ordinary = None
        for line in lines_of(size_px, options.ways, options.budget_gb):
            figures.append(measure_if_it_fits(setup, line))
            ordinary = figures[-1] if line.way == "ordinary" else ordinary
            print(describe(figures[-1], ordinary), flush=True)
    if options.out:
        write_json(options.out, [asdict(figure) for figure in figures])
    return EXIT_OK if right else EXIT_FAILED


def lines_of(size_px: int, ways: Sequence[str], budgets_gb: Sequence[float]) -> list[Figure]:
    """What is to be measured at one size."""
    budgets: dict[str, Sequence[float | None]] = {
        "ordinary": [None], "auto": budgets_gb, "flat": budgets_gb[-1:]}
    return [Figure(way=way, size_px=size_px, budget_gb=budget)
            for way in sorted(ways, key=WAYS.index) for budget in budgets[way]]


def describe(figure: Figure, ordinary: Figure | None) -> str:
    """A line of the table, with ratios to ``ordinary`` if that was measured, and the groups."""
    budget = "" if figure.budget_gb is None else f"{figure.budget_gb:.1f}"
    start = f"{figure.way:8} {figure.size_px:6d} {budget:>5}"
    if not figure.seconds or figure.cpu_seconds is None or figure.extra_mb is None:
        return f"{start} {figure.note}"
    expected = ["" if figure.expected_mb is None else f"{figure.expected_mb:.0f}",
                "" if figure.expected_x is None else f"{figure.expected_x:.2f}"]
    ratios = ["-", "-"]
    if ordinary is not None and ordinary.seconds and ordinary.extra_mb:
        ratios = [f"{figure.seconds / ordinary.seconds:.2f}",
                  f"{figure.extra_mb / ordinary.extra_mb:.3f}"]
    return (f"{start} {figure.seconds:8.2f} {figure.cpu_seconds:8.2f} "
            f"{figure.seconds / figure.size_px**2 * 1e6:6.2f} {figure.extra_mb:9.0f} "
            f"{expected[0]:>8} {ratios[0]:>6} {expected[1]:>8} {ratios[1]:>6} "
            f"{figure.gradient:10.6g}" + (f"\n{'':15} {figure.groups}" if figure.groups else ""))


def measure_if_it_fits(setup: Setup, line: Figure) -> Figure:
    """Measured in a fresh process, unless that is expected to need more memory than is free."""
    free_mb = (available_memory_bytes() / 2**20 if setup.device == "cpu"
               else in_new_process(gpu_mb))
    try:
        return in_new_process(train, setup, line, free_mb)
    except Refused as error:
        return replace(line, note=f"skipped: {error}")
    except BrokenProcessPool:
        return replace(line, note="stopped by the system, which was out of memory most likely")


# ---------------------------------------------------------------------------- one measurement

def train(setup: Setup, line: Figure, free_mb: float) -> Figure:
    """Time training steps and take their peak of memory; for a process of its own.

    ``Refused`` when ``free_mb`` or the budget would not do.
    """
    import torch
    from torch import nn

    keep_freed_memory()
    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)
    stages = stages_of(setup.network)
    steps = [step for stage in stages for step in stage]
    groups = choose(setup, line, stages, free_mb)
    parts = [] if line.way == "ordinary" else groups
    network = nn.Sequential(*(step.module for step in steps)).to(setup.device)
    head = nn.Linear(steps[-1].locality.out_channels, 2).to(setup.device)
    optimiser = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=1e-6, momentum=0.9)
    image = MadeImage(line.size_px, setup.device)
    norms: list[float] = []

    def step(x: MadeImage, parts: Sequence[Group]) -> None:
        optimiser.zero_grad(set_to_none=True)
        with autocast(setup.precision, torch.device(setup.device)):
            found = map_of(x, network, parts)
            pooled = found.float().mean((2, 3)) if setup.head == "mean" else (
                found.float().amax((2, 3)))
            logits = head(pooled)
        loss = nn.functional.cross_entropy(logits.float(), torch.ones(1, dtype=torch.long,
                                                                      device=setup.device))
        loss.backward()  # type: ignore[no-untyped-call]
        norms.append(float(nn.utils.get_total_norm(
            [one.grad for one in network.parameters() if one.grad is not None])))
        optimiser.step()

    step(MadeImage(_WARM_UP_PX, setup.device), [])  # gradients and momentum are in memory now
    meter = Meter(setup.device)
    seconds, cpu = best_of(1, meter.waited(lambda: step(image, parts)))
    if setup.repeats > 1 and seconds < _LONG_SECONDS:
        again = best_of(setup.repeats - 1, meter.waited(lambda: step(image, parts)))
        seconds, cpu = min((seconds, cpu), again)
    return replace(line, seconds=seconds, cpu_seconds=cpu, extra_mb=meter.extra_mb(),
                   gradient=norms[1], groups=" | ".join(map(described, parts)),
                   expected_x=sum(group.work for group in groups),
                   expected_mb=max(group.peak_bytes for group in groups) / 2**20)


def map_of(image: MadeImage, network: nn.Module, groups: Sequence[Group]) -> torch.Tensor:
    """(1, C, h, w): streamed in these groups, or, without any, by the network as it is."""
    from models.stream_budget import run_groups

    if groups:
        return run_groups(groups, image)
    whole = (slice(0, image.size[0]), slice(0, image.size[1]))
    found: torch.Tensor = network(image.prepare(image.read(whole)))
    return found


def choose(setup: Setup, line: Figure, stages: Sequence[Sequence[Step]], free_mb: float
           ) -> list[Group]:
    """The groups of a line, of ordinary one that is held; ``Refused`` when memory is short."""
    from models.stream_budget import plan_groups
    from models.streaming_stages import ends

    def planned(budget_bytes: float, flat: bool = False) -> list[Group]:
        return plan_groups(
            [step for stage in stages for step in stage], (line.size_px, line.size_px),
            budget_bytes=int(budget_bytes), store_maps="none" if flat else "auto", grad=True,
            bytes_per_value=2 if setup.precision == "bf16" else 4, boundaries=ends(stages))

    if line.budget_gb is not None:
        if line.budget_gb * 1e9 > free_mb * 2**20:
            raise Refused(f"{free_mb / 1024:,.1f} GB free")
        return planned(line.budget_gb * 1e9, line.way == "flat")
    whole = planned(1e15)  # everything held
    expected_mb = max(group.peak_bytes for group in whole) / 2**20
    if expected_mb > free_mb:
        raise Refused(f"about {expected_mb / 1024:,.1f} GB expected, {free_mb / 1024:,.1f} GB free")
    return whole


def stages_of(network: str) -> list[list[Step]]:
    """The steps of a network with random weights, stage by stage, up to the last map."""
    import torch

    from models.e2e_encoders import build_encoder
    from models.streaming_stages import align_padding, freeze_norms, split_stages

    encoder = build_encoder(network).eval()
    align_padding(encoder)
    freeze_norms(encoder)
    return split_stages(encoder.to(memory_format=torch.channels_last).stages(), None)[0]


def described(group: Group) -> str:
    """"stem..layer1.2: 4 x 1 tiles of 1088 x 4096 px" or "layer4.0..layer4.2: held"."""
    first, last = group.steps[0].name, group.steps[-1].name
    span = first if first == last else f"{first}..{last}"
    if group.plan is None:
        return f"{span}: held"
    rows, columns = (len({tile.window[axis].start for tile in group.plan.tiles}) for axis in (0, 1))
    height, width = (max(tile.window[axis].stop - tile.window[axis].start
                         for tile in group.plan.tiles) for axis in (0, 1))
    return f"{span}: {rows} x {columns} tiles of {height} x {width}"


def count_tiles() -> bool:
    """Print the table of tile counts of the specification; are all as they should be?"""
    from models.stream_tiles import plan_tiles

    steps = [step for stage in stages_of("resnet34") for step in stage]
    print(f"tiles of ResNet-34, each pass\n{'up to':9} {'tile px':>7} {'image px':>8} {'tiles':>6}")
    right = True
    for end, tile_px, image_px, expected in TILE_COUNTS:
        last = max(number for number, step in enumerate(steps)
                   if step.name == end or step.name.startswith(f"{end}."))
        found = len(plan_tiles(steps[:last + 1], (image_px, image_px), (tile_px, tile_px)).tiles)
        print(f"{end:9} {tile_px:7d} {image_px:8d} {found:6d}"
              f"{'' if found == expected else f'  but {expected} expected'}")
        right &= found == expected
    return right


class MadeImage:
    """A square image of noise, ``models.streaming.ImageTiles``: one small piece again and again,
    so that memory holds what was read."""

    channels = 3

    def __init__(self, side_px: int, device: str) -> None:
        import torch

        self.size = side_px, side_px
        self._device = device
        self._piece = torch.randint(0, 256, (331, 331, 3), dtype=torch.uint8,
                                    generator=torch.Generator().manual_seed(0))

    def read(self, window: tuple[slice, slice]) -> torch.Tensor:
        """(h, w, 3) uint8."""
        import torch

        rows, columns = (torch.arange(part.start, part.stop) % 331 for part in window)
        return self._piece[rows][:, columns]

    def prepare(self, raw: torch.Tensor) -> torch.Tensor:
        """(1, 3, h, w) in -1..1."""
        return raw.movedim(-1, 0)[None].to(self._device).float().div_(127.5).sub_(1.0)


if __name__ == "__main__":
    sys.exit(run_script(main))
