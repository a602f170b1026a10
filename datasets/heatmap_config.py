"""The YAML tree of ``create_heatmaps.py``: one frozen dataclass a section, defaults of CLAM.

Each key, its default, limits and help stand here once; ``load_config`` refuses unknown sections
and keys with the nearest name and converts values by their declared type.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.errors import Refused
from utils.objectives import TaskType
from utils.options import build, from_mapping, load_yaml, option
from utils.storage import plain, safe_id
from wsi_core.heatmap import SampleMode, colour_table
from wsi_core.hierarchy import wanted_children
from wsi_core.scale import PatchScale

CONFIGS = Path("heatmaps/configs")
CLAM_ENCODER, CLAM_PX = "resnet50_trunc", 224


@dataclass(frozen=True, kw_only=True)
class ExpArguments:
    """``exp_arguments``: what the run is called and where it writes."""

    n_classes: int = option(2, help="number of outputs of the model: classes, labels, values, "
                            "bins of time", low=1)
    save_exp_code: str = option("HEATMAP_OUTPUT", help="sub-folder of both output folders")
    raw_save_dir: Path = option(Path("heatmaps/heatmap_raw_results"),
                                help="folder of features, scores, masks")
    production_save_dir: Path = option(Path("heatmaps/heatmap_production_results"),
                                       help="folder of the pictures")
    batch_size: int = option(256, help="patches the encoder takes at once", low=1)


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """``data_arguments``: which slides."""

    data_dir: str | tuple[str, ...] | dict[str, str] = option(
        "heatmaps/demo/slides/", help="folder, list of folders, or key: folder")
    data_dir_key: str = option("source", help="column with the key, when data_dir has keys")
    process_list: str | None = option(
        "heatmap_demo_dataset.csv", help="csv in heatmaps/process_lists/ or a path; null: all "
        "slides of data_dir")
    preset: Path | None = option(Path("presets/bwh_biopsy.csv"), help="segmentation preset")
    slide_ext: str = option(".svs", help="suffix of slide files")
    label_dict: dict[str, int] | None = option(None, help="class name: number")


@dataclass(frozen=True, kw_only=True)
class PatchingArguments:
    """``patching_arguments``: the size of a patch, the step of the fine map, finer levels."""

    patch_size: int = option(256, help="side in px of what the encoder is given", low=1)
    overlap: float = option(0.5, help="overlap of the fine map, as a fraction", low=0, high=0.99)
    patch_level: int = option(0, help="pyramid level that is read", low=0)
    custom_downsample: int = option(1, help="read this much more and reduce", low=1)
    patch_mpp: float | None = option(None, help="um per px of the patches, as in training, instead "
                                     "of patch_level", low=0.01, high=100)
    child_levels: tuple[int, ...] = option((), help="finer levels of hag_mil, coarse to fine; "
                                           "none: as in training", low=0)
    child_mpp: tuple[float, ...] = option((), help="finer levels in um per px instead", low=0.01)

    def scale(self) -> PatchScale:
        """Size and step of the fine map's patches, as ``wsi_core.scale`` takes them."""
        step_px = max(1, int(self.patch_size * (1 - self.overlap) + 1e-9))
        return PatchScale(patch_px=self.patch_size, step_px=step_px, mpp_um=self.patch_mpp,
                          patch_level=self.patch_level, custom_downsample=self.custom_downsample)


