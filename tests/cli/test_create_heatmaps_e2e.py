"""create_heatmaps.py with an end-to-end model, which brings its own encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import create_heatmaps
from datasets.patch_streams import HeldPatches
from models.trained import load_as_described
from tests.conftest import ROOT
from tests.heatmap_project import (
    copy_project,
    make_project,
    tree_of,
    write_config,
    write_described,
)
from utils.contracts import Bag
from utils.errors import Refused
from utils.storage import file_sha256, read_h5, read_json, write_json
from wsi_core.slide import open_slide

MODEL, SIDE_PX, PATCH_PX = "e2e_test_resnet_abmilx", 48, 64
RAW = Path("raw/exp/tumor/s_0")
CHANGES: dict[str, Any] = {
    "model_arguments.ckpt_path": "e2e.pt", "model_arguments.model_type": None,
    "encoder_arguments.model_name": None, "encoder_arguments.ckpt_path": None,
    "encoder_arguments.target_img_size": 224}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project on which the script drew an end-to-end model, as a process; do not change."""
    root = make_project(tmp_path_factory.mktemp("e2e") / "project")
    write_described(root / "e2e.pt", MODEL, options={
        "img_size": SIDE_PX, "inner_dim": 32, "n_heads": 4, "p_batch_size_v": 16})
    write_config(root, CHANGES)
    run = subprocess.run(
        [sys.executable, str(ROOT / "create_heatmaps.py"), "--config_file", "c.yaml"], cwd=root,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    (root / "output.txt").write_text(run.stdout + run.stderr)
    return root


Draw = Callable[..., int]


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project, and the current folder."""
    root = copy_project(finished, tmp_path / "project")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def draw(project: Path) -> Draw:
    """Change the config and run."""

    def run(changes: dict[str, Any] | None = None, *flags: str) -> int:
        write_config(project, {**CHANGES, **(changes or {})})
        return create_heatmaps.main(["--config_file", "c.yaml", "--yes", "--device", "cpu",
                                     *flags])

    return run



def patches_at(coords: np.ndarray) -> HeldPatches:
    with open_slide(Path("slides/s_0.tif")) as slide:
        return HeldPatches((torch.from_numpy(np.stack([
            np.asarray(slide.read_region((int(x), int(y)), 0, (PATCH_PX, PATCH_PX)))
            for x, y in coords])),))


def test_the_map_is_that_of_the_whole_model(project: Path) -> None:
    """Features, prediction and attention are those of the model that is given the patches."""
    stored, blocks = read_h5(RAW / "s_0.h5"), read_h5(RAW / "s_0_blockmap.h5")
    coords = stored.arrays["coords"]
    held = patches_at(coords)
    model: Any = load_as_described(Path("e2e.pt")).build().eval()
    with torch.inference_mode():
        features = model.features(held).numpy()
        output = model(Bag(slide_id="s_0", features=torch.zeros(len(coords), 0), coords=coords,
                           patches=held))
    assert features.std(axis=0).max() > 1e-3
    np.testing.assert_allclose(stored.arrays["features"], features, atol=1e-5)
    np.testing.assert_allclose(blocks.root["prediction"], output.probabilities[0].numpy(),
                               atol=1e-5)
    np.testing.assert_allclose(blocks.arrays["attention_scores"][:, 0],
                               output.attention[0].numpy(), atol=1e-4)
    parameters = blocks.parameters
    assert parameters is not None and parameters["model"]["model_type"] == MODEL
    assert parameters["encoder"]["weights_sha256"] == file_sha256(Path("e2e.pt"))
    assert parameters["encoder"]["target_px"] == SIDE_PX


def test_all_files_are_there_and_the_encoder_is_named(project: Path) -> None:
    fine = read_h5(RAW / "s_0_0.5_roi_False.h5")
    assert fine.parameters is not None and fine.parameters["scored"] == "in bags"
    assert len(fine.arrays["coords"]) > 2 * len(read_h5(RAW / "s_0.h5").arrays["coords"])
    cells = json.loads(Path("prod/exp/tumor/s_0_attention.geojson").read_text())["features"]
    assert any(cell["properties"]["objectType"] == "detection" for cell in cells)
    assert len(list(Path("prod/exp/sampled_patches").rglob("*_s_0_*.png"))) == 2
    text = (project / "output.txt").read_text()
    assert f"its own encoder (test_resnet, {SIDE_PX} px); encoder_arguments have no effect" in text
    assert "warning" not in text


def test_again_does_nothing_and_a_region_needs_the_fine_map_alone(
    project: Path, draw: Draw
) -> None:
    before = tree_of(project)
    assert draw({"encoder_arguments.model_name": "test_resnet",
                 "encoder_arguments.target_img_size": SIDE_PX}) == 0
    same = {name for name in before if name.endswith((".h5", ".pt", ".jpg", ".geojson"))}
    assert same and all(tree_of(project)[name] == before[name] for name in same)
    assert draw({"heatmap_arguments.use_roi": True}) == 0
    coords = read_h5(RAW / "s_0_0.5_roi_True.h5").arrays["coords"]
    assert coords.min(axis=0).tolist() >= [500, 300] and (coords.max(axis=0) <= [800, 560]).all()


def test_another_encoder_is_refused(draw: Draw) -> None:
    with pytest.raises(Refused, match="model_name is uni_v1, but the checkpoint is an end-to-end"):
        draw({"encoder_arguments.model_name": "uni_v1"})
    with pytest.raises(Refused, match="ckpt_path is encoder.pt, but the checkpoint is an end-to-"):
        draw({"encoder_arguments.ckpt_path": "encoder.pt"})


def test_an_aggregator_without_attention_is_refused(draw: Draw, project: Path) -> None:
    write_described(project / "mean.pt", "e2e_test_resnet_mean", options={"img_size": SIDE_PX})
    with pytest.raises(Refused, match="model_type e2e_test_resnet_mean has no attention"):
        draw({"model_arguments.ckpt_path": "mean.pt"})


def test_patches_of_another_scale_than_in_training_are_told(
    draw: Draw, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = project / "e2e.json"
    record = read_json(beside)
    for mpp_um, warned in ((0.5, False), (2.0, True)):
        write_json(beside, {**record, "patches": {"px": [PATCH_PX], "mpp_um": [mpp_um]}})
        assert draw() == 0
        told = capsys.readouterr().err
        assert ("warning: s_0: the model was trained on patches of 64 px at 2 um/px" in told
                ) == warned


def test_its_encoder_serves_other_models(draw: Draw, project: Path) -> None:
    """A two-stage model of the features of ``e2e:CHECKPOINT``."""
    features = read_h5(RAW / "s_0.h5").arrays["features"]
    write_described(project / "two.pt", "clam_sb")
    assert draw({"model_arguments.ckpt_path": "two.pt",
                 "encoder_arguments.model_name": "e2e:e2e.pt"}) == 0
    found = read_h5(RAW / "s_0_blockmap.h5").parameters
    assert found is not None and found["model"]["model_type"] == "clam_sb"
    np.testing.assert_allclose(read_h5(RAW / "s_0.h5").arrays["features"], features, atol=1e-6)
    with pytest.raises(Refused, match="sees its patches at 48 px, as in its training, not at 96"):
        draw({"model_arguments.ckpt_path": "two.pt", "encoder_arguments.target_img_size": 96,
              "encoder_arguments.model_name": "e2e:e2e.pt"})


def test_a_checkpoint_without_json_is_told_by_keys(draw: Draw, project: Path) -> None:
    """As a published one: another order of the channels, another map."""
    before = read_h5(RAW / "s_0_blockmap.h5").arrays["attention_scores"]
    (project / "e2e.json").unlink()
    options = project / "options.yaml"
    changes = {"model_arguments.model_type": MODEL, "model_arguments.model_options": options.name}
    for channels in ("RGB", "BGR"):
        options.write_text(f"{{img_size: {SIDE_PX}, inner_dim: 32, n_heads: 4, "
                           f"channels: {channels}}}\n")
        assert draw(changes) == 0
        found = read_h5(RAW / "s_0_blockmap.h5")
        assert found.parameters is not None
        assert found.parameters["encoder"]["channels"] == channels
        assert np.allclose(found.arrays["attention_scores"], before, atol=1e-5) == (
            channels == "RGB")
