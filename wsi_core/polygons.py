"""Polygons with holes: outlines that cross themselves repaired, tissue cut to drawn regions.

Both work by painting: a polygon is drawn on a raster of its own bounding box, and the outlines of
what is painted are followed. A raster pixel is one level-0 px for pieces of up to ``RASTER_PX`` a
side, so the result is exact to a pixel; larger pieces have a coarser raster and are exact to one
pixel of that. What needs neither repair nor cutting keeps its points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from wsi_core.tissue import Tissue

RASTER_PX = 4096  # side up to which a raster pixel is a level-0 px
MAX_RASTER_PX = 16_384  # side that no raster exceeds, whatever the downsample asked for: 256 MiB
_LOOK_PX = 512  # side of the raster on which areas are compared
_MAX_CROSSED = 1000  # edges that a raster row meets on average; more would take minutes to paint

Box = tuple[int, int, int, int]  # x0, y0, x1, y1, the last pixel included


@dataclass(frozen=True)
class Polygon:
    """An area in level-0 px: ``outer`` (n, 2) int32 and outlines of what is left out of it."""

    outer: np.ndarray
    holes: list[np.ndarray] = field(default_factory=list)

    @property
    def box(self) -> Box:
        """Bounding box of ``outer``."""
        (x0, y0), (x1, y1) = self.outer.min(axis=0).tolist(), self.outer.max(axis=0).tolist()
        return x0, y0, x1, y1


# ---------------------------------------------------------------------------- painting

class _Raster:
    """A mask over a box of the slide; pixel (i, j) stands for level-0 px (x0, y0) + scale * (i, j).
    """

    def __init__(self, box: Box, scale: float) -> None:
        self.origin, self.scale = np.array(box[:2], np.float64), scale
        width, height = (int(np.ceil((box[axis + 2] - box[axis]) / scale)) + 1 for axis in (0, 1))
        self.mask = np.zeros((height, width), np.uint8)

    def paint(self, polygon: Polygon) -> None:
        """Set the polygon by the even-odd rule; the outlines of holes belong to it."""
        import cv2

        cv2.fillPoly(self.mask, [self._pixels(polygon.outer)], 1)
        holes = [self._pixels(hole) for hole in polygon.holes]
        for hole in holes:  # one by one: together, two that overlap would cancel out
            cv2.fillPoly(self.mask, [hole], 0)
        cv2.polylines(self.mask, holes, True, 1)

    def like(self, polygons: Sequence[Polygon]) -> np.ndarray:
        """(h, w) bool: the area of all these polygons on an equal raster."""
        union = np.zeros(self.mask.shape, bool)
        blank = object.__new__(_Raster)
        blank.origin, blank.scale = self.origin, self.scale
        for polygon in polygons:
            blank.mask = np.zeros_like(self.mask)
            blank.paint(polygon)
            union |= blank.mask > 0
        return union

    def polygons(self) -> Iterator[Polygon]:
        """What is painted, in level-0 px; what is only a point or a line is no area."""
        import cv2

        found, hierarchy = cv2.findContours(self.mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        if not found:
            return
        parents = np.asarray(hierarchy)[0, :, 3]
        outlines = [np.rint(points[:, 0] * self.scale + self.origin).astype(np.int32)
                    for points in found]
        holes: dict[int, list[np.ndarray]] = {}
        for index in np.flatnonzero(parents >= 0).tolist():
            if len(outlines[index]) >= 3:
                holes.setdefault(int(parents[index]), []).append(outlines[index])
        for index in np.flatnonzero(parents < 0).tolist():
            if len(outlines[index]) >= 3:
                yield Polygon(outlines[index], holes.get(index, []))

    def _pixels(self, points: np.ndarray) -> np.ndarray:
        return np.rint((points - self.origin) / self.scale).astype(np.int32)


def _longer_side(box: Box) -> int:
    return max(box[2] - box[0], box[3] - box[1]) + 1


# ---------------------------------------------------------------------------- cutting

def restrict(
    tissue: Tissue, regions: Sequence[Polygon], ignored: Sequence[Polygon], *,
    slide_size: tuple[int, int], downsample: float | None = None,
) -> Tissue:
    """The tissue that lies on the slide, in any of ``regions`` and in none of ``ignored``.

    No regions mean everywhere. Pieces that are not cut keep their outline to the point; those
    that are cut get one that is exact to a raster pixel (see the module).
    slide_size: (w, h) of level 0. downsample: the most level-0 px that a raster pixel may stand
    for, when RASTER_PX would make it coarser; None sets no limit
    """
    kept = Tissue(n_too_small=tissue.n_too_small)
    for contour, holes in zip(tissue.contours, tissue.holes, strict=True):
        for piece in _restrict_piece(Polygon(contour, holes), regions, ignored,
                                     slide_size=slide_size, downsample=downsample):
            kept.contours.append(piece.outer)
            kept.holes.append(piece.holes)
    return kept


def _restrict_piece(
    piece: Polygon, regions: Sequence[Polygon], ignored: Sequence[Polygon], *,
    slide_size: tuple[int, int], downsample: float | None,
) -> list[Polygon]:
    slide = (0, 0, slide_size[0] - 1, slide_size[1] - 1)
    if not _overlap(piece.box, slide):
        return []
    box = (max(piece.box[0], 0), max(piece.box[1], 0),
           min(piece.box[2], slide[2]), min(piece.box[3], slide[3]))
    near = [region for region in regions if _overlap(region.box, box)]
    away = [polygon for polygon in ignored if _overlap(polygon.box, box)]
    if regions and not near:
        return []
    if not regions and not away and box == piece.box:
        return [piece]
    side = _longer_side(box)
    scale = max(1.0, side / RASTER_PX)
    if downsample is not None:
        scale = max(min(scale, downsample), 1.0, side / MAX_RASTER_PX)
    raster = _Raster(box, scale)
    raster.paint(piece)
    wanted = raster.mask > 0
    if regions:
        wanted &= raster.like(near)
    if away:
        wanted &= ~raster.like(away)
    if box == piece.box and np.array_equal(wanted, raster.mask > 0):
        return [piece]
    raster.mask = wanted.astype(np.uint8)
    return list(raster.polygons())


def _overlap(one: Box, other: Box) -> bool:
    return (one[0] <= other[2] and other[0] <= one[2]
            and one[1] <= other[3] and other[1] <= one[3])


# ---------------------------------------------------------------------------- repair

def is_tangled(ring: np.ndarray) -> bool:
    """Whether an outline (n, 2) crosses itself, so that the area it encloses is in doubt.

    That is when the shoelace formula and the even-odd rule differ by more than a ring one pixel
    wide, on a raster of 512 px a side. Smaller loops, and outlines that only touch themselves
    (those of masks do), are left as they are: all that reads them goes by the even-odd rule.
    Raises ValueError for a scribble that encloses nothing.
    """
    import cv2

    polygon = Polygon(np.asarray(ring).reshape(-1, 2))
    if len(polygon.outer) < 4:
        return False
    steps = np.abs(np.diff(polygon.outer, axis=0, append=polygon.outer[:1]).astype(np.float64))
    rows = max(1, polygon.box[3] - polygon.box[1])
    if steps[:, 1].sum() / rows > _MAX_CROSSED:
        raise ValueError("an outline runs to and fro so often that it encloses no area")
    raster = _Raster(polygon.box, _longer_side(polygon.box) / _LOOK_PX)
    raster.paint(polygon)
    ring_px2 = float(np.hypot(steps[:, 0], steps[:, 1]).sum()) * raster.scale
    painted = cv2.countNonZero(raster.mask) * raster.scale**2 - ring_px2 / 2  # outlines are painted
    shoelace = cv2.contourArea((polygon.outer - polygon.outer.min(axis=0)).astype(np.int32))
    return abs(painted - shoelace) > ring_px2


def repair(polygon: Polygon) -> list[Polygon]:
    """The area that a polygon encloses by the even-odd rule, as outlines that do not cross."""
    raster = _Raster(polygon.box, max(1.0, _longer_side(polygon.box) / RASTER_PX))
    raster.paint(polygon)
    return list(raster.polygons())
