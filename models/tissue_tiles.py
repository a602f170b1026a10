"""Prediction of large overviews by overlapping tiles that are blended into one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

GLASS = 255  # what a tile holds where it reaches beyond the overview


def tile_starts(length: int, tile_px: int, overlap_px: int) -> list[int]:
    """Starts of tiles along an axis; neighbours share ``overlap_px`` or more, the last one ends
    with the axis. One tile, which reaches beyond it, for an axis shorter than a tile.
    """
    if length <= tile_px:
        return [0]
    return [*range(0, length - tile_px, tile_px - overlap_px), length - tile_px]


def blend_window(tile_px: int, overlap_px: int) -> np.ndarray:
    """(tile, tile) float32 weights: 1 inside, Hann ramps (never 0) over the overlap at each side.

    The ramps of two neighbours that share ``overlap_px`` add up to 1.
    """
    edge = np.ones(tile_px, np.float32)
    ramp = np.sin(np.pi / 2 * (np.arange(overlap_px) + 0.5) / max(1, overlap_px)) ** 2
    edge[:overlap_px] = ramp
    edge[tile_px - overlap_px:] = ramp[::-1]
    return np.outer(edge, edge)


def predict_tiled(
    images: Sequence[np.ndarray], forward: Callable[[np.ndarray], np.ndarray], *,
    tile_px: int, overlap_px: int, batch_size: int,
) -> list[np.ndarray]:
    """Probabilities of whole images from those of tiles.

    images: (h, w, 3) uint8, of any sizes; tiles of several images share a batch
    forward: (n, tile, tile, 3) uint8, n <= ``batch_size`` -> (n, tile, tile) float32
    Returns an (h, w) float32 for each image. ``overlap_px`` is at most half of ``tile_px``.
    """
    window = blend_window(tile_px, overlap_px)
    totals = [np.zeros((*image.shape[:2], 2), np.float32) for image in images]  # sum, weight
    places = [(index, y, x) for index, image in enumerate(images)
              for y in tile_starts(image.shape[0], tile_px, overlap_px)
              for x in tile_starts(image.shape[1], tile_px, overlap_px)]
    for start in range(0, len(places), batch_size):
        batch = places[start:start + batch_size]
        tiles = np.full((len(batch), tile_px, tile_px, 3), GLASS, np.uint8)
        for tile, (index, y, x) in zip(tiles, batch, strict=True):
            part = images[index][y:y + tile_px, x:x + tile_px]
            tile[:part.shape[0], :part.shape[1]] = part
        for answer, (index, y, x) in zip(forward(tiles), batch, strict=True):
            total = totals[index][y:y + tile_px, x:x + tile_px]
            weight = window[:total.shape[0], :total.shape[1]]
            total[..., 0] += answer[:total.shape[0], :total.shape[1]] * weight
            total[..., 1] += weight
    return [total[..., 0] / total[..., 1] for total in totals]
