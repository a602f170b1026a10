"""Writing the features of a slide: ``h5_files/<slide>.h5``, then ``pt_files/<slide>.pt``.

The h5 comes first and carries the record of what made it; the pt is the same matrix for readers
of CLAM's layout and is mended from the h5 when it is missing or damaged. Reading: features.py.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.patches import EncodedSlide
from utils.errors import BrokenFile
from utils.storage import H5Data, State, canonical, read_h5, save_torch, write_h5
from wsi_core.coords import Descent, PatchCoords, coords_digest

CHUNK_ROWS = {"features": 256}  # what a reader of single rows of a finer level reads at once

SETTINGS = ("encoder", "patch")  # what the user chose; the other parameters are the input files


class Finding(NamedTuple):
    """What lies at a slide's features: ``changed`` names the parameters that differ.

    rows: of complete features, else 0; pt_sound: the pt file holds the same matrix
    """

    state: State
    changed: dict[str, Any] = {}
    found: dict[str, Any] = {}
    rows: int = 0
    pt_sound: bool = False

    @property
    def other_settings(self) -> bool:
        """True when the user chose differently then, not only the input files changed since."""
        return any(name.split(".")[0] in SETTINGS for name in self.changed)


def h5_path(feat_dir: Path, slide_id: str) -> Path:
    """``h5_files/<slide>.h5``."""
    return feat_dir / "h5_files" / f"{slide_id}.h5"


def pt_path(feat_dir: Path, slide_id: str) -> Path:
    """``pt_files/<slide>.pt``."""
    return feat_dir / "pt_files" / f"{slide_id}.pt"


def feature_parameters(patches: PatchCoords, *, encoder: Mapping[str, Any],
                       slide: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that determines a slide's features: encoder, patches, and the two input files.

    encoder: ``models.encoders.encoder_record``; slide: ``wsi_core.slide.fingerprint``
    """
    return {
        "encoder": dict(encoder),
        "patch": {"patch_level": patches.patch_level, "patch_size": patches.patch_size,
                  "output_size": patches.output_size, "background": list(patches.background)},
        "coords_sha256": coords_digest(patches.coords),
        "slide": dict(slide),
    }


def inspect_features(feat_dir: Path, slide_id: str, parameters: Mapping[str, Any], *,
                     allow_dropped: bool) -> Finding:
    """What is at a slide's place, seen from ``parameters``; the file is opened and checked.

    allow_dropped: features without some unreadable patches count as done.
    """
    path = h5_path(feat_dir, slide_id)
    if not path.exists():
        return Finding(State.MISSING)
    try:
        data = read_h5(path)
    except BrokenFile:
        return Finding(State.BROKEN)
    if data.parameters is None:
        return Finding(State.FOREIGN)
    found = flatten(data.parameters)
    if allow_dropped:
        found.pop("dropped", None)
    wanted = flatten(parameters)
    changed = {name: wanted.get(name) for name in {**found, **wanted}
               if canonical({"": found.get(name)}) != canonical({"": wanted.get(name)})}
    if changed:
        return Finding(State.OTHER, changed, {name: found.get(name) for name in changed})
    if not _is_sound(data):
        return Finding(State.BROKEN)
    features = data.arrays["features"]
    return Finding(State.DONE, rows=len(features),
                   pt_sound=_holds(pt_path(feat_dir, slide_id), features))


def write_features(feat_dir: Path, done: EncodedSlide, *, parameters: Mapping[str, Any],
                   mpp_um: float | None, footprint_px_l0: tuple[int, int],
                   descent: Descent | None = None) -> None:
    """Write both files of one slide, each whole or not at all, the h5 first.

    Patches that were left out are in ``dropped_coords`` (k, 2), level-0 px, and their number is
    among the parameters. mpp_um: um per px of a patch as it is encoded before any enlarging.
    A finer level keeps every row, for the children of row p are found by their row numbers: what
    was left out has zeros and is not ``valid``. Raises OSError (no space, folder gone).
    """
    slide_id, coords = done.patches.slide_id, done.patches.coords
    record, root = dict(parameters), {}
    if descent is None:
        arrays = {"features": done.features, "coords": coords[done.rows].astype(np.int32)}
    else:
        arrays = _all_rows(done, descent.valid)
        root = {"branching": descent.branching, "parent_sha256": descent.parent_sha256}
    if done.unreadable:
        arrays["dropped_coords"] = coords[list(done.unreadable)].astype(np.int32)
        record["dropped"] = len(done.unreadable)
    write_h5(h5_path(feat_dir, slide_id), arrays, parameters=record, chunk_rows=CHUNK_ROWS, root={
        **root, "slide_id": slide_id, "encoder": str(parameters["encoder"]["name"]),
        "mpp_um": np.nan if mpp_um is None else mpp_um,
        "footprint_px_l0": np.asarray(footprint_px_l0, np.int64)})
    _write_pt(pt_path(feat_dir, slide_id), arrays["features"])


def _all_rows(done: EncodedSlide, valid: np.ndarray) -> dict[str, np.ndarray]:
    features = np.zeros((len(done.patches), done.features.shape[1]), np.float32)
    features[done.rows] = done.features
    read = np.zeros(len(features), bool)
    read[done.rows] = True
    return {"features": features, "coords": done.patches.coords.astype(np.int32),
            "valid": valid & read}


def mend_pt(feat_dir: Path, slide_id: str) -> None:
    """Write the pt file anew from the h5."""
    features = read_h5(h5_path(feat_dir, slide_id)).arrays["features"]
    _write_pt(pt_path(feat_dir, slide_id), features)


def needed_bytes(rows: int, dim: int) -> int:
    """Disk space of both files of a slide."""
    return rows * (2 * 4 * dim + 8) + 64 * 1024


def flatten(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"encoder": {"name": x}}`` as ``{"encoder.name": x}``."""
    flat: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _write_pt(path: Path, features: np.ndarray) -> None:
    import torch

    save_torch(path, torch.from_numpy(np.ascontiguousarray(features, np.float32)))


def _is_sound(data: H5Data) -> bool:
    features, coords = data.arrays.get("features"), data.arrays.get("coords")
    return (features is not None and coords is not None and features.ndim == 2
            and coords.shape == (len(features), 2))


def _holds(path: Path, features: np.ndarray) -> bool:
    """Does this torch file hold just this matrix? Its zip is read without importing torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = [name for name in archive.namelist() if name.endswith("/data/0")]
            return len(stored) == 1 and archive.read(stored[0]) == features.tobytes()
    except (OSError, zipfile.BadZipFile, EOFError):
        return False
