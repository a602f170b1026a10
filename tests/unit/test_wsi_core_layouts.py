"""Coordinates in the layouts of CLAM, TRIDENT and AtlasPatch: every field written, all files read.

The tables are those of the tools' own documents (AtlasPatch 1.0, TRIDENT 0.3, CLAM).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.slides import tissue_image, write_pyramid
from utils.errors import BrokenFile, Refused
from wsi_core.coords import Descent, PatchCoords, read_coords, write_coords
from wsi_core.layouts import LAYOUTS, coords_path, find_coords, list_coords, with_best_level
from wsi_core.slide import open_slide
from wsi_core.tissue import Tissue

COORDS = np.array([[5, 7], [261, 7], [5, 263]])
OUTLINE = np.array([[0, 0], [900, 0], [900, 700]], np.int32)

# 256 px of 0.5 um out of 128 px of a level of 1 um, on a slide of 0.25 um; steps of 192 px
PATCHES = PatchCoords(
    slide_id="s 1", coords=COORDS, patch_size=128, patch_level=1, output_size=256,
    level_downsample=(4.0, 4.0), level_size=(300, 200), slide_size=(1200, 801),
    footprint_px_l0=(512, 512), step_px_l0=(384, 384), mpp_um=0.5, slide_mpp_um=(0.25, 0.25),
    objective_power=40.0, background=(255, 255, 255),
    parameters={"slide_name": "s 1.svs", "sthresh": 8}, tissue=Tissue([OUTLINE], [[OUTLINE // 4]]))


def assert_same(after: PatchCoords, before: PatchCoords) -> None:
    for name in PatchCoords.__dataclass_fields__:
        if name not in ("coords", "tissue", "parameters"):
            assert getattr(after, name) == getattr(before, name), name
    assert after.coords.dtype == np.int64 and np.array_equal(after.coords, before.coords)
    assert dict(after.parameters) == dict(before.parameters)
    outlines = [None if patches.tissue is None else
                [outline.tolist() for piece, holes in zip(patches.tissue.contours,
                                                          patches.tissue.holes, strict=True)
                 for outline in (piece, *holes)] for patches in (after, before)]
    assert outlines[0] == outlines[1]


def written(path: Path, layout: Any, patches: PatchCoords = PATCHES, **places: Any
            ) -> tuple[dict[str, Any], dict[str, Any], np.ndarray, tuple[Any, ...]]:
    """(attributes of coords, of the root, coords, (dtype, maxshape)) of a file just written."""
    write_coords(path, patches, layout=layout, **places)
    with h5py.File(path) as file:
        data = file["coords"]
        return dict(data.attrs), dict(file.attrs), data[()], (data.dtype, data.maxshape)


def assert_table(found: dict[str, Any], table: dict[str, tuple[Any, Any]]) -> None:
    """Every field is there with its kind and value; kind is "i", "f", or "s" for text."""
    for name, (kind, value) in table.items():
        if kind == "s":
            assert isinstance(found[name], str) and found[name] == value, name
        else:
            assert np.asarray(found[name]).dtype.kind == kind, name
            assert np.asarray(found[name]).tolist() == value, name


# ---------------------------------------------------------------------------- what is written

CLAM = {
    "patch_size": ("i", 128), "patch_level": ("i", 1), "downsample": ("f", [4.0, 4.0]),
    "downsampled_level_dim": ("i", [300, 200]), "level_dim": ("i", [300, 200]),
    "name": ("s", "s 1"), "save_path": ("s", "OUT/patches")}
# as it is read: 128 px at 10x are what 256 px at 20x are
CLAMS_TRIDENT = {
    "patch_size_level0": ("i", 512), "level0_magnification": ("i", 40),
    "target_magnification": ("i", 10), "overlap": ("i", 32), "level0_width": ("i", 1200),
    "level0_height": ("i", 801), "savetodir": ("s", "OUT/patches")}
TRIDENT = {
    "patch_size": ("i", 256), "patch_size_level0": ("i", 512), "level0_magnification": ("i", 40),
    "target_magnification": ("i", 20), "overlap": ("i", 64), "level0_width": ("i", 1200),
    "level0_height": ("i", 801), "name": ("s", "s 1"), "savetodir": ("s", "OUT/patches")}
ATLASPATCH = {
    **{name: entry for name, entry in TRIDENT.items() if name not in ("name", "savetodir")},
    "wsi_path": ("s", "in/s 1.svs"), "filename": ("s", "s 1.svs"), "passport_version": ("i", 2),
    "num_patches": ("i", 3), "mpp": ("f", 0.25), "magnification": ("i", 40)}


def test_clams_fields(tmp_path: Path) -> None:
    attrs, _, coords, kind = written(tmp_path / "s.h5", "clam", save_path="OUT/patches")
    assert kind == (np.int64, (None, 2)) and coords.tolist() == COORDS.tolist()
    assert_table(attrs, CLAM | CLAMS_TRIDENT)
    assert set(attrs) == {*CLAM, *CLAMS_TRIDENT}


def test_tridents_fields(tmp_path: Path) -> None:
    attrs, root, coords, kind = written(tmp_path / "s_patches.h5", "trident",
                                        save_path="OUT/patches")
    assert kind == (np.int64, (None, 2)) and coords.tolist() == COORDS.tolist()
    assert_table(attrs, TRIDENT)
    assert set(attrs) == {*TRIDENT, "save_path"}, "CLAM would read 256 px of level 1"
    assert root["milwright_status"] == "complete" and root["read_size"] == 128


def test_trident_and_clam_agree_where_nothing_is_resized(tmp_path: Path) -> None:
    patches = replace(PATCHES, patch_size=128, output_size=128, mpp_um=1.0)
    attrs, *_ = written(tmp_path / "s_patches.h5", "trident", patches, save_path="OUT/patches")
    assert_table(attrs, CLAM | CLAMS_TRIDENT)


def test_atlaspatchs_fields(tmp_path: Path) -> None:
    attrs, root, coords, kind = written(tmp_path / "s.h5", "atlaspatch",
                                        slide_path=Path("in/s 1.svs"))
    assert attrs == {} and kind == (np.int32, (None, 5))
    assert coords.tolist() == [[x, y, 128, 128, 1] for x, y in COORDS.tolist()]
    assert_table(root, ATLASPATCH)
    assert root["creation_date"].endswith("+00:00") and "__x" in root["passport_format"]
    with h5py.File(tmp_path / "s.h5") as file:
        passports = file["passports"]
        assert (passports.dtype, passports.shape) == (np.dtype("S160"), (3,))
        assert passports[1] == b"s 1__x261_y7_rw128_rh128_lv1_mag40_tmag20_total3"


def test_magnifications_give_the_true_footprint(tmp_path: Path) -> None:
    """0.2738 um is not 40x: the quotient of the magnifications says what a patch covers."""
    patches = replace(PATCHES, slide_mpp_um=(0.2738, 0.2738), footprint_px_l0=(467, 467))
    attrs, *_ = written(tmp_path / "s.h5", "trident", patches)
    quotient = attrs["level0_magnification"] / attrs["target_magnification"]
    assert quotient * 256 == pytest.approx(467)
    unknown = replace(PATCHES, slide_mpp_um=None, mpp_um=None)
    attrs, *_ = written(tmp_path / "s.h5", "trident", unknown)
    assert (attrs["level0_magnification"], attrs["target_magnification"]) == (40, 20)
    attrs, *_ = written(tmp_path / "s.h5", "trident", replace(unknown, objective_power=None))
    assert np.isnan(attrs["level0_magnification"]) and np.isnan(attrs["target_magnification"])


def test_gaps_are_no_overlap(tmp_path: Path) -> None:
    attrs, *_ = written(tmp_path / "s.h5", "trident", replace(PATCHES, step_px_l0=(1024, 1024)))
    assert attrs["overlap"] == 0


def test_finer_levels_are_clams_alone(tmp_path: Path) -> None:
    finer = replace(PATCHES, descent=Descent(ratio=1, valid=np.ones(3, bool), parent_sha256="a"))
    for layout in ("trident", "atlaspatch"):
        with pytest.raises(Refused, match=f"layout clam, not {layout}"):
            write_coords(tmp_path / "s.h5", finer, layout=layout)
    assert not list(tmp_path.iterdir())


def test_features_of_the_same_coordinates_survive_a_rewriting(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    write_coords(path, PATCHES, layout="atlaspatch")
    with h5py.File(path, "r+") as file:
        file["features/uni"] = np.ones((3, 4), np.float32)
        file["features/uni"].attrs["note"] = "kept"
    write_coords(path, replace(PATCHES, background=(0, 0, 0)), layout="atlaspatch")
    with h5py.File(path) as file:
        assert file["features/uni"][()].sum() == 12
        assert file["features/uni"].attrs["note"] == "kept"
    write_coords(path, replace(PATCHES, coords=COORDS + 1), layout="atlaspatch")
    with h5py.File(path) as file:
        assert "features" not in file, "they were of other coordinates"


# ---------------------------------------------------------------------------- what is read

def write_foreign(path: Path, coords: Any, on_data: dict[str, Any],
                  on_file: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=coords).attrs.update(on_data)
        file.attrs.update(on_file or {})
    return path


THEIR_TRIDENT = {
    "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40,
    "target_magnification": 20, "overlap": 64, "name": "a.b", "savetodir": "/x",
    "level0_width": 1200, "level0_height": 801}
THEIR_ATLASPATCH = {
    "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40,
    "target_magnification": 20, "overlap": 64, "level0_width": 1200, "level0_height": 801,
    "wsi_path": "/in/a.b.svs", "filename": "a.b.svs", "passport_version": 2, "num_patches": 3}


def rows_of(*rows: tuple[int, ...], dtype: Any = np.int32) -> np.ndarray:
    return np.array(rows, dtype).reshape(len(rows), 5)


READ_ROWS = rows_of(*((x, y, 128, 128, 1) for x, y in COORDS.tolist()))


def test_the_three_tools_files_are_the_same_patches(tmp_path: Path) -> None:
    clam = read_coords(write_foreign(tmp_path / "1/a.b.h5", COORDS, {
        "patch_size": 128, "patch_level": 1, "downsample": (4.0, 4.0), "level_dim": (300, 200),
        "downsampled_level_dim": (300, 200), "name": "a.b", "save_path": "x"}))
    trident = read_coords(write_foreign(tmp_path / "a.b_patches.h5", COORDS, THEIR_TRIDENT))
    atlas = read_coords(write_foreign(tmp_path / "a.b.h5", READ_ROWS, {},
                                      {**THEIR_ATLASPATCH, "mpp": 0.25}))
    for found in (clam, trident, atlas):
        assert found.slide_id == "a.b" and found.coords.dtype == np.int64
        assert found.coords.tolist() == COORDS.tolist()
        assert found.footprint_px_l0 == (512, 512) and found.parameters == {}
    for found in (clam, atlas):
        assert (found.patch_size, found.patch_level, found.level_free) == (128, 1, False)
        assert found.level_downsample == (4.0, 4.0) and found.level_size == (300, 200)
    for found in (trident, atlas):
        assert found.output_size == 256 and found.step_px_l0 == (384, 384)
        assert found.slide_size == (1200, 801) and found.objective_power == 40.0
    assert (atlas.mpp_um, atlas.slide_mpp_um) == (0.5, (0.25, 0.25))
    assert (trident.mpp_um, trident.level_free) == (None, True)
    assert (trident.patch_size, trident.patch_level) == (512, 0), "right, though slow"


def test_tridents_legacy_coordinates(tmp_path: Path) -> None:
    """CLAM's attributes with a custom downsample: px of the level after shrinking."""
    found = read_coords(write_foreign(tmp_path / "a.h5", COORDS, {
        "patch_size": 256, "patch_level": 1, "custom_downsample": 2, "downsample": (4.0, 4.0)}))
    assert (found.patch_size, found.output_size) == (512, 256)
    assert found.footprint_px_l0 == (2048, 2048) and found.slide_id == "a"


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_any_integers_will_do(tmp_path: Path, dtype: Any) -> None:
    """... and fractional magnifications, floats where integers are usual, missing extras."""
    attrs = {"patch_size": 256.0, "level0_magnification": 40.0, "target_magnification": 12.5}
    found = read_coords(write_foreign(tmp_path / "a_patches.h5", COORDS.astype(dtype), attrs))
    assert found.slide_id == "a" and found.coords.dtype == np.int64
    assert found.footprint_px_l0 == found.step_px_l0 == (819, 819)
    found = read_coords(write_foreign(tmp_path / "a.h5", READ_ROWS.astype(dtype), {},
                                      {"patch_size": 256, "patch_size_level0": 512}))
    assert (found.patch_size, found.step_px_l0, found.slide_size) == (128, (512, 512), (0, 0))


