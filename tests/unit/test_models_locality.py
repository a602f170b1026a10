"""The closed form against the published values, against computing, and of whole timm networks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from timm import create_model
from timm.layers import SqueezeExcite
from torch import nn

from models.axis import Axis
from models.locality import (
    Locality,
    Step,
    check_step,
    compose,
    locality_of,
    make_steps,
    output_size,
    probe_locality,
)
from tests.local_networks import NETWORKS, Residual, network
from utils.errors import Refused


def timm_parts(name: str, **options: object) -> Iterator[tuple[str, nn.Module]]:
    """A timm ResNet on the meta device: its stem, then its blocks."""
    with torch.device("meta"):
        model = create_model(name, pretrained=False, **options).eval()
    yield "stem", nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        yield from ((f"{stage}.{key}", block)
                    for key, block in getattr(model, stage).named_children())


class Features(nn.Module):
    """A timm network up to its last map."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = create_model(name, pretrained=False, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(x)


@pytest.mark.parametrize(("name", "last", "stride", "lost"), [
    ("resnet18", "layer3.1", 16, (7, 6)), ("resnet18", "layer4.0", 32, (5, 4)),
    ("resnet18", "layer4.1", 32, (7, 6)), ("resnet34", "layer3.5", 16, (18, 17)),
    ("resnet34", "layer4.0", 32, (11, 10)), ("resnet34", "layer4.2", 32, (15, 14))])
def test_the_published_lost_borders(name: str, last: str, stride: int,
                                    lost: tuple[int, int]) -> None:
    """spec streaming.md 3.2, table"""
    parts = list(timm_parts(name))
    parts = parts[:[key for key, _ in parts].index(last) + 1]
    found = compose(make_steps(parts))
    for axis in (found.rows, found.columns):
        assert (axis.stride, axis.lost_start, axis.lost_end, axis.extra) == (stride, *lost, 0)
    assert found == locality_of(nn.Sequential(*(part for _, part in parts)), channels=3)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NETWORKS)
def test_closed_form_is_what_a_crop_loses(name: str) -> None:
    steps = make_steps(network(name), channels=1)
    whole = nn.Sequential(*(step.module for step in steps))
    closed = compose(steps)
    assert closed == locality_of(whole, channels=1)
    found = probe_locality(whole, channels=1)
    for ours, theirs in ((closed.rows, found.rows), (closed.columns, found.columns)):
        if name == "blur4":  # a mirror sees inwards by more than the crop of an image shows
            assert 0 <= ours.lost_start - theirs.lost_start <= 1
        else:
            assert (ours.lost_start, ours.lost_end, ours.extra) == (
                theirs.lost_start, theirs.lost_end, theirs.extra)
    for step in steps:
        check_step(step)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(48, 64), (57, 71)])
def test_sizes_are_those_of_torch(name: str, size: tuple[int, int]) -> None:
    whole = nn.Sequential(*(part for _, part in network(name)))
    with torch.device("meta"), torch.no_grad():
        result = whole.to("meta")(torch.empty(1, 1, *size, dtype=torch.float64))
    assert output_size(whole, size, channels=1) == result.shape[2:]
    assert locality_of(whole, channels=1).out_channels == result.shape[1]


@pytest.mark.parametrize(("name", "stride", "lost"), [
    ("resnet50", 32, (7, 6)), ("resnet26d", 32, None), ("resnetblur18", 32, None),
    ("convnext_tiny", 32, (26, 26)), ("efficientnet_lite0", 32, None), ("regnetx_002", 32, None),
    ("mobilenetv2_100", 32, None), ("vgg11", 32, None)])
def test_networks_of_timm(name: str, stride: int, lost: tuple[int, int] | None) -> None:
    found = locality_of(Features(name).eval(), channels=3)
    assert found.rows == found.columns
    assert found.rows.stride == stride
    assert lost is None or (found.rows.lost_start, found.rows.lost_end) == lost


@pytest.mark.parametrize(("name", "layer"), [
    ("efficientnet_b0", "net.model.blocks.0.0.se"), ("regnety_002", "net.model.s1.b1.se"),
    ("seresnet50", "net.model.layer1.0.se"), ("tf_efficientnet_lite0", "net.model.conv_stem"),
    ("resnetv2_50x1_bit", "net.model.stages.0.blocks.0.norm1"),
    ("convnextv2_atto", "net.model.stages.0.blocks.0.mlp.grn"),
    ("vit_tiny_patch16_224", "net.model.patch_embed"),
    ("hrnet_w18_small", "net.model.stage2.0.fuse_layers.0.1.2")])
def test_what_is_not_local_is_refused_by_its_name(name: str, layer: str) -> None:
    with pytest.raises(Refused, match=rf"layer '{layer}' cannot be streamed: .*--cut"):
        locality_of(Features(name).eval(), channels=3, name="net")


def test_batch_statistics_are_refused_and_random_layers_are_not() -> None:
    model = Features("convnext_atto", drop_path_rate=0.5, drop_rate=0.3).train()
    assert locality_of(model, channels=3) == locality_of(model.eval(), channels=3)
    block = Residual(2).train()
    with pytest.raises(Refused, match=r"'block.inner.1' .* evaluation mode"):
        locality_of(block, channels=2, name="block")
    for part in block.modules():
        part.training = not isinstance(part, nn.BatchNorm2d)
    assert locality_of(block, channels=2).rows.lost_start == 2


def test_nothing_is_touched() -> None:
    """Not the generators, weights, buffers, flags and hooks of the module, and no grad mode."""
    module = nn.Sequential(Residual(2), nn.Dropout(0.5), nn.Dropout2d(0.5)).train()
    module[0].eval()
    module[0].inner[3].train()
    state = {key: (id(value), value.clone()) for key, value in
             (*module.named_parameters(), *module.named_buffers())}
    flags = [part.training for part in module.modules()]
    random = torch.get_rng_state()
    locality_of(module, channels=2)
    probe_locality(module, channels=2)
    with pytest.raises(Refused):
        locality_of(nn.Sequential(module, nn.AdaptiveAvgPool2d(1)), channels=2)
    assert torch.equal(random, torch.get_rng_state())
    assert flags == [part.training for part in module.modules()]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    for key, value in (*module.named_parameters(), *module.named_buffers()):
        assert id(value) == state[key][0]
        assert torch.equal(value, state[key][1])
    assert torch.is_grad_enabled()


def test_the_probe_sees_what_the_closed_form_would_miss() -> None:
    honest = make_steps([("conv", nn.Conv2d(1, 1, 5, padding=2))], channels=1)[0]
    check_step(honest)
    narrow = Locality(Axis(1, 2, 2, 0), Axis(1, 2, 1, 0), 1, 1)
    with pytest.raises(Refused, match=r"'conv' .* loses 2 and 2 .* where 2 and 1 were expected"):
        check_step(Step("conv", honest.module, narrow))
    for module in (SqueezeExcite(4, rd_ratio=1), nn.GroupNorm(1, 4), nn.BatchNorm2d(4).train()):
        with pytest.raises(Refused):
            check_step(Step("global", module, Locality(*[Axis(1, 1, 1, 0)] * 2, 4, 4)))


def test_dead_units_hide_nothing_from_the_probe() -> None:
    """Rectifiers that let nothing through, branches multiplied by zero."""
    block = Residual(2)
    nn.init.zeros_(block.inner[4].weight)
    nn.init.constant_(block.inner[1].bias, -1e6)
    found = probe_locality(nn.Sequential(block.eval(), nn.Conv2d(2, 2, 3, padding=1)), channels=2)
    assert (found.rows.lost_start, found.columns.lost_end) == (3, 3)
