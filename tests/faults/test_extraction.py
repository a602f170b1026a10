"""Faults during feature extraction: what is finished stays, what is half is never trusted.

Row numbers (A1 ...) are those of the acceptance suite for reliability.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import tifffile
import torch

from tests.conftest import ROOT
from tests.feature_inputs import (
    Inputs,
    grid_coords,
    make_inputs,
    write_patches,
    write_tiny_encoder,
)
from tests.slides import tissue_image, write_pyramid
from utils.locks import claim
from utils.storage import digest, read_h5, write_h5

Run = Callable[..., CompletedProcess[str]]
SCRIPT = "extract_features_fp.py"
SLIDES = ("slide_0", "slide_1", "slide_2")


@pytest.fixture(scope="module")
def encoder_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tiny_encoder(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs") / "cohort", (20, 7, 13))


@pytest.fixture(scope="module")
def unbroken(inputs: Inputs, encoder_flags: list[str], tmp_path_factory: pytest.TempPathFactory
             ) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    done = start(inputs, folder, encoder_flags)
    assert done.wait(120) == 0
    return folder


def start(inputs: Inputs, folder: Path, flags: list[str], **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / SCRIPT), *inputs.arguments(folder), *flags], cwd=ROOT,
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env})


def contents(folder: Path) -> dict[str, str]:
    """What the result files mean, by name."""
    found = {str(path.relative_to(folder)): digest(read_h5(path).arrays)
             for path in sorted(folder.glob("h5_files/*.h5"))}
    for path in sorted(folder.glob("pt_files/*.pt")):
        tensor = torch.load(path, weights_only=True)
        found[str(path.relative_to(folder))] = digest({"features": tensor.numpy()})
    return found


def strays(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*")
            if path.name.endswith(".lock") or path.name.startswith(".mw-tmp-")]


def copy_inputs(inputs: Inputs, target: Path) -> Inputs:
    shutil.copytree(inputs.slides, target / "slides")
    shutil.copytree(inputs.patches_root, target / "out")
    return Inputs(target / "slides", target / "out", target / "out" / inputs.csv.name)


@pytest.fixture
def cohort(inputs: Inputs, tmp_path: Path) -> Inputs:
    """Inputs that the test may damage."""
    return copy_inputs(inputs, tmp_path)


@pytest.fixture
def finished(unbroken: Path, tmp_path: Path) -> Path:
    """A finished folder that the test may damage."""
    return Path(shutil.copytree(unbroken, tmp_path / "feat"))


# ---------------------------------------------------------------------------- killed, interrupted

def test_a_slide_that_kills_its_process_fails_alone(
        inputs: Inputs, unbroken: Path, encoder_flags: list[str], tmp_path: Path, run_script: Run
        ) -> None:
    """A15, and a crash in a C library."""
    arguments = [*inputs.arguments(tmp_path), *encoder_flags]
    run = run_script(SCRIPT, *arguments, env={"MILWRIGHT_FAULT": "patches.open.slide_1:kill"})
    assert run.returncode == 3, run.stdout + run.stderr
    assert "failed  slide_1: its worker process died" in run.stdout
    assert "Traceback" not in run.stderr and strays(tmp_path) == []
    assert set(contents(tmp_path)) == {name for name in contents(unbroken) if "slide_1" not in name}
    assert run_script(SCRIPT, *arguments).returncode == 0
    assert contents(tmp_path) == contents(unbroken)


def test_a_read_that_never_comes_back(
        inputs: Inputs, unbroken: Path, encoder_flags: list[str], tmp_path: Path, run_script: Run
        ) -> None:
    """A16: the slide fails as "timeout", its stack is told, the others are done; then it goes."""
    arguments = [*inputs.arguments(tmp_path), *encoder_flags, "--slide_timeout", "2"]
    run = run_script(SCRIPT, *arguments, env={"MILWRIGHT_FAULT": "patches.open.slide_1:sleep"})
    assert run.returncode == 3, run.stdout + run.stderr
    (line,) = [line for line in run.stdout.splitlines() if "failed  slide_1:" in line]
    assert "timeout: reading" in line and "longer than 2 s" in line
    assert "in fault_point" in run.stderr and strays(tmp_path) == []
    assert set(contents(tmp_path)) == {name for name in contents(unbroken) if "slide_1" not in name}
    assert run_script(SCRIPT, *arguments).returncode == 0
    assert contents(tmp_path) == contents(unbroken)


def test_killed_once_while_writing_heals_itself(
        inputs: Inputs, unbroken: Path, encoder_flags: list[str], tmp_path: Path, run_script: Run
        ) -> None:
    """A1, A2: killed before the second slide's h5 has its name; every point: test_crash_sweep."""
    run = run_script(SCRIPT, *inputs.arguments(tmp_path), *encoder_flags,
                     env={"MILWRIGHT_FAULT": "storage.replace:kill:3"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert contents(tmp_path) == contents(unbroken)
    assert [name for name in strays(tmp_path) if name.endswith(".lock")] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted(inputs: Inputs, unbroken: Path, encoder_flags: list[str], tmp_path: Path,
                     number: signal.Signals, code: int) -> None:
    """A14: the slide in hand is abandoned cleanly, the others stay."""
    run = start(inputs, tmp_path, encoder_flags, MILWRIGHT_FAULT="storage.write:sleep:3")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("pt_files/*.pt")) or not strays(tmp_path):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # as a terminal does: every process of the group
    else:
        run.send_signal(number)
    out = run.communicate(timeout=25)[0].decode()
    assert run.returncode == code, out
    assert "Traceback" not in out and "same command again" in out
    assert strays(tmp_path) == []
    assert 0 < len(contents(tmp_path)) < 6
    assert start(inputs, tmp_path, encoder_flags).wait(120) == 0
    assert contents(tmp_path) == contents(unbroken)


# ---------------------------------------------------------------------------- disks, processes

def test_disk_full(inputs: Inputs, encoder_flags: list[str], tmp_path: Path, run_script: Run
                   ) -> None:
    """A8: the slide fails with a remedy, nothing half-written stays, the others are done."""
    run = run_script(SCRIPT, *inputs.arguments(tmp_path), *encoder_flags,
                     env={"MILWRIGHT_FAULT": "storage.write:enospc:3"})
    assert run.returncode == 3 and "no space left to write" in run.stdout
    assert "Traceback" not in run.stderr and strays(tmp_path) == []
    assert len(list(tmp_path.glob("h5_files/*.h5"))) == 2


def test_the_output_folder_is_a_file(inputs: Inputs, encoder_flags: list[str], tmp_path: Path,
                                     run_script: Run) -> None:
    """A9"""
    (tmp_path / "feat").write_text("", encoding="utf-8")
    run = run_script(SCRIPT, *inputs.arguments(tmp_path / "feat"), *encoder_flags)
    assert run.returncode == 2 and "cannot be written" in run.stderr


def test_two_processes_share_a_folder(inputs: Inputs, unbroken: Path, encoder_flags: list[str],
                                      tmp_path: Path) -> None:
    """A10"""
    runs = [start(inputs, tmp_path, encoder_flags) for _ in range(2)]
    for run in runs:
        out = run.communicate(timeout=200)[0].decode()
        assert run.returncode == 0, out
    assert contents(tmp_path) == contents(unbroken) and strays(tmp_path) == []


def test_a_slide_in_other_hands_is_listed_as_busy(
        inputs: Inputs, encoder_flags: list[str], tmp_path: Path, run_script: Run) -> None:
    """A10, A11: a living owner is respected, a dead one is not."""
    (tmp_path / "h5_files").mkdir()
    dead = "import os,sys; sys.path.insert(0, '.')\nfrom utils.locks import claim\n" \
           "from pathlib import Path\nwith claim(Path(sys.argv[1])): os._exit(0)"
    subprocess.run([sys.executable, "-c", dead, str(tmp_path / "h5_files/slide_2.h5")], cwd=ROOT,
                   check=True)
    assert strays(tmp_path) == ["slide_2.h5.lock"]
    with claim(tmp_path / "h5_files/slide_0.h5"):
        run = run_script(SCRIPT, *inputs.arguments(tmp_path), *encoder_flags)
    assert run.returncode == 0 and "busy  slide_0" in run.stdout
    assert {path.stem for path in tmp_path.glob("h5_files/*.h5")} == {"slide_1", "slide_2"}
    assert strays(tmp_path) == []


# ---------------------------------------------------------------------------- damaged results

def test_damaged_results_are_seen_and_mended(encoder_flags: list[str], tmp_path: Path,
                                             run_script: Run) -> None:
    """A4, A5, A6: the h5 is made anew; A2, A7: a pt comes back from its h5, nothing is encoded."""
    inputs, folder = make_inputs(tmp_path / "cohort", (5,) * 8), tmp_path / "feat"
    arguments = [*inputs.arguments(folder), *encoder_flags]
    assert run_script(SCRIPT, *arguments).returncode == 0
    whole = contents(folder)
    files = [folder / "h5_files" / f"slide_{number}.h5" for number in range(8)]
    data = [path.read_bytes() for path in files]
    for path, share in zip(files, (0.99, 0.5, 0), strict=False):  # truncated
        path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    at = data[3].index(read_h5(files[3]).arrays["features"][2].tobytes()) + 9
    files[3].write_bytes(data[3][:at] + bytes([data[3][at] ^ 0x40]) + data[3][at + 1:])  # flipped
    kept = read_h5(files[4])
    write_h5(files[4], {**kept.arrays, "features": kept.arrays["features"][:-1]},
             parameters=kept.parameters or {})  # a row short
    files[5].write_bytes(data[5].replace(b"complete", b"c0mplete"))  # never finished
    (folder / "pt_files" / "slide_6.pt").unlink()
    (folder / "pt_files" / "slide_7.pt").write_bytes(b"PK but no zip")
    run = run_script(SCRIPT, *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "6 slides to do (30 patches), 2 settled before" in run.stdout
    assert contents(folder) == whole


# ---------------------------------------------------------------------------- stale results

def test_features_of_unknown_origin_are_not_trusted(
        inputs: Inputs, finished: Path, encoder_flags: list[str], run_script: Run) -> None:
    """A20: CLAM's own files do not say what made them."""
    import h5py

    path = finished / "h5_files" / "slide_0.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = np.zeros((20, 64), np.float32), grid_coords(20)
    run = run_script(SCRIPT, *inputs.arguments(finished), *encoder_flags)
    assert run.returncode == 2 and "slide_0: not made by this toolkit" in run.stderr


@pytest.mark.parametrize("change", ["coordinates", "slide"])
def test_changed_inputs_are_encoded_again(
        cohort: Inputs, unbroken: Path, finished: Path, encoder_flags: list[str],
        run_script: Run, change: str) -> None:
    """New coordinates or another slide file of the same name: that slide alone is redone."""
    if change == "coordinates":
        write_patches(cohort.patches_root, "slide_0", grid_coords(20) + 8)
    else:
        write_pyramid(cohort.slides / "slide_0.tif", tissue_image(1024, 768, seed=9))
    run = run_script(SCRIPT, *cohort.arguments(finished), *encoder_flags)
    assert run.returncode == 0 and "1 slides to do" in run.stdout
    new, old = contents(finished), contents(unbroken)
    assert {name for name in old if new[name] != old[name]} == {"h5_files/slide_0.h5",
                                                                "pt_files/slide_0.pt"}


# ---------------------------------------------------------------------------- bad slides

def test_bad_slides_fail_alone(encoder_flags: list[str], tmp_path: Path, run_script: Run) -> None:
    """B1, B2, and coordinates that are not there: each with its reason, the good one is done."""
    cohort = make_inputs(tmp_path / "cohort", (5,) * 8)
    slides = [cohort.slides / f"slide_{number}.tif" for number in range(8)]
    half = slides[4].read_bytes()
    for path in slides[:5]:
        path.unlink()
    slides[1].mkdir()
    slides[2].write_bytes(b"")
    slides[3].write_bytes(b"no slide at all\n" * 100)
    slides[4].write_bytes(half[:len(half) // 2])
    (cohort.patches_root / "patches" / "slide_5.h5").unlink()
    coords = cohort.patches_root / "patches" / "slide_6.h5"
    coords.write_bytes(coords.read_bytes()[:1000])
    run = run_script(SCRIPT, *cohort.arguments(tmp_path / "feat"), *encoder_flags)
    assert run.returncode == 3, run.stdout + run.stderr
    says = ("slide_0.tif", "is a folder", "empty", "slide_3.tif", "slide_4.tif",
            "run create_patches_fp.py", "slide_6.h5")
    for number, reason in enumerate(says):
        (line,) = [line for line in run.stdout.splitlines() if f"failed  slide_{number}:" in line]
        assert reason in line
    assert "Traceback" not in run.stderr
    assert set(contents(tmp_path / "feat")) == {"h5_files/slide_7.h5", "pt_files/slide_7.pt"}


def test_one_damaged_tile(cohort: Inputs, unbroken: Path, encoder_flags: list[str],
                          tmp_path: Path, run_script: Run) -> None:
    """B3: the slide fails, or with --bad_tiles drop its readable patches are kept."""
    path = cohort.slides / "slide_0.tif"
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        offset, size = page.dataoffsets[5], page.databytecounts[5]  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    data[offset:offset + size] = bytes(size)
    path.write_bytes(bytes(data))
    arguments = [*cohort.arguments(tmp_path / "feat"), *encoder_flags]
    run = run_script(SCRIPT, *arguments)
    assert run.returncode == 3 and "failed  slide_0" in run.stdout
    run = run_script(SCRIPT, *arguments, "--bad_tiles", "drop")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "unreadable patches left out, at level-0 (261, 261)" in run.stdout
    found = read_h5(tmp_path / "feat" / "h5_files" / "slide_0.h5").arrays
    whole = read_h5(unbroken / "h5_files" / "slide_0.h5").arrays
    hit = (whole["coords"] < 512).all(axis=1)  # those that touch the tile at (256, 256)
    assert 0 < hit.sum() < 10
    np.testing.assert_array_equal(found["coords"], whole["coords"][~hit])
    np.testing.assert_array_equal(found["features"], whole["features"][~hit])
    np.testing.assert_array_equal(found["dropped_coords"], whole["coords"][hit])
    again = run_script(SCRIPT, *arguments, "--bad_tiles", "drop")
    assert again.returncode == 0 and "0 slides to do" in again.stdout
    strict = run_script(SCRIPT, *arguments)  # these features lack patches: not done for it
    assert strict.returncode == 3


def test_odd_names_go_through(encoder_flags: list[str], tmp_path: Path, run_script: Run) -> None:
    """B13"""
    names = ["schnitt ä #1 100%", "-dash", "a.b.c", "漢字"]
    (tmp_path / "slides").mkdir()
    for name in names:
        write_pyramid(tmp_path / "slides" / f"{name}.tif", tissue_image(512, 512))
        write_patches(tmp_path / "out", name, grid_coords(2))
    csv = tmp_path / "ids.csv"
    csv.write_text("slide_id\n" + "".join(f"{name}.tif\n" for name in names), encoding="utf-8")
    inputs = Inputs(tmp_path / "slides", tmp_path / "out", csv)
    run = run_script(SCRIPT, *inputs.arguments(tmp_path / "feat"), *encoder_flags)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {path.stem for path in (tmp_path / "feat" / "pt_files").iterdir()} == set(names)
