"""What is computed of one slide for its heatmap: tissue, coarse and fine attention.

Each part lies in a file that carries the parameters it was made with (slide, segmentation, patch
geometry, encoder, checkpoint); it is read back only when they are equal, so another encoder,
checkpoint or level never meets old data. Encoder and slide model come as callables.

The fine map: where a patch's raw attention depends on its own features alone (CLAM, ABMIL), its
patches are scored in any portions. Where it depends on the bag (ABMILX, TransMIL, DSMIL ...), they
are scored in bags like the one that the model was trained on: shifted copies of the coarse grid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datasets.heatmap_config import HeatmapArguments, PatchingArguments
from datasets.heatmap_items import HeatmapItem
from datasets.heatmap_scores import Tools
from utils.errors import ItemFailed
from utils.storage import (
    State,
    canonical,
    file_sha256,
    h5_state,
    read_h5,
    read_json,
    save_torch,
    write_h5,
    write_json,
)
from wsi_core.geojson import read_tissue, tissue_features, write_geojson
from wsi_core.grid import patch_grid
from wsi_core.heatmap import center_shift, check_scores, clip_roi, shifted_grids
from wsi_core.presets import SEGMENTATION_NAMES
from wsi_core.scale import plan_reading
from wsi_core.slide import Slide, best_level, fingerprint
from wsi_core.tissue import Tissue, segment_tissue

OVERVIEW_DOWNSAMPLE = 32.0  # what level -1 stands for
Place = tuple[int, ...]  # x, y of a patch's corner, level-0 px
Roi = tuple[int, int, int, int]
CHUNK_PATCHES = 1 << 17  # encoded and scored at a time in the fine map; bounds memory


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """Raw attention (n,) at ``coords`` (n, 2), level-0 px; what the model predicts of the slide."""

    coords: np.ndarray
    scores: np.ndarray
    prediction: np.ndarray  # (K,), see ``heatmap_scores.Scored``
    parameters: dict[str, Any]


class FileRecord:
    """Which files without a record of their own were made with what: ``<slide>_record.json``.

    An entry holds parameters and the sha256 of its files; it counts only while both are equal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._entries: dict[str, Any] = dict(read_json(path))
        except (ItemFailed, TypeError, ValueError):  # none yet, or damaged: make all again
            self._entries = {}

    def is_fresh(self, name: str, parameters: Mapping[str, Any]) -> bool:
        """Whether the files of ``name`` are there, unaltered and of these parameters."""
        try:
            entry = self._entries[name]
            return entry["parameters"] == canonical(parameters) and all(
                file_sha256(Path(path)) == sha256 for path, sha256 in entry["files"].items())
        except (KeyError, TypeError, AttributeError, OSError):
            return False

    def store(self, name: str, parameters: Mapping[str, Any], files: list[Path]) -> None:
        """Take the files of ``name``; earlier ones that it no longer has are removed."""
        self._drop(name, keep=files)
        self._entries[name] = {"parameters": canonical(parameters), "files": {
            str(path): file_sha256(path) for path in files}}
        write_json(self.path, self._entries)

    def clear(self, *, keep: Collection[str] = ()) -> None:
        """Remove all entries and their files, except those named."""
        for name in set(self._entries) - set(keep):
            self._drop(name)
        write_json(self.path, self._entries)

    def _drop(self, name: str, *, keep: Collection[Path] = ()) -> None:
        files = self._entries.pop(name, {}).get("files", {})
        for path in {Path(text) for text in files} - set(keep):
            path.unlink(missing_ok=True)


