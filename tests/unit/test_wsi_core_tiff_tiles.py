"""The fast path: bit-equal to OpenSlide, or OpenSlide's own answer."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import openslide
import pytest
import tifffile

from tests.slides import tissue_image, write_pyramid
from utils.errors import SlideError
from wsi_core import jpeg_tiles, tiff_tiles
from wsi_core.jpeg_tiles import EOI, PHOTOMETRIC_RGB, PHOTOMETRIC_YCBCR, JpegTileDecoder
from wsi_core.slide import open_slide
from wsi_core.slide_openslide import OpenSlideSlide
from wsi_core.tiff_directory import TiffProblem, read_directories
from wsi_core.tiff_tiles import TiffTilesSlide

WHITE = (255, 255, 255)
APERIO = "Aperio Image Library v11\n1000x700 [0,0 1000x700] (256x256) |AppMag = 40|MPP = 0.25"


def write(path: Path, image: np.ndarray, *, photometric: str = "ycbcr",
          subsampling: tuple[int, int] = (2, 2), downsamples: tuple[int, ...] = (1, 2, 4),
          tile: tuple[int, int] = (128, 128), bigtiff: bool = False,
          description: str | None = None, byteorder: Literal["<", ">"] = "<") -> Path:
    """A JPEG pyramid with the choices that ``tests.slides.write_pyramid`` leaves out."""
    with tifffile.TiffWriter(path, byteorder=byteorder, bigtiff=bigtiff) as tif:
        for index, downsample in enumerate(downsamples):
            level = image[::downsample, ::downsample]
            tif.write(level, tile=tile, compression="jpeg", photometric=photometric,
                      subsampling=subsampling if photometric == "ycbcr" else None,
                      compressionargs={"level": 90}, metadata=None, subfiletype=min(index, 1),
                      description=description if index == 0 else None)
    return path


MAKERS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "ycbcr 4:2:0": lambda path, image: write(path, image),
    "ycbcr 4:2:2": lambda path, image: write(path, image, subsampling=(2, 1)),
    "ycbcr 4:4:4": lambda path, image: write(path, image, subsampling=(1, 1)),
    "rgb": lambda path, image: write(path, image, photometric="rgb"),
    "aperio": lambda path, image: write(path, image, photometric="rgb", description=APERIO),
    "oblong tiles": lambda path, image: write(path, image, tile=(96, 240)),
    "BigTIFF": lambda path, image: write(path, image, bigtiff=True, photometric="rgb"),
}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def pyramid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "slide.svs"
    return MAKERS[request.param](path, tissue_image(1000, 700, blobs=3))


def opened(path: Path) -> TiffTilesSlide:
    slide = open_slide(path)
    assert isinstance(slide, TiffTilesSlide), getattr(slide, "fast_path_problem", "")
    return slide


def test_every_region_is_openslides(pyramid: Path) -> None:
    rng = np.random.default_rng(0)
    with opened(pyramid) as slide, OpenSlideSlide(pyramid) as reference:
        for level in range(3):
            for background in ((0, 0, 0), WHITE):
                for _ in range(12):
                    place = tuple(int(v) for v in rng.integers(-200, 1100, 2) // 4 * 4)
                    size = tuple(int(v) for v in rng.integers(1, 300, 2))
                    assert np.array_equal(
                        slide.read_region(place, level, size, background=background),
                        reference.read_region(place, level, size, background=background))
        assert slide.level_problems == {}


def test_places_between_pixels_go_to_openslide(pyramid: Path) -> None:
    with opened(pyramid) as slide, OpenSlideSlide(pyramid) as reference:
        for place in ((1, 0), (402, 301), (-3, -2)):
            assert np.array_equal(slide.read_region(place, 2, (90, 80)),
                                  reference.read_region(place, 2, (90, 80)))


def test_facts_are_openslides(pyramid: Path) -> None:
    with opened(pyramid) as slide, OpenSlideSlide(pyramid) as reference:
        assert slide.backend == "tiff-tiles" and slide.path == pyramid
        for name in ("level_dimensions", "level_downsamples", "mpp_um", "mpp_problem",
                     "objective_power"):
            assert getattr(slide, name) == getattr(reference, name)


def test_real_slides_are_read_directly_and_equal(shared: Path) -> None:
    paths = [shared / "data/slides/cmu_1_small_region.svs",
             shared / "data/slides/biopsies_mpp1_3levels.tif",
             *sorted((shared / "data/colon_crchisto/slides").glob("*.tif"))[:4]]
    for path in paths:
        with opened(path) as slide, OpenSlideSlide(path) as reference:
            for level, (width, height) in enumerate(slide.level_dimensions):
                whole = ((0, 0), level, (width + 9, height + 9))
                assert np.array_equal(slide.read_region(*whole), reference.read_region(*whole))


def test_the_fast_path_does_not_ask_openslide(pyramid: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    with opened(pyramid) as slide:
        slide.read_region((0, 0), 1, (8, 8))  # level 1 is compared at its first use
        monkeypatch.setattr(OpenSlideSlide, "read_region", None)
        slide.read_region((77, 33), 0, (300, 300))
        slide.read_region((64, 32), 1, (300, 300))


# ---------------------------------------------------------------------------- left to OpenSlide

def test_unusual_slides_are_left_to_openslide(tmp_path: Path) -> None:
    image = tissue_image(600, 400)
    cases = {"compression 8": {"compression": "zlib"},
             "samples": {"photometric": "minisblack"}}
    for words, kwargs in cases.items():
        pixels = image[..., 0] if words == "samples" else image
        path = tmp_path / "unusual.tif"
        tifffile.imwrite(path, pixels, tile=(128, 128),
                         **{"compression": "jpeg", "metadata": None, **kwargs})
        with open_slide(path) as slide:
            assert slide.backend == "openslide" and isinstance(slide, OpenSlideSlide)
            assert words in slide.fast_path_problem
        with pytest.raises(SlideError, match=words):
            open_slide(path, backend="tiff-tiles")


def test_openslide_can_be_insisted_on(pyramid: Path) -> None:
    with open_slide(pyramid, backend="openslide") as slide:
        assert slide.backend == "openslide"


def test_levels_that_openslide_interpolates_are_its_own(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "odd.tif", tissue_image(1001, 701), downsamples=(1, 2))
    with opened(path) as slide, OpenSlideSlide(path) as reference:
        assert "no whole number" in slide.level_problems[1]
        for place in ((0, 0), (500, 350)):
            assert np.array_equal(slide.read_region(place, 1, (200, 200)),
                                  reference.read_region(place, 1, (200, 200)))


def test_one_differing_pixel_leaves_the_slide_to_openslide(
        pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = JpegTileDecoder.decode

    def off_by_one(self: JpegTileDecoder, stored: bytes) -> np.ndarray | None:
        tile = real(self, stored)
        return None if tile is None else tile ^ 1

    monkeypatch.setattr(JpegTileDecoder, "decode", off_by_one)
    with open_slide(pyramid) as slide:
        assert isinstance(slide, OpenSlideSlide)
        assert "other pixels than OpenSlide" in slide.fast_path_problem


def test_a_differing_level_is_left_to_openslide(pyramid: Path, monkeypatch: pytest.MonkeyPatch
                                                ) -> None:
    real = JpegTileDecoder.decode
    with opened(pyramid) as slide, OpenSlideSlide(pyramid) as reference:
        monkeypatch.setattr(JpegTileDecoder, "decode", lambda self, stored: real(self, stored) ^ 1)
        assert np.array_equal(slide.read_region((0, 0), 1, (200, 200)),
                              reference.read_region((0, 0), 1, (200, 200)))
        assert "other pixels" in slide.level_problems[1]


def test_a_decoder_that_invents_pixels_is_not_used(pyramid: Path, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    monkeypatch.setattr(tiff_tiles, "decoder_notices_short_data", lambda: False)
    with open_slide(pyramid) as slide:
        assert isinstance(slide, OpenSlideSlide) and "ends early" in slide.fast_path_problem
    assert jpeg_tiles.decoder_notices_short_data()


@pytest.mark.parametrize("vendor", ["generic-tiff", "aperio"])
def test_tiles_that_are_not_stored_are_openslides(tmp_path: Path, vendor: str) -> None:
    """Aperio's missing tiles are filled from the level above, others stay transparent."""
    path = write(tmp_path / "holes.svs", tissue_image(1000, 700), photometric="rgb",
                 description=APERIO if vendor == "aperio" else None)
    with tifffile.TiffFile(path) as tif:
        places = [(page.tags["TileByteCounts"], page.tags["TileOffsets"]) for page in tif.pages]
    with path.open("r+b") as file:
        for page_tags in places[1:]:
            for tag in page_tags:
                file.seek(tag.valueoffset + 3 * struct.calcsize({3: "H", 4: "I"}[tag.dtype]))
                file.write(bytes(struct.calcsize({3: "H", 4: "I"}[tag.dtype])))
    with opened(path) as slide, OpenSlideSlide(path) as reference:
        assert reference.vendor == vendor
        for level in (0, 1, 2):
            size = slide.level_dimensions[level]
            try:
                expected = reference.read_region((0, 0), level, size, background=WHITE)
            except SlideError:
                with pytest.raises(SlideError):
                    slide.read_region((0, 0), level, size, background=WHITE)
                continue
            assert np.array_equal(slide.read_region((0, 0), level, size, background=WHITE),
                                  expected)


