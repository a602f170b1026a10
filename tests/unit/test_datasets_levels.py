"""Finer levels of a bag: found, checked by coordinates against the level above, read by the row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import datasets.bags
from datasets.bags import BagDataset
from datasets.features import FeatureStore
from datasets.levels import StoredLevels, find_level_roots, level_stores, read_rows
from datasets.table import SlideTable
from utils.contracts import Bag, LevelRows
from utils.errors import BrokenFile, ItemFailed, Refused
from utils.storage import save_torch, write_h5
from wsi_core.hierarchy import child_coords

ENCODER = {"name": "lite0", "weights_sha256": "aa"}
WIDTH, SIDE = 8, 1024  # of a feature row; of a coarse patch in level-0 px
RATIOS = (2, 4)  # level 2 -> 1 -> 0 of a pyramid 1-4-8


def features_of(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def folders(root: Path) -> list[Path]:
    return [root / "f_level_2", root / "f_level_1_corresponding", root / "f_level_0_corresponding"]


def write_level(folder: Path, slide_id: str, coords: np.ndarray, *, side: int | None,
                branching: int | None = None, seed: int = 0, encoder: Any = ENCODER,
                valid: np.ndarray | None = None, chunk: int = 256) -> None:
    """A feature file as extract_features_fp.py writes it; ``branching`` None as CLAM does."""
    (folder / "h5_files").mkdir(parents=True, exist_ok=True)
    arrays = {"features": features_of(len(coords), seed), "coords": coords.astype(np.int32)}
    root: dict[str, Any] = {} if side is None else {"footprint_px_l0": np.array([side, side])}
    if branching is not None:
        arrays["valid"] = np.ones(len(coords), bool) if valid is None else valid
        root["branching"] = branching
    write_h5(folder / "h5_files" / f"{slide_id}.h5", arrays, parameters={"encoder": encoder},
             root=root, chunk_rows={"features": chunk})


def write_slide(root: Path, slide_id: str, parents: int = 6, **changes: Any) -> list[np.ndarray]:
    """Three levels of a slide; their coordinates."""
    coords = [np.stack([np.arange(parents) * SIDE, np.full(parents, 512)], axis=1)]
    side = SIDE
    write_level(folders(root)[0], slide_id, coords[0], side=side, seed=1)
    for level, ratio in enumerate(RATIOS, start=1):
        side //= ratio
        coords.append(child_coords(coords[-1], ratio=ratio, step_px_l0=(side, side)))
        write_level(folders(root)[level], slide_id, coords[-1], seed=level + 1,
                    **{"side": side, "branching": ratio**2, **changes})
    return coords


def open_levels(root: Path, slide_id: str = "a", *, keep: bool = False) -> tuple[LevelRows, ...]:
    store = FeatureStore(folders(root)[0])
    features, coords = store.read(slide_id)
    return StoredLevels(store, level_stores(store, (1, 0)), keep=keep)(
        slide_id, coords, len(features))


def table_of(*slide_ids: str) -> SlideTable:
    return SlideTable(slide_ids, slide_ids, np.arange(len(slide_ids)) % 2, ("x", "y"))


# ---------------------------------------------------------------------------- folders

def test_roots_are_siblings(tmp_path: Path) -> None:
    write_slide(tmp_path, "a")
    assert find_level_roots(tmp_path / "f_level_2", (1, 0)) == folders(tmp_path)[1:]
    with pytest.raises(Refused, match="f_level_3_corresponding of a finer level does not exist"):
        find_level_roots(tmp_path / "f_level_2", (3,))


def test_stores_follow_the_folders_of_each_source(tmp_path: Path) -> None:
    for source, slide_id in (("one", "a"), ("two", "b")):
        write_slide(tmp_path / source, slide_id)
    store = FeatureStore(tmp_path / "f_level_2", {
        "a": tmp_path / "one" / "f_level_2", "b": tmp_path / "two" / "f_level_2"})
    for level, finer in zip((1, 2), level_stores(store, (1, 0)), strict=True):
        for source, slide_id in (("one", "a"), ("two", "b")):
            assert finer.find(slide_id).parents[1] == folders(tmp_path / source)[level]


def test_folders_may_be_given(tmp_path: Path) -> None:
    write_slide(tmp_path, "a")
    store = FeatureStore(folders(tmp_path)[0])
    (finer,) = level_stores(store, child_dirs=folders(tmp_path)[2:])
    assert finer.root == folders(tmp_path)[2]
    with pytest.raises(Refused, match="no folder nowhere"):
        level_stores(store, child_dirs=[Path("nowhere")])
    with pytest.raises(Refused, match="in two ways"):
        level_stores(store, (1,), child_dirs=folders(tmp_path)[2:])


# ---------------------------------------------------------------------------- rows

@pytest.mark.parametrize("keep", [False, True])
def test_rows_are_those_asked_for(tmp_path: Path, keep: bool) -> None:
    coords = write_slide(tmp_path, "a", parents=40)
    levels = open_levels(tmp_path, keep=keep)
    assert [level.branching for level in levels] == [4, 16]
    for number, (level, ratio) in enumerate(zip(levels, RATIOS, strict=True), start=1):
        assert len(level) == len(coords[number]) == len(coords[number - 1]) * ratio**2
        assert level.coords is not None and level.coords.dtype == np.int64
        np.testing.assert_array_equal(level.coords, coords[number])
        assert level.valid is not None and level.valid.all()
        rows = np.random.default_rng(0).permutation(len(level))[:37]
        found = level.read(rows)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found, features_of(len(level), number + 1)[rows])
        assert level.read(rows[:0]).shape == (0, WIDTH)


def test_only_the_chunks_of_the_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    write_slide(tmp_path, "a", parents=40)  # level 0: 2560 rows, 10 chunks
    finest = open_levels(tmp_path)[1]
    asked: list[slice] = []
    original = h5py.Dataset.__getitem__

    def watched(self: Any, key: Any, **other: Any) -> Any:
        asked.append(key)
        return original(self, key, **other)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", watched)
    finest.read(np.array([2559, 3, 0, 255, 1030]))
    assert asked == [slice(0, 256), slice(1024, 1280), slice(2560 - 256, 2560)]


@pytest.mark.parametrize("layout", ["contiguous", "row by row"])
def test_rows_of_a_foreign_h5(tmp_path: Path, layout: str) -> None:
    values = features_of(200, 0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=values.astype(np.float64),
                            chunks=None if layout == "contiguous" else (1, WIDTH))
    rows = np.array([199, 0, 64, 63, 64])
    np.testing.assert_array_equal(read_rows(tmp_path / "a.h5", rows), values[rows])


def test_a_damaged_chunk_is_seen_when_it_is_read(tmp_path: Path) -> None:
    write_slide(tmp_path, "a", parents=40)
    path = folders(tmp_path)[2] / "h5_files/a.h5"
    with h5py.File(path) as file:
        at = file["features"].id.get_chunk_info(4).byte_offset
    finest = open_levels(tmp_path)[1]
    with path.open("r+b") as raw:
        raw.seek(at + 100)
        raw.write(b"\0\1\2\3")
    assert torch.isfinite(finest.read(np.arange(1024))).all()
    with pytest.raises(BrokenFile, match="cannot be read.*run extract_features_fp.py again"):
        finest.read(np.arange(1024, 1030))


def test_what_is_not_finite_fails_when_it_is_read(tmp_path: Path) -> None:
    coords = write_slide(tmp_path, "a")
    values = features_of(24, 2)
    values[7, 3] = np.nan
    write_h5(folders(tmp_path)[1] / "h5_files/a.h5", {
        "features": values, "coords": coords[1]}, parameters={"encoder": ENCODER})
    level = open_levels(tmp_path)[0]
    assert len(level.read(np.arange(7))) == 7
    with pytest.raises(ItemFailed, match=r"a: row 7 of .*f_level_1.* not finite \(.*1 of 3 rows"):
        level.read(np.array([9, 8, 7]))


def test_pt_files_are_read_by_the_row_without_coordinates(tmp_path: Path) -> None:
    for folder, rows, seed in zip(folders(tmp_path), (5, 20, 320), (1, 2, 3), strict=True):
        (folder / "pt_files").mkdir(parents=True)
        save_torch(folder / "pt_files/a.pt", torch.from_numpy(features_of(rows, seed)))
    first, second = open_levels(tmp_path)
    assert (first.branching, second.branching, first.coords, second.valid) == (4, 16, None, None)
    rows = np.array([319, 0, 2])
    np.testing.assert_array_equal(second.read(rows), features_of(320, 3)[rows])
    store = FeatureStore(folders(tmp_path)[0])
    notes = store.check(["a"], levels=level_stores(store, (1, 0))).notes
    assert sum("only their numbers of rows are compared" in note for note in notes) == 2


# ---------------------------------------------------------------------------- correspondence

def break_level(root: Path, change: str) -> None:
    """Spoil level 1 of slide a, of 6 patches, in a way that leaves single files sound."""
    coords = write_slide(root, "a")
    fine = coords[1].copy()
    settings: dict[str, Any] = {"side": SIDE // 2, "branching": 4}
    if change == "swapped parents":
        fine = np.roll(fine, 4, axis=0)
    elif change == "row-first order":
        fine = fine.reshape(-1, 4, 2)[:, [0, 2, 1, 3]].reshape(-1, 2)
    elif change == "one row off":
        fine[13] += 1
    elif change == "rows missing":
        fine = fine[:-1]
    elif change == "a parent's rows missing":
        fine = fine[:-4]
    elif change == "a parent too many":
        fine = np.concatenate([fine, fine[-4:] + SIDE])
        settings["branching"] = None  # as CLAM's, which do not say
    elif change == "a quarter covered":  # the original's fixed step on a 1-4-16 pyramid
        fine, settings["side"] = child_coords(coords[0], ratio=2, step_px_l0=(256, 256)), 256
    elif change == "no square":
        settings["branching"], fine = None, np.repeat(coords[0], 3, axis=0)
    write_level(folders(root)[1], "a", fine, **settings)


@pytest.mark.parametrize(("change", "words"), [
    ("swapped parents", r"row 0 lies at level-0 \(5120, 512\), expected \(0, 512\) as a child of "
     r"row 0 \(24 of 24 rows differ\)"),
    ("row-first order", r"row 1 lies at level-0 \(512, 512\), expected \(0, 1024\)"),
    ("one row off", r"row 13 .* as a child of row 3 \(1 of 24 rows differ\)"),
    ("rows missing", "has 23 rows, 4 x 6 = 24 expected"),
    ("a parent's rows missing", "has 20 rows, 4 x 6 = 24 expected"),
    ("a parent too many", r"has 28 rows, a square number \(4, 9, 16 ...\) times 6 expected"),
    ("a quarter covered", r"do not tile a patch of \(1024, 1024\) px"),
    ("no square", "has 18 rows, 3 x 6 = 18 expected|square number")])
def test_levels_that_do_not_correspond_are_refused(tmp_path: Path, change: str, words: str) -> None:
    break_level(tmp_path, change)
    with pytest.raises(ItemFailed, match=words) as caught:
        open_levels(tmp_path)
    assert str(caught.value).startswith("a: ")
    assert "f_level_1_corresponding" in str(caught.value)


def test_files_that_say_nothing_are_checked_by_their_coordinates(tmp_path: Path) -> None:
    """CLAM's h5: neither branching nor footprint."""
    coords = write_slide(tmp_path, "a", branching=None, side=None)
    write_level(folders(tmp_path)[0], "a", coords[0], side=None)
    assert [level.branching for level in open_levels(tmp_path)] == [4, 16]
    write_level(folders(tmp_path)[1], "a", np.roll(coords[1], 4, axis=0), side=None)
    with pytest.raises(ItemFailed, match="does not correspond"):
        open_levels(tmp_path)