@pytest.mark.parametrize("empty", [np.empty((0, 2), np.int64), np.empty(0), np.empty((0, 5), "i4")])
def test_slides_without_patches(tmp_path: Path, empty: np.ndarray) -> None:
    five = empty.ndim == 2 and empty.shape[1] == 5
    found = read_coords(write_foreign(tmp_path / "a.h5", empty, {} if five else THEIR_TRIDENT,
                                      THEIR_ATLASPATCH if five else None))
    assert len(found) == 0 and found.coords.shape == (0, 2)
    assert (found.output_size, found.footprint_px_l0) == (256, (512, 512))


MIXED = READ_ROWS.copy()
MIXED[2, 4] = 0
OBLONG = READ_ROWS.copy()
OBLONG[:, 2] = 64


@pytest.mark.parametrize(("coords", "on_data", "on_file", "words"), [
    (MIXED, {}, THEIR_ATLASPATCH, "not all read alike"),
    (OBLONG, {}, THEIR_ATLASPATCH, "not square"),
    (READ_ROWS.astype(float), {}, THEIR_ATLASPATCH, r"float64, expected \(N, 5\)"),
    (READ_ROWS, {}, {"patch_size_level0": 512}, "attribute 'patch_size'"),
    (READ_ROWS, {}, {"patch_size": 256}, "'patch_size_level0' nor 'level0_magnification'"),
    (READ_ROWS[:, :3], {}, THEIR_ATLASPATCH, "shape|patch_size"),
    (COORDS, {"patch_size_level0": 512}, {}, "attribute 'patch_size'"),
    (COORDS, {**THEIR_TRIDENT, "patch_size": "big"}, {}, "make no sense"),
    (COORDS, {**THEIR_TRIDENT, "patch_size_level0": 0}, {}, "make no sense"),
    (COORDS, {"patch_size": 256, "level0_magnification": 40, "target_magnification": 0}, {},
     "make no sense"),
    (COORDS, {"patch_size": 256, "level0_magnification": np.nan, "target_magnification": 20}, {},
     "make no sense"),
])
def test_unusable_files_are_named(tmp_path: Path, coords: Any, on_data: dict[str, Any],
                                  on_file: dict[str, Any], words: str) -> None:
    path = write_foreign(tmp_path / "a.h5", coords, on_data, on_file)
    with pytest.raises(BrokenFile, match=words) as caught:
        read_coords(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [0.99, 0.5, 0.0])
