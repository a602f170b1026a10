"""The trained encoder of an end-to-end model as a patch encoder, called ``e2e:CHECKPOINT``.

Its features are those that the model's own aggregator is given in evaluation: patches go to the
device as they were read, and are resized there by the model's ``PatchTransform``. They can feed
any other slide model too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from models.encoder_registry import E2E_PREFIX, EncoderSpec
from models.encoder_transforms import Pixels, Transform, Triple
from models.encoder_weights import Weights, WeightSource
from models.model_names import split_name
from models.trained import TrainedModel, load_as_described
from utils.devices import Precision
from utils.errors import Refused

if TYPE_CHECKING:
    import torch
    from torch import nn

    from models.e2e import EndToEnd
    from models.encoders import Encoder


@dataclass(frozen=True, kw_only=True)
class WholeField(Transform):
    """The whole patch resized to a square of ``resize_px``, on the device of the network.

    channels: order in which the network takes them, RGB or BGR
    """

    channels: Literal["RGB", "BGR"]

    def apply(self, patch: np.ndarray) -> np.ndarray:
        """As it is: nothing happens before the device."""
        return patch

    def resized(self, target_px: int) -> Transform:
        """Itself; ``Refused`` for another size than that of its training."""
        if target_px != self.resize_px:
            raise Refused(f"this end-to-end model sees its patches at {self.resize_px} px, as in "
                          f"its training, not at {target_px}: leave the target size out")
        return self

    def pixels(self, mean: Triple, std: Triple) -> Pixels:
        """See ``FieldPixels``."""
        return FieldPixels(self, mean, std)

    def record(self) -> dict[str, Any]:
        """What was done, for the features file."""
        return {"target_px": self.resize_px, "channels": self.channels,
                "resize": f"both sides to {self.resize_px}, antialias, on the device"}


class FieldPixels:
    """``models.augment.PatchTransform`` in eval mode: batches are patches of one size as read."""

    def __init__(self, transform: WholeField, mean: Triple, std: Triple) -> None:
        from models.augment import PatchTransform

        self._transform = PatchTransform(
            img_size=transform.resize_px, img_transform="none", crop_scale=1.0,
            channels=transform.channels, mean=mean, std=std).eval()

    def prepare(self, patch: np.ndarray) -> np.ndarray:
        """The (H, W, 3) uint8 patch itself."""
        return patch

    def is_prepared(self, shape: tuple[int, ...]) -> bool:
        """Patches of any size are."""
        return True

    def images(self, batch: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, img_size, img_size) float32, channels last in memory."""
        images: torch.Tensor = self._transform.to(batch.device)(batch)
        return images


def end_to_end_encoder(trained: TrainedModel, model: EndToEnd, *, device: torch.device,
                       precision: Precision) -> Encoder:
    """The encoder of ``model``, which ``trained`` built and which then lies on ``device``."""
    from models.encoders import Encoder

    return Encoder(_spec(trained, model.encoder), model.encoder.eval().requires_grad_(False),
                   weights=Weights(trained.path, trained.sha256), transform=_transform(trained),
                   device=device, precision=precision)


def aggregator(trained: TrainedModel, model: Any) -> tuple[TrainedModel, Any]:
    """The part of an end-to-end model that takes features, and what is known of it: it was
    trained on those of its own encoder. Any other model is returned as it is."""
    if not trained.end_to_end:
        return trained, model
    own = {"name": _name(trained), "weights_sha256": trained.sha256}
    return replace(trained, encoder=own), model.mil


def end_to_end_spec(name: str) -> EncoderSpec:
    """The description of ``e2e:CHECKPOINT``; ``Refused`` when that is no end-to-end model."""
    trained = _load(Path(name.removeprefix(E2E_PREFIX)))
    model: Any = trained.build()
    return _spec(trained, model.encoder)


def _load(path: Path) -> TrainedModel:
    if not path.is_file():
        raise Refused(f"encoder '{E2E_PREFIX}{path}': there is no checkpoint {path}: give the "
                      f"s_k_checkpoint.pt of the end-to-end model as {E2E_PREFIX}PATH (eval.py: "
                      "--encoder_ckpt PATH)")
    trained = load_as_described(path)
    if not trained.described:
        raise Refused(f"encoder '{E2E_PREFIX}{path}': {path.with_suffix('.json').name} is missing "
                      "beside it, which says how its patches are prepared: restore it")
    if not trained.end_to_end:
        raise Refused(f"encoder '{E2E_PREFIX}{path}': that is a {trained.spec.model_type}, which "
                      "has no encoder: give a checkpoint of a model_type e2e_<encoder>_<slide "
                      "model>")
    return trained


def _name(trained: TrainedModel) -> str:
    """Tells the encoders of two folds apart, and does not change when files are moved."""
    return f"{E2E_PREFIX}{trained.spec.model_type}-{trained.sha256[:8]}"


def _spec(trained: TrainedModel, network: Any) -> EncoderSpec:
    encoder, mil = split_name(trained.spec.model_type)
    return EncoderSpec(
        name=_name(trained), dim=trained.spec.embed_dim, source=str(trained.path),
        licence="the user's", mean=network.mean, std=network.std, build=_build,
        weights=WeightSource(file=trained.path), output=f"{encoder}, trained with {mil}",
        transform=_transform(trained))


def _transform(trained: TrainedModel) -> WholeField:
    options = trained.spec.options
    return WholeField(resize_px=options["img_size"], square=True, channels=options["channels"])


def _build(weights: Weights) -> nn.Module:
    """The network of a checkpoint, read anew: a description holds no weights."""
    model: Any = _load(weights.path).build()
    network: nn.Module = model.encoder
    return network
