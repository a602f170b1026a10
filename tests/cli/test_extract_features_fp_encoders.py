"""extract_features_fp.py with several encoders, plug-ins, slide encoders, layouts: flag by flag.

The work runs in this process (``here``), as it is the flags that are tested.
"""

from __future__ import annotations

import csv
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import datasets.extraction
import extract_features_fp
from tests.feature_inputs import Inputs, make_inputs, save_network
from tests.unit.test_models_slide_encoders import checkpoint
from utils.errors import Refused
from utils.options import parse
from utils.storage import read_h5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs") / "cohort", (6, 0, 3))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of two of timm's smallest networks, by the names of their encoders."""
    folder = tmp_path_factory.mktemp("weights")
    return {f"timm:{name}": save_network(folder / f"{name}.pth", name)
            for name in ("test_resnet", "test_efficientnet")}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No child processes; the arguments of every call of ``run_items``."""
    seen: list[dict[str, Any]] = []
    original = datasets.extraction.run_items

    def run_items(work: Any, items: Any, **settings: Any) -> Any:
        seen.append({"items": items, **settings})
        return original(work, items, workers=0, arguments=settings["arguments"])

    monkeypatch.setattr(datasets.extraction, "run_items", run_items)
    return seen


def main(inputs: Inputs, feat_dir: Path, *flags: object) -> int:
    base = inputs.arguments(feat_dir)
    names = base.index("--model_name")
    return extract_features_fp.main([*base[:names], *map(str, flags)])


def both(weights: dict[str, Path]) -> list[object]:
    return ["--model_name", *weights, "--target_patch_size", 64, "--encoder_ckpt",
            *(f"{name}={path}" for name, path in weights.items())]


def features(path: Path) -> np.ndarray:
    return read_h5(path).arrays["features"]


def rows(folder: Path, stage: str = "features") -> dict[str, dict[str, str]]:
    with (folder / f"report_{stage}.csv").open(encoding="utf-8", newline="") as file:
        return {row["item"]: row for row in csv.DictReader(file)}


# ---------------------------------------------------------------------------- encoders

def test_model_name_several_at_once_and_one_by_one(
        inputs: Inputs, weights: dict[str, Path], here: list[dict[str, Any]], tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    assert main(inputs, tmp_path / "both", *both(weights)) == 0
    assert "6 items (slides x levels x encoders) to do (18 patches)" in capsys.readouterr().out
    assert list(rows(tmp_path / "both")) == [
        f"slide_{number} ({name})" for number in range(3) for name in weights]
    for name, path in weights.items():
        label = name.replace(":", "_")
        assert main(inputs, tmp_path / label, "--model_name", name, "--encoder_ckpt", path,
                    "--target_patch_size", 64) == 0
        for number in (0, 2):
            first, second = (read_h5(folder / f"h5_files/slide_{number}.h5")
                             for folder in (tmp_path / "both" / label, tmp_path / label))
            np.testing.assert_array_equal(first.arrays["features"], second.arrays["features"])
            assert first.parameters == second.parameters and first.root["encoder"] == name
        assert (tmp_path / "both" / label / "pt_files/slide_0.pt").exists()
    shutil.rmtree(tmp_path / "both/timm_test_resnet")
    assert main(inputs, tmp_path / "both", *both(weights)) == 0
    assert {work.encoder for shard in here[-1]["items"] for work in shard.works} == {
        "timm:test_resnet"}


PLUGIN = """
import torch
from models.encoder_plugin import EncoderBundle, register_custom_encoder

def register_feature_extractors(registry, device, dtype, num_workers):
    def loader(device, dtype):
        from torchvision.transforms.functional import to_tensor
        return EncoderBundle(torch.nn.Identity(), to_tensor, lambda batch: batch.mean(dim=(2, 3)))
    register_custom_encoder(registry=registry, name="NAME", embedding_dim=3, loader=loader,
                            device=device, dtype=dtype, num_workers=num_workers)
