"""Drawing, writing, reading and checking splits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datasets.split_folder import SplitFolder
from datasets.splits import (
    Drawing,
    Split,
    check_split,
    make_splits,
    read_split,
    split_files,
    split_folder_name,
    split_notes,
    write_split,
)
from datasets.table import SlideTable
from utils.errors import Refused

NAMES = ("A", "B", "C")


def table_of(n_patients: int = 60, *, slides_each: int = 2, n_classes: int = 3) -> SlideTable:
    """Patients p000 ..., class by patient number; slide ids zero-padded numbers."""
    cases = [f"p{patient:03d}" for patient in range(n_patients) for _ in range(slides_each)]
    labels = np.array([int(case[1:]) % n_classes for case in cases])
    return SlideTable(tuple(f"{row:04d}" for row in range(len(cases))), tuple(cases), labels,
                      NAMES[:n_classes])


def cases_of(ids: tuple[str, ...], table: SlideTable) -> set[str]:
    return {table.case_ids[table.row_of[slide_id]] for slide_id in ids}


@pytest.mark.parametrize("scheme", ["clam", "kfold"])
def test_parts_are_stratified_disjoint_and_repeatable(scheme: str) -> None:
    table = table_of()
    drawing = Drawing(n_splits=5, seed=3, scheme=scheme)  # type: ignore[arg-type]
    splits = make_splits(table, drawing)
    assert splits == make_splits(table, drawing)
    assert splits != make_splits(table, Drawing(n_splits=5, seed=4, scheme=drawing.scheme))
    for split in splits:
        cases = [cases_of(ids, table) for ids in split.parts().values()]
        assert sum(map(len, cases)) == len(set.union(*cases)) == 60
        n_test = 4 if scheme == "kfold" else 2
        assert table.subset(split.test).class_counts().tolist() == [2 * n_test] * 3
        assert table.subset(split.val).class_counts().tolist() == [4, 4, 4]


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr,call-overload] # noqa: NPY002
    make_splits(table_of(), Drawing(n_splits=2, seed=1))
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index,union-attr,call-overload] # noqa: NPY002


def test_kfold_tests_every_patient_once() -> None:
    table = table_of(53)
    splits = make_splits(table, Drawing(n_splits=10, seed=1, scheme="kfold"))
    tested = [slide_id for split in splits for slide_id in split.test]
    assert sorted(tested) == sorted(table.slide_ids)
    assert {len(cases_of(split.test, table)) for split in splits} == {5, 6}


def test_label_frac_cuts_training_only_and_nests() -> None:
    table = table_of(90)
    for subset in ("first", "random"):
        made = {frac: make_splits(table, Drawing(n_splits=2, seed=1, label_frac=frac,
                                                 subset=subset))[1]  # type: ignore[arg-type]
                for frac in (0.25, 0.5, 1.0)}
        assert made[0.25].val == made[0.5].val == made[1.0].val
        assert made[0.25].test == made[1.0].test
        assert set(made[0.25].train) < set(made[0.5].train) < set(made[1.0].train)
        assert len(cases_of(made[0.5].train, table)) == 36  # 24 a class, halves
    first, random = (make_splits(table, Drawing(n_splits=1, seed=1, label_frac=0.5,
                                                subset=subset))[0]  # type: ignore[arg-type]
                     for subset in ("first", "random"))
    assert max(first.train) < max(random.train)
    assert (first.val, first.test) == (random.val, random.test)


def test_custom_test_ids_form_every_test_set() -> None:
    table = table_of()
    splits = make_splits(table, Drawing(n_splits=3, seed=1, custom_test_ids=("p007", "p000")))
    assert {split.test for split in splits} == {("0014", "0015", "0000", "0001")}
    assert all(not set(split.test) & {*split.train, *split.val} for split in splits)
    for ids, message in ((("nobody",), "'nobody' are not"), (("p001", "p001"), "twice")):
        with pytest.raises(Refused, match=message):
            make_splits(table, Drawing(n_splits=1, seed=1, custom_test_ids=ids))


def test_slide_level_divides_slides() -> None:
    table = table_of(20)
    split = make_splits(table, Drawing(n_splits=1, seed=1, slide_level=True, test_frac=0.3))[0]
    assert cases_of(split.train, table) & cases_of(split.test, table)
    assert len(split.test) == sum(np.round(table.class_counts() * 0.3))


def test_voting_decides_the_stratum_of_a_patient() -> None:
    cases = tuple(f"p{row // 3:02d}" for row in range(60))
    table = SlideTable(tuple(f"s{row}" for row in range(60)), cases,
                       np.array([1, 0, 0] * 10 + [0, 0, 0] * 10), ("A", "B"))
    split = make_splits(table, Drawing(n_splits=1, seed=1, test_frac=0.2))[0]
    assert table.subset(split.test).class_counts().tolist() == [10, 2]
    with pytest.raises(Refused, match="train on for B"):  # the majority is A everywhere
        make_splits(table, Drawing(n_splits=1, seed=1, patient_voting="maj"))


@pytest.mark.parametrize("drawing", [
    Drawing(n_splits=1, seed=1, val_frac=0.5, test_frac=0.5),
    Drawing(n_splits=2, seed=1, val_frac=0.5, scheme="kfold"),
])
def test_a_class_with_nothing_left_to_train_on_is_refused(drawing: Drawing) -> None:
    with pytest.raises(Refused, match="nothing would be left to train on"):
        make_splits(table_of(), drawing)


def test_folder_names_are_those_of_clam() -> None:
    assert split_folder_name("t", 1.0) == "t_100"
    assert split_folder_name("t", 0.29) == "t_28"  # int(), as the original


def test_files_have_the_three_forms() -> None:
    table = table_of(6, slides_each=1, n_classes=2)
    files = split_files(4, Split(("0000", "0001", "0003"), ("0002",), ()), table)
    assert files == {
        "splits_4.csv": ",train,val,test\n0,0000,0002,\n1,0001,,\n2,0003,,\n",
        "splits_4_bool.csv": ",train,val,test\n0000,True,False,False\n0001,True,False,False\n"
                             "0003,True,False,False\n0002,False,True,False\n",
        "splits_4_descriptor.csv": ",train,val,test\nA,1,1,0\nB,2,0,0\n"}


def test_an_absent_class_does_not_shift_the_descriptor() -> None:
    table = table_of(9, slides_each=1)
    text = split_files(0, Split(("0000", "0001", "0002", "0003"), ("0005",), ("0006", "0008")),
                       table)["splits_0_descriptor.csv"]
    assert text == ",train,val,test\nA,2,0,1\nB,1,0,0\nC,1,1,1\n"


@pytest.mark.parametrize("form", ["splits_0.csv", "splits_0_bool.csv"])
def test_both_forms_read_back_in_table_order(tmp_path: Path, form: str) -> None:
    table = table_of()
    split = make_splits(table, Drawing(n_splits=1, seed=1))[0]
    write_split(tmp_path, 0, split, table)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "splits_0.csv", "splits_0_bool.csv", "splits_0_descriptor.csv"]
    found = read_split(tmp_path / form, table)
    assert found == Split(*(tuple(sorted(ids)) for ids in split.parts().values()))


def write(folder: Path, text: str) -> Path:
    path = folder / "splits_0.csv"
    path.write_text(text)
    return path


HEAD = ",train,val,test\n"


@pytest.mark.parametrize(("text", "message"), [
    (HEAD + "0,0000,0004,0010\n1,0002,0004,\n", "'0004' twice"),
    (HEAD + "0,0000,0004,0010\n1,0002,0000,\n", "'0000' twice"),
    (HEAD + "0,0000,0001,0010\n1,0002,,\n", r"two parts: 'p000 \(train and val\)'"),
    (HEAD + "0,0000,zz,0010\n1,0002,,\n", "'zz', not in the table"),
    (HEAD + "0,0,4,10\n1,2,,\n", "took ids for numbers"),
    (HEAD + "0,0000,4.0,10.0\n1,0002,,\n", "took ids for numbers"),
    (HEAD + "0,0000,0002,0010\n", "no training slide of class 'B'"),
    (HEAD, "no training slide"),
    (",train,test\n0,0000,0010\n", "no column 'val'"),
    ("", "not a csv"),
])
def test_bad_split_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        read_split(write(tmp_path, text), table_of(6, n_classes=2))


def test_five_unknown_ids_are_named(tmp_path: Path) -> None:
    rows = "".join(f"{row},x{row},,\n" for row in range(9))
    with pytest.raises(Refused, match=r"'x4', \.\.\. \(9 in all\)"):
        read_split(write(tmp_path, HEAD + rows), table_of())


def test_shared_patients_are_read_only_when_meant(tmp_path: Path) -> None:
    table = table_of(6, n_classes=2)
    path = write(tmp_path, HEAD + "0,0000,0001,0010\n1,0002,,\n")
    assert read_split(path, table, allow_shared_patients=True).val == ("0001",)
    (tmp_path / "splits.json").write_text('{"parameters": {"slide_level": true}}')
    assert read_split(path, table).val == ("0001",)
    (tmp_path / "splits.json").write_text('{"parameters": {"slide_level": false}}')
    with pytest.raises(Refused, match="two parts"):
        read_split(path, table)


def test_absent_classes_and_empty_parts_are_noted() -> None:
    table = table_of(6, n_classes=2)
    split = Split(("0000", "0002"), ("0004",), ())
    assert split_notes(split, table) == [
        "no val slide of class 'B': its AUC is not defined there", "no test slides"]
    assert split_notes(Split(("0000", "0002"), ("0004", "0006"), ("0008", "0010")), table) == []


def folder_of(path: Path, table: SlideTable, **changes: int) -> SplitFolder:
    drawing = Drawing(**{"n_splits": 3, "seed": 1, **changes})  # type: ignore[arg-type]
    return SplitFolder.of(path, make_splits(table, drawing), table,
                          {"seed": drawing.seed, "n_splits": drawing.n_splits})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_done_when_every_file_is_there_and_equal(tmp_path: Path) -> None:
    table = table_of()
    folder = folder_of(tmp_path / "s", table)
    assert not folder.is_done()
    folder.write(table, csv_path=Path("t.csv"))
    whole = contents(folder.path)
    assert folder.is_done() and len(whole) == 10
    for name in ("splits_1.csv", "splits.json"):  # killed before it was written
        (folder.path / name).unlink()
        assert not folder.is_done()
        folder.write(table, csv_path=Path("t.csv"))
        assert contents(folder.path) == whole


def test_other_splits_are_replaced_only_by_request(tmp_path: Path) -> None:
    table = table_of()
    folder_of(tmp_path, table).write(table, csv_path=Path("t.csv"))
    other = folder_of(tmp_path, table, seed=2, n_splits=2)
    with pytest.raises(Refused, match="seed: file has 1, you ask 2.*--overwrite"):
        other.is_done()
    assert not other.is_done(overwrite=True)
    other.write(table, csv_path=Path("t.csv"))
    assert other.is_done()
    assert not (tmp_path / "splits_2.csv").exists()


def test_a_split_file_edited_by_hand_is_not_overwritten(tmp_path: Path) -> None:
    table = table_of()
    folder = folder_of(tmp_path, table)
    folder.write(table, csv_path=Path("t.csv"))
    (tmp_path / "splits_1.csv").write_text(HEAD + "0,0000,0002,0004\n")
    with pytest.raises(Refused, match=r"differ .*'splits_1\.csv'"):
        folder.is_done()
    assert not folder.is_done(overwrite=True)


def survivors(n_patients: int = 40, *, n_events: int = 20) -> SlideTable:
    """Patients of two slides; the first ``n_events`` of them have an event."""
    cases = [f"p{patient:03d}" for patient in range(n_patients) for _ in range(2)]
    events = np.array([int(case[1:]) < n_events for case in cases], dtype=np.int64)
    return SlideTable(
        tuple(f"{row:04d}" for row in range(len(cases))), tuple(cases), events,
        ("censored", "event"), task_type="survival", target_names=("time", "event"),
        targets=np.stack([np.arange(len(cases)) // 2 + 1.0, events], axis=1))


@pytest.mark.parametrize("scheme", ["clam", "kfold"])
def test_survival_is_stratified_by_event(scheme: str) -> None:
    table = survivors()
    for split in make_splits(table, Drawing(n_splits=5, seed=1, scheme=scheme)):  # type: ignore[arg-type]
        n_test = 4 if scheme == "kfold" else 2
        assert table.subset(split.test).class_counts().tolist() == [2 * n_test] * 2
        assert not cases_of(split.train, table) & cases_of(split.test, table)
        check_split(split, table, what="split")


def test_a_stratum_that_vanishes_does_not_stop_the_splits() -> None:
    """No censored slide at all; and a quarter of values that loses its patients by the vote."""
    table = survivors(n_events=40)
    split, = make_splits(table, Drawing(n_splits=1, seed=1))
    assert table.subset(split.test).class_counts().tolist() == [0, 8]
    values = replace(table, task_type="regression", target_names=("v", "w"),
                     labels=np.arange(80) % 2, class_names=("v up to 1", "v above 1"))
    assert len(make_splits(values, Drawing(n_splits=1, seed=1))) == 1


def split_of(table: SlideTable, train: slice, test: slice) -> Split:
    return Split(table.slide_ids[train], (), table.slide_ids[test])


def test_what_cannot_be_learnt_from_the_training_slides_is_refused() -> None:
    table = survivors(n_events=2)
    with pytest.raises(Refused, match="no training slide with an event: make other splits$"):
        check_split(split_of(table, slice(4, 40), slice(0, 4)), table, what="split")
    labels = replace(table, task_type="multilabel", target_names=("er", "pr"),
                     targets=np.array([[row % 2, row < 4 or np.nan] for row in range(80)], float))
    with pytest.raises(Refused, match="only one value of 'pr' among the training slides.*"
                                      "label out of --label_cols"):
        check_split(split_of(labels, slice(0, 40), slice(40, 80)), labels, what="split")
    values = replace(table, task_type="regression", targets=np.ones((80, 2)))
    with pytest.raises(Refused, match="only one value of 'time', 'event'"):
        check_split(split_of(values, slice(0, 40), slice(40, 80)), values, what="split")
    censored_only = split_of(survivors(), slice(0, 20), slice(60, 80))
    check_split(censored_only, survivors(), what="split")  # censored slides are no class


def test_what_validation_and_test_cannot_show_is_noted() -> None:
    table = survivors()
    assert split_notes(split_of(table, slice(0, 20), slice(60, 80)), table) == [
        "no val slides", "no test slide with an event: its c-index is not defined there"]
    values = replace(table, task_type="regression", targets=np.repeat([[1.0, 2.0]], 80, axis=0))
    assert "its R2 is not defined" in split_notes(
        split_of(values, slice(0, 20), slice(60, 80)), values)[1]
