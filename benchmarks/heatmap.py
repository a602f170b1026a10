"""Seconds to draw a heatmap, against a plain loop over the patches and the floor.

    python benchmarks/heatmap.py              # about a minute
    python benchmarks/heatmap.py --patches 7787 --repeats 3

A slide of 10,000 px square (levels 1, 4, 16) is drawn on its 10,000 px and its 2,500 px level with
about 7,787 patches that touch and about 31,148 that overlap by half, from file to picture in
memory. Beside it runs, in the same process, the obvious way: float64 maps of the level, one patch
after the other, colours a patch at a time; both pictures must agree. The floor is reading the
level and colouring and blending a picture of that size once. Percentiles are timed against one
``scipy.stats.percentileofscore`` a score. One thread.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks._measure import best_of, forget_peak, peak_mb
from benchmarks._slides import make_slide
from utils.errors import EXIT_OK, ItemFailed, run_script
from utils.options import option, parse
from utils.storage import write_json
from wsi_core.grid import patch_grid
from wsi_core.heatmap import (
    Style,
    View,
    colour_table,
    draw_heatmap,
    fill_tissue,
    patch_boxes,
    percentiles,
    read_view,
)
from wsi_core.presets import DEFAULTS
from wsi_core.slide import open_slide
from wsi_core.tissue import Tissue, segment_tissue

SIDE_PX, PATCH_PX = 10_000, 64
# anchors: CLAM's visHeatmap on 2 shared cores (picture side, patches) -> seconds
CLAM_S = {(2500, 7787): 0.87, (2500, 31148): 1.68, (10_000, 7787): 13.0, (10_000, 31148): 18.3}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    patches: int = option(7787, low=10, help="patches without overlap; four times as many with")
    repeats: int = option(2, low=1, help="runs of each timing; the best counts")
    json: Path | None = option(None, help="also write the figures to this file")


def main() -> int:
    """Run the four cases and the percentiles, and print a line each."""
    options = parse(Options, prog="benchmarks/heatmap.py", config_flag=False,
                    description=__doc__ or "")
    import cv2

    cv2.setNumThreads(1)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="heatmap-") as folder:
        path = make_slide(Path(folder) / "slide.tif", side_px=SIDE_PX)
        for overlap, factor in ((0.0, 1), (0.5, 4)):
            tissue, coords = find_patches(path, overlap, options.patches * factor)
            for level, picture_px in ((1, SIDE_PX // 4), (0, SIDE_PX)):
                name = f"{picture_px} px, {len(coords)} patches"
                anchor = CLAM_S[picture_px, 7787 * factor]
                figures[name] = run_case(path, level, coords, tissue, anchor, options.repeats)
    figures["percentiles"] = run_percentiles(options.patches * 4, options.repeats)
    if options.json:
        write_json(options.json, figures)
    return EXIT_OK


def find_patches(path: Path, overlap: float, wanted: int) -> tuple[Tissue, np.ndarray]:
    """Tissue, and at most ``wanted`` patches of its grid."""
    with open_slide(path) as slide:
        tissue = segment_tissue(slide, DEFAULTS, seg_level=2)
        coords = patch_grid(tissue, patch_px_l0=PATCH_PX, step_px_l0=int(PATCH_PX * (1 - overlap)),
                            slide_size=slide.level_dimensions[0])
    return tissue, coords[:wanted]


def run_case(path: Path, level: int, coords: np.ndarray, tissue: Tissue, anchor_s: float,
             repeats: int) -> dict[str, float]:
    """Time ours, the loop and the floor on one picture."""
    scores = np.random.default_rng(0).random(len(coords))
    style = Style()
    made: dict[str, np.ndarray] = {}

    def ours() -> None:
        with open_slide(path) as slide:
            image, view = read_view(slide, level)
        made["ours"] = draw_heatmap(image, view, scores, coords, style=style, tissue=tissue,
                                    patch_px_l0=(PATCH_PX, PATCH_PX))

    def loop() -> None:
        with open_slide(path) as slide:
            image, view = read_view(slide, level)
        made["loop"] = loop_heatmap(image, view, scores, coords, tissue, style)

    def floor() -> None:
        import cv2

        with open_slide(path) as slide:
            image, _ = read_view(slide, level)
        index = np.zeros(image.shape[:2], np.uint8)
        layer = cv2.applyColorMap(index, colour_table(style.cmap)[:, None, :])
        cv2.addWeighted(layer, style.alpha, image, 1 - style.alpha, 0.0, dst=layer)

    times, peaks = {}, {}
    for name, work in (("ours", ours), ("loop", loop), ("floor", floor)):
        forget_peak()
        times[name], peaks[name] = best_of(repeats, work)[0], peak_mb()
    if not np.array_equal(made["ours"], made["loop"]):
        raise ItemFailed("the picture differs from that of the loop")
    side = made["ours"].shape[1]
    print(f"{side:6d} px, {len(coords):6d} patches: {times['ours']:.2f} s, peak "
          f"{peaks['ours']:.0f} MB; loop {times['loop']:.2f} s, {peaks['loop']:.0f} MB (ratio "
          f"{times['loop'] / times['ours']:.1f}); floor {times['floor']:.2f} s = "
          f"{times['floor'] / times['ours']:.0%}; CLAM {anchor_s} s elsewhere")
    return {"ours_s": times["ours"], "loop_s": times["loop"], "floor_s": times["floor"],
            "floor_share": times["floor"] / times["ours"], "peak_mb": peaks["ours"],
            "loop_peak_mb": peaks["loop"], "clam_s": anchor_s}


def loop_heatmap(image: np.ndarray, view: View, scores: np.ndarray, coords: np.ndarray,
                 tissue: Tissue, style: Style) -> np.ndarray:
    """The obvious way, one patch after the other."""
    import cv2

    boxes = patch_boxes(view, coords, (PATCH_PX, PATCH_PX)).tolist()
    total, count = np.zeros(image.shape[:2]), np.zeros(image.shape[:2])
    for score, (x0, y0, x1, y1) in zip(scores, boxes, strict=True):
        total[y0:y1, x0:x1] += score
        count[y0:y1, x0:x1] += 1
    covered = count > 0
    total[covered] /= count[covered]
    mask, table, layer = fill_tissue(view, tissue) > 0, colour_table(style.cmap), image.copy()
    for x0, y0, x1, y1 in boxes:
        index = np.clip(total[y0:y1, x0:x1] * 256 + 1e-6, 0, 255).astype(np.uint8)
        inside = mask[y0:y1, x0:x1]
        layer[y0:y1, x0:x1][inside] = table[index][inside]
    blended: np.ndarray = cv2.addWeighted(layer, style.alpha, image, 1 - style.alpha, 0.0)
    return blended


def run_percentiles(count: int, repeats: int) -> dict[str, float]:
    """``count`` scores among 10,000 references, and SciPy on 200 of them."""
    from scipy.stats import percentileofscore

    rng = np.random.default_rng(0)
    references, scores = rng.normal(size=10_000), rng.normal(size=count)
    found = percentiles(scores, references)
    ours, _ = best_of(repeats, lambda: percentiles(scores, references))
    expected = [percentileofscore(references, score) for score in scores[:200]]
    theirs, _ = best_of(repeats, lambda: [percentileofscore(references, score)
                                          for score in scores[:200]])
    if not np.allclose(found[:200], expected):
        raise ItemFailed("the percentiles differ from SciPy's")
    each, scipy_each = ours / count * 1e6, theirs / 200 * 1e6
    print(f"percentiles: {each:.2f} us a score, SciPy {scipy_each:.1f} us "
          f"(ratio {scipy_each / each:.0f})")
    return {"us_each": each, "scipy_us_each": scipy_each}


if __name__ == "__main__":
    sys.exit(run_script(main))
