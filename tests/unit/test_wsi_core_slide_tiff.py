"""TIFFs through tifffile: the layouts OpenSlide leaves out, pixel by pixel, and what is refused."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from tests.conftest import ROOT
from tests.slides import tissue_image
from utils.errors import SlideError
from wsi_core.slide import Slide, open_slide, read_level
from wsi_core.slide_tiled import level_place

WHITE = (255, 255, 255)
IMAGE = tissue_image(601, 443)


def ome_pyramid(path: Path, image: np.ndarray = IMAGE, *, levels: int = 3, unit: str = "µm",
                size: float = 0.25, **how: Any) -> Path:
    """An OME-TIFF as Bio-Formats and QuPath write it: smaller levels in SubIFDs."""
    how = {"tile": (128, 128), "compression": "deflate", "photometric": "rgb", **how}
    channels_first = image.shape[0] == 3
    meta = {"axes": "CYX" if channels_first else "YXS", "PhysicalSizeX": size,
            "PhysicalSizeXUnit": unit, "PhysicalSizeY": size, "PhysicalSizeYUnit": unit}
    with tifffile.TiffWriter(path, ome=True) as tif:
        tif.write(image, subifds=levels - 1, metadata=meta, **how)
        for level in range(1, levels):
            step = 2**level
            part = image[:, ::step, ::step] if channels_first else image[::step, ::step]
            tif.write(part, subfiletype=1, metadata=None, **how)
    return path


def whole(slide: Slide, level: int = 0) -> np.ndarray:
    return slide.read_region((0, 0), level, slide.level_dimensions[level])


# ---------------------------------------------------------------------------- OME-TIFF

@pytest.mark.parametrize("how", [
    {"compression": "deflate"}, {"compression": "zstd"}, {"compression": "lzw"},
    {"compression": "jpeg2000"}, {"compression": "webp", "compressionargs": {"lossless": True}},
    {"compression": None}, {"compression": "deflate", "predictor": True},
    {"planarconfig": "contig"}, {"tile": None, "rowsperstrip": 37}, {"tile": None}],
    ids=lambda how: " ".join(map(str, how.values())))
def test_ome_pyramids_of_every_kind_have_their_own_pixels(tmp_path: Path, how: dict[str, Any]
                                                          ) -> None:
    path = ome_pyramid(tmp_path / "a.ome.tif", **how)
    with open_slide(path) as slide:
        assert slide.backend == "tiff"
        assert slide.level_dimensions == ((601, 443), (301, 222), (151, 111))
        assert slide.level_downsamples[1] == (601 / 301, 443 / 222)
        assert (slide.mpp_um, slide.mpp_problem, slide.mpp_source) == ((0.25, 0.25), "", "ome-xml")
        for level, step in enumerate((1, 2, 4)):
            assert np.array_equal(whole(slide, level), IMAGE[::step, ::step])
            assert np.array_equal(read_level(slide, level)[0], IMAGE[::step, ::step])


@pytest.mark.parametrize("planar", [True, False], ids=["planar", "three pictures"])
def test_channels_that_are_stored_one_by_one(tmp_path: Path, planar: bool) -> None:
    image = np.ascontiguousarray(IMAGE.transpose(2, 0, 1))
    path = tmp_path / "a.ome.tif"
    if planar:
        tifffile.imwrite(path, image, tile=(128, 128), photometric="rgb", planarconfig="separate",
                         compression="deflate", metadata=None)
    else:
        ome_pyramid(path, image, photometric="minisblack")
    with open_slide(path) as slide:
        assert len(slide.level_dimensions) == (1 if planar else 3)
        assert np.array_equal(whole(slide), IMAGE)


def test_places_and_borders(tmp_path: Path) -> None:
    with open_slide(ome_pyramid(tmp_path / "a.ome.tif")) as slide:
        region = slide.read_region((-20, -10), 0, (700, 500), background=WHITE)
        assert np.array_equal(region[10:453, 20:621], IMAGE)
        region[10:453, 20:621] = 255
        assert (region == 255).all()  # B10: the caller's background, and ours to write to
        assert (slide.read_region((5000, 0), 1, (8, 8)) == 0).all()
        assert np.array_equal(slide.read_region((200, 100), 1, (50, 40)),
                              IMAGE[::2, ::2][50:90, 100:150])
        for words, level, size in (("no level 3", 3, (8, 8)), ("ceiling", 0, (60_000, 60_000))):
            with pytest.raises(SlideError, match=words):
                slide.read_region((0, 0), level, size)
    with pytest.raises(SlideError, match="was closed"):
        slide.read_region((0, 0), 0, (8, 8))


@pytest.mark.parametrize("scale", [1.0, 1.33, 1.99, 2.0, 2.0015, 4.0058, 16.03])
def test_blocks_of_a_level_join_at_any_downsample(scale: float) -> None:
    assert [level_place(int(place * scale), scale) for place in range(0, 40_000, 7)] == [
        *range(0, 40_000, 7)]
    assert abs(level_place(1001, scale) - 1001 / scale) <= 1


@pytest.mark.parametrize(("unit", "size", "mpp"), [
    ("nm", 250.0, 0.25), ("mm", 0.0005, 0.5), ("pixel", 1.0, None)])
def test_units_of_the_ome_xml(tmp_path: Path, unit: str, size: float, mpp: float | None) -> None:
    with open_slide(ome_pyramid(tmp_path / "a.ome.tif", levels=2, unit=unit, size=size)) as slide:
        assert slide.mpp_um == (None if mpp is None else pytest.approx((mpp, mpp)))


def test_an_ome_tiff_that_openslide_reads_whole_stays_with_it(tmp_path: Path) -> None:
    path = ome_pyramid(tmp_path / "a.ome.tif", levels=1, compression="jpeg")
    with open_slide(path) as slide:
        assert slide.backend == "tiff-tiles" and slide.mpp_source == "ome-xml"
        assert slide.mpp_um == (0.25, 0.25)


def test_jpeg_tiles_are_those_openslide_decodes(tmp_path: Path) -> None:
    path = ome_pyramid(tmp_path / "a.ome.tif", compression="jpeg", subsampling=(2, 2))
    with open_slide(path) as slide, open_slide(path, backend="openslide") as reference:
        assert (slide.backend, len(slide.level_dimensions)) == ("tiff", 3)
        assert len(reference.level_dimensions) == 1
        assert np.array_equal(whole(slide), whole(reference))


def test_the_objective_of_the_ome_xml(tmp_path: Path) -> None:
    path = ome_pyramid(tmp_path / "a.ome.tif")
    with tifffile.TiffFile(path) as tif:
        xml = str(tif.ome_metadata)
    new = xml.replace("</OME>", '<Instrument ID="Instrument:0"><Objective ID="Objective:0:0" '
                      'NominalMagnification="40.0"/></Instrument></OME>')
    tifffile.tiffcomment(path, new.encode())
    with open_slide(path) as slide:
        assert slide.objective_power == 40.0


# ---------------------------------------------------------------------------- other TIFFs

@pytest.mark.parametrize("kind", ["grey", "miniswhite", "rgba"])
def test_kinds_of_pixels(tmp_path: Path, kind: str) -> None:
    """B11, B12: grey becomes RGB, what is transparent the background; profiles are not applied."""
    path = tmp_path / "a.tif"
    grey = IMAGE[..., 1]
    alpha = np.where(np.arange(601) < 300, 255, 0).astype(np.uint8)
    rgba = np.dstack([IMAGE, np.broadcast_to(alpha, grey.shape)])
    image, more, expected = {
        "grey": (grey, {"photometric": "minisblack"}, np.dstack([grey] * 3)),
        "miniswhite": (grey, {"photometric": "miniswhite"}, 255 - np.dstack([grey] * 3)),
        "rgba": (rgba, {"photometric": "rgb", "extrasamples": ["unassalpha"]},
                 np.where(rgba[..., 3:] > 0, IMAGE, 255))}[kind]
    tifffile.imwrite(path, image, compression="zstd", rowsperstrip=64, metadata=None,
                     iccprofile=b"a profile that would swap the colours", **more)
    with open_slide(path) as slide:
        assert slide.backend == "tiff"
        assert np.array_equal(
            slide.read_region((0, 0), 0, (601, 443), background=WHITE), expected)


def test_levels_that_are_pictures_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tif:
        for step in (1, 2, 4):
            tif.write(IMAGE[::step, ::step], compression="zstd", metadata=None,
                      subfiletype=int(step > 1), resolution=(20_000, 20_000),
                      resolutionunit="CENTIMETER")
        tif.write(IMAGE[:100, :50], compression="zstd", metadata=None)  # a label, say
    with open_slide(path) as slide:
        assert slide.level_dimensions == ((601, 443), (301, 222), (151, 111))
        assert (slide.mpp_um, slide.mpp_source) == (pytest.approx((0.5, 0.5)), "tiff resolution")
        assert np.array_equal(whole(slide, 2), IMAGE[::4, ::4])


@pytest.mark.parametrize("compression", ["jpeg2000", "jpegxl", "zstd"])
def test_a_plain_tiled_tiff_of_any_compression_is_read(tmp_path: Path, compression: str) -> None:
    """By OpenSlide where its libtiff knows the compression, else by tifffile."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, tile=(128, 128), compression=compression, photometric="rgb",
                     compressionargs={"lossless": True} if compression == "jpegxl" else None,
                     metadata=None)
    with open_slide(path) as slide:
        assert slide.backend == ("openslide" if compression == "zstd" else "tiff")
        assert np.array_equal(whole(slide), IMAGE)


