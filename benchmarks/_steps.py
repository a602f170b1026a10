"""One training step of a slide model, as the benchmarks measure it: default options, width 1024."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from models.slide_models import SlideModelSpec, build_slide_model
from utils.contracts import Bag, SlideModel

if TYPE_CHECKING:
    import torch
    from torch import nn

WIDTH = 1024


def training_step(model: str, *, precision: str, threads: int) -> Callable[[Bag], None]:
    """A function that trains a fresh model on a bag: forward, losses, backward, one Adam step.

    precision: fp32, or bf16 for autocast as in main.py. The step has run once on a small bag, so
    the weights, their gradients and Adam's moments are in memory already.
    """
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = build_slide_model(SlideModelSpec(model_type=model, embed_dim=WIDTH, n_classes=2))
    step = step_of(module, precision=precision)
    step(bag_of(torch.zeros(16, WIDTH)))
    return step


def step_of(module: nn.Module, *, precision: str, device: str = "cpu") -> Callable[[Bag], None]:
    """A function that trains ``module``, which is on ``device``, on a bag, as main.py does."""
    import torch

    optimiser = torch.optim.Adam(module.train().parameters(), lr=1e-4, weight_decay=1e-5)

    def step(bag: Bag) -> None:
        losses = iter(cast(SlideModel, module).losses(bag))
        while True:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                loss = next(losses, None)
            if loss is None:
                break
            loss.value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def bag_of(features: torch.Tensor) -> Bag:
    """A bag of class 1."""
    return Bag(slide_id="bench", features=features, label=1)
