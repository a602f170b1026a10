"""Masks without extent in space: drawn once, whatever is drawn around them."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from models.shared_masks import SharedMasks, image_masks

CPU = torch.device("cpu")
ROWS = torch.ones(6, 8, 1, 1)


@pytest.mark.parametrize("layer", [
    DropPath(0.5), StochasticDepth(0.5, "row"), nn.Dropout2d(0.5), nn.FeatureAlphaDropout(0.5),
    nn.Sequential(nn.Identity(), DropPath(0.5))], ids=lambda layer: type(layer).__name__)
def test_every_tile_gets_the_mask_of_its_image(layer: nn.Module) -> None:
    torch.manual_seed(1)
    masks = SharedMasks(layer, CPU)
    before = torch.get_rng_state()
    tiles = []
    for _ in range(3):
        torch.rand(5)
        with masks.shared():
            tiles.append(layer(ROWS))
    assert all(torch.equal(tile, tiles[0]) for tile in tiles)
    torch.set_rng_state(before)
    with masks.shared():
        layer(ROWS)
    assert torch.equal(torch.get_rng_state(), before)  # what is elementwise draws undisturbed
    others = []
    for _ in range(8):
        with SharedMasks(layer, CPU).shared():
            others.append(layer(ROWS))
    assert any(not torch.equal(other, tiles[0]) for other in others)
    torch.manual_seed(1)
    with image_masks(layer, CPU):
        assert torch.equal(layer(ROWS), tiles[0])
    assert layer(ROWS).shape == ROWS.shape  # nothing is left on it
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in layer.modules())


def test_a_layer_that_is_called_twice_has_two_masks() -> None:
    layer = nn.Dropout2d(0.5)
    masks = SharedMasks(layer, CPU)
    calls = []
    for _ in range(2):
        with masks.shared():
            calls.append((layer(ROWS), layer(ROWS)))
    assert not torch.equal(*calls[0])
    for one, other in zip(*calls, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layer", [DropPath(0.0), nn.Dropout2d(0.5).eval(), nn.Dropout(0.5)])
def test_nothing_is_drawn_for_what_is_not_active(layer: nn.Module) -> None:
    before = torch.get_rng_state()
    with image_masks(layer, CPU):
        assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_that_fails_leaves_the_generators_alone() -> None:
    layer = nn.Dropout2d(0.5)
    with image_masks(layer, CPU):
        before = torch.get_rng_state()
        with pytest.raises(AttributeError):
            layer("no map")
        assert torch.equal(torch.get_rng_state(), before)
