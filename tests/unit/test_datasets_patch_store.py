"""Patches of a cohort checked before any work: missing, empty, broken, two magnifications."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from datasets.features import FeatureStore
from datasets.patch_store import PatchStore
from tests.feature_inputs import make_inputs, write_patches
from tests.patch_lmdbs import HIGH, noise, store_patches
from tests.unit.test_wsi_core_patch_lmdb import published
from utils.errors import Refused


def counts_of(**counts: int) -> dict[str, np.ndarray]:
    return {name: noise(count) for name, count in counts.items()}


@pytest.fixture
def two_levels(tmp_path: Path) -> Path:
    path = store_patches(tmp_path / "p.lmdb", counts_of(a=8, b=6, c=0, d=4), level=HIGH,
                         finish=False)
    return store_patches(path, counts_of(a=2, b=0, c=0), footprint_px=64)


def open_both(path: Path, **other: object) -> PatchStore:
    return PatchStore.open(f"{path}#{HIGH}", patches_low=str(path), **other)  # type: ignore[arg-type]


def test_a_sound_cohort(tmp_path: Path) -> None:
    path = store_patches(tmp_path / "p.lmdb", counts_of(a=8, b=6, z=1))
    store = PatchStore.open(str(path))
    found = store.check(["b", "a"], table_ids=["a", "b", "x"])
    assert found.usable == ("b", "a") and dict(found.rows) == {"b": 6, "a": 8}
    assert (found.width, found.encoder, found.n_bytes) == (0, None, 0) and found.levels == ()
    assert found.empty == found.missing == () and not found.failures
    assert found.notes == (f"1 slides in {path} are not in the table: 'z'",)
    assert store.facts() == {"kind": "lmdb", "px": [32], "mpp_um": [0.5], "encoding": ["png"],
                             "channels": "RGB"}
    assert store.root == path and store.stamps("a") == [
        (path.stat().st_size, path.stat().st_mtime_ns)]


def test_missing_slides_are_refused_or_left_out(two_levels: Path) -> None:
    """Also those that only one magnification lacks; an id is never a part of another."""
    store_patches(two_levels, counts_of(**{"a-10": 2}), level=HIGH, finish=False)
    store_patches(two_levels, counts_of(**{"a-10": 2}), footprint_px=64)
    store = open_both(two_levels)
    with pytest.raises(Refused, match=r"2 of 4 slides have no patches: 'a-1', 'd'; there is no "
                                      r"a-1 in .*p.lmdb#level_0: run create_patches.*--all"):
        store.check(["a", "a-1", "a-10", "d"])
    found = store.check(["a", "a-1", "a-10", "d"], allow_missing=True)
    assert found.usable == ("a", "a-10") and found.missing == ("a-1", "d")
    assert found.left_out() == dict.fromkeys(("a-1", "d"), "no patches (--allow_missing)")
    assert any("2 slides without patches in a source" in note for note in found.notes)


def test_slides_without_patches_are_left_out(two_levels: Path) -> None:
    """Without high ones; a slide that has no low ones only gives none of those."""
    found = open_both(two_levels).check(["a", "b", "c"])
    assert found.usable == ("a", "b") and found.empty == ("c",)
    assert dict(found.rows) == {"a": 10, "b": 6}  # both magnifications
    assert any("high magnification only: all of theirs are drawn of it: 'b'" in note
               for note in found.notes)
    with pytest.raises(Refused, match="no slide has usable patches in .*: all are empty"):
        open_both(two_levels).check(["c"])


def test_which_sources_a_bag_has(two_levels: Path) -> None:
    store = open_both(two_levels)
    assert store.sources(training=True) == (store.low, store.high)
    assert store.sources(training=False) == (store.high,)
    store = open_both(two_levels, test_scales="both")
    assert store.sources(training=False) == (store.low, store.high)
    store = PatchStore.open(f"{two_levels}#{HIGH}")
    assert store.sources(training=True) == store.sources(training=False) == (store.high,)


def test_flags_that_do_nothing_are_refused(two_levels: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--test_scales both needs .*--patches_low"):
        PatchStore.open(str(two_levels), test_scales="both")
    with pytest.raises(Refused, match="--data_slide_dir has no effect"):
        PatchStore.open(str(two_levels), data_slide_dir=tmp_path)
    with pytest.raises(Refused, match="--slide_ext has no effect"):
        PatchStore.open(str(two_levels), slide_ext=".tif")
    with pytest.raises(Refused, match="--patches_low: there is no"):
        PatchStore.open(str(two_levels), patches_low=str(tmp_path / "none"))
    with pytest.raises(Refused, match="finer levels"):
        PatchStore.open(str(two_levels)).check(["a"], levels=[FeatureStore(tmp_path)])


def test_facts_of_two_magnifications_and_the_two_swapped(tmp_path: Path) -> None:
    path = tmp_path / "p.lmdb"
    store_patches(path, {"a": noise(4, side_px=16)}, level=HIGH, footprint_px=16, mpp_um=0.2537,
                  encoding="webp", finish=False)
    store_patches(path, {"a": noise(1, side_px=16)}, footprint_px=64, mpp_um=1.0, encoding="webp")
    store = open_both(path)
    store.check(["a"])
    shared: dict[str, object] = {"kind": "lmdb", "px": [16], "encoding": ["webp"]}
    assert store.facts() == {**shared, "mpp_um": [0.25], "channels": "RGB",
                             "low": {**shared, "mpp_um": [1.0]}}
    swapped = PatchStore.open(str(path), patches_low=f"{path}#{HIGH}")
    with pytest.raises(Refused, match=r"a: patches of --patches_low show 16 px .* 64 px: .*swap"):
        swapped.check(["a"])


def test_an_lmdb_of_abmilx_says_what_it_can(tmp_path: Path) -> None:
    store = PatchStore.open(str(published(tmp_path / "x.lmdb", {"s-1": 2, "s-10": 3})))
    assert dict(store.check(["s-10", "s-1"]).rows) == {"s-10": 3, "s-1": 2}
    assert store.facts() == {"kind": "abmilx lmdb", "px": [], "mpp_um": [], "encoding": [],
                             "channels": "RGB"}
    with pytest.raises(Refused, match="no patches: 's-100', 's';"):
        store.check(["s-100", "s", "s-1"])


def test_slides_with_coordinates(tmp_path: Path) -> None:
    """A broken file costs its slide; a slide file or coordinates that are not there are missing."""
    inputs = make_inputs(tmp_path, (4, 0, 3, 2, 2))
    (inputs.patches_root / "patches" / "slide_2.h5").write_bytes(b"no h5")
    (inputs.slides / "slide_3.tif").unlink()
    write_patches(inputs.patches_root, "slide_4", np.zeros((1, 2), np.int64), patch_px=48)
    store = PatchStore.open(str(inputs.patches_root), data_slide_dir=inputs.slides, slide_ext="tif")
    names = [f"slide_{number}" for number in range(6)]
    with pytest.raises(Refused, match=r"2 of 6 .* 'slide_3', 'slide_5'; there is no .*slide_3.tif"):
        store.check(names)
    found = store.check(names, allow_missing=True)
    assert found.usable == ("slide_0", "slide_4") and found.empty == ("slide_1",)
    assert found.missing == ("slide_3", "slide_5") and list(found.failures) == ["slide_2"]
    assert any("differ between slides: px [48, 64]" in note for note in found.notes)
    assert store.facts()["kind"] == "coordinates" and store.facts()["encoding"] == []
    before = store.stamps("slide_0")
    assert len(before) == 2  # coordinates and slide
    write_patches(inputs.patches_root, "slide_0", np.zeros((1, 2), np.int64))
    assert store.stamps("slide_0") != before
    assert pickle.loads(pickle.dumps(store)).stamps("slide_4") == store.stamps("slide_4")  # noqa: S301
