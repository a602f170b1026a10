"""Train slide models by cross-validation on bags of patch features.

    python main.py --task task_1_tumor_vs_normal --data_root_dir features --embed_dim 1024 \\
        --early_stopping --lr 2e-4 --k 10 --weighted_sample --bag_loss ce --inst_loss svm \\
        --model_type clam_sb --exp_code tumor_sb --log_data
    python main.py --csv_path cohort.csv --label_dict benign:0,cancer:1 --data_root_dir features \\
        --split_dir cohort_100 --model_type abmil --exp_code cohort --fold_workers 2
    torchrun --nproc_per_node 4 main.py ...          (several GPUs on each fold)

Writes to <results_dir>/<exp_code>_s<seed>/: s_{k}_checkpoint.pt (+ .json), splits_{k}.csv,
split_{k}_results.pkl and .csv, summary.csv, the options, and report_train.csv. Run the same
command again after an interruption: finished folds are kept, the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets.bags import CacheMode
from datasets.cohort import Cohort, find_split_folder, load_cohort
from datasets.splits import split_folder_name
from datasets.tasks import TaskOptions, load_task
from models.slide_models import SLIDE_MODELS, SlideModelSpec, build_slide_model
from utils.cross_validation import Environment, run_folds, train_and_test
from utils.devices import Precision, check_precision, pick_device
from utils.distributed import local_processes, process_group
from utils.errors import Refused, run_script
from utils.folds import (
    FoldFiles,
    FoldState,
    check_other_folds,
    fold_range,
    fold_rows,
    fold_state,
    write_settings,
    write_summary,
)
from utils.locks import claim, sweep_locks
from utils.options import option, parse, resolved, save_options
from utils.report import Row, RunReport, Status
from utils.storage import safe_id, writable_folder

if TYPE_CHECKING:
    from utils.engine import FitOptions


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """Flags of main.py: those of the task, then CLAM's by their names and meanings, then ours."""

    data_root_dir: Path = option(help="folder with the feature folders")
    embed_dim: int = option(1024, help="width of the features", low=1)
    max_epochs: int = option(200, help="most epochs to train", low=1)
    lr: float = option(1e-4, help="learning rate", low=0)
    reg: float = option(1e-5, help="weight decay", low=0)
    label_frac: float = option(1.0, help="share of training labels: names the split folder",
                               low=0, high=1)
    seed: int = option(1, help="seed of everything random, set again for each fold",
                       low=0, high=2**32 - 1)
    k: int = option(10, help="number of folds", low=1)
    k_start: int = option(-1, help="first fold, -1 = 0", low=-1)
    k_end: int = option(-1, help="fold after the last, -1 = k", low=-1)
    results_dir: Path = option(Path("results"), help="folder for the experiment's folder")
    split_dir: str | None = option(None, help="folder under --splits_root, or a path (default: "
                                   "<task>_<percent of labels>)")
    log_data: bool = option(False, help="write TensorBoard logs")
    testing: bool = option(False, help="try out on a tenth of the slides of each class")
    early_stopping: bool = option(False, help="stop on validation loss and keep the best epoch")
    opt: Literal["adam", "sgd", "adamw"] = option("adam", help="optimiser (sgd: momentum 0.9)")
    drop_out: float = option(0.25, help="dropout after the first layer", bare=0.25,
                             low=0, high=0.99)
    bag_loss: Literal["svm", "ce"] = option("ce", help="slide loss")
    model_type: str = option("clam_sb", help="slide model", choices=list(SLIDE_MODELS))
    model_size: Literal["small", "big"] = option("small", help="width of the attention")
    exp_code: str | None = option(None, help="name of the experiment (default: <task>_<model>)")
    weighted_sample: bool = option(False, help="draw slides so that classes are balanced")
    no_inst_cluster: bool = option(False, help="CLAM without instance clustering")
    inst_loss: Literal["svm", "ce", "None"] | None = option(None, help="instance loss (None: ce)")
    subtyping: bool = option(False, help="classes exclude each other (CLAM models)")
    bag_weight: float = option(0.7, help="share of the slide loss in the total", low=0, high=1)
    B: int = option(8, help="instances sampled from each end; 0 or less = 8")
    feature_dir: str | None = option(None, help="sub-folder of --data_root_dir with the features")
    splits_root: Path = option(Path("splits"), help="folder that holds the folders of splits")
    attention_dropout: float | None = option(
        None, help="dropout in the attention (default: 0.25, none with --drop_out 0)",
        low=0, high=0.99)
    ungated: bool = option(False, help="attention without the sigmoid gate")
    patience: int = option(20, help="epochs without improvement before stopping", low=1)
    stop_epoch: int = option(50, help="never stop at or before this epoch (from 0)", low=0)
    accumulate: int = option(1, help="slides per optimiser step", low=1)
    clip_grad: float | None = option(None, help="largest gradient norm", low=1e-6)
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    precision: Precision = option("fp32", help="number format of the forward pass")
    cache: CacheMode = option("auto", help="keep features in memory")
    fold_workers: int = option(1, help="folds trained at once, each in a process", low=1)
    num_threads: int | None = option(None, help="CPU threads of all folds together", low=1)
    allow_missing: bool = option(False, help="go on without slides that have no features")
    overwrite: bool = option(False, help="replace folds trained with other settings")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the folds share; it travels to worker processes."""

    folder: Path
    cohort: Cohort
    spec: SlideModelSpec
    fit: FitOptions
    where: Environment

    def facts(self, fold: int) -> dict[str, Any]:
        """What decides the fold's result, beside how it is trained."""
        return {**asdict(self.spec), **self.cohort.facts(fold)}


