"""Doing a forward pass twice: the same random numbers, and running statistics moved once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.replay import RandomState, kept_buffers, kept_random

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("kind", DEVICES)
def test_restored_generators_draw_the_same(kind: str) -> None:
    device = torch.device(kind)
    state = RandomState.capture(device)
    drawn = torch.rand(5, device=device), torch.rand(5)
    after = torch.rand(5, device=device)
    state.restore()
    again = torch.rand(5, device=device), torch.rand(5)
    assert torch.equal(drawn[0], again[0])
    assert torch.equal(drawn[1], again[1])
    assert torch.equal(after, torch.rand(5, device=device))


@pytest.mark.parametrize("kind", DEVICES)
def test_what_is_drawn_inside_leaves_no_trace(kind: str) -> None:
    device = torch.device(kind)
    state = RandomState.capture(device)
    expected = torch.rand(5, device=device), torch.rand(5)
    state.restore()
    with pytest.raises(ZeroDivisionError), kept_random(device):
        torch.rand(100, device=device)
        raise ZeroDivisionError
    found = torch.rand(5, device=device), torch.rand(5)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_buffers_are_set_back_also_after_an_error() -> None:
    norm = nn.Sequential(nn.BatchNorm1d(3))
    norm(torch.randn(8, 3))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with pytest.raises(ZeroDivisionError), kept_buffers(norm):
        norm(torch.randn(8, 3))
        assert int(norm.state_dict()["0.num_batches_tracked"]) == 2
        assert not torch.equal(norm.state_dict()["0.running_mean"], before["0.running_mean"])
        raise ZeroDivisionError
    torch.testing.assert_close(dict(norm.state_dict()), before, rtol=0, atol=0)


def test_buffers_that_stay_are_not_written_to() -> None:
    """A graph that has saved them would be of no use."""
    norm = nn.BatchNorm1d(3).eval()
    found = norm(torch.randn(8, 3)).sum()
    with kept_buffers(norm):
        norm(torch.randn(8, 3))
    found.backward()


def test_weights_keep_what_happened_to_them() -> None:
    norm = nn.BatchNorm1d(3)
    with kept_buffers(norm), torch.no_grad():
        norm.weight.fill_(7)
    assert norm.weight.tolist() == [7, 7, 7]
