"""The patch grid: which squares of a slide lie on tissue, without reading a pixel.

Points are tested against outlines by scan lines: for each row of the grid the crossings with the
outline are computed once and sorted, and a point is inside when an odd number of them lies to its
right. Everything is integer arithmetic on half pixels, so points on an edge are recognised
exactly, as ``cv2.pointPolygonTest`` does one point at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from wsi_core.presets import ContourRule
from wsi_core.tissue import Tissue

_MAX_CANDIDATES = 1 << 20  # tested at a time; bounds the memory of tiny steps on huge slides

Number = int | float
Pair = tuple[Number, Number]


def patch_grid(
    tissue: Tissue,
    *,
    patch_px_l0: Number | Pair,
    step_px_l0: Number | Pair,
    slide_size: tuple[int, int],
    contour_fn: ContourRule = "four_pt",
    use_padding: bool = True,
    roi: tuple[int, int, int, int] | None = None,
    center_shift: float | None = None,
) -> np.ndarray:
    """Top-left corners of the patches on tissue, (N, 2) int64 level-0 px, in CLAM's order.

    Each contour has its own grid, starting at its bounding box; within it x is the outer loop.

    patch_px_l0, step_px_l0: side and step in level-0 px, one number or (x, y); fractions are
        allowed (a level that is 2.5 times smaller), corners are rounded to whole pixels
    slide_size: (w, h) of level 0
    contour_fn: with c the centre of the patch and s a shift of a quarter side: ``basic`` the
        corner, ``center`` c, ``four_pt`` any of c +- s, ``four_pt_hard`` all of c +- s
    use_padding: False keeps patches inside the slide
    roi: (left, top, right, bottom) in level-0 px; corners outside are left out
    center_shift: s as a share of half the side, for the four-point rules; 0 tests c only
    """
    patch, step = _pair(patch_px_l0), _pair(step_px_l0)
    if min(*patch, *step) < 1:
        raise ValueError(f"patch {patch} and step {step} must be at least one level-0 pixel")
    parts = [_contour_grid(contour, holes, patch, step, slide_size, contour_fn, use_padding, roi,
                           0.5 if center_shift is None else center_shift)
             for contour, holes in zip(tissue.contours, tissue.holes, strict=True)]
    return np.concatenate([np.empty((0, 2), np.int64), *parts])


def points_in_polygon(
    points: np.ndarray, polygon: np.ndarray, *, boundary: bool = True
) -> np.ndarray:
    """(M,) bool: which of (M, 2) points lie in the (n, 2) polygon, even-odd rule.

    Exact for whole and half pixels (others are rounded to the nearest half). Points on an edge
    count as inside when ``boundary``, as ``cv2.pointPolygonTest(...) >= 0``, else as outside.
    """
    doubled = np.rint(np.asarray(points, np.float64) * 2).astype(np.int64)
    rows, row = np.unique(doubled[:, 1], return_inverse=True)
    return Scanlines.through(polygon, rows).contains(row.reshape(-1), doubled[:, 0],
                                                     boundary=boundary)


def _pair(value: Number | Pair) -> tuple[float, float]:
    x, y = value if isinstance(value, tuple) else (value, value)
    return float(x), float(y)


def _contour_grid(
    contour: np.ndarray, holes: list[np.ndarray], patch: tuple[float, float],
    step: tuple[float, float], slide_size: tuple[int, int], contour_fn: ContourRule,
    use_padding: bool, roi: tuple[int, int, int, int] | None, center_shift: float,
) -> np.ndarray:
    side = (round(patch[0]), round(patch[1]))
    axes = []
    for axis in (0, 1):
        start = int(contour[:, axis].min())
        stop = int(contour[:, axis].max()) + 1
        if not use_padding:
            stop = min(stop, slide_size[axis] - side[axis] + 1)
        if roi is not None:
            start, stop = max(start, roi[axis]), min(stop, roi[axis + 2])
        axes.append(_ticks(start, stop, step[axis]))
    xs, ys = axes
    if not len(xs) or not len(ys):
        return np.empty((0, 2), np.int64)
    kept = []
    columns = max(1, _MAX_CANDIDATES // len(ys))
    for first in range(0, len(xs), columns):
        some = xs[first:first + columns]
        accepted = _accept(some, ys, side, contour, contour_fn, center_shift)
        for hole in holes:
            centres = (2 * some + side[0], 2 * ys + side[1])  # half pixels
            accepted &= ~_inside_grid(centres[0], centres[1], hole, boundary=False)
        x_index, y_index = np.nonzero(accepted.T)  # x outer, y inner
        kept.append(np.stack([some[x_index], ys[y_index]], axis=1))
    return np.concatenate(kept)


def _ticks(start: int, stop: int, step: float) -> np.ndarray:
    """Whole pixels start, start + step, ... below stop; each rounded once, so no drift."""
    count = max(0, int(np.ceil((stop - start) / step)))
    ticks: np.ndarray = start + np.rint(np.arange(count) * step).astype(np.int64)
    return np.asarray(ticks[ticks < stop])


def _accept(
    xs: np.ndarray, ys: np.ndarray, side: tuple[int, int], contour: np.ndarray,
    contour_fn: ContourRule, center_shift: float,
) -> np.ndarray:
    """(len(ys), len(xs)) bool: which corners xs x ys (level-0 px) the contour rule accepts."""
    accepted = None
    for dx, dy in _tested_points(side, contour_fn, center_shift):
        inside = _inside_grid(2 * (xs + dx), 2 * (ys + dy), contour)
        if accepted is None:
            accepted = inside
        elif contour_fn == "four_pt_hard":
            accepted &= inside
        else:
            accepted |= inside
    assert accepted is not None
    return accepted


def _tested_points(
    side: tuple[int, int], contour_fn: ContourRule, center_shift: float
) -> Iterator[tuple[int, int]]:
    """Offsets from a patch's corner, level-0 px, of the points its rule looks at."""
    if contour_fn == "basic":
        yield 0, 0
        return
    x, y = side[0] // 2, side[1] // 2
    shift_x, shift_y = int(x * center_shift), int(y * center_shift)
    if contour_fn == "center" or shift_x <= 0 or shift_y <= 0:
        yield x, y
        return
    for sign_x, sign_y in ((-1, -1), (1, 1), (1, -1), (-1, 1)):
        yield x + sign_x * shift_x, y + sign_y * shift_y


