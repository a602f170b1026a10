"""Train, validation and test sets of slides: drawing, writing, reading, checking.

Two schemes. ``clam`` draws a new validation and test set for every split, with NumPy's legacy
generator in the order of the original, so that equal seeds give equal files. ``kfold`` deals the
patients into k stratified parts, each of which is the test set once.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datasets.table import SlideTable, listed
from datasets.tasks import Voting
from utils.errors import BrokenFile, Refused
from utils.storage import read_json, read_table, write_text

RECORD = "splits.json"
PARTS = ("train", "val", "test")
LABEL_FRACS = (0.1, 0.25, 0.5, 0.75, 1.0)  # made when no single share is asked for
Scheme = Literal["clam", "kfold"]
Subset = Literal["first", "random"]
Draw = tuple[np.ndarray, np.ndarray, np.ndarray]  # train, val, test: unit ids


@dataclass(frozen=True)
class Split:
    """Slide ids of one split; a part may be empty."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def parts(self) -> dict[str, tuple[str, ...]]:
        """``{"train": ..., "val": ..., "test": ...}``."""
        return {"train": self.train, "val": self.val, "test": self.test}


def split_folder_name(task: str, label_frac: float) -> str:
    """``<task>_<percent>``, the percent cut as in the original: ``int(label_frac * 100)``."""
    return f"{task}_{int(label_frac * 100)}"


# ---------------------------------------------------------------------------- drawing

def draw_clam(
    class_ids: Sequence[np.ndarray],
    *,
    val_num: Sequence[int],
    test_num: Sequence[int],
    n_splits: int,
    seed: int,
    label_frac: float = 1.0,
    subset: Subset = "first",
    custom_test_ids: Sequence[int] | None = None,
) -> Iterator[Draw]:
    """Draw splits as CLAM's ``generate_split`` does, from a generator of our own.

    class_ids: for each class its unit ids (patients or slides), increasing
    val_num, test_num: units of each class to draw; custom_test_ids replaces the test draw
    Order of draws: split by split, class by class, validation then test. A draw of nothing still
    moves the generator on, so it is made. Validation and test sets do not depend on label_frac.
    """
    random = np.random.RandomState(seed)  # the original's stream; ours alone, never the global one
    fixed = np.asarray([] if custom_test_ids is None else custom_test_ids, dtype=np.int64)
    for number in range(n_splits):
        train, val, test = [], [], [fixed]
        for index, ids in enumerate(class_ids):
            rest = np.setdiff1d(ids, fixed)
            chosen = random.choice(rest, val_num[index], replace=False)
            rest = np.setdiff1d(rest, chosen)
            val.append(chosen)
            if custom_test_ids is None:
                chosen = random.choice(rest, test_num[index], replace=False)
                rest = np.setdiff1d(rest, chosen)
                test.append(chosen)
            train.append(_share(rest, label_frac, subset, key=(seed, number, index)))
        yield np.concatenate(train), np.concatenate(val), np.concatenate(test)


def draw_kfold(
    class_ids: Sequence[np.ndarray],
    *,
    val_num: Sequence[int],
    n_splits: int,
    seed: int,
    label_frac: float = 1.0,
    subset: Subset = "first",
) -> Iterator[Draw]:
    """Deal every unit into one of ``n_splits`` test sets, class by class, sizes differing by one.

    Validation units are drawn from the rest of each fold.
    """
    random = np.random.default_rng(seed)
    dealt = 0
    folds = []
    for ids in class_ids:
        fold = np.empty(len(ids), dtype=np.int64)
        fold[random.permutation(len(ids))] = (np.arange(len(ids)) + dealt) % n_splits
        dealt += len(ids)
        folds.append(fold)
    for number in range(n_splits):
        train, val, test = [], [], []
        for index, (ids, fold) in enumerate(zip(class_ids, folds, strict=True)):
            test.append(ids[fold == number])
            rest = ids[fold != number]
            chosen = random.choice(rest, min(val_num[index], len(rest)), replace=False)
            val.append(chosen)
            train.append(_share(np.setdiff1d(rest, chosen), label_frac, subset,
                                key=(seed, number, index)))
        yield np.concatenate(train), np.concatenate(val), np.concatenate(test)


