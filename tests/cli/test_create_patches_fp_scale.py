"""create_patches_fp.py at a physical scale: flags of size, lattice, pixel size, and the dry run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import create_patches_fp
from tests.slides import tissue_image, write_pyramid
from utils.errors import Refused
from wsi_core.coords import PatchCoords, read_coords

SIDE_UM = 1024.0  # of the field that every scanner sees
SCANNERS = {"at_025.tif": 0.25, "at_0274.tif": 0.274, "at_050.tif": 0.5}
FINE = ("--seg_mpp", 2, "--min_area_um2", 5000, "--min_hole_um2", 5000)


def run(source: Path, out: Path, *flags: object) -> int:
    return create_patches_fp.main(["--source", str(source), "--save_dir", str(out), "--seg",
                                   "--patch", *map(str, flags)])


def physical(source: Path, out: Path, *flags: object) -> int:
    return run(source, out, *FINE, "--patch_size", 64, *flags)


def coords(out: Path, slide: str) -> PatchCoords:
    return read_coords(out / "patches" / f"{slide}.h5")


def report(out: Path) -> dict[str, dict[str, str]]:
    with (out / "report_patches.csv").open(newline="") as file:
        return {row["item"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One field of tissue, 1024 um a side, as three scanners see it."""
    folder = tmp_path_factory.mktemp("cohort")
    field = tissue_image(4096, 4096, seed=3)
    for name, mpp in SCANNERS.items():
        side = round(SIDE_UM / mpp)
        image = cv2.resize(field, (side, side), interpolation=cv2.INTER_AREA)
        power = {"at_050.tif": 40}.get(name, 40)  # the last is wrong on purpose: 0.5 um is 20x
        write_pyramid(folder / name, image, mpp=mpp, photometric="rgb", description=(
            f"Aperio Image Library v1\n{side}x{side}|AppMag = {power}|MPP = {mpp}"))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_mixed_scanners_give_the_same_physical_patches(cohort: Path, out: Path) -> None:
    """Spec B, section 13, test 1: side within 1 %, and the same cells of the lattice."""
    assert physical(cohort, out, "--patch_mpp", 0.5, "--lattice", "global", "--segmenter", "otsu",
                    "--min_tissue", 0.5) == 0
    cells = {}
    for name, mpp in SCANNERS.items():
        found = coords(out, Path(name).stem)
        assert found.output_size == 64
        assert found.footprint_px_l0[0] * mpp == pytest.approx(32, rel=0.01)
        assert found.mpp_um == pytest.approx(0.5, rel=0.01)
        assert found.slide_mpp_um == pytest.approx((mpp, mpp), rel=1e-3)
        cells[name] = {tuple(cell) for cell in np.rint(found.coords * mpp / 32).astype(int)}
        assert len(cells[name]) == len(found) > 50
    first, *others = cells.values()
    for other in others:  # a border cell may hold 49 % of tissue here and 51 % there
        assert len(first & other) / len(first | other) > 0.97


def test_target_mag_is_a_shorthand(cohort: Path, out: Path, tmp_path: Path) -> None:
    physical(cohort, out, "--patch_mpp", 0.5)
    physical(cohort, tmp_path / "b", "--target_mag", 20)
    physical(cohort, tmp_path / "c", "--target_mag", 12.5)
    for slide in ("at_025", "at_0274", "at_050"):
        assert np.array_equal(coords(out, slide).coords, coords(tmp_path / "b", slide).coords)
        assert coords(tmp_path / "c", slide).mpp_um == pytest.approx(0.8, rel=0.01)


@pytest.mark.parametrize(("flags", "step"), [
    ((), 128), (("--step_size", 48), 96), (("--overlap", 16), 96)])
def test_step_and_overlap(flags: tuple[object, ...], step: int, cohort: Path, out: Path) -> None:
    physical(cohort, out, "--patch_mpp", 0.5, "--lattice", "global", *flags)
    found = coords(out, "at_025")
    assert found.step_px_l0 == (step, step) and not (found.coords % step).any()


def test_lattice_and_least_tissue(cohort: Path, out: Path, tmp_path: Path) -> None:
    counts = []
    for place, least in enumerate((0, 0.5, 1)):
        physical(cohort, tmp_path / str(place), "--patch_mpp", 0.5, "--lattice", "global",
                 "--min_tissue", least)
        counts.append(len(coords(tmp_path / str(place), "at_025")))
    assert counts[0] > counts[1] > counts[2] > 0
    physical(cohort, out, "--patch_mpp", 0.5, "--lattice", "contour")
    ours = coords(out, "at_025")
    assert (ours.coords % 128).any(), "a grid for each piece begins at its own corner"
    physical(cohort, tmp_path / "dense", "--patch_mpp", 0.5, "--lattice", "contour",
             "--min_tissue", 0.9)
    dense = {tuple(cell) for cell in coords(tmp_path / "dense", "at_025").coords}
    assert dense < {tuple(cell) for cell in ours.coords}


