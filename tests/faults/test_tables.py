"""Bad tables, settings and ids (reliability rows C1-C7): refused before any work, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from datasets.features import FeatureStore
from datasets.splits import read_split
from datasets.table import SlideTable
from utils.errors import Refused
from utils.storage import write_h5

Run = Callable[..., CompletedProcess[str]]
ROWS = [(f"p{row:02d}", f"{row:03d}", "ab"[row % 2]) for row in range(20)]


def csv_of(rows: list[tuple[str, str, str]], separator: str = ",", end: str = "\n") -> str:
    return end.join(separator.join(row) for row in [("case_id", "slide_id", "label"), *rows]) + end


def split(run_script: Run, folder: Path, data: bytes, *flags: object) -> CompletedProcess[str]:
    (folder / "t.csv").write_bytes(data)
    return run_script("create_splits_seq.py", "--csv_path", folder / "t.csv", "--label_dict",
                      "a:0,b:1", "--k", 2, "--splits_root", folder / "splits", *flags)


def assert_refused(done: CompletedProcess[str], folder: Path, *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert not list(folder.glob("splits/**/*.csv"))


@pytest.mark.parametrize("encoded", [
    csv_of(ROWS).encode("utf-8-sig"), csv_of(ROWS, end="\r\n").encode(),
    csv_of(ROWS, ";").encode(), csv_of(ROWS, "\t").encode(), csv_of(ROWS).encode("utf-16"),
], ids=["bom", "crlf", "semicolon", "tab", "utf16"])
def test_c1_every_way_to_save_a_table_gives_the_same_splits(
        run_script: Run, tmp_path: Path, encoded: bytes) -> None:
    done = split(run_script, tmp_path, encoded)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "splits" / "t_100" / "splits_0.csv").read_text()
    assert sorted(cell for line in text.splitlines()[1:] for cell in line.split(",")[1:] if cell
                  ) == [slide_id for _, slide_id, _ in ROWS]


def test_c1_ids_that_look_like_something_else_stay_text(run_script: Run, tmp_path: Path) -> None:
    odd = ["001", "1E5", "NA", "None", "true", "1.0", "nan", "-1", "0x1F", "2020-01-01"]
    rows = [(f"{row}", slide_id, "ab"[row % 2]) for row, slide_id in enumerate(odd)]
    done = split(run_script, tmp_path, csv_of(rows).encode())
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "splits" / "t_100" / "splits_0_bool.csv").read_text()
    assert {line.split(",")[0] for line in text.splitlines()[1:]} == set(odd)


@pytest.mark.parametrize(("change", "words"), [
    (("p00", "000 ", "a"), ("line 22", "'000 '", "outer blank")),  # C1
    (("p00", "000", "b"), ("'000' twice", "different labels")),  # C2
    (("p99", "000", "a"), ("'000' twice", "patients")),  # C2
    (("p20", "020", "c"), ("line 22", "'c'", "not in the map")),  # C3
    (("p20", "020", ""), ("line 22", "''", "not in the map")),  # C3
    (("p20", "020", "1"), ("line 22", "'1'")),  # C3
    (("p20", "../../etc/passwd", "a"), ("line 22", "'..'")),  # C7
    (("p20", "/etc/passwd", "a"), ("line 22", "slash")),  # C7
    (("p20", "a\0b", "a"), ("line 22", "control sign")),  # C7
    (("p20", "..", "a"), ("line 22", "'..'")),  # C7
])
def test_c1_c2_c3_c7_bad_rows_are_refused_with_their_line(
        run_script: Run, tmp_path: Path, change: tuple[str, str, str],
        words: tuple[str, ...]) -> None:
    assert_refused(split(run_script, tmp_path, csv_of([*ROWS, change]).encode()), tmp_path,
                   str(tmp_path / "t.csv"), *words)


def test_c2_equal_repeats_are_kept_once_and_said(run_script: Run, tmp_path: Path) -> None:
    done = split(run_script, tmp_path, csv_of([*ROWS, ROWS[3]]).encode())
    assert done.returncode == 0 and "20 slides of 20 patients" in done.stdout
    assert "1 rows repeat" in done.stdout


@pytest.mark.parametrize(("change", "words"), [
    ("p20,020,-3,1", ("line 22", "'-3'", "not below 0")),
    ("p20,020,,1", ("line 22", "''", "no time")),
    ("p20,020,nan,1", ("line 22", "'nan'")),
    ("p20,020,3,2", ("line 22", "'2'", "no event")),
    ("p19,020,3,1", ("'p19'", "different times or events")),
])
def test_c3_bad_survival_rows_are_refused_with_their_line(
        run_script: Run, tmp_path: Path, change: str, words: tuple[str, ...]) -> None:
    rows = [f"p{row:02d},{row:03d},{row + 1},{row % 2}" for row in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["case_id,slide_id,t,e", *rows, change]) + "\n")
    done = run_script("create_splits_seq.py", "--csv_path", tmp_path / "t.csv", "--task_type",
                      "survival", "--time_col", "t", "--event_col", "e", "--splits_root",
                      tmp_path / "splits")
    assert_refused(done, tmp_path, *words)


@pytest.mark.parametrize(("data", "word"), [
    (b"", "not a csv"), (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "UTF-8"),
    (b"case_id,slide_id,label\n", "no slides"), (b"case_id,label\np,a\n", "'slide_id'"),
    (b"case_id,slide_id,label\np,x,a,b,c\nq,y,a,b,c\n", "more cells"),
])
def test_files_that_are_no_table_are_refused(
        run_script: Run, tmp_path: Path, data: bytes, word: str) -> None:
    assert_refused(split(run_script, tmp_path, data), tmp_path, word)


@pytest.mark.parametrize("place", ["../out", "/tmp/out", "a/../../out"])
def test_c7_splits_stay_in_their_folder(run_script: Run, tmp_path: Path, place: str) -> None:
    done = split(run_script, tmp_path, csv_of(ROWS).encode(), "--split_dir", place)
    assert_refused(done, tmp_path, "leave the folder")


def test_a_folder_that_cannot_be_written_is_refused(run_script: Run, tmp_path: Path) -> None:
    (tmp_path / "splits").write_text("a file, no folder")
    done = split(run_script, tmp_path, csv_of(ROWS).encode())
    assert done.returncode == 2 and "cannot be written" in done.stderr


def test_a_full_disk_ends_in_one_line(run_script: Run, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(csv_of(ROWS))
    done = run_script("create_splits_seq.py", "--csv_path", tmp_path / "t.csv", "--label_dict",
                      "a:0,b:1", "--k", 2, "--splits_root", tmp_path / "splits",
                      env={"MILWRIGHT_FAULT": "storage.write:enospc:3"})
    assert done.returncode == 3, done.stderr
    assert "no space left" in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------- the same rules where the tables are used

def table() -> SlideTable:
    return SlideTable(tuple(row[1] for row in ROWS), tuple(row[0] for row in ROWS),
                      np.array([row[2] == "b" for row in ROWS], dtype=np.int64), ("a", "b"))


@pytest.mark.parametrize(("text", "word"), [
    ("0,000,003,004\n1,001,003,\n", "'003' twice"),
    ("0,000,001,004\n1,001,,\n", "'001' twice"),
    ("0,000,zzz,004\n1,001,,\n", "'zzz'"),
    ("0,0.0,3.0,4.0\n1,1.0,,\n", "took ids for numbers"),
    ("0,000,003,004\n1,002,,\n", "no training slide of class 'b'"),
])
def test_c5_c6_split_files_that_lie_are_refused(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n" + text)
    with pytest.raises(Refused, match=word):
        read_split(tmp_path / "splits_0.csv", table())


def test_c4_features_and_table_are_compared_both_ways(tmp_path: Path) -> None:
    (tmp_path / "h5_files").mkdir()
    for name in ("000", "001", "stranger"):
        write_h5(tmp_path / "h5_files" / f"{name}.h5", {"features": np.ones((2, 4), np.float32)},
                 parameters={})
    store = FeatureStore(tmp_path)
    with pytest.raises(Refused, match="18 of 20 slides have no features.*--allow_missing"):
        store.check(table().slide_ids)
    found = store.check(table().slide_ids, allow_missing=True)
    assert found.usable == ("000", "001") and len(found.missing) == 18
    assert any("'stranger'" in note for note in found.notes)
