"""Small U-Nets for tissue on slide overviews (Ronneberger et al. 2015, arXiv 1505.04597).

An encoder gives features from fine to coarse; the decoder goes back up, joining them at every
step. The encoder is ours (a few hundred thousand to two million weights) or a timm one.
Batch norm is fixed at prediction, so a pixel's answer depends on its surroundings alone and not
on how an overview was cut into tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import Refused


def _double_conv(n_in: int, n_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (n_in, n_out):
        layers += [nn.Conv2d(channels, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out),
                   nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class ConvEncoder(nn.Module):
    """``depth`` stages of two 3 x 3 convolutions, each at half the resolution of the last.

    Stage s has ``width * 2**s`` channels. (B, 3, H, W) -> ``depth`` maps (B, C_s, H/2**s, W/2**s).
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.channels = [width * 2**stage for stage in range(depth)]
        self.stages = nn.ModuleList(
            _double_conv(n_in, n_out) for n_in, n_out in pairwise([3, *self.channels]))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features: list[torch.Tensor] = []
        for stage in self.stages:
            features.append(stage(F.max_pool2d(features[-1], 2) if features else x))
        return features


class TissueUNet(nn.Module):
    """(B, 3, H, W) normalised RGB -> (B, n_classes, H, W) logits.

    encoder: gives one map a resolution, fine to coarse; channels: of those maps
    """

    def __init__(self, encoder: nn.Module, channels: Sequence[int], *, n_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.ModuleList(
            _double_conv(coarse + fine, fine) for fine, coarse in pairwise(channels))
        self.head = nn.Conv2d(channels[0], n_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *skips, up = self.encoder(x)
        for skip, merge in zip(reversed(skips), reversed(self.decoder), strict=True):
            up = F.interpolate(up, skip.shape[-2:], mode="bilinear", align_corners=False)
            up = merge(torch.cat([up, skip], dim=1))
        logits: torch.Tensor = self.head(up)
        if logits.shape[-2:] != x.shape[-2:]:
            logits = F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)
        return logits


def build_unet(*, n_classes: int, width: int, depth: int) -> TissueUNet:
    """Our own encoder. Width 16 and depth 5: 1.9 million weights; 16 and 4: 0.5 million."""
    encoder = ConvEncoder(width, depth)
    return TissueUNet(encoder, encoder.channels, n_classes=n_classes)


def build_timm_unet(
    *, n_classes: int, encoder: str, weights: Mapping[str, torch.Tensor] | None = None,
) -> TissueUNet:
    """A timm backbone as encoder, e.g. ``resnet18`` or ``efficientnet_lite0``.

    weights: of the whole timm model (its classifier is not needed); None = random ones
    Raises Refused: no such backbone, one without maps at several resolutions, other weights.
    """
    import timm

    options: dict[str, Any] = {} if weights is None else {
        "pretrained": True,
        "pretrained_cfg_overlay": {"state_dict": _fitting(encoder, weights), "source": ""}}
    try:
        backbone = timm.create_model(encoder, features_only=True, **options)
    except (RuntimeError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(f"timm encoder '{encoder}' cannot be built ({reason}): give a convolutional "
                      "backbone such as resnet18") from None
    maps: Any = backbone.feature_info
    steps: list[int] = maps.reduction()
    if len(steps) < 2 or any(coarse <= fine for fine, coarse in pairwise(steps)):
        raise Refused(f"timm encoder '{encoder}' has maps at the reductions {steps}, several "
                      "growing ones were expected: give a convolutional backbone such as resnet18")
    return TissueUNet(backbone, maps.channels(), n_classes=n_classes)


def _fitting(encoder: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights, if they are a whole encoder's: timm itself would leave the rest at random."""
    import timm

    whole: Any = timm.create_model(encoder, num_classes=0)
    wanted = {name: value.shape for name, value in whole.state_dict().items()
              if not name.endswith("num_batches_tracked")}
    wrong = [name for name, shape in wanted.items()
             if name not in weights or weights[name].shape != shape]
    if wrong:
        raise Refused(f"the encoder's weights are not those of '{encoder}': {len(wrong)} of its "
                      f"{len(wanted)} tensors are missing or of another shape ({wrong[0]})")
    return {name: value for name, value in weights.items() if name in whole.state_dict()}
