"""Truths and strata of multi-label, regression and survival tables, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datasets.table import SlideTable, load_table
from datasets.targets import EVENT_WORDS, read_number, strata_of
from datasets.tasks import Task
from utils.errors import Refused

SURVIVAL = "case_id,slide_id,months,died\n"
MULTI = "case_id,slide_id,er,pr\n"
VALUES = "case_id,slide_id,purity,age\n"


def load(folder: Path, text: str, **changes: object) -> SlideTable:
    path = folder / "table.csv"
    path.write_text(text)
    kind = {SURVIVAL: {"task_type": "survival", "time_col": "months", "event_col": "died"},
            MULTI: {"task_type": "multilabel", "label_cols": ("er", "pr")},
            VALUES: {"task_type": "regression", "label_cols": ("purity", "age")}}
    of_type = kind[text[:text.index("\n") + 1]]
    return load_table(Task(name="t", csv_path=path, **{**of_type, **changes}))  # type: ignore[arg-type]


def test_survival_has_time_and_event_and_the_event_as_stratum(tmp_path: Path) -> None:
    text = SURVIVAL + "p,a,12.5,Yes\np,b,12.50,1\nq,c,0,alive\nr,d,3e1,FALSE\n"
    table = load(tmp_path, text)
    assert table.targets is not None and table.targets.dtype == np.float64
    assert table.targets.tolist() == [[12.5, 1], [12.5, 1], [0, 0], [30, 0]]
    assert (table.task_type, table.target_names) == ("survival", ("months", "died"))
    assert (table.labels.tolist(), table.class_names) == ([1, 1, 0, 0], ("censored", "event"))
    assert table.target_of(2) == (0.0, 0.0) and table.output_names == ("months", "died")


def test_every_word_for_an_event_is_read(tmp_path: Path) -> None:
    rows = "".join(f"p{row},s{row},1,{word.upper()} \n" for row, word in enumerate(EVENT_WORDS))
    table = load(tmp_path, SURVIVAL + rows)
    assert table.targets is not None
    assert table.targets[:, 1].tolist() == list(EVENT_WORDS.values())


def test_labels_may_be_unknown_and_the_first_is_the_stratum(tmp_path: Path) -> None:
    table = load(tmp_path, MULTI + "p,a,1,\nq,b,0,1\nr,c,,0.0\n")
    assert table.targets is not None
    np.testing.assert_array_equal(table.targets, [[1, np.nan], [0, 1], [np.nan, 0]])
    assert (table.labels.tolist(), table.class_names) == ([1, 0, 0], ("not er", "er"))


def test_frequent_label_sets_are_the_strata(tmp_path: Path) -> None:
    rows = [f"p{row},s{row},{row % 2},{row % 4 // 2}" for row in range(40)]
    table = load(tmp_path, MULTI + "\n".join(rows) + "\n")
    assert set(table.class_names) == {"none", "er", "pr", "er+pr"}
    assert [table.class_names[label] for label in table.labels[:4]] == ["none", "er", "pr", "er+pr"]
    assert table.class_counts().tolist() == [10] * 4
    rare = load(tmp_path, MULTI + "\n".join(rows[:39]) + "\n")  # nine slides of the last set
    assert rare.class_names == ("not er", "er")


def test_values_have_quarters_of_the_first_as_strata(tmp_path: Path) -> None:
    rows = "".join(f"p{row // 2},s{row},{row},{-row}\n" for row in range(8))
    table = load(tmp_path, VALUES + rows)
    assert table.targets is not None and table.targets[3].tolist() == [3, -3]
    assert table.class_counts().tolist() == [2, 2, 2, 2]  # a patient's slides may differ
    assert table.class_names == ("purity up to 1.75", "purity up to 3.5", "purity up to 5.25",
                                 "purity above 5.25")


def test_equal_values_share_a_stratum_and_none_is_empty(tmp_path: Path) -> None:
    rows = "".join(f"p{row},s{row},{0 if row < 7 else 5},1\n" for row in range(8))
    table = load(tmp_path, VALUES + rows)
    assert table.class_counts().tolist() == [7, 1]
    assert table.class_names == ("purity up to 0", "purity above 0")
    task = Task(name="t", csv_path=Path("x"), task_type="regression", label_cols=("v",))
    assert strata_of(np.ones((5, 1)), task).of_slide.tolist() == [0] * 5


def test_rows_taken_carry_their_targets(tmp_path: Path) -> None:
    table = load(tmp_path, SURVIVAL + "p,a,1,1\nq,b,2,0\nr,c,3,1\n").subset(["c", "a"])
    assert table.targets is not None and table.targets.tolist() == [[3, 1], [1, 1]]
    assert (table.task_type, table.labels.tolist()) == ("survival", [1, 1])


def test_equal_repeats_agree_in_numbers_not_in_letters(tmp_path: Path) -> None:
    table = load(tmp_path, MULTI + "p,a,1,\np,a,1.0,\nq,b,0,1\n")
    assert table.slide_ids == ("a", "b") and "1 rows repeat" in table.notes[0]


@pytest.mark.parametrize(("text", "message"), [
    (SURVIVAL + "p,a,-1,1\nq,b,,1\nr,c,nan,1\ns,d,inf,0\nt,e,1_0,0\nu,f,soon,0\nv,g,3,1\n",
     r"'months': 6 of 7 rows are no time.*line 2: '-1'; line 3: ''; line 4: 'nan'; line 5: 'inf'; "
     r"line 6: '1_0'$"),
    (SURVIVAL + "p,a,1,2\nq,b,1,\nr,c,1,1\n", "'died': 2 of 3 rows are no event.*line 2: '2'"),
    (SURVIVAL + "p,a,1,1\np,b,2,1\n", "patients 'p' different times or events"),
    (SURVIVAL + "p,a,1,1\np,b,1,0\n", "patients 'p' different times or events"),
    (SURVIVAL + "p,a,1,1\np,a,2,1\n", "lists 'a' twice"),
    (MULTI + "p,a,1,2\n", "'pr': 1 of 1 rows are neither 0 nor 1"),
    (MULTI + "p,a,yes,1\n", "'er'.*line 2: 'yes'"),
    (MULTI + "p,a,,\nq,b,1,0\n", "no label is known of 'a'"),
    (VALUES + 'p,a,0.5,\nq,b,"0,5",3\n', "'purity': 1 of 2 rows are no number.*line 3: '0,5'"),
    (VALUES + "p,a,0.5,\n", "'age': 1 of 1 rows are no number.*line 2: ''"),
])
def test_bad_cells_are_refused_with_their_lines(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize(("changes", "message"), [
    ({"time_col": "month"}, "no column 'month': did you mean 'months'.*--time_col"),
    ({"event_col": "dies"}, "did you mean 'died'.*--event_col")])
def test_missing_columns_are_named_with_their_flag(
        tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        load(tmp_path, SURVIVAL + "p,a,1,1\n", **changes)
    with pytest.raises(Refused, match="no column 'her2'.*--label_cols"):
        load(tmp_path, MULTI + "p,a,1,1\n", label_cols=("er", "her2"))


def test_numbers_are_plain_and_finite() -> None:
    assert [read_number(cell) for cell in ("1", " 2.5 ", "-1e-3", "", "1_0", "nan", "inf", "x")
            ] == [1.0, 2.5, -0.001, None, None, None, None, None]


def two_columns(folder: Path, text: str, *, kind: str, cols: tuple[str, ...]) -> SlideTable:
    path = folder / "table.csv"
    path.write_text(text)
    return load_table(Task(name="t", csv_path=path, task_type=kind, label_cols=cols))  # type: ignore[arg-type]


def test_lists_of_labels_become_columns(tmp_path: Path) -> None:
    """Spec streaming.md 9, which the published parser could not read (defect 12)."""
    text = "slide_id,label\na,[0;2]\nb,[]\nc,[ 1 ]\nd,[2;2;0]\n"
    table = two_columns(tmp_path, text, kind="multilabel", cols=("er", "pr", "her2"))
    assert table.targets is not None
    assert table.targets.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert table.target_names == ("er", "pr", "her2")
    assert "'label' for its labels, numbered as in --label_cols" in table.notes[0]
    with pytest.raises(Refused, match="'label': 2 of 4 rows are beyond the 2 labels of "
                                      r"--label_cols, numbered 0 to 1: line 2: '\[0;2\]'; line 5"):
        two_columns(tmp_path, text, kind="multilabel", cols=("er", "pr"))


@pytest.mark.parametrize("cell", ["0;2", "[0,2]", "[0;]", "[-1]", "[a]", "", "[0"])
def test_what_is_no_list_of_labels(tmp_path: Path, cell: str) -> None:
    with pytest.raises(Refused, match="1 of 2 rows are no list of labels such as"):
        two_columns(tmp_path, f'slide_id,label\na,"{cell}"\nb,[1]\n', kind="multilabel",
                    cols=("er", "pr"))


def test_one_value_a_slide(tmp_path: Path) -> None:
    table = two_columns(tmp_path, "name,score\na,0.5\nb,-1e1\n", kind="regression",
                        cols=("purity",))
    assert table.targets is not None and table.targets.tolist() == [[0.5], [-10]]
    assert table.target_names == ("purity",)
    with pytest.raises(Refused, match="no column 'slide_id'"):
        two_columns(tmp_path, "name,score\na,0.5\n", kind="regression", cols=("purity", "age"))
