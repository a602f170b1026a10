"""The table of slides: ids byte for byte, patients, votes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datasets.table import SlideTable, listed, load_table
from datasets.tasks import Task
from utils.errors import Refused

HEADER = "case_id,slide_id,label\n"


def task_of(folder: Path, text: str | bytes, **changes: object) -> Task:
    path = folder / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    values: dict[str, object] = {"name": "t", "csv_path": path,
                                 "label_dict": {"normal": 0, "tumor": 1}, **changes}
    return Task(**values)  # type: ignore[arg-type]


def test_ids_are_text_byte_for_byte(tmp_path: Path) -> None:
    ids = ["001", "1E5", "NA", "None", "true", "1.0", "a b", "ä-ö", "x.svs", "null", "-inf"]
    text = HEADER + "".join(f"P{i},{slide_id},normal\n" for i, slide_id in enumerate(ids))
    assert load_table(task_of(tmp_path, text)).slide_ids == tuple(ids)


@pytest.mark.parametrize("encoded", [
    "case_id,slide_id,label\r\n007,1E5,tumor\r\n".encode("utf-8-sig"),
    b"case_id;slide_id;label\n007;1E5;tumor\n",
    b"case_id\tslide_id\tlabel\n007\t1E5\ttumor\n",
    "case_id,slide_id,label\n007,1E5,tumor\n".encode("utf-16"),
], ids=["bom-crlf", "semicolon", "tab", "utf16"])
def test_every_common_way_to_save_a_csv(tmp_path: Path, encoded: bytes) -> None:
    table = load_table(task_of(tmp_path, encoded))
    assert (table.slide_ids, table.case_ids, table.labels.tolist()) == (("1E5",), ("007",), [1])


def test_numeric_labels_are_names_like_others(tmp_path: Path) -> None:
    table = load_table(task_of(tmp_path, HEADER + "p,a,0\nq,b,1\n", label_dict={"0": 1, "1": 0}))
    assert table.labels.tolist() == [1, 0]
    assert table.class_names == ("1", "0")


def test_filters_and_ignored_labels_leave_rows_out(tmp_path: Path) -> None:
    text = ("case_id,slide_id,label,site,source\np,a,normal,A,one\nq,b,tumor,B,two\n"
            "r,c,tumor,C,one\ns,d,unsure,A,two\n")
    table = load_table(task_of(tmp_path, text, filter_dict={"site": ("A", "B")},
                               ignore=("unsure",)))
    assert (table.slide_ids, table.sources) == (("a", "b"), ("one", "two"))
    with pytest.raises(Refused, match="no slides left after filter_dict"):
        load_table(task_of(tmp_path, text, filter_dict={"site": ("Z",)}))
    with pytest.raises(Refused, match="no column 'sites': did you mean 'site'"):
        load_table(task_of(tmp_path, text, filter_dict={"sites": ("A",)}))


def test_without_patients_each_slide_is_its_own(tmp_path: Path) -> None:
    table = load_table(task_of(tmp_path, "slide_id,label\na,normal\nb,tumor\n"))
    assert table.case_ids == ("a", "b")
    assert "its own patient" in table.notes[0]


def test_equal_repeats_are_kept_once_with_a_note(tmp_path: Path) -> None:
    table = load_table(task_of(tmp_path, HEADER + "p,a,normal\nq,b,tumor\np,a,normal\n"))
    assert table.slide_ids == ("a", "b")
    assert "1 rows repeat" in table.notes[0]


@pytest.mark.parametrize(("text", "message"), [
    (HEADER + "p,a,normal\np,a,tumor\n", "lists 'a' twice"),
    (HEADER + "p,a,normal\nq,a,normal\n", "different labels or patients"),
    (HEADER + "p,a,normal\nq,b,cyst\nr,c,\n", r"2 of 3 rows.*line 3: 'cyst'; line 4: ''"),
    (HEADER + "p,a,normal \n", "not in the map"),
    (HEADER + "p,../a,normal\n", "line 2: '../a'"),
    (HEADER + "p,/etc/a,normal\n", "no plain name"),
    (HEADER + "p,a\\b,normal\n", "no plain name"),
    (HEADER + "p,a ,normal\n", "outer blank"),
    (HEADER + "p,,normal\n", "no plain name"),
    (HEADER + f"p,{'x' * 201},normal\n", "200 bytes"),
    (HEADER + "p ,a,normal\n", "case_id.*outer blanks"),
    (HEADER, "no slides"),
    ("case_id,slide,label\np,a,normal\n", "did you mean 'slide'"),
    ("case_id,slide_id,Label\np,a,normal\n", "did you mean 'Label'.*--label_col"),
    ("case_id,slide_id,label,label \np,a,normal,tumor\n", "'label' twice"),
    (HEADER + "p,a,normal,\nq,b,tumor,\n", "more cells than its header"),
    ("", "not a csv table"),
])
def test_bad_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        load_table(task_of(tmp_path, text))


def test_only_five_bad_rows_are_listed(tmp_path: Path) -> None:
    text = HEADER + "".join(f"p,s{i},odd\n" for i in range(50))
    with pytest.raises(Refused) as caught:
        load_table(task_of(tmp_path, text))
    assert "50 of 50 rows" in str(caught.value)
    assert str(caught.value).count("line ") == 5


def test_the_line_named_is_that_of_the_file_after_filtering(tmp_path: Path) -> None:
    text = "slide_id,label,site\na,normal,A\nb,normal,B\nc,cyst,B\n"
    with pytest.raises(Refused, match="line 4: 'cyst'"):
        load_table(task_of(tmp_path, text, filter_dict={"site": ("B",)}))


def small_table() -> SlideTable:
    return SlideTable(
        slide_ids=("s0", "s1", "s2", "s3", "s4"), case_ids=("b", "a", "b", "b", "c"),
        labels=np.array([2, 0, 1, 1, 0]), class_names=("x", "y", "z"),
        sources=("u", "v", "u", "v", "u"))


def test_patients_are_sorted_and_keep_their_slides_in_table_order() -> None:
    patients = small_table().patients("max")
    assert patients.case_ids == ("a", "b", "c")
    assert [rows.tolist() for rows in patients.slide_rows] == [[1], [0, 2, 3], [4]]
    assert patients.labels.tolist() == [0, 2, 0]
    assert small_table().patients("maj").labels.tolist() == [0, 1, 0]


def test_a_tied_vote_goes_to_the_lower_class() -> None:
    table = SlideTable(("s0", "s1"), ("p", "p"), np.array([2, 1]), ("x", "y", "z"))
    assert table.patients("maj").labels.tolist() == [1]
    assert table.patients("max").labels.tolist() == [2]


def test_subset_keeps_the_order_asked_for_and_all_classes() -> None:
    part = small_table().subset(["s4", "s0"])
    assert (part.slide_ids, part.case_ids, part.sources) == (("s4", "s0"), ("c", "b"), ("u", "u"))
    assert part.labels.tolist() == [0, 2]
    assert (part.n_classes, part.class_counts().tolist()) == (3, [1, 0, 1])
    assert part.row_of == {"s4": 0, "s0": 1}
    with pytest.raises(Refused, match="'nobody'"):
        small_table().subset(["s0", "nobody"])


def test_listed_names_the_first_few() -> None:
    assert listed("abc") == "'a', 'b', 'c'"
    assert listed(range(9)) == "0, 1, 2, 3, 4, ... (9 in all)"


def test_two_columns_of_any_name_are_slide_and_label(tmp_path: Path) -> None:
    """The form of the published streaming models; ids stay text."""
    table = load_table(task_of(tmp_path, "image,grade\n007,normal\n1e5,tumor\n"))
    assert table.slide_ids == ("007", "1e5") and table.labels.tolist() == [0, 1]
    assert "'image' is taken for the slide and 'grade' for its label" in table.notes[0]
    ours = load_table(task_of(tmp_path, "label,slide_id\nnormal,a\ntumor,b\n"))
    assert ours.slide_ids == ("a", "b") and not any("taken" in note for note in ours.notes)


@pytest.mark.parametrize(("first", "options"), [
    ("a,tumor", {}), ("a,cyst", {"ignore": ("cyst",)}),
    ("a,2.5", {"task_type": "regression", "label_cols": ("size",), "label_dict": {}}),
    ("a,[0;1]", {"task_type": "multilabel", "label_cols": ("x", "y"), "label_dict": {}})])
def test_a_table_without_a_header_loses_no_slide(tmp_path: Path, first: str,
                                                 options: dict[str, object]) -> None:
    with pytest.raises(Refused, match=r"has no header: its first line, a and .*slide_id,label"):
        load_table(task_of(tmp_path, f"{first}\nb,normal\n", **options))


@pytest.mark.parametrize(("text", "label_col", "message"), [
    ("image,grade,site\na,normal,x\n", "label", "no column 'slide_id'"),
    ("case_id,slide_id\np,a\n", "label", "no column 'label'"),
    ("slide_id,case_id\na,p\n", "label", "no column 'label'"),
    ("slide_id,grade\na,normal\n", "class", "no column 'class'"),
    ("image,grade\na,normal\nb,cyst\n", "label", "line 3: 'cyst'"),
])
def test_columns_that_say_something_else_are_not_taken(
        tmp_path: Path, text: str, label_col: str, message: str) -> None:
    """A label column that was asked for, patients, more than two columns."""
    with pytest.raises(Refused, match=message):
        load_table(task_of(tmp_path, text, label_col=label_col))
