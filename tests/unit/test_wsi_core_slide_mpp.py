"""Pixel sizes: what is believed, where it is from, and what an objective says against it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slides import tissue_image, write_pyramid
from wsi_core.slide import Slide, believable_mpp, objective_disagrees, open_slide
from wsi_core.slide_mpp import (
    first_believable,
    length_claim,
    ome_xml_claim,
    openslide_claims,
    resolution_claim,
    text_claim,
)


@pytest.mark.parametrize(("x", "y", "words"), [
    ("0", "0", "expected"), ("-0.5", "-0.5", "expected"), ("nan", "nan", "finite"),
    ("inf", "0.5", "finite"), ("1e6", "1e6", "0.05 to 50"), ("0.001", "0.001", "0.05 to 50"),
    ("264.58333", "264.58333", "96 dpi"), ("42.33333", "42.33333", "600 dpi"),
    ("0.5", "0.53", "more than 5 %"), ("0.5", None, "finite"), ("half", "0.5", "no number")])
def test_implausible_pixel_sizes_are_not_believed(x: str, y: str | None, words: str) -> None:
    mpp, problem = believable_mpp(x, y)
    assert mpp is None and words in problem and "\n" not in problem


def test_plausible_pixel_sizes_are() -> None:
    assert believable_mpp(None, None) == (None, "")
    for x, y in ((0.25, 0.25), (0.5, 0.524), (28.969, 28.968)):
        assert believable_mpp(str(x), str(y)) == ((x, y), "")


# ---------------------------------------------------------------------------- sources

@pytest.mark.parametrize(("properties", "mpp", "source"), [
    ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25", "aperio.MPP": "0.5"}, 0.25,
     "openslide.mpp-x"),
    ({"openslide.mpp-x": "264.58333", "openslide.mpp-y": "264.58333", "aperio.MPP": "0.5"}, 0.5,
     "aperio.MPP"),
    ({"mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X": "0.23",
      "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y": "0.23"}, 0.23, "mirax"),
    ({"hamamatsu.XResolution": "43826", "hamamatsu.YResolution": "43826",
      "tiff.ResolutionUnit": "centimeter"}, 10_000 / 43_826, "hamamatsu resolution"),
    ({"tiff.ImageDescription": "Scan|AppMag = 40|MPP = 0.2325|Left = 2"}, 0.2325, "description"),
    ({"openslide.comment": "microns per pixel: 0.46"}, 0.46, "description"),
    ({"tiff.XResolution": "50800", "tiff.YResolution": "50800", "tiff.ResolutionUnit": "inch"},
     0.5, "tiff resolution"),
    ({"tiff.ImageDescription": '<OME><Image><Pixels PhysicalSizeX="250" PhysicalSizeXUnit="nm" '
      'PhysicalSizeY="250" PhysicalSizeYUnit="nm"/></Image></OME>'}, 0.25, "ome-xml")])
def test_each_source_of_a_pixel_size(properties: dict[str, str], mpp: float, source: str) -> None:
    found = first_believable(openslide_claims(properties))
    assert found.mpp_um == pytest.approx((mpp, mpp)) and found[1:] == ("", source)


@pytest.mark.parametrize("properties", [
    {"hamamatsu.XResolution": "0.25", "hamamatsu.YResolution": "0.25"},  # a resolution of no unit
    {"tiff.XResolution": "2", "tiff.YResolution": "2", "tiff.ResolutionUnit": "none"},
    {"tiff.ImageDescription": "Compression: none, mpps 0.25"}, {}])
def test_what_says_nothing(properties: dict[str, str]) -> None:
    assert first_believable(openslide_claims(properties)) == (None, "", "")


def test_the_first_problem_is_told_when_nothing_is_believed() -> None:
    claims = openslide_claims({"openslide.mpp-x": "0", "openslide.mpp-y": "0",
                               "tiff.ImageDescription": "MPP = 900"})
    assert first_believable(claims).problem.startswith("the file gives 0 x 0 um")


@pytest.mark.parametrize(("unit", "um"), [
    ("µm", 0.25), ("μm", 0.25), ("micrometer", 0.25), ("nm", 0.00025), ("millimeter", 250),
    ("cm", 2500), ("inch", 6350)])
def test_units_of_lengths(unit: str, um: float) -> None:
    assert float(length_claim("s", "0.25", "1", unit, unit).x or "nan") == pytest.approx(um)


@pytest.mark.parametrize("unit", ["pixel", "reference frame", "", None])
def test_a_length_in_no_unit_is_no_claim(unit: str | None) -> None:
    assert length_claim("s", "0.25", "0.25", unit, unit)[1:] == (None, None)


def test_numbers_that_are_none_are_told() -> None:
    for claim in (resolution_claim("s", "0", "0", "inch"), length_claim("s", "a", "b", "um", "um"),
                  resolution_claim("s", "many", "many", "inch")):
        assert first_believable([claim]).mpp_um is None and first_believable([claim]).problem


def test_ome_xml_of_several_pictures_without_units_and_damaged() -> None:
    xml = ('<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
           '<Image><Pixels PhysicalSizeX="8" PhysicalSizeY="8"/></Image>'
           '<Image><Pixels PhysicalSizeX="0.5" PhysicalSizeY="0.51"/></Image></OME>')
    assert ome_xml_claim(xml, 1)[1:] == ("0.5", "0.51")
    for nothing in (xml[:60], "", "<OME/>", "<!DOCTYPE a>" + xml):
        assert ome_xml_claim(nothing, 0)[1:] == (None, None)
    assert ome_xml_claim(xml, 2)[1:] == (None, None)


def test_text_without_a_number_is_no_claim() -> None:
    assert text_claim("MPP = unknown", "")[1:] == (None, None)


def test_slides_say_where_their_pixel_size_is_from(tmp_path: Path) -> None:
    described = write_pyramid(tmp_path / "a.tif", tissue_image(256, 256), downsamples=(1,),
                              mpp=264.5833, description="MPP = 0.25")
    plain = write_pyramid(tmp_path / "b.tif", tissue_image(256, 256), downsamples=(1,), mpp=None)
    with open_slide(described) as slide:
        assert slide.backend == "tiff-tiles"
        assert (slide.mpp_um, slide.mpp_source) == ((0.25, 0.25), "description")
    with open_slide(plain) as slide:
        assert (slide.mpp_um, slide.mpp_source) == (None, "")


# ---------------------------------------------------------------------------- B6

@pytest.mark.parametrize(("power", "mpp", "disagree"), [
    (40.0, 0.22, False), (40.0, 0.28, False), (20.0, 0.25, True), (40.0, 0.5, True),
    (20.0, 0.5, False), (None, 0.25, False), (40.0, 0.193, False), (40.0, 0.19, True)])
def test_an_objective_that_belongs_to_another_pixel_size(power: float | None, mpp: float,
                                                         disagree: bool) -> None:
    class Fake:
        objective_power = power

    slide: Slide = Fake()  # type: ignore[assignment]
    line = objective_disagrees(slide, mpp)
    assert bool(line) == disagree
    if (power, mpp) == (20.0, 0.25):
        assert line == ("objective says 20x (0.5 um), pixel size says 0.25 um: "
                        "the pixel size counts")
