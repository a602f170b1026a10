"""The table of slides: ids as text, one patient and one class each, checked before any work."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.tasks import Task, Voting
from utils.errors import Refused
from utils.storage import read_table, safe_id

if TYPE_CHECKING:
    import pandas as pd

MAX_LISTED = 5


@dataclass(frozen=True)
class Patients:
    """The patients of a table, sorted by id.

    case_ids: (P,) text; labels: (P,) int64; slide_rows: for each patient its rows, in table order
    """

    case_ids: tuple[str, ...]
    labels: np.ndarray
    slide_rows: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.case_ids)


@dataclass(frozen=True)
class SlideTable:
    """Slides with their patients and classes; all columns are row-aligned.

    labels: (n,) int64 class indices; class_names: one a class, in class order
    sources: value of the ``source`` column, "" where there is none
    notes: what was odd about the csv and how it was taken, for the run's summary
    """

    slide_ids: tuple[str, ...]
    case_ids: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.slide_ids)

    @property
    def n_classes(self) -> int:
        """Number of classes of the task, present in this table or not."""
        return len(self.class_names)

    @cached_property
    def row_of(self) -> Mapping[str, int]:
        """Slide id -> row."""
        return {slide_id: row for row, slide_id in enumerate(self.slide_ids)}

    def class_counts(self) -> np.ndarray:
        """(C,) number of slides of each class."""
        return np.bincount(self.labels, minlength=self.n_classes)

    def take(self, rows: Sequence[int] | np.ndarray) -> SlideTable:
        """The table of these rows, in this order."""
        index = np.asarray(rows, dtype=np.int64)
        return SlideTable(
            slide_ids=tuple(self.slide_ids[row] for row in index),
            case_ids=tuple(self.case_ids[row] for row in index),
            labels=self.labels[index], class_names=self.class_names,
            sources=tuple(self.sources[row] for row in index) if self.sources else (),
            notes=self.notes)

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
    """Read and check a task's csv: ``slide_id``, ``case_id``, the label column, maybe ``source``.

    Rows are filtered, then rows with ignored labels dropped, then labels mapped. Without a
    ``case_id`` column each slide is its own patient. Raises ``Refused``, naming up to five rows,
    for ids that are no plain names, labels outside the map, and slides listed twice in
    contradiction; a slide listed twice in agreement is kept once, with a note.
    """
    path = task.csv_path
    table = read_table(path, what="csv")
    _need_column(table, "slide_id", path)
    _need_column(table, task.label_col, path, remedy="give --label_col")
    for column, values in task.filter_dict.items():
        _need_column(table, column, path, remedy="correct filter_dict of the task")
        table = table[table[column].isin(values)]
    table = table[~table[task.label_col].isin(task.ignore)]
    if table.empty:
        raise Refused(f"csv {path} has no slides" + (
            " left after filter_dict and ignore" if task.filter_dict or task.ignore else ""))
    notes = []
    if "case_id" not in table.columns:
        table = table.assign(case_id=table["slide_id"])
        notes.append(f"csv {path} has no column 'case_id': each slide counts as its own patient")
    _check_rows(table, path, "slide_id", _unsafe)
    _check_rows(table, path, "case_id", _unclean)
    _check_rows(table, path, task.label_col, lambda label: (
        "" if label in task.label_dict else f"not in the map {dict(task.label_dict)}"))
    table, repeated = _without_repeats(table, path, task)
    if repeated:
        notes.append(f"csv {path}: {repeated} rows repeat an earlier slide and are left out")
    return SlideTable(
        slide_ids=tuple(table["slide_id"]), case_ids=tuple(table["case_id"]),
        labels=np.array([task.label_dict[label] for label in table[task.label_col]], np.int64),
        class_names=task.class_names,
        sources=tuple(table["source"]) if "source" in table.columns else (),
        notes=tuple(notes))


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
    """One row a slide; ``Refused`` when its rows differ in class or patient."""
    repeated = table["slide_id"].duplicated()
    if not repeated.any():
        return table, 0
    classes = table[task.label_col].map(task.label_dict)
    facts = table[["slide_id", "case_id"]].assign(label=classes).drop_duplicates()
    clash = facts["slide_id"][facts["slide_id"].duplicated()].drop_duplicates()
    if len(clash):
        raise Refused(f"csv {path} lists {listed(clash)} twice, with different labels or patients: "
                      "keep the right row")
    return table[~repeated], int(repeated.sum())
