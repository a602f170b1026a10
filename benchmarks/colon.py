"""The published colon benchmark, from slides to accuracy and attention, with our six scripts.

    python benchmarks/colon.py --data ../shared/data/colon_crchisto

CRCHistoPhenotypes (Sirinukunwattana et al. 2016): 100 H&E colon images of 500 x 500 px; a bag is
positive when it holds epithelial nuclei. Ilse, Tomczak & Welling 2018 (ICML) report attention MIL
trained end to end at accuracy 0.904 +- 0.011, 10-fold CV. Here: frozen ImageNet features of 96-px
tiles every 50 px, enlarged to 128 px; stratified 10-fold CV, ten slides of each training part held
back for early stopping, so nothing is chosen on test data. Prints accuracy and AUC over seeds, and
how well the attention of positive test bags finds the tiles with marked epithelial nuclei.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from typing import Any

import numpy as np

from utils.errors import ItemFailed, Refused, run_script
from utils.options import option, parse
from utils.storage import read_json, read_table, write_json

TILE_PX, STEP_PX, ENLARGED_PX = 96, 50, 128
PUBLISHED = "attention MIL, Ilse et al. 2018: accuracy 0.904 +- 0.011"
RECIPES = {  # one recipe a model, the same for every seed and fold; hag_mil sees one magnification
    "abmil": ["--model_type", "abmil"],
    "abmil_ungated": ["--model_type", "abmil", "--ungated"],
    "clam_sb": ["--model_type", "clam_sb", "--bag_weight", "0.7"],
    "clam_mb": ["--model_type", "clam_mb", "--bag_weight", "0.7"],
    "abmilx": ["--model_type", "abmilx", "--inner_dim", "256"],
    "transmil": ["--model_type", "transmil", "--inner_dim", "128"],
    "dsmil": ["--model_type", "dsmil"],
    "hag_mil": ["--model_type", "hag_mil", "--hidden_dims", "128", "128"],
    "mean": ["--model_type", "mean"],
    "max": ["--model_type", "max"],
    "mil": ["--model_type", "mil"],
}
WITHOUT_ATTENTION = ("mean", "max", "mil")
COMMON = ["--lr", "1e-4", "--reg", "1e-3", "--drop_out", "0.25", "--max_epochs", "50",
          "--early_stopping", "--stop_epoch", "15", "--patience", "8"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options."""

    data: Path = option(ROOT.parent / "shared/data/colon_crchisto",
                        help="folder with slides/, labels.csv, nuclei.csv.gz")
    out: Path | None = option(None, help="folder for results (default: a temporary one)")
    folds: int = option(10, help="folds", low=2)
    seeds: tuple[int, ...] = option((1, 2, 3), help="seeds: splits and training")
    models: tuple[str, ...] = option(tuple(RECIPES), help="models to train")
    precision: str = option("fp32", help="encoder precision", choices=("fp32", "bf16"))


def main() -> int:
    """Run everything that is not there yet and print the table."""
    options = parse(Options, prog="colon.py", description="The colon benchmark.")
    if not (options.data / "labels.csv").exists():
        raise Refused(f"{options.data} holds no labels.csv: give the set's folder with --data")
    out = options.out or Path(tempfile.mkdtemp(prefix="colon-"))
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    prepare(options.data, out, options.precision)
    ready = time.monotonic()
    rows = []
    for model in options.models:
        for seed in options.seeds:
            rows.append(cross_validate(model, seed, options.folds, options.data, out))
            print(f"{model} seed {seed}: accuracy {rows[-1]['accuracy']:.3f}, "
                  f"AUC {rows[-1]['auc']:.3f}, attention {rows[-1]['attention']:.3f}", flush=True)
    print_table(rows, options.models)
    print(f"patches and features {ready - start:.0f} s, training and evaluation "
          f"{time.monotonic() - ready:.0f} s; results in {out}")
    write_json(out / "colon.json", rows)
    return 0


