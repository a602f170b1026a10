"""What end-to-end training does when patches, databases or its own life fail it."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pandas as pd
import pytest

import eval as evaluation
import main
from tests.cli.test_eval_e2e import told
from tests.cli.test_main_e2e import equal, flags, weights
from tests.patch_cohort import LOW, database, patch_pixels, write_lmdb, write_patch_cohort
from tests.unit.test_wsi_core_patch_lmdb import Runs, published
from utils.errors import EXIT_FAILED, EXIT_OK, Refused
from wsi_core.patch_lmdb import patch_key
from wsi_core.patch_lmdb_reader import PatchLmdbReader

Script = Callable[..., subprocess.CompletedProcess[str]]
SLIDES = [f"slide_{index:02}" for index in range(12)]


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    return write_patch_cohort(tmp_path)


def report(cohort: Path) -> pd.DataFrame:
    return pd.read_csv(cohort / "results" / "run_s1" / "report_train.csv", index_col="item",
                       keep_default_na=False)


def damage(cohort: Path, slide_id: str) -> None:
    """All pictures of the slide's high magnification become noise."""
    path = cohort / "patches.lmdb"
    with PatchLmdbReader(path) as reader:
        facts = reader.facts(slide_id, level="level_0")
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        for index in range(facts["first"], facts["first"] + facts["count"]):
            txn.put(patch_key(index), b"no picture")


# ---------------------------------------------------------------------------- killed

def test_killed_in_an_epoch_and_run_again_gives_the_same_bits(
    cohort: Path, tmp_path_factory: pytest.TempPathFactory, run_script: Script
) -> None:
    """Draws, augmentation, dropout and the running mean go on as if nothing had been."""
    whole = tmp_path_factory.mktemp("whole")
    more = ("--patches_low", database(cohort, LOW), "--img_transform", "strong", "--batch_size",
            2, "--accumulate", 2, "--ema", 0.9, "--test_type", "both", "--p_batch_size", 4)
    assert main.main(flags(cohort, whole, *more, max_epochs=3)) == EXIT_OK
    given = flags(cohort, cohort / "results", *more, max_epochs=3)
    killed = run_script("main.py", *given, env={"MILWRIGHT_FAULT": "train.bag:kill:9"})
    assert killed.returncode == -signal.SIGKILL  # in the second epoch of six bags
    assert main.main(given) == EXIT_OK
    folders = [whole / "run_s1", cohort / "results" / "run_s1"]
    assert equal(weights(folders[0]), weights(folders[1]))
    for name in ("s_0_ema_checkpoint.pt", "split_0_results.csv"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


# ---------------------------------------------------------------------------- one slide

def test_a_slide_with_damaged_patches_fails_alone(cohort: Path) -> None:
    damage(cohort, SLIDES[1])
    assert main.main(flags(cohort, cohort / "results")) == EXIT_FAILED
    found = report(cohort)
    assert found.loc["fold 0", "status"] == "done"
    assert found.loc[SLIDES[1], "status"] == "failed"
    assert "no picture" in found.loc[SLIDES[1], "reason"]
    code = evaluation.main(told(cohort, cohort / "out", "--split", "all"))
    assert code == EXIT_FAILED
    assert len(pd.read_csv(cohort / "out" / "EVAL_e" / "fold_0.csv")) == len(SLIDES) - 1


def test_slides_without_patches_are_told_and_may_be_left_out(cohort: Path) -> None:
    path = write_lmdb(cohort / "some.lmdb", {
        name: patch_pixels(index, count=6) for index, name in enumerate(SLIDES[1:], start=1)})
    given = flags(cohort, cohort / "results", patches=path)
    with pytest.raises(Refused, match=r"1 of 12 slides have no patches: 'slide_00'.*allow_missing"):
        main.main(given)
    assert main.main([*given, "--allow_missing"]) == EXIT_OK
    assert report(cohort).loc[SLIDES[0], "status"] == "empty"


# ---------------------------------------------------------------------------- the database

def test_the_published_layout_trains_and_evaluates(cohort: Path) -> None:
    path = published(cohort / "224_80_level1.lmdb", dict.fromkeys(SLIDES, 5))
    assert main.main(flags(cohort, cohort / "results", "--channels", "BGR", patches=path)) == 0
    assert evaluation.main(told(cohort, cohort / "out", patches=path)) == EXIT_OK


@pytest.mark.parametrize("record", ["__slide__", "__pn__", "slide_01-2"])
def test_a_malicious_pickle_never_runs(cohort: Path, record: str) -> None:
    """In the metadata it refuses the run, in a patch it fails the slide."""
    mark = cohort / "ran"
    bomb = pickle.dumps([Runs(os.mkdir, str(mark))])
    path = published(cohort / "x.lmdb", dict.fromkeys(SLIDES, 3), **{record: bomb})
    given = flags(cohort, cohort / "results", patches=path, same_psize=3)
    if record.startswith("__"):
        with pytest.raises(Refused, match="could run code"):
            main.main(given)
    else:
        assert main.main(given) == EXIT_FAILED
        assert "could run code" in report(cohort).loc[SLIDES[1], "reason"]
    assert not mark.exists()


def test_an_unfinished_database_names_the_remedy(cohort: Path) -> None:
    path = write_lmdb(cohort / "part.lmdb", {name: patch_pixels(0, count=2) for name in SLIDES},
                      finish=False)
    with pytest.raises(Refused, match="never finished"):
        main.main(flags(cohort, cohort / "results", patches=path))


@pytest.mark.parametrize(("patches", "low", "message"), [
    ("#level_7", None, "no level 'level_7'.*level_0"),
    ("", "#level_0", "lower magnification"),
    ("cohort.csv", None, "cohort.csv"),
    ("splits", None, "no folder 'patches'"),
    ("nothing.lmdb", None, "nothing.lmdb")], ids=str)
def test_patches_of_another_kind_or_level_are_one_line(
    cohort: Path, patches: str, low: str | None, message: str
) -> None:
    lmdb_path = str(cohort / "patches.lmdb")
    named = lmdb_path + patches if patches[:1] in ("", "#") else str(cohort / patches)
    more = () if low is None else ("--patches_low", lmdb_path + low)
    with pytest.raises(Refused, match=message) as caught:
        main.main(flags(cohort, cohort / "results", *more, patches=named))
    assert "\n" not in str(caught.value)


def test_the_terminal_shows_one_line_and_code_2(cohort: Path, run_script: Script) -> None:
    done = run_script("main.py", *flags(cohort, cohort / "results", patches=None))
    assert done.returncode == 2
    assert "--patches" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_other_patches_than_those_of_a_finished_fold_are_no_rerun(cohort: Path) -> None:
    """Fewer patches of the same slides make another result, so nothing is mixed unasked."""
    assert main.main(flags(cohort, cohort / "results")) == EXIT_OK
    shutil.copy(cohort / "results/run_s1/s_0_checkpoint.pt", cohort / "kept.pt")
    path = write_lmdb(cohort / "fewer.lmdb", {
        name: patch_pixels(index, count=4) for index, name in enumerate(SLIDES)})
    with pytest.raises(Refused, match="--overwrite"):
        main.main(flags(cohort, cohort / "results", patches=path))
    assert np.array_equal((cohort / "kept.pt").read_bytes(),
                          (cohort / "results/run_s1/s_0_checkpoint.pt").read_bytes())
