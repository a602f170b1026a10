"""For any region the fast path gives OpenSlide's pixels, and regions tile without seams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slides import tissue_image, write_pyramid
from wsi_core.slide import Slide, believable_mpp, nominal_downsample, open_slide
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
