"""What the cells of a table say of each slide: classes, labels, values, times to an event.

Every task type has its columns, its cells, its truths (n, T) and its strata: the groups that
splits keep in proportion and that weighted sampling balances.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datasets.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

EVENT_WORDS = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "event", "dead", "deceased"), 1.0),
    **dict.fromkeys(("0", "0.0", "false", "no", "censored", "alive", "living"), 0.0)}
LABEL_WORDS = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "": float("nan")}
EVENT_STRATA = ("censored", "event")
# Sets of labels become strata when they are few and none is rare, else the first label alone
MAX_LABEL_SETS = 8
MIN_IN_LABEL_SET = 10


_LABEL_SET = re.compile(r"\[\s*(?:\d+\s*(?:;\s*\d+\s*)*)?\]")  # [], [1], [0;2]


@dataclass(frozen=True)
class Strata:
    """(n,) int64 group of each slide, and the names of the groups."""

    of_slide: np.ndarray
    names: tuple[str, ...]


def read_number(cell: str) -> float | None:
    """A plain finite number, or None."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in cell else None


def label_set_fault(task: Task) -> Callable[[str], str]:
    """What is wrong with a cell that lists the labels of a slide ("" when nothing is)."""
    count = len(task.label_cols)

    def fault(cell: str) -> str:
        if not _LABEL_SET.fullmatch(cell.strip()):
            return "no list of labels such as [0;2] or []"
        inside = all(number < count for number in _labels_in(cell))
        return "" if inside else (f"beyond the {count} labels of --label_cols, numbered 0 to "
                                  f"{count - 1}")

    return fault


def with_own_columns(table: pd.DataFrame, task: Task) -> pd.DataFrame:
    """A table of the form of ``tasks.label_column``, its cells without faults, with our columns."""
    slides, cells = (table.iloc[:, column] for column in (0, 1))
    ours = slides.rename("slide_id").to_frame()
    if task.task_type != "multilabel":
        return ours.assign(**{task.truth_columns[0]: cells})
    sets = [_labels_in(cell) for cell in cells]
    return ours.assign(**{name: [str(int(number in labels)) for labels in sets]
                          for number, name in enumerate(task.label_cols)})


def _labels_in(cell: str) -> set[int]:
    return set(map(int, re.findall(r"\d+", cell)))


def cell_faults(task: Task) -> dict[str, Callable[[str], str]]:
    """Column -> what is wrong with a cell of it ("" when nothing is)."""
    if task.task_type == "survival":
        return {task.time_col: _time_fault, task.event_col: _event_fault}
    if task.task_type == "multilabel":
        return dict.fromkeys(task.label_cols, lambda cell: (
            "" if cell in LABEL_WORDS else "neither 0 nor 1 (nor empty, for unknown)"))
    if task.task_type == "regression":
        return dict.fromkeys(task.label_cols, lambda cell: (
            "" if read_number(cell) is not None else "no number (leave such rows out)"))
    return {task.label_col: lambda cell: (
        "" if cell in task.label_dict else f"not in the map {dict(task.label_dict)}")}


def _time_fault(cell: str) -> str:
    time = read_number(cell)
    return "no time (a number, not below 0)" if time is None or time < 0 else ""


def _event_fault(cell: str) -> str:
    return "" if cell.strip().lower() in EVENT_WORDS else (
        "no event: expected 1, true, yes, event, dead, deceased (seen) or 0, false, no, censored, "
        "alive, living")


def read_truths(table: pd.DataFrame, task: Task) -> np.ndarray:
    """(n, T) float64 of cells without faults: the class, T labels (NaN = unknown), T values, or
    time and event."""
    readers: dict[str, Callable[[str], float]] = {task.label_col: lambda cell: (
        float(task.label_dict[cell]))}
    if task.task_type == "survival":
        readers = {task.time_col: float, task.event_col: lambda cell: (
            EVENT_WORDS[cell.strip().lower()])}
    elif task.task_type == "multilabel":
        readers = dict.fromkeys(task.label_cols, LABEL_WORDS.__getitem__)
    elif task.task_type == "regression":
        readers = dict.fromkeys(task.label_cols, float)
    return np.array([[read(cell) for cell in table[column]] for column, read in readers.items()],
                    dtype=np.float64).T


def strata_of(truths: np.ndarray, task: Task) -> Strata:
    """The strata of truths (n, T): classes; event or not; quarters of the first value; label sets
    (the first label where sets are many or rare)."""
    if task.task_type == "survival":
        return Strata(truths[:, 1].astype(np.int64), EVENT_STRATA)
    if task.task_type == "regression":
        return _quarters(truths[:, 0], task.label_cols[0])
    if task.task_type == "multilabel":
        return _label_sets(truths == 1, task.label_cols)
    return Strata(truths[:, 0].astype(np.int64), task.class_names)


def _quarters(values: np.ndarray, name: str) -> Strata:
    """Equal values stay together, so few distinct ones give fewer than four groups."""
    cuts = np.unique(np.quantile(values, (0.25, 0.5, 0.75)))
    used, group = np.unique(np.searchsorted(cuts, values, side="left"), return_inverse=True)
    spans = [f"{name} above {cuts[one - 1]:g}" if one == len(cuts) else
             f"{name} up to {cuts[one]:g}" for one in used.tolist()]
    return Strata(group.astype(np.int64), tuple(spans))


def _label_sets(has: np.ndarray, names: tuple[str, ...]) -> Strata:
    sets, group, sizes = np.unique(has, axis=0, return_inverse=True, return_counts=True)
    if len(sets) > MAX_LABEL_SETS or sizes.min() < MIN_IN_LABEL_SET:
        return Strata(has[:, 0].astype(np.int64), (f"not {names[0]}", names[0]))
    return Strata(group.reshape(-1).astype(np.int64), tuple(
        "+".join(name for name, there in zip(names, row, strict=True) if there) or "none"
        for row in sets.tolist()))
