"""End-to-end training killed at its tender places, and shared by processes: the same numbers.

A kill at the bag of an epoch: ``test_e2e.py``.
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import eval as evaluation
import main
from tests.cli.test_eval_e2e import told
from tests.cli.test_main import weights
from tests.cli.test_main_e2e import flags, predictions
from tests.patch_cohort import LOW, database, write_patch_cohort
from tests.unit.test_utils_distributed import torchrun
from utils.storage import read_json

Script = Callable[..., subprocess.CompletedProcess[str]]
LASTING = ("s_*_checkpoint*", "split_*_results.*", "summary.csv")
EPOCHS = 4


def digests(folder: Path) -> dict[str, str]:
    """What two runs of one command have in common, byte for byte."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in LASTING for path in sorted(folder.glob(pattern))}


def command(cohort: Path, results: Path) -> list[str]:
    """All that is random and all that a state must hold: bags of two scales in groups of two,
    chunks that are encoded twice, the best epochs of the running mean. Bits are equal for equal
    numbers of threads."""
    return flags(
        cohort, results, "--patches_low", database(cohort, LOW), "--img_transform", "strong_v2",
        "--enc_grad", "cached", "--p_batch_size", 5, "--enc_bn", "batch", "--batch_size", 2,
        "--accumulate", 4, "--ema", 0.6, "--test_type", "both_ema", "--early_stopping",
        "--save_top_k", 2, "--schedule", "cosine", "--warmup_epochs", 1, "--weighted_sample",
        "--clip_grad", 1, "--num_threads", 1, max_epochs=EPOCHS)


def between_checkpoints(sites: list[str]) -> int:
    """Which passage of ``storage.replace`` puts the second checkpoint of the last improvement in
    place, when the first one has just been replaced."""
    passage, of_epoch, found = 0, 0, 0
    for site in sites:
        if site == "train.bag":
            of_epoch = 0
        elif site == "storage.replace":
            passage, of_epoch = passage + 1, of_epoch + 1
            found = passage if of_epoch == 2 else found
        elif site == "train.epoch":
            of_epoch = -9  # what follows is the state
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort, and in ``results`` an unbroken run whose passages are in ``sites.txt``."""
    root = write_patch_cohort(tmp_path_factory.mktemp("whole"), slides=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILWRIGHT_FAULT_LOG", str(root / "sites.txt"))
        assert main.main(command(root, root / "results")) == 0
    return root


@pytest.mark.parametrize("place", ["within a group", "between two checkpoints"])
def test_killed_and_run_again_gives_the_same_bytes(
    whole: Path, tmp_path: Path, run_script: Script, place: str
) -> None:
    sites = [line.split()[0] for line in (whole / "sites.txt").read_text().splitlines()]
    fault = {"within a group": f"train.bag:kill:{sites.count('train.bag') // EPOCHS + 2}",
             "between two checkpoints": f"storage.replace:kill:{between_checkpoints(sites)}"}[place]
    killed = run_script("main.py", *command(whole, tmp_path), env={"MILWRIGHT_FAULT": fault})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run_s1" / "s_0_checkpoint.json").exists()
    assert main.main(command(whole, tmp_path)) == 0
    found = digests(tmp_path / "run_s1")
    assert found == digests(whole / "results" / "run_s1")
    assert {"s_0_checkpoint.pt", "s_0_ema_checkpoint.pt", "s_0_ema_checkpoint.json",
            "split_0_ema_results.csv"} <= set(found)
    assert sum("_epoch_" in name for name in found) == 4  # the best two of both


def test_both_are_complete_or_the_fold_is_not_done(whole: Path) -> None:
    """The record has the figures of both, each checkpoint a record of its own."""
    folder = whole / "results" / "run_s1"
    record, mean = (read_json(folder / f"s_0_{kind}checkpoint.json") for kind in ("", "ema_"))
    assert set(record["metrics"]) == {"val", "test", "val_ema", "test_ema"}
    assert set(mean["metrics"]) == {"val", "test"}
    for part in ("val", "test"):
        assert mean["metrics"][part] == record["metrics"][f"{part}_ema"]
    summary = pd.read_csv(folder / "summary.csv")
    assert summary["test_auc"][0] == pytest.approx(record["headline"]["test"]["auc"])
    evaluated = whole / "out"
    assert evaluation.main(told(whole, evaluated, "--weights", "ema")) == 0
    scores = pd.read_csv(evaluated / "EVAL_e" / "fold_0.csv")[["p_0", "p_1"]].to_numpy()
    tested = pd.read_csv(folder / "split_0_ema_results.csv")[["p_0", "p_1"]].to_numpy()
    np.testing.assert_allclose(scores, tested, atol=1e-6)
    assert not np.allclose(tested, predictions(folder), atol=1e-4)


def test_two_processes_with_shared_statistics_are_one_with_groups_of_two(tmp_path: Path) -> None:
    """Seven training slides, three to validate and three to test: the last step has one slide,
    and its process is waited for by one that has none."""
    cohort = write_patch_cohort(tmp_path, slides=13)
    plain = {"drop_out": 0, "max_epochs": 2, "lr": 0.01, "opt": "sgd"}  # adam enlarges rounding
    shared = torchrun("main.py", *flags(cohort, tmp_path / "two", "--enc_bn", "sync", **plain))
    assert shared.returncode == 0, shared.stderr
    assert main.main(flags(cohort, tmp_path / "one", "--enc_bn", "batch", "--batch_size", 2,
                           "--accumulate", 2, **plain)) == 0
    two, one = (tmp_path / name / "run_s1" for name in ("two", "one"))
    expected = weights(one)
    for name, value in weights(two).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert len(predictions(two)) == 3  # none twice
    np.testing.assert_allclose(predictions(two), predictions(one), atol=1e-5)
    again = told(cohort, tmp_path / "out", results_dir=tmp_path / "two")  # in one process
    assert evaluation.main(again) == 0
    scores = pd.read_csv(tmp_path / "out" / "EVAL_e" / "fold_0.csv")[["p_0", "p_1"]].to_numpy()
    np.testing.assert_allclose(scores, predictions(two), atol=1e-6)
