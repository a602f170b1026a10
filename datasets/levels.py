"""Finer levels of a bag: found beside the coarse features, checked against them, read by the row.

A finer level is a feature folder like any other. Its rows correspond to those of the level above:
the children of row p are the rows p * branching ..., and they tile what p covers. That is checked
by coordinates whenever both files have them; files without (CLAM's and HAG-MIL's .pt) only by
numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.features import FeatureStore, load_pt
from utils.contracts import LevelRows
from utils.errors import BrokenFile, ItemFailed, Refused
from utils.storage import RECORD_STATUS
from wsi_core.hierarchy import child_coords, level_folder, wanted_children

if TYPE_CHECKING:
    import h5py
    import torch

BLOCK_ROWS = 64  # read at least so many at once: opening a chunk has its price
_READ_ERRORS = (OSError, RuntimeError, KeyError, ValueError)

# slide id, coarse coords (N, 2) or None, coarse rows N -> the finer levels, coarse to fine
Children = Callable[[str, "np.ndarray | None", int], tuple[LevelRows, ...]]


# ---------------------------------------------------------------------------- folders

def find_level_roots(root: Path, child_levels: Sequence[int] = (),
                     child_mpp: Sequence[float] = ()) -> list[Path]:
    """The folders of finer levels beside ``root``, coarse to fine; ``Refused`` when one is missing.
    """
    folders = [level_folder(root, child) for child in wanted_children(child_levels, child_mpp)]
    for folder in folders:
        if not folder.is_dir():
            raise Refused(f"folder {folder} of a finer level does not exist: make it with "
                          "create_patches_fp.py and extract_features_fp.py, both with the same "
                          "--child_levels or --child_mpp")
    return folders


def level_stores(store: FeatureStore, child_levels: Sequence[int] = (), *,
                 child_mpp: Sequence[float] = (), child_dirs: Sequence[Path] = ()
                 ) -> tuple[FeatureStore, ...]:
    """Stores of the finer levels of a store, by name or by the folders given.

    Where cohorts are kept apart, each has its own folders of finer levels.
    """
    if child_dirs and (child_levels or child_mpp):
        raise Refused("--child_dirs and --child_levels name the finer levels in two ways: give one")
    for folder in child_dirs:
        if not folder.is_dir():
            raise Refused(f"--child_dirs: there is no folder {folder}")
    if child_dirs:
        return tuple(FeatureStore(folder) for folder in child_dirs)
    for place in sorted({*store.folders.values()} or {store.root}):
        find_level_roots(place, child_levels, child_mpp)
    return tuple(
        FeatureStore(level_folder(store.root, child),
                     {slide: level_folder(place, child) for slide, place in store.folders.items()})
        for child in wanted_children(child_levels, child_mpp))


# ---------------------------------------------------------------------------- correspondence

@dataclass(frozen=True, kw_only=True)
class Above:
    """What is known of the level above. side_px_l0: (x, y) that a patch covers, if recorded."""

    rows: int
    coords: np.ndarray | None
    side_px_l0: tuple[int, int] | None = None


def find_rows(above: Above, coords: np.ndarray | None, *, rows: int, branching: int | None,
              side_px_l0: tuple[int, int] | None, what: str) -> tuple[int, np.ndarray | None]:
    """The number of children of a parent, and which rows of the file they are (None = all).

    coords, rows, side_px_l0: of the finer file; branching: as it says itself, None for a foreign
    file; what: slide and file, for messages. Rows whose parents are not in the level above
    (patches that could not be read) are left out. Raises ``ItemFailed`` with what was expected
    and found where the levels do not correspond.
    """
    if branching is None:
        branching = rows // above.rows if above.rows and rows % above.rows == 0 else 0
    ratio = isqrt(max(branching, 0))
    blocks = None if coords is None or above.coords is None else _blocks_of(
        above.coords, coords, max(1, branching))
    count = rows if blocks is None else len(blocks) * branching
    if ratio == 0 or ratio**2 != branching or rows % branching or count != branching * above.rows:
        wanted = (f"{branching} x {above.rows} = {branching * above.rows}" if ratio else
                  f"a square number (4, 9, 16 ...) times {above.rows}")
        raise ItemFailed(f"{what} has {rows} rows, {wanted} expected for the {above.rows} patches "
                         "of the level above: make both levels anew")
    if blocks is None or coords is None or above.coords is None:
        return branching, None
    chosen = (blocks[:, None] * branching + np.arange(branching)).reshape(-1)
    step = _step_of(above, coords[chosen], ratio, side_px_l0, what)
    _check_tiles(above.coords, coords[chosen], ratio, step, what)
    return branching, None if len(chosen) == rows else chosen


def _blocks_of(parents: np.ndarray, coords: np.ndarray, branching: int) -> np.ndarray:
    """(N,) for each parent the block of children that starts at its corner.

    Blocks in the parents' order, which is the rule, are taken as they are and checked later.
    """
    starts = coords[::branching]
    if len(starts) <= len(parents):
        return np.arange(len(starts))
    place = {corner: block for block, corner in enumerate(map(tuple, starts.tolist()))}
    return np.array([place[corner] for corner in map(tuple, parents.tolist()) if corner in place],
                    np.int64)


def _step_of(above: Above, coords: np.ndarray, ratio: int, side_px_l0: tuple[int, int] | None,
             what: str) -> tuple[int, int]:
    """(x, y) side of a child in level-0 px: as recorded with either level, else as the first lie.

    ``ItemFailed`` when such children do not fill a patch of the level above.
    """
    side = above.side_px_l0
    if side_px_l0 is None:
        if side is not None:
            return side[0] // ratio, side[1] // ratio
        if ratio == 1 or not len(coords):
            return 1, 1
        return int(coords[ratio, 0] - coords[0, 0]), int(coords[1, 1] - coords[0, 1])
    if side not in (None, (side_px_l0[0] * ratio, side_px_l0[1] * ratio)):
        raise ItemFailed(f"{what}: {ratio} x {ratio} children of {side_px_l0} level-0 px do not "
                         f"tile a patch of {side} px of the level above: make the finer level "
                         "anew")
    return side_px_l0


def _check_tiles(parents: np.ndarray, coords: np.ndarray, ratio: int, step_px_l0: tuple[int, int],
                 what: str) -> None:
    """``ItemFailed`` unless the children of each parent lie where they tile it."""
    expected = child_coords(parents, ratio=ratio, step_px_l0=step_px_l0)
    wrong = np.flatnonzero((coords != expected).any(axis=1))
    if len(wrong):
        row = int(wrong[0])
        raise ItemFailed(
            f"{what} does not correspond to the level above: row {row} lies at level-0 "
            f"{tuple(coords[row].tolist())}, expected {tuple(expected[row].tolist())} as a child "
            f"of row {row // ratio**2} ({len(wrong)} of {len(coords)} rows differ): make both "
            "levels anew")


# ---------------------------------------------------------------------------- stored rows

@dataclass(kw_only=True, eq=False)
class StoredLevel:
    """A finer level in a feature file; implements ``LevelRows``.

    file_rows: the rows of the file that count, None = all; kept: (N, D) features when they are
    held in memory
    """

    slide_id: str
    path: Path
    branching: int
    coords: np.ndarray | None
    valid: np.ndarray | None
    n_rows: int
    file_rows: np.ndarray | None = None
    kept: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.n_rows

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """(len(rows), D) float32; reads the chunks that hold them, and checks those."""
        import torch

        rows = np.asarray(rows, np.int64)
        if self.kept is not None:
            return self.kept[torch.from_numpy(rows)]
        places = rows if self.file_rows is None else self.file_rows[rows]
        if self.path.suffix == ".h5":
            found = torch.from_numpy(read_rows(self.path, places))
        else:
            found = load_pt(self.path)[torch.from_numpy(places)].float()
        if not torch.isfinite(found).all():
            bad = rows[~torch.isfinite(found).all(dim=1).numpy()]
            raise ItemFailed(f"{self.slide_id}: row {int(bad[0])} of {self.path} is not finite "
                             f"(NaN or infinity; {len(bad)} of {len(rows)} rows asked for): delete "
                             "it and run extract_features_fp.py again")
        return found


@dataclass(frozen=True)
class StoredLevels:
    """``Children`` from feature folders. keep: hold the features in memory, once read."""

    store: FeatureStore
    finer: tuple[FeatureStore, ...]
    keep: bool = False

    def __call__(self, slide_id: str, coords: np.ndarray | None, rows: int
                 ) -> tuple[LevelRows, ...]:
        """Open every level of a slide and check it against the one above."""
        above = Above(rows=rows, coords=coords, side_px_l0=_side(self.store.find(slide_id)))
        levels: list[StoredLevel] = []
        for store in self.finer:
            level = _open_level(store, slide_id, above)
            above = Above(rows=len(level), coords=level.coords, side_px_l0=_side(level.path))
            if self.keep:
                features, _ = store.read(slide_id)
                kept = features if level.file_rows is None else features[level.file_rows]
                level = replace(level, kept=kept)
            levels.append(level)
        return tuple(levels)


def _open_level(store: FeatureStore, slide_id: str, above: Above) -> StoredLevel:
    path, dataset = store.locate(slide_id)
    info = store.info(slide_id)
    if dataset != "features":
        raise ItemFailed(f"{slide_id}: {path} is not in the layout clam, which finer levels need: "
                         "make them with extract_features_fp.py --child_levels")
    coords = valid = branching = None
    if path.suffix == ".h5":
        coords, valid, branching = _read_places(path)
    branching, file_rows = find_rows(above, coords, rows=info.rows, branching=branching,
                                     side_px_l0=_side(path), what=f"{slide_id}: {path}")
    if file_rows is not None:
        coords, valid = (None if array is None else array[file_rows] for array in (coords, valid))
    return StoredLevel(slide_id=slide_id, path=path, branching=branching, coords=coords,
                       valid=valid, file_rows=file_rows,
                       n_rows=info.rows if file_rows is None else len(file_rows))


def _read_places(path: Path) -> tuple[np.ndarray | None, np.ndarray | None, int | None]:
    """coords (N, 2) int64, valid (N,) bool and branching of an h5, as far as it has them."""
    try:
        with open_h5(path) as file:
            if file.attrs.get(RECORD_STATUS, "complete") != "complete":
                raise BrokenFile(f"{path} was never finished")
            coords = file["coords"][()].astype(np.int64) if "coords" in file else None
            valid = file["valid"][()].astype(bool) if "valid" in file else None
            branching = file.attrs.get("branching")
    except _READ_ERRORS as error:
        raise _broken(path, error) from None
    return coords, valid, None if branching is None else int(branching)


def _side(path: Path) -> tuple[int, int] | None:
    """(x, y) side of a patch in level-0 px, when the file says so."""
    if path.suffix != ".h5":
        return None
    try:
        with open_h5(path) as file:
            side = file.attrs.get("footprint_px_l0")
    except _READ_ERRORS as error:
        raise _broken(path, error) from None
    return None if side is None else (int(side[0]), int(side[1]))


def read_rows(path: Path, rows: np.ndarray) -> np.ndarray:
    """(len(rows), D) float32 of ``features``, in the order of ``rows``, from a feature h5.

    Only the chunks that hold them are read, each with its checksum where it has one.
    """
    try:
        with open_h5(path) as file:
            data = file["features"]
            out = np.empty((len(rows), data.shape[1]), np.float32)
            if not len(rows):
                return out
            size = max(BLOCK_ROWS, data.chunks[0] if data.chunks else 0)
            order = np.argsort(rows, kind="stable")
            ends = np.flatnonzero(np.diff(rows[order] // size)) + 1
            for part in np.split(order, ends):
                start = int(rows[part[0]]) // size * size
                out[part] = data[start:start + size][rows[part] - start]
            return out
    except _READ_ERRORS as error:
        raise _broken(path, error) from None


def open_h5(path: Path) -> h5py.File:
    """For reading, without a lock."""
    import h5py

    return h5py.File(path, "r", locking=False)


def _broken(path: Path, error: Exception) -> BrokenFile:
    return BrokenFile(f"{path} cannot be read ({error}): it is truncated, damaged or no h5 file: "
                      "delete it and run extract_features_fp.py again")
