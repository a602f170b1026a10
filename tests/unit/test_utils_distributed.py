"""Two real processes under torchrun (gloo): the numbers of one process, and no hanging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.training import COX, OBJECTIVES, WIDTH, BagList, ToyModel, make_bag, make_task_bag
from utils.contracts import Bag, SlideOutput
from utils.distributed import ALONE, Group
from utils.engine import FitOptions, fit, predict

CPU = torch.device("cpu")

WORKER = '''
import json, os, sys
from pathlib import Path

import torch
from tests.training import BagList, make_bag
from tests.unit.test_utils_distributed import cox_training, every_task, fitted_mean, toy_training
from utils.distributed import process_group

folder, mode = Path(sys.argv[1]), sys.argv[2]
CPU = torch.device("cpu")


class Dying(BagList):
    def __getitem__(self, index):
        if mode == "die" and os.environ["RANK"] == "1" and index >= 3:
            os.kill(os.getpid(), 9)
        return super().__getitem__(index)


with process_group(CPU) as group:
    assert group.gather(group.rank) == [0, 1]
    assert group.from_main(group.rank) == 0
    train = Dying([make_bag(index) for index in range(11)], broken=["slide_08"])
    found = {"toy": toy_training(folder, train, group=group), "tasks": every_task(group),
             "cox": cox_training(folder, group=group), "norm": fitted_mean(folder, group)}
    everyone = group.gather(json.dumps(found))
    assert everyone[0] == everyone[1]
    if group.is_main:
        (folder / "out.json").write_text(everyone[0])
'''


def toy_training(folder: Path, train: BagList, *, group: Group = ALONE, accumulate: int = 1
                 ) -> dict[str, Any]:
    """With a mean of the weights, a schedule, clipping, and early stopping on a metric."""
    torch.manual_seed(0)
    model = ToyModel(dropout=0)
    val = BagList([make_bag(index) for index in range(11, 18)], broken=["slide_13"])
    result = fit(model, train, val, folder=folder, checkpoint=folder / "best.pt", device=CPU,
                 group=group, options=FitOptions(
                     max_epochs=3, lr=0.01, clip_grad=0.5, ema=0.5, schedule="cosine",
                     warmup_epochs=1, accumulate=accumulate, early_stopping=True,
                     monitor="metric"))
    answers = predict(model, val, device=CPU, group=group)
    return {"slide_ids": answers.slide_ids, "labels": answers.labels.tolist(),
            "scores": answers.scores.tolist(), "weight": model.head.weight.tolist(),
            "unused": model.unused.tolist(), "best": [result.best_epoch, result.best_val_loss],
            "failures": [row.item for row in result.failures]}


def every_task(group: Group = ALONE) -> dict[str, Any]:
    """The answers on seven bags, of a model of each task type, and their figures."""
    found: dict[str, Any] = {}
    for task_type, objective in OBJECTIVES.items():
        torch.manual_seed(0)
        bags = [make_task_bag(index, task_type) for index in range(7)]
        answers = predict(ToyModel(objective=objective), bags, device=CPU, group=group)
        found[task_type] = {"truths": answers.truths.tolist(), "scores": answers.scores.tolist(),
                            "figures": answers.metrics(objective).headline()}
    return found


def cox_training(folder: Path, *, group: Group = ALONE, accumulate: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    model = ToyModel(dropout=0, objective=COX)
    bags = [make_task_bag(index, "survival") for index in range(20)]
    (folder / "cox").mkdir(parents=True, exist_ok=True)
    result = fit(model, bags[:13], bags[13:], folder=folder / "cox", group=group, device=CPU,
                 checkpoint=folder / "cox.pt",
                 options=FitOptions(max_epochs=2, lr=0.02, accumulate=accumulate))
    return {"weight": model.head.weight.tolist(), "best": result.best_val_loss}


def fitted_mean(folder: Path, group: Group) -> list[float]:
    """The running statistics of a norm, which differ in each process while it trains."""
    class Normed(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(WIDTH)

        def forward(self, bag: Bag) -> SlideOutput:
            return super().forward(replace(bag, features=self.norm(bag.features)))

    torch.manual_seed(0)
    model = Normed()
    (folder / "norm").mkdir(parents=True, exist_ok=True)
    fit(model, [make_bag(index) for index in range(4)], [], folder=folder / "norm", group=group,
        checkpoint=folder / "norm.pt", device=CPU, options=FitOptions(max_epochs=1))
    mean = model.norm.running_mean
    assert mean is not None
    return mean.tolist()


def torchrun(*command: object, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             "PYTHONPATH": str(ROOT)})


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return script


def test_two_processes_give_the_numbers_of_one(worker: Path, tmp_path: Path) -> None:
    """An odd number of bags, one of them broken: a step of two ranks is one of two bags."""
    run = torchrun(worker, tmp_path, "train")
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    alone = tmp_path / "alone"
    alone.mkdir()
    train = BagList([make_bag(index) for index in range(11)], broken=["slide_08"])
    toy, expected = found["toy"], toy_training(alone, train, accumulate=2)
    for exact in ("slide_ids", "labels"):  # none twice, in order
        assert toy[exact] == expected[exact]
    close(toy["scores"], expected["scores"])
    close(toy["weight"], expected["weight"])
    close(toy["best"], expected["best"])
    assert toy["unused"] == [1, 1, 1]  # a parameter nobody used is left alone
    assert toy["failures"] == ["slide_08", "slide_13"] == expected["failures"]
    for task_type, one in every_task().items():
        for name in ("truths", "scores"):
            close(found["tasks"][task_type][name], one[name])
        assert found["tasks"][task_type]["figures"] == pytest.approx(one["figures"])
    cox = cox_training(alone, accumulate=4)  # the slides of both processes are compared
    close(found["cox"]["weight"], cox["weight"])
    assert found["cox"]["best"] == pytest.approx(cox["best"], rel=1e-5)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6,
                               equal_nan=True)


def test_a_dead_process_stops_the_others_and_leaves_no_half_checkpoint(
    worker: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    run = torchrun(worker, tmp_path, "die")
    assert run.returncode != 0
    assert time.monotonic() - start < 120
    assert not (tmp_path / "best.pt").exists()
    assert not (tmp_path / "out.json").exists()
    assert not list(tmp_path.glob(".mw-tmp-*"))


def test_one_process_is_a_group_of_its_own() -> None:
    assert (ALONE.rank, ALONE.size, ALONE.is_main) == (0, 1, True)
    assert ALONE.gather("a") == ["a"]
    assert ALONE.share(range(5)) == range(5)
    parts = [Group(rank=rank, size=3).share(range(8)) for rank in range(3)]
    assert sorted(index for part in parts for index in part) == list(range(8))


def test_mean_gradient_of_one_process() -> None:
    used, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    used.grad = torch.tensor([2.0, 4.0])
    assert ALONE.average_gradients([used, unused], 2) == 2
    assert used.grad.tolist() == [1.0, 2.0]
    assert unused.grad is None
    assert ALONE.average_gradients([used, unused], 0) == 0
