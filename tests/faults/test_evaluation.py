"""eval.py against bad input: refused before work or told in the report, never a wrong figure."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval as script
from tests.html_pages import read
from tests.trained import Cohort, make_cohort, spec_of, write_features, write_model
from utils.errors import Refused
from utils.objectives import TaskType
from utils.storage import read_h5

Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    """One fold, free to be damaged."""
    return make_cohort(tmp_path / "cohort", folds=1)


def evaluate(cohort: Cohort, **flags: Any) -> int:
    return script.main(cohort.flags(k=1, no_report=True, **flags))


def slides_of(cohort: Cohort) -> list[str]:
    """The test slides."""
    found = csv.DictReader((cohort.models / "splits_0.csv").open())
    return [row["test"] for row in found if row["test"]]


def outcome(cohort: Cohort) -> dict[str, Any]:
    return json.loads((cohort.root / "eval_results" / "EVAL_e" / "metrics.json").read_text())


def edit_record(cohort: Cohort, **values: Any) -> None:
    path = cohort.models / "s_0_checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one line that says what and what to do."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr, done.stderr


# ---------------------------------------------------------------- checkpoints (D7 D8 D9)

class _Run:
    """What an attacker puts into a pickle."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_a_malicious_checkpoint_is_refused_and_nothing_ran(
        cohort: Cohort, run_script: Script, tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "ran"
    path = cohort.models / "s_0_checkpoint.pt"
    value = {"attention_net.0.weight": _Run(f"touch {marker}")}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "torch")
    assert_refused(run_script("eval.py", *cohort.flags(k=1)), str(path), "refused")
    assert not marker.exists()
    assert not (cohort.root / "eval_results").exists()


