"""The flags of create_patches_fp.py, and the plans that follow from them.

Light to import: ``--help`` needs nothing but this.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.errors import Refused
from utils.options import option

if TYPE_CHECKING:
    from wsi_core.find_tissue import TissueSearch
    from wsi_core.outputs import OutputPlan
    from wsi_core.pack import PackPlan
    from wsi_core.patch_plan import PatchPlan
    from wsi_core.slide_images import ImagePlan

CLASSICAL = ("otsu", "entropy", "stain")  # as wsi_core.segmenters registers them
LEARNED = ("sam2", "network")
DEFAULT_STEP_PX = 256


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """Size and place of patches."""

    patch_size: int = option(256, low=1, high=16384, help="side of a patch, px of patch_level or "
                             "of --patch_mpp")
    step_size: int | None = option(None, low=1, help="step of the grid in the same px (default: "
                                   "256; patch_size with --patch_mpp and --target_mag)")
    overlap: int | None = option(None, low=0, help="the same as a step of patch_size minus this")
    patch_level: int = option(0, low=0, high=127, help="pyramid level to read patches from")
    custom_downsample: Literal[1, 2] = option(
        1, help="2: read patches (and step) twice as large, to be shrunk to patch_size")
    patch_mpp: float | None = option(
        None, low=0.01, high=100, help="um per pixel of the patches: read from the best level of "
        "each slide and resized (up to 5 % enlarged), instead of --patch_level")
    target_mag: float | None = option(None, low=0.1, high=1000, help="the same as --patch_mpp of "
                                      "10 / this, e.g. 20 for 0.5 um")
    mpp_csv: Path | None = option(None, help="csv with columns slide_id (or wsi) and mpp: pixel "
                                  "sizes that replace those of the files")
    mpp_from_objective: bool = option(
        False, help="a slide that gives its objective but no pixel size counts as 10 / objective")
    require_mpp: bool = option(
        False, help="fail slides of unknown pixel size also where --patch_level is used")
    child_levels: tuple[int, ...] = option(
        (), low=0, high=127, help="finer levels, coarse to fine, that tile the coarse patches")
    child_mpp: tuple[float, ...] = option(
        (), low=0.01, high=100, help="the same by um per pixel, read at the best level and resized")
    lattice: Literal["contour", "global"] = option(
        "contour", help="contour: a grid for each piece of tissue, as CLAM; global: one for the "
        "slide, each cell once, none beyond its edge (unless --white_padding)")
    min_tissue: float = option(0.0, low=0, high=1, help="share of a patch that must be tissue")
    white_padding: bool = option(
        False, help="patches that reach beyond the slide are filled with white, not black")
    white_thresh: int | None = option(
        None, low=0, high=255, help="leave out patches of which 70 % have a saturation below this "
        "and a value of 200 or more (15 is usual); reads the pixels")
    black_thresh: int | None = option(
        None, low=0, high=255, help="leave out patches of which 70 % are darker than this (50)")


@dataclass(frozen=True, kw_only=True)
class TissueOptions:
    """How tissue is found."""

    preset: str | None = option(None, help="csv of parameters under presets/, e.g. tcga.csv")
    segmenter: Literal["clam", "otsu", "entropy", "stain", "mask", "sam2", "network"] = option(
        "clam", help="clam: by the preset; otsu, entropy, stain: classical, at 8 um; mask: the "
        "files of --mask_dir; sam2, network: learned, of --seg_ckpt")
    seg_mpp: float | None = option(None, low=0.1, high=100, help="um per pixel of the image that "
                                   "is segmented (default: 8, or the network's own; clam: the "
                                   "preset's seg_level)")
    seg_ckpt: Path | None = option(None, help="weights of sam2, or folder of a network made by "
                                   "scripts/train_tissue_network.py")
    seg_thresh: float | None = option(None, low=0, high=1, help="how sure the segmenter must be "
                                      "(default: 0.5, or the network's own; not for clam, mask)")
    seg_batch_size: int = option(4, low=1, help="overviews at a time through sam2 or network")
    device: str = option("auto", help="of sam2 and network: auto, cpu, cuda or cuda:N")
    mask_dir: Path | None = option(None, help="folder with <slide>.png (not black: tissue)")
    contours_dir: Path | None = option(
        None, help="folder with <slide>.geojson drawn in QuPath: tissue, regions of interest "
        "(class Region*) and what to leave out (Ignore*)")
    remove_pen: bool = option(False, help="take pen marks off the tissue")
    remove_artefacts: bool = option(False, help="take dark edges, bubbles and dust off the tissue")
    min_area_um2: float | None = option(
        None, low=0, help="smallest piece of tissue (default: 40000; clam: a_t of the preset)")
    min_hole_um2: float | None = option(
        None, low=0, help="smallest hole in it (default: 10000; clam: a_h of the preset)")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written beside the coordinates."""

    stitch: bool = option(False, help="draw a preview of the patches of each slide")
    visualize: tuple[Literal["mask", "contours", "grid"], ...] = option(
        (), help="overlays to draw into visualization/")
    save_geojson: bool = option(False, help="outlines for QuPath, into contours_geojson/")
    save_images: Literal["png", "jpeg"] | None = option(
        None, help="save the patches as pictures, into images/<slide>/")
    save_lmdb: str | None = option(None, help="pack the patches of all slides into "
                                   "save_dir/<this>.lmdb, for end-to-end training")
    image_format: Literal["jpeg", "jpeg420", "png", "webp"] = option(
        "jpeg", help="encoding of patches in the LMDB (jpeg420: colours at half the resolution; "
        "webp: lossless)")
    slide_images: float | None = option(
        None, low=0.05, high=100, help="write the tissue of each slide as one image of so many um "
        "per pixel, its pieces packed together, into slide_images/ (for streaming models)")
    keep_gaps: bool = option(False, help="leave the pieces in --slide_images where they are, with "
                             "the glass between them")
    lossless_images: bool = option(False, help="zlib instead of JPEG in --slide_images: exact, "
                                   "several times larger")
    jpeg_quality: int = option(90, low=1, high=100, help="of saved and packed JPEG patches and of "
                               "--slide_images")
    max_images: int | None = option(None, low=1, help="pictures a slide, evenly spread")
    layout: Literal["clam", "trident", "atlaspatch"] = option(
        "clam", help="of the h5 files; the others need --patch_mpp or --target_mag")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the work is spread out."""

    recursive: bool = option(False, help="look for slides in sub-folders as well")
    slide_ext: tuple[str, ...] = option((), help="only files with these endings, e.g. .svs .ndpi "
                                        "(not with --process_list)")
    id_from_path: bool = option(False, help="with --recursive: slides are called folder__name, "
                                "so equal names in several folders are no clash")
    auto_skip: bool = option(True, help="redo slides that have their coordinates already")
    process_list: str | None = option(None, help="csv inside save_dir: slides and parameters")
    workers: int = option(0, low=0, help="slides at a time, in processes of their own; 0: one "
                          "after the other in this process")
    scheduler: str | None = option(None, help="address of a Dask cluster (tcp://host:8786) that "
                                   "does the slides instead of --workers")
    slide_timeout: float | None = option(None, low=0.1, help="seconds after which a slide is given "
                                         "up as failed")
    dry_run: bool = option(False, help="print what would be done and what is wrong, write nothing")


def check_scale(options: ScaleOptions) -> None:
    """Refuse ways of saying the same thing twice, differently."""
    if options.patch_mpp is not None and options.target_mag is not None:
        raise Refused("--patch_mpp and --target_mag say the same in two ways: give one")
    if options.overlap is not None:
        if options.step_size is not None:
            raise Refused("--overlap and --step_size say the same in two ways: give one")
        if options.overlap >= options.patch_size:
            raise Refused(f"--overlap {options.overlap} leaves no step between patches of "
                          f"{options.patch_size} px: give less than --patch_size")
    if wanted_mpp(options) is not None:
        for flag, given in (("patch_level", options.patch_level != 0),
                            ("custom_downsample", options.custom_downsample != 1),
                            ("child_levels", bool(options.child_levels))):
            if given:
                raise Refused(f"--{flag} goes by pyramid levels, --patch_mpp and --target_mag by "
                              "um per pixel: give one"
                              + (" (finer levels: --child_mpp)" if flag == "child_levels" else ""))
    elif options.child_levels and options.child_levels[0] >= options.patch_level:
        raise Refused(f"--child_levels {options.child_levels[0]} is not finer than --patch_level "
                      f"{options.patch_level}: levels count from 0, the finest")


def check_listing(options: RunOptions) -> None:
    """Refuse ways of looking for slides where none are looked for."""
    if options.id_from_path and not options.recursive:
        raise Refused("--id_from_path has no effect without --recursive: give both or leave it out")
    if options.process_list is not None and (options.recursive or options.slide_ext):
        raise Refused("--recursive and --slide_ext look for slides, --process_list names them: "
                      "give one")


def wanted_mpp(options: ScaleOptions) -> float | None:
    """um per px of the patches, None when they are taken by pyramid level."""
    if options.target_mag is not None:
        return 10.0 / options.target_mag
    return options.patch_mpp


def step_px(options: ScaleOptions) -> int:
    """The grid's step in px of a patch."""
    if options.step_size is not None:
        return options.step_size
    if options.overlap is not None:
        return options.patch_size - options.overlap
    return DEFAULT_STEP_PX if wanted_mpp(options) is None else options.patch_size


