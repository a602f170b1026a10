"""Outlines that cross themselves, and tissue cut to regions: areas and points."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_core.polygons import RASTER_PX, Polygon, is_tangled, repair, restrict
from wsi_core.tissue import Tissue

SLIDE = (60_000, 50_000)


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.int32)


def area(polygons: list[Polygon]) -> float:
    return sum(cv2.contourArea(polygon.outer) - sum(map(cv2.contourArea, polygon.holes))
               for polygon in polygons)


def tissue_area(tissue: Tissue) -> float:
    return area([Polygon(*pair) for pair in zip(tissue.contours, tissue.holes, strict=True)])


BOW = np.array([(0, 0), (1000, 1000), (1000, 0), (0, 1000)], np.int32)
BOW_AT_A_POINT = np.array([(0, 0), (500, 500), (1000, 1000), (1000, 0), (500, 500), (0, 1000)],
                          np.int32)
STAR = np.rint(1000 + 1000 * np.stack([np.cos(np.arange(5) * 0.8 * np.pi),
                                       np.sin(np.arange(5) * 0.8 * np.pi)], axis=1)
               ).astype(np.int32)


@pytest.mark.parametrize(("ring", "even_odd"), [
    (BOW, 500_000), (BOW_AT_A_POINT, 500_000), (STAR, 1_122_570 - 346_910)],
    ids=["bow", "crossing at a point", "star"])
@pytest.mark.parametrize("times", [1, 20])
def test_crossing_outlines_get_the_area_they_enclose(ring: np.ndarray, even_odd: float, times: int
                                                     ) -> None:
    """Within a ring one raster pixel wide; the plain formula says 0 for the first two."""
    ring = ring * times
    assert is_tangled(ring)
    mended = repair(Polygon(ring))
    perimeter = cv2.arcLength(ring, True)
    pixel = max(1.0, 1000 * times / RASTER_PX)
    assert area(mended) == pytest.approx(even_odd * times**2, abs=perimeter * pixel)
    assert not any(is_tangled(polygon.outer) for polygon in mended)


def test_plain_outlines_and_those_of_masks_are_not_touched() -> None:
    """Outlines of masks touch themselves, and cross by a pixel once they are scaled."""
    assert not is_tangled(box(0, 0, 9, 9)) and not is_tangled(box(0, 0, 9, 9)[:3])
    looked_at = 0
    for seed in range(12):
        noise = np.random.default_rng(seed).random((200, 300))
        mask = (cv2.GaussianBlur(noise, (0, 0), 1 + seed % 4) > 0.5).astype(np.uint8)
        for outline in cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0]:
            for scale in ((1, 1), (16.003, 15.997), (64.1, 64.05)):
                looked_at += 1
                assert not is_tangled((outline[:, 0] * np.array(scale)).astype(np.int32))
    assert looked_at > 3000


def test_a_million_points_take_moments() -> None:
    angle = np.linspace(0, 2 * np.pi, 1_000_000, endpoint=False)
    radius = 20_000 * (1 + 0.2 * np.sin(7 * angle) + 0.1 * np.sin(501 * angle))
    ring = np.rint(np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None] + 27_000)
    start = time.process_time()
    assert not is_tangled(ring.astype(np.int32))
    scribble = np.random.default_rng(0).integers(0, 50_000, (1_000_000, 2)).astype(np.int32)
    with pytest.raises(ValueError, match="encloses no area"):
        is_tangled(scribble)
    assert time.process_time() - start < 3


PIECE = Tissue([box(1000, 1000, 3000, 3000)], [[box(1500, 1500, 1600, 1600)]], n_too_small=4)


def test_nothing_to_restrict_keeps_every_point() -> None:
    for regions, ignored in (([], []), ([Polygon(box(0, 0, 9000, 9000))], []),
                             ([], [Polygon(box(5000, 0, 6000, 900))])):
        kept = restrict(PIECE, regions, ignored, slide_size=SLIDE)
        assert np.array_equal(kept.contours[0], PIECE.contours[0])
        assert np.array_equal(kept.holes[0][0], PIECE.holes[0][0]) and kept.n_too_small == 4


def test_regions_and_ignored_areas_cut_to_the_pixel() -> None:
    half = Polygon(box(0, 0, 2000, 9000))
    kept = restrict(PIECE, [half], [], slide_size=SLIDE)
    assert len(kept.contours) == 1 and kept.contours[0].max(axis=0).tolist() == [2000, 3000]
    assert len(kept.holes[0]) == 1
    assert tissue_area(kept) == pytest.approx(1000 * 2000 - 100 * 100, abs=400)
    bar = Polygon(box(0, 1900, 9000, 2100))
    kept = restrict(PIECE, [half], [bar], slide_size=SLIDE)
    assert len(kept.contours) == 2
    assert tissue_area(kept) == pytest.approx(1000 * 1800 - 100 * 100, abs=4000)
    assert restrict(PIECE, [Polygon(box(4000, 0, 5000, 900))], [], slide_size=SLIDE) == Tissue(
        n_too_small=4)
    assert not restrict(PIECE, [], [Polygon(box(0, 0, 9000, 9000))], slide_size=SLIDE)


def test_regions_add_up_and_their_holes_count() -> None:
    left, right = Polygon(box(0, 0, 1800, 9000)), Polygon(box(1700, 0, 9000, 9000))
    both = restrict(PIECE, [left, right], [], slide_size=SLIDE)
    assert np.array_equal(both.contours[0], PIECE.contours[0])  # together they cover the piece
    ring = Polygon(box(0, 0, 9000, 9000), [box(2000, 2000, 2500, 2500)])
    assert tissue_area(restrict(PIECE, [ring], [], slide_size=SLIDE)) == pytest.approx(
        2000**2 - 100**2 - 500**2, abs=4000)


def test_what_leaves_the_slide_is_cut_off() -> None:
    tissue = Tissue([box(-500, -500, 500, 500), box(-900, 0, -100, 50)], [[], []])
    kept = restrict(tissue, [], [], slide_size=SLIDE)
    assert [outline.tolist() for outline in kept.contours] == [
        [[0, 0], [0, 500], [500, 500], [500, 0]]]


def test_large_pieces_are_cut_on_a_coarser_raster_and_downsample_limits_it() -> None:
    piece = Tissue([box(0, 0, 40_000, 40_000)], [[]])
    cut = [Polygon(box(0, 0, 20_001, 50_000))]
    coarse = restrict(piece, cut, [], slide_size=SLIDE)
    fine = restrict(piece, cut, [], slide_size=SLIDE, downsample=4.0)
    assert abs(int(coarse.contours[0][:, 0].max()) - 20_001) <= 40_001 / RASTER_PX
    assert abs(int(fine.contours[0][:, 0].max()) - 20_001) <= 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40),
                          st.integers(1, 40)), min_size=1, max_size=3),
       st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40),
                          st.integers(1, 40)), max_size=3))
def test_cutting_is_set_arithmetic(regions: list[tuple[int, ...]], ignored: list[tuple[int, ...]]
                                   ) -> None:
    """Of whole pixels, borders of every shape included in it."""
    def polygons(several: list[tuple[int, ...]]) -> list[Polygon]:
        return [Polygon(box(x, y, x + w, y + h)) for x, y, w, h in several]

    def painted(several: list[tuple[int, ...]]) -> np.ndarray:
        mask = np.zeros((90, 90), bool)
        for x, y, w, h in several:
            mask[y:y + h + 1, x:x + w + 1] = True
        return mask

    expected = painted([(5, 5, 50, 45)]) & painted(regions) & ~painted(ignored)
    kept = restrict(Tissue([box(5, 5, 55, 50)], [[]]), polygons(regions), polygons(ignored),
                    slide_size=(90, 90))
    found = np.zeros((90, 90), np.uint8)
    for contour, holes in zip(kept.contours, kept.holes, strict=True):
        cv2.fillPoly(found, [contour], 1)
        for hole in holes:
            inner = np.zeros_like(found)
            cv2.fillPoly(inner, [hole], 1)
            cv2.polylines(inner, [hole], True, 0)
            found[inner > 0] = 0
    missing = expected & (found == 0)
    thin = cv2.morphologyEx(expected.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    assert not (found > 0)[~expected].any()
    assert not missing[thin > 0].any()  # points and lines alone are no area
