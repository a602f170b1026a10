"""A slide behind one small protocol: open it, ask for its levels, read RGB regions.

Frames: a location is always in pixels of level 0, a size in pixels of the level that is read.
Handles are neither shared between threads nor pickled: each worker opens its own slide.
A read either returns the slide's own pixels or raises ``SlideError``; nothing is invented.
Pixels are as stored, 8 bits a channel: colour profiles (ICC) are not applied, grey becomes RGB,
slides of 16 bits are refused.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np

from utils.errors import SlideError
from wsi_core.slide_files import SLIDE_SUFFIXES as SLIDE_SUFFIXES
from wsi_core.slide_files import check_file as check_file
from wsi_core.slide_files import fingerprint as fingerprint
from wsi_core.slide_files import is_slide_file as is_slide_file
from wsi_core.slide_files import slide_entries as slide_entries
from wsi_core.slide_files import stamp as stamp
from wsi_core.slide_mpp import believable_mpp as believable_mpp
from wsi_core.slide_mpp import objective_disagrees as objective_disagrees

Backend = Literal["auto", "openslide", "tiff-tiles", "tiff", "zarr", "flat"]
Colour = tuple[int, int, int]

BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)

LEVEL_TOLERANCE = 0.01  # by which a downsample may miss a whole number, or the one asked for
MAX_REGION_PIXELS = 2**28  # one read: 16,384 px square, 1 GiB as RGBA
MAX_SIDE_PX = 2**24  # of level 0: 4 m at 0.25 um/px, whatever a header says

# OpenSlide cuts every read into blocks of this side, each placed at a whole level-0 pixel. Blocks
# of the same size give the same pixels as one read of the whole level, also where downsamples are
# not whole numbers.
BLOCK_PX = 4096

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Reader(NamedTuple):
    """A module that reads some formats.

    The module has ``open_with(path, *, backend, cache_mb) -> Slide | None``: None for a file that
    it does not know, SlideError for one that it knows and cannot read. It is imported when it is
    its turn.
    """

    module: str
    backends: tuple[Backend, ...]
    formats: str


# Asked in this order; the first that knows the file reads it. A new reader is a module and a line.
READERS = (
    Reader("wsi_core.slide_zarr", ("zarr",), "OME-Zarr folders"),
    Reader("wsi_core.slide_openslide", ("openslide", "tiff-tiles"), "OpenSlide's formats"),
    Reader("wsi_core.slide_tiff", ("tiff",), "other TIFFs"),
    Reader("wsi_core.slide_flat", ("flat",), "PNG, JPEG, BMP and WebP pictures"))


class Slide(Protocol):
    """An open slide; a context manager.

    path:              the file, or the folder of a DICOM series or of a Zarr hierarchy
    backend:           "openslide", "tiff-tiles", "tiff", "zarr" or "flat"
    level_dimensions:  (width, height) of each level, level 0 first
    level_downsamples: (x, y) = (w0 / wl, h0 / hl) of each level
    mpp_um:            (x, y) micrometres per pixel of level 0; None when the file says nothing
                       plausible
    mpp_problem:       "", or in one line why the file's own value is not believed
    mpp_source:        where mpp_um is from, e.g. "openslide.mpp-x"; see ``slide_mpp``
    objective_power:   as the file says, e.g. 40.0, or None
    """

    path: Path
    backend: str
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[tuple[float, float], ...]
    mpp_um: tuple[float, float] | None
    mpp_problem: str
    mpp_source: str = ""
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
    """Open a slide with the first of ``READERS`` that knows it, or with one ``backend``.

    "auto" takes stored JPEG tiles directly where that is bit-exact to OpenSlide, and OpenSlide for
    every other slide that it knows; "openslide" leaves the fast path out, "tiff-tiles" insists on
    it. "tiff" and "zarr" need optional packages, named in the error when they are missing.
    ``cache_mb`` bounds the decoded tiles that a handle keeps.
    A TIFF is never given to Pillow, which reads damaged files as black pixels.
    Raises SlideError: missing, no slide, empty, truncated, over a pixel ceiling.
    """
    path = Path(path)
    check_file(path)
    readers = [one for one in READERS if backend in ("auto", *one.backends)]
    for reader in readers:
        slide: Slide | None = import_module(reader.module).open_with(
            path, backend=backend, cache_mb=cache_mb)
        if slide is not None:
            return slide
    if backend != "auto":
        raise SlideError(f"{path}: the backend '{backend}' does not know this file (it reads "
                         f"{readers[0].formats}): use 'auto'")
    raise SlideError(f"{path}: {what_it_is(path)}")


def what_it_is(path: Path) -> str:
    """Why no reader knows the path, from its first bytes."""
    if path.is_dir():
        return "a folder whose .dcm files are no whole-slide images that OpenSlide reads"
    with path.open("rb") as file:
        if file.read(4) in TIFF_MAGIC:
            return "a TIFF that OpenSlide cannot open: truncated or damaged"
    return ("not a slide: its content is of no kind that is read ("
            + ", ".join(one.formats for one in READERS) + ")")


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


def read_overview(slide: Slide, downsample: float, *, max_pixels: int = 100_000_000,
                  background: Colour = BLACK) -> tuple[np.ndarray, tuple[float, float]]:
    """The whole slide about ``downsample`` times reduced: (h, w, 3) uint8 RGB, (x, y) downsample.

    Taken from the coarsest level that is fine enough, by averaging, block by block: the level is
    never held. A level within 1 % of the wanted downsample is taken as it is; else the size is
    that of level 0 divided by ``downsample``, rounded. The downsample that comes back is level 0's
    size over that of the result. Over about ``max_pixels`` a coarser overview is made; one finer
    than level 0 never is.
    """
    import cv2

    slide_width, slide_height = slide.level_dimensions[0]
    fitting = (slide_width * slide_height / max_pixels) ** 0.5
    downsample = max(1.0, downsample, fitting)
    level = best_level(slide, downsample)
    level_size = slide.level_dimensions[level]
    width, height = overview_size(slide, level, downsample)
    scale = sum(slide.level_downsamples[level]) / 2
    out = np.empty((height, width, 3), np.uint8)
    # Blocks of whole output pixels; each takes the level's pixels up to the nearest whole one, so
    # every pixel is used once and nothing is shifted by more than half a pixel of the level.
    edges = [_block_edges(*sides) for sides in zip(level_size, (width, height), strict=True)]
    for (top, bottom), (y, y_end) in edges[1]:
        for (left, right), (x, x_end) in edges[0]:
            block = slide.read_region((int(x * scale), int(y * scale)), level,
                                      (x_end - x, y_end - y), background=background)
            target = out[top:bottom, left:right]
            target[:] = block if block.shape == target.shape else cv2.resize(
                block, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    return out, (slide_width / width, slide_height / height)


def overview_size(slide: Slide, level: int, downsample: float) -> tuple[int, int]:
    """(w, h) of an overview made from ``level``: between the level's size and 1/4096 of it."""
    level_size = slide.level_dimensions[level]
    mean = sum(slide.level_downsamples[level]) / 2
    if abs(mean - downsample) <= LEVEL_TOLERANCE * downsample:
        return level_size
    width, height = (min(side, max(round(full / downsample), -(-side // BLOCK_PX)))
                     for side, full in zip(level_size, slide.level_dimensions[0], strict=True))
    return width, height


def _block_edges(level_px: int, out_px: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((from, to) of the output, (from, to) of the level) of each block along one axis."""
    factor = level_px / out_px
    step = max(1, int(BLOCK_PX / factor))
    starts = range(0, out_px, step)
    return [((start, end), (round(start * factor), round(end * factor)))
            for start in starts for end in [min(start + step, out_px)]]


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
