"""create_patches_fp.py: segmenters, masks, outlines drawn by hand, pen and artefacts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

import create_patches_fp
from tests.slides import tissue_image, write_pyramid
from tests.tissue_models import save_tiny_sam2
from utils.errors import Refused
from wsi_core.coords import PatchCoords, read_coords

SCALE = ("--patch_mpp", 1, "--patch_size", 64, "--lattice", "global")
SMALL = ("--seg_mpp", 4, "--min_area_um2", 3000, "--min_hole_um2", 3000)
INK = (20, 110, 40)


def run(source: Path, out: Path, *flags: object) -> int:
    return create_patches_fp.main(["--source", str(source), "--save_dir", str(out), "--seg",
                                   "--patch", *map(str, SCALE), *map(str, flags)])


def coords(out: Path, slide: str = "a") -> PatchCoords:
    return read_coords(out / "patches" / f"{slide}.h5")


def cells(found: PatchCoords) -> set[tuple[int, int]]:
    return {(int(x), int(y)) for x, y in found.coords}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One slide of 2048 px, 0.5 um: tissue, a stroke of green pen and a black edge."""
    folder = tmp_path_factory.mktemp("marked")
    image = tissue_image(2048, 2048, seed=3)
    cv2.line(image, (100, 1900), (900, 1800), INK, 60)
    image[:, :90] = 12
    write_pyramid(folder / "a.tif", image, mpp=0.5)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("segmenter", ["clam", "otsu", "entropy", "stain"])
def test_segmenters(segmenter: str, source: Path, out: Path) -> None:
    assert run(source, out, *SMALL, "--segmenter", segmenter, "--min_tissue", 0.4) == 0
    found = coords(out)
    assert (out / "masks/a.jpg").exists() and len(found) > 20
    assert found.parameters.get("segmenter", "clam") == segmenter
    truth = cv2.absdiff(cv2.cvtColor(tissue_image(2048, 2048, seed=3), cv2.COLOR_RGB2GRAY), 243) > 9
    share = [truth[y:y + 128, x:x + 128].mean() for x, y in found.coords if x >= 128 and y < 1600]
    assert np.mean(np.array(share) > 0.2) > 0.9


def test_seg_mpp_and_threshold_change_what_is_found(source: Path, out: Path, tmp_path: Path
                                                    ) -> None:
    run(source, out, *SMALL, "--segmenter", "stain")
    run(source, tmp_path / "b", "--seg_mpp", 16, *SMALL[2:], "--segmenter", "stain")
    run(source, tmp_path / "c", *SMALL, "--segmenter", "stain", "--seg_thresh", 0.99)
    first = coords(out).tissue
    assert first is not None
    outline = coords(tmp_path / "b").tissue
    assert outline is not None and len(outline.contours[0]) < len(first.contours[0])
    assert cells(coords(tmp_path / "c")) < cells(coords(out))


def test_pen_and_artefacts_can_be_taken_off(source: Path, out: Path, tmp_path: Path) -> None:
    def marked(found: PatchCoords) -> tuple[int, int]:
        pen = sum(1 for x, y in cells(found) if y > 1650 and 128 <= x < 900)
        edge = sum(1 for x, y in cells(found) if x < 64)
        return pen, edge

    run(source, out, *SMALL, "--segmenter", "clam")
    assert marked(coords(out))[0] > 4
    run(source, tmp_path / "pen", *SMALL, "--segmenter", "clam", "--remove_pen")
    assert marked(coords(tmp_path / "pen"))[0] == 0
    run(source, tmp_path / "edge", *SMALL, "--segmenter", "otsu")
    run(source, tmp_path / "clean", *SMALL, "--segmenter", "otsu", "--remove_artefacts")
    assert marked(coords(tmp_path / "clean"))[1] == 0
    kept = cells(coords(tmp_path / "pen")) & cells(coords(out))
    tissue = {cell for cell in cells(coords(out)) if cell[1] < 1600 and cell[0] >= 128}
    assert len(kept & tissue) > 0.97 * len(tissue)


