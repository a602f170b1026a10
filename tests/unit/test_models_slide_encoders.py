"""Slide encoders: pooling, the embedding of a trained model, plug-ins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.slide_encoders import load_slide_encoder
from models.slide_models import SlideModelSpec, build_slide_model
from models.trained import load_trained
from utils.contracts import Bag
from utils.errors import ItemFailed, Refused
from utils.storage import file_sha256, save_torch, write_json

WIDTH = 24
ROWS = np.random.default_rng(0).normal(size=(7, WIDTH)).astype(np.float32)
COORDS = 256 * np.arange(14).reshape(7, 2)


def checkpoint(folder: Path, model_type: str = "clam_sb", **changes: object) -> Path:
    """A checkpoint of ours with random weights, and its json."""
    spec = {"model_type": model_type, "embed_dim": WIDTH, "n_classes": 2, **changes}
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    path = folder / "s_0_checkpoint.pt"
    save_torch(path, build_slide_model(SlideModelSpec(**spec)).state_dict())  # type: ignore
    write_json(path.with_suffix(".json"), {
        "spec": spec, "class_names": ["normal", "tumor"], "fold": 0,
        "encoder": {"name": "uni_v1", "weights_sha256": "1"},
        "checkpoint_sha256": file_sha256(path)})
    return path


@pytest.mark.parametrize(("name", "wanted"), [
    ("mean", ROWS.mean(axis=0)), ("max", ROWS.max(axis=0)),
    ("mean_max", np.concatenate([ROWS.mean(axis=0), ROWS.max(axis=0)]))])
def test_pooling(name: str, wanted: np.ndarray) -> None:
    encoder = load_slide_encoder(name)
    vector = encoder.encode(ROWS.astype(np.float16), COORDS)
    assert vector.dtype == np.float32 and encoder.record() == {"name": name}
    np.testing.assert_allclose(vector, wanted, atol=1e-2)
    np.testing.assert_allclose(encoder.encode(ROWS, COORDS), wanted, rtol=1e-5, atol=1e-6)
    encoder.check(12345, {"name": "any"})


@pytest.mark.parametrize("model_type", ["clam_sb", "clam_mb", "mil", "dsmil", "transmil"])
def test_a_trained_model_gives_its_embedding(tmp_path: Path, model_type: str) -> None:
    path = checkpoint(tmp_path / "exp_s1", model_type)
    encoder = load_slide_encoder(f"checkpoint:{path}")
    assert encoder.name == "exp_s1_s_0_checkpoint"
    assert encoder.record()["sha256"] == file_sha256(path)
    model = load_trained(path, class_names=("normal", "tumor")).build().eval()
    with torch.inference_mode():
        wanted = model(Bag(slide_id="", features=torch.from_numpy(ROWS), coords=COORDS)).embedding
    np.testing.assert_array_equal(encoder.encode(ROWS, COORDS), wanted.flatten().numpy())


def test_a_model_knows_whose_features_it_takes(tmp_path: Path) -> None:
    encoder = load_slide_encoder(f"checkpoint:{checkpoint(tmp_path)}")
    encoder.check(WIDTH, {"name": "uni_v1", "weights_sha256": "1"})
    encoder.check(0, {"name": "uni_v1"})
    with pytest.raises(Refused, match="width 24, found 1024"):
        encoder.check(1024, {"name": "uni_v1"})
    with pytest.raises(Refused, match="found resnet50_trunc"):
        encoder.check(WIDTH, {"name": "resnet50_trunc"})


PLUGIN = """
def register_slide_encoders(registry):
    @registry.register("median")
    def build(device):
        return lambda features, coords: features.median(dim=0).values

    @registry.register("broken")
    def broken(device):
        return lambda features, coords: features @ coords

    @registry.register("infinite")
    def infinite(device):
        return lambda features, coords: features.sum(dim=0) / 0
"""


def test_a_plug_in(tmp_path: Path) -> None:
    path = tmp_path / "pool.py"
    path.write_text(PLUGIN, encoding="utf-8")
    encoder = load_slide_encoder(f"{path}:median")
    np.testing.assert_array_equal(encoder.encode(ROWS, COORDS), np.median(ROWS, axis=0))
    assert encoder.record() == {"name": "median", "plugin_sha256": file_sha256(path)}
    for name, says in (("broken", "slide encoder broken failed"), ("infinite", "not finite")):
        with pytest.raises(ItemFailed, match=says):
            load_slide_encoder(f"{path}:{name}").encode(ROWS, COORDS)


@pytest.mark.parametrize(("text", "content", "says"), [
    ("sum", "", "known: max, mean, mean_max, checkpoint:PATH"),
    ("checkpoint:nowhere.pt", "", "nowhere.pt is missing"),
    ("nowhere.py:pool", "", "no Python file nowhere.py"),
    ("{file}:pool", "", "does not define 'def register_slide_encoders"),
    ("{file}:pool", "1 / 0", "ZeroDivisionError"),
    ("{file}:meadian", PLUGIN, "did you mean 'median'"),
    ("mean", "cuda", "no usable CUDA"),
])
def test_refusals(tmp_path: Path, text: str, content: str, says: str) -> None:
    file = tmp_path / "plugin.py"
    file.write_text(content, encoding="utf-8")
    if content == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Refused, match=says):
        load_slide_encoder(text.format(file=file), device="cuda" if content == "cuda" else "cpu")


def test_models_of_several_levels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="several magnifications"):
        load_slide_encoder(f"checkpoint:{checkpoint(tmp_path / 'b', 'hag_mil', n_levels=2)}")
