"""The loop on toy models: what is stepped, when, what is kept, what is said when it goes wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training import OBJECTIVES, WIDTH, BagList, ToyModel, make_bag, make_task_bag
from tests.unit.test_utils_tracking import read_scalars
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.engine import FitFailed, FitOptions, FitResult, Predictions, fit, predict
from utils.errors import BrokenFile, Refused
from utils.fit_options import check_fit
from utils.objectives import TaskType
from utils.report import Status
from utils.seeding import epoch_order
from utils.step_gradients import why_unusable
from utils.tracking import TensorBoardTracker
from utils.training_state import load_state

CPU = torch.device("cpu")
TRAIN = BagList([make_bag(index) for index in range(10)])
VAL = BagList([make_bag(index) for index in range(10, 16)])


def train(tmp_path: Path, model: torch.nn.Module | None = None, *, train: Sequence[Bag] = TRAIN,
          val: Sequence[Bag] = VAL, tracker: Any = None, **options: Any
          ) -> tuple[torch.nn.Module, FitResult]:
    if model is None:
        torch.manual_seed(0)
        model = ToyModel()
    tmp_path.mkdir(exist_ok=True)
    result = fit(model, train, val, folder=tmp_path, checkpoint=tmp_path / "best.pt", device=CPU,
                 options=FitOptions(**{"max_epochs": 3, "lr": 0.01, **options}), tracker=tracker,
                 train_labels=train.labels if isinstance(train, BagList)
                 else [bag.label or 0 for bag in train])
    return model, result


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


# ---------------------------------------------------------------------------- the step

@pytest.mark.parametrize(("opt", "build"), [
    ("adam", lambda w: torch.optim.Adam(w, lr=0.01, weight_decay=0.1)),
    ("adamw", lambda w: torch.optim.AdamW([  # decays the matrix, not the bias
        {"params": [one for one in w if one.ndim == 2], "weight_decay": 0.1},
        {"params": [one for one in w if one.ndim == 1], "weight_decay": 0.0}], lr=0.01)),
    ("sgd", lambda w: torch.optim.SGD(w, lr=0.01, weight_decay=0.1, momentum=0.9))])
def test_every_loss_is_backpropagated_and_each_bag_is_one_step(
    tmp_path: Path, opt: str, build: Any
) -> None:
    torch.manual_seed(0)
    ours, theirs = ToyModel(dropout=0), ToyModel(dropout=0)
    theirs.load_state_dict(ours.state_dict())
    train(tmp_path, ours, opt=opt, reg=0.1, max_epochs=2)
    optimiser = build(list(theirs.parameters()))
    for epoch in range(2):
        for index in epoch_order(len(TRAIN), seed=1, epoch=epoch):
            optimiser.zero_grad()
            sum(loss.value for loss in theirs.losses(TRAIN[index])).backward()  # type: ignore[union-attr]
            optimiser.step()
    torch.testing.assert_close(weights(ours), weights(theirs))
    assert torch.equal(ours.unused, torch.ones(3))  # no gradient: not even decayed


def test_one_graph_is_alive_at_a_time(tmp_path: Path) -> None:
    """A loss is back-propagated before the model computes the next one."""
    events: list[str] = []

    class Watched(ToyModel):
        def losses(self, bag: Bag) -> Iterator[StepLoss]:
            for loss in super().losses(bag):
                events.append("forward")
                loss.value.register_hook(lambda grad: events.append("backward"))
                yield loss

    train(tmp_path, Watched(), train=TRAIN.bags[:2], val=[], max_epochs=1)
    assert events == ["forward", "backward"] * 4


def test_a_model_may_do_its_own_backward(tmp_path: Path) -> None:
    class Inside(ToyModel):
        def losses(self, bag: Bag) -> Iterator[StepLoss]:
            for loss in super().losses(bag):
                if torch.is_grad_enabled():
                    loss.value.backward()
                yield StepLoss(value=loss.value.detach(), slide_loss=loss.slide_loss,
                               output=loss.output)

    torch.manual_seed(0)
    inside = Inside()
    outside = ToyModel()
    outside.load_state_dict(inside.state_dict())
    train(tmp_path / "inside", inside)
    train(tmp_path / "outside", outside)
    assert torch.equal(weights(inside), weights(outside))


def test_accumulation_steps_with_the_mean_gradient(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, theirs = ToyModel(dropout=0), ToyModel(dropout=0)
    theirs.load_state_dict(ours.state_dict())
    train(tmp_path, ours, opt="sgd", reg=0, accumulate=4, max_epochs=1)
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9)
    order = epoch_order(len(TRAIN), seed=1, epoch=0)
    for start in (0, 4, 8):  # the last step has two bags
        part = order[start:start + 4]
        optimiser.zero_grad()
        for index in part:
            sum(loss.value / len(part) for loss in theirs.losses(TRAIN[index])).backward()  # type: ignore[union-attr]
        optimiser.step()
    torch.testing.assert_close(weights(ours), weights(theirs))


def test_gradient_clipping_bounds_the_step(tmp_path: Path) -> None:
    def moved(clip: float | None) -> float:
        torch.manual_seed(0)
        model = ToyModel(dropout=0)
        before = weights(model)
        train(tmp_path / str(clip), model, train=TRAIN.bags[:1], opt="sgd", lr=1.0, reg=0,
              clip_grad=clip, max_epochs=1)
        return float((weights(model) - before).norm())

    assert moved(None) > 0.1
    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip_grad", [None, 0.05])
def test_clipping_acts_on_what_the_scaler_gives_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_grad: float | None
) -> None:
    """fp16 needs a GPU, its scaler does not: scaled, unscaled and clipped is clipped."""
    options: dict[str, Any] = {"opt": "sgd", "reg": 0, "clip_grad": clip_grad, "accumulate": 2}
    torch.manual_seed(0)
    plain, _ = train(tmp_path / "plain", ToyModel(dropout=0), **options)
    unscaled: list[float] = []

    class Scaler(torch.amp.GradScaler):
        def __init__(self, device: str, *, enabled: bool) -> None:
            super().__init__("cpu", init_scale=1024.0)

        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            super().unscale_(optimizer)
            unscaled.append(self.get_scale())

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    torch.manual_seed(0)
    scaled, _ = train(tmp_path / "scaled", ToyModel(dropout=0), **options)
    assert unscaled == [1024.0] * 15
    torch.testing.assert_close(weights(scaled), weights(plain))


@pytest.mark.parametrize("step_per_loss", [False, True])
def test_a_step_after_each_loss_on_request(tmp_path: Path, *, step_per_loss: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = ToyModel(dropout=0), ToyModel(dropout=0)
    theirs.load_state_dict(ours.state_dict())
    train(tmp_path, ours, step_per_loss=step_per_loss, opt="sgd", reg=0, max_epochs=1)
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9)
    for index in epoch_order(len(TRAIN), seed=1, epoch=0):
        optimiser.zero_grad(set_to_none=not step_per_loss)
        for loss in theirs.losses(TRAIN[index]):
            loss.value.backward()
            if step_per_loss:
                optimiser.step()
                optimiser.zero_grad(set_to_none=False)
        if not step_per_loss:
            optimiser.step()
    torch.testing.assert_close(weights(ours), weights(theirs))


@pytest.mark.parametrize(("options", "processes", "message"), [
    ({"step_per_loss": True, "accumulate": 2}, 1, "--step_per_loss.*--accumulate 2"),
    ({"step_per_loss": True}, 2, "--step_per_loss goes with one process"),
    ({"schedule": "cosine", "lr": 1e-8}, 1, "--min_lr 1e-07 is above --lr 1e-08"),
    ({"warmup_epochs": 2, "warmup_lr": 0.1}, 1, "--warmup_lr 0.1 is above --lr 0.0001")])
def test_options_that_contradict_are_refused(options: dict[str, Any], processes: int,
                                             message: str) -> None:
    with pytest.raises(Refused, match=message):
        check_fit(FitOptions(**options), ToyModel(), processes=processes)
    check_fit(FitOptions(), ToyModel(), processes=processes)


def test_fit_checks_its_options(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--step_per_loss"):
        train(tmp_path, step_per_loss=True, accumulate=2)


def test_bf16_runs_the_forward_pass_only(tmp_path: Path) -> None:
    seen = []

    class Watched(ToyModel):
        def forward(self, bag: Bag) -> SlideOutput:
            output = super().forward(bag)
            seen.append(output.logits.dtype)
            return output

    model, _ = train(tmp_path, Watched(), precision="bf16", max_epochs=1)
    assert set(seen) == {torch.bfloat16}
    assert weights(model).dtype is torch.float32
    answers = predict(model, VAL, device=CPU, precision="bf16")
    assert answers.probabilities.dtype == np.float32


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="fp16 needs CUDA"):
        train(tmp_path, precision="fp16")


def test_weighted_sampling_balances(tmp_path: Path) -> None:
    uneven = [make_bag(index) for index in (0, 2, 4, 6, 8, 10, 12, 1)]
    seen: list[int] = []

    class Counting(ToyModel):
        def losses(self, bag: Bag) -> Iterator[StepLoss]:
            if torch.is_grad_enabled():
                seen.append(bag.label or 0)
            return super().losses(bag)

    train(tmp_path, Counting(), train=uneven, val=[], weighted_sample=True, max_epochs=50)
    assert len(seen) == 400
    assert 0.4 < np.mean(seen) < 0.6


# ---------------------------------------------------------------------------- epochs

def test_early_stopping_keeps_the_best_epoch_and_loads_it(tmp_path: Path) -> None:
    """Validation losses are scripted: 3, 1, 2, nan, 2, 2 ..."""
    script = [3.0, 1.0, 2.0, math.nan] + [2.0] * 20
    kept: list[torch.Tensor] = []

    class Scripted(ToyModel):
        def losses(self, bag: Bag) -> Iterator[StepLoss]:
            for loss in super().losses(bag):
                if not torch.is_grad_enabled():
                    epoch = len(kept) // len(VAL)
                    loss.slide_loss = torch.tensor(script[epoch])
                    if loss.parts["share"] > 0.5:
                        kept.append(weights(self).clone())
                yield loss

    model, result = train(tmp_path, Scripted(), early_stopping=True, patience=3, stop_epoch=1,
                          max_epochs=24)
    assert (result.best_epoch, result.best_val_loss, result.epochs) == (1, 1.0, 5)
    assert torch.equal(weights(model), kept[len(VAL)])  # weights of epoch 1
    assert torch.equal(torch.load(tmp_path / "best.pt", weights_only=True)["head.weight"],
                       model.head.weight)


def test_the_metric_is_watched_on_request(tmp_path: Path) -> None:
    """The validation AUC is scripted by the logits; the loss says otherwise."""
    flipped = [-1, 1, 1, -1]  # AUC 0, 1, 1, 0
    losses = [1.0, 3.0, 2.0, 0.5]
    seen = [0]

    class Scripted(ToyModel):
        def losses(self, bag: Bag) -> Iterator[StepLoss]:
            epoch = seen[0] // len(VAL)
            for loss in super().losses(bag):
                if not torch.is_grad_enabled() and loss.output is not None:
                    sign = flipped[epoch] * (2.0 * (bag.label or 0) - 1)
                    loss.output.logits = torch.tensor([[0.0, sign]])
                    loss.slide_loss = torch.tensor(losses[epoch])
                yield loss
            seen[0] += not torch.is_grad_enabled()

    _, result = train(tmp_path / "metric", Scripted(), early_stopping=True, monitor="metric",
                      max_epochs=4)
    assert (result.best_epoch, result.best_val_loss) == (2, 2.0)  # of equal AUCs the lower loss
    seen[0] = 0
    _, result = train(tmp_path / "loss", Scripted(), early_stopping=True, max_epochs=4)
    assert result.best_epoch == 3


def test_a_metric_that_the_split_does_not_define_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(FitFailed, match="do not define auc.*--monitor loss"):
        train(tmp_path, early_stopping=True, monitor="metric",
              val=[make_bag(index) for index in (10, 12)])


def test_without_early_stopping_the_last_epoch_is_kept(tmp_path: Path) -> None:
    model, result = train(tmp_path, max_epochs=4)
    assert result.epochs == 4
    stored = torch.load(tmp_path / "best.pt", weights_only=True)
    assert torch.equal(stored["head.weight"], model.head.weight)


def test_a_validation_loss_that_is_never_finite_fails(tmp_path: Path) -> None:
    class Blind(ToyModel):
        def losses(self, bag: Bag) -> Iterator[StepLoss]:
            for loss in super().losses(bag):
                if not torch.is_grad_enabled():
                    loss.slide_loss = torch.tensor(math.nan)
                yield loss

    with pytest.raises(FitFailed, match="validation loss was never finite"):
        train(tmp_path, Blind(), early_stopping=True)


def test_early_stopping_without_validation_slides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="needs validation slides"):
        train(tmp_path, val=[], early_stopping=True)


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_a_resumed_run_has_equal_bits(tmp_path: Path, stop_after: int) -> None:
    class Stop(Exception):
        pass

    class Interrupted(ToyModel):
        calls = 0

        def losses(self, bag: Bag) -> Iterator[StepLoss]:
            if torch.is_grad_enabled():
                self.calls += 1
                if self.calls > stop_after * len(TRAIN) + 3:
                    raise Stop
            return super().losses(bag)

    options: dict[str, Any] = {
        "max_epochs": 6, "early_stopping": True, "weighted_sample": True, "ema": 0.8,
        "schedule": "cosine", "warmup_epochs": 2, "monitor": "metric", "opt": "adamw"}
    unbroken, expected = train(tmp_path / "a", **options)
    torch.manual_seed(0)
    with pytest.raises(Stop):
        train(tmp_path / "b", Interrupted(), **options)
    torch.manual_seed(99)  # whatever the process did before plays no part
    resumed, result = train(tmp_path / "b", ToyModel(), **options)
    assert torch.equal(weights(resumed), weights(unbroken))
    assert result == expected


def test_resuming_with_other_options_is_refused(tmp_path: Path) -> None:
    train(tmp_path, max_epochs=1)
    with pytest.raises(Refused, match="lr: file has 0.01, you ask 0.02"):
        train(tmp_path, max_epochs=1, lr=0.02)


# ---------------------------------------------------------------------------- what goes wrong

class Diverging(ToyModel):
    """Its loss becomes NaN at the n-th training bag."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0
        self.culprit = ""

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        if torch.is_grad_enabled():
            self.calls += 1
        for loss in super().losses(bag):
            if self.calls == self.at and torch.is_grad_enabled():
                self.culprit = bag.slide_id
                loss.value = loss.value * math.nan
            yield loss


