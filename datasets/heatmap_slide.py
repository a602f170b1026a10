"""What is computed of one slide whose patches are encoded: coarse and fine attention.

Encoder and slide model come as callables; files and tissue are those of ``heatmap_files``.

The fine map: where a patch's raw attention depends on its own features alone (CLAM, ABMIL), its
patches are scored in any portions. Where it depends on the bag (ABMILX, TransMIL, DSMIL ...), they
are scored in bags like the one that the model was trained on: shifted copies of the coarse grid.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datasets.heatmap_files import AttentionMap, SlideFiles, read_map
from datasets.heatmap_scores import Tools
from utils.errors import ItemFailed
from utils.storage import State, h5_state, read_h5, save_torch, write_h5
from wsi_core.grid import patch_grid
from wsi_core.heatmap import center_shift, clip_roi, shifted_grids
from wsi_core.tissue import Tissue

Place = tuple[int, ...]  # x, y of a patch's corner, level-0 px
Roi = tuple[int, int, int, int]
CHUNK_PATCHES = 1 << 17  # encoded and scored at a time in the fine map; bounds memory


class SlideMaps(SlideFiles):
    """Tissue and attention of one open slide whose patches are encoded one by one."""

    tools: Tools

    @property
    def _step_px(self) -> int:
        """Between patches of the fine map, px of the level that is read."""
        return self.patching.scale().step_px * self.patching.custom_downsample

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
            return read_map(path, parameters)
        coords, features = self.coarse_features()
        if not len(coords):
            return None
        scored = self.tools.score(self.item.slide_id, features)
        return self.save_map(path, coords, self._drawn(scored.attention, scored.prediction),
                              scored.prediction, parameters)

    def _drawn(self, attention: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The row (N,) of attention (R, N) of the predicted class or label, else the first."""
        row = self.tools.outputs.predicted(prediction) if len(attention) > 1 else None
        drawn: np.ndarray = attention[row or 0]
        return drawn

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
                return read_map(path, parameters)
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
        return self.save_map(path, np.array(places, np.int64),
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


def _contour_of(grids: list[np.ndarray]) -> np.ndarray:
    """(n,) number of the contour of each patch of all grids together."""
    return np.repeat(np.arange(len(grids)), [len(grid) for grid in grids])
