"""One vector a slide: what is written, going on, what is missing, the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from datasets.extraction_plan import list_levels, plan_works
from datasets.slide_features import (
    FeatureSet,
    check_slide_features,
    encode_features,
    write_tables,
)
from models.slide_encoders import load_slide_encoder
from tests.feature_inputs import Inputs, MeanColour, grid_coords, make_inputs, write_patches
from tests.unit.test_datasets_extraction import ENCODER, extraction, run
from utils.errors import ItemFailed, Refused
from utils.locks import claim
from utils.report import Row, RunReport, Status
from utils.storage import read_h5

SLIDES = ("slide_0", "slide_1", "slide_2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs") / "cohort")


def extracted(inputs: Inputs, feat_dir: Path, *, layout: Any = "clam") -> FeatureSet:
    one = FeatureSet(feat_dir=feat_dir, encoder="mean", layout=layout)
    for folder in one.folders():
        folder.mkdir(parents=True, exist_ok=True)
    works = plan_works({name: inputs.slides / f"{name}.tif" for name in SLIDES},
                       list_levels(inputs.patches_root, feat_dir, ()), RunReport("features"),
                       encoders={"": ENCODER}, backend="auto", redo=False, allow_dropped=False,
                       layout=layout)
    run(works, extraction(load=lambda device: MeanColour()))
    return one


def encode(one: FeatureSet, *names: str, redo: bool = False, **missing: Row) -> dict[str, Row]:
    encoders = [load_slide_encoder(name) for name in names]
    return {row.item: row for row in encode_features(SLIDES, [one], encoders, missing=missing,
                                                     redo=redo)}


@pytest.mark.parametrize("layout", ["clam", "trident", "atlaspatch"])
def test_a_vector_and_its_record(inputs: Inputs, tmp_path: Path, layout: str) -> None:
    one = extracted(inputs, tmp_path, layout=layout)
    rows = encode(one, "mean", "mean_max")
    assert [rows[f"{name} mean"].status for name in SLIDES] == [Status.DONE, Status.EMPTY,
                                                                Status.DONE]
    assert rows["slide_0 mean_max"].numbers == {"dim": 6}
    folder = tmp_path / "slide_features" / ("" if layout == "clam" else "mean")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.h5")) == [
        f"{name}/slide_{number}.h5" for name in ("mean", "mean_max") for number in (0, 2)]
    data = read_h5(folder / "mean_max/slide_0.h5")
    features = read_features_of(one, "slide_0")
    np.testing.assert_allclose(data.arrays["features"][:3], features.mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(data.arrays["features"][3:], features.max(axis=0))
    assert data.parameters is not None and len(data.parameters["features_sha256"]) == 64
    assert data.root["encoder"] == "mean" and data.root["slide_encoder"] == "mean_max"


def read_features_of(one: FeatureSet, slide_id: str) -> np.ndarray:
    from datasets.feature_layouts import read_features

    return read_features(one.features(slide_id)).arrays["features"]


def test_going_on_and_changed_features(inputs: Inputs, tmp_path: Path) -> None:
    moved = Inputs(inputs.slides, tmp_path / "out", inputs.csv)
    for number, count in enumerate((20, 0, 13)):
        write_patches(moved.patches_root, f"slide_{number}", grid_coords(count))
    one = extracted(moved, tmp_path / "f")
    encode(one, "mean")
    again = encode(one, "mean")
    assert again["slide_0 mean"].status is again["slide_2 mean"].status is Status.SKIPPED
    assert encode(one, "mean", redo=True)["slide_0 mean"].status is Status.DONE
    write_patches(moved.patches_root, "slide_0", grid_coords(9))
    extracted(moved, tmp_path / "f")
    path = tmp_path / "f/slide_features/mean/slide_0.h5"
    before = read_h5(path).arrays["features"]
    rows = encode(one, "mean")
    assert rows["slide_0 mean"].status is Status.DONE
    assert rows["slide_2 mean"].status is Status.SKIPPED
    assert (read_h5(path).arrays["features"] != before).any()
    path.write_bytes(b"damaged")
    assert encode(one, "mean")["slide_0 mean"].status is Status.DONE


def test_what_is_missing_or_held_is_listed(inputs: Inputs, tmp_path: Path) -> None:
    one = extracted(inputs, tmp_path)
    one.features("slide_2").path.write_bytes(b"damaged")
    lost = Row(item="slide_0", status=Status.FAILED, reason="half a TIFF")
    rows = encode(one, "mean", slide_0=lost)
    assert rows["slide_0 mean"].status is Status.FAILED
    assert rows["slide_0 mean"].reason == "has no features: half a TIFF"
    assert "cannot be read" in rows["slide_2 mean"].reason
    with claim(tmp_path / "slide_features/mean/slide_0.h5"):
        assert encode(one, "mean")["slide_0 mean"].status is Status.BUSY


class Other:
    """A slide encoder that says of itself what the test wants."""

    def __init__(self, name: str, record: dict[str, Any], vector: np.ndarray | None = None
                 ) -> None:
        self.name, self._record, self._vector = name, record, vector

    def record(self) -> dict[str, Any]:
        return self._record

    def encode(self, features: np.ndarray, coords: np.ndarray) -> np.ndarray:
        if self._vector is None:
            raise ItemFailed("out of ideas")
        return self._vector


def test_vectors_of_another_encoder_of_the_name_are_refused(inputs: Inputs, tmp_path: Path
                                                            ) -> None:
    """A20"""
    one = extracted(inputs, tmp_path)
    mean = load_slide_encoder("mean")
    check_slide_features(SLIDES, [one], [mean])
    encode(one, "mean")
    check_slide_features(SLIDES, [one], [mean])
    other = Other("mean", {"name": "mean", "plugin_sha256": "1"})
    with pytest.raises(Refused, match="made by another slide encoder mean"):
        check_slide_features(SLIDES, [one], [other])
    with pytest.raises(Refused, match="two of them are called mean"):
        check_slide_features(SLIDES, [one], [mean, other])


def test_the_table_has_the_vectors_to_the_last_bit(inputs: Inputs, tmp_path: Path) -> None:
    one = extracted(inputs, tmp_path)
    vector = np.float32([1 / 3, -1e-30, 16777217])
    encoders = [load_slide_encoder("mean"), Other("odd", {"name": "odd"}, vector),
                Other("failing", {"name": "failing"})]
    rows = list(encode_features(SLIDES, [one], encoders, missing={}, redo=False))
    assert [row.reason for row in rows if row.status is Status.FAILED] == ["out of ideas"] * 2
    write_tables(SLIDES, [one], encoders, rows)
    table = pd.read_csv(tmp_path / "slide_features/odd.csv", dtype={"slide_id": str})
    assert table["slide_id"].tolist() == ["slide_0", "slide_2"]
    np.testing.assert_array_equal(table[["f0", "f1", "f2"]].to_numpy(np.float32)[1], vector)
    mean = pd.read_csv(tmp_path / "slide_features/mean.csv")
    np.testing.assert_array_equal(
        mean.iloc[1, 1:].to_numpy(np.float32),
        read_h5(tmp_path / "slide_features/mean/slide_2.h5").arrays["features"])
    assert len(pd.read_csv(tmp_path / "slide_features/failing.csv")) == 0
