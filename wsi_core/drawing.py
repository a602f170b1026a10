"""Pictures of what patching did: outlines on the slide (mask), and the patches alone (stitch)."""

from __future__ import annotations

import math

import numpy as np

from wsi_core.tissue import Tissue

TISSUE_COLOUR = (0, 255, 0)
HOLE_COLOUR = (0, 0, 255)
NUMBER_COLOUR = (255, 0, 0)


def draw_mask(
    image: np.ndarray,
    downsample: tuple[float, float],
    tissue: Tissue,
    *,
    line_thickness: float = 250,
    number: bool = False,
) -> np.ndarray:
    """A copy of ``image`` with tissue outlined in green and holes in blue.

    image: (h, w, 3) uint8 RGB, ``downsample`` (x, y) times below level 0
    line_thickness: level-0 px; drawn at least one pixel wide
    number: write each contour's number, as ``keep_ids`` counts, at its centroid in red
    """
    import cv2

    canvas = np.array(image)
    thickness = max(1, int(line_thickness / math.sqrt(downsample[0] * downsample[1])))

    def to_image(outline: np.ndarray) -> np.ndarray:
        return np.asarray(outline / np.asarray(downsample), np.int32)

    for contour, holes in zip(tissue.contours, tissue.holes, strict=True):
        cv2.drawContours(canvas, [to_image(contour)], -1, TISSUE_COLOUR, thickness, cv2.LINE_8)
        cv2.drawContours(canvas, [to_image(hole) for hole in holes], -1, HOLE_COLOUR, thickness,
                         cv2.LINE_8)
    if number:  # after all outlines, so that none covers a number
        for index, contour in enumerate(tissue.contours):
            x, y = to_image(contour).mean(axis=0).astype(int).tolist()
            scale = min(2.0, max(0.5, max(image.shape[:2]) / 1000))
            cv2.putText(canvas, str(index), (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale,
                        NUMBER_COLOUR, max(1, round(5 * scale)))
    return canvas


def draw_stitch(
    image: np.ndarray,
    downsample: tuple[float, float],
    coords: np.ndarray,
    footprint_px_l0: tuple[int, int],
) -> np.ndarray:
    """The patches of a slide at their places on black.

    image: (h, w, 3) uint8 RGB of the whole slide, ``downsample`` (x, y) times below level 0
    coords: (N, 2) top-left corners and footprint_px_l0: (x, y) side of a patch, in level-0 px
    """
    scale = np.asarray(downsample, np.float64)
    corners = np.ceil(coords / scale).astype(np.int64)
    width, height = np.ceil(np.asarray(footprint_px_l0) / scale).astype(np.int64).tolist()
    canvas = np.zeros_like(image)
    for x, y in corners.clip(0).tolist():
        canvas[y:y + height, x:x + width] = image[y:y + height, x:x + width]
    return canvas
