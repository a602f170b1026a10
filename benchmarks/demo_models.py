"""Every slide model on the demo's cohort: 5-fold cross-validation, one line a model.

    make demo && .venv/bin/python benchmarks/demo_models.py

Uses the features and splits that `make demo` left in demo/, trains every model with main.py and
evaluates it with eval.py. HAG-MIL sees one magnification here, as all do; its transformer takes
longer to start learning from 21 slides. Prints the AUC of the pooled test slides with its 95 %
interval over patients, the mean of the folds, and the seconds of training on this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from utils.errors import ItemFailed, Refused, run_script
from utils.options import option, parse
from utils.storage import read_json, write_json

TABLE = ["--label_dict", "skin:0,colon:1"]
COMMON = ["--lr", "2e-4", "--drop_out", "0.25", "--max_epochs", "40"]
MODELS = {
    "clam_sb": [], "clam_mb": [], "abmil": [], "abmilx": ["--inner_dim", "256"],
    "transmil": ["--inner_dim", "128"], "dsmil": [], "mean": [], "max": [], "mil": [],
    "hag_mil": ["--hidden_dims", "128", "128", "--inst_loss", "svm", "--lr", "3e-4",
                "--max_epochs", "60"]}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options."""

    demo: Path = option(Path("demo"), help="what make demo made")
    models: tuple[str, ...] = option(tuple(MODELS), help="models to train", choices=list(MODELS))
    folds: int = option(5, help="folds, as in the demo", low=2)


def main() -> int:
    """Train and evaluate what is not there yet, print the table."""
    options = parse(Options, prog="demo_models.py", description=__doc__ or "")
    if not (options.demo / "splits/cohort").is_dir():
        raise Refused(f"{options.demo} holds no finished demo: run make demo first, or give --demo")
    rows = []
    for model in options.models:
        rows.append(cross_validate(model, options.demo, options.folds))
        print(_line(rows[-1]), flush=True)
    print("\nmodel      pooled test AUC (95 %)     mean of folds   accuracy   training s")
    print("\n".join(map(_line, rows)))
    write_json(options.demo / "demo_models.json", rows)
    return 0


def cross_validate(model: str, demo: Path, folds: int) -> dict[str, Any]:
    """Train and evaluate one model; its figures."""
    table = ["--csv_path", demo / "cohort.csv", *TABLE, "--data_root_dir", demo / "features_cohort",
             "--k", folds, "--results_dir", demo / "models"]
    start = time.monotonic()
    run(["main.py", *table, "--embed_dim", 1280, "--model_type", model,
         "--exp_code", model, "--split_dir", (demo / "splits/cohort").resolve(), *COMMON,
         *MODELS[model], "--fold_workers", min(folds, os.cpu_count() or 1)])
    seconds = time.monotonic() - start
    run(["eval.py", *table, "--models_exp_code", f"{model}_s1",
         "--save_exp_code", model, "--output_root", demo / "models/eval", "--no_report"])
    found = read_json(demo / f"models/eval/EVAL_{model}/metrics.json")
    return {"model": model, "seconds": seconds, "pooled": found["pooled"]["metrics"],
            "across_folds": found["across_folds"]}


def run(command: list[Any]) -> None:
    """One script from the repository's root, quietly; its failure ends the benchmark."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True)
    if done.returncode:
        raise ItemFailed(f"{command[0]} ended with exit code {done.returncode}: "
                         f"{(done.stderr or done.stdout)[-1500:]}")


def _line(row: dict[str, Any]) -> str:
    auc, accuracy = row["pooled"]["auc"], row["pooled"]["accuracy"]
    folds = row["across_folds"]["auc"]
    return (f"{row['model']:<10} {auc['value']:.3f} ({auc['low']:.3f} - {auc['high']:.3f})"
            f"        {folds['mean']:.3f} +- {folds['std']:.3f}   {accuracy['value']:.3f}"
            f"      {row['seconds']:6.0f}")


if __name__ == "__main__":
    sys.exit(run_script(main))
