"""What happens to the pixels of a patch before the network sees them.

Readers call ``prepare`` on single patches, the device calls ``images`` on batches of prepared ones.
CLAM's transform is the plain case: shorter side to the target size, bilinear with antialias,
rounded to uint8 as Pillow does; then 0..1, minus mean, divided by std.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from utils.resize import resize_patch, resize_shorter_side

if TYPE_CHECKING:
    import torch

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How a patch gets the size that an encoder takes.

    resize_px: its shorter side after resizing, or both sides (``square``); 0 = as read
    crop_px:   side of the square then cut from the centre; 0 = no cut
    """

    resize_px: int = 224
    crop_px: int = 0
    square: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @property
    def side_px(self) -> int:
        """Shorter side of a prepared patch; 0 = as read."""
        return self.crop_px or self.resize_px

    def resized(self, target_px: int) -> Transform:
        """The whole patch at another size (0 or less: as read), as the user asks."""
        return Transform(resize_px=max(0, target_px), interpolation=self.interpolation)

    def apply(self, patch: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> the same, resized and cut as torchvision's Resize and CenterCrop."""
        if self.resize_px == 0:
            return patch
        bicubic = self.interpolation == "bicubic"
        if self.square:
            patch = resize_patch(patch, (self.resize_px, self.resize_px), bicubic=bicubic)
        else:
            patch = resize_shorter_side(patch, self.resize_px, bicubic=bicubic)
        if not self.crop_px:
            return patch
        top, left = (round((side - self.crop_px) / 2) for side in patch.shape[:2])
        return patch[top:top + self.crop_px, left:left + self.crop_px]

    def pixels(self, mean: Triple, std: Triple) -> Pixels:
        """It, and what follows on the device, for a network of these statistics."""
        return ScaledPixels(self, mean, std)

    def record(self) -> dict[str, Any]:
        """What was done, for the features file."""
        text = f"{self.interpolation}, antialias, uint8"
        if self.square:
            text = f"both sides to {self.resize_px}, {text}"
        if self.crop_px:
            text = f"{text}, centre crop from {self.resize_px}"
        return {"target_px": self.side_px, "resize": text}


class Pixels(Protocol):
    """From patches to the network's input."""

    def prepare(self, patch: np.ndarray) -> np.ndarray:
        """One (H, W, 3) uint8 patch -> what batches are stacked from; from many threads."""
        ...

    def is_prepared(self, shape: tuple[int, ...]) -> bool:
        """Whether a batch of this shape can go to ``images``."""
        ...

    def images(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch of prepared patches -> (B, 3, H, W) float32 on the same device."""
        ...


class ScaledPixels:
    """``Transform``, then 0..1, minus mean, divided by std: what published encoders ask for."""

    def __init__(self, transform: Transform, mean: Triple, std: Triple) -> None:
        self.transform = transform
        self._statistics = mean, std
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def prepare(self, patch: np.ndarray) -> np.ndarray:
        """See ``Transform.apply``."""
        return self.transform.apply(patch)

    def is_prepared(self, shape: tuple[int, ...]) -> bool:
        """(B, H, W, 3) with the side that ``prepare`` gives."""
        return self.transform.side_px in (0, min(shape[1:3]))

    def images(self, batch: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, channels last in memory as it comes."""
        import torch

        if batch.device not in self._on:
            mean, std = (torch.tensor(values, device=batch.device).view(1, 3, 1, 1)
                         for values in self._statistics)
            self._on[batch.device] = mean, std
        mean, std = self._on[batch.device]
        return (batch.permute(0, 3, 1, 2).float() / 255 - mean) / std
