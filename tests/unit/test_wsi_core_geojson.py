"""GeoJSON for QuPath: what is written, and tissue read back."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import BrokenFile
from wsi_core.geojson import attention_features, read_tissue, tissue_features, write_geojson
from wsi_core.heatmap import colour_table
from wsi_core.tissue import Tissue


def ragged(seed: int, centre: int, radius: int) -> np.ndarray:
    """A star-shaped outline."""
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.random(200)) * 2 * np.pi
    length = radius * (0.8 + 0.2 * rng.random(200))
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * length[:, None] + centre
    return np.rint(points).astype(np.int32)


@pytest.fixture
def tissue() -> Tissue:
    return Tissue([ragged(0, 5000, 3000), ragged(1, 20_000, 900)],
                  [[ragged(2, 5000, 400), ragged(3, 6000, 200)], []])


def test_tissue_round_trip_is_exact(tmp_path: Path, tissue: Tissue) -> None:
    write_geojson(tmp_path / "t.geojson", tissue_features(tissue, slide_id="s"),
                  extra={"milwright": {"a": np.int64(1)}})
    found = read_tissue(tmp_path / "t.geojson")
    assert found.skipped == 0 and found.extra == {"milwright": {"a": 1}}
    for ours, read in zip(tissue.contours, found.tissue.contours, strict=True):
        assert np.array_equal(ours, read)
        assert cv2.contourArea(ours) == cv2.contourArea(read)
    assert [len(holes) for holes in found.tissue.holes] == [2, 0]
    assert np.array_equal(found.tissue.holes[0][1], tissue.holes[0][1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(-10, 10**6), st.integers(-10, 10**6)),
                         min_size=3, max_size=20, unique=True), max_size=4))
def test_round_trip_of_any_outline(tmp_path_factory: pytest.TempPathFactory,
                                   outlines: list[list[tuple[int, int]]]) -> None:
    path = tmp_path_factory.mktemp("g") / "t.geojson"
    tissue = Tissue([np.array(points, np.int32) for points in outlines], [[] for _ in outlines])
    write_geojson(path, tissue_features(tissue, slide_id="s"))
    found = read_tissue(path).tissue
    assert [points.tolist() for points in found.contours] == [
        points.tolist() for points in tissue.contours]


def test_what_qupath_needs(tissue: Tissue) -> None:
    """objectType, classification with colour, measurements, closed rings, unique UUIDs."""
    scores = np.array([0.0, 0.35, 0.999, 1.0])
    coords = np.array([[0, 0], [256, 0], [512, 0], [768, 512]])
    cells = attention_features(scores, coords, slide_id="s", patch_px_l0=(256, 256),
                               colours=colour_table("jet"))
    features = [*tissue_features(tissue, slide_id="s"), *cells]
    ids = [uuid.UUID(feature["id"]) for feature in features]
    assert len(set(ids)) == len(features)
    for feature in json.loads(json.dumps(features)):
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1] and len(ring) >= 4
            assert all(isinstance(value, int) for point in ring for value in point)
    assert {feature["properties"]["objectType"] for feature in features} == {
        "annotation", "detection"}
    last = cells[-1]
    assert last["geometry"]["coordinates"][0][2] == [1024, 768]  # level-0 px
    assert last["properties"]["measurements"] == {"attention": 1.0}
    names = [cell["properties"]["classification"]["name"] for cell in cells]
    assert names == ["Attention 0.0-0.2", "Attention 0.2-0.4", "Attention 0.8-1.0",
                     "Attention 0.8-1.0"]
    colours = [cell["properties"]["classification"]["color"] for cell in cells]
    assert colours[0] != colours[2] and all(0 <= part <= 255 for part in sum(colours, []))


def test_ids_are_stable_and_differ_between_slides(tissue: Tissue) -> None:
    one, again, other = (tissue_features(tissue, slide_id=name) for name in ("a", "a", "b"))
    assert one == again
    assert not {feature["id"] for feature in one} & {feature["id"] for feature in other}


def test_min_score_keeps_files_small() -> None:
    scores, coords = np.linspace(0, 1, 11), np.zeros((11, 2), int)
    cells = attention_features(scores, coords, slide_id="s", patch_px_l0=(8, 8),
                               colours=colour_table("jet"), min_score=0.5)
    assert [cell["properties"]["measurements"]["attention"] for cell in cells] == [
        0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def polygon(*rings: list[list[float]], kind: str = "Polygon") -> dict[str, Any]:
    coordinates: Any = list(rings) if kind == "Polygon" else [[ring] for ring in rings]
    return {"type": "Feature", "properties": {}, "geometry": {"type": kind,
                                                              "coordinates": coordinates}}


RING = [[0.4, 0.6], [100.2, 0], [100, 100], [0.4, 0.6]]


@pytest.mark.parametrize("value", [
    {"type": "FeatureCollection", "features": [polygon(RING)]}, polygon(RING), [polygon(RING)]],
    ids=["collection", "feature", "list"])
def test_the_three_shapes_qupath_writes(tmp_path: Path, value: Any) -> None:
    (tmp_path / "q.geojson").write_text(json.dumps(value))
    found = read_tissue(tmp_path / "q.geojson").tissue
    assert found.contours[0].tolist() == [[0, 1], [100, 0], [100, 100]]


def test_multipolygon_points_and_empty(tmp_path: Path) -> None:
    path = tmp_path / "q.geojson"
    point = {"type": "Feature", "properties": {}, "geometry": {"type": "Point",
                                                              "coordinates": [1, 2]}}
    path.write_text(json.dumps([polygon(RING, RING, kind="MultiPolygon"), point]))
    found = read_tissue(path)
    assert len(found.tissue.contours) == 2 and found.skipped == 1
    path.write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    assert read_tissue(path).tissue.contours == []
    path.write_text(json.dumps([point]))
    with pytest.raises(BrokenFile, match="none of them a polygon"):
        read_tissue(path)


@pytest.mark.parametrize("text", [
    "", "{", "7", '{"type": "FeatureCollection"}', '[{"geometry": null}]', "[1]",
    '[{"geometry": {"type": "Polygon", "coordinates": [[[NaN, 0], [1, 1], [2, 0]]]}}]',
    '[{"geometry": {"type": "Polygon", "coordinates": [[[1e300, 0], [1, 1], [2, 0]]]}}]',
    '[{"geometry": {"type": "Polygon", "coordinates": [[["a", 0], [1, 1], [2, 0]]]}}]',
    '[{"geometry": {"type": "Polygon", "coordinates": 5}}]'])
def test_what_is_no_geojson_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "q.geojson"
    path.write_text(text)
    with pytest.raises(BrokenFile, match=r"q\.geojson"):
        read_tissue(path)
