"""Survival losses, concordance and bins of time against the original programs."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import GOLDEN
from utils.contracts import Bag
from utils.objectives import DiscreteSurvival
from utils.survival import concordance, nll_survival, survival_bins, survival_curve, time_bins

CASES = json.loads((GOLDEN / "losses.json").read_text())


def logits_of(case: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(case["logits"], dtype=torch.float32).view(case["shape"])


@pytest.mark.parametrize("case", CASES["nll_survival"])
def test_likelihood_and_its_gradient(case: dict[str, Any]) -> None:
    logits = logits_of(case).requires_grad_()
    loss = nll_survival(logits, torch.tensor(case["bin"]), 1 - torch.tensor(case["censored"]),
                        alpha=case["alpha"]).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(case["loss"], abs=2e-6)
    np.testing.assert_allclose(logits.grad.flatten(), case["grad"], atol=2e-7)


@pytest.mark.parametrize("case", CASES["nll_survival"])
def test_the_objective_means_the_same_slide_by_slide(case: dict[str, Any]) -> None:
    logits = logits_of(case)
    n_bins = logits.shape[1]
    objective = DiscreteSurvival(n_bins=n_bins, alpha=case["alpha"],
                                 bin_edges=tuple(map(float, range(n_bins + 1))))
    losses = [objective.loss(row[None], Bag(slide_id="s", features=torch.zeros(1, 1),
                                            target=(bin_ + 0.5, 1.0 - censored)))
              for row, bin_, censored in zip(logits, case["bin"], case["censored"], strict=True)]
    assert float(torch.stack(losses).mean()) == pytest.approx(case["loss"], abs=2e-6)
    scores = objective.scores(logits)
    np.testing.assert_allclose(scores[:, 0], case["risk"], atol=1e-6)
    np.testing.assert_allclose(scores[:, 1:].flatten(), case["survival"], atol=1e-7)
    assert torch.equal(scores[:, 1:], survival_curve(logits))


@pytest.mark.parametrize("case", CASES["c_index"])
def test_concordance(case: dict[str, Any]) -> None:
    found = concordance(np.array(case["risk"]), np.array(case["time"]), np.array(case["event"]))
    if "error" in case:  # the original raises; ours says why there is no figure
        assert math.isnan(found.c_index)
        assert found.reason in ("no slide has an event", "no two slides can be compared")
        return
    assert found.c_index == pytest.approx(case["c_index"], abs=1e-12) and found.reason == ""
    assert [found.concordant, found.discordant, found.tied_risk, found.tied_time] == [
        case[key] for key in ("concordant", "discordant", "tied_risk", "tied_time")]


@pytest.mark.parametrize("case", CASES["survival_bins"])
def test_bins_of_time(case: dict[str, Any]) -> None:
    times = np.array(case["time"])
    edges = survival_bins(times, np.array(case["status_1_is_event"]), case["n_bins"])
    assert edges == pytest.approx(case["quartiles_of_event_times"], abs=1e-12)
    assert time_bins(times, edges).tolist() == case["label"]
