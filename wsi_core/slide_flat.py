"""Flat pictures (PNG, JPEG, BMP, WebP) as slides of one level."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.errors import SlideError
from wsi_core.slide import BLACK, Backend, Colour, Slide, check_request, compose

FLAT_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
# The decoded picture is held whole. The ceiling is ours: Pillow's global limit stays as it is
# (above this many pixels it raises an error of its own; its warning at half of them is silenced).
MAX_FLAT_PIXELS = 178_956_970
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def open_with(path: Path, *, backend: Backend, cache_mb: int) -> Slide | None:
    """See ``wsi_core.slide.Reader``; the picture is held whole, whatever ``cache_mb``."""
    try:
        return None if path.is_dir() else FlatSlide(path)
    except UnidentifiedImageError:
        return None


class FlatSlide(Slide):
    """A picture of one level without mpp; decoded at the first read, then held in memory."""

    backend = "flat"

    def __init__(self, path: Path) -> None:
        """Read the header. Raises SlideError, or Pillow's error for a file of another kind."""
        self.path = Path(path)
        with self._open() as image:
            self.level_dimensions = (image.size,)
        self.level_downsamples = ((1.0, 1.0),)
        self.mpp_um = None
        self.mpp_problem = ""
        self.objective_power = None
        self._pixels: np.ndarray | None = None  # (h, w, 3) RGB or (h, w, 4) RGBA

    def _open(self) -> Image.Image:
        """The picture with only its header read, refused when it is not one that we decode."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(self.path, formats=FLAT_FORMATS)
        except Image.DecompressionBombError:
            raise SlideError(_too_large(self.path, "it")) from None
        except UnidentifiedImageError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise SlideError(f"{self.path}: cannot be read as a picture: {error}") from None
        width, height = image.size
        problem = ""
        if width * height > MAX_FLAT_PIXELS:
            problem = _too_large(self.path, f"{width} x {height} px")
        elif image.mode not in EIGHT_BIT_MODES:
            problem = f"{self.path}: has pixels of kind '{image.mode}', 8 bits were expected"
        if problem:
            image.close()
            raise SlideError(problem)
        return image

    def _decode(self) -> np.ndarray:
        with self._open() as image:
            transparent = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
            try:
                return np.array(image.convert("RGBA" if transparent else "RGB"))
            except (OSError, SyntaxError, ValueError, MemoryError) as error:
                raise SlideError(f"{self.path}: cannot be decoded: {error}") from None

    def read_region(self, location_l0: tuple[int, int], level: int, size: tuple[int, int], *,
                    background: Colour = BLACK) -> np.ndarray:
        """See ``Slide.read_region``."""
        check_request(self, level, size)
        if self._pixels is None:
            self._pixels = self._decode()
        width, height = int(size[0]), int(size[1])
        x, y = int(location_l0[0]), int(location_l0[1])
        left, top = max(0, x), max(0, y)
        inside = self._pixels[top:max(top, y + height), left:max(left, x + width)]
        out = np.empty((height, width, 3), np.uint8)
        out[:] = background
        rows, columns = inside.shape[:2]
        if rows and columns:
            out[top - y:top - y + rows, left - x:left - x + columns] = (
                inside if inside.shape[2] == 3 else compose(inside, background))
        return out

    def close(self) -> None:
        """See ``Slide.close``."""
        self._pixels = None


def _too_large(path: Path, what: str) -> str:
    return (f"{path}: {what} is over the ceiling of {MAX_FLAT_PIXELS} px for a flat picture: "
            "convert it to a tiled pyramidal TIFF")
