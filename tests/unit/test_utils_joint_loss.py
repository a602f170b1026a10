"""Cox: two passes of one bag at a time give the gradient of one big graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import COX, BagList, ToyModel, make_task_bag
from utils.contracts import Bag, SlideOutput
from utils.engine import FitFailed, FitOptions, FitResult, fit, predict
from utils.errors import Refused
from utils.seeding import derive_seed, epoch_order, seed_everything
from utils.survival import cox_loss

CPU = torch.device("cpu")
TRAIN = BagList([make_task_bag(index, "survival") for index in range(12)])
VAL = BagList([make_task_bag(index, "survival") for index in range(12, 24)])


class Normed(ToyModel):
    """With dropout, and running statistics that each bag must move once."""

    def __init__(self) -> None:
        super().__init__(objective=COX, dropout=0.4)
        self.norm = torch.nn.BatchNorm1d(16)

    def forward(self, bag: Bag) -> SlideOutput:
        return super().forward(replace(bag, features=self.norm(bag.features)))


def train(folder: Path, model: torch.nn.Module, *, train: Sequence[Bag] = TRAIN,
          val: Sequence[Bag] = VAL, **options: Any) -> FitResult:
    folder.mkdir(exist_ok=True)
    return fit(model, train, val, folder=folder, checkpoint=folder / "best.pt", device=CPU,
               options=FitOptions(**{"max_epochs": 1, "lr": 0.01, "accumulate": 4, **options}))


def cox(logits: torch.Tensor, bags: Sequence[Bag]) -> torch.Tensor:
    truths = torch.tensor([bag.target for bag in bags])
    return cox_loss(logits[:, 0], truths[:, 0], truths[:, 1])


def test_it_equals_one_graph_of_all_bags(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, theirs = Normed(), Normed()
    theirs.load_state_dict(ours.state_dict())
    result = train(tmp_path, ours, opt="sgd", reg=0)
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9)
    seed_everything(derive_seed(1, 0, 0))
    order = epoch_order(len(TRAIN), seed=1, epoch=0)
    for start in (0, 4, 8):  # three steps
        part = [TRAIN[index] for index in order[start:start + 4]]
        optimiser.zero_grad()
        cox(torch.cat([theirs(bag).logits for bag in part]), part).backward()
        assert theirs.head.weight.grad is not None
        assert theirs.head.weight.grad.any()
        optimiser.step()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()),
                               rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # validation: one loss over the whole set
        expected = cox(torch.cat([theirs.eval()(bag).logits for bag in VAL]), VAL.bags)
    assert result.best_val_loss == pytest.approx(float(expected), rel=1e-5)


def test_one_graph_is_alive_at_a_time(tmp_path: Path) -> None:
    events: list[str] = []

    class Watched(ToyModel):
        def forward(self, bag: Bag) -> SlideOutput:
            output = super().forward(bag)
            if output.logits.requires_grad:
                events.append("graph")
                output.logits.register_hook(lambda gradient: events.append("backward"))
            return output

    train(tmp_path, Watched(objective=COX), val=[])
    assert events == ["graph", "backward"] * len(TRAIN)


def test_it_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ToyModel(objective=COX)
    train(tmp_path, model, max_epochs=20, lr=0.05, early_stopping=True, monitor="metric", ema=0.5)
    assert predict(model, VAL, device=CPU).metrics(COX).headline()["c_index"] > 0.85


def test_steps_without_an_event_are_left_out(tmp_path: Path) -> None:
    censored = [replace(bag, target=(bag.target[0], 0.0)) for bag in TRAIN.bags if bag.target]
    model = ToyModel(objective=COX)
    before = model.head.weight.detach().clone()
    train(tmp_path, model, train=censored, reg=1.0)
    assert torch.equal(model.head.weight, before)  # not even decayed


def test_validation_without_an_event_fails_the_fold(tmp_path: Path) -> None:
    censored = [replace(bag, target=(bag.target[0], 0.0)) for bag in VAL.bags if bag.target]
    with pytest.raises(FitFailed, match="Cox needs validation slides with an event"):
        train(tmp_path, ToyModel(objective=COX), val=censored, early_stopping=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_needs_several_slides_a_step(tmp_path: Path, accumulate: int) -> None:
    model = ToyModel(objective=COX)
    if accumulate > 1:
        train(tmp_path, model, accumulate=accumulate)
        return
    with pytest.raises(Refused, match="Cox compares the slides of a step: give --accumulate 16"):
        train(tmp_path, model, accumulate=accumulate)


def test_bags_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    class Greedy(ToyModel):
        def forward(self, bag: Bag) -> SlideOutput:
            if bag.slide_id == "slide_05" or (bag.slide_id == "slide_06" and torch.is_grad_enabled()
                                              and self.training):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(bag)

    bags = BagList([replace(bag, target=None) if bag.slide_id == "slide_07" else bag
                    for bag in TRAIN.bags], broken=["slide_04"])
    model = Greedy(objective=COX)
    result = train(tmp_path, model, train=bags, max_epochs=2)
    assert [row.item for row in result.failures] == ["slide_04", "slide_05", "slide_06", "slide_07"]
    assert "no truth" in result.failures[3].reason
    assert model.head.weight.isfinite().all()


def test_a_nan_names_its_slide(tmp_path: Path) -> None:
    bags = [replace(bag, features=bag.features * torch.nan) if bag.slide_id == "slide_03" else bag
            for bag in TRAIN.bags]
    with pytest.raises(FitFailed, match="not finite in epoch 0, first at slide slide_03"):
        train(tmp_path, ToyModel(objective=COX), train=bags)


def test_a_resumed_run_has_equal_bits(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Stopping(ToyModel):
        calls = 0

        def forward(self, bag: Bag) -> SlideOutput:
            self.calls += self.training
            if self.calls > 54:  # in the third epoch
                raise Stop
            return super().forward(bag)

    found = []
    for name, first in (("broken", Stopping), ("whole", None)):
        options: dict[str, Any] = {"max_epochs": 4, "ema": 0.8, "schedule": "step"}
        if first is not None:
            torch.manual_seed(0)
            with pytest.raises(Stop):
                train(tmp_path / name, first(objective=COX), **options)
        torch.manual_seed(0)
        found.append(ToyModel(objective=COX))
        train(tmp_path / name, found[-1], **options)
    assert torch.equal(found[0].head.weight, found[1].head.weight)
