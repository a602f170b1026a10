"""Two passes: the gradient of one big graph in the memory of one part."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.two_pass import GradientSums, two_pass
from utils.errors import ItemFailed

CPU = torch.device("cpu")


def network(*, norm: bool = True, dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU(),
        nn.Dropout(dropout), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def tiles(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2 + number % 3, 3, 7, 7, generator=generator) for number in range(count)]


def loss_of(results: Iterable[Tensor]) -> Tensor:
    """Every result matters to the gradient of the others; it draws random numbers too."""
    rows = nn.functional.dropout(torch.cat(list(results)), 0.2)
    return (rows.softmax(dim=0) * rows).sum().square()


def plain(parts: Callable[[], Iterable[Any]], compute: Callable[[Any], Tensor], **_: Any
          ) -> tuple[Tensor, ...]:
    return tuple(compute(part) for part in parts())


def gradients(net: nn.Module, how: Callable[..., tuple[Tensor, ...]], *, scale: float = 1.0,
              precision: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Of all weights; the generators and the buffers afterwards come too."""
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=precision) if precision else nullcontext():
        results = how(tiles, net, module=net, device=CPU)
        value = loss_of(one.float() for one in results)
    between = torch.rand(3)  # what comes after draws what it would have drawn
    (value * scale).backward()
    found = {name: None if one.grad is None else one.grad.clone()
             for name, one in net.named_parameters()}
    return {**found, **{f"buffer {name}": one.clone() for name, one in net.named_buffers()},
            "value": value.detach(), "between": between, "after": torch.rand(3)}


@pytest.mark.parametrize(("precision", "scale", "tolerance"), [
    (None, 1.0, 1e-5), (None, 4096.0, 1e-5), (torch.bfloat16, 1.0, 2e-2)])
@pytest.mark.parametrize("training", [True, False])
def test_it_equals_one_graph(precision: torch.dtype | None, scale: float, tolerance: float,
                             training: bool) -> None:
    """With dropout and batch statistics, after several graphs under the same random numbers."""
    net, twin = network().train(training), network().train(training)
    ours = gradients(net, two_pass, scale=scale, precision=precision)
    theirs = gradients(twin, plain, scale=scale, precision=precision)
    assert theirs["0.weight"] is not None
    size = float(theirs["0.weight"].abs().max())
    assert size > 1e-4 * scale
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * size)
    for exact in ("between", "after", "buffer 1.num_batches_tracked"):
        assert torch.equal(ours[exact], theirs[exact])  # type: ignore[arg-type]
    assert int(ours["buffer 1.num_batches_tracked"]) == (5 if training else 0)  # type: ignore


def test_autocast_of_the_call_holds_in_both_passes() -> None:
    net, seen = network(), []

    def compute(part: Tensor) -> Tensor:
        result = net(part)
        seen.append((result.dtype, torch.is_grad_enabled()))
        return result.float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = two_pass(lambda: tiles(2), compute, module=net, device=CPU)
    torch.cat(results).sum().backward()
    assert seen == [(torch.bfloat16, False)] * 2 + [(torch.bfloat16, True)] * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):  # backward inside another one
        seen.clear()
        with torch.autocast("cpu", enabled=False):
            results = two_pass(lambda: tiles(2), compute, module=net, device=CPU)
        torch.cat(results).sum().backward()
        net(tiles(1)[0]).sum().backward()  # nothing stale was left in its cache
    assert seen == [(torch.float32, False)] * 2 + [(torch.float32, True)] * 2


def test_frozen_weights_get_no_gradient() -> None:
    net = network()
    net[0].requires_grad_(False)
    ours = gradients(net, two_pass)
    net.zero_grad()
    twin = network()
    twin[0].requires_grad_(False)
    theirs = gradients(twin, plain)
    assert ours["0.weight"] is None
    torch.testing.assert_close(ours["4.weight"], theirs["4.weight"], rtol=1e-5, atol=1e-7)


def test_without_anything_to_learn_there_is_no_graph() -> None:
    net = network()
    with torch.no_grad():
        assert not any(one.requires_grad for one in two_pass(tiles, net, module=net, device=CPU))
    net.requires_grad_(False)
    calls = []

    def compute(part: Tensor) -> Tensor:
        calls.append(len(part))
        return net(part)

    results = two_pass(tiles, compute, module=net, device=CPU)
    assert not any(one.requires_grad for one in results)
    assert len(calls) == 5
    assert two_pass(list, net, module=net, device=CPU) == ()


def test_only_results_that_matter_are_computed_again() -> None:
    net, calls = network(), []

    def compute(part: Tensor) -> Tensor:
        calls.append(len(part))
        return net(part)

    results = two_pass(tiles, compute, module=net, device=CPU)
    calls.clear()
    results[1].sum().backward()
    assert calls == [3]


