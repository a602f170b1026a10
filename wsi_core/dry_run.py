"""What a patching run would do, before a weekend is spent on it: every slide is opened, its scale
worked out, its tissue segmented and its patches counted; nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.errors import ItemFailed
from utils.parallel import run_items
from utils.report import Row, RunReport, Status, outcome_row
from utils.storage import free_bytes
from wsi_core.find_tissue import MASK, Overviews, find_tissue
from wsi_core.patch_plan import PatchJob, PatchPlan, find_standing
from wsi_core.patching import pixel_size, place_patches
from wsi_core.scale import plan_reading
from wsi_core.slide import Slide, open_slide

COLUMNS = ("size", "levels", "mpp", "read", "patches", "image", "left")  # image: where asked for
UNKNOWN = "?"
COORDS_BYTES = 16  # a row of coordinates; outlines and attributes come on top
COORDS_OVERHEAD_BYTES = 64 * 1024
FEATURE_DIM, FEATURE_BYTES = 1024, 2 * 4  # float32, in the h5 and the pt file
IMAGE_BYTES_A_PIXEL = {"png": 2.0, "jpeg": 0.25}  # of H&E patches; measured on the demo's slides
PYRAMID = 16 / 15  # all levels against the first


def survey_slide(job: PatchJob, *, plan: PatchPlan) -> Row:
    """One slide's line: geometry, what is read, and the number of patches.

    Pixel filters (--white_thresh) are not applied: they would read every patch. Raises
    ItemFailed, SlideError as the run itself would.
    """
    with open_slide(job.slide_path) as slide:
        width, height = slide.level_dimensions[0]
        numbers: dict[str, Any] = {
            "size": f"{width}x{height}", "levels": len(slide.level_dimensions),
            "mpp": UNKNOWN, "read": "-", "patches": "-",
            "left": find_standing(job, plan).left.value}
        try:
            note = _look(slide, job, plan, numbers)
        except ItemFailed as error:
            return Row(item=job.listed_as, status=Status.FAILED, reason=str(error),
                       numbers=numbers)
    empty = numbers["patches"] == 0
    return Row(item=job.listed_as, status=Status.EMPTY if empty else Status.DONE,
               reason=note or ("no patches" if empty else ""), numbers=numbers)


def _look(slide: Slide, job: PatchJob, plan: PatchPlan, numbers: dict[str, Any]) -> str:
    """Fill in ``numbers`` as far as the slide allows, and return what is to be noted."""
    slide_mpp, note = pixel_size(slide, job, plan)
    if slide_mpp is not None:
        numbers["mpp"] = f"{sum(slide_mpp) / 2:.4g}"
    reading = plan_reading(slide, plan.scale, slide_mpp)
    numbers["read"] = f"{reading.read_px} px of level {reading.level}" + (
        "" if reading.read_px == reading.output_px else f" -> {reading.output_px}")
    numbers["patches"] = UNKNOWN
    if not _waits_for_masks(job, plan):
        tissue = find_tissue(Overviews(slide), job.slide_id, job.parameters, plan.search,
                             slide_mpp=slide_mpp)
        patches = place_patches(slide, tissue, reading, slide_mpp, job, plan, by_pixels=False)
        numbers["patches"] = len(patches)
        if plan.beside.slide_image is not None and slide_mpp is not None:
            packing = plan.beside.slide_image.layout(slide, tissue, slide_mpp)
            numbers["image"] = "{}x{}".format(*packing.size_px) if packing else "-"
            numbers["image_px"] = packing.size_px[0] * packing.size_px[1] if packing else 0
    return note


def _waits_for_masks(job: PatchJob, plan: PatchPlan) -> bool:
    """Whether a learned segmenter would have to look at the slide first."""
    search = plan.search
    return (search.segmenter == MASK and bool(search.record)
            and not search.mask_path(job.slide_id).exists())


def survey(jobs: Sequence[PatchJob], plan: PatchPlan, report: RunReport, *, workers: int) -> int:
    """Print the line of every slide, what is wrong, and the disk space; returns the exit code.

    report: of the planning, which has settled slides that are done before or cannot be begun
    """
    from tqdm import tqdm

    settled = len(report.rows)
    outcomes = run_items(survey_slide, jobs, workers=workers, arguments={"plan": plan})
    for outcome in tqdm(outcomes, total=len(jobs), disable=None, unit="slide"):
        report.add(outcome_row(outcome.item.listed_as, outcome))
    rows = sorted(report.rows[settled:], key=lambda row: row.item)
    _print_table(rows)
    for row in (*report.rows[:settled], *rows):
        if row.reason:
            print(f"  {row.status.value:>7}  {row.item}: {row.reason}")
    counts = [row.numbers.get("patches") for row in rows]
    known = sum(count for count in counts if isinstance(count, int))
    more = " and those of slides without a mask yet" if UNKNOWN in counts else ""
    print(f"dry run: {len(jobs)} slides to do, {settled} settled before; {known:,} patches{more}")
    _print_space(known, len(jobs), plan,
                 image_px=sum(row.numbers.get("image_px", 0) for row in rows))
    print("nothing was written")
    return report.exit_code


def _print_table(rows: Sequence[Row]) -> None:
    columns = [name for name in COLUMNS
               if name != "image" or any(name in row.numbers for row in rows)]
    cells = [("slide", *columns),
             *((row.item, *(str(row.numbers.get(name, "-")) for name in columns)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
              .rstrip())


def _print_space(patches: int, slides: int, plan: PatchPlan, *, image_px: int) -> None:
    """Disk need of this step and of features to come, and whether there is room."""
    need = {"coordinates": patches * COORDS_BYTES + slides * COORDS_OVERHEAD_BYTES}
    images = plan.beside.images
    if images is not None:
        count = min(patches, slides * (plan.beside.max_images or patches))
        need[f"{images} images, about"] = int(
            count * plan.patch_size**2 * IMAGE_BYTES_A_PIXEL[images])
    if plan.beside.slide_image is not None:
        kind = "png" if plan.beside.slide_image.quality is None else "jpeg"
        need["images of slides, about"] = int(image_px * PYRAMID * IMAGE_BYTES_A_PIXEL[kind])
    place = next(folder for folder in (plan.save_dir.resolve(), *plan.save_dir.resolve().parents)
                 if folder.exists())
    free = free_bytes(place)
    listed = ", ".join(f"{size / 1e6:,.1f} MB {what}" for what, size in need.items())
    features = patches * FEATURE_DIM * FEATURE_BYTES
    print(f"space: {listed}; features of {FEATURE_DIM} numbers would need {features / 1e6:,.1f} "
          f"MB; {free / 1e6:,.0f} MB are free")
    if sum(need.values()) > free:
        print(f"warning: {plan.save_dir} has too little space for this")

