"""Tiles of an image through a network: the map and every gradient are those of one pass."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath, LayerNorm2d
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from models.locality import Step, compose, make_steps
from models.shared_masks import image_masks
from models.stream_tiles import plan_tiles
from models.streaming import stream
from models.tile_reading import TileReader
from utils.errors import ItemFailed

CPU = torch.device("cpu")
Run = Callable[[Sequence[Step], Tensor], Tensor]


class Residual(nn.Module):
    """A basic block, with a strided shortcut where it is needed."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, drop: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True), nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs), DropPath(drop))
        self.short = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.body(x) + self.short(x))


def resnet(drop: float = 0.0) -> list[tuple[str, nn.Module]]:
    """Stride 8, as a ResNet to its third stage."""
    return [("stem", nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4),
                                   nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))),
            ("a", Residual(4, 4, drop=drop)), ("b", Residual(4, 6, 2, drop)),
            ("c", Residual(6, 6, drop=drop))]


def convnext(drop: float = 0.0) -> list[tuple[str, nn.Module]]:
    """Stride 8: patches, depthwise 7 x 7, layer norm and linear layers a position, layer scale."""
    return [("stem", nn.Sequential(nn.Conv2d(3, 4, 4, 4), LayerNorm2d(4))),
            ("a", ConvNeXtBlock(4, ls_init_value=0.5, drop_path=drop)),
            ("down", nn.Sequential(LayerNorm2d(4), nn.Conv2d(4, 6, 2, 2))),
            ("b", ConvNeXtBlock(6, ls_init_value=0.5, drop_path=drop))]


def odd() -> list[tuple[str, nn.Module]]:
    """No padding, dilation, other rows than columns, groups; the first layer writes in place."""
    return [("first", nn.LeakyReLU(0.3, inplace=True)),
            ("wide", nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(1, 0))),
            ("pool", nn.AvgPool2d(2)), ("dilated", nn.Conv2d(4, 4, 3, dilation=2, groups=2)),
            ("last", nn.Sequential(nn.GELU(), nn.Conv2d(4, 5, 1)))]


NETWORKS = {"resnet": resnet, "convnext": convnext, "odd": odd}


def build(parts: Sequence[tuple[str, nn.Module]], dtype: torch.dtype = torch.float64
          ) -> list[Step]:
    """Random weights, statistics and affine parameters; batch norm in eval mode."""
    torch.manual_seed(0)
    for _, part in parts:
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
        part.to(dtype)
    return make_steps(parts)


def ordinary(steps: Sequence[Step], image: Tensor) -> Tensor:
    net = nn.Sequential(*(step.module for step in steps))
    with image_masks(net, CPU):
        return net(image)


def tiled(tile_px: tuple[int, int], **options: Any) -> Run:
    def run(steps: Sequence[Step], image: Tensor) -> Tensor:
        plan = plan_tiles(steps, tuple(image.shape[-2:]), tile_px)
        return stream(steps, image, plan, **options)
    return run


def picture(height: int, width: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=dtype)


