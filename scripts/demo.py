"""The demo: all six scripts on a small real cohort, from slides to heatmaps and report.

    make demo            (or: python scripts/demo.py --out demo)

Every command is printed before it runs, so it can be typed again by hand. Run a second time, each
stage finds its results and says so.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from utils.errors import ItemFailed, run_script
from utils.options import option, parse
from utils.storage import read_json, read_table, write_json, write_text

FOLDS = 5
PATCH_PX = 256
ENCODER = "efficientnet_lite0"
EMBED_DIM = "1280"
EXPERIMENT = "clam_sb"
SEED = "1"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options."""

    out: Path = option(Path("demo"), help="folder for slides and results")
    slides: int = option(40, help="slides in the cohort", low=20)
    precision: str = option("fp32", help="precision of the encoder", choices=("fp32", "bf16"))


def main() -> int:
    """Build the cohort, run the scripts, print where to look and what was found."""
    options = parse(Options, prog="demo.py", description="Run the demo.")
    out = options.out
    seconds: dict[str, float] = {}
    write_heatmap_config(out)
    for name, command in commands(out, options.slides, options.precision):
        start = time.monotonic()
        run(command)
        seconds[name] = time.monotonic() - start
    overlap = planted_attention(out)
    print_summary(out, overlap, seconds)
    return 0


def commands(out: Path, slides: int, precision: str) -> list[tuple[str, list[str]]]:
    """The demo as (stage, command line) pairs, in order."""
    table = ["--csv_path", f"{out}/cohort.csv", "--label_dict", "skin:0,colon:1"]
    run_name = f"{EXPERIMENT}_s{SEED}"
    steps = [("cohort", ["scripts/demo_cohort.py", "--out", f"{out}", "--slides", f"{slides}"])]
    for folder, name in (("slides", "cohort"), ("real_slide", "real")):
        extension = ".tif" if name == "cohort" else ".svs"
        steps += [
            (f"patches ({name})", [
                "create_patches_fp.py", "--source", f"{out}/{folder}",
                "--save_dir", f"{out}/patches_{name}", "--patch_size", f"{PATCH_PX}",
                "--step_size", f"{PATCH_PX}", "--preset", "bwh_biopsy.csv",
                "--seg", "--patch", "--stitch"]),
            (f"features ({name})", [
                "extract_features_fp.py", "--data_h5_dir", f"{out}/patches_{name}",
                "--data_slide_dir", f"{out}/{folder}", "--slide_ext", extension,
                "--csv_path", f"{out}/patches_{name}/process_list_autogen.csv",
                "--feat_dir", f"{out}/features_{name}", "--model_name", ENCODER,
                "--precision", precision])]
    steps += [
        ("splits", ["create_splits_seq.py", *table, "--k", f"{FOLDS}", "--scheme", "kfold",
                    "--val_frac", "0.2", "--seed", SEED, "--splits_root", f"{out}/splits",
                    "--split_dir", "cohort"]),
        ("training", ["main.py", *table, "--data_root_dir", f"{out}/features_cohort",
                      "--embed_dim", EMBED_DIM, "--k", f"{FOLDS}", "--seed", SEED,
                      "--split_dir", f"{(out / 'splits/cohort').resolve()}",
                      "--results_dir", f"{out}/results", "--exp_code", EXPERIMENT,
                      "--model_type", "clam_sb", "--drop_out", "0.25", "--lr", "2e-4",
                      "--max_epochs", "20", "--fold_workers", "2", "--log_data"]),
        ("evaluation", ["eval.py", *table, "--data_root_dir", f"{out}/features_cohort",
                        "--embed_dim", EMBED_DIM, "--k", f"{FOLDS}",
                        "--results_dir", f"{out}/results", "--models_exp_code", run_name,
                        "--save_exp_code", EXPERIMENT, "--model_type", "clam_sb",
                        "--output_root", f"{out}/eval_results"]),
        ("heatmaps", ["create_heatmaps.py", "--config_file", f"{out}/heatmap.yaml", "--yes"]),
        ("heatmap (real)", ["create_heatmaps.py", "--config_file", f"{out}/heatmap_real.yaml",
                            "--yes"])]
    return steps


