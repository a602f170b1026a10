"""Tissue packed onto a canvas: the layout, and the reader that packs a slide as it is read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import pytest

from tests.slides import tissue_image, write_pyramid
from utils.errors import ItemFailed
from wsi_core.find_tissue import TissueSearch
from wsi_core.image_layout import (
    GAP_PX,
    MARGIN_UM,
    UNIT_PX,
    Frame,
    cut_apart,
    image_frame,
    pack_tissue,
    shelve,
)
from wsi_core.packing import PackedSlide, open_packed
from wsi_core.presets import PatchingParameters
from wsi_core.scaled_slide import ScaledSlide, sweep_cache_mb
from wsi_core.slide import Slide, open_slide
from wsi_core.tissue import Tissue

SMALL = PatchingParameters(a_t=0.05, a_h=0.05)
FRAME = Frame(size_px=(4000, 3000), downsample=(4.0, 4.0), mpp_um=1.0)


def square(x: int, y: int, width: int, height: int) -> np.ndarray:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.int32)


def tissue_of(*outlines: np.ndarray, holes: tuple[np.ndarray, ...] = ()) -> Tissue:
    return Tissue(list(outlines), [[*holes], *([] for _ in outlines[1:])])


def overlaps(boxes: Sequence[tuple[float, ...]]) -> bool:
    return any(a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3]
               and b[1] < a[1] + a[3] for at, a in enumerate(boxes) for b in boxes[at + 1:])


# ---------------------------------------------------------------------------- layout

@pytest.mark.parametrize("seed", range(8))
def test_cuts_take_all_tissue_once_and_keep_their_distance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((120, 160), bool)
    for _ in range(int(rng.integers(1, 12))):
        x, y = int(rng.integers(0, 150)), int(rng.integers(0, 110))
        mask[y:y + rng.integers(1, 20), x:x + rng.integers(1, 20)] = True
    band = 5
    pieces = cut_apart(mask, band=band)
    inside = np.zeros(mask.shape, int)
    for x, y, width, height in pieces:
        inside[y:y + height, x:x + width] += 1
        view = mask[y:y + height, x:x + width]  # tight
        assert view[0].any() and view[-1].any() and view[:, 0].any() and view[:, -1].any()
        for line in (view.any(axis=0), view.any(axis=1)):  # and nothing left to cut
            assert np.diff(np.flatnonzero(line)).max(initial=1) <= band
    assert inside[mask].min() == 1 and inside.max() == 1
    wide = [(x, y, w + band, h + band) for x, y, w, h in pieces]
    assert not overlaps(wide)


def test_cutting_goes_on_inside_what_was_cut() -> None:
    mask = np.zeros((40, 40), bool)
    mask[0:5, 0:40] = mask[20:40, 0:5] = mask[20:25, 30:40] = True  # no one cut parts the last two
    assert cut_apart(mask, band=10) == [(0, 0, 40, 5), (0, 20, 5, 20), (30, 20, 10, 5)]
    assert cut_apart(np.zeros((9, 9), bool), band=3) == []


@pytest.mark.parametrize("seed", range(5))
def test_shelves_hold_everything_apart_on_little_room(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [(int(w), int(h)) for w, h in rng.integers(1, 60, (25, 2))]
    places = shelve(sizes)
    gap = GAP_PX // UNIT_PX
    boxes = [(x, y, w + gap, h + gap) for (x, y), (w, h) in zip(places, sizes, strict=True)]
    assert not overlaps(boxes) and min(min(place) for place in places) == 0
    width, height = (max(box[side] + box[side + 2] for box in boxes) for side in (0, 1))
    assert width * height < 1.6 * sum(box[2] * box[3] for box in boxes)
    assert 0.4 < width / height < 2.5
    assert shelve(sizes) == places


def test_pieces_far_apart_are_packed_and_keep_where_they_were() -> None:
    """Two pieces in opposite corners: a fraction of their bounding box."""
    tissue = tissue_of(square(400, 400, 1600, 1200), square(13_000, 10_000, 2000, 1200))
    packed = pack_tissue(tissue, FRAME)
    plain = pack_tissue(tissue, FRAME, keep_gaps=True)
    assert packed is not None and plain is not None
    assert len(packed.boxes) == 2 and len(plain.boxes) == 1
    assert np.prod(packed.size_px) < 0.15 * np.prod(plain.size_px)
    margin = MARGIN_UM / FRAME.mpp_um
    first = min(packed.boxes, key=lambda box: box.x_l0)
    assert first.x_l0 == pytest.approx(max(0, 100 - margin) * 4, abs=4 * UNIT_PX)
    assert first.x_l0 + first.width_l0 == pytest.approx((500 + margin) * 4, abs=8 * UNIT_PX)
    for box in packed.boxes:
        assert (box.width_l0, box.height_l0) == (4 * box.width, 4 * box.height)
        assert box.x % UNIT_PX == box.y % UNIT_PX == 0
        assert box.x + box.width <= packed.size_px[0] and box.y + box.height <= packed.size_px[1]
    assert not overlaps([box[:4] for box in packed.boxes])
    assert not overlaps([box[4:] for box in packed.boxes])
    again = pack_tissue(tissue, FRAME)
    assert again is not None and again.boxes == packed.boxes


def test_what_cannot_be_packed_better_stays_as_it_is() -> None:
    """An L has no band of glass; a near pair would need more room apart than together."""
    corner = np.array([[400, 400], [9000, 400], [9000, 900], [900, 900], [900, 9000], [400, 9000]],
                      np.int32)
    for tissue in (tissue_of(corner), tissue_of(square(2000, 2000, 800, 800),
                                                square(3200, 2000, 800, 800))):
        packed, plain = pack_tissue(tissue, FRAME), pack_tissue(tissue, FRAME, keep_gaps=True)
        assert packed is not None and plain is not None and packed.boxes == plain.boxes
    assert pack_tissue(Tissue(), FRAME) is None


def test_the_tissue_map_is_the_share_of_tissue() -> None:
    """Against the outlines drawn at full resolution, moved with the pieces."""
    tissue = tissue_of(square(4000, 2000, 2400, 3200), square(200, 10_000, 2600, 800),
                       holes=(square(4800, 2800, 800, 1200),))
    packed = pack_tissue(tissue, FRAME)
    assert packed is not None and len(packed.boxes) == 2
    frame = np.zeros(FRAME.size_px[::-1], np.float32)
    for outline, value in ((tissue.contours[0], 1), (tissue.contours[1], 1),
                           (tissue.holes[0][0], 0)):
        cv2.fillPoly(frame, [outline // 4], value)
    image = np.zeros((packed.tissue_map.shape[0] * 64, packed.tissue_map.shape[1] * 64), np.float32)
    for box in packed.boxes:
        x, y = round(box.x_l0 / 4), round(box.y_l0 / 4)
        image[box.y:box.y + box.height, box.x:box.x + box.width] = frame[
            y:y + box.height, x:x + box.width]
    shares = cv2.resize(image, packed.tissue_map.shape[::-1], interpolation=cv2.INTER_AREA)
    off = np.abs(packed.tissue_map / 255 - shares)
    assert packed.tissue_map.dtype == np.uint8 and packed.cell_px == 64
    assert off.mean() < 0.03 and off.max() < 0.3  # cells on an edge: units count as a whole
    assert packed.tissue_map.max() == 255


def test_tissue_at_the_edge_of_the_slide_keeps_inside_it() -> None:
    frame = replace(FRAME, size_px=(1003, 997))
    packed = pack_tissue(tissue_of(square(0, 0, 4011, 3987)), frame)
    assert packed is not None
    assert packed.boxes == ((0, 0, 1003, 997, 0, 0, 4012, 3988),)
    assert packed.size_px == (1008, 1000)


# ---------------------------------------------------------------------------- scale

def test_a_level_of_nearly_the_scale_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_image(1023, 777), downsamples=(1, 4), mpp=0.25)
    with open_slide(path) as slide:
        frame = image_frame(slide, 1.005, (0.25, 0.25))
        assert frame.size_px == slide.level_dimensions[1]
        assert frame.mpp_um == pytest.approx(0.25 * 1023 / 256, rel=1e-2)
        assert image_frame(slide, 1.02, (0.25, 0.25)).size_px == (251, 190)
        assert image_frame(slide, 0.5, (0.25, 0.5)).size_px == (512, 777)  # not square pixels
        assert image_frame(slide, 0.24, (0.25, 0.25)).size_px == (1066, 809)  # 4 % enlarged
        with pytest.raises(ItemFailed, match=r"a\.tif: has 0\.25 um per pixel, too coarse.* 0\.2 "):
            image_frame(slide, 0.2, (0.25, 0.25))


# ---------------------------------------------------------------------------- pixels

@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stained squares far apart on a slide of known pixels, with a black gap."""
    image = np.full((1700, 2300, 3), 243, np.uint8)
    rng = np.random.default_rng(0)
    stain = rng.integers(60, 200, (1700, 2300, 3), dtype=np.uint8) // (1, 3, 1)
    for x, y in ((100, 80), (1500, 1100)):
        image[y:y + 500, x:x + 700] = stain[y:y + 500, x:x + 700]
    image[300:340, 200:300] = 3
    path = tmp_path_factory.mktemp("slides") / "p.png"
    cv2.imwrite(str(path), image[:, :, ::-1])
    return path


