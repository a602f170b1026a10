"""The tables of published encoders: a small network of each family through its own builder."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models as tv

import models.encoder_families as families
from models.encoder_networks import ENCODERS, encoder_spec
from models.encoder_registry import EncoderSpec, check_input, missing_package
from models.encoder_table import encoder_table
from models.encoder_transforms import Transform
from models.encoder_weights import Weights, find_weights
from models.encoders import Encoder, encoder_record, load_encoder, matching_encoder
from tests.conftest import ROOT
from utils.errors import Refused

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 48, "image_size": 224, "patch_size": 56}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 50}

ATLASPATCH = """
    resnet18 resnet34 resnet50 resnet101 resnet152 convnext_tiny convnext_small
    convnext_base convnext_large vit_b_16 vit_b_32 vit_l_16 vit_l_32 vit_h_14 dinov2_small
    dinov2_base dinov2_large dinov2_giant dinov3_vits16 dinov3_vits16_plus dinov3_vitb16
    dinov3_vitl16 dinov3_vitl16_sat dinov3_vith16_plus dinov3_vit7b16 dinov3_vit7b16_sat uni_v1
    uni_v2 phikon_v1 phikon_v2 virchow_v1 virchow_v2 prov_gigapath chief-ctranspath midnight
    openmidnight musk pathorchestra h_optimus_0 h_optimus_1 h0_mini conch_v1 conch_v15 hibou_b
    hibou_l lunit_resnet50_bt lunit_resnet50_swav lunit_resnet50_mocov2
    lunit_vit_small_patch16_dino lunit_vit_small_patch8_dino clip_rn50 clip_rn101 clip_rn50x4
    clip_rn50x16 clip_rn50x64 clip_vit_b_32 clip_vit_b_16 clip_vit_l_14 clip_vit_l_14_336 plip
    medsiglip quilt_b_32 quilt_b_16 quilt_b_16_pmb biomedclip omiclip
"""
TRIDENT = """
    uni_v1 uni_v2 conch_v1 conch_v15 virchow virchow2 phikon phikon_v2 keep gigapath
    hoptimus0 hoptimus1 h0-mini musk midnight12k openmidnight gpfm kaiko-vits8 kaiko-vits16
    kaiko-vitb8 kaiko-vitb16 kaiko-vitl14 lunit-vits8 hibou_l ctranspath
"""


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def small(name: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> EncoderSpec:
    """The row ``name``, made to accept a smaller network."""
    spec = replace(ENCODERS.get(name), dim=0, **changes)
    monkeypatch.setitem(ENCODERS._entries, name, spec)
    return spec


def expected(encoder: Encoder, patch: np.ndarray) -> torch.Tensor:
    """What the network makes of one patch as torchvision's own transforms prepare it."""
    from torchvision import transforms as T

    want = encoder.transform
    mode = T.InterpolationMode(want.interpolation)
    side: Any = (want.resize_px,) * 2 if want.square else want.resize_px
    steps: list[Any] = [T.Resize(side, interpolation=mode)]
    steps += [T.CenterCrop(want.crop_px)] if want.crop_px else []
    steps += [T.ToTensor(), T.Normalize(encoder.spec.mean, encoder.spec.std)]
    with torch.no_grad():
        found: torch.Tensor = encoder._network(T.Compose(steps)(Image.fromarray(patch))[None])
    return found


def assert_encodes(encoder: Encoder, dim: int) -> None:
    patch = photo(256, 256)
    torch.testing.assert_close(encoder.encode(patch[None]), expected(encoder, patch),
                               rtol=1e-3, atol=1e-4)
    assert encoder.dim == dim


# ---------------------------------------------------------------------------- the table

def test_every_name_of_atlaspatch_and_trident_is_known() -> None:
    assert len(ATLASPATCH.split()) == 66
    for name in (ATLASPATCH + TRIDENT).split():
        spec = encoder_spec(name.upper())
        assert spec.dim and spec.source and spec.licence and spec.output
        assert spec.gated <= bool(spec.weights.request), "gated weights are never downloaded"


@pytest.mark.parametrize(("name", "dim", "patch_px", "mpp_um"), [
    ("virchow2", 2560, 224, 0.5), ("gigapath", 1536, 256, 0.5), ("ctranspath", 768, 256, 1.0),
    ("musk", 1024, 384, 0.5), ("conch_v15", 768, 512, 0.5), ("midnight12k", 3072, 224, 0.5),
    ("h0_mini", 1536, 224, 0.5), ("h0-mini", 768, 224, 0.5), ("resnet50", 2048, 0, 0.0)])
