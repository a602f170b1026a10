"""Patch databases: written in parts by anybody, taken in by one, read by index; and ABMILX's."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.slides import write_pyramid
from utils.errors import BrokenFile, ItemFailed, Refused
from wsi_core import patch_lmdb
from wsi_core.coords import PatchCoords
from wsi_core.patch_images import Encoding, keep_by_pixels, patch_reader
from wsi_core.patch_lmdb import (
    PatchLmdb,
    lmdb_path,
    pack_part,
    part_done,
    part_path,
    write_part,
)
from wsi_core.patch_lmdb_reader import PatchLmdbReader
from wsi_core.slide import open_slide

SIDE, COUNT = 32, 24


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise that is red on the left and blue on the right."""
    noise = np.random.default_rng(0).integers(60, 90, (128, 192, 3))
    noise[:, :96, 0] += 120
    noise[:, 96:, 2] += 120
    return write_pyramid(tmp_path_factory.mktemp("slide") / "s.tif", noise.astype(np.uint8),
                         quality=95)


def grid(slide_id: str, count: int = COUNT, **changes: Any) -> PatchCoords:
    y, x = np.divmod(np.arange(count), 6)
    patches = PatchCoords(
        slide_id=slide_id, coords=np.stack([x, y], axis=1) * SIDE, patch_size=SIDE, patch_level=0,
        output_size=SIDE, level_downsample=(1.0, 1.0), level_size=(192, 128),
        slide_size=(192, 128), footprint_px_l0=(SIDE, SIDE), step_px_l0=(SIDE, SIDE), mpp_um=0.5,
        parameters={"slide_bytes": 7})
    return replace(patches, **changes)


def store(slide_path: Path, database: Path, *grids: PatchCoords, level: str = "",
          encoding: Encoding = "jpeg", quality: int = 90, finish: bool = True) -> Path:
    with (open_slide(slide_path) as slide,
          PatchLmdb(database, encoding=encoding, quality=quality) as target):
        for patches in grids:
            part = part_path(database, patches.slide_id, level=level)
            pack_part(slide, patches, part, level=level, encoding=encoding, quality=quality)
            assert target.add(part) == len(patches)
        if finish:
            target.finish()
    return database


# ---------------------------------------------------------------------------- ours

@pytest.mark.parametrize(("encoding", "tolerance"), [
    ("jpeg", 40), ("jpeg420", 80), ("png", 0), ("webp", 0)])
def test_patches_come_back_in_true_colours(slide_path: Path, tmp_path: Path, encoding: Encoding,
                                           tolerance: int) -> None:
    database = store(slide_path, tmp_path / "p.lmdb", grid("a"), grid("b", 5), encoding=encoding)
    with PatchLmdbReader(database) as reader, open_slide(slide_path) as slide:
        assert len(reader) == 29 and reader.slides() == ["a", "b"] and reader.levels() == [""]
        assert list(reader.rows("b")) == [24, 25, 26, 27, 28]
        read = patch_reader(slide, grid("a"))
        for row in (0, 5, 23):
            found = reader[row]
            assert found.shape == (SIDE, SIDE, 3) and found.dtype == np.uint8
            assert np.abs(found.astype(int) - read(row)).max() <= tolerance
            assert np.array_equal(reader[reader.rows("a")[row]], found)
        assert reader[0][..., 0].mean() > 150 > reader[5][..., 0].mean()  # red, then blue
        assert np.array_equal(reader.coords("b"), grid("b", 5).coords)
        facts = reader.facts("b")
        assert (facts["count"], facts["output_px"], facts["mpp_um"]) == (5, SIDE, 0.5)
        assert facts["footprint_px_l0"] == [SIDE, SIDE]
        reader.verify("a")


