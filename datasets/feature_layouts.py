"""Feature files as CLAM, TRIDENT, AtlasPatch and STAMP lay them out: where they lie, how to read.

``clam``        ``h5_files/<slide>.h5``, ``pt_files/<slide>.pt``
``trident``     ``features_<encoder>/<slide>.h5``: ``features`` (N, D), ``coords`` with attributes
``atlaspatch``  ``patches/<slide>.h5``: data sets ``features/<encoder>`` beside ``coords`` (N, 5)

AtlasPatch's file holds several encoders. Each data set of ours carries its own record, whose
checksum covers the coordinates too; the record of the file is that of the coordinates. STAMP's
``<slide>.h5`` (``feats``) is read without its coordinates, whose unit is not level-0 px.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from glob import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from utils import __version__
from utils.errors import BrokenFile, ItemFailed, Refused
from utils.storage import (
    RECORD_DIGEST,
    RECORD_PARAMETERS,
    RECORD_SCHEMA,
    RECORD_STATUS,
    RECORD_VERSION,
    SCHEMA_VERSION,
    H5Data,
    canonical,
    digest,
    read_h5,
    write_bytes,
)
from wsi_core.coords import PatchCoords, copy_groups, write_coords
from wsi_core.layouts import Layout, layout_of

if TYPE_CHECKING:
    import h5py

GROUP, STAMP = "features", "feats"
TRIDENT_PREFIX = "features_"
CHUNK_ROWS = {"features": 256}  # what a reader of single rows of a finer level reads at once
READ_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)


class FeatureFile(NamedTuple):
    """Where a slide's features are. dataset: ``features``, ``feats`` or ``features/<encoder>``"""

    path: Path
    dataset: str = GROUP

    @property
    def located(self) -> bool:
        """Are its coordinates in level-0 px?"""
        return self.dataset != STAMP

    @property
    def columns(self) -> int:
        """Of its coordinates: AtlasPatch's have 5."""
        return 5 if "/" in self.dataset else 2

    @property
    def encoder(self) -> str | None:
        """The encoder that the place names, as ``encoder_label`` writes it; None for CLAM's."""
        if self.dataset.startswith(f"{GROUP}/"):
            return self.dataset.removeprefix(f"{GROUP}/")
        folder = self.path.parent.name
        return folder.removeprefix(TRIDENT_PREFIX) if folder.startswith(TRIDENT_PREFIX) else None


def encoder_label(name: str) -> str:
    """An encoder's name as a folder or data set may be called: ``timm:a/b`` -> ``timm_a_b``."""
    return re.sub(r"[^\w.+-]+", "_", name)


def check_layout(layout: Layout, *, finer_levels: bool, bad_tiles: Literal["fail", "drop"]) -> None:
    """``Refused`` for what a layout cannot hold."""
    if layout != "clam" and finer_levels:
        raise Refused(f"finer levels of a hierarchy are written in the layout clam, not {layout}: "
                      "leave --layout out, or --child_levels and --child_mpp")
    if layout == "atlaspatch" and bad_tiles == "drop":
        raise Refused("--bad_tiles drop leaves rows out, but all encoders in a file of the layout "
                      "atlaspatch share its coordinates: give --layout clam or trident")


# ---------------------------------------------------------------------------- finding

