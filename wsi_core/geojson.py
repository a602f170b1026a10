"""GeoJSON that QuPath opens by drag and drop: tissue outlines and attention cells.

Coordinates are level-0 pixels, as QuPath wants them. Tissue goes out as annotations (polygons
with holes) and comes back from files that QuPath wrote, with regions of interest and what is to be
left out; attention goes out as detections with the measurement ``attention`` (0..1) and a class of
colour by bins of it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import BrokenFile
from utils.storage import plain, write_text
from wsi_core.polygons import Polygon, is_tangled, repair
from wsi_core.polygons import restrict as restrict  # part of the round trip
from wsi_core.tissue import Tissue

Feature = dict[str, Any]

ATTENTION_BINS = 5
MAX_FILE_BYTES = 256 * 2**20  # some ten million points; their json takes ten times that in memory
MAX_COORDINATE = 2**29  # far beyond any slide, and safe for sums and products of coordinates

# First words of classes, in lower case. QuPath's own default classes are "Region*" and "Ignore*";
# its classes that end in * are left out of measurements.
_REGIONS = ("region*", "region", "roi")
_IGNORED = ("ignore", "exclude", "artefact", "artifact")
_NOT_DRAWN = ("detection", "cell", "tile")  # objectType of what programs find by thousands
_NAMESPACE = uuid.UUID("6c1c0a2e-6f0b-5f0e-9d38-2f4c5b1f2a10")  # ids are equal from run to run


def _id(slide_id: str, kind: str, index: int) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{slide_id}/{kind}/{index}"))


def _ring(points: np.ndarray) -> list[list[int]]:
    """(n, 2) or (n, 1, 2) as a closed ring."""
    ring: list[list[int]] = points.reshape(-1, 2).tolist()
    return [*ring, ring[0]]


def tissue_features(tissue: Tissue, *, slide_id: str, locked: bool = True) -> list[Feature]:
    """One annotation a contour, with its holes; outlines of under 3 points are no area.

    locked: QuPath lets nobody move its points
    """
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
                           "isLocked": locked}})
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


def write_contours(path: Path, tissue: Tissue, *, slide_id: str, slide_size: tuple[int, int]
                   ) -> None:
    """Tissue as unlocked annotations, to be corrected in QuPath and given back to us.

    slide_size: (w, h) of level 0; recorded, so that ``read_annotations`` knows another slide's file
    """
    write_geojson(path, tissue_features(tissue, slide_id=slide_id, locked=False), extra={
        "milwright": {"slide_id": slide_id, "slide_size": slide_size, "unit": "level-0 px"}})


# ---------------------------------------------------------------------------- reading

@dataclass(frozen=True)
class TissueFile:
    """Outlines read from GeoJSON, what could not be used, and the file's further members."""

    tissue: Tissue
    skipped: int  # features without area (points, lines), rings under 3 points
    extra: dict[str, Any]


def read_tissue(path: Path) -> TissueFile:
    """Polygons and MultiPolygons as ``Tissue`` in level-0 px (rounded to int32), as they are.

    Takes a FeatureCollection, one Feature or a list of them (QuPath writes all three).
    Raises ``BrokenFile`` for what is no GeoJSON, has coordinates that are no finite numbers of
    an image, or holds no polygon although it holds features.
    """
    features, extra = _load(path)
    found = [_polygons(feature, where=f"{path}: feature {number}")
             for number, feature in enumerate(features)]
    if features and not any(found):
        raise BrokenFile(f"{path} holds {len(features)} objects, none of them a polygon")
    polygons = [polygon for several in found for polygon in several]
    return TissueFile(_as_tissue(polygons), sum(not several for several in found), extra)


@dataclass(frozen=True)
class Annotations:
    """What somebody drew on a slide, in level-0 px.

    tissue: outlines of tissue; None when the file says nothing of tissue (it has only regions or
        areas to ignore), empty when it says that there is none (a file without any object)
    regions: areas that patches are to come from; none means everywhere
    ignored: areas that patches must not come from
    skipped: objects without an area on the slide (points, lines), and cells and detections
    repaired: polygons that crossed themselves and were replaced by what they enclose
    """

    tissue: Tissue | None
    regions: list[Polygon] = field(default_factory=list)
    ignored: list[Polygon] = field(default_factory=list)
    skipped: int = 0
    repaired: int = 0


def read_annotations(path: Path, *, slide_size: tuple[int, int]) -> Annotations:
    """Tissue, regions of interest and areas to leave out, by the classes QuPath gave them.

    "Region*", "Region" and "ROI" are regions; "Ignore*", "Exclude", "Artefact" and other classes
    ending in "*" are left out; every other class, and none, is tissue. Upper and lower case are
    the same. slide_size: (w, h) of level 0.
    Raises ``BrokenFile``: no GeoJSON, not a number, over 256 MiB, nothing with an area, or made
    for another slide or another frame than level-0 px (everything lies outside).
    """
    features, extra = _load(path)
    _check_slide(path, extra, slide_size)
    tissue: list[Polygon] = []
    regions: list[Polygon] = []
    ignored: list[Polygon] = []
    skipped = repaired = 0
    everything: list[Polygon] = []
    for number, feature in enumerate(features):
        where = f"{path}: feature {number}"
        drawn = _polygons(feature, where=where) if _is_drawn(feature) else []
        everything += drawn
        sound, mended = _untangle([polygon for polygon in drawn if _is_on(polygon, slide_size)],
                                  where=where)
        {"region": regions, "ignored": ignored}.get(_role(feature), tissue).extend(sound)
        skipped += not sound
        repaired += mended
    if features and not everything:
        raise BrokenFile(f"{path} holds {len(features)} objects, none of them a drawn polygon")
    if features and skipped == len(features):
        raise BrokenFile(_outside(path, everything, slide_size))
    return Annotations(_as_tissue(tissue) if tissue or not features else None,
                       regions, ignored, skipped, repaired)


