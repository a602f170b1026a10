"""The one way patches change size, so that features are CLAM's."""

from __future__ import annotations

import numpy as np


def resize_shorter_side(patch: np.ndarray, side_px: int) -> np.ndarray:
    """(H, W, 3) uint8 with its shorter side at ``side_px``, equal to torchvision's Resize.

    Pillow's antialiased bilinear filter, which rounds to uint8; torch's own uint8 path rounds a
    few values otherwise. A patch that has the size is returned as it is.
    """
    height, width = patch.shape[:2]
    if min(height, width) == side_px:
        return patch
    from PIL import Image

    longer = int(side_px * max(height, width) / min(height, width))
    size = (side_px, longer) if width <= height else (longer, side_px)
    return np.asarray(Image.fromarray(patch).resize(size, Image.Resampling.BILINEAR))