def test_rows(name: str, dim: int, patch_px: int, mpp_um: float) -> None:
    spec = encoder_spec(name)
    assert (spec.dim, spec.patch_px, spec.mpp_um) == (dim, patch_px, mpp_um)


def test_the_table_comes_without_torch() -> None:
    code = ("import sys; from models.encoder_table import encoder_table; rows = encoder_table()\n"
            "assert len(rows) > 70 and rows[0]['dim']\n"
            "heavy = {'torch', 'timm', 'transformers', 'open_clip', 'torchvision', 'pandas'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_table_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"")
    monkeypatch.setenv("VIRCHOW_V2_CKPT_PATH", str(tmp_path / "w.bin"))
    rows = {row["name"]: row for row in encoder_table()}
    assert rows["virchow_v2"]["weights"] == "found" and rows["virchow_v1"]["weights"] == ""
    assert rows["virchow_v2"]["gated"] == "yes" and rows["conch_v15"]["remote_code"] == "yes"
    assert rows["musk"]["missing"].startswith("pip install fairscale git+")
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_package(ENCODERS.get("clip_rn50")) == "pip install open_clip_torch"


@pytest.mark.parametrize(("px", "mpp", "fits"), [
    (224, 0.5, True), (224, 0.52, True), (448, 0.25, True), (224, None, True), (256, 0.5, False),
    (224, 0.25, False), (112, 1.0, False), (256, None, False)])
def test_input_that_does_not_suit_is_warned_of(px: int, mpp: float | None, fits: bool) -> None:
    text = check_input(encoder_spec("virchow2"), px, mpp)
    assert (text == "") is fits
    assert fits or ("224 px at 0.5 um/px" in text and f"{px} px" in text and "\n" not in text)
    assert check_input(encoder_spec("resnet18"), px, mpp) == ""


def test_dimensions_of_large_networks() -> None:
    """Shapes only, on torch's meta device: ViT-g and the like are not built."""
    for name in ("uni_v2", "virchow_v1", "virchow_v2", "prov_gigapath", "h_optimus_0", "h0_mini",
                 "h0_mini_cls", "gpfm", "openmidnight", "kaiko-vitl14", "lunit-vits8"):
        spec = encoder_spec(name)
        row: dict[str, Any] = spec.build.keywords  # type: ignore[attr-defined]
        assert spec.transform is not None
        with torch.device("meta"), torch.no_grad():
            network = families.timm_network(row["arch"], row["arguments"])
            if row["output"] == families.CLASS_AND_MEAN:
                network = families.wrap(network, families._class_and_mean)
            assert network(torch.zeros(1, 3, 224, 224)).shape == (1, spec.dim), name


# ---------------------------------------------------------------------------- transforms

def test_transforms_are_those_of_the_hub_s_processors() -> None:
    transformers = pytest.importorskip("transformers")
    cases = {
        "dinov2_base": transformers.BitImageProcessorPil(
            size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224},
            image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
        "plip": transformers.CLIPImageProcessorPil(),
        "medsiglip": transformers.SiglipImageProcessorPil(
            size={"height": 448, "width": 448}, resample=Image.Resampling.BILINEAR),
        "phikon_v1": transformers.ViTImageProcessorPil(
            image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])}
    from models.encoder_transforms import ScaledPixels

    patch = photo(300, 300)
    for name, processor in cases.items():
        spec = encoder_spec(name)
        assert spec.transform is not None
        pixels = ScaledPixels(spec.transform, spec.mean, spec.std)
        found = pixels.images(torch.tensor(pixels.prepare(patch))[None])
        wanted = processor(Image.fromarray(patch), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("row", [name for name in ENCODERS if ENCODERS.get(
    name).source.startswith("https://download.pytorch.org")])
def test_torchvision_rows_are_torchvision_s(row: str) -> None:
    spec = encoder_spec(row)
    (entry,) = [entry for entry in tv.get_model_weights(row) if entry.url == spec.weights.url]
    theirs = entry.transforms()
    assert spec.transform == Transform(
        resize_px=theirs.resize_size[0], crop_px=theirs.crop_size[0],
        interpolation=theirs.interpolation.value)
    assert (list(spec.mean), list(spec.std)) == (theirs.mean, theirs.std)


def test_the_record_says_what_was_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "w.pth"
    torch.save(tv.resnet18().state_dict(), path)
    own = encoder_record("resnet18", checkpoint=path)
    assert (own["target_px"], own["resize"]) == (
        224, "bilinear, antialias, uint8, centre crop from 256")
    assert own["output"] == "pooled" and own["mean"] == [0.485, 0.456, 0.406]
    asked = encoder_record("resnet18", checkpoint=path, target_px=96)
    assert (asked["target_px"], asked["resize"]) == (96, "bilinear, antialias, uint8")
    for record in (own, asked):  # a heatmap finds the same encoder again
        assert matching_encoder(record, checkpoint=path)().record() == record
    with pytest.raises(Refused, match="is not the one"):
        matching_encoder({**own, "precision": "fp32", "std": [1, 1, 1]}, checkpoint=path)
    square = encoder_spec("hoptimus0").transform
    assert square is not None and square.record()["resize"] == (
        "both sides to 224, bilinear, antialias, uint8")
    assert square.apply(photo(100, 50)).shape == (224, 224, 3)


def test_records_of_earlier_files_stay_equal(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"x": torch.zeros(1)}, path)
    sha = find_weights("uni_v1", ENCODERS.get("uni_v1").weights, path).sha256
    for name in ("uni_v1", "resnet50_trunc", "timm:resnet18"):
        for target_px in (None, 224):
            assert encoder_record(name, checkpoint=path, target_px=target_px) == {
                "name": name, "weights_sha256": sha, "target_px": 224,
                "resize": "bilinear, antialias, uint8", "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225], "precision": "fp32"}


# ---------------------------------------------------------------------------- torchvision, timm

def test_resnet_without_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "resnet18.pth"
    torch.save(tv.resnet18().state_dict(), path)
    encoder = load_encoder("resnet18", checkpoint=path)
    assert_encodes(encoder, 512)
    assert encoder.prepare(photo(256, 256)).shape == (224, 224, 3)
    assert load_encoder("resnet18", checkpoint=path, target_px=64).prepare(
        photo(256, 256)).shape == (64, 64, 3)


def test_convnext_keeps_its_layer_norm() -> None:
    """Defect 26 of the specification: without it features have another scale."""
    torch.manual_seed(0)
    whole = tv.convnext_tiny().eval()
    nn.init.normal_(whole.classifier[0].weight)
    weights = Weights(Path("none"), "")
    object.__setattr__(weights, "state", whole.state_dict)
    network = families.build_torchvision(weights, name="convnext_tiny", arguments={}).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), whole.classifier[:2](
            whole.avgpool(whole.features(images))))


