"""Heads over the positions of a map: their definition, their start, dropout."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from models.streaming_heads import PooledHead
from utils.contracts import Bag
from utils.errors import ItemFailed

POOLS: tuple[Literal["max", "mean"], ...] = ("max", "mean")


def bag(rows: torch.Tensor) -> Bag:
    return Bag(slide_id="slide", features=rows, label=1)


@pytest.mark.parametrize("pool", POOLS)
def test_channels_are_pooled_over_the_map_then_weighed(pool: Literal["max", "mean"]) -> None:
    """As torch's global pooling of the (1, C, h, w) map, gradients included."""
    torch.manual_seed(0)
    head = PooledHead(pool=pool, n_classes=3, embed_dim=5).double()
    maps = torch.randn(1, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    layer = {"max": nn.AdaptiveMaxPool2d(1), "mean": nn.AdaptiveAvgPool2d(1)}[pool]
    wanted = head.linear(layer(maps).flatten(1))
    output = head(bag(maps.permute(0, 2, 3, 1).reshape(-1, 5)))
    torch.testing.assert_close(output.logits, wanted, rtol=1e-12, atol=1e-12)
    assert output.embedding.shape == (1, 5)
    assert output.attention is None
    ours, theirs = (torch.autograd.grad(logits.square().sum(), maps, retain_graph=True)[0]
                    for logits in (output.logits, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_of_equal_maxima_one_position_learns() -> None:
    head = PooledHead(pool="max", n_classes=2, embed_dim=3)
    rows = torch.ones(7, 3, requires_grad=True)
    head(bag(rows)).logits[0, 0].backward()
    assert rows.grad is not None
    assert torch.equal((rows.grad != 0).sum(dim=0), torch.ones(3, dtype=torch.long))


def test_it_starts_as_published() -> None:
    """Xavier-normal weights, zero bias: spec streaming.md 7."""
    torch.manual_seed(0)
    head = PooledHead(pool="max", n_classes=100, embed_dim=300)
    assert not head.linear.bias.any()
    assert head.linear.weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert set(head.state_dict()) == {"linear.weight", "linear.bias"}


def test_dropout_leaves_out_pooled_channels_in_training_only() -> None:
    head = PooledHead(pool="mean", n_classes=2, embed_dim=64, dropout=0.5)
    rows = bag(torch.ones(4, 64))
    torch.manual_seed(0)
    seen = {tuple(head(rows).logits[0].tolist()) for _ in range(5)}
    assert len(seen) > 1
    still = [head.eval()(rows).logits for _ in range(2)]
    assert torch.equal(*still)
    assert torch.equal(head(rows).embedding, torch.ones(1, 64))


def test_bags_that_do_not_fit_say_so() -> None:
    head = PooledHead(pool="max", n_classes=2, embed_dim=3)
    with pytest.raises(ItemFailed, match="slide: features have shape"):
        head(bag(torch.zeros(4, 2)))
    with pytest.raises(ItemFailed, match="slide: the bag has no patches"):
        list(head.losses(bag(torch.zeros(0, 3))))


def test_the_loss_is_the_objectives() -> None:
    head = PooledHead(pool="mean", n_classes=2, embed_dim=3)
    one = bag(torch.rand(4, 3))
    (loss,) = head.losses(one)
    assert loss.output is not None
    assert torch.equal(loss.value, head.objective.loss(loss.output.logits, one))
