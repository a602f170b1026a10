"""The coordinates h5 of a slide: ``patches/<slide>.h5``, written here, read by every later stage.

Data set ``coords`` (N, 2) int64 level-0 px with CLAM's attributes, so CLAM reads our files; data
sets ``contour_points``, ``contour_ends``, ``contour_parents`` hold the tissue outlines; those of a
finer level of a hierarchy have ``parent_index`` and ``valid``; the rest is in attributes of the
root. CLAM's own files are read as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import BrokenFile
from utils.storage import RECORD_PARAMETERS, H5Data, digest, read_h5, write_h5
from wsi_core.tissue import Tissue

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How the rows of a finer level come from those of the level above.

    ratio: r; every parent is tiled by r x r children, row p by the rows p * r * r ...
    valid: (N,) bool, False for a child that lies wholly outside the slide
    parent_sha256: ``coords_digest`` of the level above
    """

    ratio: int
    valid: np.ndarray
    parent_sha256: str

    @property
    def branching(self) -> int:
        """Children of a parent."""
        return self.ratio**2

    @property
    def parent_index(self) -> np.ndarray:
        """(N,) int64 row of each child's parent."""
        return np.arange(len(self.valid), dtype=np.int64) // self.branching


@dataclass(frozen=True, kw_only=True)
class PatchCoords:
    """Patches of one slide.

    slide_id: the slide's file name without its last extension
    coords: (N, 2) int64, x, y of the top-left corners in level-0 px; N may be 0
    patch_size: px of ``patch_level`` to READ; output_size: px after resizing (another than
        ``patch_size`` only with ``--custom_downsample`` and ``--child_mpp``)
    level_downsample: (x, y) of ``patch_level``; level_size, slide_size: (w, h) of that level and
        of level 0
    footprint_px_l0, step_px_l0: (x, y) side of a patch and step of the grid in level-0 px
    mpp_um: um per px of the output patch; slide_mpp_um: (x, y) of level 0; None when unknown
    background: RGB for what lies outside the slide, see ``Slide.read_region``
    parameters: everything that determined the coordinates; empty for CLAM's files
    tissue: outlines in level-0 px; None for CLAM's files and finer levels
    descent: None but for the finer levels of a hierarchy
    """

    slide_id: str
    coords: np.ndarray
    patch_size: int
    patch_level: int
    output_size: int
    level_downsample: tuple[float, float]
    level_size: Size
    slide_size: Size
    footprint_px_l0: Size
    step_px_l0: Size
    mpp_um: float | None = None
    slide_mpp_um: tuple[float, float] | None = None
    background: tuple[int, int, int] = (0, 0, 0)
    parameters: dict[str, Any] = field(default_factory=dict)
    tissue: Tissue | None = None
    descent: Descent | None = None

    def __len__(self) -> int:
        return len(self.coords)


def coords_digest(coords: np.ndarray) -> str:
    """sha256 of (N, 2) coordinates; what features and finer levels remember of their origin."""
    return digest({"coords": np.asarray(coords, np.int64)})


def write_coords(path: Path, patches: PatchCoords, *, save_path: str | None = None) -> None:
    """Write ``patches`` to ``path``, whole or not at all.

    ``save_path`` is recorded as CLAM does: the patches folder as the user gave it.
    """
    level_size = np.asarray(patches.level_size, np.int64)
    clam = {
        "patch_size": patches.patch_size, "patch_level": patches.patch_level,
        "downsample": np.asarray(patches.level_downsample, np.float64),
        "downsampled_level_dim": level_size, "level_dim": level_size,  # both of patch_level
        "name": patches.slide_id,
        "save_path": str(path.parent) if save_path is None else save_path,
    }
    root: dict[str, Any] = {
        "output_size": patches.output_size,
        "slide_size": np.asarray(patches.slide_size, np.int64),
        "footprint_px_l0": np.asarray(patches.footprint_px_l0, np.int64),
        "step_px_l0": np.asarray(patches.step_px_l0, np.int64),
        "mpp_um": np.nan if patches.mpp_um is None else float(patches.mpp_um),
        "slide_mpp_um": np.asarray(patches.slide_mpp_um or (np.nan, np.nan), np.float64),
        "background": np.asarray(patches.background, np.uint8),
    }
    arrays = {"coords": np.asarray(patches.coords, np.int64).reshape(-1, 2)}
    if patches.tissue is not None:
        arrays.update(_pack_tissue(patches.tissue))
    if patches.descent is not None:
        arrays.update(parent_index=patches.descent.parent_index, valid=patches.descent.valid)
        root.update(branching=patches.descent.branching,
                    parent_sha256=patches.descent.parent_sha256)
    write_h5(path, arrays, parameters=patches.parameters, attrs={"coords": clam}, root=root)


