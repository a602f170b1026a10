"""The weights that a training starts from: of an encoder, of a slide model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.model_names import split_name
from utils.errors import BrokenFile, Refused
from utils.storage import file_sha256, load_torch

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """Where weights come from. encoder: name of the encoder, "" for a model without one;
    enc_init: a file, or a folder with one a fold, None = those of ImageNet; no_enc_pt: none at
    all; mil_init: of the slide model, a file or a folder, None = random"""

    encoder: str
    enc_init: Path | None
    no_enc_pt: bool
    mil_init: Path | None

    def record(self, fold: int) -> dict[str, Any]:
        """start: the encoder's name, what starts at random; start_sha256: checksums of the weights
        of this fold. ``Refused`` when they are missing."""
        from models.e2e_encoders import pretrained_record

        start: dict[str, Any] = {"mil": "weights" if self.mil_init else "random"}
        checksums: dict[str, Any] = {}
        if self.encoder:
            found = pretrained_record(self.encoder, init=self.enc_init, fold=fold,
                                      random=self.no_enc_pt)
            start["encoder"] = "random" if self.no_enc_pt else found["name"]
            checksums["encoder"] = found["weights_sha256"]
        if self.mil_init:
            checksums["mil"] = file_sha256(_of_fold(self.mil_init, fold))
        return {"start": start, "start_sha256": checksums}

    def load(self, model: nn.Module, fold: int) -> None:
        """Give ``model`` the weights of a fold; ``Refused`` when they do not fit."""
        own: Any = model
        if self.encoder:
            from models.e2e_encoders import load_pretrained

            found = load_pretrained(own.encoder, self.encoder, init=self.enc_init, fold=fold,
                                    random=self.no_enc_pt)
            if left_out := found.get("left_out"):
                print(f"note: fold {fold}: {self.encoder} starts from {found['name']}, of which "
                      f"{', '.join(left_out)} is left out")
        if self.mil_init:
            _load_slide_model(own.mil if self.encoder else own, _of_fold(self.mil_init, fold))


def starting_weights(model_type: str, *, enc_init: Path | None, no_enc_pt: bool,
                     mil_init: Path | None) -> StartingWeights | None:
    """What the flags ask for; None for a model without an encoder that starts at random.

    ``Refused`` for two flags that contradict each other, and for one without effect.
    """
    encoder = split_name(model_type)[0]
    given = [f"--{name}" for name, value in (("enc_init", enc_init), ("no_enc_pt", no_enc_pt))
             if value]
    if given and not encoder:
        raise Refused(f"{given[0]} belongs to e2e and streaming models, {model_type} has no "
                      "encoder: leave it out")
    if len(given) > 1:
        raise Refused("--enc_init gives weights, --no_enc_pt wants none: choose one")
    if not (encoder or mil_init):
        return None
    return StartingWeights(encoder=encoder, enc_init=enc_init, no_enc_pt=no_enc_pt,
                           mil_init=mil_init)


def _of_fold(path: Path, fold: int) -> Path:
    """The checkpoint of a fold, or the one for all; ``Refused`` when there is none."""
    found = path / f"s_{fold}_checkpoint.pt" if path.is_dir() else path
    if not found.is_file():
        raise Refused(f"--mil_init: {found} is not there: give a checkpoint of main.py, or a "
                      "folder with one a fold")
    return found


def _load_slide_model(model: nn.Module, path: Path) -> None:
    from models.checkpoints import clean_state_dict, state_dict_in

    try:
        state, _ = state_dict_in(load_torch(path), averaged=False)
        clean, _ = clean_state_dict(state, model)
    except (BrokenFile, Refused) as error:
        raise Refused(f"--mil_init {path}: {str(error).removeprefix('checkpoint: ')}: it must be "
                      "of the same slide model, options and classes") from None
    model.load_state_dict(clean)
