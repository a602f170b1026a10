"""Losses by name; the smooth SVM's numbers are in tests/golden/test_losses.py."""

from __future__ import annotations

import math

import pytest
import torch

from utils.errors import Refused
from utils.losses import LOSSES, smooth_top1_svm


def test_known_losses() -> None:
    assert list(LOSSES) == ["ce", "svm"]
    with pytest.raises(Refused, match="unknown loss 'cee': did you mean 'ce'"):
        LOSSES.get("cee")


@pytest.mark.parametrize("name", list(LOSSES))
def test_rows_average_to_the_mean_in_float32(name: str) -> None:
    scores, labels = torch.randn(9, 4).bfloat16(), torch.arange(9) % 4
    loss = LOSSES.get(name)
    rows = loss(scores, labels, reduction="none")
    assert rows.shape == (9,)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.mean(), loss(scores, labels))


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_right_answer_costs_less(name: str) -> None:
    loss = LOSSES.get(name)
    scores = torch.tensor([[3.0, 0.0]])
    assert float(loss(scores, torch.tensor([0]))) < float(loss(scores, torch.tensor([1])))


def test_svm_is_hard_from_a_gap_of_ln_1000() -> None:
    gap = math.log(1000.0)
    label = torch.tensor([1])
    below, above = (float(smooth_top1_svm(torch.tensor([[gap + step, 0.0]]), label))
                    for step in (-1e-3, 1e-3))
    assert above == pytest.approx(gap + 1e-3 + 1.0, abs=1e-5)
    assert below > gap - 1e-3 + 1.0 + 1e-4  # the smooth form lies above its maximum


def test_svm_gradient_is_finite_for_huge_scores() -> None:
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    smooth_top1_svm(scores, torch.tensor([0, 0])).backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
