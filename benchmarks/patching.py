"""Speed of tissue segmentation and patch coordinates, against CLAM's figures and the floor.

    python benchmarks/patching.py                  # about a minute
    python benchmarks/patching.py --baseline_share 1   # CLAM's algorithm on every candidate

First a whole 40,000 px slide with mask, stitch and h5 on disk, at several patch sizes; its floor
is reading the level and OpenCV's segmentation, measured in the same run. Then the contour test
alone: 25 ragged outlines on 120,000 x 90,000 px, about 85,000 patches. Beside it runs the algorithm
of the reference in one process, ``cv2.pointPolygonTest`` candidate by candidate, on a share of the
candidates; both must agree. In between, the slide at a physical scale (0.5 um, global lattice) with
each classical segmenter, against CLAM's way on the same work in the same run: its mask of the same
overview, and every candidate tested point by point. Times are the best of several runs, in one
process.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks._measure import best_of, forget_peak, peak_mb
from utils.errors import EXIT_OK, ItemFailed, run_script
from utils.options import option, parse
from utils.storage import write_json
from wsi_core.grid import patch_grid
from wsi_core.presets import DEFAULTS
from wsi_core.tissue import Tissue, segment_image

SLIDE_PX, TILE_PX = 40_000, 256
PATCH_SIZES = (512, 256, 128, 64)
# anchors: CLAM 53e2409 on 2 shared cores, in-process, imports left out
CLAM_RAGGED_S = 30.1
CLAM_SLIDE = {512: (0.41, 162), 256: (0.86, 205), 128: (3.35, 368), 64: (14.8, 960)}  # s, MB


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    repeats: int = option(5, low=1, help="runs of each timing; the best counts")
    baseline_share: float = option(0.02, low=0.001, high=1,
                                   help="share of candidates for the reference's algorithm")
    json: Path | None = option(None, help="also write the figures to this file")


def main() -> int:
    """Run both cases and print their tables."""
    options = parse(Options, prog="benchmarks/patching.py", config_flag=False,
                    description=__doc__ or "")
    import cv2

    cv2.setNumThreads(1)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="patching-") as folder:
        slide = make_slide(Path(folder) / "synth40k.tif")
        for size in PATCH_SIZES:
            figures[f"slide, {size} px"] = run_slide(slide, Path(folder) / str(size), size,
                                                     options.repeats)
        figures["physical"] = run_physical(slide, Path(folder), options.repeats)
    figures["ragged"] = run_ragged(options.repeats, options.baseline_share)
    if options.json:
        write_json(options.json, figures)
    return EXIT_OK


# ---------------------------------------------------------------------------- the slide

def make_slide(path: Path) -> Path:
    """A 40,000 px square JPEG pyramid (1/4/16/64) with 28 % tissue in three pieces.

    The fine levels repeat two tiles; only the coarsest, which patching reads, is a picture.
    """
    import cv2
    import tifffile

    rng = np.random.default_rng(1)
    side = SLIDE_PX // 64
    overview = np.full((side, side, 3), 243, np.uint8)
    shape = np.zeros((side, side), np.uint8)
    for centre, axes in (((200, 210), (150, 95)), ((430, 250), (95, 130)), ((300, 480), (130, 75))):
        cv2.ellipse(shape, centre, axes, 20, 0, 360, 255, -1)
    ragged = cv2.GaussianBlur(shape, (0, 0), 3) + rng.normal(0, 8, shape.shape) > 127
    texture = rng.integers(0, 60, (side, side, 3))
    overview[ragged] = np.clip(np.array([170, 90, 160]) + texture, 0, 255)[ragged]
    coarse = [_jpeg(np.full((TILE_PX, TILE_PX, 3), colour, np.uint8))
              for colour in ((243, 243, 243), (170, 90, 160))]

    def tiles(size: int) -> Iterator[bytes]:
        count = -(-size // TILE_PX)
        for row, column in np.ndindex(count, count):
            if size == side:
                part = overview[row * TILE_PX:, column * TILE_PX:][:TILE_PX, :TILE_PX]
                missing = [(0, TILE_PX - length) for length in part.shape[:2]]
                yield _jpeg(np.pad(part, (*missing, (0, 0)), mode="edge"))
            else:
                y, x = (min(side - 1, int((place + 0.5) * TILE_PX * side / size))
                        for place in (row, column))
                yield coarse[int(ragged[y, x])]

    with tifffile.TiffWriter(path) as tif:
        for downsample in (1, 4, 16, 64):
            size = SLIDE_PX // downsample
            tif.write(tiles(size), shape=(size, size, 3), dtype=np.uint8, photometric="ycbcr",
                      compression="jpeg", subsampling=(2, 2), tile=(TILE_PX, TILE_PX),
                      subfiletype=int(downsample > 1), metadata=None,
                      resolution=(40_000 / downsample, 40_000 / downsample),
                      resolutionunit="CENTIMETER")
    return path


def _jpeg(rgb: np.ndarray) -> bytes:
    import cv2

    return bytes(cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes())


def run_slide(slide_path: Path, save_dir: Path, patch: int, repeats: int) -> dict[str, float]:
    """Time a slide from file to h5, mask and stitch, and the floor under it."""
    from wsi_core.coords import read_coords
    from wsi_core.outputs import OutputPlan
    from wsi_core.patch_plan import PatchJob, PatchPlan
    from wsi_core.patching import patch_slide
    from wsi_core.slide import open_slide, read_level

    job = PatchJob(slide_path=slide_path, parameters=DEFAULTS)
    plan = PatchPlan(save_dir=save_dir, patch_size=patch, step_size=patch, redo=True,
                     outputs=OutputPlan(save_dir=save_dir, stitch=True))
    for name in ("patches", "masks", "stitches"):
        (save_dir / name).mkdir(parents=True)

    def floor() -> None:
        with open_slide(slide_path) as slide:
            segment_image(*read_level(slide, 3), DEFAULTS)

    forget_peak()
    total, cpu = best_of(repeats, lambda: patch_slide(job, plan=plan))
    peak = peak_mb()
    least, _ = best_of(repeats, floor)
    count = len(read_coords(save_dir / "patches" / f"{job.slide_id}.h5"))
    clam_s, clam_mb = CLAM_SLIDE[patch]
    print(f"slide, {patch:4d} px, {count:6d} patches: {total:.3f} s wall, {cpu:.3f} s CPU, peak "
          f"{peak:.0f} MB; floor {least:.3f} s = {least / total:.0%}; "
          f"CLAM {clam_s} s, {clam_mb} MB (ratio {clam_s / total:.1f})")
    return {"patches": count, "wall_s": total, "cpu_s": cpu, "floor_s": least,
            "floor_share": least / total, "clam_s": clam_s, "peak_mb": peak}


# ---------------------------------------------------------------------------- physical scale

def run_physical(slide_path: Path, folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Time thumbnail, mask and coordinates of 256 px at 0.5 um with each segmenter."""
    from wsi_core.coords import read_coords
    from wsi_core.dry_run import survey_slide
    from wsi_core.find_tissue import TissueSearch
    from wsi_core.patch_plan import PatchJob, PatchPlan
    from wsi_core.patching import patch_slide

    clam_wall, clam_cpu = best_of(repeats, lambda: clams_way(slide_path, 512))
    print(f"CLAM's way on the same overview: {clam_wall:.3f} s wall, {clam_cpu:.3f} s CPU")
    figures = {"clam's way": {"wall_s": clam_wall, "cpu_s": clam_cpu}}
    job = PatchJob(slide_path=slide_path, parameters=DEFAULTS)
    for segmenter in ("clam", "otsu", "entropy", "stain"):
        save_dir = folder / segmenter
        for name in ("patches", "masks"):
            (save_dir / name).mkdir(parents=True)
        plan = PatchPlan(save_dir=save_dir, patch_mpp=0.5, lattice="global", redo=True,
                         search=TissueSearch(segmenter=segmenter, seg_mpp=8.0))
        bare, _ = best_of(repeats, partial(survey_slide, job, plan=plan))
        wall, cpu = best_of(repeats, partial(patch_slide, job, plan=plan))
        count = len(read_coords(plan.coords_path(job.slide_id)))
        print(f"physical, {segmenter:8} {count:6d} patches: {bare:.3f} s wall, CLAM's way takes "
              f"{clam_wall / bare:.1f} times as long; with h5 and mask picture {wall:.3f} s wall, "
              f"{cpu:.3f} s CPU")
        figures[segmenter] = {"patches": count, "bare_s": bare, "wall_s": wall, "cpu_s": cpu,
                              "ratio": clam_wall / bare}
    return figures


