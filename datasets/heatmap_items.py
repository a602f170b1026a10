"""Which slides get a heatmap: the process list (or a folder), checked before any work.

Column names are CLAM's: ``slide_id``, optional ``label``, ``process``, the segmentation
parameters, ``x1,x2,y1,y2`` of a region, and the column with the key of a folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets.heatmap_config import DataArguments
from utils.errors import Refused
from utils.storage import inside, safe_id
from wsi_core.presets import HEATMAP_DEFAULTS, PatchingParameters, load_preset
from wsi_core.process_list import (
    ProcessList,
    new_list,
    read_list,
    row_mpp,
    row_parameters,
    to_process,
)
from wsi_core.slide import is_slide_file

PROCESS_LISTS = Path("heatmaps/process_lists")
UNSPECIFIED = "Unspecified"  # CLAM's folder for slides without a label


@dataclass(frozen=True, kw_only=True)
class HeatmapItem:
    """One slide to draw.

    slide_id: file name without ``slide_ext``; label: class name or ``Unspecified``
    roi_l0: x1, y1, x2, y2 in level-0 px, or None for the whole slide
    process: False = a row that is carried along untouched
    mpp_um: the user's word on the pixel size of level 0, a column ``mpp``
    """

    slide_id: str
    slide_path: Path
    label: str
    segmentation: PatchingParameters
    roi_l0: tuple[int, int, int, int] | None = None
    process: bool = True
    mpp_um: float | None = None


def list_items(
    data: DataArguments, *, use_roi: bool = False
) -> tuple[ProcessList, list[HeatmapItem]]:
    """The process list (or one made of ``data_dir``), and an item for each of its rows.

    Raises ``Refused`` for a missing column, bad cells, unsafe or repeated ids, unknown labels.
    """
    defaults = HEATMAP_DEFAULTS if data.preset is None else load_preset(data.preset)
    source, table = _read_rows(data, defaults)
    items = []
    for number, row in enumerate(table.rows.values(), start=2):  # line 1 is the header
        try:
            slide_id, path = _locate(row, data)
            items.append(HeatmapItem(
                slide_id=slide_id, slide_path=path, process=to_process(row),
                label=_label(row.get("label", ""), data.label_dict),
                segmentation=row_parameters(row, defaults), mpp_um=row_mpp(row),
                roi_l0=_roi(row) if use_roi and to_process(row) else None))
        except Refused as error:
            raise Refused(f"{source}, line {number} ({row['slide_id']}): {error}") from None
    ids = [item.slide_id for item in items]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        paths = [str(item.slide_path) for item in items if item.slide_id == twice[0]]
        raise Refused(f"{source}: slide '{twice[0]}' is there {len(paths)} times "
                      f"({', '.join(paths)}): their results would share a folder")
    return table, items


# ---------------------------------------------------------------------------- rows and folders

def _read_rows(
    data: DataArguments, defaults: PatchingParameters
) -> tuple[str, ProcessList]:
    if data.process_list is None:
        return "data_dir", _list_folders(data, defaults)
    path = find_process_list(data.process_list)
    table = read_list(path, defaults)
    if isinstance(data.data_dir, dict) and data.data_dir_key not in table.columns:
        raise Refused(f"process list {path} has no column '{data.data_dir_key}' (data_dir_key), "
                      f"which says in which of {', '.join(data.data_dir)} a slide lies")
    if not table.rows:
        raise Refused(f"process list {path} has no rows")
    return str(path), table


def find_process_list(name: str) -> Path:
    """A list by its name in ``heatmaps/process_lists/`` or by path."""
    own = PROCESS_LISTS / name
    return own if own.is_file() else Path(name)


def _list_folders(data: DataArguments, defaults: PatchingParameters) -> ProcessList:
    """A row a slide file of the folders, in name order; the key column says which folder."""
    folders = _folders(data.data_dir)
    keys = list(data.data_dir) if isinstance(data.data_dir, dict) else list(map(str, folders))
    found = []
    for key, folder in zip(keys, folders, strict=True):
        if not folder.is_dir():
            raise Refused(f"data_dir {folder} is not a folder")
        found += [(path.name, key) for path in sorted(folder.iterdir())
                  if path.name.endswith(data.slide_ext) and (
                      path.is_file() or is_slide_file(path))]
    if not found:
        raise Refused(f"no file ends with '{data.slide_ext}' in "
                      f"{', '.join(map(str, folders))}: correct data_dir or slide_ext")
    names = [name for name, _ in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        where = ", ".join(key for name, key in found if name == twice[0])
        raise Refused(f"data_dir: slide '{twice[0]}' is in several folders ({where}): their "
                      "results would share a folder")
    table = new_list(names, defaults)
    if len(folders) > 1 or isinstance(data.data_dir, dict):
        table.columns.append(data.data_dir_key)
        for row, (_, key) in zip(table.rows.values(), found, strict=True):
            row[data.data_dir_key] = key
    return table


def _folders(data_dir: str | tuple[str, ...] | dict[str, str]) -> list[Path]:
    if isinstance(data_dir, dict):
        return [Path(folder) for folder in data_dir.values()]
    return [Path(data_dir)] if isinstance(data_dir, str) else [Path(part) for part in data_dir]


def _locate(row: Mapping[str, str], data: DataArguments) -> tuple[str, Path]:
    """Slide id and file; the file may be missing, which then fails that slide alone."""
    name = row["slide_id"] if row["slide_id"].endswith(data.slide_ext) \
        else row["slide_id"] + data.slide_ext
    slide_id = safe_id(name.removesuffix(data.slide_ext))
    key = row.get(data.data_dir_key, "")
    if isinstance(data.data_dir, dict):
        if key not in data.data_dir:
            raise Refused(f"{data.data_dir_key} is '{key}', data_dir has: "
                          f"{', '.join(data.data_dir)}")
        return slide_id, inside(Path(data.data_dir[key]), name)
    folders = _folders(data.data_dir)
    named = [folder for folder in folders if str(folder) == key]
    candidates = [inside(folder, name) for folder in (named or folders)]
    there = [path for path in candidates if path.exists()]
    if len(there) > 1:
        raise Refused(f"the slide is in several folders ({', '.join(map(str, there))}): "
                      f"name one in the column '{data.data_dir_key}'")
    return slide_id, (there or candidates)[0]


# ---------------------------------------------------------------------------- cells

def _label(cell: str, label_dict: Mapping[str, int] | None) -> str:
    text = cell.strip()
    if not text:
        return UNSPECIFIED
    if label_dict is None or text in label_dict:
        return safe_id(text, what="label")
    for name, number in label_dict.items():
        if text in (str(number), f"{number}.0"):
            return name
    near = difflib.get_close_matches(text, label_dict, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"label_dict has: {', '.join(label_dict)}"
    raise Refused(f"unknown label '{text}', {hint}")


def _roi(row: Mapping[str, str]) -> tuple[int, int, int, int]:
    try:
        x1, y1, x2, y2 = (round(float(row[name])) for name in ("x1", "y1", "x2", "y2"))
    except (KeyError, ValueError, OverflowError):
        raise Refused("use_roi needs numbers in the columns x1, x2, y1, y2 "
                      "(level-0 px)") from None
    if x1 >= x2 or y1 >= y2:
        raise Refused(f"the region x {x1}-{x2}, y {y1}-{y2} is empty, expected "
                      "x1 < x2 and y1 < y2")
    return x1, y1, x2, y2