def _share(ids: np.ndarray, label_frac: float, subset: Subset,
           *, key: tuple[int, ...]) -> np.ndarray:
    """The share of the training ids that keeps its labels; smaller shares lie in larger ones."""
    if label_frac == 1:
        return ids
    number = ceil(len(ids) * label_frac)
    if subset == "first":
        return ids[:number]
    return np.sort(np.random.default_rng(key).permutation(ids)[:number])


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the splits of a table are drawn; goes into the record beside them.

    slide_level: divide slides whatever their patients; custom_test_ids: patients (slides) that
    form every test set. ``test_frac`` counts for the scheme ``clam`` without custom test ids.
    """

    n_splits: int
    seed: int
    val_frac: float = 0.1
    test_frac: float = 0.1
    label_frac: float = 1.0
    scheme: Scheme = "clam"
    subset: Subset = "first"
    patient_voting: Voting = "max"
    slide_level: bool = False
    custom_test_ids: tuple[str, ...] | None = None


def make_splits(table: SlideTable, drawing: Drawing) -> list[Split]:
    """Splits by patients (or slides), stratified by class; ``Refused`` if a class is too small.

    Other task types: stratified by ``table.labels``, whose groups may vanish among the patients.
    """
    if drawing.slide_level:
        names, labels = table.slide_ids, table.labels
        rows = tuple(np.arange(len(table)).reshape(-1, 1))
    else:
        units = table.patients(drawing.patient_voting)
        names, labels, rows = units.case_ids, units.labels, units.slide_rows
    groups = {name: np.flatnonzero(labels == index)
              for index, name in enumerate(table.class_names)}
    if table.task_type != "classification":
        groups = {name: ids for name, ids in groups.items() if len(ids)}
    class_ids = list(groups.values())
    fixed = _positions(names, drawing.custom_test_ids)
    val_num = [int(np.round(len(ids) * drawing.val_frac)) for ids in class_ids]
    test_num = [int(np.round(len(ids) * drawing.test_frac)) for ids in class_ids]
    if fixed is not None:
        test_num = [int(np.isin(ids, fixed).sum()) for ids in class_ids]
    if drawing.scheme == "kfold":
        test_num = [ceil(len(ids) / drawing.n_splits) for ids in class_ids]
    poor = [f"{name} ({len(ids)} {'slides' if drawing.slide_level else 'patients'})"
            for name, ids, n_val, n_test
            in zip(groups, class_ids, val_num, test_num, strict=True) if len(ids) <= n_val + n_test]
    if poor:
        raise Refused(f"nothing would be left to train on for {', '.join(poor)}: lower --val_frac "
                      "and --test_frac" + (", or leave the class out of --label_dict"
                                           if table.task_type == "classification" else ""))
    common: dict[str, Any] = {
        "val_num": val_num, "n_splits": drawing.n_splits, "seed": drawing.seed,
        "label_frac": drawing.label_frac, "subset": drawing.subset}
    draws = (draw_kfold(class_ids, **common) if drawing.scheme == "kfold" else
             draw_clam(class_ids, **common, test_num=test_num, custom_test_ids=fixed))
    return [Split(*(tuple(table.slide_ids[row] for unit in part for row in rows[unit])
                    for part in draw)) for draw in draws]


def _positions(names: Sequence[str], wanted: Sequence[str] | None) -> list[int] | None:
    if wanted is None:
        return None
    position = {name: number for number, name in enumerate(names)}
    unknown = [name for name in wanted if name not in position]
    if unknown:
        raise Refused(f"custom test ids {listed(unknown)} are not in the table: give case ids "
                      "(slide ids with --slide_level), one a line")
    if len(set(wanted)) < len(wanted):
        raise Refused("custom test ids are listed twice: leave each once")
    return [position[name] for name in wanted]


# ---------------------------------------------------------------------------- writing

def split_files(fold: int, split: Split, table: SlideTable) -> dict[str, str]:
    """File name -> text of the three csv files of a split, byte for byte as the original's."""
    header = ("", *PARTS)
    parts = split.parts()
    plain = [(str(row), *ids) for row, ids in enumerate(zip_longest(*parts.values(), fillvalue=""))]
    flags = [(slide_id, *(str(part == name) for name in PARTS))
             for part, ids in parts.items() for slide_id in ids]
    counts = np.stack([table.subset(ids).class_counts() for ids in parts.values()], axis=1)
    numbers = [(name, *map(str, row)) for name, row in
               zip(table.class_names, counts.tolist(), strict=True)]
    return {f"splits_{fold}.csv": _csv_text([header, *plain]),
            f"splits_{fold}_bool.csv": _csv_text([header, *flags]),
            f"splits_{fold}_descriptor.csv": _csv_text([header, *numbers])}