def test_torchvision_vits_have_older_key_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                               ) -> None:
    def tiny(name: str, weights: None, **arguments: Any) -> nn.Module:
        assert (name, arguments) == ("vit_h_14", {"image_size": 518})
        return tv.VisionTransformer(518, 259, 1, 2, 16, 24)

    monkeypatch.setattr(tv, "get_model", tiny)
    network = tv.VisionTransformer(518, 259, 1, 2, 16, 24)
    path = tmp_path / "vit.pth"
    torch.save({key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
                for key, value in network.state_dict().items()}, path)
    small("vit_h_14", monkeypatch)
    encoder = load_encoder("vit_h_14", checkpoint=path)
    assert_encodes(encoder, 16)


@pytest.mark.parametrize(("name", "dim"), [("virchow_v2", 128), ("uni_v2", 64)])
def test_timm_vits(name: str, dim: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Class token and mean of the patches behind the registers, or the class token alone."""
    torch.manual_seed(0)
    arguments = {"img_size": 224, "patch_size": 56, "reg_tokens": 4, "swiglu": True,
                 "dynamic_img_size": True}
    network = families.timm_network("test_vit", arguments).eval()
    path = tmp_path / "pytorch_model.bin"
    torch.save(network.state_dict(), path)
    spec = ENCODERS.get(name)
    output = spec.build.keywords["output"]  # type: ignore[attr-defined]
    small(name, monkeypatch, build=partial(families.build_timm, arch="test_vit",
                                           arguments=arguments, output=output))
    encoder = load_encoder(name, checkpoint=tmp_path)  # the folder
    assert_encodes(encoder, dim)
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        tokens = network.forward_features(images)  # type: ignore[operator]
        wanted = tokens[:, 0]
        if name == "virchow_v2":
            wanted = torch.cat([wanted, tokens[:, 5:].mean(1)], 1)
        torch.testing.assert_close(encoder._network(images), wanted)


def test_checkpoints_in_dinov2_s_names(tmp_path: Path) -> None:
    """OpenMidnight and GPFM come as DINOv2 wrote them: registers, w12 and w3, a mask token."""
    torch.manual_seed(0)
    arguments = {"img_size": 224, "patch_size": 56, "reg_tokens": 4, "swiglu": True,
                 "no_embed_class": True, "class_token": True, "global_pool": "token"}
    network = families.timm_network("test_vit", arguments).eval()
    state = dict(network.state_dict())
    dinov2 = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
              for key, value in state.items() if key not in ("reg_token", "pos_embed")}
    dinov2 |= {"mask_token": torch.zeros(1, 64), "register_tokens": state["reg_token"],
               "pos_embed": torch.cat([torch.zeros(1, 1, 64), state["pos_embed"]], 1)}
    path = tmp_path / "teacher.pt"
    torch.save(dinov2, path)
    built = families.build_timm(Weights(path, ""), arch="test_vit", arguments=arguments,
                                output="class token", dinov2_keys=True).eval()
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(built(images), network(images))


# ---------------------------------------------------------------------------- transformers

def hub_folder(path: Path, network: Any, kind: str) -> Path:
    """A folder as the hub has it; "bin" with a torch file, "shards" in parts."""
    network.save_pretrained(path, **({"max_shard_size": "20KB"} if kind == "shards" else {}))
    if kind == "bin":
        (path / "model.safetensors").unlink()
        torch.save(network.state_dict(), path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize(("name", "made", "config", "kind", "dim"), [
    ("dinov2_small", "Dinov2Model", "Dinov2Config", "safetensors", 32),
    ("midnight", "Dinov2Model", "Dinov2Config", "shards", 64),
    ("phikon_v1", "ViTModel", "ViTConfig", "bin", 32),
    ("dinov3_vits16", "DINOv3ViTModel", "DINOv3ViTConfig", "safetensors", 32)])
def test_vision_models_of_the_hub(name: str, made: str, config: str, kind: str, dim: int,
                                  monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = getattr(transformers, made)(getattr(transformers, config)(**SMALL)).eval()
    folder = hub_folder(tmp_path / "hub", network, kind)
    small(name, monkeypatch)
    encoder = load_encoder(name, checkpoint=folder)
    assert_encodes(encoder, dim)
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        found, wanted = encoder._network(images), network(images)
    tokens = wanted.last_hidden_state
    reference = {"dinov3_vits16": wanted.pooler_output, "midnight": torch.cat(
        [tokens[:, 0], tokens[:, 1:].mean(1)], 1)}.get(name, tokens[:, 0])
    torch.testing.assert_close(found, reference)
    record = encoder.record()
    assert record == encoder_record(name, checkpoint=folder)
    assert len(record["config_sha256"]) == len(record["weights_sha256"]) == 64


@pytest.mark.parametrize(("name", "dim"), [("plip", 24), ("medsiglip", 32)])
def test_image_towers_of_pairs(name: str, dim: int, monkeypatch: pytest.MonkeyPatch,
                               tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "plip":
        pair = transformers.CLIPModel(transformers.CLIPConfig(
            text_config=TEXT, vision_config=SMALL, projection_dim=24)).eval()
    else:
        pair = transformers.SiglipModel(transformers.SiglipConfig(
            text_config=TEXT, vision_config={**SMALL, "image_size": 448})).eval()
    folder = hub_folder(tmp_path / "hub", pair, "safetensors")
    capsys.readouterr()
    small(name, monkeypatch)
    encoder = load_encoder(name, checkpoint=folder / "model.safetensors")
    assert_encodes(encoder, dim)
    assert "UNEXPECTED" not in "".join(capsys.readouterr())
    images = torch.rand(1, 3, encoder.transform.side_px, encoder.transform.side_px)
    with torch.no_grad():
        wanted = pair.get_image_features(pixel_values=images)
        torch.testing.assert_close(encoder._network(images),
                                   getattr(wanted, "pooler_output", wanted))


def test_hub_folders_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    network = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL))
    folder = hub_folder(tmp_path / "hub", network, "safetensors")
    state = {key: value for key, value in network.state_dict().items() if "norm1" not in key}
    small("phikon_v2", monkeypatch)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(Refused, match="2 tensors missing .*norm1"):
        load_encoder("phikon_v2", checkpoint=folder)
    save_file({**network.state_dict(), "layernorm.bias": torch.zeros(3)},
              folder / "model.safetensors")
    with pytest.raises(Refused, match="do not fit their config.json"):
        load_encoder("phikon_v2", checkpoint=folder)
    small("phikon_v1", monkeypatch)
    with pytest.raises(Refused, match="type 'dinov2', expected 'vit'"):
        load_encoder("phikon_v1", checkpoint=folder)
    (folder / "config.json").unlink()
    with pytest.raises(Refused, match="needs the file config.json of its authors beside"):
        encoder_record("phikon_v2", checkpoint=folder)


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class FarConfig(PretrainedConfig):
    model_type = "far"

class FarModel(PreTrainedModel):
    config_class = FarConfig
    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Linear(3, 4)
        self.post_init()
    def encode_image(self, images):
        return self.scale(images.mean(dim=(2, 3)))
    def return_conch(self):
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                   self.scale), None
    def forward(self, pixel_values):
        return type("Output", (), {"pooler_output": self.encode_image(pixel_values)})()
"""


@pytest.mark.parametrize("name", ["keep", "conch_v15", "hibou_l"])
def test_code_of_others_runs_only_when_allowed(name: str, monkeypatch: pytest.MonkeyPatch,
                                               tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / f"far_{name}"
    folder.mkdir()
    (folder / "far.py").write_text(REMOTE, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "far", "auto_map": {"AutoConfig": "far.FarConfig",
                                          "AutoModel": "far.FarModel"}}), encoding="utf-8")
    weight = torch.arange(12.).reshape(4, 3)
    save_file({"scale.weight": weight, "scale.bias": torch.zeros(4)},
              folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    small(name, monkeypatch)
    for call in (encoder_record, load_encoder):
        with pytest.raises(Refused, match="allow it with --trust_remote_code"):
            call(name, checkpoint=folder)
    encoder = load_encoder(name, checkpoint=folder, trust_remote_code=True)
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(encoder._network(images), images.mean(dim=(2, 3)) @ weight.T)
    before = encoder.record()
    (folder / "far.py").write_text(REMOTE + "# changed\n", encoding="utf-8")
    after = encoder_record(name, checkpoint=folder, trust_remote_code=True)
    assert {key for key in after if after[key] != before[key]} == {"code_sha256"}


def test_transformers_works_from_the_repository_root() -> None:
    """Our package ``datasets`` has the name of a hub library that transformers looks for."""
    code = "import datasets; from transformers import AutoModel, Dinov2Model; Dinov2Model"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------------------- open_clip, others

def test_open_clip_towers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {"embed_dim": 24, "quick_gelu": True,
              "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16,
                             "patch_size": 56},
              "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2,
                           "layers": 1}}
    torch.manual_seed(0)
    whole = open_clip.CLIP(**config).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}),
                                                    encoding="utf-8")
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(whole.state_dict(), path)
    small("quilt_b_32", monkeypatch)
    encoder = load_encoder("quilt_b_32", checkpoint=tmp_path)
    assert_encodes(encoder, 24)
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder._network(images), whole.encode_image(images))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {
        "ViT-B-32-quickgelu": config}[name])
    small("clip_vit_b_32", monkeypatch)
    named = load_encoder("clip_vit_b_32", checkpoint=path)
    assert torch.equal(named.encode(photo(256, 256)[None]), encoder.encode(photo(256, 256)[None]))
    torch.save({"visual.proj": torch.zeros(3)}, path)
    with pytest.raises(Refused, match="belong to another network"):
        load_encoder("clip_vit_b_32", checkpoint=path)