def test_a_cut_file_is_broken(tmp_path: Path, layout: Any, keep: float) -> None:
    path = tmp_path / "s.h5"
    write_coords(path, PATCHES, layout=layout)
    raw = path.read_bytes()
    path.write_bytes(raw[:int(len(raw) * keep)])
    with pytest.raises(BrokenFile):
        read_coords(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_altered_coordinates_fail_their_checksum(tmp_path: Path, layout: Any) -> None:
    path = tmp_path / "s.h5"
    write_coords(path, PATCHES, layout=layout)
    with h5py.File(path, "r+") as file:
        file["coords"][1, 0] += 1
    with pytest.raises(BrokenFile, match="checksum"):
        read_coords(path)


# ---------------------------------------------------------------------------- the level to read

def test_tridents_patches_get_the_best_level_of_their_slide(tmp_path: Path) -> None:
    slide_path = tmp_path / "a.tif"
    write_pyramid(slide_path, tissue_image(1024, 768))
    with open_slide(slide_path) as slide:
        attrs = {**THEIR_TRIDENT, "patch_size": 64, "patch_size_level0": 160, "overlap": 0}
        found = read_coords(write_foreign(tmp_path / "a_patches.h5", COORDS, attrs))
        best = with_best_level(found, slide)
        assert slide.level_downsamples[1] == (2.0, 2.0)
        assert (best.patch_level, best.patch_size, best.output_size) == (1, 80, 64)
        assert best.footprint_px_l0 == (160, 160) and not best.level_free
        assert best.level_size == slide.level_dimensions[1] and best.slide_size == (1024, 768)
        assert slide.mpp_um is not None
        assert best.mpp_um == pytest.approx(slide.mpp_um[0] * 160 / 64)
        enlarged = with_best_level(replace(found, output_size=320), slide)
        assert (enlarged.patch_level, enlarged.patch_size) == (0, 160)
        assert with_best_level(best, slide) is best
        low, high = (slide.read_region((261, 7), patches.patch_level, (patches.patch_size,) * 2)
                     for patches in (best, found))
        reduced = high.reshape(80, 2, 80, 2, 3).mean(axis=(1, 3))
        assert np.abs(reduced - low).mean() < 3, "the same place"


def test_the_tools_read_the_same_pixels(tmp_path: Path) -> None:
    """Each layout read as its tool documents it, with OpenSlide alone."""
    import openslide

    slide_path = write_pyramid(tmp_path / "s 1.tif", tissue_image(1024, 768))
    patches = replace(PATCHES, patch_size=80, output_size=64, level_downsample=(2.0, 2.0),
                      level_size=(512, 384), slide_size=(1024, 768), footprint_px_l0=(160, 160),
                      step_px_l0=(160, 160))
    with open_slide(slide_path) as ours:
        wanted = [ours.read_region((x, y), 1, (80, 80)) for x, y in COORDS.tolist()]
    with openslide.OpenSlide(slide_path) as theirs:
        def read(place: Any, level: Any, side: Any) -> np.ndarray:
            size = (int(side), int(side))
            region = theirs.read_region((int(place[0]), int(place[1])), int(level), size)
            return np.asarray(region.convert("RGB"))

        attrs, _, coords, _ = written(tmp_path / "s.h5", "clam", patches)
        for place, pixels in zip(coords, wanted, strict=True):
            assert np.array_equal(read(place, attrs["patch_level"], attrs["patch_size"]), pixels)
        _, root, coords, _ = written(tmp_path / "s.h5", "atlaspatch", patches)
        assert int(root["patch_size"]) == 64
        for (x, y, width, height, level), pixels in zip(coords, wanted, strict=True):
            assert width == height
            assert np.array_equal(read((x, y), level, width), pixels)
        attrs, _, coords, _ = written(tmp_path / "s.h5", "trident", patches)
        side = (attrs["patch_size"] * attrs["level0_magnification"]
                / attrs["target_magnification"])  # of level 0; TRIDENT shrinks to patch_size
        assert (side, attrs["patch_size"]) == (160, 64) and coords.shape == (3, 2)


# ---------------------------------------------------------------------------- places

def test_where_files_go() -> None:
    def path(layout: Any, **scale: Any) -> str:
        return str(coords_path(Path("out"), "a.b", layout, patch_px=256, overlap_px=32, **scale))

    assert path("clam") == path("atlaspatch", mpp_um=0.5) == "out/patches/a.b.h5"
    assert path("trident", mpp_um=0.5) == "out/20x_256px_32px_overlap/patches/a.b_patches.h5"
    assert path("trident", mpp_um=0.8) == "out/12.5x_256px_32px_overlap/patches/a.b_patches.h5"
    assert path("trident", patch_level=1).startswith("out/level1_256px_32px_overlap/")
    assert path("trident", custom_downsample=2).startswith("out/level0down2_256px_32px_overlap/")


def test_files_are_found_in_any_layout(tmp_path: Path) -> None:
    assert find_coords(tmp_path, "a") == tmp_path / "patches" / "a.h5"
    assert list_coords(tmp_path) == {}
    wanted = {}
    for slide_id, layout in zip("abc", LAYOUTS, strict=True):
        wanted[slide_id] = coords_path(tmp_path, slide_id, layout, patch_px=256, overlap_px=0,
                                       mpp_um=0.5)
    wanted["d"] = tmp_path / "patches" / "d_patches.h5"  # TRIDENT's own folder
    for slide_id, path in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_coords(path, replace(PATCHES, slide_id=slide_id),
                     layout="atlaspatch" if slide_id == "c" else "trident")
    assert list_coords(tmp_path) == wanted
    assert {slide_id: find_coords(tmp_path, slide_id) for slide_id in wanted} == wanted
    assert find_coords(tmp_path / "20x_256px_0px_overlap", "b") == wanted["b"]


def test_a_slide_in_two_folders_is_refused(tmp_path: Path) -> None:
    for folder in ("20x_256px_0px_overlap", "10x_256px_0px_overlap"):
        write_foreign(tmp_path / folder / "patches" / "a_patches.h5", COORDS, THEIR_TRIDENT)
    for call in (lambda: find_coords(tmp_path, "a"), lambda: list_coords(tmp_path)):
        with pytest.raises(Refused, match=r"2 folders: .*10x_256px.*, .*20x_256px.*--data_h5_dir"):
            call()
    write_foreign(tmp_path / "patches" / "a.h5", COORDS, CLAM_MINIMUM)
    assert find_coords(tmp_path, "a") == list_coords(tmp_path)["a"] == tmp_path / "patches/a.h5"


CLAM_MINIMUM = {"patch_size": 256, "patch_level": 0}


def test_a_slide_whose_name_ends_like_tridents_files(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "patches" / "a_patches.h5", COORDS,
                         {**CLAM_MINIMUM, "name": "a_patches"})
    assert list_coords(tmp_path) == {"a_patches": path}
    assert find_coords(tmp_path, "a") == tmp_path / "patches" / "a.h5"
    path.write_bytes(b"broken")
    assert list_coords(tmp_path) == {"a": path}
    with pytest.raises(BrokenFile):
        read_coords(find_coords(tmp_path, "a"))