def test_quality_and_threads(slide_path: Path, tmp_path: Path) -> None:
    with open_slide(slide_path) as slide:
        for name, quality, threads in (("low", 20, 1), ("high", 95, 1), ("again", 95, 3)):
            pack_part(slide, grid("a"), tmp_path / name, quality=quality, threads=threads)
    assert 1.4 * (tmp_path / "low").stat().st_size < (tmp_path / "high").stat().st_size
    assert (tmp_path / "high").read_bytes() == (tmp_path / "again").read_bytes()


def test_levels_have_their_own_names(slide_path: Path, tmp_path: Path) -> None:
    database = tmp_path / "p.lmdb"
    store(slide_path, database, grid("a", 4), grid("b", 2), level="20x", finish=False)
    store(slide_path, database, grid("a", 3, patch_level=1, output_size=16), level="10x")
    with PatchLmdbReader(database) as reader:
        assert reader.levels() == ["10x", "20x"] and len(reader) == 9
        assert reader.slides(level="20x") == ["a", "b"] and reader.slides(level="10x") == ["a"]
        assert reader[reader.rows("a", level="10x")[0]].shape == (16, 16, 3)
        assert reader[reader.rows("a", level="20x")[0]].shape == (SIDE, SIDE, 3)
        with pytest.raises(ItemFailed, match="no slide 'b' at level '10x'"):
            reader.rows("b", level="10x")


def test_a_part_may_stand_behind_filters(slide_path: Path, tmp_path: Path) -> None:
    """One reading filters and encodes; the record has the coordinates of what was kept."""
    beyond = np.array([[-500, 0], [0, 0], [-500, 32], [32, 0]])
    patches = grid("a", coords=beyond)
    part = part_path(tmp_path / "p.lmdb", "a")
    with open_slide(slide_path) as slide, write_part(part, patches) as sink:
        kept = keep_by_pixels(slide, patches, black_thresh=20, sinks=[sink])
    left = replace(patches, coords=beyond[kept])
    assert kept.tolist() == [False, True, False, True]
    assert part_done(part, left, encoding="jpeg", quality=90)
    assert not part_done(part, patches, encoding="jpeg", quality=90)
    with PatchLmdb(tmp_path / "p.lmdb") as target:
        target.add(part)
        assert target.holds(left) and not target.holds(patches)
        target.finish(missing=["z", "y"])
    with PatchLmdbReader(tmp_path / "p.lmdb") as reader:
        assert reader.coords("a").tolist() == [[0, 0], [32, 0]] and len(reader) == 2


def test_slides_without_patches_are_there(slide_path: Path, tmp_path: Path) -> None:
    database = store(slide_path, tmp_path / "p.lmdb", grid("a", 0), grid("b", 2), grid("c", 0))
    with PatchLmdbReader(database) as reader:
        assert reader.slides() == ["a", "b", "c"] and list(reader.rows("c")) == []
        assert reader.coords("a").shape == (0, 2) and reader[1].any()
        for index in (-1, 2):
            with pytest.raises(IndexError):
                reader[index]


def test_what_is_held_and_what_must_be_made_again(slide_path: Path, tmp_path: Path) -> None:
    database = store(slide_path, tmp_path / "p.lmdb", grid("a"))
    with PatchLmdb(database) as target:
        assert target.holds(grid("a")) and not target.holds(grid("b"))
        assert not target.holds(grid("a"), level="20x")
        for changed in (grid("a", 23), grid("a", output_size=16), grid("a", patch_level=1),
                        grid("a", background=(255, 255, 255)),
                        grid("a", parameters={"slide_bytes": 8})):
            assert not target.holds(changed)
    part = part_path(database, "a")
    assert part_done(part, grid("a"), encoding="jpeg", quality=90)
    assert not part_done(part, grid("a"), encoding="jpeg", quality=91)
    assert not part_done(part, grid("a"), encoding="png", quality=90)
    part.write_bytes(part.read_bytes()[:-30])
    assert not part_done(part, grid("a"), encoding="jpeg", quality=90)


