"""What breaks a heatmap run, and what it then does: each slide alone, nothing half-written kept.

Numbers in brackets are rows of the fault table (A files, B slides, C tables, D models).
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import create_heatmaps
from tests.conftest import ROOT
from tests.heatmap_project import (
    EMBED_DIM,
    PRODUCTION,
    copy_project,
    make_project,
    write_checkpoint,
    write_config,
    write_hierarchy,
)
from tests.slides import tissue_image, write_pyramid
from utils.errors import Refused
from utils.locks import claim
from utils.storage import read_h5, read_json
from wsi_core.heatmap import colour_table

RAW = Path("raw/exp/tumor/s_0")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project before its first run; do not change."""
    return make_project(tmp_path_factory.mktemp("heatmaps") / "project")


@pytest.fixture(scope="module")
def unbroken(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a run in which nothing went wrong; do not change."""
    root = copy_project(prepared, tmp_path_factory.mktemp("unbroken") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert draw() == 0
    return root


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = copy_project(prepared, tmp_path / "project")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def finished(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = copy_project(unbroken, tmp_path / "project")
    monkeypatch.chdir(root)
    return root


def draw(changes: dict[str, Any] | None = None) -> int:
    """In this process."""
    write_config(Path(), changes)
    return create_heatmaps.main(["--config_file", "c.yaml", "--yes", "--device", "cpu"])


def start(root: Path, **env: str) -> subprocess.Popen[str]:
    """In a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "create_heatmaps.py"), "--config_file", "c.yaml"], cwd=root,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env})


def rows() -> dict[str, dict[str, Any]]:
    return {row["item"]: row for row in read_json(Path("raw/exp/report_heatmaps.json"))["items"]}


