"""What main.py does when slides, disks, settings or its own life fail it (rows A8, A10, A14, D)."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

import main
from tests.conftest import ROOT
from tests.training import WIDTH, write_cohort
from utils.errors import EXIT_FAILED, Refused
from utils.locks import claim

Script = Callable[..., subprocess.CompletedProcess[str]]

# what two runs of one command have in common, byte for byte
LASTING = ("s_*_checkpoint.*", "split_*_results.*", "splits_*.csv", "summary.csv", "*.txt")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    write_cohort(tmp_path, slides=16, folds=1)
    return tmp_path


def flags(cohort: Path, *more: object) -> list[str]:
    return ["--csv_path", str(cohort / "cohort.csv"), "--label_dict", "class_0:0,class_1:1",
            "--data_root_dir", str(cohort / "features"), "--splits_root", str(cohort / "splits"),
            "--embed_dim", str(WIDTH), "--k", "1", "--max_epochs", "3", "--early_stopping",
            "--results_dir", str(cohort / "results"), "--exp_code", "run", "--device", "cpu",
            "--lr", "0.01", *map(str, more)]


def feature_file(cohort: Path, number: int) -> Path:
    return cohort / "features" / "pt_files" / f"slide_{number:02}.pt"


def report(cohort: Path) -> pd.DataFrame:
    return pd.read_csv(cohort / "results" / "run_s1" / "report_train.csv", index_col="item",
                       keep_default_na=False)


def digests(cohort: Path) -> dict[str, str]:
    folder = cohort / "results" / "run_s1"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in LASTING for path in sorted(folder.glob(pattern))}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("unbroken")
    write_cohort(root, slides=16, folds=1)
    assert main.main(flags(root)) == 0
    found = digests(root)
    del found["experiment_run.txt"]  # holds the path
    return found


def same_as(unbroken: dict[str, str], cohort: Path) -> bool:
    found = digests(cohort)
    del found["experiment_run.txt"]
    return found == unbroken


# ---------------------------------------------------------------------------- killed

@pytest.mark.parametrize("fault", [
    "train.bag:kill:13",  # in the middle of the second epoch
    "train.epoch:kill:2",  # checkpoint of the second epoch written, its state not
    "storage.replace:kill:6",  # while a file is being put in place
])
def test_killed_and_run_again_gives_the_same_bytes(
    cohort: Path, unbroken: dict[str, str], run_script: Script, fault: str
) -> None:
    killed = run_script("main.py", *flags(cohort), env={"MILWRIGHT_FAULT": fault})
    assert killed.returncode == -signal.SIGKILL
    assert not list((cohort / "results").rglob("s_0_checkpoint.json"))
    assert main.main(flags(cohort)) == 0
    assert same_as(unbroken, cohort)
    assert not list((cohort / "results").rglob("state.pt"))
    assert not list((cohort / "results").rglob("*.lock"))


def test_killed_with_a_mean_and_a_schedule_gives_the_same_bytes(
    tmp_path: Path, run_script: Script
) -> None:
    """The state holds the weights and their mean; the rate is a function of the epoch."""
    more = ("--ema", 0.9, "--schedule", "cosine", "--warmup_epochs", 1, "--monitor", "metric",
            "--opt", "adamw", "--accumulate", 2, "--clip_grad", 1)
    found = []
    for name, fault in (("whole", None), ("killed", "train.epoch:kill:2")):
        (tmp_path / name).mkdir()
        write_cohort(tmp_path / name, slides=16, folds=1)
        if fault:
            killed = run_script("main.py", *flags(tmp_path / name, *more),
                                env={"MILWRIGHT_FAULT": fault})
            assert killed.returncode == -signal.SIGKILL
            assert (tmp_path / name / "results" / "run_s1" / "0" / "state.pt").exists()
        assert main.main(flags(tmp_path / name, *more)) == 0
        found.append(digests(tmp_path / name))
        del found[-1]["experiment_run.txt"]
    assert found[0] == found[1]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_ends_cleanly_and_goes_on(
    cohort: Path, unbroken: dict[str, str], sent: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *flags(cohort)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             "MILWRIGHT_FAULT": "train.bag:sleep:11"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((cohort / "results").rglob("s_0*.pt")):
        time.sleep(0.05)  # until the first epoch is over and the second one sleeps
    time.sleep(1)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert not list((cohort / "results").rglob(".mw-tmp-*"))
    assert main.main(flags(cohort)) == 0
    assert same_as(unbroken, cohort)


# ---------------------------------------------------------------------------- slides

def test_broken_slides_are_listed_and_the_fold_is_trained(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.full((5, WIDTH), float("nan")), feature_file(cohort, 9))  # training
    whole = feature_file(cohort, 5).read_bytes()
    feature_file(cohort, 5).write_bytes(whole[:len(whole) // 2])  # test
    torch.save(torch.zeros(0, WIDTH), feature_file(cohort, 10))  # no patches
    for _ in range(2):  # the second time nothing is trained, and the truth is told again
        assert main.main(flags(cohort)) == EXIT_FAILED
        found = report(cohort)
        assert found["status"]["slide_09"] == found["status"]["slide_05"] == "failed"
        assert "row 0" in found["reason"]["slide_09"]
        assert found["status"]["slide_10"] == "empty"
        assert found["test_auc"]["fold 0"] != ""
    assert report(cohort)["status"]["fold 0"] == "already done"
    assert "slide_05" not in (cohort / "results/run_s1/split_0_results.csv").read_text()
    torch.save(torch.ones(5, WIDTH), feature_file(cohort, 9))
    with pytest.raises(Refused, match="without slide_09, which can be read now.*--overwrite"):
        main.main(flags(cohort))
    assert main.main(flags(cohort, "--overwrite")) == EXIT_FAILED  # slide_05 is still broken
    assert "slide_09" not in report(cohort).index


def test_a_diverging_fold_fails_with_its_slide_and_the_others_go_on(
    tmp_path: Path, run_script: Script
) -> None:
    write_cohort(tmp_path, slides=16, folds=2)
    torch.save(torch.full((5, WIDTH), 3.4e38), feature_file(tmp_path, 15))  # trained on in fold 0
    split = tmp_path / "splits" / "cohort_100" / "splits_1.csv"
    table = pd.read_csv(split, index_col=0, dtype=str, keep_default_na=False)
    table["train"] = table["train"].replace("slide_15", "")
    table.to_csv(split)
    done = run_script("main.py", *flags(tmp_path), "--k", 2)
    assert done.returncode == EXIT_FAILED
    assert "Traceback" not in done.stderr
    found = report(tmp_path)
    assert found["status"].to_dict() == {"fold 0": "failed", "fold 1": "done"}
    assert "slide_15" in found["reason"]["fold 0"]
    assert not (tmp_path / "results/run_s1/s_0_checkpoint.json").exists()
    summary = pd.read_csv(tmp_path / "results/run_s1/summary.csv")
    assert summary["test_auc"].isna().tolist() == [True, False]


def test_single_class_test_split_gives_no_auc_and_no_crash(cohort: Path) -> None:
    split = cohort / "splits" / "cohort_100" / "splits_0.csv"
    table = pd.read_csv(split, index_col=0, dtype=str, keep_default_na=False)
    table["test"] = [slide if slide in ("slide_04", "slide_06") else "" for slide in table["test"]]
    table.to_csv(split)
    assert main.main(flags(cohort, "--log_data")) == 0
    assert report(cohort)["test_auc"]["fold 0"] in ("", "None", "nan")
    assert float(report(cohort)["test_acc"]["fold 0"]) >= 0


def test_wrong_width_is_refused_in_one_line(cohort: Path, run_script: Script) -> None:
    done = run_script("main.py", *flags(cohort), "--embed_dim", 1024)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert f"give --embed_dim {WIDTH}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (cohort / "results").exists()


# ---------------------------------------------------------------------------- disks and neighbours

@pytest.mark.parametrize("passage", [6, 9])
def test_full_disk_fails_the_fold_and_the_next_run_goes_on(
    cohort: Path, unbroken: dict[str, str], monkeypatch: pytest.MonkeyPatch, passage: int
) -> None:
    from utils import faults

    faults._passed.clear()
    monkeypatch.setenv("MILWRIGHT_FAULT", f"storage.write:enospc:{passage}")
    assert main.main(flags(cohort)) == EXIT_FAILED
    assert "no space left" in report(cohort)["reason"]["fold 0"]
    assert not list((cohort / "results").rglob(".mw-tmp-*"))
    monkeypatch.delenv("MILWRIGHT_FAULT")
    assert main.main(flags(cohort)) == 0
    assert same_as(unbroken, cohort)


def test_a_fold_that_another_process_holds_is_left_alone(cohort: Path) -> None:
    folder = cohort / "results" / "run_s1"
    folder.mkdir(parents=True)
    with claim(folder / "0") as mine:
        assert mine
        assert main.main(flags(cohort)) == 0
    assert report(cohort)["status"]["fold 0"] == "busy"
    assert not (folder / "s_0_checkpoint.pt").exists()


def test_results_folder_that_cannot_be_written_is_refused(cohort: Path) -> None:
    (cohort / "results").write_text("a file")
    with pytest.raises(Refused, match="results folder"):
        main.main(flags(cohort))


def test_clams_own_results_are_not_overwritten(cohort: Path) -> None:
    folder = cohort / "results" / "run_s1"
    folder.mkdir(parents=True)
    torch.save({"theirs": torch.ones(1)}, folder / "s_0_checkpoint.pt")
    before = (folder / "s_0_checkpoint.pt").read_bytes()
    with pytest.raises(Refused, match="unknown origin"):
        main.main(flags(cohort))
    assert (folder / "s_0_checkpoint.pt").read_bytes() == before


def test_a_damaged_state_file_fails_the_fold_in_one_line(
    cohort: Path, run_script: Script
) -> None:
    killed = run_script("main.py", *flags(cohort), env={"MILWRIGHT_FAULT": "train.epoch:kill:2"})
    assert killed.returncode == -signal.SIGKILL
    state = cohort / "results" / "run_s1" / "0" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    done = run_script("main.py", *flags(cohort))
    assert done.returncode == 2
    assert "state.pt" in done.stderr
    assert "--overwrite" in done.stderr
    assert main.main(flags(cohort, "--overwrite")) == 0


def test_a_checkpoint_altered_after_training_is_not_trusted(cohort: Path) -> None:
    assert main.main(flags(cohort)) == 0
    checkpoint = cohort / "results" / "run_s1" / "s_0_checkpoint.pt"
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(Refused, match="altered after training"):
        main.main(flags(cohort))


def test_features_of_other_patches_are_another_cohort(cohort: Path) -> None:
    assert main.main(flags(cohort)) == 0
    torch.save(torch.ones(25, WIDTH), feature_file(cohort, 3))
    with pytest.raises(Refused, match="n_patches: file has 320, you ask 325"):
        main.main(flags(cohort))
    assert main.main(flags(cohort, "--overwrite")) == 0


def test_features_gone_between_two_runs_are_refused(cohort: Path) -> None:
    assert main.main(flags(cohort)) == 0
    shutil.rmtree(cohort / "features" / "pt_files")
    with pytest.raises(Refused, match="no features"):
        main.main(flags(cohort))