def run(command: list[str]) -> None:
    """Print and run one script of ours; its failure ends the demo with its words."""
    print("\n$ python " + " ".join(command), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        raise ItemFailed(f"{command[0]} ended with exit code {code}; what it said is above")


def write_heatmap_config(out: Path) -> None:
    """Two YAML files for create_heatmaps.py: three cohort slides, and the real slide alone."""
    import yaml

    (out / "heatmap").mkdir(parents=True, exist_ok=True)
    lists = {"heatmap": ["slide_id,label", "demo_000.tif,colon", "demo_001.tif,colon",
                         "demo_002.tif,skin"],
             "heatmap_real": ["slide_id", "cmu_small_region.svs"]}
    for name, rows in lists.items():
        real = name == "heatmap_real"
        process_list = out / "heatmap" / f"{name}_slides.csv"
        write_text(process_list, "\n".join(rows) + "\n")
        config = {
            "exp_arguments": {
                "n_classes": 2, "save_exp_code": name, "batch_size": 64,
                "raw_save_dir": f"{out}/heatmap/raw",
                "production_save_dir": f"{out}/heatmap/production"},
            "data_arguments": {
                "data_dir": f"{out}/{'real_slide' if real else 'slides'}",
                "process_list": str(process_list.resolve()),
                "preset": "presets/bwh_biopsy.csv", "slide_ext": ".svs" if real else ".tif",
                "label_dict": {"skin": 0, "colon": 1}},
            "patching_arguments": {"patch_size": PATCH_PX, "overlap": 0.5, "patch_level": 0},
            "encoder_arguments": {"model_name": ENCODER, "target_img_size": 224},
            "model_arguments": {
                "ckpt_path": f"{out}/results/{EXPERIMENT}_s{SEED}/s_0_checkpoint.pt",
                "model_type": "clam_sb", "drop_out": 0.25, "embed_dim": int(EMBED_DIM)},
            "heatmap_arguments": {"vis_level": 0 if real else 1, "alpha": 0.4, "cmap": "jet"},
            "sample_arguments": {"samples": [
                {"name": "topk_high_attention", "sample": True, "seed": 1, "k": 8,
                 "mode": "topk"}]}}
        write_text(out / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False))


def planted_attention(out: Path) -> dict[str, float]:
    """Mean shares of attention and of patches on the planted colon regions, test folds."""
    from scripts.attention_check import attention_of_fold, share_on_ellipse

    planted = read_table(out / "planted.csv").set_index("slide_id")
    shares = []
    for fold in range(FOLDS):
        split = read_table(out / "splits/cohort" / f"splits_{fold}.csv")
        tested = [name for name in split["test"] if name and planted.tissue[name] == "colon"]
        for attention in attention_of_fold(out / f"results/{EXPERIMENT}_s{SEED}",
                                           out / "features_cohort", fold, tested):
            x, y, radius_x, radius_y = (
                float(planted[name][attention.slide_id])
                for name in ("x", "y", "radius_x", "radius_y"))
            shares.append(share_on_ellipse(attention, centre=(x, y), radii=(radius_x, radius_y),
                                               patch_px_l0=PATCH_PX))
    attention_share = sum(share[0] for share in shares) / len(shares)
    patch_share = sum(share[1] for share in shares) / len(shares)
    found = {"slides": len(shares), "attention_share": attention_share,
             "patch_share": patch_share, "enrichment": attention_share / patch_share}
    write_json(out / "planted_attention.json", found)
    return found


def print_summary(out: Path, overlap: dict[str, float], seconds: dict[str, float]) -> None:
    """The table at the end: AUC of each fold with its interval, attention, seconds, places."""
    metrics = read_json(out / f"eval_results/EVAL_{EXPERIMENT}/metrics.json")
    print("\nfold   test AUC   95 % interval")
    for name, part in [*metrics["folds"].items(), ("all", metrics["pooled"])]:
        print(f"{name:>4}   {auc_text(part['metrics']['auc'])}")
    print(f"\n{overlap['slides']:.0f} positive test slides: patches that show the planted region "
          f"are {overlap['patch_share']:.0%} of all\nand take {overlap['attention_share']:.0%} of "
          f"the attention ({overlap['enrichment']:.1f} times chance)")
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
          + f"; in all {sum(seconds.values()):.0f}")
    print("\nlook at\n"
          f"  {out}/eval_results/EVAL_{EXPERIMENT}/report.html      the evaluation\n"
          f"  {out}/heatmap/production/heatmap/        heatmaps, GeoJSON for QuPath\n"
          f"  {out}/heatmap/production/heatmap_real/   the real slide alone\n"
          f"  {out}/patches_cohort/masks/, stitches/   segmentation and patches\n"
          f"  tensorboard --logdir {out}/results       training curves")


def auc_text(value: dict[str, float | None]) -> str:
    """``0.950      0.812 - 1.000``, or why there is none."""
    if value.get("value") is None:
        return f"  -        {value.get('reason', '')}"
    return f"{value['value']:8.3f}   {value['low']:.3f} - {value['high']:.3f}"


if __name__ == "__main__":
    sys.exit(run_script(main))
