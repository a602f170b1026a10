"""Encoders of the user's own: the hook, its refusals, child processes; precision that overflows."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import models.encoder_plugin as plugin
from models.encoder_registry import ENCODERS, EncoderSpec, register
from models.encoder_table import encoder_table
from models.encoder_transforms import Transform
from models.encoder_weights import SHARDS, Weights, WeightSource, find_weights
from models.encoders import (
    Encoder,
    encoder_record,
    load_encoder,
    matching_encoder,
    resolve_precision,
)
from utils.errors import Refused, SlideError
from utils.storage import file_sha256

HOOK = """
import numpy as np
import torch
from types import SimpleNamespace
from models.encoder_plugin import EncoderBundle, register_custom_encoder

CALLS = []

class Colour(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))
    def forward(self, images):
        return self.gain * images.mean(dim=3)

def preprocess(image):
    return torch.tensor(np.asarray(image)[:8, :8].copy()).permute(2, 0, 1).float() / 255

def load(device, dtype):
    CALLS.append((device, dtype))
    assert device.type == "cpu" and dtype == torch.float32
    return SimpleNamespace(model=Colour().to(device, dtype), preprocess=preprocess)

def load_function(device, dtype):
    model = Colour()
    return EncoderBundle(model, preprocess, lambda batch: model(batch).mean(dim=2) * 2)

def register_feature_extractors(registry, device, dtype, num_workers):
    common = dict(registry=registry, device=device, dtype=dtype, num_workers=num_workers)
    register_custom_encoder(name="My_Rows", embedding_dim=24, loader=load, **common)
    register_custom_encoder(name="my_mean", embedding_dim=3, loader=load_function,
                            non_blocking=True, **common)
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(ENCODERS, "_entries", dict(ENCODERS._entries))
    monkeypatch.setattr(plugin, "_LOADED", {})


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(HOOK, encoding="utf-8")
    return path


def noise(count: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_the_hook_of_atlaspatch(hook: Path) -> None:
    """Lower-case names, outputs flattened, forward_fn, the file's sha256 in the record."""
    batch = noise(20)
    rows = load_encoder("MY_ROWS", plugins=[hook])
    wanted = torch.tensor(batch[:, :8, :8]).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(rows.encode(batch), wanted.mean(dim=3).flatten(1))
    mean = load_encoder("my_mean", plugins=[hook])
    torch.testing.assert_close(mean.encode(batch), wanted.mean(dim=(2, 3)) * 2)
    record = encoder_record("my_mean", plugins=[hook])
    assert record == mean.record() and record["name"] == "my_mean"
    assert record["weights_sha256"] == file_sha256(hook)
    assert matching_encoder(record, plugins=[hook])().record() == record
    prepared = np.stack([rows.prepare(patch) for patch in batch])
    assert prepared.shape == (20, 3, 8, 8) and torch.equal(
        rows.launch(prepared).cpu(), rows.encode(batch))
    assert {"my_mean", "my_rows"} <= {row["name"] for row in encoder_table([hook])}


def test_target_px_comes_before_the_plug_in_s_own(hook: Path) -> None:
    half = load_encoder("my_mean", plugins=[hook], target_px=8)
    patch = np.zeros((16, 16, 3), np.uint8)
    patch[8:, 8:] = 255
    assert float(load_encoder("my_mean", plugins=[hook]).encode(patch[None]).max()) == 0
    assert float(half.encode(patch[None]).min()) > 0.3  # the lower corner is seen now
    assert half.record()["target_px"] == 8


def test_loaders_are_called_late_and_files_once(hook: Path) -> None:
    import sys

    plugin.load_plugins([hook])
    plugin.load_plugins([hook, hook])
    (module,) = [module for name, module in sys.modules.items()
                 if getattr(module, "__file__", None) == str(hook)]
    assert module.CALLS == []  # type: ignore[attr-defined]
    load_encoder("my_rows", plugins=[hook])
    assert len(module.CALLS) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("text", "says"), [
    ("x = 1", r"def register_feature_extractors\(registry, device, dtype, num_workers\)"),
    (HOOK.replace("my_mean", "MY_ROWS"), "'my_rows' is taken"),
    (HOOK.replace("my_mean", "Virchow"), "'virchow' is taken by encoder 'virchow_v1'"),
    ("import no_such_package", "failed .ModuleNotFoundError: No module named 'no_such_package'"),
    (HOOK.replace("=24", "=0"), "embedding_dim is 0"), ("def broken(:", "SyntaxError")])
