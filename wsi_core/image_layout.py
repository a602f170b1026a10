"""Tissue of a slide packed onto a canvas: which pieces of the slide go where.

The tissue is cut into rectangles along bands of glass that run through all of it, again and again
(an XY-cut), and these are put onto shelves, the highest first, on a canvas that is about square.
Where that saves nothing the tissue's bounding box is taken as it is. The original that we follow
takes empty bands out of the whole slide (spec streaming.md 9); pieces that lie askew keep their
glass there, and where a pixel came from is lost.

Frames: level-0 px of the slide; frame px, the whole slide at the scale of the image; px of the
image. Everything lies on a lattice of ``UNIT_PX`` in the latter two, and no piece is turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import NamedTuple

import numpy as np

from utils.errors import ItemFailed
from wsi_core.image_record import Box
from wsi_core.scale import MPP_TOLERANCE
from wsi_core.slide import LEVEL_TOLERANCE, Slide
from wsi_core.tissue import Tissue

UNIT_PX = 8  # of the lattice that pieces lie on
CELL_UNITS = 8  # side of a cell of the tissue map: 64 px
MARGIN_UM = 128.0  # of glass that is left around tissue (the original: 32 px of about 8 um)
GAP_PX = 16  # white between pieces on the canvas
_WIDTHS = tuple(1 + step / 20 for step in range(-6, 13))  # of the canvas, against a full square

Pair = tuple[float, float]
Size = tuple[int, int]


class Piece(NamedTuple):
    """A rectangle, in units of the lattice."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The whole slide at the scale of an image.

    size_px: (w, h); downsample: (x, y) level-0 px per px; mpp_um: um per px, as it really is
    """

    size_px: Size
    downsample: Pair
    mpp_um: float


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where everything lies.

    size_px: (w, h) of the image; boxes: its pieces
    tissue_map: (h, w) uint8, share of tissue (255 = all) in the cells of ``cell_px`` px
    """

    size_px: Size
    boxes: tuple[Box, ...]
    tissue_map: np.ndarray
    cell_px: int = UNIT_PX * CELL_UNITS


def image_frame(slide: Slide, mpp_um: float, slide_mpp: Pair) -> Frame:
    """The slide at ``mpp_um``; slide_mpp: (x, y) um per level-0 px.

    A pyramid level within 1 % of that is taken as it is, so its pixels need no resizing. Raises
    ItemFailed for a slide that is more than 5 % too coarse.
    """
    own_mpp = sum(slide_mpp) / 2
    if mpp_um < own_mpp * (1 - MPP_TOLERANCE):
        raise ItemFailed(
            f"{slide.path}: has {own_mpp:.4g} um per pixel, too coarse for an image of "
            f"{mpp_um:.4g} um (more than {MPP_TOLERANCE:.0%} enlarging): leave it out, or ask for "
            "more um per pixel")
    full = slide.level_dimensions[0]
    wanted = [max(1.0, side * own / mpp_um) for side, own in zip(full, slide_mpp, strict=True)]
    size = (round(wanted[0]), round(wanted[1]))
    for level_size in slide.level_dimensions:
        if all(abs(side - want) <= LEVEL_TOLERANCE * want
               for side, want in zip(level_size, wanted, strict=True)):
            size = level_size
    downsample = (full[0] / size[0], full[1] / size[1])
    return Frame(size_px=size, downsample=downsample,
                 mpp_um=(downsample[0] * slide_mpp[0] + downsample[1] * slide_mpp[1]) / 2)


