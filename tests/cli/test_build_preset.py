"""scripts/build_preset.py: every flag lands in the csv, which create_patches_fp.py reads."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from scripts import build_preset
from utils.errors import Refused
from wsi_core.presets import DEFAULTS, load_preset

CLAM_ORDER = ("seg_level,sthresh,mthresh,close,use_otsu,keep_ids,exclude_ids,a_t,a_h,max_n_holes,"
              "vis_level,line_thickness,white_thresh,black_thresh,use_padding,contour_fn")


def build(*flags: object) -> dict[str, str]:
    assert build_preset.main(["--preset_name", "p.csv", *map(str, flags)]) == 0
    with Path("presets/p.csv").open(newline="") as file:
        return next(csv.DictReader(file))


def test_from_the_shell(run_script: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    done = run_script("scripts/build_preset.py", "--preset_name", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "presets/mine.csv").read_text().splitlines()[0] == CLAM_ORDER
    assert load_preset(tmp_path / "presets/mine.csv") == DEFAULTS


@pytest.mark.parametrize(("flag", "value", "cell"), [
    ("seg_level", 2, "2"), ("sthresh", 20, "20"), ("mthresh", 9, "9"), ("close", 0, "0"),
    ("a_t", 0.5, "0.5"), ("a_h", 3, "3"), ("max_n_holes", 1, "1"), ("vis_level", 1, "1"),
    ("line_thickness", 50, "50"), ("white_thresh", 6, "6"), ("black_thresh", 40, "40"),
    ("contour_fn", "basic", "basic")])
def test_every_number_has_its_column(flag: str, value: object, cell: str, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert build(f"--{flag}", value)[flag] == cell


def test_switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, switched = build(), build("--use_otsu", "--no_padding")
    assert (plain["use_otsu"], plain["use_padding"]) == ("FALSE", "TRUE")
    assert (switched["use_otsu"], switched["use_padding"]) == ("TRUE", "FALSE")


@pytest.mark.parametrize("flags", [("--mthresh", "8"), ("--sthresh", "300")])
def test_bad_values_are_refused(flags: tuple[str, ...], tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused):
        build(*flags)
    with pytest.raises(Refused, match="not a plain name"):
        build_preset.main(["--preset_name", "../p.csv"])
    assert not (tmp_path / "presets").exists()
