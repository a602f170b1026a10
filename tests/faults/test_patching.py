"""What goes wrong around create_patches_fp.py, each fault as a process: exit code, report, files.

The rows are those of the reliability catalogue (A1, A4, ...). A run that was broken is repeated
and must end like one that was not.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import h5py
import numpy as np
import pytest
from filelock import SoftFileLock

from tests.conftest import ROOT
from tests.slides import tissue_image, write_pyramid
from utils.storage import read_h5

Script = Callable[..., CompletedProcess[str]]
Patch = Callable[..., CompletedProcess[str]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def source(tmp_path: Path, slide_folder: Path) -> Path:
    """Two good slides, a.tif and b.tif, that a test may add to."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for index, name in enumerate(("a.tif", "b.tif")):
        os.link(slide_folder / f"slide_{index}.tif", folder / name)
    return folder


@pytest.fixture
def patch(run_script: Script, source: Path, out: Path) -> Patch:
    def run(*flags: object, env: dict[str, str] | None = None) -> CompletedProcess[str]:
        return run_script("create_patches_fp.py", "--source", source, "--save_dir", out, "--seg",
                          "--patch", "--preset", "bwh_biopsy.csv", *flags, env=env)
    return run


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "process_list_autogen.csv").open(newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def results(out: Path) -> dict[str, object]:
    """What the finished files mean."""
    found: dict[str, object] = {}
    for path in sorted(out.glob("*/*")):
        if path.suffix == ".h5":
            data = read_h5(path)
            found[path.name] = (str(data.parameters), data.arrays["coords"].tolist())
        else:
            found[path.name] = path.read_bytes()
    return found


def clean(out: Path) -> bool:
    """No temporary and no lock is left."""
    return not list(out.rglob(".mw-tmp-*")) and not list(out.rglob("*.lock"))


# ---------------------------------------------------------------------------- files, processes

@pytest.mark.parametrize("site", ["storage.open", "storage.write", "storage.replace"])
def test_a1_killed_while_writing_the_h5(site: str, patch: Patch, out: Path) -> None:
    killed = patch(env={"MILWRIGHT_FAULT": f"{site}:kill:5"})  # mask, h5, list, mask, h5
    assert killed.returncode == -signal.SIGKILL
    again = patch()
    assert again.returncode == 0, again.stderr
    assert clean(out)
    whole = results(out)
    assert {"a.h5", "b.h5", "a.jpg", "b.jpg"} == set(whole)
    assert patch("--no_auto_skip").returncode == 0
    assert results(out) == whole


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.0])
def test_a4_truncated_h5_is_redone(keep: float, patch: Patch, out: Path) -> None:
    assert patch().returncode == 0
    whole = results(out)
    path = out / "patches/a.h5"
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])
    again = patch()
    assert again.returncode == 0 and "1 already done, 1 done" in again.stdout
    assert results(out) == whole


def test_a6_flipped_byte_is_redone(patch: Patch, out: Path) -> None:
    assert patch().returncode == 0
    whole = results(out)
    path = out / "patches/a.h5"
    with h5py.File(path) as file:
        place = file["coords"].id.get_chunk_info(0).byte_offset
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    assert patch().returncode == 0
    assert results(out) == whole


def test_a8_disk_full_fails_the_slide_and_keeps_the_old(patch: Patch, out: Path) -> None:
    assert patch().returncode == 0
    whole = results(out)
    full = patch("--no_auto_skip", "--step_size", "128",
                 env={"MILWRIGHT_FAULT": "storage.write:enospc:2"})  # the h5 of a
    assert full.returncode == 3
    assert "a.tif: no space left to write" in full.stdout
    assert rows(out)["b.tif"]["status"] == "processed"
    assert results(out)["a.h5"] == whole["a.h5"] and clean(out)