def learn(steps: Sequence[Step], image: Tensor, run: Run, *, of_image: bool = True,
          scale: float = 1.0) -> dict[str, Tensor]:
    """The map and all gradients, of a loss in which every position matters."""
    torch.manual_seed(5)
    image = image.clone().requires_grad_(of_image)
    for step in steps:
        step.module.zero_grad()
    x = image * 1  # the first layer may write into it
    found = run(steps, x if of_image else x.detach())
    factor = torch.linspace(-1, 1, found[0].numel()).view_as(found[0]).to(found)
    (((found * factor).sum() + found.square().mean()) * scale).backward()
    gradients = {f"{step.name}.{name}": one.grad.clone() / scale for step in steps
                 for name, one in step.module.named_parameters() if one.grad is not None}
    if image.grad is not None:
        gradients["image"] = image.grad / scale
    return {"map": found.detach(), **gradients}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Relative to the largest number of each tensor."""
    assert ours.keys() == theirs.keys()
    found = {}
    for name, one in theirs.items():
        assert ours[name].dtype == one.dtype
        assert ours[name].shape == one.shape
        size = float(one.double().abs().max())
        found[name] = float((ours[name].double() - one.double()).abs().max()) / (size or 1)
    return found


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(differences(ours, theirs).values())


# ---------------------------------------------------------------------------- exactness

SIZES = {"aligned": (160, 192), "odd": (157, 171), "wide": (83, 301), "small": (61, 49),
         "one tile": (128, 128), "one axis": (60, 230)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("network", NETWORKS)
def test_map_and_all_gradients_are_those_of_one_pass(network: str, size: tuple[int, int]) -> None:
    steps, image = build(NETWORKS[network]()), picture(*size, batch=1 + size[0] % 2)
    ours, theirs = (learn(steps, image, run) for run in (tiled((128, 128)), ordinary))
    names = {f"{step.name}.{name}" for step in steps for name, _ in step.module.named_parameters()}
    assert ours.keys() == {"map", "image", *names}
    assert all(one.abs().max() > 0 for one in theirs.values())
    found = differences(ours, theirs)
    assert found["map"] <= 1e-12
    assert max(found.values()) <= 1e-10, found


@pytest.mark.parametrize("network", ["resnet", "convnext"])
def test_any_size_of_tile_gives_the_same(network: str) -> None:
    steps, image = build(NETWORKS[network]()), picture(210, 250)
    one, *others = [learn(steps, image, tiled(tile)) for tile in
                    ((96, 96), (128, 104), (160, 256))]
    assert max(worst(other, one) for other in others) <= 1e-10


@pytest.mark.parametrize("network", ["resnet", "convnext"])
def test_single_precision(network: str) -> None:
    steps = build(NETWORKS[network](), torch.float32)
    image = picture(200, 187, dtype=torch.float32)
    assert worst(learn(steps, image, tiled((128, 96))), learn(steps, image, ordinary)) <= 1e-4


@pytest.mark.parametrize(("precision", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 64.0)])
def test_half_precision(precision: torch.dtype, scale: float) -> None:
    """Both passes under the autocast of the call, also where the backward pass is outside."""
    steps = build(resnet(), torch.float32)
    image = picture(200, 187, dtype=torch.float32)

    def cast(run: Run) -> Run:
        def under(steps: Sequence[Step], image: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=precision):
                found = run(steps, image)
            assert found.dtype == precision
            return found.float()
        return under

    ours = learn(steps, image, cast(tiled((128, 96))), scale=scale)
    exact = learn(steps, image, ordinary)
    rounded = learn(steps, image, cast(ordinary), scale=scale)
    for name, one in exact.items():
        assert ours[name].dtype == torch.float32
        error, usual = ((other[name] - one).norm() / one.norm() for other in (ours, rounded))
        assert error <= max(2e-2, 1.2 * usual), name


def test_maps_between_groups_carry_the_gradient() -> None:
    steps, image = build(resnet()), picture(210, 250)

    def chained(steps: Sequence[Step], image: Tensor) -> Tensor:
        for few, tile in ((steps[:1], 96), (steps[1:3], 32), (steps[3:], 16)):
            image = tiled((tile, tile))(few, image)
        return image

    assert worst(learn(steps, image, chained), learn(steps, image, ordinary)) <= 1e-10


def test_gradients_add_up_and_leave_once() -> None:
    """A hook of a weight runs once a backward pass, as data-parallel training wants."""
    steps, image = build(resnet()), picture(160, 160)
    runs: list[str] = []
    for step in steps:
        for name, one in step.module.named_parameters():
            one.register_post_accumulate_grad_hook(lambda _, name=name: runs.append(name))
    once = learn(steps, image, tiled((128, 128)), of_image=False)
    assert len(runs) == len(once) - 1
    tiled((128, 128))(steps, image).sum().backward()
    sums = {f"{step.name}.{name}": one.grad.clone() for step in steps
            for name, one in step.module.named_parameters()}
    for step in steps:
        step.module.zero_grad()
    ordinary(steps, image).sum().backward()
    for step in steps:
        for name, one in step.module.named_parameters():
            torch.testing.assert_close(sums[f"{step.name}.{name}"],
                                       once[f"{step.name}.{name}"] + one.grad)


def test_two_graphs_of_one_network_go_back_together() -> None:
    """Small images may be held, large ones streamed; the statistics that both have saved stay."""
    steps, image = build(resnet()), picture(160, 160)

    def twice(one: Run, other: Run) -> Run:
        return lambda steps, image: one(steps, image) + 2 * other(steps, image)

    streamed = tiled((128, 128))
    theirs = learn(steps, image, twice(ordinary, ordinary))
    for pair in ((ordinary, streamed), (streamed, ordinary), (streamed, streamed)):
        assert worst(learn(steps, image, twice(*pair)), theirs) <= 1e-10


def test_under_data_parallel_training(tmp_path: Path) -> None:
    steps, image = build(resnet()), picture(160, 160)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([step.module for step in steps])

        def forward(self, image: Tensor) -> Tensor:
            return tiled((128, 128))(steps, image)

    theirs = learn(steps, image, ordinary, of_image=False)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(Net())
        ours = [learn(steps, image, lambda _, image: net(image), of_image=False) for _ in "ab"]
    finally:
        torch.distributed.destroy_process_group()
    assert max(worst(one, theirs) for one in ours) <= 1e-10


def test_channels_last_stays() -> None:
    steps, image = build(resnet()), picture(160, 168)
    image = image.to(memory_format=torch.channels_last)
    seen = []
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
               for step in steps for module in step.module.modules()
               if isinstance(module, nn.Conv2d)]
    found = tiled((128, 128))(steps, image)
    for handle in handles:
        handle.remove()
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in [*seen, found])
    assert tiled((128, 128))(steps, image.contiguous()).is_contiguous()
    ours, theirs = (learn(steps, image, run) for run in (tiled((128, 128)), ordinary))
    assert worst(ours, theirs) <= 1e-10


# ---------------------------------------------------------------------------- random numbers

@pytest.mark.parametrize("network", [resnet, convnext])
def test_stochastic_depth_is_drawn_once_an_image(network: Callable[..., Any]) -> None:
    """As in one pass under the same seed, which the next draw shows too."""
    steps, image = build(network(0.5)), picture(160, 168, batch=4)
    plain = build(network())
    for step, other in zip(steps, plain, strict=True):
        other.module.load_state_dict(step.module.state_dict())
    ours, theirs = (learn(steps, image, run) for run in (tiled((128, 128)), ordinary))
    after = torch.rand(3)
    assert worst(ours, theirs) <= 1e-10
    learn(steps, image, ordinary)
    assert torch.equal(after, torch.rand(3))
    without = learn(plain, image, ordinary)
    assert worst(ours, without) > 0.01


def test_channel_dropout_is_drawn_once_an_image() -> None:
    layer = nn.Dropout2d(0.5)  # of two places, another mask at each
    steps = build([*resnet(), ("drop", nn.Sequential(layer, nn.Conv2d(6, 6, 1), layer))])
    image = picture(160, 168, batch=2)
    ours, theirs = (learn(steps, image, run) for run in (tiled((128, 128)), ordinary))
    assert worst(ours, theirs) <= 1e-10
    dead = (ours["map"] == 0).all(dim=(2, 3))
    assert dead.any()
    assert not dead.all()


def dropped() -> list[Step]:
    parts = resnet()
    parts.insert(2, ("drop", nn.Dropout(0.4)))
    return build(parts)


def by_hand(tile_px: tuple[int, int]) -> Run:
    """The tiles one after another in an ordinary graph."""
    def run(steps: Sequence[Step], image: Tensor) -> Tensor:
        plan = plan_tiles(steps, tuple(image.shape[-2:]), tile_px)
        found = image.new_empty(len(image), plan.out_channels, *plan.out_size)
        for tile in plan.tiles:
            x = image[(..., *tile.window)]
            for step, crop in zip(steps, tile.crops, strict=True):
                x = step.module(x)[(..., *crop)]
            found[(..., *tile.keep)] = x
        return found
    return run


def test_elementwise_dropout_is_the_same_in_both_passes() -> None:
    steps, image = dropped(), picture(160, 168)
    ours, theirs = (learn(steps, image, run) for run in (tiled((128, 128)), by_hand((128, 128))))
    assert worst(ours, theirs) <= 1e-10
    assert not torch.equal(ours["map"], learn(steps, image, tiled((112, 96)))["map"])
    state = torch.get_rng_state()
    found = tiled((128, 128))(steps, image)
    between = torch.get_rng_state()
    found[..., 0, 0].sum().backward()  # of the first tile alone
    assert not torch.equal(state, between)
    assert torch.equal(between, torch.get_rng_state())


# ---------------------------------------------------------------------------- what is not computed

@contextmanager
def counted(module: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Sizes of what the module is given."""
    seen: list[tuple[int, ...]] = []
    handle = module.register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape[-2:])))
    yield seen
    handle.remove()


