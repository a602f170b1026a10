"""The one way patches change size, so that features are CLAM's."""

from __future__ import annotations

import numpy as np


def resize_shorter_side(patch: np.ndarray, side_px: int, *, bicubic: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 with its shorter side at ``side_px``, equal to torchvision's Resize.

    A patch that has the size is returned as it is.
    """
    height, width = patch.shape[:2]
    longer = int(side_px * max(height, width) / min(height, width))
    size = (side_px, longer) if width <= height else (longer, side_px)
    return patch if min(height, width) == side_px else resize_patch(patch, size, bicubic=bicubic)


def resize_patch(patch: np.ndarray, size: tuple[int, int], *, bicubic: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 at ``size`` (width, height).

    Pillow's antialiased bilinear (or bicubic) filter, which rounds to uint8; torch's own uint8
    path rounds a few values otherwise. A patch that has the size is returned as it is.
    """
    if patch.shape[1::-1] == size:
        return patch
    from PIL import Image

    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(patch).resize(size, resample))
