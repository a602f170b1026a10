"""A slide behind one small protocol: open it, ask for its levels, read RGB regions.

Frames: a location is always in pixels of level 0, a size in pixels of the level that is read.
Handles are neither shared between threads nor pickled: each worker opens its own slide.
A read either returns the slide's own pixels or raises ``SlideError``; nothing is invented.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from utils.errors import SlideError

Backend = Literal["auto", "openslide", "tiff-tiles"]
Colour = tuple[int, int, int]

BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)

LEVEL_TOLERANCE = 0.01  # by which a downsample may miss a whole number, or the one asked for
MAX_REGION_PIXELS = 2**28  # one read: 16,384 px square, 1 GiB as RGBA
MAX_SIDE_PX = 2**24  # of level 0: 4 m at 0.25 um/px, whatever a header says
MIN_MPP_UM, MAX_MPP_UM = 0.05, 50.0  # finer than light resolves; coarser than any overview level
MAX_MPP_RATIO = 1.05  # of the two axes
PRINT_DPI = (72, 96, 100, 150, 200, 300, 600, 1200)  # what image programs write by default

# OpenSlide cuts every read into blocks of this side, each placed at a whole level-0 pixel. Blocks
# of the same size give the same pixels as one read of the whole level, also where downsamples are
# not whole numbers.
BLOCK_PX = 4096


class Slide(Protocol):
    """An open slide; a context manager.

    path:              the file
    backend:           "openslide", "tiff-tiles" or "flat"
    level_dimensions:  (width, height) of each level, level 0 first
    level_downsamples: (x, y) = (w0 / wl, h0 / hl) of each level
    mpp_um:            (x, y) micrometres per pixel of level 0; None when the file says nothing
                       plausible
    mpp_problem:       "", or in one line why the file's own value is not believed
    objective_power:   as the file says, e.g. 40.0, or None
    """

    path: Path
    backend: str
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[tuple[float, float], ...]
    mpp_um: tuple[float, float] | None
    mpp_problem: str
    objective_power: float | None

    def read_region(self, location_l0: tuple[int, int], level: int, size: tuple[int, int], *,
                    background: Colour = BLACK) -> np.ndarray:
        """Pixels of ``size`` (w, h in px of ``level``) from ``location_l0`` (x, y in level-0 px).

        Returns (h, w, 3) uint8 RGB that the caller may write to. What is transparent or outside
        the slide has the colour ``background``. On black the result is that of OpenSlide's
        ``read_region(...).convert("RGB")``, partly transparent edge pixels included; on any other
        background those are blended.
        Raises SlideError naming slide, place and level; later reads still work.
        """
        ...

    def close(self) -> None:
        """Give the file handles back; a closed slide is not read again."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


# ---------------------------------------------------------------------------- opening

def open_slide(path: Path, *, backend: Backend = "auto", cache_mb: int = 256) -> Slide:
    """Open a slide with the fastest reader whose pixels are OpenSlide's.

    "auto" takes stored JPEG tiles directly where that is bit-exact, OpenSlide for every other
    slide, and Pillow for flat PNG, JPEG, BMP and WebP images; "openslide" leaves the fast path
    out; "tiff-tiles" insists on it. ``cache_mb`` bounds the decoded tiles that a handle keeps.
    A TIFF is never given to Pillow, which reads damaged files as black pixels.
    Raises SlideError: missing, a folder, empty, no slide, truncated, over a pixel ceiling.
    """
    path = Path(path)
    check_file(path)
    from wsi_core.slide_openslide import OpenSlideSlide, vendor_of

    vendor = vendor_of(path)
    if vendor is None:
        from wsi_core.slide_flat import FlatSlide

        if backend != "auto":
            raise SlideError(f"{path}: OpenSlide does not know this file, so the backend "
                             f"'{backend}' cannot read it: use 'auto'")
        return FlatSlide(path)
    slide = OpenSlideSlide(path, cache_mb=cache_mb)
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