def locate(folder: Path, slide_id: str, encoder: str | None = None) -> FeatureFile | None:
    """The features of a slide under a folder in any layout, CLAM's first; None without.

    folder: a feature folder of any of the tools; TRIDENT's is that of an encoder or its parent
    encoder: which, where there are several; ``Refused``, with their names, when none is given.
        Ours of several in CLAM's layout lie in a folder each, which may be named instead
    """
    own = [] if encoder is None else [folder / encoder_label(encoder)]
    for root in (*own, folder):
        for place, suffix in (("h5_files", ".h5"), ("pt_files", ".pt")):
            path = root / place / (slide_id + suffix)
            if path.is_file():
                return FeatureFile(path)
    path = folder / f"{slide_id}.h5"
    if path.is_file() and (found := _locate_in(path, encoder)):
        return found
    beside = [encoders.name.removeprefix(TRIDENT_PREFIX)
              for encoders in sorted(folder.glob(f"{TRIDENT_PREFIX}*/"))
              if (encoders / f"{slide_id}.h5").is_file()]
    if (name := _chosen(beside, encoder, folder)) is not None:
        return FeatureFile(folder / f"{TRIDENT_PREFIX}{name}" / f"{slide_id}.h5")
    ours = sorted({path.parent.parent.name for kind in ("h5", "pt")
                   for path in folder.glob(f"*/{kind}_files/{escape(slide_id)}.{kind}")})
    if len(ours) > 1 and encoder is None:
        _chosen(ours, encoder, folder)
    path = folder / "patches" / f"{slide_id}.h5"
    return _locate_in(path, encoder) if path.is_file() else None


def _locate_in(path: Path, encoder: str | None) -> FeatureFile | None:
    """The features in an h5; one that cannot be opened counts as having some, to be reported."""
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            if not isinstance(file.get(GROUP), h5py.Group):
                name = STAMP if STAMP in file and "coords" in file else GROUP
                return FeatureFile(path, name) if name in file else None
            names = sorted(file[GROUP])
    except READ_ERRORS:
        return FeatureFile(path)
    chosen = _chosen(names, encoder, path)
    return None if chosen is None else FeatureFile(path, f"{GROUP}/{chosen}")


def _chosen(names: list[str], encoder: str | None, place: Path) -> str | None:
    """The one that is there, or the one asked for, if it is there."""
    if encoder is not None:
        return next((name for name in (encoder, encoder_label(encoder)) if name in names), None)
    if len(names) > 1:
        raise Refused(f"{place} has features of {len(names)} encoders: {', '.join(names)}: choose "
                      "one with --feature_encoder")
    return names[0] if names else None


def list_slides(folder: Path, *, but: Collection[str], encoder: str | None = None) -> set[str]:
    """Ids of slides with features under a folder, in any layout; those of ``but`` left out."""
    clams, others = ({path.stem for pattern in patterns for path in folder.glob(pattern)} - set(but)
                     for patterns in (("h5_files/*.h5", "pt_files/*.pt"),
                                      ("*.h5", f"{TRIDENT_PREFIX}*/*.h5", "patches/*.h5")))
    return clams | {slide_id for slide_id in others if _has_any(folder, slide_id, encoder)}


def _has_any(folder: Path, slide_id: str, encoder: str | None) -> bool:
    try:
        return locate(folder, slide_id, encoder) is not None
    except Refused:  # even those of several encoders
        return True


# ---------------------------------------------------------------------------- reading

def read_features(found: FeatureFile, *, verify: bool = True) -> H5Data:
    """``features`` (N, D), ``coords`` (N, 2) if any, and the record of the features.

    What AtlasPatch and STAMP call otherwise has CLAM's names here; a leading axis of one, which
    TRIDENT may write, is gone. ``BrokenFile`` as ``read_h5``; it also checks the checksum.
    """
    if found.columns == 5:
        return _read_group(found, verify=verify)
    data = read_h5(found.path, verify=verify)
    arrays = {name: squeezed(array) if name in (GROUP, "coords") else array
              for name, array in data.arrays.items()}
    if not found.located:
        del arrays["coords"]
        arrays[GROUP] = squeezed(arrays.pop(STAMP))
    return replace(data, arrays=arrays)


