"""Find the tissue on whole-slide images and list the patches on it.

    python create_patches_fp.py --source SLIDES --save_dir OUT --seg --patch --stitch
    python create_patches_fp.py --source SLIDES --save_dir OUT --seg --patch --preset tcga.csv

In two steps, to correct single slides by hand:

    python create_patches_fp.py --source SLIDES --save_dir OUT --seg
    (look at OUT/masks, edit OUT/process_list_autogen.csv, set process to 1 where wanted)
    python create_patches_fp.py --source SLIDES --save_dir OUT --seg --patch \\
        --process_list process_list_autogen.csv

Finer levels of the same patches, for HAG-MIL (pyramid levels, or um per pixel by --child_mpp), go
into folders beside save_dir, OUT_level_1_corresponding and OUT_level_0_corresponding:

    python create_patches_fp.py --source SLIDES --save_dir OUT_level_2 --seg --patch \\
        --patch_level 2 --child_levels 1 0

Every file directly in SLIDES is a slide (hidden files and sub-folders are left out). Writes
patches/<slide>.h5 (level-0 coordinates), masks/ and stitches/<slide>.jpg, process_list_autogen.csv,
report_patches.csv and .json. Running the same command again goes on where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from utils.errors import ItemFailed, Refused, run_script
from utils.locks import sweep_locks
from utils.options import option, parse, resolved
from utils.parallel import describe_os_error, run_items
from utils.report import Row, RunReport, Status, outcome_row
from utils.storage import inside, safe_id, writable_folder

if TYPE_CHECKING:
    from wsi_core.patching import PatchJob, PatchPlan
    from wsi_core.presets import PatchingParameters
    from wsi_core.process_list import ProcessList

SAVE_EVERY_S = 1.0  # the process list, while slides finish


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of create_patches_fp.py."""

    source: Path = option(help="folder with slides")
    save_dir: Path = option(help="folder for patches/, masks/, stitches/ and the process list")
    patch_size: int = option(256, low=1, high=16384, help="side of a patch, px of patch_level")
    step_size: int = option(256, low=1, help="step of the grid, px of patch_level")
    patch_level: int = option(0, low=0, high=127, help="pyramid level to read patches from")
    child_levels: tuple[int, ...] = option(
        (), low=0, high=127, help="finer levels, coarse to fine, that tile the coarse patches")
    child_mpp: tuple[float, ...] = option(
        (), low=0.01, high=100, help="the same by um per pixel, read at the best level and resized")
    custom_downsample: Literal[1, 2] = option(
        1, help="2: read patches (and step) twice as large, to be shrunk to patch_size")
    seg: bool = option(False, help="segment the tissue and draw masks")
    patch: bool = option(False, help="compute patch coordinates (with --seg)")
    stitch: bool = option(False, help="draw a preview of the patches of each slide")
    auto_skip: bool = option(True, help="redo slides that have their coordinates already")
    preset: str | None = option(None, help="csv of parameters under presets/, e.g. tcga.csv")
    process_list: str | None = option(None, help="csv inside save_dir: slides and parameters")
    white_padding: bool = option(
        False, help="patches that reach beyond the slide are filled with white, not black")
    require_mpp: bool = option(
        False, help="fail slides of unknown pixel size (a column mpp of the process list gives it)")
    workers: int = option(0, low=0, help="slides at a time, in processes of their own; 0: one "
                          "after the other in this process")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(Options, prog="create_patches_fp.py", argv=argv,
                    description=__doc__ or "")
    check_options(options)
    from wsi_core.deriving import DerivePlan, derive_slides, prepare
    from wsi_core.hierarchy import wanted_children
    from wsi_core.patching import PatchPlan
    from wsi_core.slide import BLACK, WHITE

    finer = DerivePlan(save_dir=options.save_dir, redo=not options.auto_skip,
                       children=wanted_children(options.child_levels, options.child_mpp))

    defaults = load_defaults(options.preset)
    listing = load_listing(options.source, options.save_dir, options.process_list, defaults)
    plan = PatchPlan(
        save_dir=options.save_dir, patch_size=options.patch_size, step_size=options.step_size,
        patch_level=options.patch_level, custom_downsample=options.custom_downsample,
        background=WHITE if options.white_padding else BLACK, require_mpp=options.require_mpp,
        segment=options.seg, make_patches=options.patch, make_stitch=options.stitch,
        redo=not options.auto_skip, single_thread=options.workers > 1)
    report = RunReport("patches")
    jobs = plan_jobs(listing, options.source, defaults, plan, report)
    for name in ("", "patches", "masks", "stitches"):
        writable_folder(options.save_dir / name, what="--save_dir")
    sweep_locks(options.save_dir / "patches")
    prepare(finer, list(listing.rows), plan)
    print(f"{len(jobs)} slides to do, {len(report.rows)} settled before, of "
          f"{len(listing.rows)} listed")
    try:
        do_jobs(jobs, plan, listing, report, workers=options.workers)
        derive_slides(finer, listing, options.source, report, workers=options.workers)
    finally:
        save_results(listing, report, options)
    report.print_summary(options.save_dir)
    return report.exit_code


# ---------------------------------------------------------------------------- validate

