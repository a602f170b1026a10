"""Turn the patches of each slide into feature vectors.

    python extract_features_fp.py --data_h5_dir OUT --data_slide_dir SLIDES --feat_dir FEATURES \\
        --csv_path OUT/process_list_autogen.csv --slide_ext .svs --model_name resnet50_trunc

Writes h5_files/<slide>.h5 (features, coords, what made them), pt_files/<slide>.pt (the matrix),
report_features.csv and .json. Running the same command again goes on where it stopped.
On a CPU, --precision bf16 is several times faster (relative error 3e-3 to 4e-2).

Several encoders read every patch once (FEATURES/uni_v1/h5_files ...); all of them are in the
memory of the device at the same time. One vector a slide besides, in slide_features/:

    ... --model_name uni_v1 timm:resnet18 --encoder_ckpt uni_v1=uni.bin timm:resnet18=r18.pth
    ... --slide_encoder mean checkpoint:results/exp_s1/s_0_checkpoint.pt

All levels of a hierarchy (OUT_level_1_corresponding lies beside OUT_level_2; their features go
into FEATURES_level_1_corresponding and so on), several GPUs, a cluster:

    ... --data_h5_dir OUT_level_2 --feat_dir FEATURES_level_2 --child_levels 1 0
    torchrun --nproc_per_node 4 extract_features_fp.py ...
    ... --scheduler tcp://host:8786
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.extraction_options import EncoderOptions, InputOptions, OutputOptions, RunOptions
from utils.distributed import Group, process_group
from utils.errors import Refused, run_script
from utils.options import parse, resolved
from utils.report import RunReport, Status
from utils.storage import free_bytes, writable_folder

if TYPE_CHECKING:
    from datasets.extraction import Work
    from datasets.slide_features import FeatureSet, SlideEncoder
    from models.encoder_choice import ChosenEncoder

AUTOGEN = "process_list_autogen.csv"
A_WEEK_S = 7 * 24 * 3600.0  # that a rank which is done waits for the others


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, OutputOptions, EncoderOptions, InputOptions):
    """Flags of extract_features_fp.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    options = parse(Options, prog="extract_features_fp.py", description=__doc__ or "", argv=argv)
    if options.list_encoders:
        return print_encoders(options.encoder_plugin)
    with process_group(None, timeout_s=A_WEEK_S) as group:
        from datasets.extraction import Extraction, cluster_tasks, extract, share_out
        from datasets.extraction_plan import list_levels, plan_works, report_order
        from datasets.feature_layouts import check_layout
        from datasets.slide_features import FeatureSet, check_slide_features
        from datasets.slide_list import list_slides
        from models.encoder_choice import choose_encoders
        from wsi_core.hierarchy import wanted_children

        slides = list_slides(options.csv_path or options.data_h5_dir / AUTOGEN,
                             options.data_h5_dir, options.data_slide_dir, options.slide_ext)
        devices = check_devices(options.device, options.gpus, options.scheduler, group)
        children = wanted_children(options.child_levels, options.child_mpp)
        check_layout(options.layout, finer_levels=bool(children), bad_tiles=options.bad_tiles)
        chosen = choose_encoders(
            options.model_name, options.encoder_ckpt, target_px=options.target_patch_size,
            precision=options.precision, device=options.device, plugins=options.encoder_plugin,
            trust_remote_code=options.trust_remote_code)
        levels = list_levels(options.data_h5_dir, options.feat_dir, children)
        sets = [FeatureSet(feat_dir=level.encoder_dir(label, options.layout), label=label,
                           encoder=one.record["name"], level=level.name, layout=options.layout)
                for level in levels for label, one in chosen.items()]
        check_folders([*dict.fromkeys(folder for one in sets for folder in one.folders())],
                      options.data_slide_dir, options.scheduler)
        pooling = load_pooling(options.slide_encoder, options.device, chosen.values())
        if options.auto_skip:
            check_slide_features(list(slides), sets, pooling)
        report = RunReport("features")
        mine = dict(group.share(list(slides.items())))
        works = plan_works(
            mine, levels, report, encoders={label: one.record for label, one in chosen.items()},
            backend=options.backend, redo=not options.auto_skip, layout=options.layout,
            allow_dropped=options.bad_tiles == "drop", storage_dtype=options.storage_dtype)
        announce(works, len(report.rows), chosen, options.feat_dir, group)
        extraction = Extraction(
            load={label: one.load for label, one in chosen.items()}, redo=not options.auto_skip,
            batch_size=options.batch_size, workers=options.workers, bad_tiles=options.bad_tiles,
            deadline_s=options.slide_timeout, cache_dir=options.cache_dir)
        shards = share_out(works, devices * (cluster_tasks(works) if options.scheduler else 1))
        order = report_order(list(slides), levels, list(chosen))
        try:
            for row in extract(shards, extraction, scheduler=options.scheduler):
                report.add(row)
            report.rows = [row for rows in group.gather(report.rows) for row in rows]
        finally:
            write_report(report, order, options.feat_dir, resolved(options), group)
        print_report(report, options.feat_dir, group)
        if not pooling:
            return report.exit_code
        second, order = pool(list(mine), list(slides), sets, pooling, report, group,
                             redo=not options.auto_skip)
        write_report(second, order, options.feat_dir, resolved(options), group)
        print_report(second, options.feat_dir, group)
        return max(report.exit_code, second.exit_code)


