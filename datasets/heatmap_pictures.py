"""What a person looks at: heatmaps, mask, the slide itself, sampled patches, GeoJSON.

File names are CLAM's. A picture is made again only when its parameters or its file changed.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasets.heatmap_config import HeatmapConfig, Sample
from datasets.heatmap_items import HeatmapItem
from datasets.heatmap_slide import OVERVIEW_DOWNSAMPLE, AttentionMap, SlideMaps, Tools
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
    percentiles,
    read_view,
    sample_patches,
)
from wsi_core.slide import best_level, open_slide


def process_slide(item: HeatmapItem, *, config: HeatmapConfig, tools: Tools) -> Row:
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
            maps = SlideMaps(item, slide, folder=raw, tools=tools,
                             patching=config.patching_arguments, heatmap=config.heatmap_arguments)
            return _make_all(maps, config, production)


def _make_all(maps: SlideMaps, config: HeatmapConfig, production: Path) -> Row:
    slide_id = maps.item.slide_id
    tissue, coarse = maps.tissue, None
    save_mask(maps)
    if tissue:
        coarse = maps.coarse
    if coarse is None:
        maps.forget()
        return Row(item=slide_id, status=Status.EMPTY, numbers={
            "n_contours": len(tissue.contours), "n_patches": 0}, reason=(
            "no patch lies wholly on its tissue: try a smaller patch_size" if tissue else
            "no tissue found: look at the mask, try a smaller a_t or sthresh"))
    pictures = _Pictures(maps, coarse, config, production)
    pictures.save_samples()
    pictures.save_block_map()
    pictures.save_geojson()
    if config.heatmap_arguments.save_orig:
        pictures.save_original()
    fine = maps.fine
    cells = _cells(maps, coarse)
    if fine is None:
        return Row(item=slide_id, status=Status.EMPTY, numbers=cells,
                   reason="no patch of the fine map lies on tissue (in its region)")
    pictures.save_heatmap(fine)
    return Row(item=slide_id, status=Status.DONE if maps.made else Status.SKIPPED,
               numbers=cells)


def _cells(maps: SlideMaps, coarse: AttentionMap) -> dict[str, Any]:
    """CLAM's result columns (ranked classes), and a probability a class by its name."""
    names = maps.tools.class_names
    ranked = np.argsort(-coarse.probabilities, kind="stable")
    cells: dict[str, Any] = {"n_contours": len(maps.tissue.contours),
                             "n_patches": len(coarse.coords), "bag_size": len(coarse.coords)}
    mpp_um = maps.slide.mpp_um
    if mpp_um is not None:  # of the patch that the encoder sees
        cells["mpp_used"] = round(mpp_um[0] * maps.patch_px_l0[0] / maps.patching.patch_size, 6)
    for rank, index in enumerate(ranked):
        cells[f"Pred_{rank}"] = names[index]
        cells[f"p_{rank}"] = round(float(coarse.probabilities[index]), 6)
    for name, probability in zip(names, coarse.probabilities, strict=True):
        cells[f"p_class_{name}"] = round(float(probability), 6)
    return cells


def save_mask(maps: SlideMaps) -> None:
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


def _level(maps: SlideMaps, asked: int) -> int:
    """The level of a picture; -1 is the best for 32x."""
    count = len(maps.slide.level_dimensions)
    if asked >= count:
        raise ItemFailed(f"{maps.item.slide_path.name} has no level {asked} to draw on, only "
                         f"{count}: vis_level -1 takes the best one of each slide")
    return asked if asked >= 0 else best_level(maps.slide, OVERVIEW_DOWNSAMPLE)


