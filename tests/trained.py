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
from datasets.table import SlideTable, load_table
from datasets.tasks import Task, load_task
from models.slide_models import SlideModelSpec, build_slide_model
from utils.objectives import TaskType
from utils.storage import write_h5

WIDTH = 12
ENCODER = {"name": "test_encoder", "weights_sha256": "a" * 64}


@dataclass(frozen=True)
class Cohort:
    """Where everything lies."""

    root: Path
    table: SlideTable
    spec: SlideModelSpec
    task: Task

    @property
    def models(self) -> Path:
        return self.root / "results" / "exp_s1"

    @property
    def features(self) -> Path:
        return self.root / "features" / "h5_files"

    def flags(self, **other: Any) -> list[str]:
        """Flags of eval.py for this cohort; ``other`` adds or replaces, None takes one out."""
        values = {"data_root_dir": self.root / "features", "results_dir": self.root / "results",
                  "models_exp_code": "exp_s1", "save_exp_code": "e", "k": 2,
                  "csv_path": self.root / "cohort.csv", "device": "cpu",
                  "output_root": self.root / "eval_results", "n_bootstrap": 50,
                  **_task_flags(self.task), **other}
        flags: list[str] = []
        for name, value in values.items():
            if value is True:
                flags.append(f"--{name}")
            elif isinstance(value, tuple):
                flags += [f"--{name}", *map(str, value)]
            elif value is not None:
                flags += [f"--{name}", str(value)]
        return flags


def _task_flags(task: Task) -> dict[str, Any]:
    if task.task_type == "classification":
        return {"label_dict": ",".join(f"{name}:{c}" for name, c in task.label_dict.items())}
    return {"task_type": task.task_type, "label_cols": task.label_cols or None,
            "time_col": task.time_col or None, "event_col": task.event_col or None}


# What each task type predicts of the cohort's csv, and its model
TASKS: dict[str, dict[str, Any]] = {
    "classification": {},
    "multilabel": {"label_cols": ("necrosis", "invasion")},
    "regression": {"label_cols": ("size", "age")},
    "survival": {"time_col": "months", "event_col": "death"}}
SPECS: dict[str, dict[str, Any]] = {
    "multilabel": {"model_type": "abmil", "n_classes": 2},
    "regression": {"model_type": "abmil", "n_classes": 2, "target_mean": (5.0, 60.0),
                   "target_std": (2.0, 9.0)},
    "survival": {"model_type": "abmil", "n_classes": 4, "bin_edges": (0.0, 10.0, 20.0, 30.0, 90.0)}}


def spec_of(n_classes: int = 2, **other: Any) -> SlideModelSpec:
    """A narrow CLAM_SB."""
    return SlideModelSpec(**{"model_type": "clam_sb", "embed_dim": WIDTH,
                             "n_classes": n_classes, **other})


def write_model(folder: Path, fold: int, spec: SlideModelSpec, *, described: bool = True,
                class_names: tuple[str, ...] = ("benign", "cancer"), seed: int = 0,
                **record: Any) -> Path:
    """``s_{fold}_checkpoint.pt`` with seeded weights, and its json when ``described``.

    record: further keys of the json, or other values
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed + fold)
    path = folder / f"s_{fold}_checkpoint.pt"
    torch.save(build_slide_model(spec).state_dict(), path)
    if described:
        path.with_suffix(".json").write_text(json.dumps({
            "spec": asdict(spec), "class_names": list(class_names), "encoder": ENCODER,
            "fold": fold, **record}))
    return path


def write_features(path: Path, features: np.ndarray, *, encoder: dict[str, Any] = ENCODER) -> None:
    """One slide's feature file, as extract_features_fp.py writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coords = np.zeros((len(features), 2), np.int32)
    write_h5(path, {"features": features, "coords": coords}, parameters={"encoder": encoder})


def make_cohort(root: Path, *, n_classes: int = 2, folds: int = 2, slides: int = 24,
                names: list[str] | None = None, task_type: TaskType = "classification",
                **spec: Any) -> Cohort:
    """Slides (two for every third patient) with features that tell their class, splits, models.

    Fold k tests a third of the patients, fold k + 3 the same; ids are ``names`` or s00, s01 ...
    """
    rng = np.random.default_rng(0)
    ids = names or [f"s{number:02d}" for number in range(slides)]
    cases = [f"p{number - (number % 3 == 2)}" for number in range(len(ids))]
    classes = ("benign", "cancer", "other")[:n_classes]
    _, rank = np.unique(cases, return_inverse=True)
    labels = rank % n_classes
    root.mkdir(parents=True, exist_ok=True)
    write_table(root / "cohort.csv", ids, cases, labels, classes)
    named = TASKS[task_type] or {"label_dict": {name: c for c, name in enumerate(classes)}}
    task = load_task(None, csv_path=root / "cohort.csv", task_type=task_type, **named)
    table = load_table(task)
    cohort = Cohort(root, table, spec_of(**{"n_classes": n_classes, "task_type": task_type,
                                            **SPECS.get(task_type, {}), **spec}), task)
    for slide, label in zip(ids, labels, strict=True):
        bag = rng.normal(size=(int(rng.integers(10, 20)), WIDTH)) + 1.5 * label * np.arange(WIDTH)
        write_features(cohort.features / f"{slide}.h5", (bag / WIDTH).astype(np.float32))
    for fold in range(folds):
        write_model(cohort.models, fold, cohort.spec,
                    class_names=task.class_names or task.label_cols)
        third = (rank // n_classes + fold) % 3
        split = Split(*(tuple(slide for slide, place in zip(ids, third, strict=True)
                              if place == part) for part in (0, 1, 2)))
        write_split(cohort.models, fold, split, table)
    return cohort


def write_table(path: Path, ids: list[str], cases: list[str], labels: np.ndarray,
                classes: tuple[str, ...]) -> None:
    """A csv with a class, two labels (one with gaps), two values, and a survival time a slide."""
    rng = np.random.default_rng(1)
    patients = dict.fromkeys(cases)
    months = dict(zip(patients, rng.exponential(24, len(patients)).round(1) + 0.1, strict=True))
    death = dict(zip(patients, (rng.random(len(patients)) < 0.6).astype(int), strict=True))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", "slide_id", "label", "necrosis", "invasion", "size", "age",
                         "months", "death", "weeks", "relapse"])
        for row, (case, slide, label) in enumerate(zip(cases, ids, labels, strict=True)):
            writer.writerow([case, slide, classes[label], label % 2,
                             "" if row % 5 == 4 else row % 2, round(3 * label + rng.normal(), 2),
                             int(rng.integers(40, 80)), months[case], death[case],
                             round(4.35 * months[case], 1), 1 - death[case]])