def test_children_of_patches_that_could_not_be_read_are_left_out(tmp_path: Path) -> None:
    """The coarse file lacks parents 2 and 4 (--bad_tiles drop), the finer ones have theirs."""
    coords = write_slide(tmp_path, "a")
    kept = np.array([0, 1, 3, 5])
    write_level(folders(tmp_path)[0], "a", coords[0][kept], side=SIDE)
    first, second = open_levels(tmp_path)
    assert (len(first), len(second)) == (16, 256)
    rows = (kept[:, None] * 4 + np.arange(4)).ravel()
    np.testing.assert_array_equal(first.coords, coords[1][rows])
    np.testing.assert_array_equal(first.read(np.arange(16)), features_of(24, 2)[rows])
    last = np.arange(240, 256)
    np.testing.assert_array_equal(second.read(last), features_of(384, 3)[last + 128])
    np.testing.assert_array_equal(open_levels(tmp_path, keep=True)[1].read(last),
                                  second.read(last))


# ---------------------------------------------------------------------------- bags

def bags_of(root: Path, *slide_ids: str, **settings: Any) -> BagDataset:
    store = FeatureStore(folders(root)[0])
    return BagDataset(table_of(*slide_ids), store, level_stores=level_stores(store, (1, 0)),
                      **settings)


