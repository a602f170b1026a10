"""Features in the layouts of CLAM, TRIDENT and AtlasPatch: written field by field, read from all.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from datasets.feature_files import (
    feature_parameters,
    h5_path,
    inspect_features,
    needed_bytes,
    pt_path,
    write_features,
)
from datasets.feature_layouts import check_layout, encoder_label
from datasets.features import FeatureStore
from datasets.levels import level_stores
from datasets.patches import EncodedSlide, SlidePatches
from tests.conftest import ROOT
from tests.unit.test_wsi_core_layouts import COORDS, PATCHES, THEIR_TRIDENT, assert_table
from utils.errors import BrokenFile, ItemFailed, Refused
from utils.storage import State
from wsi_core.coords import Descent, PatchCoords, read_coords, write_coords
from wsi_core.layouts import LAYOUTS, Layout

FEATURES = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
SLIDE = {"slide_name": "s 1.svs", "slide_bytes": 1}


def parameters_of(encoder: str = "uni", patches: PatchCoords = PATCHES, **changes: Any
                  ) -> dict[str, Any]:
    return feature_parameters(patches, encoder={"name": encoder, "weights_sha256": "aa"},
                              slide=SLIDE, **changes)


def put(folder: Path, layout: Layout, encoder: str = "uni", features: np.ndarray = FEATURES, *,
        patches: PatchCoords = PATCHES, rows: tuple[int, ...] = (0, 1, 2),
        coords_layout: Layout = "clam", descent: Descent | None = None, **changes: Any) -> Path:
    """Features of the slide "s 1", whose coordinates lie in ``coords/``; returns the h5."""
    source = folder / "coords" / f"{patches.slide_id}.h5"
    source.parent.mkdir(exist_ok=True)
    write_coords(source, patches, layout=coords_layout)
    feat_dir = folder / "f"
    for place in ("h5_files", "pt_files"):
        (feat_dir / place).mkdir(parents=True, exist_ok=True)
    parameters = parameters_of(encoder, patches, **changes)
    write_features(
        feat_dir, EncodedSlide(
            patches=SlidePatches(
                slide_id=patches.slide_id, slide_path=Path("x"), coords=patches.coords,
                patch_level=2, patch_size=64, output_size=patches.output_size),
            features=features, rows=np.array(rows, np.int64),
            unreadable={row: "bad" for row in range(len(patches)) if row not in rows}),
        parameters=parameters, mpp_um=0.5, footprint_px_l0=(512, 512), layout=layout,
        coords_path=source, descent=descent)
    return h5_path(feat_dir, patches.slide_id, layout=layout, encoder=encoder)


def state_of(folder: Path, layout: Layout, encoder: str = "uni", **changes: Any) -> State:
    return inspect_features(folder / "f", "s 1", parameters_of(encoder, **changes),
                            allow_dropped=False, layout=layout).state


# ---------------------------------------------------------------------------- what is written

def test_tridents_fields(tmp_path: Path) -> None:
    path = put(tmp_path, "trident", "timm:a/b")
    assert path == tmp_path / "f" / "features_timm_a_b" / "s 1.h5"
    with h5py.File(path) as file:
        assert set(file) == {"features", "coords"}
        features, coords = file["features"], file["coords"]
        assert (features.dtype, features.shape) == (np.float32, (3, 4))
        assert features[()].tolist() == FEATURES.tolist()
        assert_table(dict(features.attrs), {"name": ("s", "timm:a/b"),
                                            "savetodir": ("s", str(path.parent))})
        assert (coords.dtype, coords[()].tolist()) == (np.int64, COORDS.tolist())
        assert_table(dict(coords.attrs), {
            "patch_size": ("i", 256), "patch_size_level0": ("i", 512), "overlap": ("i", 64),
            "level0_magnification": ("i", 40), "target_magnification": ("i", 20),
            "level0_width": ("i", 1200), "level0_height": ("i", 801), "name": ("s", "s 1"),
            "savetodir": ("s", str(tmp_path / "coords"))})
    assert not list((tmp_path / "f" / "pt_files").iterdir())


@pytest.mark.parametrize("coords_layout", LAYOUTS)
def test_atlaspatchs_fields(tmp_path: Path, coords_layout: Layout) -> None:
    path = put(tmp_path, "atlaspatch", coords_layout=coords_layout)
    assert path == tmp_path / "f" / "patches" / "s 1.h5"
    with h5py.File(path) as file:
        assert (file["coords"].dtype, file["coords"].shape) == (np.int32, (3, 5))
        assert file["coords"][:, :2].tolist() == COORDS.tolist()
        assert file.attrs["patch_size"] == 256 and file.attrs["num_patches"] == 3
        assert list(file["features"]) == ["uni"]
        features = file["features/uni"]
        assert (features.dtype, features.shape) == (np.float32, (3, 4))
        assert features[()].tolist() == FEATURES.tolist()
    assert read_coords(path).tissue is not None, "it is a whole coordinates file"
    assert state_of(tmp_path, "atlaspatch") is State.DONE


def test_clams_files_are_as_they_were(tmp_path: Path) -> None:
    path = put(tmp_path, "clam")
    assert path == tmp_path / "f" / "h5_files" / "s 1.h5"
    with h5py.File(path) as file:
        assert file["coords"].dtype == np.int32 and dict(file["coords"].attrs) == {}
        assert set(file.attrs) == {
            "slide_id", "encoder", "mpp_um", "footprint_px_l0", "milwright_status",
            "milwright_schema", "milwright_version", "milwright_parameters", "milwright_digest"}
    pt = torch.load(pt_path(tmp_path / "f", "s 1"), weights_only=True)
    assert pt.dtype == torch.float32 and pt.numpy().tolist() == FEATURES.tolist()
    assert "storage_dtype" not in parameters_of(), "old files still count as done"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_on_disk(tmp_path: Path, layout: Layout) -> None:
    path = put(tmp_path, layout, storage_dtype="float16")
    with h5py.File(path) as file:
        stored = file["features/uni" if layout == "atlaspatch" else "features"]
        assert stored.dtype == np.float16
    if layout == "clam":
        assert torch.load(pt_path(tmp_path / "f", "s 1"), weights_only=True).dtype == torch.float16
    assert state_of(tmp_path, layout, storage_dtype="float16") is State.DONE
    finding = inspect_features(tmp_path / "f", "s 1", parameters_of(), allow_dropped=False,
                               layout=layout)
    assert finding.state is State.OTHER and finding.other_settings
    found = FeatureStore(tmp_path / "f").read("s 1")[0]
    assert found.dtype == torch.float32
    assert found.tolist() == FEATURES.astype(np.float16).astype(np.float32).tolist()
    with pytest.raises(ItemFailed, match=r"^s 1: features of up to 7e\+04 do not fit float16"):
        put(tmp_path, layout, features=FEATURES * 0 + 70_000, storage_dtype="float16")
    assert state_of(tmp_path, layout, storage_dtype="float16") is State.DONE, "the old file stays"


def test_patches_left_out(tmp_path: Path) -> None:
    path = put(tmp_path, "trident", features=FEATURES[:2], rows=(0, 2))
    with h5py.File(path) as file:
        assert file["coords"][()].tolist() == COORDS[[0, 2]].tolist()
        assert file["dropped_coords"][()].tolist() == [COORDS[1].tolist()]
    assert len(FeatureStore(tmp_path / "f").read("s 1")[0]) == 2
    with pytest.raises(ItemFailed, match="1 patches are unreadable.*a row for each"):
        put(tmp_path, "atlaspatch", features=FEATURES[:2], rows=(0, 2))


def test_what_layouts_cannot_hold(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        check_layout(layout, finer_levels=False, bad_tiles="fail")
    check_layout("clam", finer_levels=True, bad_tiles="drop")
    check_layout("trident", finer_levels=False, bad_tiles="drop")
    with pytest.raises(Refused, match="finer levels .*--child_levels"):
        check_layout("trident", finer_levels=True, bad_tiles="fail")
    with pytest.raises(Refused, match="--bad_tiles drop .*--layout clam or trident"):
        check_layout("atlaspatch", finer_levels=False, bad_tiles="drop")
    descent = Descent(ratio=1, valid=np.ones(3, bool), parent_sha256="a")
    with pytest.raises(ItemFailed, match="finer levels are written in the layout clam"):
        put(tmp_path, "trident", descent=descent)


def test_coordinates_that_changed_meanwhile(tmp_path: Path) -> None:
    put(tmp_path, "trident")
    source = tmp_path / "coords" / "s 1.h5"
    write_coords(source, replace(PATCHES, coords=COORDS + 1))
    done = EncodedSlide(
        patches=SlidePatches(slide_id="s 1", slide_path=Path("x"), coords=COORDS, patch_level=0,
                             patch_size=1, output_size=1), features=FEATURES, rows=np.arange(3))
    with pytest.raises(ItemFailed, match="has changed while its patches were encoded"):
        write_features(tmp_path / "f", done, parameters=parameters_of(), mpp_um=0.5,
                       footprint_px_l0=(1, 1), layout="trident", coords_path=source)


def test_tridents_own_coordinates_get_the_level_that_was_read(tmp_path: Path) -> None:
    free = replace(PATCHES, level_free=True, patch_level=0, patch_size=512,
                   level_downsample=(1.0, 1.0), level_size=(1200, 801))
    path = put(tmp_path, "atlaspatch", patches=free)  # encoded from 64 px of level 2
    with h5py.File(path) as file:
        assert file["coords"][0].tolist() == [5, 7, 64, 64, 2]
    found = read_coords(path)
    assert found.level_downsample == (8.0, 8.0) and found.footprint_px_l0 == (512, 512)
    assert (found.level_size, found.level_free) == ((150, 100), False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_disk_need_is_not_less_than_what_is_written(tmp_path: Path, layout: Layout,
                                                    storage: Any) -> None:
    rows = 5000
    coords = np.stack([np.arange(rows) * 256, np.arange(rows) % 97 * 256], 1)
    features = np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32)
    put(tmp_path, layout, patches=replace(PATCHES, coords=coords), features=features,
        rows=tuple(range(rows)), storage_dtype=storage)
    written = sum(path.stat().st_size for path in (tmp_path / "f").rglob("*.*"))
    asked = needed_bytes(rows, 64, layout=layout, storage_dtype=storage)
    assert written <= asked < 1.4 * written


# ---------------------------------------------------------------------------- several encoders

def test_other_encoders_survive(tmp_path: Path) -> None:
    path = put(tmp_path, "atlaspatch", "uni")
    put(tmp_path, "atlaspatch", "timm:a/b", FEATURES[:, :2] + 1)
    with h5py.File(path, "r+") as file:
        assert set(file["features"]) == {"uni", "timm_a_b"}
        file["slide_features/titan"] = np.ones(5)  # AtlasPatch 1.1 has those
    put(tmp_path, "atlaspatch", "uni", FEATURES * 2)
    for encoder in ("uni", "timm:a/b"):
        assert state_of(tmp_path, "atlaspatch", encoder) is State.DONE
    assert state_of(tmp_path, "atlaspatch", "gigapath") is State.MISSING
    with h5py.File(path) as file:
        assert file["features/uni"][()].tolist() == (FEATURES * 2).tolist()
        assert file["features/timm_a_b"][()].tolist() == (FEATURES[:, :2] + 1).tolist()
        assert file["slide_features/titan"][()].sum() == 5
    write_coords(path, PATCHES, layout="atlaspatch")  # the same coordinates made anew
    assert state_of(tmp_path, "atlaspatch", "uni") is State.DONE


def test_into_atlaspatchs_own_file(tmp_path: Path) -> None:
    path = write_atlaspatch(tmp_path / "f", "s 1", {"uni": FEATURES})
    assert state_of(tmp_path, "atlaspatch") is State.FOREIGN
    put(tmp_path, "atlaspatch", "resnet50", FEATURES + 1)
    with h5py.File(path) as file:
        assert set(file["features"]) == {"uni", "resnet50"}
        assert file.attrs["vendor"] == "aperio" and file["passports"][0] == b"x"
    assert state_of(tmp_path, "atlaspatch", "resnet50") is State.DONE


def test_features_of_other_coordinates_are_not_thrown_away(tmp_path: Path) -> None:
    path = put(tmp_path, "atlaspatch", "uni")
    moved = replace(PATCHES, coords=COORDS + 256)
    with pytest.raises(ItemFailed, match=r"features of other coordinates \(uni\)"):
        put(tmp_path, "atlaspatch", "resnet50", patches=moved)
    assert state_of(tmp_path, "atlaspatch") is State.DONE
    put(tmp_path, "atlaspatch", "uni", FEATURES * 2, patches=moved)  # alone it may be made anew
    assert read_coords(path).coords.tolist() == (COORDS + 256).tolist()
    assert state_of(tmp_path, "atlaspatch", patches=moved) is State.DONE
    assert state_of(tmp_path, "atlaspatch") is State.OTHER


def test_a_file_of_another_layout_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "f" / "patches" / "s 1.h5"
    path.parent.mkdir(parents=True)
    write_coords(path, PATCHES)
    with pytest.raises(ItemFailed, match="not in the layout atlaspatch"):
        put(tmp_path, "atlaspatch")
    assert state_of(tmp_path, "atlaspatch") is State.MISSING


KILLED = """
import sys
from pathlib import Path
from tests.unit.test_datasets_feature_layouts import FEATURES, put
put(Path(sys.argv[1]), sys.argv[2], sys.argv[3], FEATURES * 3)
"""


@pytest.mark.parametrize(("layout", "encoder", "site"), [
    ("trident", "uni", "storage.write"), ("atlaspatch", "uni", "storage.replace"),
    ("atlaspatch", "resnet50", "storage.write")])
def test_a_killed_write_leaves_the_old_file(tmp_path: Path, layout: Layout, encoder: str,
                                            site: str) -> None:
    """The second file written is that of the features; the first is ``coords/``."""
    put(tmp_path, layout)
    before = {path: path.read_bytes() for path in (tmp_path / "f").rglob("*.h5")}
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), layout, encoder], cwd=ROOT,
        env={"MILWRIGHT_FAULT": f"{site}:kill:2", "PATH": ""}, capture_output=True)
    assert child.returncode == -9, child.stderr.decode()
    assert {path: path.read_bytes() for path in (tmp_path / "f").rglob("*.h5")} == before
    put(tmp_path, layout, encoder, FEATURES * 3)
    assert state_of(tmp_path, layout, encoder) is State.DONE


# ---------------------------------------------------------------------------- damage

@pytest.mark.parametrize("layout", ["trident", "atlaspatch"])
@pytest.mark.parametrize("keep", [0.99, 0.5, 0.0])
def test_cut_files_are_made_anew(tmp_path: Path, layout: Layout, keep: float) -> None:
    path = put(tmp_path, layout)
    raw = path.read_bytes()
    path.write_bytes(raw[:int(len(raw) * keep)])
    assert state_of(tmp_path, layout) is State.BROKEN
    store = FeatureStore(tmp_path / "f")
    for call in (store.info, store.read):
        with pytest.raises(BrokenFile, match="s 1.h5 cannot be read"):
            call("s 1")
    put(tmp_path, layout)
    assert state_of(tmp_path, layout) is State.DONE


def alter_features(file: h5py.File) -> None:
    file["features/uni" if isinstance(file["features"], h5py.Group) else "features"][1, 2] += 1


def alter_coords(file: h5py.File) -> None:
    file["coords"][1, 0] += 1


@pytest.mark.parametrize("layout", ["trident", "atlaspatch"])
@pytest.mark.parametrize("alter", [alter_features, alter_coords])
def test_altered_files_fail_their_checksum(tmp_path: Path, layout: Layout,
                                           alter: Callable[[h5py.File], None]) -> None:
    with h5py.File(put(tmp_path, layout), "r+") as file:
        alter(file)
    assert state_of(tmp_path, layout) is State.BROKEN
    with pytest.raises(BrokenFile, match="fails its checksum"):
        FeatureStore(tmp_path / "f").read("s 1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_record_that_is_no_json(tmp_path: Path, layout: Layout) -> None:
    with h5py.File(put(tmp_path, layout), "r+") as file:
        holder = file["features/uni"] if layout == "atlaspatch" else file
        holder.attrs["milwright_parameters"] = "{..."
    assert state_of(tmp_path, layout) is State.BROKEN
    with pytest.raises(BrokenFile, match="s 1.h5 cannot be read"):
        FeatureStore(tmp_path / "f").info("s 1")


# ---------------------------------------------------------------------------- files of the tools

def write_atlaspatch(folder: Path, slide_id: str, features: dict[str, np.ndarray], *,
                     rows: int = 3) -> Path:
    """As AtlasPatch writes it; rows of coordinates."""
    path = folder / "patches" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        coords = np.hstack([COORDS, np.full((3, 3), (128, 128, 1))]).astype(np.int32)[:rows]
        file["coords"], file["passports"] = coords, np.array([b"x"] * rows, "S160")
        for name, array in features.items():
            file[f"features/{name}"] = array
        file.attrs.update({
            "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40,
            "target_magnification": 20, "overlap": 64, "level0_width": 1200, "level0_height": 801,
            "vendor": "aperio", "num_patches": rows})
    return path


def write_trident(folder: Path, slide_id: str, features: np.ndarray,
                  coords: np.ndarray = COORDS) -> Path:
    """As TRIDENT writes it, into the folder of an encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{slide_id}.h5", "w") as file:
        file["features"], file["coords"] = features, coords
        file["coords"].attrs.update(THEIR_TRIDENT)
    return folder / f"{slide_id}.h5"


