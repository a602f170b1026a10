"""Two real processes under torchrun (gloo): the numbers of one process, and no hanging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.training import BagList, ToyModel, make_bag
from utils.distributed import ALONE, Group
from utils.engine import FitOptions, fit, predict

WORKER = '''
import json, os, sys
from pathlib import Path

import torch
from tests.training import BagList, ToyModel, make_bag
from utils.distributed import process_group
from utils.engine import FitFailed, FitOptions, fit, predict

folder, mode = Path(sys.argv[1]), sys.argv[2]
CPU = torch.device("cpu")


class Dying(BagList):
    def __getitem__(self, index):
        if mode == "die" and os.environ["RANK"] == "1" and index == 3:
            os.kill(os.getpid(), 9)
        return super().__getitem__(index)


with process_group(CPU) as group:
    assert group.gather(group.rank) == [0, 1]
    assert group.from_main(group.rank) == 0
    torch.manual_seed(0)
    model = ToyModel(dropout=0)
    train = Dying([make_bag(index) for index in range(11)], broken=["slide_08"])
    val = BagList([make_bag(index) for index in range(11, 18)], broken=["slide_13"])
    result = fit(model, train, val, folder=folder, checkpoint=folder / "best.pt", device=CPU,
                 options=FitOptions(max_epochs=3, lr=0.01, clip_grad=0.5), group=group)
    answers = predict(model, val, device=CPU, group=group)
    everyone = group.gather([answers.slide_ids, answers.probabilities.tolist(),
                             model.head.weight.tolist(), result.best_val_loss])
    assert everyone[0] == everyone[1]
    if group.is_main:
        (folder / "out.json").write_text(json.dumps({
            "slide_ids": answers.slide_ids, "labels": answers.labels.tolist(),
            "probabilities": answers.probabilities.tolist(), "weight": model.head.weight.tolist(),
            "unused": model.unused.tolist(), "best": result.best_val_loss,
            "failures": [row.item for row in result.failures]}))
'''


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
    torch.manual_seed(0)
    model = ToyModel(dropout=0)
    train = BagList([make_bag(index) for index in range(11)], broken=["slide_08"])
    val = BagList([make_bag(index) for index in range(11, 18)], broken=["slide_13"])
    alone = tmp_path / "alone"
    alone.mkdir()
    result = fit(model, train, val, folder=alone, checkpoint=alone / "best.pt",
                 device=torch.device("cpu"),
                 options=FitOptions(max_epochs=3, lr=0.01, clip_grad=0.5, accumulate=2))
    answers = predict(model, val, device=torch.device("cpu"))
    assert found["slide_ids"] == answers.slide_ids  # none twice, in order
    assert found["labels"] == answers.labels.tolist()
    torch.testing.assert_close(torch.tensor(found["probabilities"]),
                               torch.from_numpy(answers.probabilities), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found["weight"]), model.head.weight.detach())
    assert found["unused"] == [1, 1, 1]  # a parameter nobody used is left alone
    assert found["best"] == pytest.approx(result.best_val_loss, rel=1e-5)
    assert found["failures"] == ["slide_08", "slide_13"] == [row.item for row in result.failures]


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
