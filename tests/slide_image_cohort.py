"""A small cohort of slides and the images packed from them, for tests of streaming models."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np

import create_patches_fp
from tests.patch_cohort import write_split
from tests.slides import tissue_image, write_pyramid

SLIDE_MPP_UM, IMAGE_MPP_UM = 0.5, 1.0
SIZE_PX = (1280, 960)  # width, height of the slides


def slide_pixels(index: int) -> np.ndarray:
    """(960, 1280, 3) uint8: tissue on glass; slides of class 1 have a dark green piece in it."""
    image = tissue_image(*SIZE_PX, seed=index)
    if index % 2:
        y, x = np.argwhere(image.min(axis=2) < 200).mean(axis=0)
        cv2.ellipse(image, (int(x), int(y)), (120, 120), 0, 0, 360, (40, 110, 60), -1)
    return image


def write_slide_images(root: Path, *, slides: int = 8) -> Path:
    """``slides/*.tif``, ``images/slide_images/``, ``cohort.csv``, ``splits/cohort_100``; ``root``.

    Slide i has class i % 2, is alone in its case and measures i / 10. Test: the last quarter;
    validation: the one before.
    """
    names = [f"slide_{index:02}" for index in range(slides)]
    (root / "slides").mkdir(parents=True)
    for index, name in enumerate(names):
        write_pyramid(root / "slides" / f"{name}.tif", slide_pixels(index), mpp=SLIDE_MPP_UM)
    assert create_patches_fp.main([
        "--source", str(root / "slides"), "--save_dir", str(root / "images"), "--seg",
        "--min_area_um2", "1000", "--slide_images", str(IMAGE_MPP_UM)]) == 0
    with (root / "cohort.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case_id", "slide_id", "label", "size", "a", "b"), *(
            (f"case_{index:02}", name, f"class_{index % 2}", index / 10, index % 2, index // 4 % 2)
            for index, name in enumerate(names))])
    write_split(root / "splits" / "cohort_100", names)
    return root