def print_encoders(plugins: Sequence[Path]) -> int:
    """``--list_encoders``: a line an encoder."""
    from models.encoder_table import encoder_table

    rows = encoder_table(plugins)
    names = list(rows[0])
    table = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)
                        ).rstrip())
    return 0


# ---------------------------------------------------------------------------- validate

def check_devices(device: str, gpus: int, scheduler: str | None, group: Group) -> list[str]:
    """One device name for each child process; ``Refused`` when there are not so many GPUs, or
    the work is shared out in two ways."""
    ways = [name for name, given in (("--gpus", gpus), ("--scheduler", scheduler),
                                     ("torchrun", group.size > 1)) if given]
    if len(ways) > 1:
        raise Refused(f"{' and '.join(ways)} share the slides out in two ways: give one")
    if not gpus:
        return [device]
    if device not in ("auto", "cuda"):
        raise Refused(f"--gpus {gpus} and --device {device} contradict each other: give one")
    from utils.devices import pick_device

    return [str(pick_device(f"cuda:{index}")) for index in range(gpus)]


def check_folders(folders: Sequence[Path], slide_dir: Path, scheduler: str | None) -> None:
    """Make the folders of the results; ``Refused`` where we or a cluster cannot use them."""
    for folder in folders:
        writable_folder(folder, what="--feat_dir")
    if scheduler is not None:
        from utils.dask_cluster import check_workers

        check_workers(scheduler, [slide_dir, *folders])


def load_pooling(names: Sequence[str], device: str, chosen: Iterable[ChosenEncoder]
                 ) -> list[SlideEncoder]:
    """The slide encoders; ``Refused`` when one does not take the features of an encoder."""
    from models.slide_encoders import load_slide_encoder

    pooling = [load_slide_encoder(name, device=device) for name in names]
    for one in chosen:
        for encoder in pooling:
            encoder.check(one.spec.dim, one.record)
    return [*pooling]


def announce(works: Sequence[Work], settled: int, chosen: Mapping[str, ChosenEncoder],
             feat_dir: Path, group: Group) -> None:
    """Say what is to be done, and warn of patches that an encoder was not made for.

    ``Refused`` when the features of all slides together cannot fit.
    """
    from models.encoder_registry import check_input

    for label, one in chosen.items():
        odd = sorted({check_input(one.spec, work.patches.output_size, work.mpp_um)
                      for work in works if work.encoder == label} - {""})
        if odd:
            more = f" (and patches of {len(odd) - 1} other scales)" if odd[1:] else ""
            print(f"warning: {odd[0]}{more}", file=sys.stderr)
    need = sum(work.needed_bytes(chosen[work.encoder].spec.dim) for work in works)
    patches = sum(len(work.patches) for work in works)
    count, patches, settled, need = map(sum, zip(
        *group.gather((len(works), patches, settled, need)), strict=True))
    if need > (free := free_bytes(feat_dir)):
        raise Refused(f"--feat_dir {feat_dir} has {free / 1e6:,.0f} MB free, the features need "
                      f"{need / 1e6:,.0f} MB: free some or choose another folder")
    if group.is_main:
        names = ", ".join(f"{one.record['name']} {one.record['precision']}"
                          for one in chosen.values())
        what = "slides" if len({(work.encoder, work.patches.level) for work in works}) < 2 else (
            "items (slides x levels x encoders)")
        print(f"{count} {what} to do ({patches:,} patches), {settled} settled before; encoder "
              f"{names}")


# ---------------------------------------------------------------------------- do and report

def pool(mine: Sequence[str], slides: Sequence[str], sets: Sequence[FeatureSet],
         encoders: Sequence[SlideEncoder], features: RunReport, group: Group, *, redo: bool
         ) -> tuple[RunReport, dict[str, int]]:
    """Make the vectors of this rank's slides, and the table of all; their report and its order."""
    from datasets.slide_features import encode_features, write_tables

    missing = {row.item: row for row in features.rows
               if row.status in (Status.FAILED, Status.BUSY)}
    rows = list(encode_features(mine, sets, encoders, missing=missing, redo=redo))
    report = RunReport("slide_features")
    report.extend(row for found in group.gather(rows) for row in found)
    if group.is_main:
        write_tables(slides, sets, encoders, report.rows)
    names = (one.vector(slide_id, encoder)
             for one in sets for slide_id in slides for encoder in encoders)
    return report, {name: place for place, name in enumerate(names)}


def write_report(report: RunReport, order: Mapping[str, int], folder: Path,
                 options: dict[str, Any], group: Group) -> None:
    """The main process writes the report of all."""
    if group.is_main:
        report.rows.sort(key=lambda row: order[row.item])
        report.write(folder, options=options)


def print_report(report: RunReport, folder: Path, group: Group) -> None:
    """What became of the slides, and a line for each of which patches were left out."""
    if not group.is_main:
        return
    for row in report.rows:
        if row.numbers.get("n_dropped"):
            print(f"  {row.item}: {row.reason}")
    report.print_summary(folder)


if __name__ == "__main__":
    sys.exit(run_script(main))
