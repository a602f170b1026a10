"""The optimiser's groups, the learning rate of each epoch, and the running mean of the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import BagList, ToyModel, make_bag
from tests.unit.test_utils_tracking import read_scalars
from utils.engine import FitOptions, FitResult, fit, predict
from utils.optimisation import MeanModel, build_optimiser, learning_rate, share_of_epoch
from utils.tracking import TensorBoardTracker
from utils.training_loop import TrainingLoop
from utils.training_state import load_state

CPU = torch.device("cpu")
TRAIN = BagList([make_bag(index) for index in range(6)])
VAL = BagList([make_bag(index) for index in range(10, 14)])


class Normed(ToyModel):
    """With running statistics and a step counter, which are buffers."""

    def __init__(self) -> None:
        super().__init__(dropout=0)
        self.norm = torch.nn.BatchNorm1d(16)

    def forward(self, bag: Any) -> Any:
        bag = type(bag)(slide_id=bag.slide_id, features=self.norm(bag.features), label=bag.label)
        return super().forward(bag)


def train(folder: Path, model: torch.nn.Module, **options: Any) -> FitResult:
    folder.mkdir(exist_ok=True)
    return fit(model, TRAIN, VAL, folder=folder, checkpoint=folder / "best.pt", device=CPU,
               options=FitOptions(**{"max_epochs": 3, "lr": 0.05, **options}))


# ---------------------------------------------------------------------------- optimiser

@pytest.mark.parametrize(("opt", "decays"), [
    ("adam", {"weight": 0.1, "bias": 0.1}), ("sgd", {"weight": 0.1, "bias": 0.1}),
    ("adamw", {"weight": 0.1, "bias": 0.0})])
def test_who_is_decayed(opt: Any, decays: dict[str, float]) -> None:
    layer = torch.nn.Linear(3, 2)
    optimiser = build_optimiser(list(layer.parameters()), FitOptions(opt=opt, reg=0.1))
    found = {id(one): group["weight_decay"] for group in optimiser.param_groups
             for one in group["params"]}
    assert {name: found[id(one)] for name, one in layer.named_parameters()} == decays


def test_adamw_of_vectors_alone() -> None:
    optimiser = build_optimiser([torch.nn.Parameter(torch.ones(3))], FitOptions(opt="adamw"))
    assert len(optimiser.param_groups) == 1


# ---------------------------------------------------------------------------- learning rate

def rates(**options: Any) -> list[float]:
    chosen = FitOptions(**{"max_epochs": 8, "lr": 1.0, "min_lr": 0.1, **options})
    return [learning_rate(chosen, epoch) for epoch in range(chosen.max_epochs)]


def test_constant() -> None:
    assert rates() == [1.0] * 8


def test_step_takes_a_fifth_from_half_of_the_epochs_on() -> None:
    assert rates(schedule="step") == [1.0] * 4 + [0.2] * 4
    assert rates(schedule="step", max_epochs=5) == [1.0, 1.0, 1.0, 0.2, 0.2]


def test_cosine_goes_from_lr_to_min_lr() -> None:
    found = rates(schedule="cosine")
    assert found == pytest.approx(
        [0.1 + 0.9 * (1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)])
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.55)
    end = learning_rate(FitOptions(max_epochs=8, lr=1.0, min_lr=0.1, schedule="cosine"), 8)
    assert end == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_warm_up_is_linear_and_then_the_schedule_goes_on(schedule: Any) -> None:
    found = rates(schedule=schedule, warmup_epochs=2, warmup_lr=0.2)
    assert found[:2] == pytest.approx([0.2, 0.6])
    assert found[2:] == rates(schedule=schedule)[2:]


def test_every_epoch_steps_with_its_rate_and_logs_it(tmp_path: Path) -> None:
    """One bag without momentum or decay: the weights move by rate x gradient."""
    used: list[float] = []

    class Watched(ToyModel):
        pass

    def note(loop: TrainingLoop, *args: Any) -> Any:
        used.append(loop.optimiser.param_groups[0]["lr"])
        return step(loop, *args)

    step, options = TrainingLoop._step, {"schedule": "step", "warmup_epochs": 1, "warmup_lr": 0.01}
    tracker = TensorBoardTracker(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_step", note)
        fit(Watched(), TRAIN, [], folder=tmp_path, checkpoint=tmp_path / "best.pt", device=CPU,
            options=FitOptions(max_epochs=4, lr=0.05, **options), tracker=tracker)  # type: ignore[arg-type]
    tracker.close()
    expected = [0.01, 0.05, 0.01, 0.01]
    assert used == pytest.approx([rate for rate in expected for _ in TRAIN])
    logged = read_scalars(tmp_path)["train/lr"]
    assert [value for _, value in logged] == pytest.approx(expected)


# ---------------------------------------------------------------------------- running mean

def test_the_mean_is_the_formula_from_the_initial_weights_on() -> None:
    torch.manual_seed(0)
    model = Normed()
    mean = MeanModel(model)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter))
        model.train()(TRAIN[0])
        mean.update(0.25)
        for name, value in model.state_dict().items():
            expected[name] = (0.75 * expected[name] + 0.25 * value if value.is_floating_point()
                              else value.clone())
    torch.testing.assert_close(dict(mean.model.state_dict()), expected)
    assert expected["norm.num_batches_tracked"] == 3
    assert not any(one.requires_grad for one in mean.model.parameters())


def test_it_follows_optimiser_steps_not_bags(tmp_path: Path) -> None:
    """With one step an epoch, the mean after one epoch is one move away from the start."""
    torch.manual_seed(0)
    model = ToyModel(dropout=0)
    start = model.head.weight.detach().clone()
    train(tmp_path, model, ema=0.75, accumulate=len(TRAIN), max_epochs=1)
    state = load_state(tmp_path)
    assert state is not None
    torch.testing.assert_close(model.head.weight.detach(),
                               0.75 * start + 0.25 * state.model["head.weight"])


@pytest.mark.parametrize("early_stopping", [False, True])
def test_it_is_validated_saved_and_tested(
    tmp_path: Path, early_stopping: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = Normed()
    result = train(tmp_path, model, ema=0.9, early_stopping=early_stopping)
    state = load_state(tmp_path)
    assert state is not None
    stored = torch.load(tmp_path / "best.pt", weights_only=True)
    torch.testing.assert_close(stored, state.mean, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), stored, rtol=0, atol=0)
    assert not torch.equal(stored["head.weight"], state.model["head.weight"])
    answers = predict(model, VAL, device=CPU)
    loss = -math.fsum(math.log(row[label]) for row, label in zip(
        answers.scores.tolist(), answers.labels.tolist(), strict=True)) / len(VAL)
    assert f"val loss {loss:.4f}" in capsys.readouterr().out.splitlines()[-1]
    if early_stopping:
        assert result.best_val_loss == pytest.approx(loss, rel=1e-5)


def test_a_decay_of_zero_is_the_weights_themselves(tmp_path: Path) -> None:
    models = []
    for ema in (None, 0.0):
        torch.manual_seed(0)
        models.append(ToyModel())
        train(tmp_path / str(ema), models[-1], ema=ema)
    assert torch.equal(models[0].head.weight, models[1].head.weight)


# ---------------------------------------------------------------------------- equal mean

EPOCHS = 7


def ends_of_epochs(folder: Path, patch: pytest.MonkeyPatch, **options: Any
                   ) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """The checkpoint of a run, and the weights of the model itself after each of its epochs."""
    ends: list[dict[str, torch.Tensor]] = []

    def note(loop: TrainingLoop, *args: Any) -> None:
        ends.append({name: value.clone() for name, value in loop.model.state_dict().items()})
        finish(loop, *args)

    finish = TrainingLoop.finish_epoch
    patch.setattr(TrainingLoop, "finish_epoch", note)
    torch.manual_seed(0)
    train(folder, Normed(), **{"max_epochs": EPOCHS, **options})
    patch.setattr(TrainingLoop, "finish_epoch", finish)
    return torch.load(folder / "best.pt", weights_only=True), ends


def test_shares_of_epochs_make_an_equal_mean() -> None:
    found = [share_of_epoch(3, epoch=epoch, max_epochs=EPOCHS) for epoch in range(EPOCHS)]
    assert found == pytest.approx([1, 1, 1, 1, 1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("count", [1, 5, EPOCHS])
def test_as_many_epochs_are_averaged_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Not one fewer, as published (spec streaming.md, defect 14); counters are not averaged."""
    stored, ends = ends_of_epochs(tmp_path, monkeypatch, swa=count)
    assert len(ends) == EPOCHS

    def mean_of_last(number: int, name: str) -> torch.Tensor:
        return torch.stack([one[name].double() for one in ends[-number:]]).mean(dim=0)

    for name in ("head.weight", "norm.running_mean"):
        torch.testing.assert_close(stored[name].double(), mean_of_last(count, name),
                                   rtol=0, atol=1e-6)
        for wrong in {count - 1, count + 1} & set(range(1, EPOCHS + 1)):
            assert not torch.allclose(stored[name].double(), mean_of_last(wrong, name), atol=1e-4)
    assert stored["norm.num_batches_tracked"] == 2 * EPOCHS * len(TRAIN)  # two losses a bag


