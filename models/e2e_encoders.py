"""The encoders of end-to-end and streaming models by name: their networks, and the weights they
start from.

Four ResNets as published (spec abmilx.md 5; Tang et al., NeurIPS 2025, arXiv 2506.02408),
torchvision's, the packaged EfficientNet-Lite0, the encoders of encoder_zoo.py that are networks of
timm's, and timm's own. State-dict keys are timm's, as in published end-to-end checkpoints.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.encoder_families import timm_trunk
from models.encoder_networks import ENCODERS, encoder_spec
from models.encoder_registry import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec, find_encoder
from models.encoder_weights import Weights, WeightSource, find_weights, load_strictly
from models.patch_network import PatchNetwork
from utils.errors import Refused

__all__ = ["PatchNetwork", "build_encoder", "encoder_width", "load_pretrained",
           "pretrained_record"]

ALIASES = {"lite0": "efficientnet_lite0"}
_FOLD_FILES = ("s_{fold}_checkpoint.pt", "fold_{fold}_model_best.pt")  # ours, and ABMILX's
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # around a network or a whole model
_ENCODERS = ("encoder.", "resnet.")  # in a model that has other parts too
_HEADS = ("fc.", "head.", "head_dist.", "classifier.")  # of networks that told classes apart


def build_encoder(name: str) -> PatchNetwork:
    """The encoder of this name with random weights; ``Refused`` when there is none."""
    spec = _spec(name)
    return _network(spec, dim=spec.dim or encoder_width(name))


@cache
def encoder_width(name: str, *, img_size: int | None = None) -> int:
    """Length of the features of an encoder, found without memory for its weights.

    img_size: side of the patches in px; ``Refused`` when the network takes no such patches
    """
    spec = _spec(name)
    if spec.dim and img_size is None:
        return spec.dim
    side_px = img_size or spec.default_px
    with torch.device("meta"):
        network = _network(spec, dim=spec.dim).eval()
        images = torch.zeros((1, 3, side_px, side_px))
    try:
        with torch.no_grad():
            return int(network(images).shape[1])
    except (RuntimeError, AssertionError, ValueError) as error:
        raise Refused(f"encoder '{name}' takes no patches of {side_px} px "
                      f"({' '.join(str(error).split())[:100]}): give --img_size "
                      f"{spec.default_px}") from None


def pretrained_record(name: str, *, init: Path | None = None, fold: int | None = None,
                      random: bool = False) -> dict[str, Any]:
    """Name of an encoder and sha256 of the weights it would start from; None for random ones.

    Arguments as ``load_pretrained``; ``Refused`` when there is no such file. It is not opened.
    """
    spec = _spec(name)
    weights = None if random else _weights(spec, init, fold)
    return {"name": spec.name, "weights_sha256": weights and weights.sha256}


def load_pretrained(network: PatchNetwork, name: str, *, init: Path | None = None,
                    fold: int | None = None, random: bool = False) -> dict[str, Any]:
    """Give ``network``, made by ``build_encoder(name)``, its weights: all of them or ``Refused``.

    init: a weight file or end-to-end checkpoint (of which the encoder is taken), or a folder with
    one for each ``fold``; None = ImageNet's (or the encoder's own), looked for as the extraction of
    features does
    random: none, it stays as it was built
    Returns ``pretrained_record``, and as ``left_out`` the parts of the file that are not the
    encoder's: a classifier, later stages, a slide model.
    """
    spec = _spec(name)
    if random:
        return pretrained_record(name, random=True)
    weights = _weights(spec, init, fold)
    state, others = _encoder_part(weights.state())
    of_whole_model = any(other.startswith("mil.") for other in others)
    if of_whole_model or not _missing(network.model, state):
        others += _fill(network.model, state, where=weights.path)
    else:  # names of other programs
        network.model.load_state_dict(spec.build(weights).state_dict())
    return {"name": spec.name, "weights_sha256": weights.sha256,
            "left_out": sorted({other.split(".")[0] for other in others})}


# ---------------------------------------------------------------------------- descriptions

def _network(spec: EncoderSpec, *, dim: int) -> PatchNetwork:
    assert spec.network is not None  # _spec gives no other
    return PatchNetwork(spec.network(), dim=dim, mean=spec.mean, std=spec.std, output=spec.output)


def _spec(name: str) -> EncoderSpec:
    """The description of an encoder that can be trained, or ``Refused``."""
    if name in _RESNETS:
        return _RESNETS[name]
    plain = ALIASES.get(name, name).removeprefix("timm:")
    known = None
    if not name.startswith("timm:"):
        try:
            known = find_encoder(plain)
        except Refused:  # perhaps a name of timm's
            known = None
        if known and known.network:
            return known
    try:
        return encoder_spec(f"timm:{plain}")
    except Refused as error:
        if known:
            raise Refused(f"encoder '{known.name}' cannot be trained end to end, its network comes "
                          "with its weights only: extract its features, or choose an encoder of "
                          "timm's") from None
        own = [*_RESNETS, *(key for key in ENCODERS if ENCODERS.get(key).network)]
        near = difflib.get_close_matches(plain, own, n=3)
        raise Refused(f"encoder '{name}': {error}"
                      + (f"; other encoders: {', '.join(near)}" if near else
                         f"; ResNets as published are {', '.join(_RESNETS)}")) from None


def _resnet(name: str, dim: int, arch: str, stages: int, tag: str, file: str) -> EncoderSpec:
    """A ResNet to its stage ``stages`` with torchvision's weights; ``tag``: timm's name of them."""
    return EncoderSpec(
        name=name, dim=dim, source=f"torchvision {arch}, ImageNet-1k ({tag})",
        licence="BSD-3-Clause", mean=IMAGENET_MEAN, std=IMAGENET_STD,
        network=partial(timm_trunk, arch, stages), build=partial(_build_resnet, arch, stages),
        weights=WeightSource(hub_id=f"timm/{arch}.{tag}",
                             url=f"https://download.pytorch.org/models/{file}"))


def _build_resnet(arch: str, stages: int, weights: Weights) -> nn.Module:
    network = timm_trunk(arch, stages)
    _fill(network, weights.state(), where=weights.path)
    return network


_RESNETS: dict[str, EncoderSpec] = {spec.name: spec for spec in (
    _resnet("r18", 256, "resnet18", 3, "tv_in1k", "resnet18-f37072fd.pth"),
    _resnet("r18a", 512, "resnet18", 4, "tv_in1k", "resnet18-f37072fd.pth"),
    _resnet("r50", 1024, "resnet50", 3, "tv_in1k", "resnet50-0676ba61.pth"),
    _resnet("r50v2", 1024, "resnet50", 3, "tv2_in1k", "resnet50-11ad3fa6.pth"),
    # whole, with the weights that these names have in extract_features_fp.py (and had in published
    # streaming CNNs: spec streaming.md 7)
    _resnet("resnet18", 512, "resnet18", 4, "tv_in1k", "resnet18-f37072fd.pth"),
    _resnet("resnet34", 512, "resnet34", 4, "tv_in1k", "resnet34-b627a593.pth"),
    _resnet("resnet50", 2048, "resnet50", 4, "tv_in1k", "resnet50-0676ba61.pth"))}


# ---------------------------------------------------------------------------- weights

def _weights(spec: EncoderSpec, init: Path | None, fold: int | None) -> Weights:
    """The file with the weights of a fold, or ``Refused`` saying which one to give."""
    if init and init.is_dir():
        init = _of_fold(init, fold)
    try:
        return find_weights(spec.name, spec.weights, init, flag="--enc_init")
    except Refused as error:
        raise Refused(str(error) if init else f"{error}; or --no_enc_pt for a random start"
                      ) from None


def _of_fold(folder: Path, fold: int | None) -> Path:
    """The checkpoint of a fold in a folder of checkpoints; the folder itself if it holds none."""
    names = [pattern.format(fold=fold) for pattern in _FOLD_FILES]
    found = [folder / name for name in names if (folder / name).is_file()]
    if found:
        return found[0]
    if any(next(folder.glob(pattern.format(fold="*")), None) for pattern in _FOLD_FILES):
        raise Refused(f"--enc_init {folder} holds checkpoints of other folds, none of fold {fold}: "
                      f"expected {' or '.join(names)}")
    return folder


def _encoder_part(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the encoder under timm's names, and the names of the others."""
    inside, others = dict(state), list[str]()
    while True:
        prefix = next((prefix for prefix in (*_WRAPPERS, *_ENCODERS) if (
            any if prefix in _ENCODERS else all)(name.startswith(prefix) for name in inside)), "")
        if not prefix or not inside:
            return inside, others
        others += [name for name in inside if not name.startswith(prefix)]
        inside = {name.removeprefix(prefix): value for name, value in inside.items()
                  if name.startswith(prefix)}


def _missing(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in network.state_dict()
            if name not in state and not name.endswith("num_batches_tracked")]


def _fill(network: nn.Module, state: Mapping[str, Tensor], *, where: Path) -> list[str]:
    """Load all that the network has; returns the names of what it has not: a classifier, and the
    stages that were taken off it. Anything else is ``Refused``."""
    cut = tuple(f"{name}." for name, part in network.named_children()
                if name.startswith("layer") and isinstance(part, nn.Identity))
    wanted = network.state_dict()
    others = [name for name in state if name not in wanted and name.startswith((*_HEADS, *cut))]
    load_strictly(network, {name: value for name, value in state.items() if name not in others},
                  where=where)
    return others
