"""MNIST-bags (Ilse, Tomczak, Welling, ICML 2018, section 4.2): test AUC against training bags.

    python benchmarks/mnist_bags.py --data ../shared/data/mil_classic --out mnist_bags

A bag holds about ten handwritten digits (their number is normal with mean 10 and variance 2) and is
positive when one of them is a 9, which is so for about two bags in three. Bags are made of the
10,000 digits of MNIST's test part (t10k, the folder has no more): in every repeat 7,000 of them,
drawn at random, make the training bags and the other 3,000 the 1,000 test bags. A smaller training
set is the beginning of a larger one.

The paper's LeNet turns each digit into 500 numbers and is trained end to end with one of our slide
models on top of it (attention, gated attention, mean, max). Recipe, equal for all: AdamW, learning
rate 5e-4 and weight decay 1e-4 (the paper's), no dropout; epochs until --steps bags were seen, so
that all sizes cost the same; no early stopping. Prints the mean AUC and its standard error over the
repeats, and writes mnist_bags.json and mnist_bags.png to --out.
"""

from __future__ import annotations

import gzip
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks._in_memory import train_and_test
from models.slide_models import SlideModelSpec, build_slide_model
from utils.contracts import Bag
from utils.errors import EXIT_FAILED, EXIT_OK, Refused, run_script
from utils.fit_options import FitOptions
from utils.options import option, parse
from utils.parallel import available_cpus, run_items
from utils.seeding import derive_seed, seed_everything
from utils.storage import writable_folder, write_bytes, write_json

