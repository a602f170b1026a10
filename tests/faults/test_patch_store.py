"""Faults of the patches of end-to-end models: nothing in a file runs, nothing is invented, a slide
never costs the others."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.patch_bags import PatchBags
from datasets.patch_store import PatchStore
from tests.feature_inputs import make_inputs
from tests.patch_lmdbs import noise, store_patches
from tests.unit.test_datasets_bags import table_of
from tests.unit.test_wsi_core_patch_lmdb import Runs, published, red_jpeg
from utils.contracts import Bag
from utils.errors import ItemFailed, Refused
from utils.feeding import Missing, feed
from wsi_core.coords import read_coords


def read_everything(bags: PatchBags) -> dict[str, int | str]:
    """Slide -> patches read, or why not; in evaluation, as the engine and the models do."""
    found: dict[str, int | str] = {}
    for item in feed(bags, range(len(bags)), device=torch.device("cpu")):
        if isinstance(item, Missing):
            found[item.slide_id] = item.reason
            continue
        assert isinstance(item, Bag) and item.patches is not None
        try:
            found[item.slide_id] = sum(len(chunk) for chunk in item.patches.stream(4))
        except ItemFailed as error:
            found[item.slide_id] = str(error)
    assert not any("\n" in str(value) for value in found.values())
    return found


def test_a_malicious_pickle_in_an_lmdb_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    """In a patch it costs its slide, in a list of slides the file."""
    mark = tmp_path / "ran"
    bomb = pickle.dumps(Runs(os.mkdir, str(mark)))
    path = published(tmp_path / "x.lmdb", {"a": 3, "b": 3}, **{"a-1": bomb})
    store = PatchStore.open(str(path))
    assert store.check(["a", "b"]).usable == ("a", "b")
    bags = PatchBags(table_of("a", "b"), store, same_psize=3)
    found = read_everything(bags)
    assert found["b"] == 3
    assert "a: patch 1 cannot" in str(found["a"]) and "run code" in str(found["a"])
    with pytest.raises(ItemFailed, match="a: patch 1 cannot .* could run code"):
        bags.training(["a"])[0]
    for record in ("__slide__", "__pn__"):
        bad = published(tmp_path / f"{record}.lmdb", {"a": 1}, **{record: bomb})
        with pytest.raises(Refused, match="--patches: .*could run code"):
            PatchStore.open(str(bad))
    assert not mark.exists()
    pickle.loads(bomb)  # noqa: S301 - it works: it was the store that refused it
    assert mark.exists()


def test_a_truncated_lmdb_is_refused_before_any_work(tmp_path: Path) -> None:
    """Reading beyond its end would kill the process."""
    path = store_patches(tmp_path / "p.lmdb", {"a": noise(40)})
    data = path.read_bytes()
    for size, reason in ((len(data) - 8192, "truncated"), (len(data) // 2, "truncated"),
                         (50, "cannot be opened"), (0, "cannot be|no patch")):
        (tmp_path / "cut.lmdb").write_bytes(data[:size])
        with pytest.raises(Refused, match=f"--patches: .*{reason}"):
            PatchStore.open(str(tmp_path / "cut.lmdb"))


def test_a_slide_that_an_lmdb_lacks(tmp_path: Path) -> None:
    store = PatchStore.open(str(store_patches(tmp_path / "p.lmdb", {"s-10": noise(5)})))
    with pytest.raises(Refused, match="1 of 2 slides have no patches: 's-1'"):
        store.check(["s-1", "s-10"])
    assert store.check(["s-1", "s-10"], allow_missing=True).usable == ("s-10",)
    found = read_everything(PatchBags(table_of("s-1", "s-10"), store))
    assert found["s-10"] == 5 and "holds no slide 's-1'" in str(found["s-1"])


@pytest.mark.parametrize("value", [
    b"", b"no picture", red_jpeg()[:60], b"\x89PNG\r\n\x1a\n" + bytes(40)], ids=range(4))
def test_a_patch_that_is_no_picture_costs_its_slide(tmp_path: Path, value: bytes) -> None:
    path = published(tmp_path / "x.lmdb", {"a": 9, "b": 9}, **{"a-7": pickle.dumps(value)})
    bags = PatchBags(table_of("a", "b"), PatchStore.open(str(path), num_workers=2), same_psize=9)
    found = read_everything(bags)
    assert found["b"] == 9
    assert "a: patch 7 cannot" in str(found["a"]) and "is no picture" in str(found["a"])
    drawn = list(feed(bags.training(["a", "b"]), [0, 1], device=torch.device("cpu")))
    assert isinstance(drawn[0], Missing) and "patch 7" in drawn[0].reason
    assert isinstance(drawn[1], Bag) and len(drawn[1]) == 9


def test_a_record_that_makes_no_sense_costs_its_slide(tmp_path: Path) -> None:
    import json

    import lmdb

    from wsi_core.patch_lmdb import record_key

    path = store_patches(tmp_path / "p.lmdb", {"a": noise(3), "b": noise(3), "c": noise(3)})
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        record = json.loads(txn.get(record_key("slide", "", "a")) or "")
        txn.put(record_key("slide", "", "a"), json.dumps({**record, "origin": 5}).encode())
        txn.put(record_key("coords", "", "b"), b"[[1, 2]]")
    store = PatchStore.open(str(path))
    found = store.check(["a", "b", "c"])
    assert found.usable == ("b", "c") and "record of a makes no sense" in found.failures["a"]
    result = read_everything(PatchBags(table_of("b", "c"), store))
    assert result["c"] == 3 and "b has 1 coordinates for 3 patches" in str(result["b"])


def test_a_slide_that_cannot_be_read_costs_itself(tmp_path: Path) -> None:
    """Truncated after it was checked."""
    inputs = make_inputs(tmp_path, (6, 6))
    store = PatchStore.open(str(inputs.patches_root), data_slide_dir=inputs.slides,
                            slide_ext=".tif", num_workers=2)
    assert store.check(["slide_0", "slide_1"]).usable == ("slide_0", "slide_1")
    path = inputs.slides / "slide_0.tif"
    path.write_bytes(path.read_bytes()[:3000])
    bags = PatchBags(table_of("slide_0", "slide_1"), store, same_psize=4)
    found = read_everything(bags)
    assert found["slide_1"] == 6 and str(found["slide_0"]).startswith("slide_0: ")
    assert "slide_0.tif" in str(found["slide_0"])
    assert list(bags.verify()) == ["slide_0"]
    assert list(bags.training(bags.slide_ids).verify()) == ["slide_0"]


def test_coordinates_that_vanish_cost_their_slide(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, (6, 6))
    store = PatchStore.open(str(inputs.patches_root), data_slide_dir=inputs.slides,
                            slide_ext=".tif")
    store.check(["slide_0", "slide_1"])
    path = inputs.patches_root / "patches" / "slide_0.h5"
    assert len(read_coords(path)) == 6
    path.unlink()
    found = read_everything(PatchBags(table_of("slide_0", "slide_1"), store))
    assert found["slide_1"] == 6 and "slide_0.h5" in str(found["slide_0"])


def test_patches_of_unequal_size_are_told(tmp_path: Path) -> None:
    path = published(tmp_path / "x.lmdb", {"a": 3})
    import cv2
    import lmdb

    small = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    with lmdb.open(str(path), subdir=False, map_size=2**24) as env, env.begin(write=True) as txn:
        txn.put(b"a-2", pickle.dumps(small))
    found = read_everything(PatchBags(table_of("a"), PatchStore.open(str(path))))
    assert "a: patch 2 cannot" in str(found["a"]) and "has 8 x 8 px, another 16 x 16" in str(
        found["a"])
