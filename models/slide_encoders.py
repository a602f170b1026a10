"""From the patch features of a slide to one vector: pooling, a trained slide model, a plug-in.

``mean``, ``max``, ``mean_max``      of each feature over the patches
``checkpoint:PATH``                  the slide embedding of a model that main.py trained (an
                                     end-to-end model takes the features of its own encoder)
``FILE.py:NAME``                     a plug-in: the file defines

    def register_slide_encoders(registry): ...

which registers builders, ``registry.register("name")(build)``. ``build(device)`` returns a function
of (N, D) float32 features on the device and (N, 2) int64 level-0 coordinates that gives a tensor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.e2e_patches import aggregator
from models.trained import TrainedModel, load_as_described
from utils.contracts import Bag
from utils.devices import pick_device
from utils.errors import ItemFailed, Refused
from utils.registry import Registry
from utils.storage import file_sha256

if TYPE_CHECKING:
    import torch

    Encode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    Build = Callable[[torch.device], Encode]

CHECKPOINT = "checkpoint:"
HOOK = "register_slide_encoders"

POOLING: Registry[Build] = Registry("slide encoder")


@POOLING.register("mean")
def _mean(device: torch.device) -> Encode:
    return lambda features, coords: features.mean(dim=0)


@POOLING.register("max")
def _max(device: torch.device) -> Encode:
    return lambda features, coords: features.amax(dim=0)


@POOLING.register("mean_max")
def _mean_max(device: torch.device) -> Encode:
    import torch

    return lambda features, coords: torch.cat([features.mean(dim=0), features.amax(dim=0)])


class SlideEncoder:
    """A slide encoder on its device; see ``load_slide_encoder``. name: for files and reports."""

    def __init__(self, name: str, encode: Encode, *, device: torch.device,
                 record: Mapping[str, Any], model: TrainedModel | None = None) -> None:
        self.name = name
        self._encode = encode
        self._device = device
        self._record = dict(record)
        self._model = model

    def record(self) -> dict[str, Any]:
        """What identifies its vectors: equal records, comparable vectors."""
        return dict(self._record)

    def check(self, width: int, encoder: Mapping[str, Any]) -> None:
        """``Refused`` when it cannot take features of this width (0 = unknown) and encoder."""
        if self._model is not None:
            self._model.check_features(width or self._model.spec.embed_dim, encoder)

    def encode(self, features: np.ndarray, coords: np.ndarray) -> np.ndarray:
        """(N, D) features and (N, 2) level-0 corners, N >= 1 -> (H,) float32; ``ItemFailed``."""
        import torch

        try:
            with torch.inference_mode():
                vector = self._encode(
                    torch.from_numpy(features.astype(np.float32)).to(self._device),
                    torch.from_numpy(coords.astype(np.int64)).to(self._device))
            values = vector.detach().float().flatten().cpu().numpy()
        except Exception as error:  # a plug-in may raise anything; a slide may be too large
            raise ItemFailed(f"slide encoder {self.name} failed ({type(error).__name__}: "
                             f"{' '.join(str(error).split())[:200]})") from None
        if not np.isfinite(values).all():
            raise ItemFailed(f"slide encoder {self.name} gave values that are not finite")
        return values


def load_slide_encoder(text: str, *, device: str = "cpu") -> SlideEncoder:
    """A slide encoder as the user names it, see above.

    ``Refused``: unknown name, no such file, a damaged checkpoint, a model of several levels.
    """
    place = pick_device(device)
    if text.startswith(CHECKPOINT):
        return _load_model(Path(text.removeprefix(CHECKPOINT)), place)
    file, _, name = text.rpartition(":")
    if file:
        return _load_plugin(Path(file), name, place)
    if text not in POOLING:
        raise Refused(f"unknown slide encoder '{text}': known: {', '.join(POOLING)}, "
                      f"{CHECKPOINT}PATH, FILE.py:NAME")
    return SlideEncoder(text, POOLING.get(text)(place), device=place, record={"name": text})


def _load_model(path: Path, device: torch.device) -> SlideEncoder:
    trained = load_as_described(path)
    if trained.spec.n_levels > 1:
        raise Refused(f"checkpoint {path} ({trained.spec.model_type}) takes several "
                      "magnifications, a slide encoder takes the features of one")
    trained, network = aggregator(trained, trained.build())
    network = network.eval().requires_grad_(False).to(device)

    def encode(features: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        bag = Bag(slide_id="", features=features, coords=coords.cpu().numpy())
        embedding: torch.Tensor | None = network(bag).embedding
        if embedding is None:
            raise ItemFailed(f"{trained.spec.model_type} has no slide embedding")
        return embedding

    record = {"name": "checkpoint", "model_type": trained.spec.model_type,
              "sha256": trained.sha256}
    return SlideEncoder(f"{path.resolve().parent.name}_{path.stem}", encode, device=device,
                        record=record, model=trained)


def _load_plugin(path: Path, name: str, device: torch.device) -> SlideEncoder:
    if not path.is_file() or path.suffix != ".py":
        raise Refused(f"slide encoder plug-in: there is no Python file {path}")
    registry: Registry[Build] = Registry(f"slide encoder of {path}")
    spec = importlib.util.spec_from_file_location(f"milwright_slide_plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a .py file
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        hook = getattr(module, HOOK, None)
        if hook is None:
            raise Refused(f"slide encoder plug-in {path} does not define 'def {HOOK}(registry)'")
        hook(registry)
        encode = registry.get(name)(device)
    except Refused:
        raise
    except Exception as error:  # the user's code may raise anything
        raise Refused(f"slide encoder plug-in {path} failed ({type(error).__name__}: "
                      f"{' '.join(str(error).split())[:200]})") from None
    return SlideEncoder(name, encode, device=device,
                        record={"name": name, "plugin_sha256": file_sha256(path)})
