"""Tissue masks as PNG: one a slide, of any size, covering the whole slide.

Ours hold 0 and 255 and, in a text chunk, the parameters they were made with. Those of others may
be binary, grey, palette or RGB with 8 bits: whatever is not zero is tissue. A slide's size over
the mask's size, by axis, is the mask's downsample.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import __version__
from utils.errors import BrokenFile
from utils.storage import RECORD_PARAMETERS, RECORD_VERSION, State, canonical, write_bytes

if TYPE_CHECKING:
    from PIL import Image

    from wsi_core.tissue import Tissue

Size = tuple[int, int]  # width, height

MASK_NAMES = ("{}.png", "{}_mask.png", "{}_mask_bw.png", "{}.geojson")
MAX_ASPECT_ERROR = 0.02  # by which a mask's shape may differ from its slide's
# The ceiling is ours: above it Pillow raises an error of its own; it warns at half of it.
MAX_MASK_PIXELS = 178_956_970
DRAWN_SIDE_PX = 4096  # longer side of a mask that is drawn from polygons
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


@dataclass(frozen=True)
class MaskFile:
    """A mask that was read.

    mask: (h, w) bool, True = tissue
    parameters: what it was made with, None when it is not ours
    """

    mask: np.ndarray
    parameters: dict[str, Any] | None


def find_mask(folder: Path, slide_id: str) -> Path:
    """The mask of a slide by one of the names in use; ``<slide_id>.png`` when there is none.

    Names, in this order: ``<id>.png`` (ours), ``<id>_mask.png``, ``<id>_mask_bw.png`` (AtlasPatch's
    binary mask), ``<id>.geojson`` (polygons in level-0 px).
    """
    paths = [Path(folder) / name.format(slide_id) for name in MASK_NAMES]
    return next((path for path in paths if path.exists()), paths[0])


def write_mask(path: Path, mask: np.ndarray, *, parameters: Mapping[str, Any]) -> None:
    """Write an (h, w) bool mask, or probabilities cut at 0.5, whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    binary = mask if mask.dtype == bool else mask >= 0.5
    record = PngInfo()
    record.add_itxt(RECORD_VERSION, __version__)
    record.add_itxt(RECORD_PARAMETERS, canonical(parameters))
    data = BytesIO()
    Image.fromarray(binary.astype(np.uint8) * 255).save(
        data, format="PNG", pnginfo=record, compress_level=4)
    write_bytes(path, data.getbuffer())


def read_mask(path: Path, *, slide_size: Size | None = None) -> MaskFile:
    """Read a mask; with the (w, h) of level 0, its shape is checked and GeoJSON is taken too.

    Raises BrokenFile: missing, no PNG, truncated or altered, more than 8 bits, over the pixel
    ceiling (found before decoding), or of another shape than the slide.
    """
    path = Path(path)
    if path.suffix.lower() == ".geojson":
        return _drawn(path, slide_size)
    with _opened(path) as image:
        if slide_size is not None:
            _check_shape(path, image.size, slide_size)
        parameters = _parameters(path, image)
        mask = _nonzero(image)
    return MaskFile(mask, parameters)


def mask_state(path: Path, parameters: Mapping[str, Any]) -> State:
    """Is ``path`` the finished mask of these parameters? Opens, decodes and compares."""
    if not Path(path).exists():
        return State.MISSING
    try:
        found = read_mask(path).parameters
    except BrokenFile:
        return State.BROKEN
    if found is None:
        return State.FOREIGN
    return State.DONE if canonical(found) == canonical(parameters) else State.OTHER


