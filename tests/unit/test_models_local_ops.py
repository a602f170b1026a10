"""What single functions of torch do to the reach of a map; what is refused, in whose name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axis import Axis
from models.locality import Locality, locality_of
from utils.errors import Refused

CONSTANT, GAMMA = torch.rand(4, device="meta"), torch.rand(1, 4, 1, 1, device="meta")


class Layer(nn.Module):
    """Any function as a layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def traced(function: Callable[[Tensor], Any]) -> Locality:
    """Of a function of 4 channels, between two layers."""
    return locality_of(nn.Sequential(nn.Conv2d(4, 4, 1), Layer(function), nn.ReLU()), channels=4,
                       name="net")


ALONE = (Axis(1, 0, 0, 0), Axis(1, 0, 0, 0))


@pytest.mark.parametrize("function", [
    lambda x: F.gelu(x) * 2 - x / 3, lambda x: 1 - x.sigmoid(), lambda x: x.mul_(GAMMA),
    lambda x: x + GAMMA.expand(-1, 4, -1, -1), lambda x: x ** 2 + (-x).exp().clamp(0, 1),
    lambda x: x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5), lambda x: F.prelu(x, CONSTANT),
    lambda x: F.dropout2d(F.dropout(x.relu_(), 0.2, True), 0.2, True),
    lambda x: torch.cat(x.chunk(2, 1)[::-1], dim=1), lambda x: torch.cat(x.split([1, 3], -3), -3),
    lambda x: torch.cat([x[:, 2:], x[:, :2, :, :]], 1), lambda x: x.to(torch.float64).float(),
    lambda x: (x.permute(0, 2, 3, 1).contiguous() * CONSTANT).permute((0, 3, 1, 2)),
    lambda x: F.linear(x.permute(dims=(0, 2, 3, 1)),
                       CONSTANT.expand(4, 4)).transpose(2, 3).transpose(1, 2),
    lambda x: F.layer_norm(x.transpose(1, 3), (4,)).transpose(3, 1),
    lambda x: F.batch_norm(x, CONSTANT, CONSTANT), lambda x: x if x.shape[2] % 2 else x.clone(),
    lambda x: F.pad(x, (0, 0, 0, 0, 1, 2))[:, 1:5]])
def test_every_position_by_itself(function: Callable[[Tensor], Tensor]) -> None:
    found = traced(function)
    assert (found.rows, found.columns) == ALONE
    assert found.out_channels == 4


@pytest.mark.parametrize(("function", "rows", "columns"), [
    (lambda x: F.max_pool2d(x, (3, 2)), Axis(3, 0, 2, 0), Axis(2, 0, 1, 0)),
    (lambda x: F.avg_pool2d(x, 3, 2, 1, True), Axis(2, 1, 1, 2), Axis(2, 1, 1, 2)),
    (lambda x: F.lp_pool2d(x, 2, 2, (1, 2)), Axis(1, 0, 1, -1), Axis(2, 0, 1, 0)),
    (lambda x: F.pad(x, (1, 2, 3, 4)), Axis(1, 3, -3, 7), Axis(1, 1, -1, 3)),
    (lambda x: F.conv2d(F.pad(x, (1, 1, 2, 2), "reflect"), torch.rand(2, 4, 5, 3, device="meta")),
     Axis(1, 2, 2, 0), Axis(1, 1, 1, 0)),
    (lambda x: F.max_pool2d(x, 3, 1, 1) + F.conv2d(x, GAMMA.expand(4, 4, 1, 5), padding="same"),
     Axis(1, 1, 1, 0), Axis(1, 2, 2, 0))])
def test_windows(function: Callable[[Tensor], Tensor], rows: Axis, columns: Axis) -> None:
    found = traced(function)
    assert (found.rows, found.columns) == (rows, columns)