def check_tissue(options: TissueOptions) -> None:
    """Refuse a segmenter without what it needs, and flags that it would not look at."""
    name = options.segmenter
    if name == "mask" and options.mask_dir is None:
        raise Refused("--segmenter mask needs --mask_dir, the folder with a <slide>.png each")
    if name in LEARNED and options.seg_ckpt is None:
        raise Refused(f"--segmenter {name} needs its weights: give --seg_ckpt")
    looks = options.remove_pen or options.remove_artefacts  # at the slide, beside the mask
    without = [(name != "mask", "mask_dir", options.mask_dir is not None),
               (name not in LEARNED, "seg_ckpt", options.seg_ckpt is not None),
               (name not in LEARNED, "seg_batch_size", options.seg_batch_size != 4),
               (name not in LEARNED, "device", options.device != "auto"),
               (name in ("clam", "mask"), "seg_thresh", options.seg_thresh is not None),
               (name == "mask" and not looks, "seg_mpp", options.seg_mpp is not None)]
    for useless, flag, given in without:
        if useless and given:
            raise Refused(f"--{flag} has no effect with --segmenter {name}: leave it out")
    for flag, folder in (("mask_dir", options.mask_dir), ("contours_dir", options.contours_dir)):
        if folder is not None and not folder.is_dir():
            raise Refused(f"--{flag} {folder} is no folder")


