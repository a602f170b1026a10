"""create_heatmaps.py with a streaming model: attention or gradient, led back to the slide."""

from __future__ import annotations

import csv
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
import create_patches_fp
from datasets import image_sources
from models.trained import load_as_described
from tests.conftest import ROOT
from tests.heatmap_project import (
    copy_project,
    make_project,
    tree_of,
    write_config,
    write_described,
)
from tests.streaming import TensorImage
from utils.contracts import Bag
from utils.errors import Refused
from utils.storage import read_h5, read_json, write_json
from wsi_core.slide_images import open_image

MODEL, STRIDE, WIDTH, IMAGE_MPP = "streaming_test_resnet", 32, 96, 1.0
CELL_L0 = 64  # side of a square: slides have 0.5 um per px
MIN_AREA_UM2 = 1000.0  # pieces of tissue on the small slides here
IMAGES = Path("images/slide_images")
RAW = Path("raw/exp/tumor/s_0")
CHANGES: dict[str, Any] = {
    "model_arguments.ckpt_path": "s.pt", "model_arguments.model_type": None,
    "model_arguments.embed_dim": None, "streaming_arguments.slide_images": str(IMAGES),
    "sample_arguments.samples": [{"name": "top", "k": 2, "mode": "topk"}]}


def write_streaming(path: Path, head: str = "gated_attention", **images: Any) -> None:
    """A checkpoint that was trained on images of these facts."""
    write_described(path, MODEL, embed_dim=WIDTH, options={
        "head": head, "tile_size": 192, "store_maps": "none"})
    beside = path.with_suffix(".json")
    write_json(beside, {**read_json(beside), "images": {"mpp_um": [IMAGE_MPP], **images}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project on which the script drew a streaming model, as a process; do not change."""
    root = make_project(tmp_path_factory.mktemp("streaming") / "project")
    assert create_patches_fp.main([
        "--source", str(root / "slides"), "--save_dir", str(root / "images"), "--seg",
        "--min_area_um2", str(MIN_AREA_UM2), "--slide_images", str(IMAGE_MPP)]) == 0
    write_streaming(root / "s.pt")
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


def rows_of_results() -> dict[str, dict[str, str]]:
    with Path("heatmaps/results/list.csv").open() as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def map_of(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and attention (h, w), of the whole image at once."""
    model: Any = load_as_described(Path("s.pt")).build().eval()
    with torch.inference_mode():
        found = model.map_of(TensorImage(torch.from_numpy(image)))
        output = model.mil(Bag(slide_id="s", features=found[0].flatten(1).T))
    attention = output.attention.reshape(found.shape[-2:])
    return output.probabilities[0].numpy(), attention.numpy()


def test_the_map_is_the_attention_of_the_model_on_the_slide(project: Path) -> None:
    """Each score stands where the record says that its position looks at."""
    with open_image(IMAGES, "s_0") as picture:
        prediction, attention = map_of(picture.read(0, 0, *picture.size_px))
        y, x = np.indices(attention.shape).reshape(2, -1)
        # a position of a ResNet looks around the px at position * stride
        centres = picture.to_level0(np.stack([x, y], axis=1) * STRIDE + 0.5)
    there = np.isfinite(centres).all(axis=1)
    found = read_h5(RAW / "s_0_blockmap.h5")
    np.testing.assert_allclose(found.arrays["coords"], centres[there] - CELL_L0 / 2, atol=1)
    scores = found.arrays["attention_scores"][:, 0]
    np.testing.assert_allclose(scores, attention.ravel()[there], atol=1e-4)
    assert scores.std() > 1e-4
    np.testing.assert_allclose(found.root["prediction"], prediction, atol=1e-5)
    row = rows_of_results()["s_0"]
    assert row["n_patches"] == str(len(scores)) and row["mpp_used"] == "1.0"
    assert float(row["p_class_tumor"]) == pytest.approx(prediction[1], abs=1e-5)


def test_all_files_are_there_and_what_has_no_effect_is_told(project: Path) -> None:
    assert Path("prod/exp/tumor/s_0_0.0_roi_0_blur_0_rs_1_bc_0_a_0.4_l_1_bi_0_-1.0.jpg").exists()
    assert (RAW / "s_0_blockmap.png").exists() and Path("prod/exp/tumor/s_0_orig_1.jpg").exists()
    cells = [cell for cell in json.loads(
        Path("prod/exp/tumor/s_0_attention.geojson").read_text())["features"]
        if cell["properties"]["objectType"] == "detection"]
    corners = np.array(cells[0]["geometry"]["coordinates"][0])
    assert len(cells) == len(read_h5(RAW / "s_0_blockmap.h5").arrays["coords"])
    assert np.ptp(corners, axis=0).tolist() == [CELL_L0, CELL_L0]
    assert len(list(Path("prod/exp/sampled_patches").rglob("*_s_0_*.png"))) == 2
    assert not list(RAW.glob("s_0.h5")) and not list(RAW.glob("*.pt"))
    text = (project / "output.txt").read_text()
    assert "its attention is drawn in squares of 32 px of the image; patching_arguments," in text
    assert "warning" not in text


def test_again_does_nothing_and_a_region_needs_no_other_map(project: Path, draw: Draw) -> None:
    before = tree_of(project)
    assert draw({"patching_arguments.overlap": 0.9}) == 0
    same = {name for name in before if name.endswith((".h5", ".jpg", ".png", ".geojson"))}
    assert same and all(tree_of(project)[name] == before[name] for name in same)
    assert draw({"heatmap_arguments.use_roi": True}) == 0
    name = str(RAW / "s_0_blockmap.h5")
    assert tree_of(project)[name] == before[name]
    assert list(Path("prod/exp/tumor").glob("s_0_0.0_roi_1_*.jpg"))


def test_the_gradient_of_any_head(draw: Draw, project: Path) -> None:
    """Another map, made anew when the source or the checkpoint changes; the max head has no
    attention, so it is drawn by its gradient unless another source is asked for."""
    attention = read_h5(RAW / "s_0_blockmap.h5").arrays
    assert draw({"streaming_arguments.source": "gradient"}) == 0
    found = read_h5(RAW / "s_0_blockmap.h5")
    gradient = found.arrays
    assert found.parameters is not None and found.parameters["source"] == "gradient"
    assert len(gradient["coords"]) and not np.array_equal(gradient["coords"][0],
                                                          attention["coords"][0])
    write_streaming(project / "max.pt", "max")
    assert draw({"model_arguments.ckpt_path": "max.pt"}) == 0
    other = read_h5(RAW / "s_0_blockmap.h5")
    assert other.parameters is not None and other.parameters["source"] == "gradient"
    assert np.array_equal(other.arrays["coords"], gradient["coords"])
    assert np.abs(other.arrays["attention_scores"] - gradient["attention_scores"]).max() > 1e-6
    with pytest.raises(Refused, match="source is attention, but the head of this model has none"):
        draw({"model_arguments.ckpt_path": "max.pt", "streaming_arguments.source": "attention"})


def test_slides_read_themselves_give_the_map_of_their_images(
    draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the scale of the training, with the same tissue; JPEG makes the difference."""
    monkeypatch.setattr(image_sources, "MIN_AREA_UM2", MIN_AREA_UM2)
    prepared = read_h5(RAW / "s_0_blockmap.h5").arrays
    assert draw({"streaming_arguments.slide_images": None}) == 0
    direct = read_h5(RAW / "s_0_blockmap.h5")
    assert direct.parameters is not None and direct.parameters["image"]["image_mpp"] == IMAGE_MPP
    assert np.array_equal(direct.arrays["coords"], prepared["coords"])
    scores = (direct.arrays["attention_scores"][:, 0], prepared["attention_scores"][:, 0])
    assert np.corrcoef(*scores)[0, 1] > 0.9 and not np.array_equal(*scores)


def test_a_slide_without_an_image_fails_alone(
    draw: Draw, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / IMAGES / "s_0.json").unlink()
    assert draw() == 3
    rows = rows_of_results()
    assert rows["s_0"]["status"] == "failed"
    assert rows["s_0"]["reason"].startswith(f"s_0: has no image in {IMAGES} (s_0.json): make it")
    assert rows["s_1"]["status"] == "processed"


def test_another_scale_than_in_training_is_told(
    draw: Draw, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_streaming(project / "s.pt", mpp_um=[4.0], image_size=256)
    assert draw() == 0
    told = capsys.readouterr()
    assert told.err.count("trained on images of 4 um/px, this one has 1 um/px: give streaming") == 1
    assert "it is shown whole images, in training squares of 256 px" in told.out


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_arguments.ckpt_path": "s_0_checkpoint.pt", "model_arguments.model_type": "clam_sb"},
     "streaming_arguments have no effect: clam_sb is no streaming model"),
    ({"streaming_arguments.image_mpp": 1.0}, "slide_images have their own um per px"),
    ({"streaming_arguments.slide_images": None, "model_arguments.ckpt_path": "bare.pt"},
     r"give slide_images, or image_mpp: .* \(nothing known\)")])
def test_what_makes_no_sense_is_refused(
    draw: Draw, project: Path, changes: dict[str, Any], message: str
) -> None:
    write_streaming(project / "bare.pt", mpp_um=None)
    with pytest.raises(Refused, match=message):
        draw(changes)


def test_half_precision_gives_another_map_of_the_same(draw: Draw) -> None:
    before = read_h5(RAW / "s_0_blockmap.h5").arrays["attention_scores"]
    assert draw({}, "--precision", "bf16") == 0
    found = read_h5(RAW / "s_0_blockmap.h5")
    assert found.parameters is not None and found.parameters["model"]["precision"] == "bf16"
    after = found.arrays["attention_scores"]
    assert not np.array_equal(after, before) and np.allclose(after, before, atol=0.05)
