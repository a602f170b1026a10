"""What is to be predicted: a table, its columns, and for classes a map from label names to them.

Named tasks live in ``dataset_csv/tasks.yaml``; adding one needs no code. The same keys can be
given on the command line, alone or over a named task.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from utils.errors import Refused
from utils.objectives import TaskType
from utils.options import from_mapping, load_yaml, option
from utils.storage import read_table, safe_id

TASKS_FILE = Path("dataset_csv/tasks.yaml")
Voting = Literal["max", "maj"]
_OUR_COLUMNS = ("slide_id", "case_id", "source")  # of every table
# Keys that say what is to be predicted, by task type: the first ones are needed
TRUTH_KEYS: dict[TaskType, tuple[str, ...]] = {
    "classification": ("label_dict", "label_col", "ignore", "subtyping_required"),
    "multilabel": ("label_cols",), "regression": ("label_cols",),
    "survival": ("time_col", "event_col")}


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The flags that name a task; the options of every script that reads a table begin so."""

    task: str | None = option(None, help="name of a task in the tasks file")
    csv_path: Path | None = option(None, help="table of slides, instead of the task's")
    label_col: str | None = option(None, help="column with the labels, instead of the task's")
    label_dict: dict[str, int] | None = option(None, help="label names and their classes",
                                               metavar="NAME:0,OTHER:1")
    task_type: TaskType | None = option(
        None, help="what is predicted (default: the task's, else classification)")
    label_cols: tuple[str, ...] = option((), help="columns with the labels (multilabel: 0, 1 or "
                                         "empty for unknown) or the values (regression)")
    time_col: str | None = option(None, help="column with the time to the event or to censoring "
                                  "(survival)")
    event_col: str | None = option(None, help="column that says whether the event was seen: 1 or "
                                   "0, true or false, yes or no, dead or alive (survival)")
    tasks_file: Path = option(TASKS_FILE, help="yaml file with the tasks")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task over a table of slides.

    label_col, label_dict: of a classification: label name -> class index; several names may
    share a class
    label_cols: columns of a multilabel task (0, 1, empty) or of a regression (numbers)
    time_col, event_col: columns of a survival task
    feature_dir: sub-folder of ``--data_root_dir`` with the features ("" = that folder itself)
    source_dirs: value of the ``source`` column -> sub-folder, for cohorts kept apart
    patient_voting: class (stratum) of a patient with several slides: highest ("max") or most
    frequent ("maj")
    filter_dict: column -> values to keep; ignore: label names whose rows are left out
    subtyping_required: CLAM models must be trained with ``--subtyping``
    """

    name: str
    csv_path: Path
    label_dict: dict[str, int] = field(default_factory=dict)
    label_col: str = "label"
    task_type: TaskType = "classification"
    label_cols: tuple[str, ...] = ()
    time_col: str = ""
    event_col: str = ""
    feature_dir: str = ""
    source_dirs: dict[str, str] = field(default_factory=dict)
    patient_voting: Voting = "max"
    subtyping_required: bool = False
    filter_dict: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    @property
    def n_classes(self) -> int:
        """Number of distinct classes; 0 for other task types."""
        return len(set(self.label_dict.values()))

    @property
    def n_outputs(self) -> int:
        """Classes, labels or values; 0 for survival, where bins or Cox decide."""
        return self.n_classes or len(self.label_cols)

    @property
    def truth_columns(self) -> tuple[str, ...]:
        """The columns that say what is true of a slide."""
        if self.task_type == "survival":
            return self.time_col, self.event_col
        return self.label_cols or (self.label_col,)

    @property
    def flags(self) -> str:
        """The command-line flags that describe this task, for a message."""
        if self.task_type == "survival":
            what = f"--time_col {self.time_col} --event_col {self.event_col}"
        elif self.task_type == "classification":
            labels = ",".join(f"{label}:{index}" for label, index in self.label_dict.items())
            column = "" if self.label_col == "label" else f" --label_col {self.label_col}"
            return f"--csv_path {self.csv_path}{column} --label_dict {labels}"
        else:
            what = f"--label_cols {' '.join(self.label_cols)}"
        return f"--csv_path {self.csv_path} --task_type {self.task_type} {what}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The first label name of each class, in class order."""
        first: dict[int, str] = {}
        for name, index in self.label_dict.items():
            first.setdefault(index, name)
        return tuple(first[index] for index in sorted(first))


def label_column(columns: Sequence[str], task: Task) -> str:
    """The second column of a csv of streaming models' form, "" where the csv is of ours.

    That form has two columns, whatever their names: slide and class, value, or set of labels
    (spec streaming.md 9). A csv that has the task's columns is of ours, and so is one where the
    task names a column that is missing.
    """
    if len(columns) != 2 or task.task_type == "survival" or columns[1] in _OUR_COLUMNS or (
            columns[0] in _OUR_COLUMNS[1:]):
        return ""
    own = {"slide_id", *task.truth_columns} <= set(columns)
    named = {"classification": task.label_col != "label", "regression": len(task.label_cols) > 1}
    return "" if own or named.get(task.task_type, False) else columns[1]


