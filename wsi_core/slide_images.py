"""Images of whole slides for streaming models: ``slide_images/<slide>.tif`` and what belongs to it.

A tiled pyramidal TIFF of the packed tissue with its pixel size, ``<slide>_tissue.png`` (where the
tissue is, a cell a pixel) and ``<slide>.json`` (``ImageRecord``), which is written last: an image
is done when it opens, its files are of one making and its record has the parameters asked for.
Spec streaming.md 9 and 15.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import BrokenFile, ItemFailed, SlideError
from utils.faults import fault_point
from utils.storage import safe_id, write_image
from wsi_core.image_layout import Packing, image_frame, pack_tissue
from wsi_core.image_record import ImageRecord as ImageRecord
from wsi_core.image_record import read_record as read_record
from wsi_core.image_record import write_record
from wsi_core.packing import PackedSlide, SlidePicture, image_parameters, record_of
from wsi_core.pyramid_writer import image_levels, write_tiled_pyramid
from wsi_core.scaled_slide import sweep_cache_mb
from wsi_core.slide import WHITE, Slide, open_slide, stamp
from wsi_core.tissue import Tissue

FOLDER = "slide_images"
Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """The images that all slides of a run get.

    folder: ``slide_images/``; image_mpp: um per px; keep_gaps: no packing
    quality: of the JPEG tiles, 1..100; None = without loss
    """

    folder: Path
    image_mpp: float
    keep_gaps: bool = False
    quality: int | None = 90

    def parameters(self, slide_path: Path, *, mpp_override: float | None, mpp_from_objective: bool,
                   tissue: dict[str, Any]) -> dict[str, Any]:
        """Everything that determines a slide's image; tissue: ``tissue_record``."""
        return {**image_parameters(slide_path, image_mpp=self.image_mpp, keep_gaps=self.keep_gaps,
                                   mpp_override=mpp_override, tissue=tissue),
                "quality": self.quality,
                **({"mpp_from_objective": True} if mpp_from_objective else {})}

    def found(self, slide_id: str) -> ImageRecord | None:
        """The record of the finished image that is there, None when there is none that opens."""
        try:
            with open_image(self.folder, slide_id) as image:
                return image.record
        except (ItemFailed, OSError):
            return None

    def layout(self, slide: Slide, tissue: Tissue, slide_mpp: Pair) -> Packing | None:
        """Where the tissue goes, None when there is none. Raises ItemFailed: slide too coarse."""
        frame = image_frame(slide, self.image_mpp, slide_mpp)
        return pack_tissue(tissue, frame, keep_gaps=self.keep_gaps)

    def clear(self, slide_id: str) -> None:
        """Take a slide's image away, the record first."""
        for path in (record_path, image_path, map_path):
            path(self.folder, slide_id).unlink(missing_ok=True)

    def make(self, slide: Slide, slide_id: str, tissue: Tissue, *, slide_mpp: Pair,
             parameters: dict[str, Any]) -> ImageRecord | None:
        """Write the image of one slide anew; None, and no file, when it has no tissue.

        Raises ItemFailed (SlideError), OSError.
        """
        frame = image_frame(slide, self.image_mpp, slide_mpp)
        before = stamp(slide.path)
        self.clear(slide_id)
        packing = pack_tissue(tissue, frame, keep_gaps=self.keep_gaps)
        if packing is None:
            return None
        record = record_of(slide, slide_id, slide_mpp, frame, packing, parameters)
        target = image_path(self.folder, slide_id)
        packed = PackedSlide(slide, record, packing.tissue_map,
                             cache_mb=max(128, sweep_cache_mb(record.size_px[0])))
        write_tiled_pyramid(target, image_levels(record.size_px, packed.read, mpp_um=record.mpp_um),
                            quality=self.quality, description=f"MILwright slide image {slide_id}")
        fault_point(f"slide_images.map.{slide_id}")
        write_image(map_path(self.folder, slide_id), packing.tissue_map)
        if stamp(slide.path) != before:
            raise SlideError(f"{slide.path}: was replaced while it was read: run the same command "
                             "again")
        fault_point(f"slide_images.record.{slide_id}")
        record = replace(record, image_bytes=target.stat().st_size)
        write_record(record_path(self.folder, slide_id), record)
        return record


# ---------------------------------------------------------------------------- reading

class WrittenImage(SlidePicture):
    """The image of a slide as ``create_patches_fp.py --slide_images`` has left it in a folder.

    Raises BrokenFile: no record, or a TIFF or tissue map that is not the one it tells of.
    """

    def __init__(self, folder: Path, slide_id: str, *, cache_mb: int = 128) -> None:
        safe_id(slide_id)
        self.record = read_record(record_path(folder, slide_id))
        self.tissue_map = read_tissue_map(folder, self.record)
        if not image_there(folder, self.record):
            raise BrokenFile(f"{image_path(folder, slide_id)} is missing or not the image that its "
                             ".json tells of: run create_patches_fp.py --slide_images again")
        self._slide = open_slide(image_path(folder, slide_id), cache_mb=cache_mb)
        self._turn = threading.Lock()
        if self._slide.level_dimensions[0] != self.record.size_px:
            self.close()
            raise BrokenFile(f"{image_path(folder, slide_id)} has another size than its .json says")

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See ``SlidePicture``."""
        with self._turn:
            return self._slide.read_region((x, y), 0, (width, height), background=WHITE)

    def close(self) -> None:
        """See ``SlidePicture``."""
        self._slide.close()


def open_image(folder: Path, slide_id: str, *, cache_mb: int = 128) -> WrittenImage:
    """The written image of a slide in ``slide_images/``. ``Refused`` for a name that is none;
    BrokenFile, SlideError."""
    return WrittenImage(folder, slide_id, cache_mb=cache_mb)


# ---------------------------------------------------------------------------- files

def image_path(folder: Path, slide_id: str) -> Path:
    """The TIFF of a slide in ``slide_images/``."""
    return folder / f"{slide_id}.tif"


def map_path(folder: Path, slide_id: str) -> Path:
    """Its tissue map."""
    return folder / f"{slide_id}_tissue.png"


def record_path(folder: Path, slide_id: str) -> Path:
    """Its record, the commit mark."""
    return folder / f"{slide_id}.json"


def image_there(folder: Path, record: ImageRecord) -> bool:
    """Is the TIFF there that the record tells of, and its tissue map? By size; not opened."""
    path = image_path(folder, record.slide_id)
    return (path.is_file() and path.stat().st_size == record.image_bytes
            and map_path(folder, record.slide_id).is_file())


def read_tissue_map(folder: Path, record: ImageRecord) -> np.ndarray:
    """(h, w) uint8; ``BrokenFile`` when it is missing, damaged or of another size."""
    import cv2

    path = map_path(folder, record.slide_id)
    data = np.frombuffer(path.read_bytes(), np.uint8) if path.is_file() else np.empty(0, np.uint8)
    found = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if data.size else None
    width, height = (-(-side // record.cell_px) for side in record.size_px)
    if found is None or found.shape != (height, width):
        raise BrokenFile(f"{path} is missing, damaged or of another image ({width} x {height} "
                         "cells expected): run create_patches_fp.py --slide_images again")
    return np.asarray(found)
