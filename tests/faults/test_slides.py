"""Broken and odd slides (rows B1-B5, B10-B12, B15 of the fault table): a clear error, and never
invented pixels. B7, B8: test_wsi_core_slide_overview.py; B6: ..._mpp.py; B14, B16: ..._files.py."""

from __future__ import annotations

import csv
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image, ImageCms

from tests.slides import tissue_image, write_pyramid
from utils.errors import SlideError
from wsi_core.slide import Backend, open_slide
from wsi_core.tiff_directory import read_directories

BACKENDS: tuple[Backend, ...] = ("auto", "openslide")
PATCH = (256, 256)


def refused(path: Path, *words: str) -> None:
    """Opening fails for every backend, in one line that names the slide."""
    for backend in BACKENDS:
        with pytest.raises(SlideError) as caught:
            open_slide(path, backend=backend)
        message = str(caught.value)
        assert message.startswith(str(path)) and "\n" not in message
        assert any(word in message for word in words), message


@pytest.fixture
def slide_path(tmp_path: Path, slide_folder: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copy(slide_folder / "slide_0.tif", tmp_path / "slide_0.tif"))


# ---------------------------------------------------------------------------- B1, B2

def test_what_is_no_slide_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing.svs", "no such file")
    (tmp_path / "folder.svs").mkdir()
    refused(tmp_path / "folder.svs", "is a folder")
    (tmp_path / "empty.svs").touch()
    refused(tmp_path / "empty.svs", "empty (0 bytes)")
    (tmp_path / "text.svs").write_text("slide_id,label\n" * 100)
    refused(tmp_path / "text.svs", "not a slide", "does not know")


@pytest.mark.parametrize("share", [0.999, 0.5, 0.1, 0.001])
def test_a_truncated_slide_is_refused_at_opening(slide_path: Path, share: float) -> None:
    data = slide_path.read_bytes()
    slide_path.write_bytes(data[:int(share * len(data))])
    refused(slide_path, "truncated", "cannot open", "does not know")


def test_a_truncated_real_slide_is_refused(shared: Path, tmp_path: Path) -> None:
    data = (shared / "data/slides/cmu_1_small_region.svs").read_bytes()
    path = tmp_path / "cut.svs"
    for share in (0.5, 0.1):
        path.write_bytes(data[:int(share * len(data))])
        refused(path, "truncated", "cannot open", "does not know")