def clams_way(slide_path: Path, patch: int) -> None:
    """CLAM's mask of an overview of 8 um, then each candidate tested point by point."""
    from wsi_core.slide import open_slide, read_overview

    with open_slide(slide_path) as slide:
        tissue = segment_image(*read_overview(slide, 32.0), DEFAULTS)
        coords = patch_grid(tissue, patch_px_l0=patch, step_px_l0=patch,
                            slide_size=slide.level_dimensions[0])
    reference_test(tissue, patch, 1.0, coords)


# ---------------------------------------------------------------------------- the contour test

def ragged_tissue() -> Tissue:
    """25 pieces with fractal outlines, found at downsample 16 of 120,000 x 90,000 px."""
    import cv2

    rng = np.random.default_rng(0)
    width, height = 7500, 5625
    noise = np.zeros((height, width), np.float32)
    for cell, weight in ((96, 0.8), (24, 0.8), (6, 0.8)):
        coarse = rng.standard_normal((height // cell + 2, width // cell + 2)).astype(np.float32)
        noise += weight * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    x = (np.arange(width) % 1500 / 1500 * 2 - 1).astype(np.float32)
    y = (np.arange(height) % 1125 / 1125 * 2 - 1).astype(np.float32)
    squared = x[None, :] ** 2 + y[:, None] ** 2
    tissue = (squared < 0.61 + 0.2 * noise) & (np.maximum(abs(x[None, :]), abs(y[:, None])) < 0.97)
    rgb = np.where(tissue[..., None], (200, 90, 160), (240, 240, 240)).astype(np.uint8)
    return segment_image(rgb, (16.0, 16.0), replace(DEFAULTS, mthresh=3, close=0, a_h=0.05))


def run_ragged(repeats: int, share: float) -> dict[str, float]:
    """Time the contour test, and the reference's algorithm on a share of the candidates."""
    tissue = ragged_tissue()
    size, patch = (120_000, 90_000), 256

    def ours() -> np.ndarray:
        return patch_grid(tissue, patch_px_l0=patch, step_px_l0=patch, slide_size=size)

    coords = ours()
    forget_peak()
    wall, cpu = best_of(repeats, ours)
    peak = peak_mb()
    start = time.perf_counter()
    tested, candidates = reference_test(tissue, patch, share, coords)
    baseline = (time.perf_counter() - start) * candidates / tested
    longest = max(map(len, tissue.contours))
    print(f"contour test: {len(tissue.contours)} outlines (longest {longest} points, "
          f"{tissue.n_holes} holes), {len(coords)} patches of {candidates} candidates\n"
          f"  ours            {wall:8.3f} s wall {cpu:8.3f} s CPU, peak {peak:.0f} MB\n"
          f"  point by point  {baseline:8.1f} s ({tested} candidates timed, all agree): "
          f"{baseline / wall:.0f} x ours\n"
          f"  CLAM            {CLAM_RAGGED_S:8.1f} s on the case of its specification")
    return {"patches": len(coords), "wall_s": wall, "cpu_s": cpu, "point_by_point_s": baseline,
            "peak_mb": peak}


def reference_test(tissue: Tissue, patch: int, share: float, coords: np.ndarray
                   ) -> tuple[int, int]:
    """Test every n-th candidate as the reference does; (tested, candidates).

    Raises ItemFailed when a verdict differs from ours.
    """
    import cv2

    ours = set(map(tuple, coords.tolist()))
    stride = max(1, round(1 / share))
    tested = candidates = 0
    shift = int(patch // 2 * 0.5)
    for contour, holes in zip(tissue.contours, tissue.holes, strict=True):
        left, top = contour.min(axis=0).tolist()
        right, bottom = contour.max(axis=0).tolist()
        corners = [(x, y) for x in range(left, right + 1, patch)
                   for y in range(top, bottom + 1, patch)]
        candidates += len(corners)
        for x, y in corners[::stride]:
            centre = x + patch // 2, y + patch // 2
            points = [(centre[0] + dx, centre[1] + dy)
                      for dx, dy in ((-shift, -shift), (shift, shift), (shift, -shift),
                                     (-shift, shift))]
            kept = any(cv2.pointPolygonTest(contour, point, False) >= 0 for point in points) and (
                not any(cv2.pointPolygonTest(hole, (x + patch / 2, y + patch / 2), False) > 0
                        for hole in holes))
            if kept != ((x, y) in ours):
                raise ItemFailed(f"candidate {x}, {y}: the reference's test says {kept}, ours not")
            tested += 1
    return tested, candidates


if __name__ == "__main__":
    sys.exit(run_script(main))
