"""How fast 256-px patches are read, in CLAM's order: x outer, y inner, off the tile grid.

    python benchmarks/reading.py                      # a synthetic slide, and real ones if there
    python benchmarks/reading.py --slide a.svs b.tif  # your own
    python benchmarks/reading.py --side 40000 --patches 4000

Each reader runs in a process of its own; "floor" is the decoding of the stored tiles that the
patches touch, once each, with nothing else done: the share says how near a reader comes to it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks._measure import in_new_process, peak_mb
from utils.errors import EXIT_OK, run_script
from utils.options import option, parse

PATCH_PX = 256
MIN_COLOUR = 12  # largest less smallest channel at a patch's centre; glass has less
GRID_OFFSET_PX = (131, 77)  # of CLAM's grid, which starts at a contour's corner
REAL_SLIDE = ROOT.parent / "shared" / "data" / "slides" / "cmu_1_small_region.svs"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    slide: tuple[Path, ...] = option((), help="slides to read instead")
    side: int = option(8192, low=1024, help="of the synthetic slide, px")
    patches: int = option(1000, low=1, help="at most, per slide")
    repeats: int = option(3, low=1, help="runs of each reader; the best counts")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One reader on one slide: the best of the repeats, opening left out."""

    open_ms: float
    cpu_ms: float  # a patch
    rate: float  # patches a second
    peak_mb: float
    checksum: int  # of all pixels in order


class Reader(Protocol):
    """What is measured: made from a path (that is the opening), then asked for patches."""

    def __call__(self, x: int, y: int) -> np.ndarray: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every reader on every slide and print a table."""
    options = parse(Options, prog="benchmarks/reading.py", argv=argv, config_flag=False,
                    description=__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        slides = list(options.slide) or [REAL_SLIDE] * REAL_SLIDE.is_file()
        if not options.slide:
            from benchmarks._slides import make_slide

            slides.insert(0, make_slide(Path(folder) / "synthetic.tif", side_px=options.side))
        for slide in slides:
            report(slide, tissue_patches(slide, options.patches), options.repeats)
    return EXIT_OK


def tissue_patches(path: Path, limit: int) -> np.ndarray:
    """(N, 2) level-0 corners of patches whose centre is coloured, column by column."""
    from wsi_core.slide import best_level, open_slide, read_level

    with open_slide(path, backend="openslide") as slide:
        overview, downsample = read_level(slide, best_level(slide, 16))
        width, height = slide.level_dimensions[0]
    x, y = np.meshgrid(np.arange(GRID_OFFSET_PX[0], width - PATCH_PX, PATCH_PX),
                       np.arange(GRID_OFFSET_PX[1], height - PATCH_PX, PATCH_PX), indexing="ij")
    corners = np.stack([x.ravel(), y.ravel()], axis=1)
    centre = ((corners + PATCH_PX // 2) / downsample).astype(int)
    colours = overview[centre[:, 1].clip(max=overview.shape[0] - 1),
                       centre[:, 0].clip(max=overview.shape[1] - 1)].astype(int)
    chosen: np.ndarray = corners[np.ptp(colours, axis=1) > MIN_COLOUR][:limit]
    return chosen


def report(path: Path, corners: np.ndarray, repeats: int) -> None:
    """Print the table of one slide."""
    readers: dict[str, Callable[[Path], Reader]] = {
        "openslide-python, as CLAM": open_as_clam,
        "ours, OpenSlide": partial(open_ours, backend="openslide"),
        "ours, auto": partial(open_ours, backend="auto")}
    results = {name: in_new_process(measure, opener, path, corners, repeats)
               for name, opener in readers.items()}
    floor_ms, tile_kb = in_new_process(measure_floor, path, corners, repeats)
    equal = len({result.checksum for result in results.values()}) == 1
    print(f"\n{path.name}: {len(corners)} patches of {PATCH_PX} px, "
          f"pixels of the readers {'equal' if equal else 'DIFFER'}")
    print(f"{'reader':27}{'CPU ms/patch':>13}{'patches/s':>11}{'times':>7}{'of floor':>10}"
          f"{'open ms':>9}{'peak MB':>9}")
    reference = next(iter(results.values()))
    for name, result in results.items():
        print(f"{name:27}{result.cpu_ms:13.2f}{result.rate:11.0f}"
              f"{reference.cpu_ms / result.cpu_ms:7.1f}{floor_ms / result.cpu_ms:10.0%}"
              f"{result.open_ms:9.1f}{result.peak_mb:9.0f}")
    print(f"{'floor: decoding alone':27}{floor_ms:13.2f}   (tiles of {tile_kb:.1f} kB)")


def measure(opener: Callable[[Path], Reader], path: Path, corners: np.ndarray, repeats: int
            ) -> Measured:
    """Read all patches ``repeats`` times, each with a fresh handle, in this process."""
    import cv2

    cv2.setNumThreads(1)
    places = corners.tolist()
    reader, checksum = opener(path), 0
    for x, y in places:
        checksum = zlib.adler32(reader(x, y).tobytes(), checksum)
    open_s, cpu_s, wall_s = [], [], []
    for _ in range(repeats):
        start = time.process_time()
        reader = opener(path)
        cpu, wall = time.process_time(), time.perf_counter()
        for x, y in places:
            reader(x, y)
        cpu_s.append(time.process_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
        open_s.append(cpu - start)
    return Measured(
        open_ms=1000 * min(open_s), peak_mb=peak_mb(), checksum=checksum,
        cpu_ms=1000 * min(cpu_s) / len(places),
        rate=len(places) / min(wall_s))


def open_as_clam(path: Path) -> Reader:
    """The calls of CLAM's data set, library defaults."""
    import openslide

    slide = openslide.OpenSlide(path)

    def read(x: int, y: int) -> np.ndarray:
        return np.asarray(slide.read_region((x, y), 0, (PATCH_PX, PATCH_PX)).convert("RGB"))

    return read


