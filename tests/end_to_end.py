"""A tiny encoder and bags of pixels, for tests of end-to-end models that take milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from models.e2e import EndToEnd
from models.patch_network import PatchNetwork, Run
from models.slide_models import SLIDE_MODELS, SlideModelSpec
from utils.contracts import Bag
from utils.errors import ItemFailed

DIM = 12
SIDE_PX = 16


class TinyEncoder(PatchNetwork):
    """Three blocks of convolution, batch norm and ReLU, the last with dropout and the average."""

    def __init__(self, *, dropout: float = 0.2) -> None:
        def block(inputs: int, outputs: int, *more: nn.Module) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
                                 nn.BatchNorm2d(outputs), nn.ReLU(), *more)

        super().__init__(
            nn.Sequential(block(3, 6), block(6, 8), block(
                8, DIM, nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1), nn.Flatten())),
            dim=DIM, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        for norm in self.norms():
            nn.init.normal_(norm.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]

    def norms(self) -> list[nn.BatchNorm2d]:
        """The batch norms, in order."""
        return [one for one in self.modules() if isinstance(one, nn.BatchNorm2d)]

    def forward(self, x: torch.Tensor, run: Run | None = None) -> torch.Tensor:
        for block in self.blocks():
            x = block(x) if run is None else run(block, x)
        return x

    def blocks(self) -> list[nn.Module]:
        return list(self.model.children())


class Pixels:
    """``PatchImages`` in memory: scales (n, h, w, 3) uint8, one after another.

    log: sizes of the chunks that were streamed; broken: the patch that cannot be read
    """

    def __init__(self, *scales: torch.Tensor, broken: int | None = None) -> None:
        self.scales, self.broken = scales, broken
        self.log: list[int] = []

    def __len__(self) -> int:
        return sum(len(scale) for scale in self.scales)

    def stream(self, most: int) -> Iterator[torch.Tensor]:
        done = 0
        for scale in self.scales:
            for part in scale.split(most):
                done += len(part)
                if self.broken is not None and done > self.broken:
                    raise ItemFailed("slide_x: a patch is damaged")
                self.log.append(len(part))
                yield part


def pixel_bag(index: int, *, patches: int | Sequence[int] = 5, n_classes: int = 2,
              broken: int | None = None, **truth: Any) -> Bag:
    """A slide whose class is a colour; several numbers of patches: scales of growing size."""
    random = np.random.default_rng(index)
    label = index % n_classes
    scales = []
    for scale, count in enumerate([patches] if isinstance(patches, int) else patches):
        side = 20 + 6 * scale
        pixels = random.integers(0, 120, size=(count, side, side, 3), dtype=np.uint8)
        pixels[..., label % 3] += 100
        scales.append(torch.from_numpy(pixels))
    total = sum(len(scale) for scale in scales)
    return Bag(slide_id=f"slide_{index:02}", features=torch.empty(total, 0),
               patches=Pixels(*scales, broken=broken), case_id=f"case_{index:02}",
               coords=np.arange(2 * total).reshape(total, 2),
               **(truth or {"label": label}))


def end_to_end(mil: str = "abmil", *, enc_dropout: float = 0.2, seed: int = 0,
               spec: dict[str, Any] | None = None, **options: Any) -> EndToEnd:
    """An ``EndToEnd`` of small parts; ``options`` are those of ``E2EOptions``."""
    torch.manual_seed(seed)
    small: dict[str, dict[str, Any]] = {
        "abmilx": {"inner_dim": 16, "n_heads": 2}, "transmil": {"inner_dim": 16, "n_heads": 2},
        "hag_mil": {"hidden_dims": (16, 16)}}
    made = SlideModelSpec(model_type=mil, embed_dim=DIM, **{
        "n_classes": 2, "options": small.get(mil, {}), **(spec or {})})
    return EndToEnd(TinyEncoder(dropout=enc_dropout), SLIDE_MODELS.get(mil)(made), **{
        "train_blocks": None, "enc_bn": "frozen", "enc_grad": "auto", "batch_size": 1,
        "p_batch_size": 4, "p_batch_size_v": 3, "img_size": SIDE_PX, "img_transform": "strong",
        "crop_scale": 0.3, "channels": "RGB", **options})