def train_fold(fold: int, *, job: Job, states: dict[int, FoldState]) -> list[Row]:
    """Train, test and record one fold; a row for it and for each slide that could not be used."""
    import torch

    from utils.seeding import seed_everything

    files, group = FoldFiles(job.folder, fold), job.where.group
    with claim(files.work) if group.is_main else nullcontext(True) as mine:
        if not group.from_main(mine):
            return [Row(item=f"fold {fold}", status=Status.BUSY,
                        reason="another process works on it")]
        if group.from_main(states[fold] is not FoldState.REPLACED and files.record.exists()):
            return fold_rows(files, status=Status.SKIPPED)  # another process was faster
        torch.set_num_threads(job.where.threads)
        if group.is_main:
            if states[fold] is FoldState.REPLACED:
                files.clear()
            files.work.mkdir(exist_ok=True)
            job.cohort.write_split(job.folder, fold)
        group.wait()
        seed_everything(job.fit.seed)
        bags = job.cohort.parts(fold)
        train_and_test(
            build_slide_model(job.spec), bags, files=files, options=job.fit,
            facts=job.facts(fold), train_labels=bags["train"].labels, where=job.where,
            n_classes=job.spec.n_classes, description={
                "spec": asdict(job.spec), "class_names": bags["train"].table.class_names,
                "encoder": job.cohort.encoder})
    return fold_rows(files, status=Status.DONE)


def plan_folds(job: Job, folds: range, *, overwrite: bool) -> dict[int, FoldState]:
    """How far each fold is; ``Refused`` when finished ones would be mixed or replaced unasked."""
    from utils.engine import run_settings

    settings = {fold: run_settings(job.fit, job.facts(fold), ranks=job.where.group.size)
                for fold in folds}
    check_other_folds(job.folder, folds, settings[folds.start])
    states = {fold: fold_state(FoldFiles(job.folder, fold), settings[fold], overwrite=overwrite,
                               readable=job.cohort.can_read) for fold in folds}
    job.where.group.wait()  # nobody writes before all have looked
    if job.where.group.is_main:
        print(f"{job.folder}: {len(job.cohort.bags)} slides, {job.spec.model_type}, "
              f"{job.where.device}")
        for note in job.cohort.notes:
            print(f"note: {note}")
        for state in FoldState:
            if which := [str(fold) for fold in folds if states[fold] is state]:
                print(f"{state.value}: fold {', '.join(which)}")
    return states


