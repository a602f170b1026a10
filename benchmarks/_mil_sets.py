"""The classical MIL sets: one .npz a set, its bags, folds over bags, standardised instances."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.splits import draw_kfold
from utils.contracts import Bag
from utils.errors import Refused

CLIP = 3.0  # standard deviations: the image sets have rare columns with values up to 40 of them
LAYOUT = "X (instances, dims), bag (an id an instance), y (a label a bag, in the order of the ids)"


@dataclass(frozen=True)
class MilSet:
    """One set. bags: of each bag its instances (n, dims) float32; labels: (bags,) from 0."""

    name: str
    bags: list[np.ndarray]
    labels: np.ndarray

    @property
    def n_classes(self) -> int:
        """How many labels there are."""
        return int(self.labels.max()) + 1

    @property
    def dims(self) -> int:
        """Width of an instance."""
        return int(self.bags[0].shape[1])


def find_sets(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of the sets asked for, of all when none is; ``Refused`` when one is not there."""
    found = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    if not found:
        raise Refused(f"{folder} holds no .npz file: give the folder of the sets with --data, "
                      f"each with {LAYOUT}")
    unknown = [name for name in names if name not in found]
    if unknown:
        raise Refused(f"--sets {unknown[0]}: {folder} holds {', '.join(found)}")
    return [found[name] for name in names or found]


def read_set(path: Path) -> MilSet:
    """A set from its file; ``Refused`` when that has another layout or numbers not finite."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x, ids, y = (file[key] for key in ("X", "bag", "y"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise Refused(f"{path} is not a MIL set ({error}): expected {LAYOUT}") from None
    names, rows = np.unique(ids, return_inverse=True)
    fits = x.ndim == 2 and x.size and ids.shape == x.shape[:1] and y.shape == names.shape
    if not fits or x.dtype.kind not in "biuf":
        raise Refused(f"{path} has X {x.shape} of {x.dtype}, bag {ids.shape} with {len(names)} "
                      f"ids, y {y.shape}: expected {LAYOUT}")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise Refused(f"{path} holds numbers that are not finite, first in row "
                      f"{int(np.argmin(np.isfinite(x).all(axis=1)))} of X")
    classes, labels = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise Refused(f"{path} has bags of one label only: nothing can be learnt")
    return MilSet(path.stem, [x[rows == bag] for bag in range(len(names))], labels)


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> Iterator[tuple[np.ndarray,
                                                                                  np.ndarray]]:
    """(training, test) bags of each fold, stratified by label; each bag is tested once."""
    class_ids = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    for train, _, test in draw_kfold(class_ids, val_num=[0] * len(class_ids), n_splits=folds,
                                     seed=seed):
        yield train, test


def standardised(data: MilSet, train: np.ndarray) -> list[Bag]:
    """All bags in standard deviations from the mean of the training instances, up to ``CLIP``.

    A column that is constant in training is only centred.
    """
    import torch

    seen = np.concatenate([data.bags[bag] for bag in train]).astype(np.float64)
    mean, deviation = seen.mean(axis=0), seen.std(axis=0)
    deviation[deviation < 1e-6] = 1.0
    return [Bag(slide_id=f"{data.name}_{bag}", label=int(label), features=torch.from_numpy(
                ((rows - mean) / deviation).clip(-CLIP, CLIP).astype(np.float32)))
            for bag, (rows, label) in enumerate(zip(data.bags, data.labels, strict=True))]
