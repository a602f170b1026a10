"""Which slides an extraction is for: the rows of a csv, their ids and their files."""

from __future__ import annotations

from pathlib import Path

from utils.errors import Refused
from utils.storage import read_table, safe_id
from wsi_core.layouts import find_coords
from wsi_core.process_list import PATH_COLUMN


def list_slides(csv_path: Path, data_h5_dir: Path, slide_dir: Path, slide_ext: str
                ) -> dict[str, Path]:
    """Slide ids (names without extension) and slide files or folders, in the order of the csv.

    A csv may name slides with their extension or without; a column ``path`` says where a slide
    lies, from ``slide_dir`` on. ``Refused``: no such csv, folder or column, a path that leaves the
    folder, or two rows with files of the same id.
    """
    for folder, flag in ((data_h5_dir, "--data_h5_dir"), (slide_dir, "--data_slide_dir")):
        if not folder.is_dir():
            raise Refused(f"{flag}: there is no folder {folder}")
    if not any(data_h5_dir.glob("patches/")) and not any(data_h5_dir.glob("*/patches/")):
        raise Refused(f"--data_h5_dir: there is no folder {data_h5_dir / 'patches'}: run "
                      "create_patches_fp.py --seg --patch")
    table = read_table(csv_path, what="--csv_path")
    if "slide_id" not in table.columns:
        raise Refused(f"--csv_path {csv_path} has no column 'slide_id' (its columns: "
                      f"{', '.join(list(table.columns)[:8])})")
    if not len(table):
        raise Refused(f"--csv_path {csv_path} lists no slides")
    paths = table[PATH_COLUMN] if PATH_COLUMN in table.columns else [""] * len(table)
    slides: dict[str, Path] = {}
    for name, path_cell in zip(map(str, table["slide_id"]), map(str, paths), strict=True):
        safe_id(name)
        slide_id, path = _resolve(name, path_cell.strip(), data_h5_dir, slide_dir, slide_ext)
        if slides.setdefault(slide_id, path) != path:
            raise Refused(f"--csv_path {csv_path}: {slides[slide_id]} and {path} have the same id "
                          f"'{slide_id}', so their features would overwrite each other: rename one")
    return slides


def _resolve(name: str, path_cell: str, data_h5_dir: Path, slide_dir: Path, slide_ext: str
             ) -> tuple[str, Path]:
    """(id, file) of a row."""
    extension = slide_ext if slide_ext.startswith(".") or not slide_ext else f".{slide_ext}"
    named = _within(slide_dir, path_cell or name)
    slide_id = name.removesuffix(named.suffix if path_cell else extension)
    if slide_id == name and not find_coords(data_h5_dir, name).exists() and (
            find_coords(data_h5_dir, Path(name).stem).exists()):
        slide_id = Path(name).stem
    if path_cell or named.exists():
        return slide_id, named
    return slide_id, slide_dir / f"{slide_id}{extension}"


def _within(slide_dir: Path, text: str) -> Path:
    """``slide_dir/text`` unless the text leads out of it; links in the folder are the user's own
    and may lead anywhere."""
    if Path(text).is_absolute() or ".." in Path(text).parts:
        raise Refused(f"{text} would leave the folder {slide_dir}: give a path inside it")
    return slide_dir / text