@pytest.mark.parametrize("early_stopping", [True, False])
def test_a_nan_loss_names_the_slide_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, early_stopping: bool
) -> None:
    good, _ = train(tmp_path / "good", early_stopping=early_stopping, max_epochs=2)
    torch.manual_seed(0)
    model = Diverging(at=2 * len(TRAIN) + 5)
    with pytest.raises(FitFailed, match="not finite in epoch 2, first at slide") as error:
        train(tmp_path / "bad", model, early_stopping=early_stopping, max_epochs=9)
    assert f"first at slide {model.culprit} (after slide_" in str(error.value)
    assert "--lr" in str(error.value)
    kept = torch.load(tmp_path / "bad" / "best.pt", weights_only=True)
    assert torch.equal(kept["head.weight"], good.head.weight)
    state = load_state(tmp_path / "bad")
    assert state is not None
    assert state.next_epoch == 2


def test_a_nan_loss_in_the_first_epoch_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FitFailed):
        train(tmp_path, Diverging(at=1))
    assert not (tmp_path / "best.pt").exists()


def test_an_infinite_gradient_in_the_last_step_is_found(tmp_path: Path) -> None:
    class Exploding(ToyModel):
        calls = 0

        def losses(self, bag: Bag) -> Iterator[StepLoss]:
            self.calls += torch.is_grad_enabled()
            for loss in super().losses(bag):
                if self.calls == len(TRAIN) and loss.value.requires_grad:
                    loss.value.register_hook(lambda grad: grad * math.inf)
                yield loss

    with pytest.raises(FitFailed, match="weights are not finite after epoch 0"):
        train(tmp_path, Exploding())


