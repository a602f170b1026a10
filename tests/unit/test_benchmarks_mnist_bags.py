"""MNIST-bags: which digits make which bags, the network, the files a run leaves."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import mnist_bags
from benchmarks._lenet import EMBEDDING, EndToEnd
from models.slide_models import SlideModelSpec, build_slide_model
from utils.errors import EXIT_OK, Refused
from utils.storage import read_json

DIGITS = 120


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ``DIGITS`` images; the upper left pixels of number i are i, labels i mod 10."""
    monkeypatch.setattr(mnist_bags, "TRAINING_DIGITS", 80)
    monkeypatch.setattr(mnist_bags, "TEST_BAGS", 30)
    numbers = np.arange(DIGITS, dtype=np.uint8)
    images = np.zeros((DIGITS, 28, 28), np.uint8)
    images[:, 0, 0] = numbers
    images[numbers % 10 == 9, 8:20, 8:20] = 255  # a nine is a white square
    (tmp_path / mnist_bags.IMAGES).write_bytes(
        gzip.compress(struct.pack(">IIII", 2051, DIGITS, 28, 28) + images.tobytes()))
    (tmp_path / mnist_bags.LABELS).write_bytes(
        gzip.compress(struct.pack(">II", 2049, DIGITS) + (numbers % 10).tobytes()))
    return tmp_path


def numbers_in(bag: mnist_bags.Bag) -> list[int]:
    """Which digits a bag holds."""
    pixels = bag.features[:, 0] * mnist_bags.PIXEL_DEVIATION + mnist_bags.PIXEL_MEAN
    numbers: list[int] = (pixels * 255).round().int().tolist()
    return numbers


def test_training_and_test_bags_share_no_digit(digits: Path) -> None:
    train, test = mnist_bags.training_and_test_bags(digits, 200, seed=1)
    assert len(train) == 200 and len(test) == 30
    seen, tested = ({one for bag in bags for one in numbers_in(bag)} for bags in (train, test))
    assert len(seen) == 80 and not seen & tested
    sizes = np.array([len(bag) for bag in train])
    assert abs(sizes.mean() - 10) < 0.5 and 1.2 < sizes.var() < 3
    other, _ = mnist_bags.training_and_test_bags(digits, 200, seed=2)
    assert {one for bag in other for one in numbers_in(bag)} != seen


def test_a_bag_is_positive_when_it_holds_a_nine(digits: Path) -> None:
    train, _ = mnist_bags.training_and_test_bags(digits, 60, seed=1)
    assert {bag.label for bag in train} == {0, 1}
    for bag in train:
        assert bag.label == any(number % 10 == 9 for number in numbers_in(bag))


def test_a_smaller_training_set_is_the_beginning_of_a_larger_one(digits: Path) -> None:
    few, same = mnist_bags.training_and_test_bags(digits, 10, seed=1)
    many, test = mnist_bags.training_and_test_bags(digits, 20, seed=1)
    assert [numbers_in(bag) for bag in few] == [numbers_in(bag) for bag in many[:10]]
    assert [numbers_in(bag) for bag in same] == [numbers_in(bag) for bag in test]


def test_files_that_are_no_mnist_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="give the folder"):
        mnist_bags.read_digits(tmp_path / "nowhere")
    (digits / mnist_bags.LABELS).write_bytes(gzip.compress(bytes(8 + DIGITS - 1)))
    with pytest.raises(Refused, match="do not belong together"):
        mnist_bags.read_digits(digits)
    (digits / mnist_bags.LABELS).write_bytes(b"not gzip")
    with pytest.raises(Refused, match="gzip"):
        mnist_bags.read_digits(digits)


@pytest.mark.parametrize("model", mnist_bags.MODELS)
def test_the_loss_reaches_the_first_layer_of_the_encoder(digits: Path, model: str) -> None:
    bag = mnist_bags.training_and_test_bags(digits, 1, seed=1)[0][0]
    network = EndToEnd(build_slide_model(SlideModelSpec(
        embed_dim=EMBEDDING, n_classes=2, dropout=0.0, **mnist_bags.MODELS[model])))
    for loss in network.losses(bag):
        loss.value.backward()  # type: ignore[no-untyped-call]
    assert all(one.grad is not None and one.grad.abs().sum() > 0
               for one in network.encoder.parameters())
    assert network(bag).logits.shape == (1, 2)
    assert torch.allclose(network.objective.scores(network(bag).logits).sum(dim=1), torch.ones(1))


def test_a_run_learns_and_leaves_table_json_and_picture(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = digits / "out"
    code = mnist_bags.main(["--data", str(digits), "--bags", "5", "40", "--models", "max",
                            "--steps", "80", "--repeats", "1", "--workers", "0", "--out", str(out)])
    assert code == EXIT_OK
    found = read_json(out / "mnist_bags.json")["auc"]["max"]
    assert list(found) == ["5", "40"] and found["40"][0] > 0.95
    assert f"max              {found['5'][0]:.3f} +- nan" in capsys.readouterr().out
    assert (out / "mnist_bags.png").read_bytes()[:4] == b"\x89PNG"


def test_more_steps_give_more_epochs(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = []

    def record(model: object, train: object, test: list[object],
               options: mnist_bags.FitOptions) -> np.ndarray:
        epochs.append(options.max_epochs)
        return np.zeros((len(test), 2))

    monkeypatch.setattr(mnist_bags, "train_and_test", record)
    for n_bags in (5, 8):
        mnist_bags.area_under_curve(mnist_bags.Job("mean", n_bags, 0), data=digits, steps=20,
                                    seed=1)
    assert epochs == [4, 3]
