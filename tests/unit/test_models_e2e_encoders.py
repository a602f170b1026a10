"""Encoders of end-to-end models: their blocks are timm's network, their weights are those given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from torch import nn

from models.e2e_encoders import (
    PatchNetwork,
    build_encoder,
    encoder_width,
    load_pretrained,
    pretrained_record,
)
from models.encoder_families import CLASS_AND_MEAN, timm_trunk
from models.encoder_registry import ENCODERS, HALF, IMAGENET_MEAN, IMAGENET_STD
from models.encoder_weights import find_weights
from utils.errors import Refused
from utils.storage import file_sha256

State = dict[str, torch.Tensor]
LITE0_SHA256 = "57934424"  # the beginning, in the name of the packaged file


def lively(network: nn.Module) -> nn.Module:
    """In evaluation mode, with batch norms and layer scales that do something."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return network.eval()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Empty caches, and a hub out of reach."""
    def offline(*args: Any, **settings: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    """As torchvision publishes it: four stages and a classifier."""
    torch.manual_seed(1)
    return lively(timm.create_model("resnet18"))


@pytest.fixture(scope="module")
def weights(resnet18: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18-f37072fd.pth"
    torch.save(resnet18.state_dict(), path)
    return path


def trunk_state() -> State:
    torch.manual_seed(2)
    return dict(lively(timm_trunk("resnet18", 3)).state_dict())


def saved(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path


def holds(network: PatchNetwork, state: State) -> bool:
    return all(torch.equal(value, state[name])
               for name, value in network.model.state_dict().items())


# ---------------------------------------------------------------------------- networks

@pytest.mark.parametrize(("name", "dim", "parameters", "blocks"), [
    ("r18", 256, 2_782_784, 4), ("r18a", 512, 11_176_512, 5), ("r50", 1024, 8_543_296, 4),
    ("r50v2", 1024, 8_543_296, 4), ("efficientnet_lite0", 1280, 3_371_008, 9),
    ("lite0", 1280, 3_371_008, 9), ("resnet34", 512, 21_284_672, 5),
    ("resnet50", 2048, 23_508_032, 5)])
def test_published_encoders(name: str, dim: int, parameters: int, blocks: int) -> None:
    """Sizes: spec abmilx.md 5."""
    network = build_encoder(name)
    assert sum(value.numel() for value in network.parameters()) == parameters
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, dim) == (2, network.dim)
    assert encoder_width(name) == dim and len(network.blocks()) == blocks
    normal = (HALF, HALF) if "lite0" in name else (IMAGENET_MEAN, IMAGENET_STD)
    assert (network.mean, network.std) == normal


@pytest.mark.parametrize(("name", "file"), [
    ("resnet18", "resnet18-f37072fd.pth"), ("resnet34", "resnet34-b627a593.pth"),
    ("resnet50", "resnet50-0676ba61.pth")])
def test_plain_names_of_resnets_mean_torchvisions_weights(name: str, file: str) -> None:
    """As in the extraction of features, whose encoders of these names are torchvision's."""
    with pytest.raises(Refused, match=f"timm/{name}.tv_in1k.*{file}"):
        pretrained_record(name)
    assert ENCODERS.get(name).weights.url == f"https://download.pytorch.org/models/{file}"


def test_r18_is_resnet18_to_its_third_stage(resnet18: nn.Module, weights: Path) -> None:
    whole: Any = resnet18
    network = build_encoder("r18").eval()
    load_pretrained(network, "r18", init=weights)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        x = whole.maxpool(whole.act1(whole.bn1(whole.conv1(images))))
        wanted = whole.layer3(whole.layer2(whole.layer1(x))).mean(dim=(2, 3))
        torch.testing.assert_close(network(images), wanted, rtol=1e-6, atol=1e-6)
    assert "model.conv1.weight" in network.state_dict()
    assert set(network.model.state_dict()) < set(whole.state_dict())


@pytest.mark.parametrize(("name", "blocks", "side_px"), [
    ("resnet18", 5, 64), ("timm:resnet50", 5, 64), ("tf_efficientnet_lite0", 9, 64),
    ("mobilenetv3_small_050", 7, 64), ("convnext_atto", 5, 64), ("regnetx_002", 5, 64),
    ("repvgg_a0", 5, 64), ("vit_tiny_patch16_224", 13, 224), ("test_vit", 7, 160),
    ("swin_tiny_patch4_window7_224", 5, 224), ("densenet121", 1, 64)])
def test_blocks_are_timms_network(name: str, blocks: int, side_px: int) -> None:
    torch.manual_seed(0)
    network = build_encoder(name).eval()
    lively(network.model)
    theirs = timm.create_model(name.removeprefix("timm:"), num_classes=0).eval()
    theirs.load_state_dict(network.model.state_dict())
    images = torch.randn(2, 3, side_px, side_px)
    seen: list[nn.Module] = []

    def run(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(block)
        return block(x)  # type: ignore[no-any-return]

    with torch.no_grad():
        found, wanted = network(images, run), theirs(images)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(network(images), found)
    assert len(seen) == len(network.blocks()) == blocks
    assert found.shape[1] == network.dim == encoder_width(name)
    owned = [id(value) for block in seen for value in (*block.parameters(), *block.buffers())]
    everything = {id(value) for value in (*network.parameters(), *network.buffers())}
    assert len(owned) == len(set(owned)) and set(owned) == everything


def test_what_is_done_to_a_block_is_done_to_the_network() -> None:
    network = build_encoder("test_vit")
    for block in network.blocks()[:2]:
        block.requires_grad_(False).eval()
    model: Any = network.model
    assert not model.pos_embed.requires_grad and not model.cls_token.requires_grad
    assert not model.blocks[0].training and model.blocks[1].training
    network(torch.randn(1, 3, 160, 160)).sum().backward()
    frozen = {name for name, value in network.named_parameters() if value.grad is None}
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith((
        "model.pos_embed", "model.cls_token", "model.reg_token", "model.patch_embed.",
        "model.blocks.0."))}


def test_a_caller_may_run_blocks_its_own_way() -> None:
    network = build_encoder("r18").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = images
        for block in network.blocks():
            x = block(x) + 1
        torch.testing.assert_close(network(images, lambda block, x: block(x) + 1), x)
        assert not torch.allclose(network(images), x)


def test_a_layer_that_is_replaced_later_runs() -> None:
    """As batch norms are when processes share their statistics."""
    network = build_encoder("r18").eval()
    images = torch.randn(1, 3, 64, 64)
    before = network(images)
    network.model.bn1 = nn.BatchNorm2d(64, eps=10.0).eval()
    assert not torch.allclose(network(images), before)


def test_class_token_and_mean_of_the_patches() -> None:
    model: Any = timm.create_model("test_vit", num_classes=0).eval()
    network = PatchNetwork(model, dim=128, mean=HALF, std=HALF, output=CLASS_AND_MEAN)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        tokens = model.forward_features(images)
        wanted = torch.cat([tokens[:, 0], tokens[:, model.num_prefix_tokens:].mean(1)], dim=1)
        torch.testing.assert_close(network(images), wanted)
    assert encoder_width("h0_mini") == 2 * 768 == encoder_width("h0_mini", img_size=112)


@pytest.mark.parametrize("name", ["r18", "test_vit", "swin_tiny_patch4_window7_224"])
def test_no_patches_give_no_features_but_a_gradient(name: str) -> None:
    """A process without patches takes part in shared statistics and gradients."""
    network = build_encoder(name).train()
    features = network(torch.zeros(0, 3, 224, 224))
    assert features.shape == (0, network.dim)
    features.sum().backward()
    assert all(value.grad is not None and not value.grad.any() for value in network.parameters())


def test_networks_of_published_encoders_for_histology() -> None:
    assert encoder_width("uni_v1", img_size=224) == 1024
    assert encoder_width("chief-ctranspath", img_size=224) == encoder_width("ctranspath") == 768
    assert encoder_width("prov_gigapath") == 1536
    assert len(build_encoder("lunit-vits16").blocks()) == 13


@pytest.mark.parametrize(("name", "img_size", "dim"), [
    ("r18", 65, 256), ("test_vit", 64, 64), ("swin_tiny_patch4_window7_224", 256, 768)])
def test_patches_of_other_sizes(name: str, img_size: int, dim: int) -> None:
    assert encoder_width(name, img_size=img_size) == dim
    with torch.no_grad():
        found = build_encoder(name).eval()(torch.zeros(1, 3, img_size, img_size))
    assert found.shape == (1, dim)


def test_patches_that_a_network_does_not_take_are_refused() -> None:
    with pytest.raises(Refused, match="test_vit.*no patches of 100 px .*--img_size 160"):
        encoder_width("test_vit", img_size=100)


@pytest.mark.parametrize(("name", "says"), [
    ("r19", "unknown timm model 'r19'.*r18"), ("resnet18_x", "unknown timm model"),
    ("resnet18.nothing", "no weights tagged 'resnet18.nothing'"),
    ("timm:uni_v1", "unknown timm model 'uni_v1'"),
    ("conch_v1", "encoder 'conch_v1' cannot be trained end to end"),
    ("phikon", "encoder 'phikon_v1' cannot be trained end to end")])
def test_unknown_encoders_are_refused(name: str, says: str) -> None:
    for ask in (build_encoder, encoder_width):
        with pytest.raises(Refused, match=says) as refused:
            ask(name)
        assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------- weights

def test_weights_come_from_the_cache(weights: Path, tmp_path: Path) -> None:
    cached = tmp_path / "torch" / "hub" / "checkpoints" / weights.name
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights)
    state = torch.load(weights, weights_only=True)
    for name, left_out in (("r18", ["fc", "layer4"]), ("r18a", ["fc"])):
        network = build_encoder(name)
        before = network.state_dict()["model.conv1.weight"].clone()
        record = pretrained_record(name, init=None, fold=3)
        assert record == {"name": name, "weights_sha256": file_sha256(weights)}
        assert load_pretrained(network, name, fold=3) == {**record, "left_out": left_out}
        assert holds(network, state)
        assert not torch.equal(network.state_dict()["model.conv1.weight"], before)


def test_a_random_start_needs_no_weights() -> None:
    network = build_encoder("r18")
    state = {name: value.clone() for name, value in network.model.state_dict().items()}
    record = load_pretrained(network, "r18", random=True)
    assert record == pretrained_record("r18", random=True) == {
        "name": "r18", "weights_sha256": None}
    assert holds(network, state)
    with pytest.raises(Refused, match="no weights for encoder 'r50v2'.*timm/resnet50.tv2_in1k.*"
                                      "resnet50-11ad3fa6.pth.*--enc_init; or --no_enc_pt"):
        pretrained_record("r50v2")
    assert load_pretrained(build_encoder("r18"), "r18", random=True)["weights_sha256"] is None


def test_random_starts_differ_by_the_seed_alone() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_encoder("r18").model.state_dict())
    assert torch.equal(states[0]["conv1.weight"], states[1]["conv1.weight"])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


