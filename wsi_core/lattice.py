"""One lattice for the whole slide, and how much of each cell is tissue.

The cells lie at whole multiples of the step from the slide's corner, so no cell comes twice and
neighbours are neighbours whatever piece of tissue they lie on. The tissue in all cells is counted
at once, through the summed-area table of the tissue mask (Crow 1984), read between its pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wsi_core.tissue import Tissue

Pair = tuple[float, float]
MASK_PIXELS = 4_000_000  # at most, of the raster that tissue is counted on
# Of that raster, in the side of a cell: as segmentation saw it (256 px of 0.5 um, at 8 um each).
# Coarser ones count too much, every pixel whole that an outline touches: 3 % of a cell with 8.
CELL_PIXELS = 16
ROUNDING_PX = 1e-6  # of area, what sums of millions of pixels may leave where there is no tissue


@dataclass(frozen=True)
class TissueArea:
    """The tissue of a slide as a summed-area table.

    table: (h + 1, w + 1) float64, [i, j] = pixels of tissue in the first i rows and j columns
    downsample: (x, y) of the raster's pixels against level 0
    """

    table: np.ndarray
    downsample: Pair

    @classmethod
    def of(cls, tissue: Tissue, *, slide_size: tuple[int, int], cell_px_l0: Pair) -> TissueArea:
        """Outlines drawn on a raster fine enough for cells of this size (level-0 px)."""
        import cv2

        wanted = max(1.0, min(cell_px_l0) / CELL_PIXELS,
                     (slide_size[0] * slide_size[1] / MASK_PIXELS) ** 0.5)
        width, height = (max(1, round(side / wanted)) for side in slide_size)
        scale = np.array([slide_size[0] / width, slide_size[1] / height])
        mask = np.zeros((height, width), np.uint8)
        pieces = [(_pixels(contour, scale), [_pixels(hole, scale) for hole in holes])
                  for contour, holes in zip(tissue.contours, tissue.holes, strict=True)]
        # the largest first, so that a piece inside a hole of another is not wiped out by it
        for contour, holes in sorted(pieces, key=lambda piece: -cv2.contourArea(piece[0])):
            cv2.fillPoly(mask, [contour], 1)
            for hole in holes:
                cv2.fillPoly(mask, [hole], 0)
                cv2.polylines(mask, [hole], True, 1)  # a hole's outline is its rim of tissue
        table = np.zeros((height + 1, width + 1))
        table[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
        return cls(table, (float(scale[0]), float(scale[1])))

    def fraction(self, corners: np.ndarray, side_px_l0: Pair) -> np.ndarray:
        """(N,) share of each square that is tissue, 0..1; what lies off the slide is not.

        corners: (N, 2) top-left, level-0 px; side_px_l0: (x, y)
        """
        height, width = (side - 1 for side in self.table.shape)
        sides = np.asarray(side_px_l0, np.float64)
        begin = np.asarray(corners, np.float64) / self.downsample
        end = begin + sides / self.downsample
        begin = np.clip(begin, 0, (width, height))
        end = np.clip(end, 0, (width, height))
        area = (self._sum(end[:, 0], end[:, 1]) - self._sum(begin[:, 0], end[:, 1])
                - self._sum(end[:, 0], begin[:, 1]) + self._sum(begin[:, 0], begin[:, 1]))
        area[area < ROUNDING_PX] = 0.0
        cell = np.prod(sides / self.downsample)
        return np.asarray(np.clip(area / cell, 0.0, 1.0))

    def _sum(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Tissue above and left of points between pixels, exact for a mask of whole pixels."""
        left = np.minimum(x.astype(np.int64), self.table.shape[1] - 2)
        top = np.minimum(y.astype(np.int64), self.table.shape[0] - 2)
        dx, dy = x - left, y - top
        table = self.table
        return np.asarray(
            (1 - dy) * ((1 - dx) * table[top, left] + dx * table[top, left + 1])
            + dy * ((1 - dx) * table[top + 1, left] + dx * table[top + 1, left + 1]))


def _pixels(outline: np.ndarray, scale: np.ndarray) -> np.ndarray:
    pixels: np.ndarray = np.floor(np.asarray(outline).reshape(-1, 2) / scale + 1e-6)
    return pixels.astype(np.int32)


def global_lattice(
    tissue: Tissue, *, patch_px_l0: Pair, step_px_l0: Pair, slide_size: tuple[int, int],
    min_tissue: float = 0.0, pad: bool = False,
) -> np.ndarray:
    """Top-left corners (N, 2) int64, level-0 px, of the cells with tissue, row after row.

    Cell (i, j) lies at ``rint(i * step)``: rounded once each, so there is no drift. Only cells
    wholly on the slide, or (pad) also those that reach over its right and lower edge.
    min_tissue: share of the cell that must be tissue; 0 takes every cell that any tissue touches
    """
    axes = []
    for axis in (0, 1):
        room = slide_size[axis] - (0 if pad else patch_px_l0[axis])
        count = int(np.floor(room / step_px_l0[axis] + 1e-9)) + 1 if room >= 0 else 0
        ticks = np.rint(np.arange(count) * step_px_l0[axis]).astype(np.int64)
        fits = ticks < slide_size[axis] if pad else (
            ticks + round(patch_px_l0[axis]) <= slide_size[axis])
        axes.append(ticks[fits])
    xs, ys = axes
    cells = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    kept: np.ndarray = cells[enough_tissue(cells, tissue, patch_px_l0=patch_px_l0,
                                           slide_size=slide_size, min_tissue=min_tissue)]
    return kept


def enough_tissue(
    corners: np.ndarray, tissue: Tissue, *, patch_px_l0: Pair, slide_size: tuple[int, int],
    min_tissue: float,
) -> np.ndarray:
    """(N,) bool: which of the squares are tissue to the share ``min_tissue`` (0: to any)."""
    if not tissue or not len(corners):
        return np.zeros(len(corners), bool)
    area = TissueArea.of(tissue, slide_size=slide_size, cell_px_l0=patch_px_l0)
    share = area.fraction(corners, patch_px_l0)
    return np.asarray(share >= min_tissue - 1e-9 if min_tissue > 0 else share > 0)
