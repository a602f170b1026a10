"""Where the tiles of an image lie, and what is cut off after each step of the network.

Geometry alone, no tensors: the map is divided into blocks that do not overlap, and the tile of a
block is the part of the image that the block depends on (spec streaming.md 6). A step's result is
cut down to what the steps after it need, so that no border is computed farther than it is of use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate

from models.axis import Axis
from models.locality import Step, compose
from utils.errors import Refused

Slices = tuple[slice, slice]  # rows, columns


@dataclass(frozen=True)
class Tile:
    """window: of the input; keep: the block of the map that it gives; crops: after each step, what
    is kept of its result, relative to that; the last leaves ``keep``. No slice is open-ended."""

    window: Slices
    keep: Slices
    crops: tuple[Slices, ...]


@dataclass(frozen=True)
class Span:
    """A tile along one axis. ranges: of the map before the first step, between steps, and after
    the last, from and to, in positions of the whole map; crops: as in ``Tile``."""

    ranges: tuple[tuple[int, int], ...]
    crops: tuple[slice, ...]


@dataclass(frozen=True)
class TilePlan:
    """Tiles row by row; their blocks cover the map once. Sizes are (h, w)."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    out_channels: int

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """Every pair of a span of rows and one of columns."""
        return tuple(_tile(rows, columns) for rows in self.rows for columns in self.columns)

    def work(self) -> tuple[int, ...]:
        """For each step the input positions that it computes over all tiles, borders included."""
        height, width = (
            [sum(span.ranges[step][1] - span.ranges[step][0] for span in spans)
             for step in range(len(spans[0].crops))] for spans in (self.rows, self.columns))
        return tuple(rows * columns for rows, columns in zip(height, width, strict=True))


def plan_tiles(steps: Sequence[Step], size: tuple[int, int],
               tile_px: tuple[int, int]) -> TilePlan:
    """The tiles of an image (or map) of ``size`` (h, w) for the steps, one after another.

    tile_px: (h, w) in px of that image; an image that is no longer than it has one tile there.
    Windows are as long or a little shorter. ``Refused`` for a tile that is not a multiple of the
    stride or has no right position inside, with the smallest that can be, and for an image that is
    smaller than the network's window.
    """
    if not steps:
        raise ValueError("plan_tiles: no steps")
    whole = compose(steps)
    out_size = whole.output_size(size)
    if min(out_size) < 1:
        raise Refused(f"an image of {size[1]} x {size[0]} px is smaller than the window of the "
                      "network; take a larger one, or cut the network earlier with --cut")
    rows, columns = (
        _spans(axes, length, tile) for axes, length, tile in (
            ([step.locality.rows for step in steps], size[0], tile_px[0]),
            ([step.locality.columns for step in steps], size[1], tile_px[1])))
    return TilePlan(rows, columns, size, out_size, whole.out_channels)


def smallest_tile(steps: Sequence[Step]) -> tuple[int, int]:
    """(h, w) of the smallest legal tile, in px of the input of the first step."""
    whole = compose(steps)
    return whole.rows.smallest_tile, whole.columns.smallest_tile


def _spans(axes: Sequence[Axis], length: int, tile_px: int) -> tuple[Span, ...]:
    """The tiles along an axis. Source: spec streaming.md 6."""
    whole = reduce(Axis.then, axes)
    sizes = list(accumulate(axes, lambda size, axis: axis.outputs(size), initial=length))
    if tile_px < length:
        _check(whole, tile_px)
    inside = tile_px // whole.stride - whole.reach_after // whole.stride
    spans, done = [], 0
    while done < sizes[-1]:
        first = max(0, done - whole.lost_start)
        at_end = first * whole.stride + tile_px >= length
        end = sizes[-1] if at_end else min(first + inside, sizes[-1])
        spans.append(_span(axes, sizes, (done, end)))
        done = end
    return tuple(spans)


def _check(whole: Axis, tile_px: int) -> None:
    smallest = whole.smallest_tile
    if tile_px % whole.stride or tile_px < smallest:
        near = max(smallest, round(tile_px / whole.stride) * whole.stride)
        raise Refused(f"tiles of {tile_px} px do not fit this network: they must be a multiple of "
                      f"its stride, {whole.stride} px, and at least {smallest} px; for example "
                      f"--tile_size {near}")


def _span(axes: Sequence[Axis], sizes: Sequence[int], keep: tuple[int, int]) -> Span:
    """What of the input and after each step the outputs ``keep`` depend on.

    What a step is given starts at a multiple of its stride, so that its windows lie as in the whole
    image, and ends there too, at the end of the image, or where the step before it ends. It is
    never empty, though an output may see nothing but padding.
    """
    needed, starts = [keep], [keep[0]]
    for axis, size in zip(reversed(axes), reversed(sizes[:-1]), strict=True):
        low, high = needed[-1]
        low = min(max(0, low * axis.stride - axis.reach_before), size - 1)
        high = max(min(size, (high - 1) * axis.stride + axis.reach_after + 1), low + 1)
        needed.append((low, high))
        starts.append(min(low // axis.stride, starts[-1]) * axis.stride)
    ranges: list[tuple[int, int]] = []
    crops: list[slice] = []
    given = sizes[0]
    for number, (start, (_, high)) in enumerate(zip(starts[::-1], needed[::-1], strict=True)):
        stride = axes[number].stride if number < len(axes) else 1
        end = min(sizes[number], given, -(-high // stride) * stride)
        if number:
            before = ranges[-1][0] // axes[number - 1].stride
            crops.append(slice(start - before, end - before))
        ranges.append((start, end))
        if number < len(axes):
            given = start // stride + axes[number].outputs(end - start)
    return Span(tuple(ranges), tuple(crops))


def _tile(rows: Span, columns: Span) -> Tile:
    return Tile((slice(*rows.ranges[0]), slice(*columns.ranges[0])),
                (slice(*rows.ranges[-1]), slice(*columns.ranges[-1])),
                tuple(zip(rows.crops, columns.crops, strict=True)))
