"""The process list: a csv with a row a slide that says what to do and what was done.

It is written at the end of every run (``process_list_autogen.csv``), edited by hand, and given
back with ``--process_list``. Cells are kept as text, columns of the user keep their place.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.errors import Refused
from utils.report import Row, Status
from utils.storage import read_table, safe_id, write_text
from wsi_core.presets import PARAMETER_NAMES, PatchingParameters, format_cell, parse_parameters
from wsi_core.tissue import UNIT_AREA_PX_L0

AUTOGEN = "process_list_autogen.csv"
TO_BE_PROCESSED = "tbp"
LIST_STATUS = {Status.DONE: "processed", Status.SKIPPED: "already_exist", Status.EMPTY: "no_tissue",
               Status.FAILED: "failed", Status.BUSY: TO_BE_PROCESSED}
LISTED_PARAMETERS = tuple(name for name in PARAMETER_NAMES
                          if name not in ("white_thresh", "black_thresh"))
CANONICAL_COLUMNS = ("slide_id", "process", "status", *LISTED_PARAMETERS)
RESULT_COLUMNS = ("n_contours", "n_patches", "mpp_used", "reason")
PATH_COLUMN = "path"  # of slides in sub-folders: where they lie, from --source on
LEGACY_AREA = "a"  # lists of old: smallest area in pixels of seg_level
_RESET_BY_LEGACY = ("a_t", "a_h", "max_n_holes", "line_thickness", "contour_fn")

Cells = dict[str, str]


@dataclass
class ProcessList:
    """Column names in their order, and a row of text cells for each slide, by its file name."""

    columns: list[str]
    rows: dict[str, Cells]

    def settle(self, name: str, row: Row) -> None:
        """Write a slide's end into its cells; what failed or is held is to be tried again."""
        cells = self.rows[name]
        cells["status"] = LIST_STATUS[row.status]
        if row.status not in (Status.FAILED, Status.BUSY):
            cells["process"] = "0"
        cells["reason"] = row.reason
        cells.update({key: str(value) for key, value in row.numbers.items()
                      if key in self.columns})

    def copy(self, reason: str) -> ProcessList:
        """A list of the same slides with nothing done, for ``reason``."""
        fresh = {"process": "1", "status": TO_BE_PROCESSED, "n_patches": "", "reason": reason}
        return ProcessList(list(self.columns),
                           {name: {**cells, **fresh} for name, cells in self.rows.items()})

    def save(self, path: Path) -> None:
        """Write the csv, whole or not at all."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        write_text(path, text.getvalue())


def new_list(slide_ids: Iterable[str], defaults: PatchingParameters, *,
             paths: Mapping[str, str] | None = None) -> ProcessList:
    """A list in which every slide (file name with extension) is to be processed.

    paths: where slides lie that are not directly in the source folder, by name; they make the
    column ``path``.
    """
    rows = [{"slide_id": name, **({PATH_COLUMN: paths[name]} if paths else {})}
            for name in slide_ids]
    return _complete(["slide_id", *([PATH_COLUMN] if paths else [])], rows, defaults)


def read_list(path: Path, defaults: PatchingParameters) -> ProcessList:
    """A list edited by hand; missing columns and empty cells are filled with ``defaults``.

    ``Refused`` when there is no ``slide_id`` column, or an id is no plain name or comes twice.
    """
    table = read_table(path, what="process list")
    columns = list(table.columns)
    if "slide_id" not in columns:
        raise Refused(f"process list {path} has no column 'slide_id' (its columns: "
                      f"{', '.join(columns[:8])}): add it, with file names such as a.svs")
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise Refused(f"process list {path} has the column '{twice}' twice: remove one")
    rows = [dict(zip(columns, map(str, cells), strict=True))
            for cells in table.itertuples(index=False, name=None)]
    seen: dict[str, int] = {}
    for line, row in enumerate(rows, start=2):
        name = safe_id(row["slide_id"], what=f"{path}, line {line}: slide_id")
        if name in seen:
            raise Refused(f"process list {path} has {name} twice (lines {seen[name]} and {line}): "
                          "remove one of them")
        seen[name] = line
    return _complete(columns, rows, defaults)


def _complete(columns: list[str], rows: list[Cells], defaults: PatchingParameters) -> ProcessList:
    fills = {"process": "1", "status": TO_BE_PROCESSED,
             **{name: format_cell(getattr(defaults, name)) for name in LISTED_PARAMETERS}}
    for row in rows:
        row.update({name: text for name, text in fills.items() if not row.get(name, "").strip()})
    wanted = (*CANONICAL_COLUMNS, *RESULT_COLUMNS)
    return ProcessList([*columns, *(name for name in wanted if name not in columns)],
                       {row["slide_id"]: row for row in rows})


def to_process(row: Mapping[str, str]) -> bool:
    """Whether the row's ``process`` cell says so; ``Refused`` when it is neither 1 nor 0."""
    answers = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
    answer = answers.get(row["process"].strip().lower())
    if answer is None:
        raise Refused(f"process is {row['process']!r}, expected 1 or 0")
    return answer


def row_parameters(row: Mapping[str, str], defaults: PatchingParameters) -> PatchingParameters:
    """The parameters in a row, or ``Refused`` naming the cell."""
    return parse_parameters(row, defaults=defaults)


def row_mpp(row: Mapping[str, str]) -> float | None:
    """um per level-0 px that the user gives in a column ``mpp``; None when the cell is empty."""
    return parse_mpp(row.get("mpp", ""))


def parse_mpp(cell: str, *, where: str = "") -> float | None:
    """um per level-0 px in a cell, None when it is empty; ``Refused``, beginning with ``where``,
    when it is no pixel size."""
    text = cell.strip()
    if not text:
        return None
    try:
        mpp_um = float(text)
    except ValueError:
        mpp_um = 0.0
    if not 0.01 <= mpp_um <= 100:
        raise Refused(f"{where}mpp is {text!r}, expected micrometres per pixel such as 0.25")
    return mpp_um


def is_legacy(row: Mapping[str, str]) -> bool:
    """Whether the row gives its area filter the old way, as a number of pixels in column ``a``."""
    return bool(row.get(LEGACY_AREA, "").strip())


def convert_legacy(
    row: Cells, defaults: PatchingParameters, downsample: tuple[float, float]
) -> None:
    """Turn an old row into a current one, in place.

    ``a`` (px of the row's seg_level, whose (x, y) downsample is given) becomes ``a_t``; the other
    filter and drawing cells become ``defaults``, the levels automatic. The cell ``a`` is emptied,
    so that the saved list is not converted again.
    """
    try:
        area = float(row[LEGACY_AREA])
    except ValueError:
        raise Refused(f"a is {row[LEGACY_AREA]!r}, expected an area in pixels") from None
    row.update({name: format_cell(getattr(defaults, name)) for name in _RESET_BY_LEGACY})
    row["a_t"] = str(int(area * downsample[0] * downsample[1] / UNIT_AREA_PX_L0))
    row.update({"seg_level": "-1", "vis_level": "-1", LEGACY_AREA: ""})
