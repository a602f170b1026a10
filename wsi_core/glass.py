"""Small images of whole slides: their glass, what is black, optical density, kernels in um.

Ground of ``wsi_core.segmenters`` and ``wsi_core.artefacts``. Images are (h, w, 3) uint8 RGB of
about 8 um per px; ``mpp`` is theirs, in um per px.
"""

from __future__ import annotations

import cv2
import numpy as np

USUAL_MPP_UM = 8.0  # of an overview whose scale is unknown
BLACK = 40  # brightest channel of what was not scanned or lies behind the slide's edge
DEFAULT_GLASS = 243.0  # where an image shows no glass
GLASS_DARKEST, GLASS_COLOUR = 120, 24  # weakest channel, and how far it is from the strongest
FILLED = 254  # from here on white may be what the scanner's file puts where it did not scan
TINTED_GLASS, EVEN = 64, 8  # the same of glass in a yellow light, and how little it changes
LEAST_GLASS, LEAST_TINTED_GLASS = 0.005, 0.2  # share of the image
PEAK = 0.25  # of the highest peak, for another to count
SAMPLE = 100_000  # pixels are enough to know the glass
FINEST_UM = 4.0  # finer detail than this says nothing of where tissue is, and costs time


def glass_colour(rgb: np.ndarray) -> np.ndarray:
    """(3,) float64: the brightest common colour that is nearly grey.

    Not the commonest: pale tissue may cover more than the glass. White (255) is the glass only
    when nothing else can be: scanners fill with it what they left out, while their glass is grey.
    Tinted glass is taken where there is no grey one and it is even. ``DEFAULT_GLASS`` when the
    image shows none.
    """
    step = max(1, int(np.sqrt(rgb.shape[0] * rgb.shape[1] / SAMPLE)))
    sample = cv2.GaussianBlur(np.ascontiguousarray(rgb[::step, ::step]), (0, 0), 1)
    high, low = _extremes(*cv2.split(sample))
    light = (low >= GLASS_DARKEST) & (low < FILLED)
    grey = light & (high - low <= GLASS_COLOUR)
    if grey.mean() >= LEAST_GLASS:
        return _brightest_peak(sample[grey])
    if (low >= FILLED).mean() >= LEAST_GLASS:
        return np.full(3, 255.0)
    change = cv2.morphologyEx(sample[:, :, 1], cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    tinted = light & (high - low <= TINTED_GLASS) & (change <= EVEN)
    return (_brightest_peak(sample[tinted]) if tinted.mean() >= LEAST_TINTED_GLASS
            else np.full(3, DEFAULT_GLASS))


def _brightest_peak(pixels: np.ndarray) -> np.ndarray:
    """(3,) median colour around the brightest of the high peaks of the weakest channel."""
    weakest = pixels.min(1)
    histogram = np.convolve(np.bincount(weakest, minlength=256), np.ones(5), mode="same")
    around = cv2.dilate(histogram[None], np.ones((1, 11)))[0]
    peaks = np.flatnonzero((histogram == around) & (histogram >= PEAK * histogram.max()))
    near = np.abs(weakest.astype(int) - peaks[-1]) <= 3
    return np.asarray(np.median(pixels[near], axis=0), np.float64)


def colour_and_darkness(rgb: np.ndarray, glass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the optical density: its largest difference between channels (0 = grey), and its mean.

    The density of a channel is -ln of the share of the glass's light that is left, so that glass
    has 0. Both (h, w) float32; the mean is below 0 where it is brighter than glass.
    """
    values = np.arange(1, 257, dtype=np.float32)
    red, green, blue = (
        np.asarray(cv2.LUT(channel, np.log((light + 1) / values).astype(np.float32)))
        for channel, light in zip(cv2.split(rgb), glass, strict=True))
    high, low = _extremes(red, green, blue)
    return high - low, (red + green + blue) / 3


def colour_strength(rgb: np.ndarray, glass: np.ndarray) -> np.ndarray:
    """(h, w) uint8: strongest minus weakest channel when glass is made white; 0 for its greys."""
    values = np.arange(256)
    high, low = _extremes(*(
        np.asarray(cv2.LUT(channel, np.minimum(values * (255 / light), 255).astype(np.uint8)))
        for channel, light in zip(cv2.split(rgb), glass, strict=True)))
    return np.asarray(high - low)


def _extremes(red: np.ndarray, green: np.ndarray, blue: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray]:
    """The greatest and the least channel at every pixel."""
    return (np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue))


def reduced(rgb: np.ndarray, mpp: float, *, finest_um: float = FINEST_UM
            ) -> tuple[np.ndarray, float]:
    """The image and its um per px, averaged down when it is clearly finer than ``finest_um``."""
    if mpp > finest_um / 1.25:
        return rgb, mpp
    height, width = rgb.shape[:2]
    size = (max(1, round(width * mpp / finest_um)), max(1, round(height * mpp / finest_um)))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)), finest_um


def enlarged(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    """What was found on a ``reduced`` image, at the (h, w) of the original."""
    height, width = like.shape[:2]
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))


def black_areas(rgb: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool: not scanned, or beyond the slide, and 20 um around it."""
    black = cv2.morphologyEx(cv2.inRange(rgb, (0, 0, 0), (BLACK,) * 3), cv2.MORPH_OPEN,
                             disk(40.0, mpp))
    return np.asarray(cv2.dilate(black, disk(40.0, mpp)) > 0)


def smoothed(image: np.ndarray, sigma_um: float, mpp: float) -> np.ndarray:
    """Blurred by a Gaussian, never less than a third of a pixel wide."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), max(0.3, sigma_um / mpp)))


def closed(image: np.ndarray, diameter_um: float, mpp: float) -> np.ndarray:
    """Gaps up to so wide filled; those at the border of the image are no gaps."""
    kernel = disk(diameter_um, mpp)
    rim = len(kernel) // 2
    framed = cv2.copyMakeBorder(image, rim, rim, rim, rim, cv2.BORDER_CONSTANT, value=0)
    filled = cv2.morphologyEx(framed, cv2.MORPH_CLOSE, kernel)
    return np.ascontiguousarray(filled[rim:rim + image.shape[0], rim:rim + image.shape[1]])


def odd_px(um: float, mpp: float) -> int:
    """The odd number of px nearest to a length in um, at least 1."""
    return 2 * round(um / mpp / 2) + 1


def disk(diameter_um: float, mpp: float) -> np.ndarray:
    """A round kernel."""
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE,
                                                (odd_px(diameter_um, mpp),) * 2))
