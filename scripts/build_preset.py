"""Write a preset: one csv row of segmentation and grid parameters for ``--preset``.

    python scripts/build_preset.py --preset_name mine.csv --a_t 16 --sthresh 12

The file goes to ``presets/`` under the current folder.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from utils.errors import EXIT_OK, run_script
from utils.options import option, parse
from utils.storage import safe_id, writable_folder, write_text
from wsi_core.presets import (
    CONTOUR_RULES,
    DEFAULTS,
    PARAMETER_NAMES,
    format_cell,
    parse_parameters,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of build_preset.py; ``wsi_core.presets.PatchingParameters`` explains the parameters."""

    preset_name: str = option(help="file name of the preset, e.g. mine.csv")
    seg_level: int = option(-1, help="pyramid level to segment; -1: automatic")
    sthresh: int = option(8, help="saturation above which a pixel is tissue, 0-255")
    mthresh: int = option(7, help="side of the median filter, odd")
    use_otsu: bool = option(False, help="find the threshold by Otsu's method")
    close: int = option(4, help="side of the closing square; 0: none")
    a_t: float = option(100.0, help="smallest tissue area, in 512 x 512 level-0 px")
    a_h: float = option(16.0, help="smallest hole area, in 512 x 512 level-0 px")
    max_n_holes: int = option(8, help="holes kept in one contour")
    vis_level: int = option(-1, help="pyramid level to draw the mask on; -1: automatic")
    line_thickness: int = option(250, help="of outlines in the mask, level-0 px")
    white_thresh: int = option(5, help="column of CLAM's old pipeline, carried along")
    black_thresh: int = option(50, help="column of CLAM's old pipeline, carried along")
    padding: bool = option(True, help="keep patches inside the slide")
    contour_fn: str = option("four_pt", choices=CONTOUR_RULES,
                             help="which points of a patch must lie in the tissue")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the preset; returns the exit code."""
    options = parse(Options, prog="build_preset.py", argv=argv, config_flag=False,
                    description=__doc__ or "")
    name = safe_id(options.preset_name, what="--preset_name")
    cells = {key: value for key, value in asdict(options).items() if key in PARAMETER_NAMES}
    parameters = parse_parameters({**cells, "use_padding": options.padding}, defaults=DEFAULTS)
    row = {column: format_cell(getattr(parameters, column)) for column in PARAMETER_NAMES}
    row.update({key: row[key].upper() for key in ("use_otsu", "use_padding")})
    text = io.StringIO()
    writer = csv.DictWriter(text, PARAMETER_NAMES, lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)
    folder = writable_folder(Path("presets"), what="presets folder")
    path = folder / (name if name.endswith(".csv") else f"{name}.csv")
    write_text(path, text.getvalue())
    print(f"{path} written: use it with create_patches_fp.py --preset {path.name}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_script(main))
