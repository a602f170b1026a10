"""Draw where a slide model looks: attention heatmaps, the patches it likes most, GeoJSON.

    python create_heatmaps.py --config_file config_template.yaml --yes
    python create_heatmaps.py --config_file my.yaml --save_exp_code fold_3 --overlap 0.8 --yes

The config is looked up in heatmaps/configs/ or taken as a path; config_template.yaml there explains
every key. A slide is encoded once without overlap and once with (what coincides is not encoded
again), and each result is kept with the parameters that it was made with: the same command again
only does what is missing. A hag_mil of several magnifications has a map a level instead, with the
patches outlined that it looked into; an end-to-end model brings its own encoder; the map of a
streaming model, its attention or its gradient, is led back from the packed image. Writes
<raw_save_dir>/<exp>/<label>/<slide>/ (features, scores, mask), <production_save_dir>/<exp>/
(pictures, sampled patches, <slide>_attention.geojson for QuPath), heatmaps/results/<list>.csv and
<raw_save_dir>/<exp>/report_heatmaps.csv. Asks before it starts when run on a terminal without
--yes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.heatmap_config import (
    CLAM_ENCODER,
    CLAM_PX,
    EncoderArguments,
    HeatmapConfig,
    StreamingArguments,
    as_yaml,
    find_config,
    load_config,
)
from datasets.heatmap_images import ImageTools, direct_mpp, pick_source, score_image
from datasets.heatmap_items import list_items
from datasets.heatmap_levels import find_children
from datasets.heatmap_run import draw_slides
from datasets.heatmap_scale import ImageScale, TrainedScale
from datasets.heatmap_scores import Outputs, Tools, score_bag
from models.e2e_patches import aggregator, end_to_end_encoder
from models.encoder_registry import E2E_PREFIX
from models.encoders import Encoder, load_encoder
from models.model_names import split_name
from models.options import read_model_options
from models.trained import TrainedModel, load_trained, output_names
from utils.contracts import Bag, SlideModel
from utils.devices import Precision, check_precision, pick_device
from utils.errors import EXIT_OK, BrokenFile, Refused, run_script
from utils.options import option, parse, resolved
from utils.storage import inside, plain, read_json, writable_folder, write_text

if TYPE_CHECKING:
    import torch

    from models.e2e import EndToEnd

RESULTS = Path("heatmaps/results")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of create_heatmaps.py; all else is in the YAML file."""

    config_file: str = option("config_template.yaml", aliases=("--config",), metavar="YAML",
                              help="config in heatmaps/configs/ or a path")
    save_exp_code: str | None = option(None, help="name of the output folder, over the config's")
    overlap: float | None = option(None, help="overlap of the fine map, over the config's",
                                   low=0, high=0.99)
    yes: bool = option(False, help="do not ask before starting (a terminal is asked otherwise)")
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    workers: int = option(1, help="threads that read patches", low=1)
    precision: Precision = option("fp32", help="precision of the encoder or streaming model")


def confirm() -> None:
    """Ask on a terminal; a batch job has none and is not asked."""
    if sys.stdin is None or not sys.stdin.isatty():
        return
    try:
        answer = input("start with these settings? [Y/n] ")
    except EOFError:
        answer = "n"
    if answer.strip().lower() not in ("", "y", "yes"):
        raise Refused("not started, as you answered; --yes skips the question")


def read_model(config: HeatmapConfig) -> tuple[TrainedModel, Outputs]:
    """The checkpoint, checked against the json beside it, and the names of its outputs."""
    asked, n_outputs = config.model_arguments, config.exp_arguments.n_classes
    beside = asked.ckpt_path.with_suffix(".json")
    source = str(beside)
    try:
        record = read_json(beside) if beside.exists() else {}
        names: tuple[str, ...] = output_names(record)
        task_type = asked.task_type or record.get("spec", {}).get("task_type", "classification")
    except (BrokenFile, AttributeError):
        raise Refused(f"{beside} does not describe a checkpoint: restore it") from None
    if task_type == "classification" and config.class_names is not None:
        names, source = config.class_names, "label_dict"
    if task_type != "survival":
        names = names or tuple(map(str, range(n_outputs)))
        if len(names) != n_outputs:
            raise Refused(f"n_classes is {n_outputs}, but {source} names "
                          f"{', '.join(names)}")
    trained = load_trained(
        asked.ckpt_path, class_names=names, model_type=asked.model_type, task_type=task_type,
        model_size=asked.model_size, embed_dim=asked.embed_dim,
        options=asked.model_options and read_model_options(asked.model_options),
        dropout=None if beside.exists() else asked.drop_out)
    if trained.spec.n_classes != n_outputs:
        raise Refused(f"n_classes is {n_outputs}, but the model of {asked.ckpt_path} has "
                      f"{trained.spec.n_classes} outputs: correct n_classes")
    for note in trained.notes:
        print(f"note: {note}")
    return trained, Outputs(task_type=task_type, names=names)


def needs_bags(model: SlideModel, trained: TrainedModel) -> bool:
    """Whether a patch's raw attention depends on the bag; ``Refused`` for a model without any."""
    import torch

    if trained.spec.n_levels > 1:
        return True
    with torch.inference_mode():
        output = model(Bag(slide_id="", features=torch.zeros(1, trained.spec.embed_dim)))
    if output.attention is None:
        raise Refused(f"model_type {trained.spec.model_type} has no attention, a heatmap needs "
                      "abmil, abmilx, clam_sb, clam_mb, dsmil, hag_mil or transmil")
    return model.contextual or output.heads is not None  # heads: weights that sum to 1


