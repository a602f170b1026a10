"""models/stream_budget.py: what a step takes, which groups and tiles are chosen, the same step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from models.locality import Step, make_steps
from models.stream_budget import (
    Group,
    free_memory,
    graph_bytes,
    plan_groups,
    run_groups,
)
from models.stream_tiles import plan_tiles
from utils.errors import Refused
from utils.memory import share_memory

GB = 10**9
Parts = list[tuple[str, nn.Module]]


def network_of(name: str = "resnet18") -> nn.Module:
    """With random weights and statistics, in eval mode."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, global_pool="")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = (
                torch.randn(module.num_features) / 5, torch.rand(module.num_features) + 0.5)
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, std=0.2)
    return network.eval()


def steps_of(network: Any) -> tuple[list[Step], list[int]]:
    """Stem and blocks of a ResNet, and after how many of them a stage ends."""
    stem = nn.Sequential(network.conv1, network.bn1, network.act1, network.maxpool)
    parts: Parts = [("stem", stem)]
    ends = [1]
    for name in ("layer1", "layer2", "layer3", "layer4"):
        parts += [(f"{name}.{key}", block) for key, block in
                  network.get_submodule(name).named_children()]
        ends.append(len(parts))
    return make_steps(parts), ends


@pytest.fixture(scope="module")
def resnet34() -> tuple[list[Step], list[int]]:
    return steps_of(network_of("resnet34"))


@pytest.fixture(scope="module")
def resnet18() -> tuple[list[Step], list[int]]:
    return steps_of(network_of())


def planned(network: tuple[list[Step], list[int]], size: int | tuple[int, int], gb: float,
            **changes: object) -> list[Group]:
    size = (size, size) if isinstance(size, int) else size
    settings = {"budget_bytes": round(gb * GB), "grad": True, "boundaries": network[1], **changes}
    return plan_groups(network[0], size, **settings)  # type: ignore[arg-type]


def work(groups: Sequence[Group]) -> float:
    return sum(group.work for group in groups)


def peak(groups: Sequence[Group]) -> int:
    return max(group.peak_bytes for group in groups)


# ---------------------------------------------------------------------------- the same step

@pytest.mark.parametrize(("size", "gb", "changes"), [
    ((400, 400), 0.17, {"tile_size": 160}),
    ((1024, 40), 1.0, {"store_maps": "none", "tile_size": 992})])
def test_a_step_of_resnet34_up_to_layer4_is_that_of_ordinary_autograd(
        size: tuple[int, int], gb: float, changes: dict[str, object]) -> None:
    """Spec 13.4, and the acceptance of the streaming models: weights equal to 1e-10."""
    networks = [network_of("resnet34").double()]
    networks.append(copy.deepcopy(networks[0]))
    groups = planned(steps_of(networks[0]), size, gb, bytes_per_value=8, **changes)
    assert any(group.plan and len(group.plan.tiles) > 1 for group in groups)
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    runs: list[Callable[[Tensor], Tensor]] = [lambda x: run_groups(groups, x), networks[1]]
    maps = []
    for network, run in zip(networks, runs, strict=True):
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        maps.append(run(image))
        maps[-1].amax((2, 3)).square().mean().backward()
        optimiser.step()
    assert (maps[0] - maps[1]).abs().max() <= 1e-12 * maps[1].abs().max()
    before = network_of("resnet34").double().state_dict()
    moved = 0
    for (name, streamed), ordinary in zip(
            networks[0].state_dict().items(), networks[1].state_dict().values(), strict=True):
        if streamed.is_floating_point():
            assert (streamed - ordinary).abs().max() <= 1e-10 * ordinary.abs().max(), name
            moved += bool((streamed != before[name]).any())
    assert moved == len(list(networks[0].parameters())), "every parameter learns"


# ---------------------------------------------------------------------------- what a step takes

def test_resnet34_holds_what_was_measured_of_it(
        resnet34: tuple[list[Step], list[int]]) -> None:
    """642 bytes a pixel of the image (spec 8)."""
    size = (1024, 1024)
    total = 0
    for step in resnet34[0]:
        total += graph_bytes(step, size)
        size = step.locality.output_size(size)
    image = 3 * 4
    assert total / 1024**2 + image == pytest.approx(642, rel=0.001)


