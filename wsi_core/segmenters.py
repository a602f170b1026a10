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
from wsi_core.glass import (
    USUAL_MPP_UM,
    black_areas,
    closed,
    colour_and_darkness,
    colour_strength,
    disk,
    enlarged,
    glass_colour,
    odd_px,
    reduced,
    smoothed,
)


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
    small, mpp = reduced(rgb, mpp_um or USUAL_MPP_UM)
    colour = colour_strength(smoothed(small, 8.0, mpp), glass_colour(small))
    cut, _ = cv2.threshold(colour, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    cut = float(np.clip(cut, OTSU_LOWEST, OTSU_HIGHEST))
    sure = _as_bytes(_ramp(np.arange(256), cut, 0.75 * cut))[colour]
    sure = closed(sure, 32.0, mpp)
    sure[black_areas(small, mpp)] = 0
    return _as_share(cv2.morphologyEx(sure, cv2.MORPH_OPEN, disk(24.0, mpp)), rgb)


# ---------------------------------------------------------------------------- entropy

ENTROPY_WINDOW_UM = 88.0
ENTROPY_LOWEST, ENTROPY_HIGHEST = 0.7, 1.8  # bits
FILLED = 191  # sureness of an even hole, as a share of 255


@SEGMENTERS.register("entropy")
def entropy(rgb: np.ndarray, *, mpp_um: float | None) -> np.ndarray:
    """Local entropy of the grey levels, cut by Otsu's method within bounds.

    The levels are narrow near the slide's glass and wider towards the dark, and the glass lies
    in the middle of one of them, so that its noise does not count as disorder.
    """
    small, mpp = reduced(rgb, mpp_um or USUAL_MPP_UM, finest_um=USUAL_MPP_UM)
    grey = smoothed(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), 4.0, mpp)
    black = black_areas(small, mpp)
    levels = _grey_levels(float(glass_colour(small).mean()))[grey]
    bits = _local_entropy(levels, min(15, max(9, odd_px(ENTROPY_WINDOW_UM, mpp))))
    cut, _ = cv2.threshold(_as_bytes(bits / 8), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    cut = float(np.clip(cut / 255 * 8, ENTROPY_LOWEST, ENTROPY_HIGHEST))
    sure = _as_bytes(_ramp(bits, cut, 0.75 * cut))
    sure = closed(sure, 64.0, mpp)
    sure[black] = 0
    sure = cv2.erode(sure, disk(56.0, mpp))  # the window reaches beyond the tissue
    sure = _without_even_holes(sure, (levels < levels.max()) & ~black)
    return _as_share(sure, rgb)


def _without_even_holes(sure: np.ndarray, shaded: np.ndarray) -> np.ndarray:
    """Fills what tissue surrounds and is darker than glass: even tissue has no disorder."""
    count, labels = cv2.connectedComponents((sure < 128).view(np.uint8), connectivity=4)
    size = np.bincount(labels.ravel(), minlength=count)
    share = np.bincount(labels.ravel(), shaded.ravel(), minlength=count) / np.maximum(size, 1)
    fill = np.where(share > 0.5, np.uint8(FILLED), np.uint8(0))
    for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        fill[border] = 0
    fill[0] = 0
    return np.asarray(np.maximum(sure, fill[labels]))


def _grey_levels(glass: float) -> np.ndarray:
    """(256,) uint8: the level of each grey value."""
    edges, width, edge = [], 4.0, glass - 5.0
    while edge > 0:
        edges.append(edge)
        edge, width = edge - width, width * 1.1
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

COLOUR_FLOOR, TEXTURE_FLOOR = 0.026, 0.040  # optical density; the slide's noise may raise them
PLENTY = 0.12  # optical density that no glass has
QUIET = 0.05  # optical density, and colour of it, that may be the noise of glass
SAMPLE = 100_000  # pixels are enough to know that noise
FRINGE_COLOUR, FRINGE_UM = 0.040, 64.0  # less colour than that, thinner than that: no tissue
HALF = 128  # a sureness of 0.5, as a share of 255
SEED, WEAK = 140, 76  # sureness of 0.55 and 0.3, as shares of 255


@SEGMENTERS.register("stain")
def stain(rgb: np.ndarray, *, mpp_um: float | None) -> np.ndarray:
    """Optical density against the slide's own glass: its colour, and the texture of its darkness.

    Evidence e counts how far the two rise above noise; sureness is e2 / (1 + e2). Faint parts
    stay only where they touch surely stained ones, and gaps of an adipocyte's size are closed.
    """
    small, mpp = reduced(rgb, mpp_um or USUAL_MPP_UM)
    colour, dark = colour_and_darkness(smoothed(small, 6.0, mpp), glass_colour(small))
    dark = np.clip(dark, 0, PLENTY)  # an edge is no texture of its own
    texture = _variance(dark, 40.0, mpp)
    quiet = _sample(dark) < QUIET
    quiet &= _sample(colour) < QUIET
    colour_floor = _floor(COLOUR_FLOOR, _sample(colour)[quiet])
    texture_floor = _floor(TEXTURE_FLOOR ** 2, _sample(texture)[quiet])
    evidence = (colour / colour_floor) ** 2 + texture / texture_floor
    sure = _as_bytes(evidence / (1 + evidence))
    sure = closed(sure, 72.0, mpp)
    sure[black_areas(small, mpp)] = 0
    sure = cv2.erode(sure, disk(24.0, mpp))  # the windows reach beyond the tissue
    sure = _touching_seeds(sure, mpp)
    sure[_fringe(colour, sure >= HALF, mpp)] = HALF - 1
    return _as_share(sure, rgb)


def _fringe(colour: np.ndarray, found: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool: glass along the tissue's edge that the windows and the closing took in.

    Colourless, in a strip thinner than ``FRINGE_UM``, and not enclosed by coloured pixels.
    """
    pale = colour <= FRINGE_COLOUR
    gap = found & pale
    thick = cv2.morphologyEx(gap.view(np.uint8), cv2.MORPH_OPEN, disk(FRINGE_UM, mpp))
    gap &= thick == 0
    count, labels, stats, _ = cv2.connectedComponentsWithStats(pale.view(np.uint8), connectivity=4)
    where = labels[gap]
    inside = np.bincount(labels[found & pale], minlength=count)
    gap[gap] = inside[where] <= 0.5 * stats[where, cv2.CC_STAT_AREA]
    return np.asarray(gap)


def _variance(image: np.ndarray, window_um: float, mpp: float) -> np.ndarray:
    window = (odd_px(window_um, mpp),) * 2
    mean = cv2.blur(image, window)
    return np.asarray(np.maximum(cv2.blur(image * image, window) - mean * mean, 0))


def _sample(image: np.ndarray) -> np.ndarray:
    step = max(1, int(np.sqrt(image.size / SAMPLE)))
    return np.asarray(image[::step, ::step])


def _floor(usual: float, quiet: np.ndarray) -> float:
    """What glass does not reach: ``usual``, or up to twice as much on a noisy slide.

    That is the median and five robust standard deviations; not more, as pale tissue is quiet too.
    """
    if not len(quiet):
        return usual
    middle = float(np.median(quiet))
    noise = middle + 5 * 1.4826 * float(np.median(np.abs(quiet - middle)))
    return float(np.clip(noise, usual, 2 * usual))


def _touching_seeds(sure: np.ndarray, mpp: float) -> np.ndarray:
    """Takes away what is connected to no surely stained spot; (h, w) uint8 in and out."""
    count, labels = cv2.connectedComponents((sure >= WEAK).view(np.uint8))
    seeds = cv2.erode(sure, disk(40.0, mpp)) >= SEED
    keep = np.zeros(count, np.uint8)
    keep[labels[seeds]] = 1
    return np.asarray(sure * keep[labels])


# ---------------------------------------------------------------------------- shares of 255

def _as_bytes(share: np.ndarray) -> np.ndarray:
    """0..1 as 0..255, on which morphology is several times faster."""
    return np.asarray(np.rint(share * 255).astype(np.uint8))


def _as_share(sure: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """0..255 as 0..1, at the size of the segmenter's input."""
    return enlarged(sure, rgb).astype(np.float32) / np.float32(255)


def _ramp(values: np.ndarray, middle: float, half_width: float) -> np.ndarray:
    """0..1, 0.5 at ``middle``."""
    return np.clip(0.5 + (values - middle) / (2 * half_width), 0, 1)