def test_gradients_add_to_those_that_are_there() -> None:
    net = network(dropout=0).eval()
    for _ in range(2):
        torch.cat(two_pass(tiles, net, module=net, device=CPU)).sum().backward()
    twice = net[0].weight.grad.clone()
    net.zero_grad()
    torch.cat(plain(tiles, net)).sum().backward()
    torch.testing.assert_close(twice, 2 * net[0].weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factors", [[3.0], [1.0, 2.0], [1.0, 1.0, 1.0]])
def test_a_gradient_shared_by_two_weights_is_not_written_over(factors: list[float]) -> None:
    pair = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))])
    results = two_pass(lambda: factors, lambda factor: (pair[0] + pair[1]) * factor,
                       module=pair, device=CPU)
    torch.stack(results).sum().backward()
    assert pair[0].grad.tolist() == pair[1].grad.tolist() == [3, 3]
    assert pair[0].grad.data_ptr() != pair[1].grad.data_ptr()


def test_sums_of_half_precision_weights_lose_nothing() -> None:
    weights = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2), torch.zeros(1)]
    sums, one = GradientSums(weights), torch.ones(2)
    for _ in range(300):  # a sum in bfloat16 stays at 256
        sums.add([one.bfloat16(), one, None])
    sums.add([one.bfloat16(), None, None], times=100)
    first, second, third = sums.totals()
    assert first is not None and second is not None and third is None
    assert (first.tolist(), first.dtype) == ([400.0] * 2, torch.bfloat16)
    assert second.tolist() == [300.0] * 2
    assert one.tolist() == [1, 1]


def test_the_graph_of_one_part_is_alive_at_a_time() -> None:
    """Bytes saved for the way back, at their peak, and parts that are held."""
    def peak(count: int, how: Callable[..., tuple[Tensor, ...]]) -> tuple[int, int]:
        net, alive, most = network(), {"bytes": 0, "parts": 0}, {"bytes": 0, "parts": 0}

        class Saved:
            def __init__(self, value: Tensor) -> None:
                self.value, self.size = value, value.numel() * value.element_size()
                alive["bytes"] += self.size
                most["bytes"] = max(alive["bytes"], most["bytes"])

            def __del__(self) -> None:
                alive["bytes"] -= self.size

        def parts() -> Iterator[Tensor]:
            for _ in range(count):
                part = torch.randn(4, 3, 9, 9)
                alive["parts"] += 1
                most["parts"] = max(alive["parts"], most["parts"])
                weakref.finalize(part, lambda: alive.update(parts=alive["parts"] - 1))
                yield part
                del part

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
            loss = loss_of(how(parts, net, module=net, device=CPU))
            loss.backward()
        del loss
        gc.collect()
        assert alive == {"bytes": 0, "parts": 0}
        return most["bytes"], most["parts"]

    few, many = peak(2, two_pass), peak(16, two_pass)
    weights = sum(one.numel() * 4 for one in network().parameters())
    results = 4 * 4 * 4 * 8  # of one part: 4 rows of 4 numbers, some times over
    assert many[0] - few[0] <= 14 * results
    assert many[1] == few[1] == 1
    assert peak(16, plain)[0] > 5 * (many[0] - weights)


def test_no_second_derivatives() -> None:
    net = network()
    value = torch.cat(two_pass(tiles, net, module=net, device=CPU)).square().sum()
    (gradient,) = torch.autograd.grad(value, net[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_weight_changed_in_between_is_noticed() -> None:
    net = network()
    results = two_pass(tiles, net, module=net, device=CPU)
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.cat(results).sum().backward()


@pytest.mark.parametrize("turn", [1, 2])
def test_what_a_part_raises_comes_out_and_no_gradient_stays(turn: int) -> None:
    net, turns = network(), []

    def broken() -> Iterator[Tensor]:
        turns.append(1)
        for number, part in enumerate(tiles()):
            if len(turns) == turn and number == 3:
                raise ItemFailed("slide_a: damaged")
            yield part

    before = {name: value.clone() for name, value in net.named_buffers()}
    with pytest.raises(ItemFailed, match="slide_a: damaged"):
        results = two_pass(broken, net, module=net, device=CPU)
        before = {name: value.clone() for name, value in net.named_buffers()}
        state = torch.get_rng_state()
        torch.cat(results).sum().backward()
    assert all(one.grad is None for one in net.parameters())
    if turn == 2:
        torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("second", "message"), [(3, "fewer parts"), (6, "more parts")])
def test_other_parts_in_the_second_pass_are_an_error(second: int, message: str) -> None:
    net, counts = network(), iter([5, second])
    results = two_pass(lambda: tiles(next(counts)), net, module=net, device=CPU)
    with pytest.raises(RuntimeError, match=message):
        torch.cat(results).sum().backward()
