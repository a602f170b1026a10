"""create_splits_seq.py as typed: the commands of the docstring, and what every flag changes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import create_splits_seq
from tests.conftest import ROOT
from utils.errors import Refused

Run = Callable[..., CompletedProcess[str]]
TASK = "task_1_tumor_vs_normal"


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """80 patients of two slides; label and stage disagree; p00 has both labels."""
    path = tmp_path / "cohort.csv"
    rows = [f"p{number:02d},s{number:02d}{slide},{'ab'[number % 2]},{'xy'[number < 40]}"
            for number in range(80) for slide in "01"]
    rows[1] = rows[1].replace(",a,", ",b,")
    path.write_text("case_id,slide_id,label,stage\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def make(cohort: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run ``main`` on the cohort in this process; returns the folder of splits."""

    def call(*flags: object, label_dict: str = "a:0,b:1", folder: str = "cohort_100") -> Path:
        argv = ["--csv_path", cohort, "--label_dict", label_dict, "--k", 2,
                "--splits_root", tmp_path / "out", *flags]
        assert create_splits_seq.main([str(flag) for flag in argv]) == 0
        return tmp_path / "out" / folder

    return call


def parts(folder: Path, fold: int = 0) -> dict[str, list[str]]:
    with (folder / f"splits_{fold}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {part: [row[part] for row in rows if row[part]] for part in ("train", "val", "test")}


def record(folder: Path) -> dict[str, object]:
    parameters: dict[str, object] = json.loads((folder / "splits.json").read_text())["parameters"]
    return parameters


@pytest.mark.parametrize(("task", "folder"), [
    (TASK, "task_1_tumor_vs_normal_100"),
    ("task_2_tumor_subtyping", "task_2_tumor_subtyping_100")])
def test_clams_commands_run_from_a_fresh_clone(
        run_script: Run, tmp_path: Path, task: str, folder: str) -> None:
    command = ("create_splits_seq.py", "--task", task, "--seed", 1, "--k", 10,
               "--splits_root", tmp_path)
    first = run_script(*command)
    assert first.returncode == 0, first.stderr
    assert "10 splits written" in first.stdout and "no patient is in two parts" in first.stdout
    made = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
    assert len(made) == 31
    again = run_script(*command)
    assert again.returncode == 0 and "10 splits already done" in again.stdout
    assert made == {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}


def test_other_parameters_are_refused_then_replaced(run_script: Run, tmp_path: Path) -> None:
    command = ("create_splits_seq.py", "--task", TASK, "--k", 3, "--splits_root", tmp_path)
    assert run_script(*command).returncode == 0
    before = parts(tmp_path / f"{TASK}_100")
    other = run_script(*command, "--seed", 2)
    assert other.returncode == 2
    assert other.stderr.startswith("error: ") and other.stderr.count("\n") == 1
    assert "seed: file has 1, you ask 2" in other.stderr
    assert parts(tmp_path / f"{TASK}_100") == before
    assert run_script(*command, "--seed", 2, "--overwrite").returncode == 0
    assert parts(tmp_path / f"{TASK}_100") != before


def test_killed_while_writing_then_run_again(run_script: Run, tmp_path: Path) -> None:
    command = ("create_splits_seq.py", "--task", TASK, "--k", 3, "--splits_root")
    assert run_script(*command, tmp_path / "whole").returncode == 0
    killed = run_script(*command, tmp_path / "again",
                        env={"MILWRIGHT_FAULT": "storage.replace:kill:5"})
    assert killed.returncode == -9
    done = run_script(*command, tmp_path / "again")
    assert done.returncode == 0 and "3 splits written" in done.stdout
    whole, again = ({path.name: path.read_bytes() for path in (root / f"{TASK}_100").iterdir()
                     if not path.name.startswith(".mw-tmp-")}
                    for root in (tmp_path / "whole", tmp_path / "again"))
    assert whole == again


def test_importing_the_script_loads_no_torch(run_script: Run) -> None:
    import subprocess
    import sys

    code = "import create_splits_seq, sys; assert not {'torch', 'pandas'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_seed_k_and_shares(make: Callable[..., Path]) -> None:
    first = make("--split_dir", "one", folder="one")
    other = make("--split_dir", "two", "--seed", 5, "--k", 4, "--val_frac", 0.2, "--test_frac",
                 0.3, folder="two")
    assert len(list(first.glob("splits_?.csv"))) == 2
    assert len(list(other.glob("splits_?.csv"))) == 4
    assert {part: len(ids) // 2 for part, ids in parts(first).items()} == {
        "train": 64, "val": 8, "test": 8}
    assert {part: len(ids) // 2 for part, ids in parts(other).items()} == {
        "train": 40, "val": 16, "test": 24}
    seeded = make("--split_dir", "three", "--seed", 5, folder="three")
    assert parts(seeded)["test"] != parts(first)["test"]


def test_label_frac_names_the_folder_and_cuts_training(make: Callable[..., Path]) -> None:
    half = parts(make("--label_frac", 0.5, folder="cohort_50"))
    whole = parts(make())
    assert set(half["train"]) < set(whole["train"])
    assert (len(half["train"]), len(whole["train"])) == (66, 128)  # 16 + 17 of 31 + 33 patients
    assert half["test"] == whole["test"]


def test_no_single_label_frac_makes_five_folders(make: Callable[..., Path]) -> None:
    root = make("--label_frac", -1).parent
    assert sorted(path.name for path in root.iterdir()) == [
        f"cohort_{percent}" for percent in (10, 100, 25, 50, 75)]
    make("--label_frac", 0, "--split_dir", "mine")
    assert (root / "mine_25" / "splits_0.csv").exists()


def test_subset_random_keeps_other_labels(make: Callable[..., Path]) -> None:
    first = parts(make("--label_frac", 0.5, "--split_dir", "f", folder="f"))
    random = parts(make("--label_frac", 0.5, "--split_dir", "r", "--subset", "random", folder="r"))
    assert set(first["train"]) != set(random["train"])
    assert len(first["train"]) == len(random["train"])
    assert first["val"] == random["val"]


def test_scheme_kfold_tests_each_patient_once(make: Callable[..., Path]) -> None:
    folder = make("--scheme", "kfold", "--k", 5)
    tested = [slide_id for fold in range(5) for slide_id in parts(folder, fold)["test"]]
    assert len(tested) == len(set(tested)) == 160
    drawn = make("--k", 5, "--split_dir", "clam", folder="clam")
    assert len({slide_id for fold in range(5) for slide_id in parts(drawn, fold)["test"]}) < 160


def test_label_col_and_label_dict(make: Callable[..., Path]) -> None:
    folder = make("--label_col", "stage", label_dict="x:0,y:1")
    text = (folder / "splits_0_descriptor.csv").read_text()
    assert text.splitlines()[1:] == ["x,64,8,8", "y,64,8,8"]
    assert record(folder)["label_col"] == "stage"


def test_patient_voting_moves_a_patient_to_another_class(
        make: Callable[..., Path]) -> None:
    highest = make("--split_dir", "max", folder="max")
    majority = make("--patient_voting", "maj", "--split_dir", "maj", folder="maj")
    assert record(highest)["patient_voting"] == "max"
    assert record(majority)["patient_voting"] == "maj"
    assert parts(highest)["train"] != parts(majority)["train"]


def test_slide_level_divides_slides_of_one_patient(
        make: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    split = parts(make("--slide_level"))
    assert {name[:3] for name in split["train"]} & {name[:3] for name in split["test"]}
    assert "whatever their patients" in capsys.readouterr().out


def test_custom_test_ids_are_the_test_set(make: Callable[..., Path], tmp_path: Path) -> None:
    ids = tmp_path / "test.txt"
    ids.write_text("p41\n\np02\n")
    folder = make("--custom_test_ids", ids)
    for fold in range(2):
        assert parts(folder, fold)["test"] == ["s410", "s411", "s020", "s021"]


def test_tasks_file_brings_ones_own_task(cohort: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("staging: {csv_path: cohort.csv, label_col: stage, label_dict: {x: 0, y: 1}}")
    argv = ["--tasks_file", str(tasks), "--task", "staging", "--splits_root", str(tmp_path), "--k",
            "1"]
    assert create_splits_seq.main(argv) == 0
    assert (tmp_path / "staging_100" / "splits_0.csv").exists()


def test_a_config_file_gives_the_defaults(make: Callable[..., Path], tmp_path: Path) -> None:
    config = tmp_path / "splits.yaml"
    config.write_text("seed: 9\nsplit_dir: from_yaml\n")
    assert record(make("--config", config, folder="from_yaml"))["seed"] == 9


@pytest.mark.parametrize(("flags", "message"), [
    (["--scheme", "kfold", "--test_frac", "0.2"], "--test_frac out"),
    (["--scheme", "kfold", "--k", "1"], "--k 2 or more"),
    (["--split_dir", "../elsewhere"], "leave the folder"),
    (["--split_dir", "/tmp/elsewhere"], "leave the folder"),
    (["--val_frac", "0.6", "--test_frac", "0.4"], "nothing would be left"),
    (["--label_frac", "1.5"], "--label_frac is 1.5"),
    (["--label_frac", "nan"], "--label_frac is nan"),
    (["--k", "0"], "at least 1"),
    (["--seed", "-1"], "--seed is -1"),
    (["--custom_test_ids", "/nowhere"], "cannot be read"),
    (["--custom_test_ids", "/dev/null"], "holds no ids"),
    (["--splits_root", "/proc/none"], "cannot be written"),
])
def test_what_cannot_be_honoured_is_refused(
        make: Callable[..., Path], tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        make(*flags)
    assert not (tmp_path / "out").exists() and not Path("/tmp/elsewhere").exists()


def test_a_class_missing_from_a_test_set_is_reported(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_text("slide_id,label\n" + "".join(f"s{row},{'ab'[row < 3]}\n" for row in range(30)))
    argv = ["--csv_path", str(table), "--label_dict", "a:0,b:1", "--k", "1", "--splits_root",
            str(tmp_path)]
    assert create_splits_seq.main(argv) == 0
    out = capsys.readouterr().out
    assert "no test slide of class 'b'" in out and "its own patient" in out


@pytest.mark.parametrize(("flags", "strata"), [
    (["--task_type", "survival", "--time_col", "months", "--event_col", "died"],
     ("censored", "event")),
    (["--task_type", "multilabel", "--label_cols", "er", "pr"], ("not er", "er")),
    (["--task_type", "regression", "--label_cols", "months"],
     ("months up to", "months above"))])
def test_other_task_types_are_divided_by_patient_and_stratum(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str],
        strata: tuple[str, ...]) -> None:
    table = tmp_path / "t.csv"
    rows = [f"p{row // 2:02d},s{row:03d},{row // 2 + 0.5},{'no' if row % 6 < 2 else 'yes'},"
            f"{row % 2},{'' if row % 5 else int(row % 10 == 0)}" for row in range(90)]
    table.write_text("case_id,slide_id,months,died,er,pr\n" + "\n".join(rows) + "\n")
    argv = ["--csv_path", str(table), *flags, "--k", "3", "--scheme", "kfold", "--splits_root",
            str(tmp_path / "out")]
    assert create_splits_seq.main(argv) == 0
    out = capsys.readouterr().out
    assert "checked: no patient is in two parts" in out
    assert all(name in out for name in strata)
    folder = tmp_path / "out" / "t_100"
    tested = [slide for fold in range(3) for slide in parts(folder, fold)["test"]]
    assert sorted(tested) == [f"s{row:03d}" for row in range(90)]
    assert record(folder)["task_type"] == flags[1] and "label_dict" not in record(folder)
    assert create_splits_seq.main(argv) == 0 and "already done" in capsys.readouterr().out
    table.write_text(table.read_text().replace(",0.5,", ",0.25,").replace("s000,0.25,no,0,1",
                                                                          "s000,0.25,no,0,0"))
    with pytest.raises(Refused, match="other parameters"):  # the truths are part of the record
        create_splits_seq.main(argv)


@pytest.mark.parametrize("name", ["survival", "multilabel", "regression"])
def test_the_example_tables_give_splits(tmp_path: Path, name: str) -> None:
    argv = ["--task", f"example_{name}", "--splits_root", str(tmp_path), "--k", "5"]
    assert create_splits_seq.main(argv) == 0
    assert len(list((tmp_path / f"example_{name}_100").glob("splits_*.csv"))) == 15