def test_ctranspath_is_loaded_by_its_published_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = families.ctranspath_network().eval()
    state = {}
    for key, value in network.state_dict().items():
        parts = key.replace("patch_embed.stem.", "patch_embed.proj.").split(".")
        if "downsample" in parts:  # the original halves the grid at the end of a stage
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts)] = value
    state |= {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
              "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49),
              "head.weight": torch.zeros(10, 768)}
    path = tmp_path / "CHIEF_CTransPath.pth"
    torch.save({"model": state}, path)
    encoder = load_encoder("ctranspath", checkpoint=path)
    assert encoder.dim == 768
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        tokens = network.forward_features(images)  # type: ignore[operator]
        torch.testing.assert_close(encoder._network(images), tokens.mean(dim=(1, 2)))
    assert tokens.shape == (1, 7, 7, 768)


def test_musk_uses_one_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1024, 3)}, path)
    with pytest.raises(Refused, match="pip install fairscale git"):
        load_encoder("musk", checkpoint=path)

    class Musk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1024, 3))

        def forward(self, image: torch.Tensor, **how: Any) -> tuple[torch.Tensor, None]:
            assert how == {"with_head": False, "out_norm": False, "ms_aug": False,
                           "return_global": True}
            return image.mean(dim=(2, 3)) @ self.weight.T, None

    for name in ("musk", "musk.modeling"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(timm, "create_model", lambda name: {"musk_large_patch16_384": Musk()}[name])
    encoder = load_encoder("musk", checkpoint=path)
    white = encoder.encode(np.full((1, 384, 384, 3), 255, np.uint8))
    torch.testing.assert_close(white, torch.full((1, 1024), 3.0))