@dataclass(frozen=True, kw_only=True)
class EncoderArguments:
    """``encoder_arguments``: the patch encoder; an end-to-end model has its own."""

    model_name: str | None = option(None, help="encoder; null: resnet50_trunc, or that of an "
                                    "end-to-end model")
    target_img_size: int = option(CLAM_PX, help="px after resizing; -1: as read", low=-1)
    ckpt_path: Path | None = option(None, help="local weights of the encoder")

    def refuse_others(self, names: Collection[str], *, side_px: int) -> None:
        """``Refused`` when a key asks for another encoder than that of an end-to-end model.

        names: what that is called; side_px: of a patch as it sees it. What CLAM's template holds
        counts as not given.
        """
        own: list[tuple[str, Any, Collection[Any]]] = [
            ("model_name", self.model_name, {None, CLAM_ENCODER, *names}),
            ("target_img_size", self.target_img_size, {CLAM_PX, side_px}),
            ("ckpt_path", self.ckpt_path, {None})]
        for key, value, fine in own:
            if value not in fine:
                raise Refused(f"encoder_arguments: {key} is {value}, but the checkpoint is an "
                              f"end-to-end model: its patches go through its own encoder "
                              f"({next(iter(names))}, {side_px} px); leave the key out")


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """``model_arguments``: the slide model."""

    ckpt_path: Path = option(Path("heatmaps/demo/ckpts/s_0_checkpoint.pt"), help="its weights")
    model_type: str | None = option(None, help="clam_sb, abmilx, hag_mil ...; null: as "
                                    "s_{k}_checkpoint.json says, else the weights, else clam_sb")
    model_options: Path | None = option(None, help="yaml with the model family's own options, a "
                                        "preset for example; for checkpoints without json")
    task_type: TaskType | None = option(None, help="what is predicted; null: as the json says, "
                                        "else classification")
    initiate_fn: Literal["initiate_model"] = option("initiate_model", help="CLAM's key")
    model_size: Literal["small", "big"] | None = option(None, help="width of the attention")
    drop_out: float | None = option(None, help="dropout of the training; counts only where no "
                                    "json lies beside the checkpoint", low=0, high=0.99)
    embed_dim: int | None = option(None, help="feature length; null: as the json says, else 1024",
                                   low=1)


@dataclass(frozen=True, kw_only=True)
class StreamingArguments:
    """``streaming_arguments``: the images of a streaming model, and what its map shows."""

    slide_images: Path | None = option(None, help="folder slide_images/ of create_patches_fp.py "
                                       "--slide_images; null: the slides themselves are read, "
                                       "their tissue found and packed when they are opened")
    image_mpp: float | None = option(None, help="um per px at which they are read; null: as in "
                                     "training", low=0.05, high=100)
    source: Literal["attention", "gradient"] | None = option(
        None, help="attention: where the head looks (gated_attention has it); gradient: by how "
        "much the tissue of each place raises the output; null: attention where there is one")


@dataclass(frozen=True, kw_only=True)
class HeatmapArguments:
    """``heatmap_arguments``: how the map is computed and drawn."""

    vis_level: int = option(1, help="pyramid level of the picture; -1: the best for 32x", low=-1)
    alpha: float = option(0.4, help="weight of the colours; 1: no slide", low=0)
    blank_canvas: bool = option(False, help="white instead of the slide")
    save_orig: bool = option(True, help="save the slide's picture too")
    save_ext: Literal["jpg", "png"] = option("jpg", help="picture format")
    use_ref_scores: bool = option(True, help="percentiles among the scores of the coarse map")
    blur: bool = option(False, help="smooth")
    use_center_shift: bool = option(True, help="test four points of a patch, not its centre")
    use_roi: bool = option(False, help="fine map of x1,x2,y1,y2 of the process list alone")
    calc_heatmap: bool = option(True, help="compute the overlapping map; false: reuse it")
    binarize: bool = option(False, help="two colours")
    binary_thresh: float = option(-1.0, help="0..1; below 0: 1/patches", high=1)
    custom_downsample: int = option(1, help="reduce the picture by this", low=1)
    cmap: str = option("jet", help="matplotlib colour map")
    geojson: bool = option(True, help="<slide>_attention.geojson for QuPath")
    geojson_min_score: float = option(0.0, help="leave out patches below, 0..1", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One entry of ``sample_arguments.samples``: patches saved as pictures."""

    name: str = option(help="folder")
    sample: bool = option(True, help="false: skip this entry")
    seed: int = option(1, help="of range_sample", low=0)
    k: int = option(15, help="patches", low=1)
    mode: SampleMode = option("topk", help="topk, reverse_topk or range_sample")
    score_start: float = option(0.0, help="of range_sample, 0..1", low=0, high=1)
    score_end: float = option(1.0, help="of range_sample, 0..1", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """``sample_arguments``."""

    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HeatmapConfig:
    """The whole tree; field names are the section names of the YAML."""

    exp_arguments: ExpArguments
    data_arguments: DataArguments
    patching_arguments: PatchingArguments
    encoder_arguments: EncoderArguments
    model_arguments: ModelArguments
    streaming_arguments: StreamingArguments
    heatmap_arguments: HeatmapArguments
    sample_arguments: SampleArguments

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The first name of each class in class order; None when the config names none."""
        names = self.data_arguments.label_dict
        if names is None:
            return None
        return tuple(next(name for name, index in names.items() if index == number)
                     for number in range(len(set(names.values()))))


SECTIONS: dict[str, type] = {
    "exp_arguments": ExpArguments, "data_arguments": DataArguments,
    "patching_arguments": PatchingArguments, "encoder_arguments": EncoderArguments,
    "model_arguments": ModelArguments, "streaming_arguments": StreamingArguments,
    "heatmap_arguments": HeatmapArguments, "sample_arguments": SampleArguments}


def find_config(name: str) -> Path:
    """A config by its name in ``heatmaps/configs/`` or by path, or ``Refused``."""
    for path in (CONFIGS / name, Path(name)):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml"))) or "none"
    raise Refused(f"no config '{name}' in {CONFIGS}/ nor at that path; there: {known}")


def load_config(
    path: Path, *, save_exp_code: str | None = None, overlap: float | None = None
) -> HeatmapConfig:
    """The config of a YAML file, checked, with the two values that flags may replace.

    Sections and keys that are left out keep their defaults. Raises ``Refused``.
    """
    tree = load_yaml(path)
    unknown = [name for name in tree if name not in SECTIONS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], SECTIONS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(SECTIONS)}"
        raise Refused(f"{path}: unknown section '{unknown[0]}', {hint}")
    sections = {name: _section(name, tree.get(name), source=f"{path}: {name}")
                for name in SECTIONS}
    if save_exp_code is not None:
        sections["exp_arguments"]["save_exp_code"] = save_exp_code
    if overlap is not None:
        sections["patching_arguments"]["overlap"] = overlap
    config = HeatmapConfig(**{
        name: build(SECTIONS[name], values, prefix=f"{path}: {name}: ")
        for name, values in sections.items()})
    _check(config, source=str(path))
    return config