def check_file(path: Path) -> None:
    """Raise SlideError unless ``path`` is a readable file with something in it."""
    try:
        if path.is_dir():
            raise SlideError(f"{path}: is a folder, a slide file was expected")
        if path.stat().st_size == 0:
            raise SlideError(f"{path}: the file is empty (0 bytes): copy the slide again")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise SlideError(f"{path}: no such file") from None
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror})") from None


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells one slide file from another in the parameters of a result."""
    path = Path(path)
    try:
        return {"slide_bytes": path.stat().st_size, "slide_name": path.name}
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror})") from None


# ---------------------------------------------------------------------------- levels

def best_level(slide: Slide, downsample: float) -> int:
    """The coarsest level whose downsample is at most ``downsample``, give or take 1 %.

    The tolerance takes in pyramids that round their level sizes (64.003 for 64). Level 0 when
    no level qualifies.
    """
    limit = downsample * (1 + LEVEL_TOLERANCE)
    means = [(x + y) / 2 for x, y in slide.level_downsamples]
    fitting = [level for level, mean in enumerate(means) if mean <= limit]
    return max(fitting, key=lambda level: means[level], default=0)


def nominal_downsample(downsample: float) -> float:
    """The nearest whole number when within 1 % of it (3.9998 -> 4.0), else the value itself."""
    whole = float(round(downsample))
    near = whole >= 1 and abs(downsample - whole) <= LEVEL_TOLERANCE * whole
    return whole if near else downsample


def read_level(slide: Slide, level: int, *, max_pixels: int = 100_000_000,
               background: Colour = BLACK) -> tuple[np.ndarray, tuple[float, float]]:
    """A whole level as (h, w, 3) uint8 RGB, and its (x, y) downsample against level 0.

    A level of more than ``max_pixels`` is averaged over squares of 2, 4, 8 ... pixels until it
    fits, block by block: it is never held whole. Up to that factor minus one pixels at the right
    and lower border are then left out, so that every pixel of the result is a full square.
    """
    import cv2

    check_level(slide, level)
    width, height = slide.level_dimensions[level]
    factor = reduction_factor((width, height), max_pixels)
    out = np.empty((max(1, height // factor), max(1, width // factor), 3), np.uint8)
    x_downsample, y_downsample = slide.level_downsamples[level]
    scale = (x_downsample + y_downsample) / 2  # OpenSlide's scalar downsample
    for y in range(0, height, BLOCK_PX):
        for x in range(0, width, BLOCK_PX):
            size = (min(BLOCK_PX, width - x), min(BLOCK_PX, height - y))
            block = slide.read_region((int(x * scale), int(y * scale)), level, size,
                                      background=background)
            target = out[y // factor:(y + BLOCK_PX) // factor,
                         x // factor:(x + BLOCK_PX) // factor]
            if target.size == 0:
                continue
            rows, columns = target.shape[:2]
            whole = block[:rows * factor, :columns * factor]
            target[:] = whole if factor == 1 else cv2.resize(
                whole, (columns, rows), interpolation=cv2.INTER_AREA)
    return out, (x_downsample * factor, y_downsample * factor)


def reduction_factor(size: tuple[int, int], max_pixels: int) -> int:
    """The smallest power of two that brings (w, h) to ``max_pixels`` or less.

    A power of two divides ``BLOCK_PX``, so the squares that are averaged never straddle blocks.
    """
    factor = 1
    while (size[0] // factor) * (size[1] // factor) > max_pixels and factor < BLOCK_PX:
        factor *= 2
    return factor


# ---------------------------------------------------------------------------- for the backends

def check_level(slide: Slide, level: int) -> None:
    """Raise SlideError when the slide has no such level."""
    count = len(slide.level_dimensions)
    if not 0 <= level < count:
        raise SlideError(f"{slide.path}: has no level {level}, only "
                         + ("level 0" if count == 1 else f"levels 0 to {count - 1}"))


def check_request(slide: Slide, level: int, size: tuple[int, int]) -> None:
    """Raise SlideError for a level that is not there, or a region that is empty or too large."""
    check_level(slide, level)
    width, height = size
    if width < 1 or height < 1:
        raise SlideError(f"{slide.path}: a region of {width} x {height} px was asked for")
    if width * height > MAX_REGION_PIXELS:
        raise SlideError(f"{slide.path}: a region of {width} x {height} px is over the ceiling of "
                         f"{MAX_REGION_PIXELS} px a read: ask for less or for a coarser level")


def check_dimensions(path: Path, size: tuple[int, int]) -> None:
    """Raise SlideError when a header announces a level 0 that no slide can have."""
    if not all(1 <= side <= MAX_SIDE_PX for side in size):
        raise SlideError(f"{path}: announces {size[0]} x {size[1]} px, sides of 1 to {MAX_SIDE_PX} "
                         "px were expected: the header is damaged")


def compose(rgba: np.ndarray, background: Colour) -> np.ndarray:
    """(h, w, 4) RGBA, not premultiplied, on ``background``: a fresh (h, w, 3) array.

    See ``Slide.read_region`` for what happens to partly transparent pixels.
    """
    import cv2

    rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    alpha = rgba[..., 3]
    if int(alpha.min()) == 255:
        return rgb
    if background != BLACK:
        partly = (alpha > 0) & (alpha < 255)
        weight = alpha[partly][:, None].astype(np.uint32)
        blend = rgb[partly] * weight + np.asarray(background, np.uint32) * (255 - weight)
        rgb[partly] = (blend + 127) // 255
    rgb[alpha == 0] = background
    return rgb


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
