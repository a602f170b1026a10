"""The table of slides: ids as text, one patient and one truth each, checked before any work."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.targets import (
    cell_faults,
    label_set_fault,
    read_truths,
    strata_of,
    with_own_columns,
)
from datasets.tasks import Task, Voting, label_column
from utils.errors import Refused
from utils.objectives import TaskType
from utils.storage import read_table, safe_id

if TYPE_CHECKING:
    import pandas as pd

MAX_LISTED = 5


@dataclass(frozen=True)
class Patients:
    """The patients of a table, sorted by id.

    case_ids: (P,) text; labels: (P,) int64 classes (strata)
    slide_rows: for each patient its rows, in table order
    """

    case_ids: tuple[str, ...]
    labels: np.ndarray
    slide_rows: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.case_ids)


@dataclass(frozen=True)
class SlideTable:
    """Slides with their patients and truths; all columns are row-aligned.

    labels: (n,) int64 class indices; class_names: one a class, in class order. Other task types:
        strata and their names (``datasets.targets``), for splits and weighted sampling only
    sources: value of the ``source`` column, "" where there is none
    notes: what was odd about the csv and how it was taken, for the run's summary
    targets: (n, T) float64 truths of other task types, None for classes; target_names: (T,)
    """

    slide_ids: tuple[str, ...]
    case_ids: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    task_type: TaskType = "classification"
    targets: np.ndarray | None = None
    target_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.slide_ids)

    @property
    def n_classes(self) -> int:
        """Number of classes (strata) of the task, present in this table or not."""
        return len(self.class_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Classes, labels or values in order; of survival the columns of time and event."""
        return self.target_names or self.class_names

    @cached_property
    def row_of(self) -> Mapping[str, int]:
        """Slide id -> row."""
        return {slide_id: row for row, slide_id in enumerate(self.slide_ids)}

    def class_counts(self) -> np.ndarray:
        """(C,) number of slides of each class (stratum)."""
        return np.bincount(self.labels, minlength=self.n_classes)

    def target_of(self, row: int) -> tuple[float, ...] | None:
        """The truth of a row as ``Bag.target`` takes it; None for classes."""
        return None if self.targets is None else tuple(self.targets[row].tolist())

    def take(self, rows: Sequence[int] | np.ndarray) -> SlideTable:
        """The table of these rows, in this order."""
        index = np.asarray(rows, dtype=np.int64)
        return replace(
            self, slide_ids=tuple(self.slide_ids[row] for row in index),
            case_ids=tuple(self.case_ids[row] for row in index), labels=self.labels[index],
            sources=tuple(self.sources[row] for row in index) if self.sources else (),
            targets=None if self.targets is None else self.targets[index])

    def subset(self, slide_ids: Iterable[str]) -> SlideTable:
        """The table of these slides, in this order; ``Refused`` for an id that is not here."""
        wanted = list(slide_ids)
        unknown = [slide_id for slide_id in wanted if slide_id not in self.row_of]
        if unknown:
            raise Refused(f"{listed(unknown)} not in the table of {len(self)} slides")
        return self.take([self.row_of[slide_id] for slide_id in wanted])

    def patients(self, voting: Voting = "max") -> Patients:
        """Patients in order of their ids, with the highest ("max") or most frequent ("maj", ties
        to the lowest) class of their slides."""
        names, owner = np.unique(np.array(self.case_ids, dtype=np.str_), return_inverse=True)
        if voting == "max":
            labels = np.zeros(len(names), dtype=np.int64)
            np.maximum.at(labels, owner, self.labels)
        else:
            votes = np.bincount(owner * self.n_classes + self.labels,
                                minlength=len(names) * self.n_classes)
            labels = votes.reshape(len(names), self.n_classes).argmax(axis=1)
        by_patient = np.argsort(owner, kind="stable")
        ends = np.cumsum(np.bincount(owner, minlength=len(names)))[:-1]
        return Patients(tuple(names.tolist()), labels, tuple(np.split(by_patient, ends)))


def listed(items: Iterable[object]) -> str:
    """``'a', 'b', ... (7 in all)``: the first few, for a message."""
    all_items = list(items)
    text = ", ".join(repr(item) for item in all_items[:MAX_LISTED])
    return text if len(all_items) <= MAX_LISTED else f"{text}, ... ({len(all_items)} in all)"


def load_table(task: Task) -> SlideTable:
    """Read and check a task's csv: ``slide_id``, ``case_id``, the task's columns, maybe ``source``;
    or just two columns, slide and label, by any names.

    Rows are filtered, then rows with ignored labels dropped, then cells read. Without a
    ``case_id`` column each slide is its own patient. Raises ``Refused``, naming up to five rows,
    for ids that are no plain names, cells that say nothing (``datasets.targets``), slides listed
    twice in contradiction, and patients with two times of survival; a slide listed twice in
    agreement is kept once, with a note. Values and labels of a regression or a multi-label task
    may differ between the slides of a patient: they may be of the slide (a share of tumour).
    """
    path = task.csv_path
    table, notes = _read(task)
    faults = cell_faults(task)
    _need_column(table, "slide_id", path)
    for column in faults:
        _need_column(table, column, path, remedy=_remedy(task, column))
    for column, values in task.filter_dict.items():
        _need_column(table, column, path, remedy="correct filter_dict of the task")
        table = table[table[column].isin(values)]
    if task.ignore:
        table = table[~table[task.label_col].isin(task.ignore)]
    if table.empty:
        raise Refused(f"csv {path} has no slides" + (
            " left after filter_dict and ignore" if task.filter_dict or task.ignore else ""))
    if "case_id" not in table.columns:
        table = table.assign(case_id=table["slide_id"])
        notes.append(f"csv {path} has no column 'case_id': each slide counts as its own patient")
    _check_rows(table, path, "slide_id", _unsafe)
    _check_rows(table, path, "case_id", _unclean)
    for column, fault in faults.items():
        _check_rows(table, path, column, fault)
    table, repeated = _without_repeats(table, path, task)
    if repeated:
        notes.append(f"csv {path}: {repeated} rows repeat an earlier slide and are left out")
    truths = read_truths(table, task)
    _check_truths(table, truths, path, task)
    strata = strata_of(truths, task)
    classes = task.task_type == "classification"
    return SlideTable(
        slide_ids=tuple(table["slide_id"]), case_ids=tuple(table["case_id"]),
        labels=strata.of_slide, class_names=strata.names,
        sources=tuple(table["source"]) if "source" in table.columns else (),
        notes=tuple(notes), task_type=task.task_type, targets=None if classes else truths,
        target_names=() if classes else task.truth_columns)


