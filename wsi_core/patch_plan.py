"""What a patching run wants of its slides, and what of that is there already.

Nothing here opens a slide.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from utils.errors import BrokenFile
from utils.storage import canonical, differences
from wsi_core.coords import read_coords
from wsi_core.find_tissue import TissueSearch, tissue_record
from wsi_core.layouts import Layout, coords_path
from wsi_core.outputs import OutputPlan
from wsi_core.presets import PatchingParameters
from wsi_core.scale import PatchScale
from wsi_core.slide import BLACK, Colour, fingerprint


@dataclass(frozen=True, kw_only=True)
class PatchPlan:
    """What all slides of a run share.

    patch_size, step_size: px of ``patch_level`` after the custom downsample, or of ``patch_mpp``
    custom_downsample: read this many times larger patches and shrink them
    patch_mpp: um per px of a patch; None = patches are taken from ``patch_level``
    divide_by: with patch_mpp, its level-0 side is a multiple of this, for finer levels
    lattice: a grid for each piece of tissue (CLAM), or one for the slide
    min_tissue: share of a patch that must be tissue; 0 = as the contour rule says
    white_thresh, black_thresh: leave out patches that are glass or black, see pixel_filters
    background: RGB of what lies outside the slide
    require_mpp: fail slides whose pixel size is unknown; mpp_from_objective: take 10 / objective
        power for it then
    segment, make_patches: write ``masks/``, ``patches/``; patches need ``segment``
    search: how tissue is found; outputs: what is made beside; layout: of the h5
    redo: write again what is there
    single_thread: keep OpenCV to one thread, for several workers
    """

    save_dir: Path
    patch_size: int = 256
    step_size: int = 256
    patch_level: int = 0
    custom_downsample: int = 1
    patch_mpp: float | None = None
    divide_by: int = 1
    lattice: Literal["contour", "global"] = "contour"
    min_tissue: float = 0.0
    white_thresh: int | None = None
    black_thresh: int | None = None
    background: Colour = BLACK
    require_mpp: bool = False
    mpp_from_objective: bool = False
    segment: bool = True
    make_patches: bool = True
    search: TissueSearch = TissueSearch()
    outputs: OutputPlan | None = None
    layout: Layout = "clam"
    redo: bool = False
    single_thread: bool = False

    @property
    def scale(self) -> PatchScale:
        """How patches are wanted."""
        return PatchScale(patch_px=self.patch_size, step_px=self.step_size,
                          patch_level=self.patch_level, mpp_um=self.patch_mpp,
                          divide_by=self.divide_by, custom_downsample=self.custom_downsample)

    @property
    def beside(self) -> OutputPlan:
        """The outputs beside the coordinates, possibly none."""
        return self.outputs or OutputPlan(save_dir=self.save_dir)

    def coords_path(self, slide_id: str) -> Path:
        """Where a slide's coordinates go."""
        return coords_path(self.save_dir, slide_id, self.layout, mpp_um=self.patch_mpp,
                           patch_px=self.patch_size, patch_level=self.patch_level,
                           custom_downsample=self.custom_downsample,
                           overlap_px=max(0, self.patch_size - self.step_size))


@dataclass(frozen=True, kw_only=True)
class PatchJob:
    """One slide of a run. ``mpp_um`` is the user's word on the pixel size of level 0.

    name: the slide as the process list calls it, "" = its file name
    """

    slide_path: Path
    parameters: PatchingParameters
    mpp_um: float | None = None
    name: str = ""

    @property
    def listed_as(self) -> str:
        """The slide's name in the process list and the report."""
        return self.name or self.slide_path.name

    @property
    def slide_id(self) -> str:
        """That name without its last extension; names the slide's files."""
        return Path(self.listed_as).stem