def opened(path: Path, image_mpp: float = 0.9, **options: object) -> PackedSlide:
    """At 0.5 um a level-0 px. Small margins need small um: these slides are 1 mm."""
    return open_packed(path, image_mpp=image_mpp, mpp_um=0.5, parameters=SMALL, **options)  # type: ignore[arg-type]


def test_windows_agree_on_every_pixel(picture: Path) -> None:
    """Spec defect 22: read in tiles of any size and order as in one piece, at a ratio of 1.8."""
    with opened(picture) as packed:
        width, height = packed.size_px
        whole = packed.read(0, 0, width, height)
        assert len(packed.boxes) == 2 and whole.shape == (height, width, 3)
    with opened(picture, cache_mb=1) as packed:
        put = np.zeros_like(whole)
        for y in reversed(range(0, height, 117)):
            for x in range(0, width, 93):
                put[y:y + 117, x:x + 93] = packed.read(
                    x, y, min(93, width - x), min(117, height - y))
        assert np.array_equal(put, whole)
        beyond = packed.read(-20, -10, 50, 40)
        assert np.array_equal(beyond[10:, 20:], whole[:30, :30])
        assert (beyond[:10] == 255).all() and (beyond[:, :20] == 255).all()


@pytest.mark.parametrize("image_mpp", [0.5, 0.9, 1.7])
def test_pixels_are_those_of_the_slide_without_drift(image_mpp: float, picture: Path) -> None:
    source = cv2.imread(str(picture))[:, :, ::-1].copy()
    source[source.sum(axis=2) < 30] = 255
    with opened(picture, image_mpp) as packed:
        image = packed.read(0, 0, *packed.size_px)
        frame = packed.record.frame_px
        small = cv2.resize(source, frame, interpolation=cv2.INTER_AREA)
        boxed = np.zeros(image.shape[:2], bool)
        for box in packed.boxes:
            x, y = (round(at * side / full) for at, side, full in zip(
                box[4:6], frame, packed.record.slide_size, strict=True))
            here = (slice(box.y, box.y + box.height), slice(box.x, box.x + box.width))
            boxed[here] = True
            off = np.abs(image[here].astype(int) - small[y:y + box.height, x:x + box.width])
            assert off.mean() < (0.01 if image_mpp == 0.5 else 6)  # noise: half a px would be 20
        assert (image[~boxed] == 255).all() and not boxed.all()


