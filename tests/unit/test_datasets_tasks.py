"""Tasks by name, by flags, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datasets.table import load_table
from datasets.tasks import load_task
from tests.conftest import ROOT
from utils.errors import Refused

TASKS = ROOT / "dataset_csv" / "tasks.yaml"


def write_tasks(folder: Path, text: str) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_two_named_tasks_are_those_of_clam() -> None:
    first = load_task("task_1_tumor_vs_normal", tasks_file=TASKS)
    assert first.label_dict == {"normal_tissue": 0, "tumor_tissue": 1}
    assert first.feature_dir == "tumor_vs_normal_resnet_features"
    assert (first.patient_voting, first.subtyping_required, first.n_classes) == ("max", False, 2)
    assert first.csv_path.name == "tumor_vs_normal_dummy_clean.csv"
    second = load_task("task_2_tumor_subtyping", tasks_file=TASKS)
    assert second.feature_dir == "tumor_subtyping_resnet_features"
    assert (second.patient_voting, second.subtyping_required, second.n_classes) == ("maj", True, 3)


def test_the_table_of_a_named_task_is_found_from_any_folder(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.csv").write_text("slide_id,label\na,x\n")
    tasks = write_tasks(tmp_path, "mine: {csv_path: own.csv, label_dict: {x: 0, y: 1}}")
    monkeypatch.chdir("/")
    assert load_task("mine", tasks_file=tasks).csv_path == tmp_path / "own.csv"


def test_flags_alone_make_a_task() -> None:
    task = load_task(None, csv_path=Path("some/cohort.csv"), label_dict={"a": 0, "b": 1},
                     label_col="grade", feature_dir="resnet", patient_voting="maj")
    assert (task.name, task.label_col, task.feature_dir) == ("cohort", "grade", "resnet")
    assert task.patient_voting == "maj"


def test_flags_go_over_a_named_task() -> None:
    task = load_task("task_1_tumor_vs_normal", csv_path=Path("other.csv"), feature_dir="",
                     tasks_file=TASKS)
    assert (task.name, task.csv_path, task.feature_dir) == (
        "task_1_tumor_vs_normal", Path("other.csv"), "")
    assert task.label_dict == {"normal_tissue": 0, "tumor_tissue": 1}


def test_several_names_share_a_class_and_the_first_names_it(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path, "grades:\n  csv_path: t.csv\n"
                                  "  label_dict: {G1: 0, G2: 0, G3: 1}\n  ignore: [GX]\n"
                                  "  filter_dict: {site: [A, B]}\n")
    task = load_task("grades", tasks_file=tasks)
    assert (task.n_classes, task.class_names) == (2, ("G1", "G3"))
    assert (task.ignore, task.filter_dict) == (("GX",), {"site": ("A", "B")})


def test_a_map_in_any_order_gives_names_in_class_order() -> None:
    task = load_task(None, csv_path=Path("t.csv"), label_dict={"tumor": 1, "normal": 0})
    assert task.class_names == ("normal", "tumor")


@pytest.mark.parametrize(("text", "name", "message"), [
    ("alpha: {csv_path: t.csv, label_dict: {a: 0, b: 1}}", "alhpa", "did you mean 'alpha'"),
    ("alpha: {csv_path: t.csv, label_dic: {a: 0}}", "alpha", "did you mean 'label_dict'"),
    ("alpha: {csv_path: t.csv, label_dict: tumor}", "alpha", "label_dict is 'tumor'"),
    ("alpha: {name: beta, csv_path: t.csv}", "alpha", "unknown key 'name'"),
    ("alpha: {csv_path: t.csv, label_dict: {a: zero}}", "alpha", "label_dict"),
    ("alpha: {csv_path: t.csv, label_dict: {a: 0, b: 2}}", "alpha", "without a gap"),
    ("alpha: {csv_path: t.csv, label_dict: {a: 0}}", "alpha", "at least two"),
    ("alpha: {csv_path: t.csv, label_dict: {a: 0, b: 1}, patient_voting: mean}", "alpha",
     "one of max, maj"),
    ("alpha: {label_dict: {a: 0, b: 1}}", "alpha", "no csv_path"),
    ("alpha: 3", "alpha", "key: value"),
    ("alpha: !!python/object/apply:os.getcwd []", "alpha", "not plain YAML"),
    ("../up: {csv_path: t.csv, label_dict: {a: 0, b: 1}}", "../up", "plain name"),
])
def test_bad_tasks_are_refused(tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        load_task(name, tasks_file=write_tasks(tmp_path, text))


def test_nothing_given_and_no_tasks_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--task"):
        load_task(None)
    with pytest.raises(Refused, match="cannot be read"):
        load_task("x", tasks_file=tmp_path / "none.yaml")


def test_a_missing_map_is_asked_for_with_the_labels_found(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("slide_id,label\na,tumor\nb,normal\n")
    with pytest.raises(Refused, match="--label_dict normal:0,tumor:1"):
        load_task(None, csv_path=tmp_path / "t.csv")
    with pytest.raises(Refused, match="no column 'grade'"):
        load_task(None, csv_path=tmp_path / "t.csv", label_col="grade")


def test_the_three_examples_of_other_types_load_as_they_are() -> None:
    survival = load_task("example_survival", tasks_file=TASKS)
    assert (survival.task_type, survival.truth_columns) == ("survival", ("months", "died"))
    assert survival.n_outputs == 0
    multilabel = load_task("example_multilabel", tasks_file=TASKS)
    assert (multilabel.task_type, multilabel.n_outputs) == ("multilabel", 3)
    regression = load_task("example_regression", tasks_file=TASKS)
    assert (regression.task_type, regression.truth_columns) == (
        "regression", ("purity", "mutations_per_mb"))
    for task in (survival, multilabel, regression):
        assert len(load_table(task)) >= 40


def test_a_task_can_be_said_again_in_flags() -> None:
    task = load_task(None, csv_path=Path("t.csv"), task_type="survival", time_col="m",
                     event_col="e")
    assert task.flags == "--csv_path t.csv --task_type survival --time_col m --event_col e"
    values = load_task(None, csv_path=Path("t.csv"), task_type="regression", label_cols=["a", "b"])
    assert values.flags == "--csv_path t.csv --task_type regression --label_cols a b"
    classes = load_task(None, csv_path=Path("t.csv"), label_dict={"a": 0, "b": 1}, label_col="x")
    assert classes.flags == "--csv_path t.csv --label_col x --label_dict a:0,b:1"
    assert (classes.n_outputs, classes.truth_columns) == (2, ("x",))


@pytest.mark.parametrize(("flags", "message"), [
    ({"task_type": "survival"}, "--time_col and --event_col required.*columns slide_id, m, e"),
    ({"task_type": "survival", "time_col": "m"}, "^--event_col required"),
    ({"task_type": "survival", "time_col": "m", "event_col": "m"}, "a column twice: m, m"),
    ({"task_type": "survival", "label_dict": {"a": 0, "b": 1}},
     "label_dict goes with --task_type classification.*takes time_col, event_col"),
    ({"task_type": "regression", "label_col": "m"}, "label_col goes with.*takes label_cols"),
    ({"task_type": "multilabel"}, "--label_cols required"),
    ({"task_type": "multilabel", "label_cols": ("m", "m")}, "a column twice"),
    ({"label_cols": ("m",)}, "label_cols goes with --task_type multilabel or regression"),
    ({"time_col": "m", "event_col": "e"}, "time_col goes with --task_type survival"),
])
def test_columns_of_another_task_type_are_refused(
        tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    (tmp_path / "t.csv").write_text("slide_id,m,e\na,1,1\n")
    with pytest.raises(Refused, match=message):
        load_task(None, csv_path=tmp_path / "t.csv", **flags)


def test_a_type_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path, "alpha: {csv_path: t.csv, task_type: ranking}")
    with pytest.raises(Refused, match="one of classification, multilabel, regression, survival"):
        load_task("alpha", tasks_file=tasks)


def test_the_labels_of_a_csv_of_two_columns_are_listed(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,class\na,1\nb,0\n")
    with pytest.raises(Refused, match=r"column 'class' holds 2 labels.*--label_dict 0:0,1:1"):
        load_task(None, csv_path=tmp_path / "t.csv")
