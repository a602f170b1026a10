"""The coordinates h5 of a slide: ``patches/<slide>.h5``, written here, read by every later stage.

Data set ``coords``, level-0 px, as CLAM, TRIDENT or AtlasPatch lay it out (``layouts.py``), so
those tools read our files; data sets ``contour_points``, ``contour_ends``, ``contour_parents`` hold
the tissue outlines; those of a finer level of a hierarchy have ``parent_index`` and ``valid``; the
rest is in attributes of the root. The files of the three tools are read as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import BrokenFile, Refused
from utils.storage import RECORD_PARAMETERS, H5Data, digest, read_h5, write_h5
from wsi_core.layouts import Layout, fields_of, read_fields
from wsi_core.tissue import Tissue

if TYPE_CHECKING:
    import h5py

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
    patch_size: px of ``patch_level`` to READ; output_size: px after resizing
    level_downsample: (x, y) of ``patch_level``; level_size, slide_size: (w, h) of that level and
        of level 0
    footprint_px_l0, step_px_l0: (x, y) side of a patch and step of the grid in level-0 px
    mpp_um: um per px of the output patch; slide_mpp_um: (x, y) of level 0; None when unknown
    objective_power: nominal magnification of level 0, None when unknown
    level_free: the file does not say which level to read (TRIDENT's): level 0 until
        ``layouts.with_best_level`` has chosen
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
    objective_power: float | None = None
    level_free: bool = False
    background: tuple[int, int, int] = (0, 0, 0)
    parameters: dict[str, Any] = field(default_factory=dict)
    tissue: Tissue | None = None
    descent: Descent | None = None

    def __len__(self) -> int:
        return len(self.coords)


def read_coords_inside(path: Path) -> PatchCoords:
    """As ``read_coords``, without the children of a hierarchy that lie wholly outside the slide:
    for what shows patches and has no use for the places of their rows. ``descent`` is None."""
    patches = read_coords(path)
    if patches.descent is None:
        return patches
    return replace(patches, coords=patches.coords[patches.descent.valid], descent=None)


def coords_digest(coords: np.ndarray) -> str:
    """sha256 of (N, 2) coordinates; what features and finer levels remember of their origin."""
    return digest({"coords": np.asarray(coords, np.int64)})


def write_coords(path: Path, patches: PatchCoords, *, layout: Layout = "clam",
                 save_path: str | None = None, slide_path: Path | None = None) -> None:
    """Write ``patches`` to ``path``, whole or not at all, as one of three tools lays them out.

    save_path, slide_path: recorded as the tools do: the patches folder and the slide, as given.
    Features in an AtlasPatch file of the same coordinates stay in it. ``Refused`` for finer levels
    of a hierarchy in any layout but CLAM's: no other tool knows them.
    """
    if patches.descent is not None and layout != "clam":
        raise Refused(f"finer levels of a hierarchy are written in the layout clam, not {layout}: "
                      "leave --layout out, or --child_levels and --child_mpp")
    arrays, attrs, root = fields_of(
        patches, layout, save_path=str(path.parent) if save_path is None else save_path,
        slide_path=None if slide_path is None else str(slide_path))
    if patches.tissue is not None:
        arrays.update(_pack_tissue(patches.tissue))
    if patches.descent is not None:
        arrays.update(parent_index=patches.descent.parent_index, valid=patches.descent.valid)
        root.update(branching=patches.descent.branching,
                    parent_sha256=patches.descent.parent_sha256)
    keep = layout == "atlaspatch" and _has_rows(path, arrays["coords"])
    write_h5(path, arrays, parameters=patches.parameters, attrs={"coords": attrs}, root=root,
             extend=partial(copy_groups, path) if keep else None)


def _has_rows(path: Path, coords: np.ndarray) -> bool:
    """Does a file hold just these rows? The features in it are still right then."""
    try:
        found = read_h5(path).arrays.get("coords")
    except BrokenFile:
        return False
    return found is not None and np.array_equal(found, coords)


def copy_groups(path: Path, target: h5py.File, *, leave_out: str = "") -> None:
    """Take the groups of an h5 file over into an open one, but for one data set of theirs."""
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        for group in (item for item in file.values() if isinstance(item, h5py.Group)):
            for name in group:
                if (place := f"{group.name}/{name}") != f"/{leave_out}":
                    file.copy(place, target, place)


def recorded_parameters(path: Path) -> dict[str, Any]:
    """What a file of ours says determined its coordinates, nothing else read; {} for any other."""
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            return dict(json.loads(file.attrs.get(RECORD_PARAMETERS, "{}")))
    except (OSError, RuntimeError, KeyError, ValueError):
        return {}


def read_coords(path: Path) -> PatchCoords:
    """A coordinates file of ours, CLAM, TRIDENT or AtlasPatch; ``layouts.py`` has their fields.

    ``BrokenFile`` when it is missing, damaged, or no such file (features, old pixel patches).
    """
    path = Path(path)
    data = read_h5(path)
    if "coords" not in data.arrays:
        raise BrokenFile(f"{path} holds no 'coords': it was not made by create_patches_fp.py")
    if "imgs" in data.arrays:
        raise BrokenFile(f"{path} is of CLAM's old pipeline (pixels in the file, coordinates in "
                         "another unit): run create_patches_fp.py on the slides instead")
    try:
        return _from_h5(path, data)
    except (TypeError, ValueError, IndexError, KeyError, ArithmeticError) as error:
        raise BrokenFile(f"{path} has attributes that make no sense ({error})") from None


def _from_h5(path: Path, data: H5Data) -> PatchCoords:
    root = data.root
    red, green, blue = (int(value) for value in root.get("background", (0, 0, 0)))
    return PatchCoords(
        **read_fields(path, data), background=(red, green, blue),
        parameters=data.parameters or {},
        tissue=_unpack_tissue(data.arrays),
        descent=None if "branching" not in root else Descent(
            ratio=isqrt(int(root["branching"])), valid=data.arrays["valid"].astype(bool),
            parent_sha256=str(root["parent_sha256"])),
    )


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
