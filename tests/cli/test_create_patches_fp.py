"""create_patches_fp.py: what every flag does, the two-step run, statuses, exit codes.

Most runs call ``main`` in this process; a few are processes, to see the shell's side.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import cv2
import h5py
import numpy as np
import pytest

import create_patches_fp
from tests.slides import tissue_image, write_pyramid
from utils.errors import Refused
from utils.storage import read_h5
from wsi_core.coords import PatchCoords, read_coords

Script = Callable[..., CompletedProcess[str]]
BIOPSY = ("--preset", "bwh_biopsy.csv")


def run(source: Path, out: Path, *flags: object) -> int:
    return create_patches_fp.main(["--source", str(source), "--save_dir", str(out),
                                   *map(str, flags)])


def patch(source: Path, out: Path, *flags: object) -> int:
    return run(source, out, "--seg", "--patch", *BIOPSY, *flags)


def rows(out: Path, name: str = "process_list_autogen.csv") -> dict[str, dict[str, str]]:
    with (out / name).open(newline="") as file:
        return {row.get("slide_id") or row["item"]: row for row in csv.DictReader(file)}


def edit(out: Path, changes: dict[str, dict[str, str]], *, name: str = "edited.csv") -> str:
    """The generated list with some cells changed, as a user would."""
    table = rows(out)
    columns = list(dict.fromkeys([*next(iter(table.values())),
                                  *(key for cells in changes.values() for key in cells)]))
    for slide, cells in changes.items():
        table[slide].update(cells)
    with (out / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(table.values())
    return name


def coords(out: Path, slide: str = "slide_0") -> PatchCoords:
    return read_coords(out / "patches" / f"{slide}.h5")


@pytest.fixture
def one(tmp_path: Path, slide_folder: Path) -> Path:
    """A folder with one slide of 2048 x 1536 px, levels 1/2/4, 0.5 um a px."""
    folder = tmp_path / "one"
    folder.mkdir()
    os.link(slide_folder / "slide_0.tif", folder / "slide_0.tif")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# ---------------------------------------------------------------------------- the whole thing

def test_everything_from_the_shell(run_script: Script, slide_folder: Path, out: Path) -> None:
    command = ("create_patches_fp.py", "--source", slide_folder, "--save_dir", out, "--seg",
               "--patch", "--stitch", *BIOPSY)
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert "patches: 3 done" in done.stdout and not done.stderr
    for slide in ("slide_0", "slide_1", "slide_2"):
        assert (out / "masks" / f"{slide}.jpg").exists()
        assert (out / "stitches" / f"{slide}.jpg").exists()
        assert len(coords(out, slide)) > 0
        assert f"{slide}.tif: processed" in done.stdout
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    again = run_script(*command)
    assert again.returncode == 0 and "3 already done" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*")} == before
    table = rows(out)
    assert {row["status"] for row in table.values()} == {"already_exist"}
    assert int(table["slide_0.tif"]["n_patches"]) == len(coords(out))
    report = json.loads((out / "report_patches.json").read_text())
    assert report["options"]["patch_size"] == 256 and report["counts"] == {"already done": 3}


def test_process_list_and_report_tell_what_was_done(one: Path, out: Path) -> None:
    assert patch(one, out) == 0
    row = rows(out)["slide_0.tif"]
    assert (row["process"], row["status"], row["reason"]) == ("0", "processed", "")
    assert (row["seg_level"], row["vis_level"], row["sthresh"]) == ("2", "2", "15")  # resolved
    assert int(row["n_patches"]) == len(coords(out)) and int(row["n_contours"]) >= 1
    assert row["mpp_used"] == "0.5"
    assert rows(out, "report_patches.csv")["slide_0.tif"]["status"] == "done"


def test_the_h5_says_how_it_was_made(one: Path, out: Path) -> None:
    assert patch(one, out, "--patch_level", 1, "--patch_size", 100, "--step_size", 50) == 0
    found = coords(out)
    assert (found.patch_size, found.patch_level, found.output_size) == (100, 1, 100)
    assert (found.footprint_px_l0, found.step_px_l0) == ((200, 200), (100, 100))
    assert (found.level_size, found.slide_size) == ((1024, 768), (2048, 1536))
    assert found.mpp_um == pytest.approx(1.0) and found.tissue is not None
    assert found.parameters["sthresh"] == 15 and found.parameters["seg_level"] == 2
    assert found.parameters["slide_name"] == "slide_0.tif"
    with h5py.File(out / "patches/slide_0.h5") as file:
        assert file["coords"].attrs["save_path"] == str(out / "patches")


# ---------------------------------------------------------------------------- flag by flag

def test_seg_alone_draws_masks(one: Path, out: Path) -> None:
    assert run(one, out, "--seg", *BIOPSY) == 0
    mask = cv2.imread(str(out / "masks/slide_0.jpg"))[:, :, ::-1].astype(int)
    assert mask.shape == (384, 512, 3)
    assert ((mask[:, :, 1] > 200) & (mask[:, :, 0] < 60)).any()  # green
    assert not list((out / "patches").iterdir()) and not list((out / "stitches").iterdir())
    assert rows(out)["slide_0.tif"]["status"] == "processed"


@pytest.mark.parametrize(("flags", "words"), [
    ((), "nothing to do"), (("--patch",), "give --seg --patch"),
    (("--seg", "--preset", "no.csv"), "preset 'no.csv' is not in"),
    (("--seg", "--process_list", "no.csv"), "process list"),
    (("--seg", "--process_list", "../no.csv"), "would leave the folder"),
    (("--seg", "--process_list", "/etc/passwd"), "would leave the folder"),
    (("--seg", "--patch_size", 0), "--patch_size is 0, expected from 1 to 16384"),
    (("--seg", "--step_size", 0), "--step_size is 0"),
    (("--seg", "--patch_level", -1), "--patch_level is -1"),
    (("--seg", "--workers", -1), "--workers is -1")])
def test_refused_before_any_work(flags: tuple[object, ...], words: str, one: Path, out: Path
                                 ) -> None:
    with pytest.raises(Refused) as caught:
        run(one, out, *flags)
    assert words in str(caught.value)
    assert not out.exists()


def test_source_and_save_dir_are_required_and_checked(out: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--source is required"):
        create_patches_fp.main(["--save_dir", str(out), "--seg"])
    with pytest.raises(Refused, match="--save_dir is required"):
        create_patches_fp.main(["--source", str(tmp_path), "--seg"])
    with pytest.raises(Refused, match="is no folder"):
        run(tmp_path / "no", out, "--seg")
    (tmp_path / "empty/sub").mkdir(parents=True)
    (tmp_path / "empty/.hidden").touch()
    with pytest.raises(Refused, match="has no files"):
        run(tmp_path / "empty", out, "--seg")


def test_patch_and_step_size(one: Path, out: Path) -> None:
    assert patch(one, out / "a", "--patch_size", 128, "--step_size", 128) == 0
    assert patch(one, out / "b", "--patch_size", 128, "--step_size", 64) == 0
    assert 3.3 < len(coords(out / "b")) / len(coords(out / "a")) < 4.5
    assert np.gcd.reduce(np.diff(np.unique(coords(out / "a").coords[:, 0]))) % 2 == 0


def test_patch_level_beyond_the_pyramid_fails_that_slide(
        one: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert patch(one, out, "--patch_level", 3) == 3
    assert "has no level 3 to take patches from, only 0 to 2" in capsys.readouterr().out
    assert rows(out)["slide_0.tif"]["status"] == "failed"
    assert rows(out)["slide_0.tif"]["process"] == "1"  # tried again next time
    assert patch(one, out) == 0


def test_custom_downsample_reads_twice_as_much(one: Path, out: Path) -> None:
    size = ("--patch_size", 64, "--step_size", 64)
    assert patch(one, out / "a", *size, "--custom_downsample", 2) == 0
    assert patch(one, out / "b", "--patch_size", 128, "--step_size", 128) == 0
    half, plain = coords(out / "a"), coords(out / "b")
    assert (half.patch_size, half.output_size) == (128, 64)
    assert (half.footprint_px_l0, half.step_px_l0) == ((128, 128), (128, 128))
    assert np.array_equal(half.coords, plain.coords)  # the same area, seen smaller
    assert half.mpp_um == pytest.approx(1.0) and plain.mpp_um == pytest.approx(0.5)


def test_stitch_shows_the_patches(one: Path, out: Path) -> None:
    assert patch(one, out) == 0
    assert not list((out / "stitches").iterdir())
    assert patch(one, out, "--stitch") == 0  # coordinates are there: only the picture is made
    assert rows(out)["slide_0.tif"]["status"] == "processed"
    stitch = cv2.imread(str(out / "stitches/slide_0.jpg"))
    found = coords(out)
    x, y = (found.coords[0] + 128) // 4
    assert stitch.shape == (384, 512, 3) and stitch[y, x].sum() > 150
    shown = np.zeros((384, 512), bool)
    for x, y in found.coords // 4:
        shown[y:y + 65, x:x + 65] = True
    assert stitch[~shown].max() < 60  # black but for JPEG's ringing


def test_stitch_alone_needs_coordinates(one: Path, out: Path) -> None:
    assert run(one, out, "--stitch") == 3
    assert "run with --seg --patch first" in rows(out)["slide_0.tif"]["reason"]
    assert patch(one, out) == 0
    assert run(one, out, "--stitch") == 0
    assert (out / "stitches/slide_0.jpg").exists()


def test_no_auto_skip_redoes(one: Path, out: Path) -> None:
    assert patch(one, out, "--stitch") == 0
    first = len(coords(out))
    assert patch(one, out, "--stitch", "--no_auto_skip", "--step_size", 128) == 0
    assert len(coords(out)) > 3 * first
    assert patch(one, out, "--no_auto_skip") == 0
    assert not (out / "stitches/slide_0.jpg").exists()  # it showed the other coordinates


def test_preset_changes_parameters(one: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("a_t,contour_fn,use_padding,sthresh\n0.5,basic,FALSE,20\n")
    assert run(one, out, "--seg", "--patch", "--preset", tmp_path / "mine.csv") == 0
    row = rows(out)["slide_0.tif"]
    assert (row["a_t"], row["contour_fn"], row["use_padding"]) == ("0.5", "basic", "False")
    assert coords(out).parameters["a_t"] == 0.5
    assert run(one, out / "b", "--seg", "--patch") == 0  # a_t 100 is more than this slide has
    assert rows(out / "b")["slide_0.tif"]["status"] == "no_tissue"


def test_white_padding_is_recorded_and_asked_for(one: Path, out: Path) -> None:
    assert patch(one, out / "a") == 0
    assert patch(one, out / "b", "--white_padding") == 0
    assert coords(out / "a").background == (0, 0, 0)
    assert coords(out / "b").background == (255, 255, 255)
    with pytest.raises(Refused, match="background: file has"):
        patch(one, out / "a", "--white_padding")


def test_require_mpp_and_the_mpp_column(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    write_pyramid(source / "u.tif", tissue_image(1024, 1024, seed=1), mpp=None)
    assert patch(source, out / "a") == 0 and coords(out / "a", "u").mpp_um is None
    assert patch(source, out, "--require_mpp") == 3
    assert "pixel size unknown" in rows(out)["u.tif"]["reason"]
    name = edit(out, {"u.tif": {"mpp": "0.25"}})
    assert patch(source, out, "--require_mpp", "--process_list", name) == 0
    found = coords(out, "u")
    assert found.mpp_um == 0.25 and found.parameters["mpp_override"] == 0.25
    assert rows(out)["u.tif"]["mpp_used"] == "0.25"
    name = edit(out, {"u.tif": {"mpp": "zero", "process": "1"}})
    assert patch(source, out, "--process_list", name) == 3
    assert "mpp is 'zero'" in rows(out)["u.tif"]["reason"]


def test_workers_give_the_same_files(slide_folder: Path, out: Path, run_script: Script) -> None:
    assert patch(slide_folder, out / "a", "--stitch") == 0
    done = run_script("create_patches_fp.py", "--source", slide_folder, "--save_dir", out / "b",
                      "--seg", "--patch", "--stitch", *BIOPSY, "--workers", 2)
    assert done.returncode == 0, done.stderr
    for path in (out / "a").glob("*/*"):
        other = out / "b" / path.relative_to(out / "a")
        if path.suffix == ".h5":
            first, second = read_h5(path), read_h5(other)
            assert first.parameters == second.parameters
            assert all(np.array_equal(first.arrays[k], second.arrays[k]) for k in first.arrays)
        else:
            assert path.read_bytes() == other.read_bytes()
    assert list(rows(out / "a")) == list(rows(out / "b"))


def test_workers_are_processes(slide_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
                               ) -> None:
    seen = []
    run_items = create_patches_fp.run_items

    def watching(*given: Any, workers: int, arguments: dict[str, Any], **spread: Any) -> Any:
        seen.append((workers, arguments["plan"].single_thread))
        assert spread == {"scheduler": None, "deadline_s": None}
        return run_items(*given, workers=0, arguments=arguments)

    monkeypatch.setattr(create_patches_fp, "run_items", watching)
    for workers in (0, 2):
        assert patch(slide_folder, out / str(workers), "--workers", workers) == 0
    assert seen == [(0, False), (2, True)]


def test_config_file_replaces_defaults(one: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"source: {one}\nsave_dir: {out}\nseg: yes\npatch: yes\n"
                                     "preset: bwh_biopsy.csv\npatch_size: 128\nauto_skip: no\n")
    assert create_patches_fp.main(["--config", str(tmp_path / "c.yaml")]) == 0
    assert coords(out).patch_size == 128


# ---------------------------------------------------------------------------- process lists

def test_two_step_run(slide_folder: Path, out: Path) -> None:
    assert run(slide_folder, out, "--seg", *BIOPSY) == 0
    name = edit(out, {"slide_0.tif": {"process": "1", "contour_fn": "four_pt_hard",
                                      "note": "checked"},
                      "slide_2.tif": {"process": "1", "keep_ids": "0"}})
    assert patch(slide_folder, out, "--process_list", name) == 0
    table = rows(out)
    assert {path.stem for path in (out / "patches").iterdir()} == {"slide_0", "slide_2"}
    assert table["slide_0.tif"]["note"] == "checked"
    assert table["slide_1.tif"]["status"] == "processed" == table["slide_0.tif"]["status"]
    assert coords(out).parameters["contour_fn"] == "four_pt_hard"
    assert coords(out, "slide_2").parameters["keep_ids"] == [0]


def test_the_generated_list_itself_can_be_given_back(one: Path, out: Path) -> None:
    assert run(one, out, "--seg", *BIOPSY) == 0
    edit(out, {"slide_0.tif": {"process": "1"}}, name="process_list_autogen.csv")
    given = ("--process_list", "process_list_autogen.csv")
    assert patch(one, out, *given) == 0
    assert len(coords(out)) > 0
    # its levels are resolved now; that is no other parameter, with or without the list
    edit(out, {"slide_0.tif": {"process": "1"}}, name="process_list_autogen.csv")
    assert patch(one, out, *given) == 0
    assert rows(out)["slide_0.tif"]["status"] == "already_exist"
    assert patch(one, out) == 0
    assert rows(out)["slide_0.tif"]["status"] == "already_exist"


def test_a_short_list_with_only_names(slide_folder: Path, out: Path) -> None:
    out.mkdir()
    (out / "short.csv").write_text("slide_id\nslide_1.tif\n")
    assert patch(slide_folder, out, "--process_list", "short.csv") == 0
    assert [path.name for path in (out / "patches").iterdir()] == ["slide_1.h5"]


def test_bad_rows_fail_alone(slide_folder: Path, out: Path) -> None:
    out.mkdir()
    (out / "l.csv").write_text(
        "slide_id,process,mthresh,keep_ids,seg_level\nslide_0.tif,1,8,none,-1\n"
        "slide_1.tif,1,7,9,-1\nslide_2.tif,1,7,none,5\ngone.tif,1,7,none,-1\n"
        "odd.tif,maybe,7,none,-1\nrest.tif,0,8,none,-1\n")
    assert patch(slide_folder, out, "--process_list", "l.csv") == 3
    table = rows(out)
    for slide, words in {"slide_0.tif": "mthresh is 8, expected an odd number",
                         "slide_1.tif": "keep_ids names contour 9",
                         "slide_2.tif": "has no level 5", "gone.tif": "no such file",
                         "odd.tif": "process is 'maybe'"}.items():
        assert table[slide]["status"] == "failed" and words in table[slide]["reason"], slide
    assert table["rest.tif"]["status"] == "tbp"  # process 0 is carried along


def test_legacy_list(one: Path, out: Path) -> None:
    out.mkdir()
    (out / "old.csv").write_text("slide_id,a,seg_level,a_h,contour_fn\n"
                                 "slide_0.tif,70000,1,3,basic\n")  # 70000 * 2 * 2 / 512**2
    assert patch(one, out, "--process_list", "old.csv") == 0
    found = coords(out).parameters
    assert (found["a_t"], found["a_h"], found["contour_fn"]) == (1.0, 1.0, "four_pt")
    assert found["seg_level"] == 2 and rows(out)["slide_0.tif"]["a"] == ""
    (out / "old.csv").write_text("slide_id,a,seg_level\nslide_0.tif,20000,7\n")
    assert patch(one, out, "--process_list", "old.csv") == 3
    assert "has no level 7" in rows(out)["slide_0.tif"]["reason"]


# ---------------------------------------------------------------------------- slides of all kinds

def test_slides_without_tissue_are_listed_with_zero_rows(
        tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "s"
    source.mkdir()
    write_pyramid(source / "white.tif", np.full((600, 800, 3), 245, np.uint8))
    write_pyramid(source / "black.tif", np.zeros((600, 800, 3), np.uint8))
    for expected in ("no_tissue", "already_exist"):
        assert patch(source, out, "--stitch") == 0
        for slide in ("white", "black"):
            assert coords(out, slide).coords.shape == (0, 2)
            assert rows(out)[f"{slide}.tif"]["status"] == expected
            assert rows(out)[f"{slide}.tif"]["n_patches"] == "0"
    assert not list((out / "stitches").iterdir())
    assert (out / "masks/white.jpg").exists()
    assert "nothing on the slide is coloured enough" in capsys.readouterr().out


def test_settings_that_find_nothing_replace_old_coordinates(one: Path, out: Path) -> None:
    assert patch(one, out, "--stitch") == 0
    assert run(one, out, "--seg", "--patch", "--stitch", "--no_auto_skip") == 0  # a_t 100
    assert len(coords(out)) == 0 and not (out / "stitches/slide_0.jpg").exists()
    assert "smaller than a_t (100 x 512" in rows(out)["slide_0.tif"]["reason"]


def test_downsample_that_is_no_whole_number(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    image = tissue_image(2000, 1500, seed=3)
    write_pyramid(source / "a.tif", image, downsamples=(1, 3.9998))  # CLAM: every 192 px
    write_pyramid(source / "b.tif", image, downsamples=(1, 2.5))
    size = ("--patch_level", 1, "--patch_size", 63, "--step_size", 63)
    assert patch(source, out, *size) == 0
    assert coords(out, "a").step_px_l0 == (252, 252)
    steps = np.diff(np.unique(coords(out, "a").coords[:, 0]))
    assert (steps % 252 == 0).all()
    found = coords(out, "b")  # 63 * 2.5 = 157.5
    columns = np.unique(found.coords[:, 0])
    assert set(np.diff(columns)) <= {157, 158} and found.footprint_px_l0 == (158, 158)
    assert found.mpp_um == pytest.approx(1.25)


def test_a_foreign_file_counts_as_done(one: Path, out: Path) -> None:
    (out / "patches").mkdir(parents=True)
    with h5py.File(out / "patches/slide_0.h5", "w") as file:
        data = file.create_dataset("coords", data=np.array([[0, 0]]))
        data.attrs.update(patch_size=256, patch_level=0)
    raw = (out / "patches/slide_0.h5").read_bytes()
    assert patch(one, out, "--stitch") == 0
    assert (out / "patches/slide_0.h5").read_bytes() == raw
    assert (out / "stitches/slide_0.jpg").exists()
    assert patch(one, out, "--stitch") == 0
    assert rows(out)["slide_0.tif"]["status"] == "already_exist"


def test_flat_images_and_odd_names(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    image = np.ascontiguousarray(tissue_image(1500, 1200, seed=4)[:, :, ::-1])
    name = "-überlang #1 100%.v2.png"
    cv2.imencode(".png", image)[1].tofile(source / name)
    (source / "sub").mkdir()
    (source / ".DS_Store").write_text("x")
    assert patch(source, out) == 0
    assert list(rows(out)) == [name]
    assert len(coords(out, "-überlang #1 100%.v2")) > 0


def test_a_mask_too_wide_for_jpeg_is_png(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    image = np.full((40, 65_501, 3), 240, np.uint8)
    image[5:35, 100:60_000] = (160, 90, 200)
    cv2.imwrite(str(source / "long.png"), image)
    assert patch(source, out, "--stitch", "--patch_size", 32, "--step_size", 32) == 0
    for kind in ("masks", "stitches"):
        assert [path.name for path in (out / kind).iterdir()] == ["long.png"]
    assert patch(source, out, "--stitch", "--patch_size", 32, "--step_size", 32) == 0
    assert rows(out)["long.png"]["status"] == "already_exist"


def test_a_huge_single_level_is_reduced_by_strips(
        one: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wsi_core.find_tissue
    from wsi_core.slide import read_level

    assert patch(one, out / "a", "--process_list", _seg_level_0(out / "a")) == 0
    monkeypatch.setattr(wsi_core.find_tissue, "read_level",
                        lambda slide, level: read_level(slide, level, max_pixels=1_000_000))
    assert patch(one, out / "b", "--process_list", _seg_level_0(out / "b")) == 0
    assert cv2.imread(str(out / "b/masks/slide_0.jpg")).shape == (768, 1024, 3)
    ratio = len(coords(out / "b")) / len(coords(out / "a"))
    assert 0.8 < ratio < 1.25


def _seg_level_0(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "l.csv").write_text("slide_id,seg_level,vis_level\nslide_0.tif,0,0\n")
    return "l.csv"


def test_wrong_files_fail_alone(slide_folder: Path, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    shutil.copy(slide_folder / "slide_0.tif", source)
    (source / "notes.txt").write_text("not a slide")
    (source / "empty.svs").touch()
    assert patch(source, out) == 3
    table = rows(out)
    assert [table[name]["status"] for name in sorted(table)] == ["failed", "failed", "processed"]
    assert "not a slide" in table["notes.txt"]["reason"]
    assert "0 bytes" in table["empty.svs"]["reason"]


# ---------------------------------------------------------------------------- finer levels

def finer(out: Path, name: str) -> Path:
    return out.with_name(f"out_{name}_corresponding")


def test_child_levels_of_two_pyramids(tmp_path: Path, run_script: Script) -> None:
    """1-2-4 and 1-4-16 in one run: the real ratios, coordinates that tile, a list each level."""
    source, out = tmp_path / "slides", tmp_path / "out_level_2"
    source.mkdir()
    write_pyramid(source / "halves.tif", tissue_image(2048, 1536, seed=0), downsamples=(1, 2, 4))
    write_pyramid(source / "quarters.tif", tissue_image(2048, 1536, seed=0),
                  downsamples=(1, 4, 16))
    command = ("create_patches_fp.py", "--source", source, "--save_dir", out, "--seg", "--patch",
               "--patch_level", 2, "--patch_size", 32, "--step_size", 32, *BIOPSY,
               "--child_levels", 1, 0, "--workers", 2)
    done = run_script(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    for slide, ratios in (("halves", (2, 2)), ("quarters", (4, 4))):
        parent = coords(out, slide)
        for name, ratio in zip(("level_1", "level_0"), ratios, strict=True):
            fine = coords(finer(out, name), slide)
            assert fine.descent is not None and fine.descent.ratio == ratio
            assert len(fine) == len(parent) * ratio**2 > 0
            assert fine.patch_size == fine.output_size == 32 and fine.mpp_um is not None
            assert np.array_equal(fine.coords[::ratio**2], parent.coords)
            assert fine.footprint_px_l0[0] * ratio == parent.footprint_px_l0[0]
            table = rows(finer(out, name))[f"{slide}.tif"]
            assert (table["process"], table["status"]) == ("0", "processed")
            assert int(table["n_patches"]) == len(fine)
            parent = fine
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*/patches/*")}
    assert len(before) == 6
    assert create_patches_fp.main([*map(str, command[1:-2])]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {row["status"] for row in rows(out, "report_patches.csv").values()} == {"already done"}
    report = rows(out, "report_patches.csv")
    assert set(report) == {f"{slide}.tif{level}" for level in ("", " [level_1]", " [level_0]")
                           for slide in ("halves", "quarters")}


def test_child_levels_of_a_finished_run_and_redone(one: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--patch_level", 2, "--patch_size", 64, "--step_size", 64)
    assert patch(one, out, *flags) == 0 and not finer(out, "level_0").exists()
    assert patch(one, out, *flags, "--child_levels", 0) == 0
    assert len(coords(finer(out, "level_0"))) == 16 * len(coords(out))
    with pytest.raises(Refused, match="output_size: file has 64, you ask 32"):
        patch(one, tmp_path / "out_level_1", "--patch_level", 1, "--patch_size", 32,
              "--step_size", 32, "--child_levels", 0)  # whose finer level has the same folder
    assert patch(one, out, *flags[:3], 128, "--step_size", 128, "--child_levels", 0,
                 "--no_auto_skip") == 0
    assert coords(finer(out, "level_0")).patch_size == 128


def test_child_mpp_reads_and_resizes(one: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert patch(one, out, "--patch_level", 2, "--patch_size", 60, "--step_size", 60,
                 "--child_mpp", 0.667) == 0  # 2 um a px over 3
    fine = coords(finer(out, "mpp_0.667"))
    assert (fine.patch_level, fine.patch_size, fine.output_size) == (0, 80, 60)
    assert fine.mpp_um == pytest.approx(2 / 3) and len(fine) == 9 * len(coords(out))


def test_a_slide_without_the_level_fails_alone(slide_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "s", tmp_path / "out"
    source.mkdir()
    os.link(slide_folder / "slide_0.tif", source / "good.tif")
    write_pyramid(source / "odd.tif", tissue_image(2048, 1536, seed=0), downsamples=(1, 2.6, 4))
    assert patch(source, out, "--patch_level", 2, "--child_levels", 1, 0) == 3
    report = rows(out, "report_patches.csv")
    assert {item: row["status"] for item, row in report.items()} == {
        "good.tif": "done", "odd.tif": "done", "good.tif [level_1]": "done",
        "good.tif [level_0]": "done", "odd.tif [level_1]": "failed", "odd.tif [level_0]": "failed"}
    assert "choose other --child_levels" in report["odd.tif [level_1]"]["reason"]
    assert rows(finer(out, "level_1"))["odd.tif"]["status"] == "failed"
    assert len(coords(finer(out, "level_0"), "good")) == 16 * len(coords(out, "good"))


@pytest.mark.parametrize(("flags", "words"), [
    (("--seg", "--child_levels", 0), "give --seg --patch as well"),
    (("--seg", "--patch", "--child_levels", 1), "not finer than --patch_level 0"),
    (("--seg", "--patch", "--patch_level", 2, "--child_levels", 0, 1), "coarse to fine"),
    (("--seg", "--patch", "--child_levels", 0, "--patch_level", 1, "--child_mpp", 1),
     "in two ways")])
def test_finer_levels_that_are_refused(flags: tuple[object, ...], words: str, one: Path, out: Path
                                       ) -> None:
    with pytest.raises(Refused, match=words):
        run(one, out, *flags)
    assert not out.exists()
