"""What is neither tissue nor glass on a small image of a whole slide: ink, and colourless dirt.

The colours of ink are those that haematoxylin, eosin and DAB do not have, alone or mixed: at about
8 um per px their hues lie between 105 and 170 (blue violet to pink) or near 15 (brown) of
OpenCV's 180, and their brightest channel seldom falls below 90. Special stains in green or strong
blue (trichrome, Alcian blue) look like ink: leave ``reject_pen`` off for those.
"""

from __future__ import annotations

import cv2
import numpy as np

from wsi_core.glass import (
    BLACK,
    USUAL_MPP_UM,
    closed,
    colour_and_darkness,
    disk,
    enlarged,
    glass_colour,
    reduced,
    smoothed,
)

Band = tuple[tuple[int, int, int], tuple[int, int, int]]  # lowest and highest hue, sat., value

# ink: what is surely its colour, and what is its colour where it touches that
SURE_INK: dict[str, tuple[Band, ...]] = {
    "green": (((35, 60, 25), (92, 255, 240)),),
    "blue": (((92, 110, 40), (106, 255, 255)), ((106, 155, 40), (119, 255, 255))),
    "red": (((173, 185, 110), (179, 255, 255)), ((0, 185, 110), (6, 255, 255))),
    "black": (((0, 0, 0), (179, 255, 45)), ((30, 0, 0), (179, 150, 70)))}  # not brown: dense DAB
LIKELY_INK: dict[str, tuple[Band, ...]] = {
    "green": (((33, 25, 0), (100, 255, 255)),),
    "blue": (((90, 60, 0), (122, 255, 255)), ((122, 150, 0), (128, 255, 255))),
    "red": (((168, 130, 60), (179, 255, 255)), ((0, 130, 60), (10, 255, 255))),
    "black": (((0, 0, 0), (179, 100, 125)),)}
SPECK_UM = {"green": 24.0, "blue": 24.0, "red": 96.0, "black": 56.0}  # finer: blood, pigment
REACH_UM = 2000.0  # of a stroke's thin parts, from where it is surely ink

GREY_DENSITY, GREY_SHARE = 0.12, 0.16  # darker than glass; colour as a share of that darkness


def reject_pen(rgb: np.ndarray, *, mpp_um: float | None) -> np.ndarray:
    """(h, w) bool: ink of a green, blue, red or black pen on an (h, w, 3) uint8 RGB image.

    mpp_um: um per px, None when unknown (8 is assumed).
    """
    small, mpp = reduced(rgb, mpp_um or USUAL_MPP_UM)
    hsv = cv2.cvtColor(smoothed(small, 8.0, mpp), cv2.COLOR_RGB2HSV)
    ink = np.zeros(small.shape[:2], bool)
    for name, bands in SURE_INK.items():
        seeds = cv2.morphologyEx(_within(hsv, bands), cv2.MORPH_OPEN, disk(SPECK_UM[name], mpp))
        if seeds.any():
            ink |= _grown(seeds > 0, _within(hsv, LIKELY_INK[name]) > 0, REACH_UM / mpp)
    whole = closed(ink.view(np.uint8), 80.0, mpp)
    whole = cv2.dilate(whole, disk(24.0, mpp))  # its blurred edge
    return enlarged(whole, rgb) > 0


def _grown(seeds: np.ndarray, likely: np.ndarray, reach_px: float) -> np.ndarray:
    """(h, w) bool: the seeds, and of what is likely the pieces that touch one, so far from it."""
    candidates = seeds | likely
    count, labels = cv2.connectedComponents(candidates.view(np.uint8))
    touching = np.zeros(count, bool)
    touching[labels[seeds]] = True
    distance = cv2.distanceTransform((~seeds).view(np.uint8), cv2.DIST_L2, 5)
    return np.asarray(touching[labels] & candidates & (distance <= reach_px))


def _within(hsv: np.ndarray, bands: tuple[Band, ...]) -> np.ndarray:
    """(h, w) uint8, 255 where a pixel lies in one of the bands."""
    return np.asarray(np.bitwise_or.reduce([cv2.inRange(hsv, *band) for band in bands]))


def reject_artefacts(rgb: np.ndarray, *, mpp_um: float | None) -> np.ndarray:
    """(h, w) bool: what is dark or grey and has no stain on an (h, w, 3) uint8 RGB image.

    Cover-slip edges, rims of bubbles, dust, frames and black borders. mpp_um: um per px, None
    when unknown (8 is assumed).
    """
    small, mpp = reduced(rgb, mpp_um or USUAL_MPP_UM)
    smooth = smoothed(small, 10.0, mpp)
    colour, dark = colour_and_darkness(smooth, glass_colour(small))
    dirt = (dark > GREY_DENSITY) & (colour < GREY_SHARE * dark)
    dirt |= cv2.inRange(smooth, (0, 0, 0), (BLACK,) * 3) > 0
    kept = cv2.morphologyEx(dirt.astype(np.uint8), cv2.MORPH_OPEN, disk(16.0, mpp))
    return enlarged(cv2.dilate(kept, disk(32.0, mpp)), rgb) > 0
