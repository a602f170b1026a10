"""What is computed of one slide for its heatmap: tissue, coarse and fine attention.

Each part lies in a file that carries the parameters it was made with (slide, segmentation, patch
geometry, encoder, checkpoint); it is read back only when they are equal, so another encoder,
checkpoint or level never meets old data. Encoder and slide model come as callables.
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
from utils.contracts import Bag, SlideModel
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
from wsi_core.heatmap import center_shift, check_scores, clip_roi
from wsi_core.presets import SEGMENTATION_NAMES
from wsi_core.slide import Slide, best_level, fingerprint, nominal_downsample
from wsi_core.tissue import Tissue, segment_tissue

OVERVIEW_DOWNSAMPLE = 32.0  # what level -1 stands for
CHUNK_PATCHES = 1 << 17  # encoded and scored at a time in the fine map; bounds memory


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Encoder and slide model, loaded once a run.

    encode: (slide path, (N, 2) level-0 coords) -> (N, D) float32 features
    score:  (slide id, (N, D) features) -> (C,) probabilities, (K, N) raw attention; a patch's
            raw attention depends on its own features alone, as in all attention pooling here
    encoder, model: what they are (weights' hashes included), for the files' records
    """

    encode: Callable[[Path, np.ndarray], np.ndarray]
    score: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]]
    encoder: Mapping[str, Any]
    model: Mapping[str, Any]
    class_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """Raw attention (N,) of the predicted class at ``coords`` (N, 2), level-0 px."""

    coords: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray  # (C,)
    parameters: dict[str, Any]

    @property
    def predicted(self) -> int:
        """Class index; ties go to the lower one."""
        return int(self.probabilities.argmax())


