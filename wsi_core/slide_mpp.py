"""What a file says of its pixel size, and whether that can be true.

A slide's sources are asked in this order, the first believable one counts and is named in
``Slide.mpp_source``:

    openslide.mpp-x      OpenSlide's own finding (for a plain TIFF from its resolution)
    aperio.MPP           um per pixel
    mirax                MICROMETER_PER_PIXEL of the base layer
    hamamatsu resolution pixels per centimetre or inch; never um per pixel by itself
    ome-xml, ome-zarr    with their units; a length without one is micrometres in OME-XML, unknown
                         in OME-Zarr
    description          "MPP = x" or "microns per pixel = x" in a comment
    tiff resolution      pixels per centimetre or inch, unless it is one that image programs write
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

if TYPE_CHECKING:
    from wsi_core.slide import Slide

MIN_MPP_UM, MAX_MPP_UM = 0.05, 50.0  # finer than light resolves; coarser than any overview level
MAX_MPP_RATIO = 1.05  # of the two axes
PRINT_DPI = (72, 96, 100, 150, 200, 300, 600, 1200)  # what image programs write by default
UM_AT_ONE_X = 10.0  # um per pixel times objective power: 40x is 0.25 um
MAX_OBJECTIVE_RATIO = 1.3  # 0.22 to 0.28 um are all sold as 40x
MAX_XML_CHARACTERS = 2**24

_UM_PER_UNIT = {
    "å": 1e-4, "angstrom": 1e-4, "pm": 1e-6, "nm": 1e-3, "nanometer": 1e-3, "µm": 1.0, "μm": 1.0,
    "um": 1.0, "micrometer": 1.0, "micron": 1.0, "mm": 1e3, "millimeter": 1e3, "cm": 1e4,
    "centimeter": 1e4, "m": 1e6, "meter": 1e6, "in": 25_400.0, "inch": 25_400.0}
_NUMBER = r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)"
_IN_TEXT = re.compile(r"\b(?:mpp|microns?\s+per\s+pixel)\b\s*[=:]?\s*" + _NUMBER, re.IGNORECASE)


class Claim(NamedTuple):
    """What one source says, as text, in um per pixel along x and y; None says nothing."""

    source: str
    x: str | None
    y: str | None


class PixelSize(NamedTuple):
    """``mpp_um``, ``mpp_problem`` and ``mpp_source`` of a Slide."""

    mpp_um: tuple[float, float] | None
    problem: str
    source: str


def first_believable(claims: Iterable[Claim]) -> PixelSize:
    """The first claim that can be true; when none can, the problem of the first that was made."""
    problem = ""
    for claim in claims:
        mpp_um, why_not = believable_mpp(claim.x, claim.y)
        if mpp_um is not None:
            return PixelSize(mpp_um, "", claim.source)
        problem = problem or why_not
    return PixelSize(None, problem, "")


def believable_mpp(x_text: str | None, y_text: str | None
                   ) -> tuple[tuple[float, float] | None, str]:
    """(mpp, problem) from what a file says of its pixel size, in micrometres.

    Nothing said: (None, ""). Not believed: (None, why): no number, 0, negative, NaN, outside
    0.05 to 50, the axes more than 5 % apart, or 25400/dpi of a print resolution, which image
    programs write without knowing better.
    """
    if x_text is None and y_text is None:
        return None, ""
    said = f"the file gives {x_text} x {y_text} um per pixel"
    try:
        x_um, y_um = float(x_text or "nan"), float(y_text or "nan")
    except ValueError:
        return None, f"the file gives {x_text!r} x {y_text!r} um per pixel, which is no number"
    if not (math.isfinite(x_um) and math.isfinite(y_um)):
        return None, f"{said}, two finite numbers were expected"
    for dpi in PRINT_DPI:
        if math.isclose(x_um, 25400 / dpi, rel_tol=1e-4):
            return None, f"{said}, a print resolution ({dpi} dpi), not a measured one"
    if not all(MIN_MPP_UM <= value <= MAX_MPP_UM for value in (x_um, y_um)):
        return None, f"{said}, {MIN_MPP_UM:g} to {MAX_MPP_UM:g} was expected"
    if max(x_um, y_um) > MAX_MPP_RATIO * min(x_um, y_um):
        return None, f"{said}, the axes differ by more than 5 %"
    return (x_um, y_um), ""


def objective_disagrees(slide: Slide, mpp_um: float) -> str:
    """ "", or one line when the objective power belongs to another pixel size than ``mpp_um``.

    mpp_um: um per level-0 px that counts (the user's word or the slide's own). Up to a ratio of
    1.3 is no disagreement.
    """
    if slide.objective_power is None:
        return ""
    nominal_um = UM_AT_ONE_X / slide.objective_power
    if max(nominal_um / mpp_um, mpp_um / nominal_um) <= MAX_OBJECTIVE_RATIO:
        return ""
    return (f"objective says {slide.objective_power:g}x ({nominal_um:g} um), pixel size says "
            f"{mpp_um:.4g} um: the pixel size counts")


# ---------------------------------------------------------------------------- sources

def openslide_claims(properties: Mapping[str, str]) -> list[Claim]:
    """What OpenSlide's properties say, in the order of the module."""
    get = properties.get
    layer = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_"
    hamamatsu_unit = get("hamamatsu.ResolutionUnit", get("tiff.ResolutionUnit"))
    description = get("tiff.ImageDescription", "")
    return [
        Claim("openslide.mpp-x", get("openslide.mpp-x"), get("openslide.mpp-y")),
        Claim("aperio.MPP", get("aperio.MPP"), get("aperio.MPP")),
        Claim("mirax", get(layer + "X"), get(layer + "Y")),
        resolution_claim("hamamatsu resolution", get("hamamatsu.XResolution"),
                         get("hamamatsu.YResolution"), hamamatsu_unit),
        ome_xml_claim(description),
        text_claim(get("openslide.comment", ""), description),
        resolution_claim("tiff resolution", get("tiff.XResolution"), get("tiff.YResolution"),
                         get("tiff.ResolutionUnit"))]


