"""utils.storage: whole or not at all, and never trusted without looking."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from utils.errors import BrokenFile, ItemFailed, Refused
from utils.storage import (
    State,
    atomic_file,
    differences,
    free_bytes,
    h5_state,
    inside,
    load_torch,
    plain,
    read_h5,
    read_json,
    read_table,
    safe_id,
    save_torch,
    sweep_temporaries,
    writable_folder,
    write_h5,
    write_image,
    write_json,
    write_text,
)

ARRAYS = {"coords": np.arange(10, dtype=np.int64).reshape(5, 2), "features": np.ones((5, 3), "f4")}
PARAMETERS = {"patch_size": 256, "level": 0, "name": "x"}


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "/etc/x", "../x", "a\\b", "a\0b", "a\nb",
                                  " a", "a ", "x" * 201])
def test_unsafe_ids_are_refused(text: str) -> None:
    with pytest.raises(Refused):
        safe_id(text)


@pytest.mark.parametrize("text", ["001", "1E5", "NA", "Größe 5%", "a.b_c-d", "幻灯片", "-x", "a#b"])
def test_ordinary_ids_pass_unchanged(text: str) -> None:
    assert safe_id(text) == text


def test_paths_stay_inside(tmp_path: Path) -> None:
    assert inside(tmp_path, "a", "b.h5") == tmp_path / "a" / "b.h5"
    for parts in (("..", "x"), ("/etc/passwd",), ("a", "../../x")):
        with pytest.raises(Refused):
            inside(tmp_path, *parts)


def test_atomic_file_leaves_the_old_one_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_file(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("site", ["storage.open", "storage.write", "storage.replace"])
def test_killed_while_writing_leaves_old_or_nothing(tmp_path: Path, site: str) -> None:
    code = ("from pathlib import Path; from utils.storage import write_text; "
            f"write_text(Path({str(tmp_path)!r}) / 'a.txt', 'new')")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT,
                         env={**os.environ, "MILWRIGHT_FAULT": f"{site}:kill"})
    assert run.returncode == -9
    assert not (tmp_path / "a.txt").exists()


def test_full_disk_is_an_ordinary_error(tmp_path: Path) -> None:
    code = ("import resource, signal, numpy as np; from pathlib import Path; "
            "from utils.storage import write_h5; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
            f"try: write_h5(Path({str(tmp_path)!r}) / 'a.h5', "
            "{'features': np.random.rand(1000, 100)}, parameters={})\n"
            "except OSError: raise SystemExit(7)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 7
    assert os.listdir(tmp_path) == []


def test_h5_round_trip_with_record(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_h5(path, ARRAYS, parameters=PARAMETERS, attrs={"coords": {"patch_size": 256}},
             root={"encoder": "e"})
    data = read_h5(path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(data.arrays[name], array)
        assert data.arrays[name].dtype == array.dtype
    assert data.parameters == PARAMETERS
    assert data.attrs["coords"]["patch_size"] == 256
    assert data.root["encoder"] == "e"
    with h5py.File(path) as file:
        assert file["coords"].maxshape == (None, 2)


def test_h5_with_no_rows(tmp_path: Path) -> None:
    write_h5(tmp_path / "a.h5", {"coords": np.zeros((0, 2), np.int64)}, parameters={})
    assert read_h5(tmp_path / "a.h5").arrays["coords"].shape == (0, 2)


def test_h5_chunks_may_be_small(tmp_path: Path) -> None:
    write_h5(tmp_path / "a.h5", ARRAYS, parameters={}, chunk_rows={"features": 2})
    with h5py.File(tmp_path / "a.h5") as file:
        assert (file["features"].chunks, file["coords"].chunks) == ((2, 3), (5, 2))


def test_h5_states(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    assert h5_state(path, PARAMETERS) is State.MISSING
    write_h5(path, ARRAYS, parameters=PARAMETERS)
    assert h5_state(path, {"level": 0, "name": "x", "patch_size": np.int64(256)}) is State.DONE
    assert h5_state(path, {**PARAMETERS, "level": 1}) is State.OTHER
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["coords"] = ARRAYS["coords"]
    assert h5_state(tmp_path / "clam.h5", PARAMETERS) is State.FOREIGN


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.0])
def test_truncated_h5_is_broken(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.h5"
    write_h5(path, ARRAYS, parameters=PARAMETERS)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert h5_state(path, PARAMETERS) is State.BROKEN


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    values = np.random.default_rng(0).random((50, 20))
    write_h5(path, {"features": values}, parameters={})
    data = bytearray(path.read_bytes())
    place = bytes(data).index(values[20].tobytes())
    data[place + 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BrokenFile):
        read_h5(path)


def test_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_torch(path, {"a": torch.ones(3), "epoch": 3})
    assert load_torch(path)["epoch"] == 3
    data = path.read_bytes()
    for broken in (data[:100], b"", b"PK\x03\x04nothing"):
        path.write_bytes(broken)
        with pytest.raises(BrokenFile):
            load_torch(path)
    with pytest.raises(BrokenFile):
        load_torch(tmp_path / "none.pt")


def test_a_pickle_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {marker}",)

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(BrokenFile, match="refused"):
        load_torch(tmp_path / "evil.pt")
    assert not marker.exists()


@pytest.mark.parametrize(("raw", "expected"), [
    (b"slide_id,label\n001,a\n1E5,NA\n", [["001", "a"], ["1E5", "NA"]]),
    (b"\xef\xbb\xbfslide_id;label\r\n001;\r\n", [["001", ""]]),
    ("slide_id\tlabel\nä\t1\n".encode("utf-16"), [["ä", "1"]]),
    (b"slide_id,label\nNone,true\n", [["None", "true"]]),
])
def test_tables_are_text(tmp_path: Path, raw: bytes, expected: list[list[str]]) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(raw)
    table = read_table(path)
    assert list(table.columns) == ["slide_id", "label"]
    assert table.to_numpy().tolist() == expected


def test_unreadable_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "binary.csv").write_bytes(b"\x80\x81\x82\xff")
    for name in ("none.csv", "empty.csv", "binary.csv"):
        with pytest.raises(Refused, match=name):
            read_table(tmp_path / name)


def test_json_and_images(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": np.float32(1.5), "y": float("nan"), "z": np.arange(2)})
    assert read_json(tmp_path / "a.json") == {"x": 1.5, "y": None, "z": [0, 1]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(BrokenFile):
        read_json(tmp_path / "b.json")
    write_image(tmp_path / "wide.jpg", np.zeros((1, 65_600, 3), np.uint8))
    assert (tmp_path / "wide.png").exists() and not (tmp_path / "wide.jpg").exists()


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused):
        writable_folder(tmp_path / "file" / "sub", what="--save_dir")
    folder = writable_folder(tmp_path / "a" / "b", what="--save_dir")
    assert free_bytes(folder) > 0
    old = folder / ".mw-tmp-old"
    old.write_text("")
    os.utime(old, (0, 0))
    (folder / ".mw-tmp-young").write_text("")
    assert sweep_temporaries(folder) == 1
    assert (folder / ".mw-tmp-young").exists()


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ItemFailed, match="its folder is gone"):
        write_text(tmp_path / "gone" / "a.txt", "")


def test_differences_name_what_differs() -> None:
    text = differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4})
    assert "b: file has 2, you ask 3" in text and "c" in text and "a:" not in text


@given(st.dictionaries(st.text(max_size=5), st.one_of(
    st.integers(), st.text(max_size=5), st.booleans(), st.lists(st.integers(), max_size=3))))
def test_plain_values_stay(value: dict[str, object]) -> None:
    assert plain(value) == value
