"""Streaming models in the one engine: what is stepped, shared, rested and averaged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from models.streaming_cnn import StreamingCNN
from tests.streaming import DrawnImages, TensorImage, image_bag
from tests.streaming_network import ordinary_logits, tiny_network
from tests.unit.test_utils_distributed import torchrun
from utils.contracts import Bag, SlideOutput
from utils.distributed import ALONE, Group
from utils.engine import FitOptions, FitResult, fit, predict
from utils.seeding import epoch_order
from utils.training_loop import TrainingLoop

CPU = torch.device("cpu")
EXACT = {"rtol": 0, "atol": 1e-10}


def train(folder: Path, model: StreamingCNN, bags: Sequence[Bag], *, val: Sequence[Bag] = (),
          group: Group = ALONE, labels: Sequence[int] | None = None, **options: Any) -> FitResult:
    folder.mkdir(exist_ok=True, parents=True)
    return fit(model, bags, val, folder=folder, checkpoint=folder / "best.pt", device=CPU,
               group=group, train_labels=labels, progress=False,
               options=FitOptions(**{"max_epochs": 1, "lr": 0.01, "opt": "sgd", **options}))


def images(count: int) -> list[Bag]:
    return [image_bag(index) for index in range(count)]


def weights(model: StreamingCNN, part: str = "") -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()
            if name.startswith(part)}


def moved(model: StreamingCNN) -> torch.Tensor:
    """How far each weight of the network is from where it started."""
    start = weights(tiny_network())
    return torch.cat([(value.double() - start[name]).flatten()
                      for name, value in weights(model, "encoder").items()])


# ---------------------------------------------------------------------------- steps

def test_left_over_images_are_stepped_on_by_their_own_number(tmp_path: Path) -> None:
    """Five images in steps of two: the third step has one, whose gradient is not halved; every
    step is that of ordinary autograd (spec streaming.md 13.4, defect 18)."""
    bags, ours, theirs = images(5), tiny_network(), tiny_network()
    train(tmp_path, ours, bags, accumulate=2, reg=0)
    image = bags[0].image
    assert isinstance(image, TensorImage)
    assert len(image.windows) > 2  # several tiles, twice
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9)
    order = epoch_order(5, seed=1, epoch=0)
    for part in (order[:2], order[2:4], order[4:]):
        optimiser.zero_grad()
        for index in part:
            logits = ordinary_logits(theirs, bags[index])
            (theirs.objective.loss(logits, bags[index]) / len(part)).backward()
        optimiser.step()
    torch.testing.assert_close(weights(ours), weights(theirs), **EXACT)
    assert float(moved(ours).norm()) > 1e-3


@pytest.mark.parametrize("accumulate", [1, 3])
def test_bf16_moves_the_weights_as_float32_does(tmp_path: Path, accumulate: int) -> None:
    steps = []
    for precision in ("fp32", "bf16"):
        model = tiny_network(dtype=torch.float32)
        train(tmp_path / precision, model, images(3), precision=precision, accumulate=accumulate)
        steps.append(moved(model))
        assert {one.dtype for one in model.parameters()} == {torch.float32}
    exact, rough = steps
    assert float(exact.norm()) > 1e-3
    assert 0 < float((exact - rough).norm() / exact.norm()) < 0.05


def test_cox_compares_images(tmp_path: Path) -> None:
    """Each image is streamed once to be compared, and once more, with its gradient."""
    bags = [Bag(slide_id=bag.slide_id, features=bag.features, image=bag.image,
                target=(30.0 - 5 * index, 1.0)) for index, bag in enumerate(images(4))]
    survival = {"n_classes": 1, "task_type": "survival", "bag_loss": "cox"}
    ours, theirs = (tiny_network(objective=survival) for _ in range(2))
    train(tmp_path, ours, bags, accumulate=4, reg=0, lr=0.1)
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    logits = torch.cat([ordinary_logits(theirs, bag) for bag in bags])
    truths = torch.tensor([bag.target for bag in bags], dtype=torch.float64)
    _, gradient = theirs.objective.joint_gradient(logits.detach().float(), truths)
    logits.backward(gradient.double())
    optimiser.step()
    torch.testing.assert_close(weights(ours), weights(theirs), **EXACT)


# ---------------------------------------------------------------------------- processes

WORKER = '''
import json, sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.unit.test_streaming_training import weighted_training
from utils.distributed import process_group

sent = []
all_reduce = dist.all_reduce


def counted(tensor, *args, **options):
    sent.append(tensor.numel())
    return all_reduce(tensor, *args, **options)


dist.all_reduce = counted
folder = Path(sys.argv[1])
with process_group(torch.device("cpu")) as group:
    model, read = weighted_training(folder / "two", group=group, accumulate=2)
    told = group.gather({"read": read, "sent": sent})
    if group.is_main:
        torch.save(model.state_dict(), folder / "two.pt")
        (folder / "told.json").write_text(json.dumps(told))
'''

NUMBERS = [0, 2, 4, 6, 8, 10, 1]  # the last alone is of class 1
EPOCHS = 2


def weighted_training(folder: Path, *, accumulate: int, group: Group = ALONE
                      ) -> tuple[StreamingCNN, list[tuple[int, int, int]]]:
    """Seven images drawn by weight, two epochs; the model, and what was read."""
    bags, model = DrawnImages(NUMBERS), tiny_network()
    train(folder, model, bags, group=group, labels=bags.labels, weighted_sample=True,
          accumulate=accumulate, max_epochs=EPOCHS)
    return model, bags.read


def test_two_processes_are_one_and_send_their_gradients_once_a_step(tmp_path: Path) -> None:
    """Two ranks of two images a step are one process with four: spec streaming.md 13.8, and
    defect 13, as images are drawn by weight; the last step has three, of which one rank has one."""
    (tmp_path / "worker.py").write_text(WORKER)
    run = torchrun(tmp_path / "worker.py", tmp_path)
    assert run.returncode == 0, run.stderr
    model, read = weighted_training(tmp_path / "one", accumulate=4)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.testing.assert_close(two, weights(model), **EXACT)

    told = json.loads((tmp_path / "told.json").read_text())
    assert sorted(tuple(item) for one in told for item in one["read"]) == sorted(read)
    assert Counter(epoch for epoch, *_ in read) == dict.fromkeys(range(EPOCHS), len(NUMBERS))
    assert max(turn for *_, turn in read) > 0  # or the test shows nothing of turns
    of_class_1 = sum(NUMBERS[index] == 1 for _, index, _ in read)
    assert 0.25 < of_class_1 / len(read) < 0.75

    gradients = sum(one.numel() for one in model.parameters() if one.requires_grad)
    flags = sum(one.requires_grad for one in model.parameters()) + 1  # who has one, of how many
    statistics = sum(one.numel() for one in model.buffers() if one.is_floating_point())
    an_epoch = [gradients + flags, gradients + flags, statistics]
    assert [one["sent"] for one in told] == [an_epoch * EPOCHS] * 2


# ---------------------------------------------------------------------------- rest, mean, memory

def test_the_network_rests_in_the_first_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is then streamed once an image, as nothing in it learns."""
    bags, model, start = images(2), tiny_network(), weights(tiny_network())
    ends: list[tuple[dict[str, torch.Tensor], int]] = []
    finish = TrainingLoop.finish_epoch

    def note(loop: TrainingLoop, *args: Any) -> None:
        windows = [bag.image.windows for bag in bags if isinstance(bag.image, TensorImage)]
        ends.append((weights(model), sum(map(len, windows))))
        for some in windows:
            some.clear()
        finish(loop, *args)

    monkeypatch.setattr(TrainingLoop, "finish_epoch", note)
    train(tmp_path, model, bags, max_epochs=2, freeze_epochs=1)
    changed = [{name.split(".")[0] for name in start if not torch.equal(end[name], start[name])}
               for end, _ in ends]
    assert changed == [{"mil"}, {"mil", "encoder"}]
    assert ends[1][1] == 2 * ends[0][1] > 0


