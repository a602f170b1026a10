"""Coordinates files as CLAM, TRIDENT and AtlasPatch lay them out: where they lie, what they hold.

``clam``        ``patches/<slide>.h5``; ``coords`` (N, 2), attributes of the data set
``trident``     ``<mag>x_<px>px_<ov>px_overlap/patches/<slide>_patches.h5``; the same shape
``atlaspatch``  ``patches/<slide>.h5``; ``coords`` (N, 5), attributes of the file

One name has two meanings: CLAM's ``patch_size`` counts px of ``patch_level`` as they are read,
TRIDENT's and AtlasPatch's px after resizing. Each layout has the meaning of its own tool, so that
tool reads the file; what it cannot say stands in attributes of ours at the root. Field names:
AtlasPatch 1.0, TRIDENT 0.3, CLAM. ``coords.py`` reads and writes the files with this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from utils.errors import BrokenFile, Refused
from utils.storage import H5Data
from wsi_core.scale import UM_PER_MAGNIFICATION
from wsi_core.slide import Slide, best_level, nominal_downsample

if TYPE_CHECKING:
    from wsi_core.coords import PatchCoords

Layout = Literal["clam", "trident", "atlaspatch"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
LAYOUT_ATTRIBUTE = "milwright_layout"  # of the root; files of ours without it are CLAM's

TRIDENT_FOLDERS, TRIDENT_SUFFIX = "*_*px_*px_overlap", "_patches"
PASSPORT = ("{stem}__x{x}_y{y}_rw{read_w}_rh{read_h}_lv{level}_mag{mag}_tmag{target_mag}"
            "_total{total}")
PASSPORT_BYTES, PASSPORT_VERSION = 160, 2


# ---------------------------------------------------------------------------- places

def coords_path(save_dir: Path, slide_id: str, layout: Layout, *, patch_px: int, overlap_px: int,
                mpp_um: float | None = None, patch_level: int = 0, custom_downsample: int = 1
                ) -> Path:
    """Where a run writes the coordinates of a slide.

    TRIDENT's folder has the magnification in its name: 10 / um per px where patches are made by
    physical scale. Made by pyramid level (``mpp_um`` None) they have another one on every slide,
    so the level stands there. patch_px, overlap_px: of the patch after resizing
    """
    if layout != "trident":
        return save_dir / "patches" / f"{slide_id}.h5"
    if mpp_um is not None:
        scale = f"{UM_PER_MAGNIFICATION / mpp_um:g}x"
    else:
        scale = f"level{patch_level}" + (f"down{custom_downsample}" if custom_downsample > 1
                                         else "")
    folder = save_dir / f"{scale}_{patch_px}px_{overlap_px}px_overlap" / "patches"
    return folder / f"{slide_id}{TRIDENT_SUFFIX}.h5"


def find_coords(data_h5_dir: Path, slide_id: str) -> Path:
    """The coordinates of a slide in any layout; CLAM's place when there are none.

    ``Refused`` when several of TRIDENT's folders hold the slide: it is not said which is meant.
    """
    plain = data_h5_dir / "patches" / f"{slide_id}.h5"
    if plain.is_file():
        return plain
    name = f"{slide_id}{TRIDENT_SUFFIX}.h5"
    found = [path for folder in _folders(data_h5_dir)
             if (path := folder / name).is_file() and _id_of(path) == slide_id]
    return _only(found, slide_id) if found else plain


def list_coords(data_h5_dir: Path) -> dict[str, Path]:
    """Every slide with coordinates, whatever the layout, by id; ``Refused`` as ``find_coords``."""
    plain: dict[str, Path] = {}
    suffixed: dict[str, list[Path]] = {}
    for folder in _folders(data_h5_dir):
        for path in folder.glob("*.h5"):
            slide_id = _id_of(path)
            if slide_id == path.stem and folder == data_h5_dir / "patches":
                plain[slide_id] = path
            elif slide_id != path.stem:
                suffixed.setdefault(slide_id, []).append(path)
    found = {slide_id: _only(paths, slide_id) for slide_id, paths in suffixed.items()
             if slide_id not in plain}
    return dict(sorted({**found, **plain}.items()))


def _folders(data_h5_dir: Path) -> list[Path]:
    return [data_h5_dir / "patches", *sorted(data_h5_dir.glob(f"{TRIDENT_FOLDERS}/patches"))]


def _only(paths: list[Path], slide_id: str) -> Path:
    if len(paths) > 1:
        raise Refused(f"{slide_id} has coordinates in {len(paths)} folders: "
                      f"{', '.join(str(path.parent.parent) for path in paths)}: give one of them "
                      "as --data_h5_dir")
    return paths[0]


def _id_of(path: Path) -> str:
    """The slide of a file: ``a_patches.h5`` belongs to ``a``, unless it says ``a_patches``."""
    import h5py

    if not path.stem.endswith(TRIDENT_SUFFIX):
        return path.stem
    try:
        with h5py.File(path, "r", locking=False) as file:
            named = file["coords"].attrs.get("name")
    except (OSError, RuntimeError, KeyError):
        named = None  # reading it will say what is wrong
    return path.stem if named == path.stem else path.stem.removesuffix(TRIDENT_SUFFIX)


# ---------------------------------------------------------------------------- what is written

def fields_of(patches: PatchCoords, layout: Layout, *, save_path: str, slide_path: str | None
              ) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Data sets, attributes of ``coords``, and attributes of the root, in a layout.

    save_path: the patches folder as the user gave it; slide_path: likewise the slide
    """
    coords = np.asarray(patches.coords, np.int64).reshape(-1, 2)
    root = _own_root(patches, layout)
    if layout == "atlaspatch":
        arrays, file_attributes = _atlaspatch(patches, coords, slide_path)
        return arrays, {}, {**root, **file_attributes}
    common = {"name": patches.slide_id, "save_path": save_path, "savetodir": save_path}
    clam = _clam(patches)
    if layout == "clam":
        return {"coords": coords}, {**geometry(patches, patches.patch_size), **clam, **common}, root
    trident = {**common, **geometry(patches, patches.output_size)}
    # with other px to read than TRIDENT's patch_size, CLAM must not find a level to read them from
    same = patches.patch_size == patches.output_size and not patches.level_free
    return {"coords": coords}, {**(clam if same else {}), **trident}, root