def test_a_broken_bag_is_left_out_and_listed(tmp_path: Path) -> None:
    broken = BagList(TRAIN.bags, broken=["slide_04"])
    model, result = train(tmp_path, train=broken, val=BagList(VAL.bags, broken=["slide_11"]))
    assert [(row.item, row.status, row.reason) for row in result.failures] == [
        ("slide_04", Status.FAILED, "slide_04 is damaged"),
        ("slide_11", Status.FAILED, "slide_11 is damaged")]
    assert torch.isfinite(weights(model)).all()


def test_no_usable_bag_at_all_fails(tmp_path: Path) -> None:
    with pytest.raises(FitFailed, match="slide_0. is damaged"):
        train(tmp_path, train=BagList(TRAIN.bags, broken=TRAIN.slide_ids))


@pytest.mark.parametrize("error", [BrokenFile, OSError])
def test_a_bag_that_fails_within_the_model_costs_only_itself(
    tmp_path: Path, error: type[Exception]
) -> None:
    """As the finer levels of a hierarchy, which are read when the model asks for them."""
    class Reading(ToyModel):
        def forward(self, bag: Bag) -> SlideOutput:
            if bag.slide_id in ("slide_04", "slide_11"):
                raise error(f"{bag.slide_id}: level 1 is damaged")
            return super().forward(bag)

    torch.manual_seed(0)
    model, result = train(tmp_path / "a", Reading(), opt="sgd")
    assert [(row.item, row.reason) for row in result.failures] == [
        ("slide_04", "slide_04: level 1 is damaged"), ("slide_11", "slide_11: level 1 is damaged")]
    torch.manual_seed(0)
    expected, _ = train(tmp_path / "b", ToyModel(), opt="sgd",
                        train=BagList(TRAIN.bags, broken=["slide_04"]))
    assert torch.equal(weights(model), weights(expected))
    assert [row.item for row in predict(model, VAL, device=CPU).failures] == ["slide_11"]


