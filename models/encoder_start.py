"""The weights that the encoder of an end-to-end model starts from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.model_names import split_name
from utils.errors import Refused

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class EncoderStart:
    """Which weights. encoder: its name; init: a file, or a folder with one a fold; None = those
    of ImageNet; random: none at all"""

    encoder: str
    init: Path | None
    random: bool

    def record(self, fold: int) -> dict[str, Any]:
        """Name and checksum of the weights of a fold; ``Refused`` when they are missing."""
        from models.e2e_encoders import pretrained_record

        return pretrained_record(self.encoder, init=self.init, fold=fold, random=self.random)

    def load(self, model: nn.Module, fold: int) -> None:
        """Give the encoder of ``model`` its weights; ``Refused`` when they do not fit."""
        from models.e2e_encoders import load_pretrained

        network: Any = model.encoder
        found = load_pretrained(network, self.encoder, init=self.init, fold=fold,
                                random=self.random)
        if left_out := found.get("left_out"):
            print(f"note: fold {fold}: {self.encoder} starts from {found['name']}, of which "
                  f"{', '.join(left_out)} is left out")


def encoder_start(model_type: str, *, enc_init: Path | None, no_enc_pt: bool
                  ) -> EncoderStart | None:
    """What the flags ask for; None for a model without an encoder.

    ``Refused`` for both flags at once, and for a flag that has no effect on the model.
    """
    encoder = split_name(model_type)[0]
    given = [f"--{name}" for name, value in (("enc_init", enc_init), ("no_enc_pt", no_enc_pt))
             if value]
    if given and not encoder:
        raise Refused(f"{given[0]} belongs to e2e models, {model_type} has no encoder: leave it "
                      "out")
    if len(given) > 1:
        raise Refused("--enc_init gives weights, --no_enc_pt wants none: choose one")
    return EncoderStart(encoder=encoder, init=enc_init, random=no_enc_pt) if encoder else None
