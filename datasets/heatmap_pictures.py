"""What a person looks at: heatmaps, mask, the slide itself, sampled patches, GeoJSON.

A model of several magnifications has a heatmap and a GeoJSON a level instead of the overlapping
one; the patches whose children were looked at are outlined. The map of a streaming model is fine
as it is: it is drawn twice, coarse and in the production picture.

File names are CLAM's. A picture is made again only when its parameters or its file changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasets.heatmap_config import HeatmapConfig, Sample
from datasets.heatmap_files import OVERVIEW_DOWNSAMPLE, AttentionMap, SlideFiles
from datasets.heatmap_images import ImageMaps, ImageTools
from datasets.heatmap_items import HeatmapItem
from datasets.heatmap_levels import LevelMap, level_maps
from datasets.heatmap_scores import Tools
from datasets.heatmap_slide import SlideMaps
from utils.errors import ItemFailed
from utils.locks import claim
from utils.report import Row, Status
from utils.resize import resize_shorter_side
from utils.storage import inside, writable_folder, write_image
from wsi_core.drawing import draw_mask
from wsi_core.geojson import attention_features, tissue_features, write_geojson
from wsi_core.heatmap import (
    Style,
    View,
    colour_table,
    draw_heatmap,
    draw_outline,
    percentiles,
    read_view,
    sample_patches,
)
from wsi_core.slide import best_level, open_slide


def process_slide(item: HeatmapItem, *, config: HeatmapConfig, tools: Tools | ImageTools) -> Row:
    """All files of one slide, as far as they are not there yet.

    Raises ``ItemFailed`` (``SlideError``, ``BrokenFile``) with one line that names the slide.
    """
    exp = config.exp_arguments
    raw = inside(exp.raw_save_dir, exp.save_exp_code, item.label, item.slide_id)
    production = inside(exp.production_save_dir, exp.save_exp_code, item.label)
    for folder in (raw, production):
        writable_folder(folder, what="output folder")  # sweeps what a killed run left, too
    with claim(raw) as mine:
        if not mine:
            return Row(item=item.slide_id, status=Status.BUSY,
                       reason="another process works on it")
        with open_slide(item.slide_path) as slide:
            maps: SlideFiles
            if isinstance(tools, ImageTools):
                maps = ImageMaps(item, slide, folder=raw, tools=tools,
                                 heatmap=config.heatmap_arguments)
            else:
                maps = SlideMaps(item, slide, folder=raw, tools=tools,
                                 patching=config.patching_arguments,
                                 heatmap=config.heatmap_arguments)
            tools.scale.warn(item.slide_id, maps.reading.output_px, maps.mpp_um)
            return _make_all(maps, config, production)


def _make_all(maps: SlideFiles, config: HeatmapConfig, production: Path) -> Row:
    save_mask(maps)
    levels: tuple[LevelMap, ...] = ()
    coarse: AttentionMap | None = None
    if maps.tissue and isinstance(maps, SlideMaps) and maps.tools.children:
        levels = level_maps(maps)
        coarse = levels[0] if levels else None
    elif maps.tissue:
        coarse = maps.coarse
    if coarse is None:
        maps.forget()
        return _empty(maps, {"n_contours": len(maps.tissue.contours), "n_patches": 0}, (
            "no patch lies wholly on its tissue: try a smaller patch_size" if maps.tissue else
            "no tissue found: look at the mask, try a smaller a_t or sthresh"))
    cells = _cells(maps, coarse, levels)
    pictures = _Pictures(maps, coarse, config, production)
    pictures.save_samples()
    if config.heatmap_arguments.save_orig:
        pictures.save_original()
    if levels:
        for level in levels:
            pictures.save_level(level)
    else:
        pictures.save_block_map()
        pictures.save_geojson(coarse)
        fine = maps.fine
        if fine is None:
            return _empty(maps, cells, "no patch of the fine map lies on tissue (in its region)")
        pictures.save_heatmap(fine)
    return Row(item=maps.item.slide_id, status=Status.DONE if maps.made else Status.SKIPPED,
               numbers=cells)


def _empty(maps: SlideFiles, cells: dict[str, Any], reason: str) -> Row:
    return Row(item=maps.item.slide_id, status=Status.EMPTY, numbers=cells, reason=reason)


def _cells(maps: SlideFiles, coarse: AttentionMap, levels: Sequence[LevelMap]
           ) -> dict[str, Any]:
    """What was looked at (``n_level_<k>``: patches fed at a finer level) and what is predicted."""
    cells: dict[str, Any] = {"n_contours": len(maps.tissue.contours),
                             "n_patches": len(coarse.coords), "bag_size": len(coarse.coords)}
    cells.update({f"n_{level.name}": len(level.coords) for level in levels[1:]})
    if maps.mpp_um is not None:
        cells["mpp_used"] = round(maps.mpp_um, 6)
    return cells | maps.tools.outputs.cells(coarse.prediction)


def save_mask(maps: SlideFiles) -> None:
    """``_mask.jpg``: outlines with the numbers that ``keep_ids`` and ``exclude_ids`` use."""
    asked = maps.item.segmentation
    level = _level(maps, asked.vis_level)
    path = maps.file("_mask.jpg")

    def write() -> Path:
        image, view = read_view(maps.slide, level)
        return write_image(path, draw_mask(image, view.downsample, maps.tissue, number=True,
                                           line_thickness=asked.line_thickness))

    maps.make(path.name, {**maps.tissue_parameters, "vis_level": level,
                          "line_thickness": asked.line_thickness}, write)


def _level(maps: SlideFiles, asked: int) -> int:
    """The level of a picture; -1 is the best for 32x."""
    count = len(maps.slide.level_dimensions)
    if asked >= count:
        raise ItemFailed(f"{maps.item.slide_path.name} has no level {asked} to draw on, only "
                         f"{count}: vis_level -1 takes the best one of each slide")
    return asked if asked >= 0 else best_level(maps.slide, OVERVIEW_DOWNSAMPLE)


class _Pictures:
    """The pictures of one slide with its coarse map; ``production`` is the label's folder."""

    def __init__(self, maps: SlideFiles, coarse: AttentionMap, config: HeatmapConfig,
                 production: Path) -> None:
        self.maps, self.coarse, self.production = maps, coarse, production
        self.heatmap, self.overlap = config.heatmap_arguments, maps.patching.overlap
        self.samples = config.sample_arguments.samples
        self.slide_id = maps.item.slide_id
        self.shares = percentiles(coarse.scores) / 100  # 0..1
        predicted = maps.tools.outputs.predicted(coarse.prediction)
        self.sample_group = f"label_{maps.item.label}" + (
            "" if predicted is None else f"_pred_{predicted}")
        self._views: dict[Any, tuple[np.ndarray, View]] = {}

    def _view(self, level: int, shrink: int, roi_l0: tuple[int, int, int, int] | None = None
              ) -> tuple[np.ndarray, View]:
        """The last picture of the slide is kept: heatmap and original share one read."""
        key = (level, shrink, roi_l0)
        if key not in self._views:
            self._views = {key: read_view(self.maps.slide, level, shrink=shrink, roi_l0=roi_l0)}
        return self._views[key]

    def save_samples(self) -> None:
        """Patches by their attention as PNG, as the encoder's level shows them."""
        for sample in self.samples:
            if not sample.sample:
                continue
            folder = inside(self.production.parent, "sampled_patches", self.sample_group,
                            sample.name)
            self.maps.make(f"samples/{sample.name}", {
                **self.coarse.parameters, **dataclasses.asdict(sample), "folder": str(folder)},
                partial(self._write_sample, sample, folder))

    def _write_sample(self, sample: Sample, folder: Path) -> list[Path]:
        writable_folder(folder, what="sample folder")
        chosen = sample_patches(
            self.shares, mode=sample.mode, k=sample.k, seed=sample.seed,
            score_start=sample.score_start, score_end=sample.score_end)
        reading, files = self.maps.reading, []
        for rank, index in enumerate(chosen):
            x, y = (int(value) for value in self.coarse.coords[index])
            patch = self.maps.slide.read_region((x, y), reading.level,
                                                (reading.read_px, reading.read_px))
            if reading.read_px != reading.output_px:
                patch = resize_shorter_side(patch, reading.output_px)
            files.append(write_image(
                folder / f"{rank}_{self.slide_id}_x_{x}_y_{y}_a_{self.shares[index]:.3f}.png",
                patch))
        return files

    def save_block_map(self) -> None:
        """``_blockmap.png``: percentiles of the coarse map at 32x."""
        style = Style(cmap=self.heatmap.cmap, alpha=self.heatmap.alpha)
        level = best_level(self.maps.slide, OVERVIEW_DOWNSAMPLE)
        path = self.maps.file("_blockmap.png")

        def write() -> Path:
            image, view = self._view(level, 1)
            return write_image(path, draw_heatmap(
                image, view, self.shares, self.coarse.coords, style=style,
                patch_px_l0=self.maps.patch_px_l0, tissue=self.maps.tissue))

        self.maps.make(path.name, {**self.coarse.parameters, **dataclasses.asdict(style),
                                   "level": level}, write)

    def save_geojson(self, found: AttentionMap) -> None:
        """``_attention.geojson`` for QuPath: the cells without overlap, tissue as annotations.

        Of a hierarchy one file a level, with what was ``selected``; the tissue is in the first.
        """
        if not self.heatmap.geojson:
            return
        maps, low, cmap = self.maps, self.heatmap.geojson_min_score, self.heatmap.cmap
        level = found if isinstance(found, LevelMap) else None
        name = f"{self.slide_id}_{level.name}" if level else self.slide_id
        path = self.production / f"{name}_attention.geojson"

        def write() -> Path:
            write_geojson(path, [
                *(tissue_features(maps.tissue, slide_id=self.slide_id)
                  if found is self.coarse else ()),
                *attention_features(
                    percentiles(found.scores) / 100, found.coords, slide_id=name,
                    patch_px_l0=level.side_px_l0 if level else maps.patch_px_l0,
                    selected=level.selected if level else None,
                    colours=colour_table(cmap), min_score=low)])
            return path

        maps.make(path.name, {**found.parameters, "min_score": low, "cmap": cmap}, write)

    def save_original(self) -> None:
        """``_orig_{vis}``: the slide at the heatmap's level."""
        heatmap = self.heatmap
        path = self.production / f"{self.slide_id}_orig_{heatmap.vis_level}.{heatmap.save_ext}"
        level = _level(self.maps, heatmap.vis_level)
        self.maps.make(
            path.name, {**self.maps.tissue_parameters, "level": level,
                        "custom_downsample": heatmap.custom_downsample},
            lambda: write_image(path, self._view(level, heatmap.custom_downsample)[0],
                                quality=100))

    def save_heatmap(self, fine: AttentionMap) -> None:
        """The production picture, of the region when there is one."""
        heatmap = self.heatmap
        references = self.coarse.scores if heatmap.use_ref_scores else None
        self._save_picture(
            f"{float(self.overlap)}_roi_{int(heatmap.use_roi)}_blur_{int(heatmap.blur)}"
            f"_rs_{int(heatmap.use_ref_scores)}", fine, percentiles(fine.scores, references),
            overlap=self.overlap, side_px_l0=self.maps.patch_px_l0,
            looks={"use_ref_scores": heatmap.use_ref_scores})

    def save_level(self, level: LevelMap) -> None:
        """One level of a hierarchy: its GeoJSON, and its picture with what went on outlined."""
        self.save_geojson(level)
        self._save_picture(
            f"{level.name}_roi_{int(self.heatmap.use_roi)}_blur_{int(self.heatmap.blur)}", level,
            percentiles(level.scores), overlap=0.0, side_px_l0=level.side_px_l0,
            looks={"outline": True}, outlined=level.coords[level.selected])

    def _save_picture(
        self, made_of: str, found: AttentionMap, ranks: np.ndarray, *, overlap: float,
        side_px_l0: tuple[float, float], looks: dict[str, Any], outlined: np.ndarray | None = None,
    ) -> None:
        """Colour percentiles over the slide; ``outlined`` (n, 2): corners of patches to outline.

        The name is CLAM's, which says how the picture was made.
        """
        heatmap, level = self.heatmap, _level(self.maps, self.heatmap.vis_level)
        roi_l0, shrink = self.maps.item.roi_l0, heatmap.custom_downsample
        path = self.production / (
            f"{self.slide_id}_{made_of}_bc_{int(heatmap.blank_canvas)}_a_{float(heatmap.alpha)}"
            f"_l_{heatmap.vis_level}_bi_{int(heatmap.binarize)}_{float(heatmap.binary_thresh)}"
            f".{heatmap.save_ext}")

        def write() -> Path:
            image, view = self._view(level, shrink, roi_l0)
            side = side_px_l0[0] / view.downsample[0]
            style = Style(
                cmap=heatmap.cmap, alpha=heatmap.alpha, blank_canvas=heatmap.blank_canvas,
                blur_px=int(side * (1 - overlap)) if heatmap.blur else 0,
                binarize=heatmap.binarize, threshold=heatmap.binary_thresh)
            drawn = draw_heatmap(
                image, view, ranks / 100, found.coords, patch_px_l0=side_px_l0, style=style,
                tissue=self.maps.tissue)
            if outlined is not None:
                drawn = draw_outline(drawn, view, outlined, side_px_l0)
            return write_image(path, drawn, quality=100)

        looks = looks | {name: getattr(heatmap, name) for name in (
            "cmap", "alpha", "blank_canvas", "blur", "binarize", "binary_thresh",
            "custom_downsample")}
        self.maps.make(path.name, {**found.parameters, **looks, "level": level,
                                   "picture_roi_l0": roi_l0}, write)
