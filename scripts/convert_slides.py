"""Turn pictures and slides of any kind that is read into tiled pyramidal TIFFs with a pixel size.

    python scripts/convert_slides.py --source PICTURES --save_dir SLIDES --mpp_csv sizes.csv
    python scripts/convert_slides.py --source SLIDES_40X --save_dir SLIDES_20X --downscale_by 2

The csv has the columns slide_id (or wsi) and mpp; it is needed where the files do not say their
pixel size. Writes <slide>.tif with levels 1, 4, 16 ... (JPEG tiles, or without loss), which
OpenSlide and every script here read, and report_convert.csv. Needs: pip install tifffile. Running
the same command again goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from utils.errors import ItemFailed, Refused, SlideError, run_script
from utils.options import option, parse, resolved
from utils.parallel import run_items
from utils.report import Row, RunReport, Status, outcome_row
from utils.storage import canonical, safe_id, writable_folder

RECORD = "milwright"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of convert_slides.py."""

    source: Path = option(help="folder with slides or pictures")
    save_dir: Path = option(help="folder for the TIFFs")
    mpp_csv: Path | None = option(None, help="csv with columns slide_id (or wsi) and mpp: um per "
                                  "pixel, instead of what the files say")
    downscale_by: float = option(1.0, low=1, high=64, help="make level 0 so many times smaller")
    jpeg_quality: int = option(90, low=1, high=100, help="of the tiles")
    lossless: bool = option(False, help="zlib instead of JPEG: exact, several times larger")
    recursive: bool = option(False, help="look for slides in sub-folders as well")
    id_from_path: bool = option(False, help="with --recursive: results are called folder__name")
    overwrite: bool = option(False, help="convert again what is there, made from other settings")
    workers: int = option(0, low=0, help="slides at a time, in processes of their own")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One slide to convert. mpp_um: the user's word on level 0; quality None = without loss"""

    name: str
    path: Path
    target: Path
    mpp_um: float | None
    downscale_by: float
    quality: int | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(Options, prog="convert_slides.py", argv=argv, config_flag=False,
                    description=__doc__ or "")
    if not options.source.is_dir():
        raise Refused(f"--source {options.source} is no folder")
    from tqdm import tqdm

    from wsi_core.pyramid_writer import import_tifffile
    from wsi_core.slide_listing import known_mpp, list_slides, read_mpp_csv

    import_tifffile()
    slides = list_slides(options.source, recursive=options.recursive,
                         id_from_path=options.id_from_path)
    sizes = {} if options.mpp_csv is None else read_mpp_csv(options.mpp_csv)
    jobs = [Conversion(
        name=name, path=options.source / path, mpp_um=known_mpp(sizes, name),
        target=options.save_dir / f"{safe_id(Path(name).stem)}.tif",
        downscale_by=options.downscale_by,
        quality=None if options.lossless else options.jpeg_quality)
        for name, path in slides.items()]
    check_targets(jobs)
    writable_folder(options.save_dir, what="--save_dir")
    report = RunReport("convert")
    try:
        outcomes = run_items(convert, jobs, workers=options.workers,
                             arguments={"overwrite": options.overwrite})
        for outcome in tqdm(outcomes, total=len(jobs), disable=None, unit="slide"):
            report.add(outcome_row(outcome.item.name, outcome))
    finally:
        report.rows.sort(key=lambda row: row.item)
        report.write(options.save_dir, options=resolved(options))
    report.print_summary(options.save_dir)
    return report.exit_code


def check_targets(jobs: Sequence[Conversion]) -> None:
    """``Refused`` when two slides would become one file, or a slide its own."""
    seen: dict[str, Conversion] = {}
    for job in jobs:
        other = seen.setdefault(job.target.name.casefold(), job)
        if other is not job:
            raise Refused(f"{other.path} and {job.path} would both become {job.target.name}: "
                          "rename one of them")
        if job.target.resolve() == job.path.resolve():
            raise Refused(f"{job.path} would be written over itself: give another --save_dir")


# ---------------------------------------------------------------------------- one slide

def convert(job: Conversion, *, overwrite: bool) -> Row:
    """Write the TIFF of one slide, whole or not at all. Raises SlideError, ItemFailed, OSError."""
    from wsi_core.pyramid_writer import slide_levels, write_tiled_pyramid
    from wsi_core.slide import fingerprint, open_slide

    record = canonical({**fingerprint(job.path), "mpp_um": job.mpp_um,
                        "downscale_by": job.downscale_by, "quality": job.quality})
    if recorded(job.target) == record:
        return Row(item=job.name, status=Status.SKIPPED)
    if job.target.exists() and not overwrite:
        raise ItemFailed(f"{job.target} is there, made from another slide, with other settings or "
                         "by another program: give --overwrite, or another --save_dir")
    with open_slide(job.path) as slide:
        mpp_um = job.mpp_um or (sum(slide.mpp_um) / 2 if slide.mpp_um else None)
        if mpp_um is None:
            raise SlideError(f"{job.path}: pixel size unknown "
                             f"({slide.mpp_problem or 'the file gives none'}): put um per pixel "
                             "into --mpp_csv")
        levels = slide_levels(slide, mpp_um=mpp_um, downscale_by=job.downscale_by)
        write_tiled_pyramid(job.target, levels, quality=job.quality,
                            description=json.dumps({RECORD: record}))
    return Row(item=job.name, status=Status.DONE, numbers={
        "levels": len(levels), "mpp_um": f"{levels[0].mpp_um:.6g}"})


def recorded(path: Path) -> str:
    """What a TIFF of ours says it was made from, "" for a missing, damaged or other file."""
    from wsi_core.pyramid_writer import description_of

    try:
        return str(json.loads(description_of(path))[RECORD])
    except (ValueError, KeyError, TypeError):
        return ""


if __name__ == "__main__":
    sys.exit(run_script(main))