class _Pictures:
    """The pictures of one slide with its coarse map; ``production`` is the label's folder."""

    def __init__(self, maps: SlideMaps, coarse: AttentionMap, config: HeatmapConfig,
                 production: Path) -> None:
        self.maps, self.coarse, self.production = maps, coarse, production
        self.heatmap, self.overlap = config.heatmap_arguments, config.patching_arguments.overlap
        self.samples = config.sample_arguments.samples
        self.slide_id = maps.item.slide_id
        self.shares = percentiles(coarse.scores) / 100  # 0..1
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
            folder = inside(
                self.production.parent, "sampled_patches",
                f"label_{self.maps.item.label}_pred_{self.coarse.predicted}", sample.name)
            self.maps.make(f"samples/{sample.name}", {
                **self.coarse.parameters, **dataclasses.asdict(sample), "folder": str(folder)},
                partial(self._write_sample, sample, folder))

    def _write_sample(self, sample: Sample, folder: Path) -> list[Path]:
        writable_folder(folder, what="sample folder")
        chosen = sample_patches(
            self.shares, mode=sample.mode, k=sample.k, seed=sample.seed,
            score_start=sample.score_start, score_end=sample.score_end)
        patching, files = self.maps.patching, []
        for rank, index in enumerate(chosen):
            x, y = (int(value) for value in self.coarse.coords[index])
            patch = self.maps.slide.read_region((x, y), patching.patch_level,
                                                (patching.read_px, patching.read_px))
            if patching.custom_downsample > 1:
                patch = resize_shorter_side(patch, patching.patch_size)
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

    def save_geojson(self) -> None:
        """``_attention.geojson`` for QuPath: the coarse cells, and the tissue as annotations."""
        path = self.production / f"{self.slide_id}_attention.geojson"
        if not self.heatmap.geojson:
            return
        low, cmap = self.heatmap.geojson_min_score, self.heatmap.cmap

        def write() -> Path:
            write_geojson(path, [
                *tissue_features(self.maps.tissue, slide_id=self.slide_id),
                *attention_features(self.shares, self.coarse.coords, slide_id=self.slide_id,
                                    patch_px_l0=self.maps.patch_px_l0,
                                    colours=colour_table(cmap), min_score=low)])
            return path

        self.maps.make(path.name, {**self.coarse.parameters, "min_score": low, "cmap": cmap},
                       write)

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
        heatmap, level = self.heatmap, _level(self.maps, self.heatmap.vis_level)
        references = self.coarse.scores if heatmap.use_ref_scores else None
        roi_l0, shrink = self.maps.item.roi_l0, heatmap.custom_downsample
        path = self.production / self.production_name()

        def write() -> Path:
            image, view = self._view(level, shrink, roi_l0)
            side = self.maps.patch_px_l0[0] / view.downsample[0]
            style = Style(
                cmap=heatmap.cmap, alpha=heatmap.alpha, blank_canvas=heatmap.blank_canvas,
                blur_px=int(side * (1 - self.overlap)) if heatmap.blur else 0,
                binarize=heatmap.binarize, threshold=heatmap.binary_thresh)
            drawn = draw_heatmap(
                image, view, percentiles(fine.scores, references) / 100, fine.coords,
                patch_px_l0=self.maps.patch_px_l0, style=style, tissue=self.maps.tissue)
            return write_image(path, drawn, quality=100)

        looks = {name: getattr(heatmap, name) for name in (
            "use_ref_scores", "cmap", "alpha", "blank_canvas", "blur", "binarize",
            "binary_thresh", "custom_downsample")}
        self.maps.make(path.name, {**fine.parameters, **looks, "level": level,
                                   "picture_roi_l0": roi_l0}, write)

    def production_name(self) -> str:
        """CLAM's name, which says how the picture was made."""
        heatmap = self.heatmap
        return (f"{self.slide_id}_{float(self.overlap)}_roi_{int(heatmap.use_roi)}"
                f"_blur_{int(heatmap.blur)}_rs_{int(heatmap.use_ref_scores)}"
                f"_bc_{int(heatmap.blank_canvas)}_a_{float(heatmap.alpha)}"
                f"_l_{heatmap.vis_level}_bi_{int(heatmap.binarize)}"
                f"_{float(heatmap.binary_thresh)}.{heatmap.save_ext}")
