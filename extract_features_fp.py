"""Turn the patches of each slide into feature vectors.

    python extract_features_fp.py --data_h5_dir OUT --data_slide_dir SLIDES --feat_dir FEATURES \\
        --csv_path OUT/process_list_autogen.csv --slide_ext .svs --model_name resnet50_trunc

On a CPU, --precision bf16 is several times faster (relative error 3e-3 to 4e-2). Encoders:
resnet50_trunc, uni_v1 (UNI_CKPT_PATH), conch_v1 (CONCH_CKPT_PATH), efficientnet_lite0 (its weights
come with a package) and timm:<name>, e.g. timm:resnet18; --encoder_ckpt gives a weight file.

Reads OUT/patches/<slide>.h5, the slides, and a csv with a column slide_id (every row is used).
Writes h5_files/<slide>.h5 (features, coords, what made them), pt_files/<slide>.pt (the matrix),
report_features.csv and .json. Running the same command again goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.devices import Precision
from utils.errors import ItemFailed, Refused, run_script
from utils.options import option, parse, resolved
from utils.report import Row, RunReport, Status
from utils.storage import (
    State,
    differences,
    free_bytes,
    inside,
    read_table,
    safe_id,
    writable_folder,
)

if TYPE_CHECKING:
    from datasets.extraction import Work
    from wsi_core.slide import Backend

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
    from models.encoders import encoder_record, encoder_spec, load_encoder

    settings: dict[str, Any] = {"checkpoint": options.encoder_ckpt, "precision": options.precision,
                                "target_px": options.target_patch_size}
    encoder = encoder_record(options.model_name, **settings)
    for name in ("", "h5_files", "pt_files"):
        writable_folder(options.feat_dir / name, what="--feat_dir")
    report = RunReport("features")
    works = plan_works(slides, report, encoder=encoder, backend=options.backend,
                       coords_dir=options.data_h5_dir / "patches", feat_dir=options.feat_dir,
                       redo=not options.auto_skip, allow_dropped=options.bad_tiles == "drop")
    check_space(works, encoder_spec(options.model_name).dim, options.feat_dir)
    print(f"{len(works)} slides to do ({sum(len(work.patches) for work in works):,} patches), "
          f"{len(report.rows)} settled before; encoder {options.model_name}, {options.precision}")
    extraction = Extraction(
        feat_dir=options.feat_dir, batch_size=options.batch_size, workers=options.workers,
        bad_tiles=options.bad_tiles, redo=not options.auto_skip,
        load=partial(load_encoder, options.model_name, **settings))
    try:
        for row in extract(share_out(works, devices), extraction):
            report.add(row)
    finally:
        order = {slide_id: place for place, slide_id in enumerate(slides)}
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


# ---------------------------------------------------------------------------- plan

def plan_works(slides: Mapping[str, Path], report: RunReport, *, encoder: Mapping[str, Any],
               backend: Backend, coords_dir: Path, feat_dir: Path, redo: bool,
               allow_dropped: bool) -> list[Work]:
    """The slides to encode; what needs no encoding goes into the report at once.

    ``Refused`` when finished features of any slide were made with other settings.
    """
    works, clashes = [], []
    for slide_id, path in slides.items():
        try:
            work = plan_slide(slide_id, path, coords_dir / f"{slide_id}.h5", encoder=encoder,
                              backend=backend)
        except ItemFailed as error:
            report.add(Row(item=slide_id, status=Status.FAILED, reason=str(error)))
            continue
        if redo or (settled := settle(work, feat_dir, allow_dropped=allow_dropped)) is None:
            works.append(work)
        elif isinstance(settled, Row):
            report.add(settled)
        else:
            clashes.append(f"{slide_id}: {settled}")
    if clashes:
        more = f" (and {len(clashes) - 1} more slides)" if len(clashes) > 1 else ""
        raise Refused(f"{feat_dir} holds other features, {clashes[0]}{more}: give another "
                      "--feat_dir, or --no_auto_skip to make them anew")
    return works


def plan_slide(slide_id: str, slide_path: Path, coords_path: Path, *, encoder: Mapping[str, Any],
               backend: Backend) -> Work:
    """One slide's work; ``ItemFailed`` without usable coordinates or slide file."""
    from datasets.extraction import Work
    from datasets.feature_files import feature_parameters
    from datasets.patches import SlidePatches
    from wsi_core.coords import read_coords
    from wsi_core.slide import fingerprint

    if not coords_path.exists():
        raise ItemFailed(f"{coords_path} is missing: run create_patches_fp.py --seg --patch")
    coords = read_coords(coords_path)
    patches = SlidePatches(
        slide_id=slide_id, slide_path=slide_path, coords=coords.coords,
        patch_level=coords.patch_level, patch_size=coords.patch_size,
        output_size=coords.output_size, background=coords.background, backend=backend)
    return Work(patches=patches, mpp_um=coords.mpp_um, footprint_px_l0=coords.footprint_px_l0,
                parameters=feature_parameters(coords, encoder=encoder,
                                              slide=fingerprint(slide_path)))


def settle(work: Work, feat_dir: Path, *, allow_dropped: bool) -> Row | str | None:
    """None: to be encoded. A row: done before (a lost pt is mended). A text: made otherwise."""
    from datasets.feature_files import inspect_features, mend_pt

    finding = inspect_features(feat_dir, work.slide_id, work.parameters,
                               allow_dropped=allow_dropped)
    if finding.state is State.FOREIGN:
        return "not made by this toolkit, so it is unknown with which encoder"
    if finding.state is State.OTHER and finding.other_settings:
        return differences(finding.found, finding.changed)
    if finding.state is not State.DONE:
        return None  # missing, broken, or the slide or its coordinates have changed since
    if not finding.pt_sound:
        mend_pt(feat_dir, work.slide_id)
    empty = finding.rows == 0
    return Row(item=work.slide_id, status=Status.EMPTY if empty else Status.SKIPPED,
               reason="no patches" if empty else "" if finding.pt_sound else
               "pt file made anew from the h5", numbers={"n_patches": finding.rows, "n_dropped": 0})


def print_dropped(report: RunReport) -> None:
    """A line for each slide of which patches were left out."""
    for row in report.rows:
        if row.numbers.get("n_dropped"):
            print(f"  {row.item}: {row.reason}")


if __name__ == "__main__":
    sys.exit(run_script(main))