def assert_read(store: FeatureStore, slide_id: str, features: np.ndarray = FEATURES, *,
                located: bool = True) -> None:
    info = store.info(slide_id)
    assert (info.rows, info.width, info.located) == (*features.shape, located)
    found, coords = store.read(slide_id)
    assert found.dtype == torch.float32 and found.numpy().tolist() == features.tolist()
    if located:
        assert coords is not None and coords.dtype == np.int64
        assert coords.tolist() == COORDS.tolist()
    else:
        assert coords is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_store_reads_ours(tmp_path: Path, layout: Layout) -> None:
    put(tmp_path, layout, "timm:a/b")
    for store in (FeatureStore(tmp_path / "f"), FeatureStore(tmp_path / "f", encoder="timm:a/b")):
        assert_read(store, "s 1")
        info = store.info("s 1")
        assert info.encoder == {"name": "timm:a/b", "weights_sha256": "aa"}
        assert info.patch is not None and info.patch["patch_size"] == 128
        assert store.check(["s 1"]).usable == ("s 1",)
    with pytest.raises(BrokenFile, match=r"no features of uni|features of timm_a_b, not of uni"):
        FeatureStore(tmp_path / "f", encoder="uni").info("s 1")


def test_the_store_reads_tridents_folders(tmp_path: Path) -> None:
    write_trident(tmp_path / "features_uni_v1", "a", FEATURES)
    write_trident(tmp_path / "features_uni_v1", "b", FEATURES[None].astype(np.float16),
                  COORDS[None])
    half = FEATURES.astype(np.float16).astype(np.float32)
    for store in (FeatureStore(tmp_path), FeatureStore(tmp_path / "features_uni_v1"),
                  FeatureStore(tmp_path, encoder="uni_v1")):
        assert_read(store, "a")
        assert_read(store, "b", half)
        assert store.info("a").made_by == "uni_v1" and store.info("a").encoder is None
        assert store.check(["a", "b"]).width == 4
        assert store.extra(["a"]) == ["b"]
    write_trident(tmp_path / "features_conch", "a", FEATURES + 1)
    with pytest.raises(Refused, match="2 encoders: conch, uni_v1: choose one with --feature_enc"):
        FeatureStore(tmp_path).check(["a"])
    assert_read(FeatureStore(tmp_path, encoder="conch"), "a", FEATURES + 1)
    with pytest.raises(BrokenFile, match="no features of conch"):
        FeatureStore(tmp_path, encoder="conch").read("b")