def run_job(job: Job, states: dict[int, FoldState], *, workers: int) -> RunReport:
    """Train what is not done; the report has a row for each fold and each unusable slide."""
    report = RunReport("train")
    rows = list(job.cohort.left_out)
    for fold, state in states.items():
        if state is FoldState.DONE:
            rows += fold_rows(FoldFiles(job.folder, fold), status=Status.SKIPPED)
    todo = [fold for fold, state in states.items() if state is not FoldState.DONE]
    for outcome in run_folds(train_fold, todo, workers=workers, group=job.where.group,
                             arguments={"job": job, "states": states}):
        failed = Row(item=f"fold {outcome.item}", status=Status.FAILED, reason=outcome.error or "")
        first, *slides = outcome.result or [failed]
        rows += [replace(first, seconds=outcome.seconds), *slides]
    report.extend({row.item: row for row in rows}.values())  # a slide may fail in several folds
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Validate everything, show the plan, train the folds, report."""
    options = parse(Options, prog="main.py", description=__doc__ or "", argv=argv)
    folds = fold_range(options.k, k_start=options.k_start, k_end=options.k_end)
    device = pick_device(options.device)
    if options.fold_workers > 1 and local_processes() > 1:
        raise Refused("--fold_workers runs folds side by side, torchrun shares each: choose one")
    task = load_task(options.task, csv_path=options.csv_path, label_col=options.label_col,
                     label_dict=options.label_dict, feature_dir=options.feature_dir,
                     tasks_file=options.tasks_file)
    if task.subtyping_required and "clam" in options.model_type and not options.subtyping:
        raise Refused(f"task {task.name} tells subtypes apart: CLAM models need --subtyping for it")
    spec = SlideModelSpec(
        model_type=options.model_type, embed_dim=options.embed_dim, n_classes=task.n_classes,
        model_size=options.model_size, dropout=options.drop_out, gated=not options.ungated,
        k_sample=options.B if options.B > 0 else 8, subtyping=options.subtyping,
        bag_loss=options.bag_loss, inst_loss="svm" if options.inst_loss == "svm" else "ce",
        bag_weight=options.bag_weight, instance_clustering=not options.no_inst_cluster,
        attention_dropout=options.attention_dropout)
    exp_code = safe_id(options.exp_code or f"{task.name}_{spec.model_type}", what="--exp_code")
    split_folder = find_split_folder(
        options.splits_root, options.split_dir or split_folder_name(task.name, options.label_frac),
        task=task)
    cohort = load_cohort(
        task, data_root=options.data_root_dir, split_folder=split_folder, folds=folds,
        embed_dim=spec.embed_dim, allow_missing=options.allow_missing, tenth=options.testing,
        cache=options.cache, processes=max(options.fold_workers, local_processes()),
        pin=device.type == "cuda")
    import torch

    from utils.engine import FitOptions

    fit = FitOptions(**{item.name: getattr(options, item.name) for item in fields(FitOptions)})
    check_precision(fit.precision, device)
    folder = writable_folder(options.results_dir / f"{exp_code}_s{options.seed}",
                             what="results folder")
    threads = (options.num_threads or torch.get_num_threads()) // options.fold_workers
    with process_group(device) as group:
        job = Job(folder=folder, cohort=cohort, spec=spec, fit=fit, where=Environment(
            device=device, group=group, threads=max(1, threads), log_data=options.log_data,
            progress=options.fold_workers == 1))
        states = plan_folds(job, folds, overwrite=options.overwrite)
        if group.is_main:
            sweep_locks(folder)
            save_options(options, folder / "options.yaml")
            write_settings(folder, exp_code, resolved(options), task=task.name,
                           split_dir=split_folder)
        report = run_job(job, states, workers=options.fold_workers)
        if group.is_main:
            print(write_summary(folder, folds=folds, k=options.k))
            report.write(folder, options=resolved(options))
            report.print_summary(folder)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(run_script(main))
