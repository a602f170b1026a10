"""Mean and maximum of patch scores: what they compute, whom they listen to, on any bag."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.pooling import MaxPooling, MeanPooling
from models.slide_models import SlideModelSpec, build_slide_model
from utils.contracts import Bag
from utils.errors import ItemFailed

MODELS = {"mean": MeanPooling, "max": MaxPooling}


def make(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return build_slide_model(SlideModelSpec(
        **{"model_type": name, "embed_dim": 12, "n_classes": 3, **changes}))


def bag(n: int, seed: int = 1, label: int | None = 2) -> Bag:
    features = torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))
    return Bag(slide_id="s", features=features, label=label)


def patch_scores(model: Any, features: torch.Tensor) -> torch.Tensor:
    first, last = model.head[0], model.head[3]
    h = (features @ first.weight.T + first.bias).clamp(min=0)
    return h @ last.weight.T + last.bias


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 60])
def test_logits_pool_the_patch_scores(name: str, n: int) -> None:
    model = make(name).eval()
    assert type(model) is MODELS[name]
    scores = patch_scores(model, bag(n).features)
    output = model(bag(n))
    pooled = scores.mean(dim=0) if name == "mean" else scores.amax(dim=0)
    torch.testing.assert_close(output.logits, pooled[None])
    torch.testing.assert_close(output.instances, scores.softmax(dim=1))
    assert output.attention is None and not model.contextual
    assert list(model.state_dict()) == [f"head.{i}.{part}" for i in (0, 3)
                                        for part in ("weight", "bias")]


@pytest.mark.parametrize("name", MODELS)
def test_order_of_the_patches_does_not_matter(name: str) -> None:
    model, one = make(name).eval(), bag(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    other = model(Bag(slide_id="s", features=one.features[order]))
    torch.testing.assert_close(model(one).logits, other.logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_are_those_of_the_whole_bag(name: str, dropout: float) -> None:
    """``max`` only redoes the patches that win; masks and gradients stay those of all."""
    model = make(name, dropout=dropout).train()
    torch.manual_seed(5)
    (step,) = model.losses(bag(40))
    step.value.backward()
    found = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    torch.manual_seed(5)
    scores = model.head(bag(40).features)
    logits = scores.mean(dim=0) if name == "mean" else scores.amax(dim=0)
    loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([2]))
    torch.testing.assert_close(step.value, loss)
    loss.backward()
    for mine, weight in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, weight.grad)
        assert bool(mine.abs().sum() > 0)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_on_in_training_only(name: str) -> None:
    model = make(name, dropout=0.5).train()
    assert not torch.equal(model(bag(9)).logits, model(bag(9)).logits)
    model.eval()
    assert torch.equal(model(bag(9)).logits, model(bag(9)).logits)


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_bag_fails_alone(name: str) -> None:
    with pytest.raises(ItemFailed, match="s: the bag has no patches"):
        make(name)(bag(0))
