"""Tissue masks of the classical segmenters against outlines drawn by hand, and their seconds.

    python benchmarks/tissue.py --data ../shared/data
    python benchmarks/tissue.py --data ../shared/data --out /tmp/overlays   # pictures too
    python benchmarks/tissue.py --data ../shared/data --mpp 8   # at the kit's scale, where known

Ten real images (``tissue_truth/README.md`` says what the labels are worth). Every way of finding
tissue sees the same pixels, at the size of the drawn mask, and every mask goes through the same
outlines and area filter (``LEAST_PX``). Pixels drawn as doubtful, and tissue under ink, count for
nobody. ``clam`` has CLAM's default preset, whose numbers are also those of AtlasPatch's benchmark
of CLAM (threshold 8, median 7, close 4); ``clam, own areas`` keeps CLAM's area filter too (100 and
16 squares of 512 px), with level 0 at 0.25 um per px. CLAM's kernels are pixels, those of the
others um: without ``--mpp`` CLAM profits from drawn masks that are finer than the kit's 8 um.

"Cut by leave-one-out" chooses the cut of a segmenter's sureness for each image on all the others.
It speaks of the cut alone: constants of ``stain`` were chosen on these very images. "Second
drawing" is the mean F1 against masks drawn again without sight of the first, of nine images.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import numpy as np

from utils.errors import EXIT_OK, Refused, run_script
from utils.options import option, parse
from utils.storage import write_json
from wsi_core.presets import DEFAULTS, PatchingParameters
from wsi_core.tissue import UNIT_AREA_PX_L0, outline_tissue, tissue_mask

TRUTH = Path(__file__).parent / "tissue_truth"
GLASS, INK, DOUBTFUL, INK_ON_TISSUE, TISSUE = 0, 64, 128, 192, 255  # labels of the drawn masks
LEAST_PX = 64  # smallest piece and smallest hole, for all alike
USUAL_MPP, LEVEL_0_MPP = 8.0, 0.25  # where an image does not say, for CLAM's own areas
CUTS = tuple(np.round(np.arange(0.2, 0.85, 0.05), 2).tolist())  # that leave-one-out chooses from

# name of the drawn mask: file in the data folder, um per px of its level 0 (None = unknown)
IMAGES: dict[str, tuple[str, float | None]] = {
    "biopsies_mpp1_3levels": ("slides/biopsies_mpp1_3levels.tif", 0.987),
    "breast_crop_6levels_badmpp": ("slides/breast_crop_6levels_badmpp.tiff", None),
    "cmu_1_macro": ("slides/cmu_1_small_region.svs", None),
    "cmu_1_small_region": ("slides/cmu_1_small_region.svs", 0.499),
    "diagnostic_thumb": ("overviews/diagnostic_thumb.png", None),
    "dicom_camelyon_overview_a": ("slides/dicom_camelyon_overview_a/1.dcm", 28.969),
    "he_two_pieces": ("overviews/he_two_pieces.jpg", None),
    "rat_kidney_he": ("overviews/rat_kidney_he.jpg", None),
    "tcga_red_pen": ("overviews/tcga_red_pen.png", None),
    "tma_spots": ("overviews/tma_spots.jpg", None)}

Sureness = Callable[[np.ndarray, float | None], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    data: Path = option(ROOT.parent / "shared" / "data", help="folder with overviews and slides")
    out: Path | None = option(None, help="write overlays (PNG) to this folder")
    json: Path | None = option(None, help="also write the figures to this file")
    mpp: float | None = option(None, low=0.25, high=64, help="um per px to segment at, of images "
                               "whose scale is known and finer; default: as they were drawn on")
    sam2: Path | None = option(None, help="weights of SAM2, to score it too (CPU)")
    repeats: int = option(3, low=1, help="runs of each timing; the fastest counts")


@dataclass(frozen=True, kw_only=True)
class Case:
    """An image and what was drawn on it.

    rgb: (h, w, 3) uint8; mpp_um: its um per px, None when unknown; truth: (h, w) uint8 labels;
    second: those of the second drawing, None where there is none
    """

    name: str
    rgb: np.ndarray
    mpp_um: float | None
    truth: np.ndarray
    second: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of finding tissue: how sure it is, the cut, and what it takes off."""

    name: str
    sureness: Sureness
    own_areas: bool = False
    has_cut: bool = True
    without: tuple[str, ...] = ()


