"""Attention on a picture of the slide: percentiles, the picture's frame, drawing, sampling.

Scores and level-0 coordinates come in, pixels go out. A picture is drawn in horizontal bands, and
within a band the patches' edges cut it into few cells, so memory is that of the picture and time
hardly depends on the number of patches. Frames: ``_l0`` is level-0 px; everything else here is px
of the picture.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from utils.errors import ItemFailed, Refused
from wsi_core.slide import WHITE, Slide, nominal_downsample, read_level
from wsi_core.tissue import Tissue

MAX_PICTURE_PIXELS = 100_000_000
BAND_ROWS = 1024
OUTLINE_PER_SIDE = 700  # the longer side of a picture over the width of an outline

SampleMode = Literal["topk", "reverse_topk", "range_sample"]


# ---------------------------------------------------------------------------- scores

def check_scores(scores: np.ndarray, coords: np.ndarray, *, what: str) -> np.ndarray:
    """``scores`` flat as float64 if there is one finite number a row of ``coords``.

    Raises ``ItemFailed`` naming ``what`` and the first bad row.
    """
    flat = np.asarray(scores, dtype=np.float64).reshape(-1)
    if len(flat) != len(coords):
        raise ItemFailed(f"{what}: {len(flat)} scores for {len(coords)} patches")
    bad = np.flatnonzero(~np.isfinite(flat))
    if len(bad):
        raise ItemFailed(f"{what}: the attention of {len(bad)} of {len(flat)} patches is not a "
                         f"number (first: row {bad[0]}): check the features and the checkpoint")
    return flat


def percentiles(scores: np.ndarray, references: np.ndarray | None = None) -> np.ndarray:
    """Percentile 0..100 of each score among the references (default: the scores themselves).

    The average rank over n: ``50 (#below + #not above + [any equal]) / n``, which is
    ``scipy.stats.percentileofscore(kind="rank")``, by one sort and two binary searches.
    """
    flat = np.asarray(scores).reshape(-1)
    ordered = np.sort(flat if references is None else np.asarray(references).reshape(-1))
    if not len(ordered):
        return np.zeros(len(flat))
    below = np.searchsorted(ordered, flat, side="left")
    not_above = np.searchsorted(ordered, flat, side="right")
    ranks: np.ndarray = (below + not_above + (not_above > below)) * (50.0 / len(ordered))
    return ranks


def sample_patches(
    scores: np.ndarray, *, mode: SampleMode, k: int, seed: int = 1,
    score_start: float = 0.0, score_end: float = 1.0,
) -> np.ndarray:
    """Indices of at most ``k`` patches, best first; scores and bounds are on one scale, 0..1.

    topk: the highest; reverse_topk: the lowest; range_sample: a seeded draw without replacement
    from ``score_start <= score <= score_end`` (none there gives none). Ties go to earlier rows.
    """
    if mode == "topk":
        return np.argsort(-scores, kind="stable")[:k]
    if mode == "reverse_topk":
        return np.argsort(scores, kind="stable")[:k]
    inside = np.flatnonzero((scores >= score_start) & (scores <= score_end))
    drawn = np.random.default_rng(seed).permutation(inside)[:k]
    return drawn[np.argsort(-scores[drawn], kind="stable")]


def center_shift(overlap: float, *, enabled: bool) -> float:
    """How far the four test points lie from a patch's centre, as a fraction of half its side.

    CLAM's table for heatmaps: 0 when switched off (the centre alone is tested), else .375 below
    25 % overlap, .5 below 95 %, .625 from there.
    """
    if not enabled:
        return 0.0
    if overlap < 0.25:
        return 0.375
    return 0.5 if overlap < 0.95 else 0.625


def shifted_grids(
    coords: np.ndarray, *, origin_l0: Sequence[float], patch_px_l0: tuple[float, float],
    step_px_l0: tuple[float, float],
) -> np.ndarray:
    """(N,) number of the grid without overlap that each patch of an overlapping grid belongs to.

    coords: (N, 2) of one grid from ``origin_l0`` in steps of ``step_px_l0``, level-0 px
    Patches share a number when they are k steps apart in x and y, or a multiple, k the fewest
    steps that make a side of a patch: so patches of one number lie beside each other, and each
    number is the grid of number 0 shifted by whole steps.
    """
    step = np.asarray(step_px_l0, dtype=np.float64)
    every = np.ceil(np.asarray(patch_px_l0) / step - 1e-9).astype(np.int64)
    index = np.rint((coords - np.asarray(origin_l0)) / step).astype(np.int64)
    column, row = (index % every).T
    number: np.ndarray = column * every[1] + row
    return number


# ---------------------------------------------------------------------------- the frame

@dataclass(frozen=True)
class View:
    """Where a picture lies on its slide.

    origin_l0:  x, y of its top-left corner in level-0 px
    downsample: x, y level-0 px per px of the picture
    size:       width, height in px of the picture
    """

    origin_l0: tuple[float, float]
    downsample: tuple[float, float]
    size: tuple[int, int]

    def place(self, points_l0: np.ndarray) -> np.ndarray:
        """Points (..., 2) of level 0 in px of the picture (float64)."""
        placed: np.ndarray = (np.asarray(points_l0, dtype=np.float64) - self.origin_l0) \
            / self.downsample
        return placed


def read_view(
    slide: Slide, level: int, *, roi_l0: tuple[int, int, int, int] | None = None,
    shrink: int = 1, max_pixels: int = MAX_PICTURE_PIXELS,
) -> tuple[np.ndarray, View]:
    """The slide, or its region ``roi_l0`` (x1, y1, x2, y2), as RGB at a level.

    ``shrink`` reduces further by area; a level above ``max_pixels`` comes reduced by strips.
    Raises ``ItemFailed`` when the region does not touch the slide.
    """
    import cv2

    if roi_l0 is None:
        image, downsample = read_level(slide, level, max_pixels=max_pixels, background=WHITE)
        view = View((0.0, 0.0), _nominal(downsample), (image.shape[1], image.shape[0]))
    else:
        image, view = _read_roi(slide, level, roi_l0, max_pixels)
    if shrink <= 1:
        return image, view
    width, height = view.size
    size = (max(1, width // shrink), max(1, height // shrink))
    scale = (width / size[0], height / size[1])
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return small, View(view.origin_l0, (view.downsample[0] * scale[0],
                                        view.downsample[1] * scale[1]), size)


def _nominal(downsample: tuple[float, float]) -> tuple[float, float]:
    return nominal_downsample(downsample[0]), nominal_downsample(downsample[1])


def _read_roi(
    slide: Slide, level: int, roi_l0: tuple[int, int, int, int], max_pixels: int
) -> tuple[np.ndarray, View]:
    """The region at ``level``, or cut out of the reduced level when it is too large for that."""
    x1, y1, x2, y2 = clip_roi(roi_l0, slide.level_dimensions[0], name=slide.path.name)
    ds_x, ds_y = _nominal(slide.level_downsamples[level])
    size = (max(1, round((x2 - x1) / ds_x)), max(1, round((y2 - y1) / ds_y)))
    if size[0] * size[1] <= max_pixels:
        image = slide.read_region((x1, y1), level, size, background=WHITE)
        return image, View((x1, y1), (ds_x, ds_y), size)
    whole, downsample = read_level(slide, level, max_pixels=max_pixels, background=WHITE)
    frame = View((0.0, 0.0), downsample, (whole.shape[1], whole.shape[0]))
    (left, top), (right, bottom) = np.rint(frame.place(np.array([(x1, y1), (x2, y2)]))).astype(int)
    cut = np.ascontiguousarray(whole[top:max(bottom, top + 1), left:max(right, left + 1)])
    origin = (left * downsample[0], top * downsample[1])
    return cut, View(origin, downsample, (cut.shape[1], cut.shape[0]))


def clip_roi(
    roi_l0: tuple[int, int, int, int], slide_size: tuple[int, int], *, name: str
) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 within the slide, or ``ItemFailed`` when nothing is left."""
    x1, y1 = max(0, roi_l0[0]), max(0, roi_l0[1])
    x2, y2 = min(slide_size[0], roi_l0[2]), min(slide_size[1], roi_l0[3])
    if x1 >= x2 or y1 >= y2:
        raise ItemFailed(f"{name}: the region x {roi_l0[0]}-{roi_l0[2]}, y {roi_l0[1]}-{roi_l0[3]} "
                         f"is empty on a slide of {slide_size[0]} x {slide_size[1]} px")
    return x1, y1, x2, y2


# ---------------------------------------------------------------------------- drawing

@dataclass(frozen=True, kw_only=True)
class Style:
    """How a heatmap looks.

    alpha:     weight of the colour layer over the slide; 1 and above hide the slide
    blur_px:   half the Gaussian kernel in px of the picture (0 = none): the kernel has
               ``2 blur_px + 1`` px and smooths the scores, then the coloured picture
    binarize:  scores become 1 where >= threshold, else 0 and are not painted
    threshold: on the 0..1 scale; below 0 means 1 / number of patches
    """

    cmap: str = "jet"
    alpha: float = 0.4
    blank_canvas: bool = False
    blur_px: int = 0
    binarize: bool = False
    threshold: float = -1.0


def colour_table(cmap: str) -> np.ndarray:
    """(256, 3) uint8 RGB of a matplotlib colour map, or ``Refused`` naming the nearest."""
    import matplotlib

    if cmap not in matplotlib.colormaps:
        near = difflib.get_close_matches(cmap, list(matplotlib.colormaps), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "any colour map of matplotlib will do"
        raise Refused(f"unknown colour map '{cmap}': {hint}")
    table: np.ndarray = matplotlib.colormaps[cmap](np.linspace(0, 1, 256), bytes=True)[:, :3]
    return table


def patch_boxes(
    view: View, coords: np.ndarray, patch_px_l0: tuple[float, float]
) -> np.ndarray:
    """(N, 4) int64 x0, y0, x1, y1 of each patch on the picture, cut at its border.

    Both corners are rounded, so that patches which touch on the slide touch on the picture; a
    patch covers at least one px, and one wholly outside has an empty box.
    """
    first = np.rint(view.place(coords)).astype(np.int64)
    last = np.rint(view.place(np.asarray(coords) + patch_px_l0)).astype(np.int64)
    last = np.maximum(last, first + 1)
    boxes = np.clip(np.concatenate([first, last], axis=1), 0, (*view.size, *view.size))
    return np.ascontiguousarray(boxes)


def fill_tissue(view: View, tissue: Tissue) -> np.ndarray:
    """(h, w) uint8, 255 on tissue and 0 elsewhere and in holes; islands in holes count again."""
    import cv2

    mask = np.zeros((view.size[1], view.size[0]), np.uint8)
    areas = [cv2.contourArea(contour) for contour in tissue.contours]
    for index in np.argsort(areas, kind="stable")[::-1]:  # large first, what lies inside later
        for points, value in ((tissue.contours[index], 255),
                              *((hole, 0) for hole in tissue.holes[index])):
            placed = np.rint(view.place(points.reshape(-1, 2))).astype(np.int32)
            cv2.fillPoly(mask, [placed], value)
    return mask


def draw_heatmap(
    image: np.ndarray, view: View, scores: np.ndarray, coords: np.ndarray, *,
    patch_px_l0: tuple[float, float], style: Style, tissue: Tissue | None = None,
) -> np.ndarray:
    """The picture with the mean score of the covering patches as colour over each of its px.

    image: (h, w, 3) uint8 RGB with the frame ``view``; not changed
    scores: (N,) on the 0..1 scale (values beyond are drawn as 0 or 1), coords: (N, 2) level-0 px
    tissue: colour is laid on tissue only; None = wherever there are patches
    """
    values = np.clip(check_scores(scores, coords, what="heatmap"), 0.0, 1.0)
    shown = np.ones(len(values), bool)
    if style.binarize:
        limit = style.threshold if style.threshold >= 0 else 1.0 / max(1, len(values))
        shown = values >= limit
        values = shown.astype(np.float64)
    boxes = patch_boxes(view, coords, patch_px_l0)
    mask = None if tissue is None else fill_tissue(view, tissue)
    table = colour_table(style.cmap)
    drawn = np.empty_like(image)
    for top in range(0, len(image), BAND_ROWS):
        rows = (top, min(top + BAND_ROWS, len(image)))
        drawn[rows[0]:rows[1]] = _draw_band(image, rows, boxes, values, shown, mask, table, style)
    return drawn


def draw_outline(
    image: np.ndarray, view: View, coords: np.ndarray, patch_px_l0: tuple[float, float]
) -> np.ndarray:
    """A copy of the picture with a line around the patches, not around each of them.

    coords: (n, 2) level-0 px. The line is black on white, so that it is seen on every colour; its
    width grows with the picture.
    """
    import cv2

    mask = np.zeros(image.shape[:2], np.uint8)
    for x0, y0, x1, y1 in patch_boxes(view, coords, patch_px_l0).tolist():
        mask[y0:y1, x0:x1] = 255
    outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    width = max(1, round(max(image.shape[:2]) / OUTLINE_PER_SIDE))
    drawn = image.copy()
    for colour, thickness in ((255, 255, 255), 3 * width), ((0, 0, 0), width):
        cv2.drawContours(drawn, outlines, -1, colour, thickness)
    return drawn


def _draw_band(
    image: np.ndarray, rows: tuple[int, int], boxes: np.ndarray, values: np.ndarray,
    shown: np.ndarray, mask: np.ndarray | None, table: np.ndarray, style: Style,
) -> np.ndarray:
    """Rows ``rows`` of the finished picture. Both blurs look ``blur_px`` further each."""
    import cv2

    low = max(0, rows[0] - 2 * style.blur_px)
    high = min(len(image), rows[1] + 2 * style.blur_px)
    canvas = image[low:high]
    if style.blank_canvas:
        canvas = np.full_like(canvas, 255)
    cells = _cells(boxes, (low, high), image.shape[1])
    means = cells.total(values) / np.maximum(cells.total(np.ones(len(values))), 1)
    if style.binarize:
        means = np.rint(means)
    painted = cells.expand((cells.total(shown) > 0.5).astype(np.uint8))
    kernel = (2 * style.blur_px + 1,) * 2
    if style.blur_px:
        colour_index = _to_index(cv2.GaussianBlur(cells.expand(means.astype(np.float32)),
                                                  kernel, 0))
    else:
        colour_index = cells.expand(_to_index(means))
    if mask is not None:
        painted &= mask[low:high]
    layer = canvas.copy()
    cv2.copyTo(cv2.applyColorMap(colour_index, table[:, None, :]), painted, layer)
    if style.blur_px:
        layer = cv2.GaussianBlur(layer, kernel, 0)
    if style.alpha < 1.0:
        layer = cv2.addWeighted(layer, style.alpha, canvas, 1.0 - style.alpha, 0.0)
    band: np.ndarray = layer[rows[0] - low:rows[1] - low]
    return band


def _to_index(values: np.ndarray) -> np.ndarray:
    """0..1 as an index into 256 colours, as matplotlib counts them."""
    return np.clip(values * 256.0 + 1e-6, 0, 255).astype(np.uint8)  # sums are exact to 1e-12


@dataclass(frozen=True)
class _Cells:
    """A band cut along the edges of its patches; within a cell every px has the same patches."""

    corners: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # cell indices x0, y0, x1, y1
    members: np.ndarray  # indices of the patches that touch the band
    widths: np.ndarray
    heights: np.ndarray

    def total(self, amounts: np.ndarray) -> np.ndarray:
        """Sum over the patches that cover each cell, of one amount a patch of the slide."""
        x0, y0, x1, y1 = self.corners
        amount = amounts[self.members].astype(np.float64)
        steps = np.zeros((len(self.heights) + 1, len(self.widths) + 1))
        np.add.at(steps, (y0, x0), amount)  # a 2-D difference array, integrated below
        np.add.at(steps, (y1, x1), amount)
        np.add.at(steps, (y0, x1), -amount)
        np.add.at(steps, (y1, x0), -amount)
        sums: np.ndarray = steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
        return sums

    def expand(self, cells: np.ndarray) -> np.ndarray:
        """A value a cell as a value a px."""
        return np.repeat(np.repeat(cells, self.widths, axis=1), self.heights, axis=0)


def _cells(boxes: np.ndarray, rows: tuple[int, int], width: int) -> _Cells:
    inside = (boxes[:, 3] > rows[0]) & (boxes[:, 1] < rows[1]) & (boxes[:, 2] > boxes[:, 0])
    members = np.flatnonzero(inside)
    x0, y0, x1, y1 = boxes[members].T
    y0, y1 = np.clip(y0, *rows), np.clip(y1, *rows)
    xs = np.unique(np.concatenate([x0, x1, [0, width]]))
    ys = np.unique(np.concatenate([y0, y1, list(rows)]))
    corners = (np.searchsorted(xs, x0), np.searchsorted(ys, y0),
               np.searchsorted(xs, x1), np.searchsorted(ys, y1))
    return _Cells(corners, members, np.diff(xs), np.diff(ys))