DIGIT_PX = 28
IMAGES, LABELS = "mnist_t10k-images-idx3-ubyte.gz", "mnist_t10k-labels-idx1-ubyte.gz"
TARGET = 9  # makes a bag positive: easily taken for a 4 or a 7
BAG_MEAN, BAG_VARIANCE = 10.0, 2.0  # digits in a bag
TRAINING_DIGITS, TEST_BAGS = 7_000, 1_000
PIXEL_MEAN, PIXEL_DEVIATION = 0.1307, 0.3081  # of MNIST, in shares of 255
FIT = FitOptions(opt="adamw", lr=5e-4, reg=1e-4)
MODELS: dict[str, dict[str, Any]] = {
    "attention": {"model_type": "abmil", "gated": False},
    "gated attention": {"model_type": "abmil"},
    "mean": {"model_type": "mean"},
    "max": {"model_type": "max"},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options."""

    data: Path = option(ROOT.parent / "shared/data/mil_classic",
                        help=f"folder with {IMAGES} and {LABELS}")
    models: tuple[str, ...] = option(tuple(MODELS), help="poolings", choices=list(MODELS))
    bags: tuple[int, ...] = option((50, 100, 150, 200, 300, 400, 500), low=1,
                                   help="training bags, one point of the curve each")
    steps: int = option(2000, help="least number of training steps, of a bag each", low=1)
    repeats: int = option(3, help="draws of digits and bags", low=1)
    seed: int = option(1, help="seed of bags and training", low=0, high=2**32 - 1)
    workers: int = option(available_cpus(), help="processes; 0: only this one", low=0)
    out: Path = option(Path("mnist_bags"), help="folder for the json and the picture")


Curves = dict[str, dict[int, list[float]]]  # model -> training bags -> AUC of each repeat


class Job(NamedTuple):
    """One point of one curve."""

    model: str
    n_bags: int
    repeat: int


def main(argv: Sequence[str] | None = None) -> int:
    """Train every model on every number of bags; print the table, write the files."""
    options = parse(Options, prog="benchmarks/mnist_bags.py", description=__doc__ or "",
                    argv=argv, config_flag=False)
    read_digits(options.data)
    writable_folder(options.out, what="--out")
    jobs = [Job(model, n_bags, repeat) for repeat in range(options.repeats)
            for model in options.models for n_bags in options.bags]
    curves: Curves = {model: {} for model in options.models}
    failures = 0
    for outcome in run_items(area_under_curve, jobs, workers=options.workers, arguments={
            "data": options.data, "steps": options.steps, "seed": options.seed}):
        model, n_bags, repeat = outcome.item
        if outcome.result is None:
            failures += 1
            print(f"{model}, {n_bags} bags, repeat {repeat}: failed: {outcome.error}",
                  file=sys.stderr)
            continue
        curves[model].setdefault(n_bags, []).append(outcome.result)
        print(f"{model}, {n_bags} bags, repeat {repeat}: AUC {outcome.result:.3f}, "
              f"{outcome.seconds:.0f} s", flush=True)
    print_table(curves)
    write_json(options.out / "mnist_bags.json", {
        "steps": options.steps, "seed": options.seed, "fit": asdict(FIT), "auc": curves})
    write_bytes(options.out / "mnist_bags.png", draw(curves))
    return EXIT_FAILED if failures else EXIT_OK


# ---------------------------------------------------------------------------- bags

def read_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 784) uint8 and labels (n,); ``Refused`` when a file is missing or no MNIST."""
    parts = []
    for name, header in ((IMAGES, 16), (LABELS, 8)):
        try:
            parts.append(gzip.decompress((folder / name).read_bytes())[header:])
        except (OSError, EOFError) as error:
            raise Refused(f"{folder / name}: {error}: give the folder of {IMAGES} and {LABELS} "
                          "with --data") from None
    labels = np.frombuffer(parts[1], np.uint8)
    if len(parts[0]) != len(labels) * DIGIT_PX**2 or len(labels) <= TRAINING_DIGITS:
        raise Refused(f"{folder}: {IMAGES} and {LABELS} do not belong together: expected 10,000 "
                      f"digits of {DIGIT_PX} x {DIGIT_PX} px")
    return np.frombuffer(parts[0], np.uint8).reshape(len(labels), -1), labels


def make_bags(images: np.ndarray, labels: np.ndarray, count: int,
              random: np.random.Generator) -> list[Bag]:
    """Bags of digits drawn with replacement; features (n, 784) are normalised pixels."""
    import torch

    bags = []
    for number in range(count):
        size = max(1, round(random.normal(BAG_MEAN, math.sqrt(BAG_VARIANCE))))
        drawn = random.integers(len(labels), size=size)
        pixels = (images[drawn].astype(np.float32) / 255 - PIXEL_MEAN) / PIXEL_DEVIATION
        bags.append(Bag(slide_id=f"bag_{number}", features=torch.from_numpy(pixels),
                        label=int((labels[drawn] == TARGET).any())))
    return bags


def training_and_test_bags(folder: Path, n_bags: int, seed: int) -> tuple[list[Bag], list[Bag]]:
    """Bags of disjoint digits; the training bags of one seed are the first of an endless row."""
    images, labels = read_digits(folder)
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = order[:TRAINING_DIGITS], order[TRAINING_DIGITS:]
    train, test = (make_bags(images[part], labels[part], count, np.random.default_rng([seed, side]))
                   for side, (part, count) in enumerate(zip(parts, (n_bags, TEST_BAGS),
                                                            strict=True)))
    return train, test


# ---------------------------------------------------------------------------- one point

def area_under_curve(job: Job, *, data: Path, steps: int, seed: int) -> float:
    """Test AUC of one model after training on ``n_bags``."""
    import torch

    from benchmarks._lenet import EMBEDDING, EndToEnd
    from utils.metrics import binary_auc

    torch.set_num_threads(1)  # several of these run beside each other
    train, test = training_and_test_bags(data, job.n_bags, derive_seed(seed, job.repeat))
    run_seed = derive_seed(seed, job.repeat, job.n_bags) % 2**32
    seed_everything(run_seed)
    spec = SlideModelSpec(embed_dim=EMBEDDING, n_classes=2, dropout=0.0, **MODELS[job.model])
    scores = train_and_test(EndToEnd(build_slide_model(spec)), train, test, replace(
        FIT, seed=run_seed, max_epochs=math.ceil(steps / job.n_bags)))
    return float(binary_auc(scores[:, 1], np.array([bag.label for bag in test])))


# ---------------------------------------------------------------------------- table and picture

def print_table(curves: Curves) -> None:
    """A line a model: mean AUC and its standard error over the repeats at each number of bags."""
    sizes = sorted({size for curve in curves.values() for size in curve})
    print("\ntraining bags    " + "".join(f"{size:<16}" for size in sizes))
    for model, curve in curves.items():
        cells = [f"{mean:.3f} +- {error:.3f}" for mean, error in map(mean_and_error, (
            curve.get(size, []) for size in sizes))]
        print(f"{model:<17}" + "".join(f"{cell:<16}" for cell in cells))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; NaN where there are too few values."""
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    return mean, float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else math.nan


def draw(curves: Curves) -> bytes:
    """The learning curves as PNG bytes; bars are standard errors."""
    from utils.plots import COLOURS, new_figure, to_png

    figure = new_figure(5.6, 4.0)
    axes = figure.add_subplot()
    for (model, curve), colour in zip(curves.items(), COLOURS, strict=False):
        means, errors = zip(*(mean_and_error(curve[size]) for size in sorted(curve)), strict=True)
        axes.errorbar(sorted(curve), means, yerr=np.nan_to_num(errors), label=model, color=colour,
                      marker="o", markersize=4, capsize=2)
    axes.set(xlabel="training bags", ylabel="test AUC", title="MNIST-bags, ten digits a bag")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    return to_png(figure)


if __name__ == "__main__":
    sys.exit(run_script(main))
