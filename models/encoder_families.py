"""One builder a family of encoders: torchvision, timm, transformers, open_clip, and the odd ones.

Each takes ``Weights`` and gives a network (B, 3, H, W) float32 -> (B, D), every weight loaded, or
refuses. The rows that call them: encoder_zoo.py.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from models.encoder_registry import PACKAGES
from models.encoder_weights import Weights, load_strictly
from utils.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

CLASS_TOKEN = "class token"
CLASS_AND_MEAN = "class token + mean of patches"


def import_package(name: str, module: str = "") -> Any:
    """An optional package (or a module of it), or ``Refused`` with the pip command."""
    try:
        return importlib.import_module(module or name)
    except ImportError as error:
        raise Refused(f"the package {name} is needed: pip install {PACKAGES[name]} ({error})"
                      ) from None


def wrap(network: nn.Module, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]
         ) -> nn.Module:
    """``network`` as a module whose forward pass is ``forward``."""
    from torch import nn

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return forward(self.network, images)

    return Wrapped()


# ---------------------------------------------------------------------------- torchvision

def build_torchvision(weights: Weights, *, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A torchvision classifier without its last linear layer; a layer norm before it stays."""
    from torch import nn
    from torchvision.models import get_model

    network: Any = get_model(name, weights=None, **arguments)
    state = {key.replace("mlp.linear_1.", "mlp.0.").replace("mlp.linear_2.", "mlp.3."): value
             for key, value in weights.state().items()}  # the ViT files have older names
    load_strictly(network, state, where=weights.path)
    if name.startswith("vit"):
        network.heads = nn.Identity()
    elif name.startswith("convnext"):
        network.classifier[2] = nn.Identity()
    else:
        network.fc = nn.Identity()
    return network  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------- timm

def build_timm(weights: Weights, *, arch: str, arguments: Mapping[str, Any], output: str,
               dinov2_keys: bool = False) -> nn.Module:
    """A network of timm's from a checkpoint in timm's key names, or in DINOv2's own."""
    network = timm_network(arch, arguments)
    state = weights.state()
    if dinov2_keys:
        from timm.models.vision_transformer import checkpoint_filter_fn

        state = checkpoint_filter_fn(state, cast(Any, network))
    load_strictly(network, state, where=weights.path)
    return wrap(network, _class_and_mean) if output == CLASS_AND_MEAN else network


def timm_network(arch: str, arguments: Mapping[str, Any]) -> nn.Module:
    """timm's ``arch`` without classifier. ``swiglu``: gated MLPs instead of plain ones."""
    import timm
    from torch import nn

    settings = dict(arguments)
    if settings.pop("swiglu", False):
        from timm.layers.mlp import SwiGLUPacked

        settings |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return timm.create_model(arch, num_classes=0, **settings)  # type: ignore[no-any-return]


def timm_trunk(arch: str, stages: int) -> nn.Module:
    """timm's ResNet ``arch`` without classifier and without the stages after the first ``stages``:
    (B, 3, H, W) -> (B, D), the mean over positions of the last stage that is left."""
    from torch import nn

    network: Any = timm_network(arch, {})
    for stage in range(stages + 1, 5):
        setattr(network, f"layer{stage}", nn.Identity())
    return network  # type: ignore[no-any-return]


def _class_and_mean(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    vit = cast(Any, network)
    return class_and_mean_of(vit.forward_features(images), vit.num_prefix_tokens)


def class_and_mean_of(tokens: torch.Tensor, prefix: int) -> torch.Tensor:
    """(B, T, C) tokens -> (B, 2C): the class token, the mean of those after ``prefix``."""
    import torch

    return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(dim=1)], dim=1)


# ---------------------------------------------------------------------------- transformers

def build_transformers(weights: Weights, *, model: str, output: str) -> nn.Module:
    """A vision model of transformers; its config.json lies beside the weights."""
    library = import_package("transformers")
    config = library.AutoConfig.from_pretrained(str(weights.path.parent), local_files_only=True)
    if hasattr(config, "vision_config"):  # of an image-text pair, only the image tower is built
        config.vision_config.projection_dim = getattr(config, "projection_dim", None)
        config = config.vision_config
    build = getattr(library, model)
    extra = {"add_pooling_layer": False} if model == "ViTModel" else {}
    if config.model_type != build.config_class.model_type:
        raise Refused(f"encoder weights {weights.path}: config.json describes a network of type "
                      f"'{config.model_type}', expected '{build.config_class.model_type}'")
    with _speechless(library):
        try:
            network, found = build.from_pretrained(
                None, config=config, state_dict=weights.state(), output_loading_info=True,
                dtype="float32", **extra)
        except RuntimeError as error:
            raise Refused(f"encoder weights {weights.path} do not fit their config.json "
                          f"({' '.join(str(error).split())[:120]})") from None
    if missing := sorted(found["missing_keys"]):
        raise Refused(f"encoder weights {weights.path} belong to another network: "
                      f"{len(missing)} tensors missing ({', '.join(missing[:3])})")
    return wrap(network, _OUTPUTS[output])