def open_ours(path: Path, *, backend: Literal["auto", "openslide"]) -> Reader:
    """Our reader with the given backend, its checks at opening included."""
    from wsi_core.slide import open_slide

    slide = open_slide(path, backend=backend)
    return lambda x, y: slide.read_region((x, y), 0, (PATCH_PX, PATCH_PX))


def measure_floor(path: Path, corners: np.ndarray, repeats: int) -> tuple[float, float]:
    """(CPU ms a patch, mean kB a tile) of decoding the tiles under the patches, once each.

    NaN for a slide whose level 0 is not JPEG tiles.
    """
    import cv2

    from wsi_core.jpeg_tiles import JpegTileDecoder
    from wsi_core.tiff_directory import TiffProblem, read_directories

    cv2.setNumThreads(1)
    try:
        level = read_directories(path)[0]
    except TiffProblem:
        return float("nan"), float("nan")
    width, height = level.tile_width, level.tile_height
    decoder = JpegTileDecoder(tables=level.tables, size=(width, height),
                              photometric=level.photometric)
    touched = {row * level.columns + column for x, y in corners.tolist()
               for column in range(x // width, (x + PATCH_PX - 1) // width + 1)
               for row in range(y // height, (y + PATCH_PX - 1) // height + 1)}
    data = path.read_bytes()
    tiles = [data[level.offsets[i]:level.offsets[i] + level.counts[i]] for i in sorted(touched)]
    cpu_s = []
    for _ in range(repeats):
        start = time.process_time()
        # kept, as a cache keeps them: giving 200 kB back and forth costs as much as decoding
        decoded = [decoder.decode(tile) for tile in tiles]
        cpu_s.append(time.process_time() - start)
        if any(tile is None for tile in decoded):
            return float("nan"), float("nan")
    return (1000 * min(cpu_s) / len(corners),
            statistics.mean(map(len, tiles)) / 1000)


if __name__ == "__main__":
    sys.exit(run_script(main))