def geometry(patches: PatchCoords, patch_px: int) -> dict[str, Any]:
    """What TRIDENT and AtlasPatch say of patches of ``patch_px`` px.

    The magnifications are 10 / um per px, and those the slide names only when its pixel size is
    unknown: their quotient gives the true footprint. NaN when neither is known.
    """
    footprint, step = patches.footprint_px_l0[0], patches.step_px_l0[0]
    if patches.slide_mpp_um is not None:
        power = UM_PER_MAGNIFICATION / (sum(patches.slide_mpp_um) / 2)
    else:
        power = patches.objective_power or np.nan
    return {
        "patch_size": patch_px, "patch_size_level0": footprint,
        "level0_magnification": _whole(power),
        "target_magnification": _whole(power * patch_px / footprint),
        "overlap": max(0, patch_px - round(step * patch_px / footprint)),
        "level0_width": patches.slide_size[0], "level0_height": patches.slide_size[1],
    }


def _whole(value: float) -> int | float:
    """40 for 40.0: the tools' own numbers are integers where they can be."""
    near = round(value) if np.isfinite(value) else value
    return near if abs(value - near) < 1e-6 else value


def _clam(patches: PatchCoords) -> dict[str, Any]:
    level_size = np.asarray(patches.level_size, np.int64)
    return {"patch_size": patches.patch_size, "patch_level": patches.patch_level,
            "downsample": np.asarray(patches.level_downsample, np.float64),
            "downsampled_level_dim": level_size, "level_dim": level_size}  # both of patch_level


def _own_root(patches: PatchCoords, layout: Layout) -> dict[str, Any]:
    """Ours: what no layout says, and what the layout at hand does not say."""
    root: dict[str, Any] = {
        "output_size": patches.output_size,
        "slide_size": np.asarray(patches.slide_size, np.int64),
        "footprint_px_l0": np.asarray(patches.footprint_px_l0, np.int64),
        "step_px_l0": np.asarray(patches.step_px_l0, np.int64),
        "mpp_um": np.nan if patches.mpp_um is None else float(patches.mpp_um),
        "slide_mpp_um": np.asarray(patches.slide_mpp_um or (np.nan, np.nan), np.float64),
        "objective_power": patches.objective_power or np.nan,
        "background": np.asarray(patches.background, np.uint8),
    }
    if layout != "clam":
        root.update({
            LAYOUT_ATTRIBUTE: layout, "read_level": patches.patch_level,
            "read_size": patches.patch_size, "slide_id": patches.slide_id,
            "level_downsample": np.asarray(patches.level_downsample, np.float64),
            "level_size": np.asarray(patches.level_size, np.int64)})
    if layout != "clam" or patches.level_free:
        root["level_free"] = patches.level_free
    return root