def main() -> int:
    """Score every way on every image; print the tables."""
    options = parse(Options, prog="benchmarks/tissue.py", config_flag=False,
                    description=__doc__ or "")
    import cv2

    cv2.setNumThreads(1)
    tried = ways(options.sam2, mpp_um=options.mpp)
    cases = [load_case(name, options.data) for name in IMAGES]
    rejected = {case.name: rejections(case) for case in cases}
    rows = []
    for way in tried:
        for case in cases:
            scores = run(way, case, rejected[case.name], repeats=options.repeats, out=options.out)
            rows.append({"way": way.name, "image": case.name, **scores})
    print_tables(rows, cases)
    print_rejected(cases, rejected)
    print_agreement(cases)
    if options.json:
        write_json(options.json, rows)
    return EXIT_OK


def load_case(name: str, data: Path) -> Case:
    """The image at the size of its drawn mask; ``Refused`` when the file is not there."""
    import cv2

    truth = cv2.imread(str(TRUTH / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
    again = TRUTH / "second" / f"{name}.png"
    second = cv2.imread(str(again), cv2.IMREAD_GRAYSCALE) if again.exists() else None
    if truth is None:
        raise Refused(f"{TRUTH / name}.png is not there: it belongs to the repository")
    file, mpp = IMAGES[name]
    if not (data / file).exists():
        raise Refused(f"{data / file} is not there: give the folder of overviews/ and slides/ "
                      "with --data")
    rgb = read_rgb(data / file, macro=name.endswith("_macro"))
    scale = rgb.shape[1] / truth.shape[1]
    rgb = cv2.resize(rgb, truth.shape[::-1], interpolation=cv2.INTER_AREA)
    return Case(name=name, rgb=rgb, mpp_um=mpp and mpp * scale, truth=truth, second=second)


def read_rgb(path: Path, *, macro: bool) -> np.ndarray:
    """The whole of level 0, or the scanner's picture of the whole glass, (h, w, 3) uint8."""
    if macro:
        import openslide

        with openslide.OpenSlide(path) as slide:
            return np.array(slide.associated_images["macro"].convert("RGB"))
    from wsi_core.slide import WHITE, open_slide, read_overview

    with open_slide(path) as opened:
        return read_overview(opened, 1.0, background=WHITE)[0]


# ---------------------------------------------------------------------------- ways

def ways(sam2: Path | None = None, *, mpp_um: float | None = None) -> list[Way]:
    """CLAM's segmentation and ours, plain and with what pen and artefact rejection take off.

    sam2: weights, to have SAM2 too; mpp_um: the scale that images are reduced to, where known.
    """
    from wsi_core.segmenters import SEGMENTERS

    def clam(parameters: PatchingParameters) -> Sureness:
        return lambda rgb, mpp_um: tissue_mask(rgb, parameters) / np.float32(255)

    def registered(name: str) -> Sureness:
        return lambda rgb, mpp_um: SEGMENTERS.get(name)(rgb, mpp_um=mpp_um)

    found = [Way(name="clam, own areas", sureness=clam(DEFAULTS), own_areas=True, has_cut=False)]
    biopsy = replace(DEFAULTS, sthresh=15, mthresh=11, close=2)
    plain = [Way(name="clam", sureness=clam(DEFAULTS), has_cut=False),
             Way(name="clam, biopsy preset", sureness=clam(biopsy), has_cut=False),
             Way(name="clam, use_otsu", sureness=clam(replace(DEFAULTS, use_otsu=True)),
                 has_cut=False),
             *(Way(name=name, sureness=registered(name)) for name in SEGMENTERS)]
    if sam2:
        plain.append(Way(name="sam2", sureness=learned(sam2)))
    for way in plain:
        found += [way, replace(way, name=f"{way.name} - pen", without=("pen",)),
                  replace(way, name=f"{way.name} - pen, artefacts", without=("pen", "artefacts"))]
    return [replace(way, sureness=at_scale(way.sureness, mpp_um)) for way in found]


def learned(checkpoint: Path) -> Sureness:
    """SAM2 with the user's weights, on one thread of the CPU."""
    import torch

    from models.tissue_networks import load_tissue_predictor

    torch.set_num_threads(1)
    predictor = load_tissue_predictor("sam2", checkpoint, device="cpu")
    return lambda rgb, mpp_um: predictor.predict([rgb])[0]


def at_scale(sureness: Sureness, wanted_um: float | None) -> Sureness:
    """The same on the image reduced to that many um per px, where it is known to be finer."""
    import cv2

    def reduced(rgb: np.ndarray, mpp_um: float | None) -> np.ndarray:
        if wanted_um is None or mpp_um is None or mpp_um >= wanted_um:
            return sureness(rgb, mpp_um)
        height, width = rgb.shape[:2]
        size = tuple(max(1, round(side * mpp_um / wanted_um)) for side in (width, height))
        sure = sureness(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), wanted_um)
        return cv2.resize(sure, (width, height), interpolation=cv2.INTER_NEAREST)

    return reduced


def rejections(case: Case) -> dict[str, np.ndarray]:
    """(h, w) bool of what each rejection takes off."""
    from wsi_core.artefacts import reject_artefacts, reject_pen

    return {"pen": reject_pen(case.rgb, mpp_um=case.mpp_um),
            "artefacts": reject_artefacts(case.rgb, mpp_um=case.mpp_um)}


def run(way: Way, case: Case, rejected: dict[str, np.ndarray], *, repeats: int, out: Path | None
        ) -> dict[str, Any]:
    """Scores of one way on one image, its CPU seconds, and its F1 at every cut."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        sure = way.sureness(case.rgb, case.mpp_um)
        seconds.append(time.process_time() - start)

    def at(cut: float) -> np.ndarray:
        mask = sure >= cut
        for name in way.without:
            mask = mask & ~rejected[name]
        return filtered(mask, way, case.mpp_um)

    found = at(0.5)
    if out:
        save_overlay(out / f"{case.name} {way.name}.png", case, found)
    cuts = [scores(at(cut), case.truth)["F1"] for cut in CUTS] if way.has_cut else []
    again = None if case.second is None else scores(found, case.second)["F1"]
    return {**scores(found, case.truth), "F1 second drawing": again, "seconds": min(seconds),
            "F1 at cuts": cuts}


def filtered(mask: np.ndarray, way: Way, mpp_um: float | None) -> np.ndarray:
    """(h, w) bool: the mask after the kit's outlines and area filter, as the lattice sees it."""
    from wsi_core.lattice import TissueArea

    height, width = mask.shape
    scale, parameters = 1.0, replace(DEFAULTS, a_t=LEAST_PX / UNIT_AREA_PX_L0,
                                     a_h=LEAST_PX / UNIT_AREA_PX_L0, max_n_holes=10**6)
    if way.own_areas:
        scale, parameters = (mpp_um or USUAL_MPP) / LEVEL_0_MPP, DEFAULTS
    tissue = outline_tissue(mask, (scale, scale), parameters)
    size = (round(width * scale), round(height * scale))
    area = TissueArea.of(tissue, slide_size=size, cell_px_l0=(16 * scale, 16 * scale))
    drawn: np.ndarray = np.diff(np.diff(area.table, axis=0), axis=1) > 0.5
    return drawn


def scores(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """IoU, F1, precision and recall over the pixels that were drawn without doubt."""
    tissue, glass = truth == TISSUE, (truth == GLASS) | (truth == INK)
    right, wrong = int((found & tissue).sum()), int((found & glass).sum())
    missed = int((tissue & ~found).sum())
    return {"IoU": right / max(1, right + wrong + missed),
            "F1": 2 * right / max(1, 2 * right + wrong + missed),
            "precision": right / max(1, right + wrong), "recall": right / max(1, right + missed)}


# ---------------------------------------------------------------------------- what is shown

def save_overlay(path: Path, case: Case, found: np.ndarray) -> None:
    """The image, with what is too much in red and what is missing in blue."""
    from PIL import Image

    tissue, glass = case.truth == TISSUE, (case.truth == GLASS) | (case.truth == INK)
    picture = case.rgb // 2 + 100
    picture[found & glass] = (255, 0, 0)
    picture[tissue & ~found] = (0, 0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def print_tables(rows: Sequence[dict[str, Any]], cases: Sequence[Case]) -> None:
    """Means over the images as markdown, then F1 of every image."""
    names = list(dict.fromkeys(row["way"] for row in rows))
    own = {name: [row for row in rows if row["way"] == name] for name in names}
    columns = ("IoU", "F1", "precision", "recall")
    print(f"| mean of {len(cases)} | {' | '.join(columns)} | median F1 | lowest F1 | ms CPU | F1, "
          f"cut by leave-one-out | F1, second drawing |\n|---|{'---|' * 9}")
    for name in names:
        means = " | ".join(f"{np.mean([row[column] for row in own[name]]):.3f}"
                           for column in columns)
        milliseconds = 1e3 * np.mean([row["seconds"] for row in own[name]])
        f1 = [row["F1"] for row in own[name]]
        again = np.mean([row["F1 second drawing"] for row in own[name]
                         if row["F1 second drawing"] is not None])
        print(f"| {name} | {means} | {np.median(f1):.3f} | {min(f1):.3f} | {milliseconds:.0f} | "
              f"{left_out([row['F1 at cuts'] for row in own[name]])} | {again:.3f} |")
    print(f"\n| F1 | {' | '.join(case.name for case in cases)} |\n|---|{'---|' * len(cases)}")
    for name in names:
        each = " | ".join(f"{row['F1']:.3f}" for row in own[name])
        print(f"| {name} | {each} |")


def left_out(curves: Sequence[Sequence[float]]) -> str:
    """Mean F1 when the cut of each image is the best one of the others."""
    if not curves[0]:
        return "-"
    table = np.array(curves)
    others = (table.sum(0) - table) / (len(table) - 1)
    return f"{np.mean(table[np.arange(len(table)), others.argmax(1)]):.3f}"


def print_rejected(cases: Sequence[Case], rejected: dict[str, dict[str, np.ndarray]]) -> None:
    """What the rejections take of tissue, of ink on glass and of ink on tissue."""
    print("\n| taken off | of tissue, pen | artefacts | of ink on glass, pen | of ink on tissue, "
          f"pen |\n|---|{'---|' * 4}")
    for case in cases:
        shares = [_share(rejected[case.name][kind], case.truth == label) for kind, label in
                  (("pen", TISSUE), ("artefacts", TISSUE), ("pen", INK), ("pen", INK_ON_TISSUE))]
        print(f"| {case.name} | {' | '.join(shares)} |")


def print_agreement(cases: Sequence[Case]) -> None:
    """F1 of the two drawings where neither doubts, and how much of the tissue one of them does."""
    print(f"\n| two drawings | F1 where both are sure | tissue of one, doubtful in the other |\n"
          f"|---|{'---|' * 2}")
    for case in cases:
        if case.second is not None:
            f1, doubted = agreement(case.truth, case.second)
            print(f"| {case.name} | {f1:.3f} | {100 * doubted:.0f} % |")


def agreement(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """F1 of two drawings where both are sure; of what either calls tissue, the share in doubt."""
    sure = (TISSUE, GLASS, INK)
    both = np.isin(first, sure) & np.isin(second, sure)
    one, other = first == TISSUE, second == TISSUE
    f1 = 2 * (one & other).sum() / max(1, (one & both).sum() + (other & both).sum())
    return float(f1), float(((one | other) & ~both).sum() / max(1, (one | other).sum()))


def _share(taken: np.ndarray, of: np.ndarray) -> str:
    return f"{100 * taken[of].mean():.1f} %" if of.any() else "-"


if __name__ == "__main__":
    sys.exit(run_script(main))