def test_only_what_is_read_is_decoded_and_it_is_kept(tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(ome_pyramid(tmp_path / "a.ome.tif")) as slide:
        decoded = []
        grid = slide._grids[0]  # type: ignore[attr-defined]
        real = grid.read
        monkeypatch.setattr(grid, "read", lambda *place: decoded.append(place) or real(*place))
        for _ in range(2):
            slide.read_region((130, 130), 0, (100, 200))
    assert decoded == [(1, 1), (1, 2)]


def test_tiles_that_are_not_stored_are_background(tmp_path: Path) -> None:
    path = ome_pyramid(tmp_path / "a.ome.tif")
    with tifffile.TiffFile(path) as tif:
        counts = tif.pages[0].tags["TileByteCounts"]
    with path.open("r+b") as file:
        file.seek(counts.valueoffset)
        file.write(bytes(struct.calcsize("<I" if counts.dtype == 4 else "<H")))
    with open_slide(path) as slide:
        image = slide.read_region((0, 0), 0, (601, 443), background=WHITE)
    assert (image[:128, :128] == 255).all() and np.array_equal(image[128:], IMAGE[128:])


# ---------------------------------------------------------------------------- refused

@pytest.mark.parametrize(("image", "how", "words"), [
    (IMAGE.astype(np.uint16), {"photometric": "rgb"}, "8 bits were expected"),
    (np.zeros((2, 300, 300, 3), np.uint8), {"photometric": "rgb"}, "one plane was expected"),
    (np.zeros((3, 300, 300), np.uint8), {"photometric": "minisblack"}, "one was expected"),
    (np.zeros((300, 300, 4), np.uint8), {"photometric": "separated"}, "RGBA was expected"),
    (IMAGE, {"photometric": "cielab"}, "RGBA was expected"),
    (IMAGE, {"photometric": "rgb", "extratags": [(274, 3, 1, 6)]}, "orientation 6"),
    (IMAGE[..., 0].astype(np.float32), {"photometric": "minisblack"}, "8 bits were expected")])
def test_pixels_of_other_kinds_are_refused(tmp_path: Path, image: np.ndarray, how: dict[str, Any],
                                           words: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", image, compression="zstd", metadata=None, **how)
    with pytest.raises(SlideError, match=words):
        open_slide(tmp_path / "a.tif")


def test_one_strip_over_the_ceiling_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    """B15, and no whole level is ever decoded."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((16, 16, 3), np.uint8), compression="zstd", metadata=None)
    with tifffile.TiffFile(path) as tif:
        tags = [tif.pages[0].tags[name] for name in ("ImageWidth", "ImageLength", "RowsPerStrip")]
    with path.open("r+b") as file:
        for tag in tags:
            file.seek(tag.valueoffset)
            file.write(struct.pack("<H" if tag.dtype == 3 else "<I", 60_000))
    with pytest.raises(SlideError, match="vips tiffsave"):
        open_slide(path)


@pytest.mark.parametrize("share", [0.999, 0.7, 0.4, 0.05, 0.01])
def test_a_truncated_file_is_refused_at_opening(tmp_path: Path, share: float) -> None:
    path = ome_pyramid(tmp_path / "a.ome.tif")
    data = path.read_bytes()
    path.write_bytes(data[:int(share * len(data))])
    with pytest.raises(SlideError, match=r"a\.ome\.tif: .*(truncated|reach)"):
        open_slide(path)


@pytest.mark.parametrize("compression", ["deflate", "jpeg", "jpeg2000", "zstd"])
def test_a_damaged_tile_fails_alone(tmp_path: Path, compression: str) -> None:
    path = ome_pyramid(tmp_path / "a.ome.tif", compression=compression)
    with tifffile.TiffFile(path) as tif:
        place, count = (tags[1] for tags in (tif.pages[0].dataoffsets,
                                             tif.pages[0].databytecounts))
    with path.open("r+b") as file:
        file.seek(place + count // 2)
        file.write(bytes(count - count // 2))
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(SlideError, match=r"a\.ome\.tif.*\(128, 0\) of level 0") as caught:
                slide.read_region((128, 0), 0, (64, 64))
            assert "\n" not in str(caught.value)
            slide.read_region((0, 0), 0, (128, 128))


def test_a_missing_package_is_one_line_with_the_way_to_install_it(tmp_path: Path) -> None:
    path = ome_pyramid(tmp_path / "a.ome.tif")
    code = ("import sys, pathlib; sys.modules['tifffile'] = None; sys.modules['zarr'] = None\n"
            "from wsi_core.slide import open_slide\n"
            "from utils.errors import SlideError\n"
            "for path in sys.argv[1:]:\n"
            "    try: open_slide(pathlib.Path(path))\n"
            "    except SlideError as error: print(error)")
    (tmp_path / "b.zarr").mkdir()
    done = subprocess.run([sys.executable, "-c", code, path, tmp_path / "b.zarr"], cwd=ROOT,
                          capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert "a.ome.tif" in first and "pip install tifffile imagecodecs" in first
    assert "b.zarr" in second and "pip install zarr" in second


def test_reading_prints_nothing_on_damaged_metadata(tmp_path: Path,
                                                    capfd: pytest.CaptureFixture[str]) -> None:
    path = ome_pyramid(tmp_path / "a.ome.tif")
    tifffile.tiffcomment(path, b"<OME xmlns='http://www.openmicroscopy.org/Schemas/OME/2016-06'>")
    with open_slide(path) as slide:
        assert cv2.countNonZero(whole(slide)[..., 0]) and slide.mpp_um is None
    assert capfd.readouterr() == ("", "")
