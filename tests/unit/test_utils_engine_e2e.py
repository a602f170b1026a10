"""Models that encode their bags themselves: groups, what a failing bag costs, which weights count.

On a toy encoder of pixels; the real one: ``tests/faults/test_e2e_resume.py``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training import COX, WIDTH, BagList, ToyModel, make_bag, make_task_bag
from tests.unit.test_utils_tracking import read_scalars
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.engine import FitFailed, FitOptions, FitResult, fit, predict
from utils.errors import ItemFailed, Refused
from utils.fit_options import check_fit
from utils.objectives import Objective
from utils.seeding import epoch_order
from utils.step_gradients import why_unusable
from utils.tracking import TensorBoardTracker
from utils.training_state import load_state

CPU = torch.device("cpu")
SIDE_PX, PATCHES = 4, 6


class Pixels:
    """Patches in memory, in the form of ``utils.contracts.PatchImages``."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def stream(self, most: int) -> Iterator[torch.Tensor]:
        yield from self.images.split(most)


def with_pixels(bag: Bag, seed: int) -> Bag:
    """Patches whose colours tell the label (or the time), the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(100, 156, (PATCHES, SIDE_PX, SIDE_PX, 3), generator=generator)
    strength = bag.label if bag.target is None else bag.target[0] / 20
    images[..., 0] += round(40 * float(strength or 0))
    return replace(bag, features=torch.zeros(PATCHES, 0), coords=None,
                   patches=Pixels(images.to(torch.uint8)))


def pixel_bag(index: int) -> Bag:
    return with_pixels(make_bag(index), index)


class ToyEncoder(nn.Module):
    """A linear encoder of pixels, with a batch norm if asked, before a ``ToyModel``."""

    contextual = False

    def __init__(self, *, batch_size: int = 2, norm: bool = False,
                 objective: Objective | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.encoder = nn.Sequential(nn.Linear(3 * SIDE_PX**2, WIDTH),
                                     nn.BatchNorm1d(WIDTH) if norm else nn.Tanh())
        self.mil = ToyModel(dropout=0, objective=objective)
        self.objective = self.mil.objective
        self.groups: list[int] = []  # sizes of the groups in training
        self.closed = 0

    def features(self, bags: Sequence[Bag]) -> list[torch.Tensor]:
        pixels = [torch.cat(list(bag.patches.stream(4))) for bag in bags if bag.patches is not None]
        flat = torch.cat(pixels).flatten(1).float() / 255
        return list(self.encoder(flat).split([len(bag) for bag in bags]))

    def ready(self, bag: Bag) -> Bag:
        return bag if bag.patches is None else replace(
            bag, features=self.features([bag])[0], patches=None)

    def forward(self, bag: Bag) -> SlideOutput:
        output: SlideOutput = self.mil(self.ready(bag))
        return output

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        return self.mil.losses(self.ready(bag))

    def encode(self, bags: Sequence[Bag]) -> Generator[Bag, None, None]:
        self.groups.append(len(bags))
        if not bags:
            return
        made = self.features(bags)
        leaves = [one.detach().requires_grad_() for one in made]
        try:
            for bag, leaf in zip(bags, leaves, strict=True):
                yield replace(bag, features=leaf, patches=None)
        except GeneratorExit:
            self.closed += 1
            raise
        torch.autograd.backward(made, [leaf.grad for leaf in leaves])


TRAIN = BagList([pixel_bag(index) for index in range(10)])
VAL = BagList([pixel_bag(index) for index in range(10, 16)])
STEP = {"batch_size": 2, "accumulate": 4}


def train(folder: Path, model: nn.Module, *, bags: Sequence[Bag] = TRAIN,
          val: Sequence[Bag] = VAL, tracker: Any = None, **options: Any) -> FitResult:
    folder.mkdir(exist_ok=True)
    return fit(model, bags, val, folder=folder, checkpoint=folder / "best.pt", device=CPU,
               mean_checkpoint=folder / "best_ema.pt" if "both" in str(options.get("test_type"))
               else None, tracker=tracker,
               options=FitOptions(**{"max_epochs": 1, "lr": 0.05, **options}))


def toy(**options: Any) -> ToyEncoder:
    torch.manual_seed(0)
    return ToyEncoder(**options)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def by_hand(model: ToyEncoder, groups: Sequence[Sequence[int]], *, per_step: int = 2,
            lr: float = 0.05) -> ToyEncoder:
    """The plain way: one graph from the pixels of a group to its losses, steps by the mean."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for start in range(0, len(groups), per_step):
        step = groups[start:start + per_step]
        count = sum(map(len, step))
        optimiser.zero_grad()
        for group in step:
            bags = [TRAIN[index] for index in group]
            for bag, features in zip(bags, model.features(bags), strict=True):
                ready = replace(bag, features=features, patches=None)
                loss = sum(one.value for one in model.mil.losses(ready)) / count
                loss.backward(retain_graph=True)  # type: ignore[union-attr]
        optimiser.step()
    return model