def test_the_store_reads_atlaspatchs_files(tmp_path: Path) -> None:
    write_atlaspatch(tmp_path, "a", {"uni_v2": FEATURES})
    write_atlaspatch(tmp_path, "bare", {})
    for store in (FeatureStore(tmp_path), FeatureStore(tmp_path / "patches"),
                  FeatureStore(tmp_path, encoder="uni_v2")):
        assert_read(store, "a")
        assert store.extra([]) == ["a"], "coordinates alone are no features"
        assert store.check(["a", "bare"], allow_missing=True).missing == ("bare",)
    write_atlaspatch(tmp_path, "a", {"uni_v2": FEATURES, "resnet50": FEATURES + 1})
    with pytest.raises(Refused, match="2 encoders: resnet50, uni_v2: choose one"):
        FeatureStore(tmp_path).info("a")
    assert FeatureStore(tmp_path).extra([]) == ["a"]
    assert_read(FeatureStore(tmp_path, encoder="resnet50"), "a", FEATURES + 1)


def test_each_data_set_is_checked_for_itself(tmp_path: Path) -> None:
    bad = FEATURES.copy()
    bad[1, 1] = np.nan
    write_atlaspatch(tmp_path, "a", {"good": FEATURES, "bad": bad})
    assert_read(FeatureStore(tmp_path, encoder="good"), "a")
    store = FeatureStore(tmp_path)
    store.encoder = "good"
    store.read("a")
    store.encoder = "bad"
    with pytest.raises(ItemFailed, match="row 1 of .* is not finite"):
        store.read("a")


