"""The minimum set of faults: where each is tested as a process, and those tested nowhere else.

``WHERE`` maps every row of the fault table's minimum set to the tests that break a script, run as
a child, in that way. Where many slides can be broken at once, one child meets them all and each
is a test of its own on what the child reported.
"""

from __future__ import annotations

import ast
import csv
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from tests.conftest import ROOT
from tests.feature_inputs import Inputs, make_inputs, write_patches, write_tiny_encoder
from tests.slides import tissue_image, write_pyramid
from tests.trained import spec_of, write_model
from tests.training import WIDTH, write_cohort
from utils.storage import read_h5, write_h5

Run = Callable[..., subprocess.CompletedProcess[str]]

WHERE: dict[str, tuple[str, ...]] = {
    "A1": ("test_patching.py::test_a1_killed_while_writing_the_h5",
           "test_extraction.py::test_killed_once_while_writing_heals_itself",
           "test_heatmaps.py::test_killed_at_any_write_then_finished",
           "test_crash_sweep.py::test_extraction"),
    "A4": ("test_patching.py::test_a4_truncated_h5_is_redone",
           "test_extraction.py::test_damaged_results_are_seen_and_mended",
           "test_minimum_set.py::test_a_broken_bag_is_told_and_the_others_train"),
    "A5": ("test_extraction.py::test_damaged_results_are_seen_and_mended",
           "test_minimum_set.py::test_a_broken_bag_is_told_and_the_others_train"),
    "A6": ("test_patching.py::test_a6_flipped_byte_is_redone",
           "test_extraction.py::test_damaged_results_are_seen_and_mended",
           "test_minimum_set.py::test_a_broken_bag_is_told_and_the_others_train"),
    "A8": ("test_patching.py::test_a8_disk_full_fails_the_slide_and_keeps_the_old",
           "test_patching.py::test_a8_file_size_limit_is_no_crash",
           "test_extraction.py::test_disk_full",
           "test_heatmaps.py::test_full_disk_fails_the_slide_and_leaves_nothing_half",
           "test_tables.py::test_a_full_disk_ends_in_one_line"),
    "A10": ("test_patching.py::test_a10_two_processes_share_the_work",
            "test_extraction.py::test_two_processes_share_a_folder",
            "test_extraction.py::test_a_slide_in_other_hands_is_listed_as_busy"),
    "A11": ("test_patching.py::test_a11_a_live_lock_is_respected_and_a_dead_ones_taken_over",
            "test_minimum_set.py::test_a11_whose_lock_it_is_decides"),
    "A14": ("test_patching.py::test_a14_interrupted_cleanly",
            "test_extraction.py::test_interrupted",
            "test_training.py::test_interrupted_ends_cleanly_and_goes_on",
            "test_heatmaps.py::test_sigterm_says_how_to_go_on",
            "test_minimum_set.py::test_a14_a_reader_that_has_seen_enough"),
    "A19": ("test_patching.py::test_a19_same_stem_is_refused_with_both_paths",
            "../cli/test_extract_features_fp.py::test_bad_tables_are_refused"),
    "A20": ("test_patching.py::test_a20_other_parameters_are_refused_and_nothing_is_touched",
            "../cli/test_extract_features_fp.py::"
            "test_other_settings_are_refused_with_the_difference",
            "test_minimum_set.py::test_a20_another_pixel_size_is_another_result",
            "test_minimum_set.py::test_a20_features_of_another_encoder_are_refused"),
    "B1": ("test_patching.py::test_b1_b2_bad_files_fail_alone_with_their_reason",
           "test_extraction.py::test_bad_slides_fail_alone"),
    "B2": ("test_patching.py::test_b1_b2_bad_files_fail_alone_with_their_reason",
           "test_extraction.py::test_bad_slides_fail_alone",
           "test_heatmaps.py::test_one_bad_slide_costs_itself_alone"),
    "B3": ("test_extraction.py::test_one_damaged_tile",),
    "B5": ("test_minimum_set.py::test_b5_pixel_sizes_that_cannot_be",
           "test_minimum_set.py::test_b5_the_process_list_knows_better"),
    "B9": ("test_patching.py::test_b9_blank_black_and_pen_only_slides",
           "test_minimum_set.py::test_a_broken_bag_is_told_and_the_others_train"),
    "B15": ("test_slides.py::test_bad_slides_are_listed_and_the_good_one_goes_on",
            "test_minimum_set.py::test_b15_bombs_are_refused_before_decoding",
            "test_minimum_set.py::test_b15_a_region_too_large_fails_its_slide"),
    "C1": ("test_tables.py::test_c1_every_way_to_save_a_table_gives_the_same_splits",
           "test_tables.py::test_c1_ids_that_look_like_something_else_stay_text"),
    "C4": ("test_minimum_set.py::test_c4_missing_features_need_a_word",
           "test_minimum_set.py::test_c4_both_differences_are_told"),
    "C5": ("test_minimum_set.py::test_c5_splits_that_lie_are_refused",),
    "C7": ("test_tables.py::test_c1_c2_c3_c7_bad_rows_are_refused_with_their_line",
           "test_tables.py::test_c7_splits_stay_in_their_folder",
           "test_patching.py::test_c7_ids_that_leave_the_folder",
           "test_minimum_set.py::test_c7_no_name_leaves_its_folder"),
    "C8": ("test_heatmaps.py::test_bad_yaml_ends_with_one_line",
           "test_minimum_set.py::test_c8_bad_settings_are_refused_in_one_line",
           "test_minimum_set.py::test_c8_numbers_and_words_are_read_by_their_type"),
    "D1": ("test_minimum_set.py::test_a_broken_bag_is_told_and_the_others_train",
           "test_minimum_set.py::test_d1_small_bags_are_learnt_from"),
    "D2": ("test_minimum_set.py::test_a_broken_bag_is_told_and_the_others_train",
           "test_minimum_set.py::test_d2_features_that_are_not_finite_are_never_written"),
    "D6": ("test_training.py::test_killed_and_run_again_gives_the_same_bytes",
           "test_crash_sweep.py::test_training"),
    "D8": ("test_evaluation.py::test_a_malicious_checkpoint_is_refused_and_nothing_ran",
           "test_minimum_set.py::test_a_broken_bag_is_told_and_the_others_train",
           "test_minimum_set.py::test_d8_malicious_encoder_weights_are_refused"),
}


