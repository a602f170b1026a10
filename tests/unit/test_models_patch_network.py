"""The stages of a network, as streaming runs them: timm's own network up to its last map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models.e2e_encoders import build_encoder
from utils.errors import Refused


@pytest.mark.parametrize(("name", "stages", "parts"), [
    ("resnet18", "stem layer1 layer2 layer3 layer4", [1, 2, 2, 2, 2]),
    ("regnetx_002", "stem s1 s2 s3 s4", [1, 1, 1, 4, 7]),
    ("mobilenetv3_small_050", "stem blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 blocks.5",
     [1, 1, 2, 3, 2, 3, 1]),
    ("test_efficientnet", "stem blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 conv_head",
     [1, 1, 1, 1, 1, 1, 2]),
    ("repvgg_a0", "stem stages.0 stages.1 stages.2 stages.3", [1, 2, 4, 14, 1]),
    ("r18", "stem layer1 layer2 layer3", [1, 2, 2, 2])])  # its last stage was taken off
def test_stages_make_timms_last_map(name: str, stages: str, parts: list[int]) -> None:
    torch.manual_seed(0)
    network = build_encoder(name).eval()
    found = network.stages()
    assert [stage for stage, _ in found] == stages.split()
    assert [len(inside) for _, inside in found] == parts
    x = images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for _, inside in found:
            for _, part in inside:
                x = part(x)
        model: Any = network.model
        assert torch.equal(x, model.forward_features(images))


def test_convnext_is_normed_at_each_position() -> None:
    """The norm that timm applies after pooling; else as timm's map."""
    network = build_encoder("convnext_atto").eval()
    model: Any = network.model
    nn.init.uniform_(model.head.norm.weight, 0.5, 1.5)
    found = network.stages()
    assert found[1][0] == "stages.0"
    assert [name for name, _ in found[2][1]] == [
        "stages.1.downsample", "stages.1.blocks.0", "stages.1.blocks.1"]
    assert found[-1][1][-1][0] == "head.norm"
    x = images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for _, inside in found:
            for _, part in inside:
                x = part(x)
        assert torch.equal(x, model.head.norm(model.forward_features(images)))


def test_parts_are_the_networks_own_under_its_names() -> None:
    network = build_encoder("resnet18")
    stages = dict(network.stages())
    assert stages["layer3"][1] == ("layer3.1", network.model.get_submodule("layer3.1"))
    mine = {id(one) for inside in stages.values() for _, part in inside
            for one in part.parameters()}
    assert mine == {id(one) for one in network.parameters()}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
                                  "densenet121"])
def test_networks_without_stages_of_maps_are_refused(name: str) -> None:
    with torch.device("meta"):
        network = build_encoder(name)
    with pytest.raises(Refused, match="no network of convolutions in stages: take one of timm's"):
        network.stages()
