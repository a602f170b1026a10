"""GeoJSON for QuPath: what is written, tissue read back, and what a person drew."""

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
from wsi_core.geojson import (
    attention_features,
    read_annotations,
    read_tissue,
    restrict,
    tissue_features,
    write_contours,
    write_geojson,
)
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


# ---------------------------------------------------------------------------- annotations

SLIDE = (30_000, 24_000)


def drawn(ring: Any, name: str | None = None, **properties: Any) -> dict[str, Any]:
    """A feature as QuPath exports it."""
    if name is not None:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    return {"type": "Feature", "id": str(uuid.uuid4()),
            "geometry": {"type": "Polygon", "coordinates": [ring], "isEllipse": False,
                         "plane": {"c": -1, "z": 0, "t": 0}},
            "properties": {"objectType": "annotation", **properties}}


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def save(path: Path, *features: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def test_contours_come_back_to_the_pixel_and_may_be_edited(tmp_path: Path, tissue: Tissue) -> None:
    path = tmp_path / "s.geojson"
    write_contours(path, tissue, slide_id="s", slide_size=SLIDE)
    value = json.loads(path.read_text())
    assert not any(feature["properties"]["isLocked"] for feature in value["features"])
    assert value["milwright"] == {"slide_id": "s", "slide_size": [*SLIDE], "unit": "level-0 px"}
    found = read_annotations(path, slide_size=SLIDE)
    assert found.tissue is not None and (found.skipped, found.repaired) == (0, 0)
    for ours, read in zip([*tissue.contours, *tissue.holes[0]],
                          [*found.tissue.contours, *found.tissue.holes[0]], strict=True):
        assert np.array_equal(ours, read)
    with pytest.raises(BrokenFile, match="another slide"):
        read_annotations(path, slide_size=(30_000, 24_001))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1, 70), sigma=st.integers(1, 4))
def test_round_trip_of_any_mask(tmp_path_factory: pytest.TempPathFactory, seed: int, scale: float,
                                sigma: int) -> None:
    """Outlines as segmentation makes them, pinched and doubled back, are equal point by point."""
    noise = np.random.default_rng(seed).random((60, 80))
    mask = (cv2.GaussianBlur(noise, (0, 0), sigma) > 0.5).astype(np.uint8)
    outlines, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    points = [(outline[:, 0] * scale).astype(np.int32) for outline in outlines]
    tissue = Tissue()
    for index, outline in enumerate(points):
        if hierarchy[0][index][3] < 0 and len(outline) >= 3:
            tissue.contours.append(outline)
            tissue.holes.append([points[hole] for hole in range(len(points))
                                 if hierarchy[0][hole][3] == index and len(points[hole]) >= 3])
    path = tmp_path_factory.mktemp("g") / "t.geojson"
    write_contours(path, tissue, slide_id="s", slide_size=SLIDE)
    found = read_annotations(path, slide_size=SLIDE)
    assert found.repaired == 0 and found.tissue is not None
    assert [contour.tolist() for contour in found.tissue.contours] == [
        contour.tolist() for contour in tissue.contours]
    assert [[hole.tolist() for hole in holes] for holes in found.tissue.holes] == [
        [hole.tolist() for hole in holes] for holes in tissue.holes]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), radius=st.floats(20, 9000))
def test_floats_keep_their_area_within_a_ring_of_one_pixel(
        tmp_path_factory: pytest.TempPathFactory, seed: int, radius: float) -> None:
    """QuPath's brush and polygon tools give fractions of pixels."""
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.random(80)) * 2 * np.pi
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (
        radius * (0.6 + 0.4 * rng.random(80)))[:, None] + 12_000.3
    path = save(tmp_path_factory.mktemp("g") / "t.geojson",
                drawn([*points.tolist(), points[0].tolist()]))
    tissue = read_annotations(path, slide_size=SLIDE).tissue
    assert tissue is not None
    x, y = points.T
    exact = abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    ring = float(np.hypot(*(points - np.roll(points, -1, axis=0)).T).sum())
    assert sum(map(cv2.contourArea, tissue.contours)) == pytest.approx(exact, abs=ring)


