"""Train a network that finds tissue, from slides or overviews and their masks.

    python scripts/train_tissue_network.py --pairs pairs.csv --out networks/mine
    python create_patches_fp.py --segmenter network --seg_ckpt networks/mine ...

pairs.csv has the columns image (a slide, or a picture of one), mask (PNG: not 0 = tissue; or
QuPath's GeoJSON in pixels of the image) and, if you like, mpp (um per pixel of the image; needed
for pictures) and patient. Some patients are held out: they stop the training and are scored in
the report. The network is model.safetensors with model.json. About 15 MB of memory a slide.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from utils.devices import Precision, check_precision, pick_device
from utils.errors import ItemFailed, Refused, run_script
from utils.options import option, parse, pick, resolved, save_options
from utils.report import Row, RunReport, Status
from utils.storage import writable_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from datasets.tissue_pairs import Example, TissuePair
    from datasets.tissue_sampling import Tiles, TileSampler
    from models.tissue_networks import NetworkCard
    from models.tissue_training import TissueFit
    from utils.contracts import TissuePredictor

Named = list[tuple[str, "Example"]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of train_tissue_network.py."""

    pairs: Path = option(help="csv with columns image, mask[, mpp][, patient]", metavar="CSV")
    out: Path = option(help="folder for the network and its report")
    mpp: float = option(8.0, help="um per pixel that the network works at", low=0.5, high=32)
    tile_px: int = option(256, help="side of a tile, a multiple of 32", low=64, high=2048)
    arch: Literal["unet", "timm_unet"] = option(
        "unet", help="our small U-Net, or a U-Net on a timm encoder")
    width: int = option(16, help="unet: channels of the first stage", low=4, high=128)
    depth: int = option(5, help="unet: stages, each at half the resolution", low=2, high=6)
    encoder: str = option("resnet18", help="timm_unet: the encoder's name in timm")
    encoder_ckpt: Path | None = option(
        None, help="timm_unet: file with the encoder's weights, as timm publishes them "
        "(safetensors, or a state dict); without it they are random")
    val_frac: float = option(0.2, help="share of patients held out", low=0.01, high=0.9)
    batch_size: int = option(8, help="tiles a step", low=2)
    steps: int = option(100, help="steps an epoch", low=1)
    max_epochs: int = option(40, help="most epochs", low=1)
    patience: int = option(8, help="epochs without a better held-out IoU before stopping", low=1)
    lr: float = option(2e-3, help="largest learning rate (warm-up, then cosine)", low=1e-7)
    reg: float = option(1e-4, help="weight decay", low=0)
    pen_frac: float = option(0.2, help="share of tiles that get a pen stroke, which the network "
                             "learns to leave out", low=0, high=1)
    seed: int = option(1, help="seed of everything random", low=0, high=2**32 - 1)
    workers: int = option(2, help="threads that make tiles; they change no number", low=1)
    device: str = option("auto", help="auto, cpu, cuda, cuda:0 ...")
    precision: Precision = option("fp32", help="number format of the forward pass")
    overwrite: bool = option(False, help="replace a network that is in --out already")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, report; returns the exit code."""
    options = parse(Options, prog="train_tissue_network.py", argv=argv, description=__doc__ or "")
    from datasets.tissue_pairs import hold_out, read_pairs
    from datasets.tissue_sampling import TileSampler
    from models.tissue_networks import CARD_FILE, build_network, save_network
    from models.tissue_training import TissueFit
    from utils.seeding import seed_everything

    device = pick_device(options.device)
    check_precision(options.precision, device)
    card = _card(options)
    train, held = hold_out(read_pairs(options.pairs), fraction=options.val_frac, seed=options.seed)
    seed_everything(options.seed)
    network = build_network(card, encoder_file=options.encoder_ckpt)
    out = writable_folder(options.out, what="--out")
    if (out / CARD_FILE).exists() and not options.overwrite:
        raise Refused(f"--out {out} holds a network already: choose another folder or give "
                      "--overwrite")
    report = RunReport("train_tissue_network")
    examples = list(_load(train, options.mpp, report, role="training"))
    tests = list(_load(held, options.mpp, report, role="held out"))
    if not examples or not tests:
        report.write(out, options=resolved(options))
        raise ItemFailed(f"no {'training' if not examples else 'held-out'} image could be read: "
                         f"{report.rows[-1].reason}")
    sampler = TileSampler([example for _, example in examples], tile_px=options.tile_px,
                          pen_frac=options.pen_frac, seed=options.seed)
    fit = TissueFit(**pick(TissueFit, options))
    _fit(network, card, fit, sampler, tests, batch_size=options.batch_size,
         workers=options.workers, device=device)
    save_options(options, out / "options.yaml")
    save_network(out, network, card)
    report.extend(_judge_saved(out, tests, device, options.precision))
    report.write(out, options=resolved(options))
    _print_scores(report)
    report.print_summary(out)
    print(f"{out} written: use it with create_patches_fp.py --segmenter network --seg_ckpt {out}")
    return report.exit_code


def _card(options: Options) -> NetworkCard:
    """What the network is; ``Refused`` for flags that do not fit together."""
    from models.tissue_networks import NetworkCard

    plain = options.arch == "unet"
    if plain and options.encoder_ckpt is not None:
        raise Refused("--encoder_ckpt is of --arch timm_unet: give that too")
    if options.encoder_ckpt is not None and not options.encoder_ckpt.is_file():
        raise Refused(f"--encoder_ckpt {options.encoder_ckpt} is not a file")
    card = NetworkCard(
        arch=options.arch, width=options.width, depth=options.depth,
        encoder=None if plain else options.encoder, mpp_um=options.mpp, tile_px=options.tile_px)
    if card.problem():
        raise Refused(f"the network asked for {card.problem()}")
    return card


def _load(pairs: Sequence[TissuePair], mpp_um: float, report: RunReport, *, role: str
          ) -> Iterator[tuple[str, Example]]:
    """The pairs that can be read; a row for each that cannot, and for training images."""
    from datasets.tissue_pairs import load_example

    for pair in pairs:
        try:
            example = load_example(pair, mpp_um=mpp_um)
        except (ItemFailed, OSError) as error:
            report.add(Row(item=str(pair.image), status=Status.FAILED, reason=str(error),
                           numbers={"role": role}))
            continue
        if role == "training":
            report.add(Row(item=str(pair.image), status=Status.DONE, numbers={"role": role}))
        yield str(pair.image), example


def _fit(network: nn.Module, card: NetworkCard, fit: TissueFit, sampler: TileSampler, tests: Named,
         *, batch_size: int, workers: int, device: torch.device) -> None:
    from datasets.tissue_sampling import read_ahead
    from models.tissue_training import fit_tissue_network

    def batches(epoch: int) -> Iterator[Tiles]:
        return read_ahead(sampler, epoch=epoch, steps=fit.steps, batch_size=batch_size,
                          workers=workers)

    def judge(predictor: TissuePredictor) -> float:
        scores = [_scores(predictor, example)[0] for _, example in tests]
        return sum(scores) / len(scores)

    for done in fit_tissue_network(network, card, fit, batches=batches, judge=judge,
                                   device=device):
        print(f"epoch {done.epoch}: loss {done.loss:.4f}, held-out IoU {done.score:.4f}"
              + (" (best)" if done.best else ""), flush=True)


def _scores(predictor: TissuePredictor, example: Example) -> tuple[float, float]:
    from datasets.tissue_pairs import overlap

    return overlap(predictor.predict([example.rgb])[0] >= predictor.threshold, example.mask)


def _judge_saved(folder: Path, tests: Named, device: torch.device, precision: Precision
                 ) -> Iterator[Row]:
    """Rows of the held-out images, by the network as it was saved."""
    from models.tissue_networks import load_tissue_predictor

    predictor = load_tissue_predictor("network", folder, device=device, precision=precision)
    for name, example in tests:
        iou, f1 = _scores(predictor, example)
        yield Row(item=name, status=Status.DONE, numbers={
            "role": "held out", "iou": round(iou, 4), "f1": round(f1, 4)})


def _print_scores(report: RunReport) -> None:
    rows = [row for row in report.rows if "iou" in row.numbers]
    means = (sum(row.numbers[name] for row in rows) / len(rows) for name in ("iou", "f1"))
    print("held out: {} images, IoU {:.3f}, F1 {:.3f}".format(len(rows), *means))


if __name__ == "__main__":
    sys.exit(run_script(main))