def test_padding_keeps_cells_at_the_edge(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    write_pyramid(folder / "full.tif", np.full((1000, 1000, 3), (190, 110, 170), np.uint8))
    flags = ("--patch_mpp", 0.5, "--lattice", "global", "--patch_size", 256)
    run(folder, out, *FINE, *flags)
    run(folder, tmp_path / "pad", *FINE, *flags, "--white_padding")
    assert len(coords(out, "full")) == 9 and len(coords(tmp_path / "pad", "full")) == 16
    assert coords(tmp_path / "pad", "full").background == (255, 255, 255)


# ---------------------------------------------------------------------------- the pixel size

def test_the_csv_overrides_and_is_recorded(cohort: Path, out: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "mpp.csv"
    table.write_text("wsi,mpp\nat_025,0.5\nat_0274.tif,0.137\nother,1\n")
    assert physical(cohort, out, "--patch_mpp", 0.5, "--mpp_csv", table) == 0
    assert "names 1 slides that are not in this run: other" in capsys.readouterr().out
    assert coords(out, "at_025").footprint_px_l0 == (64, 64)
    assert coords(out, "at_025").parameters["mpp_override"] == 0.5
    assert coords(out, "at_0274").footprint_px_l0[0] == pytest.approx(64 * 0.5 / 0.137, rel=0.01)
    assert coords(out, "at_050").parameters["mpp_override"] is None


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A slide that gives its objective but no pixel size, and one that gives neither."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name, about in (("power.tif", "Aperio Image\n1|AppMag = 20"), ("none.tif", None)):
        write_pyramid(folder / name, tissue_image(1024, 1024, seed=3), mpp=None,
                      photometric="rgb", description=about)
    return folder


def test_an_unknown_pixel_size_fails_that_slide_with_the_remedy(bare: Path, out: Path) -> None:
    """B5; with --mpp_from_objective the objective is the last resort, and said to be one."""
    assert physical(bare, out, "--patch_mpp", 0.5) == 3
    found = report(out)
    assert "--mpp_csv, or give --mpp_from_objective (20x)" in found["power.tif"]["reason"]
    assert found["none.tif"]["reason"].endswith("--mpp_csv")
    assert physical(bare, out, "--patch_mpp", 0.5, "--mpp_from_objective") == 3
    found = report(out)
    assert found["power.tif"]["status"] == "done"
    assert "taken for 0.5 um, as the objective is 20x" in found["power.tif"]["reason"]
    assert found["none.tif"]["status"] == "failed"


def test_objective_and_pixel_size_that_disagree_are_reported(cohort: Path, out: Path) -> None:
    """B6: the pixel size wins."""
    physical(cohort, out, "--patch_mpp", 0.5)
    found = report(out)
    assert found["at_025.tif"]["reason"] == ""
    assert "40x" in found["at_050.tif"]["reason"] and "0.5" in found["at_050.tif"]["reason"]
    assert coords(out, "at_050").footprint_px_l0 == (64, 64)


def test_a_slide_too_coarse_fails_alone(cohort: Path, out: Path) -> None:
    assert physical(cohort, out, "--patch_mpp", 0.25) == 3
    found = report(out)
    assert {name: row["status"] for name, row in found.items()} == {
        "at_025.tif": "done", "at_0274.tif": "failed", "at_050.tif": "failed"}
    assert "too coarse for patches of 0.25 um" in found["at_050.tif"]["reason"]


def test_another_scale_is_refused_in_the_same_folder(cohort: Path, out: Path) -> None:
    """Spec B, defect 10, fault A20."""
    physical(cohort, out, "--patch_mpp", 0.5)
    for flags, what in ((("--patch_mpp", 1.0), "patch_mpp: file has 0.5, you ask 1.0"),
                        (("--patch_mpp", 0.5, "--lattice", "global"), "lattice: file has None"),
                        (("--patch_mpp", 0.5, "--min_tissue", 0.1), "min_tissue"),
                        (("--patch_mpp", 0.5, "--segmenter", "otsu"), "segmenter")):
        with pytest.raises(Refused, match=what):
            physical(cohort, out, *flags)
    assert physical(cohort, out, "--patch_mpp", 0.5) == 0
    assert {row["status"] for row in report(out).values()} == {"already done"}


@pytest.mark.parametrize(("flags", "message"), [
    (("--patch_mpp", 0.5, "--target_mag", 20), "in two ways"),
    (("--overlap", 8, "--step_size", 56), "in two ways"),
    (("--overlap", 64), "leaves no step"),
    (("--patch_mpp", 0.5, "--patch_level", 1), "--patch_level goes by pyramid levels"),
    (("--patch_mpp", 0.5, "--custom_downsample", 2), "--custom_downsample goes by"),
    (("--patch_mpp", 1, "--child_levels", 0), "not finer|finer levels: --child_mpp"),
    (("--segmenter", "mask"), "needs --mask_dir"),
    (("--segmenter", "sam2"), "needs its weights: give --seg_ckpt"),
    (("--seg_thresh", 0.4), "--seg_thresh has no effect with --segmenter clam"),
    (("--segmenter", "otsu", "--seg_ckpt", "x"), "--seg_ckpt has no effect"),
    (("--segmenter", "otsu", "--device", "cpu"), "--device has no effect"),
    (("--segmenter", "otsu", "--seg_batch_size", 2), "--seg_batch_size has no effect"),
    (("--max_images", 3), "--max_images has no effect without --save_images"),
    (("--image_format", "png"), "--image_format has no effect without --save_lmdb"),
    (("--save_images", "png", "--jpeg_quality", 50), "--jpeg_quality has no effect without"),
    (("--id_from_path",), "has no effect without --recursive"),
    (("--process_list", "l.csv", "--recursive"), "--process_list names them: give one"),
    (("--process_list", "l.csv", "--slide_ext", ".svs"), "--process_list names them: give one"),
    (("--contours_dir", "/nowhere"), "--contours_dir /nowhere is no folder"),
    (("--layout", "trident"), "tells patches by magnification"),
    (("--layout", "trident", "--patch_mpp", 1, "--child_mpp", 0.5), "no place for finer levels")])
def test_contradictions_are_refused(flags: tuple[object, ...], message: str, cohort: Path,
                                    out: Path) -> None:
    with pytest.raises(Refused, match=message):
        physical(cohort, out, *flags)
    assert not out.exists()


def test_finer_levels_tile_physical_patches(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert physical(cohort, out, "--patch_mpp", 2, "--child_mpp", 1, 0.5) == 0
    for slide, mpp in (("at_025", 0.25), ("at_0274", 0.274), ("at_050", 0.5)):
        coarse = coords(out, slide)
        fine = coords(tmp_path / "run_mpp_0.5_corresponding", slide)
        assert len(fine) == 16 * len(coarse) > 0
        assert fine.footprint_px_l0[0] * 4 == coarse.footprint_px_l0[0]
        assert fine.mpp_um == pytest.approx(0.5, rel=0.02)
        assert fine.footprint_px_l0[0] * mpp == pytest.approx(32, rel=0.02)
    again = physical(cohort, out, "--patch_mpp", 2, "--child_mpp", 1, 0.5)
    assert again == 0 and {row["status"] for row in report(out).values()} == {"already done"}


# ---------------------------------------------------------------------------- the dry run

def test_a_dry_run_tells_the_truth_and_writes_nothing(
    cohort: Path, bare: Path, out: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    flags: tuple[Any, ...] = ("--patch_mpp", 0.5, "--lattice", "global", "--save_images", "png")
    assert physical(cohort, out, *flags, "--dry_run") == 0
    text = capsys.readouterr().out
    assert not out.exists() and "nothing was written" in text
    line = next(line for line in text.splitlines() if line.startswith("at_0274.tif"))
    assert "3737x3737" in line and "117 px of level 0 -> 64" in line and "everything" in line
    assert "objective" in text, "the slide whose objective and pixel size disagree"
    physical(cohort, out, *flags)
    for slide in ("at_025", "at_0274", "at_050"):
        line = next(line for line in text.splitlines() if line.startswith(f"{slide}.tif"))
        assert f" {len(coords(out, slide))} " in line
    capsys.readouterr()
    assert physical(bare, out, *flags, "--dry_run") == 3
    text = capsys.readouterr().out
    assert "failed  none.tif" in text and "pixel size unknown" in text
    assert "dry run: 2 slides to do" in text and "png images, about" in text
    assert not (out / "patches" / "power.h5").exists()


def test_a_dry_run_in_processes(cohort: Path, out: Path, run_script: Callable[..., Any]) -> None:
    done = run_script("create_patches_fp.py", "--source", cohort, "--save_dir", out, "--seg",
                      "--patch", "--dry_run", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "dry run: 3 slides to do" in done.stdout and not out.exists()


def test_workers_change_nothing(cohort: Path, out: Path, tmp_path: Path) -> None:
    flags = ("--patch_mpp", 0.5, "--lattice", "global", "--segmenter", "otsu")
    physical(cohort, out, *flags)
    physical(cohort, tmp_path / "four", *flags, "--workers", 4)
    for name in SCANNERS:
        one, four = (folder / "patches" / f"{Path(name).stem}.h5"
                     for folder in (out, tmp_path / "four"))
        assert np.array_equal(read_coords(one).coords, read_coords(four).coords)
    options = json.loads((out / "report_patches.json").read_text())["options"]
    assert options["patch_mpp"] == 0.5 and options["lattice"] == "global"