def test_the_whole_minimum_set_is_tested() -> None:
    wanted = {"A": (1, 4, 5, 6, 8, 10, 11, 14, 19, 20), "B": (1, 2, 3, 5, 9, 15),
              "C": (1, 4, 5, 7, 8), "D": (1, 2, 6, 8)}
    assert set(WHERE) == {f"{row}{number}" for row, numbers in wanted.items()
                          for number in numbers}


@pytest.mark.parametrize("fault", WHERE)
def test_the_tests_named_exist_and_start_processes(fault: str) -> None:
    for name in WHERE[fault]:
        path, _, function = name.partition("::")
        tree = ast.parse((Path(__file__).parent / path).read_text(encoding="utf-8"))
        defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in defined, name
        assert starts_process(function, defined), name


def starts_process(name: str, defined: dict[str, ast.FunctionDef]) -> bool:
    """Does this function, or a fixture or function of its module that it uses, run a child?"""
    used, todo = set(), [name]
    while todo:
        one = defined.get(todo.pop())
        names = set() if one is None else {
            node.id if isinstance(node, ast.Name) else node.arg for node in ast.walk(one)
            if isinstance(node, ast.Name | ast.arg)}
        todo += names - used
        used |= names
    return bool(used & {"run_script", "subprocess"})


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line that says what is wrong."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def rows_of(path: Path, key: str) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row[key]: row for row in csv.DictReader(file)}


class Malice:
    """What an attacker puts into a pickle: makes the file it names."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


# ---------------------------------------------------------------------------- slides (B5, B15)

PIXEL_SIZES = {"missing": "gives none", "zero": "0 x 0", "nan": "pixel size unknown",
               "huge": "0.05 to 50 was expected", "dpi": "96 dpi", "axes": "more than 5 %"}


def patching(source: Path, out: Path, *flags: object) -> list[str]:
    return ["create_patches_fp.py", "--source", str(source), "--save_dir", str(out), "--seg",
            "--patch", "--preset", "bwh_biopsy.csv", *map(str, flags)]


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Like ``run_script``, for fixtures that live longer than a test."""

    def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)], cwd=ROOT, timeout=120,
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})

    return run


