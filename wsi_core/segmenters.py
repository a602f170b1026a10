"""Classical tissue detection on a small image of a whole slide, about 8 um per px.

Every segmenter takes (h, w, 3) uint8 RGB and its um per px (None: unknown, taken for 8) and
answers with (h, w) float32 in 0..1, how surely there is tissue; 0.5 is the natural cut. All kernel
sizes are micrometres. Pens and artefacts are taken off afterwards (``wsi_core.artefacts``).

* ``otsu``: Otsu's threshold (1979, doi 10.1109/TSMC.1979.4310076) of the colour's strength
* ``entropy``: disorder of the grey levels, after the idea of EntropyMasker (Song et al. 2023,
  doi 10.1038/s41598-023-29638-1)
* ``stain``: optical density against the slide's own glass, in colour and in texture
"""

from __future__ import annotations

from typing import Protocol

import cv2
import numpy as np

from utils.registry import Registry

USUAL_MPP_UM = 8.0  # of an overview whose scale is unknown
BLACK = 50  # brightest channel of what was not scanned or lies behind the slide's edge
DEFAULT_GLASS = 243.0  # where an image shows no glass


class Segmenter(Protocol):
    """From a picture of a slide to the probability of tissue."""

    def __call__(self, rgb: np.ndarray, *, mpp_um: float | None) -> np.ndarray:
        """(h, w, 3) uint8 at ``mpp_um`` um per px (None = unknown) -> (h, w) float32 in 0..1."""
        ...


SEGMENTERS: Registry[Segmenter] = Registry("segmenter")


# ---------------------------------------------------------------------------- otsu

OTSU_LOWEST, OTSU_HIGHEST = 12.0, 20.0  # grey levels between the strongest and weakest channel