def _section(name: str, value: Any, *, source: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Refused(f"{source} is {value!r}, expected 'key: value' lines")
    if name != "sample_arguments":
        return from_mapping(SECTIONS[name], value, source=source)
    if list(value) not in ([], ["samples"]) or not isinstance(value.get("samples"), list | None):
        raise Refused(f"{source} holds {', '.join(map(str, value))}, expected one list 'samples'")
    return {"samples": tuple(
        _sample(entry, source=f"{source}: samples[{number}]")
        for number, entry in enumerate(value.get("samples") or []))}


def _sample(entry: Any, *, source: str) -> Sample:
    if not isinstance(entry, Mapping):
        raise Refused(f"{source} is {entry!r}, expected 'key: value' lines")
    return build(Sample, from_mapping(Sample, entry, source=source), prefix=f"{source}: ")


def _check(config: HeatmapConfig, *, source: str) -> None:
    """What one section alone cannot know."""
    exp, data = config.exp_arguments, config.data_arguments
    safe_id(exp.save_exp_code, what="save_exp_code")
    for name in ("raw_save_dir", "production_save_dir"):
        folder = getattr(exp, name)
        if ".." in folder.parts or "\0" in str(folder):
            raise Refused(f"{source}: {name} {str(folder)!r} climbs out of its place: write the "
                          "folder itself")
    if data.label_dict is not None:
        classes = sorted(set(data.label_dict.values()))
        if classes != list(range(len(classes))):
            raise Refused(f"{source}: label_dict numbers its classes {classes}, expected "
                          f"{list(range(len(classes)))}")
        for label in data.label_dict:
            safe_id(label, what="label")
    names = [safe_id(sample.name, what="sample name")
             for sample in config.sample_arguments.samples]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise Refused(f"{source}: two samples are called '{twice[0]}': they share a folder")
    if not data.slide_ext.startswith("."):
        raise Refused(f"{source}: slide_ext is '{data.slide_ext}', expected it with its dot")
    patching = config.patching_arguments
    wanted_children(patching.child_levels, patching.child_mpp)
    if patching.patch_mpp is not None and (patching.patch_level or patching.custom_downsample > 1):
        raise Refused(f"{source}: patch_level and custom_downsample go by pyramid levels, "
                      "patch_mpp by um per px: give one")
    streaming = config.streaming_arguments
    if streaming.slide_images is not None and streaming.image_mpp is not None:
        raise Refused(f"{source}: slide_images have their own um per px, image_mpp is for slides "
                      "that are read themselves: give one")
    colour_table(config.heatmap_arguments.cmap)


def as_yaml(config: HeatmapConfig) -> str:
    """The resolved tree, as ``load_config`` takes it back."""
    import yaml

    text: str = yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False,
                               allow_unicode=True)
    return text
