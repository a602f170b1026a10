"""Finer levels without features: patches are encoded when a model asks for their rows.

Selection keeps few parents, so most of a fine level is never looked at. What was encoded is kept
in a sparse cache file a slide and level, and a second run reads it. Only coordinates are needed
(``create_patches_fp.py --child_levels``) and the slide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.feature_files import feature_parameters
from datasets.feature_layouts import CHUNK_ROWS
from datasets.levels import Above, find_rows
from datasets.patches import PatchEncoder, SlidePatches, encode_slides
from utils.contracts import LevelRows
from utils.errors import BrokenFile, ItemFailed, SlideError
from utils.parallel import describe_os_error
from utils.storage import canonical, read_h5, write_h5
from wsi_core.coords import PatchCoords, read_coords
from wsi_core.slide import fingerprint

if TYPE_CHECKING:
    import torch

Encode = Callable[[SlidePatches], np.ndarray]  # (n, D) float32 of n patches; SlideError


def encode_with(load: Callable[[], PatchEncoder], *, batch_size: int, workers: int = 1) -> Encode:
    """``Encode`` by an encoder that is loaded when the first patch is asked for.

    workers: reading threads
    """
    loaded = cache(load)

    def encode(patches: SlidePatches) -> np.ndarray:
        (done,) = encode_slides([patches], encoders={"": loaded()}, batch_size=batch_size,
                                workers=workers)
        if done.error:
            raise SlideError(done.error)
        return done.features

    return encode


@dataclass(kw_only=True, eq=False)
class LazyLevel:
    """A finer level of one slide; implements ``LevelRows``.

    grid: the patches of the file; file_rows: those that count, None = all
    parameters: of features from this grid, slide and encoder; the cache is used only if it has
    the same
    asked, encoded: rows that this run has asked for, and those of them it had to encode
    """

    name: str
    slide_path: Path
    grid: PatchCoords
    branching: int
    encode: Encode
    cache_path: Path
    parameters: dict[str, Any]
    file_rows: np.ndarray | None = None
    coords: np.ndarray | None = field(init=False)
    valid: np.ndarray | None = field(init=False)
    asked: set[int] = field(default_factory=set, repr=False)
    encoded: int = 0

    def __post_init__(self) -> None:
        chosen = slice(None) if self.file_rows is None else self.file_rows
        self.coords = self.grid.coords[chosen]
        self.valid = None if self.grid.descent is None else self.grid.descent.valid[chosen]

    def __len__(self) -> int:
        return len(self.grid) if self.file_rows is None else len(self.file_rows)

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """(len(rows), D) float32: from the cache, or encoded now and kept there.

        ``ItemFailed`` when the slide cannot be read or encoded, or the cache not written.
        """
        import torch

        rows = np.asarray(rows, np.int64)
        places = rows if self.file_rows is None else self.file_rows[rows]
        known, features = self._cached()
        new = np.setdiff1d(places, known)
        if len(new) or features is None:
            known, features = self._grown(known, features, new)
        self.asked.update(rows.tolist())
        return torch.from_numpy(features[np.searchsorted(known, places)])

    def _cached(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows (k,), ascending, and their features (k, D); None without a cache of this kind."""
        nothing = np.empty(0, np.int64), None
        try:
            data = read_h5(self.cache_path)
        except BrokenFile:  # missing, or damaged and made anew
            return nothing
        if data.parameters is None or canonical(data.parameters) != canonical(self.parameters):
            return nothing
        return data.arrays["rows"], data.arrays["features"]

    def _grown(self, known: np.ndarray, features: np.ndarray | None, new: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray]:
        """Encode rows and add them to the cache file."""
        fresh = np.asarray(self.encode(SlidePatches(
            slide_id=self.grid.slide_id, slide_path=self.slide_path, coords=self.grid.coords[new],
            patch_level=self.grid.patch_level, patch_size=self.grid.patch_size,
            output_size=self.grid.output_size, background=self.grid.background,
            level=self.name)), np.float32)
        if not np.isfinite(fresh).all():
            raise ItemFailed(f"{self.slide_path}: features of {self.name} are not finite: use "
                             "another precision")
        self.encoded += len(new)
        rows = np.concatenate([known, new])
        order = np.argsort(rows)
        both = fresh if features is None else np.concatenate([features, fresh])
        rows, both = rows[order], both[order]
        try:
            self.cache_path.parent.mkdir(parents=True, exist_ok=True)
            write_h5(self.cache_path, {"rows": rows, "features": both},
                     parameters=self.parameters, chunk_rows=CHUNK_ROWS)
        except OSError as error:
            raise ItemFailed(f"{self.cache_path}: {describe_os_error(error)}") from None
        return rows, both


