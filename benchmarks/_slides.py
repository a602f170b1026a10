"""The synthetic slide of the benchmarks: textured tissue on glass, JPEG tiles, three levels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from scripts.pyramid import write_pyramid

LEVEL_DOWNSAMPLES = (1, 4, 16)


def make_slide(path: Path, *, side_px: int = 8192) -> Path:
    """Write a square slide as a tiled JPEG pyramid that stores RGB, as Aperio's do; 0.25 um/px."""
    return write_pyramid(path, tissue_image(side_px), downsamples=LEVEL_DOWNSAMPLES,
                         photometric="rgb", mpp=0.25, quality=80)


def tissue_image(side_px: int) -> np.ndarray:
    """(side, side, 3) uint8 RGB: pink tissue with dark nuclei in ellipses on near-white glass."""
    rng = np.random.default_rng(0)
    mask = np.zeros((side_px, side_px), np.uint8)
    for x, y in ((0.35, 0.4), (0.68, 0.62)):
        axes = (int(rng.uniform(0.17, 0.25) * side_px), int(rng.uniform(0.2, 0.3) * side_px))
        cv2.ellipse(mask, (int(x * side_px), int(y * side_px)), axes,
                    float(rng.uniform(0, 180)), 0, 360, 255, -1)
    image = np.full((side_px, side_px, 3), 243, np.uint8)
    for grain, strength in ((64, 40), (8, 36), (3, 14)):  # px: folds, cells, fibres
        cells = (side_px // grain + 1, side_px // grain + 1, 1)
        small = rng.integers(-strength, strength, cells) * np.array([0.6, 1.0, 0.7])
        noise = cv2.resize(small.astype(np.int16), (side_px, side_px),
                           interpolation=cv2.INTER_LINEAR)
        _add_where(image, noise, mask)
    stain = np.array([-45, -105, -60], np.int16)
    _add_where(image, np.broadcast_to(stain, image.shape), mask)
    return image


def _add_where(image: np.ndarray, change: np.ndarray, mask: np.ndarray) -> None:
    """Add (h, w, 3) int16 to the image in place where the mask is set, row by row band."""
    for start in range(0, len(image), 1024):
        band = slice(start, start + 1024)
        changed = np.clip(image[band] + change[band], 0, 255).astype(np.uint8)
        np.copyto(image[band], changed, where=mask[band, :, None] > 0)
