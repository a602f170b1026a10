"""softmax(q k^T) a without N x N: the numbers of the plain formula, and what is held meanwhile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import models.spread
from models.spread import Kernel, spread

KERNELS: tuple[Kernel, ...] = ("blocks", "fused")


def plain(q: torch.Tensor, k: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The formula, with its N x N."""
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ a[..., None])[..., 0]


def inputs(n: int, *, bags: int = 2, heads: int = 3, width: int = 8, seed: int = 0,
           dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((bags, heads, n, width), (bags, heads, n, width), (bags, heads, n))
    return tuple(2.0 * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


def with_gradients(function: object, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The result and the gradients of a weighted sum of it."""
    leaves = [copy.copy(tensor).requires_grad_() for tensor in tensors]
    out = function(*leaves)  # type: ignore[operator]
    weight = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n", "width"), [(1, 8), (2, 5), (17, 8), (65, 3), (100, 16)])
def test_equals_the_plain_formula(
    kernel: Kernel, n: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.spread._SCORES_AT_ONCE, "cpu", 1)  # blocks of 16 rows, the last less
    tensors = inputs(n, width=width)
    for found, expected in zip(
            with_gradients(lambda q, k, a: spread(q, k, a, kernel=kernel), tensors),
            with_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_large_scores_do_not_overflow() -> None:
    q, k, a = inputs(40, dtype=torch.float32)
    for kernel in KERNELS:
        found = with_gradients(lambda q, k, a: spread(q, k, a, kernel=kernel),  # noqa: B023
                               (100 * q, 100 * k, a))
        assert all(torch.isfinite(tensor).all() for tensor in found)
        torch.testing.assert_close(found[0], plain(100 * q, 100 * k, a))


@pytest.mark.parametrize("kernel", KERNELS)
def test_halves_are_close_and_the_result_is_float32(kernel: Kernel) -> None:
    q, k, a = inputs(300, width=16, dtype=torch.float32)
    halves = (q.bfloat16(), k.bfloat16(), a)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(lambda q, k, a: spread(q, k, a, kernel=kernel), halves)
    expected = with_gradients(plain, (halves[0].float(), halves[1].float(), a))
    assert [tensor.dtype for tensor in found] == [
        torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() < 0.02 * other.norm()


def test_blocks_give_the_same_bits_again() -> None:
    tensors = inputs(500, dtype=torch.float32)
    one, other = (with_gradients(lambda q, k, a: spread(q, k, a, kernel="blocks"), tensors)
                  for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_takes_the_flash_kernel_in_training_and_inference(dtype: torch.dtype) -> None:
    q, k, a = inputs(50, width=20, dtype=torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    with torch.no_grad():
        assert flash in operations(lambda: spread(q, k, a, kernel="fused"))
    for tensor in (q, k, a):
        tensor.requires_grad_()
    assert {flash, f"{flash}_backward"} <= operations(
        lambda: spread(q, k, a, kernel="fused").sum().backward())


def operations(work: object) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()  # type: ignore[operator]
    return {event.key for event in found.key_averages()}


def peak_bytes(work: object) -> int:
    """The most memory that tensors made by ``work`` occupied at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()  # type: ignore[operator]
    events = sorted((event for event in found.profiler.kineto_results.events()
                     if event.name() == "[memory]"), key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_grows_with_n_not_with_its_square(kernel: Kernel) -> None:
    n = 20_000
    q, k, a = inputs(n, bags=1, heads=1, dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (q, k, a)]
    peak = peak_bytes(lambda: spread(*leaves, kernel=kernel).sum().backward())
    assert 4 * n * 8 < peak < 30e6  # N x N floats are 1,600e6 bytes
    q, k, a = (tensor.detach()[..., :1_000, :] if tensor.ndim == 4 else tensor.detach()[..., :1_000]
               for tensor in leaves)
    assert peak_bytes(lambda: plain(q, k, a)) > 4 * 1_000**2  # so the measure would tell
