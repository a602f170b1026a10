"""Metrics against CLAM's evaluation functions on made-up probabilities."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import GOLDEN
from utils.metrics import slide_metrics

CASES = json.loads((GOLDEN / "metrics.json").read_text())["cases"]


def assert_auc(found: float, golden: float | None) -> None:
    """NaN where the original says NaN (training) or -1 (evaluation)."""
    if golden is None or math.isnan(golden) or golden == -1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(golden, abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_metrics_equal_the_original(case: dict[str, Any]) -> None:
    probabilities = np.array(case["probs"], np.float32)
    # torch.topk is how the original guesses; it differs from argmax on ties of four classes only
    guesses = torch.from_numpy(probabilities).topk(1, dim=1).indices[:, 0].numpy()
    same_guesses = bool((guesses == probabilities.argmax(axis=1)).all())
    for micro, key in ((False, "eval_py_summary"), (True, "eval_py_summary_micro")):
        found = slide_metrics(probabilities, np.array(case["labels"]), micro_average=micro)
        golden = case[key]
        assert_auc(found.auc, golden["auc"])
        assert bool(found.auc_reason) == math.isnan(found.auc)
        if not same_guesses:
            continue
        assert found.error == pytest.approx(golden["test_error"], abs=1e-12)
        assert found.accuracy == pytest.approx(1 - golden["test_error"], abs=1e-12)
        for entry in golden["class_acc"]:
            assert found.class_accuracy[entry["class"]] == pytest.approx(entry["acc"])
            assert found.class_correct[entry["class"]] == entry["correct"]
            assert found.class_counts[entry["class"]] == entry["count"]
    assert_auc(slide_metrics(probabilities, np.array(case["labels"])).auc,
               case["main_py_summary"]["auc"])


def test_equal_probabilities_go_to_the_lower_class() -> None:
    (case,) = (case for case in CASES if case["name"].startswith("equal probabilities"))
    found = slide_metrics(np.array(case["probs"]), np.array(case["labels"]))
    assert found.class_correct == [entry["correct"]
                                   for entry in case["main_py_summary"]["class_acc"]]
