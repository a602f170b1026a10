"""Where images of slides are: a folder of prepared ones, or the slides themselves.

A source says what it has of a slide without reading pixels, and opens it for one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from utils.errors import BrokenFile, ItemFailed, SlideError
from utils.storage import safe_id
from wsi_core.find_tissue import MIN_AREA_UM2, MIN_HOLE_UM2, TissueSearch
from wsi_core.image_layout import image_frame
from wsi_core.image_record import ImageRecord, read_record
from wsi_core.packing import READ_CACHE_MB, PackedSlide, SlidePicture, open_packed
from wsi_core.slide import fingerprint, open_slide, slide_entries
from wsi_core.slide_images import (
    image_path,
    image_there,
    map_path,
    open_image,
    read_tissue_map,
    record_path,
)

_CACHE_MB = 96  # of pixels, of each open image
_OF_THE_SLIDE = ("slide_name", "slide_bytes", "slide_files", "stage", "seg_level", "seg_level_auto",
                 "mpp_override", "mask_sha256", "contours_sha256")


class Layout(NamedTuple):
    """What an image shows: its record, and (h, w) uint8 how much of each cell is tissue."""

    record: ImageRecord
    tissue: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What is known of an image before it is opened.

    mpp_um: um per px; size_px: (w, h), None where the tissue is not found yet
    parameters: what it was made with, the same for slides made alike
    """

    mpp_um: float
    size_px: tuple[int, int] | None
    parameters: dict[str, Any]


class ImageSource(Protocol):
    """Images of slides. Pickled without anything open."""

    @property
    def root(self) -> Path:
        """The folder."""
        ...

    @property
    def kind(self) -> str:
        """"slide images" or "slides"."""
        ...

    @property
    def remedy(self) -> str:
        """How those that are not there come to be."""
        ...

    def slides(self) -> list[str]:
        """Ids of the slides that are there."""
        ...

    def files(self, slide_id: str) -> list[Path]:
        """The files of a slide; the first one says whether it is there."""
        ...

    def facts(self, slide_id: str) -> ImageFacts:
        """``ItemFailed`` where what is there cannot be used."""
        ...

    def layout(self, slide_id: str) -> Layout:
        """Errors as ``facts``; ``ItemFailed`` for a slide without tissue too."""
        ...

    def open(self, slide_id: str, layout: Layout) -> SlidePicture:
        """For one thread; errors as ``layout``."""
        ...


@dataclass(frozen=True, kw_only=True)
class PreparedImages:
    """The folder ``slide_images`` of create_patches_fp.py --slide_images."""

    root: Path
    kind = "slide images"
    remedy = "run create_patches_fp.py --slide_images"

    def slides(self) -> list[str]:
        """See ``ImageSource``."""
        return sorted(path.stem for path in self.root.glob("*.json"))

    def files(self, slide_id: str) -> list[Path]:
        """See ``ImageSource``; the record, which is written last, comes first."""
        return [path(self.root, safe_id(slide_id)) for path in (record_path, image_path, map_path)]

    def facts(self, slide_id: str) -> ImageFacts:
        """See ``ImageSource``; ``BrokenFile`` where the files are not of one making."""
        record = self._record(slide_id)
        return ImageFacts(
            mpp_um=record.mpp_um, size_px=record.size_px, parameters={
                name: value for name, value in record.parameters.items()
                if name not in _OF_THE_SLIDE})

    def layout(self, slide_id: str) -> Layout:
        """See ``ImageSource``."""
        record = self._record(slide_id)
        return Layout(record, read_tissue_map(self.root, record))

    def open(self, slide_id: str, layout: Layout) -> SlidePicture:
        """See ``ImageSource``; ``BrokenFile`` when it was made anew since its layout was read."""
        picture = open_image(self.root, slide_id, cache_mb=_CACHE_MB)
        if picture.record != layout.record:
            picture.close()
            raise BrokenFile(f"{slide_id}: its image in {self.root} was made anew while it was "
                             "used: run the same command again")
        return picture

    def _record(self, slide_id: str) -> ImageRecord:
        path, image, tissue = self.files(slide_id)
        record = read_record(path)
        if record.slide_id != slide_id:
            raise BrokenFile(f"{path} is of the slide {record.slide_id!r}: files were renamed")
        if not image_there(self.root, record):
            raise BrokenFile(f"{slide_id}: {image.name} or {tissue.name} in {self.root} is missing "
                             f"or not what {path.name} tells of (a TIFF of {record.image_bytes} "
                             f"bytes): {self.remedy} again")
        return record


def open_direct(slide_path: Path, *, image_mpp: float, mpp_um: float | None = None) -> PackedSlide:
    """See ``open_packed``: the image that models see of a slide without any preparation.

    Tissue is found in CLAM's way with its default preset, but small pieces count by their real
    size: that preset leaves out what is below 100 x 512^2 px, and with it whole biopsies.
    """
    return open_packed(slide_path, image_mpp=image_mpp, mpp_um=mpp_um, search=TissueSearch(
        min_area_um2=MIN_AREA_UM2, min_hole_um2=MIN_HOLE_UM2))


@dataclass(frozen=True, kw_only=True)
class DirectSlides:
    """Slides, whose tissue is found and packed when they are first read. image_mpp: um per px."""

    root: Path
    slide_ext: str
    image_mpp: float
    kind = "slides"
    remedy = "copy it there"

    def slides(self) -> list[str]:
        """See ``ImageSource``."""
        return [path.name.removesuffix(self.slide_ext)
                for path in slide_entries(self.root, recursive=False)
                if path.name.endswith(self.slide_ext)]

    def files(self, slide_id: str) -> list[Path]:
        """See ``ImageSource``."""
        return [self.root / f"{safe_id(slide_id)}{self.slide_ext}"]

    def facts(self, slide_id: str) -> ImageFacts:
        """See ``ImageSource``; ``ItemFailed`` for an unknown pixel size or a slide too coarse."""
        with open_slide(self.files(slide_id)[0]) as slide:
            if slide.mpp_um is None:
                why = slide.mpp_problem or "the file gives none"
                raise ItemFailed(f"{slide.path}: pixel size unknown ({why}): make images with "
                                 "create_patches_fp.py --slide_images, which can be told it")
            frame = image_frame(slide, self.image_mpp, slide.mpp_um)
        return ImageFacts(mpp_um=frame.mpp_um, size_px=None,
                          parameters={"image_mpp": self.image_mpp})

    def layout(self, slide_id: str) -> Layout:
        """See ``ImageSource``; takes the time of finding tissue."""
        with open_direct(self.files(slide_id)[0], image_mpp=self.image_mpp) as packed:
            return Layout(packed.record, packed.tissue_map)

    def open(self, slide_id: str, layout: Layout) -> SlidePicture:
        """See ``ImageSource``; the tissue is not looked for again. ``SlideError`` when the slide
        was replaced since."""
        path = self.files(slide_id)[0]
        if fingerprint(path) != layout.record.slide:
            raise SlideError(f"{path}: was replaced while it was used: run the same command again")
        return PackedSlide(open_slide(path, cache_mb=READ_CACHE_MB), layout.record, layout.tissue,
                           cache_mb=_CACHE_MB)
