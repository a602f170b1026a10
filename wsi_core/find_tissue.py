"""Where the tissue of a slide is, by the segmenter of the user's choice, masks or drawn outlines.

CLAM's own way looks at a pyramid level, as presets and process lists say. Every other segmenter
looks at an overview of a fixed scale (8 um per px), so that slides of all scanners are treated
alike, and its area filter counts square micrometres.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import ItemFailed
from utils.storage import file_sha256
from wsi_core.presets import SEGMENTATION_NAMES, PatchingParameters
from wsi_core.slide import WHITE, Slide, best_level, read_level, read_overview
from wsi_core.tissue import UNIT_AREA_PX_L0, Tissue, outline_tissue, tissue_mask

OVERVIEW_DOWNSAMPLE = 64.0  # automatic levels: the coarsest at most this far below level 0
OVERVIEW_MPP = 8.0  # of the image that segmenters other than CLAM's look at
OVERVIEW_PIXELS = 50_000_000  # at most
UNKNOWN_DOWNSAMPLE = 32.0  # of that image when the pixel size is unknown: 8 um at 40x
MIN_AREA_UM2, MIN_HOLE_UM2 = 40_000.0, 10_000.0  # squares of 0.2 and 0.1 mm
CLAM, MASK = "clam", "mask"
LEARNED = ("sam2", "network")  # these write masks, all slides at once, before patching begins

Pair = tuple[float, float]
Image = tuple[np.ndarray, Pair]


@dataclass(frozen=True, kw_only=True)
class TissueSearch:
    """How tissue is looked for on all slides of a run.

    segmenter: ``clam``, a name of ``wsi_core.segmenters.SEGMENTERS``, or ``mask``; the learned
        ones are a ``mask`` whose ``mask_dir`` they have filled, and ``record`` says how
    seg_mpp: um per px of the image that is segmented; None = the preset's level, or 8
    threshold: how sure the segmenter must be, 0..1 (not for CLAM's and masks)
    remove_pen, remove_artefacts: take ink, and what is dark without stain, off the tissue
    min_area_um2, min_hole_um2: smallest piece and hole; None = a_t and a_h with CLAM's segmenter
        (or an unknown pixel size), else 0.04 and 0.01 mm2
    mask_dir: masks, one a slide; contours_dir: QuPath's GeoJSON, for the slides that have one
    """

    segmenter: str = CLAM
    seg_mpp: float | None = None
    threshold: float = 0.5
    remove_pen: bool = False
    remove_artefacts: bool = False
    min_area_um2: float | None = None
    min_hole_um2: float | None = None
    mask_dir: Path | None = None
    contours_dir: Path | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def by_level(self) -> bool:
        """Whether the segmented image is a pyramid level, as in CLAM."""
        return self.segmenter == CLAM and self.seg_mpp is None

    def parameters(self, slide_id: str) -> dict[str, Any]:
        """What of this decides the coordinates of a slide; {} for CLAM's plain segmentation.

        The files given for the slide are known by their sha256.
        """
        plain = TissueSearch()
        names = ("segmenter", "seg_mpp", "threshold", "remove_pen", "remove_artefacts",
                 "min_area_um2", "min_hole_um2")
        found = {name: getattr(self, name) for name in names
                 if getattr(self, name) != getattr(plain, name)}
        if self.record:  # of a learned segmenter, whose masks are a step on the way
            found["segmenter"] = self.record
        elif self.mask_dir is not None and (mask := self.mask_path(slide_id)).exists():
            found["mask_sha256"] = file_sha256(mask)
        if (contours := self.contours_path(slide_id)) is not None:
            found["contours_sha256"] = file_sha256(contours)
        return found

    def mask_path(self, slide_id: str) -> Path:
        """The slide's mask in ``mask_dir``, by one of the names in use."""
        from wsi_core.mask_files import find_mask

        assert self.mask_dir is not None
        return find_mask(self.mask_dir, slide_id)

    def contours_path(self, slide_id: str) -> Path | None:
        """The slide's drawn outlines, None when there are none."""
        path = self.contours_dir and self.contours_dir / f"{slide_id}.geojson"
        return path if path and path.exists() else None


class Overviews:
    """Small images of a slide, each read once."""

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self._levels: dict[int, Image] = {}
        self._scaled: dict[float, Image] = {}

    def level(self, level: int) -> Image:
        """A whole level (h, w, 3) and its (x, y) downsample."""
        if level not in self._levels:
            self._levels[level] = read_level(self.slide, level)
        return self._levels[level]

    def scaled(self, mpp_um: float, slide_mpp: Pair | None) -> Image:
        """The whole slide at so many um per px; 32 times reduced when its scale is unknown.

        What was not scanned is white, like glass.
        """
        downsample = UNKNOWN_DOWNSAMPLE if slide_mpp is None else mpp_um / (sum(slide_mpp) / 2)
        downsample = max(1.0, downsample)
        if downsample not in self._scaled:
            self._scaled[downsample] = read_overview(
                self.slide, downsample, max_pixels=OVERVIEW_PIXELS, background=WHITE)
        return self._scaled[downsample]

    def picture(self) -> Image:
        """The level that pictures of the slide are drawn on."""
        return self.level(automatic_level(self.slide, -1))


def automatic_level(slide: Slide, level: int) -> int:
    """``level``, or for a negative one the coarsest level at most 64 times below level 0."""
    return level if level >= 0 else best_level(slide, OVERVIEW_DOWNSAMPLE)


def tissue_record(slide_id: str, parameters: PatchingParameters, search: TissueSearch, *,
                  seg_level: int, seg_level_auto: int) -> dict[str, Any]:
    """Everything that determines the tissue of a slide, for the records of what is made of it.

    ``seg_level`` is the level used, ``seg_level_auto`` the one that -1 stands for on this slide.
    """
    return {"seg_level": seg_level, "seg_level_auto": seg_level_auto,
            **{name: getattr(parameters, name) for name in SEGMENTATION_NAMES},
            **search.parameters(slide_id)}


def find_tissue(overviews: Overviews, slide_id: str, parameters: PatchingParameters,
                search: TissueSearch, *, slide_mpp: Pair | None) -> Tissue:
    """Outlines of the tissue in level-0 px, filtered by area, after the user's corrections.

    slide_mpp: (x, y) um per level-0 px, None when unknown. Raises SlideError, BrokenFile (mask
    or GeoJSON), ItemFailed.
    """
    slide = overviews.slide
    drawn = search.contours_path(slide_id)
    if drawn is not None:
        from wsi_core.geojson import read_annotations, restrict

        annotations = read_annotations(drawn, slide_size=slide.level_dimensions[0])
        tissue = annotations.tissue  # drawn by hand: not filtered again
        if tissue is None:
            tissue = _segment(overviews, slide_id, parameters, search, slide_mpp)
        return restrict(tissue, annotations.regions, annotations.ignored,
                        slide_size=slide.level_dimensions[0],
                        downsample=UNKNOWN_DOWNSAMPLE if slide_mpp is None else
                        max(1.0, OVERVIEW_MPP / (sum(slide_mpp) / 2)))
    return _segment(overviews, slide_id, parameters, search, slide_mpp)


def _segment(overviews: Overviews, slide_id: str, parameters: PatchingParameters,
             search: TissueSearch, slide_mpp: Pair | None) -> Tissue:
    mask, downsample = _mask(overviews, slide_id, parameters, search, slide_mpp)
    return outline_tissue(mask, downsample, _with_areas(parameters, search, slide_mpp))


def _mask(overviews: Overviews, slide_id: str, parameters: PatchingParameters,
          search: TissueSearch, slide_mpp: Pair | None) -> tuple[np.ndarray, Pair]:
    """(h, w) uint8, not 0 where there is tissue, and its (x, y) downsample."""
    if search.segmenter == MASK and not (search.remove_pen or search.remove_artefacts):
        return _external(overviews.slide, slide_id, search)
    rgb, downsample = (
        overviews.level(automatic_level(overviews.slide, parameters.seg_level))
        if search.by_level else overviews.scaled(search.seg_mpp or OVERVIEW_MPP, slide_mpp))
    mpp_um = None if slide_mpp is None else sum(slide_mpp) * sum(downsample) / 4
    if search.segmenter == CLAM:
        mask = tissue_mask(rgb, parameters) > 0
    elif search.segmenter == MASK:
        from wsi_core.mask_files import resample_mask

        mask = resample_mask(_external(overviews.slide, slide_id, search)[0] > 0,
                             (rgb.shape[1], rgb.shape[0]))
    else:
        from wsi_core.segmenters import SEGMENTERS

        mask = SEGMENTERS.get(search.segmenter)(rgb, mpp_um=mpp_um) >= search.threshold
    if search.remove_pen:
        from wsi_core.artefacts import reject_pen

        mask &= ~reject_pen(rgb, mpp_um=mpp_um)
    if search.remove_artefacts:
        from wsi_core.artefacts import reject_artefacts

        mask &= ~reject_artefacts(rgb, mpp_um=mpp_um)
    return mask.astype(np.uint8) * 255, downsample


def _external(slide: Slide, slide_id: str, search: TissueSearch) -> tuple[np.ndarray, Pair]:
    """The slide's mask file, which covers the whole slide."""
    from wsi_core.mask_files import read_mask

    path = search.mask_path(slide_id)
    if not path.exists():
        raise ItemFailed(f"{slide.path}: has no mask {path}: make one, or choose another "
                         "--segmenter")
    width, height = slide.level_dimensions[0]
    mask = read_mask(path, slide_size=(width, height)).mask
    return mask.astype(np.uint8) * 255, (width / mask.shape[1], height / mask.shape[0])


def _with_areas(parameters: PatchingParameters, search: TissueSearch, slide_mpp: Pair | None
                ) -> PatchingParameters:
    """The parameters with the area filter in the units of CLAM's (512 x 512 level-0 px)."""
    area, hole = search.min_area_um2, search.min_hole_um2
    physical = search.segmenter != CLAM and slide_mpp is not None
    if physical:
        area = MIN_AREA_UM2 if area is None else area
        hole = MIN_HOLE_UM2 if hole is None else hole
        parameters = replace(parameters, max_n_holes=10**6)
    if area is None and hole is None:
        return parameters
    if slide_mpp is None:
        raise ItemFailed("an area in um2 needs the slide's pixel size, which is unknown: give it "
                         "in a column 'mpp' of the process list or in --mpp_csv")
    unit = UNIT_AREA_PX_L0 * slide_mpp[0] * slide_mpp[1]
    return replace(parameters, a_t=parameters.a_t if area is None else area / unit,
                   a_h=parameters.a_h if hole is None else hole / unit)
