"""Divide the slides of a task into training, validation and test sets, patient by patient.

    python create_splits_seq.py --task task_1_tumor_vs_normal --seed 1 --k 10
    python create_splits_seq.py --task task_2_tumor_subtyping --seed 1 --label_frac 0.5 --k 10
    python create_splits_seq.py --csv_path cohort.csv --label_dict benign:0,cancer:1 --scheme kfold
    python create_splits_seq.py --csv_path cohort.csv --task_type survival \\
        --time_col months --event_col died --k 5 --scheme kfold

Writes splits/<task>_<percent>/splits_{k}.csv, splits_{k}_bool.csv, splits_{k}_descriptor.csv and
the record splits.json. Equal seeds give the files of CLAM, byte for byte (scheme clam).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets.split_folder import SplitFolder
from datasets.splits import (
    LABEL_FRACS,
    Drawing,
    Scheme,
    Subset,
    make_splits,
    split_folder_name,
    split_notes,
)
from datasets.table import SlideTable, load_table
from datasets.tasks import Task, TaskOptions, Voting, load_task
from utils.errors import EXIT_OK, Refused, run_script
from utils.options import option, parse, pick
from utils.storage import canonical, inside


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """Flags of create_splits_seq.py."""

    label_frac: float = option(1.0, help="share of the training labels to keep; 0 or less makes "
                               "0.1, 0.25, 0.5, 0.75 and 1.0", high=1)
    seed: int = option(1, help="seed of the draws", low=0, high=2**32 - 1)
    k: int = option(10, help="number of splits", low=1)
    val_frac: float = option(0.1, help="share of each class's patients for validation",
                             low=0, high=1)
    test_frac: float | None = option(None, help="share of each class's patients for testing, in "
                                     "the scheme clam (default: 0.1)", low=0, high=1)
    patient_voting: Voting | None = option(
        None, help="class of a patient with several slides: highest or most frequent")
    scheme: Scheme = option(
        "clam", help="clam: every split draws its own test set; kfold: each patient is tested once")
    subset: Subset = option("first", help="which labels --label_frac keeps: the first ids (as "
                            "CLAM) or a random choice; smaller shares lie in larger ones")
    slide_level: bool = option(False, help="divide slides, whatever patients they come from")
    custom_test_ids: Path | None = option(
        None, help="text file, one case id (slide id with --slide_level) a line: the test set of "
        "every split")
    splits_root: Path = option(Path("splits"), help="folder that holds the folders of splits")
    split_dir: str | None = option(None, help="folder under --splits_root (default: "
                                   "<task>_<percent of labels>)")
    overwrite: bool = option(False, help="replace splits made with other parameters")


def read_ids(path: Path) -> tuple[str, ...]:
    """Ids from a text file, one a line; ``Refused`` when there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise Refused(f"--custom_test_ids {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise Refused(f"--custom_test_ids {path} is not UTF-8 text: give one id a line") from None
    ids = tuple(line.strip() for line in lines if line.strip())
    if not ids:
        raise Refused(f"--custom_test_ids {path} holds no ids: write one a line")
    return ids


def describe(task: Task, table: SlideTable, drawing: Drawing) -> dict[str, Any]:
    """Everything that decides what the splits are, for the record beside them."""
    classes = table.targets is None
    content = canonical({"slide_ids": table.slide_ids, "case_ids": table.case_ids,
                         "labels": table.labels, **({} if classes else {"targets": table.targets})})
    what = ({"label_col": task.label_col, "label_dict": task.label_dict} if classes else
            {"task_type": task.task_type, "columns": task.truth_columns})
    return {"task": task.name, **what, **asdict(drawing),
            "table_sha256": hashlib.sha256(content.encode()).hexdigest()}


def print_counts(folder: SplitFolder, table: SlideTable) -> None:
    """A line for each split: slides of every class in train/val/test."""
    widths = [max(13, len(name)) for name in table.class_names]
    print("split  " + "  ".join(f"{name:>{width}}" for name, width
                                in zip(table.class_names, widths, strict=True))
          + "   (train/val/test slides)")
    for fold, split in enumerate(folder.splits):
        counts = [table.subset(ids).class_counts() for ids in split.parts().values()]
        cells = ["/".join(map(str, numbers)) for numbers in zip(*counts, strict=True)]
        print(f"{fold:>5}  " + "  ".join(f"{cell:>{width}}" for cell, width
                                         in zip(cells, widths, strict=True)))
        for note in split_notes(split, table):
            print(f"       note: {note}")


def main(argv: Sequence[str] | None = None) -> int:
    """Validate, draw every folder's splits, write what is not there, print the counts."""
    options = parse(Options, prog="create_splits_seq.py", description=__doc__ or "", argv=argv)
    if options.scheme == "kfold" and (options.custom_test_ids or options.test_frac is not None):
        raise Refused("--scheme kfold tests every patient once, 1/k at a time: leave "
                      "--custom_test_ids and --test_frac out")
    if options.scheme == "kfold" and options.k < 2:
        raise Refused("--scheme kfold needs --k 2 or more")
    task = load_task(**pick(TaskOptions, options), patient_voting=options.patient_voting)
    table = load_table(task)
    drawing = Drawing(
        n_splits=options.k, seed=options.seed, val_frac=options.val_frac,
        test_frac=0.1 if options.test_frac is None else options.test_frac, scheme=options.scheme,
        subset=options.subset, patient_voting=task.patient_voting, slide_level=options.slide_level,
        custom_test_ids=read_ids(options.custom_test_ids) if options.custom_test_ids else None)
    folders = []
    for share in LABEL_FRACS if options.label_frac <= 0 else (options.label_frac,):
        name = options.split_dir
        if name is None or options.label_frac <= 0:
            name = split_folder_name(name or task.name, share)
        one = replace(drawing, label_frac=share)
        folders.append(SplitFolder.of(inside(options.splits_root, name), make_splits(table, one),
                                      table, describe(task, table, one)))
    done = [folder.is_done(overwrite=options.overwrite) for folder in folders]
    print(f"{task.name}: {len(table)} slides of {len(set(table.case_ids))} patients")
    for note in table.notes:
        print(f"note: {note}")
    for folder, finished in zip(folders, done, strict=True):
        if not finished:
            folder.write(table, csv_path=task.csv_path)
        print(f"{folder.path}: {options.k} splits {'already done' if finished else 'written'}")
        print_counts(folder, table)
    print("slides were divided whatever their patients" if options.slide_level else
          "checked: no patient is in two parts of a split")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_script(main))
