"""Patching parameters: defaults, preset files, cells as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from utils.errors import Refused
from wsi_core.presets import (
    DEFAULTS,
    HEATMAP_DEFAULTS,
    PatchingParameters,
    find_preset,
    format_cell,
    load_preset,
    parse_ids,
    parse_parameters,
)

PRESETS = {  # CLAM's figures: sthresh, mthresh, close, a_t, a_h, max_n_holes, line_thickness
    "bwh_biopsy": (15, 11, 2, 1, 1, 2, 50), "bwh_resection": (15, 11, 4, 100, 16, 8, 150),
    "tcga": (8, 7, 4, 16, 4, 8, 100)}
NAMES = ("sthresh", "mthresh", "close", "a_t", "a_h", "max_n_holes", "line_thickness")


@pytest.mark.parametrize("name", PRESETS)
def test_shipped_presets_are_clams(name: str) -> None:
    preset = load_preset(ROOT / "presets" / f"{name}.csv")
    assert preset == PatchingParameters(**dict(zip(NAMES, PRESETS[name], strict=True)))


def test_defaults_are_clams() -> None:
    assert tuple(getattr(DEFAULTS, name) for name in NAMES) == (8, 7, 4, 100, 16, 8, 250)
    assert tuple(getattr(HEATMAP_DEFAULTS, name) for name in NAMES) == (15, 11, 2, 50, 8, 10, 250)
    for values in (DEFAULTS, HEATMAP_DEFAULTS):
        assert (values.seg_level, values.vis_level, values.use_otsu) == (-1, -1, False)
        assert (values.keep_ids, values.exclude_ids) == ((), ())
        assert values.use_padding and values.contour_fn == "four_pt"


@pytest.mark.parametrize(("cell", "ids"), [
    ("none", ()), ("", ()), ("None", ()), ("3", (3,)), ("3.0", (3,)), ("0,2,5", (0, 2, 5)),
    (" 5 , 2 ", (2, 5)), ("1;2", (1, 2)), ("[1, 2]", (1, 2)), ([4, 1], (1, 4)), (3, (3,)),
    (3.0, (3,)), ((), ())])
def test_ids_as_people_write_them(cell: Any, ids: tuple[int, ...]) -> None:
    assert parse_ids(cell) == ids


@pytest.mark.parametrize(("cells", "words"), [
    ({"mthresh": "8"}, "mthresh is 8, expected an odd number"),
    ({"sthresh": "256"}, "sthresh is 256, expected a number from 0 to 255"),
    ({"sthresh": "abc"}, "sthresh is 'abc', expected a whole number"),
    ({"sthresh": "8.5"}, "sthresh is '8.5', expected a whole number"),
    ({"seg_level": "-2"}, "seg_level is -2"), ({"vis_level": "500"}, "vis_level is 500"),
    ({"close": "-1"}, "close is -1"), ({"a_t": "nan"}, "a_t is 'nan', expected a number"),
    ({"a_t": "inf"}, "a_t is inf"), ({"a_h": "-3"}, "a_h is -3"),
    ({"max_n_holes": "-1"}, "max_n_holes"), ({"max_n_holes": "inf"}, "max_n_holes"),
    ({"line_thickness": "-1"}, "line_thickness"), ({"white_thresh": "300"}, "white_thresh"),
    ({"black_thresh": "-1"}, "black_thresh"), ({"use_otsu": "perhaps"}, "expected TRUE or FALSE"),
    ({"contour_fn": "five_pt"}, "contour_fn is 'five_pt', expected one of four_pt, four_pt_hard"),
    ({"keep_ids": "1.5"}, "keep_ids is '1.5'"), ({"keep_ids": "a,b"}, "keep_ids is 'a,b'"),
    ({"exclude_ids": "-1"}, "exclude_ids")])
def test_bad_cells_are_refused_by_name(cells: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_parameters(cells, where="row 3")
    assert words in str(caught.value) and str(caught.value).startswith("row 3: ")


def test_cells_keep_fractions_and_fall_back_to_the_given_defaults() -> None:
    found = parse_parameters({"a_t": "0.5", "sthresh": "9.0", "use_otsu": "TRUE", "close": " ",
                              "use_padding": False, "other": "x"}, defaults=HEATMAP_DEFAULTS)
    assert (found.a_t, found.sthresh, found.use_otsu, found.use_padding) == (0.5, 9, True, False)
    assert found.close == HEATMAP_DEFAULTS.close


def test_a_formatted_cell_reads_back() -> None:
    before = PatchingParameters(keep_ids=(1, 4), a_t=0.25, use_otsu=True, contour_fn="basic")
    cells = {name: format_cell(getattr(before, name))
             for name in PatchingParameters.__dataclass_fields__}
    assert (cells["keep_ids"], cells["exclude_ids"], cells["a_h"]) == ("1,4", "none", "16")
    assert parse_parameters(cells) == before


def test_presets_are_found_by_name_with_or_without_suffix_and_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("a_t\n3\n")
    for name in ("mine", "mine.csv"):
        assert find_preset(name, folders=[ROOT / "presets", tmp_path]) == tmp_path / "mine.csv"
    path = tmp_path / "mine.csv"
    assert find_preset(str(path), folders=[ROOT / "presets"]) == path
    with pytest.raises(Refused, match=r"preset 'no' is not in .*known: bwh_biopsy.csv"):
        find_preset("no", folders=[ROOT / "presets"])


@pytest.mark.parametrize("text", ["a_t\n", "x,y\n1,2\n", ""])
def test_a_file_without_parameters_is_no_preset(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(Refused, match=r"p\.csv"):
        load_preset(tmp_path / "p.csv")