def test_the_mean_of_the_last_epochs_is_a_network_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is validated is what is saved, and neither is the network in training."""
    model, val = tiny_network(), [image_bag(index) for index in range(4, 8)]
    train(tmp_path, model, images(4), val=val, max_epochs=3, swa=2)
    stored = torch.load(tmp_path / "best.pt", weights_only=True)
    torch.testing.assert_close(weights(model), stored, rtol=0, atol=0)
    answers = predict(model, val, device=CPU)
    rows = torch.from_numpy(answers.scores)[range(4), answers.labels.tolist()]
    assert f"val loss {-float(rows.log().mean()):.4f}" in capsys.readouterr().out.splitlines()[-1]


def test_an_image_too_large_for_the_memory_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = StreamingCNN.forward

    def full(self: StreamingCNN, bag: Bag) -> SlideOutput:
        if bag.slide_id == "slide_01":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, bag)

    monkeypatch.setattr(StreamingCNN, "forward", full)
    answers = predict(tiny_network(), images(3), device=CPU)
    assert answers.slide_ids == ["slide_00", "slide_02"]
    said = answers.failures[0].reason
    assert said.startswith("slide_01: an image of 96 x 80 px does not fit in the memory")
    for flag in ("--stream_memory", "--tile_size", "--precision bf16"):
        assert flag in said
    assert "patches" not in said
