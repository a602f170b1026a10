"""The smooth top-1 SVM against the original package and its definition in float64."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import GOLDEN
from utils.losses import smooth_top1_svm

SVM = json.loads((GOLDEN / "losses.json").read_text())["smooth_top1_svm"]


@pytest.mark.parametrize("case", SVM, ids=[f"{i}-C{case['n_classes']}"
                                           for i, case in enumerate(SVM)])
def test_smooth_svm_and_its_gradient(case: dict[str, Any]) -> None:
    scores = torch.tensor(case["scores"], dtype=torch.float32).view(case["scores_shape"])
    scores.requires_grad_()
    labels = torch.tensor(case["labels"])
    keywords = {"alpha": case["alpha"], "tau": case["tau"]}
    loss = smooth_top1_svm(scores, labels, **keywords)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(case["loss"], abs=2e-6)
    assert float(loss.detach()) == pytest.approx(case["definition_float64"]["loss"], abs=2e-6)
    np.testing.assert_allclose(scores.grad.flatten(), case["grad"], atol=2e-6)
    rows = smooth_top1_svm(scores.detach(), labels, reduction="none", **keywords)
    assert float(rows.mean()) == pytest.approx(case["loss"], abs=2e-6)
