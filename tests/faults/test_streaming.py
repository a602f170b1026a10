"""Streaming models whose training is killed, and slides whose image cannot be read to the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.streaming import DrawnImages, TensorImage, image_bag
from tests.streaming_network import tiny_network
from tests.training import BagList
from utils.engine import FitOptions, FitResult, fit, predict
from utils.errors import ItemFailed

CPU = torch.device("cpu")
EPOCHS, SLIDES = 3, 5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are equal for equal numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------- killed

def random_training(folder: Path) -> FitResult:
    """All that is random and all that a state must hold: images and order drawn, dropout, momentum,
    and a mean of which the last epoch is the second part."""
    folder.mkdir(exist_ok=True)
    bags = DrawnImages(range(SLIDES))
    return fit(tiny_network(dtype=torch.float32, dropout=0.5), bags, [image_bag(8), image_bag(9)],
               folder=folder, checkpoint=folder / "best.pt", mean_checkpoint=folder / "mean.pt",
               device=CPU, train_labels=bags.labels, progress=False,
               options=FitOptions(max_epochs=EPOCHS, lr=0.01, opt="sgd", accumulate=2, swa=2,
                                  test_type="both", weighted_sample=True, schedule="cosine"))


def test_killed_within_an_epoch_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """Spec streaming.md 13.10."""
    expected = random_training(tmp_path / "whole")
    command = ("from pathlib import Path; from tests.faults.test_streaming import *; "
               f"torch.set_num_threads(1); random_training(Path({str(tmp_path / 'killed')!r}))")
    within = (EPOCHS - 1) * SLIDES + 4  # the second step of the last epoch
    killed = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
             "MILWRIGHT_FAULT": f"train.bag:kill:{within}"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert f"epoch {EPOCHS - 2}:" in killed.stdout
    assert not (tmp_path / "killed" / "best.pt").exists()
    assert random_training(tmp_path / "killed") == expected
    for name in ("best.pt", "mean.pt", "state.pt"):
        whole, again = ((tmp_path / run / name).read_bytes() for run in ("whole", "killed"))
        assert whole == again, name


# ---------------------------------------------------------------------------- damaged images

class Damaged(TensorImage):
    """Cannot be read any more after so many windows."""

    def __init__(self, pixels: torch.Tensor, *, good: int, error: Exception) -> None:
        super().__init__(pixels)
        self.good, self.error = good, error

    def read(self, x: int, y: int, width: int, height: int) -> torch.Tensor:
        if len(self.windows) == self.good:
            raise self.error
        return super().read(x, y, width, height)


def trained(folder: Path, bags: BagList, order: list[int]) -> tuple[dict[str, torch.Tensor],
                                                                     FitResult]:
    """The weights after one epoch over the bags in this order."""
    folder.mkdir()
    model = tiny_network()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.engine.epoch_order", lambda *_, **__: order)
        result = fit(model, bags, [], folder=folder, checkpoint=folder / "best.pt", device=CPU,
                     options=FitOptions(max_epochs=1, lr=0.01, opt="sgd"), progress=False)
    return dict(model.state_dict()), result


def windows_of_a_pass() -> int:
    """Tiles of a test image."""
    bag = image_bag(2)
    predict(tiny_network(), [bag], device=CPU)
    assert isinstance(bag.image, TensorImage)
    return len(bag.image.windows)


@pytest.mark.parametrize("where", ["at once", "in the first pass", "in the last tile"])
@pytest.mark.parametrize("error", [ItemFailed("slide_02: tile 7 is damaged"),
                                   OSError("stale handle")])
def test_an_image_that_fails_half_way_leaves_no_trace(
    tmp_path: Path, where: str, error: Exception
) -> None:
    """Not even where all but one of its tiles have given their gradient."""
    tiles = windows_of_a_pass()
    assert tiles > 1
    good = {"at once": 0, "in the first pass": tiles - 1, "in the last tile": 2 * tiles - 1}[where]
    bags = [image_bag(index) for index in range(4)]
    assert isinstance(bags[2].image, TensorImage)
    bad = replace(bags[2], image=Damaged(bags[2].image.pixels, good=good, error=error))
    found, result = trained(tmp_path / "a", BagList([*bags[:2], bad, bags[3]]), [3, 2, 0, 1])
    expected, _ = trained(tmp_path / "b", BagList(bags), [3, 0, 1])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [(row.item, row.reason) for row in result.failures] == [("slide_02", str(error))]
