"""Where streaming models find the images of slides, and how they are varied: flags of main.py.

Source: spec streaming.md 10. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.options import option


@dataclass(frozen=True, kw_only=True)
class ImageSourceOptions:
    """Where images are; shared by main.py and eval.py.

    data_slide_dir, slide_ext, num_workers: also of ``PatchSourceOptions``, so defined as there
    """

    slide_images: Path | None = option(
        None, help="streaming: folder slide_images/ that create_patches_fp.py --slide_images made; "
        "or give --image_mpp and --data_slide_dir")
    image_mpp: float | None = option(
        None, help="streaming: um per px at which slides in --data_slide_dir are read themselves; "
        "their tissue is found and packed when they are opened", low=0.05, high=100)
    image_size: int | None = option(
        None, help="streaming: side in px of the square that is seen of each image: in training "
        "drawn anew in each epoch, where there is tissue; in evaluation the one with most; 0 = "
        "whole images (default: 0; eval.py: as in training, --whole_images too)", low=0)
    whole_images: bool = option(
        False, help="streaming: validate, test and evaluate on whole images, whatever --image_size")
    data_slide_dir: Path | None = option(None, help="folder with the slides")
    slide_ext: str = option(".svs", help="extension of the slide files")
    num_workers: int = option(2, help="e2e, streaming: threads that read pixels", low=1)


@dataclass(frozen=True, kw_only=True)
class ImageAugmentOptions:
    """How training images vary from epoch to epoch; all of it in one resampling of the crop.

    Defaults: spec streaming.md 10; angles are not whole degrees, and the hue is added to.
    """

    image_augment: bool = option(False, help="streaming: rotate, flip, bend and recolour training "
                                 "images, as the next five say")
    max_rotation: float = option(180.0, help="streaming: largest rotation, degrees", low=0,
                                 high=180)
    image_flips: bool = option(True, help="streaming: --image_augment without flips")
    colour_jitter: float = option(
        0.05, help="streaming: lightness and chroma change by up to this share, the hue by up to "
        "this many radians", low=0, high=1)
    elastic_alpha: float = option(
        1000.0, help="streaming: strength of the elastic deformation, px: a field of random "
        "displacements in -1..1 is smoothed, then multiplied by this; 0 = none; at most a quarter "
        "of --elastic_sigma squared", low=0)
    elastic_sigma: float = option(150.0, help="streaming: width of that smoothing, px", low=1)
