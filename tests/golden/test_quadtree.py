"""Derived coordinates equal to those of HAG-MIL's quadtree script, row by row.

``hagmil_quadtree.json`` is the case of ``shared/golden/public/hagmil.json``: a 4-2-1 pyramid, three
levels. Its files have one row a chunk and two attributes; ours are complete.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.conftest import GOLDEN
from wsi_core.coords import PatchCoords, read_coords, write_coords
from wsi_core.hierarchy import Child, derive

CASES = json.loads((GOLDEN / "hagmil_quadtree.json").read_text())


@dataclass
class Pyramid:
    """What ``derive`` asks of an open slide."""

    path: Path
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[tuple[float, float], ...]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_quadtree(case: dict[str, Any], tmp_path: Path) -> None:
    sizes = [tuple(case[f"level_{level}"].get("attrs", case[f"level_{level}"])["level_dim"])
             for level in range(3)]
    slide: Any = Pyramid(tmp_path / "a.svs", tuple(sizes), ((1.0, 1.0), (2.0, 2.0), (4.0, 4.0)))
    side = case["patch_size"]
    parent = PatchCoords(
        slide_id="a", coords=np.array(case["level_2"]["coords"]), patch_size=side, patch_level=2,
        output_size=side, level_downsample=(4.0, 4.0), level_size=sizes[2], slide_size=sizes[0],
        footprint_px_l0=(4 * side, 4 * side), step_px_l0=(4 * side, 4 * side))
    for level in (1, 0):
        parent = derive(slide, parent, Child(level=level), parameters={})
        golden = case[f"level_{level}"]
        write_coords(path := tmp_path / f"{level}.h5", parent)
        with h5py.File(path) as file:
            coords = file["coords"]
            assert coords[()].tolist() == golden["coords"]
            assert (coords.dtype, coords.maxshape) == (golden["dtype"], (None, 2))
            for name, value in golden["attrs"].items():
                assert np.array_equal(coords.attrs[name], value), name
            assert {"downsample", "downsampled_level_dim", "name", "save_path"} <= {*coords.attrs}
            assert file["parent_index"][()].tolist() == [row // 4 for row in range(len(coords))]
        assert read_coords(path).coords.tolist() == golden["coords"]