def test_a_slide_made_again_replaces_the_old_one(slide_path: Path, tmp_path: Path) -> None:
    database = store(slide_path, tmp_path / "p.lmdb", grid("a"), grid("b", 3))
    with PatchLmdbReader(database) as reader:
        kept = [reader.encoded(index) for index in reader.rows("b")]
    store(slide_path, database, grid("a", 7))
    with PatchLmdbReader(database) as reader:
        assert len(reader) == 10 and list(reader.rows("a")) == list(range(7))
        assert [reader.encoded(index) for index in reader.rows("b")] == kept
        reader.verify("a")
    with lmdb.open(str(database), subdir=False, readonly=True, lock=False) as env:
        assert env.stat()["entries"] == 10 + 2 * 2 + 1  # nothing of the old one is left


def test_other_encoding_and_foreign_files_are_refused(slide_path: Path, tmp_path: Path) -> None:
    database = store(slide_path, tmp_path / "p.lmdb", grid("a", 2))
    with pytest.raises(Refused, match="quality 90, you ask 80"):
        PatchLmdb(database, quality=80)
    with pytest.raises(Refused, match="encoding jpeg, you ask png"):
        PatchLmdb(database, encoding="png")
    with pytest.raises(Refused, match="not written by this toolkit"):
        PatchLmdb(published(tmp_path / "x.lmdb", {"s": 1}))
    (tmp_path / "text.lmdb").write_text("no database" * 1000)
    with pytest.raises(Refused, match="cannot be opened"):
        PatchLmdb(tmp_path / "text.lmdb")


def test_the_map_grows_as_needed(slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                 ) -> None:
    """Ahead of a slide, and, should the guess be too small, by doing the slide again."""
    monkeypatch.setattr(patch_lmdb, "_SPARE_BYTES", 32 * 4096)
    ahead = store(slide_path, tmp_path / "ahead.lmdb", *(grid(f"{n}") for n in range(8)))
    monkeypatch.setattr(PatchLmdb, "_make_room", lambda self, part_bytes: None)
    late = store(slide_path, tmp_path / "late.lmdb", *(grid(f"{n}") for n in range(8)))
    with PatchLmdbReader(ahead) as one, PatchLmdbReader(late) as other:
        assert len(one) == len(other) == 8 * COUNT and ahead.stat().st_size > 32 * 4096
        for slide_id in one.slides():
            one.verify(slide_id)
            other.verify(slide_id)


def test_unfinished_is_not_read_and_a_killed_run_goes_on(slide_path: Path, tmp_path: Path) -> None:
    """Killed in the middle of the second slide: the first is in, the second wholly not."""
    database = tmp_path / "p.lmdb"
    whole = store(slide_path, tmp_path / "whole.lmdb", grid("a"), grid("b"))
    with open_slide(slide_path) as slide:
        for name in ("a", "b"):
            pack_part(slide, grid(name), part_path(database, name))
    code = ("import sys; from pathlib import Path; from wsi_core.patch_lmdb import *\n"
            "target = PatchLmdb(Path(sys.argv[1]))\n"
            "for name in 'ab': target.add(part_path(target.path, name))")
    run = subprocess.run([sys.executable, "-c", code, str(database)], cwd=ROOT, check=False,
                         env={**os.environ, "MILWRIGHT_FAULT": "lmdb.commit:kill:2"})
    assert run.returncode == -9
    with pytest.raises(BrokenFile, match="never finished"):
        PatchLmdbReader(database)
    with PatchLmdb(database) as target:
        assert target.holds(grid("a")) and not target.holds(grid("b"))
        target.add(part_path(database, "b"))
        target.finish()
    with PatchLmdbReader(database) as one, PatchLmdbReader(whole) as other:
        assert [one.encoded(i) for i in range(len(one))] == [
            other.encoded(i) for i in range(len(other))]


