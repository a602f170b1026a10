"""The slides of a cross-validation: splits, and the bags that can be used, checked up front.

Bags hold features, patches or images, as the model wants them; the rest is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from datasets.bag_sources import PixelSource, pixel_bags
from datasets.bags import BagDataset, CacheMode
from datasets.features import FeatureStore, StoreCheck
from datasets.image_bags import ImageBags
from datasets.levels import level_stores
from datasets.patch_bags import PatchBags
from datasets.splits import Split, check_split, read_split, split_files, split_notes
from datasets.table import SlideTable, load_table
from datasets.tasks import Task
from utils.errors import Refused
from utils.options import option
from utils.report import Row, Status
from utils.storage import canonical, write_text

Bags = BagDataset | PatchBags | ImageBags
VAL_IS_TEST = ("the test slides are the validation slides too (--val_is_test): the best epoch is "
               "chosen on them, so all figures are optimistic")


@dataclass(frozen=True, kw_only=True)
class CohortOptions:
    """Flags of main.py that say which slides are used, and which features."""

    data_root_dir: Path | None = option(None, help="folder with the feature folders (all models "
                                        "but e2e and streaming)")
    feature_encoder: str | None = option(None, help="which features, where a folder holds those "
                                         "of several encoders")
    child_levels: tuple[int, ...] = option((), low=0, help="finer levels of hag_mil, coarse to "
                                           "fine: features in <folder>_level_<n>_corresponding")
    child_dirs: tuple[Path, ...] = option((), help="feature folders of the finer levels, instead "
                                          "of --child_levels")
    cache: CacheMode = option("auto", help="keep features in memory")
    allow_missing: bool = option(False, help="go on without slides that have no features (or "
                                 "patches, or image)")
    allow_shared_patients: bool = option(False, help="accept splits that divide a patient's slides")
    val_is_test: bool = option(False, help="legacy protocol: the test slides are the validation "
                               "slides too, which makes the figures optimistic; reports say so")
    testing: bool = option(False, help="try out on a tenth of the slides of each class")


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Splits of the folds of a run, and their bags.

    asked: fold -> the slides of its split file, in the order of the table
    splits: fold -> those of them that can be used
    rows: patches of each slide that can be used
    encoder: record of what made the features, None when unknown
    left_out: a row for each slide of the splits that cannot be used
    notes: what is allowed but worth knowing
    val_is_test: the legacy protocol, in which the test slides are the validation slides too; the
    splits stay as they are
    level_rows: patches of each slide on each finer level, coarse to fine
    pixels: where those of the bags come from, and how they are drawn; None where they hold features
    pixel_facts: what they are
    """

    asked: Mapping[int, Split]
    splits: Mapping[int, Split]
    bags: Bags
    rows: Mapping[str, int]
    encoder: dict[str, Any] | None
    left_out: tuple[Row, ...]
    notes: tuple[str, ...]
    val_is_test: bool = False
    level_rows: tuple[Mapping[str, int], ...] = ()
    pixels: PixelSource | None = None
    pixel_facts: Mapping[str, Any] | None = None

    def parts(self, fold: int) -> dict[str, Bags]:
        """Bags of ``train``, ``val`` and ``test``."""
        ids = self.splits[fold].parts()
        if self.val_is_test:
            ids["val"] = ids["test"]
        return {part: (self.bags.training if part == "train" else self.bags.subset)(slides)
                for part, slides in ids.items()}

    def facts(self, fold: int) -> dict[str, Any]:
        """What decides a result: classes, encoder, which slides with which labels, and patches.

        Features that were made anew from other patches show in ``n_patches``, whatever their date.
        """
        table = self.bags.table
        truths = {slide: [table.labels[row], *(table.target_of(row) or ())]
                  for row, slide in enumerate(table.slide_ids)}
        asked = {part: [[slide, *truths.get(slide, [None])] for slide in ids]
                 for part, ids in self.asked[fold].parts().items()}
        left_out = {row.item for row in self.left_out}
        used = [slide for ids in self.splits[fold].parts().values() for slide in ids]
        levels = [sum(rows[slide] for slide in used) for rows in self.level_rows]
        return {**({"val_is_test": True} if self.val_is_test else {}),
                **({"n_patches_of_levels": levels} if levels else {}),
                **({self.pixels.material: {**(self.pixel_facts or {}), **self.pixels.draws}}
                   if self.pixels else {}),
                "class_names": list(table.output_names), "encoder": self.encoder,
                "n_patches": sum(self.rows[slide] for slide in used),
                "slides": hashlib.sha256(canonical(asked).encode()).hexdigest()[:16],
                "left_out": [slide for ids in self.asked[fold].parts().values() for slide in ids
                             if slide in left_out]}

    def origin(self) -> dict[str, Any]:
        """What the bags were made of, for the record of a model."""
        return {"encoder": self.encoder, "patches": None, **(
            {self.pixels.material: self.pixel_facts} if self.pixels else {})}

    def overview(self) -> list[str]:
        """A line a fold: the slides of each part by class."""
        lines = []
        for fold, split in self.splits.items():
            cells = []
            for part, ids in split.parts().items():
                counts = self.bags.table.subset(ids).class_counts()
                by_class = ", ".join(f"{name} {count}" for name, count in zip(
                    self.bags.table.class_names, counts, strict=True))
                cells.append(f"{part} {len(ids)} ({by_class})")
            lines.append(f"fold {fold}: {'; '.join(cells)}")
        return lines

    def write_split(self, folder: Path, fold: int) -> None:
        """Write ``splits_{fold}.csv``, the slides actually used."""
        name = f"splits_{fold}.csv"
        write_text(folder / name, split_files(fold, self.splits[fold], self.bags.table)[name])

    def can_read(self, slide_id: str) -> bool:
        """Can the slide's bag be read now?"""
        return not self.bags.subset([slide_id]).verify()


