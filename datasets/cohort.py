"""The slides of a cross-validation: splits, and the bags that can be used, checked up front."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from datasets.bags import BagDataset, CacheMode
from datasets.features import FeatureStore, StoreCheck
from datasets.splits import Split, check_split, read_split, split_files, split_notes
from datasets.table import SlideTable, load_table
from datasets.tasks import Task
from utils.errors import Refused
from utils.report import Row, Status
from utils.storage import canonical, write_text


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Splits of the folds of a run, and their bags.

    asked: fold -> the slides of its split file, in the order of the table
    splits: fold -> those of them that can be used
    rows: patches of each slide that can be used
    encoder: record of what made the features, None when unknown
    left_out: a row for each slide of the splits that cannot be used
    notes: what is allowed but worth knowing
    """

    asked: Mapping[int, Split]
    splits: Mapping[int, Split]
    bags: BagDataset
    rows: Mapping[str, int]
    encoder: dict[str, Any] | None
    left_out: tuple[Row, ...]
    notes: tuple[str, ...]

    def parts(self, fold: int) -> dict[str, BagDataset]:
        """Bags of ``train``, ``val`` and ``test``."""
        return {part: self.bags.subset(ids) for part, ids in self.splits[fold].parts().items()}

    def facts(self, fold: int) -> dict[str, Any]:
        """What decides a result: classes, encoder, which slides with which labels, and patches.

        Features that were made anew from other patches show in ``n_patches``, whatever their date.
        """
        labels = dict(zip(self.bags.table.slide_ids, self.bags.table.labels, strict=True))
        asked = {part: [[slide, labels.get(slide)] for slide in ids]
                 for part, ids in self.asked[fold].parts().items()}
        left_out = {row.item for row in self.left_out}
        used = [slide for ids in self.splits[fold].parts().values() for slide in ids]
        return {"class_names": list(self.bags.table.class_names), "encoder": self.encoder,
                "n_patches": sum(self.rows[slide] for slide in used),
                "slides": hashlib.sha256(canonical(asked).encode()).hexdigest()[:16],
                "left_out": [slide for ids in self.asked[fold].parts().values() for slide in ids
                             if slide in left_out]}

    def write_split(self, folder: Path, fold: int) -> None:
        """Write ``splits_{fold}.csv``, the slides actually used."""
        name = f"splits_{fold}.csv"
        write_text(folder / name, split_files(fold, self.splits[fold], self.bags.table)[name])

    def can_read(self, slide_id: str) -> bool:
        """Can the slide's bag be read now?"""
        return not self.bags.subset([slide_id]).verify()


def find_split_folder(root: Path, name: str, *, task: Task) -> Path:
    """``root/name``, or ``name`` as a path; ``Refused`` with the command that makes it."""
    for path in (root / name, Path(name)):
        if path.is_dir():
            return path
    labels = ",".join(f"{label}:{index}" for label, index in task.label_dict.items())
    raise Refused(f"split folder {root / name} does not exist: make it with python "
                  f"create_splits_seq.py --task {task.name} (or --csv_path {task.csv_path} "
                  f"--label_dict {labels}), or name one with --split_dir")


def load_cohort(
    task: Task, *, data_root: Path, split_folder: Path, folds: Iterable[int], embed_dim: int,
    allow_missing: bool = False, tenth: bool = False, cache: CacheMode = "auto",
    processes: int = 1, pin: bool = False,
) -> Cohort:
    """Read and check the table, the splits of ``folds``, and the shape of every feature file.

    tenth: keep a tenth of the slides of each class in each part, for a try-out
    cache, processes, pin: see ``BagDataset``
    Raises ``Refused`` for everything that the table, the splits or the features do wrong.
    """
    table = load_table(task)
    asked = {fold: read_split(split_folder / f"splits_{fold}.csv", table) for fold in folds}
    if tenth:
        asked = {fold: Split(*(_tenth(ids, table) for ids in split.parts().values()))
                 for fold, split in asked.items()}
    wanted = {slide for split in asked.values() for ids in split.parts().values() for slide in ids}
    store = FeatureStore.for_task(data_root, task, table)
    found = store.check([slide for slide in table.slide_ids if slide in wanted],
                        embed_dim=embed_dim, allow_missing=allow_missing)
    usable = set(found.usable)
    splits = {fold: Split(*(tuple(filter(usable.__contains__, ids))
                            for ids in split.parts().values())) for fold, split in asked.items()}
    notes = [*table.notes, *found.notes]
    for fold, split in splits.items():
        check_split(split, table, what=f"fold {fold} without its unusable slides",
                    allow_shared_patients=True)  # judged when the file was read
        notes += [f"fold {fold}: {note}" for note in split_notes(split, table)]
    bags = BagDataset(table.subset(found.usable), store, cache=cache, n_bytes=found.n_bytes,
                      processes=processes, pin=pin, embed_dim=embed_dim)
    return Cohort(asked=asked, splits=splits, bags=bags, rows=found.rows,
                  encoder=found.encoder, left_out=_rows(found), notes=tuple(notes))


def _tenth(slide_ids: tuple[str, ...], table: SlideTable) -> tuple[str, ...]:
    """The first tenth of the slides of each class, at least one."""
    by_class: dict[int, list[str]] = {}
    for slide in slide_ids:
        by_class.setdefault(int(table.labels[table.row_of[slide]]), []).append(slide)
    kept = {slide for ids in by_class.values() for slide in ids[:ceil(len(ids) / 10)]}
    return tuple(filter(kept.__contains__, slide_ids))


def _rows(found: StoreCheck) -> tuple[Row, ...]:
    kinds = ((Status.EMPTY, found.left_out()), (Status.FAILED, found.failures))
    return tuple(Row(item=slide, status=status, reason=reason)
                 for status, slides in kinds for slide, reason in slides.items())