def test_damaged_parts_leave_the_database_as_it_was(slide_path: Path, tmp_path: Path) -> None:
    database = store(slide_path, tmp_path / "p.lmdb", grid("a"))
    part = part_path(database, "a")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 255
    for broken in (bytes(data), bytes(data[:100]), b""):
        part.write_bytes(broken)
        with PatchLmdb(database) as target, pytest.raises(BrokenFile, match="no whole part"):
            target.add(part)
    with PatchLmdbReader(database) as reader:
        reader.verify("a")


def test_a_failed_part_leaves_nothing(slide_path: Path, tmp_path: Path) -> None:
    part = part_path(tmp_path / "p.lmdb", "a", level="20x")
    with open_slide(slide_path) as slide, pytest.raises(ItemFailed):
        pack_part(slide, grid("a", patch_level=9), part)
    assert list(part.parent.iterdir()) == []


def test_truncated_and_altered_databases_are_told(slide_path: Path, tmp_path: Path) -> None:
    database = store(slide_path, tmp_path / "p.lmdb", grid("a"), encoding="png")
    with PatchLmdbReader(database) as reader:
        needle = reader.encoded(3)
    data = database.read_bytes()
    place = data.index(needle[100:]) + 50
    (tmp_path / "altered.lmdb").write_bytes(data[:place] + bytes([data[place] ^ 1])
                                            + data[place + 1:])
    with (PatchLmdbReader(tmp_path / "altered.lmdb") as reader,
          pytest.raises(BrokenFile, match="fail their checksum")):
        reader.verify("a")
    for size, reason in ((len(data) // 2, "truncated"), (100, "cannot be opened"),
                         (0, "cannot be|no patch")):
        (tmp_path / "cut.lmdb").write_bytes(data[:size])
        with pytest.raises(BrokenFile, match=reason):
            PatchLmdbReader(tmp_path / "cut.lmdb")
    with pytest.raises(BrokenFile, match="is missing"):
        PatchLmdbReader(tmp_path / "none.lmdb")


def _sum(reader: PatchLmdbReader, index: int) -> int:
    return int(reader[index].sum())


def test_a_reader_travels_to_other_processes(slide_path: Path, tmp_path: Path) -> None:
    """As a data loader sends it: pickled to a spawned child, and inherited by a forked one."""
    reader = PatchLmdbReader(store(slide_path, tmp_path / "p.lmdb", grid("a")))
    expected = [_sum(reader, index) for index in range(3)]
    again = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert [_sum(again, index) for index in range(3)] == expected
    again.close()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(_sum, [(reader, index) for index in range(3)]) == expected
    reader.close()
    assert _sum(reader, 0) == expected[0]  # opened again


def test_two_readers_of_one_file_and_a_writer_after_them(slide_path: Path, tmp_path: Path) -> None:
    """LMDB itself lets a process open a file once."""
    database = store(slide_path, tmp_path / "p.lmdb", grid("a"))
    one, other = PatchLmdbReader(database), PatchLmdbReader(database, channels="BGR")
    one.close()
    assert np.array_equal(one[2], other[2][..., ::-1])
    one.close()
    other.close()
    store(slide_path, database, grid("b"))


def test_names_that_would_leave_the_folder_are_refused(tmp_path: Path) -> None:
    assert lmdb_path(tmp_path, "train") == lmdb_path(tmp_path, "train.lmdb") == (
        tmp_path / "train.lmdb")
    for name in ("../x", "a/b", ""):
        with pytest.raises(Refused):
            lmdb_path(tmp_path, name)
    with pytest.raises(Refused):
        part_path(tmp_path / "p.lmdb", "../../x")


def test_without_the_package_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    for make in (PatchLmdb, PatchLmdbReader):
        with pytest.raises(Refused, match="pip install lmdb"):
            make(tmp_path / "p.lmdb")


# ---------------------------------------------------------------------------- ABMILX's layout

def red_jpeg() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (254, 0, 0)).save(data, "JPEG", quality=80)
    return data.getvalue()