@SEGMENTERS.register("otsu")
def otsu(rgb: np.ndarray, *, mpp_um: float | None) -> np.ndarray:
    """Otsu's threshold of max(R, G, B) - min(R, G, B), with a soft margin.

    The threshold is held between what noise reaches and what tissue has, as Otsu's method
    splits an image of glass alone, or of tissue alone, as readily as one of both.
    """
    mpp = mpp_um or USUAL_MPP_UM
    colour = _smoothed(_colour_strength(rgb), 8.0, mpp)
    cut, _ = cv2.threshold(colour, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    cut = float(np.clip(cut, OTSU_LOWEST, OTSU_HIGHEST))
    sure = _ramp(colour.astype(np.float32), cut, 0.75 * cut)
    sure[_black(rgb, mpp)] = 0
    sure = cv2.morphologyEx(sure, cv2.MORPH_CLOSE, _disk(32.0, mpp))
    return np.asarray(cv2.morphologyEx(sure, cv2.MORPH_OPEN, _disk(24.0, mpp)))


# ---------------------------------------------------------------------------- entropy

ENTROPY_WINDOW_UM = 88.0
ENTROPY_LOWEST, ENTROPY_HIGHEST = 0.9, 1.8  # bits


@SEGMENTERS.register("entropy")
def entropy(rgb: np.ndarray, *, mpp_um: float | None) -> np.ndarray:
    """Local entropy of the grey levels, cut at the valley of its histogram.

    The levels are narrow near the slide's glass and wider towards the dark, and the glass lies
    in the middle of one of them, so that its noise does not count as disorder.
    """
    mpp = mpp_um or USUAL_MPP_UM
    height, width = rgb.shape[:2]
    small, small_mpp = rgb, mpp
    if mpp < USUAL_MPP_UM / 1.25:  # finer detail would only cost time
        scale = mpp / USUAL_MPP_UM
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small, small_mpp = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), USUAL_MPP_UM
    grey = _smoothed(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), 4.0, small_mpp)
    black = _black(small, small_mpp)
    levels = _grey_levels(float(_glass(small).mean()))[grey]
    bits = _local_entropy(levels, min(15, max(9, _odd(ENTROPY_WINDOW_UM, small_mpp))))
    bits[black] = 0
    as_bytes = np.minimum(bits * 50, 255).astype(np.uint8)
    cut, _ = cv2.threshold(as_bytes, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    cut = float(np.clip(cut / 50, ENTROPY_LOWEST, ENTROPY_HIGHEST))
    sure = _ramp(bits, cut, 0.75 * cut)
    sure = cv2.morphologyEx(sure, cv2.MORPH_CLOSE, _disk(64.0, small_mpp))
    sure = cv2.erode(sure, _disk(40.0, small_mpp))  # the window reaches beyond the tissue
    sure = _without_even_holes(sure, (levels < levels.max()) & ~black)
    if small is not rgb:
        sure = cv2.resize(sure, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(sure)


def _without_even_holes(sure: np.ndarray, shaded: np.ndarray) -> np.ndarray:
    """Fills what tissue surrounds and is darker than glass: even tissue has no disorder."""
    count, labels = cv2.connectedComponents((sure < 0.5).view(np.uint8), connectivity=4)
    size = np.bincount(labels.ravel(), minlength=count)
    share = np.bincount(labels.ravel(), shaded.ravel(), minlength=count) / np.maximum(size, 1)
    fill = (share > 0.5).astype(np.float32)
    for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        fill[border] = 0
    fill[0] = 0
    return np.asarray(np.maximum(sure, 0.75 * fill[labels]))


def _grey_levels(glass: float) -> np.ndarray:
    """(256,) uint8: the level of each grey value."""
    edges, width, edge = [], 7.0, glass - 5.0
    while edge > 0:
        edges.append(edge)
        edge, width = edge - width, width * 1.08
    return np.searchsorted(np.array(edges[::-1]), np.arange(256), side="right").astype(np.uint8)


def _local_entropy(levels: np.ndarray, window: int) -> np.ndarray:
    """Shannon entropy in bits of an (h, w) uint8 image, in windows of at most 15 x 15 px."""
    share = np.arange(256, dtype=np.float32) / (window * window)
    with np.errstate(divide="ignore", invalid="ignore"):
        term = np.where(share > 0, -share * np.log2(share), 0).astype(np.float32)
    bits = np.zeros(levels.shape, np.float32)
    for level in np.flatnonzero(np.bincount(levels.ravel(), minlength=1)):
        count = cv2.boxFilter((levels == level).view(np.uint8), cv2.CV_8U, (window, window),
                              normalize=False, borderType=cv2.BORDER_REFLECT)
        bits += cv2.LUT(count, term)
    return bits


# ---------------------------------------------------------------------------- stain

COLOUR_FLOOR, TEXTURE_FLOOR = 0.040, 0.040  # optical density; the slide's noise may raise them
PLENTY = 0.12  # optical density that no glass has
SEED, WEAK = 0.8, 0.3


@SEGMENTERS.register("stain")
def stain(rgb: np.ndarray, *, mpp_um: float | None) -> np.ndarray:
    """Optical density against the slide's own glass: its colour, and the texture of its darkness.

    Evidence e counts how far the two rise above noise; sureness is e2 / (1 + e2). Faint parts
    stay only where they touch surely stained ones, and gaps of an adipocyte's size are closed.
    """
    mpp = mpp_um or USUAL_MPP_UM
    density = _optical_density(_smoothed(rgb, 6.0, mpp), _glass(rgb))
    red, green, blue = cv2.split(density)
    colour = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    dark = np.clip((red + green + blue) / 3, 0, PLENTY)  # an edge is no texture of its own
    texture = _variance(dark, 40.0, mpp)
    quiet = (dark < 0.05) & (colour < 0.05)
    colour_floor = max(COLOUR_FLOOR, _noise(colour[quiet]))
    around = _smoothed(cv2.min(colour, 3 * colour_floor), 14.0, mpp)
    evidence = (cv2.max(colour, around) / colour_floor) ** 2
    evidence += texture / max(TEXTURE_FLOOR ** 2, _noise(texture[quiet]))
    sure = evidence / (1 + evidence)
    sure[_black(rgb, mpp)] = 0
    sure = cv2.morphologyEx(sure, cv2.MORPH_CLOSE, _disk(96.0, mpp))
    sure = cv2.erode(sure, _disk(24.0, mpp))  # the windows reach beyond the tissue
    return _touching_seeds(sure, mpp)


def _optical_density(rgb: np.ndarray, glass: np.ndarray) -> np.ndarray:
    """(h, w, 3) float32: -ln of the share of the glass's light that is left."""
    values = np.arange(1, 257, dtype=np.float32)
    table = np.log((glass + 1)[None, None] / values[None, :, None])
    return np.asarray(cv2.LUT(rgb, table.astype(np.float32)))


def _variance(image: np.ndarray, window_um: float, mpp: float) -> np.ndarray:
    window = (_odd(window_um, mpp),) * 2
    mean = cv2.blur(image, window)
    return np.asarray(cv2.max(cv2.blur(image * image, window) - mean * mean, 0))


def _noise(values: np.ndarray) -> float:
    """A value that glass does not reach: median and five robust standard deviations."""
    if not len(values):
        return 0.0
    sample = values[::max(1, len(values) // 20_000)]
    middle = float(np.median(sample))
    return middle + 5 * 1.4826 * float(np.median(np.abs(sample - middle)))


def _touching_seeds(sure: np.ndarray, mpp: float) -> np.ndarray:
    """Takes away what is connected to no surely stained spot."""
    count, labels = cv2.connectedComponents((sure >= WEAK).view(np.uint8))
    seeds = cv2.erode((sure >= SEED).astype(np.uint8), _disk(24.0, mpp)) > 0
    keep = np.zeros(count, np.float32)
    keep[np.unique(labels[seeds])] = 1
    keep[0] = 1
    return np.asarray(sure * keep[labels])


# ---------------------------------------------------------------------------- shared

def _glass(rgb: np.ndarray) -> np.ndarray:
    """(3,) float64: the colour of bare glass, the commonest bright and colourless even colour."""
    step = max(1, int(np.sqrt(rgb.shape[0] * rgb.shape[1] / 250_000)))
    pixels = rgb[::step, ::step].reshape(-1, 3)
    high, low = pixels.max(1), pixels.min(1)
    bright = pixels[(low >= 150) & (high - low <= 24) & (low < 254)]
    if len(bright) < max(1, 0.005 * len(pixels)):
        return np.full(3, 255.0 if (low >= 254).any() else DEFAULT_GLASS)
    return np.array([float(np.argmax(_smooth_histogram(channel))) for channel in bright.T])


def _smooth_histogram(values: np.ndarray) -> np.ndarray:
    return np.convolve(np.bincount(values, minlength=256), np.ones(5), mode="same")


def _black(rgb: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool: not scanned, or beyond the slide."""
    black = (cv2.inRange(rgb, (0, 0, 0), (BLACK,) * 3) > 0).view(np.uint8)
    black = cv2.morphologyEx(black, cv2.MORPH_OPEN, _disk(40.0, mpp))
    return np.asarray(cv2.dilate(black, _disk(40.0, mpp)) > 0)


def _colour_strength(rgb: np.ndarray) -> np.ndarray:
    """(h, w) uint8: strongest minus weakest channel; 0 for every grey."""
    red, green, blue = cv2.split(rgb)
    return cv2.subtract(cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue))


def _smoothed(image: np.ndarray, sigma_um: float, mpp: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), max(0.3, sigma_um / mpp))


def _ramp(values: np.ndarray, middle: float, half_width: float) -> np.ndarray:
    """0..1, 0.5 at ``middle``."""
    return np.clip(0.5 + (values - middle) / (2 * half_width), 0, 1)


def _odd(um: float, mpp: float) -> int:
    return 2 * round(um / mpp / 2) + 1


def _disk(diameter_um: float, mpp: float) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (_odd(diameter_um, mpp),) * 2)
