"""A small streaming model, and what it computes done the ordinary way, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from models.slide_models import SlideModelSpec, build_slide_model
from models.streaming_cnn import StreamingCNN
from tests.streaming import TensorImage
from utils.contracts import Bag, SlideOutput


def tiny_network(*, dtype: torch.dtype = torch.float64, dropout: float = 0.0,
                 objective: dict[str, Any] | None = None, **options: Any) -> StreamingCNN:
    """timm's ``test_resnet`` (five stages, stride 32) before the mean of its map, always the same;
    its norms have statistics, and no residual branch is asleep. Streamed in several tiles where an
    image is more than 64 px."""
    torch.manual_seed(0)
    model = build_slide_model(SlideModelSpec(
        model_type="streaming_test_resnet", embed_dim=96, dropout=dropout,
        options={"head": "mean", "tile_size": 64, "store_maps": "all", **options},
        **(objective or {"n_classes": 2})))
    assert isinstance(model, StreamingCNN)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                for value in (norm.weight, norm.running_var):
                    cast(torch.Tensor, value).uniform_(0.5, 1.5)
                for value in (norm.bias, norm.running_mean):
                    cast(torch.Tensor, value).normal_(std=0.2)
    return model.to(dtype)


def ordinary_logits(model: StreamingCNN, bag: Bag) -> torch.Tensor:
    """(1, C): the whole image through timm's own network at once, with its graph."""
    assert isinstance(bag.image, TensorImage)
    number = next(model.parameters()).dtype
    mean, std = (torch.tensor(values).to(number)
                 for values in (model.encoder.mean, model.encoder.std))
    pixels = (bag.image.pixels.to(number) / 255 - mean) / std
    found = cast(Any, model.encoder.model).forward_features(pixels.permute(2, 0, 1)[None])
    rows = found.flatten(2).transpose(1, 2)[0]
    output: SlideOutput = model.mil(replace(bag, features=rows, image=None))
    return output.logits
