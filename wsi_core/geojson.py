"""GeoJSON that QuPath opens by drag and drop: tissue outlines and attention cells.

Coordinates are level-0 pixels, as QuPath wants them. Tissue goes out as locked annotations
(polygons with holes) and comes back from files that QuPath wrote; attention goes out as
detections with the measurement ``attention`` (0..1) and a class of colour by bins of it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import BrokenFile
from utils.storage import plain, write_text
from wsi_core.tissue import Tissue

Feature = dict[str, Any]

ATTENTION_BINS = 5
_NAMESPACE = uuid.UUID("6c1c0a2e-6f0b-5f0e-9d38-2f4c5b1f2a10")  # ids are equal from run to run


def _id(slide_id: str, kind: str, index: int) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{slide_id}/{kind}/{index}"))


def _ring(points: np.ndarray) -> list[list[int]]:
    """(n, 2) or (n, 1, 2) as a closed ring."""
    ring: list[list[int]] = points.reshape(-1, 2).tolist()
    return [*ring, ring[0]]


def tissue_features(tissue: Tissue, *, slide_id: str) -> list[Feature]:
    """One locked annotation a contour, with its holes; outlines of under 3 points are no area."""
    features = []
    for index, (contour, holes) in enumerate(zip(tissue.contours, tissue.holes, strict=True)):
        if len(contour) < 3:
            continue
        rings = [_ring(contour), *(_ring(hole) for hole in holes if len(hole) >= 3)]
        features.append({
            "type": "Feature", "id": _id(slide_id, "tissue", index),
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {"objectType": "annotation", "name": f"tissue {index}",
                           "classification": {"name": "Tissue", "color": [0, 160, 0]},
                           "isLocked": True}})
    return features


def attention_features(
    scores: np.ndarray, coords: np.ndarray, *, slide_id: str,
    patch_px_l0: tuple[float, float], colours: np.ndarray, min_score: float = 0.0,
    selected: np.ndarray | None = None,
) -> list[Feature]:
    """One detection a patch whose score reaches ``min_score``.

    scores: (N,) 0..1; coords: (N, 2) top-left, level-0 px; colours: (256, 3) uint8 RGB, from
    which each of the ``ATTENTION_BINS`` classes takes the colour of its middle.
    selected: (N,) bool, goes out as the property ``selected`` and, since QuPath shows only these,
    as a measurement of 0 or 1; None leaves both out
    """
    bins = np.clip((scores * ATTENTION_BINS).astype(int), 0, ATTENTION_BINS - 1)
    classes = [
        {"name": f"Attention {low / ATTENTION_BINS:.1f}-{(low + 1) / ATTENTION_BINS:.1f}",
         "color": colours[int((low + 0.5) / ATTENTION_BINS * 256)].tolist()}
        for low in range(ATTENTION_BINS)]
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) * np.asarray(patch_px_l0)
    rings = np.rint(coords[:, None, :] + corners).astype(np.int64)
    features = []
    for index in np.flatnonzero(scores >= min_score).tolist():
        properties: dict[str, Any] = {
            "objectType": "detection", "classification": classes[bins[index]],
            "measurements": {"attention": round(float(scores[index]), 6)}}
        if selected is not None:
            properties["selected"] = bool(selected[index])
            properties["measurements"]["selected"] = int(selected[index])
        features.append({
            "type": "Feature", "id": _id(slide_id, "attention", index),
            "geometry": {"type": "Polygon", "coordinates": [rings[index].tolist()]},
            "properties": properties})
    return features


def write_geojson(
    path: Path, features: Iterable[Feature], *, extra: Mapping[str, Any] | None = None
) -> None:
    """A FeatureCollection, whole or not at all; ``extra`` are further members of the top."""
    collection = {"type": "FeatureCollection", **plain(extra or {}), "features": list(features)}
    write_text(path, json.dumps(collection, separators=(",", ":"), ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class TissueFile:
    """Outlines read from GeoJSON, what could not be used, and the file's further members."""

    tissue: Tissue
    skipped: int  # features without area (points, lines), rings under 3 points
    extra: dict[str, Any]


def read_tissue(path: Path) -> TissueFile:
    """Polygons and MultiPolygons as ``Tissue`` in level-0 px (rounded to int32).

    Takes a FeatureCollection, one Feature or a list of them (QuPath writes all three).
    Raises ``BrokenFile`` for what is no GeoJSON, has coordinates that are no finite numbers of
    an image, or holds no polygon although it holds features.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFile(f"{path} is not readable GeoJSON ({error})") from None
    extra: dict[str, Any] = {}
    if isinstance(value, dict) and value.get("type") == "FeatureCollection":
        extra = {key: item for key, item in value.items() if key not in ("type", "features")}
        value = value.get("features")
    features = value if isinstance(value, list) else [value]
    contours: list[np.ndarray] = []
    holes: list[list[np.ndarray]] = []
    skipped = 0
    for number, feature in enumerate(features):
        polygons = _polygons(feature, where=f"{path}: feature {number}")
        for outer, *inner in polygons:
            if len(outer) >= 3:
                contours.append(outer)
                holes.append([ring for ring in inner if len(ring) >= 3])
        skipped += not any(len(rings[0]) >= 3 for rings in polygons)
    if features and not contours:
        raise BrokenFile(f"{path} holds {len(features)} objects, none of them a polygon")
    return TissueFile(Tissue(contours, holes), skipped, extra)


def _polygons(feature: Any, *, where: str) -> list[list[np.ndarray]]:
    """The rings of each polygon of a feature; none for points and lines."""
    try:
        geometry = feature["geometry"]
        kind, coordinates = geometry["type"], geometry.get("coordinates")
        if kind not in ("Polygon", "MultiPolygon"):
            return []
        polygons = coordinates if kind == "MultiPolygon" else [coordinates]
        return [[_points(ring) for ring in polygon] for polygon in polygons if polygon]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BrokenFile(f"{where} is not a GeoJSON polygon in pixels ({error})") from None


def _points(ring: Any) -> np.ndarray:
    """(n, 2) int32 without the closing point."""
    points = np.asarray([position[:2] for position in ring], dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(points).all() or np.abs(points).max(initial=0.0) >= 2**31 - 1:
        raise ValueError("a coordinate is no number of an image")
    if len(points) > 1 and (points[0] == points[-1]).all():
        points = points[:-1]
    return np.rint(points).astype(np.int32)
