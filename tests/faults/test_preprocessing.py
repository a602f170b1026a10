"""Faults A10 to A20 and B1 to B16 around create_patches_fp.py with all that issue 4 added.

``WHERE`` says for every row of the catalogue (../shared/anchors/reliability.md, section 4) which
test holds it for patching: one of this file only where there was none. Scripts are run in this
process where the fault is in a slide or a folder, as processes where it is in a process.
"""

from __future__ import annotations

import ast
import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from filelock import SoftFileLock

import create_patches_fp
from tests.conftest import ROOT
from tests.faults.test_crash_sweep import contents
from tests.slides import tissue_image, write_pyramid
from utils.errors import BrokenFile, Refused
from utils.locks import claim, lock_path
from wsi_core.coords import PatchCoords, read_coords
from wsi_core.patch_lmdb import PatchLmdb
from wsi_core.patch_lmdb_reader import PatchLmdbReader
from wsi_core.tiff_directory import read_directories

HERE = "test_preprocessing.py"
WHERE: dict[str, tuple[str, ...]] = {
    "A10": (f"{HERE}::test_a10_two_processes_make_what_one_makes",
            f"{HERE}::test_a10_a_database_in_other_hands_is_listed_as_busy",
            "test_patching.py::test_a10_two_processes_share_the_work",
            "test_parallel.py::test_two_runs_at_once_do_each_item_once"),
    "A11": ("test_patching.py::test_a11_a_live_lock_is_respected_and_a_dead_ones_taken_over",
            "test_minimum_set.py::test_a11_whose_lock_it_is_decides"),
    "A12": (f"{HERE}::test_a12_a_lock_deleted_by_hand_stops_the_final_write",
            "../unit/test_utils_locks.py::"
            "test_a_lock_deleted_by_hand_is_noticed_before_the_final_write"),
    "A13": (f"{HERE}::test_a13_a_file_system_without_locks_is_told",
            "../unit/test_utils_locks.py::test_a_file_system_without_locks_is_told_once"),
    "A14": (f"{HERE}::test_a14_terminated_while_workers_patch_or_the_database_is_written",
            "test_patching.py::test_a14_interrupted_cleanly",
            "test_parallel.py::test_an_interrupted_run_leaves_nothing"),
    "A15": (f"{HERE}::test_a15_a_slide_that_kills_its_worker_fails_alone",
            "../unit/test_utils_parallel.py::test_a_death_costs_its_item_only"),
    "A16": (f"{HERE}::test_a16_a_slide_that_hangs_fails_alone",
            "test_parallel.py::test_a_hanging_item_is_done_by_the_next_run"),
    "A17": (f"{HERE}::test_a17_sixty_slides_leave_no_more_open_than_five",
            "test_parallel.py::test_two_thousand_items_take_no_more_than_a_hundred"),
    "A18": (f"{HERE}::test_a18_no_clock_decides",),
    "A19": ("test_patching.py::test_a19_same_stem_is_refused_with_both_paths",
            "../cli/test_create_patches_fp_outputs.py::test_slides_in_sub_folders"),
    "A20": (f"{HERE}::test_a20_another_way_to_find_tissue_or_to_pack_is_refused",
            "../cli/test_create_patches_fp_scale.py::"
            "test_another_scale_is_refused_in_the_same_folder",
            "test_patching.py::test_a20_other_parameters_are_refused_and_nothing_is_touched"),
    "B1": ("test_patching.py::test_b1_b2_bad_files_fail_alone_with_their_reason",),
    "B2": ("test_patching.py::test_b1_b2_bad_files_fail_alone_with_their_reason",
           "test_slides.py::test_a_truncated_slide_is_refused_at_opening"),
    "B3": (f"{HERE}::test_b3_a_damaged_tile_fails_pictures_and_database_alone",
           "test_slides.py::test_one_damaged_tile_fails_alone"),
    "B4": ("test_slides.py::test_when_every_read_fails_each_says_so",),
    "B5": ("test_minimum_set.py::test_b5_pixel_sizes_that_cannot_be",
           "../cli/test_create_patches_fp_scale.py::"
           "test_an_unknown_pixel_size_fails_that_slide_with_the_remedy",
           "../cli/test_create_patches_fp_scale.py::test_the_csv_overrides_and_is_recorded"),
    "B6": ("../cli/test_create_patches_fp_scale.py::"
           "test_objective_and_pixel_size_that_disagree_are_reported",),
    "B7": ("../cli/test_create_patches_fp.py::test_a_huge_single_level_is_reduced_by_strips",),
    "B8": ("../cli/test_create_patches_fp.py::test_downsample_that_is_no_whole_number",),
    "B9": (f"{HERE}::test_b9_slides_without_tissue_are_empty_for_every_segmenter",
           "test_patching.py::test_b9_blank_black_and_pen_only_slides",
           "../cli/test_extract_features_fp.py::test_the_report_says_what_was_done"),
    "B10": (f"{HERE}::test_b10_tissue_to_the_border_gives_cells_by_a_formula",
            f"{HERE}::test_b10_padding_is_white",
            "../unit/test_wsi_core_lattice.py::test_a_patch_larger_than_the_slide"),
    "B11": ("test_slides.py::test_a_transparent_margin_of_a_picture_has_the_callers_background",
            "test_slides.py::test_tiles_that_were_not_scanned_have_the_callers_background"),
    "B12": ("test_slides.py::test_profiles_are_not_applied_and_grey_becomes_rgb",
            "test_slides.py::test_slides_of_16_bits_are_refused"),
    "B13": (f"{HERE}::test_b13_any_name_goes_through_everything",),
    "B14": (f"{HERE}::test_b14_links_are_followed_and_clashes_of_case_refused",),
    "B15": ("test_minimum_set.py::test_b15_bombs_are_refused_before_decoding",
            "test_slides.py::test_bad_slides_are_listed_and_the_good_one_goes_on"),
    "B16": (f"{HERE}::test_b16_a_slide_replaced_while_it_is_read_fails_and_writes_nothing",
            f"{HERE}::test_b16_coordinates_of_another_slide_are_not_drawn_or_packed"),
    "spec 2": (f"{HERE}::test_coordinates_are_what_their_parameters_say",
               "../property/test_lattice.py::test_lattice_is_its_definition"),
    "spec 4": (f"{HERE}::test_slides_of_all_kinds_in_one_run",),
    "spec 5": (f"{HERE}::test_a20_another_way_to_find_tissue_or_to_pack_is_refused",
               "test_extraction.py::test_killed_once_while_writing_heals_itself",
               f"{HERE}::test_a10_two_processes_make_what_one_makes",
               "test_minimum_set.py::test_a11_whose_lock_it_is_decides"),
}
SCALE = ("--patch_mpp", 1, "--patch_size", 64, "--lattice", "global")
SMALL = ("--seg_mpp", 4, "--min_area_um2", 3000, "--min_hole_um2", 3000)
BESIDE = ("--save_geojson", "--visualize", "grid", "--save_images", "png", "--max_images", 2,
          "--save_lmdb", "p")