"""


def test_encoder_plugin_given_twice(inputs: Inputs, here: object, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """Two files, each by its own flag; they are in the table too."""
    flags: list[object] = []
    for name in ("cli_one", "cli_two"):
        (tmp_path / f"{name}.py").write_text(PLUGIN.replace("NAME", name), encoding="utf-8")
        flags += ["--encoder_plugin", tmp_path / f"{name}.py"]
    assert main(inputs, tmp_path / "f", *flags, "--model_name", "cli_one") == 0
    found = features(tmp_path / "f/h5_files/slide_0.h5")
    assert found.shape == (6, 3) and 0.2 < found.mean() < 1
    capsys.readouterr()
    assert extract_features_fp.main(["--list_encoders", *map(str, flags)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["name", "aliases", "dim"]
    assert {"cli_two", "uni_v1", "resnet50_trunc"} <= {line.split()[0] for line in lines}


def test_flags_reach_the_encoder(inputs: Inputs, weights: dict[str, Path], tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """--trust_remote_code, --precision auto, --target_patch_size left out."""
    name, path = next(iter(weights.items()))
    seen: dict[str, Any] = {}
    import models.encoder_choice

    def record(asked: str, **settings: Any) -> dict[str, Any]:
        seen.update(settings)
        return {"name": asked, "precision": "fp32"}

    monkeypatch.setattr(models.encoder_choice, "encoder_record", record)
    monkeypatch.setattr(datasets.extraction, "extract", lambda *given, **settings: [])
    main(inputs, tmp_path, "--model_name", name, "--encoder_ckpt", path, "--trust_remote_code",
         "--precision", "auto")
    assert seen["trust_remote_code"] and seen["precision"] == "auto" and seen["target_px"] is None
    main(inputs, tmp_path, "--model_name", name, "--encoder_ckpt", path)
    assert not seen["trust_remote_code"] and seen["precision"] == "fp32"


def test_patches_an_encoder_was_not_made_for_are_warned_of(
        inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(datasets.extraction, "extract", lambda *given, **settings: [])
    monkeypatch.setenv("UNI_CKPT_PATH", str(save_network(tmp_path / "weights.pth")))
    assert main(inputs, tmp_path / "f", "--model_name", "uni_v1") == 0
    assert ("warning: encoder 'uni_v1' was made for patches of 256 px at 0.5 um/px; these are "
            "64 px at 0.5 um/px") in capsys.readouterr().err


# ---------------------------------------------------------------------------- slide encoders

def test_slide_encoder(inputs: Inputs, weights: dict[str, Path], here: object, tmp_path: Path
                       ) -> None:
    """Beside each encoder's features, and later, when those are done."""
    assert main(inputs, tmp_path, *both(weights), "--slide_encoder", "mean") == 0
    for name in weights:
        folder = tmp_path / name.replace(":", "_")
        vector = features(folder / "slide_features/mean/slide_0.h5")
        np.testing.assert_allclose(
            vector, features(folder / "h5_files/slide_0.h5").mean(axis=0), rtol=1e-5, atol=1e-6)
        assert len((folder / "slide_features/mean.csv").read_text().splitlines()) == 3
    report = rows(tmp_path, "slide_features")
    assert report["slide_1 (timm:test_resnet) mean"]["status"] == "empty"
    assert [row["status"] for row in report.values()].count("done") == 4
    pool = tmp_path / "pool.py"
    pool.write_text("def register_slide_encoders(registry):\n"
                    "    registry.register('first')(lambda device: lambda f, xy: f[0])\n",
                    encoding="utf-8")
    assert main(inputs, tmp_path, *both(weights), "--slide_encoder", "mean", f"{pool}:first") == 0
    report = rows(tmp_path, "slide_features")
    assert report["slide_0 (timm:test_resnet) mean"]["status"] == "already done"
    assert report["slide_0 (timm:test_resnet) first"]["status"] == "done"
    model = checkpoint(tmp_path / "exp", "abmil", embed_dim=96)
    with pytest.raises(Refused, match="trained on features of encoder name uni_v1"):
        main(inputs, tmp_path, *both(weights), "--slide_encoder", f"checkpoint:{model}")


def test_slides_without_features_fail_there_too(inputs: Inputs, weights: dict[str, Path],
                                                here: object, tmp_path: Path) -> None:
    slides = Path(shutil.copytree(inputs.slides, tmp_path / "slides"))
    (slides / "slide_0.tif").write_bytes(b"no slide")
    moved = Inputs(slides, inputs.patches_root, inputs.csv)
    name, path = next(iter(weights.items()))
    assert main(moved, tmp_path / "f", "--model_name", name, "--encoder_ckpt", path,
                "--slide_encoder", "max") == 3
    report = rows(tmp_path / "f", "slide_features")
    assert [row["status"] for row in report.values()] == ["failed", "empty", "done"]
    assert "has no features" in report["slide_0 max"]["reason"]


# ---------------------------------------------------------------------------- files

@pytest.mark.parametrize("layout", ["trident", "atlaspatch"])
def test_layout_and_storage_dtype(inputs: Inputs, weights: dict[str, Path], here: object,
                                  tmp_path: Path, layout: str) -> None:
    flags = [*both(weights), "--layout", layout, "--storage_dtype", "float16"]
    assert main(inputs, tmp_path, *flags) == 0
    if layout == "trident":
        with h5py.File(tmp_path / "features_timm_test_resnet/slide_0.h5") as file:
            assert file["features"].dtype == np.float16 and file["coords"].shape == (6, 2)
    else:
        with h5py.File(tmp_path / "patches/slide_0.h5") as file:
            assert sorted(file["features"]) == ["timm_test_efficientnet", "timm_test_resnet"]
    assert main(inputs, tmp_path, *flags) == 0
    assert {row["status"] for row in rows(tmp_path).values()} == {"already done", "empty"}