def pack_tissue(tissue: Tissue, frame: Frame, *, keep_gaps: bool = False) -> Packing | None:
    """Lay the tissue out; None when there is none. keep_gaps: its bounding box, as it is.

    The same tissue gives the same layout. The larger side of a piece may be that of the slide;
    nothing is ever scaled down to fit.
    """
    mask = tissue_units(tissue, frame)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    margin = max(1, ceil(MARGIN_UM / (frame.mpp_um * UNIT_PX)))
    whole = Piece(int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]) + 1,
                  int(rows[-1] - rows[0]) + 1)
    pieces, places = [_widened(whole, margin, mask.shape)], [(0, 0)]
    size = _extent(pieces, places)
    if not keep_gaps:
        cut = [_widened(piece, margin, mask.shape)
               for piece in cut_apart(mask, band=2 * margin + GAP_PX // UNIT_PX)]
        shelved = shelve([(piece.width, piece.height) for piece in cut])
        packed = _extent(cut, shelved)
        if packed[0] * packed[1] < size[0] * size[1]:
            pieces, places, size = cut, shelved, packed
    return Packing(
        size_px=(size[0] * UNIT_PX, size[1] * UNIT_PX),
        boxes=tuple(_box(piece, place, frame) for piece, place in zip(pieces, places, strict=True)),
        tissue_map=_shares(mask, pieces, places, size))


def tissue_units(tissue: Tissue, frame: Frame) -> np.ndarray:
    """(h, w) bool, the frame in units: which of them tissue touches, holes left out."""
    import cv2

    shape = (-(-frame.size_px[1] // UNIT_PX), -(-frame.size_px[0] // UNIT_PX))
    mask = np.zeros(shape, np.uint8)
    unit_l0 = np.asarray(frame.downsample) * UNIT_PX
    last = np.array([shape[1] - 1, shape[0] - 1])
    for contour, holes in zip(tissue.contours, tissue.holes, strict=True):
        outline, *inner = (np.clip(np.floor(points.reshape(-1, 2) / unit_l0), 0, last)
                           .astype(np.int32) for points in (contour, *holes))
        x, y, width, height = cv2.boundingRect(outline)
        piece = np.zeros((height, width), np.uint8)
        cv2.fillPoly(piece, [outline - (x, y)], 1)
        for hole in inner:
            cv2.fillPoly(piece, [hole - (x, y)], 0)
        cv2.polylines(piece, [outline - (x, y)], True, 1)  # what a hole takes is inside
        mask[y:y + height, x:x + width] |= piece
    return mask.astype(bool)


# ---------------------------------------------------------------------------- cutting

def cut_apart(mask: np.ndarray, *, band: int) -> list[Piece]:
    """Rectangles around all of an (h, w) bool mask, each as tight as can be.

    Along rows or columns any two of them are at least ``band`` apart; none can be cut further at
    an empty band as wide as that. From top to bottom and left to right, roughly.
    """
    found: list[Piece] = []
    left_over = [Piece(0, 0, mask.shape[1], mask.shape[0])]
    while left_over:
        x, y, width, height = left_over.pop()
        view = mask[y:y + height, x:x + width]
        rows, columns = (_runs(np.any(view, axis=axis), band) for axis in (1, 0))
        if not rows:
            continue
        if len(rows) == len(columns) == 1:
            (top, bottom), (left, right) = rows[0], columns[0]
            found.append(Piece(x + left, y + top, right - left, bottom - top))
        elif _gaps(rows) >= _gaps(columns):
            left_over += [Piece(x, y + top, width, bottom - top) for top, bottom in rows[::-1]]
        else:
            left_over += [Piece(x + left, y, right - left, height) for left, right in columns[::-1]]
    return found


def _runs(filled: np.ndarray, band: int) -> list[tuple[int, int]]:
    """(from, to) of what is filled, gaps of less than ``band`` included."""
    places = np.flatnonzero(filled)
    if not places.size:
        return []
    breaks = np.flatnonzero(np.diff(places) > band)
    starts = places[np.concatenate([[0], breaks + 1])]
    ends = places[np.concatenate([breaks, [len(places) - 1]])] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _gaps(runs: Sequence[tuple[int, int]]) -> int:
    return sum(after[0] - before[1] for before, after in zip(runs, runs[1:], strict=False))


def _widened(piece: Piece, margin: int, shape: tuple[int, ...]) -> Piece:
    """With its margin, as far as the slide goes."""
    left, top = max(0, piece.x - margin), max(0, piece.y - margin)
    right = min(shape[1], piece.x + piece.width + margin)
    bottom = min(shape[0], piece.y + piece.height + margin)
    return Piece(left, top, right - left, bottom - top)


# ---------------------------------------------------------------------------- shelves

def shelve(sizes: Sequence[Size]) -> list[tuple[int, int]]:
    """(x, y) of rectangles (w, h) on a canvas of small area, all in units, ``GAP_PX`` apart.

    Of several widths about that of a full square the one of the smallest area counts, then of the
    shortest longer side.
    """
    gap = GAP_PX // UNIT_PX
    side = sqrt(sum((width + gap) * (height + gap) for width, height in sizes))
    widest = max(width for width, _ in sizes)
    widths = sorted({max(widest, round(side * share)) for share in _WIDTHS})

    def cost(places: list[tuple[int, int]]) -> tuple[int, int]:
        width, height = _extent(sizes, places)
        return width * height, max(width, height)

    return min((_on_shelves(sizes, width, gap) for width in widths), key=cost)


def _on_shelves(sizes: Sequence[Size], width: int, gap: int) -> list[tuple[int, int]]:
    """The highest first, each onto the first shelf with room."""
    order = sorted(range(len(sizes)), key=lambda at: (-sizes[at][1], -sizes[at][0], at))
    places = [(0, 0)] * len(sizes)
    shelves: list[list[int]] = []  # [next x, y]
    bottom = 0
    for at in order:
        shelf = next((one for one in shelves if one[0] + sizes[at][0] <= width), None)
        if shelf is None:
            shelves.append(shelf := [0, bottom])
            bottom += sizes[at][1] + gap
        places[at] = (shelf[0], shelf[1])
        shelf[0] += sizes[at][0] + gap
    return places


def _extent(pieces: Sequence[Piece] | Sequence[Size], places: Sequence[tuple[int, int]]) -> Size:
    """(w, h) of the canvas that holds everything."""
    return (max(x + piece[-2] for piece, (x, _) in zip(pieces, places, strict=True)),
            max(y + piece[-1] for piece, (_, y) in zip(pieces, places, strict=True)))


# ---------------------------------------------------------------------------- results

def _box(piece: Piece, place: tuple[int, int], frame: Frame) -> Box:
    """A piece in px of the image and in level-0 px; the last unit may reach beyond the slide."""
    left, top = piece.x * UNIT_PX, piece.y * UNIT_PX
    width = min(piece.width * UNIT_PX, frame.size_px[0] - left)
    height = min(piece.height * UNIT_PX, frame.size_px[1] - top)
    x, y = frame.downsample
    return Box(place[0] * UNIT_PX, place[1] * UNIT_PX, width, height,
               left * x, top * y, width * x, height * y)


def _shares(mask: np.ndarray, pieces: Sequence[Piece], places: Sequence[tuple[int, int]],
            size: Size) -> np.ndarray:
    """(h, w) uint8: tissue in each cell of the image, 255 = all of it."""
    width, height = (-(-side // CELL_UNITS) for side in size)
    packed = np.zeros((height * CELL_UNITS, width * CELL_UNITS), bool)
    for piece, (x, y) in zip(pieces, places, strict=True):
        packed[y:y + piece.height, x:x + piece.width] = mask[
            piece.y:piece.y + piece.height, piece.x:piece.x + piece.width]
    cells = packed.reshape(height, CELL_UNITS, width, CELL_UNITS)
    shares: np.ndarray = np.rint(cells.mean(axis=(1, 3)) * 255).astype(np.uint8)
    return shares
