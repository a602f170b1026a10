"""Write an RGB picture as a tiled JPEG pyramid that OpenSlide opens (demo, tests, benchmarks)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np


def write_pyramid(
    path: Path,
    image: np.ndarray,
    *,
    downsamples: tuple[float, ...] = (1, 2, 4),
    tile: int = 256,
    photometric: str = "ycbcr",
    mpp: float | None = 0.5,
    description: str | None = None,
    quality: int = 90,
) -> Path:
    """Write ``image`` (H, W, 3) uint8 RGB with one level for each of ``downsamples``.

    ``photometric`` "rgb" gives the Aperio kind (no YCbCr inside the JPEG). ``mpp`` is
    micrometres per pixel of level 0, written as TIFF resolution; None leaves it out.
    """
    import tifffile

    height, width = image.shape[:2]
    with tifffile.TiffWriter(path, bigtiff=False) as tif:
        for index, downsample in enumerate(downsamples):
            size = (max(1, round(width / downsample)), max(1, round(height / downsample)))
            level = image if downsample == 1 else cv2.resize(
                image, size, interpolation=cv2.INTER_AREA)
            extra: dict[str, Any] = {"compressionargs": {"level": quality,
                                                         "outcolorspace": photometric}}
            if mpp is not None:
                per_cm = 1e4 / (mpp * downsample)
                extra.update(resolution=(per_cm, per_cm), resolutionunit="CENTIMETER")
            tif.write(level, tile=(tile, tile), compression="jpeg", subsampling=(2, 2),
                      photometric="rgb", subfiletype=0 if index == 0 else 1, metadata=None,
                      description=description if index == 0 else None, **extra)
    return Path(path)
