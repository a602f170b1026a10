"""Tissue segmentation by colour saturation, as CLAM does it (Lu et al. 2021, doi
10.1038/s41551-020-00682-w): median filter, threshold, closing, contours, area filter.

Contours are level-0 pixels; the order is that of OpenCV's ``findContours``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import ItemFailed
from wsi_core.presets import PatchingParameters

if TYPE_CHECKING:
    from wsi_core.slide import Slide

UNIT_AREA_PX_L0 = 512 * 512  # what a_t and a_h count


@dataclass(frozen=True)
class Tissue:
    """Outlines of tissue and of the holes in it.

    contours: one (n, 2) int32 array of x, y in level-0 px a piece of tissue
    holes: for each contour, a list of such arrays
    n_too_small: pieces that the area filter left out
    """

    contours: list[np.ndarray] = field(default_factory=list)
    holes: list[list[np.ndarray]] = field(default_factory=list)
    n_too_small: int = 0

    def __bool__(self) -> bool:
        return bool(self.contours)

    @property
    def n_holes(self) -> int:
        """Holes of all contours together."""
        return sum(map(len, self.holes))


def segment_tissue(slide: Slide, parameters: PatchingParameters, *, seg_level: int) -> Tissue:
    """Segment level ``seg_level`` of a slide (area-reduced by strips when it is huge).

    Raises SlideError when the level cannot be read, ItemFailed for contour ids that are not there.
    """
    from wsi_core.slide import read_level

    rgb, downsample = read_level(slide, seg_level)
    return segment_image(rgb, downsample, parameters)


def segment_image(
    rgb: np.ndarray, downsample: tuple[float, float], parameters: PatchingParameters
) -> Tissue:
    """Segment an (h, w, 3) uint8 RGB image that is ``downsample`` (x, y) times below level 0.

    Returns contours and holes in level-0 px, filtered by area and by ``keep_ids`` and
    ``exclude_ids``. Raises ItemFailed when one of those ids does not exist.
    """
    return outline_tissue(tissue_mask(rgb, parameters), downsample, parameters)


def outline_tissue(
    mask: np.ndarray, downsample: tuple[float, float], parameters: PatchingParameters
) -> Tissue:
    """Outlines of a binary (h, w) mask that is ``downsample`` (x, y) times below level 0.

    Filtered as the parameters say: areas ``a_t`` and ``a_h``, ``max_n_holes``, ``keep_ids`` and
    ``exclude_ids``. Raises ItemFailed when one of those ids does not exist.
    """
    import cv2

    found, hierarchy = cv2.findContours(
        np.ascontiguousarray(mask, np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    outlines = [np.asarray(outline) for outline in found]
    # OpenCV gives None for a blank image; the fourth column is the parent, -1 = outer
    parents = np.empty(0, int) if hierarchy is None else np.asarray(hierarchy).reshape(-1, 4)[:, 3]
    contours, holes = _filter_contours(outlines, parents, downsample, parameters)
    selected = _select_ids(len(contours), parameters)
    scale = np.asarray(downsample, np.float64)

    def to_level_0(outline: np.ndarray) -> np.ndarray:
        return np.asarray(outline.reshape(-1, 2) * scale, np.int32)

    return Tissue([to_level_0(contours[index]) for index in selected],
                  [[to_level_0(hole) for hole in holes[index]] for index in selected],
                  n_too_small=int((parents < 0).sum()) - len(contours))


def tissue_mask(rgb: np.ndarray, parameters: PatchingParameters) -> np.ndarray:
    """(h, w) uint8, 255 where the saturation says tissue; areas are not filtered yet."""
    import cv2

    saturation = np.ascontiguousarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[:, :, 1])
    if parameters.mthresh > 1:
        saturation = cv2.medianBlur(saturation, parameters.mthresh)
    kind = cv2.THRESH_BINARY | (cv2.THRESH_OTSU if parameters.use_otsu else 0)
    threshold = 0 if parameters.use_otsu else parameters.sthresh
    mask = cv2.threshold(saturation, threshold, 255, kind)[1]
    if parameters.close > 0:
        square = np.ones((parameters.close, parameters.close), np.uint8)
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, square)
    return np.asarray(mask)


def _filter_contours(
    outlines: Sequence[np.ndarray], parents: np.ndarray, downsample: tuple[float, float],
    parameters: PatchingParameters,
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Outer contours of enough net area, and the largest holes of each, in image pixels."""
    import cv2

    unit = UNIT_AREA_PX_L0 / (downsample[0] * downsample[1])
    if unit >= 1:
        unit = int(unit)  # CLAM counts whole pixels; below one that would switch the filter off
    areas = [float(cv2.contourArea(outline)) for outline in outlines]
    children: dict[int, list[int]] = defaultdict(list)
    for index, parent in enumerate(parents):
        if parent >= 0:
            children[int(parent)].append(index)
    contours, holes = [], []
    for index in np.flatnonzero(parents < 0).tolist():
        inner = children[index]
        net_area = areas[index] - sum(areas[hole] for hole in inner)
        if net_area == 0 or not net_area > parameters.a_t * unit:
            continue
        largest = sorted(inner, key=areas.__getitem__, reverse=True)[:parameters.max_n_holes]
        contours.append(outlines[index])
        holes.append([outlines[hole] for hole in largest if areas[hole] > parameters.a_h * unit])
    return contours, holes


def _select_ids(count: int, parameters: PatchingParameters) -> list[int]:
    """Numbers of the contours that ``keep_ids`` and ``exclude_ids`` leave, ascending."""
    for name in ("keep_ids", "exclude_ids"):
        missing = [number for number in getattr(parameters, name) if number >= count]
        if missing:
            span = f"0 to {count - 1}" if count else "none"
            raise ItemFailed(f"{name} names contour {missing[0]}, but the slide has {count} "
                             f"({span}): look at the mask picture and correct the process list")
    return sorted(set(parameters.keep_ids or range(count)) - set(parameters.exclude_ids))
