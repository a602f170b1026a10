"""Whatever the layers, sizes, tiles and groups: the map and gradients are those of one pass."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.locality import Step, compose, make_steps
from models.stream_tiles import plan_tiles, smallest_tile
from models.streaming import stream

CHANNELS = 4


class Beside(nn.Module):
    """Two paths of one stride, of which one sees farther."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(CHANNELS, CHANNELS, 1, stride)
        self.far = nn.Conv2d(CHANNELS, CHANNELS, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.near(x) + torch.tanh(self.far(x))


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    kind = draw(st.sampled_from(["conv", "pool", "mean", "join", "norm", "point"]))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    stride = draw(st.sampled_from([1, 1, 2]))
    padding = tuple(draw(st.integers(0, one // 2)) for one in kernel)
    if kind == "conv":
        return nn.Conv2d(CHANNELS, CHANNELS, kernel, stride, padding,
                         dilation=draw(st.integers(1, 2)), groups=draw(st.sampled_from([1, 2, 4])))
    if kind == "norm":
        return nn.BatchNorm2d(CHANNELS).eval()
    return {"pool": nn.MaxPool2d(kernel, stride, padding), "join": Beside(stride),
            "mean": nn.AvgPool2d(kernel, stride, padding),
            "point": nn.LeakyReLU(0.2, inplace=True)}[kind]


def gradients(steps: list[Step], image: Tensor, found: Tensor) -> list[Tensor | None]:
    factor = torch.linspace(-1, 1, found[0].numel(), dtype=found.dtype).view_as(found[0])
    wanted = [one for step in steps for one in step.module.parameters() if one.requires_grad]
    if image.requires_grad:
        wanted.append(image)
    if not wanted:
        return [found]
    value = (found * factor + found.square()).sum()
    return [found.detach(), *torch.autograd.grad(value, wanted, allow_unused=True)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), drawn=st.lists(layers(), min_size=1, max_size=5),
       size=st.tuples(st.integers(8, 60), st.integers(8, 60)), batch=st.integers(1, 2),
       cut=st.integers(0, 5), n_frozen=st.integers(0, 5), flat=st.booleans(),
       of_image=st.booleans(), seed=st.integers(0, 99))
def test_any_local_network(data: st.DataObject, drawn: list[nn.Module], size: tuple[int, int],
                           batch: int, cut: int, n_frozen: int, flat: bool, of_image: bool,
                           seed: int) -> None:
    torch.manual_seed(seed)
    drawn = [one.double() for one in drawn]
    for before, module in pairwise(drawn):  # torch allows no more
        if isinstance(module, nn.LeakyReLU):
            module.inplace = not isinstance(before, nn.LeakyReLU)
    for module in drawn[:n_frozen]:
        module.requires_grad_(False)
    steps = make_steps([(str(place), one) for place, one in enumerate(drawn)], channels=CHANNELS)
    assume(min(compose(steps).output_size(size)) > 0)
    image = torch.randn(batch, CHANNELS, *size, dtype=torch.float64)
    if flat:
        image[..., 1:-1, 1:-1] = image[..., 1:2, 1:2]
    image.requires_grad_(of_image)
    x: Any = image * 1
    for few in (steps[:cut], steps[cut:]):
        if few:
            stride = compose(few).rows.stride, compose(few).columns.stride
            tile = tuple(least + more * data.draw(st.integers(0, 3))
                         for least, more in zip(smallest_tile(few), stride, strict=True))
            x = stream(few, x, plan_tiles(few, tuple(x.shape[-2:]), tile), skip_constant=flat)
    ours = gradients(steps, image, x)
    theirs = gradients(steps, image, nn.Sequential(*drawn)(image * 1))
    if flat and of_image and any(isinstance(one, nn.MaxPool2d) for one in drawn):
        del ours[-1], theirs[-1]  # of equal pixels a maximum picks any for its gradient
    for one, other in zip(ours, theirs, strict=True):
        if other is None:
            assert one is None
        else:
            scale = max(1.0, float(other.abs().max()))
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11 * scale)
