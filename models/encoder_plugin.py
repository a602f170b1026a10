"""Encoders of the user's own, from Python files given by ``--encoder_plugin``.

The file defines AtlasPatch's hook

    def register_feature_extractors(registry, device, dtype, num_workers): ...

which calls ``register_custom_encoder`` (import it from here) for each encoder, or it registers an
``EncoderSpec`` with ``models.encoder_registry.register``. Files run once in every process that
needs them; the record of an encoder holds the sha256 of its file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.encoder_families import wrap
from models.encoder_registry import ENCODERS, EncoderSpec, register
from models.encoder_transforms import Pixels, Transform
from models.encoder_weights import Weights, WeightSource
from utils.errors import Refused, SlideError
from utils.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

HOOK = "register_feature_extractors"
SIGNATURE = f"def {HOOK}(registry, device, dtype, num_workers)"

_LOADED: dict[Path, tuple[str, ...]] = {}  # files run in this process, and what they registered
_RUNNING: list[Path] = []  # the file whose hook is being called


@dataclass(frozen=True)
class EncoderBundle:
    """What a loader returns; any object with these attributes does.

    model:      module, evaluated as it is unless ``forward_fn`` is given
    preprocess: PIL image -> (C, H, W) tensor
    forward_fn: (B, C, H, W) batch -> (B, D), or more axes, which are flattened
    """

    model: Any
    preprocess: Callable[[Any], Any]
    forward_fn: Callable[[Any], Any] | None = None


def load_plugins(paths: Sequence[Path]) -> tuple[str, ...]:
    """Run plug-in files that have not run in this process; the names of their encoders.

    ``Refused``: no such file, an error in it, no hook, a name that is taken.
    """
    return tuple(name for path in paths for name in _load_once(Path(path).resolve()))


def register_custom_encoder(
    *, registry: Registry[EncoderSpec], name: str, embedding_dim: int,
    loader: Callable[[torch.device, torch.dtype], Any], device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None, num_workers: int = 0, non_blocking: bool = False,
) -> None:
    """Register an encoder from within the hook, as AtlasPatch has it.

    loader(device, dtype) is called when the encoder is first needed and returns an
    ``EncoderBundle``. It gets the run's device and float32: ``--precision`` is applied by autocast
    and reading by ``--workers``, so device, dtype, num_workers and non_blocking are only accepted.
    Names are lower case for all purposes.
    """
    if not _RUNNING:
        raise Refused(f"register_custom_encoder is called from within {HOOK}, in a file given by "
                      "--encoder_plugin")
    if not isinstance(embedding_dim, int) or embedding_dim < 1:
        raise Refused(f"plug-in encoder '{name}': embedding_dim is {embedding_dim!r}, expected a "
                      "positive integer")
    label = name.casefold()

    def build(place: torch.device, transform: Transform) -> tuple[nn.Module, Pixels]:
        import torch

        bundle = loader(place, torch.float32)
        for part in ("model", "preprocess"):
            if not callable(getattr(bundle, part, None)):
                raise Refused(f"plug-in encoder '{label}': its loader returned no '{part}' "
                              "(expected an object with model, preprocess, maybe forward_fn)")
        return _network(bundle), PluginPixels(transform, bundle.preprocess)

    register(EncoderSpec(
        name=label, dim=embedding_dim, source=str(_RUNNING[-1]), licence="the user's",
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), transform=Transform(resize_px=0),
        output="plug-in, its own preprocessing", build=_never, plugin=build,
        weights=WeightSource(file=_RUNNING[-1])), registry)


class PluginPixels:
    """``Transform``, then the plug-in's own ``preprocess``: batches are what it returns."""

    def __init__(self, transform: Transform, preprocess: Callable[[Any], Any]) -> None:
        self._transform = transform
        self._preprocess = preprocess

    def prepare(self, patch: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (C, H', W') float32."""
        import torch
        from PIL import Image

        try:
            image = self._preprocess(Image.fromarray(self._transform.apply(patch)))
        except Exception as error:  # the user's code may raise anything
            raise SlideError(f"preprocess of the plug-in encoder failed ({type(error).__name__}: "
                             f"{' '.join(str(error).split())[:120]})") from None
        if not isinstance(image, torch.Tensor) or image.ndim != 3:
            raise SlideError("preprocess of the plug-in encoder returned "
                             f"{tuple(getattr(image, 'shape', ())) or type(image).__name__}, "
                             "expected a (C, H, W) tensor")
        return image.to("cpu", torch.float32).numpy()

    def is_prepared(self, shape: tuple[int, ...]) -> bool:
        """(B, C, H, W); raw patches end with their 3 channels."""
        return shape[-1] != 3

    def images(self, batch: torch.Tensor) -> torch.Tensor:
        """Batches are images already."""
        return batch


# ---------------------------------------------------------------------------- running a file

def _load_once(path: Path) -> tuple[str, ...]:
    if path not in _LOADED:
        if not path.is_file():
            raise Refused(f"--encoder_plugin: there is no file {path}")
        before = set(ENCODERS)
        _RUNNING.append(path)
        try:
            _run(path, before)
        except Refused:
            raise
        except Exception as error:  # the user's code may raise anything
            raise Refused(f"--encoder_plugin {path} failed ({type(error).__name__}: "
                          f"{' '.join(str(error).split())[:200]})") from None
        finally:
            _RUNNING.pop()
        _LOADED[path] = tuple(sorted(set(ENCODERS) - before))
    return _LOADED[path]


def _run(path: Path, before: set[str]) -> None:
    import torch

    label = f"milwright_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(label, path)
    if spec is None or spec.loader is None:
        raise Refused(f"--encoder_plugin {path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module  # so that its classes can be found by name
    spec.loader.exec_module(module)
    hook = getattr(module, HOOK, None)
    if callable(hook):
        hook(ENCODERS, torch.device("cpu"), torch.float32, 0)
    if set(ENCODERS) == before:
        raise Refused(f"--encoder_plugin {path} registers no encoder: it must define "
                      f"'{SIGNATURE}' and call models.encoder_plugin.register_custom_encoder in it")


def _network(bundle: Any) -> nn.Module:
    from torch import nn

    run = getattr(bundle, "forward_fn", None) or bundle.model

    def forward(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = run(images)
        return found.flatten(1)

    inner = bundle.model if isinstance(bundle.model, nn.Module) else nn.Identity()
    return wrap(inner, forward)


def _never(weights: Weights) -> nn.Module:
    raise AssertionError(f"a plug-in builds its own network ({weights.path})")
