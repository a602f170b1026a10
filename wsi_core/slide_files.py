"""Which files and folders are slides, before any of them is opened.

A slide is one file, a folder with the .dcm files of one series, or a ``.zarr`` folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import SlideError

DICOM_SUFFIXES = frozenset((".dcm", ".dicom"))
ZARR_SUFFIX = ".zarr"
SLIDE_SUFFIXES = DICOM_SUFFIXES | frozenset((
    ".svs", ".svslide", ".tif", ".tiff", ".btf", ".tf8", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs",
    ".bif", ".czi", ".png", ".jpg", ".jpeg", ".bmp", ".webp", ZARR_SUFFIX))
"""Known endings of slides and pictures, in small letters; a name's own case does not matter."""

# Hamamatsu's .vms and .vmu are lists of the files that hold the pixels (OpenSlide's format notes)
_HAMAMATSU_PART = re.compile(
    r"^(?:ImageFile\S*|MapFile|OptimisationFile|MacroImage) *= *(.+?) *$", re.MULTILINE)
_HAMAMATSU_LIST_BYTES = 2**20


# ---------------------------------------------------------------------------- one path

def is_dicom_folder(path: Path) -> bool:
    """Whether ``path`` is a folder that directly holds .dcm files."""
    return path.is_dir() and any(
        one.suffix.lower() in DICOM_SUFFIXES and one.is_file() for one in path.iterdir())


def is_zarr_folder(path: Path) -> bool:
    """Whether ``path`` is a folder by the name of a Zarr hierarchy."""
    return path.suffix.lower() == ZARR_SUFFIX and path.is_dir()


def is_slide_file(path: Path) -> bool:
    """Whether ``path`` looks like a slide: by its ending, a folder by its content. Not opened."""
    path = Path(path)
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return is_zarr_folder(path) or is_dicom_folder(path)
    return path.suffix.lower() in SLIDE_SUFFIXES - {ZARR_SUFFIX}


def check_file(path: Path) -> None:
    """Raise SlideError unless ``path`` is a readable file with something in it, or a folder that
    is a slide."""
    try:
        if path.is_dir():
            if not is_zarr_folder(path) and not is_dicom_folder(path):
                raise SlideError(f"{path}: is a folder, a slide file was expected (or a folder of "
                                 ".dcm files, or one named .zarr)")
            return
        if path.stat().st_size == 0:
            raise SlideError(f"{path}: the file is empty (0 bytes): copy the slide again")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise SlideError(f"{path}: is a link to a file that is not there" if path.is_symlink()
                         else f"{path}: no such file") from None
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror})") from None


# ---------------------------------------------------------------------------- same slide?

@dataclass(frozen=True)
class Stamp:
    """How a slide lies on the disk: to notice within a run that it was replaced; never stored.

    changed_ns: time of the newest change of one of its files
    """

    n_bytes: int
    n_files: int
    changed_ns: int


def stamp(path: Path) -> Stamp:
    """The slide's bytes, files and newest change; of a folder, those of all that is in it."""
    path = Path(path)
    try:
        found = list(_statuses(path)) if path.is_dir() else [path.stat()]
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror})") from None
    return Stamp(sum(one.st_size for one in found), len(found),
                 max((one.st_mtime_ns for one in found), default=0))


def _statuses(folder: Path) -> Iterator[os.stat_result]:
    """Of all files in a folder and below, with one look at each: a Zarr can have 100,000."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _statuses(Path(entry.path))
            else:
                yield entry.stat()


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells one slide from another in the parameters of a result; no times.

    A folder also has the number of its files in it.
    """
    path = Path(path)
    found = stamp(path)
    files = {"slide_files": found.n_files} if path.is_dir() else {}
    return {"slide_bytes": found.n_bytes, **files, "slide_name": path.name}


# ---------------------------------------------------------------------------- a folder of slides

def slide_entries(folder: Path, *, recursive: bool) -> list[Path]:
    """The slides in a folder, hidden ones left out, sorted by their path inside it.

    Directly in it every file counts whatever its ending, and so do folders that are slides.
    ``recursive`` goes into the other folders too, and takes only what ``is_slide_file``. Left out
    are the parts of slides: the folder beside an .mrxs, the pictures that a .vms or .vmu names.
    Links are followed, but not in a circle; a link to nothing is listed, so that it is reported.
    Raises OSError when a folder cannot be read.
    """
    folder = Path(folder)
    found = _walk(folder, recursive=recursive, above=frozenset())
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _walk(folder: Path, *, recursive: bool, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """See ``slide_entries``. above: device and inode of the folders we came through, to end
    circles of links."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as scan:
        entries = {Path(entry.path): entry.is_dir() for entry in scan
                   if not entry.name.startswith(".")}
    for path in entries.keys() - _parts(entries):
        if not entries[path]:
            if not recursive or path.suffix.lower() in SLIDE_SUFFIXES:
                yield path
        elif is_slide_file(path):
            yield path
        elif recursive:
            yield from _walk(path, recursive=True, above=above | {here})


def _parts(entries: Iterable[Path]) -> set[Path]:
    """What of a folder's entries belongs to a slide that is another one of them."""
    parts: set[Path] = set()
    for path in entries:
        if path.suffix.lower() == ".mrxs":
            parts.add(path.with_suffix(""))
        elif path.suffix.lower() in (".vms", ".vmu") and path.is_file():
            with path.open("rb") as file:
                text = file.read(_HAMAMATSU_LIST_BYTES).decode("latin-1").replace("\r", "")
            parts.update(path.with_name(name) for name in _HAMAMATSU_PART.findall(text)
                         if name and "/" not in name and "\0" not in name)
    return parts
