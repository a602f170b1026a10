"""Writing the features of a slide: ``h5_files/<slide>.h5``, then ``pt_files/<slide>.pt``.

The h5 comes first and carries the record of what made it; the pt is the same matrix for readers
of CLAM's layout and is mended from the h5 when it is missing or damaged. The layouts of TRIDENT
and AtlasPatch have an h5 alone, see feature_layouts.py. Reading: features.py.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from datasets.feature_layouts import (
    CHUNK_ROWS,
    GROUP,
    TRIDENT_PREFIX,
    FeatureFile,
    encoder_label,
    has_features,
    read_features,
    write_group,
)
from datasets.patches import EncodedSlide
from utils.errors import BrokenFile, ItemFailed
from utils.storage import H5Data, State, canonical, save_torch, write_h5
from wsi_core.coords import Descent, PatchCoords, coords_digest, read_coords
from wsi_core.layouts import Layout, fields_of

StorageType = Literal["float32", "float16"]

# what the user chose; the other parameters are the input files
SETTINGS = ("encoder", "patch", "storage_dtype")


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


def h5_path(feat_dir: Path, slide_id: str, *, layout: Layout = "clam", encoder: str = "") -> Path:
    """``h5_files/<slide>.h5``, or where a layout has it; TRIDENT's folder is named by encoder."""
    folder = {"clam": "h5_files", "trident": f"{TRIDENT_PREFIX}{encoder_label(encoder)}",
              "atlaspatch": "patches"}[layout]
    return feat_dir / folder / f"{slide_id}.h5"


def pt_path(feat_dir: Path, slide_id: str) -> Path:
    """``pt_files/<slide>.pt``."""
    return feat_dir / "pt_files" / f"{slide_id}.pt"


def feature_parameters(patches: PatchCoords, *, encoder: Mapping[str, Any],
                       slide: Mapping[str, Any], storage_dtype: StorageType = "float32"
                       ) -> dict[str, Any]:
    """Everything that determines a slide's features: encoder, patches, and the two input files.

    encoder: ``models.encoders.encoder_record``; slide: ``wsi_core.slide.fingerprint``
    storage_dtype: of the numbers on disk; the usual one is not recorded, as it never was
    """
    return {
        **({} if storage_dtype == "float32" else {"storage_dtype": storage_dtype}),
        "encoder": dict(encoder),
        "patch": {"patch_level": patches.patch_level, "patch_size": patches.patch_size,
                  "output_size": patches.output_size, "background": list(patches.background)},
        "coords_sha256": coords_digest(patches.coords),
        "slide": dict(slide),
    }


def inspect_features(feat_dir: Path, slide_id: str, parameters: Mapping[str, Any], *,
                     allow_dropped: bool, layout: Layout = "clam") -> Finding:
    """What is at a slide's place, seen from ``parameters``; the file is opened and checked.

    allow_dropped: features without some unreadable patches count as done.
    """
    name = str(parameters["encoder"]["name"])
    path = h5_path(feat_dir, slide_id, layout=layout, encoder=name)
    if not path.exists():
        return Finding(State.MISSING)
    dataset = f"{GROUP}/{encoder_label(name)}" if layout == "atlaspatch" else GROUP
    try:
        if layout == "atlaspatch" and not has_features(path, name):
            return Finding(State.MISSING)
        data = read_features(FeatureFile(path, dataset))
        stored = data.parameters
    except (BrokenFile, ValueError):  # ValueError: a record that is no json
        return Finding(State.BROKEN)
    if stored is None:
        return Finding(State.FOREIGN)
    found = flatten(stored)
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
    return Finding(State.DONE, rows=len(features), pt_sound=layout != "clam" or
                   _holds(pt_path(feat_dir, slide_id), features))