def test_clams_layout_with_a_folder_an_encoder(tmp_path: Path) -> None:
    for encoder, factor in (("uni", 1), ("timm:a/b", 2)):
        put(tmp_path, "clam", encoder, FEATURES * factor)
        (tmp_path / "f").rename(tmp_path / encoder_label(encoder))
    assert_read(FeatureStore(tmp_path, encoder="timm:a/b"), "s 1", FEATURES * 2)
    assert_read(FeatureStore(tmp_path, encoder="uni"), "s 1")
    assert_read(FeatureStore(tmp_path / "uni"), "s 1")
    with pytest.raises(Refused, match="2 encoders: timm_a_b, uni: choose one with --feature_enc"):
        FeatureStore(tmp_path).read("s 1")


@pytest.mark.parametrize(("make", "words"), [
    (lambda root: write_atlaspatch(root, "a", {"uni": FEATURES}, rows=2),
     "3 rows of features, but coords of shape"),
    (lambda root: write_trident(root / "features_uni", "a", FEATURES, COORDS[:2]),
     "3 rows of features, but coords of shape"),
    (lambda root: write_trident(root / "features_uni", "a", np.ones((2, 3, 4), np.float32)),
     r"shape \(2, 3, 4\)"),
    (lambda root: write_atlaspatch(root, "a", {"uni": FEATURES[0]}), r"shape \(4,\)"),
    (lambda root: write_trident(root / "features_uni", "a", FEATURES.astype(int)),
     "expected real numbers"),
])
def test_wrong_shapes_and_types(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path)
    with pytest.raises(BrokenFile, match=words) as caught:
        FeatureStore(tmp_path).read("a")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_two_foreign_encoders_are_not_mixed(tmp_path: Path) -> None:
    write_atlaspatch(tmp_path, "a", {"uni": FEATURES})
    write_atlaspatch(tmp_path, "b", {"conch": FEATURES})
    with pytest.raises(Refused, match=r"cannot be mixed \(a: uni, b: conch\)"):
        FeatureStore(tmp_path).check(["a", "b"])