def test_a_truncated_picture_never_gives_pixels(tmp_path: Path, shared: Path) -> None:
    for name in ("he_two_pieces.jpg", "tcga_red_pen.png"):
        data = (shared / "data/overviews" / name).read_bytes()
        path = tmp_path / name
        path.write_bytes(data[:len(data) // 2])
        with open_slide(path) as slide:
            for _ in range(2):  # the second read is where Pillow's fallback turned black
                with pytest.raises(SlideError, match="cannot be decoded"):
                    slide.read_region((0, 0), 0, (64, 64))


# ---------------------------------------------------------------------------- B3, B4

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda data: bytes(len(data)),
    "half zeros": lambda data: data[:len(data) // 2] + bytes(len(data) - len(data) // 2),
    "half random": lambda data: data[:len(data) // 2] + np.random.default_rng(0).bytes(
        len(data) - len(data) // 2),
    "ends early": lambda data: data[:len(data) // 2] + b"\xff\xd9" + bytes(
        len(data) - len(data) // 2 - 2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damage", sorted(DAMAGES))
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_one_damaged_tile_fails_alone(tmp_path: Path, damage: str, backend: Backend,
                                      photometric: str) -> None:
    path = write_pyramid(tmp_path / "s.tif", tissue_image(1536, 1024), photometric=photometric)
    level = read_directories(path)[0]
    column, row = 3, 2
    tile = row * level.columns + column
    with open_slide(path) as slide:
        sound = {(x, y): slide.read_region((x, y), 0, PATCH)
                 for x in range(0, 1536, 256) for y in range(0, 1024, 256)}
    data = bytearray(path.read_bytes())
    place = slice(int(level.offsets[tile]), int(level.offsets[tile] + level.counts[tile]))
    data[place] = DAMAGES[damage](bytes(data[place]))
    path.write_bytes(data)
    failed = []
    with open_slide(path, backend=backend) as slide:
        for _ in range(2):  # in vain again, and still nothing latched
            for corner, pixels in sound.items():
                try:
                    assert np.array_equal(slide.read_region(corner, 0, PATCH), pixels)
                except SlideError as error:
                    assert "s.tif" in str(error) and str(corner) in str(error)
                    assert "level 0" in str(error)
                    failed.append(corner)
    assert failed == [(column * 256, row * 256)] * 2


def test_when_every_read_fails_each_says_so(slide_path: Path, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    """B4: one new handle a failed read, no endless reopening."""
    opened = []
    real = openslide.OpenSlide.__init__

    def counting(self: openslide.OpenSlide, path: Path) -> None:
        opened.append(path)
        real(self, path)

    def failing(*_: object) -> None:
        raise openslide.OpenSlideError("i/o error")

    monkeypatch.setattr(openslide.OpenSlide, "__init__", counting)
    with open_slide(slide_path, backend="openslide") as slide:
        monkeypatch.setattr(openslide.OpenSlide, "read_region", failing)
        for _ in range(5):
            with pytest.raises(SlideError, match="i/o error"):
                slide.read_region((0, 0), 0, PATCH)
    assert len(opened) == 5


def test_a_slide_cut_while_it_is_read_fails_and_gives_no_black(slide_path: Path) -> None:
    size = slide_path.stat().st_size
    for backend in BACKENDS:
        data = slide_path.read_bytes()
        with open_slide(slide_path, backend=backend) as slide:
            with slide_path.open("r+b") as file:
                file.truncate(size // 100)
            with pytest.raises(SlideError, match="slide_0"):
                for x in range(0, 2048, 256):
                    for y in range(0, 1536, 256):
                        slide.read_region((x, y), 0, PATCH)
        slide_path.write_bytes(data)


# ---------------------------------------------------------------------------- B5

@pytest.mark.parametrize(("mpp", "words"), [
    (None, ""), (264.5833, "96 dpi"), (1e6, "expected"), (0.001, "expected")])
def test_pixel_sizes_that_a_file_gets_wrong(tmp_path: Path, mpp: float | None, words: str) -> None:
    path = write_pyramid(tmp_path / "s.tif", tissue_image(256, 256), downsamples=(1,), mpp=mpp)
    for backend in BACKENDS:
        with open_slide(path, backend=backend) as slide:
            assert slide.mpp_um is None
            assert words in slide.mpp_problem and bool(slide.mpp_problem) == bool(words)


def test_axes_that_differ(tmp_path: Path) -> None:
    for ratio, believed in ((1.04, True), (1.06, False)):
        tifffile.imwrite(tmp_path / "s.tif", tissue_image(256, 256), tile=(128, 128),
                         compression="jpeg", resolution=(20_000, 20_000 * ratio),
                         resolutionunit="CENTIMETER", metadata=None)
        with open_slide(tmp_path / "s.tif") as slide:
            assert (slide.mpp_um is not None) == believed
            assert ("5 %" in slide.mpp_problem) != believed


@pytest.mark.parametrize("pair", [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("tile", [(128, 128), None], ids=["OpenSlide's", "tifffile's"])
def test_a_resolution_of_nothing_is_no_pixel_size(tmp_path: Path, pair: tuple[int, int],
                                                  tile: tuple[int, int] | None) -> None:
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, tissue_image(256, 256), tile=tile, compression="zstd", metadata=None,
                     resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    with tifffile.TiffFile(path) as tif:
        places = [tif.pages[0].tags[name].valueoffset for name in ("XResolution", "YResolution")]
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(struct.pack("<II", *pair))
    with open_slide(path) as slide:
        assert slide.mpp_um is None and slide.mpp_source == ""
        assert "\n" not in slide.mpp_problem


# ---------------------------------------------------------------------------- B10, B11, B12

WHITE = (255, 255, 255)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_region_larger_than_the_slide_has_the_callers_background(tmp_path: Path, backend: Backend
                                                                   ) -> None:
    image = np.full((100, 120, 3), 90, np.uint8)
    path = write_pyramid(tmp_path / "s.tif", image, downsamples=(1,))
    with open_slide(path, backend=backend) as slide:
        for background, colour in ((WHITE, 255), ((0, 0, 0), 0)):
            region = slide.read_region((-40, -30), 0, (256, 256), background=background)
            assert (np.abs(region[30:130, 40:160].astype(int) - 90) < 4).all()
            region[30:130, 40:160] = colour
            assert (region == colour).all()


def test_tiles_that_were_not_scanned_have_the_callers_background(slide_path: Path) -> None:
    """B11: what OpenSlide gives as transparent, as outside of the bounds of an MRXS."""
    with tifffile.TiffFile(slide_path) as tif:
        tag = tif.pages[0].tags["TileByteCounts"]
    with slide_path.open("r+b") as file:
        file.seek(tag.valueoffset)
        file.write(bytes(struct.calcsize("<H" if tag.dtype == 3 else "<I")))
    for backend in BACKENDS:
        with open_slide(slide_path, backend=backend) as slide:
            region = slide.read_region((0, 0), 0, (512, 256), background=WHITE)
            assert (region[:, :256] == 255).all()
            assert (slide.read_region((0, 0), 0, PATCH) == 0).all()


def test_a_transparent_margin_of_a_picture_has_the_callers_background(tmp_path: Path) -> None:
    rgba = np.dstack([tissue_image(64, 64), np.zeros((64, 64), np.uint8)])
    rgba[16:48, 16:48, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "s.png")
    with open_slide(tmp_path / "s.png") as slide:
        region = slide.read_region((0, 0), 0, (64, 64), background=WHITE)
    assert np.array_equal(region[16:48, 16:48], rgba[16:48, 16:48, :3])
    assert (region[:16] == 255).all() and (region[:, 48:] == 255).all()


@pytest.mark.parametrize("tile", [(128, 128), None], ids=["OpenSlide's", "tifffile's"])
@pytest.mark.parametrize("kind", ["RGB", "grey"])
def test_slides_of_16_bits_are_refused(tmp_path: Path, tile: tuple[int, int] | None, kind: str
                                       ) -> None:
    """libtiff, and so OpenSlide, would drop the lower eight without a word."""
    image = tissue_image(256, 256).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "s.tif", image if kind == "RGB" else image[..., 0], tile=tile,
                     compression="zstd", metadata=None)
    with pytest.raises(SlideError, match="8 (bits )?were expected") as caught:
        open_slide(tmp_path / "s.tif")
    assert "16" in str(caught.value)


@pytest.mark.parametrize("kind", ["RGB", "grey"])
def test_profiles_are_not_applied_and_grey_becomes_rgb(tmp_path: Path, kind: str) -> None:
    image = tissue_image(256, 256) if kind == "RGB" else tissue_image(256, 256)[..., 0]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    tifffile.imwrite(tmp_path / "s.tif", image, tile=(128, 128), compression="deflate",
                     iccprofile=profile, metadata=None)
    Image.fromarray(image).save(tmp_path / "s.png", icc_profile=profile)
    expected = image if kind == "RGB" else np.dstack([image] * 3)
    for name in ("s.tif", "s.png"):
        with open_slide(tmp_path / name) as slide:
            assert np.array_equal(slide.read_region((0, 0), 0, PATCH), expected)


# ---------------------------------------------------------------------------- B15

def png(width: int, height: int) -> bytes:
    """A PNG that announces its size and has next to nothing in it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [14_000, 30_000, 2**31 - 1])
def test_a_picture_bomb_is_refused_before_decoding(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side))
    with pytest.raises(SlideError, match="over the ceiling of 178956970 px"):
        open_slide(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_region_too_large_is_refused_before_reading(slide_path: Path, backend: Backend) -> None:
    with open_slide(slide_path, backend=backend) as slide:
        with pytest.raises(SlideError, match="60000 x 60000 px is over the ceiling"):
            slide.read_region((0, 0), 0, (60_000, 60_000))
        slide.read_region((0, 0), 0, (64, 64))


@pytest.mark.parametrize("side", [2**31, 2**32 - 1, 2**25])
def test_a_tiff_that_announces_an_absurd_width_is_refused(slide_path: Path, side: int) -> None:
    with tifffile.TiffFile(slide_path) as tif:
        tag = tif.pages[0].tags["ImageWidth"]
        assert tag.dtype == 4
    with slide_path.open("r+b") as file:
        file.seek(tag.valueoffset)
        file.write(struct.pack("<I", side))
    refused(slide_path, "announces", "cannot open", "does not know")


def test_a_tile_bomb_is_not_decoded_here(slide_path: Path) -> None:
    """A TIFF whose tiles announce 60,000 px: no fast path, and OpenSlide's word counts."""
    with tifffile.TiffFile(slide_path) as tif:
        tags = [tif.pages[0].tags[name] for name in ("TileWidth", "TileLength")]
    with slide_path.open("r+b") as file:
        for tag in tags:
            file.seek(tag.valueoffset)
            file.write(struct.pack("<H", 60_000))
    for backend in BACKENDS:
        with open_slide(slide_path, backend=backend) as slide:
            assert slide.backend == "openslide"
            with pytest.raises(SlideError, match="slide_0"):
                slide.read_region((0, 0), 0, (64, 64))


# ---------------------------------------------------------------------------- as a process

def test_bad_slides_are_listed_and_the_good_one_goes_on(
        tmp_path: Path, slide_folder: Path,
        run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    source, target = tmp_path / "slides", tmp_path / "out"
    source.mkdir()
    good = Path(shutil.copy(slide_folder / "slide_0.tif", source / "good.tif"))
    data = good.read_bytes()
    (source / "cut.tif").write_bytes(data[:len(data) // 2])
    (source / "empty.svs").touch()
    (source / "text.svs").write_text("not a slide")
    (source / "bomb.png").write_bytes(png(30_000, 30_000))
    done = run_script("create_patches_fp.py", "--source", source, "--save_dir", target,
                      "--seg", "--patch", "--stitch")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    with (target / "report_patches.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["item"]: row for row in csv.DictReader(file)}
    for name, words in {"cut.tif": "cannot open", "empty.svs": "empty (0 bytes)",
                        "text.svs": "not a slide", "bomb.png": "over the ceiling"}.items():
        assert rows[name]["status"] == "failed" and words in rows[name]["reason"]
    assert rows["good.tif"]["status"] in ("done", "empty")