def test_areas_in_um2(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    image = np.full((1024, 1024, 3), 243, np.uint8)
    image[100:300, 100:300] = (170, 90, 160)  # 100 x 100 um
    image[500:900, 500:900] = (170, 90, 160)  # 200 x 200 um
    image[650:750, 650:750] = 243  # a hole of 50 x 50 um
    write_pyramid(folder / "a.tif", image, mpp=0.5)

    def pieces(name: str, *flags: object) -> tuple[int, int]:
        run(folder, out / name, "--seg_mpp", 2, "--segmenter", "otsu", *flags)
        tissue = coords(out / name).tissue
        assert tissue is not None
        return len(tissue.contours), tissue.n_holes

    assert pieces("both", "--min_area_um2", 5000, "--min_hole_um2", 1000) == (2, 1)
    assert pieces("large", "--min_area_um2", 20000, "--min_hole_um2", 1000) == (1, 1)
    assert pieces("filled", "--min_area_um2", 5000, "--min_hole_um2", 4000) == (2, 0)


# ---------------------------------------------------------------------------- learned segmenters

def untrained_network(folder: Path) -> Path:
    """A small network with random weights, as training leaves one."""
    import torch

    from models.tissue_networks import NetworkCard, build_network, save_network

    card = NetworkCard(arch="unet", width=4, depth=2, mpp_um=8.0, tile_px=64, threshold=0.4)
    torch.manual_seed(0)
    folder.mkdir()
    save_network(folder, build_network(card), card)
    return folder


def masks(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 0
            for path in sorted((out / "tissue_masks").iterdir())}


def test_a_learned_segmenter_writes_masks_first(source: Path, out: Path, tmp_path: Path) -> None:
    for name in ("b.tif", "c.tif"):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / name).symlink_to(source / "a.tif")
    (tmp_path / "s" / "broken.tif").write_bytes(b"no slide")
    network = untrained_network(tmp_path / "network")
    flags = ("--segmenter", "network", "--seg_ckpt", network, "--device", "cpu", *SMALL[2:])
    assert run(tmp_path / "s", out, *flags) == 3  # broken.tif, alone
    assert set(masks(out)) == {"b", "c"}
    assert coords(out, "b").parameters["segmenter"]["name"] == "network"
    stamp = (out / "tissue_masks/b.png").stat().st_mtime_ns
    assert run(tmp_path / "s", out, *flags) == 3
    assert (out / "tissue_masks/b.png").stat().st_mtime_ns == stamp

    other = tmp_path / "one"
    run(tmp_path / "s", other, *flags, "--seg_batch_size", 1)
    assert all(np.array_equal(masks(out)[name], masks(other)[name]) for name in "bc")
    shares = []
    for threshold in (0, 0.4, 1):
        place = tmp_path / str(threshold)
        run(tmp_path / "s", place, *flags, "--seg_thresh", threshold)
        shares.append(masks(place)["b"].mean())
    assert shares[0] == 1 and shares[2] == 0 and shares[1] == masks(out)["b"].mean()
    run(tmp_path / "s", tmp_path / "fine", *flags, "--seg_mpp", 4)
    assert masks(tmp_path / "fine")["b"].shape[0] == 2 * masks(out)["b"].shape[0]


def test_sam2(source: Path, out: Path, tmp_path: Path) -> None:
    save_tiny_sam2(tmp_path / "sam2")
    flags = ("--segmenter", "sam2", "--seg_ckpt", tmp_path / "sam2", "--device", "cpu", *SMALL[2:])
    assert run(source, out, *flags, "--seg_thresh", 0.01) == 0
    assert coords(out).parameters["segmenter"]["name"] == "sam2" and len(coords(out)) > 0
    with pytest.raises(Refused, match="segmenter: file has"):
        run(source, out, *flags, "--seg_thresh", 0.02)
    with pytest.raises(Refused):
        run(source, tmp_path / "b", *flags[:3], tmp_path / "nowhere")


# ---------------------------------------------------------------------------- masks and outlines