@pytest.mark.parametrize(("function", "reason"), [
    (lambda x: x - x.mean((2, 3), keepdim=True), r"not known .* \(mean\)"),
    (lambda x: F.adaptive_avg_pool2d(x, 1), r"not known .* \(adaptive_avg_pool2d\)"),
    (lambda x: x * F.avg_pool2d(x, x.shape[2:]).sigmoid(), "different strides"),
    (lambda x: F.avg_pool2d(x, x.shape[2:]), "depends on the size of the image"),
    (lambda x: F.group_norm(x, 2), r"\(group_norm\)"),
    (lambda x: F.instance_norm(x), r"\(instance_norm\)"),
    (lambda x: F.batch_norm(x, CONSTANT, CONSTANT, training=True), "evaluation mode"),
    (lambda x: F.batch_norm(x, None, None, training=True), "evaluation mode"),
    (lambda x: F.layer_norm(x, x.shape[1:]), "statistics are over positions"),
    (lambda x: F.layer_norm(x, x.shape[3:]), "statistics are over positions"),
    (lambda x: F.interpolate(x, scale_factor=2), r"\(interpolate\)"),
    (lambda x: F.conv_transpose2d(x, GAMMA.expand(4, 4, 2, 2)), r"\(conv_transpose2d\)"),
    (lambda x: F.scaled_dot_product_attention(*[x.flatten(2)] * 3), r"\(flatten\)"),
    (lambda x: x @ x.transpose(2, 3), r"\(matmul\)"),
    (lambda x: F.linear(x, torch.rand(20160, 1, device="meta")), "mixes positions|fails"),
    (lambda x: x + torch.rand(x.shape[2:], device=x.device), "differ from position to position"),
    (lambda x: x + x.new_ones(x.shape), "differ from position to position"),
    (lambda x: x + x.new_ones(x.shape)[..., :1], "differ from position to position"),
    (lambda x: x + F.max_pool2d(x, 1, 2), "fails|different strides"),
    (lambda x: x + x.transpose(2, 3), "different strides|rows for columns"),
    (lambda x: torch.cat([x, x], 2), "otherwise than by their channels"),
    (lambda x: x[:, :, 1:], "picks positions"), (lambda x: x[..., 0], "picks positions"),
    (lambda x: x.chunk(2, 2)[0], "cuts the map by positions"),
    (lambda x: F.pad(x, (1, 1, 1, 1), "circular"), "other side of the image"),
    (lambda x: F.pad(x, (-1, 0)), "by less than nothing"),
    (lambda x: F.pad(x, (1, 2, 1, 1), "replicate"), "unequal padding"),
    (lambda x: F.pad(x, (0, -x.shape[3] % 7)), "depends on the size of the image"),
    (lambda x: x / x.shape[2] ** 0.5, "depends on the size of the image"),
    (lambda x: x.clamp(max=1e-3 * x.shape[3]), "depends on the size of the image"),
    (lambda x: F.pad(x, (0, 1)) if x.shape[3] % 2 else x, "depends on the size of the image"),
    (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], "max_pool2d_with_indices"),
    (lambda x: F.conv2d(x[:1], x.permute(1, 0, 2, 3)), "picks|depend on the image"),
    (lambda x: (x.chunk(2, 1)[0].add_(F.max_pool2d(x[:, :2], 3, 1, 1)), x)[1], "shows too"),
    (lambda x: x.__setitem__((0, 0), 0.0) or x, r"\(__setitem__\)"),
    (lambda x: x.view(1, 2, -1), r"\(view\)"), (lambda x: F.pixel_shuffle(x, 2), "pixel_shuffle")])
def test_refusals_name_layer_and_function(function: Callable[[Tensor], Tensor],
                                          reason: str) -> None:
    with pytest.raises(Refused, match=rf"layer 'net\.1' cannot be streamed: .*({reason}).*--cut"):
        traced(function)


@pytest.mark.parametrize("function", [
    lambda x: x.permute(0, 2, 3, 1), lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
    lambda x: torch.rand(1, 4, 20160, 20160, device="meta"), lambda x: [x]])
def test_what_comes_out_must_be_a_map(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(Refused, match="layer 'end' .* result is not a map"):
        locality_of(Layer(function), channels=4, name="end")


def test_reflection_sees_inwards() -> None:
    """A window shorter than the padding on both sides: at the end of the image it looks back."""
    module = nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(1, 1, 4, 2))
    assert locality_of(module, channels=1).rows == Axis(2, 3, 2, 2)
