"""create_heatmaps.py: what it writes, what each flag and each key of the YAML changes."""

from __future__ import annotations

import csv
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

import create_heatmaps
from datasets import heatmap_slide
from datasets.heatmap_scores import score_bag
from tests.conftest import ROOT
from tests.heatmap_project import (
    EMBED_DIM,
    PRODUCTION,
    copy_project,
    make_project,
    tree_of,
    write_checkpoint,
    write_config,
    write_described,
    write_hierarchy,
)
from utils.errors import Refused
from utils.storage import load_torch, read_h5, write_json
from wsi_core.geojson import read_tissue
from wsi_core.heatmap import percentiles

RAW = Path("raw/exp/tumor/s_0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project on which the script ran once, as a process; do not change."""
    root = make_project(tmp_path_factory.mktemp("heatmaps") / "project")
    run = subprocess.run(
        [sys.executable, str(ROOT / "create_heatmaps.py"), "--config_file", "c.yaml"], cwd=root,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    (root / "stdout.txt").write_text(run.stdout)
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
    """Change the config and run: ``draw({"heatmap_arguments.blur": True}, "--overlap", "0")``."""

    def run(changes: dict[str, Any] | None = None, *flags: str) -> int:
        write_config(project, changes)
        return create_heatmaps.main(["--config_file", "c.yaml", "--yes", "--device", "cpu",
                                     *flags])

    return run


def pixels(path: Path | str) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None, path
    return np.asarray(image)


def results(name: str = "list") -> list[dict[str, str]]:
    with Path(f"heatmaps/results/{name}.csv").open() as file:
        return list(csv.DictReader(file))


def report(code: str = "exp") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        Path(f"raw/{code}/report_heatmaps.json").read_text())["items"]
    return found


# ---------------------------------------------------------------------------- the whole run

def test_output_tree_is_clams(project: Path) -> None:
    names = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    expected = {"raw/exp/config.yaml", "raw/exp/report_heatmaps.csv",
                "raw/exp/report_heatmaps.json", "heatmaps/results/list.csv"}
    for label, slide in (("tumor", "s_0"), ("normal", "s_1")):
        raw = f"raw/exp/{label}/{slide}/{slide}"
        expected |= {raw + suffix for suffix in (
            ".h5", ".pt", "_mask.json", "_mask.jpg", "_blockmap.h5", "_blockmap.png",
            "_0.5_roi_False.h5", "_record.json")}
        expected |= {PRODUCTION.replace("tumor/s_0", f"{label}/{slide}"),
                     f"prod/exp/{label}/{slide}_orig_1.jpg",
                     f"prod/exp/{label}/{slide}_attention.geojson"}
    written = {name for name in names if name.startswith(("raw", "prod/exp", "heatmaps"))}
    samples = {name for name in written if "sampled_patches" in name}
    assert written - samples == expected
    assert len(samples) == 4
    for name in samples:
        folder, sample, file = name.split("/")[-3:]
        assert folder in {"label_tumor_pred_0", "label_tumor_pred_1", "label_normal_pred_0",
                          "label_normal_pred_1"} and sample == "top"
        rank, rest = file.split("_s_")
        assert rank in "01" and "_x_" in rest and "_y_" in rest and rest.endswith(".png")
        assert pixels(name).shape == (64, 64, 3)


def test_arrays_and_their_provenance(project: Path) -> None:
    features, blocks = read_h5(RAW / "s_0.h5"), read_h5(RAW / "s_0_blockmap.h5")
    fine = read_h5(RAW / "s_0_0.5_roi_False.h5")
    n = len(features.arrays["coords"])
    assert features.arrays["features"].shape == (n, EMBED_DIM)
    assert features.arrays["features"].dtype == np.float32
    assert np.array_equal(load_torch(RAW / "s_0.pt").numpy(), features.arrays["features"])
    assert features.arrays["coords"].dtype == blocks.arrays["coords"].dtype == np.int64
    assert blocks.arrays["attention_scores"].shape == (n, 1)
    assert blocks.arrays["attention_scores"].dtype == np.float32
    assert len(fine.arrays["coords"]) > 2 * n
    parameters = fine.parameters
    assert parameters is not None
    assert parameters["encoder"]["name"] == "timm:test_resnet"
    assert parameters["model"]["model_type"] == "clam_sb" and len(parameters["model"]["sha256"])
    assert parameters["tissue"]["slide_name"] == "s_0.tif"
    spread = blocks.arrays["attention_scores"]
    assert spread.std() > 0


def test_results_rank_classes_and_name_them(project: Path) -> None:
    first, second = results()
    assert first["slide_id"] == "s_0" and first["label"] == "tumor"
    assert (first["process"], first["status"]) == ("0", "processed")
    assert first["bag_size"] == first["n_patches"] == str(
        len(read_h5(RAW / "s_0.h5").arrays["coords"]))
    assert float(first["p_0"]) >= float(first["p_1"])
    assert {first["Pred_0"], first["Pred_1"]} == {"normal", "tumor"}
    assert first["p_class_" + first["Pred_0"]] == first["p_0"]
    assert float(first["p_0"]) + float(first["p_1"]) == pytest.approx(1, abs=1e-5)
    assert float(second["mpp_used"]) == pytest.approx(0.5, rel=1e-3)
    text = (project / "stdout.txt").read_text()
    assert "2 of 2 slides to draw" in text and "vis_level: 1" in text  # resolved config


def test_config_is_saved_and_loads_back(project: Path) -> None:
    saved = yaml.safe_load(Path("raw/exp/config.yaml").read_text())
    assert saved["patching_arguments"]["patch_size"] == 64
    assert saved["heatmap_arguments"]["cmap"] == "jet"  # defaults included


def test_again_does_nothing(project: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("datasets.patches.encode_slide", never)
    before = tree_of(project)
    assert draw() == 0
    after = tree_of(project)
    rewritten = {name for name in after if after[name] != before.get(name)}
    assert rewritten == {"c.yaml", "raw/exp/config.yaml", "heatmaps/results/list.csv",
                         "raw/exp/report_heatmaps.csv", "raw/exp/report_heatmaps.json"}
    assert [row["status"] for row in report()] == ["already done"] * 2


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """From now on: the coordinates (N, 2) of each call that encodes patches."""
    from datasets import patches

    encoded: list[np.ndarray] = []
    encode_slide = patches.encode_slide

    def counting(path: Path, coords: np.ndarray, **keywords: Any) -> np.ndarray:
        encoded.append(coords)
        return encode_slide(path, coords, **keywords)

    monkeypatch.setattr(patches, "encode_slide", counting)
    return encoded


def test_fine_map_reuses_the_coarse_one(
    project: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = count_encoded(monkeypatch)
    (RAW / "s_0_0.5_roi_False.h5").unlink()
    assert draw() == 0
    coarse = set(map(tuple, read_h5(RAW / "s_0.h5").arrays["coords"].tolist()))
    fine = list(map(tuple, read_h5(RAW / "s_0_0.5_roi_False.h5").arrays["coords"].tolist()))
    assert len(encoded) == 1 and len(coarse & set(fine)) > 5
    assert set(map(tuple, encoded[0].tolist())) == set(fine) - coarse
    scores = dict(zip(fine, read_h5(RAW / "s_0_0.5_roi_False.h5").arrays["attention_scores"][:, 0],
                      strict=True))
    blocks = read_h5(RAW / "s_0_blockmap.h5").arrays
    for place, score in zip(map(tuple, blocks["coords"].tolist()),
                            blocks["attention_scores"][:, 0], strict=True):
        assert scores.get(place, score) == score


def test_fine_scores_in_chunks_are_the_same(
    project: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_h5(RAW / "s_0_0.5_roi_False.h5").arrays["attention_scores"]
    (RAW / "s_0_0.5_roi_False.h5").unlink()
    monkeypatch.setattr(heatmap_slide, "CHUNK_PATCHES", 7)
    assert draw() == 0
    after = read_h5(RAW / "s_0_0.5_roi_False.h5").arrays["attention_scores"]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_geojson_holds_cells_and_tissue(project: Path) -> None:
    found = json.loads(Path("prod/exp/tumor/s_0_attention.geojson").read_text())
    kinds = [item["properties"]["objectType"] for item in found["features"]]
    blocks = read_h5(RAW / "s_0_blockmap.h5").arrays
    assert kinds.count("detection") == len(blocks["coords"])
    assert kinds.count("annotation") == len(read_tissue(RAW / "s_0_mask.json").tissue.contours)
    cell = next(item for item in found["features"]
                if item["properties"]["objectType"] == "detection")
    assert cell["geometry"]["coordinates"][0][0] == blocks["coords"][0].tolist()
    shares = percentiles(blocks["attention_scores"]) / 100
    assert cell["properties"]["measurements"]["attention"] == pytest.approx(shares[0], abs=1e-6)


# ---------------------------------------------------------------------------- flags

def test_flag_save_exp_code(draw: Draw) -> None:
    assert draw(None, "--save_exp_code", "other") == 0
    assert Path("raw/other/tumor/s_0/s_0.h5").exists()
    assert Path(PRODUCTION.replace("/exp/", "/other/")).exists()


@pytest.mark.parametrize(("changes", "flags"), [
    ({}, ["--overlap", "0"]), ({"patching_arguments.overlap": 0}, [])], ids=["flag", "key"])
def test_flag_and_key_overlap(draw: Draw, changes: dict[str, Any], flags: list[str]) -> None:
    assert draw(changes, *flags) == 0
    coarse = read_h5(RAW / "s_0_blockmap.h5").arrays["coords"]
    assert np.array_equal(read_h5(RAW / "s_0_0.0_roi_False.h5").arrays["coords"], coarse)
    assert Path(PRODUCTION.replace("_0.5_", "_0.0_")).exists()


@pytest.mark.parametrize("flag", ["--config_file", "--config"])
def test_flag_config_takes_names_of_the_folder(flag: str, project: Path) -> None:
    folder = Path("heatmaps/configs")
    folder.mkdir(parents=True)
    write_config(project).rename(folder / "mine.yaml")
    assert create_heatmaps.main([flag, "mine.yaml", "--yes"]) == 0
    with pytest.raises(Refused, match="no config 'none.yaml'"):
        create_heatmaps.main([flag, "none.yaml", "--yes"])


def test_flag_device(draw: Draw) -> None:
    with pytest.raises(Refused, match="--device tpu|--device is 'tpu'"):
        draw(None, "--device", "tpu")


def test_flag_precision_is_another_encoder(draw: Draw) -> None:
    before = read_h5(RAW / "s_0.h5").arrays["features"]
    assert draw(None, "--precision", "bf16") == 0
    after = read_h5(RAW / "s_0.h5")
    assert after.parameters is not None and after.parameters["encoder"]["precision"] == "bf16"
    difference = np.abs(after.arrays["features"] - before).max()
    assert 0 < difference < 0.1 * np.abs(before).max()


def test_flag_workers_and_key_batch_size_reach_the_reader(
    project: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import patches

    seen: list[tuple[int, int]] = []
    encode_slide = patches.encode_slide

    def watching(*arguments: Any, workers: int, batch_size: int, **keywords: Any) -> np.ndarray:
        seen.append((workers, batch_size))
        return encode_slide(*arguments, workers=workers, batch_size=batch_size, **keywords)

    monkeypatch.setattr(patches, "encode_slide", watching)
    before = read_h5(RAW / "s_0.h5").arrays["features"]
    (RAW / "s_0.h5").unlink()
    assert draw({"exp_arguments.batch_size": 5}, "--workers", "2") == 0
    assert seen == [(2, 5)]
    np.testing.assert_allclose(read_h5(RAW / "s_0.h5").arrays["features"], before, atol=1e-4)


@pytest.mark.parametrize(("flags", "answer", "code"), [
    ([], "n\n", 2), ([], "y\n", 0), (["--yes"], "", 0)], ids=["no", "yes", "flag"])
def test_a_terminal_is_asked_unless_yes(
    project: Path, flags: list[str], answer: str, code: int
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    run = subprocess.run([sys.executable, str(ROOT / "create_heatmaps.py"), "--config_file",
                          "c.yaml", *flags], stdin=theirs, capture_output=True, text=True,
                         timeout=300, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    os.close(ours)
    os.close(theirs)
    assert run.returncode == code, run.stderr
    assert ("[Y/n]" in run.stdout) == (not flags)
    assert ("not started" in run.stderr) == (code == 2)


# ---------------------------------------------------------------------------- keys: sections 1-5

def test_key_folders(draw: Draw) -> None:
    assert draw({"exp_arguments.raw_save_dir": "r", "exp_arguments.production_save_dir": "p",
                 "exp_arguments.save_exp_code": "e"}) == 0
    assert Path("r/e/tumor/s_0/s_0.h5").exists()
    assert Path(PRODUCTION.replace("prod/exp", "p/e")).exists()


def test_key_n_classes(draw: Draw, project: Path) -> None:
    with pytest.raises(Refused, match="n_classes is 3, but label_dict names normal, tumor"):
        draw({"exp_arguments.n_classes": 3})
    write_checkpoint(project / "three.pt", "clam_sb", n_classes=3)
    assert draw({"exp_arguments.n_classes": 3, "model_arguments.ckpt_path": "three.pt",
                 "data_arguments.label_dict": {"normal": 0, "tumor": 1, "other": 2}}) == 0
    assert "p_class_other" in results()[0] and "Pred_2" in results()[0]


def test_key_data_dir_and_its_key(draw: Draw, project: Path) -> None:
    for name in ("s_0.tif", "s_1.tif"):
        (project / name[:3]).mkdir()
        (project / "slides" / name).rename(project / name[:3] / name)
    (project / "list.csv").write_text("slide_id,label,where\ns_0,tumor,A\ns_1,normal,B\n")
    keyed = {"data_arguments.data_dir": {"A": "s_0", "B": "s_1"},
             "data_arguments.data_dir_key": "where"}
    assert draw(keyed) == 0
    assert draw({"data_arguments.data_dir": ["s_0", "s_1"]}) == 0
    assert [row["status"] for row in report()] == ["already done"] * 2
    assert draw({"data_arguments.data_dir": "s_0"}) == 3  # s_1 is not there


def test_key_process_list(draw: Draw, project: Path) -> None:
    assert draw({"data_arguments.process_list": None}) == 0
    assert Path("raw/exp/Unspecified/s_0/s_0.h5").exists()  # no list, no labels
    assert len(results("exp")) == 2
    folder = Path("heatmaps/process_lists")
    folder.mkdir(parents=True)
    (folder / "few.csv").write_text("slide_id,process,note\ns_0,1,mine\ns_1,0,skip\n")
    assert draw({"data_arguments.process_list": "few.csv"}) == 0
    assert [row["item"] for row in report()] == ["s_0"]
    rows = results("few")
    assert [row["note"] for row in rows] == ["mine", "skip"]
    assert rows[1]["status"] == "tbp" and rows[1].get("Pred_0") == ""


def test_key_preset_and_overrides_of_the_list(draw: Draw, project: Path) -> None:
    before = read_tissue(RAW / "s_0_mask.json").tissue
    assert draw({"data_arguments.preset": None}) == 0  # whole defaults: the pieces are too small
    assert [row["status"] for row in report()] == ["empty"] * 2
    (project / "list.csv").write_text("slide_id,label,sthresh\ns_0,tumor,60\ns_1,normal,\n")
    assert draw() == 0
    after = read_tissue(RAW / "s_0_mask.json").tissue
    assert [len(points) for points in after.contours] != [len(points) for points in before.contours]


def test_key_slide_ext(draw: Draw, project: Path) -> None:
    for path in (project / "slides").iterdir():
        path.rename(path.with_suffix(".tiff"))
    assert draw() == 3
    assert draw({"data_arguments.slide_ext": ".tiff"}) == 0


def test_key_label_dict(draw: Draw) -> None:
    assert draw({"data_arguments.label_dict": {"tumor": 0, "normal": 1}}) == 0
    assert results()[1]["label"] == "0" and Path("raw/exp/tumor/s_1").is_dir()
    with pytest.raises(Refused, match="unknown label 'tumor'"):
        draw({"data_arguments.label_dict": {"x": 0, "y": 1}})
    assert draw({"data_arguments.label_dict": None}) == 0
    assert results()[0]["Pred_0"] in ("0", "1")  # no names: class numbers


@pytest.mark.parametrize(("changes", "level", "size"), [
    ({"patch_size": 32}, 0, 32), ({"patch_level": 1, "patch_size": 32}, 1, 32),
    ({"custom_downsample": 2, "patch_size": 32}, 0, 32),
    ({"patch_mpp": 1.0, "patch_size": 32}, 1, 32)], ids=["size", "level", "custom", "mpp"])
def test_keys_of_patches(draw: Draw, changes: dict[str, int], level: int, size: int) -> None:
    """Footprints, steps and sampled patches are right also above level 0 and when reduced."""
    assert draw({f"patching_arguments.{key}": value for key, value in changes.items()}) == 0
    footprint = size * 2**level * changes.get("custom_downsample", 1)
    cells = json.loads(Path("prod/exp/tumor/s_0_attention.geojson").read_text())["features"]
    ring = np.array(next(cell for cell in cells if cell["properties"]["objectType"] == "detection")
                    ["geometry"]["coordinates"][0])
    assert (ring.max(axis=0) - ring.min(axis=0)).tolist() == [footprint] * 2
    xs = np.unique(read_h5(RAW / "s_0_blockmap.h5").arrays["coords"][:, 0])
    assert np.diff(xs).min() == footprint
    xs = np.unique(read_h5(RAW / "s_0_0.5_roi_False.h5").arrays["coords"][:, 0])
    assert np.diff(xs).min() == footprint // 2
    names = list(Path("prod/exp/sampled_patches").rglob("*_s_0_*.png"))
    assert len(names) == 2  # those of the other geometry are gone
    for name in names:
        assert pixels(name).shape == (size, size, 3)
    if footprint == 64:  # the same place seen at half the scale
        slide = pixels(PRODUCTION.replace(Path(PRODUCTION).name, "s_0_orig_1.jpg"))
        x, y = (int(part) // 2 for part in
                (names[0].name.split("_x_")[1].split("_")[0],
                 names[0].name.split("_y_")[1].split("_")[0]))
        there = slide[y:y + 32, x:x + 32].astype(int)
        assert np.abs(pixels(names[0]).astype(int) - there).mean() < 12


def test_patches_of_a_physical_scale_by_the_users_pixel_size(project: Path, draw: Draw) -> None:
    """0.75 um on slides of 0.5 um: 48 px are read for 32; with 0.25 um in the list, 96."""
    asked = {"patching_arguments.patch_mpp": 0.75, "patching_arguments.patch_size": 32}
    assert draw(asked) == 0
    xs = np.unique(read_h5(RAW / "s_0_blockmap.h5").arrays["coords"][:, 0])
    assert np.diff(xs).min() == 48
    rows = [line.split(",") for line in (project / "list.csv").read_text().splitlines()]
    (project / "list.csv").write_text("\n".join(
        ",".join([*row, "mpp" if number == 0 else "0.25"]) for number, row in enumerate(rows)))
    assert draw(asked) == 0
    xs = np.unique(read_h5(RAW / "s_0_blockmap.h5").arrays["coords"][:, 0])
    assert np.diff(xs).min() == 96
    with pytest.raises(Refused, match="patch_mpp by um per px: give one"):
        draw({**asked, "patching_arguments.patch_level": 1})


def test_keys_of_the_encoder(draw: Draw, project: Path) -> None:
    before = read_h5(RAW / "s_0.h5").arrays["features"]
    assert draw({"encoder_arguments.target_img_size": 96}) == 0
    after = read_h5(RAW / "s_0.h5")
    assert after.parameters is not None and after.parameters["encoder"]["target_px"] == 96
    assert np.abs(after.arrays["features"] - before).max() > 0  # not the cached ones
    import timm
    import torch

    torch.manual_seed(5)
    torch.save(timm.create_model("test_resnet").state_dict(), project / "other.pt")
    assert draw({"encoder_arguments.ckpt_path": "other.pt"}) == 0
    other = read_h5(RAW / "s_0.h5").parameters
    assert other is not None
    assert other["encoder"]["weights_sha256"] != after.parameters["encoder"]["weights_sha256"]
    with pytest.raises(Refused, match="unknown .*encoder.*'resnet50_trnc'"):
        draw({"encoder_arguments.model_name": "resnet50_trnc"})


def test_keys_of_the_model(draw: Draw, project: Path) -> None:
    before = read_h5(RAW / "s_0_blockmap.h5").arrays["attention_scores"]
    features = (RAW / "s_0.h5").stat().st_mtime_ns
    for kind, size in (("clam_mb", "small"), ("abmil", "big")):
        write_checkpoint(project / "other.pt", kind, model_size=size, seed=3)
        assert draw({"model_arguments.ckpt_path": "other.pt", "model_arguments.model_type": kind,
                     "model_arguments.model_size": size}) == 0
        after = read_h5(RAW / "s_0_blockmap.h5")
        assert after.parameters is not None
        assert after.parameters["model"]["model_type"] == kind
        assert after.arrays["attention_scores"].shape == before.shape
        assert not np.allclose(after.arrays["attention_scores"], before)
        assert (RAW / "s_0.h5").stat().st_mtime_ns == features  # the encoder is the same
    with pytest.raises(Refused, match="expected .*attention width 256, found attention width 384"):
        draw({"model_arguments.ckpt_path": "other.pt", "model_arguments.model_type": "abmil",
              "model_arguments.model_size": "small"})
    with pytest.raises(Refused, match="model_type mil has no attention"):
        write_checkpoint(project / "mil.pt", "mil")
        draw({"model_arguments.ckpt_path": "mil.pt", "model_arguments.model_type": "mil"})
    with pytest.raises(Refused, match=f"feature width {2 * EMBED_DIM}, found feature width"):
        draw({"model_arguments.embed_dim": 2 * EMBED_DIM})
    with pytest.raises(Refused, match="initiate_fn"):
        draw({"model_arguments.initiate_fn": "another"})


def test_multi_branch_draws_the_predicted_class(draw: Draw, project: Path) -> None:
    write_checkpoint(project / "mb.pt", "clam_mb", seed=4)
    changes = {"model_arguments.ckpt_path": "mb.pt", "model_arguments.model_type": "clam_mb"}
    assert draw(changes) == 0
    from models.trained import load_trained

    model = load_trained(project / "mb.pt", class_names=("normal", "tumor"), model_type="clam_mb",
                         embed_dim=EMBED_DIM).build().eval()
    for raw, row in zip((RAW, Path("raw/exp/normal/s_1")), results(), strict=True):
        name = raw.name
        scored = score_bag(
            name, read_h5(raw / f"{name}.h5").arrays["features"], model=model, device="cpu")
        best = int(scored.prediction.argmax())
        assert row["Pred_0"] == ("normal", "tumor")[best]
        found = read_h5(raw / f"{name}_blockmap.h5").arrays["attention_scores"][:, 0]
        np.testing.assert_allclose(found, scored.attention[best], rtol=1e-4, atol=1e-5)


def test_drop_out_only_tells_how_the_model_was_built(draw: Draw) -> None:
    before = pixels(PRODUCTION)
    assert draw({"model_arguments.drop_out": 0.25}) == 0  # dropout is off when a model is used
    after = read_h5(RAW / "s_0_blockmap.h5").parameters
    assert after is not None and after["model"]["dropout"] == 0.25
    assert np.array_equal(pixels(PRODUCTION), before)


def test_the_json_beside_a_checkpoint_decides(draw: Draw, project: Path) -> None:
    spec = {"model_type": "clam_sb", "embed_dim": EMBED_DIM, "n_classes": 2, "dropout": 0.25}
    beside = project / "s_0_checkpoint.json"
    record = {"spec": spec, "class_names": ["normal", "tumor"], "encoder": None, "fold": 0}
    write_json(beside, record)
    assert draw({"model_arguments.model_type": None, "model_arguments.embed_dim": None,
                 "model_arguments.drop_out": 0.0}) == 0
    with pytest.raises(Refused, match="model_type is clam_mb, but .*clam_sb"):
        draw({"model_arguments.model_type": "clam_mb"})
    with pytest.raises(Refused, match="knows the classes normal, tumor"):
        draw({"data_arguments.label_dict": {"tumor": 0, "normal": 1}})
    write_json(beside, {**record, "encoder": {"name": "uni_v1"}})
    with pytest.raises(Refused, match="uni_v1"):
        draw()
    write_json(beside, {**record, "class_names": ["a", "b"]})
    assert draw({"data_arguments.label_dict": None}) == 0
    assert {results()[0]["Pred_0"], results()[0]["Pred_1"]} == {"a", "b"}  # its own names


# ---------------------------------------------------------------------------- keys: the picture

LOOKS: list[tuple[dict[str, Any], str]] = [
    ({"alpha": 0.9}, "a_0.9"), ({"blank_canvas": True}, "bc_1"), ({"blur": True}, "blur_1"),
    ({"use_ref_scores": False}, "rs_0"), ({"vis_level": 0}, "l_0"),
    ({"binarize": True, "binary_thresh": 0.5}, "bi_1_0.5"),
    ({"binarize": True}, "bi_1_-1.0"), ({"save_ext": "png"}, ".png")]


@pytest.mark.parametrize(("changes", "part"), LOOKS, ids=[part for _, part in LOOKS])
def test_looks_change_the_name_and_the_pixels(
    draw: Draw, changes: dict[str, Any], part: str
) -> None:
    before = pixels(PRODUCTION)
    assert draw({f"heatmap_arguments.{key}": value for key, value in changes.items()}) == 0
    new = [path for path in Path("prod/exp/tumor").glob("s_0_0.5*")
           if path.name != Path(PRODUCTION).name]
    assert len(new) == 1 and part in new[0].name
    after = pixels(new[0])
    if "vis_level" in changes:
        assert after.shape == (768, 1024, 3)
        assert pixels("prod/exp/tumor/s_0_orig_0.jpg").shape == (768, 1024, 3)
    elif "save_ext" in changes:
        assert np.abs(after.astype(int) - before).mean() < 2
        assert Path("prod/exp/tumor/s_0_orig_1.png").exists()
    else:
        assert np.abs(after.astype(int) - before).max() > 15
    if "blank_canvas" in changes:
        assert (after[:20, :20] >= 254).all() and (before[:20, :20] < 250).all()
    if changes == {"binarize": True, "binary_thresh": 0.5}:
        plain = pixels("prod/exp/tumor/s_0_orig_1.jpg").astype(int)
        share = (np.abs(after - plain).max(axis=2) > 30).mean() / (
            np.abs(before - plain).max(axis=2) > 30).mean()
        assert 0.2 < share < 0.9  # patches under the threshold are not coloured


def test_looks_that_are_not_in_the_name(draw: Draw) -> None:
    before = pixels(PRODUCTION)
    assert draw({"heatmap_arguments.cmap": "viridis"}) == 0
    assert np.abs(pixels(PRODUCTION).astype(int) - before).max() > 40
    assert draw({"heatmap_arguments.custom_downsample": 2}) == 0
    assert pixels(PRODUCTION).shape == (192, 256, 3)
    assert pixels("prod/exp/tumor/s_0_orig_1.jpg").shape == (192, 256, 3)
    assert draw() == 0
    assert np.array_equal(pixels(PRODUCTION), before)


def test_key_vis_level_minus_one_is_the_best_for_32x(draw: Draw) -> None:
    assert draw({"heatmap_arguments.vis_level": -1}) == 0
    assert pixels(PRODUCTION.replace("_l_1_", "_l_-1_")).shape == (192, 256, 3)
    assert draw({"heatmap_arguments.vis_level": 3}) == 3
    assert "vis_level -1" in report()[0]["reason"]


def test_key_save_orig_and_geojson(draw: Draw) -> None:
    original, cells = (Path("prod/exp/tumor") / name
                       for name in ("s_0_orig_1.jpg", "s_0_attention.geojson"))
    size = cells.stat().st_size
    assert draw({"heatmap_arguments.geojson_min_score": 0.8}) == 0
    assert cells.stat().st_size < size
    assert min(item["properties"].get("measurements", {"attention": 1})["attention"]
               for item in json.loads(cells.read_text())["features"]) >= 0.8
    original.unlink()
    cells.unlink()
    assert draw({"heatmap_arguments.save_orig": False, "heatmap_arguments.geojson": False}) == 0
    assert not original.exists() and not cells.exists()
    assert draw() == 0
    assert original.exists() and cells.exists()


def test_key_use_center_shift(draw: Draw) -> None:
    before = {tuple(row) for row in read_h5(RAW / "s_0_blockmap.h5").arrays["coords"].tolist()}
    assert draw({"heatmap_arguments.use_center_shift": False}) == 0
    after = {tuple(row) for row in read_h5(RAW / "s_0_blockmap.h5").arrays["coords"].tolist()}
    assert before < after  # the centre alone is easier to satisfy


def test_key_use_roi_limits_the_fine_map_and_its_picture(draw: Draw, project: Path) -> None:
    assert draw({"heatmap_arguments.use_roi": True}) == 0
    coords = read_h5(RAW / "s_0_0.5_roi_True.h5").arrays["coords"]
    assert coords.min(axis=0).tolist() >= [500, 300]
    assert (coords.max(axis=0) <= [800, 560]).all()
    picture = pixels(PRODUCTION.replace("roi_0", "roi_1"))
    assert picture.shape == (130, 150, 3)
    (project / "list.csv").write_text("slide_id,label,x1,x2,y1,y2\ns_0,tumor,5000,8000,0,90\n")
    assert draw({"heatmap_arguments.use_roi": True}) == 3
    assert "region x 5000-8000" in report()[0]["reason"]
    (project / "list.csv").write_text("slide_id,label,x1,x2,y1,y2\ns_0,tumor,0,70,0,70\n")
    assert draw({"heatmap_arguments.use_roi": True}) == 0
    assert report()[0]["status"] == "empty" and "region" in report()[0]["reason"]


def test_key_calc_heatmap(draw: Draw) -> None:
    off: dict[str, Any] = {"heatmap_arguments.calc_heatmap": False}
    assert draw(off) == 0  # the map is there
    assert draw({**off, "heatmap_arguments.use_roi": True}) == 0  # falls back to the whole slide
    assert pixels(PRODUCTION.replace("roi_0", "roi_1")).shape == (130, 150, 3)
    assert draw(off, "--overlap", "0.25") == 3
    assert "calc_heatmap is false" in report()[0]["reason"]


def test_keys_of_samples(draw: Draw) -> None:
    def names(sample: str) -> list[str]:
        return sorted(path.name for path in Path("prod/exp/sampled_patches").glob(
            f"label_tumor_*/{sample}/*"))

    entries = [{"name": "top", "k": 3}, {"name": "low", "k": 3, "mode": "reverse_topk"},
               {"name": "off", "sample": False},
               {"name": "middle", "mode": "range_sample", "k": 4, "score_start": 0.4,
                "score_end": 0.6}]
    assert draw({"sample_arguments.samples": entries}) == 0
    assert len(names("top")) == 3 and names("top")[0].endswith("a_1.000.png")
    assert names("low")[0].startswith("0_s_0") and not set(names("top")) & set(names("low"))
    assert not names("off")
    middle = names("middle")
    assert len(middle) == 4
    assert all(0.4 <= float(name.split("_a_")[1][:-4]) <= 0.6 for name in middle)
    entries[3]["seed"] = 2
    assert draw({"sample_arguments.samples": entries}) == 0
    assert names("middle") != middle and len(names("middle")) == 4  # the others are gone


# ---------------------------------------------------------------------------- models and tasks

CONTEXTUAL = {
    "abmilx": {"inner_dim": 32, "n_heads": 4},
    "transmil": {"inner_dim": 32, "n_heads": 4},
    "dsmil": {"query_dim": 16},
    "hag_mil": {"hidden_dims": (16, 16)}}


@pytest.mark.parametrize("kind", [*CONTEXTUAL, "abmilx without A+"])
def test_models_whose_attention_depends_on_the_bag(
    draw: Draw, project: Path, kind: str
) -> None:
    """The fine map equals the coarse one where both have a patch; made again it is the same."""
    name, _, plain = kind.partition(" ")
    write_described(project / "other.pt", name, options={
        **CONTEXTUAL[name], **({"abx_attn_plus": False} if plain else {})})
    changes = {"model_arguments.ckpt_path": "other.pt", "model_arguments.model_type": None}
    assert draw(changes) == 0
    coarse, fine = (read_h5(RAW / f"s_0_{part}.h5") for part in ("blockmap", "0.5_roi_False"))
    assert fine.parameters is not None and fine.parameters["scored"] == "in bags"
    known = dict(zip(map(tuple, coarse.arrays["coords"].tolist()),
                     coarse.arrays["attention_scores"][:, 0].tolist(), strict=True))
    found = fine.arrays["attention_scores"][:, 0]
    places = list(map(tuple, fine.arrays["coords"].tolist()))
    same = [place in known for place in places]
    assert 5 < sum(same) < len(same)
    assert [known[place] for place in places if place in known] == found[same].tolist()
    assert found.std() > 0 and len(np.unique(found[np.logical_not(same)])) > 5
    (RAW / "s_0_0.5_roi_False.h5").unlink()
    assert draw(changes) == 0
    assert np.array_equal(
        read_h5(RAW / "s_0_0.5_roi_False.h5").arrays["attention_scores"][:, 0], found)


def test_log_weights_of_the_fine_map_are_on_the_coarse_maps_scale(
    draw: Draw, project: Path
) -> None:
    """Their weights sum to about the number of bags: not to what larger bags would leave."""
    write_described(project / "other.pt", "abmilx", options=CONTEXTUAL["abmilx"])
    assert draw({"model_arguments.ckpt_path": "other.pt", "model_arguments.model_type": None}) == 0
    coarse, fine = (read_h5(RAW / f"s_0_{part}.h5").arrays["attention_scores"][:, 0]
                    for part in ("blockmap", "0.5_roi_False"))
    assert np.exp(coarse.astype(float)).sum() == pytest.approx(1, abs=1e-4)
    assert np.exp(fine.astype(float)).mean() == pytest.approx(1 / len(coarse), rel=0.25)


def test_dsmil_draws_the_row_of_the_predicted_class(draw: Draw, project: Path) -> None:
    from models.trained import load_trained

    write_described(project / "other.pt", "dsmil", options=CONTEXTUAL["dsmil"])
    assert draw({"model_arguments.ckpt_path": "other.pt", "model_arguments.model_type": None}) == 0
    model = load_trained(project / "other.pt", class_names=("normal", "tumor")).build().eval()
    scored = score_bag("s_0", read_h5(RAW / "s_0.h5").arrays["features"], model=model, device="cpu")
    assert scored.attention.shape[0] == 2
    np.testing.assert_allclose(
        read_h5(RAW / "s_0_blockmap.h5").arrays["attention_scores"][:, 0],
        scored.attention[int(scored.prediction.argmax())], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "max", "mil"])
def test_models_without_attention_are_refused(draw: Draw, project: Path, kind: str) -> None:
    write_described(project / "other.pt", kind)
    with pytest.raises(Refused, match=f"{kind} has no attention, a heatmap needs abmil, abmilx, "):
        draw({"model_arguments.ckpt_path": "other.pt", "model_arguments.model_type": None})


TASKS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "multilabel": ({"model_type": "dsmil", "n_classes": 3, "options": CONTEXTUAL["dsmil"]},
                   ["necrosis", "invasion", "grade"], ["p_necrosis", "p_invasion", "p_grade"]),
    "regression": ({"model_type": "abmil", "n_classes": 2, "target_mean": (5.0, 60.0),
                    "target_std": (2.0, 9.0)}, ["size", "age"], ["yhat_size", "yhat_age"]),
    "survival": ({"model_type": "abmilx", "n_classes": 4, "options": CONTEXTUAL["abmilx"],
                  "bin_edges": (0.0, 10.0, 20.0, 30.0, 90.0)}, ["months", "death"],
                 ["risk", "S_1", "S_2", "S_3", "S_4"])}


@pytest.mark.parametrize("task_type", TASKS)
def test_other_tasks_have_their_scores_in_the_list(
    draw: Draw, project: Path, task_type: str
) -> None:
    """Strata, which the json names as classes, and the labels of the slides do not matter."""
    spec, names, cells = TASKS[task_type]
    write_described(project / "other.pt", spec["model_type"], task_type=task_type,
                    class_names=["low", "middle", "high", "very high", "five"],
                    target_names=names, **{key: value for key, value in spec.items()
                                           if key != "model_type"})
    assert draw({"model_arguments.ckpt_path": "other.pt", "model_arguments.model_type": None,
                 "exp_arguments.n_classes": spec["n_classes"]}) == 0
    row = results()[0]
    assert [name for name in row if name in cells] == cells
    assert "Pred_0" not in row and "p_class_tumor" not in row
    prediction = read_h5(RAW / "s_0_blockmap.h5").root["prediction"]
    np.testing.assert_allclose([float(row[name]) for name in cells], prediction, atol=1e-5)
    if task_type == "regression":
        assert 40 < float(row["yhat_age"]) < 80  # in its own unit
    groups = {path.name for path in Path("prod/exp/sampled_patches").iterdir()
              if any(path.rglob("*.png"))}
    assert groups == ({f"label_{label}_pred_{int(np.argmax(read_h5(raw).root['prediction']))}"
                       for label, raw in (("tumor", RAW / "s_0_blockmap.h5"),
                                          ("normal", "raw/exp/normal/s_1/s_1_blockmap.h5"))}
                      if task_type == "multilabel" else {"label_tumor", "label_normal"})
    with pytest.raises(Refused, match="n_classes is 7, but "):
        draw({"model_arguments.ckpt_path": "other.pt", "model_arguments.model_type": None,
              "exp_arguments.n_classes": 7})


def test_keys_for_checkpoints_without_json(draw: Draw, project: Path) -> None:
    """task_type and model_options say what the weights do not."""
    write_described(project / "a.pt", "abmilx", options=CONTEXTUAL["abmilx"])
    (project / "a.json").unlink()
    changes = {"model_arguments.ckpt_path": "a.pt", "model_arguments.model_type": "abmilx"}
    assert draw(changes) == 0
    before = read_h5(RAW / "s_0_blockmap.h5").arrays["attention_scores"]
    (project / "options.yaml").write_text("act: relu\n")
    assert draw({**changes, "model_arguments.model_options": "options.yaml"}) == 0
    after = read_h5(RAW / "s_0_blockmap.h5")
    assert after.parameters is not None and after.parameters["model"]["options"]["act"] == "relu"
    assert not np.allclose(after.arrays["attention_scores"], before)
    assert draw({**changes, "model_arguments.task_type": "survival"}) == 0
    assert float(results()[0]["risk"]) < 0
    with pytest.raises(Refused, match="task_type is 'cure', expected one of classification"):
        draw({**changes, "model_arguments.task_type": "cure"})


# ---------------------------------------------------------------------------- magnifications

HAG_RAW, HAG_PROD = Path("raw/hag/tumor/s_0"), Path("prod/hag/tumor")


def picture(name: str) -> Path:
    return HAG_PROD / f"s_0_{name}_roi_0_blur_0_bc_0_a_0.4_l_1_bi_0_-1.0.jpg"


@pytest.fixture(scope="module")
def drawn_levels(
    finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A project on which a HAG-MIL of three levels was drawn, and its config; do not change."""
    root = copy_project(finished, tmp_path_factory.mktemp("levels") / "project")
    changes = write_hierarchy(root)
    write_config(root, changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert create_heatmaps.main(["--config_file", "c.yaml", "--yes", "--device", "cpu"]) == 0
    return root, changes


@pytest.fixture
def levels(
    drawn_levels: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Draw:
    """``levels({...})`` draws a copy of it again with a changed config."""
    root = copy_project(drawn_levels[0], tmp_path / "levels")
    monkeypatch.chdir(root)

    def run(changes: dict[str, Any] | None = None) -> int:
        write_config(root, {**drawn_levels[1], **(changes or {})})
        return create_heatmaps.main(["--config_file", "c.yaml", "--yes", "--device", "cpu"])

    return run


def level_arrays(name: str) -> dict[str, np.ndarray]:
    return read_h5(HAG_RAW / f"s_0_blockmap_{name}.h5").arrays


def test_levels_follow_the_selection(levels: Draw) -> None:
    """Each level holds the children of what was selected above; nothing else was encoded."""
    coarse, middle, fine = (level_arrays(f"level_{level}") for level in (2, 1, 0))
    assert np.array_equal(coarse["coords"], read_h5(HAG_RAW / "s_0.h5").arrays["coords"])
    for above, below, side in ((coarse, middle, 128), (middle, fine, 64)):
        selected = above["selected"].astype(bool)
        assert 0 < selected.sum() < len(selected)
        scores = above["attention_scores"][:, 0]
        assert scores[selected].min() >= scores[~selected].max()
        assert sorted(map(tuple, below["coords"].tolist())) == sorted(
            (x + dx, y + dy) for x, y in above["coords"][selected].tolist()
            for dx in (0, side // 2) for dy in (0, side // 2))
        assert np.array_equal(np.unique(below["rows"] // 4), np.sort(above["rows"][selected]))
    assert not fine["selected"].any()
    for name, found in (("level_1", middle), ("level_0", fine)):
        cached = read_h5(HAG_RAW / f"s_0_{name}.h5").arrays
        assert np.array_equal(cached["rows"], np.sort(found["rows"]))
        assert cached["features"].shape == (len(found["rows"]), EMBED_DIM)
    row = results()[0]
    assert (row["n_patches"], row["n_level_1"], row["n_level_0"]) == tuple(
        str(len(found["coords"])) for found in (coarse, middle, fine))
    assert float(row["p_0"]) >= 0.5 and row["Pred_0"] in ("normal", "tumor")


def test_levels_have_pictures_with_an_outline_around_what_went_on(levels: Draw) -> None:
    """Black on white around the union of the selected patches, colour on the rows that were fed."""
    original = pixels(HAG_PROD / "s_0_orig_1.jpg").astype(int)
    for name, side in (("level_2", 64), ("level_1", 32), ("level_0", 16)):
        found, drawn = level_arrays(name), pixels(picture(name)).astype(int)
        selected = found["selected"].astype(bool)
        black = (drawn.max(axis=2) < 40)
        assert black.any() == selected.any()
        if selected.any():
            places = found["coords"][selected] // 2
            low, high = places.min(axis=0), places.max(axis=0) + side
            y, x = np.nonzero(black)
            assert np.abs([x.min() - low[0], y.min() - low[1]]).max() <= 2
            assert np.abs([x.max() - high[0], y.max() - high[1]]).max() <= 2
        fed = np.zeros(drawn.shape[:2], bool)
        for x0, y0 in (found["coords"] // 2).tolist():
            fed[y0 - 3:y0 + side + 3, x0 - 3:x0 + side + 3] = True
        changed = np.abs(drawn - original).max(axis=2) > 40
        assert changed[fed].mean() > 0.3 and not changed[~fed].any()
    assert not Path("raw/hag/tumor/s_0/s_0_0.5_roi_False.h5").exists()  # no overlapping map


def test_geojson_of_levels_says_what_was_selected(levels: Draw) -> None:
    for name, side in (("level_2", 128), ("level_1", 64), ("level_0", 32)):
        features = json.loads(
            (HAG_PROD / f"s_0_{name}_attention.geojson").read_text())["features"]
        cells = [item for item in features if item["properties"]["objectType"] == "detection"]
        found = level_arrays(name)
        assert [cell["properties"]["selected"] for cell in cells] == \
            found["selected"].astype(bool).tolist()
        assert [cell["properties"]["measurements"]["selected"] for cell in cells] == \
            found["selected"].astype(int).tolist()
        ring = np.array(cells[0]["geometry"]["coordinates"][0])
        assert ring[0].tolist() == found["coords"][0].tolist()
        assert (ring.max(axis=0) - ring.min(axis=0)).tolist() == [side] * 2
        assert (len(features) > len(cells)) == (name == "level_2")  # tissue once


def test_levels_again_do_nothing_and_another_model_encodes_only_what_is_new(
    levels: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = count_encoded(monkeypatch)
    before = tree_of(Path("prod/hag"))
    assert levels() == 0
    assert not encoded and tree_of(Path("prod/hag")) == before
    known = {tuple(place) for name in ("level_1", "level_0")
             for place in level_arrays(name)["coords"].tolist()}
    write_hierarchy(Path(), kept=0.7)
    assert levels() == 0
    new = [tuple(place) for coords in encoded for place in coords.tolist()]
    now = {tuple(place) for name in ("level_1", "level_0")
           for place in level_arrays(name)["coords"].tolist()}
    assert new and len(now) > len(known)
    assert len(level_arrays("level_0")["coords"]) > 0


def test_keys_of_levels(levels: Draw) -> None:
    """As the json says unless given; by pixel size too; as many as the model has, and finer."""
    before = level_arrays("level_0")
    assert levels({"patching_arguments.child_levels": [1, 0]}) == 0
    assert report("hag")[0]["status"] == "already done"  # the json says the same
    assert levels({"patching_arguments.child_mpp": [1.0, 0.5]}) == 0
    after = level_arrays("mpp_0.5")
    assert np.array_equal(after["coords"], before["coords"])
    np.testing.assert_allclose(after["attention_scores"], before["attention_scores"], atol=1e-4)
    for given, message in (([1], "takes 2 finer levels, found level_1: give"),
                           ([2, 1], "are not finer than patch_level 2"),
                           ([0, 1], "expected coarse to fine")):
        with pytest.raises(Refused, match=message):
            levels({"patching_arguments.child_levels": given})
    with pytest.raises(Refused, match="child_mpp name the finer levels in two ways"):
        levels({"patching_arguments.child_levels": [1, 0],
                "patching_arguments.child_mpp": [1.0, 0.5]})
    write_json(Path("hag.json"), {**json.loads(Path("hag.json").read_text()), "child_levels": []})
    with pytest.raises(Refused, match="takes 2 finer levels, found none: give patching_arguments"):
        levels()


def test_finer_levels_of_a_model_of_one_are_refused(draw: Draw) -> None:
    with pytest.raises(Refused, match="takes 0 finer levels, found level_0: leave child_levels"):
        draw({"patching_arguments.child_levels": [0], "patching_arguments.patch_level": 1})


def test_looks_of_levels(levels: Draw) -> None:
    """Region, blur and the rest work as in other pictures."""
    assert levels({"heatmap_arguments.use_roi": True, "heatmap_arguments.blur": True}) == 0
    region = pixels(Path(str(picture("level_2")).replace("roi_0_blur_0", "roi_1_blur_1")))
    assert region.shape == (130, 150, 3)
    assert levels({"heatmap_arguments.geojson": False, "heatmap_arguments.cmap": "viridis"}) == 0
    whole = pixels(picture("level_2")).astype(int)
    assert levels() == 0
    assert np.abs(pixels(picture("level_2")).astype(int) - whole).max() > 40