def test_finer_levels_need_clams_layout(tmp_path: Path) -> None:
    from datasets.levels import StoredLevels

    write_trident(tmp_path / "top", "a", FEATURES)
    write_atlaspatch(tmp_path / "fine", "a", {"uni": FEATURES})
    store = FeatureStore(tmp_path / "top")
    finer = level_stores(store, child_dirs=[tmp_path / "fine"])
    with pytest.raises(ItemFailed, match="not in the layout clam, which finer levels need"):
        StoredLevels(store, finer)("a", COORDS, 3)


def test_stamps_files_without_their_coordinates(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["feats"], file["coords"] = FEATURES, COORDS / 4  # um
    assert_read(FeatureStore(tmp_path), "a", located=False)


def test_a_real_file_of_stamp(shared: Path) -> None:
    store = FeatureStore(shared / "data" / "features")
    info = store.info("TCGA-AD-6964-01Z-00-DX1.stamp")
    assert (info.rows, info.width, info.located) == (777, 512, False)
    assert store.check(["TCGA-AD-6964-01Z-00-DX1.stamp"]).rows == {
        "TCGA-AD-6964-01Z-00-DX1.stamp": 777}


def test_labels_are_plain_names() -> None:
    assert encoder_label("timm:hf-hub/a b@c") == "timm_hf-hub_a_b_c"
    assert encoder_label("uni_v1.5+x") == "uni_v1.5+x"
