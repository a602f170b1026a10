"""Whatever the layers, the image and the tile: blocks of tiles are the map of the whole image."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from models.locality import Step, compose, make_steps, probe_locality
from models.stream_tiles import plan_tiles
from tests.local_networks import Residual, ready
from tests.stream_loop import by_tiles, whole


@st.composite
def windows(draw: st.DrawFn) -> nn.Module:
    """A convolution or pooling of one channel; each axis has its own size, stride and padding."""
    pair = st.tuples
    size = draw(pair(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(pair(st.integers(1, 3), st.integers(1, 2)))
    dilation = draw(pair(st.integers(1, 2), st.integers(1, 3)))
    kind = draw(st.sampled_from(["conv", "mirrored", "max", "mean", "residual"]))
    ceil, counted = draw(st.booleans()), draw(st.booleans())
    if kind == "residual":
        return Residual(1, stride=stride[1])
    if kind in ("conv", "mirrored"):
        padding = draw(pair(st.integers(0, 3), st.integers(0, 3)))
        return nn.Conv2d(1, 1, size, stride, padding, dilation,
                         padding_mode="reflect" if kind == "mirrored" else "zeros")
    padding = draw(pair(st.integers(0, size[0] // 2), st.integers(0, size[1] // 2)))
    if kind == "max":
        return nn.MaxPool2d(size, stride, padding, ceil_mode=ceil)
    return nn.AvgPool2d(size, stride, padding, ceil_mode=ceil, count_include_pad=counted)


def steps_of(modules: list[nn.Module], per_step: int) -> list[Step]:
    """In steps of so many modules each."""
    parts = [nn.Sequential(*modules[at:at + per_step]) for at in range(0, len(modules), per_step)]
    return make_steps(ready(lambda: list(parts)), channels=1)


@settings(max_examples=60, deadline=None)
@given(modules=st.lists(windows(), min_size=1, max_size=6), per_step=st.integers(1, 3),
       extra=st.tuples(st.integers(0, 5), st.integers(0, 5)),
       size=st.tuples(st.integers(1, 120), st.integers(1, 120)), seed=st.integers(0, 99))
def test_any_stack_any_image_any_tile(modules: list[nn.Module], per_step: int,
                                      extra: tuple[int, int], size: tuple[int, int],
                                      seed: int) -> None:
    steps = steps_of(modules, per_step)
    closed = compose(steps)
    image = torch.randn(1, 1, *size, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(seed))
    try:
        expected = whole(steps, image)
    except RuntimeError:  # smaller than a window, or than a mirror
        assume(False)
    rows, columns = closed.rows, closed.columns
    plan = plan_tiles(steps, size, (rows.smallest_tile + extra[0] * rows.stride,
                                    columns.smallest_tile + extra[1] * columns.stride))
    assert plan.out_size == expected.shape[2:]
    difference = (by_tiles(steps, image, plan) - expected).abs().max()
    assert difference <= 1e-12 * max(1.0, float(expected.abs().max()))


@settings(max_examples=20, deadline=None)
@given(modules=st.lists(windows(), min_size=1, max_size=3))
def test_no_crop_loses_more_than_the_closed_form(modules: list[nn.Module]) -> None:
    steps = steps_of(modules, 3)
    closed = compose(steps)
    found = probe_locality(steps[0].module, channels=1)
    for ours, theirs in ((closed.rows, found.rows), (closed.columns, found.columns)):
        assert theirs.extra == ours.extra
        assert theirs.lost_start <= ours.lost_start
        assert theirs.lost_end <= ours.lost_end