def check_options(options: Options) -> None:
    """Refuse combinations that would do nothing or cannot be done."""
    if not (options.seg or options.patch or options.stitch):
        raise Refused("nothing to do: give --seg (masks), --seg --patch (coordinates), --stitch")
    if options.patch and not options.seg:
        raise Refused("--patch needs the tissue outlines: give --seg --patch")
    if (options.child_levels or options.child_mpp) and not options.patch:
        raise Refused("finer levels come from coarse coordinates: give --seg --patch as well")
    if options.child_levels and options.child_levels[0] >= options.patch_level:
        raise Refused(f"--child_levels {options.child_levels[0]} is not finer than --patch_level "
                      f"{options.patch_level}: levels count from 0, the finest")
    if not options.source.is_dir():
        raise Refused(f"--source {options.source} is no folder: give the folder with the slides")


def load_defaults(preset: str | None) -> PatchingParameters:
    """The built-in parameters, or those of a preset."""
    from wsi_core.presets import DEFAULTS, find_preset, load_preset

    if preset is None:
        return DEFAULTS
    folders = [Path("presets"), Path(__file__).resolve().parent / "presets"]
    return load_preset(find_preset(preset, folders=folders))


def load_listing(source: Path, save_dir: Path, process_list: str | None,
                 defaults: PatchingParameters) -> ProcessList:
    """The slides of the run: those of the process list, or every file of the folder."""
    from wsi_core.patching import list_slides
    from wsi_core.process_list import check_stems, new_list, read_list

    if process_list is not None:
        listing = read_list(inside(save_dir, process_list), defaults)
    else:
        listing = new_list(list_slides(source), defaults)
    check_stems(listing, source)
    return listing


# ---------------------------------------------------------------------------- plan

def plan_jobs(listing: ProcessList, source: Path, defaults: PatchingParameters, plan: PatchPlan,
              report: RunReport) -> list[PatchJob]:
    """The slides with work left; the others are settled in ``listing`` and ``report``.

    ``Refused`` when coordinates of other parameters are there.
    """
    from wsi_core.patching import Left, find_standing
    from wsi_core.process_list import to_process

    jobs: list[PatchJob] = []
    conflicts: list[str] = []
    for name, row in listing.rows.items():
        try:
            if not to_process(row):
                continue
            safe_id(Path(name).stem)
            job = plan_job(row, source, defaults)
            standing = find_standing(job, plan)
        except (Refused, ItemFailed) as error:
            settle(listing, report, Row(item=name, status=Status.FAILED, reason=str(error)))
            continue
        if standing.left is Left.CONFLICT:
            conflicts.append(f"{name} made with other parameters: {standing.why}")
        elif standing.left is Left.NOTHING:
            settle(listing, report, Row(item=name, status=Status.SKIPPED, numbers=standing.numbers))
        else:
            jobs.append(job)
    if conflicts:
        more = f" ({len(conflicts) - 1} more slides differ as well)" if len(conflicts) > 1 else ""
        raise Refused(f"{plan.save_dir} holds coordinates of {conflicts[0]}{more}. "
                      "Give --no_auto_skip to redo them, or another --save_dir")
    return jobs


def plan_job(row: dict[str, str], source: Path, defaults: PatchingParameters) -> PatchJob:
    """A row as a job; ``Refused`` or ``SlideError`` when it cannot be one."""
    from wsi_core.patching import PatchJob, automatic_level
    from wsi_core.process_list import convert_legacy, is_legacy, row_mpp, row_parameters
    from wsi_core.slide import check_level, open_slide

    path = source / row["slide_id"]
    if is_legacy(row):
        with open_slide(path) as slide:
            level = automatic_level(slide, row_parameters(row, defaults).seg_level)
            check_level(slide, level)
            convert_legacy(row, defaults, slide.level_downsamples[level])
    return PatchJob(slide_path=path, parameters=row_parameters(row, defaults), mpp_um=row_mpp(row))


# ---------------------------------------------------------------------------- do

def do_jobs(jobs: list[PatchJob], plan: PatchPlan, listing: ProcessList, report: RunReport, *,
            workers: int) -> None:
    """Work through the jobs; each ends as a row, whatever happens to the others."""
    from tqdm import tqdm

    from wsi_core.patching import patch_slide
    from wsi_core.process_list import AUTOGEN, LIST_STATUS

    saved = 0.0
    outcomes = run_items(patch_slide, jobs, workers=workers, arguments={"plan": plan})
    for outcome in tqdm(outcomes, total=len(jobs), disable=None, unit="slide"):
        row = outcome_row(name := outcome.item.slide_path.name, outcome)
        settle(listing, report, row)
        counts = ", ".join(f"{row.numbers[key]} {text}" for key, text in
                           (("n_contours", "contours"), ("n_patches", "patches"))
                           if row.numbers.get(key, "") != "")
        tqdm.write(f"{name}: {LIST_STATUS[row.status]}{counts and ', ' + counts}, "
                   f"{row.seconds:.2f} s")
        if time.monotonic() - saved > SAVE_EVERY_S:
            listing.save(plan.save_dir / AUTOGEN)
            saved = time.monotonic()


def settle(listing: ProcessList, report: RunReport, row: Row) -> None:
    """Write a slide's end into the report and its row of the process list."""
    report.add(row)
    listing.settle(row.item, row)


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
