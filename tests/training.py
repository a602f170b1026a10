"""Small learnable cohorts and toy models for tests of training and evaluation."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils.contracts import Bag, SlideOutput, StepLoss
from utils.objectives import Classification, Objective, TaskType, build_objective

WIDTH = 16

# An objective of every task type, for two outputs (survival: three bins of time)
OBJECTIVES: dict[TaskType, Objective] = {
    "classification": Classification(n_classes=2),
    "multilabel": build_objective(task_type="multilabel", n_outputs=2),
    "regression": build_objective(task_type="regression", n_outputs=2, target_mean=(10.0, 0.0),
                                  target_std=(3.0, 1.0)),
    "survival": build_objective(task_type="survival", n_outputs=3, bin_edges=(0, 10, 20, 40))}
COX = build_objective(task_type="survival", loss="cox", n_outputs=1)


def make_bag(index: int, *, n_classes: int = 2, rows: int = 20, width: int = WIDTH) -> Bag:
    """A bag of class ``index % n_classes`` with a few marked rows, the same at every call."""
    random = np.random.default_rng(index)
    label = index % n_classes
    features = random.normal(size=(rows, width)).astype(np.float32)
    features[:rows // 4, label] += 4
    return Bag(slide_id=f"slide_{index:02}", features=torch.from_numpy(features), label=label,
               case_id=f"case_{index:02}")


def make_task_bag(index: int, task_type: TaskType) -> Bag:
    """A bag whose target of a task type shows in its features, the same at every call."""
    if task_type == "classification":
        return make_bag(index)
    bag = make_bag(index)
    strength = float(np.random.default_rng([7, index]).uniform(0, 4))
    bag.features[:, 2] += strength
    targets: dict[str, tuple[float, ...]] = {
        "multilabel": (float(index % 2), float("nan") if index % 5 == 0 else float(strength > 2)),
        "regression": (10 + 3 * (index % 2), strength),
        "survival": (40 - 9 * strength, float(index % 3 != 0))}
    return replace(bag, label=None, target=targets[task_type])


class ToyModel(nn.Module):
    """Mean pooling with dropout and one linear layer; two losses a bag; a parameter never used."""

    contextual = False

    def __init__(self, *, width: int = WIDTH, n_classes: int = 2, dropout: float = 0.1,
                 objective: Objective | None = None) -> None:
        super().__init__()
        self.objective = objective or Classification(n_classes=n_classes)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, self.objective.n_outputs)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, bag: Bag) -> SlideOutput:
        return SlideOutput(logits=self.head(self.drop(bag.features).mean(dim=0, keepdim=True)))

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        for share in (0.25, 0.75):
            output = self(bag)
            loss = self.objective.loss(output.logits, bag)
            yield StepLoss(value=share * loss, slide_loss=loss.detach(), output=output,
                           parts={"share": torch.tensor(share)})


class BagList(Sequence[Bag]):
    """Bags in memory; those in ``broken`` cannot be read."""

    def __init__(self, bags: Sequence[Bag], *, broken: Sequence[str] = ()) -> None:
        self.bags, self.broken = list(bags), set(broken)

    @property
    def slide_ids(self) -> list[str]:
        return [bag.slide_id for bag in self.bags]

    @property
    def labels(self) -> list[int]:
        return [bag.label or 0 for bag in self.bags]

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        from utils.errors import BrokenFile

        if self.bags[index].slide_id in self.broken:
            raise BrokenFile(f"{self.bags[index].slide_id} is damaged")
        return self.bags[index]


def write_cohort(
    root: Path, *, slides: int = 24, n_classes: int = 2, rows: int = 20, width: int = WIDTH,
    folds: int = 2,
) -> list[str]:
    """A csv, ``pt_files``, and ``splits/cohort_100`` under ``root``.

    Returns the flags of ``main.py`` that use it, with two epochs and little else.
    """
    (root / "features" / "pt_files").mkdir(parents=True)
    (root / "splits" / "cohort_100").mkdir(parents=True)
    bags = [make_bag(index, n_classes=n_classes, rows=rows, width=width)
            for index in range(slides)]
    with (root / "cohort.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case_id", "slide_id", "label"), *(
            (bag.case_id, bag.slide_id, f"class_{bag.label}") for bag in bags)])
    for bag in bags:
        torch.save(bag.features, root / "features" / "pt_files" / f"{bag.slide_id}.pt")
    names = [bag.slide_id for bag in bags]
    part = slides // 4
    for fold in range(folds):
        turned = names[fold * part:] + names[:fold * part]
        columns = (turned[2 * part:], turned[:part], turned[part:2 * part])
        with (root / "splits" / "cohort_100" / f"splits_{fold}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("", "train", "val", "test"), *(
                (row, *(ids[row] if row < len(ids) else "" for ids in columns))
                for row in range(slides - 2 * part))])
    labels = ",".join(f"class_{index}:{index}" for index in range(n_classes))
    return ["--csv_path", str(root / "cohort.csv"), "--label_dict", labels,
            "--data_root_dir", str(root / "features"), "--splits_root", str(root / "splits"),
            "--embed_dim", str(width), "--k", str(folds), "--max_epochs", "2",
            "--results_dir", str(root / "results"), "--exp_code", "run", "--device", "cpu"]
