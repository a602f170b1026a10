"""What is known of a slide's image: where its pixels come from, and what it was made with.

``slide_images/<slide>.json``. It is written after the image itself: it is the commit mark.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils import __version__
from utils.errors import BrokenFile
from utils.storage import read_json, write_json

SCHEMA = 1
Size = tuple[int, int]


class Box(NamedTuple):
    """A piece of the slide on the image: px of the image, then level-0 px of the slide."""

    x: int
    y: int
    width: int
    height: int
    x_l0: float
    y_l0: float
    width_l0: float
    height_l0: float


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """The image of one slide.

    slide_id: name of its files; slide: ``fingerprint`` of the slide's file
    slide_size: (w, h) of level 0; slide_mpp_um: (x, y) um per px of level 0
    mpp_um: of the image as it really is; whole pixels make it differ a little from what was asked
    size_px: (w, h) of the image; frame_px: what the whole slide would have at that scale
    cell_px: side of the squares, in px of the image, of which the tissue map tells the share
    boxes: the pieces; they are apart on the image and on the slide, all else is white
    image_bytes: size of the TIFF's file; 0 where the image is read from the slide itself
    parameters: everything that determined the image
    """

    slide_id: str
    slide: dict[str, Any]
    slide_size: Size
    slide_mpp_um: tuple[float, float]
    mpp_um: float
    size_px: Size
    frame_px: Size
    cell_px: int
    boxes: tuple[Box, ...]
    parameters: dict[str, Any]
    image_bytes: int = 0
    schema: int = SCHEMA
    version: str = __version__

    def to_level0(self, points: np.ndarray) -> np.ndarray:
        """(n, 2) x, y in px of the image -> the same in level-0 px of the slide, float64.

        A point on no piece of the slide becomes NaN; edges belong to a piece.
        """
        points = np.asarray(points, np.float64).reshape(-1, 2)
        found = np.full_like(points, np.nan)
        for box in self.boxes:
            corner, size = np.array(box[:2]), np.array(box[2:4])
            inside = ((points >= corner) & (points <= corner + size)).all(axis=1)
            found[inside] = box[4:6] + (points[inside] - corner) * (np.array(box[6:]) / size)
        return found


def write_record(path: Path, record: ImageRecord) -> None:
    """Write the json, whole or not at all."""
    write_json(path, asdict(record))


def read_record(path: Path) -> ImageRecord:
    """A record of ours; ``BrokenFile`` when it is missing, damaged, of another schema, or cannot
    be true."""
    found = read_json(path)
    try:
        if found["schema"] != SCHEMA:
            raise BrokenFile(f"{path} has the schema {found['schema']}, expected {SCHEMA}: it was "
                             "made by another version; make the image again with --no_auto_skip")
        values = {item.name: found[item.name] for item in fields(ImageRecord)}
        for name in ("slide_size", "size_px", "frame_px"):
            values[name] = (int(values[name][0]), int(values[name][1]))
        x_mpp, y_mpp = values["slide_mpp_um"]
        boxes = tuple(Box(*map(int, box[:4]), *map(float, box[4:])) for box in values["boxes"])
        record = ImageRecord(**{
            **values, "slide_id": str(values["slide_id"]), "boxes": boxes,
            "slide_mpp_um": (float(x_mpp), float(y_mpp)), "mpp_um": float(values["mpp_um"]),
            "cell_px": int(values["cell_px"]), "parameters": dict(values["parameters"]),
            "slide": dict(values["slide"]), "image_bytes": int(values["image_bytes"])})
        problem = _problem(record)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise BrokenFile(f"{path} is no record of a slide image ({error!r})") from None
    if problem:
        raise BrokenFile(f"{path} has values that make no sense ({problem})")
    return record


def _problem(record: ImageRecord) -> str:
    """What cannot be true of a record, "" when all can."""
    sizes = (*record.size_px, *record.slide_size, *record.frame_px, record.cell_px)
    if min(sizes) < 1 or not all(0 < um < inf for um in (record.mpp_um, *record.slide_mpp_um)):
        return "a size or scale that cannot be"
    if not record.boxes:
        return "no piece of the slide"
    width, height = record.size_px
    for box in record.boxes:
        if (min(box.x, box.y) < 0 or min(box.width, box.height) < 1
                or box.x + box.width > width or box.y + box.height > height):
            return f"a piece at {tuple(box[:4])} of an image of {width} x {height} px"
        if not (all(map(isfinite, box)) and min(box.width_l0, box.height_l0) > 0):
            return f"a piece at {tuple(box[4:])} of the slide"
    return ""
