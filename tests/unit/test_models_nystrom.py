"""Nyström attention: against the written-out formulas, with and without the published padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models.nystrom import NystromAttention, pseudo_inverse_times, segment_means

DIM, HEADS, LANDMARKS = 24, 2, 6


def make(seed: int = 0, **options: Any) -> NystromAttention:
    torch.manual_seed(seed)
    return NystromAttention(DIM, **{
        "heads": HEADS, "head_dim": 12, "landmarks": LANDMARKS, "residual_kernel": 5, **options})


def rows(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, n, DIM, generator=torch.Generator().manual_seed(seed))


def written_out_inverse(x: torch.Tensor, iterations: int) -> torch.Tensor:
    z = x.mT / (x.abs().sum(dim=-1).max() * x.abs().sum(dim=-2).max())
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    for _ in range(iterations):
        xz = x @ z
        z = 0.25 * z @ (13 * eye - xz @ (15 * eye - xz @ (7 * eye - xz)))
    return z


def written_out(model: NystromAttention, x: torch.Tensor) -> torch.Tensor:
    """The attention as published, nothing left out."""
    n, m, h = x.shape[1], model.landmarks, model.heads
    x = F.pad(x, (0, 0, -n % m, 0))
    q, k, v = (part.view(1, -1, h, model.head_dim).transpose(1, 2)
               for part in model.to_qkv(x).chunk(3, dim=-1))
    q = q * model.head_dim ** -0.5
    q_mean, k_mean = (part.unflatten(2, (m, -1)).mean(dim=3) for part in (q, k))
    one, two, three = ((a @ b.mT).softmax(dim=-1)
                       for a, b in ((q, k_mean), (q_mean, k_mean), (q_mean, k)))
    out = one @ written_out_inverse(two, 6) @ three @ v + model.res_conv(v)
    result: torch.Tensor = model.to_out(out.transpose(1, 2).flatten(2))[:, -n:]
    return result


@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_pseudo_inverse_and_its_gradient_equal_the_written_out_iteration(iterations: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 10, 10, dtype=torch.double).mul(2).softmax(dim=-1).requires_grad_()
    w = torch.randn(1, 3, 10, 4, dtype=torch.double, requires_grad=True)
    found = pseudo_inverse_times(x, w, iterations=iterations)
    expected = written_out_inverse(x, iterations) @ w
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for one, two in zip(torch.autograd.grad((found * weight).sum(), (x, w)),
                        torch.autograd.grad((expected * weight).sum(), (x, w)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_pseudo_inverse_inverts_and_keeps_its_digits() -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 4, 64, 16) @ torch.randn(2, 4, 16, 64) * 0.3).softmax(dim=-1)
    w = torch.randn(2, 4, 64, 16)
    truth = pseudo_inverse_times(x.double(), w.double(), iterations=6)
    error = (pseudo_inverse_times(x, w, iterations=6) - truth).abs().max()
    assert error < 2e-5 * truth.abs().max()
    easy = torch.eye(5)[None, None] * 0.9 + 0.02
    inverse = pseudo_inverse_times(easy, torch.eye(5)[None, None], iterations=6)
    torch.testing.assert_close(inverse, torch.linalg.inv(easy))


@pytest.mark.parametrize("n", [1, 5, 6, 7, 12, 31])
def test_legacy_padding_equals_the_written_out_attention(n: int) -> None:
    model, x = make(legacy_padding=True).double(), rows(n).double().requires_grad_()
    found, expected = model(x), written_out(model, x)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    inputs = (x, *model.parameters())
    for one, two in zip(torch.autograd.grad((found ** 2).sum(), inputs),
                        torch.autograd.grad((expected ** 2).sum(), inputs), strict=True):
        torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-8)


def test_padding_takes_part_only_when_asked() -> None:
    published, sound = make(legacy_padding=True), make()
    full, short = rows(4 * LANDMARKS), rows(4 * LANDMARKS - 3)
    torch.testing.assert_close(published(full), sound(full))  # nothing to pad
    assert (published(short) - sound(short)).abs().max() > 1e-3


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_without_padding_a_short_bag_gets_exact_attention(n: int) -> None:
    """Every row is a landmark then, and A pinv(A) A = A."""
    model, x = make(iterations=30).double(), rows(n).double()
    q, k, v = model.to_qkv(x).view(1, n, 3, HEADS, 12).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v) + model.res_conv(v)
    expected = model.to_out(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "count"), [(6, 6), (7, 6), (11, 6), (12, 6), (40, 6), (3, 1)])
def test_landmarks_are_means_of_segments_of_nearly_equal_length(n: int, count: int) -> None:
    x = rows(n)[0]
    expected = torch.stack([part.mean(dim=0) for part in x.tensor_split(count)])
    torch.testing.assert_close(segment_means(x, count), expected)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("n", "landmarks"), [(4, 6), (50, 6), (200, 80)])
def test_attention_rows_are_those_that_make_the_result(
    n: int, landmarks: int, legacy: bool
) -> None:
    """Without the convolution the output is the map times the values; 80 landmarks: in pieces."""
    model, x = make(landmarks=landmarks, legacy_padding=legacy), rows(n)
    torch.nn.init.zeros_(model.res_conv.weight)
    queries = torch.tensor([0, n - 1])
    out, attention = model.with_attention(x, queries)
    torch.testing.assert_close(out, model(x))
    assert attention.shape == (HEADS, 2, n)
    assert not attention.requires_grad
    v = model.to_qkv(x).view(n, 3, HEADS, 12)[:, 2].transpose(0, 1)
    expected = model.to_out((attention @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(out[0, queries], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("option", "value"), [
    ("iterations", 2), ("landmarks", 4), ("heads", 3), ("head_dim", 8), ("residual_kernel", 3)])
def test_every_option_has_an_effect(option: str, value: int) -> None:
    x = rows(20)
    assert not torch.equal(make()(x), make(**{option: value})(x))


def test_dropout_acts_in_training_only() -> None:
    model, plain, x = make(dropout=0.5), make(), rows(20)
    out = model(x)
    assert 0.3 < float((out == 0).float().mean()) < 0.7
    torch.testing.assert_close(model.eval()(x), plain(x))


def test_mixed_precision_keeps_the_pseudo_inverse_in_float32() -> None:
    model, x = make().eval(), rows(64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, attention = model.with_attention(x, torch.tensor([3]))
    assert out.dtype == torch.bfloat16
    assert attention.dtype == torch.float32
    torch.testing.assert_close(out.float(), model(x), atol=0.05, rtol=0.05)


def test_memory_grows_with_the_rows_not_their_square() -> None:
    def held(n: int) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = make()(rows(n))
        assert out.shape == (1, n, DIM)
        return sum(sizes.values())

    assert held(4000) < 4.5 * held(1000)