def published(path: Path, counts: dict[str, int], **records: bytes) -> Path:
    """As their program writes it; ``records`` replace or add."""
    keys = [f"{name}-{row}".encode() for name, count in counts.items() for row in range(count)]
    content = {key: pickle.dumps(red_jpeg()) for key in keys}
    content |= {b"__keys__": pickle.dumps(keys), b"__len__": pickle.dumps(len(keys)),
                b"__slide__": pickle.dumps(list(counts)), b"__pn__": pickle.dumps(counts)}
    content |= {key.encode(): value for key, value in records.items()}
    with lmdb.open(str(path), subdir=False, map_size=2**24) as env, env.begin(write=True) as txn:
        for key, value in content.items():
            txn.put(key, value)
    return path


def test_published_files_are_read_in_either_order_of_channels(tmp_path: Path) -> None:
    path = published(tmp_path / "224_80_level1.lmdb", {"TCGA-1": 3, "TCGA-10": 12})
    with PatchLmdbReader(path) as reader:
        assert reader.published and len(reader) == 15
        assert reader.slides() == ["TCGA-1", "TCGA-10"] and list(reader.rows("TCGA-1")) == [0, 1, 2]
        assert reader[14][8, 8].tolist() == pytest.approx([254, 0, 0], abs=2)
        assert reader.facts("TCGA-1") == {}
        with pytest.raises(ItemFailed, match="holds no coordinates"):
            reader.coords("TCGA-1")
    with PatchLmdbReader(path, channels="BGR") as reader:
        assert reader[14][8, 8].tolist() == pytest.approx([0, 0, 254], abs=2)


class Runs:
    """Pickled, it leaves a file behind when it is loaded."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("record", ["__slide__", "__pn__", "s-0"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path, record: str, protocol: int
                                                        ) -> None:
    mark = tmp_path / "ran"
    bomb = pickle.dumps([Runs(os.mkdir, str(mark))], protocol=protocol)
    path = published(tmp_path / "x.lmdb", {"s": 1}, **{record: bomb})
    with pytest.raises(BrokenFile, match="could run code"):
        PatchLmdbReader(path)[0]
    assert not mark.exists()
    pickle.loads(bomb)  # noqa: S301 - the bomb works: it was the reader that refused it
    assert mark.exists()


def test_numpy_scalars_and_other_classes_are_refused(tmp_path: Path) -> None:
    path = published(tmp_path / "x.lmdb", {"s": 1}, __pn__=pickle.dumps({"s": np.int64(1)}))
    with pytest.raises(BrokenFile, match="could run code"):
        PatchLmdbReader(path)


@pytest.mark.parametrize(("records", "reason"), [
    ({"__slide__": pickle.dumps("s")}, "no list of names"),
    ({"__pn__": pickle.dumps({"t": 1})}, "no list of names"),
    ({"__pn__": pickle.dumps({"s": -1})}, "no list of names"),
    ({"__pn__": b"\x80\x05junk"}, "refused"), ({"__pn__": b""}, "refused"),
    ({"__pn__": pickle.dumps({"s": 9})}, "lacks the record b's-8'"),
    ({"s-0": pickle.dumps(5)}, "is a int, bytes were expected"),
    ({"s-0": pickle.dumps(b"no jpeg")}, "is no picture")], ids=range(8))
def test_damaged_published_files_are_one_line(tmp_path: Path, records: dict[str, bytes],
                                              reason: str) -> None:
    path = published(tmp_path / "x.lmdb", {"s": 1}, **records)
    with pytest.raises(BrokenFile, match=reason) as caught:
        reader = PatchLmdbReader(path)
        reader[8 if len(reader) > 1 else 0]
    assert "\n" not in str(caught.value)


def test_an_lmdb_of_something_else_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    with lmdb.open(str(path), subdir=False, map_size=2**20) as env, env.begin(write=True) as txn:
        txn.put(b"key", cv2.imencode(".jpg", np.zeros((4, 4, 3), np.uint8))[1].tobytes())
    with pytest.raises(BrokenFile, match="neither ours nor ABMILX's"):
        PatchLmdbReader(path)
