"""A small cohort with trained-looking models, as main.py leaves them: for tests of what follows."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.splits import Split, write_split
from datasets.table import SlideTable
from models.slide_models import SlideModelSpec, build_slide_model
from utils.storage import write_h5

WIDTH = 12
ENCODER = {"name": "test_encoder", "weights_sha256": "a" * 64}


@dataclass(frozen=True)
class Cohort:
    """Where everything lies."""

    root: Path
    table: SlideTable
    spec: SlideModelSpec

    @property
    def models(self) -> Path:
        return self.root / "results" / "exp_s1"

    @property
    def features(self) -> Path:
        return self.root / "features" / "h5_files"

    def flags(self, **other: Any) -> list[str]:
        """Flags of eval.py for this cohort; ``other`` adds or replaces, None takes one out."""
        labels = ",".join(f"{name}:{c}" for c, name in enumerate(self.table.class_names))
        values = {"data_root_dir": self.root / "features", "results_dir": self.root / "results",
                  "models_exp_code": "exp_s1", "save_exp_code": "e", "k": 2,
                  "csv_path": self.root / "cohort.csv", "label_dict": labels, "device": "cpu",
                  "output_root": self.root / "eval_results", "n_bootstrap": 50, **other}
        flags: list[str] = []
        for name, value in values.items():
            if value is True:
                flags.append(f"--{name}")
            elif value is not None:
                flags += [f"--{name}", str(value)]
        return flags


def spec_of(n_classes: int = 2, **other: Any) -> SlideModelSpec:
    """A narrow CLAM_SB."""
    return SlideModelSpec(**{"model_type": "clam_sb", "embed_dim": WIDTH,
                             "n_classes": n_classes, **other})


def write_model(folder: Path, fold: int, spec: SlideModelSpec, *, described: bool = True,
                class_names: tuple[str, ...] = ("benign", "cancer"), seed: int = 0) -> Path:
    """``s_{fold}_checkpoint.pt`` with seeded weights, and its json when ``described``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed + fold)
    path = folder / f"s_{fold}_checkpoint.pt"
    torch.save(build_slide_model(spec).state_dict(), path)
    if described:
        path.with_suffix(".json").write_text(json.dumps({
            "spec": asdict(spec), "class_names": list(class_names), "encoder": ENCODER,
            "fold": fold}))
    return path


def write_features(path: Path, features: np.ndarray, *, encoder: dict[str, Any] = ENCODER) -> None:
    """One slide's feature file, as extract_features_fp.py writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coords = np.zeros((len(features), 2), np.int32)
    write_h5(path, {"features": features, "coords": coords}, parameters={"encoder": encoder})


def make_cohort(root: Path, *, n_classes: int = 2, folds: int = 2, slides: int = 24,
                names: list[str] | None = None, **spec: Any) -> Cohort:
    """Slides (two for every third patient) with features that tell their class, splits, models.

    Fold k tests a third of the patients, fold k + 3 the same; ids are ``names`` or s00, s01 ...
    """
    rng = np.random.default_rng(0)
    ids = names or [f"s{number:02d}" for number in range(slides)]
    cases = [f"p{number - (number % 3 == 2)}" for number in range(len(ids))]
    classes = ("benign", "cancer", "other")[:n_classes]
    _, rank = np.unique(cases, return_inverse=True)
    labels = rank % n_classes
    table = SlideTable(tuple(ids), tuple(cases), labels, classes)
    cohort = Cohort(root, table, spec_of(n_classes, **spec))
    root.mkdir(parents=True, exist_ok=True)
    with (root / "cohort.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("case_id", "slide_id", "label"), *(
            (case, slide, classes[label])
            for case, slide, label in zip(cases, ids, labels, strict=True))])
    for slide, label in zip(ids, labels, strict=True):
        bag = rng.normal(size=(int(rng.integers(10, 20)), WIDTH)) + 1.5 * label * np.arange(WIDTH)
        write_features(cohort.features / f"{slide}.h5", (bag / WIDTH).astype(np.float32))
    for fold in range(folds):
        write_model(cohort.models, fold, cohort.spec, class_names=classes)
        third = (rank // n_classes + fold) % 3
        split = Split(*(tuple(slide for slide, place in zip(ids, third, strict=True)
                              if place == part) for part in (0, 1, 2)))
        write_split(cohort.models, fold, split, table)
    return cohort
