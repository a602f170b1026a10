"""Frozen features and an aggregator, against the same encoder trained with it, on the same folds.

    python benchmarks/e2e_vs_two_stage.py --data ../shared/data/colon_crchisto --demo demo
    python benchmarks/e2e_vs_two_stage.py --sets small --seeds 1        (needs no data)

Two-stage: features of efficientnet_lite0 (ImageNet), then ABMIL or ABMILX. End to end (ABMILX,
NeurIPS 2025, in small): the same encoder and patches at the same size, the slide model started from
the two-stage ABMILX of the fold (--mil_init), then both trained for a fixed number of epochs on
random draws of augmented patches; its validation slides are not looked at.

Sets: colon, the 100 real images of benchmarks/colon.py (96-px tiles every 50 px, seen at 128 px);
demo, the cohort of `make demo` (256-px patches, seen at 128 px; a planted region shows in four or
so of about 95, so all are drawn); small, the same with regions of two thirds of the area, built
here.

Table: accuracy, AUC and Brier score (mean squared error of the probabilities) of the pooled test
slides of all folds, mean over seeds, with 95 % intervals over patients; the last model's difference
to each other one, from the same resamples; the seconds of training, summed over folds, without
those of the start. An interval says nothing of other draws of folds or weights: that is what
several seeds are for.

Run again, finished folds are kept. Recipes were chosen on other divisions of the colon set and on
folds of seed 0 of all sets: judge by other seeds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import numpy as np

from utils.errors import EXIT_OK, ItemFailed, Refused, run_script
from utils.options import option, parse
from utils.parallel import available_cpus
from utils.statistics import Estimate, estimate_weighted, weighted_metrics
from utils.storage import read_json, read_table, write_json

ENCODER = "efficientnet_lite0"
SEEN_PX = 128  # side of a patch as the encoder sees it, in both ways
FIGURES = ("accuracy", "auc", "brier")
SMALL_RADII_PX = (80, 140)  # of the planted regions; make demo has 100 to 170
COLON = ["--lr", "1e-4", "--reg", "1e-3", "--drop_out", "0.25", "--max_epochs", "50",
         "--early_stopping", "--stop_epoch", "15", "--patience", "8"]  # as benchmarks/colon.py
DEMO = ["--lr", "2e-4", "--drop_out", "0.25", "--max_epochs", "40"]  # as benchmarks/demo_models.py
END_TO_END = ["--img_size", SEEN_PX, "--img_transform", "strong",
              "--train_blocks", "3",  # of lite0's 9, the last: six of them learn 60 slides by heart
              "--opt", "adamw", "--reg", "1e-4", "--schedule", "cosine", "--ema", "0.98",
              "--drop_out", "0.25"]
RECIPES: dict[str, list[Any]] = {
    "abmil": ["--model_type", "abmil"],
    "abmilx": ["--model_type", "abmilx", "--inner_dim", "256"],
    "e2e_abmilx": ["--model_type", f"e2e_{ENCODER}_abmilx", "--inner_dim", "256", *END_TO_END]}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options."""

    data: Path = option(ROOT.parent / "shared/data/colon_crchisto",
                        help="folder of the colon set: slides/, labels.csv")
    demo: Path = option(Path("demo"), help="what make demo made")
    out: Path = option(Path("results/e2e_vs_two_stage"), help="folder for all results")
    sets: tuple[Literal["colon", "demo", "small"], ...] = option(
        ("colon", "demo", "small"), help="sets to do")
    models: tuple[str, ...] = option(tuple(RECIPES), choices=list(RECIPES),
                                     help="models; the last is compared with the others")
    folds: int = option(5, help="folds", low=2)
    seeds: tuple[int, ...] = option((1, 2, 3), help="seeds: splits and training", low=0)
    epochs: int | None = option(None, help="epochs of end-to-end models (default: 10 for colon, "
                                "16 for demo)", low=1)
    workers: int = option(available_cpus(), help="folds at once", low=1)


@dataclass(frozen=True, kw_only=True)
class SlideSet:
    """Slides with a table of two classes, and how they are cut into patches.

    two_stage: recipe of the aggregators
    recipe: of end-to-end training, beside ``END_TO_END``; it lasts ``epochs``
    """

    slides: Path
    table: list[Any]
    patching: list[Any]
    two_stage: list[Any]
    recipe: list[Any]
    epochs: int

    def check(self, remedy: str) -> None:
        """``Refused`` when slides or table are not there."""
        missing = [path for path in (self.slides, Path(self.table[1])) if not path.exists()]
        if missing:
            raise Refused(f"{missing[0]} is not there: {remedy}")


