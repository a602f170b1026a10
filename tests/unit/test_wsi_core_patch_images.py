"""Patches read once: filters, sinks, image files, and what is done on a rerun."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.slides import write_pyramid
from utils.errors import SlideError
from wsi_core.coords import PatchCoords
from wsi_core.patch_images import (
    ImageFolder,
    encode_image,
    images_done,
    keep_by_pixels,
    map_patches,
    patch_reader,
    remove_images,
    save_patch_images,
    spread,
)
from wsi_core.slide import Slide, open_slide

SIDE = 64
COLUMNS, ROWS = 12, 8
WHITE, BLACK = (3, 5, 50), (0, 95)  # rows of the grid that show nothing


def colours() -> np.ndarray:
    """One for each cell, told apart by red and green; some cells white, some black."""
    index = np.arange(COLUMNS * ROWS)
    cells = np.stack([40 + 2 * index, 180 - index, np.full_like(index, 90)], axis=1)
    cells[list(WHITE)], cells[list(BLACK)] = 255, 10
    return cells.astype(np.uint8)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = colours().reshape(ROWS, COLUMNS, 3)
    image = cells.repeat(SIDE, axis=0).repeat(SIDE, axis=1)
    return write_pyramid(tmp_path_factory.mktemp("slide") / "s [1].tif", image, quality=95)


@pytest.fixture
def slide(slide_path: Path) -> Iterator[Slide]:
    with open_slide(slide_path) as opened:
        yield opened


@pytest.fixture
def patches() -> PatchCoords:
    y, x = np.divmod(np.arange(COLUMNS * ROWS), COLUMNS)
    size = (COLUMNS * SIDE, ROWS * SIDE)
    return PatchCoords(
        slide_id="s [1]", coords=np.stack([x, y], axis=1) * SIDE, patch_size=SIDE, patch_level=0,
        output_size=SIDE, level_downsample=(1.0, 1.0), level_size=size, slide_size=size,
        footprint_px_l0=(SIDE, SIDE), step_px_l0=(SIDE, SIDE))


def middle(patch: np.ndarray) -> list[int]:
    return patch[patch.shape[0] // 2, patch.shape[1] // 2].astype(int).tolist()


def test_reader_gives_rows_at_output_size(slide: Slide, patches: PatchCoords) -> None:
    """Also from a coarser level, resized, and outside the slide in the background's colour."""
    half = replace(patches, patch_size=SIDE // 2, patch_level=1, output_size=48,
                   background=(1, 2, 3), coords=np.append(patches.coords, [[-640, 0]], axis=0))
    read = patch_reader(slide, half)
    for row in (1, 40):
        assert read(row).shape == (48, 48, 3)
        assert middle(read(row)) == pytest.approx(colours()[row].astype(int), abs=4)
    assert middle(read(len(half) - 1)) == [1, 2, 3]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_come_in_order_whatever_the_threads(slide: Slide, patches: PatchCoords, threads: int
                                                 ) -> None:
    several = replace(patches, coords=np.tile(patches.coords, (5, 1)))
    found = list(map_patches(slide, several, middle, threads=threads))
    assert [row for row, _ in found] == list(range(5 * COLUMNS * ROWS))
    assert np.array([colour for _, colour in found]) == pytest.approx(
        np.tile(colours(), (5, 1)).astype(int), abs=4)
    some = [7, 2, 90]
    assert [row for row, _ in map_patches(slide, patches, middle, rows=some, threads=threads)
            ] == some


@pytest.mark.parametrize("threads", [1, 2])
def test_an_unreadable_patch_is_the_slides_failure(slide: Slide, patches: PatchCoords, threads: int
                                                   ) -> None:
    with pytest.raises(SlideError, match="has no level 9"):
        list(map_patches(slide, replace(patches, patch_level=9), middle, threads=threads))


class Listed:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[tuple[int, int, bytes]] = []

    def encode(self, patch: np.ndarray) -> bytes:
        return bytes(middle(patch))

    def put(self, x: int, y: int, data: bytes) -> None:
        self.got.append((x, y, data))


