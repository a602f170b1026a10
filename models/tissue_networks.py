"""Learned tissue segmenters, loaded from a user's checkpoint: ``sam2`` and ``network``.

A network is two files: ``model.safetensors``, and ``model.json`` (a ``NetworkCard``), which says
what it is and how it wants to be fed. ``scripts/train_tissue_network.py`` makes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from models.encoder_weights import Weights, load_strictly
from models.tissue_tiles import predict_tiled
from models.tissue_unet import TissueUNet, build_timm_unet, build_unet
from utils.contracts import TissuePredictor as TissuePredictor  # what is loaded here
from utils.devices import Precision, autocast, check_precision, pick_device
from utils.errors import BrokenFile, Refused
from utils.options import build, from_mapping, option
from utils.storage import file_sha256, plain, read_json, write_bytes, write_json

CARD_FORMAT, CARD_VERSION = "milwright-tissue-network", 1
WEIGHTS_FILE, CARD_FILE = "model.safetensors", "model.json"
WHAT = "tissue network"
STRIDE_PX = 32  # coarsest map of the usual encoders: a tile's side is a multiple of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkCard:
    """``model.json``: what a tissue network is, and how it wants to be fed."""

    format: str = option(CARD_FORMAT, help="kind of file")
    version: int = option(CARD_VERSION, help="of the layout of this file", low=1)
    arch: Literal["unet", "timm_unet"] = option(help="our U-Net, or one on a timm encoder")
    width: int = option(16, help="unet: channels of the first stage", low=4, high=256)
    depth: int = option(5, help="unet: stages", low=2, high=6)
    encoder: str | None = option(None, help="timm_unet: name of the timm encoder")
    classes: tuple[str, ...] = option(("tissue",), help="outputs; a single one is a sigmoid")
    tissue_classes: tuple[str, ...] = option(("tissue",), help="those that count as tissue")
    mpp_um: float = option(help="um per px of the overviews", low=0.25, high=64)
    tile_px: int = option(help="side of the tiles it looks at", low=64, high=4096)
    mean: tuple[float, ...] = option((0.5, 0.5, 0.5), help="of RGB in 0..1")
    std: tuple[float, ...] = option((0.25, 0.25, 0.25), help="of RGB in 0..1", low=1e-3)
    threshold: float = option(0.5, help="probability from which on it is tissue", low=0, high=1)
    weights_sha256: str = option("", help="of the weight file beside it; empty = not checked")

    def problem(self) -> str:
        """What is wrong with the values together, "" when nothing is."""
        if self.format != CARD_FORMAT or self.version != CARD_VERSION:
            return f"is {self.format} version {self.version}, {CARD_FORMAT} 1 was expected"
        if self.arch == "timm_unet" and not self.encoder:
            return "has arch timm_unet without an encoder"
        if not self.tissue_classes or set(self.tissue_classes) - set(self.classes):
            return (f"has tissue_classes {', '.join(self.tissue_classes) or 'none'}, some of "
                    f"{', '.join(self.classes)} were expected")
        if len(self.mean) != 3 or len(self.std) != 3:
            return "needs three numbers as mean and as std"
        if self.tile_px % STRIDE_PX:
            return f"has tile_px {self.tile_px}, a multiple of {STRIDE_PX} was expected"
        return ""


def load_tissue_predictor(
    name: str, checkpoint: Path | None, *, device: torch.device | str = "auto",
    precision: Precision = "fp32", threshold: float | None = None, mpp_um: float | None = None,
) -> TissuePredictor:
    """The learned segmenter ``sam2`` or ``network`` with the user's weights, ready to predict.

    threshold, mpp_um: instead of the segmenter's own (0.5 and 8 um for sam2)
    Raises Refused: unknown name, no or another checkpoint, device or precision not there.
    """
    place = pick_device(device) if isinstance(device, str) else device
    check_precision(precision, place)
    if name == "sam2":
        from models.tissue_sam2 import GET_ONE, load_sam2

        if checkpoint is None:
            raise Refused(f"--segmenter sam2 needs weights: {GET_ONE}")
        return load_sam2(checkpoint, device=place, precision=precision, threshold=threshold,
                         mpp_um=mpp_um)
    if name != "network":
        raise Refused(f"unknown learned segmenter '{name}': known: network, sam2")
    if checkpoint is None:
        raise Refused("--segmenter network needs a checkpoint: give --seg_ckpt FOLDER with "
                      f"{WEIGHTS_FILE} and {CARD_FILE}; scripts/train_tissue_network.py makes one")
    network, card, sha256 = load_network(checkpoint)
    card = dataclasses.replace(
        card, threshold=card.threshold if threshold is None else threshold,
        mpp_um=card.mpp_um if mpp_um is None else mpp_um)
    return NetworkPredictor(network, card, sha256=sha256, device=place, precision=precision)


# ---------------------------------------------------------------------------- networks

class NetworkPredictor:
    """A network of ours on overviews, tile by tile; see ``utils.contracts.TissuePredictor``."""

    max_side_px: int | None = None

    def __init__(self, network: nn.Module, card: NetworkCard, *, sha256: str,
                 device: torch.device, precision: Precision) -> None:
        self.mpp_um, self.threshold = card.mpp_um, card.threshold
        self._network = network.eval().to(device)
        # On a CPU a tile at a time stays in the caches; the answer does not depend on it
        self._tiles_a_batch = 1 if device.type == "cpu" else 16
        self._card, self._sha256 = card, sha256
        self._device, self._precision = device, precision
        self._mean = torch.tensor(card.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(card.std, device=device).view(1, 3, 1, 1)
        self._tissue = [card.classes.index(name) for name in card.tissue_classes]

    def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(h, w, 3) uint8 RGB images of any sizes -> (h, w) float32 in 0..1 each."""
        return predict_tiled(images, self._forward, tile_px=self._card.tile_px,
                             overlap_px=self._card.tile_px // 4, batch_size=self._tiles_a_batch)

    def _forward(self, tiles: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(tiles).to(self._device).permute(0, 3, 1, 2)
        with torch.inference_mode(), autocast(self._precision, self._device):
            logits = self._network(normalised(pixels, self._mean, self._std)).float()
        if logits.shape[1] == 1:
            probability = logits[:, 0].sigmoid()
        else:
            probability = logits.softmax(dim=1)[:, self._tissue].sum(dim=1)
        return np.asarray(probability.cpu().numpy())

    def record(self) -> dict[str, Any]:
        """What decides the masks, for the parameters of results."""
        card: dict[str, Any] = plain(dataclasses.asdict(self._card))
        shown = {key: card[key] for key in ("arch", "tissue_classes", "mpp_um", "tile_px", "mean",
                                            "std", "threshold")}
        return {"name": "network", "sha256": self._sha256, **shown, "precision": self._precision}


def normalised(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 RGB as float, by the (1, 3, 1, 1) mean and std of RGB in 0..1."""
    return (pixels / 255 - mean) / std


def build_network(card: NetworkCard, *, encoder_file: Path | None = None) -> TissueUNet:
    """The network a card describes, its weights random but those of a timm encoder's file."""
    count = len(card.classes)
    if card.arch == "unet":
        return build_unet(n_classes=count, width=card.width, depth=card.depth)
    weights = None if encoder_file is None else Weights(encoder_file, "").state()
    return build_timm_unet(n_classes=count, encoder=card.encoder or "", weights=weights)


def save_network(folder: Path, network: nn.Module, card: NetworkCard) -> None:
    """Write weights and card; the card comes last and knows the sha256 of the weights."""
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous()
             for name, value in network.state_dict().items()}
    write_bytes(folder / WEIGHTS_FILE, save(state))
    card = dataclasses.replace(card, weights_sha256=file_sha256(folder / WEIGHTS_FILE))
    write_json(folder / CARD_FILE, dataclasses.asdict(card))


def load_network(checkpoint: Path) -> tuple[TissueUNet, NetworkCard, str]:
    """Network, card and sha256 of the weights from a folder, a .safetensors file or a .json.

    Raises Refused: files missing or damaged, a card with wrong values, weights of another one.
    """
    checkpoint = Path(checkpoint)
    base = checkpoint / WEIGHTS_FILE if checkpoint.is_dir() else checkpoint
    weights_path, card_path = base.with_suffix(".safetensors"), base.with_suffix(".json")
    for path in (weights_path, card_path):
        if not path.is_file():
            raise Refused(f"tissue network {checkpoint}: {path} is missing (two files make one: "
                          "weights as .safetensors and a card as .json, no pickles)")
    card = read_card(card_path)
    weights = Weights(weights_path, file_sha256(weights_path), WHAT)
    if card.weights_sha256 not in ("", weights.sha256):
        raise Refused(f"{weights_path} and {card_path} do not belong together (sha256): copy both "
                      "again, or train the network again")
    network = build_network(card)
    load_strictly(network, weights.state(), where=weights_path, what=WHAT)
    return network, card, weights.sha256


def read_card(path: Path) -> NetworkCard:
    """A checked ``model.json``, or ``Refused`` naming what is wrong."""
    try:
        found = read_json(path)
    except BrokenFile as error:
        raise Refused(str(error)) from None
    if not isinstance(found, dict):
        raise Refused(f"{path} is no card of a tissue network: a json object was expected")
    card = build(NetworkCard, from_mapping(NetworkCard, found, source=str(path)),
                 prefix=f"{path}: ")
    if card.problem():
        raise Refused(f"{path} {card.problem()}")
    return card