def test_masks_of_others(source: Path, out: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = np.zeros((256, 256), np.uint8)
    mask[64:128, 32:160] = 255  # level-0 x 256..1280, y 512..1024
    cv2.imwrite(str(masks / "a.png"), mask)
    flags = ("--segmenter", "mask", "--mask_dir", masks, *SMALL[2:], "--min_tissue", 1)
    assert run(source, out, *flags) == 0
    assert cells(coords(out)) == {(x, y) for x in range(256, 1280, 128)
                                  for y in range(512, 1024, 128)}
    mask[64:96] = 0
    cv2.imwrite(str(masks / "a.png"), mask)
    with pytest.raises(Refused, match="mask_sha256"):
        run(source, out, *flags)
    assert run(source, out, *flags, "--no_auto_skip") == 0 and len(coords(out)) == 16
    cv2.imwrite(str(masks / "a.png"), mask[:100])
    assert run(source, tmp_path / "bad", *flags) == 3
    (masks / "a.png").unlink()
    assert run(source, tmp_path / "none", *flags) == 3
    with (tmp_path / "none/report_patches.csv").open() as file:
        assert "has no mask" in next(csv.DictReader(file))["reason"]


def test_outlines_go_to_qupath_and_come_back(source: Path, out: Path, tmp_path: Path) -> None:
    assert run(source, out, *SMALL, "--segmenter", "stain", "--save_geojson") == 0
    folder = out / "contours_geojson"
    again = tmp_path / "again"
    assert run(source, again, *SMALL, "--segmenter", "stain", "--contours_dir", folder) == 0
    assert cells(coords(again)) == cells(coords(out))

    path = folder / "a.geojson"
    collection = json.loads(path.read_text())
    box = [[256, 512], [1280, 512], [1280, 1024], [256, 1024], [256, 512]]
    collection["features"] = [{"type": "Feature", "properties": {}, "geometry": {
        "type": "Polygon", "coordinates": [box]}}]
    path.write_text(json.dumps(collection))
    drawn = tmp_path / "drawn"
    assert run(source, drawn, "--contours_dir", folder, "--min_tissue", 0.9) == 0
    assert cells(coords(drawn)) == {(x, y) for x in range(256, 1280, 128)
                                    for y in range(512, 1024, 128)}


def test_outlines_drawn_in_the_run_s_own_folder_are_never_lost(source: Path, out: Path) -> None:
    """Two steps in one folder: segment, correct in QuPath, patch from the corrected outlines."""
    seg_only = [*map(str, ("--source", source, "--save_dir", out, "--seg", *SMALL, "--segmenter",
                           "stain", "--save_geojson", "--visualize", "mask", "contours", "grid"))]
    assert create_patches_fp.main(seg_only) == 0
    path = out / "contours_geojson/a.geojson"
    assert path.exists() and not (out / "patches/a.h5").exists()
    assert {one.name for one in (out / "visualization").iterdir()} == {
        "a_mask.png", "a_mask_bw.png", "a_contours.png"}

    box = [[256, 512], [1280, 512], [1280, 1024], [256, 1024], [256, 512]]
    path.write_text(json.dumps({"type": "Feature", "properties": {}, "geometry": {
        "type": "Polygon", "coordinates": [box]}}))
    drawn = path.read_bytes()
    assert create_patches_fp.main(seg_only) == 0 and path.read_bytes() == drawn
    flags = ("--contours_dir", path.parent, "--min_tissue", 0.9)
    redo = "--no_auto_skip"
    for more in ((), (redo,), (redo, "--save_geojson"), ("--save_geojson",)):
        assert run(source, out, *flags, *more) == 0
        assert path.read_bytes() == drawn and len(coords(out)) == 32
    assert run(source, out, "--no_auto_skip") == 0  # outlines left out: the drawing stays there
    assert path.read_bytes() == drawn


def test_regions_of_interest_and_what_is_left_out(source: Path, out: Path, tmp_path: Path) -> None:
    run(source, out, *SMALL, "--segmenter", "stain")
    everything = cells(coords(out))
    folder = tmp_path / "drawn"
    folder.mkdir()

    def draw(name: str) -> None:
        half = [[0, 0], [1024, 0], [1024, 2048], [0, 2048], [0, 0]]
        (folder / "a.geojson").write_text(json.dumps({
            "type": "Feature", "geometry": {"type": "Polygon", "coordinates": [half]},
            "properties": {"objectType": "annotation", "classification": {"name": name}}}))

    flags = (*SMALL, "--segmenter", "stain", "--contours_dir", folder, "--min_tissue", 0.01)
    draw("Region*")
    run(source, tmp_path / "region", *flags)
    draw("Ignore*")
    run(source, tmp_path / "ignore", *flags)
    left, right = (cells(coords(tmp_path / name)) for name in ("region", "ignore"))
    assert left and right and max(x for x, _ in left) <= 1024 and min(x for x, _ in right) >= 896
    assert left | right <= everything and len(left | right) > 0.9 * len(everything)