def load_task(
    task: str | None,
    *,
    csv_path: Path | None = None,
    label_col: str | None = None,
    label_dict: Mapping[str, int] | None = None,
    task_type: TaskType | None = None,
    label_cols: Sequence[str] = (),
    time_col: str | None = None,
    event_col: str | None = None,
    feature_dir: str | None = None,
    patient_voting: Voting | None = None,
    tasks_file: Path = TASKS_FILE,
) -> Task:
    """A task by name, by flags alone, or by name with flags over it.

    ``csv_path`` of a tasks file is looked up from the current directory, then beside the file.
    Raises ``Refused`` for an unknown task or key, a key of another task type, a missing column or
    map, or a map that leaves out a class.
    """
    if task is None and csv_path is None:
        raise Refused("give --task (a name in the tasks file), or --csv_path with --label_dict (or "
                      "with --task_type and its columns)")
    values = {} if task is None else _named(task, tasks_file)
    flags: dict[str, Any] = {
        "csv_path": csv_path, "label_col": label_col, "label_dict": label_dict,
        "task_type": task_type, "label_cols": tuple(label_cols) or None, "time_col": time_col,
        "event_col": event_col, "feature_dir": feature_dir, "patient_voting": patient_voting}
    values.update({key: value for key, value in flags.items() if value is not None})
    values.setdefault("name", Path(values["csv_path"]).stem if "csv_path" in values else task)
    if "csv_path" not in values:
        raise Refused(f"task '{task}' has no csv_path in {tasks_file}: add it or give --csv_path")
    _check_keys(values)
    made = Task(**values)
    if made.task_type != "classification":
        return made
    return replace(made, label_dict=_checked_labels(made.label_dict, made.name))


def _check_keys(values: Mapping[str, Any]) -> None:
    """``Refused`` for keys of another task type, and for missing ones."""
    kind: TaskType = values.get("task_type", "classification")
    own = TRUTH_KEYS[kind]
    for key in dict.fromkeys(key for keys in TRUTH_KEYS.values() for key in keys):
        if key in values and key not in own:
            others = " or ".join(name for name, keys in TRUTH_KEYS.items() if key in keys)
            raise Refused(f"{key} goes with --task_type {others}; task '{values['name']}' is of "
                          f"type {kind}, which takes {', '.join(own)}")
    if kind == "classification":
        if "label_dict" not in values:
            raise Refused(_ask_for_labels(values["csv_path"], values.get("label_col", "label")))
        return
    missing = [key for key in own if not values.get(key)]
    if missing:
        found = ", ".join(read_table(values["csv_path"], what="csv").columns)
        raise Refused(f"{' and '.join(f'--{key}' for key in missing)} required for --task_type "
                      f"{kind}: csv {values['csv_path']} has the columns {found}")
    columns = [*values.get("label_cols", ()), values.get("time_col"), values.get("event_col")]
    named = [column for column in columns if column]
    if len(set(named)) < len(named):
        raise Refused(f"task '{values['name']}' names a column twice: {', '.join(named)}")


def _named(task: str, tasks_file: Path) -> dict[str, Any]:
    known = load_yaml(tasks_file)
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise Refused(f"unknown task '{task}': {hint}{tasks_file} has {', '.join(known) or 'none'};"
                      " add it there, or give --csv_path and --label_dict")
    where = f"{tasks_file}: {task}"
    if not isinstance(known[task], dict):
        raise Refused(f"{where} is {known[task]!r}, expected 'key: value' lines below it")
    if "name" in known[task]:
        raise Refused(f"{where}: unknown key 'name', a task is called by the line above its keys")
    values = from_mapping(Task, known[task], source=where)
    values["name"] = safe_id(task, what="task name")
    if "csv_path" in values and not values["csv_path"].exists():
        beside = tasks_file.parent / values["csv_path"]
        values["csv_path"] = beside if beside.exists() else values["csv_path"]
    return values


def _ask_for_labels(csv_path: Path, label_col: str) -> str:
    table = read_table(csv_path, what="csv")
    asked = Task(name="", csv_path=csv_path, label_col=label_col)
    label_col = label_column(list(table.columns), asked) or label_col
    if label_col not in table.columns:
        return (f"csv {csv_path} has no column '{label_col}' (found: {', '.join(table.columns)}): "
                "give --label_col, and --label_dict as name:0,other:1")
    found = sorted(set(table[label_col]))
    example = ",".join(f"{name}:{index}" for index, name in enumerate(found[:5]))
    return (f"--label_dict is required with --csv_path; column '{label_col}' holds "
            f"{len(found)} labels: for example --label_dict {example}")


def _checked_labels(label_dict: Mapping[str, int], name: str) -> dict[str, int]:
    classes = sorted(set(label_dict.values()))
    if len(classes) < 2 or classes != list(range(len(classes))):
        raise Refused(f"label_dict of task '{name}' uses the classes {classes}: expected at least "
                      "two, numbered 0, 1, 2 ... without a gap")
    return dict(label_dict)