@pytest.mark.parametrize("bytes_per_value", [4, 8])
def test_graph_bytes_is_what_autograd_saves(
        resnet18: tuple[list[Step], list[int]], bytes_per_value: int) -> None:
    for step in (resnet18[0][0], resnet18[0][3]):  # with a maximum's places; with a projection
        module = copy.deepcopy(step.module).to(
            torch.float64 if bytes_per_value == 8 else torch.float32)
        x = torch.randn(1, step.locality.in_channels, 64, 96,
                        dtype=next(module.parameters()).dtype, requires_grad=True)
        known = {one.data_ptr() for one in (x, *module.parameters(), *module.buffers())}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            result = module(x)
        saved[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
        found = sum(size for place, size in saved.items() if place not in known)
        assert graph_bytes(step, (64, 96), bytes_per_value=bytes_per_value) == pytest.approx(
            found, rel=1e-3)


def test_measuring_leaves_the_network_alone(resnet18: tuple[list[Step], list[int]]) -> None:
    step = resnet18[0][0]
    before = [(one, one.clone()) for one in (*step.module.parameters(), *step.module.buffers())]
    graph_bytes(step, (64, 64))
    after = [*step.module.parameters(), *step.module.buffers()]
    assert all(one is same and torch.equal(one, values)
               for (one, values), same in zip(before, after, strict=True))


# ---------------------------------------------------------------------------- what is chosen

def test_an_image_that_fits_is_ordinary_autograd(resnet34: tuple[list[Step], list[int]]) -> None:
    groups = planned(resnet34, 1024, 4.0)
    assert [group.plan for group in groups] == [None]
    assert work(groups) == pytest.approx(1)
    image = torch.randn(1, 3, 64, 64)
    expected = image
    for step in resnet34[0]:
        expected = step.module(expected)
    assert torch.equal(run_groups(groups, image), expected)


def test_less_memory_is_never_exceeded_and_never_faster(
        resnet34: tuple[list[Step], list[int]]) -> None:
    plans = [planned(resnet34, 4096, gb) for gb in (16, 8, 4, 3, 2, 1.5, 1.2)]
    for groups, gb in zip(plans, (16, 8, 4, 3, 2, 1.5, 1.2), strict=True):
        assert peak(groups) <= gb * GB
        assert [step.name for group in groups for step in group.steps] == [
            step.name for step in resnet34[0]]
    assert all(work(more) <= work(less) for more, less in pairwise(plans))
    assert work(plans[0]) == pytest.approx(1) and 1.2 < work(plans[4]) < 1.6


def test_groups_follow_one_another(resnet34: tuple[list[Step], list[int]]) -> None:
    groups = planned(resnet34, (3000, 4100), 1.0)
    size = (3000, 4100)
    for group in groups:
        if group.plan is not None:
            assert group.plan.in_size == size
            size = group.plan.out_size


def test_the_memory_that_a_refusal_names_will_do(resnet34: tuple[list[Step], list[int]]) -> None:
    with pytest.raises(Refused, match=r"4100 x 3000 px takes (\S+) MB at least") as refusal:
        planned(resnet34, (3000, 4100), 0.05)
    least = float(str(refusal.value).split(" takes ")[1].split()[0].replace(",", "")) / 1000
    assert planned(resnet34, (3000, 4100), least + 0.01)
    with pytest.raises(Refused, match="--stream_memory"):
        planned(resnet34, (3000, 4100), least - 0.01)


def test_folds_side_by_side_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.stream_budget.available_memory_bytes", lambda: 2**30)
    alone = free_memory(torch.device("cpu"))
    share_memory(2)
    try:
        assert free_memory(torch.device("cpu")) == alone // 2
    finally:
        share_memory(1)


def test_without_held_maps_memory_grows_as_the_last_map_does(
        resnet34: tuple[list[Step], list[int]]) -> None:
    plans = [planned(resnet34, size, 3.0, store_maps="none", tile_size=1536)
             for size in (4096, 16384)]
    assert [len(groups) for groups in plans] == [1, 1]
    more_map = 512 * 4 * (16384**2 - 4096**2) / 32**2  # and its gradient, and a margin
    assert peak(plans[1]) - peak(plans[0]) == pytest.approx(2 * 1.1 * more_map, rel=0.01)


def test_all_maps_are_held_on_demand(resnet34: tuple[list[Step], list[int]]) -> None:
    groups = planned(resnet34, 4096, 1.2, store_maps="all")
    ends = [0]
    for group in groups:
        ends.append(ends[-1] + len(group.steps))
    assert ends[1:-1] == resnet34[1][:len(groups) - 1]


@pytest.mark.parametrize(("wanted", "side"), [(1100, 1120), (1152, 1152), (10, 960)])
def test_tiles_of_a_given_side_made_legal(
        resnet34: tuple[list[Step], list[int]], wanted: int, side: int) -> None:
    """960 px are 30 positions, 15 and 14 of them lost."""
    first = planned(resnet34, 4096, 3.0, store_maps="none", tile_size=wanted)[0]
    assert first.plan == plan_tiles(resnet34[0], (4096, 4096), (side, side))


def test_tiles_of_a_given_side_that_are_too_large_are_refused(
        resnet34: tuple[list[Step], list[int]]) -> None:
    with pytest.raises(Refused, match=r"with tiles of 4096 px.*--tile_size 0"):
        planned(resnet34, 8192, 3.0, store_maps="none", tile_size=4096)


def test_frozen_steps_go_once_and_without_a_graph(resnet34: tuple[list[Step], list[int]]) -> None:
    steps, ends = resnet34
    learning, half, frozen = (planned(resnet34, 4096, 2.0, n_frozen=n_frozen)
                              for n_frozen in (0, ends[3], len(steps)))
    assert work(learning) > 1.3
    assert work(half) < 1.02 and work(frozen) < 1.02, "of an ordinary step with what is frozen"
    assert peak(frozen) < peak(half) <= 2 * GB
    assert frozen == planned(resnet34, 4096, 2.0, grad=False)


def test_a_batch_takes_as_much_more(resnet34: tuple[list[Step], list[int]]) -> None:
    one, four = (peak(planned(resnet34, 1024, 9.0, batch=batch)) for batch in (1, 4))
    assert 3.5 < four / one < 4


def test_half_precision_takes_less(resnet34: tuple[list[Step], list[int]]) -> None:
    single, half = (peak(planned(resnet34, 2048, 9.0, bytes_per_value=size)) for size in (4, 2))
    assert 0.5 < half / single < 0.6, "places of maxima stay as they are"


def test_maps_may_be_wider_than_what_is_inside_of_steps(
        resnet34: tuple[list[Step], list[int]]) -> None:
    """Autocast, with sums in float32: the last map of a streamed network and its gradient."""
    half, mixed = (peak(planned(resnet34, 4096, 3.0, store_maps="none", tile_size=1536,
                                bytes_per_value=2, map_bytes_per_value=size)) for size in (0, 4))
    assert mixed - half == pytest.approx(1.1 * 2 * 2 * 512 * (4096 // 32)**2, rel=0.01)


def test_choosing_takes_no_time(resnet34: tuple[list[Step], list[int]]) -> None:
    planned(resnet34, 4096, 3.0)
    start = time.process_time()
    planned(resnet34, (8000, 9000), 3.0)
    assert time.process_time() - start < 0.15


# ---------------------------------------------------------------------------- expected and real

@pytest.mark.parametrize("changes", [
    {"gb": 0.06, "tile_size": 200}, {"gb": 0.13, "store_maps": "none"}])
def test_work_and_memory_are_as_expected(
        resnet18: tuple[list[Step], list[int]], monkeypatch: pytest.MonkeyPatch,
        changes: dict[str, Any]) -> None:
    """FLOP of the convolutions that run, activations by the tensors saved at the same time."""
    for other in ("_FLOP_PER_TILE", "_FLOP_PER_BYTE"):
        monkeypatch.setattr(f"models.stream_budget.{other}", 0.0)
    groups = planned(resnet18, (640, 128), **changes)
    assert any(group.plan and len(group.plan.tiles) > 1 for group in groups)
    modules = [step.module for step in resnet18[0]]
    meter = SavedBytes(modules)
    flops = []
    for way in (groups, planned(resnet18, (640, 128), 99.0)):
        with counted_flops(modules) as counted, meter.hooks():
            run_groups(way, torch.randn(1, 3, 640, 128)).mean().backward()
        flops.append(sum(counted))
        if way is groups:
            assert 0.2 * peak(groups) < meter.peak < peak(groups)
    assert flops[0] / flops[1] == pytest.approx(work(groups), rel=0.03)
    for module in modules:
        module.zero_grad()


@contextmanager
def counted_flops(modules: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Of convolutions, twice as many backward where there is a graph."""
    counted: list[int] = []

    def count(conv: nn.Conv2d, _: object, result: Tensor) -> None:
        passes = 3 if result.requires_grad else 1
        counted.append(passes * 2 * result.numel() * conv.weight[0].numel())

    handles = [inner.register_forward_hook(count) for module in modules
               for inner in module.modules() if isinstance(inner, nn.Conv2d)]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


class SavedBytes:
    """Largest sum of the memory of tensors that autograd has saved at the same time."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.own = {one.untyped_storage().data_ptr() for module in modules
                    for one in (*module.parameters(), *module.buffers())}
        self.peak = 0
        self._alive: dict[int, list[int]] = {}

    def hooks(self) -> saved_tensors_hooks:
        self.peak = 0

        def pack(tensor: Tensor) -> Held:
            return Held(tensor, self)

        return saved_tensors_hooks(pack, lambda held: held.tensor)

    def count(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.own:
            return
        entry = self._alive.setdefault(storage.data_ptr(), [0, storage.nbytes()])
        entry[0] += change
        if entry[0] == 0:
            del self._alive[storage.data_ptr()]
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


class Held:
    """A saved tensor, counted until autograd drops it."""

    def __init__(self, tensor: Tensor, meter: SavedBytes) -> None:
        self.tensor, self._meter = tensor, meter
        meter.count(tensor, 1)

    def __del__(self) -> None:
        self._meter.count(self.tensor, -1)


class Picture:
    """An image in memory that is read window by window."""

    channels = 3

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.size = pixels, (pixels.shape[0], pixels.shape[1])

    def read(self, window: tuple[slice, slice]) -> Tensor:
        return self.pixels[window]

    def prepare(self, raw: Tensor) -> Tensor:
        return raw.movedim(-1, 0)[None].float() / 255


@pytest.mark.parametrize("gb", [1.0, 0.08])
def test_an_image_read_by_window_gives_its_gradient(
        resnet18: tuple[list[Step], list[int]], gb: float) -> None:
    """Held or streamed: what the windows get adds up to the gradient of the whole image."""
    picture = Picture(torch.randint(0, 256, (200, 150, 3), dtype=torch.uint8))
    groups = planned(resnet18, picture.size, gb, **({} if gb == 1 else {"tile_size": 128}))
    assert (groups[0].plan is None) == (gb == 1)
    total = torch.zeros(1, 3, *picture.size)
    windows = []

    def sink(window: tuple[slice, slice], gradient: Tensor) -> None:
        windows.append(window)
        total[(..., *window)] += gradient

    run_groups(groups, picture, gradient_sink=sink).square().mean().backward()
    image = picture.prepare(picture.pixels).requires_grad_()
    run_groups([Group(steps=resnet18[0], plan=None)], image).square().mean().backward()
    assert image.grad is not None
    torch.testing.assert_close(total, image.grad, rtol=1e-4, atol=1e-5 * float(image.grad.max()))
    assert len(windows) == (1 if gb == 1 else 4)
    for step in resnet18[0]:
        step.module.zero_grad()


def test_a_held_map_gets_its_gradient_beside_the_sink(
        resnet18: tuple[list[Step], list[int]]) -> None:
    """As a streamed one does."""
    image = torch.randn(1, 3, 64, 64).requires_grad_()
    found: list[Tensor] = []
    run_groups([Group(resnet18[0], None)], image,
               gradient_sink=lambda _, gradient: found.append(gradient)).square().sum().backward()
    assert image.grad is not None and image.grad.any()
    assert torch.equal(found[0], image.grad)
    for step in resnet18[0]:
        step.module.zero_grad()


def test_memory_is_given_back_before_each_pass_of_a_group(
        resnet18: tuple[list[Step], list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("models.stream_budget.give_back_freed_memory", lambda: asked.append(1))
    groups = planned(resnet18, 64, 0.08, store_maps="all", tile_size=64)
    streamed = [group for group in groups if group.plan]
    found = run_groups(groups, torch.randn(1, 3, 64, 64))
    assert len(asked) == len(groups) > len(streamed) > 0
    found.mean().backward()
    assert len(asked) == len(groups) + len(streamed)
    run_groups([Group(resnet18[0], None)], torch.randn(1, 3, 64, 64)).mean().backward()
    assert len(asked) == len(groups) + len(streamed), "ordinary autograd"
    for step in resnet18[0]:
        step.module.zero_grad()


def test_free_memory_is_part_of_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.stream_budget.available_memory_bytes", lambda: 10 * GB)
    one = free_memory(torch.device("cpu"))
    assert 4 * GB < one < 8 * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == one // 4
