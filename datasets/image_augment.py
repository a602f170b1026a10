"""Views of a slide's image: a square cut out of it, turned, mirrored and bent in one resampling.

A view is made block by block, at places that do not depend on what is asked for, so windows agree
wherever they overlap. Each block reads what it needs of the image and no more: the cost is that of
the view, not of the image (spec streaming.md 10 and its defects 11, 20).
Frames: *view px* of what comes out, *image px* of what is read; a pixel i covers [i, i + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, cos, floor, radians, sin
from typing import TYPE_CHECKING

import numpy as np

from utils.contracts import SlideImage
from utils.errors import Refused

if TYPE_CHECKING:
    import torch

BLOCK_PX = 512
CELL_PX = 16  # between the points whose displacement is drawn
FRAME_CELLS = 16  # along the sides, where the displacement fades to nothing
_WHITE = 255
_CELLS = BLOCK_PX // CELL_PX

Colour = tuple[float, float, float]
Map = Callable[[Callable[[tuple[int, int]], None], Iterable[tuple[int, int]]], Iterable[None]]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images vary; names, units and defaults of ``ImageAugmentOptions``."""

    max_rotation: float = 180.0
    image_flips: bool = True
    colour_jitter: float = 0.05
    elastic_alpha: float = 1000.0
    elastic_sigma: float = 150.0

    def __post_init__(self) -> None:
        """``Refused`` for a deformation that would fold the image over itself: one whose slope, of
        a standard deviation of about 1.84 alpha / sigma^2, often passes 1."""
        most = self.elastic_sigma**2 / 4
        if self.elastic_alpha > most:
            raise Refused(f"--elastic_alpha {self.elastic_alpha:g} with --elastic_sigma "
                          f"{self.elastic_sigma:g} folds the image over itself: give an alpha of "
                          f"at most {most:g} (a quarter of sigma squared), or a larger sigma")

    def turn(self, rng: np.random.Generator) -> np.ndarray:
        """(2, 2) matrix from offsets in the view to offsets in the image: rotated, mirrored."""
        angle = radians(rng.uniform(-1, 1) * self.max_rotation)
        mirrored = np.where(rng.random(2) < 0.5, -1.0, 1.0) if self.image_flips else np.ones(2)
        rotated = np.array([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]])
        matrix: np.ndarray = rotated * mirrored
        return matrix

    def bend(self, rng: np.random.Generator, size_px: tuple[int, int]) -> np.ndarray | None:
        """(rows, columns, 2) displacement x, y in view px of points ``CELL_PX`` apart, enough of
        them for whole blocks; None without.

        Uniform in -1..1, smoothed, times alpha; it fades to nothing over the outer ``FRAME_CELLS``
        points (a quarter of the side where that is less), so that nothing tears.
        """
        import cv2

        if not self.elastic_alpha:
            return None
        columns, rows = (ceil(side / CELL_PX) + 1 for side in size_px)
        noise = rng.uniform(-1, 1, (rows, columns, 2)).astype(np.float32)
        sigma = self.elastic_sigma / CELL_PX
        smooth = cv2.GaussianBlur(noise, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
        smooth *= self.elastic_alpha * _fading(rows)[:, None, None] * _fading(columns)[:, None]
        field = np.zeros((_points(size_px[1]), _points(size_px[0]), 2), np.float32)
        field[:rows, :columns] = smooth
        return field

    def colour(self, rng: np.random.Generator) -> Colour | None:
        """``SlideImage.colour``: factors of lightness and chroma, what is added to the hue."""
        if not self.colour_jitter:
            return None
        lightness, chroma, hue = (rng.uniform(-1, 1, 3) * self.colour_jitter).tolist()
        return 1 + lightness, 1 + chroma, hue


def _fading(count: int) -> np.ndarray:
    """(count,) 0 at both ends, 1 in the middle."""
    frame = max(1, min(FRAME_CELLS, count // 4))
    ends = np.minimum(np.arange(count), np.arange(count)[::-1])
    return np.minimum(ends / frame, 1).astype(np.float32)


def _points(side_px: int) -> int:
    """Displaced points along a side of whole blocks."""
    return ceil(side_px / BLOCK_PX) * _CELLS + 1


# ---------------------------------------------------------------------------- views

@dataclass(frozen=True, kw_only=True)
class ImageView:
    """A ``SlideImage`` that shows a part of another; white where that one ends.

    size_px: (width, height) of the view
    origin_px: x, y of the image's pixel that is the view's first before it is turned; may lie
        outside
    turn, field: as ``Augmentation`` draws them; None = not turned, not bent
    colour: see ``SlideImage``
    pin: page-locked memory; threads: runs a function on blocks, as ``Executor.map``
    """

    image: SlideImage
    size_px: tuple[int, int]
    origin_px: tuple[int, int] = (0, 0)
    turn: np.ndarray | None = None
    field: np.ndarray | None = None
    colour: Colour | None = None
    pin: bool = False
    threads: Map = map

    @property
    def mpp_um(self) -> float | None:
        """Of the image: views change no scale."""
        return self.image.mpp_um

    def augmented(self, how: Augmentation, rng: np.random.Generator, *, grow: bool) -> ImageView:
        """A view as this one, turned about its centre, bent and recoloured.

        grow: make it so large that turning cuts nothing off.
        """
        turn, size = how.turn(rng), self.size_px
        if grow:
            width, height = np.ceil(np.abs(turn) @ np.array(size) - 1e-6).astype(int).tolist()
            size = (width, height)
        # Whole pixels, so that a view that is not turned copies pixels
        x, y = (start + (old - new) // 2 for start, old, new in zip(
            self.origin_px, self.size_px, size, strict=True))
        field = how.bend(rng, size)
        still = field is None and np.array_equal(turn, np.eye(2))
        return replace(self, size_px=size, origin_px=(x, y), turn=None if still else turn,
                       field=field, colour=how.colour(rng))

    def read(self, x: int, y: int, width: int, height: int) -> torch.Tensor:
        """See ``SlideImage``."""
        import torch

        pixels = torch.empty((height, width, 3), dtype=torch.uint8, pin_memory=self.pin)
        out = pixels.numpy()

        def fill(block: tuple[int, int]) -> None:
            left, top = block
            columns, rows = (slice(max(start, first), min(start + BLOCK_PX, first + side))
                             for start, first, side in ((left, x, width), (top, y, height)))
            part = self._copied(columns, rows) if self.turn is None else self._warped(left, top)[
                rows.start - top:rows.stop - top, columns.start - left:columns.stop - left]
            out[rows.start - y:rows.stop - y, columns.start - x:columns.stop - x] = part

        for _ in self.threads(fill, _blocks(x, y, width, height)):
            pass
        return pixels

    def held(self) -> HeldImage:
        """The same with all pixels in memory, made now; errors as ``read``."""
        return HeldImage(pixels=replace(self, pin=False).read(0, 0, *self.size_px),
                         mpp_um=self.mpp_um, colour=self.colour, pin=self.pin)

    def _copied(self, columns: slice, rows: slice) -> np.ndarray:
        """(h, w, 3) of a view that is not turned."""
        x, y = self.origin_px
        return _padded(self.image, columns.start + x, rows.start + y,
                       columns.stop - columns.start, rows.stop - rows.start)

    def _warped(self, left: int, top: int) -> np.ndarray:
        """(BLOCK_PX, BLOCK_PX, 3) of the block that begins there, in view px.

        Turning is linear, so turned points and those between them, interpolated, are exactly what
        turning each pixel would give: one pass for both. Numbers are small, as they count from
        the window that is read, so float32 is exact enough however large the image is.
        """
        import cv2

        points = self._points(left, top)
        x, y = (floor(points[axis].min()) for axis in (0, 1))
        width, height = (floor(points[axis].max()) + 2 - first
                         for axis, first in ((0, x), (1, y)))
        window = _padded(self.image, x, y, width, height)
        between = _between()
        maps = [(between @ (points[axis] - first) @ between.T).astype(np.float32)
                for axis, first in ((0, x), (1, y))]
        return cv2.remap(window, maps[0], maps[1], cv2.INTER_LINEAR,
                         borderMode=cv2.BORDER_REPLICATE)

    def _points(self, left: int, top: int) -> np.ndarray:
        """(2, n, n) x and y, in image px from the middle of its first pixel, of the points of a
        block ``CELL_PX`` apart."""
        assert self.turn is not None
        steps = np.arange(_CELLS + 1) * CELL_PX + 0.5
        across, down = np.meshgrid(steps + left, steps + top)
        if self.field is not None:
            row, column = top // CELL_PX, left // CELL_PX
            moved = self.field[row:row + _CELLS + 1, column:column + _CELLS + 1]
            across, down = across + moved[..., 0], down + moved[..., 1]
        (a, b), (c, d) = self.turn
        half_x, half_y = (side / 2 for side in self.size_px)
        x, y = (first + half - 0.5 for first, half in zip(
            self.origin_px, (half_x, half_y), strict=True))
        across, down = across - half_x, down - half_y
        return np.stack([x + a * across + b * down, y + c * across + d * down])


@dataclass(frozen=True, kw_only=True)
class HeldImage:
    """A ``SlideImage`` in memory. pixels: (h, w, 3) uint8 RGB; the rest as of ``ImageView``."""

    pixels: torch.Tensor
    mpp_um: float | None
    colour: Colour | None
    pin: bool = False

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height)."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def read(self, x: int, y: int, width: int, height: int) -> torch.Tensor:
        """See ``SlideImage``."""
        import torch

        window = torch.empty((height, width, 3), dtype=torch.uint8, pin_memory=self.pin)
        return window.copy_(self.pixels[y:y + height, x:x + width])


@cache
def _between() -> np.ndarray:
    """(BLOCK_PX, points) weights of the two points that each pixel of a block lies between."""
    cell, step = np.divmod(np.arange(BLOCK_PX), CELL_PX)
    weights = np.zeros((BLOCK_PX, _CELLS + 1))
    weights[np.arange(BLOCK_PX), cell] = 1 - step / CELL_PX
    weights[np.arange(BLOCK_PX), cell + 1] = step / CELL_PX
    return weights


def _blocks(x: int, y: int, width: int, height: int) -> Iterator[tuple[int, int]]:
    """Left and top of each block that a window touches."""
    for top in range(y // BLOCK_PX * BLOCK_PX, y + height, BLOCK_PX):
        for left in range(x // BLOCK_PX * BLOCK_PX, x + width, BLOCK_PX):
            yield left, top


def _padded(image: SlideImage, x: int, y: int, width: int, height: int) -> np.ndarray:
    """(height, width, 3) of a window that may lie outside of the image, white there."""
    out = np.full((height, width, 3), _WHITE, np.uint8)
    left, top = max(x, 0), max(y, 0)
    right, bottom = (min(start + side, full) for start, side, full in zip(
        (x, y), (width, height), image.size_px, strict=True))
    if left < right and top < bottom:
        out[top - y:bottom - y, left - x:right - x] = image.read(
            left, top, right - left, bottom - top).numpy()
    return out
