"""Small prepared images of slides with pixels that are known, for tests: real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from utils.storage import write_image
from wsi_core.image_record import Box, ImageRecord, write_record
from wsi_core.pyramid_writer import image_levels, write_tiled_pyramid
from wsi_core.slide_images import image_path, map_path, record_path

CELL_PX = 64


def noise_image(width: int = 300, height: int = 200, *, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8, every pixel differs from its neighbours."""
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), np.uint8)


def store_image(folder: Path, slide_id: str, pixels: np.ndarray, *,
                tissue: np.ndarray | None = None, mpp_um: float = 1.0, **parameters: Any
                ) -> ImageRecord:
    """Write a slide's three files, without loss, as one piece at (1000, 500) of a slide of 0.5 um.

    tissue: (h, w) share in each cell, 0..1; None = all of it
    """
    folder.mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape[:2]
    cells = (-(-height // CELL_PX), -(-width // CELL_PX))
    shares = np.ones(cells) if tissue is None else np.asarray(tissue)
    assert shares.shape == cells
    scale = mpp_um / 0.5
    write_tiled_pyramid(
        image_path(folder, slide_id), image_levels(
            (width, height), lambda x, y, w, h: pixels[y:y + h, x:x + w], mpp_um=mpp_um),
        quality=None, description=slide_id)
    write_image(map_path(folder, slide_id), np.rint(shares * 255).astype(np.uint8))
    record = ImageRecord(
        slide_id=slide_id, slide={"slide_name": f"{slide_id}.svs", "slide_bytes": 1},
        slide_size=(20_000, 15_000), slide_mpp_um=(0.5, 0.5), mpp_um=mpp_um,
        size_px=(width, height), frame_px=(round(20_000 / scale), round(15_000 / scale)),
        cell_px=CELL_PX, boxes=(Box(0, 0, width, height, 1000.0, 500.0, width * scale,
                                    height * scale),),
        parameters={"stage": "slide_image", "slide_name": f"{slide_id}.svs", "image_mpp": mpp_um,
                    **parameters},
        image_bytes=image_path(folder, slide_id).stat().st_size)
    write_record(record_path(folder, slide_id), record)
    return record