# ---------------------------------------------------------------------------- cache, handles

def test_decoded_tiles_are_kept_within_bounds(pyramid: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    with open_slide(pyramid, cache_mb=1) as slide:
        assert isinstance(slide, TiffTilesSlide)
        slide.read_region((0, 0), 0, (1000, 700))
        kept = [slide._cache.get(0, column, row) for column in range(9) for row in range(9)]
        assert 0 < sum(tile.nbytes for tile in kept if tile is not None) <= 2**20
    with opened(pyramid) as slide:
        slide.read_region((0, 0), 0, (700, 600))
        decoded = []
        real = JpegTileDecoder.decode
        monkeypatch.setattr(JpegTileDecoder, "decode",
                            lambda self, stored: decoded.append(1) or real(self, stored))
        slide.read_region((10, 10), 0, (600, 500))
        assert not decoded


def test_a_closed_slide_is_not_read(pyramid: Path) -> None:
    slide = opened(pyramid)
    slide.close()
    slide.close()
    with pytest.raises(SlideError, match="was closed"):
        slide.read_region((0, 0), 0, (8, 8))


def test_it_is_several_times_cheaper_than_openslide(tmp_path: Path) -> None:
    """Measured about 5 times; CPU time of this process, so a busy machine matters little."""
    path = write_pyramid(tmp_path / "s.tif", tissue_image(3072, 3072), photometric="rgb")
    places = [(x, y) for x in range(131, 2700, 256) for y in range(77, 2700, 256)]

    def cpu_seconds(read: Callable[[tuple[int, int]], object]) -> float:
        start = time.process_time()
        for place in places:
            read(place)
        return time.process_time() - start

    with openslide.OpenSlide(path) as reference, opened(path) as slide:
        theirs = cpu_seconds(lambda xy: reference.read_region(xy, 0, (256, 256)).convert("RGB"))
        ours = cpu_seconds(lambda xy: slide.read_region(xy, 0, (256, 256)))
    assert ours < theirs / 2


# ---------------------------------------------------------------------------- one tile

@pytest.fixture(scope="module")
def jpeg() -> bytes:
    return cv2.imencode(".jpg", tissue_image(128, 96))[1].tobytes()


def decode(stored: bytes, *, size: tuple[int, int] = (128, 96)) -> np.ndarray | None:
    return JpegTileDecoder(tables=b"", size=size, photometric=PHOTOMETRIC_YCBCR).decode(stored)


def test_a_tile_is_decoded_by_its_photometric_not_by_its_markers(jpeg: bytes) -> None:
    plain = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert b"JFIF" in jpeg  # which alone would make any decoder convert from YCbCr
    assert np.array_equal(decode(jpeg), plain)
    raw = JpegTileDecoder(tables=b"", size=(128, 96), photometric=PHOTOMETRIC_RGB).decode(jpeg)
    assert raw is not None
    ycrcb = cv2.cvtColor(plain, cv2.COLOR_RGB2YCrCb)
    assert np.abs(raw.astype(int) - ycrcb[..., [0, 2, 1]]).mean() < 2


def test_headers_of_different_tiles_are_told_apart(jpeg: bytes) -> None:
    other = cv2.imencode(".jpg", tissue_image(128, 96, seed=5),
                         [cv2.IMWRITE_JPEG_QUALITY, 40])[1].tobytes()
    decoder = JpegTileDecoder(tables=b"", size=(128, 96), photometric=PHOTOMETRIC_YCBCR)
    for stored in (jpeg, other, jpeg):
        expected = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.array_equal(decoder.decode(stored), expected)


def test_damaged_and_unusual_tiles_are_not_decoded(jpeg: bytes, capfd: pytest.CaptureFixture[str]
                                                   ) -> None:
    scan = jpeg.index(b"\xff\xda") + 14
    half = (scan + len(jpeg)) // 2
    progressive = cv2.imencode(".jpg", tissue_image(128, 96),
                               [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    restarts = cv2.imencode(".jpg", tissue_image(128, 96),
                            [cv2.IMWRITE_JPEG_RST_INTERVAL, 4])[1].tobytes()
    grey = cv2.imencode(".jpg", tissue_image(128, 96)[..., 0])[1].tobytes()
    for name, stored in {
            "empty": b"", "zeros": bytes(500), "cut": jpeg[:half], "no end marker": jpeg[:-2],
            "ends early": jpeg[:half].rstrip(b"\xff") + EOI, "header alone": jpeg[:100] + EOI,
            "hole": jpeg[:half] + bytes(len(jpeg) - half - 2) + EOI,
            "marker inside": jpeg[:half] + b"\xff\xd3" + jpeg[half + 2:],
            "progressive": progressive, "restart markers": restarts, "grey": grey,
            "12 bit": jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")}.items():
        assert decode(stored) is None, name
    assert decode(jpeg, size=(96, 128)) is None
    assert decode(jpeg + b"\0\0") is not None  # filling to a whole word


def test_shared_tables_are_spliced_in(jpeg: bytes) -> None:
    """A TIFF's tiles may leave their tables to the directory (Aperio's do)."""
    frame, start = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xdb")
    huffman, scan = jpeg.index(b"\xff\xc4"), jpeg.index(b"\xff\xda")
    tables = jpeg[:2] + jpeg[start:frame] + jpeg[huffman:scan] + EOI
    stored = jpeg[:2] + jpeg[frame:huffman] + jpeg[scan:]
    decoder = JpegTileDecoder(tables=tables, size=(128, 96), photometric=PHOTOMETRIC_YCBCR)
    assert np.array_equal(decoder.decode(stored), decode(jpeg))


def test_tables_that_cannot_be_made_out(jpeg: bytes) -> None:
    for tables in (b"no jpeg", jpeg[:20]):
        decoder = JpegTileDecoder(tables=tables, size=(128, 96), photometric=PHOTOMETRIC_YCBCR)
        assert decoder.decode(jpeg) is None


# ---------------------------------------------------------------------------- directories

@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_directories_are_those_tifffile_reads(tmp_path: Path, byteorder: Literal["<", ">"],
                                              bigtiff: bool, photometric: str) -> None:
    path = write(tmp_path / "a.tif", tissue_image(1000, 700), byteorder=byteorder,
                 bigtiff=bigtiff, photometric=photometric)
    ours = read_directories(path)
    with tifffile.TiffFile(path) as tif:
        assert len(ours) == len(tif.pages)
        for one, page in zip(ours, tif.pages, strict=True):
            assert (one.width, one.height) == (page.imagewidth, page.imagelength)
            assert (one.tile_width, one.tile_height) == (page.tilewidth, page.tilelength)
            assert one.offsets.tolist() == list(page.dataoffsets)
            assert one.counts.tolist() == list(page.databytecounts)
            assert one.photometric == page.photometric and one.compression == page.compression
            assert one.bits == (8, 8, 8) and one.samples == 3 and one.is_tiled
            assert one.tables == (page.jpegtables or b"")


def test_broken_directories_are_a_clear_problem(tmp_path: Path) -> None:
    bad = tmp_path / "bad.tif"
    circle = struct.pack("<2sHIHI", b"II", 42, 8, 0, 8)
    far = struct.pack("<2sHI", b"II", 42, 10**9)
    for data, words in ((b"", "bytes"), (b"no tiff at all", "not a TIFF"),
                        (circle, "circle"), (far, "bytes")):
        bad.write_bytes(data)
        with pytest.raises(TiffProblem, match=words):
            read_directories(bad)