def check_outputs(options: OutputOptions, scale: ScaleOptions) -> None:
    """Refuse flags that nothing would look at, and a layout that cannot say what is asked for."""
    images = options.slide_images is not None
    jpeg = (options.save_images == "jpeg" or (images and not options.lossless_images)
            or (options.save_lmdb is not None and options.image_format.startswith("jpeg")))
    for flag, given, needed, there in (
            ("max_images", options.max_images is not None, "--save_images", options.save_images),
            ("image_format", options.image_format != "jpeg", "--save_lmdb", options.save_lmdb),
            ("keep_gaps", options.keep_gaps, "--slide_images", images),
            ("lossless_images", options.lossless_images, "--slide_images", images),
            ("jpeg_quality", options.jpeg_quality != 90, "--save_images jpeg, a --save_lmdb of "
             "jpeg or --slide_images of it", jpeg)):
        if given and not there:
            raise Refused(f"--{flag} has no effect without {needed}: give both or leave it out")
    if options.layout == "clam":
        return
    if wanted_mpp(scale) is None:
        raise Refused(f"--layout {options.layout} tells patches by magnification: give "
                      "--patch_mpp or --target_mag")
    if scale.child_mpp:
        raise Refused(f"--layout {options.layout} has no place for finer levels: leave "
                      "--child_mpp out")


