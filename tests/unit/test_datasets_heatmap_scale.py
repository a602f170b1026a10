"""Patches of a heatmap against those of the training."""

from __future__ import annotations

from typing import Any

import pytest

from datasets.heatmap_scale import ImageScale, TrainedScale

TRAINED = {"px": [256], "mpp_um": [0.5]}


@pytest.mark.parametrize(("facts", "px", "mpp_um", "expected"), [
    (TRAINED, 256, 0.5, ""),
    (TRAINED, 256, 0.504, ""),  # grids of whole pixels meet a scale only about
    (TRAINED, 512, 0.25, ""),  # shows the same square of tissue
    (TRAINED, 256, None, ""),
    (TRAINED, 256, 0.25, "trained on patches of 256 px at 0.5 um/px, these are 256 px at 0.25 um"),
    (TRAINED, 224, None, "these are 224 px at unknown um/px"),
    ({"px": [256], "mpp_um": [0.5, 2.0]}, 256, 2.0, ""),
    ({"px": [256], "mpp_um": [0.5, 2.0]}, 256, 1.0, "0.5 or 2 um/px"),
    ({"px": [256], "mpp_um": []}, 128, 0.5, "256 px at unknown um/px, these are 128 px at 0.5"),
    ({**TRAINED, "low": {"px": [256], "mpp_um": [2.0]}}, 256, 2.0, ""),
    ({**TRAINED, "low": {"px": [128], "mpp_um": [2.0]}}, 256, 2.0,
     "of 256 px at 0.5 um/px and 128 px at 2 um/px, these are 256 px at 2 um/px"),
    ({}, 7, 7.0, "")])
def test_what_differs(facts: dict[str, Any], px: int, mpp_um: float | None, expected: str
                      ) -> None:
    found = TrainedScale(facts).difference(px, mpp_um)
    assert expected in found and bool(found) == bool(expected)


def test_the_same_difference_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    scale = TrainedScale(TRAINED)
    for slide_id, mpp_um in (("a", 0.25), ("b", 0.25), ("c", 1.0), ("d", 0.5)):
        scale.warn(slide_id, 256, mpp_um)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["a", "c"]
    assert lines[0].endswith("set patch_size and patch_mpp as in training")


@pytest.mark.parametrize(("trained", "mpp_um", "expected"), [
    ([2.0], 2.0, ""), ([2.0], 2.02, ""), ([], 2.0, ""), ([2.0], None, ""), ([1.0, 2.0], 1.0, ""),
    ([1.0, 4.0], 2.0, "on images of 1 or 4 um/px, this one has 2 um/px")])
def test_images_are_compared_by_their_scale_alone(
    trained: list[float], mpp_um: float | None, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = ImageScale({"mpp_um": trained})
    scale.warn("a", 32, mpp_um)
    scale.warn("b", 32, mpp_um)
    told = capsys.readouterr().err
    assert expected in told and told.count("\n") == bool(expected)
    assert not expected or told.endswith("give streaming_arguments the images, or the image_mpp, "
                                         "of the training\n")
