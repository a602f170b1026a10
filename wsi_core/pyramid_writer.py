"""Tiled pyramidal TIFFs with a pixel size, which OpenSlide and every script here read.

An image comes as levels, finest first, each of which can be read window by window: those of a
slide (``slide_levels``), read from its own pyramid, or of anything else that has a finest level
(``image_levels``), whose coarser ones are made on the way. Needs the optional package tifffile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from utils.errors import Refused
from utils.storage import atomic_file
from wsi_core.slide import Slide

TILE_PX, STEP = 256, 4  # STEP: between one level and the next
SMALLEST_PX = 1024  # no further level once the longer side is no longer than this
BIG_BYTES = 2**31  # of raw pixels, from which offsets of 32 bits might not do

Window = Callable[[int, int, int, int], np.ndarray]
"""(x, y, width, height) in px of a level, inside it -> (height, width, 3) uint8 RGB."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of the TIFF: (w, h), um per px, and its pixels."""

    size_px: tuple[int, int]
    mpp_um: float
    read: Window


def import_tifffile() -> ModuleType:
    """The package, or ``Refused`` with the command that installs it."""
    try:
        import tifffile
    except ImportError:
        raise Refused("writing TIFFs needs the package tifffile: pip install tifffile") from None
    return tifffile


def slide_levels(slide: Slide, *, mpp_um: float, downscale_by: float = 1.0) -> list[Level]:
    """Levels of a slide, the finest ``downscale_by`` times below its level 0.

    mpp_um: of the slide's level 0. Each is read from the best level of the slide's own pyramid.
    """
    from wsi_core.scaled_slide import ScaledSlide

    full = slide.level_dimensions[0]
    downsamples = [downscale_by]
    while max(full) / downsamples[-1] > SMALLEST_PX:
        downsamples.append(downsamples[-1] * STEP)
    sizes = [_shrunk(full, downsample) for downsample in downsamples]
    return [Level(size_px=size, mpp_um=mpp_um * downsample,
                  read=ScaledSlide(slide, size, cell_px=TILE_PX, cache_mb=1).read)
            for size, downsample in zip(sizes, downsamples, strict=True)]


def image_levels(size_px: tuple[int, int], read: Window, *, mpp_um: float) -> list[Level]:
    """Levels of an image of which only the finest can be read; to be written finest first, once.

    A level's tiles leave the next level behind, which is held whole: 1/15 of the image in all.
    """
    levels = [Level(size_px=size_px, mpp_um=mpp_um, read=read)]
    while max((finer := levels[-1]).size_px) > SMALLEST_PX:
        width, height = _shrunk(finer.size_px, STEP)
        coarser = np.full((height, width, 3), 255, np.uint8)
        levels[-1] = replace(finer, read=_leaving_behind(finer.read, coarser))
        levels.append(Level(size_px=(width, height), mpp_um=finer.mpp_um * STEP,
                            read=_part_of(coarser)))
    return levels


def write_tiled_pyramid(path: Path, levels: Sequence[Level], *, quality: int | None,
                        description: str) -> None:
    """Write the TIFF, whole or not at all.

    quality: 1..100 of JPEG tiles (colours at full resolution), None = zlib, without loss
    description: tag 270 of level 0. Raises what reading raises, OSError, ``Refused`` without
    tifffile.
    """
    tifffile = import_tifffile()
    width, height = levels[0].size_px
    how: dict[str, Any] = {"compression": "zlib", "photometric": "rgb"} if quality is None else {
        "compression": "jpeg", "photometric": "ycbcr", "subsampling": (1, 1)}
    with atomic_file(path) as file, tifffile.TiffWriter(
            tifffile.FileHandle(file, name=path.name),
            bigtiff=3 * width * height > BIG_BYTES) as tif:
        for number, level in enumerate(levels):
            per_cm = 1e4 / level.mpp_um
            tiles = _tiles(level)
            tif.write(tiles if quality is None else (_jpeg(tile, quality) for tile in tiles),
                      shape=(*level.size_px[::-1], 3), dtype="uint8", tile=(TILE_PX, TILE_PX),
                      metadata=None, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER",
                      description=None if number else description,
                      subfiletype=1 if number else 0, **how)


def description_of(path: Path) -> str:
    """What a TIFF says in ``description``, "" for a missing, damaged or other file."""
    tifffile = import_tifffile()
    try:
        with tifffile.TiffFile(path) as tif:
            return str(tif.pages.first.description)
    except (OSError, ValueError, KeyError, TypeError, IndexError, tifffile.TiffFileError):
        return ""


def _tiles(level: Level) -> Iterator[np.ndarray]:
    """(256, 256, 3) uint8 row after row; what reaches beyond the level repeats its last pixels."""
    width, height = level.size_px
    for top in range(0, height, TILE_PX):
        for left in range(0, width, TILE_PX):
            tile = level.read(left, top, min(TILE_PX, width - left), min(TILE_PX, height - top))
            yield np.pad(tile, ((0, TILE_PX - tile.shape[0]), (0, TILE_PX - tile.shape[1]), (0, 0)),
                         mode="edge")


def _leaving_behind(read: Window, coarser: np.ndarray) -> Window:
    """``read``, which also puts what it reads, ``STEP`` times reduced, into the next level."""
    import cv2

    def both(x: int, y: int, width: int, height: int) -> np.ndarray:
        tile = read(x, y, width, height)
        target = coarser[y // STEP:(y + TILE_PX) // STEP, x // STEP:(x + TILE_PX) // STEP]
        if target.size:
            target[:] = cv2.resize(tile, target.shape[1::-1], interpolation=cv2.INTER_AREA)
        return tile

    return both


def _part_of(image: np.ndarray) -> Window:
    return lambda x, y, width, height: image[y:y + height, x:x + width]


def _shrunk(size_px: tuple[int, int], downsample: float) -> tuple[int, int]:
    width, height = (max(1, round(side / downsample)) for side in size_px)
    return width, height


def _jpeg(tile: np.ndarray, quality: int) -> bytes:
    from wsi_core.patch_images import encode_image

    return encode_image(tile, "jpeg", quality=quality)
