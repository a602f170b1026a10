"""Opening slides, levels, pixel sizes, backgrounds; OpenSlide and flat backends."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from tests.slides import tissue_image, write_pyramid
from utils.errors import SlideError
from wsi_core import slide as slide_module
from wsi_core import slide_flat
from wsi_core.slide import (
    MAX_SIDE_PX,
    best_level,
    check_dimensions,
    compose,
    nominal_downsample,
    open_slide,
    read_level,
)
from wsi_core.slide_openslide import OpenSlideSlide

WHITE = (255, 255, 255)


def as_clam(path: Path, location: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.array(slide.read_region(location, level, size).convert("RGB"))


@pytest.fixture(scope="module")
def odd_pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Level sizes that are no whole fraction of level 0."""
    path = tmp_path_factory.mktemp("odd") / "odd.tif"
    return write_pyramid(path, tissue_image(1003, 701), downsamples=(1, 2.003, 4.01))


# ---------------------------------------------------------------------------- reading

@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("location", [(0, 0), (-37, -21), (333, 218), (950, 650), (5000, 5000)])
def test_regions_on_black_are_those_clam_reads(odd_pyramid: Path, level: int,
                                               location: tuple[int, int]) -> None:
    with open_slide(odd_pyramid, backend="openslide") as slide:
        ours = slide.read_region(location, level, (123, 77))
    assert ours.shape == (77, 123, 3) and ours.dtype == np.uint8 and ours.flags.writeable
    assert np.array_equal(ours, as_clam(odd_pyramid, location, level, (123, 77)))


def test_outside_of_the_slide_has_the_background(odd_pyramid: Path) -> None:
    with open_slide(odd_pyramid, backend="openslide") as slide:
        region = slide.read_region((-10, -20), 0, (64, 64), background=WHITE)
        assert (region[:20] == 255).all() and (region[:, :10] == 255).all()
        assert np.array_equal(region[20:, 10:], slide.read_region((0, 0), 0, (54, 44)))


def test_partly_transparent_pixels_are_blended_but_kept_on_black() -> None:
    rgba = np.array([[[10, 20, 30, 255], [100, 100, 100, 0], [200, 100, 0, 51]]], np.uint8)
    assert compose(rgba, (0, 0, 0)).tolist() == [[[10, 20, 30], [0, 0, 0], [200, 100, 0]]]
    blended = [round(0.2 * colour + 0.8 * 250) for colour in (200, 100, 0)]
    assert compose(rgba, (250, 250, 250)).tolist() == [[[10, 20, 30], [250] * 3, blended]]


def test_numpy_integers_are_places_too(odd_pyramid: Path) -> None:
    corner = np.array([16, 32])
    with open_slide(odd_pyramid, backend="openslide") as slide:
        assert np.array_equal(slide.read_region((corner[0], corner[1]), 0, (8, 8)),
                              slide.read_region((16, 32), 0, (8, 8)))


@pytest.mark.parametrize(("level", "size", "words"), [
    (3, (8, 8), "no level 3, only levels 0 to 2"), (-1, (8, 8), "no level -1"),
    (0, (0, 8), "0 x 8 px"), (0, (60_000, 60_000), "ceiling")])
def test_requests_that_make_no_sense_are_refused(odd_pyramid: Path, level: int,
                                                 size: tuple[int, int], words: str) -> None:
    for backend in ("openslide", "auto"):
        with (open_slide(odd_pyramid, backend=backend) as slide,
              pytest.raises(SlideError, match=words)):
            slide.read_region((0, 0), level, size)


