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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from utils.errors import ItemFailed, Refused, SlideError, run_script
from utils.options import option, parse, resolved
from utils.parallel import run_items
from utils.report import Row, RunReport, Status, outcome_row
from utils.storage import atomic_file, canonical, safe_id, writable_folder

if TYPE_CHECKING:
    import numpy as np

    from wsi_core.slide import Slide

TILE_PX, STEP = 256, 4  # between one level and the next
SMALLEST_PX = 1024  # no further level once the longer side is no longer than this
IN_MEMORY_FROM = 16.0  # downsample from which a level is made whole: at most 1/256 of the slide
BIG_BYTES = 2**31  # of raw pixels, from which offsets of 32 bits might not do
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
    try:
        import tifffile  # noqa: F401
    except ImportError:
        raise Refused("writing TIFFs needs the package tifffile: pip install tifffile") from None
    from tqdm import tqdm

    from wsi_core.slide_listing import known_mpp, list_slides, read_mpp_csv

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
    import tifffile

    from wsi_core.slide import fingerprint, open_slide

    record = {**fingerprint(job.path), "mpp_um": job.mpp_um, "downscale_by": job.downscale_by,
              "quality": job.quality}
    found = recorded(job.target)
    if found == canonical(record):
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
        width, height = slide.level_dimensions[0]
        downsamples = levels(width, height, job.downscale_by)
        with atomic_file(job.target) as file, tifffile.TiffWriter(
                tifffile.FileHandle(file, name=job.target.name),
                bigtiff=3 * width * height > BIG_BYTES) as tif:
            for downsample in downsamples:
                _write_level(tif, slide, downsample, mpp_um * downsample, job.quality,
                             json.dumps({RECORD: canonical(record)})
                             if downsample == downsamples[0] else None)
    return Row(item=job.name, status=Status.DONE, numbers={
        "levels": len(downsamples), "mpp_um": f"{mpp_um * job.downscale_by:.6g}"})


def levels(width: int, height: int, downscale_by: float) -> list[float]:
    """Downsamples of the levels against the source's level 0, finest first."""
    found = [downscale_by]
    while max(width, height) / found[-1] > SMALLEST_PX:
        found.append(found[-1] * STEP)
    return found


def recorded(path: Path) -> str:
    """What a TIFF of ours says it was made from, "" for a missing, damaged or other file."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            return str(json.loads(tif.pages.first.description)[RECORD])
    except (OSError, ValueError, KeyError, TypeError, IndexError, tifffile.TiffFileError):
        return ""


def _write_level(tif: Any, slide: Slide, downsample: float, mpp_um: float, quality: int | None,
                 description: str | None) -> None:
    width, height = (max(1, round(side / downsample)) for side in slide.level_dimensions[0])
    per_cm = 1e4 / mpp_um
    tiles = read_tiles(slide, downsample, (width, height))
    how: dict[str, Any] = {"compression": "zlib", "photometric": "rgb"} if quality is None else {
        "compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)}
    tif.write(tiles if quality is None else (_jpeg(tile, quality) for tile in tiles),
              shape=(height, width, 3), dtype="uint8", tile=(TILE_PX, TILE_PX), metadata=None,
              resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", description=description,
              subfiletype=0 if description else 1, **how)


def read_tiles(slide: Slide, downsample: float, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """(256, 256, 3) uint8 tiles of the slide at ``downsample``, row after row.

    size: (w, h) of that level; tiles that reach beyond it repeat its last pixels. Fine levels are
    read tile by tile, coarse ones are made whole (see ``IN_MEMORY_FROM``).
    """
    import cv2
    import numpy as np

    from wsi_core.slide import WHITE, best_level, read_overview

    level = best_level(slide, downsample)
    scale = sum(slide.level_downsamples[level]) / 2
    factors = [one / other for one, other in zip(slide.level_dimensions[level], size, strict=True)]
    whole = None if downsample < IN_MEMORY_FROM else cv2.resize(
        read_overview(slide, downsample, max_pixels=2**30, background=WHITE)[0], size,
        interpolation=cv2.INTER_AREA)
    for top in range(0, size[1], TILE_PX):
        for left in range(0, size[0], TILE_PX):
            right, bottom = min(size[0], left + TILE_PX), min(size[1], top + TILE_PX)
            if whole is not None:
                tile = whole[top:bottom, left:right]
            else:
                x, x_end = (round(edge * factors[0]) for edge in (left, right))
                y, y_end = (round(edge * factors[1]) for edge in (top, bottom))
                tile = slide.read_region((int(x * scale), int(y * scale)), level,
                                         (x_end - x, y_end - y), background=WHITE)
                if tile.shape[:2] != (bottom - top, right - left):
                    tile = cv2.resize(tile, (right - left, bottom - top),
                                      interpolation=cv2.INTER_AREA)
            yield np.pad(tile, ((0, TILE_PX - tile.shape[0]), (0, TILE_PX - tile.shape[1]), (0, 0)),
                         mode="edge")


def _jpeg(tile: np.ndarray, quality: int) -> bytes:
    from wsi_core.patch_images import encode_image

    return encode_image(tile, "jpeg", quality=quality)


if __name__ == "__main__":
    sys.exit(run_script(main))
