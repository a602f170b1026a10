"""extract_features_fp.py as a process: every flag, what is written, going on, refusing."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import datasets.extraction
import extract_features_fp
from tests.feature_inputs import (
    Inputs,
    grid_coords,
    make_inputs,
    make_levels,
    save_network,
    write_patches,
)
from tests.slides import tissue_image, write_pyramid
from utils.errors import Refused
from utils.storage import read_h5

Run = Callable[..., CompletedProcess[str]]
SCRIPT = "extract_features_fp.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs") / "cohort")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of timm's test_resnet: 96 features."""
    return save_network(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished feature folder of the cohort; do not change."""
    import subprocess
    import sys

    from tests.conftest import ROOT

    folder = tmp_path_factory.mktemp("finished")
    subprocess.run([sys.executable, str(ROOT / SCRIPT), *inputs.arguments(folder)], check=True,
                   capture_output=True, cwd=ROOT)
    return folder


def features(folder: Path, slide_id: str) -> np.ndarray:
    return read_h5(folder / "h5_files" / f"{slide_id}.h5").arrays["features"]


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "report_features.csv").open(encoding="utf-8", newline="") as file:
        return {row["item"]: row for row in csv.DictReader(file)}


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


# ---------------------------------------------------------------------------- what is written

def test_layout_is_clam_s_with_provenance(inputs: Inputs, finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "h5_files", "pt_files", "report_features.csv", "report_features.json"]
    for name, count in (("slide_0", 20), ("slide_1", 0), ("slide_2", 13)):
        with h5py.File(finished / "h5_files" / f"{name}.h5") as file:
            assert file["features"].dtype == np.float32 and file["features"].shape == (count, 1280)
            assert file["coords"].dtype == np.int32
            np.testing.assert_array_equal(file["coords"][()], grid_coords(count))
            assert file["features"].maxshape[0] is None
            assert file.attrs["encoder"] == "efficientnet_lite0" and file.attrs["mpp_um"] == 0.5
        tensor = torch.load(finished / "pt_files" / f"{name}.pt", weights_only=True)
        assert type(tensor) is torch.Tensor and tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), features(finished, name))
    parameters = read_h5(finished / "h5_files" / "slide_0.h5").parameters
    assert parameters is not None
    assert parameters["encoder"]["name"] == "efficientnet_lite0"
    assert len(parameters["encoder"]["weights_sha256"]) == 64
    assert parameters["encoder"]["target_px"] == 64
    assert parameters["patch"]["patch_size"] == 64
    assert parameters["slide"]["slide_name"] == "slide_0.tif"


def test_features_equal_the_reference_pipeline(inputs: Inputs, finished: Path) -> None:
    """OpenSlide, torchvision's transform, the eager network: as CLAM does it."""
    import openslide
    from torchvision import transforms

    from models.encoder_networks import ENCODERS
    from models.encoder_weights import find_weights

    spec = ENCODERS.get("efficientnet_lite0")
    network = spec.build(find_weights(spec.name, spec.weights)).eval()
    transform = transforms.Compose([transforms.Resize(64), transforms.ToTensor(),
                                    transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    with openslide.OpenSlide(str(inputs.slides / "slide_0.tif")) as slide, torch.no_grad():
        wanted = network(torch.stack([
            transform(slide.read_region((int(x), int(y)), 0, (64, 64)).convert("RGB"))
            for x, y in grid_coords(20)])).numpy()
    error = np.abs(features(finished, "slide_0") - wanted).max() / np.abs(wanted).max()
    assert error < 1e-5


def test_the_report_says_what_was_done(finished: Path) -> None:
    report = rows(finished)
    assert [report[name]["status"] for name in ("slide_0", "slide_1", "slide_2")] == [
        "done", "empty", "done"]
    assert report["slide_0"]["n_patches"] == "20"
    written = json.loads((finished / "report_features.json").read_text(encoding="utf-8"))
    assert written["options"]["model_name"] == ["efficientnet_lite0"]


# ---------------------------------------------------------------------------- flags

def test_flags_that_change_the_way_not_the_result(
        inputs: Inputs, finished: Path, tmp_path: Path, run_script: Run) -> None:
    """What they do besides is tested in test_datasets_extraction.py."""
    run = run_script(SCRIPT, *inputs.arguments(tmp_path), "--batch_size", 3, "--workers", 3,
                     "--backend", "openslide", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(features(tmp_path, "slide_0"), features(finished, "slide_0"),
                               rtol=1e-4, atol=1e-5)


def test_flags_reach_the_work(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                              ) -> None:
    """Those that leave the features as they are; what comes of them: test_datasets_extraction."""
    def plan(*flags: object) -> tuple[Any, Any]:
        seen: list[Any] = []
        monkeypatch.setattr(datasets.extraction, "extract",
                            lambda *given, **settings: seen.extend([*given, settings]) or [])
        extract_features_fp.main([*inputs.arguments(tmp_path), *map(str, flags)])
        return seen[0], seen[1]

    (shard,), todo = plan()
    assert (shard.device, todo.batch_size, todo.workers, todo.bad_tiles) == (
        "auto", 256, None, "fail")
    assert {work.patches.backend for work in shard.works} == {"auto"}
    (shard,), todo = plan("--device", "cpu", "--batch_size", 3, "--workers", 5, "--bad_tiles",
                          "drop", "--backend", "openslide")
    assert (shard.device, todo.batch_size, todo.workers, todo.bad_tiles) == ("cpu", 3, 5, "drop")
    assert {work.patches.backend for work in shard.works} == {"openslide"}
    monkeypatch.setattr("utils.devices.pick_device", lambda name: name)  # as if they were there
    shards, _ = plan("--gpus", 2)
    assert [shard.device for shard in shards] == ["cuda:0", "cuda:1"]
    assert sorted(work.slide_id for shard in shards for work in shard.works) == [
        "slide_0", "slide_1", "slide_2"]


@pytest.mark.parametrize(("flags", "side"), [(["--target_patch_size", "32"], 32),
                                             (["--target_patch_size", "-1"], 0)])
def test_target_patch_size(inputs: Inputs, finished: Path, tmp_path: Path, run_script: Run,
                           flags: list[str], side: int) -> None:
    run = run_script(SCRIPT, *inputs.arguments(tmp_path), *flags)
    assert run.returncode == 0, run.stderr
    parameters = read_h5(tmp_path / "h5_files" / "slide_0.h5").parameters
    assert parameters is not None and parameters["encoder"]["target_px"] == side
    same = np.allclose(features(tmp_path, "slide_0"), features(finished, "slide_0"), atol=1e-4)
    assert same == (side == 0)  # patches are 64 px as read, which is the target of `finished`


def test_precision_bf16(inputs: Inputs, finished: Path, tmp_path: Path, run_script: Run) -> None:
    run = run_script(SCRIPT, *inputs.arguments(tmp_path), "--precision", "bf16")
    assert run.returncode == 0, run.stderr
    exact, near = features(finished, "slide_0"), features(tmp_path, "slide_0")
    assert near.dtype == np.float32
    assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.3  # faint patches: 0.17


def test_model_name_and_encoder_ckpt(inputs: Inputs, tiny: Path, tmp_path: Path, run_script: Run
                                     ) -> None:
    run = run_script(SCRIPT, *inputs.arguments(tmp_path), "--model_name", "timm:test_resnet",
                     "--encoder_ckpt", tiny)
    assert run.returncode == 0, run.stderr
    encoder = read_h5(tmp_path / "h5_files" / "slide_0.h5").parameters["encoder"]  # type: ignore
    assert encoder["name"] == "timm:test_resnet" and features(tmp_path, "slide_0").shape[0] == 20


def test_slide_ext_and_ids(tmp_path: Path, run_script: Run) -> None:
    """Ids with, without, and with another extension; dots inside; leading zeros; numbers."""
    (tmp_path / "slides").mkdir()
    for name in ("001.tif", "TCGA.A1.tif", "plain.svs"):
        write_pyramid(tmp_path / "slides" / name, tissue_image(512, 512))
        write_patches(tmp_path / "out", name[:-4], grid_coords(2))
    csv_path = tmp_path / "ids.csv"
    csv_path.write_text("slide_id\n001\nTCGA.A1.tif\nplain.svs\nTCGA.A1.tif\n", encoding="utf-8")
    inputs = Inputs(tmp_path / "slides", tmp_path / "out", csv_path)
    feat_dir = tmp_path / "feat"
    run = run_script(SCRIPT, *inputs.arguments(feat_dir), "--slide_ext", "tif")
    assert run.returncode == 0, run.stdout + run.stderr
    assert set(rows(feat_dir)) == {"001", "TCGA.A1", "plain"}
    missing = run_script(SCRIPT, *inputs.arguments(tmp_path / "other"), "--slide_ext", ".ndpi")
    assert missing.returncode == 3 and "001.ndpi: cannot be read" in missing.stdout


def test_csv_path_is_the_process_list_when_not_given(inputs: Inputs, finished: Path,
                                                     run_script: Run) -> None:
    arguments = inputs.arguments(finished)
    at = arguments.index("--csv_path")
    run = run_script(SCRIPT, *arguments[:at], *arguments[at + 2:])
    assert run.returncode == 0 and "3 settled before" in run.stdout


def test_a_second_run_skips_and_no_auto_skip_does_not(
        inputs: Inputs, finished: Path, tmp_path: Path, run_script: Run) -> None:
    folder = copy(finished, tmp_path / "feat")
    before = (folder / "h5_files" / "slide_0.h5").stat().st_mtime_ns
    again = run_script(SCRIPT, *inputs.arguments(folder))
    assert again.returncode == 0 and rows(folder)["slide_0"]["status"] == "already done"
    assert (folder / "h5_files" / "slide_0.h5").stat().st_mtime_ns == before
    redone = run_script(SCRIPT, *inputs.arguments(folder), "--no_auto_skip")
    assert redone.returncode == 0 and rows(folder)["slide_0"]["status"] == "done"
    assert (folder / "h5_files" / "slide_0.h5").stat().st_mtime_ns != before
    np.testing.assert_array_equal(features(folder, "slide_0"), features(finished, "slide_0"))


def test_custom_downsample_and_levels_are_taken_from_the_coordinates(
        inputs: Inputs, tmp_path: Path, run_script: Run) -> None:
    for name, settings in (("slide_0", {"patch_px": 128, "output_px": 64}),
                           ("slide_2", {"level": 1})):
        write_patches(tmp_path / "out", name, grid_coords(4), **settings)  # type: ignore[arg-type]
    csv_path = tmp_path / "ids.csv"
    csv_path.write_text("slide_id\nslide_0\nslide_2\n", encoding="utf-8")
    inner = Inputs(inputs.slides, tmp_path / "out", csv_path)
    run = run_script(SCRIPT, *inner.arguments(tmp_path / "feat"))
    assert run.returncode == 0, run.stdout + run.stderr
    patch = {name: read_h5(tmp_path / "feat" / "h5_files" / f"{name}.h5").parameters["patch"]  # type: ignore[index]
             for name in ("slide_0", "slide_2")}
    assert (patch["slide_0"]["patch_size"], patch["slide_0"]["output_size"]) == (128, 64)
    assert patch["slide_2"]["patch_level"] == 1


def test_a_yaml_replaces_defaults(inputs: Inputs, finished: Path, tmp_path: Path, run_script: Run
                                  ) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("target_patch_size: 32\nmodel_name: efficientnet_lite0\n", encoding="utf-8")
    arguments = inputs.arguments(finished)
    at = arguments.index("--target_patch_size")
    run = run_script(SCRIPT, *arguments[:at], "--config", config)
    assert run.returncode == 2 and "you ask 32" in run.stderr


# ---------------------------------------------------------------------------- finer levels

def test_child_levels_in_one_run(tmp_path: Path, run_script: Run) -> None:
    """Levels 2, 1, 0 into sibling folders; a level alone; going on; other settings refused."""
    inputs = make_levels(tmp_path / "cohort")
    feat_dir = tmp_path / "feats_level_2"
    run = run_script(SCRIPT, *inputs.arguments(feat_dir), "--child_levels", 1, 0)
    assert run.returncode == 0, run.stdout + run.stderr
    report = rows(feat_dir)
    assert list(report) == [f"slide_{number}{level}" for level in ("", " [level_1]", " [level_0]")
                            for number in range(3)]
    assert [row["status"] for row in report.values()] == ["done", "empty", "done"] * 3
    assert report["slide_0 [level_0]"]["n_patches"] == "48"
    for name, count in (("level_1", 12), ("level_0", 48)):
        folder = tmp_path / f"feats_{name}_corresponding"
        assert features(folder, "slide_0").shape == (count, 1280)
        assert torch.load(folder / "pt_files/slide_0.pt", weights_only=True).shape == (count, 1280)
        with h5py.File(folder / "h5_files/slide_0.h5") as file:
            assert file.attrs["branching"] == 4 and file["valid"][()].all()
    shutil.copy(inputs.csv, tmp_path / "cohort/out_level_0_corresponding")
    alone = ["--data_h5_dir", str(tmp_path / "cohort/out_level_0_corresponding"),
             "--data_slide_dir", str(inputs.slides), "--slide_ext", "tif",
             "--feat_dir", str(folder), *inputs.arguments(folder)[-4:]]
    assert extract_features_fp.main(alone) == 0  # a plain run on a derived folder wants the same
    assert [row["status"] for row in rows(folder).values()] == ["already done", "empty",
                                                                "already done"]
    again = [*inputs.arguments(feat_dir), "--child_levels", "1"]
    assert extract_features_fp.main(again) == 0 and len(rows(feat_dir)) == 6
    with pytest.raises(Refused, match="feats_level_0_corresponding holds other features"):
        extract_features_fp.main([*inputs.arguments(tmp_path / "feats"), "--child_levels", "0",
                                  "--precision", "bf16"])


def test_child_mpp_and_missing_levels(inputs: Inputs, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="with --child_mpp 0.25"):
        extract_features_fp.main([*inputs.arguments(tmp_path), "--child_mpp", "0.25"])
    shutil.copytree(inputs.patches_root, tmp_path / "out")
    shutil.copytree(inputs.patches_root, tmp_path / "out_mpp_0.25_corresponding")
    seen: list[Any] = []
    monkeypatch.setattr(datasets.extraction, "extract",
                        lambda *given, **settings: seen.extend([*given, settings]) or [])
    moved = Inputs(inputs.slides, tmp_path / "out", inputs.csv)
    assert extract_features_fp.main([*moved.arguments(tmp_path / "f"), "--child_mpp", "0.25"]) == 3
    (shard,) = seen[0]  # these "children" are copies of their parents, so they are no children
    assert {work.patches.level for work in shard.works} == {""}
    assert "does not come from" in rows(tmp_path / "f")["slide_0 [mpp_0.25]"]["reason"]


# ---------------------------------------------------------------------------- refusals

@pytest.mark.parametrize(("flags", "says"), [
    (["--gpus", "2"], "CUDA"),
    (["--gpus", "1", "--device", "cpu"], "contradict"),
    (["--device", "cuda"], "CUDA"),
    (["--device", "tpu"], "expected auto, cpu, cuda"),
    (["--precision", "fp16"], "fp16 needs CUDA"),
    (["--model_name", "resnet50_trunk"], "did you mean 'resnet50_trunc'"),
    (["--model_name", "uni_v1"], "UNI_CKPT_PATH"),
    (["--model_name", "conch_v1"], "CONCH_CKPT_PATH"),
    (["--model_name", "resnet50_trunc"], "resnet50-0676ba61.pth"),
    (["--encoder_ckpt", "nowhere.pth"], "not a file: nowhere.pth"),
    (["--batch_size", "0"], "expected"),
    (["--workers", "0"], "expected"),
    (["--csv_path", "nowhere.csv"], "nowhere.csv cannot be read"),
    (["--data_h5_dir", "nowhere"], "no folder nowhere"),
    (["--data_slide_dir", "nowhere"], "no folder nowhere"),
])
def test_bad_flags_are_refused_before_any_work(
        inputs: Inputs, tmp_path: Path, run_script: Run, flags: list[str], says: str) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path),
               "UNI_CKPT_PATH": "", "CONCH_CKPT_PATH": ""}
    run = run_script(SCRIPT, *inputs.arguments(tmp_path / "feat"), *flags, env=offline)
    assert run.returncode == 2, run.stdout + run.stderr
    assert says in run.stderr and "Traceback" not in run.stderr
    assert not list((tmp_path / "feat").glob("h5_files/*"))


@pytest.mark.parametrize(("content", "says"), [
    ("id\na\n", "no column 'slide_id'"), ("slide_id\n", "lists no slides"),
    ("slide_id\n../a\n", "not a plain name"), ("slide_id\nslide_0.tif\nslide_0.png\n", "same id")])
def test_bad_tables_are_refused(inputs: Inputs, tmp_path: Path, run_script: Run, content: str,
                                says: str) -> None:
    table = tmp_path / "table.csv"
    table.write_text(content, encoding="utf-8")
    slides: Any = inputs.slides
    if "png" in content:  # two files of one stem
        slides = tmp_path / "slides"
        slides.mkdir()
        for name in ("slide_0.tif", "slide_0.png"):
            (slides / name).write_bytes(b"x")
    run = run_script(SCRIPT, *Inputs(slides, inputs.patches_root, table).arguments(
        tmp_path / "feat"))
    assert run.returncode == 2 and says in run.stderr


def test_other_settings_are_refused_with_the_difference(
        inputs: Inputs, finished: Path, run_script: Run) -> None:
    run = run_script(SCRIPT, *inputs.arguments(finished), "--precision", "bf16")
    assert run.returncode == 2
    assert "encoder.precision: file has 'fp32', you ask 'bf16'" in run.stderr
    assert "--no_auto_skip" in run.stderr and "another --feat_dir" in run.stderr
