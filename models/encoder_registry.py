"""What is known of a patch encoder before its weights are opened, and the registry of them all.

An entry is a description with a builder. Registering one of your own (in a file given by
``--encoder_plugin``): ``register(EncoderSpec(name="mine", dim=512, ...))``.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.encoder_transforms import Pixels, Transform, Triple
from models.encoder_weights import Weights, WeightSource
from utils.devices import Precision
from utils.errors import Refused
from utils.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HALF: Triple = (0.5, 0.5, 0.5)

E2E_PREFIX = "e2e:"  # before the checkpoint of an end-to-end model, whose encoder is meant
PLAIN_PX = 224  # CLAM's target size, of encoders without a transform of their own
MPP_TOLERANCE = 0.05

PACKAGES = {  # optional package -> what pip installs it from
    "transformers": "transformers", "open_clip": "open_clip_torch",
    "conch": "git+https://github.com/Mahmoodlab/CONCH.git",
    "musk": "fairscale git+https://github.com/lilab-stanford/MUSK.git"}


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What is known of an encoder before its weights are opened.

    name:       lower case; aliases are other spellings of it (AtlasPatch's, TRIDENT's)
    dim:        length D of a feature vector; 0 = known once built
    mean, std:  of the three channels, in 0..1
    build:      weights -> network with forward (B, 3, H, W) float32 -> (B, D)
    default_px: patch side the network expects when none is asked for
    gated:      the authors hand out the weights on request only
    patch_px, mpp_um: patches it was made for; 0 = no recommendation
    transform:  the encoder's own; None = CLAM's, shorter side to 224 px, bilinear
    precision:  recommended on a GPU
    output:     what the feature vector is
    package:    optional package that it needs, a key of ``PACKAGES``
    remote_code: its network is Python code that comes with the weights
    plugin:     of a plug-in file: device, transform -> network and its own preprocessing, in the
                place of ``build``
    network:    the timm network alone with random weights, for training end to end; None = there
                is none without the weights
    """

    name: str
    dim: int
    source: str
    licence: str
    mean: Triple
    std: Triple
    weights: WeightSource
    build: Callable[[Weights], nn.Module]
    default_px: int = PLAIN_PX
    gated: bool = False
    aliases: tuple[str, ...] = ()
    patch_px: int = 0
    mpp_um: float = 0.0
    transform: Transform | None = None
    precision: Precision = "fp32"
    output: str = "pooled"
    package: str = ""
    remote_code: bool = False
    plugin: Callable[[torch.device, Transform], tuple[nn.Module, Pixels]] | None = None
    network: Callable[[], nn.Module] | None = None


ENCODERS: Registry[EncoderSpec] = Registry("encoder")


def register(spec: EncoderSpec, registry: Registry[EncoderSpec] = ENCODERS) -> EncoderSpec:
    """Add an encoder; ``Refused`` when its name or an alias is taken already."""
    taken = {name: known for known in registry for name in (known, *registry.get(known).aliases)}
    for name in (spec.name, *spec.aliases):
        if name != name.casefold() or name.startswith(("timm:", E2E_PREFIX)):
            raise Refused(f"encoder '{name}': names are lower case and do not begin with timm: or "
                          f"{E2E_PREFIX}")
        if name in taken:
            raise Refused(f"encoder '{spec.name}' cannot be registered: '{name}' is taken by "
                          f"encoder '{taken[name]}'; give it another name")
    return registry.register(spec.name)(spec)


def find_encoder(name: str) -> EncoderSpec:
    """The registered encoder of this name or alias, in any case; ``Refused`` if there is none."""
    wanted = name.casefold()
    names = {alias: known for known in ENCODERS
             for alias in (known, *ENCODERS.get(known).aliases)}
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=3)
        names_near = ", ".join(f"'{found}'" for found in near)
        hint = f"did you mean {names_near}? " if near else ""
        raise Refused(f"unknown encoder '{name}': {hint}--list_encoders prints all names; "
                      f"timm:<any timm model> and {E2E_PREFIX}<checkpoint of an end-to-end model> "
                      "work too")
    return ENCODERS.get(names[wanted])


def missing_package(spec: EncoderSpec) -> str:
    """The pip command for the package this encoder needs, or "" when it is there."""
    if not spec.package or spec.package in sys.modules or importlib.util.find_spec(spec.package):
        return ""
    return f"pip install {PACKAGES[spec.package]}"


def check_input(spec: EncoderSpec, patch_px: int, mpp_um: float | None) -> str:
    """"" or a line of warning: these patches are not what the encoder was made for.

    patch_px: side of the patches as they reach the encoder's transform, at ``mpp_um`` um per px
    (None = unknown). Finer patches that show the same square of tissue are fine: they are resized.
    """
    if not spec.patch_px:
        return ""
    if mpp_um is None:
        fits = patch_px == spec.patch_px
    else:
        asked, found = spec.patch_px * spec.mpp_um, patch_px * mpp_um
        fits = (abs(found - asked) <= MPP_TOLERANCE * asked
                and mpp_um <= spec.mpp_um * (1 + MPP_TOLERANCE))
    if fits:
        return ""
    scale = "unknown um/px" if mpp_um is None else f"{mpp_um:.4g} um/px"
    return (f"encoder '{spec.name}' was made for patches of {spec.patch_px} px at "
            f"{spec.mpp_um:g} um/px; these are {patch_px} px at {scale}")