def test_files_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Refused, match=says) as refusal:
        load_encoder("my_rows", plugins=[path])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("old", "new", "says"), [
    ("=24", "=23", r"shape \(1, 24\), expected \(1, 23\)"),
    (", preprocess=preprocess)", ")", "returned no 'preprocess'"),
    ("mean(dim=3)", "mean(dim=9)", "cannot encode a patch"),
    (".float() / 255", ".float()[0]", "expected a .C, H, W. tensor")])
def test_loaders_that_are_refused(hook: Path, old: str, new: str, says: str) -> None:
    hook.write_text(HOOK.replace(old, new), encoding="utf-8")
    with pytest.raises(Refused, match=says):
        load_encoder("my_rows", plugins=[hook])


def test_other_refusals(hook: Path) -> None:
    with pytest.raises(Refused, match="there is no file"):
        encoder_record("my_rows", plugins=[hook.parent / "none.py"])
    with pytest.raises(Refused, match="leave --encoder_ckpt out"):
        encoder_record("my_rows", plugins=[hook], checkpoint=hook)
    with pytest.raises(Refused, match="from within register_feature_extractors"):
        plugin.register_custom_encoder(registry=ENCODERS, name="x", embedding_dim=1,
                                       loader=lambda device, dtype: None)
    pixels = plugin.PluginPixels(Transform(resize_px=0), lambda image: 1 / 0)
    with pytest.raises(SlideError, match="ZeroDivisionError"):
        pixels.prepare(noise(1)[0])


def in_child(path: Path, batch: np.ndarray) -> np.ndarray:
    """Load and encode where nothing has been registered."""
    return load_encoder("my_rows", plugins=[path]).encode(batch).numpy()


def test_the_path_travels_to_spawned_processes(hook: Path) -> None:
    batch = noise(3)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(in_child, hook, batch).result(timeout=120)
    np.testing.assert_array_equal(found, in_child(hook, batch))


