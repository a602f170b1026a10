"""Small local networks as the steps they consist of, each of a kind that streaming must get right.

float64, evaluation mode, few channels; batch norms have random statistics and affine weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

Parts = list[nn.Module]


class Residual(nn.Module):
    """Two convolutions (or ``inner``) beside a shortcut, as in ResNet-18/34."""

    def __init__(self, channels: int, out: int = 0, stride: int = 1,
                 shortcut: nn.Module | None = None) -> None:
        super().__init__()
        out = out or channels
        self.inner = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.shortcut = shortcut or nn.Identity()
        if shortcut is None and (stride > 1 or out != channels):
            self.shortcut = nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        found += self.shortcut(x)
        return found.relu()


class Dense(nn.Module):
    """Concatenates a convolution of one half of the channels to both halves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels // 2, 2, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, 1)
        return torch.cat([one, other, self.conv(other), x[:, :1]], 1)


class PaddedBefore(nn.Module):
    """A convolution of stride 2 on an input that is padded at its end only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 1, 2)))


class GeM(nn.Module):
    """Generalised mean over 3 x 3 positions."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.clamp(min=1e-3).pow(3), 3, 2, 1).pow(1 / 3)


def _stem(out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, out, 7, 2, 3), nn.BatchNorm2d(out), nn.ReLU(),
                         nn.MaxPool2d(3, 2, 1))


def _resnet(blocks: tuple[int, ...]) -> Parts:
    parts: Parts = [_stem(1)]
    for stage, number in enumerate(blocks):
        parts += [Residual(1, stride=2 if stage and not block else 1) for block in range(number)]
    return parts


def _resnet_d() -> Parts:
    shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
                             nn.Conv2d(2, 3, 1))
    return [nn.Conv2d(1, 2, 3, 2, 1), Residual(2, 3, 2, shortcut), Residual(3)]


def _blurred(size: int) -> Parts:
    return [nn.Conv2d(1, 2, 3, padding=1), BlurPool2d(2, filt_size=size), nn.Conv2d(2, 2, 3)]


NETWORKS: dict[str, Callable[[], Parts]] = {
    "unpadded": lambda: [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, 2), nn.Conv2d(2, 1, 3)],
    "padded": lambda: [nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(),
                       nn.MaxPool2d(3, 2, 1), nn.Conv2d(2, 2, 3, padding=1)],
    "resnet18": lambda: _resnet((2, 2, 2, 2)),
    "resnet_layer2": lambda: _resnet((3, 4)),
    "resnet_d": _resnet_d,
    "dilated": lambda: [nn.Conv2d(1, 2, 3, 2, 2, dilation=2), nn.SiLU(),
                        nn.Conv2d(2, 2, 3, padding=4, dilation=4),
                        nn.Conv2d(2, 2, 3, padding="same", dilation=3)],
    "depthwise": lambda: [nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 5, 2, 2, groups=4),
                          nn.ReLU6(), nn.Conv2d(4, 2, 1)],
    "even": lambda: [nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 4, 2, 1), nn.MaxPool2d(2),
                     nn.Conv2d(2, 2, 4, padding="same")],
    "rectangular": lambda: [nn.Conv2d(1, 2, (3, 5), (1, 2), (0, 2)), nn.GELU(),
                            nn.AvgPool2d((2, 1)), nn.Conv2d(2, 2, (1, 3), padding=(0, 1))],
    "convnext": lambda: [nn.Conv2d(1, 4, 4, 4), ConvNeXtBlock(4), ConvNeXtBlock(4),
                         nn.Conv2d(4, 4, 2, 2), ConvNeXtBlock(4)],
    "ceil": lambda: [nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
                     nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.LPPool2d(2, 2, ceil_mode=True)],
    "blur3": lambda: _blurred(3),
    "blur4": lambda: _blurred(4),
    "dense": lambda: [nn.Conv2d(1, 4, 3, 2, 1), Dense(4), nn.Conv2d(7, 2, 1)],
    "padded_before": lambda: [PaddedBefore(1), nn.Hardswish(), PaddedBefore(1)],
    "more_than_same": lambda: [nn.Conv2d(1, 2, 1, padding=1), nn.Conv2d(2, 2, 3, 2, 3)],
    "gem": lambda: [nn.Conv2d(1, 2, 3, 1, 1), GeM(), GeM()],
}


def network(name: str) -> list[tuple[str, nn.Module]]:
    """A network of ``NETWORKS`` in steps, always with the same weights."""
    return ready(NETWORKS[name])


def ready(build: Callable[[], Parts]) -> list[tuple[str, nn.Module]]:
    """Modules as steps: float64, evaluation mode, no weight that hides a part of the network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        parts = build()
        for module in nn.ModuleList(parts).modules():
            for name in ("running_mean", "running_var", "gamma"):
                if isinstance(getattr(module, name, None), Tensor):
                    nn.init.uniform_(getattr(module, name), 0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return [(f"step{number}", part.double().eval()) for number, part in enumerate(parts)]
