"""Pictures of a slide for a person: outlines, tissue, and the grid of patches on an overview.

The conventions are AtlasPatch's (its ``visualization/`` folder). Every function takes an overview
(h, w, 3) uint8 RGB that is ``downsample`` (x, y) times below level 0, makes it smaller where its
longer side exceeds ``longest_px``, and draws at the scale the picture then has: a level-0 pixel
lies in the picture's pixel that covers it, whatever fractions the downsamples have.
"""

from __future__ import annotations

import numpy as np

from wsi_core.coords import PatchCoords
from wsi_core.tissue import Tissue

LONGEST_PX = 1024
CONTOUR_COLOUR, CONTOUR_PX = (255, 0, 0), 2
HOLE_COLOUR, HOLE_PX = (0, 0, 255), 1
GRID_COLOUR = (0, 0, 0)
TISSUE_COLOUR, TISSUE_ALPHA = (0, 255, 0), 80 / 255

Pair = tuple[float, float]


def shrink(rgb: np.ndarray, downsample: Pair, *, longest_px: int = LONGEST_PX
           ) -> tuple[np.ndarray, Pair]:
    """A copy of an overview with sides of at most ``longest_px``, and its own downsample."""
    import cv2

    height, width = rgb.shape[:2]
    factor = max(height, width) / longest_px
    if factor <= 1:
        return rgb.copy(), downsample
    size = (max(1, round(width / factor)), max(1, round(height / factor)))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    return small, (downsample[0] * width / size[0], downsample[1] * height / size[1])


def draw_contours(rgb: np.ndarray, downsample: Pair, tissue: Tissue, *,
                  longest_px: int = LONGEST_PX) -> np.ndarray:
    """Tissue outlined in red, 2 px wide, holes in blue, 1 px."""
    import cv2

    canvas, scale = shrink(rgb, downsample, longest_px=longest_px)
    cv2.polylines(canvas, [_pixels(contour, scale) for contour in tissue.contours], True,
                  CONTOUR_COLOUR, CONTOUR_PX)
    holes = [_pixels(hole, scale) for inner in tissue.holes for hole in inner]
    cv2.polylines(canvas, holes, True, HOLE_COLOUR, HOLE_PX)
    return canvas


def draw_mask_bw(rgb: np.ndarray, downsample: Pair, tissue: Tissue, *,
                 longest_px: int = LONGEST_PX) -> np.ndarray:
    """(h, w) uint8, 255 on tissue and 0 elsewhere, of the size that the other pictures have."""
    import cv2

    canvas, scale = shrink(rgb, downsample, longest_px=longest_px)
    mask = np.zeros(canvas.shape[:2], np.uint8)
    for contour, holes in zip(tissue.contours, tissue.holes, strict=True):
        piece = np.zeros_like(mask)
        cv2.fillPoly(piece, [_pixels(contour, scale)], 255)
        for hole in holes:
            cv2.fillPoly(piece, [_pixels(hole, scale)], 0)
        mask |= piece  # a piece inside another one's hole stays
    return mask


def draw_mask_overlay(rgb: np.ndarray, downsample: Pair, tissue: Tissue, *,
                      longest_px: int = LONGEST_PX) -> np.ndarray:
    """Tissue tinted green, 80/255 of the colour."""
    canvas, _ = shrink(rgb, downsample, longest_px=longest_px)
    covered = draw_mask_bw(rgb, downsample, tissue, longest_px=longest_px) > 0
    tint = np.asarray(TISSUE_COLOUR) * TISSUE_ALPHA
    canvas[covered] = np.rint(canvas[covered] * (1 - TISSUE_ALPHA) + tint).astype(np.uint8)
    return canvas


def draw_grid(rgb: np.ndarray, downsample: Pair, patches: PatchCoords, *,
              longest_px: int = LONGEST_PX) -> np.ndarray:
    """A black rectangle a patch, and below the slide lines of text that say what the grid is."""
    import cv2

    canvas, scale = shrink(rgb, downsample, longest_px=longest_px)
    first = _pixels(patches.coords, scale)
    last = _pixels(patches.coords + np.asarray(patches.footprint_px_l0) - 1, scale)
    corners = np.stack([first, np.stack([last[:, 0], first[:, 1]], axis=1), last,
                        np.stack([first[:, 0], last[:, 1]], axis=1)], axis=1)
    cv2.polylines(canvas, list(corners), True, GRID_COLOUR, 1)
    return np.concatenate([canvas, _text_strip(canvas.shape[1], grid_facts(patches))])


def grid_facts(patches: PatchCoords) -> list[str]:
    """What the text says: number of patches, sizes, step and scale, a line each."""
    def times(pair: tuple[int, int]) -> str:
        return f"{pair[0]} x {pair[1]} px"

    mpp = "unknown" if patches.mpp_um is None else f"{patches.mpp_um:.4g} um/px"
    return [f"patches: {len(patches)}",
            f"slide: {times(patches.slide_size)}",
            f"patch: {patches.output_size} px at {mpp}",
            f"on level 0: {times(patches.footprint_px_l0)}",
            f"step: {times(patches.step_px_l0)}"]


def _pixels(points_l0: np.ndarray, downsample: Pair) -> np.ndarray:
    """(n, 2) int32: the picture's pixel that covers each level-0 pixel."""
    pixels = np.asarray(points_l0).reshape(-1, 2) / np.asarray(downsample)
    return np.asarray(np.floor(pixels), np.int32)


def _text_strip(width: int, lines: list[str]) -> np.ndarray:
    """(h, width, 3) uint8: black text on white, at most half as wide as the picture."""
    import cv2

    font = cv2.FONT_HERSHEY_SIMPLEX
    sizes = [cv2.getTextSize(line, font, 1.0, 1)[0] for line in lines]
    widest, tallest = max(w for w, _ in sizes), max(h for _, h in sizes)
    letters = min(0.5, width / 2 / widest)
    line_px = max(1, round(1.7 * tallest * letters))
    pad = max(1, line_px // 3)
    strip = np.full((line_px * len(lines) + 2 * pad, width, 3), 255, np.uint8)
    for number, line in enumerate(lines):
        cv2.putText(strip, line, (pad, pad + line_px * (number + 1) - line_px // 4), font,
                    letters, GRID_COLOUR, 1, cv2.LINE_AA)
    return strip
