"""For any region the fast path gives OpenSlide's pixels, and regions tile without seams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slides import tissue_image, write_pyramid
from tests.unit.test_wsi_core_slide_tiff import ome_pyramid
from tests.unit.test_wsi_core_slide_zarr import ome_zarr
from wsi_core.slide import Slide, believable_mpp, nominal_downsample, open_slide, read_overview
from wsi_core.slide_openslide import OpenSlideSlide

corners = st.tuples(st.integers(-400, 1500), st.integers(-400, 1500))
sizes = st.tuples(st.integers(1, 400), st.integers(1, 400))
colours = st.sampled_from([(0, 0, 0), (255, 255, 255), (12, 200, 7)])


@pytest.fixture(scope="module", params=["rgb", "ycbcr"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
         ) -> tuple[Slide, Slide]:
    path: Path = tmp_path_factory.mktemp("pair") / "slide.tif"
    write_pyramid(path, tissue_image(1104, 880), tile=128, photometric=request.param)
    fast = open_slide(path)
    assert fast.backend == "tiff-tiles"
    return fast, OpenSlideSlide(path)


@settings(max_examples=120, deadline=None)
@given(corner=corners, level=st.integers(0, 2), size=sizes, colour=colours)
def test_any_region_equals_openslides(pair: tuple[Slide, Slide], corner: tuple[int, int],
                                      level: int, size: tuple[int, int],
                                      colour: tuple[int, int, int]) -> None:
    ours, theirs = (slide.read_region(corner, level, size, background=colour) for slide in pair)
    assert np.array_equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(corner=corners, level=st.integers(0, 2), size=sizes, cut=st.integers(1, 399))
def test_a_region_is_the_sum_of_its_parts(pair: tuple[Slide, Slide], corner: tuple[int, int],
                                          level: int, size: tuple[int, int], cut: int) -> None:
    scale = (1, 2, 4)[level]
    x, y = (value // scale * scale for value in corner)
    width, height = size
    cut = min(cut, width)
    whole = pair[0].read_region((x, y), level, size)
    left = pair[0].read_region((x, y), level, (cut, height))
    assert np.array_equal(whole[:, :cut], left)
    if cut < width:
        right = pair[0].read_region((x + cut * scale, y), level, (width - cut, height))
        assert np.array_equal(whole[:, cut:], right)


@pytest.fixture(scope="module", params=["tiff", "zarr"])
def tiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
          ) -> tuple[Slide, np.ndarray]:
    """A slide of an optional reader, and its level 0."""
    folder, image = tmp_path_factory.mktemp("tiled"), tissue_image(700, 500)
    path = (ome_pyramid(folder / "a.ome.tif", image) if request.param == "tiff" else
            ome_zarr(folder / "a.zarr", image))
    slide = open_slide(path)
    assert slide.backend == request.param
    return slide, image


@settings(max_examples=60, deadline=None)
@given(corner=corners, level=st.integers(0, 2), size=sizes, colour=colours)
def test_any_region_is_the_stored_pixels_on_the_background(
        tiled: tuple[Slide, np.ndarray], corner: tuple[int, int], level: int,
        size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    slide, image = tiled
    step = 2**level
    x, y = (place // step for place in corner)
    stored = image[::step, ::step]
    height, width = stored.shape[:2]
    rows, columns = np.ogrid[y:y + size[1], x:x + size[0]]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    nearest = stored[rows.clip(0, height - 1), columns.clip(0, width - 1)]
    expected = np.where(inside[..., None], nearest, np.array(colour, np.uint8))
    region = slide.read_region((x * step, y * step), level, size, background=colour)
    assert np.array_equal(region, expected)


@settings(max_examples=40, deadline=None)
@given(downsample=st.floats(0.1, 900), max_pixels=st.integers(1000, 10**6))
def test_an_overview_covers_the_whole_slide(tiled: tuple[Slide, np.ndarray], downsample: float,
                                            max_pixels: int) -> None:
    overview, found = read_overview(tiled[0], downsample, max_pixels=max_pixels)
    height, width = overview.shape[:2]
    assert found == (700 / width, 500 / height) and height * width <= 1.05 * max_pixels
    wanted = max(1, downsample, (350_000 / max_pixels) ** 0.5)
    for side, full in ((width, 700), (height, 500)):
        assert side == 1 or abs(side - full / wanted) <= max(0.5, 0.011 * side)
    assert np.abs(overview.mean(axis=(0, 1)) - tiled[1].mean(axis=(0, 1))).max() < 12


@given(x=st.one_of(st.none(), st.text(max_size=8), st.floats().map(str)),
       y=st.one_of(st.none(), st.text(max_size=8), st.floats().map(str)))
def test_whatever_a_file_says_a_pixel_size_is_plausible_or_explained(x: str | None, y: str | None
                                                                    ) -> None:
    mpp, problem = believable_mpp(x, y)
    if mpp is None:
        assert bool(problem) == (x is not None or y is not None)
        assert len(problem.splitlines()) <= 1
    else:
        assert problem == "" and all(0.05 <= value <= 50 for value in mpp)


@given(whole=st.integers(1, 49), error=st.floats(-0.0099, 0.0099))
def test_nominal_downsample_undoes_rounding(whole: int, error: float) -> None:
    assert nominal_downsample(whole * (1 + error)) == whole
