"""What models learn: losses by hand, scores, what is masked, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from utils.contracts import Bag
from utils.errors import ItemFailed, Refused
from utils.objectives import (
    TASK_LOSSES,
    Classification,
    CoxSurvival,
    DiscreteSurvival,
    MultiLabel,
    Objective,
    Regression,
    build_objective,
)

NAN = float("nan")
OBJECTIVES: list[tuple[Objective, int | None, tuple[float, ...] | None]] = [
    (Classification(n_classes=3), 1, None),
    (MultiLabel(n_labels=2), None, (1.0, NAN)),
    (Regression(n_values=2), None, (1.0, -3.0)),
    (DiscreteSurvival(n_bins=4, bin_edges=(0.0, 1.0, 2.0, 3.0, 4.0)), None, (2.5, 1.0)),
    (CoxSurvival(), None, (2.5, 1.0))]


def bag(target: tuple[float, ...] | None = None, label: int | None = None) -> Bag:
    return Bag(slide_id="s", features=torch.zeros(1, 1), target=target, label=label)


@pytest.mark.parametrize(("objective", "label", "target"), OBJECTIVES,
                         ids=[type(one[0]).__name__ for one in OBJECTIVES])
def test_losses_and_scores_are_float32_and_need_a_truth(
        objective: Objective, label: int | None, target: tuple[float, ...] | None) -> None:
    logits = torch.randn(1, objective.n_outputs, dtype=torch.bfloat16, requires_grad=True)
    loss = objective.loss(logits, bag(target, label))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite()
    assert logits.grad is not None and logits.grad.isfinite().all()
    scores = objective.scores(torch.randn(5, objective.n_outputs, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32 and len(scores) == 5
    with pytest.raises(ItemFailed, match="s: "):
        objective.loss(logits, bag())
    empty = objective.metrics(scores.numpy()[:0], np.zeros((0, 1 if label else len(target or ()))))
    assert empty.n == 0 and all(math.isnan(value) for value in empty.headline().values())


def test_class_weights_and_smoothing_of_classes() -> None:
    logits = torch.tensor([[1.0, -2.0]])
    plain = Classification(n_classes=2)
    weighted = Classification(n_classes=2, class_weights=(1.0, 3.0))
    assert weighted.loss(logits, bag(label=1)) == 3 * plain.loss(logits, bag(label=1))
    smooth = plain.with_smoothing(0.2).loss(logits, bag(label=0))
    logs = logits.log_softmax(1)[0]
    assert float(smooth) == pytest.approx(float(-(0.9 * logs[0] + 0.1 * logs[1])))


def test_multilabel_loss_is_the_mean_over_known_labels() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    loss = MultiLabel(n_labels=3).loss(logits, bag((1.0, NAN, 0.0)))
    loss.backward()
    expected = -(math.log(1 / (1 + math.exp(-0.3))) + math.log(1 - 1 / (1 + math.exp(-2.0)))) / 2
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    assert logits.grad is not None and logits.grad[0, 1] == 0 and logits.grad[0, 0] < 0
    with pytest.raises(ItemFailed, match="no label is known"):
        MultiLabel(n_labels=2).loss(logits[:, :2], bag((NAN, NAN)))


def test_multilabel_weights_count_positives_and_smoothing_moves_targets() -> None:
    logits = torch.tensor([[0.3, -1.0]])
    one = MultiLabel(n_labels=2)
    heavy = MultiLabel(n_labels=2, class_weights=(4.0, 1.0))
    assert heavy.loss(logits, bag((1.0, NAN))) == 4 * one.loss(logits, bag((1.0, NAN)))
    assert heavy.loss(logits, bag((0.0, NAN))) == one.loss(logits, bag((0.0, NAN)))
    expected = functional.binary_cross_entropy_with_logits(logits, torch.tensor([[0.9, 0.1]]))
    assert float(one.with_smoothing(0.2).loss(logits, bag((1.0, 0.0)))) == pytest.approx(
        float(expected))
    assert torch.equal(one.scores(logits), logits.sigmoid())


def test_regression_learns_standardised_values_and_answers_in_their_units() -> None:
    objective = Regression(n_values=2, target_mean=(100.0, -1.0), target_std=(10.0, 0.5))
    logits = torch.tensor([[1.5, 0.0]])
    assert objective.scores(logits).tolist() == [[115.0, -1.0]]
    assert float(objective.loss(logits, bag((115.0, -1.0)))) == 0.0
    assert float(objective.loss(logits, bag((95.0, -1.0)))) == pytest.approx(2.0**2 / 2)
    huber = Regression(n_values=2, loss_name="huber", target_mean=(100.0, -1.0),
                       target_std=(10.0, 0.5))
    assert float(huber.loss(logits, bag((95.0, -1.0)))) == pytest.approx((2.0 - 0.5) / 2)
    assert Regression(n_values=1).scores(torch.tensor([[3.0]])).item() == 3.0


def test_a_time_falls_in_the_bin_that_begins_with_it() -> None:
    """And times beyond the training events in the outer bins."""
    objective = DiscreteSurvival(n_bins=3, bin_edges=(1.0, 2.0, 4.0, 8.0))
    logits = torch.tensor([[0.2, -0.4, 1.0]])
    hazard = logits.sigmoid()[0].double().numpy()
    alive = np.cumprod([1.0, *(1 - hazard)])
    for time, bin_ in ((0.1, 0), (1.9, 0), (2.0, 1), (3.9, 1), (4.0, 2), (99.0, 2)):
        seen = float(objective.loss(logits, bag((time, 1.0))))
        censored = float(objective.loss(logits, bag((time, 0.0))))
        assert seen == pytest.approx(-math.log(alive[bin_] * hazard[bin_]), abs=1e-6)
        assert censored == pytest.approx(-math.log(alive[bin_ + 1]), abs=1e-6)
    scores = objective.scores(logits)[0]
    assert scores.tolist() == pytest.approx([-alive[1:].sum(), *alive[1:]], abs=1e-6)
    with pytest.raises(Refused, match="needs bin_edges"):
        DiscreteSurvival(n_bins=3).loss(logits, bag((1.0, 1.0)))
    assert torch.equal(DiscreteSurvival(n_bins=3).scores(logits)[0], scores)


def test_alpha_takes_weight_from_censored_slides_alone() -> None:
    edges, logits = (0.0, 1.0, 2.0), torch.tensor([[0.2, -0.4]])
    plain = DiscreteSurvival(n_bins=2, bin_edges=edges)
    tilted = DiscreteSurvival(n_bins=2, bin_edges=edges, alpha=0.25)
    for event, share in ((1.0, 1.0), (0.0, 0.75)):
        assert float(tilted.loss(logits, bag((1.5, event)))) == pytest.approx(
            share * float(plain.loss(logits, bag((1.5, event)))))


def test_the_joint_gradient_of_cox_is_that_of_its_likelihood() -> None:
    logits = torch.tensor([[0.1], [0.7], [-0.3], [1.2], [0.0]], dtype=torch.float64)
    truths = torch.tensor([[3.0, 1], [3.0, 1], [1.0, 0], [5.0, 0], [2.0, 1]])

    def definition(risks: torch.Tensor) -> torch.Tensor:
        at_risk = truths[:, 0] >= truths[:, 0, None]
        sums = torch.where(at_risk, risks[:, 0], -torch.inf).logsumexp(1)
        return ((sums - risks[:, 0]) * truths[:, 1]).sum() / truths[:, 1].sum()

    reference = logits.clone().requires_grad_()
    definition(reference).backward()
    with torch.inference_mode():  # the engine may be in any mode
        loss, gradient = CoxSurvival().joint_gradient(logits, truths)
    assert float(loss) == pytest.approx(float(definition(logits)), abs=1e-6)
    assert not loss.requires_grad and gradient.dtype == torch.float32
    assert torch.allclose(gradient.double(), reference.grad, atol=1e-7)
    assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-6)


def test_cox_without_events_or_rivals_teaches_nothing() -> None:
    objective, logits = CoxSurvival(), torch.randn(3, 1)
    loss, gradient = objective.joint_gradient(logits, torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
    assert float(loss) == 0.0 and not gradient.any()
    loss, gradient = objective.joint_gradient(logits[:1], torch.tensor([[1.0, 1]]))
    assert float(loss) == pytest.approx(0.0, abs=1e-6) and gradient.abs().max() < 1e-6
    assert float(objective.loss(logits[:1], bag((1.0, 1.0)))) == 0.0


def test_cox_learns_the_order_of_events() -> None:
    torch.manual_seed(0)
    features = torch.randn(40, 3)
    truths = torch.stack([torch.exp(-2 * features[:, 0]), torch.ones(40)], dim=1)
    layer, objective = torch.nn.Linear(3, 1), CoxSurvival()
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(60):
        logits = layer(features)
        logits.backward(objective.joint_gradient(logits, truths)[1])
        optimiser.step()
        optimiser.zero_grad()
    scores = objective.scores(layer(features).detach()).numpy()
    assert objective.metrics(scores, truths.numpy()).headline()["c_index"] > 0.95


@pytest.mark.parametrize("target", [(1.0, 2.0), (1.0, 0.5), (NAN, 1.0), (1.0,)])
def test_a_truth_that_is_no_time_and_event_fails_the_bag(target: tuple[float, ...]) -> None:
    for objective in (CoxSurvival(), DiscreteSurvival(n_bins=1, bin_edges=(0.0, 1.0))):
        with pytest.raises(ItemFailed, match="s: (target|event) is"):
            objective.loss(torch.zeros(1, 1), bag(target))


def test_every_loss_of_every_task_is_built() -> None:
    for task_type, losses in TASK_LOSSES.items():
        for loss in losses:
            n = 1 if loss == "cox" else 3
            objective = build_objective(task_type=task_type, n_outputs=n, loss=loss)
            assert (objective.task_type, objective.n_outputs) == (task_type, n)
            assert objective.needs_batch == (loss == "cox")
            same = objective.with_smoothing(0.0)
            assert same == objective
    assert build_objective(task_type="survival", n_outputs=2, bin_edges=[0, 1, 2], nll_alpha=0.3
                           ) == DiscreteSurvival(n_bins=2, bin_edges=(0, 1, 2), alpha=0.3)
    assert build_objective(task_type="regression", n_outputs=1, target_mean=[2], target_std=[3],
                           loss="huber") == Regression(n_values=1, loss_name="huber",
                                                       target_mean=(2,), target_std=(3,))
    assert build_objective(task_type="multilabel", n_outputs=2, class_weights=[1, 2],
                           label_smoothing=0.1) == MultiLabel(
        n_labels=2, class_weights=(1, 2), label_smoothing=0.1)


@pytest.mark.parametrize(("values", "message"), [
    ({"task_type": "survival", "loss": "ce"}, "ce is none for survival: expected nll_surv or cox"),
    ({"task_type": "regression", "label_smoothing": 0.1}, "need labels"),
    ({"task_type": "survival", "class_weights": (1, 2, 3)}, "need labels"),
    ({"task_type": "multilabel", "class_weights": (1, 2)}, "2 class weights for 3 labels"),
    ({"task_type": "classification", "class_weights": (1, 2)}, "2 class weights for 3 classes"),
    ({"task_type": "classification", "loss": "svm", "label_smoothing": 0.1}, "goes with bag_loss"),
    ({"task_type": "survival", "loss": "cox"}, "one number a slide, not 3"),
    ({"task_type": "survival", "loss": "cox", "nll_alpha": 0.5, "n_outputs": 1}, "nll_alpha goes"),
    ({"task_type": "survival", "nll_alpha": 1.0}, "nll_alpha is 1.0"),
    ({"task_type": "survival", "bin_edges": (0, 1)}, "2 edges for 3 bins"),
    ({"task_type": "regression", "target_mean": (0, 0, 0)}, "3 means and 0 deviations"),
    ({"task_type": "regression", "target_mean": (0, 0, 0), "target_std": (1, 0, 1)}, "above 0")])
def test_what_an_objective_cannot_use_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        build_objective(**{"n_outputs": 3, **values})