def test_cache_size_reaches_openslide(odd_pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = openslide.OpenSlideCache
    monkeypatch.setattr(openslide, "OpenSlideCache", lambda size: sizes.append(size) or real(size))
    open_slide(odd_pyramid, backend="openslide").close()
    open_slide(odd_pyramid, backend="openslide", cache_mb=3).close()
    assert sizes == [256 * 2**20, 3 * 2**20]


def test_real_formats_open(shared: Path) -> None:
    folder = shared / "data" / "slides"
    facts = {
        "fluo_dapi_7levels.ndpi": ("openslide", 7, 0.2282, 40.0),
        "dicom_camelyon_overview_a/1.dcm": ("openslide", 1, 28.969, None),
        "cmu_1_small_region.svs": ("tiff-tiles", 1, 0.499, 20.0),
        "binary_mask_mpp4.tif": ("openslide", 2, 4.032, None)}
    for name, (backend, levels, mpp, power) in facts.items():
        with open_slide(folder / name) as slide:
            assert (slide.backend, len(slide.level_dimensions)) == (backend, levels)
            assert slide.mpp_um is not None and slide.mpp_um[0] == pytest.approx(mpp, abs=1e-3)
            assert slide.objective_power == power and slide.mpp_problem == ""
            assert np.array_equal(slide.read_region((100, 100), 0, (64, 64)),
                                  as_clam(folder / name, (100, 100), 0, (64, 64)))
    for name in ("breast_crop_6levels_badmpp.tiff", "boxes_4levels.tiff"):
        with open_slide(folder / name) as slide:
            assert slide.mpp_um is None and "print resolution" in slide.mpp_problem


# ---------------------------------------------------------------------------- levels

def test_level_downsamples_are_a_pair_per_level(odd_pyramid: Path) -> None:
    with open_slide(odd_pyramid) as slide:
        assert slide.level_dimensions[0] == (1003, 701)
        for (w, h), (x, y) in zip(slide.level_dimensions, slide.level_downsamples, strict=True):
            assert (x, y) == (1003 / w, 701 / h)


def test_best_level_takes_64_003_for_64() -> None:
    class Fake:
        level_downsamples = ((1.0, 1.0), (4.0, 4.0), (16.01, 16.0), (64.003, 64.003))

    slide: slide_module.Slide = Fake()  # type: ignore[assignment]
    assert [best_level(slide, d) for d in (0.5, 1, 3.9, 4, 15, 16, 32, 64, 1000)] == [
        0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_nominal_downsample() -> None:
    assert nominal_downsample(3.9998) == 4.0
    assert nominal_downsample(8.003) == 8.0
    assert nominal_downsample(2.5) == 2.5
    assert nominal_downsample(0.004) == 0.004


@pytest.mark.parametrize("backend", ["openslide", "auto"])
def test_whole_levels_are_those_of_one_read_beyond_one_block(tmp_path: Path, backend: str) -> None:
    """Blocks must fall where OpenSlide cuts a large read, also at odd downsamples."""
    path = write_pyramid(tmp_path / "wide.tif", tissue_image(9001, 150),
                         downsamples=(1, 2.001))
    with open_slide(path, backend=backend) as slide:
        assert slide.level_dimensions[1][0] > slide_module.BLOCK_PX
        for level, size in enumerate(slide.level_dimensions):
            image, downsample = read_level(slide, level)
            assert np.array_equal(image, as_clam(path, (0, 0), level, size))
            assert downsample == slide.level_downsamples[level]


@pytest.mark.parametrize(("max_pixels", "factor"), [(10**6, 1), (200_000, 2), (50_000, 4),
                                                    (2_000, 16)])
def test_large_levels_are_reduced_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 max_pixels: int, factor: int) -> None:
    monkeypatch.setattr(slide_module, "BLOCK_PX", 64)
    path = write_pyramid(tmp_path / "s.tif", tissue_image(811, 607), downsamples=(1,))
    whole = as_clam(path, (0, 0), 0, (811, 607))
    sizes = []
    with open_slide(path) as slide:
        read = slide.read_region
        monkeypatch.setattr(slide, "read_region",
                            lambda place, level, size, **more: sizes.append(size)
                            or read(place, level, size, **more))
        image, downsample = read_level(slide, 0, max_pixels=max_pixels)
    width, height = 811 // factor, 607 // factor
    expected = cv2.resize(whole[:height * factor, :width * factor], (width, height),
                          interpolation=cv2.INTER_AREA)
    assert np.array_equal(image, expected)
    assert downsample == (factor, factor) and image.shape[0] * image.shape[1] <= max_pixels
    assert max(w * h for w, h in sizes) <= 64 * 64  # never held whole


def test_whole_level_on_a_background(tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    Image.new("RGBA", (40, 30), (200, 10, 10, 0)).save(path)
    with open_slide(path) as slide:
        assert (read_level(slide, 0)[0] == 0).all()
        assert (read_level(slide, 0, background=WHITE)[0] == 255).all()


# ---------------------------------------------------------------------------- flat pictures

@pytest.mark.parametrize(("suffix", "mode"), [
    ("png", "RGB"), ("png", "L"), ("png", "P"), ("png", "1"), ("png", "RGBA"), ("jpg", "RGB"),
    ("jpg", "L"), ("jpg", "CMYK"), ("bmp", "RGB"), ("webp", "RGB")])
def test_flat_pictures_are_slides_of_one_level(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tmp_path / f"flat.{suffix}"
    Image.fromarray(tissue_image(321, 200)).convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB"))
    with open_slide(path) as slide:
        assert (slide.backend, slide.level_dimensions) == ("flat", ((321, 200),))
        assert slide.level_downsamples == ((1.0, 1.0),)
        assert slide.mpp_um is None and slide.mpp_problem == "" and slide.objective_power is None
        assert np.array_equal(slide.read_region((0, 0), 0, (321, 200)), expected)
        corner = slide.read_region((300, -5), 0, (50, 20), background=WHITE)
        assert np.array_equal(corner[5:, :21], expected[:15, 300:])
        assert (corner[:5] == 255).all() and (corner[:, 21:] == 255).all()
        assert (slide.read_region((-900, 900), 0, (4, 4)) == 0).all()


def test_flat_picture_of_16_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(SlideError, match="8 bits were expected"):
        open_slide(tmp_path / "deep.png")


def test_flat_ceiling_is_ours_and_pillows_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                                ) -> None:
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3  # Pillow's default
    assert slide_flat.MAX_FLAT_PIXELS <= 2 * Image.MAX_IMAGE_PIXELS  # where Pillow's error begins
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(slide_flat, "MAX_FLAT_PIXELS", 9_999)
    with pytest.raises(SlideError, match="100 x 100 px is over the ceiling"):
        open_slide(tmp_path / "a.png")


def test_backends_that_cannot_read_a_picture_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for backend in ("openslide", "tiff-tiles"):
        with pytest.raises(SlideError, match="use 'auto'"):
            open_slide(tmp_path / "a.png", backend=backend)


# ---------------------------------------------------------------------------- opening

def test_tiffs_never_go_to_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A striped TIFF, which Pillow would read as well, goes to tifffile."""
    monkeypatch.delattr(Image, "open")
    tifffile.imwrite(tmp_path / "strips.tif", tissue_image(64, 64))
    with open_slide(tmp_path / "strips.tif") as slide:
        assert slide.backend == "tiff"
        assert np.array_equal(slide.read_region((0, 0), 0, (64, 64)), tissue_image(64, 64))


def test_names_of_any_kind_open(tmp_path: Path, slide_folder: Path) -> None:
    for name in ("Präparat 1 #2 %41.svs", "-x.tif", "染色.tiff", "no suffix"):
        shutil.copy(slide_folder / "slide_0.tif", tmp_path / name)
        with open_slide(tmp_path / name) as slide:
            assert slide.level_dimensions[0] == (2048, 1536)


def test_dimensions_no_slide_can_have() -> None:
    check_dimensions(Path("a.svs"), (MAX_SIDE_PX, 1))
    for size in ((2**31, 100), (0, 10)):
        with pytest.raises(SlideError, match="announces"):
            check_dimensions(Path("a.svs"), size)


def test_a_reopened_file_that_vanished_is_named(tmp_path: Path, slide_folder: Path) -> None:
    path = Path(shutil.copy(slide_folder / "slide_0.tif", tmp_path / "gone.tif"))
    slide = OpenSlideSlide(path)
    slide.close()
    path.unlink()
    with pytest.raises(SlideError, match="gone.tif"):
        slide.read_region((0, 0), 0, (8, 8))
