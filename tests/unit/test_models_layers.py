"""Cheap dropout means what dropout means, and what enters a model is checked."""

from __future__ import annotations

import pytest
import torch

from models.layers import Dropout, ReluDropout, features_of, keep_mask
from utils.contracts import Bag
from utils.errors import ItemFailed
from utils.objectives import Classification


@pytest.mark.parametrize("drop", [0.25, 0.4375, 0.1, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(2000, 512), (7, 3), (1,)])
def test_mask_keeps_the_right_share(drop: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    keep = keep_mask(torch.empty(shape), drop)
    assert keep.shape == shape
    assert keep.dtype == torch.bool
    if keep.numel() > 1000:
        spread = (drop * (1 - drop) / keep.numel()) ** 0.5
        assert abs(float(keep.double().mean()) - (1 - drop)) < 5 * spread


def test_mask_has_no_pattern() -> None:
    torch.manual_seed(0)
    keep = keep_mask(torch.empty(4096, 512), 0.25).double() - 0.75
    for other in (keep.roll(1, 1), keep.roll(1, 0), keep.roll(4, 1), keep.roll(8, 1)):
        assert abs(float((keep * other).mean())) < 5 * 0.1875 / keep.numel() ** 0.5
    for means in (keep.mean(dim=0), keep.mean(dim=1)):
        assert float(means.abs().max()) < 6 * (0.1875 / (keep.numel() / means.numel())) ** 0.5


@pytest.mark.parametrize("drop", [0.25, 0.3])
def test_seed_decides_the_mask(drop: float) -> None:
    like = torch.empty(100, 100)
    torch.manual_seed(3)
    first, second = keep_mask(like, drop), keep_mask(like, drop)
    torch.manual_seed(3)
    assert torch.equal(first, keep_mask(like, drop))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", [Dropout, ReluDropout])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_scales_what_it_keeps_and_its_gradient(kind: type, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = kind(0.25).train()
    leaf = torch.randn(300, 40, dtype=dtype, requires_grad=True)
    base = leaf.detach().relu() if kind is ReluDropout else leaf.detach()
    weight = torch.randn(300, 40, dtype=dtype)
    result = layer(leaf * 1.0)  # ReluDropout writes over its input
    (result * weight).sum().backward()
    kept = result.detach() != 0
    expected = torch.where(kept, base * layer.scale, torch.zeros_like(base))
    torch.testing.assert_close(result.detach(), expected)
    torch.testing.assert_close(
        leaf.grad, torch.where(kept, weight * layer.scale, torch.zeros_like(weight)))
    assert result.dtype == dtype
    share = kept[base != 0].double().mean()
    assert 0.72 < float(share) < 0.78


@pytest.mark.parametrize("kind", [Dropout, ReluDropout])
def test_no_dropout_in_evaluation_or_at_rate_zero(kind: type) -> None:
    x = torch.randn(20, 5)
    expected = x.relu() if kind is ReluDropout else x
    torch.testing.assert_close(kind(0.25).eval()(x.clone()), expected)
    torch.testing.assert_close(kind(0.0).train()(x.clone()), expected)


def test_features_and_label_are_checked() -> None:
    bag = Bag(slide_id="s1", features=torch.zeros(3, 8), label=2)
    assert features_of(bag, 8) is bag.features
    with pytest.raises(ItemFailed, match=r"s1: features have shape \(3, 8\).*\(patches, 16\)"):
        features_of(bag, 16)
    with pytest.raises(ItemFailed, match="s2: the bag has no patches"):
        features_of(Bag(slide_id="s2", features=torch.zeros(0, 8)), 8)
    assert Classification(n_classes=3).label_of(bag) == 2
    for label in (None, 2, -1):
        with pytest.raises(ItemFailed, match=f"label is {label}, the model expects 0 to 1"):
            Classification(n_classes=2).label_of(
                Bag(slide_id="s", features=torch.zeros(1, 8), label=label))