@dataclass(frozen=True)
class Ended:
    """A script that has run: where, and how it ended."""

    root: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def unsized(tmp_path_factory: pytest.TempPathFactory, run_once: Run) -> Ended:
    """Slides whose files lie about the pixel size, and one that does not."""
    root = tmp_path_factory.mktemp("unsized")
    (root / "slides").mkdir()
    image = tissue_image(1024, 1024, seed=1)
    for name, mpp in {"good": 0.5, "missing": None, "dpi": 25400 / 96}.items():
        write_pyramid(root / f"slides/{name}.tif", image, mpp=mpp)
    for name, text in {"zero": "0", "nan": "nan", "huge": "1e6"}.items():
        write_pyramid(root / f"slides/{name}.tif", image, mpp=None, photometric="rgb", description=(
            f"Aperio Image Library v11\r\n1024x1024 |AppMag = 20|MPP = {text}"))
    tifffile.imwrite(root / "slides/axes.tif", image, tile=(256, 256), compression="jpeg",
                     resolution=(20_000, 21_400), resolutionunit="CENTIMETER", metadata=None)
    return Ended(root, run_once(*patching(root / "slides", root / "out", "--require_mpp")))


@pytest.mark.parametrize("kind", PIXEL_SIZES)
def test_b5_pixel_sizes_that_cannot_be(unsized: Ended, kind: str) -> None:
    assert unsized.done.returncode == 3 and "Traceback" not in unsized.done.stderr
    row = rows_of(unsized.root / "out/report_patches.csv", "item")[f"{kind}.tif"]
    assert row["status"] == "failed"
    assert "pixel size unknown" in row["reason"] and PIXEL_SIZES[kind] in row["reason"]
    assert "column 'mpp'" in row["reason"]  # the remedy
    assert [path.name for path in (unsized.root / "out/patches").iterdir()] == ["good.h5"]