def recorded_parameters(path: Path) -> dict[str, Any]:
    """What a file of ours says determined its coordinates, nothing else read; {} for any other."""
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            return dict(json.loads(file.attrs.get(RECORD_PARAMETERS, "{}")))
    except (OSError, RuntimeError, KeyError, ValueError):
        return {}


def read_coords(path: Path) -> PatchCoords:
    """A coordinates file of ours or of CLAM.

    ``BrokenFile`` when it is missing, damaged, or no such file (features, old pixel patches).
    """
    path = Path(path)
    data = read_h5(path)
    if "coords" not in data.arrays:
        raise BrokenFile(f"{path} holds no 'coords': it was not made by create_patches_fp.py")
    if "imgs" in data.arrays:
        raise BrokenFile(f"{path} is of CLAM's old pipeline (pixels in the file, coordinates in "
                         "another unit): run create_patches_fp.py on the slides instead")
    coords, attrs = data.arrays["coords"], data.attrs["coords"]
    missing = [name for name in ("patch_size", "patch_level") if name not in attrs]
    if missing or coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iu":
        what = f"attribute '{missing[0]}'" if missing else f"shape {coords.shape}"
        raise BrokenFile(f"{path}: 'coords' has no usable {what}, expected (N, 2) integers with "
                         "patch_size and patch_level")
    try:
        return _from_h5(path, data)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise BrokenFile(f"{path} has attributes that make no sense ({error})") from None


def _from_h5(path: Path, data: H5Data) -> PatchCoords:
    attrs, root = data.attrs["coords"], data.root
    patch_size = int(attrs["patch_size"])
    downsample = _pair(attrs.get("downsample", (1.0, 1.0)), float)
    level_size = _pair(attrs.get("level_dim", (0, 0)), int)
    footprint = tuple(round(patch_size * factor) for factor in downsample)
    slide_size = tuple(round(side * factor)
                       for side, factor in zip(level_size, downsample, strict=True))
    mpp = float(root.get("mpp_um", np.nan))
    slide_mpp = _pair(root.get("slide_mpp_um", (np.nan, np.nan)), float)
    red, green, blue = (int(value) for value in root.get("background", (0, 0, 0)))
    return PatchCoords(
        slide_id=str(attrs.get("name", path.stem)),
        coords=data.arrays["coords"].astype(np.int64),
        patch_size=patch_size,
        patch_level=int(attrs["patch_level"]),
        output_size=int(root.get("output_size", patch_size)),
        level_downsample=downsample,
        level_size=level_size,
        slide_size=_pair(root.get("slide_size", slide_size), int),
        footprint_px_l0=_pair(root.get("footprint_px_l0", footprint), int),
        step_px_l0=_pair(root.get("step_px_l0", footprint), int),
        mpp_um=None if np.isnan(mpp) else mpp,
        slide_mpp_um=None if np.isnan(slide_mpp[0]) else slide_mpp,
        background=(red, green, blue),
        parameters=data.parameters or {},
        tissue=_unpack_tissue(data.arrays),
        descent=None if "branching" not in root else Descent(
            ratio=isqrt(int(root["branching"])), valid=data.arrays["valid"].astype(bool),
            parent_sha256=str(root["parent_sha256"])),
    )


def _pair(value: Any, kind: Any) -> Any:
    x, y = value
    return kind(x), kind(y)


def _pack_tissue(tissue: Tissue) -> dict[str, np.ndarray]:
    """Outlines as one array of points, with the end and the parent (-1 = tissue) of each."""
    outlines, parents = [], []
    for index, contour in enumerate(tissue.contours):
        outlines.append(contour)
        parents.append(-1)
        outlines.extend(tissue.holes[index])
        parents.extend([index] * len(tissue.holes[index]))
    points = np.concatenate([np.empty((0, 2), np.int32), *outlines]).astype(np.int32)
    ends = np.cumsum([len(outline) for outline in outlines]).astype(np.int64)
    return {"contour_points": points, "contour_ends": ends,
            "contour_parents": np.asarray(parents, np.int32)}


def _unpack_tissue(arrays: dict[str, np.ndarray]) -> Tissue | None:
    if "contour_points" not in arrays:
        return None
    outlines = np.split(arrays["contour_points"], arrays["contour_ends"])
    tissue = Tissue()
    for outline, parent in zip(outlines, arrays["contour_parents"], strict=False):
        if parent < 0:
            tissue.contours.append(outline)
            tissue.holes.append([])
        else:
            tissue.holes[parent].append(outline)
    return tissue