def _atlaspatch(patches: PatchCoords, coords: np.ndarray, slide_path: str | None
                ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    read = (patches.patch_size, patches.patch_size, patches.patch_level)
    rows = np.hstack([coords, np.broadcast_to(read, (len(coords), 3))]).astype(np.int32)
    wsi_path = slide_path or str(patches.parameters.get("slide_name", patches.slide_id))
    attributes = {
        **geometry(patches, patches.output_size), "wsi_path": wsi_path,
        "filename": Path(wsi_path).name, "passport_format": PASSPORT,
        "passport_version": PASSPORT_VERSION, "num_patches": len(coords),
        "creation_date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if patches.slide_mpp_um is not None:
        attributes["mpp"] = sum(patches.slide_mpp_um) / 2
    if patches.objective_power is not None:
        attributes["magnification"] = _whole(patches.objective_power)
    return {"coords": rows, "passports": _passports(patches.slide_id, rows, attributes)}, attributes


def _passports(slide_id: str, rows: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    """(N,) fixed strings, a row's numbers in words. AtlasPatch cuts long names, so we do."""
    fixed = {"stem": slide_id, "total": len(rows), "mag": attributes["level0_magnification"],
             "target_mag": attributes["target_magnification"]}
    names = ("x", "y", "read_w", "read_h", "level")
    texts = [PASSPORT.format(**fixed, **dict(zip(names, row, strict=True))).encode()
             for row in rows.tolist()]
    return np.array(texts, dtype=f"S{PASSPORT_BYTES}")


# ---------------------------------------------------------------------------- what is read

def layout_of(data: H5Data) -> Layout:
    """Whose layout a file with ``coords`` has."""
    named = data.root.get(LAYOUT_ATTRIBUTE)
    if named in LAYOUTS:
        return LAYOUTS[LAYOUTS.index(named)]
    coords, attrs = data.arrays["coords"], data.attrs["coords"]
    if coords.ndim == 2 and coords.shape[1] == 5:
        return "atlaspatch"
    tridents = "patch_size_level0" in attrs or "target_magnification" in attrs
    return "trident" if tridents and "patch_level" not in attrs else "clam"


def read_fields(path: Path, data: H5Data) -> dict[str, Any]:
    """What the file says of a ``PatchCoords``: as its tool means it, then what ours adds.

    ``BrokenFile`` naming the missing attribute; Type-, Value- and IndexError for attributes that
    make no sense.
    """
    layout = layout_of(data)
    coords, root = data.arrays["coords"], data.root
    columns = 5 if layout == "atlaspatch" else 2
    if coords.size == 0:
        coords = np.empty((0, columns), np.int64)
    elif coords.ndim != 2 or coords.shape[1] != columns or coords.dtype.kind not in "iu":
        raise BrokenFile(f"{path}: 'coords' has no usable shape {coords.shape} of {coords.dtype}, "
                         f"expected (N, {columns}) integers")
    attrs = root if layout == "atlaspatch" else data.attrs["coords"]
    for name in ("patch_size", "patch_level") if layout == "clam" else ("patch_size",):
        if name not in attrs:
            raise BrokenFile(f"{path}: 'coords' has no usable attribute '{name}': the px to read "
                             "and their level must be known")
    fields = {"slide_id": path.stem, "coords": coords[:, :2].astype(np.int64)}
    if layout == "clam":
        fields.update(_from_clam(attrs))
    elif layout == "trident":
        fields.update(_from_trident(path, attrs))
    else:
        fields.update(_from_atlaspatch(path, attrs, coords))
    return {**fields, **_from_ours(root)}


def _from_clam(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """CLAM's, and its variants that write ``custom_downsample``: the px are counted after it."""
    output = int(attrs["patch_size"])
    patch_size = output * int(attrs.get("custom_downsample", 1))
    downsample = pair(attrs.get("downsample", (1.0, 1.0)), float)
    level_size = pair(attrs.get("level_dim", (0, 0)), int)
    footprint = tuple(round(patch_size * factor) for factor in downsample)
    fields = {
        "patch_size": patch_size, "patch_level": int(attrs["patch_level"]), "output_size": output,
        "level_downsample": downsample, "level_size": level_size,
        "slide_size": tuple(round(side * factor)
                            for side, factor in zip(level_size, downsample, strict=True)),
        "footprint_px_l0": footprint, "step_px_l0": footprint}
    return {**fields, "slide_id": str(attrs["name"])} if "name" in attrs else fields


def _from_trident(path: Path, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The level to read is not said: see ``with_best_level``."""
    footprint = _footprint(path, attrs)
    slide_id = str(attrs.get("name", path.stem.removesuffix(TRIDENT_SUFFIX)))
    return {**_unread(attrs, footprint), "slide_id": slide_id}


def _from_atlaspatch(path: Path, attrs: Mapping[str, Any], coords: np.ndarray) -> dict[str, Any]:
    fields = _unread(attrs, _footprint(path, attrs))
    mpp = float(attrs.get("mpp", np.nan))
    if np.isfinite(mpp):
        scale = fields["footprint_px_l0"][0] / fields["output_size"]
        fields.update(slide_mpp_um=(mpp, mpp), mpp_um=mpp * scale)
    if not len(coords):
        return fields
    width, height, level = map(int, coords[0, 2:])
    if width != height or (coords[:, 2:] != coords[0, 2:]).any():
        raise BrokenFile(f"{path}: its patches are not all read alike (read_w, read_h and level "
                         "differ, or are not square), which no slide model takes: make them anew")
    factor = fields["footprint_px_l0"][0] / width
    level_size = tuple(round(side / factor) for side in fields["slide_size"])
    return {**fields, "level_free": False, "patch_level": level, "patch_size": width,
            "level_downsample": (factor, factor), "level_size": level_size}


def _footprint(path: Path, attrs: Mapping[str, Any]) -> int:
    """Side of a patch in level-0 px, as said, or from the magnifications."""
    if "patch_size_level0" in attrs:
        return round(float(attrs["patch_size_level0"]))
    names = ("level0_magnification", "target_magnification")
    missing = [name for name in names if name not in attrs]
    if missing:
        raise BrokenFile(f"{path}: has neither 'patch_size_level0' nor '{missing[0]}', so it is "
                         "unknown what a patch covers: make it anew")
    level0, target = (float(attrs[name]) for name in names)
    return round(float(attrs["patch_size"]) * level0 / target)


def _unread(attrs: Mapping[str, Any], footprint: int) -> dict[str, Any]:
    """Patches of so many level-0 px, to be read from level 0 until another level is chosen."""
    patch_px = int(attrs["patch_size"])
    if footprint < 1 or patch_px < 1:
        raise ValueError(f"patches of {patch_px} px, {footprint} at level 0")
    step = round((patch_px - float(attrs.get("overlap", 0))) * footprint / patch_px)
    size = (int(attrs.get("level0_width", 0)), int(attrs.get("level0_height", 0)))
    power = float(attrs.get("level0_magnification", np.nan))
    return {"patch_size": footprint, "patch_level": 0, "output_size": patch_px,
            "level_downsample": (1.0, 1.0), "level_size": size, "slide_size": size,
            "footprint_px_l0": (footprint, footprint), "step_px_l0": (step, step),
            "objective_power": power if np.isfinite(power) and power > 0 else None,
            "level_free": True}


def _from_ours(root: Mapping[str, Any]) -> dict[str, Any]:
    """What our attributes of the root say, where there are any."""
    kinds = {"slide_id": ("slide_id", str), "output_size": ("output_size", int),
             "read_size": ("patch_size", int), "read_level": ("patch_level", int),
             "level_free": ("level_free", bool)}
    fields: dict[str, Any] = {name: kind(root[key]) for key, (name, kind) in kinds.items()
                              if key in root}
    for name in ("slide_size", "footprint_px_l0", "step_px_l0", "level_size"):
        if name in root:
            fields[name] = pair(root[name], int)
    if "level_downsample" in root:
        fields["level_downsample"] = pair(root["level_downsample"], float)
    for name in ("mpp_um", "objective_power"):
        if name in root:
            fields[name] = None if np.isnan(root[name]) else float(root[name])
    if "slide_mpp_um" in root:
        slide_mpp = pair(root["slide_mpp_um"], float)
        fields["slide_mpp_um"] = None if np.isnan(slide_mpp[0]) else slide_mpp
    return fields


def pair(value: Any, kind: Any) -> Any:
    """(x, y) out of an attribute of two numbers."""
    x, y = value
    return kind(x), kind(y)


def with_best_level(patches: PatchCoords, slide: Slide) -> PatchCoords:
    """Patches of TRIDENT's files with the level to read: the coarsest that has all their pixels.

    Others already name a level and are returned as they are. What the file does not know of the
    slide (sizes, um per px) is taken from it as well.
    """
    if not patches.level_free:
        return patches
    side = patches.footprint_px_l0[0]
    level = best_level(slide, side / patches.output_size)
    x, y = slide.level_downsamples[level]
    own_mpp = patches.slide_mpp_um or slide.mpp_um
    return replace(
        patches, level_free=False, patch_level=level, level_downsample=(x, y),
        patch_size=max(1, round(side / nominal_downsample((x + y) / 2))),
        level_size=slide.level_dimensions[level], slide_size=slide.level_dimensions[0],
        slide_mpp_um=own_mpp, objective_power=patches.objective_power or slide.objective_power,
        mpp_um=patches.mpp_um if own_mpp is None else
        sum(own_mpp) / 2 * side / patches.output_size)
