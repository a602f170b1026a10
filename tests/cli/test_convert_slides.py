"""scripts/convert_slides.py: pictures become slides, and what every flag does."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from scripts import convert_slides
from tests.slides import tissue_image, write_pyramid
from utils.errors import Refused
from wsi_core.slide import open_slide, read_level

IMAGE = tissue_image(2500, 1700, seed=3)


def run(source: Path, out: Path, *flags: object) -> int:
    return convert_slides.main(["--source", str(source), "--save_dir", str(out),
                                *map(str, flags)])


def report(out: Path) -> dict[str, dict[str, str]]:
    with (out / "report_convert.csv").open() as file:
        return {row["item"]: row for row in csv.DictReader(file)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), IMAGE[:, :, ::-1])
    (folder / "mpp.csv").write_text("wsi,mpp\na,0.5\n")
    (folder / "mpp.csv").rename(tmp_path / "mpp.csv")
    return folder


@pytest.fixture
def sizes(source: Path) -> tuple[object, ...]:
    return ("--mpp_csv", source.parent / "mpp.csv")


def test_a_picture_becomes_a_slide(source: Path, sizes: tuple[object, ...], tmp_path: Path,
                                   run_script: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    done = run_script("scripts/convert_slides.py", "--source", source, "--save_dir", out, *sizes)
    assert done.returncode == 0, done.stderr
    with open_slide(out / "a.tif", backend="tiff-tiles") as slide:
        assert slide.level_dimensions == ((2500, 1700), (625, 425))
        assert slide.mpp_um == pytest.approx((0.5, 0.5), rel=1e-4)
        assert np.abs(read_level(slide, 0)[0].astype(int) - IMAGE).mean() < 6
        small = cv2.resize(IMAGE, (625, 425), interpolation=cv2.INTER_AREA)
        assert np.abs(read_level(slide, 1)[0].astype(int) - small).mean() < 4
    stamp = (out / "a.tif").stat().st_mtime_ns
    assert run(source, out, *sizes) == 0 and report(out)["a.png"]["status"] == "already done"
    assert (out / "a.tif").stat().st_mtime_ns == stamp


def test_lossless_quality_and_overwriting(source: Path, sizes: tuple[object, ...], tmp_path: Path
                                          ) -> None:
    out = tmp_path / "out"
    assert run(source, out, *sizes, "--lossless") == 0
    with open_slide(out / "a.tif") as slide:
        assert np.array_equal(read_level(slide, 0)[0], IMAGE)
    assert run(source, out, *sizes) == 3 and "--overwrite" in report(out)["a.png"]["reason"]
    assert run(source, out, *sizes, "--overwrite", "--jpeg_quality", 95) == 0
    large = (out / "a.tif").stat().st_size
    assert run(source, out, *sizes, "--overwrite", "--jpeg_quality", 30) == 0
    assert (out / "a.tif").stat().st_size < large


@pytest.mark.parametrize("factor", [2, 2.5, 8])
def test_downscaling_a_pyramid(factor: float, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    write_pyramid(tmp_path / "s/p.tif", IMAGE, mpp=0.25, downsamples=(1, 4))
    assert run(tmp_path / "s", tmp_path / "out", "--downscale_by", factor, "--lossless") == 0
    with open_slide(tmp_path / "out/p.tif") as slide:
        size = (round(2500 / factor), round(1700 / factor))
        assert slide.level_dimensions[0] == size
        assert slide.mpp_um == pytest.approx((0.25 * factor,) * 2, rel=1e-3)
        expected = cv2.resize(IMAGE, size, interpolation=cv2.INTER_AREA)
        assert np.abs(read_level(slide, 0)[0].astype(int) - expected).mean() < 6


def test_coarse_levels_are_those_of_the_whole(tmp_path: Path) -> None:
    """Levels of 16 times and more are made whole; the picture is not shifted."""
    (tmp_path / "s").mkdir()
    image = cv2.resize(tissue_image(600, 500, seed=3), (18_000, 1_500))
    cv2.imwrite(str(tmp_path / "s/long.png"), image[:, :, ::-1])
    (tmp_path / "m.csv").write_text("slide_id,mpp\nlong.png,1\n")
    assert run(tmp_path / "s", tmp_path / "out", "--mpp_csv", tmp_path / "m.csv") == 0
    with open_slide(tmp_path / "out/long.tif") as slide:
        assert [size[0] for size in slide.level_dimensions] == [18_000, 4500, 1125, 281]
        for level in (2, 3):
            expected = cv2.resize(image, slide.level_dimensions[level],
                                  interpolation=cv2.INTER_AREA)
            assert np.abs(read_level(slide, level)[0].astype(int) - expected).mean() < 3


def test_bad_slides_fail_alone(source: Path, tmp_path: Path) -> None:
    (source / "broken.svs").write_bytes(b"no slide")
    write_pyramid(source / "good.tif", tissue_image(600, 400), mpp=0.5)
    out = tmp_path / "out"
    assert run(source, out, "--workers", 2) == 3
    found = report(out)
    assert found["good.tif"]["status"] == "done" and found["good.tif"]["mpp_um"] == "0.5"
    assert "pixel size unknown" in found["a.png"]["reason"]
    assert found["broken.svs"]["status"] == "failed"
    assert {path.name for path in out.iterdir()} == {"good.tif", "report_convert.csv",
                                                     "report_convert.json"}


def test_sub_folders_and_clashes(source: Path, sizes: tuple[object, ...], tmp_path: Path) -> None:
    (source / "deep").mkdir()
    write_pyramid(source / "deep/b.tif", tissue_image(600, 400), mpp=0.5)
    assert run(source, tmp_path / "out", *sizes, "--recursive", "--id_from_path") == 0
    assert (tmp_path / "out/deep__b.tif").exists() and (tmp_path / "out/a.tif").exists()
    write_pyramid(source / "a.tif", tissue_image(600, 400), mpp=0.5)
    with pytest.raises(Refused, match=r"would both become a\.tif"):
        run(source, tmp_path / "other", *sizes)
    (source / "a.png").unlink()
    with pytest.raises(Refused, match="would be written over itself"):
        run(source, source)