def glass(height: int, width: int, *, batch: int = 1) -> Tensor:
    """Two colours with tissue at a few places and at a side."""
    image = torch.full((batch, 3, height, width), 0.9, dtype=torch.float64)
    image[..., width // 2:] = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)[:, None, None]
    image[..., :40, :] = picture(40, width)
    image[..., 150:170, 120:150] = picture(20, 30)
    return image


def inside(window: tuple[slice, slice], size: tuple[int, int]) -> bool:
    return all(part.start > 0 and part.stop < end for part, end in zip(window, size, strict=True))


@pytest.mark.parametrize("network", ["resnet", "convnext"])
@pytest.mark.parametrize("of_image", [False, True])
def test_constant_tiles_are_computed_once_a_colour(network: str, of_image: bool) -> None:
    steps, image = build(NETWORKS[network]()), glass(400, 464, batch=2)
    whole, short = (tiled((128, 128), skip_constant=skip) for skip in (False, True))
    theirs = learn(steps, image, whole, of_image=of_image)
    tiles = plan_tiles(steps, (400, 464), (128, 128)).tiles
    constant = sum(bool((one == one[..., :1, :1]).all()) and inside(tile.window, (400, 464))
                   for tile in tiles for one in [image[(..., *tile.window)]])
    assert constant >= 4
    with counted(steps[0].module) as seen:
        ours = learn(steps, image, short, of_image=of_image)
    found = differences(ours, theirs)
    assert found["map"] <= 1e-12
    assert max(found.values()) <= 1e-10
    reach = compose(steps)
    small = (reach.rows.smallest_tile, reach.columns.smallest_tile)
    assert seen.count(small) == (2 if of_image else 4)  # of two colours, in one pass or both
    skipped = 2 * len(tiles) - (len(seen) - seen.count(small))
    assert skipped == (constant if of_image else 2 * constant)
    plain = learn(steps, image, ordinary, of_image=of_image)
    if of_image and network == "resnet":
        plain["image"] = theirs["image"]  # of equal pixels a maximum picks any for its gradient
    assert worst(plain, theirs) <= 1e-10


def test_constant_tiles_with_shared_masks_and_in_half_precision() -> None:
    steps, image = build(resnet(0.5)), glass(400, 464, batch=3)
    ours, theirs = (learn(steps, image, tiled((128, 128), skip_constant=skip), of_image=False)
                    for skip in (True, False))
    assert worst(ours, theirs) <= 1e-10
    steps = build(resnet(), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [learn(steps, image.float(), tiled((128, 128), skip_constant=skip),
                       of_image=False) for skip in (True, False)]
    assert all((found[0][name] - one).norm() <= 2e-2 * one.norm() for name, one in found[1].items())


def test_constant_tiles_are_computed_where_dropout_is_active() -> None:
    steps, image = dropped(), glass(400, 464)
    runs = [tiled((128, 128), skip_constant=True), tiled((128, 128), skip_constant=False)]
    ours, theirs = (learn(steps, image, run, of_image=False) for run in runs)
    assert all(torch.equal(ours[name], one) for name, one in theirs.items())
    for step in steps:
        step.module.eval()
    with counted(steps[0].module) as seen:
        runs[0](steps, image)
    assert len(seen) < len(plan_tiles(steps, (400, 464), (128, 128)).tiles)


def test_tiles_without_gradient_are_not_computed_again() -> None:
    """After the maximum of each channel most blocks have none."""
    steps, image = build(resnet()), picture(300, 300)
    run = tiled((128, 128))
    loss = run(steps, image).amax(dim=(2, 3)).square().sum()
    with counted(steps[0].module) as seen:
        loss.backward()
    assert 0 < len(seen) <= 6 < len(plan_tiles(steps, (300, 300), (128, 128)).tiles)
    ours = steps[0].module[0].weight.grad.clone()
    steps[0].module.zero_grad()
    ordinary(steps, image).amax(dim=(2, 3)).square().sum().backward()
    torch.testing.assert_close(ours, steps[0].module[0].weight.grad)
    (0 * run(steps, image)).sum().backward()
    torch.testing.assert_close(ours, steps[0].module[0].weight.grad)


def test_frozen_first_steps_have_no_graph() -> None:
    steps, image = build(resnet()), picture(200, 187)
    for step in steps[:2]:
        step.module.requires_grad_(False)
    graphs: dict[str, list[bool]] = {step.name: [] for step in steps}
    handles = [step.module.register_forward_hook(
        lambda _, args, result, name=step.name: graphs[name].append(result.requires_grad))
        for step in steps]
    ours = learn(steps, image, tiled((128, 128)), of_image=False)
    second = len(graphs["a"]) // 2
    for name in ("stem", "a", "b", "c"):
        assert set(graphs[name][:second]) == {False}
        assert set(graphs[name][second:]) == {name in ("b", "c")}
    for handle in handles:
        handle.remove()
    theirs = learn(steps, image, ordinary, of_image=False)
    assert "a.body.0.weight" not in ours
    assert worst(ours, theirs) <= 1e-10
    assert worst(learn(steps, image, tiled((128, 128))), learn(steps, image, ordinary)) <= 1e-10


def test_without_anything_to_learn_there_is_one_pass() -> None:
    steps, image = build(resnet()), picture(160, 168)
    expected = ordinary(steps, image).detach()
    with counted(steps[0].module) as seen:
        with torch.no_grad():
            no_grad = tiled((128, 128))(steps, image)
        with torch.inference_mode():
            inferred = tiled((128, 128))(steps, image)
        for step in steps:
            step.module.requires_grad_(False)
        frozen = tiled((128, 128))(steps, image)
    assert len(seen) == 3 * len(plan_tiles(steps, (160, 168), (128, 128)).tiles)
    for found in (no_grad, inferred, frozen):
        assert not found.requires_grad
        torch.testing.assert_close(found.clone(), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------- memory

def test_the_graph_of_one_tile_is_alive_at_a_time() -> None:
    """Bytes saved for the way back: of an image of 4 x 4 tiles at most 1.3 times those of one."""
    steps = build(resnet())

    def peak(side: int) -> int:
        alive, most = [0], [0]

        class Saved:
            def __init__(self, value: Tensor) -> None:
                self.value, self.size = value, value.numel() * value.element_size()
                alive[0] += self.size
                most[0] = max(*alive, *most)

            def __del__(self) -> None:
                alive[0] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
            found = photo_run(Photo(side, side))(steps, torch.empty(0))
            found.square().mean().backward()
            del found
        gc.collect()
        assert alive == [0]
        return most[0]

    one, many = peak(128), peak(4 * 128)
    assert many <= 1.3 * one


# ---------------------------------------------------------------------------- images

class Photo:
    """``ImageTiles`` of uint8 pixels. windows: what was read; broken: the read that fails."""

    channels = 3

    def __init__(self, height: int, width: int, *, broken: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.randint(256, (height, width, 3), generator=generator).byte()
        self.size = (height, width)
        self.broken = broken
        self.windows: list[tuple[slice, slice]] = []
        self.threads: set[str] = set()

    def read(self, window: tuple[slice, slice]) -> Tensor:
        self.windows.append(window)
        self.threads.add(threading.current_thread().name)
        if len(self.windows) - 1 == self.broken:
            raise ItemFailed("slide_a: tile cannot be read")
        return self.pixels[window].clone()

    def prepare(self, raw: Tensor) -> Tensor:
        assert raw.dtype == torch.uint8
        assert raw.is_contiguous()
        assert threading.current_thread() is threading.main_thread()
        return (raw.permute(2, 0, 1)[None].double() / 255 - 0.5) / 0.25


def photo_run(photo: Photo, tile: int = 128, **options: Any) -> Run:
    def run(steps: Sequence[Step], image: Tensor) -> Tensor:
        return stream(steps, photo, plan_tiles(steps, photo.size, (tile, tile)), **options)
    return run


def test_images_are_read_ahead_by_one_tile() -> None:
    steps, photo = build(resnet()), Photo(300, 260)
    plan = plan_tiles(steps, photo.size, (128, 128))
    ahead: list[int] = []

    def wait_for_the_next(*_: Any) -> None:
        number = len(ahead) + 1
        until = time.monotonic() + 20
        while len(photo.windows) == number < len(plan.tiles) and time.monotonic() < until:
            time.sleep(0.001)
        ahead.append(len(photo.windows) - number)

    handle = steps[-1].module.register_forward_hook(wait_for_the_next)
    found = photo_run(photo)(steps, torch.empty(0))
    handle.remove()
    assert photo.windows == [tile.window for tile in plan.tiles]
    assert ahead == [1] * (len(plan.tiles) - 1) + [0]
    assert all(name.startswith("tiles") for name in photo.threads)
    found.square().sum().backward()
    assert photo.windows[len(plan.tiles):] == photo.windows[:len(plan.tiles)]
    ours = steps[0].module[0].weight.grad.clone()
    steps[0].module.zero_grad()
    whole = ordinary(steps, photo.prepare(photo.pixels))
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    whole.square().sum().backward()
    torch.testing.assert_close(ours, steps[0].module[0].weight.grad, rtol=1e-10, atol=1e-12)


def test_glass_of_an_image_is_computed_once_and_read_once() -> None:
    steps, photo = build(resnet()), Photo(400, 464)
    photo.pixels[60:380, 40:] = 255
    results = [learn(steps, torch.zeros(1), photo_run(photo, 128, skip_constant=skip),
                     of_image=False) for skip in (False, True)]
    assert worst(results[1], results[0]) <= 1e-10
    every = 2 * len(plan_tiles(steps, photo.size, (128, 128)).tiles)
    assert len(photo.windows) < 2 * every - 6
    assert not torch.equal(results[1]["map"], torch.zeros_like(results[1]["map"]))


def test_of_a_view_only_its_own_pixels_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pinned view would have all rows of the image, and no copy of it would be pinned."""
    pinned: list[bool] = []
    monkeypatch.setattr(Tensor, "is_pinned", lambda _: False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned.append(x.is_contiguous()) or x)
    steps, photo = build(resnet()), Photo(300, 260)
    monkeypatch.setattr(photo, "read", lambda window: photo.pixels[window])
    reader = TileReader(source=photo, plan=plan_tiles(steps, photo.size, (128, 128)),
                        device=torch.device("cuda"))
    assert len(list(reader.tiles([0, 1], look=False))) == 2
    assert pinned == [True, True]


@pytest.mark.parametrize("broken", [0, 3, 25])
def test_what_a_reader_raises_comes_out(broken: int) -> None:
    steps = build(resnet())
    photo = Photo(300, 260, broken=broken)
    n_tiles = len(plan_tiles(steps, photo.size, (128, 128)).tiles)
    assert n_tiles < 25 < 2 * n_tiles
    state = torch.get_rng_state()
    with pytest.raises(ItemFailed, match="slide_a: tile cannot be read"):
        photo_run(photo)(steps, torch.empty(0)).sum().backward()
    assert all(one.grad is None for step in steps for one in step.module.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not [one for one in threading.enumerate() if one.name in photo.threads]


def test_a_network_that_fails_ends_the_reading() -> None:
    steps, photo = build(resnet()), Photo(300, 260)
    handle = steps[1].module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        photo_run(photo)(steps, torch.empty(0))
    handle.remove()
    assert len(photo.windows) <= 3
    assert not [one for one in threading.enumerate() if one.name in photo.threads]


@pytest.mark.parametrize("trained", [True, False])
def test_gradient_of_the_input_for_heatmaps(trained: bool) -> None:
    """Also of a network without a trainable weight, and where glass is skipped."""
    steps, photo = build(convnext()), Photo(400, 464)
    photo.pixels[60:380, 40:] = 255
    for step in steps:
        step.module.requires_grad_(trained)
    total = torch.zeros(1, 3, *photo.size, dtype=torch.float64)

    def sink(window: tuple[slice, slice], gradient: Tensor) -> None:
        total[(..., *window)] += gradient

    photo_run(photo, 128, gradient_sink=sink)(steps, torch.empty(0)).square().sum().backward()
    found = steps[0].module[0].weight.grad
    assert (found is not None) == trained
    for step in steps:
        step.module.zero_grad()
    image = photo.prepare(photo.pixels).requires_grad_()
    ordinary(steps, image).square().sum().backward()
    torch.testing.assert_close(total, image.grad, rtol=1e-10, atol=1e-10 * float(total.abs().max()))
    if trained:
        torch.testing.assert_close(found, steps[0].module[0].weight.grad)


# ---------------------------------------------------------------------------- misuse

def test_what_changed_in_between_is_noticed() -> None:
    steps, image = build(resnet()), picture(160, 168)
    photo = Photo(160, 168)
    steps[0].module.requires_grad_(False)
    for run in (tiled((128, 128)), photo_run(photo)):
        for weight in (steps[0].module[0].weight, steps[2].module.body[0].weight):
            found = run(steps, image)
            with torch.no_grad():
                weight.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                found.sum().backward()
    changed = image.clone()
    found = tiled((128, 128))(steps, changed)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_no_second_derivatives() -> None:
    steps, image = build(resnet()), picture(160, 168)
    value = tiled((128, 128))(steps, image).square().sum()
    weight = steps[0].module[0].weight
    (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_statistics_of_a_tile_are_an_error() -> None:
    steps, image = build(resnet()), picture(160, 160)
    steps[2].module.train()
    with pytest.raises(ValueError, match="step b has a batch norm in training mode"):
        tiled((128, 128))(steps, image)


def test_a_plan_for_something_else_is_an_error() -> None:
    steps, image = build(resnet()), picture(160, 168)
    plan = plan_tiles(steps, (160, 168), (128, 128))
    with pytest.raises(ValueError, match=r"plan is for \(160, 168\) px, the source has \(168, 160"):
        stream(steps, image.mT, plan)
    with pytest.raises(ValueError, match="step stem takes 3 channels, the source has 6"):
        stream(steps, torch.cat([image, image], dim=1), plan)
    for others in (steps[:3], build(odd())):
        with pytest.raises(ValueError, match="made for other steps"):
            stream(steps, image, plan_tiles(others, (160, 168), (128, 128)))