def lazy_levels(
    slide_id: str, coords: np.ndarray | None, rows: int, *, slide_path: Path,
    coords_roots: Sequence[Path], encode: Encode, encoder: Mapping[str, Any], cache_root: Path,
) -> tuple[LazyLevel, ...]:
    """The finer levels of a slide, coarse to fine, of which nothing is encoded yet.

    coords, rows: of the coarse bag; coords_roots: folders of the derived coordinates
    (``levels.find_level_roots``); encoder: record of what ``encode`` is, the same as that of the
    coarse features; cache_root: gets ``<folder of the level>/<slide>.h5``.
    Raises ``ItemFailed`` for coordinates that are missing or do not correspond.
    """
    above = Above(rows=rows, coords=coords)
    levels = []
    for root in coords_roots:
        path = root / "patches" / f"{slide_id}.h5"
        grid = read_coords(path)
        branching, file_rows = find_rows(
            above, grid.coords, rows=len(grid), side_px_l0=grid.footprint_px_l0,
            branching=None if grid.descent is None else grid.descent.branching,
            what=f"{slide_id}: {path}")
        level = LazyLevel(
            name=root.name, slide_path=slide_path, grid=grid, branching=branching, encode=encode,
            cache_path=cache_root / root.name / f"{slide_id}.h5", file_rows=file_rows,
            parameters={"stage": "lazy features", **feature_parameters(
                grid, encoder=encoder, slide=fingerprint(slide_path))})
        above = Above(rows=len(level), coords=level.coords, side_px_l0=grid.footprint_px_l0)
        levels.append(level)
    return tuple(levels)


@dataclass(frozen=True, kw_only=True)
class LazySummary:
    """rows: of all finer levels opened; asked: of them, by a model; encoded: of those, anew."""

    rows: int
    asked: int
    encoded: int

    def __str__(self) -> str:
        share = self.asked / self.rows if self.rows else 0.0
        return (f"{self.asked:,} of {self.rows:,} finer patches were looked at ({share:.1%}): "
                f"{self.encoded:,} encoded, {self.asked - self.encoded:,} from the cache")


@dataclass
class LazyLevels:
    """``levels.Children`` for a data set: lazy levels of its slides, and what they cost in all.

    slides: id -> file; the rest as ``lazy_levels``
    """

    slides: Mapping[str, Path]
    coords_roots: Sequence[Path]
    encode: Encode
    encoder: Mapping[str, Any]
    cache_root: Path
    _opened: dict[str, tuple[LazyLevel, ...]] = field(default_factory=dict, repr=False)

    def __call__(self, slide_id: str, coords: np.ndarray | None, rows: int
                 ) -> tuple[LevelRows, ...]:
        """The levels of a slide, opened once."""
        if slide_id not in self._opened:
            if slide_id not in self.slides:
                raise ItemFailed(f"{slide_id}: no slide file is known, so its finer levels cannot "
                                 "be computed")
            self._opened[slide_id] = lazy_levels(
                slide_id, coords, rows, slide_path=self.slides[slide_id],
                coords_roots=self.coords_roots, encode=self.encode, encoder=self.encoder,
                cache_root=self.cache_root)
        return self._opened[slide_id]

    def summary(self) -> LazySummary:
        """Over all slides opened so far."""
        levels = [level for found in self._opened.values() for level in found]
        return LazySummary(rows=sum(map(len, levels)),
                           asked=sum(len(level.asked) for level in levels),
                           encoded=sum(level.encoded for level in levels))
