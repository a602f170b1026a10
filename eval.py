"""Evaluate trained slide models: figures with intervals, plots, and a report to open.

    python eval.py --task task_1_tumor_vs_normal --data_root_dir features --k 10 \\
        --models_exp_code tumor_sb_s1 --save_exp_code tumor_sb
    python eval.py --fold 3 --split val --models_exp_code tumor_sb_s1 --save_exp_code val_3 ...
    python eval.py --split all --csv_path other_cohort.csv --label_dict benign:0,cancer:1 ...
    torchrun --nproc_per_node 4 eval.py ...          (the slides of each fold over several GPUs)

Writes eval_results/EVAL_<code>/: fold_{k}.csv and summary.csv as CLAM does (its columns are called
test_* whatever the split, and -1 stands for an AUC that is not defined), metrics.json (null there,
with a reason), plots/, report.html, report_eval.csv. Some of the folds only: the names get
_partial_{first}_{last}. Checkpoints of the published programs work too; what their weights do not
tell is said by --model_type, --model_size, --embed_dim, --model_options.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from datasets.bag_sources import PixelSource, PixelSourceOptions, pixel_source
from datasets.evaluated import EvaluatedSlides, SlideOptions, find_slides
from datasets.tasks import Task, TaskOptions, load_task
from models.encoders import matching_encoder
from models.trained import CheckpointOptions, TrainedModel, load_folds
from utils.devices import Precision, check_precision, keep_freed_memory, pick_device
from utils.distributed import Group, process_group
from utils.errors import EXIT_OK, run_script
from utils.evaluation import Evaluation, Measuring, evaluate_predictions, pool_tests, predict_fold
from utils.evaluation_files import (
    Findings,
    find_finished,
    name_files,
    remove_replaced,
    summary_lines,
    write_evaluation,
)
from utils.evaluation_tasks import VIEWS
from utils.folds import fold_range
from utils.options import option, parse, pick, resolved
from utils.report import Row, RunReport, Status
from utils.storage import inside, safe_id, writable_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Options(SlideOptions, PixelSourceOptions, CheckpointOptions, TaskOptions):
    """Flags of eval.py."""

    models_exp_code: str = option(help="folder of the trained models in --results_dir, with _s1")
    save_exp_code: str = option(help="name of the evaluation")
    results_dir: Path = option(Path("results"), help="folder that holds the folders of models")
    feature_dir: str | None = option(None, help="sub-folder of --data_root_dir with the features")
    split: Literal["train", "val", "test", "all"] = option(
        "test", help="part to evaluate; all = the whole table, which needs no split files")
    k: int = option(10, help="number of folds", low=1)
    k_start: int = option(-1, help="first fold; -1 = 0", low=-1)
    k_end: int = option(-1, help="fold after the last; -1 = k", low=-1)
    fold: int = option(-1, help="this fold only; -1 = the range", low=-1)
    micro_average: bool = option(False, help="more than two classes: one AUC over all (slide, "
                                 "class) pairs instead of the mean over the classes")
    v_patch: tuple[float, ...] = option((), low=0, help="parents kept at each level, a number or "
                                        "(below 1) a fraction, other than in training (hag_mil)")
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    precision: Precision = option("fp32", help="precision of the forward pass")
    n_bootstrap: int = option(1000, help="resamples of patients for the intervals; 0 = none",
                              low=0, high=1_000_000)
    seed: int = option(1, help="seed of the resampling", low=0)
    output_root: Path = option(Path("eval_results"), help="folder that gets EVAL_<code>")
    no_report: bool = option(False, help="neither plots nor report.html")
    overwrite: bool = option(False, help="replace what was evaluated under the same name")


# What makes another evaluation, beside models and slides
SETTINGS = (*(item.name for item in fields(TaskOptions) if item.name != "tasks_file"),
            *(item.name for item in fields(PixelSourceOptions) if item.name != "num_workers"),
            "feature_dir", "data_root_dir", "results_dir", "models_exp_code", "splits_dir", "split",
            "micro_average", "n_bootstrap", "seed", "precision", "child_levels", "child_dirs",
            "lazy_children", "weights")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that was read and checked before the work."""

    task: Task
    folder: Path
    models: dict[int, TrainedModel]
    slides: EvaluatedSlides

    def plan(self, split: str) -> list[str]:
        """What will be done, and what a user should know about the input."""
        check, table = self.slides.check, self.slides.table
        return [f"evaluating {len(self.models)} folds on {len(check.usable)} slides "
                f"(split '{split}')",
                *(f"note: {note}" for notes in (table.notes, check.notes, *(
                    [*model.notes, *model.pixel_notes(self.slides.pixel_facts)]
                    for model in self.models.values())) for note in notes)]

    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before the figures."""
        legacy = [str(fold) for fold, model in self.models.items() if model.val_is_test]
        which = "" if len(legacy) == len(self.models) else f"fold {', '.join(legacy)}: "
        return (f"{which}the validation slides were the test slides: early stopping and the best "
                "epoch were chosen on them, so these figures are optimistic",) if legacy else ()

    def identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What makes two evaluations the same; see ``utils.evaluation_files.find_finished``."""
        return {"settings": dict(settings), "inputs": self.slides.digests(), "models": {
            str(fold): {"sha256": model.sha256, "spec": asdict(model.spec)}
            for fold, model in self.models.items()}}

    def experiment(self, split: str, folder: Path) -> dict[str, Any]:
        """What CLAM writes into eval_experiment_<code>.txt."""
        spec = next(iter(self.models.values())).spec
        return {"task": self.task.name, "split": split, "save_dir": str(folder),
                "models_dir": str(self.folder), "model_type": spec.model_type,
                "drop_out": spec.dropout, "model_size": spec.model_size}

    def facts(self, split: str) -> dict[str, str]:
        """What was evaluated, for the report."""
        spec = next(iter(self.models.values())).spec
        return {"Task": f"{self.task.name}, {self.task.task_type} ({self.task.csv_path})",
                "Slides": f"split '{split}'",
                "Models": f"{self.folder} ({spec.model_type}, {spec.model_size})",
                "Features": self.slides.origin,
                "Predicted": ", ".join(f"{index}: {name}" for index, name
                                       in enumerate(self.slides.names))}


