"""A huge image through a local network, tile by tile: the same map, the same gradients.

The map is cut into disjoint blocks. Each comes from a tile of the image that is large enough for it
to be exact, and is made without a graph. On the way back each tile is computed again, now with a
graph, and takes the gradient of its own block to the weights and the input. The sum over the
blocks is the gradient of one graph over the whole image, for every parameter. Memory is that of one
tile, the map, and the gradient of the source where it is a map that wants one.
Source: Pinckaers, van Ginneken, Litjens, "Streaming convolutional neural networks for end-to-end
learning with multi-megapixel images", IEEE TPAMI 2022; with disjoint blocks in place of its
overlapping ones (``models.stream_tiles``), so that no layer needs a backward pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from models.locality import Locality, Step, compose
from models.shared_masks import SharedMasks
from models.stream_tiles import TilePlan
from models.tile_reading import ImageTiles, RawTile, Source, TileReader, Window, layout_of
from models.two_pass import GradientSums, Replay
from utils.replay import RandomState

__all__ = ["GradientSink", "ImageTiles", "stream"]

GradientSink = Callable[[Window, torch.Tensor], None]


def stream(
    steps: Sequence[Step], source: Source, plan: TilePlan, *, skip_constant: bool = True,
    gradient_sink: GradientSink | None = None,
) -> torch.Tensor:
    """The steps one after another over all of ``source``: (B, C, *plan.out_size), exact.

    source: (B, C, h, w), gradient flows into it; or an image (B = 1), read one tile ahead. Its
            size is ``plan.in_size``
    skip_constant: tiles of one colour (maps: of one value per channel) that touch no side of the
            image have the same output everywhere. It is computed once a colour, on the smallest
            tile that has it, and takes their whole gradient in one go. The same to rounding. Tiles
            whose own input wants gradient save it in the first pass only
    gradient_sink: is given, in the backward pass, the window of a tile and the gradient of its
            input (B, C, h, w), which may be kept; windows overlap, there the gradients add up. A
            window that never comes has none. Works without a trainable weight too

    Autocast of the call holds in both passes; the result has the number format of the tiles'
    results. Tiles whose block has no gradient (after a maximum: most) are not computed again.
    The first steps have no graph where neither they nor the source want gradient. The gradient of
    a weight leaves as one sum. There are no second derivatives. A weight or source that changed
    before the backward pass is an error of torch.

    Random numbers come from torch's global generators. Masks without extent in space (stochastic
    depth, dropout of channels) are drawn once for the image, see ``models.shared_masks``, where a
    pass over the undivided image gets the same. Elementwise dropout is drawn tile by tile, so it
    depends on the plan, and constant tiles are then computed. Both passes see the same masks.
    ``ValueError`` where the plan is not one for these steps and this source, and where a batch norm
    was put into training mode: its statistics would be of a tile.
    """
    _check(steps, source, plan)
    module = nn.ModuleList([step.module for step in steps])
    weights = list(module.parameters())
    device = _device(source, module)
    work = _Work(steps=steps, plan=plan, skip_constant=skip_constant, sink=gradient_sink,
                 replay=Replay(module=module, device=device), masks=SharedMasks(module, device))
    wants = [gradient_sink is not None, *(one.requires_grad for one in weights),
             isinstance(source, torch.Tensor) and source.requires_grad]
    if not (torch.is_grad_enabled() and any(wants)):
        with torch.no_grad():
            return work.first_pass(source)
    anchor = torch.empty(0, requires_grad=gradient_sink is not None)
    result: torch.Tensor = _Streamed.apply(work, anchor, source, *weights)
    return result


class _Streamed(torch.autograd.Function):
    """Source and weights to the map; saved so that torch notices when they were changed."""

    @staticmethod
    def forward(ctx: Any, work: _Work, anchor: torch.Tensor, source: Source,
                *weights: nn.Parameter) -> torch.Tensor:
        is_map = isinstance(source, torch.Tensor)
        ctx.work, ctx.weights, ctx.image = work, weights, None if is_map else source
        ctx.save_for_backward(*weights, *([source] if is_map else []))
        return work.first_pass(source)

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # looked at in any case: this notices changes
        of_source, of_weights = ctx.work.second_pass(
            saved[-1] if ctx.image is None else ctx.image, gradient, ctx.weights,
            source_wants=ctx.needs_input_grad[2])
        return None, None, of_source, *of_weights


# ---------------------------------------------------------------------------- the first pass

@dataclass
class _Constant:
    """Tiles of one colour. pixel: (..., C, 1, 1) of it; block: (B, C, 1, 1), the map there."""

    pixel: torch.Tensor
    block: torch.Tensor
    tiles: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class _Work:
    """One call. states: the generators before each tile; constants: by colour.

    writes_input: does the first step write into what it is given (an activation in place)?
    """

    steps: Sequence[Step]
    plan: TilePlan
    skip_constant: bool
    sink: GradientSink | None
    replay: Replay
    masks: SharedMasks
    states: dict[int, RandomState] = field(default_factory=dict)
    constants: dict[tuple[float, ...], _Constant] = field(default_factory=dict)
    writes_input: bool = False

    @cached_property
    def locality(self) -> Locality:
        """Of all steps as one."""
        return compose(self.steps)

    def first_pass(self, source: Source) -> torch.Tensor:
        """The whole map."""
        result: torch.Tensor | None = None
        reader = self.reader(source)
        every = range(len(self.plan.tiles))
        with closing(reader.tiles(every, look=self.skip_constant)) as tiles:
            for raw in tiles:
                keep = self.plan.tiles[raw.number].keep
                block = self._first_block(reader, raw)
                del raw  # while the next one is made
                if result is None:
                    result = torch.empty(
                        (*block.shape[:2], *self.plan.out_size), dtype=block.dtype,
                        device=block.device, memory_format=layout_of(block))
                result[(..., *keep)] = block
                del block
        assert result is not None  # a plan has a tile
        return result

    def reader(self, source: Source) -> TileReader:
        """Of the plan's tiles."""
        return TileReader(source=source, plan=self.plan, device=self.replay.device)

    def block(self, x: torch.Tensor, crops: Sequence[Window]) -> torch.Tensor:
        """A tile through the steps, after each cut down to what the rest needs."""
        version = _version(x)
        with self.masks.shared():
            for step, crop in zip(self.steps, crops, strict=True):
                result = step.module(x)
                if step is self.steps[0] and _version(x) != version:
                    self.writes_input = True
                x = result
                del result  # and with it, below, what is cut off
                x = _cropped(x, crop)
        return x

    def inner(self, reader: TileReader, pixel: torch.Tensor) -> torch.Tensor:
        """(B, C, 1, 1): the map inside of a colour, an exact output of the smallest tile."""
        rows, columns = self.locality.rows, self.locality.columns
        tile = pixel.expand(*pixel.shape[:-2], rows.smallest_tile, columns.smallest_tile)
        whole = [(slice(None), slice(None))] * len(self.steps)
        y, x = rows.lost_start, columns.lost_start
        found = self.block(reader.prepare(tile), whole)
        return found[..., y:y + 1, x:x + 1]

    def _first_block(self, reader: TileReader, raw: RawTile) -> torch.Tensor:
        if raw.is_constant and self.skip_constant:
            known = self._constant(reader, raw)
            if known is not None:
                return known
        self.states[raw.number] = self.replay.now()
        tile = self.plan.tiles[raw.number]
        with self.replay.first():
            return self.block(reader.prepare(raw.pixels), tile.crops)

    def _constant(self, reader: TileReader, raw: RawTile) -> torch.Tensor | None:
        """(B, C, 1, 1): the map of a constant tile; None where its values are random."""
        pixel = raw.pixels[..., :1, :1]
        colour = tuple(pixel.flatten().tolist())
        if colour not in self.constants:
            before = self.replay.now()
            with self.replay.first():
                block = self.inner(reader, pixel)
            if not _same(before, self.replay.now()):
                before.restore()
                self.skip_constant = False
                return None
            self.constants[colour] = _Constant(pixel.clone(), block.clone())
        self.constants[colour].tiles.append(raw.number)
        return self.constants[colour].block

    # ------------------------------------------------------------------------ the second pass

    def second_pass(
        self, source: Source, gradient: torch.Tensor, weights: Sequence[nn.Parameter], *,
        source_wants: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """The gradients of the source and of each weight, from that of the map."""
        wanted = [weight for weight in weights if weight.requires_grad]
        into = torch.zeros_like(source) if source_wants else None  # type: ignore[arg-type]
        back = _Back(work=self, reader=self.reader(source), weights=wanted, gradient=gradient,
                     into=into)
        used = self._used(gradient)
        constants = [] if back.wants_window else list(self.constants.values())
        once = {number for constant in constants for number in constant.tiles}
        with self.replay.second_pass():
            todo = [number for number in used if number not in once]
            with closing(back.reader.tiles(todo, look=False)) as tiles:
                for raw in tiles:
                    back.tile(raw)
                    del raw  # while the next one is made
            for constant in constants:
                back.constant(constant.pixel, [one for one in constant.tiles if one in used])
        totals = iter(back.sums.totals() if used else map(torch.zeros_like, wanted))
        return into, [next(totals) if one.requires_grad else None for one in weights]

    def _used(self, gradient: torch.Tensor) -> dict[int, None]:
        """The tiles whose block has any gradient, in order."""
        size = torch.linalg.vector_norm(gradient, math.inf, dim=(0, 1))
        used = (size != 0).cpu()  # NaN counts; asked once, a GPU is not waited for at each tile
        return {number: None for number, tile in enumerate(self.plan.tiles)
                if bool(used[tile.keep].any())}


@dataclass(kw_only=True)
class _Back:
    """What a second pass collects. into: the source's gradient, None where it wants none."""

    work: _Work
    reader: TileReader
    weights: Sequence[nn.Parameter]
    gradient: torch.Tensor
    into: torch.Tensor | None
    sums: GradientSums = field(init=False)
    wants_window: bool = field(init=False)

    def __post_init__(self) -> None:
        self.sums = GradientSums(self.weights)
        self.wants_window = self.into is not None or self.work.sink is not None

    def tile(self, raw: RawTile) -> None:
        """Add a tile's share."""
        work, tile = self.work, self.work.plan.tiles[raw.number]
        inputs: list[torch.Tensor] = list(self.weights)
        window = self.reader.prepare(raw.pixels)
        if self.wants_window:
            window = window.detach().requires_grad_()
            inputs.append(window)
        with work.replay.again(work.states.get(raw.number)):
            if self.wants_window and work.writes_input:
                window = window.clone()
            block = work.block(window, tile.crops)
        del window
        if not block.requires_grad:
            return
        found = torch.autograd.grad(block, inputs, self.gradient[(..., *tile.keep)],
                                    allow_unused=True)
        self.sums.add(found[:len(self.weights)])
        if self.wants_window and found[-1] is not None:
            self._add_window(tile.window, found[-1])

    def _add_window(self, window: Window, gradient: torch.Tensor) -> None:
        if self.into is not None:
            self.into[(..., *window)] += gradient
        if self.work.sink is not None:
            self.work.sink(window, gradient)

    def constant(self, pixel: torch.Tensor, tiles: Sequence[int]) -> None:
        """Add the share of all tiles of one colour: the mean of their gradient goes through the
        smallest tile, then times the number of positions: a sum may be too large for float16."""
        if not tiles:
            return
        blocks = [self.gradient[(..., *self.work.plan.tiles[number].keep)] for number in tiles]
        count = sum(block.shape[-2] * block.shape[-1] for block in blocks)
        wide = torch.promote_types(self.gradient.dtype, torch.float32)
        sums = torch.stack([block.sum((2, 3), keepdim=True, dtype=wide) for block in blocks])
        with self.work.replay.again(None):
            block = self.work.inner(self.reader, pixel)
        if block.requires_grad:
            mean = (sums.sum(0) / count).to(block.dtype)
            self.sums.add(torch.autograd.grad(block, self.weights, mean, allow_unused=True),
                          times=count)


# ---------------------------------------------------------------------------- pieces

def _cropped(x: torch.Tensor, crop: Window) -> torch.Tensor:
    """A part of a map, dense: convolutions would copy a view each for itself, in both passes."""
    height, width = x.shape[-2:]
    top, bottom, _ = crop[0].indices(height)
    left, right, _ = crop[1].indices(width)
    if (top, left, bottom, right) == (0, 0, height, width):
        return x
    return F.pad(x, (-left, right - width, -top, bottom - height))


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _same(one: RandomState, other: RandomState) -> bool:
    return torch.equal(one.cpu, other.cpu) and (
        one.cuda is None or other.cuda is None or torch.equal(one.cuda, other.cuda))


def _device(source: Source, module: nn.Module) -> torch.device:
    if isinstance(source, torch.Tensor):
        return source.device
    return next((one.device for one in (*module.parameters(), *module.buffers())),
                torch.device("cpu"))


def _check(steps: Sequence[Step], source: Source, plan: TilePlan) -> None:
    """``ValueError`` where steps, source and plan are not made for each other."""
    if isinstance(source, torch.Tensor):
        size, channels = tuple(source.shape[-2:]), source.shape[1]
    else:
        size, channels = tuple(source.size), source.channels
    if size != tuple(plan.in_size):
        raise ValueError(f"stream: the plan is for {plan.in_size} px, the source has {size}")
    whole = compose(steps)
    if ((plan.out_size, plan.out_channels, len(plan.tiles[0].crops))
            != (whole.output_size(plan.in_size), whole.out_channels, len(steps))):
        raise ValueError("stream: the plan was made for other steps")
    for step in steps:
        if any(one.training for one in step.module.modules() if isinstance(one, _BatchNorm)):
            raise ValueError(f"stream: step {step.name} has a batch norm in training mode")
    expected = steps[0].locality.in_channels
    if channels != expected:
        raise ValueError(f"stream: step {steps[0].name} takes {expected} channels, the source has "
                         f"{channels}")