def test_the_packaged_lite0(tmp_path: Path) -> None:
    found = find_weights("lite0", ENCODERS.get("efficientnet_lite0").weights)
    theirs = found.state()
    network = build_encoder("efficientnet_lite0")
    record = load_pretrained(network, "lite0")
    assert record["name"] == "efficientnet_lite0" and record["weights_sha256"] == found.sha256
    assert found.sha256.startswith(LITE0_SHA256)
    for ours, name in (("conv_stem.weight", "_conv_stem.weight"),
                       ("blocks.6.0.conv_pwl.weight", "_blocks.15._project_conv.weight"),
                       ("bn2.running_var", "_bn1.running_var")):
        assert torch.equal(network.model.state_dict()[ours], theirs[name]), ours
    again = build_encoder("efficientnet_lite0")  # what was trained has timm's names
    checkpoint = saved(tmp_path / "trained.pt", {
        f"encoder.{name}": value + 1 for name, value in network.state_dict().items()})
    load_pretrained(again, "efficientnet_lite0", init=checkpoint)
    assert torch.equal(again.model.state_dict()["conv_stem.weight"],
                       theirs["_conv_stem.weight"] + 1)


def test_uni_with_its_own_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a small network in place of the ViT-L, whose building takes 1.2 GB."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(
        {"vit_large_patch16_224": "test_vit"}[name], num_classes=0))
    state = create("test_vit", num_classes=0).state_dict()
    with pytest.raises(Refused, match="ask for access at .*--enc_init or UNI_CKPT_PATH=path; or"):
        pretrained_record("uni_v1")
    monkeypatch.setenv("UNI_CKPT_PATH", str(saved(tmp_path / "pytorch_model.bin", state)))
    network = build_encoder("uni")
    assert load_pretrained(network, "uni")["name"] == "uni_v1"
    assert holds(network, state)


