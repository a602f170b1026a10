"""The image of a slide, packed from the slide itself as it is read.

``slide_images.py`` has the same as a file. Both kinds tell of themselves by an ``ImageRecord`` and
read alike, from any thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from utils.errors import ItemFailed
from wsi_core.find_tissue import (
    Overviews,
    TissueSearch,
    automatic_level,
    find_tissue,
    tissue_record,
)
from wsi_core.image_layout import Frame, Packing, image_frame, pack_tissue
from wsi_core.image_record import Box, ImageRecord
from wsi_core.presets import DEFAULTS, PatchingParameters
from wsi_core.scale import unknown_mpp
from wsi_core.scaled_slide import ScaledSlide
from wsi_core.slide import WHITE, Slide, fingerprint, open_slide

READ_CACHE_MB = 64  # of the slide's own decoded tiles, beside finished cells
GAP_UM = 16.0  # side of the smallest square that is black for want of scanning; no nucleus is


class SlidePicture(Protocol):
    """The image of one slide, open; a context manager. See ``ImageRecord`` for its facts.

    tissue_map: (h, w) uint8, share of tissue (255 = all) in cells of ``record.cell_px`` px
    """

    record: ImageRecord
    tissue_map: np.ndarray

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB from (x, y), px of the image; white where no piece of the
        slide lies and outside of the image. From any thread; calls take turns.

        The same pixel is always the same, whatever window it is read in. Raises SlideError.
        """
        ...

    def close(self) -> None:
        """Give the file back; no thread may read any more."""
        ...

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height)."""
        return self.record.size_px

    @property
    def mpp_um(self) -> float:
        """um per px."""
        return self.record.mpp_um

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Its pieces."""
        return self.record.boxes

    def to_level0(self, points: np.ndarray) -> np.ndarray:
        """See ``ImageRecord.to_level0``."""
        return self.record.to_level0(points)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class PackedSlide(SlidePicture):
    """The packed tissue of an open slide, read from its pyramid. Closes the slide with itself.

    What the scanner left black is white. cache_mb: of resized pixels that are kept
    """

    def __init__(self, slide: Slide, record: ImageRecord, tissue_map: np.ndarray, *,
                 cache_mb: float = 128) -> None:
        self.record, self.tissue_map, self._slide = record, tissue_map, slide
        self._scaled = ScaledSlide(slide, record.frame_px, cache_mb=cache_mb,
                                   gap_px_l0=2 * GAP_UM / sum(record.slide_mpp_um))
        x, y = (side / full for side, full in zip(record.frame_px, record.slide_size, strict=True))
        self._offsets = [(round(box.x_l0 * x) - box.x, round(box.y_l0 * y) - box.y)
                         for box in record.boxes]  # from px of the image to px of the whole slide

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See ``SlidePicture``."""
        out = np.full((height, width, 3), WHITE, np.uint8)
        for box, (to_x, to_y) in zip(self.record.boxes, self._offsets, strict=True):
            left, right = max(x, box.x), min(x + width, box.x + box.width)
            top, bottom = max(y, box.y), min(y + height, box.y + box.height)
            if left < right and top < bottom:
                out[top - y:bottom - y, left - x:right - x] = self._scaled.read(
                    left + to_x, top + to_y, right - left, bottom - top)
        return out

    def close(self) -> None:
        """See ``SlidePicture``."""
        self._slide.close()


def open_packed(slide_path: Path, *, image_mpp: float, mpp_um: float | None = None,
                parameters: PatchingParameters = DEFAULTS, search: TissueSearch | None = None,
                keep_gaps: bool = False, cache_mb: float = 128) -> PackedSlide:
    """The image of a slide at ``image_mpp`` um per px without any preparation.

    Its tissue is found and packed here and now, as the flags of create_patches_fp.py would:
    parameters, search (default: CLAM's way). mpp_um: the user's word on level 0. Raises SlideError;
    ItemFailed: unknown pixel size, too coarse, no tissue.
    """
    slide_path, search = Path(slide_path), search or TissueSearch()
    slide = open_slide(slide_path, cache_mb=READ_CACHE_MB)
    try:
        slide_mpp = slide.mpp_um if mpp_um is None else (mpp_um, mpp_um)
        if slide_mpp is None:
            raise ItemFailed(unknown_mpp(slide))
        frame = image_frame(slide, image_mpp, slide_mpp)
        slide_id = slide_path.stem
        packing = pack_tissue(
            find_tissue(Overviews(slide), slide_id, parameters, search, slide_mpp=slide_mpp),
            frame, keep_gaps=keep_gaps)
        if packing is None:
            raise ItemFailed(
                f"{slide_path}: has no tissue to make an image of: leave the slide out, or make "
                "its image with create_patches_fp.py --slide_images and another --segmenter")
        automatic = automatic_level(slide, -1)
        record = record_of(slide, slide_id, slide_mpp, frame, packing, image_parameters(
            slide_path, image_mpp=image_mpp, keep_gaps=keep_gaps, mpp_override=mpp_um,
            tissue=tissue_record(slide_id, parameters, search, seg_level_auto=automatic,
                                 seg_level=automatic_level(slide, parameters.seg_level))))
        return PackedSlide(slide, record, packing.tissue_map, cache_mb=cache_mb)
    except BaseException:
        slide.close()
        raise


# ---------------------------------------------------------------------------- records

def image_parameters(slide_path: Path, *, image_mpp: float, keep_gaps: bool,
                     mpp_override: float | None, tissue: dict[str, Any]) -> dict[str, Any]:
    """Everything that determines an image's pixels but for its file format.

    mpp_override: the user's word on level 0; tissue: ``tissue_record``
    """
    return {"stage": "slide_image", **fingerprint(slide_path), "image_mpp": image_mpp,
            "keep_gaps": keep_gaps, "mpp_override": mpp_override, **tissue}


def record_of(slide: Slide, slide_id: str, slide_mpp: tuple[float, float], frame: Frame,
              packing: Packing, parameters: dict[str, Any]) -> ImageRecord:
    """The record of an image that is laid out so."""
    return ImageRecord(
        slide_id=slide_id, slide=fingerprint(slide.path), slide_size=slide.level_dimensions[0],
        slide_mpp_um=slide_mpp, mpp_um=frame.mpp_um, size_px=packing.size_px,
        frame_px=frame.size_px, cell_px=packing.cell_px, boxes=packing.boxes,
        parameters=parameters)