def resolution_claim(source: str, x: str | None, y: str | None, unit: str | None) -> Claim:
    """Pixels per ``unit`` (a name such as "centimeter") as um per pixel; no claim without one."""
    um_per_unit = _UM_PER_UNIT.get((unit or "").lower())
    if um_per_unit is None or x is None or y is None:
        return Claim(source, None, None)
    return Claim(source, _inverse(x, um_per_unit), _inverse(y, um_per_unit))


def length_claim(source: str, x: str | None, y: str | None, x_unit: str | None,
                 y_unit: str | None) -> Claim:
    """Lengths of a pixel in their units as um; no claim for an unknown unit."""
    factors = [_UM_PER_UNIT.get((unit or "").lower()) for unit in (x_unit, y_unit)]
    if x is None or y is None or factors[0] is None or factors[1] is None:
        return Claim(source, None, None)
    try:
        return Claim(source, repr(float(x) * factors[0]), repr(float(y) * factors[1]))
    except ValueError:
        return Claim(source, x, y)  # refused as no number


def text_claim(*texts: str) -> Claim:
    """ "MPP = 0.25" somewhere in the texts."""
    for text in texts:
        found = _IN_TEXT.search(text)
        if found:
            return Claim("description", found[1], found[1])
    return Claim("description", None, None)


def ome_xml_claim(xml: str, image: int = 0) -> Claim:
    """PhysicalSizeX and Y of the ``image``-th Image of an OME-XML (OME schema 2016-06)."""
    images = ome_elements(xml, "Image")
    pixels = next(iter(_children(images[image], "Pixels")), None) if image < len(images) else None
    if pixels is None:
        return Claim("ome-xml", None, None)
    get = pixels.attrib.get
    return length_claim("ome-xml", get("PhysicalSizeX"), get("PhysicalSizeY"),
                        get("PhysicalSizeXUnit", "um"), get("PhysicalSizeYUnit", "um"))


def ome_elements(xml: str, name: str) -> list[ElementTree.Element]:
    """All elements of that name; none when the text is no OME-XML, broken, or declares entities."""
    if "<OME" not in xml[:4096] or len(xml) > MAX_XML_CHARACTERS or "<!DOCTYPE" in xml:
        return []
    try:
        return _children(ElementTree.fromstring(xml.encode("utf-8")), name)
    except ElementTree.ParseError:
        return []


def _children(element: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return element.findall(f".//{{*}}{name}")


def _inverse(text: str, um_per_unit: float) -> str:
    try:
        return repr(um_per_unit / float(text))
    except ZeroDivisionError:
        return "inf"
    except ValueError:
        return text