def test_any_timm_network_with_the_file_given(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    network = build_encoder("test_resnet")
    path = saved(tmp_path / "x.pth", state)
    assert load_pretrained(network, "test_resnet", init=path) == {
        "name": "timm:test_resnet", "weights_sha256": file_sha256(path), "left_out": ["fc"]}
    assert holds(network, state)


PACKINGS: list[tuple[str, Callable[[State], Any], list[str]]] = [
    ("bare", dict, []),
    ("several GPUs", lambda s: {f"module.{name}": value for name, value in s.items()}, []),
    ("an encoder", lambda s: {f"module.encoder.{name}": value for name, value in s.items()}, []),
    ("a ResNet and a head", lambda s: {
        **{f"resnet.{name}": value for name, value in s.items()}, "head.weight": torch.ones(2)},
     ["head"]),
    ("ours", lambda s: {**{f"encoder.model.{name}": value for name, value in s.items()},
                        "mil.classifier.weight": torch.ones(2)}, ["mil"]),
    ("published", lambda s: {
        "model": {**{f"module.encoder.model.{name}": value for name, value in s.items()},
                  "module.mil.proj.weight": torch.ones(2)},
        "teacher": {f"module.encoder.model.{name}": value + 1 for name, value in s.items()},
        "epoch": 7}, ["mil"]),
    ("published mean", lambda s: {
        "teacher": {**{f"encoder.model.{name}": value for name, value in s.items()},
                    "mil.proj.weight": torch.ones(2)}, "epoch": 7}, ["mil"])]


@pytest.mark.parametrize(("pack", "left_out"), [case[1:] for case in PACKINGS],
                         ids=[case[0] for case in PACKINGS])
def test_encoders_of_checkpoints(pack: Callable[[State], Any], left_out: list[str],
                                 tmp_path: Path) -> None:
    state, network = trunk_state(), build_encoder("r18")
    record = load_pretrained(network, "r18", init=saved(tmp_path / "x.pt", pack(state)))
    assert holds(network, state) and record["left_out"] == left_out


@pytest.mark.parametrize("pattern", ["s_{}_checkpoint.pt", "fold_{}_model_best.pt"])
def test_a_folder_has_one_for_each_fold(pattern: str, tmp_path: Path) -> None:
    states = []
    for fold in (0, 1):
        states.append({name: value + fold for name, value in trunk_state().items()})
        saved(tmp_path / pattern.format(fold), {
            f"encoder.model.{name}": value for name, value in states[fold].items()})
    for fold in (0, 1):
        network = build_encoder("r18")
        record = load_pretrained(network, "r18", init=tmp_path, fold=fold)
        assert holds(network, states[fold])
        assert record["weights_sha256"] == file_sha256(tmp_path / pattern.format(fold))
    with pytest.raises(Refused, match=r"none of fold 2: expected s_2.* or fold_2.*best\.pt"):
        pretrained_record("r18", init=tmp_path, fold=2)


def test_a_folder_with_one_file_serves_all_folds(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    with pytest.raises(Refused, match="given by --enc_init holds 0 weight files"):
        pretrained_record("r18", init=folder, fold=0)
    (folder / "model.pt").symlink_to(weights)
    for fold in (0, 1):
        assert pretrained_record("r18", init=folder, fold=fold) == pretrained_record(
            "r18", init=weights)
    with pytest.raises(Refused, match="given by --enc_init are not a file"):
        pretrained_record("r18", init=tmp_path / "none.pt", fold=0)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


@pytest.mark.parametrize(("change", "says"), [
    (lambda s: s.pop("layer3.1.conv2.weight"), "1 missing .layer3.1.conv2.weight"),
    (lambda s: s.update({"layer3.2.conv1.weight": torch.ones(1)}), "1 left over .layer3.2.conv1"),
    (lambda s: s.update({"bn1.bias": torch.ones(3)}), "1 of another shape .bn1.bias"),
    (lambda s: s.update(evil=Evil()), "could run code"),
    (lambda s: s.clear(), "hold no tensors by name"),
    (lambda s: [s.update({f"mil.{name}": s.pop(name)}) for name in list(s)], "missing")])
def test_weights_that_do_not_fit_are_refused(change: Callable[[Any], Any], says: str,
                                             tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                             ) -> None:
    state: Any = trunk_state()
    change(state)
    network = build_encoder("r18")
    with pytest.raises(Refused, match=says) as refused:
        load_pretrained(network, "r18", init=saved(tmp_path / "x.pt", state))
    assert "\n" not in str(refused.value) and "ran" not in capsys.readouterr().out


def test_a_checkpoint_of_another_encoder_is_refused(tmp_path: Path) -> None:
    state = {f"encoder.model.{name}": value for name, value in trunk_state().items()}
    path = saved(tmp_path / "x.pt", {**state, "mil.proj.weight": torch.ones(2)})
    for name in ("r50", "r18a", "efficientnet_lite0", "test_vit"):
        with pytest.raises(Refused, match=r"x\.pt belong to another network: tensors \d+ missing"):
            load_pretrained(build_encoder(name), name, init=path)