def test_a8_file_size_limit_is_no_crash(source: Path, out: Path) -> None:
    code = ("import resource, sys, create_patches_fp\n"
            "from utils.errors import run_script\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))\n"
            "sys.exit(run_script(create_patches_fp.main))")
    done = subprocess.run(
        [sys.executable, "-c", code, "--source", source, "--save_dir", out, "--seg", "--patch",
         "--preset", "bwh_biopsy.csv"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "no space left to write" in done.stdout and "Traceback" not in done.stderr
    assert clean(out) and not list((out / "patches").iterdir())


def test_a9_read_only_folder_is_refused(patch: Patch, out: Path) -> None:
    out.write_text("a file in the place of the folder")
    done = patch()
    assert done.returncode == 2 and "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a10_two_processes_share_the_work(patch: Patch, source: Path, out: Path,
                                          tmp_path: Path) -> None:
    command = [sys.executable, "create_patches_fp.py", "--source", source, "--save_dir", out,
               "--seg", "--patch", "--preset", "bwh_biopsy.csv"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    for name in ("a.tif", "b.tif"):  # each done once; the other skipped it or found it busy
        done = sum(f"{name}: processed" in text for text in printed)
        assert done == 1, printed
    assert clean(out) and {"a.h5", "b.h5"} <= set(results(out))
    assert patch().returncode == 0
    assert {row["status"] for row in rows(out).values()} == {"already_exist"}


def test_a11_a_live_lock_is_respected_and_a_dead_ones_taken_over(patch: Patch, out: Path) -> None:
    (out / "patches").mkdir(parents=True)
    with SoftFileLock(str(out / "patches/a.h5.lock")):
        done = patch()
        assert done.returncode == 0 and "1 busy" in done.stdout
        row = rows(out)["a.tif"]
        assert (row["status"], row["process"]) == ("tbp", "1")
        assert rows(out)["b.tif"]["status"] == "processed"
    code = ("import os, sys; from filelock import SoftFileLock\n"
            "lock = SoftFileLock(sys.argv[1]); lock.acquire(); os._exit(9)")
    hold = subprocess.run([sys.executable, "-c", code, out / "patches/a.h5.lock"])
    assert hold.returncode == 9 and (out / "patches/a.h5.lock").exists()
    assert patch().returncode == 0
    assert rows(out)["a.tif"]["status"] == "processed" and clean(out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a14_interrupted_cleanly(number: signal.Signals, code: int, patch: Patch, source: Path,
                                 out: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "create_patches_fp.py", "--source", source, "--save_dir", out, "--seg",
         "--patch", "--preset", "bwh_biopsy.csv"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "MILWRIGHT_FAULT": "storage.write:sleep:4"})  # the mask of b
    deadline = time.monotonic() + 60
    while not (out / "process_list_autogen.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == code, errors
    assert "run the same command again" in errors and "Traceback" not in errors
    table = rows(out)
    assert (table["a.tif"]["status"], table["b.tif"]["status"]) == ("processed", "tbp")
    assert clean(out) and not (out / "patches/b.h5").exists()
    assert patch().returncode == 0
    assert {"a.h5", "b.h5"} <= set(results(out))


def test_a19_same_stem_is_refused_with_both_paths(patch: Patch, source: Path, out: Path) -> None:
    shutil.copy(source / "a.tif", source / "a.svs")
    done = patch()
    assert done.returncode == 2 and not out.exists()
    assert str(source / "a.svs") in done.stderr and str(source / "a.tif") in done.stderr


@pytest.mark.parametrize(("flags", "words"), [
    (("--patch_size", 128), "patch_size: file has 256, you ask 128"),
    (("--step_size", 128), "step_size: file has 256, you ask 128"),
    (("--patch_level", 1), "patch_level: file has 0, you ask 1"),
    (("--custom_downsample", 2), "custom_downsample: file has 1, you ask 2"),
    (("--preset", "tcga.csv"), "sthresh: file has 15, you ask 8")])
def test_a20_other_parameters_are_refused_and_nothing_is_touched(
        flags: tuple[object, ...], words: str, patch: Patch, out: Path, source: Path) -> None:
    assert patch().returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    os.link(source / "b.tif", source / "0_new.tif")  # would come first
    done = patch(*flags)
    assert done.returncode == 2 and words in done.stderr
    assert "1 more slides differ" in done.stderr and "--no_auto_skip" in done.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a20_a_slide_that_was_replaced_is_noticed(patch: Patch, out: Path, source: Path) -> None:
    assert patch().returncode == 0
    (source / "a.tif").unlink()
    write_pyramid(source / "a.tif", tissue_image(1024, 768, seed=9))
    done = patch()
    assert done.returncode == 2 and "slide_bytes: file has" in done.stderr
    assert patch("--no_auto_skip").returncode == 0


# ---------------------------------------------------------------------------- slides

def test_b1_b2_bad_files_fail_alone_with_their_reason(patch: Patch, source: Path, out: Path
                                                      ) -> None:
    raw = (source / "a.tif").read_bytes()
    (source / "cut.tif").write_bytes(raw[:len(raw) // 2])
    (source / "text.svs").write_text("no slide at all\n" * 50)
    (source / "zero.tif").touch()
    (source / "gone.tif").symlink_to(source / "nowhere")
    done = patch("--workers", 2)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    table = rows(out)
    for name in ("cut.tif", "text.svs", "zero.tif", "gone.tif"):
        assert table[name]["status"] == "failed" and table[name]["reason"], name
        assert f"failed  {name}: " in done.stdout
        assert not (out / "patches" / f"{Path(name).stem}.h5").exists()
    assert table["a.tif"]["status"] == table["b.tif"]["status"] == "processed"


def test_b9_blank_black_and_pen_only_slides(patch: Patch, source: Path, out: Path) -> None:
    white = np.full((1024, 1024, 3), 245, np.uint8)
    pen = white.copy()
    pen[100:104, 100:200] = (20, 20, 200)
    for name, image in (("white", white), ("black", white * 0), ("pen", pen)):
        write_pyramid(source / f"{name}.tif", image)
    done = patch()
    assert done.returncode == 0 and "3 empty" in done.stdout
    for name in ("white", "black", "pen"):
        assert read_h5(out / "patches" / f"{name}.h5").arrays["coords"].shape == (0, 2)
        assert rows(out)[f"{name}.tif"]["status"] == "no_tissue"


# ---------------------------------------------------------------------------- tables

@pytest.mark.parametrize("slide_id", ["../a.tif", "/etc/passwd", "sub/a.tif", "..", "a\\b.tif"])
def test_c7_ids_that_leave_the_folder(slide_id: str, patch: Patch, out: Path) -> None:
    out.mkdir()
    (out / "l.csv").write_text(f"slide_id\na.tif\n{slide_id}\n")
    done = patch("--process_list", "l.csv")
    assert done.returncode == 2 and "is not a plain name" in done.stderr
    assert [path.name for path in out.iterdir()] == ["l.csv"]


def test_c10_list_without_its_column_or_with_rows_of_other_slides(patch: Patch, out: Path) -> None:
    out.mkdir()
    (out / "l.csv").write_text("process,sthresh\n1,8\n")
    done = patch("--process_list", "l.csv")
    assert done.returncode == 2 and "no column 'slide_id'" in done.stderr
    (out / "l.csv").write_bytes("\ufeffslide_id;sthresh\r\na.tif;15\r\nother.tif;15\r\n".encode())
    done = patch("--process_list", "l.csv")
    assert done.returncode == 3
    assert rows(out)["a.tif"]["status"] == "processed"
    assert "other.tif: no such file" in rows(out)["other.tif"]["reason"]