def build_remote(weights: Weights, *, call: str) -> nn.Module:
    """A network whose code lies beside its weights; runs it only if ``weights`` are trusted.

    call: method of the model that encodes images, "pooler_output" of its result, or
    "return_conch", which gives another model that does.
    """
    library = import_package("transformers")
    with _speechless(library):
        network = library.AutoModel.from_pretrained(
            str(weights.path.parent), trust_remote_code=weights.trusted, local_files_only=True,
            use_safetensors=True, dtype="float32")
    if call == "return_conch":
        network = network.return_conch()[0]
        return wrap(network, lambda inner, images: inner(images))
    if call == "pooler_output":
        return wrap(network, _OUTPUTS["pooled"])
    return wrap(network, lambda inner, images: getattr(inner, call)(images))


def _named(field: str) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    return lambda network, images: getattr(network(pixel_values=images), field)


def _tokens(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return network(pixel_values=images).last_hidden_state  # type: ignore[no-any-return]


_OUTPUTS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    CLASS_TOKEN: lambda network, images: _tokens(network, images)[:, 0],
    CLASS_AND_MEAN: lambda network, images: class_and_mean_of(_tokens(network, images), 1),
    "pooled": _named("pooler_output"),
    "image embedding": _named("image_embeds")}


@contextmanager
def _speechless(library: Any) -> Iterator[None]:
    """Without its bar, and its table of tensors that are not wanted (text towers, heads)."""
    logging = library.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------- open_clip

def build_open_clip(weights: Weights, *, arch: str) -> nn.Module:
    """The image tower of a CLIP: (B, D) projected embeddings, not normalised.

    arch: open_clip's name; "" = the open_clip_config.json beside the weights.
    """
    library = import_package("open_clip")
    if arch:
        config = library.get_model_config(arch)
    else:
        path = weights.path.parent / "open_clip_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
    tower = open_clip_tower(config)
    state = {key.removeprefix("visual."): value for key, value in weights.state().items()
             if key.startswith("visual.")}
    load_strictly(tower, state, where=weights.path)
    return wrap(tower, _first)


def open_clip_tower(config: Mapping[str, Any]) -> nn.Module:
    """The image half of open_clip's model ``config``; the text half is never built."""
    library = import_package("open_clip", "open_clip.model")
    vision = dict(config["vision_cfg"]) | {"timm_model_pretrained": False}
    return library._build_vision_tower(  # type: ignore[no-any-return]
        config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))


def _first(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    found = network(images)  # CoCa gives the embedding and its tokens
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------- single ones

def build_ctranspath(weights: Weights) -> nn.Module:
    """CTransPath: Swin-T whose 4 px patches come from a small convolutional stem (Wang et al.,
    Medical Image Analysis 81, 2022, section 3.2); the mean over positions, (B, 768)."""
    from timm.models.swin_transformer import checkpoint_filter_fn

    network = ctranspath_network()
    state = {key.replace("patch_embed.proj.", "patch_embed.stem."): value
             for key, value in weights.state().items() if not key.startswith("head.")}
    load_strictly(network, checkpoint_filter_fn(state, network), where=weights.path)
    return network


def ctranspath_network() -> nn.Module:
    """CTransPath's network with random weights."""
    import timm
    from torch import nn

    class Stem(nn.Module):
        """(B, 3, H, W) -> (B, H/4, W/4, C)."""

        def __init__(self, img_size: tuple[int, int], embed_dim: int,
                     norm_layer: Callable[..., nn.Module], **unused: Any) -> None:
            super().__init__()
            self.grid_size = (img_size[0] // 4, img_size[1] // 4)
            width = embed_dim // 8
            self.stem = nn.Sequential(
                nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width),
                nn.ReLU(), nn.Conv2d(2 * width, embed_dim, 1))
            self.norm = norm_layer(embed_dim)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.norm(self.stem(images).permute(0, 2, 3, 1))
            return found

    return timm.create_model(  # type: ignore[no-any-return]
        "swin_tiny_patch4_window7_224", num_classes=0, embed_layer=Stem)


def build_musk(weights: Weights) -> nn.Module:
    """MUSK's image side, one scale (``ms_aug`` off): (B, 1024) before its projection."""
    import timm

    import_package("musk", "musk.modeling")  # registers its network with timm
    network = timm.create_model("musk_large_patch16_384")
    load_strictly(network, weights.state(), where=weights.path)
    return wrap(network, _musk_image_features)


def _musk_image_features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return network(image=images, with_head=False, out_norm=False,  # type: ignore[no-any-return]
                   ms_aug=False, return_global=True)[0]
