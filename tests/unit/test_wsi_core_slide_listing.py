"""Names and files of a run's slides, and pixel sizes from a csv."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.errors import Refused
from wsi_core.presets import DEFAULTS
from wsi_core.process_list import new_list
from wsi_core.slide_listing import (
    check_stems,
    known_mpp,
    list_slides,
    read_mpp_csv,
    slide_file,
    unused_sizes,
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.svs", "a.svs", ".hidden", "notes.txt", "one/a.svs", "two/c.tif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def test_a_folder_lists_its_files_in_order_and_leaves_hidden_ones(tree: Path) -> None:
    assert list_slides(tree) == {name: name for name in ("a.svs", "b.svs", "notes.txt")}
    with pytest.raises(Refused, match="cannot be read"):
        list_slides(tree / "nowhere")
    (tree / "empty").mkdir()
    with pytest.raises(Refused, match="has no files.*--recursive"):
        list_slides(tree / "empty")


def test_sub_folders_by_name_or_by_path(tree: Path) -> None:
    """A19: two slides of one name are refused, or told apart by their folders."""
    with pytest.raises(Refused, match=r"one/a\.svs have the same name.*--id_from_path"):
        list_slides(tree, recursive=True)
    assert list_slides(tree, recursive=True, id_from_path=True) == {
        "a.svs": "a.svs", "b.svs": "b.svs", "one__a.svs": "one/a.svs", "two__c.tif": "two/c.tif"}
    (tree / "a.svs").unlink()
    assert list_slides(tree, recursive=True) == {
        "b.svs": "b.svs", "a.svs": "one/a.svs", "c.tif": "two/c.tif"}


def test_the_list_says_where_slides_lie_and_leads_nowhere_else(tree: Path) -> None:
    listing = new_list(["c.tif"], DEFAULTS, paths={"c.tif": "two/c.tif"})
    assert listing.columns[:2] == ["slide_id", "path"]
    assert slide_file(tree, "c.tif", listing.rows["c.tif"]) == tree / "two/c.tif"
    assert slide_file(tree, "b.svs", {}) == tree / "b.svs"
    for path in ("../../etc/passwd", "/etc/passwd", "two/../../x"):
        with pytest.raises(Refused, match="of x: its part '(..|/)' is not a plain name"):
            slide_file(tree, "x", {"path": path})


def test_same_stem_names_both_paths() -> None:
    with pytest.raises(Refused, match=r"s/a\.svs and s/a\.tif would both become a\.h5"):
        check_stems(new_list(["a.svs", "b.svs", "a.tif"], DEFAULTS), Path("s"))
    with pytest.raises(Refused, match=r"s/A\.svs and s/a\.svs would both become a\.h5"):
        check_stems(new_list(["A.svs", "a.svs"], DEFAULTS), Path("s"))
    check_stems(new_list(["a.svs", "a.b.svs"], DEFAULTS), Path("s"))


def csv(folder: Path, text: str) -> Path:
    path = folder / "mpp.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("column", ["slide_id", "wsi", "slide"])
def test_pixel_sizes_by_name_with_and_without_extension(column: str, tmp_path: Path) -> None:
    sizes = read_mpp_csv(csv(tmp_path, f"{column},mpp\na.svs,0.25\nb,0.5\nc,\n"))
    assert sizes == {"a.svs": 0.25, "b": 0.5}
    assert known_mpp(sizes, "a.svs") == 0.25 and known_mpp(sizes, "b.ndpi") == 0.5
    assert known_mpp(sizes, "a.tif") is None
    assert unused_sizes(sizes, ["a.svs", "x.svs"]) == ["b"]


@pytest.mark.parametrize(("text", "message"), [
    ("name,mpp\na,1\n", "has the columns name, mpp, expected mpp and one of slide_id"),
    ("wsi,size\na,1\n", "expected mpp"),
    ("wsi,mpp\na,20x\n", r"line 2 \(a\): mpp is '20x', expected micrometres"),
    ("wsi,mpp\na,1\nb,0\n", r"line 3 \(b\): mpp is '0'"),
    ("wsi,mpp\na,0.25\na,0.5\n", "gives a twice, 0.25 and 0.5 um"),
    ("wsi,mpp\na,\n", "gives no pixel size")])
def test_a_bad_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=message):
        read_mpp_csv(csv(tmp_path, text))
