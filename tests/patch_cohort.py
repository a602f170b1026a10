"""A small cohort of tiny patches in one LMDB, for tests of end-to-end models."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from wsi_core.coords import PatchCoords
from wsi_core.patch_lmdb import PatchLmdb, part_path, write_part

SIDE_PX = 32
HIGH, LOW = "level_0", ""  # names of the magnifications, as create_patches_fp.py gives them


def patch_pixels(index: int, *, count: int, level: str = HIGH) -> np.ndarray:
    """(count, 32, 32, 3) uint8: grey noise; of slides of class 1 every third patch is red."""
    random = np.random.default_rng([index, len(level)])
    pixels = random.integers(90, 150, (count, SIDE_PX, SIDE_PX, 3))
    if index % 2:
        pixels[::3] += np.array([90, -80, -80])
    return pixels.astype(np.uint8)


def grid_coords(slide_id: str, count: int, *, downsample: int = 1) -> PatchCoords:
    """``count`` patches in rows of four; downsample: of the level they are of."""
    y, x = np.divmod(np.arange(count), 4)
    side_px_l0 = SIDE_PX * downsample
    size = (4 * SIDE_PX, SIDE_PX * -(-count // 4))
    return PatchCoords(
        slide_id=slide_id, coords=np.stack([x, y], axis=1) * side_px_l0, patch_size=SIDE_PX,
        patch_level=downsample - 1, output_size=SIDE_PX,
        level_downsample=(downsample, downsample), level_size=size,
        slide_size=(size[0] * downsample, size[1] * downsample),
        footprint_px_l0=(side_px_l0, side_px_l0), step_px_l0=(side_px_l0, side_px_l0),
        mpp_um=0.5 * downsample)


def write_lmdb(database: Path, slides: dict[str, np.ndarray], *, level: str = HIGH,
               finish: bool = True) -> Path:
    """Patches (n, 32, 32, 3) of each slide, lossless, at one more magnification of a database."""
    with PatchLmdb(database, encoding="png") as target:
        for slide_id, pixels in slides.items():
            patches = grid_coords(slide_id, len(pixels), downsample=1 if level else 2)
            part = part_path(database, slide_id, level=level)
            with write_part(part, patches, level=level, encoding="png") as sink:
                for (x, y), image in zip(patches.coords, pixels, strict=True):
                    sink.put(int(x), int(y), sink.encode(image))
            target.add(part)
            part.unlink()
        if finish:
            target.finish()
    return database


def write_patch_cohort(root: Path, *, slides: int = 12, patches: int = 9) -> Path:
    """``patches.lmdb`` (levels "" and "level_0"), ``cohort.csv``, ``splits/cohort_100``; ``root``.

    Slide i has class i % 2, is alone in its case, lives 10 + i months or 40 more; slide 0 has one
    patch less. Test: the last quarter; validation: the one before.
    """
    names = [f"slide_{index:02}" for index in range(slides)]
    counts = [patches - (index == 0) for index in range(slides)]
    database = root / "patches.lmdb"
    for level, divide in ((HIGH, 1), (LOW, 2)):
        write_lmdb(database, {name: patch_pixels(index, count=counts[index] // divide, level=level)
                              for index, name in enumerate(names)}, level=level)
    with (root / "cohort.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case_id", "slide_id", "label", "months", "dead"), *(
            (f"case_{index:02}", name, f"class_{index % 2}", 10 + index + 40 * (index % 2 == 0),
             int(index % 4 != 3)) for index, name in enumerate(names))])
    write_split(root / "splits" / "cohort_100", names)
    return root


def write_split(folder: Path, names: list[str]) -> None:
    """``splits_0.csv``: the last quarter are test slides, those before validation slides."""
    folder.mkdir(parents=True)
    part = len(names) // 4
    columns = (names[:-2 * part], names[-2 * part:-part], names[-part:])
    with (folder / "splits_0.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("", "train", "val", "test"), *(
            (row, *(ids[row] if row < len(ids) else "" for ids in columns))
            for row in range(len(columns[0])))])


def database(root: Path, level: str = HIGH) -> str:
    """``--patches`` of one magnification of ``root``."""
    return f"{root / 'patches.lmdb'}#{level}" if level else str(root / "patches.lmdb")