def memory(bag: Bag) -> list[bool]:
    return [level.kept is not None for level in bag.children]  # type: ignore[attr-defined]


def test_bags_carry_their_levels(tmp_path: Path) -> None:
    write_slide(tmp_path, "a")
    write_slide(tmp_path, "b", parents=3)
    bags = bags_of(tmp_path, "a", "b", cache="none")
    assert [[len(level) for level in bag.children] for bag in bags] == [[24, 384], [12, 192]]
    assert len(bags.subset(["b"])[0].children) == 2
    break_level(tmp_path, "one row off")
    assert set(bags.verify()) == {"a"}  # b is not stopped by it


def test_levels_are_kept_where_they_fit_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                ) -> None:
    write_slide(tmp_path, "a")
    coarse = 4 * WIDTH * 6
    for free, kept, levels_kept in ((2 * coarse - 1, False, False), (2 * coarse, True, False),
                                    (2 * coarse * 69, True, True)):  # 1 + 4 + 64 times
        monkeypatch.setattr(datasets.bags, "available_memory_bytes", lambda free=free: free)
        bags = bags_of(tmp_path, "a")
        assert bags.keeps == kept
        assert memory(bags[0]) == [levels_kept] * 2
        assert (bags[0] is bags[0]) == kept
    assert memory(bags_of(tmp_path, "a", cache="ram")[0]) == [True, True]
    assert memory(bags_of(tmp_path, "a", n_bytes=1, level_bytes=1 << 60)[0]) == [False, False]