def hashes(root: Path) -> dict[str, str]:
    """Everything of the slides: h5 by their arrays, the rest by bytes."""
    found = {}
    for path in sorted([*root.glob("raw/exp/*/**/*"), *root.glob("prod/**/*")]):
        if not path.is_file():
            continue
        if path.suffix == ".h5":
            arrays = read_h5(path).arrays
            data = b"".join(arrays[name].tobytes() for name in sorted(arrays))
        elif path.name.endswith("_record.json"):
            continue
        else:
            data = path.read_bytes()
        found[str(path.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return found


# ---------------------------------------------------------------------------- files

@pytest.mark.parametrize("fault", ["storage.open:kill:3", "storage.write:kill:7",
                                   "storage.replace:kill:10", "storage.done:kill:4"])
def test_killed_at_any_write_then_finished(project: Path, unbroken: Path, fault: str) -> None:
    """[A1, A2] Run again, the result is that of the unbroken run."""
    run = start(project, MILWRIGHT_FAULT=fault)
    run.communicate(timeout=300)
    assert run.returncode == -signal.SIGKILL
    assert draw() == 0
    assert hashes(project) == hashes(unbroken)
    assert not list(project.rglob(".mw-tmp-*"))


@pytest.mark.parametrize("name", ["s_0.h5", "s_0_blockmap.h5", "s_0_0.5_roi_False.h5", "s_0.pt",
                                  "s_0_mask.json", "s_0_blockmap.png", "s_0_record.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_results_are_made_again(
    finished: Path, unbroken: Path, name: str, damage: str
) -> None:
    """[A4, A6, A7] Truncated, altered or missing files are noticed and redone."""
    path = RAW / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data[:len(data) // 2] if damage == "cut" else data)
    assert draw() == 0
    assert hashes(finished) == hashes(unbroken)


def test_damaged_picture_is_drawn_again(finished: Path, unbroken: Path) -> None:
    Path(PRODUCTION).write_bytes(b"x")
    assert draw() == 0
    assert hashes(finished) == hashes(unbroken)


def test_full_disk_fails_the_slide_and_leaves_nothing_half(project: Path, unbroken: Path) -> None:
    """[A8]"""
    run = start(project, MILWRIGHT_FAULT="storage.write:enospc:5")
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 3 and "Traceback" not in errors
    assert "no space left" in rows()["s_0"]["reason"] and rows()["s_1"]["status"] == "done"
    assert not list(project.rglob(".mw-tmp-*"))
    assert draw() == 0
    assert hashes(project) == hashes(unbroken)


def test_output_that_cannot_be_written_is_refused(project: Path) -> None:
    """[A9]"""
    Path("raw").write_text("a file")
    with pytest.raises(Refused, match="raw_save_dir raw/exp cannot be written"):
        draw()


def test_slide_of_another_process_is_busy(project: Path) -> None:
    """[A10]"""
    RAW.parent.mkdir(parents=True)
    with claim(RAW) as mine:
        assert mine
        assert draw() == 0
    assert rows()["s_0"]["status"] == "busy" and rows()["s_1"]["status"] == "done"
    assert not (RAW / "s_0.h5").exists()


def test_sigterm_says_how_to_go_on(project: Path) -> None:
    """[A14]"""
    run = start(project, MILWRIGHT_FAULT="storage.write:sleep:6")
    for _ in range(900):
        if list(project.glob("raw/exp/tumor/s_0/.mw-tmp-*")) and (RAW / "s_0_mask.jpg").exists():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 143 and "terminated" in errors and "Traceback" not in errors
    assert not list(project.rglob(".mw-tmp-*"))


# ---------------------------------------------------------------------------- slides

@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut"])
def test_one_bad_slide_costs_itself_alone(project: Path, kind: str) -> None:
    """[B1, B2] The list says why; the others are drawn."""
    path = Path("slides/s_0.tif")
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"not a slide\n" * 99,
                          "cut": data[:len(data) // 2]}[kind])
    if kind == "cut":  # once as a process
        run = start(project)
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 3 and "Traceback" not in errors
    else:
        assert draw() == 3
    assert rows()["s_0"]["status"] == "failed" and "s_0.tif" in rows()["s_0"]["reason"]
    assert rows()["s_1"]["status"] == "done"
    first, second = Path("heatmaps/results/list.csv").read_text().splitlines()[1:]
    assert ",failed," in first and ",processed," in second


def test_blank_slide_is_empty_and_forgets_what_was_there(finished: Path) -> None:
    """[B9]"""
    write_pyramid(Path("slides/s_0.tif"), np.full((768, 1024, 3), 243, np.uint8))
    assert draw() == 0
    assert rows()["s_0"]["status"] == "empty" and "no tissue" in rows()["s_0"]["reason"]
    assert rows()["s_1"]["status"] == "already done"
    assert sorted(path.name for path in RAW.iterdir()) == [
        "s_0_mask.jpg", "s_0_mask.json", "s_0_record.json"]
    assert not list(Path("prod/exp/tumor").iterdir())
    assert not list(Path("prod").rglob("*_s_0_*.png"))


def test_patch_larger_than_the_tissue_is_empty(project: Path) -> None:
    """[B10]"""
    assert draw({"patching_arguments.patch_size": 900}) == 0
    assert "no patch lies wholly" in rows()["s_0"]["reason"]


def test_replaced_slide_is_not_mixed_with_old_results(finished: Path) -> None:
    """[A20]"""
    before = (RAW / "s_0.h5").stat().st_mtime_ns
    Path("slides/s_1.tif").rename("slides/s_0.tif")
    Path("list.csv").write_text("slide_id,label\ns_0,tumor\n")
    assert draw() == 0
    assert (RAW / "s_0.h5").stat().st_mtime_ns != before


# ---------------------------------------------------------------------------- tables, models

@pytest.mark.parametrize(("listing", "message"), [
    ("slide_id\n../../etc/passwd\n", "not a plain name"),
    ("slide_id\na\x00b\n", "."), ("slide_id,label\ns_0,../x\n", "unknown label"),
    ("", "."), ("slide_id\ns_0\ns_0\n", "twice")])
def test_bad_lists_are_refused_before_any_work(
    project: Path, listing: str, message: str
) -> None:
    """[C1, C7]"""
    Path("list.csv").write_text(listing)
    with pytest.raises(Refused, match=message):
        draw()
    assert not Path("raw").exists()


@pytest.mark.parametrize("text", ["heatmap_arguments: {alhpa: 1}", "a: [", "&a b: *a", "\x00"])
def test_bad_yaml_ends_with_one_line(project: Path, text: str) -> None:
    """[C8, D14] In a process without a terminal."""
    Path("c.yaml").write_text(text)
    run = start(project)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and errors.startswith("error: c.yaml")
    assert len(errors.splitlines()) == 1


def test_checkpoints_that_cannot_be_used_are_refused(project: Path) -> None:
    """[D7, D8] Another model, objects that would run code, a cut file, none at all."""
    import pickle

    write_checkpoint(Path("mb.pt"), "clam_mb")
    with pytest.raises(Refused, match="expected model type clam_sb, found model type clam_mb"):
        draw({"model_arguments.ckpt_path": "mb.pt"})
    Path("evil.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(Refused, match="evil.pt"):
        draw({"model_arguments.ckpt_path": "evil.pt"})
    Path("cut.pt").write_bytes(Path("s_0_checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(Refused, match="cut.pt"):
        draw({"model_arguments.ckpt_path": "cut.pt"})
    with pytest.raises(Refused, match="none.pt is missing"):
        draw({"model_arguments.ckpt_path": "none.pt"})
    write_checkpoint(Path("wide.pt"), "clam_sb", embed_dim=EMBED_DIM + 1)
    with pytest.raises(Refused, match="width"):  # [D3]
        draw({"model_arguments.ckpt_path": "wide.pt",
              "model_arguments.embed_dim": EMBED_DIM + 1})


def test_attention_that_is_no_number_fails_with_its_reason(project: Path) -> None:
    """[D13] And nothing is drawn from it."""
    import torch

    state = torch.load("s_0_checkpoint.pt", weights_only=True)
    name = next(name for name in state if name.endswith("attention_c.bias"))
    torch.save({**state, name: state[name] * float("nan")}, "nan.pt")
    assert draw({"model_arguments.ckpt_path": "nan.pt"}) == 3
    assert "not a number" in rows()["s_0"]["reason"]
    assert not (RAW / "s_0_blockmap.h5").exists() and not Path(PRODUCTION).exists()


def test_constant_attention_is_drawn(project: Path) -> None:
    """[D13] Equal scores share the middle rank, so the tissue has one colour."""
    import torch

    state = torch.load("s_0_checkpoint.pt", weights_only=True)
    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, "zero.pt")
    assert draw({"model_arguments.ckpt_path": "zero.pt", "heatmap_arguments.alpha": 1.0,
                 "heatmap_arguments.save_ext": "png"}) == 0
    name = PRODUCTION.replace("_a_0.4", "_a_1.0").replace(".jpg", ".png")
    picture = cv2.imread(name)
    assert picture is not None
    n = len(read_h5(RAW / "s_0.h5").arrays["coords"])
    colour = colour_table("jet")[int((50 + 50 / n) / 100 * 256)][::-1]
    assert (picture == colour).all(axis=2).mean() > 0.1


def test_one_patch_is_drawn(project: Path) -> None:
    """[D13]"""
    Path("list.csv").write_text("slide_id,label,x1,x2,y1,y2\ns_0,tumor,600,664,400,464\n")
    assert draw({"heatmap_arguments.use_roi": True}) == 0
    assert draw({"patching_arguments.patch_size": 250, "patching_arguments.overlap": 0}) == 0
    assert 1 <= len(read_h5(RAW / "s_0.h5").arrays["coords"]) <= 4


# ---------------------------------------------------------------------------- magnifications

HAG_RAW = Path("raw/hag/tumor/s_0")


@pytest.fixture(scope="module")
def unbroken_levels(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model of three magnifications in which nothing went wrong; do not change."""
    root = copy_project(prepared, tmp_path_factory.mktemp("levels") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert draw(write_hierarchy(Path())) == 0
    return root


@pytest.mark.parametrize("fault", ["storage.replace:kill:7", "storage.write:kill:9"])
def test_levels_killed_at_a_write_then_finished(
    project: Path, unbroken_levels: Path, fault: str
) -> None:
    """[A1, A2]"""
    changes = write_hierarchy(Path())
    write_config(project, changes)
    run = start(project, MILWRIGHT_FAULT=fault)
    run.communicate(timeout=300)
    assert run.returncode == -signal.SIGKILL
    assert not (HAG_RAW / "s_0_blockmap_level_0.h5").exists()
    assert draw(changes) == 0
    assert hashes(project) == hashes(unbroken_levels)
    assert not list(project.rglob(".mw-tmp-*"))


@pytest.mark.parametrize("name", ["s_0.h5", "s_0_level_1.h5", "s_0_blockmap_level_0.h5"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_levels_are_made_again(
    unbroken_levels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    """[A4, A6, A7]"""
    root = copy_project(unbroken_levels, tmp_path / "project")
    monkeypatch.chdir(root)
    path = HAG_RAW / name
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:len(data) // 2])
    assert draw(write_hierarchy(Path())) == 0
    assert hashes(root) == hashes(unbroken_levels)


def test_a_slide_without_the_levels_fails_alone(project: Path) -> None:
    """Its pyramid ends early; the other slide is drawn."""
    changes = write_hierarchy(Path())
    write_pyramid(Path("slides/s_0.tif"), tissue_image(1024, 768), downsamples=(1, 2))
    assert draw(changes) == 3
    found = {row["item"]: row for row in read_json(Path("raw/hag/report_heatmaps.json"))["items"]}
    assert "s_0.tif has no level 2 to read patches from" in found["s_0"]["reason"]
    assert found["s_1"]["status"] == "done"
    write_pyramid(Path("slides/s_0.tif"), tissue_image(1024, 768), downsamples=(1, 3, 4))
    assert draw(changes) == 3  # level 1 is no whole number of times finer
    found = {row["item"]: row for row in read_json(Path("raw/hag/report_heatmaps.json"))["items"]}
    assert "s_0.tif" in found["s_0"]["reason"] and "whole number" in found["s_0"]["reason"]


def test_levels_of_a_blank_slide_are_forgotten(
    unbroken_levels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[B9]"""
    root = copy_project(unbroken_levels, tmp_path / "project")
    monkeypatch.chdir(root)
    write_pyramid(Path("slides/s_0.tif"), np.full((768, 1024, 3), 243, np.uint8))
    assert draw(write_hierarchy(Path())) == 0
    assert sorted(path.name for path in HAG_RAW.iterdir()) == [
        "s_0_mask.jpg", "s_0_mask.json", "s_0_record.json"]
    assert not list(Path("prod/hag/tumor").iterdir())
