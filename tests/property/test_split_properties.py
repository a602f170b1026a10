"""What holds for every table: parts divide the patients, files read back, folds cover."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from datasets.splits import Drawing, make_splits, read_split, write_split
from datasets.table import SlideTable, load_table
from datasets.tasks import Task
from utils.errors import Refused
from utils.storage import safe_id


@st.composite
def tables(draw: st.DrawFn) -> SlideTable:
    """Up to 120 slides of up to 60 patients, 2-4 classes, patients of mixed class."""
    n_classes = draw(st.integers(2, 4))
    owners = draw(st.lists(st.integers(0, 59), min_size=20, max_size=120))
    labels = draw(st.lists(st.integers(0, n_classes - 1), min_size=len(owners),
                           max_size=len(owners)))
    return SlideTable(tuple(f"s{row:03d}" for row in range(len(owners))),
                      tuple(f"p{owner}" for owner in owners), np.array(labels, dtype=np.int64),
                      tuple("ABCD"[:n_classes]))


drawings = st.builds(
    Drawing, n_splits=st.integers(2, 6), seed=st.integers(0, 2**32 - 1),
    val_frac=st.floats(0, 0.3), test_frac=st.floats(0, 0.3),
    label_frac=st.sampled_from([0.1, 0.5, 0.73, 1.0]), scheme=st.sampled_from(["clam", "kfold"]),
    subset=st.sampled_from(["first", "random"]), patient_voting=st.sampled_from(["max", "maj"]),
    slide_level=st.booleans())


@settings(max_examples=150, deadline=None)
@given(table=tables(), drawing=drawings)
def test_parts_divide_the_units(table: SlideTable, drawing: Drawing) -> None:
    try:
        splits = make_splits(table, drawing)
    except Refused:  # a class too small for these shares
        assume(False)
        return
    unit_of = table.slide_ids if drawing.slide_level else table.case_ids
    for split in splits:
        every = [slide_id for ids in split.parts().values() for slide_id in ids]
        assert len(every) == len(set(every))
        assert set(every) == set(table.slide_ids) or drawing.label_frac < 1
        home = [{unit_of[table.row_of[slide_id]] for slide_id in ids}
                for ids in split.parts().values()]
        assert not (home[0] & home[1] or home[0] & home[2] or home[1] & home[2])
    if drawing.scheme == "kfold":
        assert sorted(name for split in splits for name in split.test) == sorted(table.slide_ids)


@settings(max_examples=30, deadline=None)
@given(table=tables(), drawing=drawings)
def test_files_read_back(table: SlideTable, drawing: Drawing) -> None:
    try:
        splits = make_splits(table, drawing)
    except Refused:
        assume(False)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder), 0, splits[0], table)
        found = read_split(Path(folder) / "splits_0.csv", table, allow_shared_patients=True)
        assert [set(ids) for ids in found.parts().values()] == [
            set(ids) for ids in splits[0].parts().values()]


def is_safe(text: str) -> bool:
    try:
        safe_id(text)
    except Refused:
        return False
    return True


ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(is_safe)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(ids, min_size=2, max_size=20, unique=True))
def test_any_plain_id_survives_csv_and_split_files(names: list[str]) -> None:
    import csv

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [("slide_id", "label"), *((name, "ab"[row % 2]) for row, name in enumerate(names))])
        task = Task(name="t", csv_path=path, label_dict={"a": 0, "b": 1})
        table = load_table(task)
        assert table.slide_ids == tuple(names)
        split = make_splits(table, Drawing(n_splits=1, seed=1, val_frac=0, test_frac=0))[0]
        write_split(Path(folder), 0, split, table)
        for form in ("", "_bool"):
            found = read_split(Path(folder) / f"splits_0{form}.csv", table)
            assert found.train == tuple(names)
