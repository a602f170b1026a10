"""Makers of patch databases for tests of the patches' store: any size, scale and level."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsi_core.coords import PatchCoords
from wsi_core.patch_images import Encoding
from wsi_core.patch_lmdb import PatchLmdb, part_path, write_part

HIGH = "level_0"  # name of the finer level; the coarse one has none
COLUMNS = 4


def places(count: int, *, step_px_l0: int) -> np.ndarray:
    """(count, 2) level-0 px, in rows of four."""
    y, x = np.divmod(np.arange(count), COLUMNS)
    return np.stack([x, y], axis=1) * step_px_l0


def noise(count: int, *, seed: int = 0, side_px: int = 32) -> np.ndarray:
    """(count, side, side, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side_px, side_px, 3), np.uint8)


def store_patches(database: Path, slides: dict[str, np.ndarray], *, level: str = "",
                  footprint_px: int = 32, mpp_um: float = 0.5, encoding: Encoding = "png",
                  finish: bool = True) -> Path:
    """Put the patches (n, h, w, 3) of slides into a database, n may be 0; ``database``.

    footprint_px: what a patch shows, and the step between two, level-0 px
    """
    pair = (footprint_px, footprint_px)
    with PatchLmdb(database, encoding=encoding) as target:
        for slide_id, pixels in slides.items():
            coords = places(len(pixels), step_px_l0=footprint_px)
            patches = PatchCoords(
                slide_id=slide_id, coords=coords, patch_size=footprint_px, patch_level=0,
                output_size=pixels.shape[1], level_downsample=(1.0, 1.0), level_size=(9999, 9999),
                slide_size=(9999, 9999), footprint_px_l0=pair, step_px_l0=pair, mpp_um=mpp_um)
            part = part_path(database, slide_id, level=level)
            with write_part(part, patches, level=level, encoding=encoding) as sink:
                for (x, y), image in zip(coords.tolist(), pixels, strict=True):
                    sink.put(x, y, sink.encode(image))
            target.add(part)
            part.unlink()
        if finish:
            target.finish()
    return database
