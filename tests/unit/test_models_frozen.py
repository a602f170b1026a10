"""Frozen networks equal the eager ones, or step aside and say so."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from models.frozen import fold_batch_norms, freeze_network


def with_statistics(network: nn.Module) -> nn.Module:
    """Random batch-norm statistics, as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    return network.eval()


def images(count: int = 4, side_px: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=["test_resnet", "test_efficientnet", "resnet18"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(timm.create_model(request.param, num_classes=0))


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_folding_keeps_the_result(network: nn.Module) -> None:
    folded = copy.deepcopy(network)
    with torch.no_grad():
        assert fold_batch_norms(folded, images()[:1]) == norms(network) > 0
        assert norms(folded) == 0
        torch.testing.assert_close(folded(images()), network(images()), rtol=1e-4, atol=1e-5)


def test_a_convolution_used_twice_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.conv(self.first(self.conv(x))))

    assert fold_batch_norms(with_statistics(Shared()), images()) == 0


def test_float32_is_exact_for_any_batch_size(network: nn.Module) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run, problem = freeze_network(network, images(8))
    assert problem == ""
    for count in (8, 3, 1):
        with torch.no_grad():
            wanted = network(images(count))
        assert float((run(images(count)) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    for name, value in network.state_dict().items():  # the network itself is untouched
        assert torch.equal(value, before[name])


def test_bfloat16_is_close_and_returned_as_float32(network: nn.Module) -> None:
    run, problem = freeze_network(network, images(8), bf16=True)
    with torch.no_grad():
        wanted = network(images(8))
    found = run(images(8))
    assert problem == "" and found.dtype == torch.float32
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-5 < error < 0.05  # it did round, and only rounded


@pytest.mark.parametrize("bf16", [False, True])
def test_a_network_that_cannot_be_traced_stays_eager(bf16: bool) -> None:
    class Untraceable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.jit.is_tracing():
                raise ValueError("no graph of me")
            return x.mean(dim=(2, 3))

    run, problem = freeze_network(Untraceable(), images(), bf16=bf16)
    assert "no graph of me" in problem
    torch.testing.assert_close(run(images()), images().mean(dim=(2, 3)))


def test_a_graph_that_differs_is_not_used() -> None:
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3)) * (2 if torch.jit.is_tracing() else 1)

    run, problem = freeze_network(Other(), images())
    assert "off by 1.0e+00" in problem
    torch.testing.assert_close(run(images()), images().mean(dim=(2, 3)))


def test_a_network_without_norms_and_a_transformer() -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    run, problem = freeze_network(network, images(4, 160))
    with torch.no_grad():
        torch.testing.assert_close(run(images(4, 160)), network(images(4, 160)),
                                   rtol=1e-5, atol=1e-5)
    assert problem == "" and not torch.jit.onednn_fusion_enabled()
