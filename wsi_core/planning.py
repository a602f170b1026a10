"""What a patching run has to do: its slides, their pixel sizes, and which of them are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.errors import ItemFailed, Refused
from utils.report import Row, RunReport, Status
from utils.storage import inside, safe_id
from wsi_core.find_tissue import automatic_level
from wsi_core.patch_plan import Left, PatchJob, PatchPlan, find_standing
from wsi_core.presets import DEFAULTS, PatchingParameters, find_preset, load_preset
from wsi_core.process_list import (
    ProcessList,
    convert_legacy,
    is_legacy,
    new_list,
    read_list,
    row_mpp,
    row_parameters,
    to_process,
)
from wsi_core.slide import check_level, open_slide
from wsi_core.slide_listing import (
    check_stems,
    known_mpp,
    list_slides,
    read_mpp_csv,
    slide_file,
    unused_sizes,
)


def load_defaults(preset: str | None) -> PatchingParameters:
    """The built-in parameters, or those of a preset."""
    if preset is None:
        return DEFAULTS
    folders = [Path("presets"), Path(__file__).resolve().parent.parent / "presets"]
    return load_preset(find_preset(preset, folders=folders))


def load_listing(source: Path, save_dir: Path, process_list: str | None,
                 defaults: PatchingParameters, *, recursive: bool, id_from_path: bool,
                 endings: Sequence[str] = ()) -> ProcessList:
    """The slides of the run: those of the process list, or those of the folder."""
    if process_list is not None:
        listing = read_list(inside(save_dir, process_list), defaults)
    else:
        slides = list_slides(source, recursive=recursive, id_from_path=id_from_path,
                             endings=endings)
        elsewhere = any(name != path for name, path in slides.items())
        listing = new_list(slides, defaults, paths=slides if elsewhere else None)
    check_stems(listing, source)
    return listing


def load_sizes(mpp_csv: Path | None, listing: ProcessList) -> dict[str, float]:
    """The user's pixel sizes by slide; a name that no slide has is mentioned."""
    sizes = {} if mpp_csv is None else read_mpp_csv(mpp_csv)
    if unused := unused_sizes(sizes, listing.rows):
        print(f"note: --mpp_csv names {len(unused)} slides that are not in this run: "
              + ", ".join(unused[:5]))
    return sizes


def plan_jobs(listing: ProcessList, source: Path, defaults: PatchingParameters,
              sizes: Mapping[str, float], plan: PatchPlan, report: RunReport) -> list[PatchJob]:
    """The slides with work left; the others are settled in ``listing`` and ``report``.

    ``Refused`` when coordinates or images of other parameters are there.
    """
    jobs: list[PatchJob] = []
    conflicts: list[str] = []
    for name, row in listing.rows.items():
        try:
            if not to_process(row):
                continue
            safe_id(Path(name).stem)
            job = plan_job(name, row, source, defaults, sizes)
            standing = find_standing(job, plan)
        except (Refused, ItemFailed) as error:
            settle(listing, report, Row(item=name, status=Status.FAILED, reason=str(error)))
            continue
        if standing.left is Left.CONFLICT:
            conflicts.append(f"{standing.what} of {name} made with other parameters: "
                             f"{standing.why}")
        elif standing.left is Left.NOTHING:
            settle(listing, report, Row(item=name, status=Status.SKIPPED, numbers=standing.numbers))
        else:
            jobs.append(job)
    if conflicts:
        more = f" ({len(conflicts) - 1} more slides differ as well)" if len(conflicts) > 1 else ""
        raise Refused(f"{plan.save_dir} holds {conflicts[0]}{more}. "
                      "Give --no_auto_skip to redo them, or another --save_dir")
    return jobs


def plan_job(name: str, row: dict[str, str], source: Path, defaults: PatchingParameters,
             sizes: Mapping[str, float]) -> PatchJob:
    """A row as a job; ``Refused`` or ``SlideError`` when it cannot be one."""
    path = slide_file(source, name, row)
    if is_legacy(row):
        with open_slide(path) as slide:
            level = automatic_level(slide, row_parameters(row, defaults).seg_level)
            check_level(slide, level)
            convert_legacy(row, defaults, slide.level_downsamples[level])
    return PatchJob(slide_path=path, parameters=row_parameters(row, defaults), name=name,
                    mpp_um=row_mpp(row) or known_mpp(sizes, name))


def settle(listing: ProcessList, report: RunReport, row: Row) -> None:
    """Write a slide's end into the report and its row of the process list."""
    report.add(row)
    listing.settle(row.item, row)
