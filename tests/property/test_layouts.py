"""Whatever the coordinates are, every layout gives them back."""

from __future__ import annotations

import string
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_wsi_core_layouts import assert_same
from wsi_core.coords import PatchCoords, read_coords, write_coords
from wsi_core.layouts import LAYOUTS
from wsi_core.tissue import Tissue

PX = st.integers(1, 4096)
SIDES = st.tuples(PX, PX)
MPP = st.one_of(st.none(), st.floats(0.05, 50.0))
NAMES = st.text(string.ascii_letters + string.digits + " .#%é漢_-", min_size=1, max_size=60)
OUTLINES = st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 9999)), min_size=3, max_size=5
                    ).map(lambda points: np.array(points, np.int32))


@st.composite
def coordinates(draw: st.DrawFn) -> PatchCoords:
    """Any patches, also such as no slide has: the file must not care."""
    rows = draw(st.lists(st.tuples(st.integers(0, 2**24), st.integers(0, 2**24)), max_size=6))
    contours = draw(st.lists(OUTLINES, max_size=3))
    slide_mpp = draw(MPP)
    downsample = draw(st.floats(1.0, 64.0))
    return PatchCoords(
        slide_id=draw(NAMES), coords=np.array(rows, np.int64).reshape(-1, 2), patch_size=draw(PX),
        patch_level=draw(st.integers(0, 9)), output_size=draw(PX),
        level_downsample=(downsample, downsample), level_size=draw(SIDES),
        slide_size=draw(SIDES), footprint_px_l0=draw(SIDES), step_px_l0=draw(SIDES),
        mpp_um=draw(MPP), slide_mpp_um=None if slide_mpp is None else (slide_mpp, slide_mpp * 1.01),
        objective_power=draw(st.one_of(st.none(), st.floats(1.0, 100.0))),
        level_free=draw(st.booleans()), background=draw(st.sampled_from([(0, 0, 0), (1, 2, 255)])),
        parameters=draw(st.dictionaries(NAMES, st.one_of(st.integers(), NAMES), max_size=3)),
        tissue=None if draw(st.booleans()) else Tissue(
            contours, [draw(st.lists(OUTLINES, max_size=2)) for _ in contours]))


@settings(max_examples=60, deadline=None)
@given(patches=coordinates())
def test_every_layout_gives_back_what_it_was_given(patches: PatchCoords) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            path = Path(folder) / f"{layout}.h5"
            write_coords(path, patches, layout=layout)
            found = read_coords(path)
            assert_same(found, patches)
            again = Path(folder) / "again.h5"  # and through the next layout
            write_coords(again, found, layout=LAYOUTS[LAYOUTS.index(layout) - 1])
            assert_same(read_coords(again), patches)