@dataclass(frozen=True)
class Scores:
    """Test slides of all folds: patients, classes (n,) and, of each seed, probabilities (n, 2)."""

    patients: list[str]
    labels: np.ndarray
    seeds: list[np.ndarray]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is not done yet, print a table a set."""
    options = parse(Options, prog="e2e_vs_two_stage.py", description=__doc__ or "", argv=argv,
                    config_flag=False)
    found = {name: slide_sets(options)[name] for name in options.sets}
    if "small" in found:
        run("scripts/demo_cohort.py", "--out", small_cohort(options), "--radii", *SMALL_RADII_PX)
    for name, one in found.items():
        one.check("give its folder with --data" if name == "colon" else
                  "run make demo (or python scripts/demo.py) first, or give its folder with --demo")
    results: dict[str, Any] = {}
    for name, one in found.items():
        out = options.out / name
        features_s = prepare(one, out)
        scores, seconds = {}, {}
        for model in options.models:
            runs = [cross_validate(model, seed, one, out, options) for seed in options.seeds]
            scores[model] = gather([folder for folder, _ in runs], options.folds,
                                   table=Path(one.table[1]))
            seconds[model] = float(np.mean([spent for _, spent in runs]))
        results[name] = {"seconds": seconds, "features_seconds": features_s,
                         "figures": {key: vars(value) for key, value in compare(scores).items()}}
        print("\n".join(table_lines(name, results[name], options)), flush=True)
    write_json(options.out / "e2e_vs_two_stage.json", results)
    return EXIT_OK


def small_cohort(options: Options) -> Path:
    """The folder of the cohort that is built here."""
    return options.out.resolve() / "small" / "cohort"


def slide_sets(options: Options) -> dict[str, SlideSet]:
    """The sets by name."""
    def planted(folder: Path) -> SlideSet:
        return SlideSet(
            slides=folder / "slides", two_stage=DEMO,
            table=["--csv_path", folder / "cohort.csv", "--label_dict", "skin:0,colon:1"],
            patching=["--patch_size", 256, "--step_size", 256, "--preset", "bwh_biopsy.csv"],
            recipe=["--same_psize", 96, "--lr", "1e-4", "--crop_scale", "0.8"],
            epochs=options.epochs or 5)

    return {
        "colon": SlideSet(
            slides=options.data / "slides", two_stage=COLON,
            table=["--csv_path", options.data / "labels.csv", "--label_col", "y",
                   "--label_dict", "0:0,1:1"],
            patching=["--patch_size", 96, "--step_size", 50, "--preset", "whole_field.csv"],
            recipe=["--same_psize", 40, "--lr", "1e-4", "--crop_scale", "0.4", "--batch_size", 2,
                    "--accumulate", 2],
            epochs=options.epochs or 6),
        "demo": planted(options.demo), "small": planted(small_cohort(options))}


# ---------------------------------------------------------------------------- the six scripts

def run(*command: Any) -> None:
    """One script of ours, quietly; its failure ends the benchmark with its last words."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ItemFailed(f"{command[0]} exit {done.returncode}: "
                         f"{(done.stderr or done.stdout)[-1500:]}")


def prepare(one: SlideSet, out: Path) -> float:
    """Places of patches and their features; the seconds that the features took."""
    patches, slides = out.resolve() / "patches", one.slides.resolve()
    run("create_patches_fp.py", "--source", slides, "--save_dir", patches, *one.patching,
        "--seg", "--patch")
    start = time.monotonic()
    run("extract_features_fp.py", "--data_h5_dir", patches, "--data_slide_dir", slides,
        "--slide_ext", ".tif", "--csv_path", patches / "process_list_autogen.csv",
        "--feat_dir", out.resolve() / "features", "--model_name", ENCODER,
        "--target_patch_size", SEEN_PX)
    worked = (read_table(out / "features/report_features.csv")["status"] == "done").any()
    return all_seconds(time.monotonic() - start if worked else 0.0, out / "seconds.json")


