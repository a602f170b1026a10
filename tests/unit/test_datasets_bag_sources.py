"""Which flags say where bags come from, by what the model learns from."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datasets.bag_sources import (
    PixelSource,
    PixelSourceOptions,
    TrainingSourceOptions,
    pixel_source,
)
from utils.contracts import Material
from utils.errors import Refused


def flags_of(kind: type, **given: Any) -> SimpleNamespace:
    """The flags of a script as they are by default, but for those given."""
    return SimpleNamespace(**{**{item.name: item.default for item in fields(kind)}, **given})


@pytest.mark.parametrize(("flags", "material", "words"), [
    ({"patches": "p.lmdb"}, "features", "--patches has no effect: it learns from features"),
    ({"same_psize": 4}, "features", "--same_psize has no effect"),
    ({"data_slide_dir": Path("s")}, "features", "--data_slide_dir has no effect"),
    ({"image_augment": True}, "features", "--image_augment has no effect"),
    ({}, "patches", "--patches is missing: it learns from patches"),
    ({"patches": "p.lmdb", "data_root_dir": Path("f")}, "patches", "--data_root_dir has no effect"),
    ({"patches": "p.lmdb", "lazy_children": True}, "patches", "--lazy_children has no effect"),
    ({"patches": "p.lmdb", "image_size": 64}, "patches", "--image_size has no effect"),
    ({}, "images", "--slide_images is missing: it learns from whole slides"),
    ({"slide_images": Path("i"), "patches": "p"}, "images",
     "--patches has no effect: it learns from whole images"),
    ({"slide_images": Path("i"), "cache": "ram"}, "images", "--cache has no effect")])
def test_sources_that_do_nothing_are_refused(
    flags: dict[str, Any], material: Material, words: str
) -> None:
    with pytest.raises(Refused, match=words):
        pixel_source(flags_of(TrainingSourceOptions, **flags), model_type="it", material=material)


def test_features_have_no_source_of_pixels() -> None:
    assert pixel_source(flags_of(TrainingSourceOptions, data_root_dir=Path("f")),
                        model_type="it", material="features") is None
    assert pixel_source(flags_of(PixelSourceOptions, lazy_children=True, data_slide_dir=Path("s")),
                        model_type="it", material="features") is None


def source(kind: type, material: Material, *, whole: bool = False, **given: Any) -> PixelSource:
    found = pixel_source(flags_of(kind, **given), model_type="it", material=material,
                         trained={"image_size": 512, "whole_images": whole})
    assert found is not None
    return found


def test_training_draws_and_evaluation_does_not() -> None:
    training = source(TrainingSourceOptions, "patches", patches="p.lmdb", same_psize=7)
    assert (training.place["patches"], training.draws["same_psize"]) == ("p.lmdb", 7)
    assert source(PixelSourceOptions, "patches", patches="p.lmdb", num_workers=4).draws == {}
    images = source(TrainingSourceOptions, "images", slide_images=Path("i"), colour_jitter=0.1)
    assert images.draws["colour_jitter"] == 0.1


def test_evaluation_sees_images_as_training_did_unless_told_otherwise() -> None:
    place = source(PixelSourceOptions, "images", image_mpp=2.0, data_slide_dir=Path("s")).place
    assert place["image_size"] == 512
    place = source(PixelSourceOptions, "images", slide_images=Path("i"), image_size=64).place
    assert place["image_size"] == 64


def test_a_model_judged_on_whole_images_is_evaluated_on_them() -> None:
    """Else eval.py would find other figures than main.py on the same slides."""
    for whole, size, expected in ((True, None, True), (False, None, False), (True, 64, False)):
        place = source(PixelSourceOptions, "images", whole=whole, slide_images=Path("i"),
                       image_size=size).place
        assert place["whole_images"] is expected