def _csv_text(rows: Sequence[tuple[str, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_split(folder: Path, fold: int, split: Split, table: SlideTable) -> None:
    """Write ``splits_{fold}.csv``, ``_bool.csv`` and ``_descriptor.csv``."""
    for name, text in split_files(fold, split, table).items():
        write_text(folder / name, text)


# ---------------------------------------------------------------------------- reading, checking

def read_split(path: Path, table: SlideTable, *, allow_shared_patients: bool = False) -> Split:
    """Read ``splits_{k}.csv`` (or the ``_bool`` form); ids come in the order of the table.

    Raises ``Refused``, naming up to five ids, for ids that are not in the table or listed twice,
    for a patient in two parts, and for what training slides cannot teach (a class without any).
    A patient may be in two
    parts when ``allow_shared_patients``, or when the folder's record says that the splits were
    made by slides on purpose.
    """
    cells = read_table(path, what="split file")
    missing = [part for part in PARTS if part not in cells.columns]
    if missing:
        raise Refused(f"split file {path} has no column {listed(missing)} (found: "
                      f"{', '.join(cells.columns)}): make it with create_splits_seq.py")
    columns = {part: cells[part].tolist() for part in PARTS}
    if cells.columns[0] not in PARTS and {*columns["train"], *columns["test"]} <= {"True", "False"}:
        ids = cells.iloc[:, 0].tolist()
        columns = {part: [slide_id for slide_id, flag in zip(ids, flags, strict=True)
                          if flag == "True"] for part, flags in columns.items()}
    columns = {part: [slide_id for slide_id in ids if slide_id] for part, ids in columns.items()}
    _check_ids(path, columns, table)
    rank = table.row_of
    split = Split(*(tuple(sorted(columns[part], key=rank.__getitem__)) for part in PARTS))
    check_split(split, table, what=f"split file {path}",
                allow_shared_patients=allow_shared_patients or _made_by_slides(path.parent))
    return split


def _check_ids(path: Path, columns: dict[str, list[str]], table: SlideTable) -> None:
    every = [slide_id for ids in columns.values() for slide_id in ids]
    unknown = [slide_id for slide_id in dict.fromkeys(every) if slide_id not in table.row_of]
    if not unknown:
        return
    stripped = {slide_id.lstrip("0") for slide_id in table.slide_ids}
    hint = "use the csv that the splits were made from"
    if any(_as_number(slide_id) in stripped for slide_id in unknown):
        hint = ("the program that wrote them took ids for numbers (001 became 1 or 1.0): make the "
                "splits again with create_splits_seq.py")
    raise Refused(f"split file {path} names {listed(unknown)}, not in the table of {len(table)} "
                  f"slides: {hint}")


def _as_number(slide_id: str) -> str:
    return slide_id.removesuffix(".0").lstrip("0")


def _made_by_slides(folder: Path) -> bool:
    try:
        record = read_json(folder / RECORD)
        return bool(record["parameters"]["slide_level"])
    except (BrokenFile, KeyError, TypeError):
        return False


def check_split(split: Split, table: SlideTable, *, what: str,
                allow_shared_patients: bool = False) -> None:
    """``Refused`` for a slide listed twice, a patient in two parts, a class nobody trains on.

    Or, in training: a label that all have or none has, no event, or one value for all.
    """
    place: dict[str, str] = {}
    twice, crossing = [], {}
    for part, ids in split.parts().items():
        for slide_id in ids:
            if slide_id in place:
                twice.append(slide_id)
            place[slide_id] = part
    if twice:
        raise Refused(f"{what} lists {listed(twice)} twice: leave each slide in one place")
    home: dict[str, str] = {}
    for slide_id, part in place.items():
        case_id = table.case_ids[table.row_of[slide_id]]
        if home.setdefault(case_id, part) != part:
            crossing[case_id] = f"{case_id} ({home[case_id]} and {part})"
    if crossing and not allow_shared_patients:
        raise Refused(f"{what} has patients in two parts: {listed(crossing.values())}; results "
                      "would be too good: make patient-level splits with create_splits_seq.py")
    lacking = _lacking(table.subset(split.train), "training")
    if lacking:
        raise Refused(f"{what} has {lacking}: make other splits" + {
            "classification": ", or leave the class out of the task",
            "multilabel": ", or leave the label out of --label_cols"}.get(table.task_type, ""))


def _lacking(slides: SlideTable, part: str) -> str:
    """What slides of a part can neither teach nor show, "" when nothing."""
    if slides.targets is None:
        names = [slides.class_names[index] for index in np.flatnonzero(slides.class_counts() == 0)]
        return f"no {part} slide of class {listed(names)}" if names else ""
    if slides.task_type == "survival":
        return "" if (slides.targets[:, 1] == 1).any() else f"no {part} slide with an event"
    names = [name for name, column in zip(slides.target_names, slides.targets.T, strict=True)
             if len(np.unique(column[~np.isnan(column)])) < 2]
    return f"only one value of {listed(names)} among the {part} slides" if names else ""


def split_notes(split: Split, table: SlideTable) -> list[str]:
    """What is allowed but worth knowing: empty parts, and what validation or test cannot show."""
    figure = {"survival": "c-index", "regression": "R2"}.get(table.task_type, "AUC")
    notes = []
    for part in ("val", "test"):
        slides = table.subset(split.parts()[part])
        if not len(slides):
            notes.append(f"no {part} slides")
        elif lacking := _lacking(slides, part):
            notes.append(f"{lacking}: its {figure} is not defined there")
    return notes