@pytest.mark.parametrize(("damage", "words"), [
    ("missing", ["s_0_checkpoint.pt", "missing"]),
    ("half", ["truncated"]),
    ("empty", ["s_0_checkpoint.pt"]),
    ("tensor", ["holds a Tensor", "state dict"]),
    ("numbers", ["no tensor"]),
    ("other model", ["expected model type clam_sb, found model type clam_mb"]),
    ("other classes", ["expected number of classes 2", "3"]),
    ("other width", ["expected feature width 12", "20"]),
    ("other size", ["attention width"]),
])
def test_a_checkpoint_that_does_not_fit(cohort: Cohort, damage: str, words: list[str]) -> None:
    path = cohort.models / "s_0_checkpoint.pt"
    record = path.with_suffix(".json").read_bytes()
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage in ("half", "empty"):
        path.write_bytes(data[:len(data) // 2 if damage == "half" else 0])
    elif damage in ("tensor", "numbers"):
        torch.save(torch.zeros(2) if damage == "tensor" else {"a": 1.0}, path)
    else:
        other = {"other model": {"model_type": "clam_mb"}, "other classes": {"n_classes": 3},
                 "other width": {"embed_dim": 20}, "other size": {"model_size": "big"}}[damage]
        write_model(cohort.models, 0, spec_of(**other), described=False)
        path.with_suffix(".json").write_bytes(record)
    with pytest.raises(Refused) as error:
        evaluate(cohort)
    for word in words:
        assert word in str(error.value)
    assert not (cohort.root / "eval_results").exists()


@pytest.mark.parametrize(("values", "words"), [
    ({"fold": 3}, ["fold 3", "expected fold 0"]),
    ({"class_names": ["cancer", "benign"]}, ["cancer, benign", "benign, cancer"]),
    ({"spec": {**asdict(spec_of(3))}, "class_names": []}, ["(3)", "(2)"]),
    ({"spec": None}, ["no 'spec'"]),
    ({"spec": {"model_type": "clam_sb"}}, ["embed_dim, n_classes"]),
    ({"spec": {**asdict(spec_of()), "drop_uot": 1}}, ["drop_uot", "dropout"]),
    ({"spec": {**asdict(spec_of()), "model_type": "clam_bs"}}, ["clam_bs", "clam_sb"]),
    ({"checkpoint_sha256": "0" * 64}, ["altered after training"]),
    ({"encoder": {"name": "other", "weights_sha256": "a" * 64}}, ["encoder name other",
                                                                  "test_encoder"]),
    ({"encoder": {"name": "test_encoder", "weights_sha256": "b" * 64}}, ["weights_sha256"]),
])
def test_a_record_that_contradicts(cohort: Cohort, values: dict[str, Any],
                                   words: list[str]) -> None:
    edit_record(cohort, **values)
    with pytest.raises(Refused) as error:
        evaluate(cohort)
    for word in words:
        assert word in str(error.value)


def test_a_damaged_record_and_an_unfinished_fold(cohort: Cohort) -> None:
    record = cohort.models / "s_0_checkpoint.json"
    record.write_text('{"spec": ')
    with pytest.raises(Refused, match="not readable json"):
        evaluate(cohort)
    record.unlink()
    (cohort.models / "0").mkdir()
    (cohort.models / "0" / "state.pt").write_bytes(b"x")
    with pytest.raises(Refused, match="not finished"):
        evaluate(cohort, embed_dim=12)


def test_prefixed_names_are_converted_with_a_message(
        cohort: Cohort, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(cohort)
    plain = outcome(cohort)["folds"]["0"]
    path = cohort.models / "s_0_checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({f"module.{name}": value for name, value in state.items()}, path)
    capsys.readouterr()
    evaluate(cohort, overwrite=True)
    assert "s_0_checkpoint.pt: removed the prefix" in capsys.readouterr().out
    assert outcome(cohort)["folds"]["0"] == plain


def test_a_model_whose_weights_are_not_numbers(cohort: Cohort) -> None:
    path = cohort.models / "s_0_checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["classifiers.bias"][:] = float("nan")
    torch.save(state, path)
    assert evaluate(cohort) == 3
    found = outcome(cohort)
    assert found["folds"]["0"]["slides"] == 0 and set(found["failed"]) == set(slides_of(cohort))
    assert "not finite" in found["failed"][slides_of(cohort)[0]]
    assert found["folds"]["0"]["metrics"]["auc"]["value"] is None


# ---------------------------------------------------------------- features (C4 D1 D2 D3)

def test_features_that_do_not_fit(cohort: Cohort) -> None:
    for slide in slides_of(cohort):
        write_features(cohort.features / f"{slide}.h5", np.zeros((4, 20), np.float32))
    with pytest.raises(Refused, match="expects features of width 12, found 20"):
        evaluate(cohort)
    slide = slides_of(cohort)[0]
    write_features(cohort.features / f"{slide}.h5", np.zeros((4, 12), np.float32))
    with pytest.raises(Refused, match="another width"):
        evaluate(cohort)


def test_bad_bags_fail_or_are_left_out_and_the_others_go_on(cohort: Cohort) -> None:
    slides = slides_of(cohort)
    nan, empty, broken, small = slides[:4]
    bag = np.ones((5, 12), np.float32)
    bag[3, 2] = np.nan
    write_features(cohort.features / f"{nan}.h5", bag)
    write_features(cohort.features / f"{empty}.h5", np.zeros((0, 12), np.float32))
    (cohort.features / f"{broken}.h5").write_bytes(b"\x89HDF")
    write_features(cohort.features / f"{small}.h5", np.ones((1, 12), np.float32))
    assert evaluate(cohort) == 3
    found = outcome(cohort)
    assert set(found["failed"]) == {nan, broken} and "row 3" in found["failed"][nan]
    assert found["left_out"] == {empty: "no patches"}
    assert found["folds"]["0"]["slides"] == len(slides) - 3
    for slide in (nan, broken):  # repaired: the same command evaluates again, nothing is refused
        write_features(cohort.features / f"{slide}.h5", np.ones((5, 12), np.float32))
    assert evaluate(cohort) == 0
    assert outcome(cohort)["folds"]["0"]["slides"] == len(slides) - 1


def test_features_without_slides_are_told(cohort: Cohort,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(cohort)
    assert "not in the table" not in capsys.readouterr().out
    shutil.copy(cohort.features / f"{slides_of(cohort)[0]}.h5", cohort.features / "stranger.h5")
    evaluate(cohort, overwrite=True)
    assert "1 feature files" in (told := capsys.readouterr().out) and "'stranger'" in told


def test_changed_features_are_evaluated_again(cohort: Cohort,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(cohort)
    before = outcome(cohort)
    write_features(cohort.features / f"{slides_of(cohort)[0]}.h5", np.ones((9, 12), np.float32))
    capsys.readouterr()
    assert evaluate(cohort) == 0
    assert "already done" not in capsys.readouterr().out
    assert outcome(cohort)["identity"]["inputs"] != before["identity"]["inputs"]


# ---------------------------------------------------------------- folds (C5 C6 D12)

def write_split(cohort: Cohort, test: list[str]) -> None:
    train = [slide for slide in cohort.table.slide_ids if slide not in test]
    with (cohort.models / "splits_0.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "train", "val", "test"])
        for row in range(max(len(train), len(test))):
            writer.writerow([row, train[row] if row < len(train) else "", "",
                             test[row] if row < len(test) else ""])


def of_class(cohort: Cohort, label: int) -> list[str]:
    cases = dict.fromkeys(case for case, found in
                          zip(cohort.table.case_ids, cohort.table.labels, strict=True)
                          if found == label)
    first = set(list(cases)[:3])
    return [slide for slide, case in zip(cohort.table.slide_ids, cohort.table.case_ids, strict=True)
            if case in first]


def test_a_fold_of_one_class(cohort: Cohort) -> None:
    write_split(cohort, of_class(cohort, 1))
    assert script.main(cohort.flags(k=1)) == 0
    auc = outcome(cohort)["folds"]["0"]["metrics"]["auc"]
    assert auc["value"] is None and auc["reason"] == "only class 1 has slides"
    assert auc["valid"] == 0
    accuracy = outcome(cohort)["folds"]["0"]["metrics"]["accuracy"]
    assert accuracy["valid"] == 50 and accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    folder = cohort.root / "eval_results" / "EVAL_e"
    (row,) = csv.DictReader((folder / "summary.csv").open())
    assert float(row["test_auc"]) == -1
    text = "".join(read((folder / "report.html").read_text(encoding="utf-8")).text)
    assert "AUC is not defined (only class 1 has slides)" in text


def test_a_fold_of_one_patient(cohort: Cohort) -> None:
    case = next(case for case in cohort.table.case_ids if cohort.table.case_ids.count(case) == 2)
    write_split(cohort, [slide for slide, found in zip(
        cohort.table.slide_ids, cohort.table.case_ids, strict=True) if found == case])
    assert script.main(cohort.flags(k=1)) == 0
    found = outcome(cohort)["folds"]["0"]
    assert found["patients"] == 1 and found["slides"] == 2
    accuracy = found["metrics"]["accuracy"]
    assert (accuracy["low"], accuracy["valid"]) == (None, 0) and "one patient" in accuracy["reason"]


def test_equal_scores_everywhere(cohort: Cohort) -> None:
    path = cohort.models / "s_0_checkpoint.pt"
    torch.save({name: torch.zeros_like(value) for name, value in
                torch.load(path, weights_only=True).items()}, path)
    assert script.main(cohort.flags(k=1)) == 0
    auc = outcome(cohort)["folds"]["0"]["metrics"]["auc"]
    assert auc["value"] == auc["low"] == auc["high"] == 0.5 and 0 < auc["valid"] <= 50


@pytest.mark.parametrize(("change", "words"), [
    (lambda text: text.replace(",s06", ",stranger"), "stranger"),
    (lambda text: "", "split"),
    (lambda text: text.replace("test", "tset"), "'test'"),
    (None, "splits_0.csv cannot be read"),
])
def test_split_files_that_are_wrong(cohort: Cohort, change: Callable[[str], str] | None,
                                    words: str) -> None:
    path = cohort.models / "splits_0.csv"
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(Refused, match=words):
        evaluate(cohort)


def test_no_slides_to_evaluate(cohort: Cohort) -> None:
    write_split(cohort, of_class(cohort, 1))
    with pytest.raises(Refused, match="no val slides"):
        evaluate(cohort, split="val")


# ---------------------------------------------------------------- other tasks, other levels

@pytest.mark.parametrize("task_type", ["multilabel", "regression", "survival"])
def test_bad_bags_of_every_task(tmp_path: Path, task_type: TaskType) -> None:
    """Every slide of a fold fails: no figure, no picture, and a reason; of one: the others go on.
    """
    cohort = make_cohort(tmp_path / "cohort", task_type=task_type)
    slides = slides_of(cohort)
    for slide in slides:
        write_features(cohort.features / f"{slide}.h5", np.full((3, 12), np.nan, np.float32))
    assert script.main(cohort.flags()) == 3
    found = outcome(cohort)
    assert found["folds"]["0"]["slides"] == 0 and set(slides) <= set(found["failed"])
    assert {item["reason"] for item in found["folds"]["0"]["metrics"].values()} == {
        "no slide was evaluated"}
    assert found["folds"]["1"]["slides"] > 0 and found["pooled"]["slides"] > 0
    page = (cohort.root / "eval_results" / "EVAL_e" / "report.html").read_text(encoding="utf-8")
    assert "is not finite" in "".join(read(page).text)
    assert script.main(cohort.flags(k=1, overwrite=True)) == 3  # nothing at all to show
    assert not list((cohort.root / "eval_results" / "EVAL_e" / "plots").glob("*"))


def test_survival_without_events(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path / "cohort", task_type="survival", folds=1)
    table, tested = cohort.root / "cohort.csv", slides_of(cohort)
    rows = list(csv.DictReader(table.open()))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "death": int(row["slide_id"] not in tested)} for row in rows)
    assert script.main(cohort.flags(k=1)) == 0
    found = outcome(cohort)["folds"]["0"]
    assert found["metrics"]["c_index"]["reason"] == "no slide has an event"
    assert found["log_rank"]["p_value"] is None
    folder = cohort.root / "eval_results" / "EVAL_e"
    assert next(csv.DictReader((folder / "summary.csv").open()))["test_c_index"] == ""
    text = "".join(read((folder / "report.html").read_text(encoding="utf-8")).text)
    assert "C-index is not defined (no slide has an event)" in text
    assert (folder / "plots" / "kaplan_meier.png").stat().st_size > 1000


def test_levels_that_do_not_correspond_fail_alone(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path / "cohort", folds=1)
    spec = spec_of(model_type="hag_mil", n_levels=2, options={"hidden_dims": (16, 8)})
    write_model(cohort.models, 0, spec, child_levels=[0])
    good, *_ = slides = slides_of(cohort)
    with pytest.raises(Refused, match="folder .*features_level_0_corresponding .* does not exist"):
        evaluate(cohort)
    finer = cohort.root / "features_level_0_corresponding" / "pt_files"
    finer.mkdir(parents=True)
    for slide in slides:
        rows = len(read_h5(cohort.features / f"{slide}.h5").arrays["features"])
        torch.save(torch.ones(rows * (4 if slide == good else 3), 12), finer / f"{slide}.pt")
    assert evaluate(cohort) == 3
    found = outcome(cohort)
    assert found["folds"]["0"]["slides"] == 1 and set(found["failed"]) == set(slides[1:])
    assert "expected for the" in found["failed"][slides[1]]


# ---------------------------------------------------------------- names (B13 C7), folders (A9)

def test_hostile_names_stay_text(tmp_path: Path) -> None:
    names = ["<script>alert(1)<&script>", '"><img src=x onerror=alert(1)>', "スライド ü", "=1+1",
             "a,b;c", "# %41 'q'", "-rf", "{{7*7}}"]
    cohort = make_cohort(tmp_path, folds=1, names=[*names, *(f"s{n}" for n in range(16))])
    path = cohort.models / "s_0_checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "classifiers.bias": torch.tensor([-9.0, 9.0])}, path)  # always class 1
    assert script.main(cohort.flags(k=1, split="all")) == 0
    folder = tmp_path / "eval_results" / "EVAL_e"
    found = [row["slide_id"] for row in csv.DictReader((folder / "fold_0.csv").open(
        encoding="utf-8"))]
    assert found == list(cohort.table.slide_ids)
    wrong = [row["slide_id"] for row in csv.DictReader((folder / "fold_0.csv").open(
        encoding="utf-8")) if row["Y"] != row["Y_hat"]]
    reader = read((folder / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "iframe"} & set(reader.tags) and reader.tags.count("img") == 4
    assert len(set(wrong) & set(names)) >= 3
    assert all(name in "".join(reader.text) for name in wrong)


@pytest.mark.parametrize("flags", [{"save_exp_code": "../out"}, {"save_exp_code": "/abs"},
                                   {"models_exp_code": "../../etc"}, {"feature_dir": "../x"}])
def test_no_name_leaves_its_folder(cohort: Cohort, flags: dict[str, str]) -> None:
    with pytest.raises(Refused):
        evaluate(cohort, **flags)
    assert not (cohort.root / "out").exists() and not (cohort.root / "eval_results").exists()


def test_an_output_folder_that_cannot_be(cohort: Cohort) -> None:
    (cohort.root / "file").write_text("in the way")
    with pytest.raises(Refused, match="choose another folder"):
        evaluate(cohort, output_root=cohort.root / "file")


@pytest.mark.parametrize("flags", [{"k_start": 5}, {"k_start": 0, "k_end": 0}, {"k": 0},
                                   {"n_bootstrap": -1}, {"seed": -1}, {"embed_dim": 0}])
def test_numbers_out_of_range(cohort: Cohort, flags: dict[str, int]) -> None:
    with pytest.raises(Refused):
        script.main(cohort.flags(**{"k": 1, **flags}))


# ---------------------------------------------------------------- killed (A1), disk full (A8)

def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith("report_eval")  # holds seconds
            and path.name != "metrics.json"}  # holds the checksum of those


def figures(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "metrics.json").read_text())
    return {key: found[key] for key in ("folds", "pooled", "identity", "class_names")}


@pytest.mark.parametrize(("action", "nth"), [("kill", 2), ("enospc", 5), ("kill", 11)])
def test_killed_while_writing_and_run_again(cohort: Cohort, run_script: Script, nth: int,
                                            action: str) -> None:
    """Files: txt, fold, summary, two reports, four plots, page, metrics."""
    folder = cohort.root / "eval_results" / "EVAL_e"
    script.main(cohort.flags(k=1))
    whole, numbers = contents(folder), figures(folder)
    shutil.rmtree(folder)
    done = run_script("eval.py", *cohort.flags(k=1),
                      env={"MILWRIGHT_FAULT": f"storage.replace:{action}:{nth}"})
    if action == "kill":
        assert done.returncode == -9
    else:
        assert done.returncode == 3 and "Traceback" not in done.stderr
        assert "no space left" in done.stderr
    assert not (folder / "metrics.json").exists()
    assert script.main(cohort.flags(k=1)) == 0
    assert figures(folder) == numbers
    assert {name: data for name, data in contents(folder).items()
            if not Path(name).name.startswith(".mw-tmp-")} == whole
