"""What tissue segmentation and the patch grid are told: parameters, their defaults, preset files.

Names and defaults are those of CLAM's presets and process lists, one column a parameter. Every
instance is valid: bad values are refused when it is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from utils.errors import Refused
from utils.storage import read_table

ContourRule = Literal["four_pt", "four_pt_hard", "center", "basic"]
CONTOUR_RULES: tuple[str, ...] = get_args(ContourRule)
NO_IDS = "none"  # what an empty list of contour ids is called in a csv


@dataclass(frozen=True, kw_only=True)
class PatchingParameters:
    """Parameters of one slide, in CLAM's names.

    seg_level, vis_level: pyramid levels to segment and to draw on; negative = the largest level
        whose downsample is at most 64 (32 for heatmaps)
    sthresh: saturation above which a pixel is tissue (0-255); use_otsu: find it by Otsu instead
    mthresh: side of the median filter, odd; close: side of the closing square, 0 = none
    keep_ids, exclude_ids: numbers of the contours to keep (empty = all) and to leave out
    a_t, a_h: smallest area of tissue and of a hole, in squares of 512 x 512 level-0 px
    max_n_holes: holes kept in one contour, the largest first
    line_thickness: of outlines in the mask picture, level-0 px
    use_padding: let patches reach beyond the right and lower border of the slide
    contour_fn: which points of a patch must lie in the tissue, see ``wsi_core.grid``
    white_thresh, black_thresh: columns of CLAM's presets that only its old pipeline, which saved
        pixels, acted upon; carried along so that such presets stay readable there
    """

    seg_level: int = -1
    sthresh: int = 8
    mthresh: int = 7
    close: int = 4
    use_otsu: bool = False
    keep_ids: tuple[int, ...] = ()
    exclude_ids: tuple[int, ...] = ()
    a_t: float = 100.0
    a_h: float = 16.0
    max_n_holes: int = 8
    vis_level: int = -1
    line_thickness: int = 250
    white_thresh: int = 5
    black_thresh: int = 50
    use_padding: bool = True
    contour_fn: ContourRule = "four_pt"

    def __post_init__(self) -> None:
        checks = (
            (-1 <= self.seg_level <= 127, "seg_level", "-1 (automatic) or a level number"),
            (-1 <= self.vis_level <= 127, "vis_level", "-1 (automatic) or a level number"),
            (0 <= self.sthresh <= 255, "sthresh", "a number from 0 to 255"),
            (1 <= self.mthresh <= 255 and self.mthresh % 2 == 1, "mthresh",
             "an odd number from 1 to 255"),
            (0 <= self.close <= 1000, "close", "a number of pixels from 0 to 1000"),
            (0 <= self.a_t < 1e12, "a_t", "an area of at least 0"),
            (0 <= self.a_h < 1e12, "a_h", "an area of at least 0"),
            (self.max_n_holes >= 0, "max_n_holes", "a count of at least 0"),
            (self.line_thickness >= 0, "line_thickness", "a width of at least 0"),
            (0 <= self.white_thresh <= 255, "white_thresh", "a number from 0 to 255"),
            (0 <= self.black_thresh <= 255, "black_thresh", "a number from 0 to 255"),
            (min(self.keep_ids, default=0) >= 0, "keep_ids", "contour numbers from 0"),
            (min(self.exclude_ids, default=0) >= 0, "exclude_ids", "contour numbers from 0"),
            (self.contour_fn in CONTOUR_RULES, "contour_fn", f"one of {', '.join(CONTOUR_RULES)}"),
        )
        for fits, name, expected in checks:
            if not fits:
                raise Refused(f"{name} is {getattr(self, name)!r}, expected {expected}")


DEFAULTS = PatchingParameters()
HEATMAP_DEFAULTS = PatchingParameters(sthresh=15, mthresh=11, close=2, a_t=50.0, a_h=8.0,
                                      max_n_holes=10)
SEGMENTATION_NAMES = ("sthresh", "mthresh", "close", "use_otsu", "keep_ids", "exclude_ids", "a_t",
                      "a_h", "max_n_holes")  # what decides outlines, beside the level
PARAMETER_NAMES = tuple(item.name for item in dataclasses.fields(PatchingParameters))


def parse_parameters(
    cells: Mapping[str, Any], *, defaults: PatchingParameters = DEFAULTS, where: str = ""
) -> PatchingParameters:
    """Parameters from table cells or a YAML section; missing and empty cells keep ``defaults``.

    Keys that are no parameter are ignored. ``Refused``, beginning with ``where``, on a bad cell.
    """
    hints = get_type_hints(PatchingParameters)
    values: dict[str, Any] = {}
    try:
        for name in PARAMETER_NAMES:
            cell = cells.get(name)
            if cell is not None and str(cell).strip() != "":
                values[name] = _parse_cell(name, cell, hints[name])
        return dataclasses.replace(defaults, **values)
    except Refused as error:
        raise Refused(f"{where}: {error}" if where else str(error)) from None


def _parse_cell(name: str, cell: Any, kind: Any) -> Any:
    text = str(cell).strip()
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is int or kind is float:
            number = float(text)
            if number != number or (kind is int and number != int(number)):
                raise ValueError
            return kind(number)
        if name in ("keep_ids", "exclude_ids"):
            return parse_ids(cell)
    except (ValueError, KeyError, OverflowError):
        expected = {bool: "TRUE or FALSE", int: "a whole number", float: "a number"}.get(
            kind, f"'{NO_IDS}' or contour numbers such as 0,2,5")
        raise Refused(f"{name} is {cell!r}, expected {expected}") from None
    return text


def parse_ids(cell: Any) -> tuple[int, ...]:
    """Contour numbers of a ``keep_ids`` cell: ``none``, ``3``, ``3.0``, ``0,2,5`` or a list."""
    if isinstance(cell, Sequence) and not isinstance(cell, str):
        parts = [str(part) for part in cell]
    else:
        parts = str(cell).replace(";", ",").strip("[]() ").split(",")
    parts = [part.strip() for part in parts if part.strip()]
    if [part.lower() for part in parts] in ([], [NO_IDS], ["nan"]):
        return ()
    numbers = [float(part) for part in parts]
    if any(number != int(number) for number in numbers):
        raise ValueError(cell)
    return tuple(sorted({int(number) for number in numbers}))


def format_cell(value: Any) -> str:
    """A parameter as a csv cell that ``parse_parameters`` reads back."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or NO_IDS
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    return str(value)


def load_preset(path: Path) -> PatchingParameters:
    """The first row of a preset csv over the defaults; ``Refused`` when it is none."""
    table = read_table(path, what="preset")
    if table.empty or not set(table.columns) & set(PARAMETER_NAMES):
        raise Refused(f"preset {path} holds no parameters, expected a header such as "
                      f"{','.join(PARAMETER_NAMES[:4])},... and one row")
    cells = dict(zip(table.columns, table.iloc[0], strict=True))
    return parse_parameters(cells, where=f"preset {path}")


def find_preset(name: str, *, folders: Sequence[Path]) -> Path:
    """The file of a preset given by name (``tcga`` or ``tcga.csv``) or by path."""
    for folder in (*folders, Path()):
        for candidate in (folder / name, folder / f"{name}.csv"):
            if candidate.is_file():
                return candidate
    known = sorted({path.name for folder in folders for path in folder.glob("*.csv")})
    raise Refused(f"preset '{name}' is not in {' or '.join(map(str, folders))}: "
                  f"known: {', '.join(known) or 'none'}; scripts/build_preset.py makes one")
