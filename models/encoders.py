"""Patch encoders at work: patches in, features out, on a CPU or a GPU.

An ``Encoder`` prepares single patches (in reading workers) and encodes batches; its ``record()``
goes into every features file, so that no two encoders are mixed. Networks: encoder_networks.py;
what happens to pixels: encoder_transforms.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from models.encoder_networks import ENCODERS, EncoderSpec, encoder_spec
from models.encoder_registry import E2E_PREFIX, missing_package
from models.encoder_transforms import Pixels, Transform
from models.encoder_weights import Weights, find_weights
from utils.devices import Precision, autocast, check_precision, pick_device
from utils.errors import Refused
from utils.storage import differences

__all__ = ["ENCODERS", "Encoder", "EncoderSpec", "encoder_record", "encoder_spec",
           "load_encoder", "matching_encoder"]

if TYPE_CHECKING:
    import torch
    from torch import nn

AnyPrecision = Literal["auto", "fp32", "bf16", "fp16"]

CPU_BATCH = 16  # patches forwarded at once on a CPU: more only misses the caches
MAX_HALVINGS = 6  # of the batch when a GPU runs out of memory


def encoder_record(name: str, *, checkpoint: Path | None = None, target_px: int | None = None,
                   precision: AnyPrecision = "fp32", device: str = "cpu",
                   plugins: Sequence[Path] = (), trust_remote_code: bool = False
                   ) -> dict[str, Any]:
    """What identifies the features of this encoder: equal records, comparable features.

    Needs the weight file, not the network: registered encoders are recorded without torch (unless
    ``precision`` is "auto", which asks for the device).
    """
    spec, weights = _find(name, checkpoint, plugins, trust_remote_code)
    return _record(spec, weights, _transform(spec, target_px),
                   resolve_precision(precision, spec, device))


def load_encoder(name: str, *, checkpoint: Path | None = None, target_px: int | None = None,
                 device: str = "cpu", precision: AnyPrecision = "fp32",
                 plugins: Sequence[Path] = (), trust_remote_code: bool = False) -> Encoder:
    """Build an encoder and load its weights, all of them or not at all.

    checkpoint: weight file (.pt, .pth, .bin, .safetensors) or its folder, instead of the usual
                places
    target_px:  shorter side after resizing; 0 or less = patches go in as they are; None = the
                transform of the encoder's authors, 224 where they give none
    device:     "cpu", "cuda", "cuda:1" or "auto"
    precision:  "bf16" and "fp16" compute in that format, "auto" in the one recommended for a GPU;
                features are float32 in any case
    plugins:    Python files that register encoders (encoder_plugin.py)
    trust_remote_code: allow an encoder that runs Python code which came with its weights
    Raises Refused: unknown name, no weights, weights of another network, no such device.
    """
    spec, weights = _find(name, checkpoint, plugins, trust_remote_code)
    place = pick_device(device)
    format_ = resolve_precision(precision, spec, device)
    check_precision(format_, place)
    transform = _transform(spec, target_px)
    pixels = transform.pixels(spec.mean, spec.std)
    if spec.plugin:
        network, pixels = spec.plugin(place, transform)
    else:
        network = spec.build(weights)
    return Encoder(spec, network.eval().requires_grad_(False), weights=weights,
                   transform=transform, pixels=pixels, device=place, precision=format_)


def matching_encoder(record: Mapping[str, Any], *, checkpoint: Path | None = None,
                     device: str = "cpu", plugins: Sequence[Path] = (),
                     trust_remote_code: bool = False) -> Callable[[], Encoder]:
    """What loads the very encoder that made features of this ``record``; ``Refused`` when the
    weights found are others."""
    name, precision = str(record["name"]), record.get("precision", "fp32")
    if checkpoint and name.startswith(E2E_PREFIX):  # there the checkpoint is the encoder
        name, checkpoint = f"{E2E_PREFIX}{checkpoint}", None
    spec, weights = _find(name, checkpoint, plugins, trust_remote_code)
    asked = (record.get("target_px", 224), None)  # a size that was asked for, or the encoder's own
    others = [differences(record, _record(spec, weights, _transform(spec, target_px), precision))
              for target_px in asked]
    if all(others):
        raise Refused(f"encoder '{name}' is not the one that made the features ({others[0]}): give "
                      "its weights with --encoder_ckpt")
    return partial(load_encoder, name, checkpoint=checkpoint, target_px=asked[others.index("")],
                   precision=precision, device=device, plugins=plugins,
                   trust_remote_code=trust_remote_code)


def resolve_precision(precision: AnyPrecision, spec: EncoderSpec, device: str) -> Precision:
    """"auto" as the format recommended for ``spec`` where ``device`` has it, fp32 elsewhere."""
    if precision != "auto":
        return precision
    place = pick_device(device)
    try:
        check_precision(spec.precision, place)
    except Refused:
        return "fp32"
    return spec.precision if place.type == "cuda" else "fp32"


class Launched:
    """Features on their way from the device; ``cpu`` waits for them."""

    def __init__(self, features: torch.Tensor,
                 again: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self._features = features
        self._again = again

    def cpu(self) -> torch.Tensor:
        """(B, D) float32. Rows that a short format could not hold are computed again in fp32."""
        values = self._features.cpu()
        if self._again is None or bool((finite := values.isfinite().all(dim=1)).all()):
            return values
        values = values.clone()
        values[~finite] = self._again(~finite)
        return values


class Encoder:
    """An encoder with its weights on its device; see ``load_encoder``.

    overflowed: patches whose features were computed again in fp32
    """

    def __init__(self, spec: EncoderSpec, network: nn.Module, *, weights: Weights,
                 transform: Transform, device: torch.device, precision: Precision,
                 pixels: Pixels | None = None) -> None:
        import torch

        self.spec = spec
        self.transform = transform
        self.device = device
        self.precision = precision
        self.warnings: list[str] = []
        self.overflowed = 0
        self._weights = weights
        self._network = network.to(device).to(memory_format=torch.channels_last)
        self._pixels = pixels or transform.pixels(spec.mean, spec.std)
        self._frozen: dict[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]] = {}
        self._most = CPU_BATCH if device.type == "cpu" else 2**31  # patches in one forward pass
        self.dim = self._check_width(transform.resize_px or spec.default_px)

    @property
    def weights_sha256(self) -> str:
        """sha256 of the weight file, in hex."""
        return self._weights.sha256

    def record(self) -> dict[str, Any]:
        """See ``encoder_record``."""
        return _record(self.spec, self._weights, self.transform, self.precision)

    def prepare(self, patch: np.ndarray) -> np.ndarray:
        """One (H, W, 3) uint8 patch as ``launch`` takes it; safe to call from many threads."""
        return self._pixels.prepare(patch)

    def encode(self, batch: np.ndarray | torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 RGB patches as they were read -> (B, D) float32 on the CPU."""
        if len(batch) == 0:
            return self.launch(batch).cpu()
        return self.launch(np.stack([self.prepare(np.asarray(patch)) for patch in batch])).cpu()

    def launch(self, batch: np.ndarray | torch.Tensor) -> Launched:
        """A batch of prepared patches -> features that are not waited for.

        Patches of another size than ``prepare`` gives are prepared first. A GPU that runs out of
        memory gets the batch in halves, from then on.
        """
        import torch

        if len(batch) == 0:
            return Launched(torch.zeros((0, self.dim)))
        if not self._pixels.is_prepared(tuple(batch.shape)):
            batch = np.stack([self.prepare(np.asarray(patch)) for patch in batch])
        patches = torch.as_tensor(batch)
        again = None if self.precision == "fp32" else partial(self._again, patches)
        return Launched(self._in_parts(patches, self._forward), again)

    def _in_parts(self, patches: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]
                  ) -> torch.Tensor:
        import torch

        halvings = 0
        while True:
            try:
                return torch.cat([forward(part) for part in patches.split(self._most)])
            except torch.OutOfMemoryError:
                if halvings == MAX_HALVINGS or len(patches) == 1:
                    raise
                halvings += 1
                self._most = max(1, min(self._most, len(patches)) // 2)
                torch.cuda.empty_cache()

    def _again(self, patches: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The features of these rows in fp32, on the CPU."""
        if not self.overflowed:
            self._warn(f"gives values that are not finite in {self.precision}: such patches are "
                       "computed again in fp32, slower")
        self.overflowed += int(rows.sum())
        return self._in_parts(patches[rows], self._exact).cpu()

    def _check_width(self, side_px: int) -> int:
        import torch

        try:
            patch = self.prepare(_noise(1, side_px, side_px)[0].numpy())
            features = self._exact(torch.as_tensor(patch[None].copy()))
        except (torch.OutOfMemoryError, Refused):
            raise
        except Exception as error:  # networks of others refuse sizes each in its own way
            raise Refused(f"encoder '{self.spec.name}' cannot encode a patch of {side_px} px "
                          f"({' '.join(str(error).split())[:160]}): leave --target_patch_size out "
                          "or give another one") from None
        if features.ndim != 2 or (self.spec.dim and features.shape[1] != self.spec.dim):
            raise Refused(f"encoder '{self.spec.name}' gives features of shape "
                          f"{tuple(features.shape)}, expected (1, {self.spec.dim or 'D'})")
        return int(features.shape[1])

    def _place(self, patches: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return patches
        return patches.pin_memory().to(self.device, non_blocking=True)

    def _forward(self, patches: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cpu":
            return self._eager(self._pixels.images(self._place(patches)), self.precision)
        size = tuple(patches.shape[1:])
        if size not in self._frozen:
            self._frozen[size] = self._freeze(size)
        full = patches
        if len(patches) < CPU_BATCH:  # one batch size: a row's bits do not depend on its company
            full = patches.new_zeros((CPU_BATCH, *size))
            full[:len(patches)] = patches
        return self._frozen[size](self._pixels.images(full))[:len(patches)]

    def _exact(self, patches: torch.Tensor) -> torch.Tensor:
        return self._eager(self._pixels.images(self._place(patches)), "fp32")

    def _eager(self, images: torch.Tensor, precision: Precision) -> torch.Tensor:
        import torch

        with torch.inference_mode(), autocast(precision, self.device):
            return self._network(images).float()  # type: ignore[no-any-return]

    def _freeze(self, size: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.spec.plugin or self.spec.remote_code:  # code that may branch on what it sees
            return partial(self._eager, precision=self.precision)
        from models.frozen import freeze_network

        run, problem = freeze_network(
            self._network, self._pixels.images(_noise(CPU_BATCH, *size[:2])),
            bf16=self.precision == "bf16")
        if problem:
            self._warn(f"runs without the frozen graph, slower: {problem}")
        return run

    def _warn(self, text: str) -> None:
        self.warnings.append(f"encoder '{self.spec.name}' {text}")
        print(f"warning: {self.warnings[-1]}", file=sys.stderr)


def _find(name: str, checkpoint: Path | None, plugins: Sequence[Path], trusted: bool
          ) -> tuple[EncoderSpec, Weights]:
    """The encoder and its weights, or ``Refused`` with what is in the way of it."""
    if plugins:
        from models.encoder_plugin import load_plugins

        load_plugins(plugins)
    spec = encoder_spec(name)
    if spec.remote_code and not trusted:
        raise Refused(f"encoder '{spec.name}' runs Python code that comes with its weights "
                      f"({spec.source}): read it, then allow it with --trust_remote_code")
    if spec.weights.file and checkpoint:
        raise Refused(f"encoder '{spec.name}' comes with its weights (a plug-in, an end-to-end "
                      "model): leave --encoder_ckpt out")
    weights = find_weights(spec.name, spec.weights, checkpoint)
    if command := missing_package(spec):
        raise Refused(f"encoder '{spec.name}' needs the package {spec.package}: {command}")
    return spec, replace(weights, trusted=trusted)


def _transform(spec: EncoderSpec, target_px: int | None) -> Transform:
    own = spec.transform or Transform()
    return own if target_px is None else own.resized(target_px)


def _record(spec: EncoderSpec, weights: Weights, transform: Transform, precision: Precision
            ) -> dict[str, Any]:
    record = {"name": spec.name, "weights_sha256": weights.sha256, **transform.record(),
              "mean": list(spec.mean), "std": list(spec.std), "precision": precision}
    if spec.transform:  # not the first four and timm's: their records are in many files
        record |= {"output": spec.output, **weights.beside}
    return record


def _noise(count: int, height: int, width: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8,
                         generator=generator)
