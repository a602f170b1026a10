"""Attention of a model of several magnifications: one map a level, finer ones where it looked.

The coarse level is that of every heatmap. Finer patches are derived from it in memory; only those
that the model asks for, the children of selected parents, are encoded, and what was encoded is
kept (``<slide>_<level>.h5``). A level's map (``<slide>_blockmap_<level>.h5``) holds the rows that
were fed: ``coords``, ``attention_scores`` (n, 1), ``rows``, ``selected`` (did its children go on?).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.feature_files import feature_parameters
from datasets.heatmap_config import PatchingArguments
from datasets.heatmap_files import AttentionMap
from datasets.heatmap_scores import Scored
from datasets.heatmap_slide import SlideMaps
from datasets.lazy_levels import LazyLevel
from datasets.patches import SlidePatches
from utils.errors import Refused
from utils.options import convert
from utils.storage import State, h5_state, read_h5, write_h5
from wsi_core.coords import PatchCoords
from wsi_core.heatmap import check_scores
from wsi_core.hierarchy import Child, derive, wanted_children
from wsi_core.slide import fingerprint


@dataclass(frozen=True, kw_only=True)
class LevelMap(AttentionMap):
    """The rows of one level that the model was fed.

    name: ``level_2`` or ``mpp_0.5``; selected: (n,) bool, their children went on
    side_px_l0: (x, y) side of a patch
    """

    name: str
    selected: np.ndarray
    side_px_l0: tuple[float, float]


def find_children(patching: PatchingArguments, *, record: Mapping[str, Any], n_levels: int,
                  model_type: str) -> tuple[Child, ...]:
    """The finer levels as the config says, else as the checkpoint's json (``record``).

    ``Refused`` when they are not as many as the model has, or not finer than ``patch_level``.
    """
    levels: Sequence[int] = patching.child_levels
    if n_levels > 1 and not levels and not patching.child_mpp:
        levels = convert(record.get("child_levels") or (), tuple[int, ...],
                         where="child_levels of the checkpoint's json")
    children = wanted_children(levels, patching.child_mpp)
    if len(children) != n_levels - 1:
        names = ", ".join(child.name for child in children) or "none"
        remedy = "leave child_levels and child_mpp out" if n_levels == 1 else (
            f"give patching_arguments.child_levels (or child_mpp) {n_levels - 1} values, coarse "
            "to fine")
        raise Refused(f"the {model_type} of this checkpoint takes {n_levels - 1} finer levels, "
                      f"found {names}: {remedy}")
    if levels and patching.patch_mpp is not None:
        raise Refused(f"child_levels {' '.join(map(str, levels))} go by pyramid levels, patch_mpp "
                      "by um per px: give child_mpp")
    if levels and levels[0] >= patching.patch_level:
        raise Refused(f"child_levels {' '.join(map(str, levels))} are not finer than patch_level "
                      f"{patching.patch_level}, the coarsest: level 0 is the finest")
    return children


def level_maps(maps: SlideMaps) -> tuple[LevelMap, ...]:
    """The maps of all levels, coarse to fine; () when no patch fits in at the coarse one.

    Raises ``ItemFailed`` for a slide without such levels, and for what cannot be encoded.
    """
    coords, features = maps.coarse_features()
    if not len(coords):
        return ()
    levels = _lazy_levels(maps, coords)
    mpp_um = maps.patching.patch_mpp
    coarse = Child(level=maps.patching.patch_level) if mpp_um is None else Child(mpp_um=mpp_um)
    names = [coarse.name, *(level.name for level in levels)]
    common = {**maps.coarse_parameters, "model": dict(maps.tools.model), "levels": names}
    paths = [maps.file(f"_blockmap_{name}.h5") for name in names]
    parameters = [{**common, "level": name} for name in names]
    files = [*zip(paths, parameters, strict=True),
             *((level.cache_path, level.parameters) for level in levels)]
    if any(h5_state(path, wanted) is not State.DONE for path, wanted in files):
        scored = maps.tools.score(maps.item.slide_id, features, levels)
        _write_maps(maps, [coords, *(level.coords for level in levels)], scored, paths, parameters)
    sides = [maps.patch_px_l0, *(level.grid.footprint_px_l0 for level in levels)]
    return tuple(map(_read_map, paths, parameters, names, sides))


def _lazy_levels(maps: SlideMaps, coords: np.ndarray) -> tuple[LazyLevel, ...]:
    """The finer levels, of which only what the model reads is encoded."""
    slide = fingerprint(maps.item.slide_path)

    def encode(patches: SlidePatches) -> np.ndarray:
        maps.made += 1
        return maps.tools.encode(
            patches.slide_path, patches.coords, patch_level=patches.patch_level,
            patch_size=patches.patch_size, output_size=patches.output_size)

    above, levels = _coarse_patches(maps, coords), []
    for child in maps.tools.children:
        above = derive(maps.slide, above, child, parameters={})
        assert above.descent is not None
        levels.append(LazyLevel(
            name=child.name, slide_path=maps.item.slide_path, grid=above,
            branching=above.descent.branching, encode=encode,
            cache_path=maps.file(f"_{child.name}.h5"),
            parameters={"stage": "lazy features", **feature_parameters(
                above, encoder=maps.tools.encoder, slide=slide)}))
    return tuple(levels)


def _coarse_patches(maps: SlideMaps, coords: np.ndarray) -> PatchCoords:
    slide, reading = maps.slide, maps.reading
    level, (side_x, side_y) = reading.level, map(round, maps.patch_px_l0)
    return PatchCoords(
        slide_id=maps.item.slide_id, coords=coords, patch_size=reading.read_px,
        patch_level=level, output_size=reading.output_px,
        level_downsample=slide.level_downsamples[level],
        level_size=slide.level_dimensions[level], slide_size=slide.level_dimensions[0],
        footprint_px_l0=(side_x, side_y), step_px_l0=(side_x, side_y), mpp_um=maps.mpp_um,
        slide_mpp_um=maps.slide_mpp)


def _write_maps(maps: SlideMaps, coords: Sequence[np.ndarray | None], scored: Scored,
                paths: Sequence[Path], parameters: Sequence[dict[str, Any]]) -> None:
    for places, level, path, wanted in zip(coords, scored.levels, paths, parameters, strict=True):
        assert places is not None
        fed = places[level.rows]
        scores = check_scores(level.attention, fed, what=f"{maps.item.slide_id}, {wanted['level']}")
        write_h5(path, {
            "attention_scores": scores.astype(np.float32)[:, None], "coords": fed,
            "rows": level.rows, "selected": level.selected},
            parameters=wanted, root={"prediction": scored.prediction})
        maps.made += 1


def _read_map(path: Path, parameters: dict[str, Any], name: str,
              side_px_l0: tuple[float, float]) -> LevelMap:
    data = read_h5(path)
    return LevelMap(
        coords=data.arrays["coords"], scores=data.arrays["attention_scores"][:, 0],
        prediction=np.asarray(data.root["prediction"]), parameters=parameters, name=name,
        selected=data.arrays["selected"].astype(bool), side_px_l0=side_px_l0)
