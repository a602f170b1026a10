"""Files of one slide's heatmap: its tissue, the records of what was made with what, maps.

Each part lies in a file that carries the parameters it was made with (slide, segmentation, patch
geometry, encoder, checkpoint); it is read back only when they are equal, so another encoder,
checkpoint or level never meets old data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datasets.heatmap_config import HeatmapArguments, PatchingArguments
from datasets.heatmap_items import HeatmapItem
from datasets.heatmap_scores import ModelTools
from utils.errors import ItemFailed
from utils.storage import canonical, file_sha256, read_h5, read_json, write_h5, write_json
from wsi_core.geojson import read_tissue, tissue_features, write_geojson
from wsi_core.heatmap import check_scores
from wsi_core.presets import SEGMENTATION_NAMES
from wsi_core.scale import plan_reading
from wsi_core.slide import Slide, best_level, fingerprint
from wsi_core.tissue import Tissue, segment_tissue

OVERVIEW_DOWNSAMPLE = 32.0  # what level -1 stands for


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


class SlideFiles(ABC):
    """What is kept of one open slide, in ``folder`` (``.../<label>/<slide>/``).

    patching: how its patches are read; of a streaming model the squares that it looks at
    """

    def __init__(
        self, item: HeatmapItem, slide: Slide, *, folder: Path, tools: ModelTools,
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
        self.reading = plan_reading(slide, patching.scale(), self.slide_mpp)
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
        tissue = self.find_tissue(parameters["seg_level"])

        def write() -> Path:
            write_geojson(path, tissue_features(tissue, slide_id=self.item.slide_id),
                          extra={"milwright": {"parameters": parameters}})
            return path

        self.make(path.name, parameters, write)
        return tissue

    def find_tissue(self, seg_level: int) -> Tissue:
        """Outlines by the segmentation of the list, at a level of the slide."""
        return segment_tissue(self.slide, self.item.segmentation, seg_level=seg_level)

    # ------------------------------------------------------------------------ maps

    @property
    @abstractmethod
    def coarse(self) -> AttentionMap | None:
        """The whole slide without overlap; None when there is nothing to draw."""

    @property
    @abstractmethod
    def fine(self) -> AttentionMap | None:
        """What the production picture shows, asked for after ``coarse``; None as there."""

    def save_map(self, path: Path, coords: np.ndarray, scores: np.ndarray,
                 prediction: np.ndarray, parameters: dict[str, Any]) -> AttentionMap:
        """Write scores (n,) at coords (n, 2); ``ItemFailed`` when one is not finite."""
        checked = check_scores(scores, coords, what=self.item.slide_id).astype(np.float32)
        write_h5(path, {"attention_scores": checked[:, None], "coords": coords},
                 parameters=parameters, root={"prediction": prediction})
        self.made += 1
        return AttentionMap(coords=coords, scores=checked, prediction=prediction,
                            parameters=parameters)

    def forget(self) -> None:
        """Remove what earlier settings left of a slide on which nothing is found now."""
        self.record.clear(keep=[self.file(suffix).name for suffix in ("_mask.json", "_mask.jpg")])
        for path in self.folder.glob("*.h5"):
            path.unlink()


def read_map(path: Path, parameters: dict[str, Any]) -> AttentionMap:
    """What ``save_map`` wrote with these parameters."""
    data = read_h5(path)
    return AttentionMap(
        coords=data.arrays["coords"], scores=data.arrays["attention_scores"][:, 0],
        prediction=np.asarray(data.root["prediction"]), parameters=parameters)
