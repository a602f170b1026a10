"""create_patches_fp.py --slide_images: images of whole slides for streaming models."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import create_patches_fp
from tests.slides import tissue_image, write_pyramid
from utils.errors import Refused
from wsi_core.image_record import ImageRecord, read_record
from wsi_core.slide_images import open_image

AREAS = ("--min_area_um2", 3000, "--min_hole_um2", 3000)


def run(source: Path, out: Path, *flags: object, images: float | None = 4) -> int:
    wanted = () if images is None else ("--slide_images", images)
    return create_patches_fp.main(["--source", str(source), "--save_dir", str(out), "--seg",
                                   *map(str, (*AREAS, *wanted, *flags))])


def record(out: Path, slide: str = "a") -> ImageRecord:
    return read_record(out / "slide_images" / f"{slide}.json")


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "report_patches.csv").open() as file:
        return {row["item"]: row for row in csv.DictReader(file)}


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "slide_images").iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One slide of 4 x 4 mm with two pieces in opposite corners."""
    image = np.full((2048, 2048, 3), 243, np.uint8)
    for number, (x, y) in enumerate(((0, 0), (1300, 1200))):
        image[y:y + 700, x:x + 700] = tissue_image(700, 700, seed=number, blobs=1)
    folder = tmp_path_factory.mktemp("one")
    write_pyramid(folder / "a.tif", image, mpp=2.0)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_images_in_a_run_of_its_own(source: Path, out: Path, tmp_path: Path,
                                    run_script: Callable[..., Any]) -> None:
    """Several slides, several processes, and one that cannot be done among them."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in ("a", "b"):
        shutil.copy(source / "a.tif", folder / f"{name}.tif")
    write_pyramid(folder / "unknown.tif", tissue_image(600, 600), mpp=None)
    write_pyramid(folder / "coarse.tif", tissue_image(600, 600), mpp=5.0)
    write_pyramid(folder / "glass.tif", np.full((600, 600, 3), 243, np.uint8), mpp=2.0)
    done = run_script("create_patches_fp.py", "--source", folder, "--save_dir", out, "--seg",
                      *AREAS, "--slide_images", 4, "--workers", 2)
    assert done.returncode == 3, done.stderr
    found = rows(out)
    assert {name: row["status"] for name, row in found.items()} == {
        "a.tif": "done", "b.tif": "done", "unknown.tif": "failed", "coarse.tif": "failed",
        "glass.tif": "empty"}
    assert "pixel size unknown" in found["unknown.tif"]["reason"]
    assert "--mpp_csv" in found["unknown.tif"]["reason"]
    assert "has 5 um per pixel, too coarse for an image of 4 um" in found["coarse.tif"]["reason"]
    assert {path.name for path in (out / "slide_images").iterdir()} == {
        f"{slide}{end}" for slide in "ab" for end in (".tif", ".json", "_tissue.png")}
    assert not any((out / "patches").iterdir())
    made = record(out)
    assert found["a.tif"]["image_px"] == "{}x{}".format(*made.size_px)
    assert made.mpp_um == pytest.approx(4) and len(made.boxes) == 2 and made.slide_id == "a"
    assert np.prod(made.size_px) < 0.6 * np.prod(made.frame_px)
    with open_image(out / "slide_images", "a") as image:
        pixels = image.read(0, 0, *image.size_px)
        tissue = cv2.resize(image.tissue_map, image.size_px, interpolation=cv2.INTER_NEAREST)
        assert pixels[tissue > 250].mean() < 200 < pixels[tissue == 0].mean()


def test_the_same_command_again_does_nothing_until_something_is_missing(source: Path, out: Path
                                                                        ) -> None:
    assert run(source, out) == 0
    before = times(out)
    assert run(source, out) == 0 and rows(out)["a.tif"]["status"] == "already done"
    assert times(out) == before
    (out / "slide_images/a.tif").write_bytes(b"")
    assert run(source, out) == 0 and rows(out)["a.tif"]["status"] == "done"
    assert (out / "slide_images/a.tif").stat().st_size == record(out).image_bytes
    for flags, name in ((("--keep_gaps",), "keep_gaps"), (("--lossless_images",), "quality"),
                        (("--segmenter", "otsu"), "segmenter"),
                        (("--jpeg_quality", 50), "quality"), (("--remove_pen",), "remove_pen"),
                        (("--slide_images", 5), "image_mpp")):
        with pytest.raises(Refused, match=f"holds an image of a.tif made with other .*{name}: "):
            run(source, out, *flags)
    assert run(source, out, "--no_auto_skip", "--slide_images", 5) == 0
    assert record(out).mpp_um == pytest.approx(5, rel=2e-3)


def test_with_patches_at_once_before_or_after(source: Path, tmp_path: Path) -> None:
    """The image is the same, and neither waits for the other."""
    patches = ("--patch", "--patch_size", 64)
    steps: dict[str, list[tuple[tuple[object, ...], float | None]]] = {
        "at_once": [(patches, 4)], "patches_first": [(patches, None), (patches, 4)],
        "image_first": [((), 4), (patches, 4)], "image_alone_later": [(patches, None), ((), 4)]}
    texts = set()
    for name, runs in steps.items():
        out = tmp_path / name
        for flags, images in runs:
            assert run(source, out, *flags, images=images) == 0
        assert (out / "patches/a.h5").exists()
        found = json.loads((out / "slide_images/a.json").read_text())
        texts.add(json.dumps(found) + str((out / "slide_images/a.tif").read_bytes()))
        assert run(source, out, *patches) == 0 and rows(out)["a.tif"]["status"] == "already done"
    assert len(texts) == 1
    before = times(out)
    assert run(source, out, *patches, "--no_auto_skip") == 0
    assert all(before[name] < changed for name, changed in times(out).items())


def test_empty_slides_are_done_with_their_patches(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    write_pyramid(folder / "a.tif", np.full((600, 600, 3), 243, np.uint8), mpp=2.0)
    assert run(folder, out, "--patch") == 0 and rows(out)["a.tif"]["status"] == "empty"
    assert run(folder, out, "--patch") == 0 and rows(out)["a.tif"]["status"] == "already done"
    assert not any((out / "slide_images").iterdir())


def test_gaps_loss_and_quality(source: Path, tmp_path: Path) -> None:
    sizes, n_bytes = {}, {}
    for name, flags in {"packed": (), "whole": ("--keep_gaps",), "exact": ("--lossless_images",),
                        "poor": ("--jpeg_quality", 30)}.items():
        assert run(source, tmp_path / name, *flags) == 0
        made = record(tmp_path / name)
        sizes[name], n_bytes[name] = np.prod(made.size_px), made.image_bytes
    assert sizes["whole"] > 1.5 * sizes["packed"] == 1.5 * sizes["exact"]
    assert n_bytes["poor"] < n_bytes["packed"] < n_bytes["exact"]


def test_tissue_as_this_run_finds_it(source: Path, tmp_path: Path) -> None:
    """Drawn outlines, the process list's ids, a user's pixel size."""
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    ring = [[1400, 1300], [1800, 1300], [1800, 1700], [1400, 1700], [1400, 1300]]
    (drawn / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [{
        "type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": "Tissue"}}}]}))
    assert run(source, tmp_path / "o", "--contours_dir", drawn) == 0
    (box,) = record(tmp_path / "o").boxes
    assert 1200 < box.x_l0 < 1400 and 1200 < box.y_l0 < 1300
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "p.csv").write_text("slide_id,keep_ids,mpp\na.tif,0,1.0\n")
    assert run(source, listed, "--process_list", "p.csv") == 0
    made = record(listed)
    assert len(made.boxes) == 1 and made.slide_mpp_um == (1.0, 1.0)
    assert made.parameters["mpp_override"] == 1.0


def test_a_dry_run_tells_sizes(source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, out, "--dry_run") == 0
    said = capsys.readouterr().out
    assert not out.exists() and "MB images of slides, about" in said
    run(source, out)
    assert f" {'{}x{}'.format(*record(out).size_px)} " in said


def test_what_is_refused(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in (("--keep_gaps",), ("--lossless_images",), ("--jpeg_quality", 50)):
        with pytest.raises(Refused, match=rf"{flags[0]} has no effect without .*--slide_images"):
            run(source, out, *flags, images=None)
    with pytest.raises(Refused, match="--jpeg_quality has no effect without"):
        run(source, out, "--lossless_images", "--jpeg_quality", 50)
    with pytest.raises(Refused, match="--slide_images packs the tissue that is found: give --seg"):
        create_patches_fp.main(["--source", str(source), "--save_dir", str(out),
                                "--slide_images", "4"])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(Refused, match="pip install tifffile"):
        run(source, out)
    assert not out.exists()