def named_encoder(asked: EncoderArguments, *, device: torch.device, precision: Precision
                  ) -> Encoder:
    """The encoder that the config names; of ``e2e:`` CLAM's size of a patch means its own."""
    name, target_px = asked.model_name or CLAM_ENCODER, asked.target_img_size
    own_size = name.startswith(E2E_PREFIX) and target_px == CLAM_PX
    return load_encoder(name, checkpoint=asked.ckpt_path, device=str(device),
                        target_px=None if own_size else target_px, precision=precision)


def own_encoder(asked: EncoderArguments, trained: TrainedModel, model: EndToEnd, *,
                device: torch.device, precision: Precision) -> Encoder:
    """The encoder of an end-to-end model; ``Refused`` when the config names another one."""
    encoder = end_to_end_encoder(trained, model, device=device, precision=precision)
    side_px, name = encoder.transform.side_px, split_name(trained.spec.model_type)[0]
    asked.refuse_others((name, encoder.spec.name, f"{E2E_PREFIX}{trained.path}"), side_px=side_px)
    print(f"note: an end-to-end model: patches go through its own encoder ({name}, {side_px} px); "
          "encoder_arguments have no effect")
    return encoder


def image_tools(asked: StreamingArguments, trained: TrainedModel, outputs: Outputs, *,
                device: torch.device, precision: Precision) -> ImageTools:
    """A streaming model, as a callable for every slide's image."""
    source = pick_source(
        asked.source, has_attention=trained.spec.options["head"] == "gated_attention")
    mpp_um = direct_mpp(asked, trained.trained_on)
    model: Any = trained.build().eval().requires_grad_(False).to(device)
    print(f"note: a streaming model: its {source} is drawn in squares of {model.stride} px of the "
          "image; patching_arguments, encoder_arguments, batch_size, use_ref_scores, calc_heatmap "
          "and --workers have no effect")
    if trained.trained_on.get("image_size"):
        print(f"note: it is shown whole images, in training squares of "
              f"{trained.trained_on['image_size']} px")
    return ImageTools(
        score=partial(score_image, model=model, device=device, precision=precision,
                      outputs=outputs, source=source),
        model={"sha256": trained.sha256, "precision": precision, **asdict(trained.spec)},
        outputs=outputs, source=source, stride_px=model.stride, slide_images=asked.slide_images,
        mpp_um=mpp_um, scale=ImageScale(trained.trained_on))


def load_tools(config: HeatmapConfig, *, device: torch.device, precision: Precision,
               workers: int) -> Tools | ImageTools:
    """Encoder and slide model, checked against each other, as callables for every slide."""
    from datasets.patches import encode_slide

    trained, outputs = read_model(config)
    if trained.material == "images":
        return image_tools(config.streaming_arguments, trained, outputs, device=device,
                           precision=precision)
    if config.streaming_arguments != StreamingArguments():
        raise Refused(f"streaming_arguments have no effect: {trained.spec.model_type} is no "
                      "streaming model; leave them out")
    built: Any = trained.build().eval()
    scale = TrainedScale(trained.record.get("patches") or {})
    children = find_children(config.patching_arguments, record=trained.record,
                             n_levels=trained.spec.n_levels, model_type=trained.spec.model_type)
    described, model = aggregator(trained, built)
    in_bags = needs_bags(model, trained)
    if children:
        print("note: a model of several magnifications has no overlapping map: each level's own "
              "is drawn; overlap, use_ref_scores and calc_heatmap have no effect")
    if trained.end_to_end:
        encoder = own_encoder(config.encoder_arguments, trained, built, device=device,
                              precision=precision)
    else:
        encoder = named_encoder(config.encoder_arguments, device=device, precision=precision)
    described.check_features(encoder.dim, encoder.record())
    return Tools(
        encode=partial(encode_slide, encoder=encoder, workers=workers,
                       batch_size=config.exp_arguments.batch_size),
        score=partial(score_bag, model=model.to(device), device=device),
        encoder=encoder.record(), model={"sha256": trained.sha256, **asdict(trained.spec)},
        outputs=outputs, in_bags=in_bags, children=children, scale=scale)


def main(argv: Sequence[str] | None = None) -> int:
    """Validate, plan, draw slide by slide, report."""
    options = parse(Options, prog="create_heatmaps.py", description=__doc__ or "", argv=argv,
                    config_flag=False)
    config = load_config(find_config(options.config_file), overlap=options.overlap,
                         save_exp_code=options.save_exp_code)
    print(as_yaml(config))
    if not options.yes:
        confirm()
    device = pick_device(options.device)
    check_precision(options.precision, device)
    exp, data = config.exp_arguments, config.data_arguments
    table, items = list_items(data, use_roi=config.heatmap_arguments.use_roi)
    raw = writable_folder(inside(exp.raw_save_dir, exp.save_exp_code), what="raw_save_dir")
    writable_folder(inside(exp.production_save_dir, exp.save_exp_code),
                    what="production_save_dir")
    writable_folder(RESULTS, what="results folder")
    stem = exp.save_exp_code if data.process_list is None else Path(data.process_list).stem
    print(f"{sum(item.process for item in items)} of {len(items)} slides to draw")
    if not any(item.process for item in items):
        return EXIT_OK
    tools = load_tools(config, device=device, precision=options.precision,
                       workers=options.workers)
    write_text(raw / "config.yaml", as_yaml(config))
    report = draw_slides(table, items, config=config, tools=tools, results=RESULTS / f"{stem}.csv")
    report.write(raw, options={**resolved(options), **plain(asdict(config))})
    report.print_summary(raw)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(run_script(main))
