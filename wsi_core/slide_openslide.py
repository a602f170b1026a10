"""Every format that OpenSlide reads, through OpenSlide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide

from utils.errors import SlideError
from wsi_core.slide import (
    BLACK,
    Backend,
    Colour,
    Slide,
    check_dimensions,
    check_request,
    compose,
)
from wsi_core.slide_dicom import file_to_open
from wsi_core.slide_mpp import first_believable, openslide_claims
from wsi_core.tiff_directory import Directory, TiffProblem, missing_end, read_directories

# Plain TIFF inside. Not Hamamatsu, whose offsets wrap at 4 GiB.
TIFF_VENDORS = ("aperio", "generic-tiff", "leica", "philips-tiff", "trestle", "ventana")


def open_with(path: Path, *, backend: Backend, cache_mb: int) -> Slide | None:
    """See ``wsi_core.slide.Reader``. Plain TIFFs that OpenSlide reads in part, or whose compression
    it does not know, are left to "tiff"."""
    file = file_to_open(path) if path.is_dir() else path
    vendor = vendor_of(file) if file is not None else None
    if file is None or vendor is None:
        return None
    others_may = backend == "auto" and vendor == "generic-tiff"
    if others_may and _reads_only_a_part(file):
        return None
    try:
        slide = OpenSlideSlide(path, file=file, cache_mb=cache_mb)
    except CannotOpen:
        if others_may:
            return None
        raise
    if backend == "openslide":
        return slide
    from wsi_core.tiff_tiles import TiffTilesSlide, Unsuitable

    try:
        return TiffTilesSlide(slide, cache_mb=cache_mb)
    except Unsuitable as reason:
        if backend == "tiff-tiles":
            slide.close()
            raise SlideError(f"{path}: cannot be read tile by tile ({reason}): use the backend "
                             "'auto'") from None
        slide.fast_path_problem = str(reason)
        return slide


def _reads_only_a_part(path: Path) -> bool:
    """Whether OpenSlide would miss levels that hang below level 0 (SubIFDs), the other channels
    of an OME-TIFF that stores them one by one, or what a truncated file has lost."""
    try:
        first = read_directories(path)[0]
    except TiffProblem:
        return True
    return first.has_sub_directories or (first.samples < 3 and "<OME" in first.description)


def vendor_of(path: Path) -> str | None:
    """OpenSlide's name for the format ("aperio", "generic-tiff" ...), None for what it refuses."""
    try:
        vendor: str | None = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path}: OpenSlide cannot open it: {error}") from None
    return vendor


class CannotOpen(SlideError):
    """OpenSlide knows the format and does not open the file."""


class OpenSlideSlide(Slide):
    """A slide read by OpenSlide with a tile cache of ``cache_mb``; one handle a worker.

    OpenSlide latches errors: after one damaged tile every later read on the handle fails. So a
    failed read gets a new handle before the error goes out.
    """

    backend = "openslide"

    def __init__(self, path: Path, *, file: Path | None = None, cache_mb: int = 256) -> None:
        """Open ``path``, or the ``file`` of it that stands for a folder.

        Raises SlideError, also for a TIFF that ends before its tiles do, or is not of 8 bits.
        """
        self.path = Path(path)
        self._file = self.path if file is None else file
        self._cache_bytes = cache_mb * 2**20
        self._handle: openslide.OpenSlide | None = self._open()
        properties = self._handle.properties
        self.vendor = str(properties.get(openslide.PROPERTY_NAME_VENDOR, ""))
        self.fast_path_problem = ""  # why the fast path was not taken, when "auto" looked
        self.tiff_directories = self._directories() if self.vendor in TIFF_VENDORS else []
        self.level_dimensions = tuple((int(w), int(h)) for w, h in self._handle.level_dimensions)
        self.openslide_downsamples = tuple(float(d) for d in self._handle.level_downsamples)
        check_dimensions(self.path, self.level_dimensions[0])
        width, height = self.level_dimensions[0]
        self.level_downsamples = tuple((width / w, height / h) for w, h in self.level_dimensions)
        self._check_bits()
        self.mpp_um, self.mpp_problem, self.mpp_source = first_believable(
            openslide_claims(properties))
        self.objective_power = _positive(
            properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))

    def _open(self) -> openslide.OpenSlide:
        try:
            handle = openslide.OpenSlide(self._file)
            handle.set_cache(openslide.OpenSlideCache(self._cache_bytes))
        except (openslide.OpenSlideError, OSError) as error:
            raise CannotOpen(f"{self.path}: OpenSlide cannot open it: {error}") from None
        return handle

    def _directories(self) -> list[Directory]:
        """The TIFF's directories; SlideError when the file ends before its tiles do."""
        try:
            directories = read_directories(self._file)
        except TiffProblem:  # OpenSlide made it out, so it will do without us
            return []
        missing = missing_end(self._file, directories)
        if missing:
            self.close()
            raise SlideError(f"{self.path}: is truncated ({missing}): copy the slide again")
        return directories

    def _check_bits(self) -> None:
        """SlideError for a TIFF of more than 8 bits, which libtiff would cut to 8 unasked."""
        bits = max((max(one.bits) for one in self.tiff_directories
                    if (one.width, one.height) == self.level_dimensions[0]), default=8)
        if bits > 8:
            self.close()
            raise SlideError(f"{self.path}: has {bits} bits a channel, 8 were expected: convert it "
                             "to 8 bits (vips cast IN OUT.tif uchar, after scaling)")

    def read_region(self, location_l0: tuple[int, int], level: int, size: tuple[int, int], *,
                    background: Colour = BLACK) -> np.ndarray:
        """See ``Slide.read_region``."""
        check_request(self, level, size)
        if self._handle is None:  # the reopening after an earlier error failed, or closed
            self._handle = self._open()
        location = (int(location_l0[0]), int(location_l0[1]))
        try:
            image = self._handle.read_region(location, level, (int(size[0]), int(size[1])))
        except openslide.OpenSlideError as error:
            self.close()
            raise SlideError(f"{self.path}: cannot read {size[0]} x {size[1]} px at level-0 "
                             f"position {location} of level {level}: {error}") from None
        return compose(np.asarray(image), background)

    def close(self) -> None:
        """See ``Slide.close``."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def _positive(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if value > 0 else None