def cross_validate(model: str, seed: int, one: SlideSet, out: Path, options: Options
                   ) -> tuple[Path, float]:
    """Splits, training and evaluation of one model and seed; where that is, seconds of training."""
    out = out.resolve()
    splits, code = f"s{seed}_k{options.folds}", f"{model}_k{options.folds}"
    end_to_end = model.startswith("e2e_")
    recipe = [*RECIPES[model], *one.two_stage]
    if end_to_end:
        start, _ = cross_validate("abmilx", seed, one, out, options)
        code += f"_e{one.epochs}"
        recipe = [*RECIPES[model], *one.recipe, "--max_epochs", one.epochs, "--mil_init",
                  out / "results" / start.name.removeprefix("EVAL_")]
    bags = (["--patches", out / "patches", "--data_slide_dir", one.slides.resolve(),
             "--slide_ext", ".tif"] if end_to_end else
            ["--data_root_dir", out / "features", "--embed_dim", 1280])
    table = [*one.table[:1], Path(one.table[1]).resolve(), *one.table[2:]]
    run("create_splits_seq.py", *table, "--k", options.folds, "--scheme", "kfold", "--val_frac",
        "0.1", "--seed", seed, "--splits_root", out / "splits", "--split_dir", splits)
    run("main.py", *table, *bags, "--k", options.folds, "--seed", seed, "--split_dir",
        out / "splits" / splits, "--results_dir", out / "results", "--exp_code", code, *recipe,
        "--fold_workers", options.workers)
    experiment = f"{code}_s{seed}"
    run("eval.py", *table, *bags, "--k", options.folds, "--results_dir", out / "results",
        "--models_exp_code", experiment, "--save_exp_code", experiment,
        "--output_root", out / "eval_results", "--no_report", "--n_bootstrap", 0)
    folder = out / "results" / experiment
    rows = read_table(folder / "report_train.csv")
    now = sum(float(seconds) for status, seconds in zip(rows["status"], rows["seconds"],
                                                        strict=True) if status == "done")
    return (out / "eval_results" / f"EVAL_{experiment}",
            all_seconds(now, folder / "seconds.json"))


def all_seconds(now: float, kept: Path) -> float:
    """Seconds of work of this run and, out of ``kept``, of earlier ones."""
    total = now + (float(read_json(kept)["seconds"]) if kept.exists() else 0.0)
    write_json(kept, {"seconds": total})
    return total


# ---------------------------------------------------------------------------- the table

def gather(folders: Sequence[Path], folds: int, *, table: Path) -> Scores:
    """The predictions of all test slides, in the order of their ids; one folder a seed.

    table: csv that tells each slide's patient
    """
    import pandas as pd

    case_of = read_table(table).set_index("slide_id")["case_id"]
    tables = []
    for folder in folders:
        parts = [read_table(folder / f"fold_{fold}.csv") for fold in range(folds)]
        tables.append(pd.concat(parts).sort_values("slide_id"))
    first = tables[0]
    return Scores([case_of[slide] for slide in first["slide_id"]],
                  first["Y"].astype(float).to_numpy(int),
                  [each[["p_0", "p_1"]].astype(float).to_numpy() for each in tables])


def compare(scores: dict[str, Scores]) -> dict[str, Estimate]:
    """``<model> <figure>``, and ``<last> - <other> <figure>``, all from the same resamples."""
    *others, last = scores

    def weigh(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for model, one in scores.items():
            every = [weighted_metrics(p, one.labels, weights) for p in one.seeds]
            found.update({f"{model} {figure}": np.mean([each[figure] for each in every], axis=0)
                          for figure in FIGURES})
        return found | {f"{last} - {other} {figure}":
                        found[f"{last} {figure}"] - found[f"{other} {figure}"]
                        for other in others for figure in FIGURES}

    return estimate_weighted(weigh, scores[last].patients, names=())


def table_lines(name: str, found: dict[str, Any], options: Options) -> list[str]:
    """The table of one set."""
    def cell(key: str, form: str) -> str:
        one = found["figures"][key]
        return (f"{one['value']:{form}} ({one['low']:{form}} to {one['high']:{form}})")

    *others, last = options.models
    forms = {"accuracy": ".3f", "auc": ".3f", "brier": ".4f"}
    lines = [f"\n{name}: {options.folds} folds, seeds {' '.join(map(str, options.seeds))}",
             f"{'model':<24} {'accuracy':<26} {'AUC':<26} {'Brier score':<30} training s"]
    for model in options.models:
        cells = [cell(f"{model} {figure}", form) for figure, form in forms.items()]
        lines.append(f"{model:<24} {cells[0]:<26} {cells[1]:<26} {cells[2]:<30} "
                     f"{found['seconds'][model]:.0f}")
    for label in (f"{last} - {other}" for other in others):
        cells = [cell(f"{label} {figure}", f"+{form}") for figure, form in forms.items()]
        lines.append(f"{label:<24} {cells[0]:<26} {cells[1]:<26} {cells[2]}")
    return [*lines, f"features of the two-stage models: {found['features_seconds']:.0f} s"]


if __name__ == "__main__":
    sys.exit(run_script(main))