def load_cohort(
    task: Task, *, split_folder: Path, folds: Iterable[int], embed_dim: int,
    data_root_dir: Path | None = None, pixels: PixelSource | None = None,
    allow_missing: bool = False, testing: bool = False,
    cache: CacheMode = "auto", processes: int = 1, pin: bool = False,
    allow_shared_patients: bool = False, val_is_test: bool = False,
    child_levels: Sequence[int] = (), child_dirs: Sequence[Path] = (),
    feature_encoder: str | None = None,
) -> Cohort:
    """Read and check the table, the splits of ``folds``, and the shape of every feature file.

    data_root_dir: of the features; or pixels: where those of patches or images are
    testing: keep a tenth of the slides of each class in each part, for a try-out
    cache, processes, pin: see ``BagDataset``
    val_is_test: the legacy protocol, in which the test slides are the validation slides too
    child_levels, child_dirs: finer levels of the bags, see ``levels.level_stores``
    feature_encoder: which features, where the folder holds those of several encoders
    Raises ``Refused`` for everything that the table, the splits or the features do wrong.
    """
    table = load_table(task)
    asked = {fold: read_split(split_folder / f"splits_{fold}.csv", table,
                              allow_shared_patients=allow_shared_patients) for fold in folds}
    if testing:
        asked = {fold: Split(*(_tenth(ids, table) for ids in split.parts().values()))
                 for fold, split in asked.items()}
    slides = {slide for split in asked.values() for ids in split.parts().values() for slide in ids}
    wanted = [slide for slide in table.slide_ids if slide in slides]
    bags: Bags
    pixel_facts = None
    if pixels is not None:
        source = pixels.open()
        found = source.check(wanted, allow_missing=allow_missing, table_ids=table.slide_ids)
        bags = pixel_bags(table.subset(found.usable), source, pin=pin, draws=pixels.draws)
        pixel_facts = source.facts()
    else:
        store = feature_store(task, table, data_root_dir, encoder=feature_encoder)
        finer = level_stores(store, child_levels, child_dirs=child_dirs)
        found = store.check(wanted, embed_dim=embed_dim, allow_missing=allow_missing, levels=finer)
        bags = BagDataset(table.subset(found.usable), store, cache=cache, n_bytes=found.n_bytes,
                          processes=processes, pin=pin, embed_dim=embed_dim, level_stores=finer,
                          level_bytes=sum(level.n_bytes for level in found.levels))
    usable = set(found.usable)
    splits = {fold: Split(*(tuple(filter(usable.__contains__, ids))
                            for ids in split.parts().values())) for fold, split in asked.items()}
    return Cohort(asked=asked, splits=splits, bags=bags, rows=found.rows,
                  encoder=found.encoder, left_out=_rows(found), val_is_test=val_is_test,
                  notes=_notes(table, splits, found, val_is_test=val_is_test),
                  level_rows=tuple(level.rows for level in found.levels),
                  pixels=pixels, pixel_facts=pixel_facts)


def feature_store(task: Task, table: SlideTable, data_root: Path | None, *, encoder: str | None
                  ) -> FeatureStore:
    """The features of a task; ``Refused`` when it is not said where they are."""
    if data_root is None:
        raise Refused("--data_root_dir is missing: the folder with the features of "
                      "extract_features_fp.py")
    return FeatureStore.for_task(data_root, task, table, encoder=encoder)


def _notes(table: SlideTable, splits: Mapping[int, Split], found: StoreCheck, *,
           val_is_test: bool) -> tuple[str, ...]:
    notes = [*table.notes, *found.notes, *([VAL_IS_TEST] if val_is_test else [])]
    for fold, split in splits.items():
        check_split(split, table, what=f"fold {fold} without its unusable slides",
                    allow_shared_patients=True)  # judged when the file was read
        notes += [f"fold {fold}: {note}" for note in split_notes(split, table)]
    return tuple(notes)


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
