"""The published patch encoders, one row each: what they are, and which builder makes them.

Names and outputs follow AtlasPatch's registry (66 names) and TRIDENT's list; patch size, scale and
precision are those that TRIDENT requires of an encoder, transforms those of the authors' cards.
The other spelling of a name is an alias. "see source": read the licence there.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from models.encoder_families import (
    CLASS_AND_MEAN,
    CLASS_TOKEN,
    build_ctranspath,
    build_musk,
    build_open_clip,
    build_remote,
    build_timm,
    build_torchvision,
    build_transformers,
    ctranspath_network,
    timm_network,
)
from models.encoder_registry import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    EncoderSpec,
    register,
)
from models.encoder_transforms import Transform, Triple
from models.encoder_weights import WeightSource

HUB = "https://huggingface.co/"
NC_ND = "CC-BY-NC-ND-4.0"
UNSURE = "see source"
CONFIG = "config.json"
CLIP_CONFIG = "open_clip_config.json"
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
EMBEDDING = "image embedding"
AT_20X: dict[str, Any] = {"patch_px": 224, "mpp_um": 0.5}
AT_20X_256: dict[str, Any] = {"patch_px": 256, "mpp_um": 0.5}


def _size(resize_px: int, crop_px: int = 0, **more: Any) -> Transform:
    return Transform(resize_px=resize_px, crop_px=crop_px, **more)


CROP_224 = _size(224, 224)
CUBIC_224 = _size(224, 224, interpolation="bicubic")
CUBIC_256 = _size(256, 224, interpolation="bicubic")
SQUARE_224 = _size(224, square=True)


def _add(name: str, dim: int, hub_id: str = "", *, request: str = "", url: str | None = None,
         hub_files: tuple[str, ...] = (), config: str | None = None, gated: bool = False,
         mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, **facts: Any) -> None:
    """Register a row; weights are found by <NAME>_CKPT_PATH, the hub id or the url."""
    if gated and not request:
        request = (f"ask for access at {HUB}{hub_id} and download its weights"
                   + (f" and {config}" if config else ""))
    source = facts.pop("source", HUB + hub_id if hub_id else url or "")
    files: dict[str, Any] = {"hub_files": hub_files} if hub_files else {}
    register(EncoderSpec(
        name=name, dim=dim, source=source, mean=mean, std=std, gated=gated,
        weights=WeightSource(
            env=re.sub(r"\W", "_", name).upper() + "_CKPT_PATH", hub_id=hub_id or None, url=url,
            request=request or None, config=config, code=facts.get("remote_code", False), **files),
        **facts))


# ---------------------------------------------------------------------------- torchvision

TORCHVISION: tuple[tuple[str, int, str, Transform], ...] = (
    ("resnet18", 512, "resnet18-f37072fd.pth", _size(256, 224)),
    ("resnet34", 512, "resnet34-b627a593.pth", _size(256, 224)),
    ("resnet50", 2048, "resnet50-0676ba61.pth", _size(256, 224)),
    ("resnet101", 2048, "resnet101-63fe2227.pth", _size(256, 224)),
    ("resnet152", 2048, "resnet152-394f9c45.pth", _size(256, 224)),
    ("convnext_tiny", 768, "convnext_tiny-983f1562.pth", _size(236, 224)),
    ("convnext_small", 768, "convnext_small-0c510722.pth", _size(230, 224)),
    ("convnext_base", 1024, "convnext_base-6075fbad.pth", _size(232, 224)),
    ("convnext_large", 1536, "convnext_large-ea097f82.pth", _size(232, 224)),
    ("vit_b_16", 768, "vit_b_16-c867db91.pth", _size(256, 224)),
    ("vit_b_32", 768, "vit_b_32-d86f8d99.pth", _size(256, 224)),
    ("vit_l_16", 1024, "vit_l_16-852ce7e3.pth", _size(242, 224)),
    ("vit_l_32", 1024, "vit_l_32-c7638314.pth", _size(256, 224)),
    ("vit_h_14", 1280, "vit_h_14_swag-80465313.pth", _size(518, 518, interpolation="bicubic")),
)
for _name, _dim, _file, _transform in TORCHVISION:
    _add(_name, _dim, url=f"https://download.pytorch.org/models/{_file}", transform=_transform,
         licence="CC-BY-NC-4.0" if "swag" in _file else "BSD-3-Clause",
         output=CLASS_TOKEN if _name.startswith("vit") else "pooled",
         build=partial(build_torchvision, name=_name, arguments={
             "image_size": 518} if _name == "vit_h_14" else {}))


# ---------------------------------------------------------------------------- timm

def _timm(name: str, dim: int, hub_id: str, arch: str, arguments: dict[str, Any],
          transform: Transform, *, output: str = CLASS_TOKEN, dinov2_keys: bool = False,
          **facts: Any) -> None:
    _add(name, dim, hub_id, transform=transform, output=output,
         build=partial(build_timm, arch=arch, arguments=arguments, output=output,
                       dinov2_keys=dinov2_keys),
         network=partial(timm_network, arch, arguments), **facts)


DYNAMIC = {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True}
VIRCHOW = {**DYNAMIC, "mlp_ratio": 5.3375, "swiglu": True}
MINI = {**DYNAMIC, "mlp_ratio": 5.33334, "swiglu": True}
OPTIMUS = "vit_giant_patch14_reg4_dinov2"
BIOPTIMUS: dict[str, Any] = {
    "mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517), "gated": True,
    "precision": "fp16", **AT_20X}
LUNIT: dict[str, Any] = {
    "mean": (0.70322989, 0.53606487, 0.66096631), "std": (0.21716536, 0.26081574, 0.20723464),
    "licence": UNSURE, **AT_20X}

_timm("uni_v2", 1536, "MahmoodLab/UNI2-h", "vit_giant_patch14_224",
      {**DYNAMIC, "depth": 24, "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2,
       "no_embed_class": True, "reg_tokens": 8, "swiglu": True}, CROP_224, gated=True,
      aliases=("uni2", "uni2-h"), licence=NC_ND, precision="bf16", **AT_20X_256)
_timm("virchow_v1", 2560, "paige-ai/Virchow", "vit_huge_patch14_224", VIRCHOW,
      _size(224, interpolation="bicubic"), output=CLASS_AND_MEAN, gated=True,
      aliases=("virchow",), licence="Apache-2.0", precision="fp16", **AT_20X)
_timm("virchow_v2", 2560, "paige-ai/Virchow2", "vit_huge_patch14_224",
      {**VIRCHOW, "reg_tokens": 4}, _size(224, interpolation="bicubic"), output=CLASS_AND_MEAN,
      gated=True, aliases=("virchow2",), licence=NC_ND, precision="fp16", **AT_20X)
_timm("prov_gigapath", 1536, "prov-gigapath/prov-gigapath", "vit_giant_patch14_dinov2",
      {**DYNAMIC, "patch_size": 16, "mlp_ratio": 5.33334}, CUBIC_256, gated=True,
      aliases=("gigapath",), licence=UNSURE, precision="fp16", **AT_20X_256)
_timm("openmidnight", 1536, "SophontAI/OpenMidnight", OPTIMUS, DYNAMIC, SQUARE_224, gated=True,
      hub_files=("teacher_checkpoint_load.pt",), dinov2_keys=True, licence="Apache-2.0",
      precision="fp16", **AT_20X)
_timm("pathorchestra", 1024, "AI4Pathology/PathOrchestra", "vit_large_patch16_224", DYNAMIC,
      _size(224), gated=True, licence=UNSURE, precision="fp16", **AT_20X)
_timm("gpfm", 1024, "majiabo/GPFM", "vit_large_patch14_dinov2", DYNAMIC, CUBIC_224,
      hub_files=("GPFM.pth",), dinov2_keys=True, licence=UNSURE, precision="fp16", **AT_20X)
_timm("h_optimus_0", 1536, "bioptimus/H-optimus-0", OPTIMUS, DYNAMIC, SQUARE_224,
      aliases=("hoptimus0", "h-optimus-0"), licence="Apache-2.0", **BIOPTIMUS)
_timm("h_optimus_1", 1536, "bioptimus/H-optimus-1", OPTIMUS, DYNAMIC, SQUARE_224,
      aliases=("hoptimus1", "h-optimus-1"), licence=NC_ND, **BIOPTIMUS)
_timm("h0_mini", 1536, "bioptimus/H0-mini", "vit_base_patch14_reg4_dinov2", MINI, CUBIC_224,
      output=CLASS_AND_MEAN, licence=NC_ND, **BIOPTIMUS)
_timm("h0_mini_cls", 768, "bioptimus/H0-mini", "vit_base_patch14_reg4_dinov2", MINI, CUBIC_224,
      aliases=("h0-mini",), licence=NC_ND, **BIOPTIMUS)  # TRIDENT's h0-mini: without the mean

for _name in ("bt", "swav", "mocov2"):
    _timm(f"lunit_resnet50_{_name}", 2048, f"1aurent/resnet50.lunit_{_name}", "resnet50", {},
          CUBIC_224, output="pooled", **LUNIT)
for _px in (16, 8):
    _timm(f"lunit_vit_small_patch{_px}_dino", 384, f"1aurent/vit_small_patch{_px}_224.lunit_dino",
          f"vit_small_patch{_px}_224", {"dynamic_img_size": True}, CUBIC_224,
          aliases=(f"lunit-vits{_px}",), **LUNIT)
for _short, _arch, _dim in (("vits16", "vit_small_patch16_224", 384),
                            ("vits8", "vit_small_patch8_224", 384),
                            ("vitb16", "vit_base_patch16_224", 768),
                            ("vitb8", "vit_base_patch8_224", 768),
                            ("vitl14", "vit_large_patch14_reg4_dinov2", 1024)):
    _timm(f"kaiko-{_short}", _dim, f"1aurent/{_arch}.kaiko_ai_towards_large_pathology_fms", _arch,
          {"dynamic_img_size": True}, CROP_224, mean=HALF, std=HALF, licence=UNSURE,
          aliases=(f"kaiko_{_short}",), **AT_20X_256)


# ---------------------------------------------------------------------------- transformers

def _hub(name: str, dim: int, hub_id: str, model: str, transform: Transform, *, output: str,
         **facts: Any) -> None:
    _add(name, dim, hub_id, config=CONFIG, transform=transform, output=output,
         package="transformers", build=partial(build_transformers, model=model, output=output),
         **facts)


for _name, _dim in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536)):
    _hub(f"dinov2_{_name}", _dim, f"facebook/dinov2-{_name}", "Dinov2Model", CUBIC_256,
         output=CLASS_TOKEN, licence="Apache-2.0")

AERIAL: dict[str, Triple] = {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}
for _name, _dim, _part, _data in (
        ("vits16", 384, "vits16", "lvd1689m"), ("vits16_plus", 384, "vits16plus", "lvd1689m"),
        ("vitb16", 768, "vitb16", "lvd1689m"), ("vitl16", 1024, "vitl16", "lvd1689m"),
        ("vitl16_sat", 1024, "vitl16", "sat493m"), ("vith16_plus", 1280, "vith16plus", "lvd1689m"),
        ("vit7b16", 4096, "vit7b16", "lvd1689m"), ("vit7b16_sat", 4096, "vit7b16", "sat493m")):
    _hub(f"dinov3_{_name}", _dim, f"facebook/dinov3-{_part}-pretrain-{_data}", "DINOv3ViTModel",
         SQUARE_224, output="pooled", gated=True, licence="DINOv3 License", precision="bf16",
         hub_files=("model.safetensors.index.json",) if "7b" in _name else (),
         **(AERIAL if _data == "sat493m" else {}))

_hub("phikon_v1", 768, "owkin/phikon", "ViTModel", SQUARE_224, output=CLASS_TOKEN,
     aliases=("phikon",), licence="Owkin non-commercial", **AT_20X)
_hub("phikon_v2", 1024, "owkin/phikon-v2", "Dinov2Model", CUBIC_224, output=CLASS_TOKEN,
     aliases=("phikon-v2",), licence="Owkin non-commercial", **AT_20X)
_hub("midnight", 3072, "kaiko-ai/midnight", "Dinov2Model", CROP_224, output=CLASS_AND_MEAN,
     aliases=("midnight12k",), mean=HALF, std=HALF, licence="MIT", precision="fp16", **AT_20X)
_hub("plip", 512, "vinid/plip", "CLIPVisionModelWithProjection", CUBIC_224, output=EMBEDDING,
     mean=CLIP_MEAN, std=CLIP_STD, licence=UNSURE)
_hub("medsiglip", 1152, "google/medsiglip-448", "SiglipVisionModel", _size(448, square=True),
     output="pooled", gated=True, mean=HALF, std=HALF,
     licence="Health AI Developer Foundations terms")


def _remote(name: str, dim: int, hub_id: str, call: str, transform: Transform, **facts: Any
            ) -> None:
    _add(name, dim, hub_id, config=CONFIG, transform=transform, remote_code=True,
         package="transformers", build=partial(build_remote, call=call),
         request=f"download the whole repository {HUB}{hub_id}"
                 + (" (ask for access there)" if facts.get("gated") else ""), **facts)


HIBOU: dict[str, Any] = {"mean": (0.7068, 0.5755, 0.722), "std": (0.195, 0.2316, 0.1816),
                         "licence": UNSURE, "output": "pooled", **AT_20X}
_remote("conch_v15", 768, "MahmoodLab/TITAN", "return_conch",
        _size(448, 448, interpolation="bicubic"), gated=True, aliases=("conch_v1_5",),
        licence=NC_ND, precision="fp16", output=EMBEDDING, patch_px=512, mpp_um=0.5)
_remote("hibou_b", 768, "histai/hibou-b", "pooler_output", CUBIC_224, aliases=("hibou-b",), **HIBOU)
_remote("hibou_l", 1024, "histai/hibou-L", "pooler_output", CUBIC_224, gated=True,
        aliases=("hibou-l",), **HIBOU)
_remote("keep", 768, "Astaxanthin/KEEP", "encode_image", CUBIC_224, licence=UNSURE,
        precision="fp16", output=EMBEDDING, **AT_20X_256)


# ---------------------------------------------------------------------------- open_clip

def _clip(name: str, dim: int, hub_id: str, arch: str, side_px: int = 224, **facts: Any) -> None:
    _add(name, dim, hub_id, package="open_clip", output=EMBEDDING, mean=CLIP_MEAN, std=CLIP_STD,
         transform=_size(side_px, side_px, interpolation="bicubic"),
         config=None if arch else CLIP_CONFIG, build=partial(build_open_clip, arch=arch),
         **{"hub_files": CLIP_FILES, **facts})


OPENAI: tuple[tuple[str, int, str, str, int], ...] = (
    ("clip_rn50", 1024, "resnet50_clip", "RN50", 224),
    ("clip_rn101", 512, "resnet101_clip", "RN101", 224),
    ("clip_rn50x4", 640, "resnet50x4_clip", "RN50x4", 288),
    ("clip_rn50x16", 768, "resnet50x16_clip", "RN50x16", 384),
    ("clip_rn50x64", 1024, "resnet50x64_clip", "RN50x64", 448),
    ("clip_vit_b_32", 512, "vit_base_patch32_clip_224", "ViT-B-32", 224),
    ("clip_vit_b_16", 512, "vit_base_patch16_clip_224", "ViT-B-16", 224),
    ("clip_vit_l_14", 768, "vit_large_patch14_clip_224", "ViT-L-14", 224),
    ("clip_vit_l_14_336", 768, "vit_large_patch14_clip_336", "ViT-L-14-336", 336))
for _name, _dim, _id, _arch, _px in OPENAI:
    _clip(_name, _dim, f"timm/{_id}.openai", f"{_arch}-quickgelu", _px, licence="MIT")

for _name in ("B-32", "B-16", "B-16-PMB"):
    _clip(f"quilt_{_name.lower().replace('-', '_')}", 512, f"wisdomik/QuiltNet-{_name}", "",
          licence=UNSURE)
_clip("biomedclip", 512, "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "",
      licence="MIT")
_clip("omiclip", 768, "WangGuangyuLab/Loki", "coca_ViT-L-14", hub_files=("checkpoint.pt",),
      licence=UNSURE)


# ---------------------------------------------------------------------------- single ones

_add("chief-ctranspath", 768, build=build_ctranspath, network=ctranspath_network,
     transform=SQUARE_224, licence=UNSURE, aliases=("ctranspath", "chief_ctranspath"),
     source="https://github.com/hms-dbmi/CHIEF",
     request="download CHIEF_CTransPath.pth as https://github.com/hms-dbmi/CHIEF says",
     patch_px=256, mpp_um=1.0)
_add("musk", 1024, "xiangjx/musk", build=build_musk, gated=True, package="musk",
     transform=_size(384, 384, interpolation="bicubic"), mean=HALF, std=HALF, licence=NC_ND,
     precision="fp16", output="image embedding, one scale", patch_px=384, mpp_um=0.5)