def score_bag(
    slide_id: str, features: np.ndarray, *, model: SlideModel, device: Any
) -> tuple[np.ndarray, np.ndarray]:
    """One inference: (C,) probabilities and (K, N) raw attention as float64.

    Raises ``ItemFailed`` for a model without attention.
    """
    import torch

    with torch.inference_mode():
        output = model(Bag(slide_id=slide_id, features=torch.from_numpy(features)).to(device))
    if output.attention is None:
        raise ItemFailed(f"{slide_id}: this model has no attention to draw")
    return (output.probabilities[0].double().cpu().numpy(),
            output.attention.double().cpu().numpy())


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
        level = patching.patch_level
        if level >= len(slide.level_dimensions):
            raise ItemFailed(f"{item.slide_path.name} has no level {level} to read patches from, "
                             f"only {len(slide.level_dimensions)}: lower patch_level")
        ds_x, ds_y = (nominal_downsample(value) for value in slide.level_downsamples[level])
        self.patch_px_l0 = (patching.read_px * ds_x, patching.read_px * ds_y)
        self.step_px_l0 = (patching.step_px * ds_x, patching.step_px * ds_y)

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

    def _grid(self, step_px_l0: tuple[float, float], shift: float,
              roi_l0: tuple[int, int, int, int] | None = None) -> np.ndarray:
        return patch_grid(
            self.tissue, patch_px_l0=self.patch_px_l0, step_px_l0=step_px_l0,
            slide_size=self.slide.level_dimensions[0], contour_fn="four_pt_hard",
            use_padding=True, roi=roi_l0, center_shift=shift)

    @cached_property
    def coarse_parameters(self) -> dict[str, Any]:
        """What decides the features of the patches that do not overlap."""
        return {"tissue": self.tissue_parameters, "patch_size": self.patching.patch_size,
                "patch_level": self.patching.patch_level,
                "custom_downsample": self.patching.custom_downsample,
                "center_shift": self._shift(0.0), "encoder": dict(self.tools.encoder)}

    def _shift(self, overlap: float) -> float:
        return center_shift(overlap, enabled=self.heatmap.use_center_shift)

    def _coarse_features(self) -> tuple[np.ndarray, np.ndarray]:
        """coords and features from ``<slide>.h5``, computed when that is of other parameters."""
        path, parameters = self.file(".h5"), self.coarse_parameters
        if h5_state(path, parameters, verify=False) is State.DONE:
            arrays = read_h5(path).arrays
            return arrays["coords"], arrays["features"]
        coords = self._grid(self.patch_px_l0, self._shift(0.0))
        if len(coords):
            features = self.tools.encode(self.item.slide_path, coords)
            write_h5(path, {"features": features, "coords": coords}, parameters=parameters)
            self.made += 1
            return coords, features
        return coords, np.empty((0, 0), np.float32)

    @cached_property
    def coarse(self) -> AttentionMap | None:
        """The whole slide without overlap (``_blockmap.h5``); None when no patch fits in."""
        path = self.file("_blockmap.h5")
        parameters = {**self.coarse_parameters, "model": dict(self.tools.model)}
        pt = self.file(".pt")
        if h5_state(path, parameters) is State.DONE and \
                h5_state(self.file(".h5"), self.coarse_parameters) is State.DONE and \
                self.record.is_fresh(pt.name, self.coarse_parameters):
            return _read_map(path, parameters)
        coords, features = self._coarse_features()
        if not len(coords):
            return None

        def write_pt() -> Path:
            import torch

            save_torch(pt, torch.from_numpy(features))
            return pt

        self.make(pt.name, self.coarse_parameters, write_pt)
        probabilities, attention = self.tools.score(self.item.slide_id, features)
        row = int(probabilities.argmax()) if len(attention) > 1 else 0
        return self._save_map(path, coords, attention[row], probabilities, parameters)

    def _save_map(self, path: Path, coords: np.ndarray, scores: np.ndarray,
                  probabilities: np.ndarray, parameters: dict[str, Any]) -> AttentionMap:
        checked = check_scores(scores, coords, what=self.item.slide_id).astype(np.float32)
        write_h5(path, {"attention_scores": checked[:, None], "coords": coords},
                 parameters=parameters, root={"probabilities": probabilities})
        self.made += 1
        return AttentionMap(coords=coords, scores=checked, probabilities=probabilities,
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

    def _fine_parameters(self, roi_l0: tuple[int, int, int, int] | None) -> dict[str, Any]:
        assert self.coarse is not None
        return {**self.coarse.parameters, "step_px": self.patching.step_px, "roi_l0": roi_l0,
                "fine_shift": self._fine_shift}

    @property
    def _fine_shift(self) -> float:
        return self._shift(1 - self.patching.step_px / self.patching.read_px)

    def _compute_fine(self, path: Path, parameters: dict[str, Any]) -> AttentionMap | None:
        """Scores of the coarse map where coordinates coincide, the others encoded."""
        assert self.coarse is not None
        roi_l0 = self.item.roi_l0
        if roi_l0 is not None:
            roi_l0 = clip_roi(roi_l0, self.slide.level_dimensions[0],
                              name=self.item.slide_path.name)
        coords = self._grid(self.step_px_l0, self._fine_shift, roi_l0)
        if not len(coords):
            return None
        known = dict(zip(map(tuple, self.coarse.coords.tolist()), self.coarse.scores.tolist(),
                         strict=True))
        places = list(map(tuple, coords.tolist()))
        new = list(dict.fromkeys(place for place in places if place not in known))
        for first in range(0, len(new), CHUNK_PATCHES):
            some = np.array(new[first:first + CHUNK_PATCHES], np.int64)
            features = self.tools.encode(self.item.slide_path, some)
            attention = self.tools.score(self.item.slide_id, features)[1]
            row = self.coarse.predicted if len(attention) > 1 else 0
            known.update(zip(map(tuple, some.tolist()), attention[row].tolist(), strict=True))
        scores = np.array([known[place] for place in places])
        return self._save_map(path, coords, scores, self.coarse.probabilities, parameters)

    def forget(self) -> None:
        """Remove what earlier settings left of a slide on which nothing is found now."""
        self.record.clear(keep=[self.file(suffix).name for suffix in ("_mask.json", "_mask.jpg")])
        for suffix in (".h5", "_blockmap.h5"):
            self.file(suffix).unlink(missing_ok=True)
        for path in self.folder.glob("*_roi_*.h5"):
            path.unlink()


def _read_map(path: Path, parameters: dict[str, Any]) -> AttentionMap:
    data = read_h5(path)
    return AttentionMap(
        coords=data.arrays["coords"], scores=data.arrays["attention_scores"][:, 0],
        probabilities=np.asarray(data.root["probabilities"]), parameters=parameters)