# ---------------------------------------------------------------------------- groups

@pytest.mark.parametrize("norm", [False, True])
def test_groups_give_the_gradients_of_one_graph(tmp_path: Path, *, norm: bool) -> None:
    """Ten bags in steps of two groups of two: the last step has one group, and an empty one."""
    ours = toy(batch_size=2, norm=norm)
    train(tmp_path, ours, val=[], opt="sgd", reg=0, accumulate=4)
    order = epoch_order(len(TRAIN), seed=1, epoch=0)
    theirs = by_hand(toy(norm=norm), [order[at:at + 2] for at in range(0, 10, 2)])
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-6)
    assert not torch.allclose(weights(ours), weights(toy(norm=norm)), atol=1e-4)
    assert ours.groups == [2, 2, 2, 2, 2, 0]


def test_losses_may_be_scaled_and_the_gradient_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 needs a GPU, its scaler does not: scaled through losses and encoder, then unscaled."""
    options: dict[str, Any] = {"val": [], "opt": "sgd", "reg": 0, "clip_grad": 0.05,
                               "accumulate": 4}
    plain, scaled, free = toy(), toy(), toy()
    train(tmp_path / "free", free, **{**options, "clip_grad": None})
    train(tmp_path / "plain", plain, **options)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda device, *, enabled: scaler("cpu", init_scale=1024.0))
    train(tmp_path / "scaled", scaled, **options)
    torch.testing.assert_close(weights(scaled), weights(plain))
    assert not torch.allclose(weights(plain.encoder), weights(free.encoder), atol=1e-4)


def test_a_bag_that_cannot_be_read_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    order = epoch_order(len(TRAIN), seed=1, epoch=0)
    missing = f"slide_{order[1]:02}"
    ours = toy()
    result = train(tmp_path, ours, bags=BagList(TRAIN.bags, broken=[missing]), val=[], opt="sgd",
                   reg=0, accumulate=4)
    groups = [[order[0], order[2]], [order[3]], order[4:6], order[6:8], order[8:]]
    theirs = by_hand(toy(), groups)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-6)
    assert ours.groups == [2, 1, 2, 2, 2, 0]
    assert [row.item for row in result.failures] == [missing]


class Failing(ToyEncoder):
    """Fails on a slide, in its loss or in the encoder."""

    slide_id, where = "", "loss"
    error: Exception = ItemFailed("")

    def features(self, bags: Sequence[Bag]) -> list[torch.Tensor]:
        if self.where == "encoder" and self.slide_id in [bag.slide_id for bag in bags]:
            raise self.error
        return super().features(bags)

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        yield from super().losses(bag)
        if self.where == "loss" and bag.slide_id == self.slide_id:
            raise self.error


@pytest.mark.parametrize("where", ["loss", "encoder"])
@pytest.mark.parametrize("error", ["names", "memory", "disk"])
def test_a_failing_bag_costs_its_group_and_what_its_step_had_summed(
    tmp_path: Path, where: str, error: str
) -> None:
    """The second group of the first step fails in its second bag; the others are stepped for."""
    order = epoch_order(len(TRAIN), seed=1, epoch=0)
    fellow, bad = (f"slide_{index:02}" for index in order[2:4])
    torch.manual_seed(0)
    ours = Failing()
    ours.where, ours.slide_id = where, bad
    ours.error = {"names": ItemFailed(f"{bad}: patch 3 is damaged"),
                  "memory": torch.OutOfMemoryError("CUDA out of memory"),
                  "disk": OSError("stale handle")}[error]
    result = train(tmp_path, ours, val=[], opt="sgd", reg=0, accumulate=4)
    theirs = by_hand(toy(), [order[4:6], order[6:8], order[8:]])
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-6)
    assert ours.closed == (1 if where == "loss" else 0)
    named = [bad] if error == "names" else sorted([fellow, bad])
    assert [row.item for row in result.failures] == named
    if error == "memory":
        assert "--enc_grad cached" in result.failures[0].reason


def test_what_helps_against_a_full_memory() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    said = why_unusable(pixel_bag(3), error)
    assert said.startswith(f"slide_03: {PATCHES} patches do not fit")
    for flag in ("--p_batch_size ", "--p_batch_size_v", "--same_psize", "--enc_grad cached"):
        assert flag in said
        assert flag not in why_unusable(make_bag(3), error)


def test_accumulation_must_hold_whole_groups(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--batch_size 3 slides are encoded together, so --accumulate "
                                      "must be a multiple of it, not 4"):
        train(tmp_path, toy(batch_size=3), accumulate=4)


class Resting(ToyEncoder):
    def rest(self, resting: bool) -> None:
        """A model whose encoder can rest."""


PLAIN, ALONE, PAIRS = ToyModel(), Resting(batch_size=1), Resting(batch_size=2, objective=COX)


@pytest.mark.parametrize(("options", "model", "message"), [
    ({"step_per_loss": True}, ALONE, "--step_per_loss would step before"),
    ({"accumulate": 4}, PAIRS, "Cox passes one slide at a time.*--batch_size"),
    ({"freeze_epochs": 1}, PLAIN, "this model has none"),
    ({"freeze_epochs": 3, "max_epochs": 3}, ALONE, "leave none in which"),
    ({"swa": 5, "ema": 0.9}, PLAIN, "two means.*choose one"),
    ({"swa": 5, "max_epochs": 4}, PLAIN, "--swa 5 averages more epochs"),
    ({"swa": 5, "early_stopping": True}, PLAIN, "leaves open which they are"),
    ({"swa": 5, "test_type": "main"}, PLAIN, "leave --ema and --swa out"),
    ({"test_type": "both"}, PLAIN, "--test_type both.*give its decay, --ema"),
    ({"test_type": "ema"}, PLAIN, "--test_type ema.*give its decay, --ema"),
    ({"test_type": "main", "ema": 0.9}, PLAIN, "leave --ema and --swa out")])
def test_options_that_contradict_are_refused(
    options: dict[str, Any], model: nn.Module, message: str
) -> None:
    with pytest.raises(Refused, match=message):
        check_fit(FitOptions(**options), model)


def test_the_encoder_rests_in_the_first_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(ToyEncoder, "rest", lambda self, resting: seen.append(resting),
                        raising=False)
    train(tmp_path, toy(), accumulate=2, max_epochs=4, freeze_epochs=2)
    assert seen == [True, True, False, False]


class Drawn(BagList):
    """Writes down which epochs begin, and when a bag is read."""

    def __init__(self, bags: Sequence[Bag]) -> None:
        super().__init__(bags)
        self.events: list[Any] = []

    def begin_epoch(self, *, seed: int, epoch: int, turns: Mapping[int, Sequence[int]]) -> None:
        self.events.append((seed, epoch, dict(turns)))

    def __getitem__(self, index: Any) -> Any:
        self.events.append("read")
        return with_pixels(super().__getitem__(index), len(self.events))


def test_cox_passes_each_bag_through_encoder_and_model(tmp_path: Path) -> None:
    bags = [with_pixels(make_task_bag(index, "survival"), index) for index in range(8)]
    ours, before = toy(batch_size=1, objective=COX), toy(objective=COX)
    train(tmp_path, ours, bags=bags, val=[], accumulate=4)
    assert ours.groups == []
    assert not torch.equal(weights(ours.encoder), weights(before.encoder))


def test_cox_sees_the_same_draw_of_a_bag_in_both_passes(tmp_path: Path) -> None:
    events = [1, 2, 4, 5, 7, 8]
    bags = Drawn([with_pixels(make_task_bag(index, "survival"), index) for index in events])
    seen: list[tuple[str, float]] = []

    class Watched(ToyEncoder):
        def forward(self, bag: Bag) -> SlideOutput:
            assert isinstance(bag.patches, Pixels)
            seen.append((bag.slide_id, float(bag.patches.images.float().mean())))
            return super().forward(bag)

    train(tmp_path, Watched(batch_size=1, objective=COX), bags=bags, val=[], accumulate=3,
          max_epochs=2)
    assert len(seen) == 24
    assert seen[:3] == seen[3:6]
    assert seen[6:9] == seen[9:12]
    assert len(set(seen)) == 12  # other patches in the second epoch


def test_encoding_and_its_backward_run_under_autocast_the_losses_backward_without(
    tmp_path: Path
) -> None:
    seen = []

    class Watched(ToyEncoder):
        def encode(self, bags: Sequence[Bag]) -> Generator[Bag, None, None]:
            seen.append(torch.is_autocast_enabled("cpu"))
            for bag in super().encode(bags):
                bag.features.register_hook(
                    lambda grad: seen.append(not torch.is_autocast_enabled("cpu")))
                yield bag
            seen.append(torch.is_autocast_enabled("cpu"))

    train(tmp_path, Watched(), bags=TRAIN.bags[:2], val=[], precision="bf16", accumulate=2)
    assert seen == [True] * 6  # two bags of two losses


def test_bags_that_are_drawn_anew_are_told_of_each_epoch(tmp_path: Path) -> None:
    bags = Drawn(TRAIN.bags[:2])
    train(tmp_path, toy(), bags=bags, val=[], max_epochs=2, accumulate=2, seed=7)
    once = {0: [0], 1: [0]}
    assert bags.events == [(7, 0, once), "read", "read", (7, 1, once), "read", "read"]


def test_as_many_bags_are_read_ahead_as_are_encoded_together(tmp_path: Path) -> None:
    """While the first group of four is encoded, four more are being read, not two."""
    started: list[int] = []

    class Counting(BagList):
        def __getitem__(self, index: Any) -> Any:
            started.append(index)
            return super().__getitem__(index)

    class Waiting(ToyEncoder):
        def encode(self, bags: Sequence[Bag]) -> Generator[Bag, None, None]:
            if not self.groups:
                for _ in range(200):
                    if len(started) >= 8:
                        break
                    torch.randn(100_000)  # gives the reading thread time
            return super().encode(bags)

    train(tmp_path, Waiting(batch_size=4), bags=Counting(TRAIN.bags[:8]), val=[], accumulate=4)
    assert len(started) == 8


def test_the_mean_moves_once_a_step(tmp_path: Path) -> None:
    """Five groups make one step, so the mean is one move away from the start."""
    model = toy()
    start = weights(model)
    train(tmp_path, model, val=[], ema=0.75, accumulate=10)
    state = load_state(tmp_path)
    assert state is not None
    names = [name for name, _ in model.named_parameters()]
    after = torch.cat([state.model[name].flatten() for name in names])
    torch.testing.assert_close(weights(model), 0.75 * start + 0.25 * after)


# ---------------------------------------------------------------------------- which weights count

def judged(folder: Path, test_type: str, **options: Any
           ) -> tuple[FitResult, dict[str, list[float]]]:
    """A run whose weights jump about while their mean lags behind; its validation losses."""
    tracker = TensorBoardTracker(folder)
    result = train(folder, toy(), tracker=tracker, max_epochs=6, ema=0.9, opt="sgd",
                   test_type=test_type, **{"early_stopping": True, "accumulate": 2, **options})
    tracker.close()
    found = read_scalars(folder)
    return result, {stage: [value for _, value in found[f"{stage}/loss"]]
                    for stage in ("val", "val_ema")}


def loss_of(checkpoint: Path) -> float:
    """The mean validation loss of the weights in a file."""
    model = toy()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    answers = predict(model, VAL, device=CPU)
    rows = torch.from_numpy(answers.scores)[range(len(VAL)), answers.labels.tolist()]
    return float(-rows.log().mean())


@pytest.mark.parametrize(("test_type", "followed"), [("both", "val"), ("both_ema", "val_ema")])
def test_early_stopping_goes_by_one_and_keeps_both_of_its_best_epoch(
    tmp_path: Path, test_type: str, followed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result, losses = judged(tmp_path, test_type)
    best = losses[followed]
    assert min(range(6), key=lambda epoch: losses["val"][epoch]) != min(
        range(6), key=lambda epoch: losses["val_ema"][epoch])  # or the test shows nothing
    assert result.best_epoch == min(range(6), key=lambda epoch: best[epoch])
    assert result.best_val_loss == pytest.approx(min(best))
    for name, stage in (("best.pt", "val"), ("best_ema.pt", "val_ema")):
        assert loss_of(tmp_path / name) == pytest.approx(losses[stage][result.best_epoch], rel=1e-4)
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"val loss {losses['val'][5]:.4f} error" in line
    assert f"val_ema loss {losses['val_ema'][5]:.4f} error" in line
    assert "val_ema/auc" in read_scalars(tmp_path)


def test_without_early_stopping_both_are_of_the_last_epoch(tmp_path: Path) -> None:
    _, losses = judged(tmp_path, "both", early_stopping=False)
    state = load_state(tmp_path)
    assert state is not None
    for name, kept in (("best.pt", state.model), ("best_ema.pt", state.mean)):
        stored = torch.load(tmp_path / name, weights_only=True)
        torch.testing.assert_close(stored, kept, rtol=0, atol=0)
    assert loss_of(tmp_path / "best_ema.pt") == pytest.approx(losses["val_ema"][-1], rel=1e-4)


def test_the_best_few_epochs_are_kept_of_both(tmp_path: Path) -> None:
    _, losses = judged(tmp_path, "both_ema", save_top_k=2)
    best = sorted(range(6), key=lambda epoch: losses["val_ema"][epoch])[:2]
    assert sorted(path.name for path in tmp_path.glob("best*_epoch_*.pt")) == sorted(
        f"{stem}_epoch_{epoch}.pt" for stem in ("best", "best_ema") for epoch in best)


def test_the_mean_alone_is_the_default_where_there_is_one(tmp_path: Path) -> None:
    found = []
    for test_type in (None, "ema"):
        folder = tmp_path / str(test_type)
        train(folder, toy(), max_epochs=2, ema=0.9, test_type=test_type, accumulate=2)
        found.append(torch.load(folder / "best.pt", weights_only=True))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_resumed_run_has_equal_bits_in_both(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Interrupted(ToyEncoder):
        def encode(self, bags: Sequence[Bag]) -> Generator[Bag, None, None]:
            if len(self.groups) == 13:  # of five an epoch
                raise Stop
            return super().encode(bags)

    options: dict[str, Any] = {"max_epochs": 4, "ema": 0.8, "test_type": "both_ema",
                               "early_stopping": True, "accumulate": 2}
    expected = train(tmp_path / "a", toy(), **options)
    torch.manual_seed(0)
    with pytest.raises(Stop):
        train(tmp_path / "b", Interrupted(), **options)
    assert train(tmp_path / "b", toy(), **options) == expected
    for name in ("best.pt", "best_ema.pt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_after_a_failure_both_are_of_the_last_whole_epoch(tmp_path: Path) -> None:
    class Diverging(ToyEncoder):
        def losses(self, bag: Bag) -> Iterator[StepLoss]:
            for loss in super().losses(bag):
                worse = torch.inf if len(self.groups) > 12 else 0.0
                yield replace(loss, value=loss.value + worse)

    torch.manual_seed(0)
    with pytest.raises(FitFailed):
        train(tmp_path, Diverging(), max_epochs=4, ema=0.8, test_type="both", accumulate=2)
    state = load_state(tmp_path)
    assert state is not None
    assert state.next_epoch == 2
    for name, kept in (("best.pt", state.model), ("best_ema.pt", state.mean)):
        torch.testing.assert_close(torch.load(tmp_path / name, weights_only=True), kept,
                                   rtol=0, atol=0)


def test_two_files_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 checkpoints for 2 models"):
        fit(toy(), TRAIN, VAL, folder=tmp_path, checkpoint=tmp_path / "best.pt", device=CPU,
            options=FitOptions(ema=0.9, test_type="both", accumulate=2))
