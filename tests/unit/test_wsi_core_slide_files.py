"""Which files and folders are slides, what tells them apart, and what of a folder is listed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils.errors import SlideError
from wsi_core.slide import (
    SLIDE_SUFFIXES,
    check_file,
    fingerprint,
    is_slide_file,
    slide_entries,
    stamp,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every kind of entry; the files are not opened, so their content does not matter."""
    for name in ("b.svs", "A.SVS", "notes.txt", ".hidden.svs", "case.dcmx/x.txt",
                 "dicom/1.dcm", "dicom/2.DCM", "Picture.ZARR/zarr.json", "Picture.ZARR/0/c/0/0.png",
                 "mirax.mrxs", "mirax/Slidedat.ini", "mirax/Data0000.jpg",
                 "sub/c.tiff", "sub/deep/d.png", "sub/deep/readme.md", ".cache/e.svs",
                 "scan.vms", "scan_map2.jpg", "scan(1,0).jpg", "other.jpg"):
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"123")
    (tmp_path / "slides/scan.vms").write_text(
        "[Virtual Microscope Specimen]\r\nMapFile=scan_map2.jpg\r\nImageFile=\r\n"
        "ImageFile(1,0)=scan(1,0).jpg\r\nNoLayers=1\r\n")
    return tmp_path / "slides"


def names(folder: Path, *, recursive: bool) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in
            slide_entries(folder, recursive=recursive)]


def test_directly_in_a_folder_every_file_and_every_slide_folder_counts(folder: Path) -> None:
    assert names(folder, recursive=False) == [
        "A.SVS", "Picture.ZARR", "b.svs", "dicom", "mirax.mrxs", "notes.txt", "other.jpg",
        "scan.vms"]


def test_recursively_known_endings_count(folder: Path) -> None:
    assert names(folder, recursive=True) == [
        "A.SVS", "Picture.ZARR", "b.svs", "dicom", "mirax.mrxs", "other.jpg", "scan.vms",
        "sub/c.tiff", "sub/deep/d.png"]


def test_links_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    """B14."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/f.ndpi").touch()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "g.svs").symlink_to(folder / "b.svs")
    (folder / "gone.svs").symlink_to(tmp_path / "nowhere.svs")
    (folder / "sub/up").symlink_to(folder)
    (folder / "sub/self").symlink_to(folder / "sub")
    found = names(folder, recursive=True)
    assert {"linked/f.ndpi", "g.svs", "gone.svs"} <= set(found)
    assert not any("up/" in name or "self/" in name for name in found)
    assert "gone.svs" in names(folder, recursive=False)
    with pytest.raises(SlideError, match="link to a file that is not there"):
        check_file(folder / "gone.svs")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        slide_entries(tmp_path / "none", recursive=True)


def test_what_looks_like_a_slide(folder: Path) -> None:
    expected = {"b.svs": True, "A.SVS": True, "notes.txt": False, ".hidden.svs": False,
                "case.dcmx": False, "dicom": True, "Picture.ZARR": True, "mirax": False,
                "sub": False, "missing.svs": True, "missing.zarr": False}
    assert {name: is_slide_file(folder / name) for name in expected} == expected
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SLIDE_SUFFIXES)


def test_folders_that_are_no_slides_are_refused(folder: Path) -> None:
    check_file(folder / "dicom")
    check_file(folder / "Picture.ZARR")
    for name in ("sub", "mirax"):
        with pytest.raises(SlideError, match="is a folder"):
            check_file(folder / name)


def test_fingerprint(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"12345")
    assert fingerprint(tmp_path / "a.svs") == {"slide_bytes": 5, "slide_name": "a.svs"}
    assert fingerprint(folder / "dicom") == {"slide_bytes": 6, "slide_files": 2,
                                             "slide_name": "dicom"}
    assert fingerprint(folder / "Picture.ZARR")["slide_files"] == 2
    with pytest.raises(SlideError, match="b.svs"):
        fingerprint(tmp_path / "b.svs")


@pytest.mark.parametrize("name", ["b.svs", "dicom"])
def test_a_slide_replaced_by_one_of_the_same_size_has_another_stamp(folder: Path, name: str
                                                                    ) -> None:
    """B16: within a run the time counts too; the fingerprint, which is stored, has none."""
    path = folder / name
    before, recorded = stamp(path), fingerprint(path)
    file = path if path.is_file() else path / "1.dcm"
    file.write_bytes(b"abc")
    os.utime(file, ns=(1, before.changed_ns + 1))
    assert stamp(path) != before and fingerprint(path) == recorded
    file.write_bytes(b"abcd")
    assert fingerprint(path) != recorded