def test_the_whole_catalogue_is_tested() -> None:
    assert set(WHERE) == {*(f"A{row}" for row in range(10, 21)), "spec 2", "spec 4", "spec 5",
                          *(f"B{row}" for row in range(1, 17))}
    for name in {name for names in WHERE.values() for name in names}:
        path, _, function = name.partition("::")
        tree = ast.parse((Path(__file__).parent / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, \
            name


# ---------------------------------------------------------------------------- how scripts are run

def flags_of(source: Path, out: Path, *flags: object) -> list[str]:
    return ["--source", str(source), "--save_dir", str(out), "--seg", "--patch",
            *map(str, (*SCALE, *SMALL, *flags))]


def run(source: Path, out: Path, *flags: object) -> int:
    """The script in this process; returns its exit code."""
    return create_patches_fp.main(flags_of(source, out, *flags))


def start(source: Path, out: Path, *flags: object, fault: str = "") -> subprocess.Popen[str]:
    """The script as a process."""
    return subprocess.Popen(
        [sys.executable, "create_patches_fp.py", *flags_of(source, out, *flags)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MILWRIGHT_FAULT": fault})


def report(out: Path) -> dict[str, dict[str, str]]:
    with (out / "report_patches.csv").open(newline="", encoding="utf-8") as file:
        return {row["item"]: row for row in csv.DictReader(file)}


def statuses(out: Path) -> dict[str, str]:
    return {item: row["status"] for item, row in report(out).items()}


def wait_for(there: Callable[[], object], run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def stray(out: Path) -> list[Path]:
    """Temporaries, locks and unfinished parts that are left."""
    return [*out.rglob(".mw-tmp-*"), *out.rglob("*.lock"), *out.rglob("*.parts")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides, a.tif and b.tif; do not change."""
    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate("ab"):
        write_pyramid(folder / f"{name}.tif", tissue_image(1024, 1024, seed=seed))
    return folder


@pytest.fixture(scope="module")
def unbroken(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run with everything beside makes of the two slides."""
    out = tmp_path_factory.mktemp("unbroken")
    assert run(pair, out, *BESIDE) == 0
    return contents(out)


@pytest.fixture
def source(pair: Path, tmp_path: Path) -> Path:
    """The two slides, to be changed."""
    return Path(shutil.copytree(pair, tmp_path / "slides"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# ---------------------------------------------------------------------------- A: processes

def test_a10_two_processes_make_what_one_makes(pair: Path, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(8):
        os.link(pair / f"{'ab'[number % 2]}.tif", source / f"{number}.tif")
    both = [start(source, out, *BESIDE) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for number in range(8):
        assert sum(f"{number}.tif: processed" in text for text, _ in said) == 1
    assert run(source, out, *BESIDE) == 0  # packs what was busy when the first had finished
    assert run(source, tmp_path / "alone", *BESIDE) == 0

    def packed(folder: Path) -> dict[str, list[bytes]]:  # rows lie in the order of arrival
        with PatchLmdbReader(folder / "p.lmdb") as reader:
            return {name: [reader.encoded(row) for row in reader.rows(name)]
                    for name in reader.slides()}

    assert packed(out) == packed(tmp_path / "alone") and len(packed(out)) == 8
    ours, theirs = contents(out), contents(tmp_path / "alone")
    assert ours.pop("p.lmdb") and theirs.pop("p.lmdb") and ours == theirs
    assert not stray(out)


def test_a10_a_database_in_other_hands_is_listed_as_busy(
        pair: Path, out: Path, unbroken: dict[str, str]) -> None:
    out.mkdir()
    with claim(out / "p.lmdb"):
        assert run(pair, out, *BESIDE) == 0
    assert statuses(out) == {"a.tif": "done", "b.tif": "done", "a.tif [lmdb]": "busy",
                             "b.tif [lmdb]": "busy"}
    assert f"process {os.getpid()}" in report(out)["a.tif [lmdb]"]["reason"]
    assert run(pair, out, *BESIDE) == 0 and contents(out) == unbroken


def test_a12_a_lock_deleted_by_hand_stops_the_final_write(
        pair: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wsi_core.patching as patching

    place = patching.place_patches

    def meddle(slide: Any, *rest: Any, **more: Any) -> PatchCoords:
        if slide.path.name == "a.tif":
            lock_path(out / "patches/a.h5").unlink()
        return place(slide, *rest, **more)

    monkeypatch.setattr(patching, "place_patches", meddle)
    assert run(pair, out) == 3
    assert "a.h5.lock was deleted while we worked" in report(out)["a.tif"]["reason"]
    assert [path.name for path in (out / "patches").iterdir()] == ["b.h5"]


def test_a13_a_file_system_without_locks_is_told(
        pair: Path, out: Path, unbroken: dict[str, str], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    def fail(self: SoftFileLock) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(SoftFileLock, "_acquire", fail)
    assert run(pair, out, *BESIDE) == 0
    warning = capsys.readouterr().err
    assert "patches: this file system has no locks" in warning and "one at a time" in warning
    assert contents(out) == unbroken


@pytest.mark.parametrize(("workers", "fault", "sign"), [
    (2, "patching.open.b:sleep", "patches/a.h5"),  # b hangs in a worker
    (0, "lmdb.commit:sleep:2", "p.lmdb.parts/b.zip")])  # b is being taken in
def test_a14_terminated_while_workers_patch_or_the_database_is_written(
        workers: int, fault: str, sign: str, pair: Path, out: Path, unbroken: dict[str, str]
        ) -> None:
    process = start(pair, out, *BESIDE, "--workers", workers, fault=fault)
    wait_for((out / sign).exists, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 143, errors
    assert "run the same command again" in errors and "Traceback" not in errors
    assert not [*out.rglob(".mw-tmp-*"), *out.rglob("*.lock")]
    if (out / "p.lmdb").exists():
        with pytest.raises(BrokenFile, match="never finished"):
            PatchLmdbReader(out / "p.lmdb")
    assert run(pair, out, *BESIDE) == 0
    assert contents(out) == unbroken and not stray(out)


def test_a_database_that_was_not_declared_complete_is_by_the_next_run(
        pair: Path, out: Path, unbroken: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A14 between the last slide and the end, when nothing is left to pack."""
    def die(self: PatchLmdb, **_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PatchLmdb, "finish", die)
        run(pair, out, *BESIDE)
    assert run(pair, out, *BESIDE) == 0
    assert set(statuses(out).values()) == {"already done"} and contents(out) == unbroken


def test_a15_a_slide_that_kills_its_worker_fails_alone(
        pair: Path, out: Path, unbroken: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("MILWRIGHT_FAULT", "patching.open.a:kill")
        assert run(pair, out, *BESIDE, "--workers", 2) == 3
    assert statuses(out) == {"a.tif": "failed", "b.tif": "done", "b.tif [lmdb]": "done"}
    assert "worker process died" in report(out)["a.tif"]["reason"]
    assert run(pair, out, *BESIDE) == 0 and not stray(out)
    assert {**contents(out), "p.lmdb": ""} == {**unbroken, "p.lmdb": ""}  # b lies before a there
    with PatchLmdbReader(out / "p.lmdb") as reader:
        assert set(reader.slides()) == {"a", "b"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a16_a_slide_that_hangs_fails_alone(
        workers: int, pair: Path, out: Path, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("MILWRIGHT_FAULT", "patching.open.a:sleep")
        assert run(pair, out, "--workers", workers, "--slide_timeout", 2) == 3
    assert statuses(out) == {"a.tif": "failed", "b.tif": "done"}
    assert "took longer than 2 s" in report(out)["a.tif"]["reason"]
    assert "in patch_slide" in capfd.readouterr().err  # where it hung
    assert run(pair, out) == 0
    assert statuses(out) == {"a.tif": "done", "b.tif": "already done"} and not stray(out)


def test_a17_sixty_slides_leave_no_more_open_than_five(
        tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wsi_core.planning as planning

    source = tmp_path / "many"
    source.mkdir()
    first = write_pyramid(source / "0.tif", tissue_image(512, 512), downsamples=(1, 4))
    for number in range(1, 60):
        os.link(first, source / f"{number}.tif")
    settle, files, pages = planning.settle, [], []

    def count(*settled: Any) -> None:
        files.append(len(os.listdir("/proc/self/fd")))
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
        settle(*settled)

    monkeypatch.setattr(planning, "settle", count)
    assert run(source, out, *BESIDE) == 0
    assert len(files) == 60 and max(files[5:]) <= files[5]
    assert pages[-1] <= 1.05 * pages[5]


# ---------------------------------------------------------------------------- A: what is there

def test_a18_no_clock_decides(source: Path, out: Path, unbroken: dict[str, str]) -> None:
    assert run(source, out, *BESIDE) == 0
    for when in (1, 2**32):  # 1970 and 2106
        for path in (*source.iterdir(), *out.rglob("*")):
            os.utime(path, (when, when))
        assert run(source, out, *BESIDE) == 0
        assert set(statuses(out).values()) == {"already done"}
    assert contents(out) == unbroken


@pytest.mark.parametrize(("flags", "words"), [
    (("--white_thresh", 15), "white_thresh: file has None, you ask 15"),
    (("--black_thresh", 50), "black_thresh: file has None, you ask 50"),
    (("--seg_mpp", 2), "seg_mpp: file has 4.0, you ask 2.0"),
    (("--remove_pen",), "remove_pen"), (("--remove_artefacts",), "remove_artefacts"),
    (("--min_area_um2", 1), "min_area_um2"), (("--min_hole_um2", 1), "min_hole_um2"),
    (("--white_padding",), "background"), (("--overlap", 8), "step_size"),
    (("--layout", "atlaspatch"), "layout"),
    (("--save_lmdb", "p", "--jpeg_quality", 50), "quality 90, you ask 50"),
    (("--save_lmdb", "p", "--image_format", "png"), "encoding jpeg, you ask png"),
    (("--save_lmdb", "../p"), "not a plain name")])
def test_a20_another_way_to_find_tissue_or_to_pack_is_refused(
        flags: tuple[object, ...], words: str, finished: tuple[Path, Path]) -> None:
    """Before any work, and nothing is touched."""
    source, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    with pytest.raises(Refused, match=words):
        run(source, out, *flags)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {out / "p.lmdb-lock"}


@pytest.fixture(scope="module")
def finished(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished folder of a.tif, and its source, in which b.tif waits."""
    root = tmp_path_factory.mktemp("finished")
    (root / "slides").mkdir()
    os.link(pair / "a.tif", root / "slides/a.tif")
    assert run(root / "slides", root / "out", "--save_lmdb", "p") == 0
    os.link(pair / "b.tif", root / "slides/b.tif")
    return root / "slides", root / "out"


# ---------------------------------------------------------------------------- B: slides

def test_b3_a_damaged_tile_fails_pictures_and_database_alone(source: Path, out: Path) -> None:
    sound = (source / "a.tif").read_bytes()
    level = read_directories(source / "a.tif")[0]
    middle = level.columns * 2 + 2
    place = slice(int(level.offsets[middle]), int(level.offsets[middle] + level.counts[middle]))
    data = bytearray(sound)
    data[place] = bytes(len(data[place]))
    (source / "a.tif").write_bytes(data)
    fine = ("--patch_mpp", 0.5)  # of level 0, where the damage is
    assert run(source, out, *fine, "--save_lmdb", "p") == 3  # coordinates need no level 0
    assert statuses(out) == {"a.tif": "done", "b.tif": "done", "a.tif [lmdb]": "failed",
                             "b.tif [lmdb]": "done"}
    assert "a.tif" in report(out)["a.tif [lmdb]"]["reason"]
    with PatchLmdbReader(out / "p.lmdb") as reader:
        assert reader.slides() == ["b"]
    assert run(source, out, *fine, "--save_images", "png", "--no_auto_skip") == 3
    assert statuses(out) == {"a.tif": "failed", "b.tif": "done"} and not stray(out)
    (source / "a.tif").write_bytes(sound)
    assert run(source, out, *fine, "--save_images", "png", "--save_lmdb", "p") == 0
    assert len(list((out / "images/a").iterdir())) == len(read_coords(out / "patches/a.h5")) > 0


def test_damaged_coordinates_of_a_slide_cost_the_database_that_slide_alone(
        pair: Path, out: Path) -> None:
    """A4 in the last stage: the row says 0, so nothing makes them again."""
    assert run(pair, out) == 0
    (out / "patches/a.h5").write_bytes((out / "patches/a.h5").read_bytes()[:1000])
    assert run(pair, out, "--process_list", "process_list_autogen.csv", "--save_lmdb", "p") == 3
    assert statuses(out) == {"a.tif [lmdb]": "failed", "b.tif [lmdb]": "done"}
    with PatchLmdbReader(out / "p.lmdb") as reader:
        assert reader.slides() == ["b"]


@pytest.mark.parametrize("segmenter", ["clam", "otsu", "entropy", "stain"])
def test_b9_slides_without_tissue_are_empty_for_every_segmenter(
        segmenter: str, bare: Path, out: Path) -> None:
    assert run(bare, out, "--segmenter", segmenter, "--remove_pen", "--min_area_um2", 40_000,
               "--save_images", "jpeg", "--visualize", "mask", "contours", "grid",
               "--save_geojson", "--save_lmdb", "p") == 0
    assert set(statuses(out).values()) == {"empty"}, report(out)
    for path in bare.iterdir():
        assert read_coords(out / "patches" / f"{path.stem}.h5").coords.shape == (0, 2)
        assert (out / "contours_geojson" / f"{path.stem}.geojson").exists()
    with PatchLmdbReader(out / "p.lmdb") as reader:
        assert len(reader) == 0 and len(reader.slides()) == 3


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blank, all black, and written on with a blue pen."""
    folder = tmp_path_factory.mktemp("bare")
    rng = np.random.default_rng(0)
    glass = rng.integers(238, 246, (1024, 1024, 3)).astype(np.uint8)
    pen = glass.copy()
    for x in (200, 500, 800):  # 60 um wide: finer lines would pass for blood or pigment
        cv2.line(pen, (x, 200), (x + 90, 800), (30, 40, 190), 120)
    for name, image in {"white": glass, "black": glass * 0, "pen": pen}.items():
        write_pyramid(folder / f"{name}.tif", image)
    return folder


@pytest.mark.parametrize("step", [64, 48])
@pytest.mark.parametrize("padding", [False, True])
def test_b10_tissue_to_the_border_gives_cells_by_a_formula(
        padding: bool, step: int, full: Path, out: Path) -> None:
    assert run(full, out, "--min_area_um2", 500, "--step_size", step,
               *(["--white_padding"] if padding else [])) == 0
    patch_l0, step_l0 = 128, 2 * step
    for path in full.iterdir():
        found = read_coords(out / "patches" / f"{path.stem}.h5")
        counts = [-(-side // step_l0) if padding else max(0, (side - patch_l0) // step_l0 + 1)
                  for side in found.slide_size]
        assert len(found) == counts[0] * counts[1], path.name
        assert (statuses(out)[path.name] == "empty") == (len(found) == 0)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides that are tissue to their borders; two are lower than a patch (128 px)."""
    folder = tmp_path_factory.mktemp("full")
    for width, height in ((1024, 768), (1000, 700), (920, 110), (110, 110), (128, 128)):
        image = np.full((height, width, 3), (190, 110, 170), np.uint8)
        write_pyramid(folder / f"{width}x{height}.tif", image, downsamples=(1, 2))
    return folder


def test_b10_padding_is_white(full: Path, out: Path) -> None:
    run(full, out, "--min_area_um2", 500, "--white_padding", "--save_images", "png")
    border = np.asarray(cv2.imread(str(out / "images/110x110/110x110_x0_y0.png")))
    assert border.shape == (64, 64, 3)
    assert (border[59:] > 250).all() and (border[:, 59:] > 250).all()  # the slide ends at 55
    assert (border[:51, :51] < 200).all()


NAMES = ("schnitt über #1 100%.v2", "-dash and space", "日本語 切片", "n" * 196, "=cmd()",
         "a&b <i>", "x_patches")


@pytest.mark.parametrize("layout", ["clam", "trident", "atlaspatch"])
def test_b13_any_name_goes_through_everything(layout: str, pair: Path, tmp_path: Path, out: Path
                                              ) -> None:
    source = tmp_path / "slides"
    (source / "in #1").mkdir(parents=True)
    for name in NAMES:
        os.link(pair / "a.tif", source / f"{name}.tif")
    os.link(pair / "a.tif", source / "in #1" / f"{NAMES[0]}.tif")
    ids = {*NAMES, f"in #1__{NAMES[0]}"}
    flags = (*BESIDE, "--layout", layout, "--recursive", "--id_from_path", "--stitch")
    assert run(source, out, *flags) == 0
    for folder, suffix in (("visualization", "_grid.png"), ("contours_geojson", ".geojson"),
                           ("masks", ".jpg"), ("stitches", ".jpg"), ("images", "")):
        assert {path.name for path in (out / folder).iterdir()} == {one + suffix for one in ids}
    for one in ids:
        assert len(list((out / "images" / one).iterdir())) == 2
    with PatchLmdbReader(out / "p.lmdb") as reader:
        assert set(reader.slides()) == ids
    assert run(source, out, *flags) == 0
    assert set(statuses(out).values()) == {"already done"}


def test_b13_a_name_too_long_fails_alone(pair: Path, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "slides"
    source.mkdir()
    for name in ("n" * 251, "good"):
        os.link(pair / "a.tif", source / f"{name}.tif")
    assert run(source, out, *BESIDE) == 3
    assert statuses(out) == {"n" * 251 + ".tif": "failed", "good.tif": "done",
                             "good.tif [lmdb]": "done"}
    assert "at most 200 bytes" in report(out)["n" * 251 + ".tif"]["reason"]


def test_b14_links_are_followed_and_clashes_of_case_refused(pair: Path, tmp_path: Path, out: Path
                                                            ) -> None:
    source = tmp_path / "slides"
    source.mkdir()
    (source / "a.tif").symlink_to(pair / "a.tif")
    (source / "below").symlink_to(pair, target_is_directory=True)
    (source / "circle").symlink_to(source, target_is_directory=True)
    assert run(source, out, "--recursive", "--id_from_path") == 0
    assert set(statuses(out)) == {"a.tif", "below__a.tif", "below__b.tif"}
    (source / "gone.tif").symlink_to(source / "nowhere")
    assert run(source, out, "--recursive", "--id_from_path") == 3
    assert "link to a file that is not there" in report(out)["gone.tif"]["reason"]
    (source / "A.svs").symlink_to(pair / "b.tif")
    with pytest.raises(Refused, match=r"A\.svs .*a\.tif would both become"):
        run(source, out, "--recursive", "--id_from_path")


@pytest.mark.parametrize("stage", ["find_tissue", "place_patches"])
def test_b16_a_slide_replaced_while_it_is_read_fails_and_writes_nothing(
        stage: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one of the same size, even."""
    import wsi_core.patching as patching

    original = getattr(patching, stage)

    def meddle(first: Any, *rest: Any, **more: Any) -> Any:
        path = getattr(first, "slide", first).path
        if path.name == "a.tif":
            replace(path, path.read_bytes())
        return original(first, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(patching, stage, meddle)
        assert run(source, out) == 3
    assert statuses(out) == {"a.tif": "failed", "b.tif": "done"}
    assert "was replaced while it was read" in report(out)["a.tif"]["reason"]
    assert [path.name for path in (out / "patches").iterdir()] == ["b.h5"]
    assert run(source, out) == 0


def test_b16_a_slide_replaced_while_it_is_packed(
        source: Path, out: Path, unbroken: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import wsi_core.patch_lmdb as patch_lmdb
    from wsi_core.patch_images import keep_by_pixels as keep

    def meddle(slide: Any, *rest: Any, **more: Any) -> np.ndarray:
        if slide.path.name == "a.tif":
            replace(slide.path, slide.path.read_bytes())
        return keep(slide, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(patch_lmdb, "keep_by_pixels", meddle)
        assert run(source, out, *BESIDE) == 3
    assert "was replaced while it was read" in report(out)["a.tif [lmdb]"]["reason"]
    assert not stray(out)
    with PatchLmdbReader(out / "p.lmdb") as reader:
        assert reader.slides() == ["b"]


def test_b16_coordinates_of_another_slide_are_not_drawn_or_packed(source: Path, out: Path) -> None:
    """Their rows say 0, so nobody compares parameters; the pixels would be others'."""
    assert run(source, out) == 0
    replace(source / "a.tif", (source / "b.tif").read_bytes())
    assert run(source, out, "--process_list", "process_list_autogen.csv", "--save_lmdb", "p") == 3
    assert "is not the slide that" in report(out)["a.tif [lmdb]"]["reason"]
    with PatchLmdbReader(out / "p.lmdb") as reader:
        assert reader.slides() == ["b"]
    pictures = ["--source", str(source), "--save_dir", str(out), *map(str, SCALE), "--save_images",
                "png"]
    assert create_patches_fp.main(pictures) == 3
    assert "--no_auto_skip" in report(out)["a.tif"]["reason"]
    assert not (out / "images/a").exists() and (out / "images/b").exists()


def replace(path: Path, data: bytes) -> None:
    """Another file in the place of this one, as a copy from elsewhere would put it."""
    (other := path.with_name("." + path.name)).write_bytes(data)
    os.utime(other, ns=(1, 1))
    other.replace(path)


# ---------------------------------------------------------------------------- spec, section 13

@pytest.mark.parametrize(("least", "flags"), [
    (0.5, ()), (0.9, ("--overlap", 16)), (0.2, ("--patch_mpp", 0.73))])
def test_coordinates_are_what_their_parameters_say(least: float, flags: tuple[object, ...],
                                                   slide_folder: Path, out: Path, tmp_path: Path
                                                   ) -> None:
    """Test 2: unique, on the lattice, inside, and just those with tissue enough, counted by pixels
    of level 0."""
    four = tmp_path / "four"
    assert run(slide_folder, out, "--min_tissue", least, *flags) == 0
    assert run(slide_folder, four, "--min_tissue", least, *flags, "--workers", 4) == 0
    for path in sorted((out / "patches").iterdir()):
        found = read_coords(path)
        assert np.array_equal(found.coords, read_coords(four / "patches" / path.name).coords)
        assert len(np.unique(found.coords, axis=0)) == len(found) > 10
        step = found.parameters["step_size"] * found.parameters["patch_mpp"] / 0.5
        xs, ys = (np.rint(np.arange(0, side - footprint + 1e-9, step)).astype(int)
                  for side, footprint in zip(found.slide_size, found.footprint_px_l0, strict=True))
        shares = share_of_tissue(found, xs, ys)
        chosen = {tuple(cell) for cell in found.coords.tolist()}
        assert chosen <= shares.keys()  # on the lattice, inside the slide
        assert min(shares[cell] for cell in chosen) >= least - 0.02
        assert max(shares[cell] for cell in shares.keys() - chosen) < least + 0.1


def share_of_tissue(patches: PatchCoords, xs: np.ndarray, ys: np.ndarray
                    ) -> dict[tuple[int, int], float]:
    """Of each cell, by pixels of level 0; a point of an outline stands for the 8 x 8 pixels of the
    image that was segmented (4 um, of 0.5)."""
    assert patches.tissue is not None
    square = np.ones((8, 8), np.uint8)

    def filled(outline: np.ndarray, thickness: int = cv2.FILLED) -> np.ndarray:
        blank = np.zeros(patches.slide_size[::-1], np.uint8)
        drawn = cv2.drawContours(blank, [outline], -1, 1, thickness)
        return cv2.dilate(drawn, square, anchor=(7, 7))  # to the right and down

    mask = np.zeros(patches.slide_size[::-1], np.uint8)
    for contour, holes in zip(patches.tissue.contours, patches.tissue.holes, strict=True):
        mask |= filled(contour)
        for hole in holes:
            mask &= 1 - (filled(hole) & (1 - filled(hole, 1)))
    w, h = patches.footprint_px_l0
    return {(int(x), int(y)): float(mask[y:y + h, x:x + w].mean()) for x in xs for y in ys}


def test_slides_of_all_kinds_in_one_run(pair: Path, tmp_path: Path, out: Path) -> None:
    """Test 4: status recorded, others unaffected; equal stems only by --id_from_path."""
    source = tmp_path / "slides"
    for folder in ("one", "two"):
        (source / folder).mkdir(parents=True)
        os.link(pair / "a.tif", source / folder / "same.tif")
    tissue = tissue_image(1024, 1024)
    write_pyramid(source / "empty.tif", np.full_like(tissue, 243))
    write_pyramid(source / "tiny.tif", tissue[500:532, 500:532], downsamples=(1,))
    write_pyramid(source / "small.tif", tissue[450:550, 450:550], downsamples=(1,))  # < a patch
    write_pyramid(source / "one level.tif", tissue, downsamples=(1,))
    write_pyramid(source / f"{'ü' * 98}.tif", tissue)
    (source / "cut.tif").write_bytes((pair / "a.tif").read_bytes()[:20_000])
    with pytest.raises(Refused, match="--id_from_path"):
        run(source, out, "--recursive", *BESIDE)
    assert run(source, out, "--recursive", "--id_from_path", *BESIDE, "--workers", 2) == 3
    found = statuses(out)
    expected = {"empty.tif": "empty", "tiny.tif": "empty", "small.tif": "empty",
                "one level.tif": "done", f"{'ü' * 98}.tif": "done", "cut.tif": "failed",
                "one__same.tif": "done", "two__same.tif": "done"}
    assert {item: found[item] for item in expected} == expected
    assert {item for item in found if "[lmdb]" in item and found[item] not in ("done", "empty")} \
        == set()
    for item, row in report(out).items():
        assert (int(row["n_patches"] or 0) > 10) == (row["status"] == "done"), item
