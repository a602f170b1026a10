"""Patches of all slides of a run into one LMDB: workers encode, this process takes them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import BrokenFile, ItemFailed
from utils.locks import claim, holder
from utils.parallel import run_items
from utils.report import Row, RunReport, Status
from utils.temporaries import sweep_temporaries
from wsi_core.coords import read_coords_inside
from wsi_core.deriving import DerivePlan
from wsi_core.patch_images import Encoding
from wsi_core.patch_lmdb import PatchLmdb, pack_part, part_done, part_path
from wsi_core.patch_plan import PatchPlan
from wsi_core.patching import check_made_from
from wsi_core.process_list import ProcessList
from wsi_core.slide import open_slide
from wsi_core.slide_listing import slide_file


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """Where patches are packed to and how they are encoded; quality: 1..100, of JPEG."""

    database: Path
    encoding: Encoding
    quality: int

    def open(self) -> PatchLmdb:
        """The database, made when it is not there.

        ``Refused`` when it holds patches of another encoding, or is another tool's.
        """
        return PatchLmdb(self.database, encoding=self.encoding, quality=self.quality)

    @property
    def parts(self) -> Path:
        """The folder where finished slides wait."""
        return self.database.with_name(self.database.name + ".parts")

    def prepare(self) -> None:
        """Refuse before any work what ``open`` would refuse after it."""
        with claim(self.database) as mine:
            if mine:
                self.open().close()


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """One slide at one magnification. level: its name, "" for the coarse (or only) one."""

    name: str
    slide_path: Path
    coords_path: Path
    level: str = ""

    @property
    def item(self) -> str:
        """How the report calls it."""
        return f"{self.name} [lmdb {self.level}]" if self.level else f"{self.name} [lmdb]"


def pack_listed(plan: PackPlan, listing: ProcessList, source: Path, report: RunReport, *,
                coarse: PatchPlan, finer: DerivePlan, spread: dict[str, Any]) -> None:
    """Pack the patches of every listed slide that has coordinates, on all levels.

    Slides that failed in this run are left out, whatever is there of earlier ones. spread:
    workers, scheduler, deadline_s of ``run_items``. ``Refused`` as ``PackPlan.open``.
    """
    failed = {row.item for row in report.rows if row.status is Status.FAILED}
    jobs, missing = [], []
    for name, row in listing.rows.items():
        slide_id = Path(name).stem
        places = {"": coarse.coords_path(slide_id),
                  **{child.name: finer.h5_path(child, slide_id) for child in finer.children}}
        if name in failed or not places[""].exists():
            missing.append(name)
            continue
        jobs += [PackJob(name=name, slide_path=slide_file(source, name, row), coords_path=path,
                         level=level) for level, path in places.items() if path.exists()]
    report.extend(pack_slides(jobs, plan, missing=missing, spread=spread))


def pack_slides(jobs: Sequence[PackJob], plan: PackPlan, *, missing: Sequence[str],
                spread: dict[str, Any]) -> list[Row]:
    """Bring every slide into the database; one row each, all busy when another process writes it.

    missing: slides of the run without coordinates, which the database is complete without
    """
    with claim(plan.database) as mine:
        if not mine:
            why = (f"{holder(plan.database)} writes {plan.database.name}: run the same command "
                   "again when it is done")
            return [Row(item=job.item, status=Status.BUSY, reason=why) for job in jobs]
        for folder in (plan.parts, *plan.parts.glob("*/")):
            sweep_temporaries(folder)
        with plan.open() as packed:
            rows, todo = _settle_packed(packed, jobs)
            outcomes = run_items(encode_slide, todo, **spread, arguments={"plan": plan})
            rows += (_take_in(packed, plan, outcome.item, outcome.error, outcome.seconds)
                     for outcome in outcomes)
            failed = [row.item for row in rows if row.status is Status.FAILED]
            packed.finish(missing=[*missing, *failed])
        _remove_parts(plan.parts)
    return rows


def encode_slide(job: PackJob, *, plan: PackPlan) -> None:
    """Read and encode the patches of one slide into its part. Raises ItemFailed, OSError."""
    patches = read_coords_inside(job.coords_path)
    check_made_from(job.slide_path, patches, job.coords_path)
    path = part_path(plan.database, patches.slide_id, level=job.level)
    if part_done(path, patches, encoding=plan.encoding, quality=plan.quality):
        return
    with open_slide(job.slide_path) as slide:
        pack_part(slide, patches, path, level=job.level, encoding=plan.encoding,
                  quality=plan.quality)


def _settle_packed(packed: PatchLmdb, jobs: Sequence[PackJob]) -> tuple[list[Row], list[PackJob]]:
    """Rows of the slides that are in already or whose coordinates are damaged, and the others."""
    rows, todo = [], []
    for job in jobs:
        try:
            patches = read_coords_inside(job.coords_path)
        except BrokenFile as error:
            rows.append(Row(item=job.item, status=Status.FAILED, reason=str(error)))
            continue
        if packed.holds(patches, level=job.level):
            rows.append(Row(item=job.item, status=Status.SKIPPED,
                            numbers={"n_patches": len(patches)}))
        else:
            todo.append(job)
    return rows, todo


def _take_in(packed: PatchLmdb, plan: PackPlan, job: PackJob, error: str | None, seconds: float
             ) -> Row:
    """One slide's part into the database, and away with it."""
    try:
        if error is not None:
            raise ItemFailed(error)
        slide_id = read_coords_inside(job.coords_path).slide_id
        part = part_path(plan.database, slide_id, level=job.level)
        count = packed.add(part)
        part.unlink()
    except ItemFailed as problem:
        return Row(item=job.item, status=Status.FAILED, reason=str(problem), seconds=seconds)
    return Row(item=job.item, status=Status.DONE if count else Status.EMPTY, seconds=seconds,
               reason="" if count else "no patches", numbers={"n_patches": count})


def _remove_parts(parts: Path) -> None:
    """The folder of parts when nothing is left in it (a failed slide may have left some)."""
    for place in (*parts.glob("*/"), parts):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