def test_the_equal_mean_leaves_the_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ends = ends_of_epochs(tmp_path / "swa", monkeypatch, swa=3)
    _, plain = ends_of_epochs(tmp_path / "plain", monkeypatch)
    torch.testing.assert_close(ends, plain, rtol=0, atol=0)


def test_the_equal_mean_is_validated_from_its_first_epoch_on(tmp_path: Path) -> None:
    """Both are validated and kept; before the first averaged epoch they are one."""
    tracker = TensorBoardTracker(tmp_path)
    torch.manual_seed(0)
    fit(Normed(), TRAIN, VAL, folder=tmp_path, checkpoint=tmp_path / "best.pt", device=CPU,
        mean_checkpoint=tmp_path / "best_ema.pt", tracker=tracker,
        options=FitOptions(max_epochs=EPOCHS, lr=0.05, swa=3, test_type="both"))
    tracker.close()
    found = read_scalars(tmp_path)
    own, mean = ([value for _, value in found[f"{stage}/loss"]] for stage in ("val", "val_ema"))
    assert own[:5] == mean[:5]
    assert own[5] != mean[5] and own[6] != mean[6]
    kept = [torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "best_ema.pt")]
    state = load_state(tmp_path)
    assert state is not None
    torch.testing.assert_close(kept, [state.model, state.mean], rtol=0, atol=0)
    assert not torch.equal(kept[0]["head.weight"], kept[1]["head.weight"])


@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_killed_run_goes_on_to_the_same_equal_mean(tmp_path: Path, stop_at: int) -> None:
    """Stopped before the averaged epochs, and between the first and the second of them."""

    class Stop(Exception):
        pass

    class Interrupted(Normed):
        left = stop_at * len(TRAIN) + 2

        def losses(self, bag: Any) -> Any:
            if self.training:
                self.left -= 1
                if self.left < 0:
                    raise Stop
            return super().losses(bag)

    options: dict[str, Any] = {"max_epochs": EPOCHS, "swa": 3}
    torch.manual_seed(0)
    train(tmp_path / "a", Normed(), **options)
    torch.manual_seed(0)
    with pytest.raises(Stop):
        train(tmp_path / "b", Interrupted(), **options)
    train(tmp_path / "b", Normed(), **options)
    assert (tmp_path / "a" / "best.pt").read_bytes() == (tmp_path / "b" / "best.pt").read_bytes()