def _inside_grid(
    xs2: np.ndarray, ys2: np.ndarray, polygon: np.ndarray, *, boundary: bool = True
) -> np.ndarray:
    """(len(ys2), len(xs2)) bool for the points xs2 x ys2, ascending, in half pixels."""
    row = np.repeat(np.arange(len(ys2)), len(xs2))
    inside = Scanlines.through(polygon, ys2).contains(row, np.tile(xs2, len(ys2)),
                                                      boundary=boundary)
    return inside.reshape(len(ys2), len(xs2))


@dataclass(frozen=True)
class Scanlines:
    """Where a polygon crosses some rows; all values in half pixels, so integers.

    A position on row r is written as one key, r * width + x - left, so that sorted keys are
    sorted row by row.
    """

    left: int  # smallest x that gets a key of its own
    width: int  # keys a row
    crossings: np.ndarray  # sorted keys of the crossings, rounded up to the next half pixel
    row_ends: np.ndarray  # (rows,) number of crossings up to and including each row
    touched: np.ndarray  # sorted keys of half pixels that lie on the outline
    spans: tuple[np.ndarray, np.ndarray]  # sorted keys of first and last of horizontal edges

    @classmethod
    def through(cls, polygon: np.ndarray, rows: np.ndarray) -> Scanlines:
        """Cross an (n, 2) polygon (px) with ascending ``rows`` (y in half pixels)."""
        end = np.rint(np.asarray(polygon, np.float64).reshape(-1, 2) * 2).astype(np.int64)
        begin = np.roll(end, 1, axis=0)
        left = int(end[:, 0].min()) - 1
        width = int(end[:, 0].max()) + 2 - left

        low, high = np.minimum(begin[:, 1], end[:, 1]), np.maximum(begin[:, 1], end[:, 1])
        first, stop = np.searchsorted(rows, low), np.searchsorted(rows, high)
        count = stop - first  # rows with low <= y < high: each vertex belongs to one edge
        edge = np.repeat(np.arange(len(end)), count)
        row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
        rise = (end[:, 1] - begin[:, 1])[edge]
        run = (rows[row] - begin[edge, 1]) * (end[:, 0] - begin[:, 0])[edge]
        whole = -(-run // rise)  # rounded up, exactly
        keys = row * width + (begin[edge, 0] + whole - left)

        vertex_row = np.searchsorted(rows, end[:, 1])
        on_row = vertex_row < len(rows)
        on_row[on_row] = rows[vertex_row[on_row]] == end[on_row, 1]
        vertex = vertex_row * width + (end[:, 0] - left)
        flat = on_row & (begin[:, 1] == end[:, 1])
        base = vertex_row[flat] * width - left
        spans = (np.sort(base + np.minimum(begin[flat, 0], end[flat, 0])),
                 np.sort(base + np.maximum(begin[flat, 0], end[flat, 0])))
        crossings = np.sort(keys)
        row_ends = np.searchsorted(crossings, (np.arange(len(rows)) + 1) * width)
        touched = np.unique(np.concatenate([keys[whole * rise == run], vertex[on_row]]))
        return cls(left, width, crossings, row_ends, touched, spans)

    def contains(self, row: np.ndarray, x2: np.ndarray, *, boundary: bool) -> np.ndarray:
        """(M,) bool for points given by index of row and x in half pixels."""
        keys = row * self.width + np.clip(x2 - self.left, 0, self.width - 1)
        right = self.row_ends[row] - np.searchsorted(self.crossings, keys, side="right")
        inside = right % 2 == 1
        on_edge = np.searchsorted(self.spans[0], keys, side="right") > np.searchsorted(
            self.spans[1], keys, side="left")
        if len(self.touched):
            place = np.minimum(np.searchsorted(self.touched, keys), len(self.touched) - 1)
            on_edge |= self.touched[place] == keys
        result: np.ndarray = inside | on_edge if boundary else inside & ~on_edge
        return result