def resample_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """(h, w) bool of another ``size`` (w, h): True where tissue covers half a pixel or more."""
    import cv2

    height, width = mask.shape
    if (width, height) == size:
        return mask.copy()
    shrinks = size[0] < width or size[1] < height
    cover = cv2.resize(mask.astype(np.uint8) * 255, size,
                       interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(cover >= 128)


def draw_tissue(tissue: Tissue, slide_size: Size, size: Size) -> np.ndarray:
    """Polygons in level-0 px, holes left out, as an (h, w) bool mask of ``size`` (w, h)."""
    import cv2

    scale = np.asarray(size, np.float64) / np.asarray(slide_size, np.float64)
    canvas = np.zeros((size[1], size[0]), np.uint8)
    for outer, holes in zip(tissue.contours, tissue.holes, strict=True):
        rings = [np.rint(ring * scale).astype(np.int32) for ring in (outer, *holes)]
        cv2.fillPoly(canvas, rings, 1)  # even-odd: a hole leaves what other pieces have drawn
    return canvas > 0


# ---------------------------------------------------------------------------- reading

@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The PNG with its header read; whatever is wrong with it becomes one line."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("PNG",))
        with image:
            if image.width * image.height > MAX_MASK_PIXELS:
                raise BrokenFile(f"{path}: has {image.width} x {image.height} px, over the ceiling "
                                 f"of {MAX_MASK_PIXELS:,} px for a mask: make it smaller")
            if image.mode not in EIGHT_BIT_MODES:
                raise BrokenFile(f"{path}: has pixels of kind '{image.mode}', a mask of 8 bits was "
                                 "expected (0 = no tissue, anything else = tissue)")
            yield image
    except FileNotFoundError:
        raise BrokenFile(f"{path} is missing") from None
    except Image.DecompressionBombError:
        raise BrokenFile(f"{path}: has more than {MAX_MASK_PIXELS:,} px, the ceiling for a mask: "
                         "make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenFile(f"{path} cannot be read as a PNG mask ({error}): it is truncated, damaged "
                         "or no PNG") from None


def _nonzero(image: Image.Image) -> np.ndarray:
    transparent = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    if image.mode in ("1", "L") and not transparent:
        return np.asarray(image) > 0
    pixels = np.asarray(image.convert("RGBA" if transparent else "RGB"))
    coloured = pixels[..., :3].any(axis=-1)
    return np.asarray(coloured & (pixels[..., 3] > 0) if transparent else coloured)


def _parameters(path: Path, image: Image.Image) -> dict[str, Any] | None:
    """The record of a mask of ours; it stands before the pixels."""
    text = image.info.get(RECORD_PARAMETERS)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        raise BrokenFile(f"{path}: its record of parameters is damaged") from None
    return found if isinstance(found, dict) else None


def _check_shape(path: Path, size: Size, slide_size: Size) -> None:
    """Raise BrokenFile unless the aspect is the slide's within 2 % and the rounding of a pixel."""
    ratio = (slide_size[0] * size[1]) / (slide_size[1] * size[0])
    if abs(ratio - 1) > MAX_ASPECT_ERROR + 1 / min(size):
        raise BrokenFile(f"{path}: has {size[0]} x {size[1]} px, another shape than the slide's "
                         f"{slide_size[0]} x {slide_size[1]}: a mask must cover the whole slide")


def _drawn(path: Path, slide_size: Size | None) -> MaskFile:
    """What QuPath's classes call tissue, inside the regions and outside of what to ignore."""
    from wsi_core.geojson import read_annotations, restrict

    if slide_size is None:
        raise BrokenFile(f"{path}: polygons become a mask only for a slide whose size is known: "
                         "give a PNG")
    found = read_annotations(path, slide_size=slide_size)
    if found.tissue is None:
        raise BrokenFile(f"{path}: has areas to ignore or regions of interest but no tissue: a "
                         "mask needs an annotation of another class")
    shrink = max(1.0, max(slide_size) / DRAWN_SIDE_PX)
    size = (max(1, round(slide_size[0] / shrink)), max(1, round(slide_size[1] / shrink)))
    tissue = restrict(found.tissue, found.regions, found.ignored, slide_size=slide_size,
                      downsample=shrink)
    return MaskFile(draw_tissue(tissue, slide_size, size), None)