def read_slides(task: Task, models: dict[int, TrainedModel], *, pixels: PixelSource | None,
                **slides: Any) -> EvaluatedSlides:
    """The slides, which must suit the models, or ``Refused``; arguments of ``find_slides``."""
    first = next(iter(models.values()))
    finer = first.finer_levels(slides["child_levels"], dirs=len(slides["child_dirs"]))
    found = find_slides(task, list(models), **{
        **slides, "child_levels": finer, "pixels": pixels,
        "splits_dir": slides["splits_dir"] or first.path.parent})
    for model in models.values():
        if pixels is None:
            model.check_features(found.check.width, found.check.encoder)
    return found


def predict_folds(found: Inputs, report: RunReport, how: Measuring, *, device: torch.device,
                  precision: Precision, group: Group
                  ) -> tuple[dict[int, Evaluation], dict[str, str]]:
    """Figures of every fold, and why slides have no prediction; a row a fold for the report."""
    slides, view = found.slides, VIEWS[found.task.task_type]
    if slides.pixel_facts and device.type == "cpu":
        keep_freed_memory()
    bags = slides.bags()
    folds, failed = {}, {}
    for fold, model in tqdm(found.models.items(), desc="folds",
                            disable=None if group.is_main else True):
        start = time.monotonic()
        predictions, reasons = predict_fold(
            f"fold {fold}", model.build(), bags.subset(slides.usable(fold)),
            case_of=slides.case_of, names=slides.names, n_truths=slides.n_truths, device=device,
            precision=precision, group=group)
        failed.update(reasons)
        if not group.is_main:
            continue
        folds[fold] = evaluate_predictions(predictions, view, how)
        report.add(Row(item=f"fold {fold}", status=Status.DONE, seconds=time.monotonic() - start,
                       numbers={"n_slides": predictions.n_slides, **{
                           name: folds[fold].estimates[name].value
                           for name in view.headline.values()}}))
    return folds, failed


def main(argv: Sequence[str] | None = None) -> int:
    """Validate, predict every fold, compute figures, write files and report."""
    options = parse(Options, prog="eval.py", description=__doc__ or "", argv=argv)
    folds = [options.fold] if options.fold >= 0 else list(
        fold_range(options.k, k_start=options.k_start, k_end=options.k_end))
    device = pick_device(options.device)
    check_precision(options.precision, device)
    code = safe_id(options.save_exp_code, what="--save_exp_code")
    task = load_task(**pick(TaskOptions, options), feature_dir=options.feature_dir)
    models_folder = inside(options.results_dir, options.models_exp_code)
    models = load_folds(models_folder, folds, class_names=task.class_names or task.label_cols,
                        task_type=task.task_type, v_patch=options.v_patch,
                        **pick(CheckpointOptions, options))
    first = models[folds[0]]
    pixels = pixel_source(options, model_type=first.spec.model_type, material=first.material,
                          trained=first.trained_on)
    found = Inputs(task=task, folder=models_folder, models=models, slides=read_slides(
        task, models, pixels=pixels, **pick(SlideOptions, options),
        part=options.split, encoder_of=partial(matching_encoder, device=str(device)),
        cache_root=options.output_root / "lazy_features"))
    view = VIEWS[task.task_type]
    folder = writable_folder(inside(options.output_root, f"EVAL_{code}"), what="--output_root")
    files = name_files(folder, code, folds, k=options.k, plots=view.pictures,
                       with_report=not options.no_report)
    settings = {name: value for name, value in resolved(options).items() if name in SETTINGS}
    identity = found.identity(settings)
    how = Measuring(resamples=options.n_bootstrap, seed=options.seed,
                    micro_average=options.micro_average)
    with process_group(device) as group:
        record = find_finished(files, identity, overwrite=options.overwrite)
        group.wait()  # nobody writes before all have looked
        if group.is_main:
            if options.overwrite:
                remove_replaced(files, identity)
            print("\n".join([*summary_lines(record), f"already done: {files.metrics}"]
                            if record else found.plan(options.split)), flush=True)
        if record:
            return EXIT_OK
        report = RunReport(f"eval{files.suffix}")
        evaluations, failed = predict_folds(found, report, how, device=device, group=group,
                                            precision=options.precision)
        lazy = found.slides.lazy.cost(group) if found.slides.lazy else None
        if not group.is_main:
            return EXIT_OK
        findings = Findings(
            view=view, class_names=found.slides.names, warnings=found.warnings(), lazy=lazy,
            results=pool_tests(evaluations, options.split, view, how),
            left_out=found.slides.check.left_out(),
            failed={**found.slides.check.failures, **failed})
        report.extend(findings.rows())
        record = write_evaluation(
            files, findings, report, settings=settings, identity=identity,
            experiment=found.experiment(options.split, folder), facts=found.facts(options.split))
        print("\n".join([*summary_lines(record), *files.advice()]))
        report.print_summary(folder)
        return report.exit_code


if __name__ == "__main__":
    sys.exit(run_script(main))
