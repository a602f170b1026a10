"""Turn the patches of each slide into feature vectors.

    python extract_features_fp.py --data_h5_dir OUT --data_slide_dir SLIDES --feat_dir FEATURES \\
        --csv_path OUT/process_list_autogen.csv --slide_ext .svs --model_name resnet50_trunc

On a CPU, --precision bf16 is several times faster (relative error 3e-3 to 4e-2). Encoders:
resnet50_trunc, uni_v1 (UNI_CKPT_PATH), conch_v1 (CONCH_CKPT_PATH), efficientnet_lite0 (its weights
come with a package) and timm:<name>, e.g. timm:resnet18; --encoder_ckpt gives a weight file.

All levels of a hierarchy in one run (OUT_level_2 has OUT_level_1_corresponding beside it, made by
create_patches_fp.py; their features go into FEATURES_level_1_corresponding and so on):

    python extract_features_fp.py --data_h5_dir OUT_level_2 --feat_dir FEATURES_level_2 \\
        --child_levels 1 0 --data_slide_dir SLIDES

Reads OUT/patches/<slide>.h5, the slides, and a csv with a column slide_id (every row is used).
Writes h5_files/<slide>.h5 (features, coords, what made them), pt_files/<slide>.pt (the matrix),
report_features.csv and .json. Running the same command again goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.devices import Precision
from utils.errors import Refused, run_script
from utils.options import option, parse, resolved
from utils.report import RunReport
from utils.storage import free_bytes, inside, read_table, safe_id, writable_folder

if TYPE_CHECKING:
    from datasets.extraction import Work

AUTOGEN = "process_list_autogen.csv"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of extract_features_fp.py."""

    data_h5_dir: Path = option(help="save_dir of create_patches_fp.py (holds patches/)")
    data_slide_dir: Path = option(help="folder with the slides")
    slide_ext: str = option(".svs", help="extension of the slide files")
    csv_path: Path | None = option(
        None, help="csv with a column slide_id (default: process_list_autogen.csv in data_h5_dir)")
    feat_dir: Path = option(help="folder for h5_files/ and pt_files/")
    child_levels: tuple[int, ...] = option(
        (), low=0, high=127, help="encode these finer levels of create_patches_fp.py as well, "
        "into folders beside feat_dir")
    child_mpp: tuple[float, ...] = option(
        (), low=0.01, high=100, help="the same by um per pixel")
    model_name: str = option("resnet50_trunc", help="resnet50_trunc, uni_v1, conch_v1, "
                             "efficientnet_lite0 or timm:<name>")
    encoder_ckpt: Path | None = option(None, help="weight file of the encoder (.pth, .bin, .pt, "
                                       ".safetensors)")
    batch_size: int = option(256, low=1, high=65536, help="patches in one batch (a CPU takes "
                             "them 16 at a time)")
    target_patch_size: int = option(224, high=8192, help="shorter side after resizing; 0 or less: "
                                    "as read")
    auto_skip: bool = option(True, help="redo slides that have their features already")
    precision: Precision = option("fp32", help="arithmetic of the encoder; features are stored as "
                                  "fp32")
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    gpus: int = option(0, low=0, help="share the slides out over this many GPUs (0: --device)")
    workers: int | None = option(None, low=1, high=256, help="reading threads for each encoder "
                                 "(default: 2 on a CPU, up to 8 on a GPU)")
    bad_tiles: Literal["fail", "drop"] = option(
        "fail", help="a patch that cannot be read fails its slide, or is left out and listed")
    backend: Literal["auto", "openslide"] = option(
        "auto", help="openslide: without the fast path for JPEG tiles (equal pixels)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(Options, prog="extract_features_fp.py", description=__doc__ or "", argv=argv)
    slides = list_slides(options.csv_path or options.data_h5_dir / AUTOGEN,
                         options.data_h5_dir / "patches", options.data_slide_dir,
                         options.slide_ext)
    devices = check_devices(options.device, options.gpus)
    from datasets.extraction import Extraction, extract, share_out
    from datasets.extraction_plan import list_levels, plan_works
    from datasets.patches import item_name
    from models.encoders import encoder_record, encoder_spec, load_encoder
    from wsi_core.hierarchy import wanted_children

    settings: dict[str, Any] = {"checkpoint": options.encoder_ckpt, "precision": options.precision,
                                "target_px": options.target_patch_size}
    encoder = encoder_record(options.model_name, **settings)
    levels = list_levels(options.data_h5_dir, options.feat_dir,
                         wanted_children(options.child_levels, options.child_mpp))
    for level in levels:
        for name in ("", "h5_files", "pt_files"):
            writable_folder(level.feat_dir / name, what="--feat_dir")
    report = RunReport("features")
    works = plan_works(slides, levels, report, encoder=encoder, backend=options.backend,
                       redo=not options.auto_skip, allow_dropped=options.bad_tiles == "drop")
    check_space(works, encoder_spec(options.model_name).dim, options.feat_dir)
    what = "slides" if len(levels) == 1 else f"items (slides x {len(levels)} levels)"
    print(f"{len(works)} {what} to do ({sum(len(work.patches) for work in works):,} patches), "
          f"{len(report.rows)} settled before; encoder {options.model_name}, {options.precision}")
    extraction = Extraction(
        batch_size=options.batch_size, workers=options.workers, bad_tiles=options.bad_tiles,
        redo=not options.auto_skip, load=partial(load_encoder, options.model_name, **settings))
    try:
        for row in extract(share_out(works, devices), extraction):
            report.add(row)
    finally:
        order = {item_name(slide_id, level.name): place
                 for place, (level, slide_id) in enumerate(product(levels, slides))}
        report.rows.sort(key=lambda row: order[row.item])
        report.write(options.feat_dir, options=resolved(options))
    print_dropped(report)
    report.print_summary(options.feat_dir)
    return report.exit_code


# ---------------------------------------------------------------------------- validate

def list_slides(csv_path: Path, coords_dir: Path, slide_dir: Path, slide_ext: str
                ) -> dict[str, Path]:
    """Slide ids (names without extension) and slide files, in the order of the csv.

    A csv may name slides with their extension or without. ``Refused``: no such csv, folder or
    column, or two rows with files of the same id.
    """
    for folder, flag in ((coords_dir, "--data_h5_dir"), (slide_dir, "--data_slide_dir")):
        if not folder.is_dir():
            raise Refused(f"{flag}: there is no folder {folder}")
    table = read_table(csv_path, what="--csv_path")
    if "slide_id" not in table.columns:
        raise Refused(f"--csv_path {csv_path} has no column 'slide_id' (its columns: "
                      f"{', '.join(list(table.columns)[:8])})")
    if not len(table):
        raise Refused(f"--csv_path {csv_path} lists no slides")
    extension = slide_ext if slide_ext.startswith(".") or not slide_ext else f".{slide_ext}"
    slides: dict[str, Path] = {}
    for name in map(str, table["slide_id"]):
        safe_id(name)
        slide_id = name.removesuffix(extension)
        if slide_id == name and not (coords_dir / f"{name}.h5").exists() and (
                coords_dir / f"{Path(name).stem}.h5").exists():
            slide_id = Path(name).stem
        named = inside(slide_dir, name)
        path = named if named.is_file() else slide_dir / f"{slide_id}{extension}"
        if slides.setdefault(slide_id, path) != path:
            raise Refused(f"--csv_path {csv_path}: {slides[slide_id]} and {path} have the same id "
                          f"'{slide_id}', so their features would overwrite each other: rename one")
    return slides


def check_devices(device: str, gpus: int) -> list[str]:
    """One device name for each child process; ``Refused`` when there are not so many GPUs."""
    if not gpus:
        return [device]
    if device not in ("auto", "cuda"):
        raise Refused(f"--gpus {gpus} and --device {device} contradict each other: give one")
    from utils.devices import pick_device

    return [str(pick_device(f"cuda:{index}")) for index in range(gpus)]


def check_space(works: Sequence[Work], dim: int, feat_dir: Path) -> None:
    """``Refused`` when the features of all slides together cannot fit."""
    from datasets.feature_files import needed_bytes

    need = sum(needed_bytes(len(work.patches), dim) for work in works)
    if need > (free := free_bytes(feat_dir)):
        raise Refused(f"--feat_dir {feat_dir} has {free / 1e6:,.0f} MB free, the features need "
                      f"{need / 1e6:,.0f} MB: free some or choose another folder")


# ---------------------------------------------------------------------------- report

def print_dropped(report: RunReport) -> None:
    """A line for each slide of which patches were left out."""
    for row in report.rows:
        if row.numbers.get("n_dropped"):
            print(f"  {row.item}: {row.reason}")


if __name__ == "__main__":
    sys.exit(run_script(main))
