"""Where end-to-end models find their patches, and how many are drawn a slide: flags of main.py.

Source: spec abmilx.md 4 (multi-scale random instance sampling). Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.options import option


@dataclass(frozen=True, kw_only=True)
class PatchSourceOptions:
    """Where patches are; shared by main.py and eval.py.

    data_slide_dir, slide_ext: also of ``evaluated.SlideOptions``, so defined as there
    """

    patches: str | None = option(
        None, help="e2e: patches of the slides, an LMDB of create_patches_fp.py --save_lmdb (or of "
        "ABMILX), name.lmdb#level for one of its levels; or its folder of coordinates, read from "
        "the slides in --data_slide_dir")
    patches_low: str | None = option(
        None, help="e2e: the same at a lower magnification, a share of each draw (training)")
    data_slide_dir: Path | None = option(None, help="folder with the slides")
    slide_ext: str = option(".svs", help="extension of the slide files")
    num_workers: int = option(2, help="e2e, streaming: threads that read pixels", low=1)
    test_scales: Literal["high", "both"] = option(
        "high", help="e2e: patches that are evaluated: --patches alone, as published, or those of "
        "--patches_low too")


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How the patches of a training slide are drawn, anew in each epoch."""

    same_psize: int = option(0, help="e2e: patches drawn of a slide in each epoch; 0 = all", low=0)
    mul_scale_ratio: float = option(
        2.0, help="e2e: of same_psize patches, floor(same_psize / ratio) are of --patches_low",
        low=1)
    pad_enc_bs: bool = option(True, help="e2e: a slide with fewer patches gives those it has, not "
                              "random repeats too")
    sampling: Literal["random", "intervals", "grid"] = option(
        "random", help="e2e: how patches are drawn: random; one of each of so many intervals of "
        "their order; from the cells of a grid over the slide in turn")
    num_group_2d: int = option(8, help="e2e: cells a side of that grid", low=1)