def squeezed(array: Any) -> Any:
    """(1, N, D) as (N, D)."""
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def _read_group(found: FeatureFile, *, verify: bool) -> H5Data:
    import h5py

    path = found.path
    try:
        with h5py.File(path, "r", locking=False) as file:
            features, coords = file[found.dataset][()], file["coords"][()]
            root = dict(file[found.dataset].attrs)
    except FileNotFoundError:
        raise BrokenFile(f"{path} is missing") from None
    except READ_ERRORS as error:
        raise BrokenFile(f"{path} cannot be read ({error}): it is truncated, damaged or no h5 "
                         "file") from None
    if verify and RECORD_DIGEST in root and _digest(features, coords) != root[RECORD_DIGEST]:
        raise BrokenFile(f"{path} fails its checksum: {found.dataset} or the coordinates were "
                         "altered after writing")
    return H5Data(arrays={GROUP: features, "coords": coords[:, :2]}, root=root)


def _digest(features: np.ndarray, coords: np.ndarray) -> str:
    return digest({GROUP: features, "coords": coords})


def stored_parameters(file: h5py.File, dataset: str) -> dict[str, Any]:
    """What made a data set of features, {} when it is not ours; ValueError for no json."""
    text = (file[dataset] if "/" in dataset else file).attrs.get(RECORD_PARAMETERS, "{}")
    return dict(json.loads(text))


# ---------------------------------------------------------------------------- AtlasPatch's group

def has_features(path: Path, encoder: str) -> bool:
    """Does AtlasPatch's file hold features of this encoder? ``BrokenFile`` when unreadable."""
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            return f"{GROUP}/{encoder_label(encoder)}" in file
    except READ_ERRORS as error:
        raise BrokenFile(f"{path} cannot be read ({error})") from None


def write_group(path: Path, features: np.ndarray, patches: PatchCoords, *, encoder: str,
                parameters: Mapping[str, Any]) -> None:
    """Put (N, D) features beside the coordinates of AtlasPatch's file, whole or not at all.

    The file is written anew with everything else that is in it; without one, the coordinates are
    written first. ``ItemFailed`` when it holds features of other coordinates, or is of another
    layout: those stay as they are.
    """
    import h5py

    label = encoder_label(encoder)
    _make_room(path, patches, label)
    dataset = f"{GROUP}/{label}"
    image = BytesIO()
    with h5py.File(path, "r", locking=False) as old, h5py.File(image, "w") as new:
        for name in (name for name in old if isinstance(old[name], h5py.Dataset)):
            old.copy(name, new)
        new.attrs.update(old.attrs)
        copy_groups(path, new, leave_out=dataset)
        rows = max(1, min(CHUNK_ROWS[GROUP], len(features)))
        data = new.create_dataset(
            dataset, data=features, maxshape=(None, features.shape[1]),
            chunks=(rows, features.shape[1]), fletcher32=features.size > 0)
        data.attrs.update({
            "encoder": encoder, RECORD_SCHEMA: SCHEMA_VERSION, RECORD_VERSION: __version__,
            RECORD_PARAMETERS: canonical(parameters),
            RECORD_DIGEST: _digest(features, old["coords"][()]), RECORD_STATUS: "complete"})
    write_bytes(path, image.getbuffer())


def _make_room(path: Path, patches: PatchCoords, label: str) -> None:
    """See to it that the file holds these coordinates in AtlasPatch's layout."""
    try:
        data = read_h5(path)
    except BrokenFile:  # missing, or unreadable: nothing in it can be kept
        write_coords(path, patches, layout="atlaspatch")
        return
    if "coords" not in data.arrays or layout_of(data) != "atlaspatch":
        raise ItemFailed(f"{path} is not in the layout atlaspatch, so it cannot take features: "
                         "give another --feat_dir, or make the coordinates with --layout "
                         "atlaspatch")
    if np.array_equal(data.arrays["coords"][:, :2], patches.coords):
        return
    if others := [name for name in _encoders(path) if name != label]:
        raise ItemFailed(f"{path} holds features of other coordinates ({', '.join(others)}): "
                         "delete it, or give another --feat_dir")
    write_coords(path, patches, layout="atlaspatch")


def _encoders(path: Path) -> list[str]:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        return sorted(file.get(GROUP, ()))
