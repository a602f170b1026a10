"""Every format that OpenSlide reads, through OpenSlide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide

from utils.errors import SlideError
from wsi_core.slide import (
    BLACK,
    Colour,
    Slide,
    believable_mpp,
    check_dimensions,
    check_request,
    compose,
)
from wsi_core.tiff_directory import Directory, TiffProblem, missing_end, read_directories

# Plain TIFF inside. Not Hamamatsu, whose offsets wrap at 4 GiB.
TIFF_VENDORS = ("aperio", "generic-tiff", "leica", "philips-tiff", "trestle", "ventana")


def vendor_of(path: Path) -> str | None:
    """OpenSlide's name for the format ("aperio", "generic-tiff" ...), None for what it refuses."""
    try:
        vendor: str | None = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path}: OpenSlide cannot open it: {error}") from None
    return vendor


class OpenSlideSlide(Slide):
    """A slide read by OpenSlide with a tile cache of ``cache_mb``; one handle a worker.

    OpenSlide latches errors: after one damaged tile every later read on the handle fails. So a
    failed read gets a new handle before the error goes out.
    """

    backend = "openslide"

    def __init__(self, path: Path, *, cache_mb: int = 256) -> None:
        """Open ``path``. Raises SlideError, also for a TIFF that ends before its tiles do."""
        self.path = Path(path)
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
        self.mpp_um, self.mpp_problem = believable_mpp(
            properties.get(openslide.PROPERTY_NAME_MPP_X),
            properties.get(openslide.PROPERTY_NAME_MPP_Y))
        self.objective_power = _positive(
            properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))

    def _open(self) -> openslide.OpenSlide:
        try:
            handle = openslide.OpenSlide(self.path)
            handle.set_cache(openslide.OpenSlideCache(self._cache_bytes))
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(f"{self.path}: OpenSlide cannot open it: {error}") from None
        return handle

    def _directories(self) -> list[Directory]:
        """The TIFF's directories; SlideError when the file ends before its tiles do."""
        try:
            directories = read_directories(self.path)
        except TiffProblem:  # OpenSlide made it out, so it will do without us
            return []
        missing = missing_end(self.path, directories)
        if missing:
            self.close()
            raise SlideError(f"{self.path}: is truncated ({missing}): copy the slide again")
        return directories

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
