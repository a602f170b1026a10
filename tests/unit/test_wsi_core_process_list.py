"""The process list: CLAM's columns, hand-edited files, lists of old."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from utils.errors import Refused
from wsi_core.presets import DEFAULTS
from wsi_core.process_list import (
    RESULT_COLUMNS,
    convert_legacy,
    is_legacy,
    new_list,
    read_list,
    row_mpp,
    row_parameters,
    to_process,
)

CLAM_COLUMNS = ["slide_id", "process", "status", "seg_level", "sthresh", "mthresh", "close",
                "use_otsu", "keep_ids", "exclude_ids", "a_t", "a_h", "max_n_holes", "vis_level",
                "line_thickness", "use_padding", "contour_fn"]


def write(folder: Path, text: str) -> Path:
    path = folder / "list.csv"
    path.write_text(text)
    return path


def test_a_new_list_has_clams_columns_then_ours() -> None:
    listing = new_list(["b.svs", "a.svs"], replace(DEFAULTS, a_t=0.5))
    assert listing.columns == [*CLAM_COLUMNS, *RESULT_COLUMNS]
    assert list(listing.rows) == ["b.svs", "a.svs"]
    row = listing.rows["a.svs"]
    assert (row["process"], row["status"], row["a_t"], row["keep_ids"]) == ("1", "tbp", "0.5",
                                                                            "none")
    assert row_parameters(row, DEFAULTS) == replace(DEFAULTS, a_t=0.5)


def test_saved_and_read_back(tmp_path: Path) -> None:
    listing = new_list(["a, b.svs", "001.svs", "NA"], DEFAULTS)
    listing.save(tmp_path / "list.csv")
    again = read_list(tmp_path / "list.csv", DEFAULTS)
    assert again.columns == listing.columns
    assert again.rows == {name: {**dict.fromkeys(RESULT_COLUMNS, ""), **row}
                          for name, row in listing.rows.items()}


def test_only_slide_id_is_needed_and_columns_of_the_user_keep_their_place(tmp_path: Path) -> None:
    path = write(tmp_path, "stain,slide_id,sthresh,note\nHE,a.svs,20,x\nHE,b.svs,,\n")
    listing = read_list(path, DEFAULTS)
    assert listing.columns[:4] == ["stain", "slide_id", "sthresh", "note"]
    assert set(listing.columns) == {"stain", "note", *CLAM_COLUMNS, *RESULT_COLUMNS}
    assert row_parameters(listing.rows["a.svs"], DEFAULTS).sthresh == 20
    assert row_parameters(listing.rows["b.svs"], DEFAULTS).sthresh == 8
    assert listing.rows["a.svs"]["note"] == "x" and listing.rows["b.svs"]["note"] == ""


@pytest.mark.parametrize(("cell", "answer"), [("1", True), ("1.0", True), ("TRUE", True),
                                              ("0", False), ("0.0", False), ("False", False)])
def test_process_cell(cell: str, answer: bool) -> None:
    assert to_process({"process": cell}) is answer


def test_process_cell_that_says_neither() -> None:
    with pytest.raises(Refused, match="process is 'yes please', expected 1 or 0"):
        to_process({"process": "yes please"})


@pytest.mark.parametrize(("text", "words"), [
    ("slide,process\na.svs,1\n", "no column 'slide_id' (its columns: slide, process)"),
    ("slide_id\na.svs\nb.svs\na.svs\n", "a.svs twice (lines 2 and 4)"),
    ("slide_id\n../a.svs\n", "line 2: slide_id '../a.svs' is not a plain name"),
    ("slide_id\n/etc/passwd\n", "not a plain name"), ("slide_id,x\n,1\n", "not a plain name")])
def test_lists_that_cannot_be_used(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        read_list(write(tmp_path, text), DEFAULTS)
    assert words in str(caught.value)


def test_mpp_column() -> None:
    assert row_mpp({}) is None and row_mpp({"mpp": " "}) is None
    assert row_mpp({"mpp": "0.25"}) == 0.25
    for text in ("x", "0", "-1", "nan", "1000"):
        with pytest.raises(Refused, match="mpp is"):
            row_mpp({"mpp": text})


def test_lists_of_old_are_converted_once(tmp_path: Path) -> None:
    path = write(tmp_path, "slide_id,a,seg_level,vis_level,a_h,sthresh,contour_fn\n"
                           "x.svs,4096,2,2,99,11,basic\ny.svs,,2,2,99,11,basic\n")
    listing = read_list(path, DEFAULTS)
    old, current = listing.rows["x.svs"], listing.rows["y.svs"]
    assert is_legacy(old) and not is_legacy(current)
    convert_legacy(old, DEFAULTS, (16.0, 16.0))
    found = row_parameters(old, DEFAULTS)
    assert found == replace(DEFAULTS, a_t=4.0, sthresh=11)  # 4096 px * 16 * 16 / 512**2
    listing.save(path)
    assert not is_legacy(read_list(path, DEFAULTS).rows["x.svs"])


def test_a_legacy_area_that_is_no_number() -> None:
    with pytest.raises(Refused, match="a is 'big'"):
        convert_legacy({"a": "big"}, DEFAULTS, (1.0, 1.0))
