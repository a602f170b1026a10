"""create_patches_fp.py on a Dask cluster: the same files as at home, whoever does the work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest

import create_patches_fp
import extract_features_fp
from utils.errors import Refused
from utils.storage import RECORD_DIGEST, read_h5

FLAGS = ("--seg", "--patch", "--patch_mpp", "1", "--patch_size", "64", "--lattice", "global",
         "--segmenter", "otsu", "--seg_mpp", "4", "--min_area_um2", "3000")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True,
                                  dashboard_address=":0") as cluster:
        yield str(cluster.scheduler_address)


def patch(source: Path, out: Path, *flags: object) -> dict[str, Any]:
    code = create_patches_fp.main(["--source", str(source), "--save_dir", str(out),
                                   *FLAGS, *map(str, flags)])
    assert code == 0
    return {path.name: read_h5(path) for path in sorted((out / "patches").glob("*.h5"))}


def extract(source: Path, out: Path, feat_dir: Path, *flags: object) -> dict[str, np.ndarray]:
    code = extract_features_fp.main([
        "--data_h5_dir", str(out), "--data_slide_dir", str(source), "--slide_ext", ".tif",
        "--feat_dir", str(feat_dir), "--model_name", "efficientnet_lite0", "--device", "cpu",
        "--target_patch_size", "64", *map(str, flags)])
    assert code == 0
    return {path.stem: read_h5(path).arrays["features"]
            for path in sorted((feat_dir / "h5_files").glob("*.h5"))}


def test_local_and_cluster_give_the_same_coordinates_and_features(
    slide_folder: Path, tmp_path: Path, scheduler: str,
) -> None:
    home = patch(slide_folder, tmp_path / "home", "--workers", 1)
    away = patch(slide_folder, tmp_path / "away", "--scheduler", scheduler)
    many = patch(slide_folder, tmp_path / "many", "--workers", 4)
    assert len(home) == 3 and set(home) == set(away) == set(many)
    for name, file in home.items():
        assert len(file.arrays["coords"]) > 10
        for other in (away[name], many[name]):
            assert other.parameters == file.parameters
            assert other.root[RECORD_DIGEST] == file.root[RECORD_DIGEST]
            assert np.array_equal(other.arrays["coords"], file.arrays["coords"])
    one = extract(slide_folder, tmp_path / "home", tmp_path / "f1", "--workers", 1)
    for name, flags in (("f4", ("--workers", 4)), ("fd", ("--scheduler", scheduler))):
        other_features = extract(slide_folder, tmp_path / "home", tmp_path / name, *flags)
        assert set(one) == set(other_features)
        for slide, features in one.items():
            np.testing.assert_allclose(other_features[slide], features, rtol=0, atol=1e-5)


def test_a_cluster_that_is_not_there(slide_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="tcp://127.0.0.1:9"):
        patch(slide_folder, tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9")
