"""Makers of small synthetic pyramids for tests: real files, under a second each."""

from __future__ import annotations

import cv2
import numpy as np

from scripts.pyramid import write_pyramid

__all__ = ["tissue_image", "write_pyramid"]


def tissue_image(width: int, height: int, *, seed: int = 0, blobs: int = 2) -> np.ndarray:
    """White glass with pink textured ellipses, (height, width, 3) uint8 RGB."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 243, np.uint8)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(blobs):
        centre = (int(rng.uniform(0.25, 0.75) * width), int(rng.uniform(0.25, 0.75) * height))
        axes = (int(rng.uniform(0.15, 0.25) * width), int(rng.uniform(0.15, 0.25) * height))
        cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 255, -1)
    texture = rng.integers(0, 60, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    texture = cv2.resize(texture, (width, height), interpolation=cv2.INTER_CUBIC)
    tissue = np.clip(np.array([170, 90, 160]) + texture.astype(int), 0, 255).astype(np.uint8)
    image[mask > 0] = tissue[mask > 0]
    return image
