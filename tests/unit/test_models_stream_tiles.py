"""Tiles of published counts, of any image, that together give exactly the map of the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from models.locality import Step, compose, make_steps
from models.stream_tiles import plan_tiles, smallest_tile
from tests.local_networks import NETWORKS, network, ready
from tests.stream_loop import by_tiles, whole
from tests.unit.test_models_locality import timm_parts
from utils.errors import Refused


def steps_of(name: str) -> list[Step]:
    return make_steps(network(name), channels=1)


@pytest.fixture(scope="module")
def resnet34() -> list[Step]:
    return make_steps(list(timm_parts("resnet34")))


@pytest.mark.parametrize(("last", "tile_px", "image_px", "count"), [
    ("layer3.5", 2048, 16384, 121), ("layer3.5", 5120, 16384, 16),
    ("layer4.0", 2048, 16384, 144), ("layer4.0", 5120, 16384, 16),
    ("layer4.2", 2048, 16384, 196), ("layer4.2", 3584, 16384, 36),
    ("layer4.2", 5120, 16384, 16), ("layer4.2", 2048, 8192, 49)])
def test_the_published_numbers_of_tiles(resnet34: list[Step], last: str, tile_px: int,
                                        image_px: int, count: int) -> None:
    """spec streaming.md 6, table"""
    steps = resnet34[:[step.name for step in resnet34].index(last) + 1]
    plan = plan_tiles(steps, (image_px, image_px), (tile_px, tile_px))
    assert len(plan.tiles) == count
    stride = compose(steps).rows.stride
    assert plan.out_size == (image_px // stride, image_px // stride)
    assert all(part.stop - part.start <= tile_px for tile in plan.tiles for part in tile.window)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", ["aligned", "unaligned", "flat", "tall", "one tile", "small"])
def test_the_map_is_that_of_the_whole_image(name: str, size: str) -> None:
    """spec streaming.md 13, test 2: within 1e-12 of its maximum, in a batch of 2"""
    steps = steps_of(name)
    smallest = smallest_tile(steps)
    down, right = compose(steps).rows.stride, compose(steps).columns.stride
    tile = (smallest[0] + 2 * down, smallest[1] + right)
    height, width = {
        "aligned": (tile[0] + 4 * down, tile[1] + 3 * right),
        "unaligned": (tile[0] + 4 * down + 3, tile[1] + 2 * right + 1),
        "flat": (tile[0] - 1, tile[1] + 5 * right + 1), "tall": (tile[0] + 4 * down + 2, tile[1]),
        "one tile": tile, "small": (smallest[0], tile[1] - 1)}[size]
    image = torch.randn(2, 1, height, width, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(3))
    plan = plan_tiles(steps, (height, width), tile)
    expected = whole(steps, image)
    assert plan.out_size == expected.shape[2:]
    difference = (by_tiles(steps, image, plan) - expected).abs().max()
    assert difference <= 1e-12 * expected.abs().max()
    if size in ("one tile", "small"):
        assert len(plan.tiles) == 1
    else:
        assert len(plan.tiles) > 2


def test_the_smallest_tile_is_the_smallest_and_right() -> None:
    steps = steps_of("resnet_layer2")
    tile = smallest_tile(steps)
    stride = compose(steps).rows.stride
    image = torch.randn(1, 1, tile[0] + 2 * stride, tile[1] + 9, dtype=torch.float64)
    plan = plan_tiles(steps, image.shape[2:], tile)
    torch.testing.assert_close(by_tiles(steps, image, plan), whole(steps, image), rtol=0,
                               atol=1e-13)
    with pytest.raises(Refused, match=rf"tiles of {tile[0] - stride} px .* multiple of its stride, "
                       rf"{stride} px, and at least {tile[0]} px; .* --tile_size {tile[0]}"):
        plan_tiles(steps, (999, 999), (tile[0] - stride, 999))
    with pytest.raises(Refused, match=rf"--tile_size {tile[1] + stride}$"):
        plan_tiles(steps, (999, 999), (999, tile[1] + stride + 1))


def test_bands_are_tiles_as_wide_as_the_image() -> None:
    steps = steps_of("padded")
    tile = smallest_tile(steps)[0]
    plan = plan_tiles(steps, (10 * tile, 333), (tile, 333))
    assert all(tile.keep[1] == slice(0, 167) for tile in plan.tiles)
    assert [one.keep[0].stop for one in plan.tiles][:-1] == [
        other.keep[0].start for other in plan.tiles][1:]


def test_an_image_below_the_window_is_refused() -> None:
    with pytest.raises(Refused, match="an image of 400 x 5 px is smaller than the window"):
        plan_tiles(steps_of("unpadded"), (5, 400), (64, 64))
    with pytest.raises(ValueError, match="no steps"):
        plan_tiles([], (5, 5), (5, 5))


@pytest.mark.parametrize("rows", range(1, 12))
def test_outputs_that_see_nothing_but_padding(rows: int) -> None:
    parts = ready(lambda: [nn.MaxPool2d((2, 1), (1, 1)), nn.Conv2d(1, 1, 1, padding=(1, 0)),
                           nn.Conv2d(1, 1, 1, (3, 1), (2, 0))])
    steps = make_steps(parts, channels=1)
    image = torch.rand(1, 1, rows + 1, 2, dtype=torch.float64)
    plan = plan_tiles(steps, (rows + 1, 2), smallest_tile(steps))
    assert torch.equal(by_tiles(steps, image, plan), whole(steps, image))


class Counting(nn.Module):
    """Notes the positions that a module is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.positions = module, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.positions += x.shape[2] * x.shape[3]
        return self.module(x)


def test_work_is_what_the_steps_are_given() -> None:
    steps = steps_of("resnet_layer2")
    tile = [2 * side for side in smallest_tile(steps)]
    plan = plan_tiles(steps, (500, 421), (tile[0], tile[1]))
    counted = [Step(one.name, Counting(one.module), one.locality) for one in steps]
    by_tiles(counted, torch.rand(1, 1, 500, 421, dtype=torch.float64), plan)
    assert plan.work() == tuple(step.module.positions for step in counted)


def test_crops_spare_what_later_steps_do_not_need() -> None:
    """Without them each step would work on the whole tile; inner tiles are all of one shape."""
    steps = steps_of("resnet_layer2")
    side = smallest_tile(steps)[0] + 64
    plan = plan_tiles(steps, (2000, 2000), (side, side))
    strides = list(itertools.accumulate(
        (step.locality.rows.stride for step in steps), int.__mul__, initial=1))
    inner = [tile for tile in plan.tiles if tile.window[0].start and tile.window[0].stop < 2000
             and tile.window[1].start and tile.window[1].stop < 2000]
    assert len({tuple(part.stop - part.start for crop in ((tile.window), *tile.crops)
                      for part in crop) for tile in inner}) == 1
    kept = [crop[0].stop - crop[0].start for crop in inner[0].crops]
    full = [side // stride for stride in strides[1:]]
    assert all(one < other for one, other in zip(kept, full, strict=True))
    assert kept[-1] == side // strides[-1] - sum(
        (compose(steps).rows.lost_start, compose(steps).rows.lost_end))
