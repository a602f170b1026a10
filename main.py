"""Train slide models by cross-validation on bags of patch features, or with their encoder.

    python main.py --task task_1_tumor_vs_normal --data_root_dir features --embed_dim 1024 \\
        --early_stopping --lr 2e-4 --k 10 --weighted_sample --bag_loss ce --inst_loss svm \\
        --model_type clam_sb --exp_code tumor_sb --log_data
    python main.py --csv_path cohort.csv --label_dict benign:0,cancer:1 --data_root_dir features \\
        --split_dir cohort_100 --model_type abmil --exp_code cohort --fold_workers 2
    python main.py --csv_path cohort.csv --label_dict benign:0,cancer:1 --split_dir cohort_100 \\
        --model_type e2e_r18_abmilx --patches high.lmdb --patches_low low.lmdb --same_psize 128
    python main.py --csv_path cohort.csv --label_dict benign:0,cancer:1 --split_dir cohort_100 \\
        --model_type streaming_resnet34 --slide_images patches/slide_images --image_size 8192
    torchrun --nproc_per_node 4 main.py ...          (several GPUs on each fold)

Writes to <results_dir>/<exp_code>_s<seed>/: s_{k}_checkpoint.pt (+ .json), splits_{k}.csv,
split_{k}_results.pkl and .csv, summary.csv, the options, and report_train.csv. Run the same
command again after an interruption: finished folds are kept, the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.bag_sources import TrainingSourceOptions, pixel_source
from datasets.cohort import Cohort, CohortOptions, load_cohort
from datasets.split_folder import SplitPlace, find_split_folder
from datasets.tasks import TaskOptions, load_task
from datasets.training_facts import training_facts
from models.model_flags import ModelFlags, describe_model
from models.model_names import material_of
from models.options import PretrainedOptions
from models.slide_models import SlideModelSpec, build_slide_model
from models.starting_weights import StartingWeights, starting_weights
from utils.cross_validation import Environment, run_folds, train_and_test
from utils.devices import check_precision, keep_freed_memory, pick_device
from utils.distributed import local_processes, process_group
from utils.errors import Refused, run_script
from utils.fit_options import FitOptions, check_fit
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
from utils.legacy_config import translate_config
from utils.locks import claim, sweep_locks
from utils.options import option, parse, pick, resolved, save_options
from utils.report import Row, RunReport, Status
from utils.storage import safe_id, writable_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Options(ModelFlags, PretrainedOptions, FitOptions, CohortOptions, SplitPlace,
              TrainingSourceOptions, TaskOptions):
    """Flags of main.py: of the run, the slides, the training and the model (see their classes)."""

    k: int = option(10, help="number of folds", low=1)
    k_start: int = option(-1, help="first fold, -1 = 0", low=-1)
    k_end: int = option(-1, help="fold after the last, -1 = k", low=-1)
    feature_dir: str | None = option(None, help="sub-folder of --data_root_dir with the features")
    results_dir: Path = option(Path("results"), help="folder for the experiment's folder")
    exp_code: str | None = option(None, help="name of the experiment (default: <task>_<model>)")
    log_data: bool = option(False, help="write TensorBoard logs")
    log_dir: Path | None = option(None, help="folder for them (default: the experiment's)")
    print_info: bool = option(True, help="without the table of slides by fold, part and class")
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    fold_workers: int = option(1, help="folds trained at once, each in a process", low=1)
    num_threads: int | None = option(None, help="CPU threads of all folds together", low=1)
    overwrite: bool = option(False, help="replace folds trained with other settings")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the folds share; it travels to worker processes."""

    folder: Path
    cohort: Cohort
    spec: SlideModelSpec
    fit: FitOptions
    where: Environment
    start: StartingWeights | None
    balanced: bool
    child_levels: tuple[int, ...]
    print_info: bool

    def spec_of(self, fold: int) -> SlideModelSpec:
        """The model of a fold, with what its training slides decide (weights, bins, scale)."""
        train = self.cohort.bags.table.subset(self.cohort.splits[fold].train)
        facts: dict[str, Any] = dict(training_facts(
            train, n_bins=self.spec.n_classes, bag_loss=self.spec.bag_loss or "",
            balanced=self.balanced))
        return replace(self.spec, **facts)

    def facts(self, fold: int) -> dict[str, Any]:
        """What decides the fold's result, beside how it is trained."""
        start = self.start.record(fold) if self.start else {}
        return {**asdict(self.spec_of(fold)), **self.cohort.facts(fold), **start}

    def model(self, fold: int) -> torch.nn.Module:
        """The model of a fold before training, with the weights that it starts from."""
        model = build_slide_model(self.spec_of(fold))
        if self.start:
            self.start.load(model, fold)
        return model


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
        if job.cohort.pixels and job.where.device.type == "cpu":
            keep_freed_memory()
        if group.is_main:
            if states[fold] is FoldState.REPLACED:
                files.clear()
            files.work.mkdir(exist_ok=True)
            job.cohort.write_split(job.folder, fold)
        group.wait()
        seed_everything(job.fit.seed)
        bags, spec = job.cohort.parts(fold), job.spec_of(fold)
        train_and_test(
            job.model(fold), bags, files=files, options=job.fit, facts=job.facts(fold),
            train_labels=bags["train"].labels, where=job.where, description={
                "spec": asdict(spec), "class_names": bags["train"].table.class_names,
                "target_names": bags["train"].table.target_names,
                **job.cohort.origin(), "child_levels": list(job.child_levels)})
    return fold_rows(files, status=Status.DONE)


