"""Overviews at any downsample: the right size, the right pixels, never a level in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.slides import tissue_image, write_pyramid
from wsi_core import slide as slide_module
from wsi_core.slide import BLACK, Colour, Slide, open_slide, read_level, read_overview


class ArraySlide(Slide):
    """A slide in memory, levels being every n-th pixel; it notes what is read of it."""

    backend = "array"

    def __init__(self, image: np.ndarray, steps: tuple[int, ...] = (1,)) -> None:
        self.levels = [image[::step, ::step] for step in steps]
        self.level_dimensions = tuple(one.shape[1::-1] for one in self.levels)
        width, height = self.level_dimensions[0]
        self.level_downsamples = tuple((width / w, height / h) for w, h in self.level_dimensions)
        self.path, self.reads = Path("array"), []

    def read_region(self, location_l0: tuple[int, int], level: int, size: tuple[int, int], *,
                    background: Colour = BLACK) -> np.ndarray:
        scale = sum(self.level_downsamples[level]) / 2
        x, y = (round(place / scale) for place in location_l0)
        part = self.levels[level][y:y + size[1], x:x + size[0]]
        assert part.shape[1::-1] == size
        self.reads.append((level, *size))
        return part.copy()


@pytest.mark.parametrize("downsample", [1.0, 2.0, 3.7, 7.99, 16.0, 63.5, 300.0])
@pytest.mark.parametrize("block", [64, 4096])
def test_size_place_and_brightness(monkeypatch: pytest.MonkeyPatch, downsample: float, block: int
                                   ) -> None:
    monkeypatch.setattr(slide_module, "BLOCK_PX", block)
    image = tissue_image(811, 607)
    slide = ArraySlide(image)
    overview, (x, y) = read_overview(slide, downsample)
    height, width = overview.shape[:2]
    limit = -(-811 // block), -(-607 // block)  # a block is a pixel at least
    assert (width, height) == (max(limit[0], round(811 / downsample)),
                               max(limit[1], round(607 / downsample)))
    assert (x, y) == (811 / width, 607 / height)
    expected = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(int)
    # half a pixel of level 0 at the seams, which matters the less the more it is reduced
    assert np.abs(overview - expected).mean() <= 12 / downsample
    assert max(w for _, w, _ in slide.reads) <= max(block, downsample + 1)
    assert sum(w * h for _, w, h in slide.reads) == 811 * 607  # every pixel once


def test_one_block_is_exactly_the_area_average() -> None:
    image = tissue_image(700, 500)
    overview, _ = read_overview(ArraySlide(image), 3.7)
    assert np.array_equal(overview, cv2.resize(image, (189, 135), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize(("downsample", "level", "size"), [
    (4.0, 1, (500, 400)), (3.97, 1, (500, 400)), (4.03, 1, (500, 400)), (8.0, 1, (250, 200)),
    (16.0, 2, (125, 100)), (3.0, 0, (667, 533)), (0.3, 0, (2000, 1600)), (15.0, 1, (133, 107))])
def test_the_level_that_is_used(downsample: float, level: int, size: tuple[int, int]) -> None:
    slide = ArraySlide(tissue_image(2000, 1600), (1, 4, 16))
    overview, found = read_overview(slide, downsample)
    assert {one for one, _, _ in slide.reads} == {level}
    assert overview.shape == (size[1], size[0], 3)
    assert found == (2000 / size[0], 1600 / size[1])
    if size == slide.level_dimensions[level]:
        assert np.array_equal(overview, slide.levels[level])


def test_a_ceiling_makes_it_coarser() -> None:
    slide = ArraySlide(tissue_image(1000, 800))
    overview, (x, y) = read_overview(slide, 2.0, max_pixels=5_000)
    assert 4_500 < overview.shape[0] * overview.shape[1] <= 5_000
    assert x == pytest.approx(y, rel=0.02) == pytest.approx(800_000 ** 0.5 / 5_000 ** 0.5, rel=0.03)


@pytest.mark.parametrize("backend", ["auto", "openslide"])
def test_real_pyramids_with_odd_downsamples(tmp_path: Path, backend: str) -> None:
    """B8: 2.003 and 8.003, read by blocks of OpenSlide."""
    path = write_pyramid(tmp_path / "s.tif", tissue_image(9001, 600), downsamples=(1, 2.003, 8.003))
    with open_slide(path, backend=backend) as slide:  # type: ignore[arg-type]
        for downsample in (2.0, 8.0):
            overview, found = read_overview(slide, downsample)
            level = 1 if downsample == 2 else 2
            whole, level_downsample = read_level(slide, level)
            assert np.array_equal(overview, whole) and found == level_downsample
        overview, (x, _) = read_overview(slide, 5.0)
        whole, _ = read_level(slide, 1)
        assert (overview.shape[1], x) == (1800, 9001 / 1800)
        expected = cv2.resize(whole, (1800, 120), interpolation=cv2.INTER_AREA)
        assert np.abs(overview.astype(int) - expected).mean() < 1


def test_a_single_level_slide_is_reduced_under_a_memory_ceiling(tmp_path: Path) -> None:
    """B7: 24,000 px square of one level, 1.7 GB as pixels, in a process that may hold 0.9 GB."""
    path = tmp_path / "large.tif"
    tile = cv2.imencode(".jpg", np.full((512, 512, 3), 200, np.uint8))[1].tobytes()
    import tifffile

    side = 24_064
    tifffile.imwrite(path, (tile for _ in range((side // 512) ** 2)), shape=(side, side, 3),
                     dtype=np.uint8, tile=(512, 512), compression="jpeg", photometric="ycbcr",
                     subsampling=(2, 2), metadata=None)
    # not ru_maxrss, which begins with the size of the process that started this one
    code = ("import sys, pathlib\n"
            "from wsi_core.slide import open_slide, read_overview\n"
            "with open_slide(pathlib.Path(sys.argv[1])) as slide:\n"
            "    image, found = read_overview(slide, 64)\n"
            "    assert len(slide.level_dimensions) == 1\n"
            "print(image.shape, found, abs(int(image.mean()) - 200) < 3)\n"
            "status = pathlib.Path('/proc/self/status').read_text()\n"
            "print(status.split('VmHWM:')[1].split()[0])")
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    facts, peak_kb = done.stdout.splitlines()
    assert facts == "(376, 376, 3) (64.0, 64.0) True"
    assert int(peak_kb) < 900_000
