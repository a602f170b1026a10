"""Names of slide models, alone and behind an encoder."""

from __future__ import annotations

import pytest

from models.model_names import (
    MIL_NAMES,
    is_end_to_end,
    is_streaming,
    known_name,
    material_of,
    mil_name,
    split_name,
)
from models.slide_models import SLIDE_MODELS
from utils.errors import Refused


def test_the_names_are_those_of_the_registry() -> None:
    assert sorted(SLIDE_MODELS) == sorted(MIL_NAMES)


@pytest.mark.parametrize(("name", "parts"), [
    ("abmilx", ("", "abmilx")),
    ("e2e_r18_abmilx", ("r18", "abmilx")),
    ("e2e_r18_clam_sb", ("r18", "clam_sb")),  # cut to "clam" by the original
    ("e2e_r50v2_hag_mil", ("r50v2", "hag_mil")),
    ("e2e_r50_mil", ("r50", "mil")),
    ("e2e_tf_efficientnet_lite0_abmil", ("tf_efficientnet_lite0", "abmil")),
    ("e2e_timm:vit_tiny_patch16_224_max", ("timm:vit_tiny_patch16_224", "max"))])
def test_an_end_to_end_name_is_an_encoder_and_the_longest_slide_model(
    name: str, parts: tuple[str, str]
) -> None:
    assert split_name(name) == parts
    assert mil_name(name) == parts[1]
    assert is_end_to_end(name) == bool(parts[0])


@pytest.mark.parametrize(("name", "network"), [
    ("streaming_resnet34", "resnet34"), ("streaming_timm:resnet18", "timm:resnet18"),
    ("streaming_resnet_max", "resnet_max")])  # what follows the network is no part of the name
def test_a_streaming_name_is_a_network(name: str, network: str) -> None:
    assert split_name(name) == (network, "")
    assert mil_name(name) == ""
    assert is_streaming(name) and known_name(name) and not is_end_to_end(name)


def test_each_kind_of_model_has_its_material() -> None:
    assert [material_of(name) for name in ("abmil", "e2e_r18_abmil", "streaming_r18")] == [
        "features", "patches", "images"]


@pytest.mark.parametrize(("name", "words"), [
    ("streaming_", "lacks the network: .*streaming_resnet34"),
    ("abmlx", "did you mean 'abmilx'"), ("e2e_r18_foo", "ends in no slide model"),
    ("e2e_abmilx", "ends in no slide model"), ("e2e__abmilx", "ends in no slide model")])
def test_others_are_refused_with_a_hint(name: str, words: str) -> None:
    assert not known_name(name)
    with pytest.raises(Refused, match=words):
        split_name(name)