def test_a_spec_can_be_registered_instead(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("""
from torch import nn
from models.encoder_registry import HALF, EncoderSpec, register
from models.encoder_weights import WeightSource, load_strictly

def build(weights):
    network = nn.Sequential(nn.Conv2d(3, 5, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    load_strictly(network, weights.state(), where=weights.path)
    return network

register(EncoderSpec(name="own", dim=5, source="me", licence="mine", mean=HALF, std=HALF,
                     weights=WeightSource(request="ask me"), build=build))
""", encoding="utf-8")
    weights = tmp_path / "own.pth"
    torch.save({"0.weight": torch.ones(5, 3, 2, 2), "0.bias": torch.zeros(5)}, weights)
    encoder = load_encoder("own", plugins=[path], checkpoint=weights, target_px=16)
    white = encoder.encode(np.full((1, 16, 16, 3), 255, np.uint8))
    torch.testing.assert_close(white, torch.full((1, 5), 12.0))
    with pytest.raises(Refused, match="no weights for encoder 'own': ask me"):
        load_encoder("own", plugins=[path])


# ---------------------------------------------------------------------------- precision

class Overflowing(nn.Module):
    """Gives infinities for bright patches unless it computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, bool]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        short = torch.is_autocast_enabled("cpu")
        self.calls.append((len(images), short))
        mean = images.mean(dim=(2, 3))
        return torch.where(mean > 0.9, torch.inf, mean) if short else mean


def overflowing(precision: Any) -> tuple[Encoder, Overflowing]:
    spec = replace(ENCODERS.get("resnet18"), dim=3, mean=(0.0,) * 3, std=(1.0,) * 3,
                   remote_code=True)  # eager on the CPU, as on a GPU
    network = Overflowing()
    encoder = Encoder(spec, network, weights=Weights(Path("none"), ""), device=torch.device("cpu"),
                      transform=Transform(resize_px=8), precision=precision)
    network.calls.clear()
    return encoder, network


def test_values_that_overflow_are_computed_again_in_fp32(capsys: pytest.CaptureFixture[str]
                                                         ) -> None:
    encoder, network = overflowing("bf16")
    batch = np.full((5, 8, 8, 3), 100, np.uint8)
    batch[[1, 4]] = 255
    found = encoder.encode(batch)
    torch.testing.assert_close(found, torch.tensor(batch[:, 0, 0] / 255).float())
    assert encoder.overflowed == 2 and network.calls == [(16, True), (2, False)]
    encoder.encode(batch)
    assert encoder.overflowed == 4
    assert capsys.readouterr().err.count("not finite in bf16") == 1 == len(encoder.warnings)


def test_what_is_finite_or_fp32_is_not_computed_twice() -> None:
    encoder, network = overflowing("bf16")
    encoder.encode(np.full((5, 8, 8, 3), 100, np.uint8))
    assert encoder.overflowed == 0 and network.calls == [(16, True)]
    exact, network = overflowing("fp32")
    assert float(exact.encode(np.full((1, 8, 8, 3), 255, np.uint8)).max()) == 1
    assert network.calls == [(16, False)]


def test_auto_precision_is_the_recommended_one_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch
                                                             ) -> None:
    virchow, uni2 = ENCODERS.get("virchow_v1"), ENCODERS.get("uni_v2")
    assert resolve_precision("auto", virchow, "cpu") == "fp32"
    assert resolve_precision("bf16", virchow, "cpu") == "bf16"
    monkeypatch.setattr("models.encoders.pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_precision("auto", virchow, "cuda") == "fp16"
    assert resolve_precision("auto", uni2, "cuda") == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert resolve_precision("auto", uni2, "cuda") == "fp32"


# ---------------------------------------------------------------------------- places of weights

def test_folders_and_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = WeightSource(env="MINE_CKPT_PATH", request="ask", hub_files=("special.pt",))
    monkeypatch.setenv("MINE_CKPT_PATH", str(tmp_path))
    with pytest.raises(Refused, match="holds 0 weight files for encoder 'mine', expected special"):
        find_weights("mine", source)
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pth")
    assert find_weights("mine", source).path == tmp_path / "a.pth"
    torch.save({"y": torch.ones(1)}, tmp_path / "b.pth")
    with pytest.raises(Refused, match="holds 2 weight files"):
        find_weights("mine", source)
    torch.save({"z": torch.ones(1)}, tmp_path / "special.pt")
    assert list(find_weights("mine", source).state()) == ["z"]
    index = tmp_path / f"pytorch_model.bin{SHARDS}"
    index.write_text('{"weight_map": {"x": "a.pth", "y": "b.pth"}}', encoding="utf-8")
    parts = find_weights("mine", source, index)
    assert sorted(parts.state()) == ["x", "y"]
    torch.save({"y": torch.zeros(1)}, tmp_path / "b.pth")
    assert find_weights("mine", source, index).sha256 != parts.sha256
    for text, says in (('{"weight_map": {"x": "../a.pth"}}', "missing beside"),
                       ('{"weight_map": {"x": "c.pth"}}', "c.pth is missing beside"),
                       ("[]", "lists no parts")):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(Refused, match=says):
            find_weights("mine", source, index)


def test_gated_weights_are_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                            ) -> None:
    import huggingface_hub

    def forbidden(*args: Any, **settings: Any) -> str:
        raise AssertionError("asked for a download")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", forbidden)
    for name in ("virchow2", "ctranspath", "dinov3_vitl16", "medsiglip", "h0-mini"):
        with pytest.raises(Refused, match=r"(ask for access at|download).*https://.*_CKPT_PATH="):
            load_encoder(name)
    asked: list[tuple[str, str]] = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes(b"{}")
    assert find_weights("phikon_v2", ENCODERS.get("phikon_v2").weights).path.name == (
        "model.safetensors")
    assert asked == [("owkin/phikon-v2", "config.json"), ("owkin/phikon-v2", "model.safetensors")]


def test_torchvision_s_files_are_downloaded_and_checked(monkeypatch: pytest.MonkeyPatch,
                                                        tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked: list[tuple[str, str]] = []

    def download(url: str, path: str, prefix: str, progress: bool) -> None:
        asked.append((url, prefix))
        if len(asked) == 1:
            raise OSError("no network")
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    source = ENCODERS.get("resnet18").weights
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refused, match="cannot be reached"):
        find_weights("resnet18", source)
    assert asked == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(Refused, match="resnet18-f37072fd.pth cannot be reached"):
        find_weights("resnet18", source)
    assert find_weights("resnet18", source).path.read_bytes() == b"weights"
    assert asked[-1] == ("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")
    assert find_weights("resnet18", source) and len(asked) == 2  # from the cache now


def test_names_are_taken_once() -> None:
    spec: EncoderSpec = ENCODERS.get("resnet18")
    for changes, says in (({"name": "gigapath"}, "'gigapath' is taken by encoder 'prov_gigapath'"),
                          ({"name": "new", "aliases": ("uni_v1",)}, "'uni_v1' is taken"),
                          ({"name": "New"}, "lower case"), ({"name": "timm:new"}, "timm:")):
        with pytest.raises(Refused, match=says):
            register(replace(spec, **changes))  # type: ignore[arg-type]


def test_a_size_the_network_does_not_take(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save({"x": torch.zeros(1)}, path)
    network = Overflowing()
    network.forward = lambda images: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(Refused, match="cannot encode a patch of 50 px .*--target_patch_size"):
        Encoder(ENCODERS.get("resnet18"), network, weights=Weights(path, ""), precision="fp32",
                transform=Transform(resize_px=50), device=torch.device("cpu"))