def test_b5_the_process_list_knows_better(unsized: Ended, tmp_path: Path, run_script: Run) -> None:
    (tmp_path / "own.csv").write_text(
        "slide_id,mpp\n" + "".join(f"{kind}.tif,0.25\n" for kind in PIXEL_SIZES))
    done = run_script(*patching(unsized.root / "slides", tmp_path, "--require_mpp",
                                "--process_list", "own.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    listed = rows_of(tmp_path / "process_list_autogen.csv", "slide_id")
    for kind in PIXEL_SIZES:
        assert listed[f"{kind}.tif"]["mpp_used"] == "0.25"
        parameters = read_h5(tmp_path / "patches" / f"{kind}.h5").parameters
        assert parameters is not None and parameters["mpp_override"] == 0.25


def test_a20_another_pixel_size_is_another_result(unsized: Ended, tmp_path: Path, run_script: Run
                                                  ) -> None:
    for mpp, code in (("0.25", 0), ("0.25", 0), ("0.3", 2)):
        (tmp_path / "own.csv").write_text(f"slide_id,mpp\ngood.tif,{mpp}\n")
        done = run_script(*patching(unsized.root / "slides", tmp_path, "--process_list",
                                    "own.csv"))
        assert done.returncode == code, done.stderr
    assert_refused(done, "mpp_override: file has 0.25, you ask 0.3", "--no_auto_skip")


@pytest.mark.parametrize("side", [2**31, 2**32 - 1, 2**25])
def test_b15_bombs_are_refused_before_decoding(side: int, slide_folder: Path, tmp_path: Path,
                                               run_script: Run) -> None:
    (tmp_path / "slides").mkdir()
    path = Path(shutil.copy(slide_folder / "slide_0.tif", tmp_path / "slides/bomb.tif"))
    os.link(slide_folder / "slide_1.tif", tmp_path / "slides/good.tif")
    with tifffile.TiffFile(path) as tif:
        place = tif.pages[0].tags["ImageWidth"].valueoffset
    data = bytearray(path.read_bytes())
    data[place:place + 4] = side.to_bytes(4, "little")
    path.write_bytes(data)
    code = ("import resource, sys, create_patches_fp\n"
            "from utils.errors import run_script\n"
            "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
            "sys.exit(run_script(create_patches_fp.main))")
    done = subprocess.run(
        [sys.executable, "-c", code, *patching(tmp_path / "slides", tmp_path / "out")[1:]],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    found = rows_of(tmp_path / "out/report_patches.csv", "item")
    assert found["good.tif"]["status"] == "done" and found["bomb.tif"]["status"] == "failed"
    assert re.search("announces|can open as a whole|cannot open", found["bomb.tif"]["reason"])


# ---------------------------------------------------------------------------- locks (A11)

@pytest.mark.parametrize(("owner", "status"), [
    ("this host, alive", "busy"), ("this host, dead", "done"), ("another host", "busy")])
def test_a11_whose_lock_it_is_decides(owner: str, status: str, slide_folder: Path, tmp_path: Path,
                                      run_script: Run) -> None:
    (tmp_path / "slides").mkdir()
    os.link(slide_folder / "slide_0.tif", tmp_path / "slides/a.tif")
    (tmp_path / "out/patches").mkdir(parents=True)
    lock = tmp_path / "out/patches/a.h5.lock"
    code = ("import sys, time; from filelock import SoftFileLock\n"
            "lock = SoftFileLock(sys.argv[1]); lock.acquire()\n"
            "print('held', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE,
                          text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        record = lock.read_text()
        if owner != "this host, alive":
            holder.kill()
            holder.wait()
        if owner == "another host":
            pid, _, *rest = record.splitlines()
            lock.write_text("\n".join([pid, "another-host", *rest]) + "\n")
        done = run_script(*patching(tmp_path / "slides", tmp_path / "out"))
        holder.kill()
    assert done.returncode == 0, done.stderr
    row = rows_of(tmp_path / "out/report_patches.csv", "item")["a.tif"]
    assert row["status"] == status
    assert ("busy  a.tif: process " in done.stdout) == (status == "busy")
    assert lock.exists() == (status == "busy")
    assert (tmp_path / "out/patches/a.h5").exists() == (status == "done")


# ---------------------------------------------------------------------------- interrupted (A14)

def test_a14_a_reader_that_has_seen_enough(slide_folder: Path, tmp_path: Path) -> None:
    """``| head``: nothing can be said any more; a line, no trace, and the next run goes on."""
    command = [sys.executable, *patching(slide_folder, tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        errors = run.stderr.read()
    assert run.returncode == 141
    assert "run the same command again" in errors and "Traceback" not in errors
    assert errors.count("\n") == 1
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.lock")) + list(tmp_path.rglob(".mw-tmp-*"))


# ---------------------------------------------------------------------------- settings (C7, C8)

@pytest.mark.parametrize("command", [
    ("create_heatmaps.py", "raw_save_dir: ../out"),
    ("create_heatmaps.py", "production_save_dir: a/../../out"),
    ("create_heatmaps.py", "save_exp_code: ../out"),
    ("create_heatmaps.py", "save_exp_code: /tmp/out"),
    ("main.py", "--exp_code", "../out"),
    ("main.py", "--exp_code", "/tmp/out"),
    ("main.py", "--exp_code", "..", "--feature_dir", "../out"),
    ("eval.py", "--save_exp_code", "../out", "--models_exp_code", "x"),
    ("eval.py", "--save_exp_code", "x", "--models_exp_code", "../out"),
    ("scripts/build_preset.py", "--preset_name", "../out"),
    ("extract_features_fp.py", "slide_id\n../../etc/passwd\n"),
    ("extract_features_fp.py", "slide_id\n/etc/passwd\n"),
], ids=lambda command: " ".join(command).replace("\n", " "))
def test_c7_no_name_leaves_its_folder(command: tuple[str, ...], tmp_path: Path, run_script: Run
                                      ) -> None:
    script, *flags = command
    (tmp_path / "work/patches").mkdir(parents=True)
    (tmp_path / "t.csv").write_text("slide_id,label\na,x\nb,y\n")
    if script == "create_heatmaps.py":
        (tmp_path / "c.yaml").write_text(f"exp_arguments: {{{flags[0]}}}\n")
        flags = ["--config_file", str(tmp_path / "c.yaml"), "--yes"]
    elif script == "extract_features_fp.py":
        (tmp_path / "t.csv").write_text(flags[0])
        flags = ["--csv_path", str(tmp_path / "t.csv"), "--data_h5_dir", str(tmp_path / "work"),
                 "--data_slide_dir", str(tmp_path), "--feat_dir", str(tmp_path / "out")]
    elif script in ("main.py", "eval.py"):
        flags += ["--csv_path", str(tmp_path / "t.csv"), "--label_dict", "x:0,y:1",
                  "--data_root_dir", str(tmp_path), "--device", "cpu"]
    done = run_script(script, *flags, cwd=tmp_path / "work")
    assert_refused(done)
    assert "plain name" in done.stderr or "leave" in done.stderr or "climbs out" in done.stderr
    assert not (tmp_path / "out").exists() and not Path("/tmp/out").exists()


@pytest.mark.parametrize(("text", "words"), [
    ("sede: 1", ("unknown key 'sede'", "did you mean 'seed'?")),
    ("k: [1, 2]", ("k is [1, 2], expected int",)),
    ("k: 2.5", ("k is 2.5, expected int",)),
    ("slide_level: maybe", ("slide_level is 'maybe', expected bool",)),
    ("scheme: kfolds", ("expected one of clam, kfold",)),
    ("val_frac: 2e0", ("val_frac is 2.0, expected from 0 to 1",)),
    ("split_dir: !!python/object/apply:os.system ['touch MARKER']", ("not plain YAML",)),
    ("a: &a [x]\nb: *a", ("uses YAML aliases",)),
    ("k: " + "[" * 500_000, ("nested too deeply",)),
    ("".join(f"{' ' * level}k:\n" for level in range(200)), ("nested too deeply",)),
    ("k: 1\n" + "#" * (1 << 20), ("larger than 1 MiB",)),
    ("- k\n", ("expected 'key: value' lines",)),
    ("k: 1\n\tseed: 2", ("not plain YAML",)),
], ids=["unknown", "list", "fraction", "bool", "choice", "limit", "tag", "alias", "deep",
        "deep block", "large", "no map", "tab"])
def test_c8_bad_settings_are_refused_in_one_line(text: str, words: tuple[str, ...], tmp_path: Path,
                                                 run_script: Run) -> None:
    (tmp_path / "c.yaml").write_text(text.replace("MARKER", str(tmp_path / "ran")))
    done = run_script("create_splits_seq.py", "--config", tmp_path / "c.yaml", "--task",
                      "task_1_tumor_vs_normal", "--splits_root", tmp_path / "out")
    assert_refused(done, *words)
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def test_c8_numbers_and_words_are_read_by_their_type(tmp_path: Path, run_script: Run) -> None:
    (tmp_path / "c.yaml").write_text("val_frac: 1e-1\ntest_frac: 2e-1\nslide_level: yes\n"
                                     "split_dir: 007\nk: 1\n")
    done = run_script("create_splits_seq.py", "--config", tmp_path / "c.yaml", "--task",
                      "task_1_tumor_vs_normal", "--splits_root", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "out").glob("*/splits.json")
    assert '"val_frac": 0.1' in record.read_text() and '"slide_level": true' in record.read_text()


# ---------------------------------------------------------------------------- training (C4, C5)

def save_bag(path: Path, features: np.ndarray) -> None:
    """A feature file of ours."""
    path.parent.mkdir(exist_ok=True)
    write_h5(path, {"features": features.astype(np.float32),
                    "coords": np.zeros((len(features), 2), np.int32)}, parameters={})


BROKEN_BAGS = {  # slide -> fault, status, what the report says
    "slide_12": ("A4", "failed", "truncated"),
    "slide_13": ("A5", "failed", "20 rows of features, but coords of shape (19, 2)"),
    "slide_14": ("A6", "failed", "altered after writing"),
    "slide_15": ("D1 B9", "empty", "no patches"),
    "slide_16": ("D2", "failed", "row 2 of"),
    "slide_17": ("D2", "failed", "row 3 of"),
    "slide_18": ("D8", "failed", "objects that could run code"),
    "slide_19": ("C4", "empty", "no features"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_once: Run) -> Ended:
    """main.py on a cohort in which a third of the bags cannot be used, and two are tiny."""
    root = tmp_path_factory.mktemp("trained")
    flags = write_cohort(root, slides=30, folds=1)  # training set: slide_14 to 29, then 00 ...
    h5, pt = root / "features/h5_files", root / "features/pt_files"
    bag = np.ones((20, WIDTH))
    for slide in ("slide_12", "slide_14"):
        save_bag(h5 / f"{slide}.h5", bag)
    data = (h5 / "slide_12.h5").read_bytes()
    (h5 / "slide_12.h5").write_bytes(data[:len(data) // 2])
    data = (h5 / "slide_14.h5").read_bytes()
    with pytest.MonkeyPatch.context() as patch:  # an edit that HDF5's own sums do not see
        patch.setattr("utils.storage.digest", lambda arrays: "0" * 64)
        save_bag(h5 / "slide_14.h5", bag)
    write_h5(h5 / "slide_13.h5", {"features": bag.astype(np.float32),
                                  "coords": np.zeros((19, 2), np.int32)}, parameters={})
    save_bag(h5 / "slide_15.h5", bag[:0])
    for slide, row, value in (("slide_16", 2, np.nan), ("slide_17", 3, np.inf)):
        bad = bag.copy()
        bad[row, 1] = value
        save_bag(h5 / f"{slide}.h5", bad)
    (pt / "slide_18.pt").write_bytes(pickle.dumps(Malice(root / "ran")))
    (pt / "slide_19.pt").unlink()
    for slide, rows in (("slide_20", 1), ("slide_21", 7)):
        torch.save(torch.ones(rows, WIDTH), pt / f"{slide}.pt")
    torch.save(torch.ones(5, WIDTH), pt / "stranger.pt")
    return Ended(root, run_once("main.py", *flags, "--allow_missing"))


@pytest.mark.parametrize("slide", BROKEN_BAGS)
def test_a_broken_bag_is_told_and_the_others_train(trained: Ended, slide: str) -> None:
    _, status, words = BROKEN_BAGS[slide]
    assert trained.done.returncode == 3 and "Traceback" not in trained.done.stderr
    found = rows_of(trained.root / "results/run_s1/report_train.csv", "item")
    assert found["fold 0"]["status"] == "done"
    assert found[slide]["status"] == status and words in found[slide]["reason"]
    assert f"{slide}: " in trained.done.stdout
    assert not (trained.root / "ran").exists()
    assert not list(trained.root.rglob("*.lock")) + list(trained.root.rglob(".mw-tmp-*"))


def test_d1_small_bags_are_learnt_from(trained: Ended) -> None:
    folder = trained.root / "results/run_s1"
    assert not {"slide_20", "slide_21"} & set(rows_of(folder / "report_train.csv", "item"))
    assert all(name in (folder / "splits_0.csv").read_text() for name in ("slide_20", "slide_21"))
    state = torch.load(folder / "s_0_checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())


def test_c4_both_differences_are_told(trained: Ended) -> None:
    assert "1 slides without features are left out: 'slide_19'" in trained.done.stdout
    assert "1 feature files" in trained.done.stdout and "'stranger'" in trained.done.stdout


@pytest.fixture
def cohort(tmp_path: Path) -> list[str]:
    return write_cohort(tmp_path, slides=16, folds=1)


def test_c4_missing_features_need_a_word(cohort: list[str], tmp_path: Path, run_script: Run
                                         ) -> None:
    for number in (3, 11):
        (tmp_path / f"features/pt_files/slide_{number:02}.pt").unlink()
    done = run_script("main.py", *cohort)
    assert_refused(done, "2 of 16 slides have no features", "'slide_03', 'slide_11'",
                   "--allow_missing")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("script", ["main.py", "eval.py"])
@pytest.mark.parametrize(("train", "test", "words"), [
    (("slide_00", "slide_01"), ("slide_02",), ("in two parts", "case_00 (train and test)")),
    (("slide_00", "slide_01", "slide_01"), ("slide_03",), ("'slide_01' twice",)),
    (("slide_00", "slide_01"), ("slide_01",), ("'slide_01' twice",)),
    (("slide_00", "slide_01"), ("slide_99",), ("'slide_99'", "not in")),
], ids=["patient", "column", "parts", "unknown"])
def test_c5_splits_that_lie_are_refused(
        cohort: list[str], tmp_path: Path, run_script: Run, script: str, train: tuple[str, ...],
        test: tuple[str, ...], words: tuple[str, ...]) -> None:
    table = tmp_path / "cohort.csv"
    table.write_text(table.read_text().replace("case_02", "case_00"))  # two slides of one patient
    rows = [f"{row},{slide},,{test[row] if row < len(test) else ''}"
            for row, slide in enumerate(train)]
    split = tmp_path / "splits/cohort_100/splits_0.csv"
    split.write_text("\n".join([",train,val,test", *rows]) + "\n")
    if script == "eval.py":
        write_model(tmp_path / "results/run_s1", 0, spec_of(embed_dim=WIDTH),
                    class_names=("class_0", "class_1"))
        kept = cohort[:cohort.index("--splits_root")]
        cohort = [*kept, "--k", "1", "--models_exp_code", "run_s1", "--save_exp_code", "e",
                  "--results_dir", str(tmp_path / "results"), "--splits_dir", str(split.parent),
                  "--output_root", str(tmp_path / "out"), "--device", "cpu"]
    done = run_script(script, *cohort)
    assert_refused(done, "splits_0.csv", *words)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("report_*"))


# ---------------------------------------------------------------------------- encoders (A20, D)

@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs") / "cohort", (6, 5))


@pytest.fixture(scope="module")
def extracted(inputs: Inputs, run_once: Run, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Features of a tiny encoder; of ``slide_1``, patches of 60,000 px were asked for."""
    root = tmp_path_factory.mktemp("extracted")
    flags = write_tiny_encoder(root / "tiny.pth")
    shutil.copytree(inputs.patches_root, root / "out")
    write_patches(root / "out", "slide_1", np.zeros((2, 2), np.int64), patch_px=60_000)
    own = Inputs(inputs.slides, root / "out", root / "out" / inputs.csv.name)
    return Ended(root, run_once("extract_features_fp.py", *own.arguments(root / "feat"), *flags))


def test_b15_a_region_too_large_fails_its_slide(extracted: Ended) -> None:
    assert extracted.done.returncode == 3 and "Traceback" not in extracted.done.stderr
    found = rows_of(extracted.root / "feat/report_features.csv", "item")
    assert found["slide_0"]["status"] == "done" and found["slide_1"]["status"] == "failed"
    assert "60000 x 60000 px is over the ceiling" in found["slide_1"]["reason"]
    assert not (extracted.root / "feat/h5_files/slide_1.h5").exists()


@pytest.mark.parametrize(("change", "words"), [
    ("weights", "encoder.weights_sha256: file has"), ("encoder", "encoder.name: file has"),
    ("size", "encoder.target_px: file has 64, you ask 96")])
def test_a20_features_of_another_encoder_are_refused(
        inputs: Inputs, extracted: Ended, tmp_path: Path, run_script: Run, change: str, words: str
        ) -> None:
    flags = ["--model_name", "timm:test_resnet", "--encoder_ckpt", extracted.root / "tiny.pth"]
    if change == "weights":
        state = torch.load(extracted.root / "tiny.pth", weights_only=True)
        torch.save({name: value * 2 for name, value in state.items()}, tmp_path / "other.pth")
        flags[3] = tmp_path / "other.pth"
    elif change == "encoder":
        flags = []
    else:
        flags += ["--target_patch_size", "96"]
    before = {path: path.read_bytes() for path in (extracted.root / "feat").rglob("*.*")}
    done = run_script("extract_features_fp.py", *inputs.arguments(extracted.root / "feat"), *flags)
    assert_refused(done, "slide_0", words, "another --feat_dir", "--no_auto_skip")
    assert {path: path.read_bytes() for path in (extracted.root / "feat").rglob("*.*")} == before


def test_d2_features_that_are_not_finite_are_never_written(
        inputs: Inputs, extracted: Ended, tmp_path: Path, run_script: Run) -> None:
    state = torch.load(extracted.root / "tiny.pth", weights_only=True)
    torch.save({name: value * torch.nan if value.is_floating_point() else value
                for name, value in state.items()}, tmp_path / "nan.pth")
    done = run_script("extract_features_fp.py", *inputs.arguments(tmp_path / "feat"),
                      "--model_name", "timm:test_resnet", "--encoder_ckpt", tmp_path / "nan.pth")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    for row in rows_of(tmp_path / "feat/report_features.csv", "item").values():
        assert row["status"] == "failed" and "not finite" in row["reason"]
    assert not list(tmp_path.glob("feat/*_files/*"))


def test_d8_malicious_encoder_weights_are_refused(
        inputs: Inputs, tmp_path: Path, run_script: Run) -> None:
    torch.save({"conv1.weight": Malice(tmp_path / "ran")}, tmp_path / "evil.pth")
    done = run_script("extract_features_fp.py", *inputs.arguments(tmp_path / "feat"),
                      "--model_name", "timm:test_resnet", "--encoder_ckpt", tmp_path / "evil.pth")
    assert_refused(done, "evil.pth", "could run code")
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("feat/*_files/*"))
