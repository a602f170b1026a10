"""However rows are cut into parts, and whatever is frozen, the gradient is that of one graph."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.patch_parts import PatchParts, share_out
from models.two_pass import two_pass
from tests.end_to_end import Pixels
from utils.contracts import Bag

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 6), min_size=1, max_size=6), frozen=st.sets(st.integers(0, 3)),
       used=st.integers(0, 63), seed=st.integers(0, 99))
def test_any_parts_any_weights(cuts: list[int], frozen: set[int], used: int, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    for number, weight in enumerate(net.parameters()):
        weight.requires_grad_(number not in frozen)
    parts = torch.randn(sum(cuts), 3).split(cuts)
    chosen = [number for number in range(len(parts)) if used >> number & 1]

    def gradients(results: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
        net.zero_grad()
        value = sum((results[number].exp().sum() for number in chosen), start=torch.zeros(()))
        if value.requires_grad:
            value.square().backward()
        return [None if one.grad is None else one.grad.clone() for one in net.parameters()]

    ours = gradients(two_pass(lambda: parts, net, module=net, device=CPU))
    theirs = gradients(tuple(net(part) for part in parts))
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if number in frozen or other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(slides=st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=5),
       n_parts=st.integers(1, 9))
def test_parts_hold_every_patch_once_in_order(slides: list[list[int]], n_parts: int) -> None:
    bags, number = [], 0
    for scales in slides:
        pixels = []
        for scale, count in enumerate(scales):
            side = 1 + scale
            values = torch.arange(number, number + count, dtype=torch.uint8)
            pixels.append(values[:, None, None, None].expand(count, side, side, 3))
            number += count
        bags.append(Bag(slide_id="s", features=torch.empty(0, 0), patches=Pixels(*pixels)))
    sizes = share_out(number, n_parts)
    assert len(sizes) == n_parts
    assert max(sizes) - min(sizes) <= 1
    parts = PatchParts(bags, sizes, shared=False)
    for _ in range(2):
        found = list(parts())
        assert [sum(len(piece) for piece in part) for part in found] == sizes
        assert [int(one) for part in found for piece in part for one in piece[:, 0, 0, 0]] == list(
            range(number))
