"""create_patches_fp.py: overlays, patch images, filters, LMDB, layouts, folders of folders."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

import create_patches_fp
from tests.slides import tissue_image, write_pyramid
from utils.errors import Refused
from wsi_core.coords import PatchCoords, read_coords

SCALE = ("--patch_mpp", 1, "--patch_size", 64, "--lattice", "global")
SMALL = ("--seg_mpp", 4, "--min_area_um2", 3000, "--min_hole_um2", 3000)


def run(source: Path, out: Path, *flags: object) -> int:
    return create_patches_fp.main(["--source", str(source), "--save_dir", str(out), "--seg",
                                   "--patch", *map(str, (*SCALE, *SMALL, *flags))])


def coords(out: Path, slide: str = "a") -> PatchCoords:
    return read_coords(out / "patches" / f"{slide}.h5")


def statuses(out: Path) -> set[str]:
    with (out / "report_patches.csv").open() as file:
        return {row["status"] for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    write_pyramid(folder / "a.tif", tissue_image(2048, 2048, seed=3), mpp=0.5)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_overlays_of_every_kind(source: Path, out: Path) -> None:
    assert run(source, out, "--visualize", "mask", "contours", "grid") == 0
    names = {path.name for path in (out / "visualization").iterdir()}
    assert names == {"a_mask.png", "a_mask_bw.png", "a_contours.png", "a_grid.png"}
    black_white = cv2.imread(str(out / "visualization/a_mask_bw.png"), cv2.IMREAD_GRAYSCALE)
    assert set(np.unique(black_white)) == {0, 255}
    for path in (out / "visualization").iterdir():
        path.unlink()
    assert run(source, out, "--visualize", "grid") == 0  # later, from the coordinates
    assert [path.name for path in (out / "visualization").iterdir()] == ["a_grid.png"]
    assert run(source, out, "--visualize", "grid") == 0 and statuses(out) == {"already done"}


@pytest.mark.parametrize(("kind", "suffix"), [("png", ".png"), ("jpeg", ".jpg")])
def test_patch_images(kind: str, suffix: str, source: Path, out: Path) -> None:
    assert run(source, out, "--save_images", kind) == 0
    found = coords(out)
    images = sorted((out / "images/a").iterdir())
    assert len(images) == len(found)
    x, y = found.coords[0]
    picture = cv2.imread(str(out / f"images/a/a_x{x}_y{y}{suffix}"))
    assert picture.shape == (64, 64, 3)
    truth = cv2.resize(tissue_image(2048, 2048, seed=3)[y:y + 128, x:x + 128], (64, 64),
                       interpolation=cv2.INTER_AREA)
    assert np.abs(picture[:, :, ::-1].astype(int) - truth).mean() < 8
    images[0].unlink()
    assert run(source, out, "--save_images", kind) == 0
    assert len(list((out / "images/a").iterdir())) == len(found)


def test_images_may_be_fewer_and_smaller(source: Path, out: Path, tmp_path: Path) -> None:
    run(source, out, "--save_images", "jpeg", "--max_images", 5, "--jpeg_quality", 30)
    run(source, tmp_path / "b", "--save_images", "jpeg", "--max_images", 5, "--jpeg_quality", 95)
    small, large = (sorted((folder / "images/a").iterdir()) for folder in (out, tmp_path / "b"))
    assert [path.name for path in small] == [path.name for path in large] and len(small) == 5
    assert sum(path.stat().st_size for path in small) < sum(path.stat().st_size for path in large)


def test_white_and_black_patches_are_left_out(tmp_path: Path, out: Path) -> None:
    """A patch that the mask takes for tissue, but whose pixels are glass, or black."""
    folder = tmp_path / "s"
    folder.mkdir()
    image = np.full((1024, 1024, 3), (190, 110, 170), np.uint8)
    image[384:640, 384:512], image[384:640, 512:640] = 250, 5
    write_pyramid(folder / "a.tif", image, mpp=0.5)
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    cv2.imwrite(str(masks / "a.png"), mask)
    given = ("--source", folder, "--seg", "--patch", *SCALE, *SMALL[2:], "--segmenter", "mask",
             "--mask_dir", masks)

    def kept(name: str, *flags: object) -> set[tuple[int, int]]:
        create_patches_fp.main([*map(str, (*given, "--save_dir", out / name, *flags))])
        return {(int(x), int(y)) for x, y in coords(out / name).coords}

    everything = kept("all")
    white, black = {(384, 384), (384, 512)}, {(512, 384), (512, 512)}
    assert white | black <= everything
    assert everything - kept("white", "--white_thresh", 15) == white
    assert everything - kept("black", "--black_thresh", 50) == black
    assert kept("strict", "--white_thresh", 15, "--black_thresh", 0) == everything - white


@pytest.mark.parametrize("kind", ["jpeg", "jpeg420", "png", "webp"])
def test_patches_packed_into_an_lmdb(kind: str, source: Path, out: Path) -> None:
    from wsi_core.patch_lmdb_reader import PatchLmdbReader

    assert run(source, out, "--save_lmdb", "p", "--image_format", kind) == 0
    with PatchLmdbReader(out / "p.lmdb") as reader:
        assert len(reader) == len(coords(out))
        assert reader[0].shape == (64, 64, 3)
    assert not (out / "p.lmdb.parts").exists()
    before = (out / "p.lmdb").stat().st_mtime_ns
    assert run(source, out, "--save_lmdb", "p", "--image_format", kind) == 0
    assert (out / "p.lmdb").stat().st_mtime_ns == before and statuses(out) == {"already done"}
    with pytest.raises(Refused, match="not a plain name"):
        run(source, out, "--save_lmdb", "../p")


def test_an_lmdb_of_several_magnifications(source: Path, out: Path) -> None:
    from wsi_core.patch_lmdb_reader import PatchLmdbReader

    assert run(source, out, "--child_mpp", 0.5, "--save_lmdb", "p", "--jpeg_quality", 50) == 0
    with PatchLmdbReader(out / "p.lmdb") as reader:
        assert len(reader) == 5 * len(coords(out))
        assert reader.levels() == ["", "mpp_0.5"]
        assert len(reader.rows("a", level="mpp_0.5")) == 4 * len(coords(out))
    with pytest.raises(Refused, match="quality 50, you ask 90"):
        run(source, out, "--child_mpp", 0.5, "--save_lmdb", "p")


@pytest.mark.parametrize(("layout", "place", "shape"), [
    ("clam", "patches/a.h5", 2), ("trident", "10x_64px_0px_overlap/patches/a_patches.h5", 2),
    ("atlaspatch", "patches/a.h5", 5)])
def test_layouts(layout: str, place: str, shape: int, source: Path, out: Path, tmp_path: Path
                 ) -> None:
    assert run(source, out, "--layout", layout) == 0
    with h5py.File(out / place) as file:
        assert file["coords"].shape[1] == shape
    run(source, tmp_path / "plain")
    assert np.array_equal(read_coords(out / place).coords, coords(tmp_path / "plain").coords)
    assert run(source, out, "--layout", layout) == 0 and statuses(out) == {"already done"}


# ---------------------------------------------------------------------------- sub-folders

def test_slides_in_sub_folders(source: Path, tmp_path: Path, out: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("one", "two/deep"):
        (tree / name).mkdir(parents=True)
        (tree / name / "a.tif").symlink_to(source / "a.tif")
    with pytest.raises(Refused, match="--id_from_path"):
        run(tree, out, "--recursive")
    assert run(tree, out, "--recursive", "--id_from_path") == 0
    names = {path.stem for path in (out / "patches").glob("*.h5")}
    assert names == {"one__a", "two__deep__a"}
    assert np.array_equal(coords(out, "one__a").coords, coords(out, "two__deep__a").coords)
    with (out / "process_list_autogen.csv").open() as file:
        assert {row["slide_id"]: row["path"] for row in csv.DictReader(file)} == {
            "one__a.tif": "one/a.tif", "two__deep__a.tif": "two/deep/a.tif"}
    again = run(tree, out, "--process_list", "process_list_autogen.csv", "--no_auto_skip")
    assert again == 0  # every row has process 0: nothing to do


def test_only_files_of_some_endings(source: Path, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "b.TIF").symlink_to(source / "a.tif")
    (folder / "notes.xml").write_text("<x/>")
    assert run(folder, tmp_path / "all") == 3  # every file counts, as with CLAM
    assert run(folder, out, "--slide_ext", ".svs", ".tif") == 0
    assert [path.name for path in (out / "patches").iterdir()] == ["b.h5"]
    with pytest.raises(Refused, match=r"no slides that end with \.ndpi: correct --slide_ext"):
        run(folder, out, "--slide_ext", ".ndpi")


def test_a_slide_that_takes_too_long_is_given_up(source: Path, out: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILWRIGHT_FAULT", "patching.open.a:sleep")
    assert run(source, out, "--slide_timeout", 3) == 3
    with (out / "report_patches.csv").open() as file:
        assert "took longer than 3" in next(csv.DictReader(file))["reason"]
