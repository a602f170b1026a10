"""What is neither tissue nor glass on a small image of a whole slide: ink, and colourless dirt."""

from __future__ import annotations

import cv2
import numpy as np

USUAL_MPP_UM = 8.0  # of an overview whose scale is unknown


def reject_pen(rgb: np.ndarray, *, mpp_um: float | None) -> np.ndarray:
    """(h, w) bool: ink of a pen (green, blue, red, black) on an (h, w, 3) uint8 RGB image."""
    mpp = mpp_um or USUAL_MPP_UM
    hsv = cv2.cvtColor(cv2.GaussianBlur(rgb, (0, 0), max(0.3, 8.0 / mpp)), cv2.COLOR_RGB2HSV)
    green = cv2.inRange(hsv, (35, 50, 20), (98, 255, 230))
    blue = cv2.inRange(hsv, (98, 110, 20), (122, 255, 255))
    red = cv2.inRange(hsv, (0, 190, 120), (6, 255, 255)) | cv2.inRange(
        hsv, (174, 190, 120), (179, 255, 255))
    black = cv2.inRange(hsv, (0, 0, 0), (179, 255, 60))
    ink = green | blue | red | black
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * round(24.0 / mpp) + 1,) * 2)
    return np.asarray(cv2.dilate(cv2.morphologyEx(ink, cv2.MORPH_OPEN, kernel), kernel) > 0)


def reject_artefacts(rgb: np.ndarray, *, mpp_um: float | None) -> np.ndarray:
    """(h, w) bool: dark or grey without stain on an (h, w, 3) uint8 RGB image."""
    mpp = mpp_um or USUAL_MPP_UM
    smooth = cv2.GaussianBlur(rgb, (0, 0), max(0.3, 8.0 / mpp))
    high, low = smooth.max(2), smooth.min(2)
    grey = (high < 200) & (high - low < 14)
    return grey | (high < 50)
