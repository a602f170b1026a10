"""Patch encoders at work: patches in, features out, on a CPU or a GPU.

An ``Encoder`` prepares single patches (in reading workers) and encodes batches; its ``record()``
goes into every features file, so that no two encoders are mixed. Networks: encoder_networks.py.
The transform is the one CLAM takes from torchvision: shorter side to the target size (bilinear
with antialias, rounded to uint8, as Pillow does), to 0..1, minus mean, divided by std.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.encoder_networks import ENCODERS, EncoderSpec, encoder_spec
from models.encoder_weights import Weights, find_weights
from utils.devices import Precision, autocast, check_precision, pick_device
from utils.errors import Refused
from utils.resize import resize_shorter_side
from utils.storage import differences

__all__ = ["ENCODERS", "Encoder", "EncoderSpec", "encoder_record", "encoder_spec",
           "load_encoder", "matching_encoder"]

if TYPE_CHECKING:
    import torch
    from torch import nn

CPU_BATCH = 16  # patches forwarded at once on a CPU: more only misses the caches
MAX_HALVINGS = 6  # of the batch when a GPU runs out of memory


def encoder_record(name: str, *, checkpoint: Path | None = None, target_px: int = 224,
                   precision: Precision = "fp32") -> dict[str, Any]:
    """What identifies the features of this encoder: equal records, comparable features.

    Needs the weight file, not the network: registered encoders are recorded without torch.
    """
    spec = encoder_spec(name)
    return _record(spec, find_weights(name, spec.weights, checkpoint), target_px, precision)


def load_encoder(name: str, *, checkpoint: Path | None = None, target_px: int = 224,
                 device: str = "cpu", precision: Precision = "fp32") -> Encoder:
    """Build an encoder and load its weights, all of them or not at all.

    checkpoint: weight file (.pt, .pth, .bin, .safetensors) instead of the usual places
    target_px:  shorter side after resizing; 0 or less = patches go in as they are
    device:     "cpu", "cuda", "cuda:1" or "auto"
    precision:  "bf16" and "fp16" compute in that format; features are float32 in any case
    Raises Refused: unknown name, no weights, weights of another network, no such device.
    """
    spec = encoder_spec(name)
    place = pick_device(device)
    check_precision(precision, place)
    weights = find_weights(name, spec.weights, checkpoint)
    network = spec.build(weights).eval().requires_grad_(False)
    return Encoder(spec, network, weights=weights, target_px=target_px, device=place,
                   precision=precision)


def matching_encoder(record: Mapping[str, Any], *, checkpoint: Path | None = None,
                     device: str = "cpu") -> Callable[[], Encoder]:
    """What loads the very encoder that made features of this ``record``; ``Refused`` when the
    weights found are others."""
    settings: dict[str, Any] = {"checkpoint": checkpoint, "target_px": record.get("target_px", 224),
                                "precision": record.get("precision", "fp32")}
    name = str(record["name"])
    if other := differences(record, encoder_record(name, **settings)):
        raise Refused(f"encoder '{name}' is not the one that made the features ({other}): give its "
                      "weights with --encoder_ckpt")
    return partial(load_encoder, name, device=device, **settings)


class Encoder:
    """An encoder with its weights on its device; see ``load_encoder``."""

    def __init__(self, spec: EncoderSpec, network: nn.Module, *, weights: Weights,
                 target_px: int, device: torch.device, precision: Precision) -> None:
        import torch

        self.spec = spec
        self.target_px = target_px
        self.device = device
        self.precision = precision
        self.warnings: list[str] = []
        self._weights = weights
        self._network = network.to(device).to(memory_format=torch.channels_last)
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)
        self._frozen: dict[tuple[int, int], Callable[[torch.Tensor], torch.Tensor]] = {}
        self._most = CPU_BATCH if device.type == "cpu" else 2**31  # patches in one forward pass
        side = target_px if target_px > 0 else spec.default_px
        self.dim = self._check_width(side)

    @property
    def weights_sha256(self) -> str:
        """sha256 of the weight file, in hex."""
        return self._weights.sha256

    def record(self) -> dict[str, Any]:
        """See ``encoder_record``."""
        return _record(self.spec, self._weights, self.target_px, self.precision)

    def prepare(self, patch: np.ndarray) -> np.ndarray:
        """Resize one (H, W, 3) uint8 patch to the target size; safe to call from many threads."""
        return resize_shorter_side(patch, self.target_px) if self.target_px > 0 else patch

    def encode(self, batch: np.ndarray | torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 RGB patches -> (B, D) float32 features on the CPU.

        Patches of another size than the target are resized first.
        """
        return self.launch(batch).cpu()

    def launch(self, batch: np.ndarray | torch.Tensor) -> torch.Tensor:
        """``encode`` that does not wait: the (B, D) result stays on the device.

        A GPU that runs out of memory gets the batch in halves, from then on.
        """
        import torch

        if len(batch) == 0:
            return torch.zeros((0, self.dim))
        if self.target_px > 0 and min(batch.shape[1:3]) != self.target_px:
            batch = np.stack([self.prepare(np.asarray(patch)) for patch in batch])
        patches = torch.as_tensor(batch)
        halvings = 0
        while True:
            try:
                return torch.cat([self._forward(part) for part in patches.split(self._most)])
            except torch.OutOfMemoryError:
                if halvings == MAX_HALVINGS or len(patches) == 1:
                    raise
                halvings += 1
                self._most = max(1, min(self._most, len(patches)) // 2)
                torch.cuda.empty_cache()

    def _check_width(self, side_px: int) -> int:
        features = self._eager(self._normalise(
            self._place(_noise(1, side_px, side_px))))
        if features.ndim != 2 or (self.spec.dim and features.shape[1] != self.spec.dim):
            raise Refused(f"encoder '{self.spec.name}' gives features of shape "
                          f"{tuple(features.shape)}, expected (1, {self.spec.dim or 'D'})")
        return int(features.shape[1])

    def _place(self, patches: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return patches
        return patches.pin_memory().to(self.device, non_blocking=True)

    def _normalise(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, channels last in memory as it comes."""
        return (patches.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std

    def _forward(self, patches: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cpu":
            return self._eager(self._normalise(self._place(patches)))
        size = (int(patches.shape[1]), int(patches.shape[2]))
        if size not in self._frozen:
            self._frozen[size] = self._freeze(size)
        full = patches
        if len(patches) < CPU_BATCH:  # one batch size: a row's bits do not depend on its company
            full = patches.new_zeros((CPU_BATCH, *patches.shape[1:]))
            full[:len(patches)] = patches
        return self._frozen[size](self._normalise(full))[:len(patches)]

    def _eager(self, images: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode(), autocast(self.precision, self.device):
            return self._network(images).float()  # type: ignore[no-any-return]

    def _freeze(self, size: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
        from models.frozen import freeze_network

        run, problem = freeze_network(self._network, self._normalise(_noise(CPU_BATCH, *size)),
                                      bf16=self.precision == "bf16")
        if problem:
            self.warnings.append(f"encoder '{self.spec.name}' runs without the frozen graph, "
                                 f"slower: {problem}")
            print(f"warning: {self.warnings[-1]}", file=sys.stderr)
        return run


def _record(spec: EncoderSpec, weights: Weights, target_px: int, precision: Precision
            ) -> dict[str, Any]:
    return {"name": spec.name, "weights_sha256": weights.sha256,
            "target_px": max(0, target_px), "resize": "bilinear, antialias, uint8",
            "mean": list(spec.mean), "std": list(spec.std), "precision": precision}


def _noise(count: int, height: int, width: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8,
                         generator=generator)
