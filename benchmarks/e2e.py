"""What end-to-end training costs in time and memory, in each of its four ways, and evaluation.

    python benchmarks/e2e.py                                     # r18 at 224 px, about half an hour
    python benchmarks/e2e.py --img_size 96 --patches 128 512 --eval_patches 1000    # a quick look
    python benchmarks/e2e.py --encoders r18 r50 --device cuda --precision bf16

A step is one slide of so many 256-px patches: augmentation, encoder, aggregator, losses, backward
and Adam. All ways give the same gradient (tests/unit/test_models_e2e.py):
    plain         all patches at once, every activation held (--enc_grad graph, one chunk)
    chunked       chunk after chunk, every activation held: what ABMILX's own programs do
    cached        chunk after chunk without graph, then again with one (--enc_grad cached)
    checkpointed  what lies between the blocks of the encoder is held (--enc_grad checkpointed)
    evaluation    all patches streamed through the encoder, then the aggregator, without gradient
Each line is measured in a process of its own; "extra MB" is what it adds at its peak to resident
(on a GPU: allocated) memory, beyond weights, gradients, Adam's moments and stored pixels; in
evaluation beyond the features too. "x time" and "x MB" are ratios to plain. A line that is expected
not to fit in the free memory is skipped with the estimate: the bytes that the encoder saves for its
backward pass, counted block by block on two patches, a quarter more, and 0.25 GB.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._measure import Meter, best_of, gpu_mb, in_new_process, median_ms
from benchmarks._steps import step_of
from models.model_names import MIL_NAMES
from utils.contracts import Bag
from utils.errors import EXIT_OK, run_script
from utils.memory import available_memory_bytes
from utils.options import option, parse
from utils.storage import write_json

if TYPE_CHECKING:
    import torch
    from torch import nn

WAYS = {"plain": "graph", "chunked": "graph", "cached": "cached",
        "checkpointed": "checkpointed"}  # --enc_grad of each
EVALUATION = "evaluation"
STORED_PX = 256
_LONG_SECONDS = 10  # a step of this length is timed once, its warm-up does not matter
_MARGIN, _SCRATCH_MB = 1.25, 256.0  # for gradients on their way, and what libraries take


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a line of the table shares with its neighbours; see ``Options``."""

    encoder: str
    mil: str
    img_size: int
    img_transform: str
    p_batch_size: int
    p_batch_size_v: int
    precision: str
    device: str
    threads: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    encoders: tuple[str, ...] = option(("r18",), help="encoders: r18, r18a, r50, r50v2, "
                                       "efficientnet_lite0 or any timm model")
    mil: str = option("abmilx", choices=MIL_NAMES, help="aggregator")
    patches: tuple[int, ...] = option((128, 512, 2_048), low=1, help="patches of a training step")
    ways: tuple[str, ...] = option(tuple(WAYS), choices=tuple(WAYS), help="ways to train")
    eval_patches: tuple[int, ...] = option((1_000, 10_000), low=0,
                                           help="patches to evaluate; 0 = no evaluation")
    img_size: int = option(224, low=16, help="px of a patch as the encoder sees it")
    img_transform: Literal["none", "weak", "weak_strong", "strong", "strong_v2"] = option(
        "strong", help="augmentation in training")
    p_batch_size: int = option(64, low=1, help="patches in a chunk in training")
    p_batch_size_v: int = option(256, low=1, help="the same in evaluation")
    precision: Literal["fp32", "bf16"] = option(
        "fp32", help="bf16 is autocast, as main.py --precision bf16")
    device: Literal["cpu", "cuda"] = option("cpu", help="where to measure")
    threads: int = option(2, low=1, help="threads of torch")
    repeats: int = option(3, low=1, help="steps timed, after one to warm up; the median counts "
                          "(a first step of 10 seconds is the only one)")
    out: Path | None = option(None, help="also write the figures to this json file")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What an encoder saves for the backward pass, MB a patch.

    held: all of it; between: the inputs of its blocks; largest: of the block that saves most
    """

    held: float
    between: float
    largest: float

    def expected_mb(self, way: str, patches: int, chunk: int) -> float:
        """Extra memory of a training step or of an evaluation."""
        part = min(patches, chunk)
        held = {EVALUATION: self.largest * part, "cached": self.held * part,
                "checkpointed": self.between * patches + self.largest * part}
        return _SCRATCH_MB + _MARGIN * held.get(way, self.held * patches)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table; without times it was skipped, for the reason in ``note``.

    seconds, cpu_seconds: of a training step, or of an evaluation; extra_mb: its peak over what was
    there before; of the evaluation of a bag the features (features_mb) are taken off, and mil_mb
    is the peak of the aggregator after the encoder
    """

    encoder: str
    way: str
    patches: int
    seconds: float | None = None
    cpu_seconds: float | None = None
    extra_mb: float | None = None
    features_mb: float | None = None
    mil_mb: float | None = None
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every way with every number of patches; print the table and write the json."""
    options = parse(Options, prog="benchmarks/e2e.py", description=__doc__ or "", argv=argv,
                    config_flag=False)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    figures: list[Figure] = []
    for encoder in options.encoders:
        setup = Setup(encoder=encoder, **{name: getattr(options, name) for name in (
            "mil", "img_size", "img_transform", "p_batch_size", "p_batch_size_v", "precision",
            "device", "threads", "repeats")})
        figures += measure_encoder(setup, options.patches, options.ways, options.eval_patches)
    if options.out:
        write_json(options.out, [asdict(figure) for figure in figures])
    return EXIT_OK


def measure_encoder(setup: Setup, patches: Sequence[int], ways: Sequence[str],
                    eval_patches: Sequence[int]) -> list[Figure]:
    """The table of one encoder, printed line by line."""
    footprint = in_new_process(footprint_of, setup)
    print(f"e2e_{setup.encoder}_{setup.mil}, {STORED_PX} px to {setup.img_size} "
          f"({setup.img_transform}), {setup.precision}, {setup.device}, {setup.threads} thread(s), "
          f"chunks of {setup.p_batch_size}; saved for backward {footprint.held:.1f} MB a patch, "
          f"between blocks {footprint.between:.1f}, largest block {footprint.largest:.1f}\n"
          f"{'':12} {'patches':>7} {'s/step':>8} {'CPU s':>8} {'patches/s':>9} {'extra MB':>9} "
          f"{'x time':>6} {'x MB':>6}", flush=True)
    figures = []
    for count in sorted(patches):
        plain = None
        for way in sorted(ways, key=list(WAYS).index):
            figure = measure_if_it_fits(setup, footprint, way, count)
            plain = figure if way == "plain" else plain
            print(describe(figure, plain), flush=True)
            figures.append(figure)
    for count in sorted(set(eval_patches) - {0}):
        figures.append(measure_if_it_fits(setup, footprint, EVALUATION, count))
        print(describe(figures[-1], None), flush=True)
    return figures


def describe(figure: Figure, plain: Figure | None) -> str:
    """One line of the table, with ratios to ``plain`` if that was measured."""
    start = f"{figure.way:12} {figure.patches:7d}"
    if not figure.seconds or figure.cpu_seconds is None or figure.extra_mb is None:
        return f"{start} {figure.note}"
    line = (f"{start} {figure.seconds:8.2f} {figure.cpu_seconds:8.2f} "
            f"{figure.patches / figure.seconds:9.1f} {figure.extra_mb:9.0f}")
    if figure.mil_mb is not None:
        return (f"{line}   and {figure.features_mb:.0f} MB of features, aggregator "
                f"{figure.mil_mb:.0f} MB")
    if plain is None or not plain.seconds or not plain.extra_mb:
        return f"{line} {'-':>6} {'-':>6}"
    return (f"{line} {figure.seconds / plain.seconds:6.2f} "
            f"{figure.extra_mb / plain.extra_mb:6.2f}")


def measure_if_it_fits(setup: Setup, footprint: Footprint, way: str, patches: int) -> Figure:
    """Measured in a fresh process, unless that is expected to need more memory than is free."""
    chunk = setup.p_batch_size_v if way == EVALUATION else setup.p_batch_size
    expected = footprint.expected_mb(way, patches, chunk)
    free = available_memory_bytes() / 2**20 if setup.device == "cpu" else in_new_process(gpu_mb)
    here = Figure(encoder=setup.encoder, way=way, patches=patches)
    if expected > free:
        return replace(here, note=f"skipped: about {expected / 1024:,.1f} GB expected, "
                                  f"{free / 1024:,.1f} GB free")
    try:
        return in_new_process(evaluate if way == EVALUATION else train, setup, here)
    except BrokenProcessPool:
        return replace(here, note="stopped by the system, which was out of memory most likely")


# ---------------------------------------------------------------------------- one measurement

def train(setup: Setup, line: Figure) -> Figure:
    """Time training steps and take their peak of memory; for a process of its own."""
    model = model_of(setup, enc_grad=WAYS[line.way],
                     p_batch_size=line.patches if line.way == "plain" else setup.p_batch_size)
    step = step_of(model, precision=setup.precision, device=setup.device)
    step(bag_of(2, setup.device))  # gradients and Adam's moments are in memory now
    bag = bag_of(line.patches, setup.device)
    meter = Meter(setup.device)
    seconds, cpu = best_of(1, meter.waited(lambda: step(bag)))
    if seconds < _LONG_SECONDS:
        seconds, cpu = (1e-3 * taken for taken in median_ms(
            meter.waited(lambda: step(bag)), setup.repeats, warm_up=False))
    return replace(line, seconds=seconds, cpu_seconds=cpu, extra_mb=meter.extra_mb())


def evaluate(setup: Setup, line: Figure) -> Figure:
    """Time the evaluation of one bag and take its peaks of memory; for a process of its own."""
    import torch

    model = model_of(setup, enc_grad="auto", p_batch_size=setup.p_batch_size).eval()
    precision = torch.autocast(setup.device, torch.bfloat16, enabled=setup.precision == "bf16")
    with torch.no_grad(), precision:
        model(bag_of(2, setup.device))
        bag = bag_of(line.patches, setup.device)
        found: list[torch.Tensor] = []
        encoding = Meter(setup.device)
        first = best_of(1, encoding.waited(lambda: found.append(model.features(bag.patches))))
        extra = encoding.extra_mb()
        whole = replace(bag, features=found[0], patches=None)
        pooling = Meter(setup.device)
        then = best_of(1, pooling.waited(lambda: model(whole)))
    features_mb = found[0].nbytes / 2**20
    return replace(line, seconds=first[0] + then[0], cpu_seconds=first[1] + then[1],
                   extra_mb=extra - features_mb, features_mb=features_mb,
                   mil_mb=pooling.extra_mb())


def model_of(setup: Setup, *, enc_grad: str, p_batch_size: int) -> Any:
    """An end-to-end model with random weights, on its device."""
    import torch

    from models.e2e_encoders import encoder_width
    from models.slide_models import SlideModelSpec, build_slide_model

    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)
    spec = SlideModelSpec(
        model_type=f"e2e_{setup.encoder}_{setup.mil}", embed_dim=encoder_width(setup.encoder),
        n_classes=2, options={
            "enc_grad": enc_grad, "p_batch_size": p_batch_size,
            "p_batch_size_v": setup.p_batch_size_v, "img_size": setup.img_size,
            "img_transform": setup.img_transform})
    return build_slide_model(spec).to(setup.device)


def footprint_of(setup: Setup) -> Footprint:
    """What the encoder saves in training, by looking at every tensor it saves for two patches."""
    import torch

    model = model_of(setup, enc_grad="graph", p_batch_size=2).train()
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    blocks: list[dict[int, torch.Tensor]] = []
    inputs = []

    def run(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        saved: dict[int, torch.Tensor] = {}
        blocks.append(saved)
        inputs.append(x.nbytes)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in weights:
                saved[place] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return block(x)  # type: ignore[no-any-return]

    images = torch.rand((2, 3, setup.img_size, setup.img_size), device=setup.device).to(
        memory_format=torch.channels_last)
    with torch.autocast(setup.device, torch.bfloat16, enabled=setup.precision == "bf16"):
        model.encoder(images, run)
    sizes = [sum(one.untyped_storage().nbytes() for one in saved.values()) for saved in blocks]
    distinct = {place: one for saved in blocks for place, one in saved.items()}
    in_all = sum(one.untyped_storage().nbytes() for one in distinct.values())
    held, between, largest = (size / 2 / 2**20 for size in (in_all, sum(inputs), max(sizes)))
    return Footprint(held=held, between=between, largest=largest)


# ---------------------------------------------------------------------------- patches

class MadePatches:
    """``count`` patches of noise, ``utils.contracts.PatchImages``; a few in turn, so that memory
    holds a chunk of them."""

    def __init__(self, count: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self._count = count
        self._few = torch.randint(0, 256, (32, STORED_PX, STORED_PX, 3), dtype=torch.uint8,
                                  generator=generator)

    def __len__(self) -> int:
        return self._count

    def stream(self, most: int) -> Iterator[torch.Tensor]:
        """See ``PatchImages``."""
        import torch

        for rows in torch.arange(self._count).split(most):
            yield self._few[rows % len(self._few)]


def bag_of(patches: int, device: str) -> Bag:
    """A bag of class 1 whose features are yet to be made."""
    import torch

    return Bag(slide_id="bench", label=1, features=torch.empty((patches, 0), device=device),
               patches=MadePatches(patches))


if __name__ == "__main__":
    sys.exit(run_script(main))