def write_features(feat_dir: Path, done: EncodedSlide, *, parameters: Mapping[str, Any],
                   mpp_um: float | None, footprint_px_l0: tuple[int, int],
                   descent: Descent | None = None, layout: Layout = "clam",
                   coords_path: Path | None = None) -> None:
    """Write the file or files of one slide, each whole or not at all, the h5 before the pt.

    Patches that were left out are in ``dropped_coords`` (k, 2), level-0 px, and their number is
    among the parameters, as is the type of the numbers when it is not float32.
    mpp_um: um per px of a patch as it is encoded before any enlarging.
    A finer level keeps every row, for the children of row p are found by their row numbers: what
    was left out has zeros and is not ``valid``.
    coords_path: the coordinates file, from which the layouts trident and atlaspatch take over what
    their tools say beside coordinates.
    Raises OSError (no space, folder gone); ItemFailed for what the layout cannot hold, for numbers
    too large for float16, and for coordinates that have changed since.
    """
    slide_id, coords = done.patches.slide_id, done.patches.coords
    name, record = str(parameters["encoder"]["name"]), dict(parameters)
    path = h5_path(feat_dir, slide_id, layout=layout, encoder=name)
    root: dict[str, Any] = {}
    if descent is None:
        arrays = {"features": done.features, "coords": coords[done.rows].astype(np.int32)}
    else:
        arrays = _all_rows(done, descent.valid)
        root = {"branching": descent.branching, "parent_sha256": descent.parent_sha256}
    arrays["features"] = _stored_as(arrays["features"], parameters.get("storage_dtype", "float32"),
                                    slide_id)
    attrs: dict[str, dict[str, Any]] = {}
    if layout != "clam":
        _check_room(done, descent, layout)
        path.parent.mkdir(parents=True, exist_ok=True)
        patches = _origin(coords_path, done, parameters)
        if layout == "atlaspatch":
            write_group(path, arrays["features"], patches, encoder=name, parameters=record)
            return
        arrays["coords"] = arrays["coords"].astype(np.int64)
        attrs = _trident_attributes(patches, path.parent, coords_path, encoder=name)
    if done.unreadable:
        arrays["dropped_coords"] = coords[list(done.unreadable)].astype(np.int32)
        record["dropped"] = len(done.unreadable)
    write_h5(path, arrays, parameters=record, chunk_rows=CHUNK_ROWS, attrs=attrs, root={
        **root, "slide_id": slide_id, "encoder": name,
        "mpp_um": np.nan if mpp_um is None else mpp_um,
        "footprint_px_l0": np.asarray(footprint_px_l0, np.int64)})
    if layout == "clam":
        _write_pt(pt_path(feat_dir, slide_id), arrays["features"])


def _stored_as(features: np.ndarray, storage_dtype: str, slide_id: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = features.astype(storage_dtype, copy=False)
    if not np.isfinite(stored).all():
        raise ItemFailed(f"{slide_id}: features of up to {np.abs(features).max():.4g} do not fit "
                         f"{storage_dtype}: store them as float32")
    return stored


def _check_room(done: EncodedSlide, descent: Descent | None, layout: Layout) -> None:
    if descent is not None:
        raise ItemFailed(f"{done.patches.slide_id}: finer levels are written in the layout clam, "
                         f"not {layout}")
    if layout == "atlaspatch" and done.unreadable:
        raise ItemFailed(f"{done.patches.slide_id}: {len(done.unreadable)} patches are unreadable, "
                         "and the layout atlaspatch has a row for each: use another --layout")


def _origin(coords_path: Path | None, done: EncodedSlide, parameters: Mapping[str, Any]
            ) -> PatchCoords:
    """The coordinates file that the features were made from, read at the level they were."""
    if coords_path is None:
        raise ValueError("this layout needs the coordinates file")
    patches = read_coords(coords_path)
    if coords_digest(patches.coords) != parameters["coords_sha256"]:
        raise ItemFailed(f"{coords_path} has changed while its patches were encoded: run the same "
                         "command again")
    if not patches.level_free:
        return patches
    read, side = done.patches, patches.footprint_px_l0[0]
    factor = side / read.patch_size
    width, height = patches.slide_size
    return replace(patches, level_free=False, patch_level=read.patch_level,
                   patch_size=read.patch_size, level_downsample=(factor, factor),
                   level_size=(round(width / factor), round(height / factor)))


def _trident_attributes(patches: PatchCoords, folder: Path, coords_path: Path | None, *,
                        encoder: str) -> dict[str, dict[str, Any]]:
    """Attributes of both data sets: ``coords`` has those of the coordinates file."""
    _, coords, _ = fields_of(patches, "trident", slide_path=None,
                             save_path=str(coords_path.parent if coords_path else folder))
    return {"coords": coords, "features": {"name": encoder, "savetodir": str(folder)}}


def _all_rows(done: EncodedSlide, valid: np.ndarray) -> dict[str, np.ndarray]:
    features = np.zeros((len(done.patches), done.features.shape[1]), np.float32)
    features[done.rows] = done.features
    read = np.zeros(len(features), bool)
    read[done.rows] = True
    return {"features": features, "coords": done.patches.coords.astype(np.int32),
            "valid": valid & read}


def mend_pt(feat_dir: Path, slide_id: str) -> None:
    """Write the pt file anew from the h5."""
    features = read_features(FeatureFile(h5_path(feat_dir, slide_id))).arrays["features"]
    _write_pt(pt_path(feat_dir, slide_id), features)


def needed_bytes(rows: int, dim: int, *, layout: Layout = "clam",
                 storage_dtype: StorageType = "float32") -> int:
    """Disk space of the files of a slide: two in CLAM's layout.

    Other encoders in AtlasPatch's file, which is written anew beside the old one, come on top.
    """
    copies = 2 if layout == "clam" else 1
    beside = {"clam": 8, "trident": 16, "atlaspatch": 40}[layout]  # coords, passports compressed
    return rows * (copies * np.dtype(storage_dtype).itemsize * dim + beside) + 64 * 1024


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

    save_torch(path, torch.from_numpy(np.ascontiguousarray(features)))


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
