"""Feature folders and bags: found, checked, read, kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from datasets.bags import BagDataset
from datasets.features import FeatureStore
from datasets.table import SlideTable
from datasets.tasks import Task
from utils.errors import BrokenFile, ItemFailed, Refused
from utils.memory import available_memory_bytes
from utils.storage import save_torch, write_h5

ENCODER = {"name": "lite0", "dim": 8, "weights_sha256": "aa"}


def features_of(rows: int, width: int = 8, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def write_ours(root: Path, slide_id: str, features: np.ndarray, *, coords: np.ndarray | None = None,
               encoder: dict[str, Any] | None = None) -> Path:
    path = root / "h5_files" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    if coords is None:
        coords = np.arange(2 * len(features), dtype=np.int32).reshape(-1, 2)
    write_h5(path, {"features": features, "coords": coords},
             parameters={"encoder": encoder or ENCODER, "patch_level": 0})
    return path


def write_pt(root: Path, slide_id: str, value: Any) -> Path:
    path = root / "pt_files" / f"{slide_id}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_torch(path, value)
    return path


def write_foreign(root: Path, slide_id: str, **arrays: np.ndarray) -> Path:
    path = root / "h5_files" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def table_of(*slide_ids: str) -> SlideTable:
    return SlideTable(slide_ids, tuple(f"case_{name}" for name in slide_ids),
                      np.arange(len(slide_ids)) % 2, ("x", "y"))


# ---------------------------------------------------------------------------- finding, reading

def test_the_h5_is_preferred_and_carries_coords_and_encoder(tmp_path: Path) -> None:
    features = features_of(5)
    path = write_ours(tmp_path, "a.b", features)
    write_pt(tmp_path, "a.b", torch.zeros(3, 8))
    store = FeatureStore(tmp_path)
    assert store.find("a.b") == path
    assert store.info("a.b")[:3] == (5, 8, ENCODER)
    found, coords = store.read("a.b")
    assert found.dtype == torch.float32 and found.numpy().tolist() == features.tolist()
    assert coords is not None and coords.dtype == np.int64
    assert coords.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pt_file_alone_will_do(tmp_path: Path, zipped: bool) -> None:
    features = torch.from_numpy(features_of(4))
    path = write_pt(tmp_path, "s", features)
    if not zipped:
        torch.save(features, path, _use_new_zipfile_serialization=False)
    store = FeatureStore(tmp_path)
    assert store.info("s")[:3] == (4, 8, None)
    found, coords = store.read("s")
    assert torch.equal(found, features) and coords is None


def test_clams_own_h5_is_read(tmp_path: Path) -> None:
    write_foreign(tmp_path, "s", features=features_of(3), coords=np.zeros((3, 2), np.int64))
    store = FeatureStore(tmp_path)
    assert store.info("s")[:3] == (3, 8, None)
    assert store.read("s")[0].shape == (3, 8)


@pytest.mark.parametrize("kind", ["h5", "pt"])
def test_float16_comes_as_float32(tmp_path: Path, kind: str) -> None:
    half = features_of(3).astype(np.float16)
    if kind == "h5":
        write_ours(tmp_path, "s", half)
    else:
        write_pt(tmp_path, "s", torch.from_numpy(half))
    found = FeatureStore(tmp_path).read("s")[0]
    assert found.dtype == torch.float32
    assert found.tolist() == half.astype(np.float32).tolist()


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = write_pt(tmp_path, "s", torch.ones(4, 8))
    found = FeatureStore(tmp_path).read("s")[0]
    path.write_bytes(b"\0" * path.stat().st_size)
    assert found.sum() == 32


@pytest.mark.parametrize(("make", "message"), [
    (lambda root: None, "no features in .*run extract_features_fp.py"),
    (lambda root: write_foreign(root, "s", feats=features_of(3)), "no data set 'features'"),
    (lambda root: write_foreign(root, "s", features=features_of(3)[0]), r"shape \(8,\)"),
    (lambda root: write_foreign(root, "s", features=np.ones((3, 8), int)), "expected real numbers"),
    (lambda root: write_ours(root, "s", features_of(3), coords=np.zeros((2, 2), np.int32)),
     "3 rows of features.*run extract_features_fp.py again"),
    (lambda root: write_pt(root, "s", {"x": torch.ones(2)}), "holds a dict"),
    (lambda root: write_pt(root, "s", torch.ones(8)), r"shape \(8,\)"),
    (lambda root: write_pt(root, "s", torch.ones(3, 8, dtype=torch.int64)), "int64"),
    (lambda root: write_pt(root, "s", np.ones((3, 8))), "refused"),
])
def test_files_that_are_no_features_fail_in_one_line(
        tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path)
    with pytest.raises(BrokenFile, match=message) as caught:
        FeatureStore(tmp_path).read("s")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["h5", "pt"])
def test_truncated_files_fail_in_one_line(tmp_path: Path, kind: str, keep: float) -> None:
    path = (write_ours(tmp_path, "s", features_of(200)) if kind == "h5" else
            write_pt(tmp_path, "s", torch.ones(200, 8)))
    path.write_bytes(path.read_bytes()[:int(keep * path.stat().st_size)])
    store = FeatureStore(tmp_path)
    for call in (store.info, store.read):
        with pytest.raises(BrokenFile, match="truncated") as caught:
            call("s")
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_foreign_zip_named_pt_fails_in_one_line(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "pt_files" / "s.pt"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    for call in (FeatureStore(tmp_path).info, FeatureStore(tmp_path).read):
        with pytest.raises(BrokenFile, match="s.pt cannot be read"):
            call("s")


def test_altered_features_are_never_handed_out(tmp_path: Path) -> None:
    path = write_ours(tmp_path, "s", features_of(50))
    FeatureStore(tmp_path).read("s")
    raw = bytearray(path.read_bytes())
    place = raw.find(features_of(50).tobytes()[:64])
    raw[place + 10] ^= 4  # a flipped bit, caught by HDF5's checksum of the chunk
    path.write_bytes(raw)
    with pytest.raises(BrokenFile, match="s.h5"):
        FeatureStore(tmp_path).read("s")


def test_features_edited_through_hdf5_fail_their_checksum(tmp_path: Path) -> None:
    path = write_ours(tmp_path, "s", features_of(50))
    store = FeatureStore(tmp_path)
    store.read("s")
    with h5py.File(path, "r+") as file:
        file["features"][7, 3] += 1
    with pytest.raises(BrokenFile, match="fails its checksum"):
        FeatureStore(tmp_path).read("s")


def test_the_checksum_is_verified_once_while_the_file_stays(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.feature_layouts

    path = write_ours(tmp_path, "s", features_of(5))
    asked: list[bool] = []
    read_h5 = datasets.feature_layouts.read_h5

    def counted(path: Path, *, verify: bool = True) -> Any:
        asked.append(verify)
        return read_h5(path, verify=verify)

    monkeypatch.setattr(datasets.feature_layouts, "read_h5", counted)
    store = FeatureStore(tmp_path)
    store.read("s")
    store.read("s")
    write_ours(tmp_path, "s", features_of(6))
    assert path.is_file()
    store.read("s")
    assert asked == [True, False, True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["h5", "pt"])
def test_features_that_are_not_finite_name_slide_and_row(
        tmp_path: Path, kind: str, value: float) -> None:
    features = features_of(30)
    features[17, 3] = features[20, 0] = value
    if kind == "h5":
        write_ours(tmp_path, "s", features)
    else:
        write_pt(tmp_path, "s", torch.from_numpy(features))
    store = FeatureStore(tmp_path)
    for _ in range(2):
        with pytest.raises(ItemFailed, match=r"^s: row 17 of .* \(NaN or infinity; 2 of 30 rows"):
            store.read("s")


def test_an_id_cannot_leave_the_folder(tmp_path: Path) -> None:
    write_pt(tmp_path / "in", "s", torch.ones(2, 8))
    write_pt(tmp_path, "t", torch.ones(2, 8))
    with pytest.raises(Refused, match="plain name"):
        FeatureStore(tmp_path / "in").read("../../pt_files/t")


# ---------------------------------------------------------------------------- checking up front

def test_check_reports_usable_empty_broken_and_extra(tmp_path: Path) -> None:
    write_ours(tmp_path, "a", features_of(5))
    write_ours(tmp_path, "none", features_of(0))
    write_ours(tmp_path, "b", features_of(7))
    write_ours(tmp_path, "bad", features_of(3)).write_bytes(b"no h5")
    write_ours(tmp_path, "stranger", features_of(3))
    store = FeatureStore(tmp_path)
    found = store.check(["b", "none", "bad", "a"])
    assert (found.usable, found.empty, found.missing) == (("b", "a"), ("none",), ())
    assert list(found.failures) == ["bad"] and "bad.h5" in found.failures["bad"]
    assert (found.width, found.encoder, found.n_bytes) == (8, ENCODER, 12 * 8 * 4)
    assert any("without patches" in note and "'none'" in note for note in found.notes)
    assert any("not in the table: 'stranger'" in note for note in found.notes)
    assert store.extra(["a", "b", "bad", "none"]) == ["stranger"]


def test_missing_features_are_refused_unless_allowed(tmp_path: Path) -> None:
    write_pt(tmp_path, "a", torch.ones(2, 8))
    store = FeatureStore(tmp_path)
    with pytest.raises(Refused, match="2 of 3 slides have no features.*'b', 'c'.*--allow_missing"):
        store.check(["a", "b", "c"])
    found = store.check(["a", "b", "c"], allow_missing=True)
    assert (found.usable, found.missing) == (("a",), ("b", "c"))
    assert "2 slides without features are left out" in found.notes[0]
    with pytest.raises(Refused, match="no slide has usable features"):
        store.check(["b", "c"], allow_missing=True)


def test_width_is_checked_before_any_reading(tmp_path: Path) -> None:
    write_ours(tmp_path, "a", features_of(5, 8))
    write_pt(tmp_path, "b", torch.ones(5, 8))
    store = FeatureStore(tmp_path)
    assert store.check(["a", "b"], embed_dim=8).width == 8
    with pytest.raises(Refused, match=r"another width than 1024 \(--embed_dim\).*--embed_dim 8"):
        store.check(["a", "b"], embed_dim=1024)
    write_pt(tmp_path, "c", torch.ones(5, 4))
    with pytest.raises(Refused, match=r"width than 8 \(as a\): 'c'; c has 4.*one encoder"):
        store.check(["a", "b", "c"])


def test_features_of_two_encoders_are_not_mixed(tmp_path: Path) -> None:
    write_ours(tmp_path, "a", features_of(5))
    write_ours(tmp_path, "b", features_of(5), encoder={**ENCODER, "weights_sha256": "bb"})
    with pytest.raises(Refused, match="b: weights_sha256: file has 'bb', a has 'aa'"):
        FeatureStore(tmp_path).check(["a", "b"])


def test_features_of_unknown_origin_are_noted_beside_known_ones(tmp_path: Path) -> None:
    write_ours(tmp_path, "a", features_of(5))
    write_pt(tmp_path, "b", torch.ones(5, 8))
    found = FeatureStore(tmp_path).check(["a", "b"])
    assert found.encoder == ENCODER
    assert found.notes == ("1 feature files do not say which encoder made them: 'b'",)
    assert FeatureStore(tmp_path).check(["b"]).encoder is None


def test_patches_of_different_sizes_are_noted(tmp_path: Path) -> None:
    (tmp_path / "h5_files").mkdir()
    for slide_id, size in (("a", 256), ("b", 256), ("c", 512)):
        write_h5(tmp_path / "h5_files" / f"{slide_id}.h5", {"features": features_of(5)},
                 parameters={"encoder": ENCODER, "patch": {"patch_level": 0, "patch_size": size}})
        assert FeatureStore(tmp_path).info(slide_id).patch["patch_size"] == size
        if slide_id == "a":
            assert FeatureStore(tmp_path).check(["a"]).notes == ()
    notes = FeatureStore(tmp_path).check(["a", "b", "c"]).notes
    assert "256 px of level 0 on 2 slides, 512 px of level 0 on 1 slides" in notes[0]


# ---------------------------------------------------------------------------- task to folder

def task_of(**changes: Any) -> Task:
    return Task(name="t", csv_path=Path("t.csv"), label_dict={"x": 0, "y": 1}, **changes)


def test_a_task_names_its_folder(tmp_path: Path) -> None:
    write_pt(tmp_path / "resnet", "a", torch.ones(2, 8))
    table = table_of("a")
    assert len(FeatureStore.for_task(tmp_path, task_of(feature_dir="resnet"), table).read("a")[0])
    with pytest.raises(Refused, match="uni does not exist"):
        FeatureStore.for_task(tmp_path, task_of(feature_dir="uni"), table)
    with pytest.raises(Refused, match="leave the folder"):
        FeatureStore.for_task(tmp_path / "resnet", task_of(feature_dir="../.."), table)
    assert FeatureStore.for_task(tmp_path / "resnet", task_of(), table).root == tmp_path / "resnet"


def test_each_source_has_its_folder(tmp_path: Path) -> None:
    write_pt(tmp_path / "one", "a", torch.ones(2, 8))
    write_pt(tmp_path / "two", "b", torch.ones(3, 8))
    table = SlideTable(("a", "b"), ("p", "q"), np.array([0, 1]), ("x", "y"), ("A", "B"))
    store = FeatureStore.for_task(tmp_path, task_of(source_dirs={"A": "one", "B": "two"}), table)
    assert [store.info(name).rows for name in table.slide_ids] == [2, 3]
    assert store.check(["a"]).notes == (f"1 feature files in {tmp_path} are not in the "
                                        "table: 'b'",)
    with pytest.raises(Refused, match="no folder for the sources 'B'"):
        FeatureStore.for_task(tmp_path, task_of(source_dirs={"A": "one"}), table)
    with pytest.raises(Refused, match="no folder for the sources ''"):
        FeatureStore.for_task(tmp_path, task_of(source_dirs={"A": "one"}), table_of("a"))


# ---------------------------------------------------------------------------- bags

def counted_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FeatureStore, list[str]]:
    store, reads = FeatureStore(root), []
    read = store.read

    def counted(slide_id: str) -> tuple[torch.Tensor, np.ndarray | None]:
        reads.append(slide_id)
        return read(slide_id)

    monkeypatch.setattr(store, "read", counted)
    return store, reads


def test_bags_carry_everything(tmp_path: Path) -> None:
    write_ours(tmp_path, "a", features_of(5))
    write_ours(tmp_path, "b", features_of(7))
    bags = BagDataset(table_of("b", "a"), FeatureStore(tmp_path))
    assert (len(bags), bags.slide_ids, bags.labels.tolist()) == (2, ("b", "a"), [0, 1])
    bag = bags[1]
    assert (bag.slide_id, bag.case_id, bag.label, len(bag)) == ("a", "case_a", 1, 5)
    assert bag.coords is not None and bag.coords.shape == (5, 2)
    assert [one.slide_id for one in bags] == ["b", "a"]
    assert [one.slide_id for one in bags[::-1]] == ["a", "b"]
    assert bags[-1].slide_id == "a"


@pytest.mark.parametrize(("cache", "reads_expected"), [("ram", 2), ("auto", 2), ("none", 5)])
def test_the_cache_reads_once_and_serves_every_fold(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Any, reads_expected: int) -> None:
    for name in "ab":
        write_ours(tmp_path, name, features_of(5))
    store, reads = counted_store(tmp_path, monkeypatch)
    bags = BagDataset(table_of("a", "b"), store, cache=cache)
    folds = [bags.subset(["b"]), bags.subset(["b", "a"])]
    for part in (bags, *folds):
        assert len(list(part)) == len(part)
    assert len(reads) == reads_expected
    assert folds[0][0].label == 1
    assert (folds[0][0] is bags[1]) == (cache != "none")


def test_kept_bags_do_not_travel_to_other_processes(tmp_path: Path) -> None:
    import pickle

    write_ours(tmp_path, "a", features_of(2000))
    bags = BagDataset(table_of("a"), FeatureStore(tmp_path), cache="ram")
    bags.verify()
    sent = pickle.dumps(bags)
    assert len(sent) < 4000
    other = pickle.loads(sent)  # noqa: S301
    assert other.keeps and torch.equal(other[0].features, bags[0].features)


def test_auto_keeps_bags_only_when_they_fit(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ours(tmp_path, "a", features_of(5))  # 160 bytes
    monkeypatch.setattr("datasets.bags.available_memory_bytes", lambda: 700)
    store = FeatureStore(tmp_path)
    assert BagDataset(table_of("a"), store).keeps
    assert BagDataset(table_of("a"), store, processes=2).keeps
    assert not BagDataset(table_of("a"), store, processes=3).keeps
    assert not BagDataset(table_of("a"), store, n_bytes=351).keeps
    assert BagDataset(table_of("a"), store, n_bytes=351, cache="ram").keeps


def test_memory_left_is_some_but_not_all() -> None:
    assert 1 << 20 < available_memory_bytes() < 1 << 50


def test_pinned_bags_ask_for_pinned_memory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ours(tmp_path, "a", features_of(5))
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append(1) or self)
    BagDataset(table_of("a"), FeatureStore(tmp_path)).subset(["a"])[0]
    assert not asked
    BagDataset(table_of("a"), FeatureStore(tmp_path), pin=True).subset(["a"])[0]
    assert asked == [1]


def test_bad_bags_name_their_slide_and_leave_the_others(tmp_path: Path) -> None:
    write_ours(tmp_path, "good", features_of(5))
    write_ours(tmp_path, "empty", features_of(0))
    write_ours(tmp_path, "wide", features_of(5, 9))
    nan = features_of(5)
    nan[2] = np.nan
    write_ours(tmp_path, "nan", nan)
    bags = BagDataset(table_of("empty", "good", "wide", "nan", "gone"), FeatureStore(tmp_path),
                      embed_dim=8, cache="ram")
    failures = bags.verify()
    assert list(failures) == ["empty", "wide", "nan", "gone"]
    assert "no patches" in failures["empty"] and "width 9, expected 8" in failures["wide"]
    assert "row 2" in failures["nan"] and "no features" in failures["gone"]
    assert len(bags[1]) == 5
    assert bags.subset(["good"]).verify() == {}