class Left(Enum):
    """What is left to do on a slide."""

    EVERYTHING = "everything"
    EXTRAS = "pictures and exports"
    NOTHING = "nothing"
    CONFLICT = "made with other parameters"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a slide stands: what is left, why, and what its h5 tells for the process list.

    what: that is there, made with other parameters
    """

    left: Left
    why: str = ""
    what: str = "coordinates"
    numbers: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------- what is there

def wanted_parameters(
    job: PatchJob, plan: PatchPlan, *, seg_level: int, seg_level_auto: int
) -> dict[str, Any]:
    """Everything that determines the coordinates of a slide, for the record in its h5.

    ``seg_level`` is the level used, ``seg_level_auto`` the one that -1 stands for on this slide.
    What goes beyond CLAM's settings is there only when it is used. Raises SlideError when the
    slide is not there.
    """
    plain = PatchPlan(save_dir=plan.save_dir)
    beyond = ("patch_mpp", "divide_by", "lattice", "min_tissue", "white_thresh", "black_thresh",
              "mpp_from_objective", "layout")
    return {
        "stage": "patches", **fingerprint(job.slide_path),
        "patch_size": plan.patch_size, "step_size": plan.step_size,
        "patch_level": plan.patch_level, "custom_downsample": plan.custom_downsample,
        "background": plan.background, "mpp_override": job.mpp_um,
        "use_padding": job.parameters.use_padding, "contour_fn": job.parameters.contour_fn,
        **{name: getattr(plan, name) for name in beyond
           if getattr(plan, name) != getattr(plain, name)},
        **tissue_record(job.slide_id, job.parameters, plan.search, seg_level=seg_level,
                        seg_level_auto=seg_level_auto),
    }


def find_standing(job: PatchJob, plan: PatchPlan) -> Standing:
    """What is left to do on a slide. It is not opened: its h5 says what "automatic" was."""
    standing, images = _coords_standing(job, plan), plan.beside.slide_image
    if images is None or plan.redo or standing.left is Left.CONFLICT:
        return standing
    found = images.found(job.slide_id)
    everything = standing.left is Left.EVERYTHING
    if found is None:
        blank = plan.make_patches and standing.numbers.get("n_contours") == 0
        return standing if everything or blank else replace(standing, left=Left.EXTRAS)
    wanted = wanted_image(job, plan, int(found.parameters.get("seg_level_auto", -1)))
    if canonical(found.parameters) != canonical(wanted):
        return Standing(left=Left.CONFLICT, what="an image",
                        why=differences(found.parameters, wanted))
    mask = plan.save_dir / "masks" / f"{job.slide_id}.jpg"
    if (everything and not plan.make_patches and not standing.why
            and any(mask.with_suffix(end).exists() for end in (".jpg", ".png"))
            and not plan.beside.outlines(job.slide_id, redo=False, drawn=None)):
        return Standing(left=Left.NOTHING)
    return standing


def wanted_image(job: PatchJob, plan: PatchPlan, seg_level_auto: int) -> dict[str, Any]:
    """Everything that determines the image of a slide; see ``wanted_parameters``."""
    asked = job.parameters.seg_level
    assert plan.beside.slide_image is not None
    return plan.beside.slide_image.parameters(
        job.slide_path, mpp_override=job.mpp_um, mpp_from_objective=plan.mpp_from_objective,
        tissue=tissue_record(job.slide_id, job.parameters, plan.search,
                             seg_level=asked if asked >= 0 else seg_level_auto,
                             seg_level_auto=seg_level_auto))


def _coords_standing(job: PatchJob, plan: PatchPlan) -> Standing:
    path = plan.coords_path(job.slide_id)
    if plan.redo or not path.exists():
        return Standing(left=Left.EVERYTHING if plan.segment else Left.EXTRAS)
    try:
        found = read_coords(path)
    except BrokenFile as error:
        left = Left.EVERYTHING if plan.segment else Left.EXTRAS
        return Standing(left=left, why=str(error))
    if plan.make_patches and found.parameters:  # a CLAM file has none and counts as done
        automatic = int(found.parameters.get("seg_level_auto", -1))
        asked = job.parameters.seg_level
        wanted = wanted_parameters(job, plan, seg_level=asked if asked >= 0 else automatic,
                                   seg_level_auto=automatic)
        if canonical(found.parameters) != canonical(wanted):
            return Standing(left=Left.CONFLICT, why=differences(found.parameters, wanted))
    numbers: dict[str, Any] = {"n_patches": len(found)}
    if found.tissue is not None:
        numbers["n_contours"] = len(found.tissue.contours)
    left = Left.EXTRAS if plan.beside.missing(job.slide_id, found) else Left.NOTHING
    return Standing(left=left, numbers=numbers)
