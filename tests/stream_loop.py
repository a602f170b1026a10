"""The simplest loop over tiles, which what the geometry says is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.locality import Step
from models.stream_tiles import TilePlan


@torch.no_grad()
def by_tiles(steps: Sequence[Step], image: Tensor, plan: TilePlan) -> Tensor:
    """(B, C, *plan.out_size) of (B, C, *plan.in_size); not-a-number where no tile has written.

    Each tile must lie inside of the image, and no position be written twice.
    """
    result = image.new_full((len(image), plan.out_channels, *plan.out_size), torch.nan)
    for tile in plan.tiles:
        x = _cut(image, tile.window)
        for step, crop in zip(steps, tile.crops, strict=True):
            x = _cut(step.module(x), crop)
        block = _cut(result, tile.keep)
        assert block.isnan().all()
        block.copy_(x)
    return result


@torch.no_grad()
def whole(steps: Sequence[Step], image: Tensor) -> Tensor:
    """The same without tiles."""
    for step in steps:
        image = step.module(image)
    return image


def _cut(x: Tensor, part: tuple[slice, slice]) -> Tensor:
    for limits, size in zip(part, x.shape[2:], strict=True):
        assert 0 <= limits.start < limits.stop <= size, (part, x.shape)
    return x[(..., *part)]
