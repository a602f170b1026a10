"""Kill a stage at every point where it touches a file, run it again: equal to an unbroken run.

Each stage runs once in full with the fault points it passes written down; then once for every
distinct point (see ``passages``), killed there with SIGKILL, and once more to the end. Runs are
forks of one process that has imported the script and done nothing else, as imports would take most
of the time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.slides import tissue_image, write_pyramid
from utils.storage import read_h5, save_torch
from wsi_core.coords import read_coords
from wsi_core.image_record import read_record
from wsi_core.patch_lmdb_reader import PatchLmdbReader

VOLATILE = ("report_", "events.out", "options.yaml", "process_list_autogen", ".lmdb-lock")
PATCHING = "wsi_core.patching wsi_core.deriving wsi_core.planning cv2 h5py pandas tqdm"
EXTRACTION = f"{PATCHING} torch timm torchvision datasets.extraction models.encoders"
TRAINING = "h5py pandas tqdm torch sklearn.metrics utils.folds utils.training_loop"


FORKING = """
import importlib, os, sys

script, *preload = sys.argv[1].split()
main = importlib.import_module(script).main
for name in preload:
    importlib.import_module(name)
from utils.errors import run_script

for line in sys.stdin:  # a setting of the environment, or none
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(2, 1)  # stdout is for the answers
        name, _, value = line.strip().partition("=")
        if name:
            os.environ[name] = value
        os._exit(run_script(lambda: main(sys.argv[2:])))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run(command: list[str]) -> None:
    """Run a script to its good end."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


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
        elif path.suffix == ".lmdb":
            found[name] = packed(path)
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def packed(path: Path) -> str:
    """What a patch database holds; its pages lie in the order of their making."""
    with PatchLmdbReader(path) as reader:
        for slide_id in reader.slides():
            reader.verify(slide_id)
        return repr([(slide_id, reader.facts(slide_id), reader.coords(slide_id).tolist())
                     for slide_id in reader.slides()])


def passages(site: str, count: int, *, every: bool) -> list[int]:
    """Which passages of a site to kill at: first and last, or every one.

    A temporary is the same to the next run whether it is empty, full or synced: where runs take
    seconds it is left by ``storage.replace`` alone.
    """
    if site in ("storage.open", "storage.write"):
        return [1] if every else []
    return list(range(1, count + 1)) if every else sorted({1, count})


def sweep(command: list[str], out: Path, tmp_path: Path, *, preload: str = "",
          every_passage: bool = False) -> None:
    """Run ``command`` (which writes into ``out``) unbroken, then broken at every site.

    preload: modules that the script imports late, imported once for all runs
    """
    script, *flags = command
    log, said = tmp_path / "sites.txt", tmp_path / "said.txt"
    with said.open("w") as stderr, subprocess.Popen(
            [sys.executable, "-c", FORKING, f"{Path(script).stem} {preload}", *flags], cwd=ROOT,
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            env={**environment(), "PYTHONPATH": str(ROOT)}) as server:
        to, back = server.stdin, server.stdout
        assert to is not None and back is not None

        def fork(setting: str = "", *, ends: tuple[str, ...] = ("0",)) -> None:
            print(setting, file=to, flush=True)
            assert back.readline().strip() in ends, setting + said.read_text()[-2000:]

        fork(f"MILWRIGHT_FAULT_LOG={log}")
        unbroken = contents(out)
        counts: dict[str, int] = {}  # the most that one process passed a site
        for line, times in Counter(log.read_text().splitlines()).items():
            site = line.split(" ")[0]
            counts[site] = max(times, counts.get(site, 0))
        assert counts
        for site, count in counts.items():
            for passage in passages(site, count, every=every_passage):
                shutil.rmtree(out)
                # or its child is killed, which costs a slide
                fork(f"MILWRIGHT_FAULT={site}:kill:{passage}", ends=("-9", "3"))
                fork()
                assert contents(out) == unbroken, f"{site} passage {passage}"
                stray = [*out.rglob("*.lock"), *out.rglob(".mw-tmp-*")]
                assert not stray, f"{site} passage {passage}"


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_pyramid(folder / "a.tif", tissue_image(1536, 1536, seed=1), downsamples=(1, 4))
    return folder


def patching(slides: Path, out: Path) -> list[str]:
    return ["create_patches_fp.py", "--source", str(slides), "--save_dir", str(out), "--seg",
            "--patch", "--preset", "bwh_biopsy.csv", "--workers", "0"]


def test_patching(slides: Path, tmp_path: Path) -> None:
    """The coarse grid and a finer level in the folder beside it."""
    sweep([*patching(slides, tmp_path / "out" / "grid_level_1"), "--patch_level", "1",
           "--patch_size", "64", "--step_size", "64", "--child_levels", "0"],
          tmp_path / "out", tmp_path, preload=PATCHING)
    assert len(read_coords(tmp_path / "out/grid_level_1/patches/a.h5")) > 5


def test_patching_with_everything_beside(slides: Path, tmp_path: Path) -> None:
    """Physical scale, one lattice, outlines, overlay, pictures, database: every single write."""
    sweep([*patching(slides, tmp_path / "out"), "--patch_mpp", "1", "--patch_size", "64",
           "--lattice", "global", "--save_geojson", "--visualize", "grid", "--save_images", "jpeg",
           "--max_images", "2", "--save_lmdb", "p"],
          tmp_path / "out", tmp_path, preload=PATCHING, every_passage=True)
    assert len(read_coords(tmp_path / "out/patches/a.h5")) > 5


def test_slide_images(slides: Path, tmp_path: Path) -> None:
    """Image, tissue map and record; no coordinates."""
    command = patching(slides, tmp_path / "out")
    command.remove("--patch")
    sweep([*command, "--slide_images", "1.0"], tmp_path / "out", tmp_path,
          preload=f"{PATCHING} tifffile")
    assert read_record(tmp_path / "out/slide_images/a.json").boxes


def test_extraction(slides: Path, tmp_path: Path) -> None:
    """Features, the slide's vector, the table of vectors."""
    run(patching(slides, tmp_path / "patches"))
    assert len(read_coords(tmp_path / "patches/patches/a.h5")) > 5
    command = ["extract_features_fp.py", "--data_h5_dir", str(tmp_path / "patches"),
               "--data_slide_dir", str(slides), "--slide_ext", ".tif",
               "--csv_path", str(tmp_path / "patches/process_list_autogen.csv"),
               "--feat_dir", str(tmp_path / "out"), "--model_name", "efficientnet_lite0",
               "--slide_encoder", "mean"]
    sweep(command, tmp_path / "out", tmp_path, preload=EXTRACTION)


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
    run(["create_splits_seq.py", *common, "--k", "1", "--val_frac", "0.2", "--test_frac", "0.2",
         "--splits_root", str(tmp_path), "--split_dir", "sp"])
    command = ["main.py", *common, "--data_root_dir", str(tmp_path / "features"),
               "--embed_dim", "16", "--k", "1", "--split_dir", str(tmp_path / "sp"),
               "--results_dir", str(tmp_path / "out"), "--exp_code", "x", "--max_epochs", "2"]
    sweep(command, tmp_path / "out", tmp_path, preload=TRAINING)
