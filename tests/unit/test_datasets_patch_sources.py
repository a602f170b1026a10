"""Sources of patches: an LMDB and its levels, slides and their coordinates; true colours, exact
ids, nothing open afterwards."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datasets.patch_sources import PatchSource, open_source
from tests.feature_inputs import make_inputs, make_levels, write_patches
from tests.patch_lmdbs import HIGH, noise, store_patches
from tests.unit.test_wsi_core_patch_lmdb import published
from utils.errors import ItemFailed, Refused
from wsi_core.coords import read_coords, write_coords
from wsi_core.patch_images import patch_reader
from wsi_core.slide import open_slide


def source(text: object, *, slides: Path | None = None, ext: str = ".tif") -> PatchSource:
    return open_source(str(text), flag="--patches", slide_dir=slides, slide_ext=ext)


def read_all(one: PatchSource, slide_id: str, *, threads: int = 1) -> np.ndarray:
    with one.reading(slide_id, threads=threads) as read:
        return np.stack([read(row) for row in range(one.facts(slide_id).count)])


# ---------------------------------------------------------------------------- an LMDB

def test_patches_of_an_lmdb(tmp_path: Path) -> None:
    pixels = {f"s-{n}": noise(n, seed=n) for n in (1, 10)}
    one = source(store_patches(tmp_path / "p.lmdb", pixels))
    assert one.slides() == ["s-1", "s-10"] and one.kind == "lmdb"
    assert np.array_equal(read_all(one, "s-10"), pixels["s-10"])
    facts = one.facts("s-10")
    assert (facts.count, facts.px, facts.mpp_um, facts.footprint_px_l0, facts.encoding) == (
        10, 32, 0.5, 32, "png")
    coords = one.coords("s-10")
    assert coords is not None and coords.shape == (10, 2) and coords[5].tolist() == [32, 32]
    status = (tmp_path / "p.lmdb").stat()
    assert one.stamps("s-1") == [(status.st_size, status.st_mtime_ns)]
    for slide_id in ("s", "s-", "s-0", "s-100", "S-1"):  # ids match exactly
        assert one.lacks(slide_id)
        with pytest.raises(ItemFailed, match=f"no slide '{slide_id}'"):
            one.facts(slide_id)
    assert not one.lacks("s-1")


def test_a_level_of_an_lmdb_is_named_behind_a_hash(tmp_path: Path) -> None:
    path = store_patches(tmp_path / "a#b.lmdb", {"s": noise(2)}, level=HIGH, finish=False)
    store_patches(path, {"s": noise(3)})
    assert source(path).facts("s").count == 3  # the coarse one
    assert source(f"{path}#{HIGH}").facts("s").count == 2
    with pytest.raises(Refused, match=r"no level 'level_9': .* a#b.lmdb, a#b.lmdb#level_0"):
        source(f"{path}#level_9")
    only = store_patches(tmp_path / "one.lmdb", {"s": noise(2)}, level=HIGH)
    assert source(only).facts("s").count == 2


def test_an_lmdb_of_abmilx_has_true_colours_and_no_coordinates(tmp_path: Path) -> None:
    one = source(published(tmp_path / "x.lmdb", {"s-1": 2, "s-10": 3}))
    assert one.kind == "abmilx lmdb" and one.facts("s-1").count == 2 and one.coords("s-1") is None
    assert read_all(one, "s-10")[2, 8, 8].tolist() == pytest.approx([254, 0, 0], abs=2)
    assert one.facts("s-1").px is None and one.lacks("s-")


# ---------------------------------------------------------------------------- slides

def test_patches_of_slides_are_those_of_the_features(tmp_path: Path) -> None:
    """Read at the level of the h5 and resized as it says; each thread has its own handle."""
    inputs = make_inputs(tmp_path, (5, 0, 3))
    write_patches(inputs.patches_root, "slide_2", np.array([[64, 0], [512, 384]]), patch_px=48,
                  output_px=32, level=1)
    one = source(inputs.patches_root, slides=inputs.slides, ext="tif")
    assert one.kind == "coordinates" and one.slides() == ["slide_0", "slide_1", "slide_2"]
    patches = read_coords(inputs.patches_root / "patches" / "slide_2.h5")
    with open_slide(inputs.slides / "slide_2.tif") as slide:
        read = patch_reader(slide, patches)
        expected = np.stack([read(0), read(1)])
    assert np.array_equal(read_all(one, "slide_2"), expected) and expected.shape[1:] == (32, 32, 3)
    facts = one.facts("slide_2")
    assert (facts.count, facts.px, facts.footprint_px_l0) == (2, 32, 96)
    assert np.array_equal(one.coords("slide_2"), patches.coords)  # type: ignore[arg-type]
    assert len(one.stamps("slide_2")) == 2 and one.facts("slide_1").count == 0


def test_patches_of_other_tools_layouts(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, (4,))
    plain = inputs.patches_root / "patches" / "slide_0.h5"
    patches = read_coords(plain)
    expected = read_all(source(inputs.patches_root, slides=inputs.slides), "slide_0")
    trident = tmp_path / "trident" / "20x_64px_0px_overlap" / "patches" / "slide_0_patches.h5"
    atlas = tmp_path / "atlas" / "patches" / "slide_0.h5"
    for path, layout in ((trident, "trident"), (atlas, "atlaspatch")):
        path.parent.mkdir(parents=True)
        write_coords(path, replace(patches, objective_power=20.0), layout=layout)  # type: ignore[arg-type]
        one = source(tmp_path / path.relative_to(tmp_path).parts[0], slides=inputs.slides)
        assert one.slides() == ["slide_0"] and not one.lacks("slide_0")
        assert np.array_equal(read_all(one, "slide_0"), expected)


def test_children_outside_the_slide_are_left_out(tmp_path: Path) -> None:
    inputs = make_levels(tmp_path, (3,))
    root = tmp_path / "out_level_1_corresponding"
    path = root / "patches" / "slide_0.h5"
    patches = read_coords(path)
    assert patches.descent is not None
    valid = np.arange(len(patches)) % 3 > 0
    write_coords(path, replace(patches, descent=replace(patches.descent, valid=valid)))
    one = source(root, slides=inputs.slides)
    assert one.facts("slide_0").count == valid.sum() < len(patches)
    assert np.array_equal(one.coords("slide_0"), patches.coords[valid])  # type: ignore[arg-type]


def test_another_slide_in_the_place_is_noticed(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, (2, 2))
    path = inputs.patches_root / "patches" / "slide_0.h5"
    patches = read_coords(path)
    size = (inputs.slides / "slide_0.tif").stat().st_size
    write_coords(path, replace(patches, parameters={"slide_bytes": size + 1}))
    one = source(inputs.patches_root, slides=inputs.slides)
    with pytest.raises(ItemFailed, match=r"slide_0.tif: is not the slide that .* was made from"):
        one.facts("slide_0")
    assert one.facts("slide_1").count == 2


def test_nothing_stays_open(tmp_path: Path) -> None:
    """Handles on slides are closed with the block, also when it ends early; a source pickles."""
    inputs = make_inputs(tmp_path, (3,))
    one = source(inputs.patches_root, slides=inputs.slides)
    again = pickle.loads(pickle.dumps(one))  # noqa: S301

    def open_slides() -> list[str]:
        links = (Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
        return [target for link in links if link.is_symlink()
                and (target := os.readlink(link)).startswith(str(tmp_path))
                    and target.endswith(".tif")]

    with again.reading("slide_0", threads=2) as read:
        read(0)
        assert open_slides()
    assert not open_slides()
    with pytest.raises(ZeroDivisionError), again.reading("slide_0", threads=1) as read:
        read(1)
        print(1 // 0)
    assert not open_slides()


# ---------------------------------------------------------------------------- refused

def test_what_is_no_source_is_refused_with_the_next_step(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "made", (1,))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.lmdb").write_text("no database" * 1000)
    store_patches(tmp_path / "begun.lmdb", {"s": noise(1)}, finish=False)
    for text, slides, reason in (
            (tmp_path / "none.lmdb", None, "there is no .*none.lmdb: give an LMDB"),
            (f"{tmp_path / 'none.lmdb'}#level_0", None, r"there is no \S*none.lmdb:"),
            (tmp_path / "text.lmdb", None, "cannot be opened as an LMDB"),
            (tmp_path / "begun.lmdb", None, "never finished"),
            (tmp_path / "empty", None, "no folder 'patches': give the --save_dir"),
            (inputs.patches_root, None, "give --data_slide_dir too"),
            (inputs.patches_root, tmp_path / "nowhere", "--data_slide_dir: there is no folder"),
            (f"{inputs.patches_root}#level_0", inputs.slides, "folder of coordinates, which has")):
        with pytest.raises(Refused, match=reason) as caught:
            source(text, slides=slides)
        assert "\n" not in str(caught.value)
    assert source(inputs.patches_root, slides=inputs.slides, ext=".svs").lacks("slide_0").endswith(
        "slide_0.svs")
    assert source(inputs.patches_root, slides=inputs.slides).lacks("slide_").endswith("slide_.h5")
