"""Find the tissue on whole-slide images and list the patches on it.

    python create_patches_fp.py --source SLIDES --save_dir OUT --seg --patch --stitch
    python create_patches_fp.py --source SLIDES --save_dir OUT --seg --patch --preset tcga.csv

Patches of one physical size, whatever the scanner (0.5 um per pixel = 20x), on one lattice:

    python create_patches_fp.py --source SLIDES --save_dir OUT --seg --patch --patch_mpp 0.5 \\
        --lattice global --min_tissue 0.5 --segmenter stain --dry_run     (then without --dry_run)

In two steps, to correct single slides by hand (or outlines, in QuPath: --save_geojson, then
--contours_dir OUT/contours_geojson):

    python create_patches_fp.py --source SLIDES --save_dir OUT --seg
    (look at OUT/masks, edit OUT/process_list_autogen.csv, set process to 1 where wanted)
    python create_patches_fp.py --source SLIDES --save_dir OUT --seg --patch \\
        --process_list process_list_autogen.csv

Finer levels of the same patches, for HAG-MIL (pyramid levels, or um per pixel by --child_mpp), go
into folders beside save_dir, OUT_level_1_corresponding and OUT_level_0_corresponding:

    python create_patches_fp.py --source SLIDES --save_dir OUT_level_2 --seg --patch \\
        --patch_level 2 --child_levels 1 0

The tissue of each slide as one image of 2 um per pixel, its pieces packed together, for streaming
models (with or without --patch):

    python create_patches_fp.py --source SLIDES --save_dir OUT --seg --slide_images 2.0

Every file directly in SLIDES is a slide (hidden files and, without --recursive, sub-folders are
left out). Writes patches/<slide>.h5 (level-0 coordinates), masks/ and stitches/<slide>.jpg,
process_list_autogen.csv, report_patches.csv and .json. Running the same command again goes on
where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import ItemFailed, Refused, run_script
from utils.locks import sweep_locks
from utils.options import option, parse, resolved
from utils.parallel import describe_os_error, run_items
from utils.report import RunReport, Status, outcome_row
from utils.storage import writable_folder
from wsi_core.patch_options import (
    LEARNED,
    OutputOptions,
    RunOptions,
    ScaleOptions,
    TissueOptions,
    check_listing,
    check_outputs,
    check_scale,
    check_tissue,
    output_plan,
    pack_plan,
    patch_plan,
    tissue_search,
)

if TYPE_CHECKING:
    from models.tissue_networks import TissuePredictor
    from wsi_core.patch_plan import PatchJob, PatchPlan
    from wsi_core.process_list import ProcessList

SAVE_EVERY_S = 1.0  # the process list, while slides finish


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, OutputOptions, TissueOptions, ScaleOptions):
    """Flags of create_patches_fp.py; most stand in wsi_core/patch_options.py."""

    source: Path = option(help="folder with slides")
    save_dir: Path = option(help="folder for patches/, masks/, stitches/ and the process list")
    seg: bool = option(False, help="segment the tissue and draw masks")
    patch: bool = option(False, help="compute patch coordinates (with --seg)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(Options, prog="create_patches_fp.py", argv=argv,
                    description=__doc__ or "")
    check_options(options)
    from wsi_core.deriving import DerivePlan, derive_slides, prepare
    from wsi_core.hierarchy import wanted_children
    from wsi_core.pack import pack_listed
    from wsi_core.planning import load_defaults, load_listing, load_sizes, plan_jobs
    from wsi_core.slide_listing import MASKS

    finer = DerivePlan(save_dir=options.save_dir, redo=not options.auto_skip,
                       children=wanted_children(options.child_levels, options.child_mpp))
    packing = pack_plan(options, options.save_dir)
    defaults = load_defaults(options.preset)
    listing = load_listing(options.source, options.save_dir, options.process_list, defaults,
                           recursive=options.recursive, id_from_path=options.id_from_path,
                           endings=options.slide_ext)
    sizes = load_sizes(options.mpp_csv, listing)
    predictor = load_predictor(options)
    plan = patch_plan(
        options, options, save_dir=options.save_dir, segment=options.seg, patch=options.patch,
        layout=options.layout, outputs=output_plan(options, options.save_dir),
        search=tissue_search(options, mask_dir=options.save_dir / MASKS if predictor else None,
                             record=predictor.record() if predictor else None))
    report = RunReport("patches")
    jobs = plan_jobs(listing, options.source, defaults, sizes, plan, report)
    if options.dry_run:
        from wsi_core.dry_run import survey

        return survey(jobs, plan, report, workers=options.workers)
    prepare_folders(options, plan)
    prepare(finer, list(listing.rows), plan)
    if packing is not None:
        packing.prepare()
    print(f"{len(jobs)} slides to do, {len(report.rows)} settled before, of "
          f"{len(listing.rows)} listed")
    spread: dict[str, Any] = {"workers": options.workers, "scheduler": options.scheduler,
                              "deadline_s": options.slide_timeout}
    try:
        if predictor is not None:
            jobs = predict_tissue(jobs, predictor, plan, listing, report,
                                  batch_size=options.seg_batch_size)
        do_jobs(jobs, plan, listing, report, spread=spread)
        derive_slides(finer, listing, options.source, report, **spread)
        if packing is not None:
            pack_listed(packing, listing, options.source, report, coarse=plan, finer=finer,
                        spread=spread)
    finally:
        save_results(listing, report, options)
    report.print_summary(options.save_dir)
    return report.exit_code


# ---------------------------------------------------------------------------- validate

def check_options(options: Options) -> None:
    """Refuse combinations that would do nothing or cannot be done."""
    beside = (options.stitch, options.visualize, options.save_geojson, options.save_images,
              options.save_lmdb, options.slide_images)
    if not (options.seg or options.patch or any(beside)):
        raise Refused("nothing to do: give --seg (masks), --seg --patch (coordinates), --stitch")
    if options.patch and not options.seg:
        raise Refused("--patch needs the tissue outlines: give --seg --patch")
    if options.slide_images is not None and not options.seg:
        raise Refused("--slide_images packs the tissue that is found: give --seg as well")
    if (options.child_levels or options.child_mpp) and not options.patch:
        raise Refused("finer levels come from coarse coordinates: give --seg --patch as well")
    if not options.source.is_dir():
        raise Refused(f"--source {options.source} is no folder: give the folder with the slides")
    check_listing(options)
    check_scale(options)
    check_tissue(options)
    check_outputs(options, options)


def load_predictor(options: Options) -> TissuePredictor | None:
    """The learned segmenter with its weights, None when tissue is found otherwise."""
    if options.segmenter not in LEARNED or not options.seg:
        return None
    from models.tissue_networks import load_tissue_predictor

    return load_tissue_predictor(options.segmenter, options.seg_ckpt, device=options.device,
                                 threshold=options.seg_thresh, mpp_um=options.seg_mpp)


def prepare_folders(options: Options, plan: PatchPlan) -> None:
    """Make the folders of the results and prove that they can be written, here and on a cluster."""
    coords = plan.coords_path("x").parent
    for name in ("", "patches", "masks", "stitches", *plan.beside.folders):
        writable_folder(options.save_dir / name, what="--save_dir")
    writable_folder(coords, what="--save_dir")
    sweep_locks(coords)
    if options.scheduler is not None:
        from utils.dask_cluster import check_workers

        check_workers(options.scheduler, [options.source, options.save_dir])


# ---------------------------------------------------------------------------- do

def do_jobs(jobs: list[PatchJob], plan: PatchPlan, listing: ProcessList, report: RunReport, *,
            spread: dict[str, Any]) -> None:
    """Work through the jobs; each ends as a row, whatever happens to the others."""
    from tqdm import tqdm

    from wsi_core.patching import patch_slide
    from wsi_core.planning import settle
    from wsi_core.process_list import AUTOGEN, LIST_STATUS

    saved = 0.0
    outcomes = run_items(patch_slide, jobs, arguments={"plan": plan}, **spread)
    for outcome in tqdm(outcomes, total=len(jobs), disable=None, unit="slide"):
        row = outcome_row(name := outcome.item.listed_as, outcome)
        settle(listing, report, row)
        counts = ", ".join(f"{row.numbers[key]} {text}" for key, text in
                           (("n_contours", "contours"), ("n_patches", "patches"),
                            ("image_px", "px of image"))
                           if row.numbers.get(key, "") != "")
        note = f" ({row.reason})" if row.status is Status.DONE and row.reason else ""
        tqdm.write(f"{name}: {LIST_STATUS[row.status]}{counts and ', ' + counts}, "
                   f"{row.seconds:.2f} s{note}")
        if time.monotonic() - saved > SAVE_EVERY_S:
            listing.save(plan.save_dir / AUTOGEN)
            saved = time.monotonic()


def predict_tissue(jobs: list[PatchJob], predictor: TissuePredictor, plan: PatchPlan,
                   listing: ProcessList, report: RunReport, *, batch_size: int) -> list[PatchJob]:
    """Masks of the learned segmenter, all slides at once; the jobs that have theirs then."""
    from datasets.tissue_masks import TissueSlide, predict_masks
    from wsi_core.planning import settle

    assert plan.search.mask_dir is not None
    by_name = {job.slide_id: job for job in jobs}
    slides = [TissueSlide(slide_id=job.slide_id, slide_path=job.slide_path, mpp_um=job.mpp_um)
              for job in jobs]
    for row in predict_masks(slides, predictor, folder=plan.search.mask_dir,
                             batch_size=batch_size, redo=plan.redo):
        if row.status in (Status.FAILED, Status.BUSY):
            job = by_name.pop(row.item)
            settle(listing, report, replace(row, item=job.listed_as))
    return list(by_name.values())


def save_results(listing: ProcessList, report: RunReport, options: Options) -> None:
    """The process list and the report; a full disk is one line, not a trace."""
    from wsi_core.process_list import AUTOGEN

    try:
        listing.save(options.save_dir / AUTOGEN)
        report.write(options.save_dir, options=resolved(options))
    except OSError as error:
        raise ItemFailed(f"{options.save_dir}: {describe_os_error(error)}") from None


if __name__ == "__main__":
    sys.exit(run_script(main))
