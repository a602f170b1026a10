"""create_patches_fp.py on a Dask cluster: the same files as at home, whoever does the work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest

import create_patches_fp
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


def test_local_and_cluster_give_the_same_coordinates(
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


def test_a_cluster_that_is_not_there(slide_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="tcp://127.0.0.1:9"):
        patch(slide_folder, tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9")
