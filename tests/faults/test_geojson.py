"""Fault C9: GeoJSON that is empty, crossed, of another frame, huge, or no GeoJSON at all.

Each is either used (with a count of what was repaired or left out) or refused in one line that
names the file; never a trace, never a wait.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from utils.errors import BrokenFile
from wsi_core.geojson import read_annotations

SLIDE = (60_000, 50_000)
SQUARE = [[100, 100], [900, 100], [900, 900], [100, 900], [100, 100]]


def save(path: Path, *geometries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [
        {"type": "Feature", "geometry": geometry, "properties": {"objectType": "annotation"}}
        for geometry in geometries]}))
    return path


def polygon(*rings: Any) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": list(rings)}


def test_self_crossing_is_repaired_and_counted(tmp_path: Path) -> None:
    bow = [[1000, 1000], [3000, 3000], [3000, 1000], [1000, 3000], [1000, 1000]]
    found = read_annotations(save(tmp_path / "c.geojson", polygon(bow), polygon(SQUARE)),
                             slide_size=SLIDE)
    assert found.repaired == 1 and found.skipped == 0 and found.tissue is not None
    areas = sorted(map(cv2.contourArea, found.tissue.contours))
    assert sum(areas) == pytest.approx(800**2 + 2_000_000, abs=10_000)


def test_points_lines_and_slivers_are_skipped_and_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "c.geojson", polygon(SQUARE), {"type": "Point", "coordinates": [5, 5]},
                {"type": "LineString", "coordinates": SQUARE}, polygon([[0, 0], [5, 5], [0, 0]]),
                polygon([]), {"type": "MultiPolygon", "coordinates": []})
    found = read_annotations(path, slide_size=SLIDE)
    assert found.skipped == 5 and found.tissue is not None and len(found.tissue.contours) == 1
    points = save(path, {"type": "MultiPoint", "coordinates": [[5, 5]]})
    with pytest.raises(BrokenFile, match=r"c\.geojson holds 1 objects, none of them a drawn"):
        read_annotations(points, slide_size=SLIDE)


def test_wrong_frame_says_what_was_found(tmp_path: Path) -> None:
    """All outside: refused. One outside: left out and counted. Partly outside: used."""
    far = [[x + 70_000.4, y] for x, y in SQUARE]
    with pytest.raises(BrokenFile, match="60000 x 50000 px.*level-0 px.*x 70100 to 70900, y 100"):
        read_annotations(save(tmp_path / "c.geojson", polygon(far)), slide_size=SLIDE)
    found = read_annotations(save(tmp_path / "c.geojson", polygon(far), polygon(SQUARE)),
                             slide_size=SLIDE)
    assert found.skipped == 1 and found.tissue is not None and len(found.tissue.contours) == 1
    partly = save(tmp_path / "c.geojson", polygon([[x - 500, y] for x, y in SQUARE]))
    assert read_annotations(partly, slide_size=SLIDE).skipped == 0


@pytest.mark.parametrize("text", [
    "", "{", "7", "null", "[1]", '{"type": "FeatureCollection"}', '[{"geometry": null}]',
    '[{"geometry": {"type": "Polygon"}}]', '[{"geometry": {"type": "Polygon", "coordinates": 5}}]',
    '[{"geometry": {"type": "Polygon", "coordinates": [[1, 2, 3, 4, 5, 6, 7, 8]]}}]',
    '[{"geometry": {"type": "Polygon", "coordinates": [[[NaN, 0], [9, 9], [9, 0]]]}}]',
    '[{"geometry": {"type": "Polygon", "coordinates": [[[Infinity, 0], [9, 9], [9, 0]]]}}]',
    '[{"geometry": {"type": "Polygon", "coordinates": [[[null, 0], [9, 9], [9, 0]]]}}]',
    '[{"geometry": {"type": "Polygon", "coordinates": [[[1e300, 0], [9, 9], [9, 0]]]}}]',
    '[{"geometry": {"type": "Polygon", "coordinates": [[["a", 0], [9, 9], [9, 0]]]}}]',
    '[{"geometry": {"type": "GeometryCollection", "geometries": 3}}]', "[" * 100_000,
    '{"geometry": ' * 3 + '{"type": "GeometryCollection", "geometries": [{}]}' + "}" * 3,
], ids=range(18))
def test_what_is_no_geojson_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.geojson"
    path.write_text(text)
    with pytest.raises(BrokenFile, match=r"c\.geojson") as caught:
        read_annotations(path, slide_size=SLIDE)
    assert "\n" not in str(caught.value)


def test_missing_and_not_text(tmp_path: Path) -> None:
    with pytest.raises(BrokenFile, match="not readable GeoJSON"):
        read_annotations(tmp_path / "c.geojson", slide_size=SLIDE)
    (tmp_path / "c.geojson").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(BrokenFile, match="not readable GeoJSON"):
        read_annotations(tmp_path / "c.geojson", slide_size=SLIDE)


def test_byte_order_mark_and_extra_members(tmp_path: Path) -> None:
    path = save(tmp_path / "c.geojson", {**polygon([[*point, 0.5] for point in SQUARE]),
                                         "plane": {"z": 0}, "crs": None})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = read_annotations(path, slide_size=SLIDE).tissue
    assert found is not None and found.contours[0].tolist() == SQUARE[:-1]


def test_file_over_the_ceiling_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "c.geojson"
    with path.open("wb") as file:
        file.truncate(300 * 2**20)
    start = time.process_time()
    with pytest.raises(BrokenFile, match="over the ceiling of 256 MiB"):
        read_annotations(path, slide_size=SLIDE)
    assert time.process_time() - start < 0.5


def test_a_million_vertices_are_read_in_seconds_and_a_scribble_is_refused(tmp_path: Path) -> None:
    angle = np.linspace(0, 2 * np.pi, 1_000_000)
    radius = 20_000 * (1 + 0.1 * np.sin(301 * angle))
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None] + 25_000
    path = save(tmp_path / "c.geojson", polygon(ring.round(2).tolist()))
    start = time.process_time()
    found = read_annotations(path, slide_size=SLIDE)
    assert time.process_time() - start < 8
    assert found.repaired == 0 and found.tissue is not None
    assert len(found.tissue.contours[0]) >= 999_999
    scribble = np.random.default_rng(0).integers(0, 50_000, (50_000, 2)).tolist()
    start = time.process_time()
    with pytest.raises(BrokenFile, match="feature 0: .*encloses no area: draw it again"):
        read_annotations(save(path, polygon(scribble)), slide_size=SLIDE)
    assert time.process_time() - start < 2
