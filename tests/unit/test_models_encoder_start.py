"""The weights that an encoder starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.encoder_start import encoder_start
from models.slide_models import SlideModelSpec, build_slide_model
from utils.errors import Refused

NAME = "e2e_test_resnet_mean"  # timm's smallest


def test_models_without_an_encoder_have_no_start() -> None:
    assert encoder_start("abmil", enc_init=None, no_enc_pt=False) is None
    for given in ({"enc_init": Path("w.pt"), "no_enc_pt": False},
                  {"enc_init": None, "no_enc_pt": True}):
        with pytest.raises(Refused, match="belongs to e2e models, abmil has no encoder"):
            encoder_start("abmil", **given)  # type: ignore[arg-type]


def test_weights_and_none_at_once_are_refused() -> None:
    with pytest.raises(Refused, match="choose one"):
        encoder_start(NAME, enc_init=Path("w.pt"), no_enc_pt=True)


def test_weights_of_a_file_are_loaded_and_told(tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    spec = SlideModelSpec(model_type=NAME, embed_dim=80, n_classes=2)
    torch.manual_seed(1)
    source = build_slide_model(spec)
    torch.save({**source.encoder.model.state_dict(), "fc.weight": torch.zeros(3, 80)},
               tmp_path / "w.pt")
    start = encoder_start(NAME, enc_init=tmp_path / "w.pt", no_enc_pt=False)
    assert start is not None
    model = build_slide_model(spec)
    start.load(model, 0)
    for mine, its in zip(model.encoder.state_dict().values(),
                         source.encoder.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
    assert "fc is left out" in capsys.readouterr().out
    assert len(start.record(0)["weights_sha256"]) == 64


def test_a_random_start_has_no_checksum_and_loads_nothing() -> None:
    start = encoder_start(NAME, enc_init=None, no_enc_pt=True)
    assert start is not None and start.record(0)["weights_sha256"] is None
    model = build_slide_model(SlideModelSpec(model_type=NAME, embed_dim=80, n_classes=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start.load(model, 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