def tissue_search(options: TissueOptions, *, mask_dir: Path | None = None,
                  record: dict[str, Any] | None = None) -> TissueSearch:
    """How tissue is looked for; mask_dir, record: where a learned segmenter put its masks, and
    what it is."""
    from wsi_core.find_tissue import TissueSearch

    return TissueSearch(
        segmenter="mask" if record else options.segmenter, seg_mpp=options.seg_mpp,
        threshold=0.5 if options.seg_thresh is None else options.seg_thresh,
        remove_pen=options.remove_pen,
        remove_artefacts=options.remove_artefacts, min_area_um2=options.min_area_um2,
        min_hole_um2=options.min_hole_um2, mask_dir=mask_dir or options.mask_dir,
        contours_dir=options.contours_dir, record=record or {})


def output_plan(options: OutputOptions, save_dir: Path) -> OutputPlan:
    """What is written beside the coordinates. ``Refused`` when tifffile is not installed and
    images of slides are to be written."""
    from wsi_core.outputs import OutputPlan

    return OutputPlan(save_dir=save_dir, stitch=options.stitch, overlays=options.visualize,
                      geojson=options.save_geojson, images=options.save_images,
                      jpeg_quality=options.jpeg_quality, max_images=options.max_images,
                      slide_image=image_plan(options, save_dir))


def image_plan(options: OutputOptions, save_dir: Path) -> ImagePlan | None:
    """The images of whole slides, None without."""
    if options.slide_images is None:
        return None
    from wsi_core.pyramid_writer import import_tifffile
    from wsi_core.slide_images import FOLDER, ImagePlan

    import_tifffile()
    return ImagePlan(folder=save_dir / FOLDER, image_mpp=options.slide_images,
                     keep_gaps=options.keep_gaps,
                     quality=None if options.lossless_images else options.jpeg_quality)


def pack_plan(options: OutputOptions, save_dir: Path) -> PackPlan | None:
    """The LMDB that patches go into, None without one. ``Refused``: its name is no plain one, or
    lmdb is not installed."""
    if options.save_lmdb is None:
        return None
    from wsi_core.pack import PackPlan
    from wsi_core.patch_lmdb import import_lmdb, lmdb_path

    import_lmdb()
    return PackPlan(database=lmdb_path(save_dir, options.save_lmdb),
                    encoding=options.image_format, quality=options.jpeg_quality)


def patch_plan(scale: ScaleOptions, run: RunOptions, *, save_dir: Path, segment: bool, patch: bool,
               search: TissueSearch, outputs: OutputPlan,
               layout: Literal["clam", "trident", "atlaspatch"]) -> PatchPlan:
    """What all slides of the run share."""
    from wsi_core.patch_plan import PatchPlan
    from wsi_core.slide import BLACK, WHITE

    mpp = wanted_mpp(scale)
    return PatchPlan(
        save_dir=save_dir, patch_size=scale.patch_size, step_size=step_px(scale),
        patch_level=scale.patch_level, custom_downsample=scale.custom_downsample,
        patch_mpp=mpp, divide_by=max(1, round((mpp or 0) / min(scale.child_mpp, default=inf))),
        lattice=scale.lattice, min_tissue=scale.min_tissue,
        white_thresh=scale.white_thresh, black_thresh=scale.black_thresh,
        background=WHITE if scale.white_padding else BLACK, require_mpp=scale.require_mpp,
        mpp_from_objective=scale.mpp_from_objective, segment=segment, make_patches=patch,
        search=search, outputs=outputs, layout=layout, redo=not run.auto_skip,
        single_thread=run.workers > 1 or run.scheduler is not None)
