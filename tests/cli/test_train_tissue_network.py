"""scripts/train_tissue_network.py: a network is trained, judged, and segments a new overview."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.tissue_pairs import overlap
from models.tissue_networks import load_tissue_predictor
from models.tissue_training import TissueFit, fit_tissue_network, tissue_loss
from models.tissue_unet import build_unet
from scripts import train_tissue_network
from tests.slides import tissue_image
from utils.errors import ItemFailed, Refused
from utils.report import Status

SMALL = ("--width", 8, "--depth", 3, "--tile_px", 96, "--batch_size", 4, "--device", "cpu")
SHORT = (*SMALL[:2], "--depth", 2, "--tile_px", 64, "--batch_size", 2, "--steps", 2,
         "--max_epochs", 1, "--workers", 1, "--device", "cpu")


def truth(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(np.ptp(rgb, axis=2) > 10)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of five overviews of 320 x 240 px at 8 um."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["image,mask,mpp"]
    for seed in range(5):
        rgb = tissue_image(320, 240, seed=seed)
        Image.fromarray(rgb).save(folder / f"{seed}.png")
        Image.fromarray(truth(rgb)).save(folder / f"{seed}_mask.png")
        lines.append(f"{seed}.png,{seed}_mask.png,8")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def train(pairs: Path, out: Path, *flags: object) -> int:
    return train_tissue_network.main(
        ["--pairs", str(pairs), "--out", str(out), *map(str, flags)])


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "report_train_tissue_network.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_from_the_shell_to_a_mask(pairs: Path, tmp_path: Path,
                                  run_script: Callable[..., CompletedProcess[str]]) -> None:
    done = run_script("scripts/train_tissue_network.py", "--pairs", pairs, "--out", tmp_path / "n",
                      *SMALL, "--steps", 20, "--max_epochs", 2, "--pen_frac", 0)
    assert done.returncode == 0, done.stderr
    assert "epoch 1: loss" in done.stdout and "--seg_ckpt" in done.stdout
    predictor = load_tissue_predictor("network", tmp_path / "n", device="cpu")
    rgb = tissue_image(400, 260, seed=77)
    iou, _ = overlap(predictor.predict([rgb])[0] >= predictor.threshold, truth(rgb))
    assert iou > 0.8
    assert predictor.mpp_um == 8.0
    found = {row["item"]: row for row in rows(tmp_path / "n")}
    assert len(found) == 5
    held = [row for row in found.values() if row["role"] == "held out"]
    assert len(held) == 1 and float(held[0]["iou"]) > 0.8 and float(held[0]["f1"]) > 0.88
    assert sorted(path.name for path in (tmp_path / "n").iterdir()) == [
        "model.json", "model.safetensors", "options.yaml", "report_train_tissue_network.csv",
        "report_train_tissue_network.json"]


def test_the_same_seed_gives_the_same_network(pairs: Path, tmp_path: Path) -> None:
    def weights(name: str, *flags: object) -> bytes:
        assert train(pairs, tmp_path / name, *SHORT, *flags) == 0
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = weights("a")
    assert weights("b", "--workers", 3) == first
    for number, flags in enumerate((
            ("--seed", 2), ("--lr", 1e-4), ("--reg", 0.9), ("--batch_size", 3), ("--steps", 3),
            ("--pen_frac", 1), ("--val_frac", 0.6), ("--tile_px", 96),
            ("--precision", "bf16"), ("--mpp", 4))):
        assert weights(f"c{number}", *flags) != first, flags


def test_what_the_card_says(pairs: Path, tmp_path: Path) -> None:
    flags = ("--mpp", 16, "--tile_px", 128, "--width", 4, "--depth", 3)
    assert train(pairs, tmp_path / "a", *SHORT, *flags) == 0
    card = json.loads((tmp_path / "a" / "model.json").read_text())
    assert {name: card[name] for name in ("arch", "mpp_um", "tile_px", "width", "depth")} == {
        "arch": "unet", "mpp_um": 16, "tile_px": 128, "width": 4, "depth": 3}
    assert train(pairs, tmp_path / "b", *SHORT, "--arch", "timm_unet", "--encoder",
                 "mobilenetv3_small_050") == 0
    assert load_tissue_predictor("network", tmp_path / "b", device="cpu").predict(
        [tissue_image(100, 90)])[0].shape == (90, 100)


def test_weights_of_an_encoder(pairs: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import load_file, save_file

    name, file = "mobilenetv3_small_050", tmp_path / "encoder.safetensors"
    torch.manual_seed(0)
    state = timm.create_model(name).state_dict()
    save_file(state, file)
    assert train(pairs, tmp_path / "n", *SHORT, "--arch", "timm_unet", "--encoder", name,
                 "--encoder_ckpt", file, "--lr", 1e-7) == 0
    found = load_file(tmp_path / "n" / "model.safetensors")["encoder.conv_stem.weight"]
    torch.testing.assert_close(found, state["conv_stem.weight"], atol=1e-4, rtol=0)
    del state["blocks.0.0.conv_dw.weight"]
    torch.save(state, tmp_path / "encoder.pth")
    for path, message in ((tmp_path / "encoder.pth", "not those of 'mobilenetv3_small_050': 1 of"),
                          (pairs, "encoder weights: .*refused"), (tmp_path, "not a file")):
        with pytest.raises(Refused, match=message):
            train(pairs, tmp_path / "m", *SHORT, "--arch", "timm_unet", "--encoder", name,
                  "--encoder_ckpt", path)


def test_epochs_and_patience(pairs: Path, tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]) -> None:
    def epochs(name: str, *flags: object) -> int:
        assert train(pairs, tmp_path / name, *SHORT, *flags) == 0
        return capsys.readouterr().out.count("epoch ")

    assert epochs("a", "--max_epochs", 3, "--lr", 1e-7) == 3
    # nothing is learnt at this rate: the first epoch stays the best one
    assert epochs("b", "--max_epochs", 9, "--lr", 1e-7, "--patience", 2) < 9


def test_a_network_is_not_replaced_unasked(pairs: Path, tmp_path: Path) -> None:
    assert train(pairs, tmp_path, *SHORT) == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(Refused, match="holds a network already.*--overwrite"):
        train(pairs, tmp_path, *SHORT, "--seed", 2)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert train(pairs, tmp_path, *SHORT, "--seed", 2, "--overwrite") == 0
    assert (tmp_path / "model.safetensors").read_bytes() != before


def test_images_that_cannot_be_read_are_rows(pairs: Path, tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    lines = [f"{pairs.parent}/{number}.png,{pairs.parent}/{number}_mask.png,8"
             for number in range(5)]
    table.write_text("\n".join(["image,mask,mpp", *lines, "gone.png,gone.png,8"]) + "\n")
    assert train(table, tmp_path / "n", *SHORT) == 3
    failed = [row for row in rows(tmp_path / "n") if row["status"] == Status.FAILED.value]
    assert len(failed) == 1 and "gone.png" in failed[0]["reason"]
    assert (tmp_path / "n" / "model.json").exists()
    table.write_text("image,mask,mpp\na.png,a.png,8\nb.png,b.png,8\n")
    with pytest.raises(ItemFailed, match="no training image could be read"):
        train(table, tmp_path / "m", *SHORT)


@pytest.mark.parametrize(("flags", "message"), [
    (("--tile_px", 100), "multiple of 32"), (("--encoder_ckpt", "x.safetensors"), "timm_unet"),
    (("--device", "tpu"), "--device is 'tpu'"), (("--precision", "fp16"), "needs CUDA"),
    (("--arch", "timm_unet", "--encoder", "resnet1"), "cannot be built")])
def test_flags_that_are_refused(pairs: Path, tmp_path: Path, flags: tuple[object, ...],
                                message: str) -> None:
    with pytest.raises(Refused, match=message):
        train(pairs, tmp_path / "n", *SHORT, *flags)
    assert not (tmp_path / "n").exists()


# ---------------------------------------------------------------------------- the loop

def fit(scores: list[float], *, patience: int) -> tuple[list[int], list[bool], bool]:
    """Epochs run and which were best, when held-out scores are these; are the best weights back?"""
    from models.tissue_networks import NetworkCard

    torch.manual_seed(0)
    network = build_unet(n_classes=1, width=4, depth=2)
    card = NetworkCard(arch="unet", width=4, depth=2, mpp_um=8, tile_px=64)
    states: list[torch.Tensor] = []

    def judge(predictor: object) -> float:
        states.append(network.head.weight.detach().clone())
        return scores[len(states) - 1]

    def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rgb = tissue_image(64, 64, seed=epoch)
        yield rgb[None].repeat(2, axis=0), truth(rgb)[None].repeat(2, axis=0).astype(np.float32)

    settings = TissueFit(max_epochs=len(scores), steps=1, patience=patience, lr=1e-2, reg=0)
    done = list(fit_tissue_network(network, card, settings, batches=batches, judge=judge,
                                   device=torch.device("cpu")))
    best = max(range(len(states)), key=lambda index: scores[index])
    assert not torch.equal(states[best], states[best - 1])
    return ([epoch.epoch for epoch in done], [epoch.best for epoch in done],
            torch.equal(network.head.weight, states[best]))


def test_the_best_epoch_is_kept_and_patience_ends() -> None:
    assert fit([0.1, 0.3, 0.2, 0.2, 0.9], patience=2) == (
        [0, 1, 2, 3], [True, True, False, False], True)
    assert fit([0.1, 0.3, 0.2, 0.2, 0.9], patience=3) == (
        [0, 1, 2, 3, 4], [True, True, False, False, True], True)


def test_loss_falls_to_nothing_when_all_is_right() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    right, wrong = (tissue_loss(sign * 40 * (mask - 0.5), mask) for sign in (1, -1))
    assert right < 1e-3 and wrong > 10
    half = tissue_loss(torch.zeros(1, 8, 8), mask)  # BCE ln 2, Dice (32 + 1) / (64 + 1)
    assert half.item() == pytest.approx(np.log(2) + 1 - 33 / 65, abs=1e-5)
