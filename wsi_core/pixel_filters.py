"""Which patches show nothing: glass (white) and what lies beyond the scan (black).

The definitions are AtlasPatch's: a share of the patch's pixels, not a mean, so that a patch with a
little tissue is kept where CLAM's filters on means would drop it.
"""

from __future__ import annotations

import numpy as np

MIN_PERCENT = 70  # of the pixels
MIN_VALUE = 200  # HSV value of a white pixel, 0..255


def is_white(patch: np.ndarray, threshold: int) -> bool:
    """Do 70 % of the pixels have an HSV saturation below ``threshold`` and a value of 200 or more?

    patch: (h, w, 3) uint8 RGB at its output size; threshold 0..255, AtlasPatch's default is 15
    """
    import cv2

    hsv = cv2.cvtColor(patch, cv2.COLOR_RGB2HSV)
    return _enough((hsv[..., 1] < threshold) & (hsv[..., 2] >= MIN_VALUE))


def is_black(patch: np.ndarray, threshold: int) -> bool:
    """Are 70 % of the pixels darker than ``threshold`` in grey?

    patch: (h, w, 3) uint8 RGB at its output size; threshold 0..255, AtlasPatch's default is 50
    """
    import cv2

    return _enough(cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY) < threshold)


def _enough(pixels: np.ndarray) -> bool:
    return 100 * int(np.count_nonzero(pixels)) >= MIN_PERCENT * pixels.size
