"""How an image goes through a network under a limit of memory: which maps are held, which tiles.

The steps of a network are put into groups. A group is streamed tile by tile (``models.streaming``),
and what tiles compute twice at their borders is the less, the fewer steps are in it; but between
two groups the whole map is held. The last group may be held altogether: run once, on the whole map,
with its graph, as ordinary autograd does, which saves its second pass. All such choices are tried,
each with its best tiles, and the one that computes least within the memory is taken. They change
time and memory only, never the result (spec streaming.md 6, 8).

What a step saves for its backward pass and how much it computes is looked up once on the meta
device. Work is max(FLOP, ``_FLOP_PER_BYTE`` x bytes saved): a network's first step, wide and
shallow, waits for memory and not for arithmetic.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, combinations, pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.axis import Axis
from models.locality import Step
from models.shared_masks import image_masks
from models.step_costs import cost_of, measure
from models.stream_tiles import TilePlan, plan_tiles
from models.streaming import ImageTiles, stream
from utils.errors import Refused
from utils.memory import available_memory_bytes, give_back_freed_memory, sharers

StoreMaps = Literal["auto", "none", "all"]
Window = tuple[slice, slice]

# Of the memory that is free; the rest is for the optimiser, for everybody else, and on a CPU for
# what lies between blocks in use, up to half as much as they are.
_CPU_SHARE, _GPU_SHARE = 0.5, 0.8
_FLOP_PER_BYTE = 130  # saved for the backward pass; a CPU and a GPU of today are near each other
_FLOP_PER_TILE = 1e8  # and step, spent on starting it
_TRANSIENTS = 3  # tensors of a step's largest size that live beside what is saved
_MARGIN = 1.1  # blocks of memory that are free, and too small for what is asked for


@dataclass(frozen=True)
class Group:
    """Steps that go together.

    plan: the tiles that they are streamed in; None: held, run once on the whole map with its graph
    work: computing expected, 1 = an ordinary step (training or not) of the whole network
    peak_bytes: memory expected while this group is worked on, what other groups hold included
    """

    steps: list[Step]
    plan: TilePlan | None
    work: float = 0.0
    peak_bytes: int = 0


def free_memory(device: torch.device) -> int:
    """Bytes that a training step may take on ``device``: a fixed share of what is free now.

    Ask before the first image: a process may keep what it has taken once. Processes started
    together by ``torchrun`` share the memory of a CPU, folds that are trained side by side
    (``utils.memory.share_memory``) that of any device.
    """
    if device.type != "cuda":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return int(_CPU_SHARE * available_memory_bytes() / processes / sharers())
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + kept) / sharers())


def graph_bytes(step: Step, size: tuple[int, int], *, bytes_per_value: int = 4) -> int:
    """What autograd holds of ``step`` for one input of ``size`` (h, w): saved tensors, and its
    result, which the next step saves; not its input, not its weights. On the meta device."""
    cost = measure(step, size)
    return round((cost.saved_values * bytes_per_value + cost.saved_bytes) * size[0] * size[1])


def run_groups(groups: Sequence[Group], source: Tensor | ImageTiles, *, skip_constant: bool = True,
               gradient_sink: Callable[[Window, Tensor], None] | None = None) -> Tensor:
    """The map (B, C, h, w) of an image, group after group; see ``models.streaming.stream``.

    source: as ``plan_groups`` was told, a map (B, C, h, w) or an image read tile by tile
    gradient_sink: gets (window, gradient of the prepared image in it) in the backward pass
    """
    x = source
    for group in groups:
        if torch.is_grad_enabled() and (group.plan or x is not source):
            give_back_freed_memory()  # what another group has left, in other pieces
        sink = gradient_sink if x is source else None
        if group.plan is not None:
            x = stream(group.steps, x, group.plan, skip_constant=skip_constant, gradient_sink=sink)
            if x.requires_grad and x.device.type == "cpu":  # what came after it is done by then
                x.register_hook(lambda _: give_back_freed_memory())
            continue
        x = _whole(x, sink)
        with image_masks(nn.ModuleList([step.module for step in group.steps]), x.device):
            for step in group.steps:
                x = step.module(x)
    assert isinstance(x, Tensor)  # there is a group
    return x


def _whole(source: Tensor | ImageTiles, sink: Callable[[Window, Tensor], None] | None) -> Tensor:
    """All of an image or map at once."""
    if isinstance(source, Tensor):
        x = source
    else:
        window = (slice(0, source.size[0]), slice(0, source.size[1]))
        x = source.prepare(source.read(window))
    if sink is not None and torch.is_grad_enabled():
        everything = (slice(0, x.shape[-2]), slice(0, x.shape[-1]))
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        x.register_hook(lambda gradient: sink(everything, gradient))
    return x


def plan_groups(
    steps: Sequence[Step], size: tuple[int, int], *, batch: int = 1, budget_bytes: int,
    tile_size: int = 0, store_maps: StoreMaps = "auto", n_frozen: int = 0, grad: bool,
    bytes_per_value: int = 4, map_bytes_per_value: int = 0, boundaries: Sequence[int],
) -> list[Group]:
    """The groups and tiles for an image of ``size`` (h, w) that compute least within the memory.

    budget_bytes: for all that a step takes beyond weights, their gradients and the optimiser
    tile_size: side of the first group's tiles in px, made legal (a multiple of the stride, larger
        than the borders); 0 = free
    store_maps: "auto" whatever is best; "none" one group, streamed: memory does not grow with the
        image, but for its map; "all" a map at each boundary, up to steps that are held
    n_frozen: the first steps get no gradient, and need no second pass
    grad: False: nothing gets gradient, one pass does
    bytes_per_value: inside of the steps; map_bytes_per_value: of the maps between them, 0 = as many
    boundaries: after so many steps a map may be held (the ends of stages)
    ``Refused`` when not even the smallest tiles fit, with the memory that would do.
    """
    cost = _Costs(list(steps), size, batch, n_frozen if grad else len(steps), bytes_per_value,
                  map_bytes_per_value or bytes_per_value)
    places = sorted({place for place in (*boundaries, n_frozen) if 0 < place < len(steps)})
    best: tuple[float, list[_Choice]] | None = None
    least = math.inf
    for cuts, held in _layouts(places, len(steps), store_maps, tiles_wanted=tile_size > 0):
        choices, needed = cost.choose(cuts, held, budget_bytes, tile_size)
        least = min(least, needed)
        work = sum(choice.work for choice in choices)
        if needed <= budget_bytes and (best is None or work < best[0]):
            best = work, choices
    if best is None:
        raise Refused(
            f"an image of {size[1]} x {size[0]} px takes {least / 1e6:,.0f} MB at least"
            f"{f' with tiles of {tile_size} px' if tile_size else ''}, but there are "
            f"{budget_bytes / 1e6:,.0f} MB (--stream_memory, in GB; eval.py takes it in "
            "--model_options): more of it,"
            f"{' smaller tiles (--tile_size 0),' if tile_size else ''}"
            f"{' --store_maps auto,' if store_maps != 'auto' else ''} or smaller images")
    return _groups(steps, size, best[1], cost.ordinary_work)


def _layouts(places: Sequence[int], count: int, store_maps: StoreMaps, *, tiles_wanted: bool
             ) -> Iterator[tuple[tuple[int, ...], bool]]:
    """(ends of the groups, is the last one held?) of everything that may be done."""
    if store_maps == "none":
        yield (count,), False
    elif store_maps == "all":
        yield (*places, count), False
        for number in range(0 if not tiles_wanted else 1, len(places) + 1):
            yield (*places[:number], count), True
    else:
        for number in range(len(places) + 1):
            for chosen in combinations(places, number):
                yield (*chosen, count), False
                if chosen or not tiles_wanted:
                    yield (*chosen, count), True


def _groups(steps: Sequence[Step], size: tuple[int, int], choices: Sequence[_Choice],
            ordinary_work: float) -> list[Group]:
    """With the tiles of each: the map of one group is what the next one is cut into."""
    groups = []
    for choice in choices:
        own = list(steps[choice.start:choice.end])
        plan = None
        if choice.tile_px is not None:
            plan = plan_tiles(own, size, choice.tile_px)
            size = plan.out_size
        groups.append(Group(steps=own, plan=plan, work=choice.work / ordinary_work,
                            peak_bytes=math.ceil(choice.peak_bytes)))
    return groups


@dataclass(frozen=True)
class _Choice:
    """A group with its best tiles; peak_bytes: with what is held beside it."""

    start: int
    end: int
    tile_px: tuple[int, int] | None
    work: float
    peak_bytes: float


@dataclass(frozen=True)
class _Tilings:
    """Ways to cut a group into tiles, one a row; ``None`` as a tile: not at all."""

    tiles_px: list[tuple[int, int] | None]
    work: np.ndarray
    forward_bytes: np.ndarray
    backward_bytes: np.ndarray


@dataclass(frozen=True)
class _Cut:
    """One axis in tiles: px of the input of each step, all tiles together and in the longest."""

    tile_px: int
    count: int
    total: np.ndarray
    longest: np.ndarray


class _Costs:
    """Work and memory of the groups of one network on one image; ``n_frozen`` steps need no
    gradient."""

    def __init__(self, steps: list[Step], size: tuple[int, int], batch: int, n_frozen: int,
                 bytes_per_value: int, map_bytes_per_value: int) -> None:
        self.steps, self.batch, self.n_frozen = steps, batch, n_frozen
        self.value_bytes, self.map_value_bytes = bytes_per_value, map_bytes_per_value
        self.lengths = [_lengths([_one_axis(step, axis) for step in steps], size[axis])
                        for axis in (0, 1)]
        costs = [cost_of(step) for step in steps]
        saved = np.array([one.saved_values * bytes_per_value + one.saved_bytes for one in costs])
        self.learns = np.arange(len(steps)) >= n_frozen
        self.effort = np.maximum([one.flops for one in costs], _FLOP_PER_BYTE * saved)
        self.saved = np.where(self.learns, saved, 0.0)
        self.transient = np.array([_TRANSIENTS * bytes_per_value * one.largest_values
                                   for one in costs])
        self.backward_passes = np.where(self.learns, 2.0, 0.0)
        self.backward_passes[0] /= 2  # an image needs no gradient
        self.tilings = cache(self._tilings)
        self.held = cache(self._held)

    @cached_property
    def ordinary_work(self) -> float:
        """Of the whole network, held."""
        return float(self.held(0, len(self.steps)).work[0])

    def choose(self, cuts: Sequence[int], held: bool, budget: float, tile_size: int
               ) -> tuple[list[_Choice], float]:
        """The best tiles of each group, and the memory that these take, or, where that is more
        than ``budget``, the least that this layout needs."""
        choices = []
        needed = 0.0
        starts = (0, *cuts[:-1])
        for start, end in zip(starts, cuts, strict=True):
            if held and end == cuts[-1]:
                ways = self.held(start, end)
            else:
                ways = self.tilings(start, end, 0 if start else tile_size)
            forward, backward = self._beside(starts, start, end)
            peaks = _MARGIN * np.maximum(ways.forward_bytes + forward, ways.backward_bytes
                                         + backward)
            fits = peaks <= budget
            row = int(np.argmin(np.where(fits, ways.work, np.inf) if fits.any() else peaks))
            needed = max(needed, float(peaks[row]))
            choices.append(_Choice(start, end, ways.tiles_px[row], float(ways.work[row]),
                                   float(peaks[row])))
        return choices, needed

    def _beside(self, starts: Sequence[int], start: int, end: int) -> tuple[float, float]:
        """Bytes of maps, and of their gradients, while this group is in its first, second pass."""
        earlier = sum(self._map_bytes(one) for one, then in pairwise(starts)
                      if one < start and then > self.n_frozen)
        before, after = self._map_bytes(start), self._map_bytes(end)
        if end <= self.n_frozen:  # the map before is dropped afterwards, there is no second pass
            return before + after, 0.0
        gradients = after + (before if start > self.n_frozen else 0.0)
        return earlier + before + after, (
            earlier + before + gradients + self._map_bytes(len(self.steps)))

    def _map_bytes(self, place: int) -> float:
        """Of the map after so many steps; an image is not held."""
        if place == 0:
            return 0.0
        channels = self.steps[place - 1].locality.out_channels
        rows, columns = (lengths[place] for lengths in self.lengths)
        return float(rows * columns * channels * self.batch * self.map_value_bytes)

    def _tilings(self, start: int, end: int, tile_size: int) -> _Tilings:
        """All numbers of rows and of columns of tiles; those of one side where that is given."""
        own = self.steps[start:end]
        cuts = [list(_cuts([_one_axis(step, axis) for step in own],
                           self.lengths[axis][start:end + 1], tile_size)) for axis in (0, 1)]
        pairs = [(rows, columns) for rows in cuts[0] for columns in cuts[1]]
        total, longest = (np.array([getattr(rows, name) * getattr(columns, name)
                                    for rows, columns in pairs]) for name in ("total", "longest"))
        again = 1 + bool(self.learns[start:end].any())
        work = self._work(start, end, total, again) + (
            _FLOP_PER_TILE * again * len(own) * np.array([a.count * b.count for a, b in pairs]))
        forward, backward = self._bytes(start, end, longest, weights=2)
        return _Tilings([(a.tile_px, b.tile_px) for a, b in pairs], work, forward, backward)

    def _held(self, start: int, end: int) -> _Tilings:
        """Ordinary autograd."""
        area = np.array([[rows * columns for rows, columns in zip(
            *(lengths[start:end] for lengths in self.lengths), strict=True)]], dtype=float)
        forward, backward = self._bytes(start, end, area, weights=1)
        return _Tilings([None], self._work(start, end, area, 1), forward, backward)

    def _work(self, start: int, end: int, area: np.ndarray, forward_passes: int) -> np.ndarray:
        passes = forward_passes + self.backward_passes[start:end]
        work: np.ndarray = self.batch * area @ (passes * self.effort[start:end])
        return work

    def _bytes(self, start: int, end: int, area: np.ndarray, *, weights: int
               ) -> tuple[np.ndarray, np.ndarray]:
        """In the first and in the second pass of a tile whose steps see ``area`` positions each.

        Backward, what the steps before it have saved is there beside the gradients of a step, and
        so many gradients of the weights: of a tile, and the sum.
        """
        area = self.batch * area
        own = self.steps[start:end]
        window = area[:, 0] * own[0].locality.in_channels * self.value_bytes * 2  # raw, or gradient
        passing = self.transient[start:end] * area
        forward = window + passing.max(axis=1)
        if not self.learns[end - 1]:
            return forward, np.zeros_like(forward)
        graph = np.cumsum(self.saved[start:end] * area, axis=1)
        weight_bytes = sum(one.nbytes for step in own for one in step.module.parameters()
                           if one.requires_grad)
        return forward, window + (graph + passing).max(axis=1) + weights * weight_bytes


def _one_axis(step: Step, axis: int) -> Axis:
    return step.locality.columns if axis else step.locality.rows


def _lengths(axes: Sequence[Axis], length: int) -> list[int]:
    """Of the maps of a whole image, from it on."""
    return list(accumulate(axes, lambda size, axis: axis.outputs(size), initial=length))


def _cuts(axes: Sequence[Axis], lengths: Sequence[int], tile_size: int) -> Iterator[_Cut]:
    """An axis in 1, 2, 3 ... tiles, from 8 on a quarter more at a time, each as short as that
    number allows; down to the smallest tile. Or in tiles of ``tile_size``."""
    rests: list[Axis] = list(accumulate(
        reversed(axes), lambda rest, axis: axis.then(rest)))[::-1]
    whole = rests[0]
    stride, smallest_px = whole.stride, whole.smallest_tile
    full_px = max(smallest_px, math.ceil(lengths[0] / stride) * stride)

    def legal(tile_px: float) -> int:
        return min(full_px, max(smallest_px, math.ceil(tile_px / stride) * stride))

    if tile_size:
        yield _cut(rests, lengths, legal(tile_size))
        return
    count, tile_px = 1, full_px
    yield _cut(rests, lengths, tile_px)
    while tile_px > smallest_px:
        count = max(count + 1, count * 5 // 4)
        shorter = legal((lengths[0] + (count - 1) * (smallest_px - stride)) / count)
        if shorter < tile_px:
            tile_px = shorter
            yield _cut(rests, lengths, tile_px)


def _cut(rests: Sequence[Axis], lengths: Sequence[int], tile_px: int) -> _Cut:
    """What the steps see in tiles of one length: the first, those inside, the last.

    rests: for each step, it and those after it as one
    """
    sizes = np.array(lengths[:-1], dtype=float)
    if tile_px >= lengths[0]:
        return _Cut(tile_px, 1, sizes, sizes)
    whole = rests[0]
    inside = (tile_px - whole.smallest_tile) // whole.stride + 1
    first = inside + whole.lost_start
    count = 1 + math.ceil((lengths[0] - tile_px) / (inside * whole.stride))
    last = max(1, lengths[-1] - first - (count - 2) * inside)
    stride, before, after = np.array(
        [(rest.stride, rest.reach_before, rest.reach_after) for rest in rests], dtype=float).T
    seen = np.minimum(sizes, [(first - 1) * stride + after + 1,
                              (inside - 1) * stride + before + after + 1,
                              (last - 1) * stride + before + 1])
    if count == 2:
        seen[1] = 0
    return _Cut(tile_px, count, seen[0] + (count - 2) * seen[1] + seen[2], seen.max(axis=0))