@pytest.mark.parametrize("threads", [1, 2])
def test_filters_and_sinks_share_one_reading(slide: Slide, patches: PatchCoords, threads: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sinks get the kept patches in order; no patch is read twice."""
    reads: list[tuple[int, int]] = []
    original = type(slide).read_region

    def counted(self: Slide, location: tuple[int, int], *rest: object, **more: object) -> object:
        reads.append(location)
        return original(self, location, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(type(slide), "read_region", counted)
    one, other = Listed(), Listed()
    kept = keep_by_pixels(slide, patches, white_thresh=15, black_thresh=50, sinks=[one, other],
                          threads=threads)
    assert np.flatnonzero(~kept).tolist() == sorted((*WHITE, *BLACK))
    assert len(reads) == len(patches) and one.got == other.got
    assert [(x, y) for x, y, _ in one.got] == list(map(tuple, patches.coords[kept].tolist()))


def test_each_filter_alone_and_none(slide: Slide, patches: PatchCoords) -> None:
    white = keep_by_pixels(slide, patches, white_thresh=15)
    black = keep_by_pixels(slide, patches, black_thresh=50)
    assert np.flatnonzero(~white).tolist() == sorted(WHITE)
    assert np.flatnonzero(~black).tolist() == sorted(BLACK)
    slide.close()  # without filter and sink nothing is read
    assert keep_by_pixels(slide, patches).all()


@pytest.mark.parametrize(("kind", "suffix", "tolerance"), [("png", ".png", 0), ("jpeg", ".jpg", 8)])
def test_images_show_the_patches(slide: Slide, patches: PatchCoords, tmp_path: Path, kind: str,
                                 suffix: str, tolerance: int) -> None:
    folder = tmp_path / "images" / "s [1]"
    assert save_patch_images(slide, patches, folder, kind=kind) == 96  # type: ignore[arg-type]
    assert len(list(folder.iterdir())) == 96
    read = patch_reader(slide, patches)
    for row in (1, 50, 94):
        x, y = patches.coords[row]
        found = np.asarray(Image.open(folder / f"s [1]_x{x}_y{y}{suffix}"))
        inner = (slice(16, 48), slice(16, 48))  # no neighbour's colour runs in
        assert np.abs(found[inner].astype(int) - read(row)[inner]).max() <= tolerance
    assert images_done(folder, patches, kind=kind, most=None)  # type: ignore[arg-type]


def test_quality_matters_for_jpeg_and_webp_loses_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    assert len(encode_image(noise, "jpeg", quality=30)) < len(encode_image(noise, "jpeg",
                                                                          quality=95)) / 2
    for kind in ("webp", "png"):
        data = np.frombuffer(encode_image(noise, kind, quality=30), np.uint8)
        assert np.array_equal(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1], noise)


def test_jpegs_keep_their_colours_unless_asked_to_halve_them() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2], stripes[:, 1::2] = (200, 40, 40), (40, 40, 200)  # one px each
    full, half = (cv2.imdecode(np.frombuffer(encode_image(stripes, kind), np.uint8),
                               cv2.IMREAD_COLOR)[..., ::-1].astype(int)
                  for kind in ("jpeg", "jpeg420"))
    assert np.abs(full - stripes).mean() < 10 < 40 < np.abs(half - stripes).mean()


def test_most_is_an_even_and_constant_choice(slide: Slide, patches: PatchCoords, tmp_path: Path
                                             ) -> None:
    assert spread(10, 3) == [1, 5, 8] and spread(3, 9) == spread(3, None) == [0, 1, 2]
    assert spread(0, 5) == spread(5, 0) == []
    gaps = np.diff(spread(10_007, 100))
    assert gaps.min() >= 100 and gaps.max() <= 101
    assert save_patch_images(slide, patches, tmp_path / "s", kind="png", most=5) == 5
    assert len(list((tmp_path / "s").iterdir())) == 5
    assert images_done(tmp_path / "s", patches, kind="png", most=5)
    assert not images_done(tmp_path / "s", patches, kind="png", most=6)


def test_done_is_names_and_content(slide: Slide, patches: PatchCoords, tmp_path: Path) -> None:
    folder = tmp_path / "s [1]"
    assert not images_done(folder, patches, kind="png", most=None)
    save_patch_images(slide, patches, folder, kind="png")
    assert not images_done(folder, patches, kind="jpeg", most=None)
    assert not images_done(folder, replace(patches, coords=patches.coords[1:]), kind="png",
                           most=None)  # one too many
    image = folder / "s [1]_x64_y0.png"
    image.write_bytes(b"")
    assert not images_done(folder, patches, kind="png", most=None)
    image.unlink()
    assert not images_done(folder, patches, kind="png", most=None)


def test_only_images_of_the_slide_are_removed(slide: Slide, patches: PatchCoords, tmp_path: Path
                                              ) -> None:
    folder = tmp_path / "s [1]"
    folder.mkdir()
    foreign = ["notes.txt", "s [1]_x0_y0.png.bak", "other_x0_y0.png", "s 1_x0_y0.png",
               "s [1]_xa_y0.png"]
    for name in (*foreign, "s [1]_x99999_y0.png", "s [1]_x-5_y0.jpg"):
        (folder / name).write_text("x")
    save_patch_images(slide, patches, folder, kind="png", most=2)
    names = {path.name for path in folder.iterdir()}
    assert names > set(foreign) and len(names) == len(foreign) + 2
    remove_images(folder)
    assert {path.name for path in folder.iterdir()} == set(foreign)
    for name in foreign:
        (folder / name).unlink()
    remove_images(folder)
    assert not folder.exists()
    remove_images(folder)  # not there: nothing to do


def test_folder_as_a_sink_behind_the_filters(slide: Slide, patches: PatchCoords, tmp_path: Path
                                             ) -> None:
    folder = tmp_path / "s [1]"
    save_patch_images(slide, patches, folder, kind="png")
    sink = ImageFolder(folder, "s [1]", kind="png")
    kept = keep_by_pixels(slide, patches, white_thresh=15, sinks=[sink], threads=2)
    sink.remove_others()
    left = replace(patches, coords=patches.coords[kept])
    assert len(left) == 93 and images_done(folder, left, kind="png", most=None)