def _read(task: Task) -> tuple[pd.DataFrame, list[str]]:
    """The csv as it is, or, when it has two columns of other names, with ours, and a note.

    ``Refused`` when it has no header: its first slide would be taken for one, and lost.
    """
    table = read_table(task.csv_path, what="csv")
    given = label_column(list(table.columns), task)
    if not given:
        return table, []
    sets = task.task_type == "multilabel"
    fault = label_set_fault(task) if sets else cell_faults(task)[task.truth_columns[0]]
    if not fault(given) or given in task.ignore:
        raise Refused(f"csv {task.csv_path} has no header: its first line, {table.columns[0]} and "
                      f"{given}, is a slide: put the line slide_id,label above it")
    if sets:
        _check_rows(table, task.csv_path, given, fault)
    what = "labels, numbered as in --label_cols" if sets else "label"
    return with_own_columns(table, task), [
        f"csv {task.csv_path} has two columns: '{table.columns[0]}' is taken for the slide and "
        f"'{given}' for its {what}"]


def _remedy(task: Task, column: str) -> str:
    if task.task_type == "classification":
        return "give --label_col"
    key = {task.time_col: "time_col", task.event_col: "event_col"}.get(column, "label_cols")
    return f"give --{key}"


def _check_truths(table: pd.DataFrame, truths: np.ndarray, path: Path, task: Task) -> None:
    """``Refused`` for a slide of which nothing is known, and a patient who survives twice."""
    unknown = np.isnan(truths).all(axis=1)
    if unknown.any():
        raise Refused(f"csv {path}: no label is known of {listed(table['slide_id'][unknown])}: "
                      "leave these rows out")
    if task.task_type == "survival":
        facts = table[["case_id"]].assign(time=truths[:, 0], event=truths[:, 1]).drop_duplicates()
        clash = facts["case_id"][facts["case_id"].duplicated()].drop_duplicates()
        if len(clash):
            raise Refused(f"csv {path} gives the slides of patients {listed(clash)} different "
                          "times or events: a patient has one, keep the right rows")


def _need_column(table: pd.DataFrame, column: str, path: Path, *, remedy: str = "add it") -> None:
    if column in table.columns:
        if list(table.columns).count(column) > 1:
            raise Refused(f"csv {path} has the column '{column}' twice: rename one")
        return
    near = difflib.get_close_matches(column, table.columns, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise Refused(f"csv {path} has no column '{column}': {hint}"
                  f"found: {', '.join(table.columns)}; {remedy}")


def _unsafe(slide_id: str) -> str:
    try:
        safe_id(slide_id)
    except Refused:
        return ("no plain name (empty, slash, backslash, '..', control sign, outer blank, or over "
                "200 bytes)")
    return ""


def _unclean(case_id: str) -> str:
    """Outer blanks would make two patients of one."""
    good = case_id != "" and case_id == case_id.strip() and case_id.isprintable()
    return "" if good else "empty, or with outer blanks or control signs"


def _check_rows(table: pd.DataFrame, path: Path, column: str,
                fault: Callable[[str], str]) -> None:
    """``Refused`` with up to five lines of the csv whose cell has a fault."""
    faults = {value: fault(value) for value in dict.fromkeys(table[column])}
    if not any(faults.values()):
        return
    bad = table[column][[bool(faults[value]) for value in table[column]]]
    first = bad.head(MAX_LISTED)
    lines = "; ".join(f"line {int(row) + 2}: {value!r}"
                      for row, value in zip(first.index.tolist(), first, strict=True))
    raise Refused(f"csv {path}, column '{column}': {len(bad)} of {len(table)} rows are "
                  f"{faults[bad.iloc[0]]}: {lines}")


def _without_repeats(table: pd.DataFrame, path: Path, task: Task) -> tuple[pd.DataFrame, int]:
    """One row a slide; ``Refused`` when its rows differ in truth or patient."""
    repeated = table["slide_id"].duplicated()
    if not repeated.any():
        return table, 0
    facts = table[["slide_id", "case_id"]].copy()
    facts[[f"truth {column}" for column in task.truth_columns]] = read_truths(table, task)
    facts = facts.drop_duplicates()
    clash = facts["slide_id"][facts["slide_id"].duplicated()].drop_duplicates()
    if len(clash):
        raise Refused(f"csv {path} lists {listed(clash)} twice, with different labels or patients: "
                      "keep the right row")
    return table[~repeated], int(repeated.sum())
