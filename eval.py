"""Evaluate trained slide models: figures with intervals, plots, and a report to open.

    python eval.py --task task_1_tumor_vs_normal --data_root_dir features --k 10 \\
        --models_exp_code tumor_sb_s1 --save_exp_code tumor_sb
    python eval.py --fold 3 --split val --models_exp_code tumor_sb_s1 --save_exp_code val_3 ...
    python eval.py --split all --csv_path other_cohort.csv --label_dict benign:0,cancer:1 ...

Writes eval_results/EVAL_<code>/: fold_{k}.csv and summary.csv as CLAM does (its columns are called
test_* whatever the split, and -1 stands for an AUC that is not defined), metrics.json (null there,
with a reason), plots/, report.html, report_eval.csv. Some of the folds only: the names get
_partial_{first}_{last}. Checkpoints of CLAM work too: give --model_type, --model_size, --embed_dim.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from datasets.bags import BagDataset
from datasets.features import FeatureStore, StoreCheck
from datasets.splits import read_split
from datasets.table import SlideTable, load_table
from datasets.tasks import Task, TaskOptions, load_task
from models.slide_models import SLIDE_MODELS
from models.trained import TrainedModel, load_trained
from utils.devices import Precision, check_precision, pick_device
from utils.errors import EXIT_OK, Refused, run_script
from utils.evaluation import Evaluation, Measuring, evaluate_predictions, pool_tests, predict_fold
from utils.evaluation_files import (
    Findings,
    find_finished,
    name_files,
    summary_lines,
    write_evaluation,
)
from utils.folds import fold_range
from utils.options import option, parse, resolved
from utils.report import Row, RunReport, Status
from utils.storage import inside, safe_id, writable_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """Flags of eval.py."""

    data_root_dir: Path = option(help="folder with the feature folders")
    models_exp_code: str = option(help="folder of the trained models in --results_dir, with _s1")
    save_exp_code: str = option(help="name of the evaluation")
    results_dir: Path = option(Path("results"), help="folder that holds the folders of models")
    splits_dir: Path | None = option(None, help="folder with splits_{k}.csv (default: the models')")
    feature_dir: str | None = option(None, help="sub-folder of --data_root_dir with the features")
    split: Literal["train", "val", "test", "all"] = option(
        "test", help="part to evaluate; all = the whole table, which needs no split files")
    k: int = option(10, help="number of folds", low=1)
    k_start: int = option(-1, help="first fold; -1 = 0", low=-1)
    k_end: int = option(-1, help="fold after the last; -1 = k", low=-1)
    fold: int = option(-1, help="this fold only; -1 = the range", low=-1)
    micro_average: bool = option(False, help="more than two classes: one AUC over all (slide, "
                                 "class) pairs instead of the mean over the classes")
    model_type: str | None = option(
        None, choices=list(SLIDE_MODELS), help="this and the next three are read from "
        "s_{k}_checkpoint.json where it exists, else they are clam_sb, small, 0.25, 1024")
    model_size: Literal["small", "big"] | None = option(None, help="width of the attention")
    drop_out: float | None = option(None, help="dropout of the training", low=0, high=0.99,
                                    bare=0.25)
    embed_dim: int | None = option(None, help="width of the features", low=1)
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    precision: Precision = option("fp32", help="precision of the forward pass")
    n_bootstrap: int = option(1000, help="resamples of patients for the intervals; 0 = none",
                              low=0, high=1_000_000)
    seed: int = option(1, help="seed of the resampling", low=0)
    output_root: Path = option(Path("eval_results"), help="folder that gets EVAL_<code>")
    allow_missing: bool = option(False, help="go on without slides that have no features")
    allow_shared_patients: bool = option(False, help="accept splits that divide a patient's slides")
    no_report: bool = option(False, help="neither plots nor report.html")
    overwrite: bool = option(False, help="replace what was evaluated under the same name")


SETTINGS = ("task", "csv_path", "label_col", "label_dict", "feature_dir", "data_root_dir",
            "results_dir", "models_exp_code", "splits_dir", "split", "micro_average", "n_bootstrap",
            "seed", "precision")  # what makes another evaluation, beside models and slides


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that was read and checked before the work. parts: slide ids of each fold."""

    task: Task
    table: SlideTable
    folder: Path
    models: dict[int, TrainedModel]
    parts: dict[int, tuple[str, ...]]
    store: FeatureStore
    check: StoreCheck

    def plan(self, split: str) -> list[str]:
        """What will be done, and what a user should know about the input."""
        return [f"evaluating {len(self.models)} folds on {len(self.check.usable)} slides "
                f"(split '{split}')",
                *(f"note: {note}" for notes in (self.table.notes, self.check.notes, *(
                    model.notes for model in self.models.values())) for note in notes)]

    def identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What makes two evaluations the same; see ``utils.evaluation_files.find_finished``."""
        stamps = {}
        for slide in self.check.usable:
            stamp, row = self.store.find(slide).stat(), self.table.row_of[slide]
            stamps[slide] = (slide, self.table.case_ids[row], int(self.table.labels[row]),
                             stamp.st_size, stamp.st_mtime_ns)
        inputs = {str(fold): hashlib.sha256(repr(
            [stamps.get(slide, slide) for slide in part]).encode()).hexdigest()
            for fold, part in self.parts.items()}
        models = {str(fold): {"sha256": model.sha256, "spec": asdict(model.spec)}
                  for fold, model in self.models.items()}
        return {"settings": dict(settings), "inputs": inputs, "models": models}

    def experiment(self, split: str, folder: Path) -> dict[str, Any]:
        """What CLAM writes into eval_experiment_<code>.txt."""
        spec = next(iter(self.models.values())).spec
        return {"task": self.task.name, "split": split, "save_dir": str(folder),
                "models_dir": str(self.folder), "model_type": spec.model_type,
                "drop_out": spec.dropout, "model_size": spec.model_size}

    def facts(self, split: str) -> dict[str, str]:
        """What was evaluated, for the report."""
        spec = next(iter(self.models.values())).spec
        encoder = (self.check.encoder or {}).get("name", "unknown encoder")
        return {"Task": f"{self.task.name} ({self.task.csv_path})", "Slides": f"split '{split}'",
                "Models": f"{self.folder} ({spec.model_type}, {spec.model_size})",
                "Features": f"{self.store.root} (width {self.check.width}, {encoder})"}


def read_parts(part: str, folder: Path, folds: Sequence[int], table: SlideTable, *,
               allow_shared: bool) -> dict[int, tuple[str, ...]]:
    """Slide ids to evaluate in each fold; ``Refused`` when there are none in any."""
    if part == "all":
        return dict.fromkeys(folds, table.slide_ids)
    found = {fold: read_split(folder / f"splits_{fold}.csv", table,
                              allow_shared_patients=allow_shared).parts()[part]
             for fold in folds}
    if not any(found.values()):
        raise Refused(f"the split files in {folder} have no {part} slides: choose another --split")
    return found


def read_inputs(task: Task, folder: Path, folds: Sequence[int], *, part: str,
                splits_dir: Path | None, data_root_dir: Path, allow_missing: bool,
                allow_shared: bool, **flags: Any) -> Inputs:
    """Read and check all before any work, or ``Refused``. flags: of the model, None = not given."""
    table = load_table(task)
    models = {fold: load_trained(folder / f"s_{fold}_checkpoint.pt", fold=fold,
                                 class_names=table.class_names, **flags) for fold in folds}
    parts = read_parts(part, splits_dir or folder, folds, table, allow_shared=allow_shared)
    store = FeatureStore.for_task(data_root_dir, task, table)
    slides = dict.fromkeys(slide for ids in parts.values() for slide in ids)
    check = store.check(list(slides), allow_missing=allow_missing, table_ids=table.slide_ids)
    for model in models.values():
        model.check_features(check.width, check.encoder)
    return Inputs(task=task, table=table, folder=folder, models=models, parts=parts, store=store,
                  check=check)


def predict_folds(found: Inputs, report: RunReport, how: Measuring, *, device: torch.device,
                  precision: Precision) -> tuple[dict[int, Evaluation], dict[str, str]]:
    """Figures of every fold, and why slides have no prediction; a row a fold for the report."""
    table = found.table.subset(found.check.usable)
    bags = BagDataset(table, found.store, n_bytes=found.check.n_bytes)
    case_of = dict(zip(table.slide_ids, table.case_ids, strict=True))
    folds, failed = {}, {}
    for fold, model in tqdm(found.models.items(), desc="folds", disable=None):
        start = time.monotonic()
        predictions, reasons = predict_fold(
            f"fold {fold}", model.build(),
            bags.subset(slide for slide in found.parts[fold] if slide in table.row_of),
            case_of=case_of, n_classes=table.n_classes, device=device, precision=precision)
        folds[fold] = evaluate_predictions(predictions, how)
        failed.update(reasons)
        report.add(Row(item=f"fold {fold}", status=Status.DONE, seconds=time.monotonic() - start,
                       numbers={"n_slides": folds[fold].plain.n, "auc": folds[fold].plain.auc,
                                "accuracy": folds[fold].plain.accuracy}))
    return folds, failed


def main(argv: Sequence[str] | None = None) -> int:
    """Validate, predict every fold, compute figures, write files and report."""
    options = parse(Options, prog="eval.py", description=__doc__ or "", argv=argv)
    folds = [options.fold] if options.fold >= 0 else list(
        fold_range(options.k, k_start=options.k_start, k_end=options.k_end))
    device = pick_device(options.device)
    check_precision(options.precision, device)
    code = safe_id(options.save_exp_code, what="--save_exp_code")
    task = load_task(options.task, csv_path=options.csv_path, label_col=options.label_col,
                     label_dict=options.label_dict, feature_dir=options.feature_dir,
                     tasks_file=options.tasks_file)
    found = read_inputs(
        task, inside(options.results_dir, options.models_exp_code), folds, part=options.split,
        splits_dir=options.splits_dir, data_root_dir=options.data_root_dir,
        allow_missing=options.allow_missing, allow_shared=options.allow_shared_patients,
        model_type=options.model_type, model_size=options.model_size, dropout=options.drop_out,
        embed_dim=options.embed_dim)
    folder = writable_folder(inside(options.output_root, f"EVAL_{code}"), what="--output_root")
    files = name_files(folder, code, folds, k=options.k, with_report=not options.no_report)
    settings = {name: value for name, value in resolved(options).items() if name in SETTINGS}
    identity = found.identity(settings)
    record = find_finished(files, identity, overwrite=options.overwrite)
    if record is not None:
        print("\n".join([*summary_lines(record), f"already done: {files.metrics}"]))
        return EXIT_OK
    print("\n".join(found.plan(options.split)), flush=True)
    report = RunReport(f"eval{files.suffix}")
    how = Measuring(resamples=options.n_bootstrap, seed=options.seed,
                    micro_average=options.micro_average)
    evaluations, failed = predict_folds(found, report, how, device=device,
                                        precision=options.precision)
    findings = Findings(class_names=found.table.class_names, folds=evaluations,
                        pooled=pool_tests(evaluations, options.split, how),
                        left_out=found.check.left_out(), failed={**found.check.failures, **failed})
    report.extend(findings.rows())
    record = write_evaluation(
        files, findings, report, settings=settings, identity=identity,
        experiment=found.experiment(options.split, files.folder), facts=found.facts(options.split))
    print("\n".join(summary_lines(record)))
    if not options.no_report:
        print(f"open {files.page}")
    report.print_summary(files.folder)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(run_script(main))