def test_classes_tell_regions_from_what_is_ignored(tmp_path: Path) -> None:
    names = {"tissue": [None, "Tumor", "tissue", "Regional lymph node", "Stroma"],
             "region": ["Region*", "region", "ROI", "Region*: core"],
             "ignored": ["Ignore*", "ignore", "Exclude", "Artefact: fold", "Necrosis*"]}
    path = save(tmp_path / "q.geojson", *(drawn(square(100, 100, 50), name)
                                          for group in names.values() for name in group))
    found = read_annotations(path, slide_size=SLIDE)
    assert found.tissue is not None
    assert len(found.tissue.contours) == len(names["tissue"])
    assert len(found.regions) == len(names["region"])
    assert len(found.ignored) == len(names["ignored"])


def test_other_ways_to_write_a_class(tmp_path: Path) -> None:
    derived, text, old = (drawn(square(0, 0, 50)) for _ in range(3))
    derived["properties"]["classification"] = {"names": ["Region*", "core"], "color": [1, 2, 3]}
    text["properties"]["classification"] = "Ignore*"
    old["properties"] = None
    found = read_annotations(save(tmp_path / "q.geojson", derived, text, old), slide_size=SLIDE)
    assert len(found.regions) == len(found.ignored) == 1
    assert found.tissue is not None and len(found.tissue.contours) == 1


def test_no_tissue_and_tissue_that_is_empty_are_two_things(tmp_path: Path) -> None:
    """Only regions: nothing said of tissue. No object at all: a person took all tissue away."""
    path = save(tmp_path / "q.geojson", drawn(square(0, 0, 50), "Region*"))
    assert read_annotations(path, slide_size=SLIDE).tissue is None
    found = read_annotations(save(tmp_path / "q.geojson"), slide_size=SLIDE)
    assert found.tissue is not None and found.tissue.contours == []


def test_collections_of_geometries_and_bare_geometries(tmp_path: Path) -> None:
    path = tmp_path / "q.geojson"
    parts = [{"type": "Point", "coordinates": [1, 2]},
             {"type": "Polygon", "coordinates": [square(0, 0, 50)]},
             {"type": "MultiPolygon", "coordinates": [[square(100, 0, 50), square(110, 10, 5)]]}]
    path.write_text(json.dumps({"type": "Feature", "properties": {}, "geometry": {
        "type": "GeometryCollection", "geometries": parts}}))
    found = read_annotations(path, slide_size=SLIDE).tissue
    assert found is not None and [len(holes) for holes in found.holes] == [0, 1]
    path.write_text(json.dumps(parts[1]))
    bare = read_annotations(path, slide_size=SLIDE).tissue
    assert bare is not None and len(bare.contours) == 1


def test_cells_and_detections_are_not_tissue(tmp_path: Path, tissue: Tissue) -> None:
    """A heatmap's file, or QuPath's nuclei, must not become ten thousand pieces of tissue."""
    cells = attention_features(np.ones(3), np.zeros((3, 2), int), slide_id="s",
                               patch_px_l0=(256, 256), colours=colour_table("jet"))
    path = save(tmp_path / "q.geojson", *tissue_features(tissue, slide_id="s"), *cells)
    found = read_annotations(path, slide_size=SLIDE)
    assert found.tissue is not None and len(found.tissue.contours) == 2 and found.skipped == 3
    with pytest.raises(BrokenFile, match="none of them a drawn polygon"):
        read_annotations(save(path, *cells), slide_size=SLIDE)


def test_edited_in_qupath(tmp_path: Path, tissue: Tissue) -> None:
    """The whole way: out, a piece deleted, a region drawn, an artefact marked, in."""
    path = tmp_path / "s.geojson"
    write_contours(path, tissue, slide_id="s", slide_size=SLIDE)
    ours = json.loads(path.read_text())["features"]
    save(path, ours[0], drawn(square(0, 0, 5000), "Region*"),
         drawn(square(3500.5, 3500.5, 500), "Ignore*"))
    found = read_annotations(path, slide_size=SLIDE)
    assert found.tissue is not None and len(found.tissue.contours) == 1
    left = restrict(found.tissue, found.regions, found.ignored, slide_size=SLIDE)
    points = np.concatenate(left.contours)
    assert points.max() <= 5000 and len(left.contours) >= 1

    def covered(x: int, y: int) -> bool:
        return any(cv2.pointPolygonTest(contour, (x, y), False) > 0
                   and not any(cv2.pointPolygonTest(hole, (x, y), False) > 0 for hole in holes)
                   for contour, holes in zip(left.contours, left.holes, strict=True))

    assert covered(4300, 4300) and not covered(4500, 5100)
    assert not covered(3990, 3990) and covered(4010, 4010)  # the artefact, and just beside it
