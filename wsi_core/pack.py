"""The patches of a run in one LMDB: workers encode slides, this process takes them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import ItemFailed
from utils.locks import claim, holder
from utils.parallel import run_items
from utils.report import Row, Status
from wsi_core.coords import read_coords
from wsi_core.patch_images import Encoding
from wsi_core.patch_lmdb import PatchLmdb, pack_part, part_done, part_path
from wsi_core.slide import open_slide


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


def encode_slide(job: PackJob, *, database: Path, encoding: Encoding, quality: int) -> None:
    """Read and encode the patches of one slide into its part. Raises ItemFailed, OSError."""
    patches = read_coords(job.coords_path)
    path = part_path(database, patches.slide_id, level=job.level)
    if part_done(path, patches, encoding=encoding, quality=quality):
        return
    with open_slide(job.slide_path) as slide:
        pack_part(slide, patches, path, level=job.level, encoding=encoding, quality=quality)


def pack_slides(jobs: Sequence[PackJob], database: Path, *, encoding: Encoding, quality: int,
                missing: Sequence[str], spread: dict[str, Any]) -> list[Row]:
    """Bring every slide into the database; one row each.

    missing: slides of the run without coordinates, which the database is complete without
    spread: workers, scheduler, deadline_s of ``run_items``
    ``Refused`` when the database holds patches of another encoding, or is another tool's.
    """
    rows: list[Row] = []
    arguments: dict[str, Any] = {"encoding": encoding, "quality": quality}
    with claim(database) as mine:
        if not mine:
            raise ItemFailed(f"{database}: {holder(database)} writes it: wait for its end")
        with PatchLmdb(database, **arguments) as packed:
            todo = []
            for job in jobs:
                patches = read_coords(job.coords_path)
                if packed.holds(patches, level=job.level):
                    rows.append(Row(item=job.item, status=Status.SKIPPED,
                                    numbers={"n_patches": len(patches)}))
                else:
                    todo.append(job)
            outcomes = run_items(encode_slide, todo, **spread,
                                 arguments={"database": database, **arguments})
            rows += (_take_in(packed, database, outcome.item, outcome.error, outcome.seconds)
                     for outcome in outcomes)
            failed = [row.item for row in rows if row.status is Status.FAILED]
            if todo or missing:
                packed.finish(missing=[*missing, *failed])
    _remove_parts(database)
    return rows


def _take_in(packed: PatchLmdb, database: Path, job: PackJob, error: str | None, seconds: float
             ) -> Row:
    """One slide's part into the database, and away with it."""
    try:
        if error is not None:
            raise ItemFailed(error)
        part = part_path(database, read_coords(job.coords_path).slide_id, level=job.level)
        count = packed.add(part)
        part.unlink()
    except ItemFailed as problem:
        return Row(item=job.item, status=Status.FAILED, reason=str(problem), seconds=seconds)
    return Row(item=job.item, status=Status.DONE if count else Status.EMPTY, seconds=seconds,
               reason="" if count else "no patches", numbers={"n_patches": count})


def _remove_parts(database: Path) -> None:
    """The folder of parts when nothing is left in it (a failed slide may have left some)."""
    folder = database.with_name(database.name + ".parts")
    for place in (*folder.glob("*/"), folder):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