def run(*command: object) -> None:
    """One script of ours, quietly; its failure ends the benchmark with its last words."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ItemFailed(f"{command[0]} exit {done.returncode}: "
                         f"{(done.stderr or done.stdout)[-1500:]}")


def prepare(data: Path, out: Path, precision: str) -> None:
    """Tiles and features of the 100 slides."""
    run("create_patches_fp.py", "--source", data / "slides", "--save_dir", out / "patches",
        "--patch_size", TILE_PX, "--step_size", STEP_PX, "--preset", "whole_field.csv",
        "--seg", "--patch")
    run("extract_features_fp.py", "--data_h5_dir", out / "patches",
        "--data_slide_dir", data / "slides", "--slide_ext", ".tif",
        "--csv_path", out / "patches/process_list_autogen.csv", "--feat_dir", out / "features",
        "--model_name", "efficientnet_lite0", "--target_patch_size", ENLARGED_PX,
        "--precision", precision)


def cross_validate(model: str, seed: int, folds: int, data: Path, out: Path) -> dict[str, Any]:
    """Splits, training, evaluation and attention of one model and seed."""
    table = ["--csv_path", data / "labels.csv", "--label_col", "y", "--label_dict", "0:0,1:1"]
    name = f"colon_{seed}"
    run("create_splits_seq.py", *table, "--k", folds, "--scheme", "kfold", "--val_frac", "0.1",
        "--seed", seed, "--splits_root", out / "splits", "--split_dir", name)
    run("main.py", *table, "--data_root_dir", out / "features", "--embed_dim", 1280,
        "--k", folds, "--seed", seed, "--split_dir", (out / "splits" / name).resolve(),
        "--results_dir", out / "results", "--exp_code", model, *RECIPES[model], *COMMON,
        "--fold_workers", os.cpu_count() or 1)
    run("eval.py", *table, "--data_root_dir", out / "features", "--embed_dim", 1280,
        "--k", folds, "--results_dir", out / "results", "--models_exp_code", f"{model}_s{seed}",
        "--save_exp_code", f"{model}_s{seed}",
        "--output_root", out / "eval_results", "--no_report")
    evaluated = out / f"eval_results/EVAL_{model}_s{seed}"
    accuracy = [float(np.mean(fold["Y"].astype(float) == fold["Y_hat"].astype(float)))
                for fold in (read_table(evaluated / f"fold_{k}.csv") for k in range(folds))]
    pooled = read_json(evaluated / "metrics.json")["pooled"]["metrics"]
    return {"model": model, "seed": seed, "accuracy": float(np.mean(accuracy)),
            "auc": pooled["auc"]["value"],
            "attention": attention_auc(out, model, seed, folds, data)}


def attention_auc(out: Path, model: str, seed: int, folds: int, data: Path) -> float:
    """Mean over positive test bags of the AUC of attention for tiles with epithelial nuclei.

    NaN for models without attention.
    """
    if model in WITHOUT_ATTENTION:
        return float("nan")
    from scripts.attention_check import attention_of_fold
    from utils.metrics import binary_auc

    nuclei = epithelial_nuclei(data)
    scores = []
    for fold in range(folds):
        split = read_table(out / f"splits/colon_{seed}/splits_{fold}.csv")
        tested = [name for name in split["test"] if name in nuclei]
        for slide in attention_of_fold(out / f"results/{model}_s{seed}", out / "features", fold,
                                       tested):
            gap = nuclei[slide.slide_id][None] - slide.coords[:, None]  # (tiles, nuclei, 2)
            holds = ((gap >= 0) & (gap < TILE_PX)).all(axis=2).any(axis=1)
            if 0 < holds.sum() < len(holds):
                scores.append(binary_auc(slide.weights, holds.astype(int)))
    return float(np.mean(scores))


def epithelial_nuclei(data: Path) -> dict[str, np.ndarray]:
    """slide id -> (n, 2) positions x, y in level-0 px."""
    import gzip

    places: dict[str, list[tuple[float, float]]] = {}
    with gzip.open(data / "nuclei.csv.gz", "rt") as file:
        next(file)
        for line in file:
            slide_id, x, y, kind = line.strip().split(",")
            if kind == "epithelial":
                places.setdefault(slide_id, []).append((float(x), float(y)))
    return {slide_id: np.asarray(points) for slide_id, points in places.items()}


def print_table(rows: list[dict[str, Any]], models: tuple[str, ...]) -> None:
    """Mean and standard deviation over seeds for each model, beside the published figure."""
    print("\nmodel           accuracy         AUC              attention AUC on nuclei")
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        cells = []
        for key in ("accuracy", "auc", "attention"):
            values = np.array([row[key] for row in mine])
            cells.append(f"{values.mean():.3f} +- {values.std(ddof=min(1, len(values) - 1)):.3f}")
        print(f"{model:<14}  " + "   ".join(cells))
    print(f"published: {PUBLISHED}")


if __name__ == "__main__":
    sys.exit(run_script(main))