class SlideMaps:
    """Tissue and attention of one open slide, in ``folder`` (``.../<label>/<slide>/``)."""

    def __init__(
        self, item: HeatmapItem, slide: Slide, *, folder: Path, tools: Tools,
        patching: PatchingArguments, heatmap: HeatmapArguments,
    ) -> None:
        self.item, self.slide, self.folder, self.tools = item, slide, folder, tools
        self.patching, self.heatmap = patching, heatmap
        self.record = FileRecord(self.file("_record.json"))
        self.made = 0  # files written in this run
        if patching.patch_mpp is None and patching.patch_level >= len(slide.level_dimensions):
            raise ItemFailed(f"{item.slide_path.name} has no level {patching.patch_level} to read "
                             f"patches from, only {len(slide.level_dimensions)}: lower "
                             "patch_level, or give patch_mpp")
        self.slide_mpp = slide.mpp_um if item.mpp_um is None else (item.mpp_um, item.mpp_um)
        scale = patching.scale()
        self._step_px = scale.step_px * scale.custom_downsample
        self.reading = plan_reading(slide, scale, self.slide_mpp)
        self.patch_px_l0, self.step_px_l0 = self.reading.footprint_px_l0, self.reading.step_px_l0
        self.mpp_um = self.reading.mpp_um  # of a patch as the encoder sees it

    def file(self, suffix: str) -> Path:
        """A file of this slide in the raw folder."""
        return self.folder / f"{self.item.slide_id}{suffix}"

    def make(self, name: str, parameters: Mapping[str, Any], write: Callable[[], Any]) -> None:
        """Let ``write`` make the file(s) of ``name`` (a path or a list) unless they are fresh."""
        if self.record.is_fresh(name, parameters):
            return
        files = write()
        self.record.store(name, parameters, files if isinstance(files, list) else [files])
        self.made += 1

    # ------------------------------------------------------------------------ tissue

    @cached_property
    def tissue_parameters(self) -> dict[str, Any]:
        """What decides the outlines."""
        asked = self.item.segmentation
        level = asked.seg_level if asked.seg_level >= 0 else best_level(self.slide,
                                                                        OVERVIEW_DOWNSAMPLE)
        return {**fingerprint(self.item.slide_path), "seg_level": level,
                **{name: getattr(asked, name) for name in SEGMENTATION_NAMES}}

    @cached_property
    def tissue(self) -> Tissue:
        """Outlines from ``_mask.json`` (GeoJSON), segmented when that is of other parameters."""
        path, parameters = self.file("_mask.json"), self.tissue_parameters
        if self.record.is_fresh(path.name, parameters):
            return read_tissue(path).tissue
        tissue = segment_tissue(self.slide, self.item.segmentation,
                                seg_level=parameters["seg_level"])

        def write() -> Path:
            write_geojson(path, tissue_features(tissue, slide_id=self.item.slide_id),
                          extra={"milwright": {"parameters": parameters}})
            return path

        self.make(path.name, parameters, write)
        return tissue

    # ------------------------------------------------------------------------ coarse map

    def _grids(self, step_px_l0: tuple[float, float], shift: float,
               roi_l0: Roi | None = None) -> list[np.ndarray]:
        """The patches (n, 2) of each contour, which has its own grid."""
        return [patch_grid(
            Tissue([contour], [holes]), patch_px_l0=self.patch_px_l0, step_px_l0=step_px_l0,
            slide_size=self.slide.level_dimensions[0], contour_fn="four_pt_hard",
            use_padding=True, roi=roi_l0, center_shift=shift)
            for contour, holes in zip(self.tissue.contours, self.tissue.holes, strict=True)]

    def _coarse_grids(self) -> list[np.ndarray]:
        return self._grids(self.patch_px_l0, self._shift(0.0))

    def encode(self, coords: np.ndarray) -> np.ndarray:
        """Features (n, D) of patches of this geometry."""
        return self.tools.encode(
            self.item.slide_path, coords, patch_level=self.reading.level,
            patch_size=self.reading.read_px, output_size=self.reading.output_px)

    @cached_property
    def coarse_parameters(self) -> dict[str, Any]:
        """What decides the features of the patches that do not overlap."""
        patching = self.patching
        by_mpp = {} if patching.patch_mpp is None else {
            "patch_mpp": patching.patch_mpp, "read_px": self.reading.read_px}
        return {"tissue": self.tissue_parameters, "patch_size": patching.patch_size,
                "patch_level": self.reading.level,
                "custom_downsample": patching.custom_downsample, **by_mpp,
                "center_shift": self._shift(0.0), "encoder": dict(self.tools.encoder)}

    def _shift(self, overlap: float) -> float:
        return center_shift(overlap, enabled=self.heatmap.use_center_shift)

    def coarse_features(self) -> tuple[np.ndarray, np.ndarray]:
        """coords and features from ``<slide>.h5``, computed when that is of other parameters.

        Sees to ``<slide>.pt`` too. (0, 2) and (0, 0) when no patch fits in.
        """
        path, parameters = self.file(".h5"), self.coarse_parameters
        if h5_state(path, parameters, verify=False) is State.DONE:
            arrays = read_h5(path).arrays
            coords, features = arrays["coords"], arrays["features"]
        else:
            coords = np.concatenate([np.empty((0, 2), np.int64), *self._coarse_grids()])
            if not len(coords):
                return coords, np.empty((0, 0), np.float32)
            features = self.encode(coords)
            write_h5(path, {"features": features, "coords": coords}, parameters=parameters)
            self.made += 1
        pt = self.file(".pt")

        def write_pt() -> Path:
            import torch

            save_torch(pt, torch.from_numpy(features))
            return pt

        self.make(pt.name, parameters, write_pt)
        return coords, features

    def has_coarse_features(self) -> bool:
        """Whether both files of the coarse features are there, whole and of these parameters."""
        return h5_state(self.file(".h5"), self.coarse_parameters) is State.DONE and \
            self.record.is_fresh(self.file(".pt").name, self.coarse_parameters)

    @cached_property
    def coarse(self) -> AttentionMap | None:
        """The whole slide without overlap (``_blockmap.h5``); None when no patch fits in."""
        path = self.file("_blockmap.h5")
        parameters = {**self.coarse_parameters, "model": dict(self.tools.model)}
        if h5_state(path, parameters) is State.DONE and self.has_coarse_features():
            return _read_map(path, parameters)
        coords, features = self.coarse_features()
        if not len(coords):
            return None
        scored = self.tools.score(self.item.slide_id, features)
        return self._save_map(path, coords, self._drawn(scored.attention, scored.prediction),
                              scored.prediction, parameters)

    def _drawn(self, attention: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The row (N,) of attention (R, N) of the predicted class or label, else the first."""
        row = self.tools.outputs.predicted(prediction) if len(attention) > 1 else None
        drawn: np.ndarray = attention[row or 0]
        return drawn

    def _save_map(self, path: Path, coords: np.ndarray, scores: np.ndarray,
                  prediction: np.ndarray, parameters: dict[str, Any]) -> AttentionMap:
        checked = check_scores(scores, coords, what=self.item.slide_id).astype(np.float32)
        write_h5(path, {"attention_scores": checked[:, None], "coords": coords},
                 parameters=parameters, root={"prediction": prediction})
        self.made += 1
        return AttentionMap(coords=coords, scores=checked, prediction=prediction,
                            parameters=parameters)

    # ------------------------------------------------------------------------ fine map

    @cached_property
    def fine(self) -> AttentionMap | None:
        """The overlapping map, of the region when there is one; None when no patch fits in.

        Raises ``ItemFailed`` when it must be reused (``calc_heatmap: false``) but is not there.
        """
        wanted = [self.item.roi_l0] if self.item.roi_l0 is None else [self.item.roi_l0, None]
        for roi_l0 in wanted if not self.heatmap.calc_heatmap else wanted[:1]:
            path = self.file(f"_{float(self.patching.overlap)}_roi_{roi_l0 is not None}.h5")
            parameters = self._fine_parameters(roi_l0)
            if h5_state(path, parameters) is State.DONE:
                return _read_map(path, parameters)
        if not self.heatmap.calc_heatmap:
            raise ItemFailed(f"{self.item.slide_id}: calc_heatmap is false, but there is no map "
                             f"of these settings in {self.folder}: set calc_heatmap: true")
        return self._compute_fine(path, parameters)

    def _fine_parameters(self, roi_l0: Roi | None) -> dict[str, Any]:
        assert self.coarse is not None
        return {**self.coarse.parameters, "step_px": self._step_px, "roi_l0": roi_l0,
                "fine_shift": self._fine_shift,
                "scored": "in bags" if self.tools.in_bags else "one by one"}

    @property
    def _fine_shift(self) -> float:
        return self._shift(1 - self._step_px / (
            self.patching.patch_size * self.patching.custom_downsample))

    def _compute_fine(self, path: Path, parameters: dict[str, Any]) -> AttentionMap | None:
        """Scores of the coarse map where coordinates coincide, the others encoded."""
        assert self.coarse is not None
        roi_l0 = self.item.roi_l0
        if roi_l0 is not None:
            roi_l0 = clip_roi(roi_l0, self.slide.level_dimensions[0],
                              name=self.item.slide_path.name)
        grids = self._grids(self.step_px_l0, self._fine_shift, roi_l0)
        places = [place for grid in grids for place in map(tuple, grid.tolist())]
        if not places:
            return None
        known = dict(zip(map(tuple, self.coarse.coords.tolist()), self.coarse.scores.tolist(),
                         strict=True))
        new = list(dict.fromkeys(place for place in places if place not in known))
        if new:
            scored = self._score_in_bags(grids, roi_l0) if self.tools.in_bags \
                else self._score_one_by_one(new)
            known = {**scored, **known}
        return self._save_map(path, np.array(places, np.int64),
                              np.array([known[place] for place in places]),
                              self.coarse.prediction, parameters)

    def _score_one_by_one(self, places: list[Place]) -> dict[Place, float]:
        """Raw attention of patches where it depends on each patch's own features alone."""
        assert self.coarse is not None
        known: dict[Place, float] = {}
        for first in range(0, len(places), CHUNK_PATCHES):
            some = places[first:first + CHUNK_PATCHES]
            scored = self.tools.score(self.item.slide_id, self.encode(np.array(some, np.int64)))
            drawn = self._drawn(scored.attention, self.coarse.prediction)
            known.update(zip(some, drawn.tolist(), strict=True))
        return known

    def _score_in_bags(self, grids: list[np.ndarray], roi_l0: Roi | None) -> dict[Place, float]:
        """Raw attention of the fine map's patches, each in a bag as dense as the coarse one.

        grids: (n, 2) a contour. A bag is a shifted copy of the coarse grid; where the fine map
        is of a region, with the coarse patches outside it. Rows are in the order of the coarse
        bag. Logarithms of weights are raised by log(n_bag / n_coarse): the same weight means
        less where more share it.
        """
        assert self.coarse is not None
        coords, contours, shifts = self._number_grids(grids, roi_l0)
        features, (around, around_contours) = self.coarse_features()[1], self._context(roi_l0)
        row_of = {place: row for row, place in
                  enumerate(map(tuple, self.coarse.coords.tolist()))}
        found: dict[Place, float] = {}
        for shift in np.unique(shifts):
            own = coords[shifts == shift]
            bag = np.concatenate([own, around])
            order = np.lexsort((bag[:, 1], bag[:, 0], np.concatenate(
                [contours[shifts == shift], around_contours])))
            rows = np.array([row_of.get(place, -1) for place in map(tuple, bag.tolist())])
            if (rows >= 0).all():
                continue  # the coarse map has them all
            values = features[rows]
            values[rows < 0] = self.encode(bag[rows < 0])
            scored = self.tools.score(self.item.slide_id, values[order])
            drawn = self._drawn(scored.attention, self.coarse.prediction)
            if scored.log_weights:
                drawn = drawn + np.log(len(bag) / len(self.coarse.coords))
            found.update(zip(map(tuple, bag[order].tolist()), drawn.tolist(), strict=True))
        return found

    def _number_grids(self, grids: list[np.ndarray], roi_l0: Roi | None
                      ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The fine map's patches (n, 2), the contour of each, and its ``shifted_grids`` number."""
        shifts = []
        for grid, contour in zip(grids, self.tissue.contours, strict=True):
            start = contour.reshape(-1, 2).min(axis=0)
            shifts.append(shifted_grids(
                grid, origin_l0=start if roi_l0 is None else np.maximum(start, roi_l0[:2]),
                patch_px_l0=self.patch_px_l0, step_px_l0=self.step_px_l0))
        return np.concatenate(grids), _contour_of(grids), np.concatenate(shifts)

    def _context(self, roi_l0: Roi | None) -> tuple[np.ndarray, np.ndarray]:
        """Coarse patches (n, 2) whose corner is outside the region, and the contour of each."""
        grids = self._coarse_grids()
        coords = np.concatenate(grids)
        outside = np.zeros(len(coords), bool) if roi_l0 is None else (
            (coords < roi_l0[:2]) | (coords >= roi_l0[2:])).any(axis=1)
        return coords[outside], _contour_of(grids)[outside]

    def forget(self) -> None:
        """Remove what earlier settings left of a slide on which nothing is found now."""
        self.record.clear(keep=[self.file(suffix).name for suffix in ("_mask.json", "_mask.jpg")])
        for path in self.folder.glob("*.h5"):
            path.unlink()


def _read_map(path: Path, parameters: dict[str, Any]) -> AttentionMap:
    data = read_h5(path)
    return AttentionMap(
        coords=data.arrays["coords"], scores=data.arrays["attention_scores"][:, 0],
        prediction=np.asarray(data.root["prediction"]), parameters=parameters)


def _contour_of(grids: list[np.ndarray]) -> np.ndarray:
    """(n,) number of the contour of each patch of all grids together."""
    return np.repeat(np.arange(len(grids)), [len(grid) for grid in grids])
