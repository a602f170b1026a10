"""Overviews and their masks, to train a tissue network: the table, the hold-out, the reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.tissue_masks import read_scaled
from utils.errors import ItemFailed, Refused
from utils.storage import read_table
from wsi_core.mask_files import read_mask, resample_mask
from wsi_core.slide import open_slide
from wsi_core.slide_mpp import MAX_MPP_UM, MIN_MPP_UM


@dataclass(frozen=True, kw_only=True)
class TissuePair:
    """A row of the table.

    image: slide or overview picture; mask: PNG, or GeoJSON in level-0 px of the image
    mpp_um: um per level-0 px of the image, None = as the file says
    patient: images of one patient are held out together
    """

    image: Path
    mask: Path
    mpp_um: float | None
    patient: str


@dataclass(frozen=True)
class Example:
    """A pair at the network's scale. rgb: (h, w, 3) uint8; mask: (h, w) bool, True = tissue."""

    rgb: np.ndarray
    mask: np.ndarray


def read_pairs(path: Path) -> list[TissuePair]:
    """Rows of a csv with columns image, mask and, if you like, mpp and patient.

    Relative paths start at the csv's folder; without a patient every image is its own. Raises
    Refused: no such columns, empty cells, an mpp that is no pixel size, an image given twice.
    """
    table = read_table(path, what="--pairs")
    for column in ("image", "mask"):
        if column not in table:
            raise Refused(f"--pairs {path} has no column '{column}': it has "
                          f"{', '.join(table.columns)}")
    pairs: list[TissuePair] = []
    for number, cells in enumerate(table.to_dict("records"), start=2):
        where = f"--pairs {path} line {number}"
        if not cells["image"] or not cells["mask"]:
            raise Refused(f"{where}: image or mask is empty")
        pairs.append(TissuePair(
            image=path.parent / cells["image"], mask=path.parent / cells["mask"],
            mpp_um=_mpp(cells.get("mpp", ""), where),
            patient=cells.get("patient", "") or cells["image"]))
    images = [pair.image for pair in pairs]
    twice = next((image for image in images if images.count(image) > 1), None)
    if twice is not None:
        raise Refused(f"--pairs {path} has the image {twice} twice: leave one row out")
    return pairs


def _mpp(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not MIN_MPP_UM <= value <= MAX_MPP_UM:
        raise Refused(f"{where}: mpp is {text!r}, um per pixel from {MIN_MPP_UM} to "
                      f"{MAX_MPP_UM:g} was expected")
    return value


def hold_out(pairs: Sequence[TissuePair], *, fraction: float, seed: int
             ) -> tuple[list[TissuePair], list[TissuePair]]:
    """(training, held-out) pairs, by patient; at least one patient each, or ``Refused``."""
    patients = sorted({pair.patient for pair in pairs})
    if len(patients) < 2:
        raise Refused(f"--pairs has images of {len(patients)} patient(s): two or more are needed, "
                      "one of them to test on")
    count = min(len(patients) - 1, max(1, round(fraction * len(patients))))
    order = np.random.default_rng(seed).permutation(len(patients))
    held = {patients[index] for index in order[:count]}
    return ([pair for pair in pairs if pair.patient not in held],
            [pair for pair in pairs if pair.patient in held])


def load_example(pair: TissuePair, *, mpp_um: float) -> Example:
    """Image and mask at ``mpp_um``. Raises SlideError, BrokenFile; ItemFailed: scale unknown."""
    with open_slide(pair.image) as slide:
        if pair.mpp_um is None and slide.mpp_um is None:
            raise ItemFailed(f"{pair.image}: pixel size unknown "
                             f"({slide.mpp_problem or 'the file gives none'}): put um per pixel "
                             "into a column 'mpp' of --pairs")
        mask = read_mask(pair.mask, slide_size=slide.level_dimensions[0]).mask
        rgb = read_scaled(slide, mpp_um, slide_mpp=pair.mpp_um)
    return Example(rgb, resample_mask(mask, (rgb.shape[1], rgb.shape[0])))


def overlap(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(IoU, F1) of two (h, w) bool masks; both 1 when neither has tissue."""
    both, either = int((mask & truth).sum()), int((mask | truth).sum())
    if either == 0:
        return 1.0, 1.0
    return both / either, 2 * both / (both + either)