# ---------------------------------------------------------------------------- up front

def test_a_check_covers_all_levels(tmp_path: Path) -> None:
    for slide_id in "abc":
        write_slide(tmp_path, slide_id)
    store = FeatureStore(folders(tmp_path)[0])
    finer = level_stores(store, (1, 0))
    found = store.check(["a", "b", "c"], levels=finer)
    assert [level.rows["b"] for level in found.levels] == [24, 384]
    assert [level.n_bytes for level in found.levels] == [3 * 24 * 32, 3 * 384 * 32]
    (folders(tmp_path)[1] / "h5_files/a.h5").unlink()
    (folders(tmp_path)[2] / "h5_files/b.h5").write_bytes(b"no h5")
    with pytest.raises(Refused, match="'a'.*--allow_missing"):
        store.check(["a", "b", "c"], levels=finer)
    found = store.check(["a", "b", "c"], levels=finer, allow_missing=True)
    assert found.usable == ("c",) and found.missing == ("a",) and set(found.failures) == {"b"}
    assert found.n_bytes == 6 * 32 and [set(level.rows) for level in found.levels] == [{"c"}] * 2


def test_levels_of_another_encoder_or_width_are_refused(tmp_path: Path) -> None:
    coords = write_slide(tmp_path, "a")
    store = FeatureStore(folders(tmp_path)[0])
    finer = level_stores(store, (1, 0))
    write_level(folders(tmp_path)[1], "a", coords[1], side=SIDE // 2, branching=4,
                encoder={**ENCODER, "weights_sha256": "bb"})
    with pytest.raises(Refused, match="another encoder than the coarse level.*'bb'.*has 'aa'"):
        store.check(["a"], levels=finer)
    write_h5(folders(tmp_path)[1] / "h5_files/a.h5", {"features": np.ones((24, 3), np.float32)},
             parameters={"encoder": ENCODER})
    with pytest.raises(Refused, match="another width than 8"):
        store.check(["a"], levels=finer)


def test_narrowing_keeps_what_the_coarse_level_said(tmp_path: Path) -> None:
    write_slide(tmp_path, "a")
    store = FeatureStore(folders(tmp_path)[0])
    alone = store.check(["a"])
    assert replace(store.check(["a"], levels=level_stores(store, (1,))), levels=()) == alone
