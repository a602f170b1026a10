"""Percentiles, frames, drawing and sampling of heatmaps."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.stats import percentileofscore

from utils.errors import ItemFailed, Refused
from wsi_core import heatmap
from wsi_core.heatmap import (
    Style,
    View,
    center_shift,
    check_scores,
    clip_roi,
    colour_table,
    draw_heatmap,
    draw_outline,
    fill_tissue,
    patch_boxes,
    percentiles,
    read_view,
    sample_patches,
    shifted_grids,
)
from wsi_core.slide import open_slide
from wsi_core.tissue import Tissue


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], np.int32)


# ---------------------------------------------------------------------------- scores

@pytest.mark.parametrize("kind", ["plain", "ties", "one", "constant"])
def test_percentiles_equal_scipy(kind: str) -> None:
    rng = np.random.default_rng(0)
    references = {"plain": rng.normal(size=500), "ties": rng.integers(0, 9, 500).astype(float),
                  "one": np.array([0.3]), "constant": np.full(40, 2.0)}[kind]
    scores = np.concatenate([references[:50], rng.normal(size=50), [-1e9, 1e9]])
    expected = [percentileofscore(references, score, kind="rank") for score in scores]
    np.testing.assert_allclose(percentiles(scores, references), expected, rtol=0, atol=1e-10)
    own = [percentileofscore(references, score, kind="rank") for score in references]
    np.testing.assert_allclose(percentiles(references), own, rtol=0, atol=1e-10)


def test_percentiles_take_a_column_and_nothing() -> None:
    column = np.array([[3.0], [1.0], [2.0]], np.float32)
    np.testing.assert_allclose(percentiles(column), np.array([3, 1, 2]) / 3 * 100)
    assert percentiles(np.empty(0)).shape == (0,)


def test_bad_scores_are_named() -> None:
    with pytest.raises(ItemFailed, match="slide_7: the attention of 1 of 3 patches.*row 1"):
        check_scores(np.array([1, np.nan, 2]), np.zeros((3, 2)), what="slide_7")
    with pytest.raises(ItemFailed, match="2 scores for 3 patches"):
        check_scores(np.ones(2), np.zeros((3, 2)), what="slide_7")


def test_sampling_modes() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.9, 0.0, 0.55])
    assert sample_patches(scores, mode="topk", k=3).tolist() == [1, 3, 5]
    assert sample_patches(scores, mode="reverse_topk", k=2).tolist() == [4, 0]
    drawn = sample_patches(scores, mode="range_sample", k=10, score_start=0.4, score_end=0.6)
    assert drawn.tolist() == [5, 2]  # on the scale of the scores, best first
    nothing = sample_patches(scores, mode="range_sample", k=3, score_start=0.6, score_end=0.8)
    assert len(nothing) == 0
    many = np.linspace(0, 1, 1000)
    one, two = (set(sample_patches(many, mode="range_sample", k=20, seed=seed).tolist())
                for seed in (1, 2))
    assert len(one) == 20 and one != two
    assert one == set(sample_patches(many, mode="range_sample", k=20, seed=1).tolist())


def test_center_shift_table() -> None:
    assert center_shift(0.5, enabled=False) == 0
    assert [center_shift(overlap, enabled=True) for overlap in (0, 0.24, 0.25, 0.94, 0.95)] == [
        0.375, 0.375, 0.5, 0.5, 0.625]


# ---------------------------------------------------------------------------- frames

def test_view_of_level_region_and_reduction(slide_folder: Path) -> None:
    with open_slide(slide_folder / "slide_0.tif") as slide:
        image, view = read_view(slide, 1)
        assert view == View((0, 0), (2, 2), (1024, 768)) and image.shape == (768, 1024, 3)
        small, reduced = read_view(slide, 1, shrink=4)
        assert reduced == View((0, 0), (8, 8), (256, 192))
        expected = cv2.resize(image, (256, 192), interpolation=cv2.INTER_AREA)
        assert np.array_equal(small, expected)
        part, frame = read_view(slide, 1, roi_l0=(512, 256, 1512, 900))
        assert frame == View((512, 256), (2, 2), (500, 322))
        assert np.array_equal(part, image[128:450, 256:756])
        tiny, frame = read_view(slide, 0, roi_l0=(512, 256, 1512, 900), max_pixels=400_000)
        assert tiny.shape[0] * tiny.shape[1] < 400_000 and frame.downsample[0] > 1
        centre = frame.place(np.array([1012, 578]))
        assert np.allclose(centre, np.array(frame.size) / 2, atol=1)


def test_region_is_cut_at_the_slide_or_refused() -> None:
    assert clip_roi((-5, 10, 3000, 90), (2048, 64), name="a.svs") == (0, 10, 2048, 64)
    with pytest.raises(ItemFailed, match="a.svs: the region"):
        clip_roi((5000, 0, 6000, 10), (2048, 64), name="a.svs")


def test_boxes_touch_where_patches_touch_and_never_vanish() -> None:
    view = View((10, 0), (3.7, 3.7), (100, 100))
    coords = np.stack([np.arange(6) * 50, np.zeros(6, int)], axis=1)
    boxes = patch_boxes(view, coords, (50, 50))
    assert np.array_equal(boxes[1:, 0], boxes[:-1, 2])
    thin = patch_boxes(View((0, 0), (64, 64), (100, 100)), np.array([[640, 640]]), (8, 8))
    assert thin.tolist() == [[10, 10, 11, 11]]
    outside = patch_boxes(view, np.array([[-500, 0], [9999, 9999]]), (50, 50))
    assert ((outside[:, 2] - outside[:, 0]) * (outside[:, 3] - outside[:, 1]) == 0).all()


def test_tissue_less_its_holes_with_islands() -> None:
    tissue = Tissue([box(40, 40, 60, 60), box(0, 0, 200, 200)], [[], [box(20, 20, 100, 100)]])
    mask = fill_tissue(View((0, 0), (2, 2), (120, 120)), tissue)
    assert mask[5, 5] == 255 and mask[15, 15] == 0 and mask[25, 25] == 255  # island in the hole
    assert mask[110, 110] == 0
    moved = fill_tissue(View((20, 20), (2, 2), (120, 120)), tissue)
    assert np.array_equal(moved[:-10, :-10], mask[10:, 10:])


# ---------------------------------------------------------------------------- drawing

def loop_heatmap(image: np.ndarray, view: View, scores: np.ndarray, coords: np.ndarray,
                 patch: tuple[float, float], style: Style, tissue: Tissue | None) -> np.ndarray:
    """The same picture, patch by patch."""
    limit = style.threshold if style.threshold >= 0 else 1 / len(scores)
    total, count, shown = (np.zeros(image.shape[:2]) for _ in range(3))
    for score, (x0, y0, x1, y1) in zip(scores, patch_boxes(view, coords, patch), strict=True):
        value = float(score >= limit) if style.binarize else score
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
        if not style.binarize or score >= limit:
            shown[y0:y1, x0:x1] = 1
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    if style.binarize:
        mean = np.rint(mean)
    kernel = (2 * style.blur_px + 1,) * 2
    if style.blur_px:
        mean = cv2.GaussianBlur(mean.astype(np.float32), kernel, 0)
    if tissue is not None:
        shown[fill_tissue(view, tissue) == 0] = 0
    canvas = np.full_like(image, 255) if style.blank_canvas else image
    layer = canvas.copy()
    index = np.clip(mean * 256 + 1e-6, 0, 255).astype(np.uint8)
    layer[shown > 0] = colour_table(style.cmap)[index[shown > 0]]
    if style.blur_px:
        layer = cv2.GaussianBlur(layer, kernel, 0)
    if style.alpha < 1:
        layer = cv2.addWeighted(layer, style.alpha, canvas, 1 - style.alpha, 0)
    return layer


STYLES = [Style(), Style(alpha=1), Style(blank_canvas=True, cmap="coolwarm"), Style(blur_px=9),
          Style(binarize=True, threshold=0.6), Style(binarize=True, threshold=0.5, blur_px=5),
          Style(binarize=True)]


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("bands", [1024, 37])
def test_drawing_equals_the_loop(
    style: Style, bands: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heatmap, "BAND_ROWS", bands)
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (180, 230, 3), dtype=np.uint8)
    view = View((7.0, 3.0), (4.0, 4.1), (230, 180))
    xs, ys = np.meshgrid(np.arange(-40, 900, 64), np.arange(-40, 700, 64), indexing="ij")
    coords = np.concatenate([np.stack([xs.ravel(), ys.ravel()], axis=1),
                             rng.integers(0, 700, (40, 2))])  # other grids in between
    scores = rng.random(len(coords))
    tissue = Tissue([box(30, 30, 800, 600)], [[box(200, 200, 400, 300)]])
    drawn = draw_heatmap(image, view, scores, coords, patch_px_l0=(128, 128), style=style,
                         tissue=tissue)
    expected = loop_heatmap(image, view, scores, coords, (128, 128), style, tissue)
    assert np.abs(drawn.astype(int) - expected).max() <= (1 if style.blur_px else 0)
    assert not np.array_equal(drawn, image)


def test_one_patch_constant_scores_and_coordinates_outside_are_drawn() -> None:
    image = np.full((50, 50, 3), 200, np.uint8)
    view = View((0, 0), (1, 1), (50, 50))
    style = Style(alpha=1)
    one = draw_heatmap(image, view, percentiles(np.array([5.0])) / 100, np.array([[10, 10]]),
                       patch_px_l0=(20, 20), style=style)
    assert (one[10:30, 10:30] == colour_table("jet")[255]).all()
    assert (one[:10] == 200).all() and (one[30:] == 200).all()
    coords = np.array([[0, 0], [20, 0], [5000, 5000]])
    same = draw_heatmap(image, view, percentiles(np.ones(3)) / 100, coords,
                        patch_px_l0=(20, 20), style=style)
    assert len(np.unique(same[:20, :40].reshape(-1, 3), axis=0)) == 1
    nothing = draw_heatmap(image, view, np.empty(0), np.empty((0, 2)), patch_px_l0=(20, 20),
                           style=style)
    assert np.array_equal(nothing, image)


def test_the_image_is_not_changed_and_nan_is_no_picture() -> None:
    image = np.full((50, 50, 3), 200, np.uint8)
    view = View((0, 0), (1, 1), (50, 50))
    draw_heatmap(image, view, np.array([0.5]), np.array([[0, 0]]), patch_px_l0=(20, 20),
                 style=Style(blur_px=3))
    assert (image == 200).all()
    with pytest.raises(ItemFailed, match="not a number"):
        draw_heatmap(image, view, np.array([np.nan]), np.array([[0, 0]]), patch_px_l0=(20, 20),
                     style=Style())


def test_colour_maps() -> None:
    assert colour_table("jet").shape == (256, 3) and colour_table("jet").dtype == np.uint8
    with pytest.raises(Refused, match="'virids': did you mean 'viridis'"):
        colour_table("virids")


@pytest.mark.parametrize(("patch", "step", "k"), [
    ((64, 64), (32, 32), (2, 2)), ((64, 64), (39, 39), (2, 2)), ((64, 64), (16, 16), (4, 4)),
    ((64, 64), (64, 64), (1, 1)), ((96, 64), (32, 64), (3, 1)), ((100, 100), (33.4, 33.4), (3, 3))])
def test_shifted_grids_lie_without_overlap_and_are_alike(
    patch: tuple[float, float], step: tuple[float, float], k: tuple[int, int]
) -> None:
    """Every k-th column and row of an overlapping grid; number 0 starts at the origin."""
    origin = (17, 5)
    index = np.indices((24, 24)).reshape(2, -1).T
    coords = origin + np.rint(index * step).astype(np.int64)
    numbers = shifted_grids(coords, origin_l0=origin, patch_px_l0=patch, step_px_l0=step)
    assert sorted(set(numbers.tolist())) == list(range(k[0] * k[1]))
    assert np.bincount(numbers).tolist() == [24 * 24 // (k[0] * k[1])] * (k[0] * k[1])
    for number in set(numbers.tolist()):
        own = coords[numbers == number]
        away = np.abs(own[:, None] - own[None])
        apart = (away >= np.floor(patch)).any(axis=2)
        assert apart[~np.eye(len(own), dtype=bool)].all()
    assert (coords[numbers == 0] == origin).all(axis=1).any()
    shuffled = np.random.default_rng(0).permutation(len(coords))  # some patches lie on no tissue
    assert np.array_equal(numbers[shuffled[:50]], shifted_grids(
        coords[shuffled[:50]], origin_l0=origin, patch_px_l0=patch, step_px_l0=step))


def test_outline_goes_around_patches_together_and_around_gaps() -> None:
    """Black on white, also on a black and on a white picture; nothing inside or outside."""
    view = View((0.0, 0.0), (2.0, 2.0), (200, 160))
    coords = np.array([(x, y) for x in (40, 80, 120) for y in (40, 80, 120) if (x, y) != (80, 80)]
                      + [(300, 200)])
    for shade in (0, 127, 255):
        image = np.full((160, 200, 3), shade, np.uint8)
        drawn = draw_outline(image, view, coords, (40.0, 40.0))
        assert (image == shade).all()
        changed = (drawn != shade).any(axis=2)
        black, white = (drawn == 0).all(axis=2), (drawn == 255).all(axis=2)
        for x, y in ((20, 50), (79, 50), (50, 20), (50, 79), (150, 110)):  # outer edges
            assert black[y, x] and white[y - 3:y + 4, x - 3:x + 4].any()
        assert black[42:58, 38:42].any()  # the edge of the gap
        assert not changed[50, 50] and not changed[24:36, 24:36].any()
        assert not changed[24:36, 39:41].any()  # neighbours have no line between them
        assert not changed[:17].any() and not changed[:, 180:].any()
    nothing = draw_outline(image, view, np.empty((0, 2), np.int64), (40.0, 40.0))
    assert np.array_equal(nothing, image)
