"""Tiled pyramids: of a slide by its own levels, and of an image of which only one is there."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.slides import tissue_image, write_pyramid
from utils.errors import Refused, SlideError
from wsi_core.pyramid_writer import (
    TILE_PX,
    description_of,
    image_levels,
    slide_levels,
    write_tiled_pyramid,
)
from wsi_core.slide import open_slide, read_level

IMAGE = tissue_image(2501, 1303, seed=3)


def part(x: int, y: int, width: int, height: int) -> np.ndarray:
    assert max(width, height) <= TILE_PX and x % TILE_PX == y % TILE_PX == 0
    return IMAGE[y:y + height, x:x + width]


@pytest.mark.parametrize("quality", [None, 95])
def test_an_image_of_which_tiles_are_read(quality: int | None, tmp_path: Path) -> None:
    """Sides that are no multiple of anything; each tile is asked for once."""
    asked: list[tuple[int, int]] = []

    def read(x: int, y: int, width: int, height: int) -> np.ndarray:
        asked.append((x, y))
        return part(x, y, width, height)

    path = tmp_path / "a.tif"
    write_tiled_pyramid(path, image_levels((2501, 1303), read, mpp_um=0.5), quality=quality,
                        description="where it is from")
    assert len(asked) == len(set(asked)) == 10 * 6
    assert description_of(path) == "where it is from"
    assert description_of(tmp_path / "none.tif") == ""
    with open_slide(path, backend="openslide") as slide:
        assert slide.level_dimensions == ((2501, 1303), (625, 326))
        assert slide.mpp_um == pytest.approx((0.5, 0.5), rel=1e-4)
        found = read_level(slide, 0)[0]
        off = np.abs(found.astype(int) - IMAGE)
        assert off.max() == 0 if quality is None else off.mean() < 4
        small = cv2.resize(IMAGE, (625, 326), interpolation=cv2.INTER_AREA)
        assert np.abs(read_level(slide, 1)[0].astype(int) - small).mean() < 4


def test_levels_go_on_until_they_are_small(tmp_path: Path) -> None:
    """The third level comes from the second."""
    image = cv2.resize(tissue_image(300, 40, seed=3), (4800, 640))
    levels = image_levels((4800, 640), lambda x, y, w, h: image[y:y + h, x:x + w], mpp_um=1.0)
    assert [level.size_px for level in levels] == [(4800, 640), (1200, 160), (300, 40)]
    assert [level.mpp_um for level in levels] == [1, 4, 16]
    write_tiled_pyramid(tmp_path / "a.tif", levels, quality=None, description="")
    with open_slide(tmp_path / "a.tif") as slide:
        off = np.abs(read_level(slide, 2)[0].astype(int) - cv2.resize(
            image, (300, 40), interpolation=cv2.INTER_AREA))
        assert off.mean() < 1.5


def test_jpeg_tiles_say_how_their_colours_are_sampled(tmp_path: Path) -> None:
    """The tag must be that of the tiles inside (libtiff corrects it with a warning)."""
    import tifffile

    path = tmp_path / "a.tif"
    write_tiled_pyramid(path, image_levels((600, 300), part, mpp_um=0.5), quality=90,
                        description="")
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
        assert page.tags["YCbCrSubSampling"].value == (1, 1)
        assert np.abs(page.asarray().astype(int) - IMAGE[:300, :600]).mean() < 4


def test_levels_of_a_slide_come_from_its_own(tmp_path: Path) -> None:
    source = write_pyramid(tmp_path / "s.tif", IMAGE, downsamples=(1, 4), mpp=0.25)
    with open_slide(source) as slide:
        levels = slide_levels(slide, mpp_um=0.25, downscale_by=1.5)
        assert [level.size_px for level in levels] == [(1667, 869), (417, 217)]
        assert [level.mpp_um for level in levels] == [0.375, 1.5]
        write_tiled_pyramid(tmp_path / "a.tif", levels, quality=None, description="")
    with open_slide(tmp_path / "a.tif") as made:
        for level, size in enumerate(made.level_dimensions):
            wanted = cv2.resize(IMAGE, size, interpolation=cv2.INTER_AREA)
            assert np.abs(read_level(made, level)[0].astype(int) - wanted).mean() < 6


def test_nothing_is_left_of_a_reading_that_fails(tmp_path: Path) -> None:
    def fails(x: int, y: int, width: int, height: int) -> np.ndarray:
        if x:
            raise SlideError("a.svs: cannot be read")
        return part(x, y, width, height)

    with pytest.raises(SlideError, match=r"a\.svs"):
        write_tiled_pyramid(tmp_path / "a.tif", image_levels((600, 300), fails, mpp_um=0.5),
                            quality=90, description="")
    assert list(tmp_path.iterdir()) == []


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(Refused, match="pip install tifffile"):
        write_tiled_pyramid(tmp_path / "a.tif", image_levels((600, 300), part, mpp_um=0.5),
                            quality=90, description="")