def _load(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The features of a file, and the other members of its collection."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BrokenFile(f"{path} is over the ceiling of {MAX_FILE_BYTES >> 20} MiB for "
                             "outlines: export annotations only, without cells and detections")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFile(f"{path} is not readable GeoJSON ({error})") from None
    extra: dict[str, Any] = {}
    if isinstance(value, dict) and value.get("type") == "FeatureCollection":
        extra = {key: item for key, item in value.items() if key not in ("type", "features")}
        value = value.get("features")
    return value if isinstance(value, list) else [value], extra


def _as_tissue(polygons: list[Polygon]) -> Tissue:
    return Tissue([polygon.outer for polygon in polygons], [polygon.holes for polygon in polygons])


def _polygons(feature: Any, *, where: str) -> list[Polygon]:
    """The polygons of a feature that have 3 points or more; none for points and lines."""
    try:
        geometry = feature.get("geometry", feature)
        found = [[_points(ring) for ring in rings] for rings in _rings(geometry)]
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise BrokenFile(f"{where} is not a GeoJSON polygon in pixels ({error})") from None
    return [Polygon(outer, [ring for ring in inner if len(ring) >= 3])
            for outer, *inner in found if len(outer) >= 3]


def _rings(geometry: Any) -> Iterator[list[Any]]:
    """The rings of each polygon in a geometry, collections of geometries included."""
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _rings(part)
    elif kind in ("Polygon", "MultiPolygon"):
        coordinates = geometry["coordinates"]
        yield from filter(None, coordinates if kind == "MultiPolygon" else [coordinates])


def _points(ring: Any) -> np.ndarray:
    """(n, 2) int32 without the closing point."""
    try:
        points = np.asarray(ring, dtype=np.float64)
    except ValueError:  # positions of unequal length
        points = np.asarray([position[:2] for position in ring], dtype=np.float64)
    if not len(points):
        return np.empty((0, 2), np.int32)
    if points.ndim != 2 or points.shape[1] < 2:
        raise ValueError("a position is not x, y")
    points = points[:, :2]
    if not (np.abs(points) < MAX_COORDINATE).all():  # false for NaN as well
        raise ValueError("a coordinate is no number of an image")
    points = np.rint(points).astype(np.int32)
    if len(points) > 1 and (points[0] == points[-1]).all():
        points = points[:-1]
    return points


# ---------------------------------------------------------------------------- what is meant

def _properties(feature: Any) -> dict[str, Any]:
    found = feature.get("properties") if isinstance(feature, dict) else None
    return found if isinstance(found, dict) else {}


def _is_drawn(feature: Any) -> bool:
    properties = _properties(feature)
    kind = properties.get("objectType", properties.get("object_type"))
    return kind not in _NOT_DRAWN


def _role(feature: Any) -> str:
    """"region", "ignored" or "tissue", by the class of a feature."""
    found = _properties(feature).get("classification")
    if isinstance(found, dict):  # derived classes have a list of names
        found = found.get("name") or (found.get("names") or [""])[0]
    name = str(found or "").split(":")[0].strip().casefold()
    if name in _REGIONS:
        return "region"
    return "ignored" if name.startswith(_IGNORED) or name.endswith("*") else "tissue"


def _is_on(polygon: Polygon, slide_size: tuple[int, int]) -> bool:
    x0, y0, x1, y1 = polygon.box
    return x1 >= 0 and y1 >= 0 and x0 < slide_size[0] and y0 < slide_size[1]


def _untangle(polygons: list[Polygon], *, where: str) -> tuple[list[Polygon], int]:
    """The polygons without those that cross themselves, and how many were replaced."""
    sound: list[Polygon] = []
    mended = 0
    for polygon in polygons:
        try:
            tangled = any(map(is_tangled, (polygon.outer, *polygon.holes)))
        except ValueError as error:
            raise BrokenFile(f"{where}: {error}: draw it again") from None
        mended += tangled
        sound += repair(polygon) if tangled else [polygon]
    return sound, mended


def _check_slide(path: Path, extra: dict[str, Any], slide_size: tuple[int, int]) -> None:
    """A file of ours says which slide it belongs to; QuPath does not hand that on."""
    ours = extra.get("milwright")
    recorded = ours.get("slide_size") if isinstance(ours, dict) else None
    if recorded is not None and recorded != list(slide_size):
        raise BrokenFile(f"{path} was written for a slide of {recorded} px, this one has "
                         f"{list(slide_size)}: it belongs to another slide")


def _outside(path: Path, polygons: list[Polygon], slide_size: tuple[int, int]) -> str:
    boxes = np.array([polygon.box for polygon in polygons])
    x0, y0 = boxes[:, :2].min(axis=0).tolist()
    x1, y1 = boxes[:, 2:].max(axis=0).tolist()
    return (f"{path}: nothing of it lies on the slide, which has {slide_size[0]} x {slide_size[1]} "
            f"px: coordinates must be level-0 px, found x {x0} to {x1}, y {y0} to {y1} (another "
            "slide's file, or one in micrometres?)")