def test_black_gaps_become_white(picture: Path) -> None:
    with opened(picture, 0.5) as packed:
        image = packed.read(0, 0, *packed.size_px)
        assert int(image.astype(int).sum(axis=2).min()) >= 30
        first = min(packed.boxes, key=lambda box: box.x_l0)
        x, y = 250 - int(first.x_l0) + first.x, 320 - int(first.y_l0) + first.y
        assert (image[y, x] == 255).all()


@pytest.mark.parametrize("image_mpp", [0.5, 0.9])
def test_dark_nuclei_stay_dark(tmp_path: Path, image_mpp: float) -> None:
    """The published rule takes every black pixel for a gap, and puts white dots into stained
    tissue (shared slide cmu_1_small_region.svs); a gap is black all over, also across cells."""
    image = np.full((1200, 1200, 3), 243, np.uint8)
    image[100:1100, 100:1100] = (120, 60, 110)
    for x in range(150, 1050, 60):
        for y in range(150, 1050, 60):
            cv2.circle(image, (x, y), 8, (4, 4, 4), -1)  # 8 um wide
    image[480:560, 400:700] = 2  # 40 x 150 um, over the corner of four cells
    path = tmp_path / "n.png"
    cv2.imwrite(str(path), image[:, :, ::-1])
    image[480:560, 400:700] = 255
    with opened(path, image_mpp) as packed:
        width, height = packed.record.frame_px  # all of the slide, in one piece
        assert packed.boxes[0][:4] == (0, 0, width, height)
        found = packed.read(0, 0, width, height).astype(int)
    expected = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    assert np.abs(found - expected).mean() < (0.01 if image_mpp == 0.5 else 2)


