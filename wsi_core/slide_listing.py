"""Which slides a run has: names and files, and the pixel sizes that the user knows better.

A slide's name is a file name; it names all results, so two of a kind are refused. Slides in
sub-folders keep their file name, or (``--id_from_path``) are called ``folder__name``; where they
lie is in the column ``path`` of the process list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from utils.errors import Refused
from utils.storage import read_table, safe_id
from wsi_core.process_list import PATH_COLUMN, ProcessList, parse_mpp
from wsi_core.slide import slide_entries

NAME_COLUMNS = ("slide_id", "wsi", "slide")  # AtlasPatch and TRIDENT call it wsi
JOINT = "__"
MASKS = "tissue_masks"  # folder in save_dir that learned segmenters write into


def list_slides(source: Path, *, recursive: bool = False, id_from_path: bool = False,
                endings: Sequence[str] = ()) -> dict[str, str]:
    """Name -> path inside ``source``, of the slides of a folder; ``Refused`` when there are none.

    endings: only names that end so, capitals or not; () = all. Without ``recursive`` every file
    directly in it counts, hidden ones left out, and folders that are one slide (DICOM, Zarr); with
    it, what has a slide's extension, in any sub-folder.
    """
    try:
        entries = [entry.relative_to(source)
                   for entry in slide_entries(source, recursive=recursive)
                   if not endings or entry.name.casefold().endswith(
                       tuple(map(str.casefold, endings)))]
    except OSError as error:
        raise Refused(f"--source {source} cannot be read ({error.strerror}): give the folder "
                      "with the slides") from None
    if not entries and endings:
        raise Refused(f"--source {source} has no slides that end with {', '.join(endings)}: "
                      "correct --slide_ext")
    if not entries:
        raise Refused(f"--source {source} has no files: give the folder that holds the slides "
                      "themselves" + ("" if recursive else
                                      " (sub-folders are searched with --recursive)"))
    slides: dict[str, str] = {}
    for entry in entries:
        name = JOINT.join(entry.parts) if id_from_path else entry.name
        if name in slides:
            raise Refused(f"{source / slides[name]} and {source / entry} have the same name: give "
                          "--id_from_path, which calls slides folder__name")
        slides[name] = str(entry)
    return slides


def slide_file(source: Path, name: str, row: Mapping[str, str]) -> Path:
    """The file of a row of the process list; ``Refused`` when it would lie outside ``source``.

    A link that the user put into the folder is followed wherever it leads.
    """
    path = row.get(PATH_COLUMN, "").strip() or name
    for part in Path(path).parts:
        safe_id(part, what=f"{PATH_COLUMN} {path!r} of {name}: its part")
    return source / path


def check_stems(listing: ProcessList, source: Path) -> None:
    """``Refused`` when two slides of the list would write results of the same name, on a file
    system that does not tell capitals from small letters, too."""
    stems: dict[str, str] = {}
    for name, row in listing.rows.items():
        stem = Path(name).stem
        other = stems.setdefault(stem.casefold(), name)
        if other != name:
            paths = [slide_file(source, one, cells) for one, cells in
                     ((other, listing.rows[other]), (name, row))]
            raise Refused(f"{paths[0]} and {paths[1]} would both become {stem}.h5: "
                          "rename one of them, give each a folder and a --save_dir of its own, or "
                          "(slides in sub-folders) give --recursive --id_from_path")


def read_mpp_csv(path: Path) -> dict[str, float]:
    """Slide name (file name, or without its extension) -> um per level-0 px.

    ``Refused``: no such column, a value that is no pixel size, a slide named twice differently.
    """
    table = read_table(path, what="--mpp_csv")
    name_column = next((name for name in NAME_COLUMNS if name in table.columns), None)
    if name_column is None or "mpp" not in table.columns:
        raise Refused(f"--mpp_csv {path} has the columns {', '.join(table.columns[:8])}, expected "
                      f"mpp and one of {', '.join(NAME_COLUMNS)}")
    sizes: dict[str, float] = {}
    for line, (name, cell) in enumerate(zip(table[name_column], table["mpp"], strict=True), 2):
        mpp_um = parse_mpp(str(cell), where=f"--mpp_csv {path}, line {line} ({name}): ")
        if mpp_um is None:
            continue
        if sizes.setdefault(str(name), mpp_um) != mpp_um:
            raise Refused(f"--mpp_csv {path} gives {name} twice, {sizes[str(name)]:g} and "
                          f"{mpp_um:g} um: remove one")
    if not sizes:
        raise Refused(f"--mpp_csv {path} gives no pixel size")
    return sizes


def unused_sizes(sizes: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Names in the csv that no slide of the run has."""
    known = {form for name in names for form in (name, Path(name).stem)}
    return [name for name in sizes if name not in known]


def known_mpp(sizes: Mapping[str, float], name: str) -> float | None:
    """A slide's pixel size by its name, with or without the extension."""
    return sizes.get(name, sizes.get(Path(name).stem))