def test_paths_in_sub_folders_and_slides_that_are_folders(
        inputs: Inputs, weights: dict[str, Path], here: object, tmp_path: Path) -> None:
    """The column path of the process list; --slide_ext '' for a folder of DICOM files."""
    slides = tmp_path / "slides"
    (slides / "b/inner").mkdir(parents=True)
    (slides / "dicom").mkdir()
    shutil.copy(inputs.slides / "slide_0.tif", slides / "b/inner/x.tif")
    (slides / "dicom/1.dcm").write_bytes(b"no DICOM")
    coords = tmp_path / "out/patches"
    coords.mkdir(parents=True)
    for name in ("b__inner__x", "dicom"):
        shutil.copy(inputs.patches_root / "patches/slide_0.h5", coords / f"{name}.h5")
    table = tmp_path / "list.csv"
    table.write_text("slide_id,path\nb__inner__x.tif,b/inner/x.tif\ndicom,\n", encoding="utf-8")
    moved = Inputs(slides, tmp_path / "out", table)
    name, path = next(iter(weights.items()))
    flags = ["--model_name", name, "--encoder_ckpt", path, "--slide_ext", ""]
    assert main(moved, tmp_path / "f", *flags) == 3
    report = rows(tmp_path / "f")
    assert report["b__inner__x"]["status"] == "done"
    assert "DICOM" in report["dicom"]["reason"] or "dicom" in report["dicom"]["reason"]
    table.write_text("slide_id,path\nx.tif,../../x.tif\n", encoding="utf-8")
    with pytest.raises(Refused, match="would leave the folder"):
        main(moved, tmp_path / "f", *flags)


# ---------------------------------------------------------------------------- the run

def test_flags_reach_the_work(inputs: Inputs, weights: dict[str, Path], tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    """--slide_timeout, --cache_dir, --scheduler; what comes of them: test_datasets_*."""
    seen: list[Any] = []
    monkeypatch.setattr(datasets.extraction, "extract",
                        lambda *given, **settings: seen.extend([*given, settings]) or [])
    monkeypatch.setattr("utils.dask_cluster.check_workers", lambda *given: seen.append(given))
    name, path = next(iter(weights.items()))
    flags = ["--model_name", name, "--encoder_ckpt", path, "--slide_timeout", 7, "--cache_dir",
             tmp_path / "fast"]
    main(inputs, tmp_path / "f", *flags)
    shards, todo, settings = seen
    assert (todo.deadline_s, todo.cache_dir) == (7.0, tmp_path / "fast")
    assert settings == {"scheduler": None} and len(shards) == 1
    seen.clear()
    main(inputs, tmp_path / "f", *flags, "--scheduler", "tcp://host:1")
    (scheduler, folders), shards, _, settings = seen
    assert scheduler == "tcp://host:1" == settings["scheduler"]
    assert {inputs.slides, tmp_path / "f/h5_files"} <= set(folders)
    assert len(shards) == 3  # a task a slide


@pytest.mark.parametrize(("flags", "says"), [
    (["--encoder_ckpt", "a.pth"], "with several encoders give name=PATH"),
    (["--encoder_ckpt", "timm:test_resnet=a.pth", "timm:test_resnet=b.pth"], "two weight files"),
    (["--encoder_ckpt", "timm:test_resnet=a.pth"], "not a file: a.pth"),
    (["--model_name", "efficientnet_lite0", "EfficientNet_Lite0"], "the same encoder"),
    (["--model_name", "efficientnet_lite0", "--slide_encoder", "sum"], "unknown slide encoder"),
    (["--model_name", "efficientnet_lite0", "--encoder_plugin", "no.py"], "there is no file"),
    (["--layout", "trident", "--child_levels", "0"], "finer levels"),
    (["--layout", "atlaspatch", "--bad_tiles", "drop"], "--bad_tiles drop"),
    (["--gpus", "1", "--scheduler", "tcp://a:1"], "--gpus and --scheduler share"),
    (["--slide_timeout", "0"], "expected"),
])
def test_refusals(inputs: Inputs, tmp_path: Path, flags: list[str], says: str) -> None:
    names = [] if "--model_name" in flags else [
        "--model_name", "timm:test_resnet", "efficientnet_lite0"]
    with pytest.raises(Refused, match=says):
        main(inputs, tmp_path, *names, *flags)


def test_torchrun_shares_by_itself(inputs: Inputs) -> None:
    from utils.distributed import Group

    check = partial(extract_features_fp.check_devices, "auto", scheduler=None)
    assert check(gpus=0, group=Group(1, 2)) == ["auto"]
    with pytest.raises(Refused, match="--gpus and torchrun share the slides out in two ways"):
        check(gpus=2, group=Group(1, 2))


def test_nothing_is_required_beside_list_encoders() -> None:
    options = parse(extract_features_fp.Options, prog="x", description="", argv=["--list_encoders"])
    assert options.list_encoders and options.feat_dir is None
    with pytest.raises(Refused, match="--data_h5_dir is required"):
        parse(extract_features_fp.Options, prog="x", description="", argv=[])