def test_points_go_back_to_the_slide(picture: Path) -> None:
    with opened(picture, 0.5) as packed:
        image, slide = packed.read(0, 0, *packed.size_px), cv2.imread(str(picture))[:, :, ::-1]
        rows, columns = np.nonzero(image[..., 0] < 200)
        places = packed.to_level0(np.stack([columns, rows], axis=1)).astype(int)
        assert len(places) > 1000
        assert np.array_equal(slide[places[:, 1], places[:, 0]], image[rows, columns])
        box, other = packed.boxes
        gap = (box.x + box.width + 1, box.y + box.height + 1)
        corners = packed.to_level0(np.array([box[:2], (box.x + box.width, box.y + box.height),
                                             other[:2], gap, (-1, 0)]))
        assert corners[0].tolist() == list(box[4:6]) and corners[2].tolist() == list(other[4:6])
        assert corners[1] == pytest.approx((box.x_l0 + box.width_l0, box.y_l0 + box.height_l0))
        assert np.isnan(corners[3:]).all()
        assert packed.to_level0(np.empty((0, 2))).shape == (0, 2)


def test_threads_may_read_at_once(picture: Path) -> None:
    with opened(picture, cache_mb=1) as packed:
        width, height = packed.size_px
        whole = packed.read(0, 0, width, height)
        wrong: list[int] = []

        def reading(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(20):
                x, y = int(rng.integers(0, width - 64)), int(rng.integers(0, height - 64))
                if not np.array_equal(packed.read(x, y, 64, 64), whole[y:y + 64, x:x + 64]):
                    wrong.append(seed)

        threads = [threading.Thread(target=reading, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_the_best_level_is_read_and_only_where_the_window_lies(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_image(2048, 2048, seed=3, blobs=1),
                         downsamples=(1, 4, 16), mpp=0.25)
    with open_packed(path, image_mpp=1.1, parameters=SMALL) as packed:
        inner = packed._slide
        asked: list[tuple[int, tuple[int, int]]] = []
        plain = inner.read_region

        def spy(location: tuple[int, int], level: int, size: tuple[int, int], **more: object
                ) -> np.ndarray:
            asked.append((level, size))
            return plain(location, level, size, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(inner, "read_region", spy)
        box = packed.boxes[0]
        packed.read(box.x + 5, box.y + 5, 60, 60)
        assert {level for level, _ in asked} == {1}
        assert sum(width * height for _, (width, height) in asked) <= 4 * 600**2
        before = len(asked)
        packed.read(box.x + 9, box.y + 9, 50, 50)  # kept
        assert len(asked) == before


def test_a_slide_without_a_pyramid_is_read_in_blocks(tmp_path: Path) -> None:
    """Far below level 0 a cell shrinks, so that no read is larger than a block of the slide."""
    image = cv2.resize(tissue_image(640, 480), (3200, 2400))
    path = tmp_path / "flat.png"
    cv2.imwrite(str(path), image[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    with open_slide(path) as slide:
        scaled = ScaledSlide(slide, (200, 150))
        assert scaled.cell_px == 256  # 256 px of 16: 4096
        found = scaled.read(0, 0, 200, 150)
    assert np.abs(found.astype(int) - cv2.resize(
        image, (200, 150), interpolation=cv2.INTER_AREA)).max() <= 1


def test_a_wide_picture_is_read_row_by_row_without_reading_twice() -> None:
    """Windows of 256 px, 100 px askew to the cells, of a slide of 90,000 px without pixels."""
    class Blank:
        level_dimensions, level_downsamples = ((90_000, 1200),), ((1.0, 1.0),)

        def read_region(self, location_l0: tuple[int, int], level: int, size: tuple[int, int],
                        **_: object) -> np.ndarray:
            asked.append(location_l0)
            return np.zeros((size[1], size[0], 3), np.uint8)

    for cache_mb in (sweep_cache_mb(90_000), 128):
        asked: list[tuple[int, int]] = []
        scaled = ScaledSlide(cast(Slide, Blank()), (90_000, 1200), cache_mb=cache_mb)
        for y in range(100, 1200, 256):
            for x in range(100, 90_000, 256):
                scaled.read(x, y, 256, 256)
        assert (len(asked) == len(set(asked))) == (cache_mb != 128)


# ---------------------------------------------------------------------------- without preparation

def test_the_record_and_map_of_a_slide_opened_directly(picture: Path) -> None:
    with opened(picture, 0.9) as packed:
        record = packed.record
        assert record.slide_id == "p" and record.slide_size == (2300, 1700)
        assert record.slide["slide_name"] == "p.png"
        assert packed.mpp_um == pytest.approx(0.9, rel=2e-3)
        assert record.parameters["image_mpp"] == 0.9 and record.parameters["a_t"] == 0.05
        width, height = (-(-side // record.cell_px) for side in packed.size_px)
        assert packed.tissue_map.shape == (height, width) and packed.tissue_map.any()
    with opened(picture, 0.9, keep_gaps=True) as plain:
        assert len(plain.boxes) == 1 and np.prod(plain.size_px) > np.prod(record.size_px)
    with opened(picture, 0.9, search=TissueSearch(segmenter="otsu", min_area_um2=100,
                                                  min_hole_um2=100)) as other:
        assert other.record.parameters["segmenter"] == "otsu"


def test_slides_that_cannot_be_packed(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(ItemFailed, match=r"p\.png: pixel size unknown"):
        open_packed(picture, image_mpp=1)
    glass = tmp_path / "glass.png"
    cv2.imwrite(str(glass), np.full((600, 600, 3), 243, np.uint8))
    with pytest.raises(ItemFailed, match=r"glass\.png: has no tissue"):
        opened(glass)
    with pytest.raises(ItemFailed, match="too coarse"):
        opened(picture, 0.4)


def test_a_real_slide(shared: Path) -> None:
    path = shared / "data/slides/biopsies_mpp1_3levels.tif"
    with open_packed(path, image_mpp=2.0, search=TissueSearch(segmenter="otsu")) as packed:
        assert len(packed.boxes) == 2 and packed.mpp_um == pytest.approx(2, rel=2e-3)
        image = packed.read(0, 0, *packed.size_px)
        cells = cv2.resize(255 - image.min(axis=2), packed.tissue_map.shape[::-1],
                           interpolation=cv2.INTER_AREA)
        tissue = packed.tissue_map > 128
        assert cells[tissue].mean() > 3 * cells[packed.tissue_map == 0].mean()