def plan_folds(job: Job, folds: range, *, overwrite: bool) -> dict[int, FoldState]:
    """How far each fold is; ``Refused`` when finished ones would be mixed or replaced unasked."""
    import torch

    from utils.engine import run_settings

    spec = job.spec_of(folds.start)
    with torch.device("meta"):
        model = build_slide_model(spec)  # what cannot be built is refused now
    check_fit(job.fit, model, processes=job.where.group.size)
    if job.start:
        job.model(folds.start)  # and weights that do not fit
    settings = {fold: run_settings(job.fit, job.facts(fold), ranks=job.where.group.size)
                for fold in folds}
    check_other_folds(job.folder, folds, settings[folds.start])
    states = {fold: fold_state(FoldFiles(job.folder, fold), settings[fold], overwrite=overwrite,
                               readable=job.cohort.can_read) for fold in folds}
    job.where.group.wait()  # nobody writes before all have looked
    if job.where.group.is_main:
        print(f"{job.folder}: {len(job.cohort.bags)} slides, {job.spec.model_type}, "
              f"{job.where.device}")
        for line in (*(f"note: {note}" for note in job.cohort.notes),
                     *(job.cohort.overview() if job.print_info else ())):
            print(line)
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
    options = parse(Options, prog="main.py", description=__doc__ or "", argv=argv,
                    translate=translate_config)
    folds = fold_range(options.k, k_start=options.k_start, k_end=options.k_end)
    device = pick_device(options.device)
    if options.fold_workers > 1 and local_processes() > 1:
        raise Refused("--fold_workers runs folds side by side, torchrun shares each: choose one")
    task = load_task(**pick(TaskOptions, options), feature_dir=options.feature_dir)
    if task.subtyping_required and "clam" in options.model_type and not options.subtyping:
        raise Refused(f"task {task.name} tells subtypes apart: CLAM models need --subtyping for it")
    levels = options.child_dirs or options.child_levels
    spec = describe_model(options, task_type=task.task_type, n_classes=task.n_outputs,
                          n_levels=1 + len(levels))
    pixels = pixel_source(options, model_type=spec.model_type,
                          material=material_of(spec.model_type))
    start = starting_weights(spec.model_type, **pick(PretrainedOptions, options))
    fit = FitOptions(**pick(FitOptions, options))
    check_precision(fit.precision, device)
    exp_code = safe_id(options.exp_code or f"{task.name}_{spec.model_type}", what="--exp_code")
    split_folder = find_split_folder(**pick(SplitPlace, options), task=task)
    cohort = load_cohort(
        task, split_folder=split_folder, folds=folds, embed_dim=spec.embed_dim,
        processes=max(options.fold_workers, local_processes()), pin=device.type == "cuda",
        pixels=pixels, **pick(CohortOptions, options))
    import torch

    folder = writable_folder(options.results_dir / f"{exp_code}_s{options.seed}",
                             what="results folder")
    threads = (options.num_threads or torch.get_num_threads()) // options.fold_workers
    with process_group(device) as group:
        job = Job(folder=folder, cohort=cohort, spec=spec, fit=fit, start=start, where=Environment(
            device=device, group=group, threads=max(1, threads), log_data=options.log_data,
            log_dir=options.log_dir, side_by_side=options.fold_workers),
            balanced=options.class_weights == "balanced", child_levels=options.child_levels,
            print_info=options.print_info)
        states = plan_folds(job, folds, overwrite=options.overwrite)
        if group.is_main:
            sweep_locks(folder)
            save_options(options, folder / "options.yaml")
            write_settings(folder, exp_code, {**resolved(options), "embed_dim": spec.embed_dim},
                           task=task.name, split_dir=split_folder)
        report = run_job(job, states, workers=options.fold_workers)
        if group.is_main:
            print(write_summary(folder, folds=folds, k=options.k))
            report.write(folder, options=resolved(options))
            report.print_summary(folder)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(run_script(main))
