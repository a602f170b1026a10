"""Folders of .dcm files: one series is a slide, two are refused."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from utils.errors import SlideError
from wsi_core.slide import fingerprint, is_slide_file, open_slide, slide_entries
from wsi_core.slide_dicom import WHOLE_SLIDE_IMAGE, file_to_open, slide_series

UID = b"1.2.3"
OVERVIEW = "data/slides/dicom_camelyon_overview_a/1.dcm"


def element(group: int, number: int, kind: bytes, value: bytes, *, length: int | None = None
            ) -> bytes:
    size = len(value) if length is None else length
    head = struct.pack("<HH2s", group, number, kind)
    if kind in (b"SQ", b"OB", b"UN"):
        return head + struct.pack("<HI", 0, size) + value
    return head + struct.pack("<H", size) + value


def item(value: bytes, *, open_end: bool) -> bytes:
    if open_end:
        return (struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + value
                + struct.pack("<HHI", 0xFFFE, 0xE00D, 0))
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value


def dicom(series: bytes, *, sop: str = WHOLE_SLIDE_IMAGE, open_end: bool = True) -> bytes:
    """The head of a file, with a reference to another series nested before its own."""
    nested = item(element(0x0020, 0x000E, b"UI", b"9.9.9\0"), open_end=open_end)
    nested = element(0x0008, 0x1115, b"SQ", nested + item(b"", open_end=open_end), length=None)
    if open_end:
        body = nested[12:] + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        nested = element(0x0008, 0x1115, b"SQ", body, length=0xFFFFFFFF)
    deeper = item(nested, open_end=open_end)
    return (bytes(128) + b"DICM" + element(0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1\0")
            + element(0x0008, 0x0016, b"UI", sop.encode() + b"\0" * (len(sop) % 2))
            + nested + element(0x0008, 0x2218, b"SQ", deeper)
            + element(0x0010, 0x0010, b"PN", b"A^B ")
            + element(0x0020, 0x000E, b"UI", series + b"\0")
            + element(0x0020, 0x0011, b"IS", b"1 "))


@pytest.mark.parametrize("open_end", [True, False])
def test_the_series_of_a_file_is_its_own(tmp_path: Path, open_end: bool) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom(UID, open_end=open_end))
    assert slide_series(path) == "1.2.3"


def test_files_of_other_kinds_and_damaged_ones_have_none(tmp_path: Path) -> None:
    whole = dicom(UID)
    for data in (dicom(UID, sop="1.2.840.10008.5.1.4.1.1.2"), b"", b"text" * 100, whole[:200],
                 whole[:-40], whole[:128] + b"DICX" + whole[132:]):
        (tmp_path / "a.dcm").write_bytes(data)
        assert slide_series(tmp_path / "a.dcm") == ""


def test_a_folder_of_two_series_is_refused_by_name(tmp_path: Path) -> None:
    for name, series in {"a.dcm": UID, "b.DCM": UID, "c.dcm": b"1.2.4"}.items():
        (tmp_path / name).write_bytes(dicom(series))
    with pytest.raises(SlideError, match="mixes 2 DICOM series.*a.dcm, another that of c.dcm"):
        open_slide(tmp_path)
    (tmp_path / "c.dcm").unlink()
    (tmp_path / "annotation.dcm").write_bytes(dicom(b"1.2.9", sop="1.2.3.4"))
    assert file_to_open(tmp_path) == tmp_path / "a.dcm"
    with pytest.raises(SlideError, match="no whole-slide images|OpenSlide cannot open"):
        open_slide(tmp_path)  # a head is no picture


def test_a_real_folder_is_the_slide_that_its_file_is(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cases" / "case 1"
    folder.mkdir(parents=True)
    shutil.copy(shared / OVERVIEW, folder / "1.dcm")
    assert is_slide_file(folder)
    for recursive in (True, False):
        assert slide_entries(tmp_path / "cases", recursive=recursive) == [folder]
    assert fingerprint(folder) == {"slide_bytes": 115834, "slide_files": 1, "slide_name": "case 1"}
    with open_slide(folder) as slide, open_slide(folder / "1.dcm") as file:
        assert slide.path == folder and slide.backend == "openslide"
        assert slide.level_dimensions == file.level_dimensions == ((1152, 700),)
        assert slide.mpp_um == file.mpp_um and slide.mpp_um is not None
        assert np.array_equal(slide.read_region((100, 100), 0, (300, 300)),
                              file.read_region((100, 100), 0, (300, 300)))


def test_a_real_folder_with_a_second_series_is_refused(shared: Path, tmp_path: Path) -> None:
    data = (shared / OVERVIEW).read_bytes()
    uid = slide_series(shared / OVERVIEW).encode()
    (tmp_path / "1.dcm").write_bytes(data)
    (tmp_path / "2.dcm").write_bytes(data.replace(uid, uid[:-1] + b"9"))
    with pytest.raises(SlideError, match="mixes 2 DICOM series"):
        open_slide(tmp_path)
    with open_slide(tmp_path / "2.dcm") as slide:  # a file is still the slide of its series
        assert slide.level_dimensions == ((1152, 700),)
