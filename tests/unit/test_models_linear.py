"""The fast linear layer is ``nn.Linear``: values, gradients and names, however it is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models import linear
from models.linear import Linear


def pair(width_in: int, width_out: int, *, bias: bool = True) -> tuple[Linear, nn.Linear]:
    torch.manual_seed(0)
    fast, plain = (kind(width_in, width_out, bias=bias) for kind in (Linear, nn.Linear))
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def rows(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    if kind == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "every second":
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    return x.requires_grad_()


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("kind", ["dense", "transposed", "every second"])
@pytest.mark.parametrize("shape", [(1, 5), (7, 5), (1, 9, 5), (2, 3, 4, 5)])
def test_values_and_gradients(shape: tuple[int, ...], kind: str, public: bool,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    """public: PyTorch without the call that spares the copies."""
    if public:
        monkeypatch.setattr(linear, "_DIRECT", None)
    for bias in (True, False):
        fast, plain = pair(5, 3, bias=bias)
        mine, theirs = rows(shape, kind), rows(shape, kind)
        weight = torch.randn(*shape[:-1], 3)
        (fast(mine) * weight).sum().backward()
        (plain(theirs) * weight).sum().backward()
        torch.testing.assert_close(fast(mine), plain(theirs))
        torch.testing.assert_close(mine.grad, theirs.grad)
        for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_float32_takes_the_fast_way_and_the_rest_the_plain_one(
        monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = pair(5, 3)
    x = torch.randn(4, 5)
    monkeypatch.setattr(linear._OneDnnLinear, "apply", lambda *_: torch.full((4, 3), 7.0))
    assert torch.equal(fast(x), torch.full((4, 3), 7.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), plain(x)) and fast(x).dtype == torch.bfloat16
    assert torch.equal(fast.double()(x.double()), plain.double()(x.double()))


@pytest.mark.parametrize("kind", ["dense", "transposed", "expanded", "double"])
def test_batched_product(kind: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    if kind == "transposed":
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    elif kind == "expanded":
        a, b = a[:1, :1, :1].expand(3, 4, 5), b[:1, :1, :1].expand(3, 5, 6)
    elif kind == "double":
        a, b = a.double(), b.double()
    torch.testing.assert_close(linear.bmm(a, b), torch.einsum("gnk,gkm->gnm", a, b))


@pytest.mark.parametrize("view", [
    lambda x: x[:, ::2], lambda x: x[:, :4], lambda x: x[:, :1].expand(-1, 4)])
def test_onednn_never_meets_gaps(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It falls back to a kernel a thousand times as slow there."""
    met: list[bool] = []

    def spy(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
        met.extend(part.is_contiguous() or part.T.is_contiguous() for part in (x, weight))
        return x @ weight.T

    monkeypatch.setattr(linear, "_DIRECT", spy)
    x = torch.randn(6, 8, requires_grad=True)
    Linear(4, 3, bias=False)(view(x)).sum().backward()
    linear.bmm(view(x).detach()[None], view(x).detach().T[None])
    assert len(met) == 8
    assert all(met)
