"""Coordinates, contours and levels equal to CLAM's (commit 53e2409), value by value and in order.

``clam_coords.json`` holds the runs, ``clam_coords.npz`` their contours and coordinates as
differences of successive points; both were packed from ``shared/golden/*_public.*``, all 1075
runs kept. 651 of them have contours and are checked by the grid test alone; those whose slide is
at hand (the pictures are drawn by ``fill.py``) are also run from the pixels.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.conftest import GOLDEN
from tests.golden import fill
from utils.errors import SlideError
from wsi_core.find_tissue import automatic_level
from wsi_core.grid import patch_grid
from wsi_core.presets import PatchingParameters
from wsi_core.slide import nominal_downsample, open_slide, read_level
from wsi_core.tissue import Tissue, segment_image

RECORD = json.loads((GOLDEN / "clam_coords.json").read_text())
PICTURES = {"pictures/picture_a.png": (3000, 2200, 5), "pictures/picture_c.png": (900, 700, 7)}
EMPTY = np.empty((0, 2), np.int64)


def unpack(names: np.ndarray, steps: np.ndarray, ends: np.ndarray) -> dict[str, np.ndarray]:
    points = np.cumsum(steps, axis=0)
    return dict(zip(names.tolist(), np.split(points, ends[:-1]), strict=True))


@pytest.fixture(scope="module")
def coords() -> dict[str, np.ndarray]:
    data = np.load(GOLDEN / "clam_coords.npz")
    return unpack(data["run_ids"], data["coord_steps"], data["coord_ends"])


@pytest.fixture(scope="module")
def tissues() -> dict[str, Tissue]:
    data = np.load(GOLDEN / "clam_coords.npz")
    outlines = unpack(data["contour_names"], data["contour_steps"], data["contour_ends"])
    members: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, outline in outlines.items():
        group, member = name.split("/")
        members[group][member] = outline.astype(np.int32)
    found = {}
    for group, parts in members.items():
        count = sum("_" not in member for member in parts)
        found[group] = Tissue(
            [parts[f"c{i}"] for i in range(count)],
            [[parts[f"c{i}_h{j}"] for j in range(sum(m.startswith(f"c{i}_h") for m in parts))]
             for i in range(count)])
    return found


def grid_of(run: dict[str, Any], tissue: Tissue, size: tuple[int, int],
            downsample: tuple[float, float]) -> np.ndarray:
    scale = [nominal_downsample(factor) for factor in downsample]
    return patch_grid(
        tissue, patch_px_l0=(run["patch_size"] * scale[0], run["patch_size"] * scale[1]),
        step_px_l0=(run["step_size"] * scale[0], run["step_size"] * scale[1]), slide_size=size,
        contour_fn=run["params"]["contour_fn"], use_padding=run["params"]["use_padding"])


def test_grid_on_clams_contours(coords: dict[str, np.ndarray], tissues: dict[str, Tissue]) -> None:
    checked = 0
    for run in RECORD["runs"]:
        if run["contour_set"] is None:
            continue
        slide = RECORD["slides"][run["slide"]]
        factor = slide["level_downsamples"][run["patch_level"]]
        grid = grid_of(run, tissues[run["contour_set"]], tuple(slide["level_dimensions"][0]),
                       (factor, factor))
        assert np.array_equal(grid, coords.get(run["id"], EMPTY)), run["id"]
        assert grid.dtype == np.int64
        checked += 1
    assert checked == 651


def check_slide(name: str, path: Path, coords: dict[str, np.ndarray],
                tissues: dict[str, Tissue]) -> None:
    """Level choice, contours, counts, coordinates and attributes of every run on a slide."""
    runs = [run for run in RECORD["runs"] if run["slide"] == name]
    assert runs
    with open_slide(path) as slide:
        assert [list(size) for size in slide.level_dimensions] == (
            RECORD["slides"][name]["level_dimensions"])
        levels: dict[int, Any] = {}
        segmented: dict[str, Tissue] = {}
        for run in runs:
            parameters = PatchingParameters(**run["params"])
            level = automatic_level(slide, parameters.seg_level)
            if level not in levels:
                levels[level] = read_level(slide, level)
            key = str({k: v for k, v in run["params"].items()
                       if k not in ("use_padding", "contour_fn")})
            if key not in segmented:
                segmented[key] = segment_image(*levels[level], parameters)
            tissue = segmented[key]
            if "error" in run:  # no contour at all: CLAM's batch ends there, ours has no tissue
                assert not tissue.contours, run["id"]
                continue
            assert level == run["seg_level_used"]
            assert (len(tissue.contours), tissue.n_holes) == (run["n_contours"], run["n_holes"])
            if run["contour_set"] is not None:
                wanted = tissues[run["contour_set"]]
                assert all(map(np.array_equal, tissue.contours, wanted.contours)), run["id"]
            grid = grid_of(run, tissue, slide.level_dimensions[0],
                           slide.level_downsamples[run["patch_level"]])
            assert np.array_equal(grid, coords.get(run["id"], EMPTY)), run["id"]


@pytest.mark.parametrize("name", [*PICTURES, "pictures/blank_800x600_250.png"])
def test_pictures(name: str, tmp_path: Path, coords: dict[str, np.ndarray],
                  tissues: dict[str, Tissue]) -> None:
    if name in PICTURES:
        width, height, seed = PICTURES[name]
        image = fill.picture(width, height, seed)
    else:
        image = np.full((600, 800, 3), 250, np.uint8)
    cv2.imwrite(str(tmp_path / "picture.png"), image[:, :, ::-1])
    check_slide(name, tmp_path / "picture.png", coords, tissues)


PUBLIC = [name for name, slide in RECORD["slides"].items()
          if name.startswith("public/") and "open_error" not in slide]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_slides(name: str, shared: Path, coords: dict[str, np.ndarray],
                       tissues: dict[str, Tissue]) -> None:
    check_slide(name, shared / "data" / name.removeprefix("public/"), coords, tissues)


@pytest.mark.parametrize("name", [name for name, slide in RECORD["slides"].items()
                                  if "open_error" in slide])
def test_slides_that_clam_cannot_open_either(name: str, shared: Path) -> None:
    with pytest.raises(SlideError):
        open_slide(shared / "data" / name.removeprefix("public/"))
