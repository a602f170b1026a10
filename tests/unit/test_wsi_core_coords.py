"""The coordinates file: ours both ways, CLAM's, and files that are neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from utils.errors import BrokenFile
from utils.storage import write_h5
from wsi_core.coords import (
    Descent,
    PatchCoords,
    read_coords,
    read_coords_inside,
    recorded_parameters,
    write_coords,
)
from wsi_core.tissue import Tissue

OUTLINE = np.array([[0, 0], [900, 0], [900, 700]], np.int32)
TISSUE = Tissue([OUTLINE, OUTLINE + 50], [[OUTLINE // 4, OUTLINE // 8], []])


def patches(**changes: Any) -> PatchCoords:
    values: dict[str, Any] = {
        "slide_id": "s 1", "coords": np.array([[5, 7], [261, 7], [5, 263]]), "patch_size": 512,
        "patch_level": 1, "output_size": 256, "level_downsample": (4.0, 4.0),
        "level_size": (300, 200), "slide_size": (1200, 801), "footprint_px_l0": (2048, 2048),
        "step_px_l0": (1024, 1024), "mpp_um": 4.0, "slide_mpp_um": (0.5, 0.5),
        "background": (255, 255, 255), "parameters": {"sthresh": 8}, "tissue": TISSUE, **changes}
    return PatchCoords(**values)


@pytest.mark.parametrize("changes", [
    {}, {"tissue": None, "mpp_um": None, "slide_mpp_um": None},
    {"coords": np.empty((0, 2), np.int64), "tissue": Tissue()}])
def test_reads_back_what_was_written(changes: dict[str, Any], tmp_path: Path) -> None:
    before = patches(**changes)
    write_coords(tmp_path / "s 1.h5", before)
    after = read_coords(tmp_path / "s 1.h5")
    assert len(after) == len(before.coords)
    for name in PatchCoords.__dataclass_fields__:
        if name not in ("coords", "tissue"):
            assert getattr(after, name) == getattr(before, name), name
    assert after.coords.dtype == np.int64 and np.array_equal(after.coords, before.coords)
    if before.tissue is None:
        assert after.tissue is None
        return
    assert after.tissue is not None
    assert all(map(np.array_equal, after.tissue.contours, before.tissue.contours))
    assert [len(holes) for holes in after.tissue.holes] == [len(h) for h in before.tissue.holes]
    for holes, wanted in zip(after.tissue.holes, before.tissue.holes, strict=True):
        assert all(map(np.array_equal, holes, wanted))


def test_attributes_are_clams(tmp_path: Path) -> None:
    write_coords(tmp_path / "s.h5", patches(), save_path="OUT/patches")
    with h5py.File(tmp_path / "s.h5") as file:
        data = file["coords"]
        assert (data.dtype, data.shape, data.maxshape) == (np.int64, (3, 2), (None, 2))
        attrs = dict(data.attrs)
    assert set(attrs) > {"patch_size", "patch_level", "downsample", "downsampled_level_dim",
                         "level_dim", "name", "save_path"}
    assert attrs["patch_size"].dtype == attrs["patch_level"].dtype == np.int64
    assert attrs["downsample"].dtype == np.float64 and attrs["downsample"].tolist() == [4, 4]
    assert attrs["level_dim"].dtype == np.int64 and attrs["level_dim"].tolist() == [300, 200]
    assert attrs["downsampled_level_dim"].tolist() == [300, 200]
    assert (attrs["name"], attrs["save_path"]) == ("s 1", "OUT/patches")


def write_clam(path: Path, coords: np.ndarray, **attrs: Any) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_dataset("coords", data=coords, chunks=(1, 2), maxshape=(None, 2))
        data.attrs.update(attrs)
    return path


CLAM = {"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0), "level_dim": (300, 200),
        "downsampled_level_dim": (300, 200), "name": "slide", "save_path": "x"}


def test_reads_clams_files(tmp_path: Path) -> None:
    found = read_coords(write_clam(tmp_path / "slide.h5", np.array([[1, 2], [3, 4]]), **CLAM))
    assert found.slide_id == "slide" and found.coords.tolist() == [[1, 2], [3, 4]]
    assert (found.patch_size, found.output_size, found.patch_level) == (256, 256, 1)
    assert found.footprint_px_l0 == (1024, 1024) and found.slide_size == (1200, 800)
    assert found.parameters == {} and found.tissue is None and found.mpp_um is None
    assert found.background == (0, 0, 0)


def test_reads_files_with_only_what_consumers_need(tmp_path: Path) -> None:
    found = read_coords(write_clam(tmp_path / "b.h5", np.array([[1, 2]], np.int32), patch_size=64,
                                   patch_level=0))
    assert (found.slide_id, found.coords.dtype, found.footprint_px_l0) == ("b", np.int64, (64, 64))


@pytest.mark.parametrize(("attrs", "coords", "words"), [
    ({"patch_level": 0}, [[1, 2]], "attribute 'patch_size'"),
    (CLAM, [1, 2], "shape"), (CLAM, [[1.5, 2.5]], "shape"),
    ({**CLAM, "downsample": 4.0}, [[1, 2]], "make no sense")])
def test_unusable_coords_are_named(attrs: dict[str, Any], coords: Any, words: str,
                                   tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("coords", data=np.array(coords)).attrs.update(attrs)
    with pytest.raises(BrokenFile, match=words):
        read_coords(tmp_path / "s.h5")


def test_files_of_older_versions_of_ours(tmp_path: Path) -> None:
    """They say nothing of layouts and magnifications."""
    write_h5(tmp_path / "s.h5", {"coords": np.array([[1, 2]])}, parameters={"sthresh": 8},
             attrs={"coords": {**CLAM, "patch_size": 512}},
             root={"output_size": 256, "slide_size": (1200, 801), "footprint_px_l0": (2048, 2048),
                   "step_px_l0": (1024, 1024), "mpp_um": 4.0, "slide_mpp_um": (0.5, 0.5),
                   "background": (255, 255, 255)})
    found = read_coords(tmp_path / "s.h5")
    assert (found.patch_size, found.output_size, found.patch_level) == (512, 256, 1)
    assert found.slide_size == (1200, 801) and found.step_px_l0 == (1024, 1024)
    assert (found.mpp_um, found.slide_mpp_um) == (4.0, (0.5, 0.5))
    assert found.parameters == {"sthresh": 8} and found.objective_power is None
    assert not found.level_free and found.background == (255, 255, 255)


def test_a_finer_level_reads_back(tmp_path: Path) -> None:
    descent = Descent(ratio=2, valid=np.array([True, False, True, True]), parent_sha256="ab")
    write_coords(tmp_path / "s.h5", patches(coords=np.arange(8).reshape(4, 2), descent=descent))
    found = read_coords(tmp_path / "s.h5").descent
    assert found is not None and (found.ratio, found.branching, found.parent_sha256) == (2, 4, "ab")
    assert found.valid.tolist() == [True, False, True, True]
    assert found.parent_index.tolist() == [0] * 4
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["parent_index"][()].tolist() == [0] * 4


def test_recorded_parameters_alone(tmp_path: Path) -> None:
    write_coords(tmp_path / "s.h5", patches())
    assert recorded_parameters(tmp_path / "s.h5") == {"sthresh": 8}
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["coords"] = np.zeros((2, 2))
    (tmp_path / "broken.h5").write_bytes(b"no h5")
    for name in ("clam.h5", "broken.h5", "missing.h5"):
        assert recorded_parameters(tmp_path / name) == {}


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenFile, match="missing"):
        read_coords(tmp_path / "s.h5")
    write_h5(tmp_path / "s.h5", {"features": np.zeros((2, 4), np.float32)}, parameters={})
    with pytest.raises(BrokenFile, match="holds no 'coords'"):
        read_coords(tmp_path / "s.h5")
    write_h5(tmp_path / "s.h5", {"coords": np.zeros((2, 2), np.int32),
                                 "imgs": np.zeros((2, 4, 4, 3), np.uint8)}, parameters={})
    with pytest.raises(BrokenFile, match="old pipeline"):
        read_coords(tmp_path / "s.h5")


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.0])
def test_a_cut_file_is_broken(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    write_coords(path, patches())
    raw = path.read_bytes()
    path.write_bytes(raw[:int(len(raw) * keep)])
    with pytest.raises(BrokenFile):
        read_coords(path)


def test_children_outside_the_slide_can_be_left_out(tmp_path: Path) -> None:
    valid = np.array([True, False, True, True] * 2)
    finer = patches(coords=np.arange(16).reshape(8, 2), tissue=None,
                    descent=Descent(ratio=2, valid=valid, parent_sha256="0" * 64))
    write_coords(tmp_path / "s.h5", finer)
    inside = read_coords_inside(tmp_path / "s.h5")
    assert inside.descent is None and len(read_coords(tmp_path / "s.h5")) == 8
    np.testing.assert_array_equal(inside.coords, finer.coords[valid])
