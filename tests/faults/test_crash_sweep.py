"""Kill a stage at every point where it touches a file, run it again: equal to an unbroken run.

Each stage runs once in full with the fault points it passes written down; then once for every
distinct point (first and last passage), killed there with SIGKILL, and once more to the end.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.slides import tissue_image, write_pyramid
from utils.storage import read_h5, save_torch

VOLATILE = ("report_", "events.out", "options.yaml", "process_list_autogen")


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})})
    assert done.returncode in (0, -9), done.stderr[-2000:]
    return done.returncode


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> digest of what the file means (volatile reports left out)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or any(part in path.name for part in VOLATILE):
            continue
        if path.suffix == ".h5":
            data = read_h5(path)
            arrays = sorted((key, array.tobytes()) for key, array in data.arrays.items())
            found[name] = f"{data.parameters} {arrays}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def sweep(command: list[str], out: Path, tmp_path: Path) -> None:
    """Run ``command`` (which writes into ``out``) unbroken, then broken at every site."""
    log = tmp_path / "sites.txt"
    assert run(command, {"MILWRIGHT_FAULT_LOG": str(log)}) == 0
    unbroken = contents(out)
    sites = log.read_text().split()
    assert sites
    for site in dict.fromkeys(sites):
        for passage in sorted({1, sites.count(site)}):
            shutil.rmtree(out)
            run(command, {"MILWRIGHT_FAULT": f"{site}:kill:{passage}"})
            assert run(command) == 0
            assert contents(out) == unbroken, f"{site} passage {passage}"
            assert not list(out.rglob("*.lock")), f"{site}: stray lock"


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_pyramid(folder / "a.tif", tissue_image(1024, 1024, seed=1), downsamples=(1, 4))
    return folder


def patching(slides: Path, out: Path) -> list[str]:
    return ["create_patches_fp.py", "--source", str(slides), "--save_dir", str(out), "--seg",
            "--patch", "--preset", "bwh_biopsy.csv", "--workers", "0"]


def test_patching(slides: Path, tmp_path: Path) -> None:
    """The coarse grid and a finer level in the folder beside it."""
    sweep([*patching(slides, tmp_path / "out" / "grid_level_1"), "--patch_level", "1",
           "--patch_size", "64", "--step_size", "64", "--child_levels", "0"],
          tmp_path / "out", tmp_path)


def test_extraction(slides: Path, tmp_path: Path) -> None:
    assert run(patching(slides, tmp_path / "patches")) == 0
    command = ["extract_features_fp.py", "--data_h5_dir", str(tmp_path / "patches"),
               "--data_slide_dir", str(slides), "--slide_ext", ".tif",
               "--csv_path", str(tmp_path / "patches/process_list_autogen.csv"),
               "--feat_dir", str(tmp_path / "out"), "--model_name", "efficientnet_lite0"]
    sweep(command, tmp_path / "out", tmp_path)


def test_training(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    import torch

    features = tmp_path / "features" / "pt_files"
    features.mkdir(parents=True)
    rows = ["case_id,slide_id,label"]
    for number in range(12):
        label = number % 2
        save_torch(features / f"s{number}.pt",
                   torch.tensor(rng.normal(label, 1, (9, 16)), dtype=torch.float32))
        rows.append(f"p{number},s{number},{'ab'[label]}")
    table = tmp_path / "t.csv"
    table.write_text("\n".join(rows) + "\n")
    common = ["--csv_path", str(table), "--label_dict", "a:0,b:1"]
    assert run(["create_splits_seq.py", *common, "--k", "1", "--val_frac", "0.2",
                "--test_frac", "0.2", "--splits_root", str(tmp_path), "--split_dir", "sp"]) == 0
    command = ["main.py", *common, "--data_root_dir", str(tmp_path / "features"),
               "--embed_dim", "16", "--k", "1", "--split_dir", str(tmp_path / "sp"),
               "--results_dir", str(tmp_path / "out"), "--exp_code", "x", "--max_epochs", "2"]
    sweep(command, tmp_path / "out", tmp_path)
