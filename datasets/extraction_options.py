"""Flags of extract_features_fp.py by subject; the script's ``Options`` inherits them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.options import option


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Which slides, and which patches of them."""

    data_h5_dir: Path = option(help="save_dir of create_patches_fp.py, or a folder of TRIDENT's "
                                    "or AtlasPatch's")
    data_slide_dir: Path = option(help="folder with the slides")
    slide_ext: str = option(".svs", help="extension of the slide files; '' for slides that are "
                                         "folders without one (DICOM)")
    csv_path: Path | None = option(
        None, help="csv with a column slide_id, and path where slides lie in sub-folders "
        "(default: process_list_autogen.csv in data_h5_dir)")
    child_levels: tuple[int, ...] = option(
        (), low=0, high=127, help="encode these finer levels of create_patches_fp.py as well, "
        "into folders beside feat_dir")
    child_mpp: tuple[float, ...] = option(
        (), low=0.01, high=100, help="the same by um per pixel")
    backend: Literal["auto", "openslide"] = option(
        "auto", help="openslide: without the fast path for JPEG tiles (equal pixels)")
    bad_tiles: Literal["fail", "drop"] = option(
        "fail", help="a patch that cannot be read fails its slide, or is left out and listed")


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """What encodes the patches, and the slides."""

    model_name: tuple[str, ...] = option(
        ("resnet50_trunc",), help="one or several encoders, each patch is read once for all of "
        "them: see --list_encoders; timm:<name> for any model of timm, e2e:<checkpoint> for the "
        "encoder of an end-to-end model")
    list_encoders: bool = option(False, alone=True, help="print the table of encoders and stop")
    encoder_ckpt: tuple[str, ...] = option(
        (), metavar="PATH", help="weight file of the encoder (.pth, .bin, .pt, .safetensors), or "
        "name=PATH for each of several encoders")
    encoder_plugin: tuple[Path, ...] = option(
        (), repeat=True, help="Python file that registers encoders of your own (its code runs)")
    trust_remote_code: bool = option(
        False, help="run the Python code that comes with the weights of some encoders")
    target_patch_size: int | None = option(
        None, high=8192, help="shorter side after resizing; 0 or less: as read (default: the "
        "encoder's own transform)")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = option(
        "fp32", help="arithmetic of the encoder; auto: as each encoder recommends")
    batch_size: int = option(256, low=1, high=65536, help="patches in one batch (a CPU takes "
                             "them 16 at a time)")
    slide_encoder: tuple[str, ...] = option(
        (), help="also make one vector a slide: mean, max, mean_max, checkpoint:PATH of a model "
        "that main.py trained, FILE.py:NAME of a plug-in")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written."""

    feat_dir: Path = option(help="folder for h5_files/ and pt_files/; of several encoders one "
                                 "folder each in it")
    layout: Literal["clam", "trident", "atlaspatch"] = option(
        "clam", help="whose places and fields the feature files have")
    storage_dtype: Literal["float32", "float16"] = option(
        "float32", help="of the stored features; float16 halves the files")
    auto_skip: bool = option(True, help="redo slides that have their features already")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how fast."""

    device: str = option("auto", help="auto, cpu, cuda or cuda:N; under torchrun each process has "
                                      "the GPU of its rank")
    gpus: int = option(0, low=0, help="share the slides out over this many GPUs (0: --device)")
    workers: int | None = option(None, low=1, high=256, help="reading threads for each process "
                                 "(default: 2 on a CPU, up to 8 on a GPU)")
    scheduler: str | None = option(
        None, metavar="ADDRESS", help="encode on the workers of this Dask scheduler, "
        "tcp://host:port")
    slide_timeout: float | None = option(
        None, low=0.1, metavar="SECONDS", help="a slide fails when a thread spends longer than "
        "this reading it")
    cache_dir: Path | None = option(
        None, help="folder on a fast disk: the next slides are copied there while one is read")