def test_a_large_hierarchy_is_told_of_t_patch() -> None:
    bag, error = make_bag(3), torch.OutOfMemoryError("CUDA out of memory")
    assert "--t_patch" not in why_unusable(bag, error)
    children: Any = (object(),)
    assert "a lower --t_patch" in why_unusable(replace(bag, children=children), error)


class Greedy(ToyModel):
    """Runs out of GPU memory on one slide, after its first loss was back-propagated."""

    def forward(self, bag: Bag) -> SlideOutput:
        if bag.slide_id in ("slide_04", "slide_11"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(bag)

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        if bag.slide_id in ("slide_04", "slide_11"):
            value = self.head.weight.sum() * 1e6
            yield StepLoss(value=value, slide_loss=value.detach())
        yield from super().losses(bag)


def test_a_bag_too_large_for_the_gpu_costs_only_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, result = train(tmp_path / "a", Greedy(), opt="sgd")
    assert [row.item for row in result.failures] == ["slide_04", "slide_11"]
    assert "do not fit in the memory of the GPU" in result.failures[0].reason
    torch.manual_seed(0)
    expected, _ = train(tmp_path / "b", ToyModel(), opt="sgd",
                        train=BagList(TRAIN.bags, broken=["slide_04"]))
    assert torch.equal(weights(model), weights(expected))  # its half gradient was dropped
    answers = predict(model, VAL, device=CPU)
    assert [row.item for row in answers.failures] == ["slide_11"]
    assert len(answers.slide_ids) == len(VAL) - 1


# ---------------------------------------------------------------------------- what comes out

def test_predict_gives_rows_in_order_and_lists_failures() -> None:
    torch.manual_seed(0)
    model = ToyModel()
    unlabelled = copy.copy(make_bag(20))
    object.__setattr__(unlabelled, "label", None)
    bags = BagList([*VAL.bags, unlabelled], broken=["slide_12"])
    answers = predict(model, bags, device=CPU)
    assert answers.slide_ids == [bag.slide_id for bag in bags.bags if bag.slide_id != "slide_12"]
    assert answers.labels.tolist() == [0, 1, 1, 0, 1, -1]
    assert answers.probabilities.shape == (6, 2)
    assert answers.probabilities.dtype == np.float32
    np.testing.assert_allclose(answers.probabilities.sum(axis=1), 1, rtol=1e-6)
    assert [(row.item, row.reason) for row in answers.failures] == [
        ("slide_12", "slide_12 is damaged")]
    again = predict(model, bags, device=CPU)  # dropout is off
    np.testing.assert_array_equal(answers.probabilities, again.probabilities)


def test_predictions_of_nothing_have_undefined_metrics() -> None:
    for objective in OBJECTIVES.values():
        metrics = predict(ToyModel(objective=objective), [], device=CPU).metrics(objective)
        assert math.isnan(next(iter(metrics.headline().values())))
        assert metrics.n == 0


@pytest.mark.parametrize(("task_type", "n_scores"), [
    ("multilabel", 2), ("regression", 2), ("survival", 4)])
def test_every_task_learns_and_is_answered(
    tmp_path: Path, task_type: TaskType, n_scores: int, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = OBJECTIVES[task_type]
    bags = [make_task_bag(index, task_type) for index in range(30)]
    torch.manual_seed(0)
    model = ToyModel(objective=objective)
    before = predict(model, bags, device=CPU).metrics(objective).headline()
    tracker = TensorBoardTracker(tmp_path)
    fit(model, bags[:20], bags[20:], folder=tmp_path, checkpoint=tmp_path / "best.pt", device=CPU,
        options=FitOptions(max_epochs=15, lr=0.05, early_stopping=True, monitor="metric"),
        tracker=tracker)
    tracker.close()
    answers = predict(model, [*bags, replace(bags[0], slide_id="unknown", target=None)], device=CPU)
    assert answers.scores.shape == (31, n_scores)
    assert answers.scores.dtype == np.float32
    np.testing.assert_array_equal(answers.truths[:30], [bag.target for bag in bags])
    assert np.isnan(answers.truths[30]).all()
    assert answers.metrics(objective).n == 30  # the unknown is left out
    name, value = next(iter(answers.metrics(objective).headline().items()))
    assert value > max(before[name], 0.5 if name == "r2" else 0.7)
    assert f"val/{name}" in read_scalars(tmp_path)
    assert f" {name} 0." in capsys.readouterr().out


def test_labels_are_those_of_a_classification() -> None:
    answers = Predictions(["a", "b"], np.array([[2.0], [np.nan]]), np.zeros((2, 3), np.float32), [])
    assert answers.labels.tolist() == [2, -1]
    assert answers.probabilities is answers.scores
    assert Predictions([], np.zeros((0, 1)), np.zeros((0, 2)), []).labels.shape == (0,)


def test_tags_are_those_of_clam(tmp_path: Path) -> None:
    class Clustering(ToyModel):
        def losses(self, bag: Bag) -> Iterator[StepLoss]:
            for loss in super().losses(bag):
                loss.parts = {"instance_loss": loss.slide_loss}
                loss.targets = torch.tensor([1, 1, 0, 0])
                loss.predictions = torch.tensor([1, 0, 0, 0])
                yield loss

    tracker = TensorBoardTracker(tmp_path)
    train(tmp_path, Clustering(), tracker=tracker, max_epochs=2)
    tracker.close()
    found = read_scalars(tmp_path)
    assert set(found) == {
        "train/loss", "train/error", "train/class_0_acc", "train/class_1_acc",
        "train/clustering_loss", "val/loss", "val/error", "val/auc", "val/inst_loss",
        "val/class_0_acc", "val/class_1_acc"}
    assert [step for step, _ in found["val/auc"]] == [0, 1]


def test_the_epoch_line_has_losses_and_clustering(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, max_epochs=1)
    line = capsys.readouterr().out
    assert "epoch 0: train loss 0." in line
    assert "val loss 0." in line
    assert "auc" in line


def test_single_class_validation_does_not_crash(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    train(tmp_path, val=[make_bag(index) for index in (10, 12)], tracker=tracker, max_epochs=1)
    tracker.close()
    assert "val/auc" not in read_scalars(tmp_path)
    assert "val/loss" in read_scalars(tmp_path)


def test_small_width_is_what_the_toy_expects() -> None:
    assert TRAIN[0].features.shape == (20, WIDTH)
