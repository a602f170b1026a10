"""Finer levels: names, ratios, tiling, what lies outside; and the work over slides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.slides import tissue_image, write_pyramid
from utils.errors import ItemFailed, Refused
from utils.locks import claim
from utils.report import RunReport, Status
from utils.storage import read_table
from wsi_core.coords import PatchCoords, coords_digest, read_coords, write_coords
from wsi_core.deriving import DerivePlan, derive_slide, derive_slides, prepare
from wsi_core.hierarchy import Child, child_coords, derive, level_folder, wanted_children
from wsi_core.patch_plan import PatchPlan
from wsi_core.presets import DEFAULTS
from wsi_core.process_list import new_list
from wsi_core.slide import fingerprint

CHILDREN = (Child(level=1), Child(level=0))


@dataclass
class Pyramid:
    """What ``derive`` asks of an open slide."""

    level_downsamples: tuple[tuple[float, float], ...]
    size: tuple[int, int] = (8192, 6144)
    path: Path = Path("s.svs")

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        return tuple((round(self.size[0] / x), round(self.size[1] / y))
                     for x, y in self.level_downsamples)


def pyramid(*downsamples: float) -> Any:
    return Pyramid(tuple((value, value) for value in downsamples))


def grid(slide: Any, level: int, *, side: int = 64, custom: int = 1,
         mpp_um: float | None = 0.5, corners: Any = ((0, 0), (4096, 2048))) -> PatchCoords:
    """A coarse grid of a pyramid; ``mpp_um`` is that of level 0."""
    scale = round(slide.level_downsamples[level][0])
    covered = side * custom * scale
    return PatchCoords(
        slide_id="s", coords=np.array(corners, np.int64), patch_size=side * custom,
        patch_level=level, output_size=side, level_downsample=slide.level_downsamples[level],
        level_size=slide.level_dimensions[level], slide_size=slide.level_dimensions[0],
        footprint_px_l0=(covered, covered), step_px_l0=(covered, covered),
        mpp_um=None if mpp_um is None else mpp_um * scale * custom)


# ---------------------------------------------------------------------------- names

@pytest.mark.parametrize(("root", "child", "folder"), [
    ("x/camelyon_patches_256_level_2", Child(level=1),
     "x/camelyon_patches_256_level_1_corresponding"),
    ("x/out", Child(level=0), "x/out_level_0_corresponding"),
    ("x/level_2_b/", Child(level=0), "x/level_2_b_level_0_corresponding"),
    ("a_level_2/b_level_12", Child(mpp_um=0.5), "a_level_2/b_mpp_0.5_corresponding")])
def test_folder_names_are_the_original_s(root: str, child: Child, folder: str) -> None:
    assert level_folder(Path(root), child) == Path(folder)


def test_a_folder_given_as_a_dot_has_siblings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    (tmp_path / "f_level_2").mkdir()
    monkeypatch.chdir(tmp_path / "f_level_2")
    assert level_folder(Path(), Child(level=1)) == tmp_path / "f_level_1_corresponding"


@pytest.mark.parametrize(("levels", "mpp", "words"), [
    ((1, 0), (0.5,), "in two ways"), ((0, 1), (), "e.g. 1 0"), ((1, 1), (), "each once"),
    ((), (0.5, 1.0), "e.g. 1 0.5")])
def test_orders_that_are_refused(levels: Any, mpp: Any, words: str) -> None:
    with pytest.raises(Refused, match=words):
        wanted_children(levels, mpp)


# ---------------------------------------------------------------------------- tiling

@given(downsamples=st.sampled_from([(1, 4, 16), (1, 2, 4), (1, 2, 8), (1, 3, 12),
                                    (1, 3.9998, 16)]),
       side=st.sampled_from([4, 6, 8]), custom=st.sampled_from([1, 2]))
def test_children_tile_their_parents_exactly(downsamples: tuple[float, ...], side: int, custom: int
                                             ) -> None:
    """Every level-0 px of a parent is covered once, at every level, and no other px."""
    slide = pyramid(*downsamples)
    chain = [grid(slide, 2, side=side, custom=custom, corners=((0, 0), (300, 207)))]
    for level in (1, 0):
        chain.append(derive(slide, chain[-1], Child(level=level), parameters={}))
    for fine in chain[1:]:
        for index, (x, y) in enumerate(chain[0].coords):
            width, height = chain[0].footprint_px_l0
            covered = np.zeros((height, width), int)
            per_parent = len(fine) // len(chain[0])
            for left, top in fine.coords[index * per_parent:(index + 1) * per_parent] - (x, y):
                covered[top:top + fine.footprint_px_l0[1], left:left + fine.footprint_px_l0[0]] += 1
            assert (covered == 1).all()
        assert fine.descent is not None and fine.output_size == side
        assert fine.patch_size == fine.output_size * custom  # read as the coarse ones are
    assert chain[-1].coords.dtype == np.int64


def test_the_order_of_children() -> None:
    """Column after column; for r = 2 as in the specification, section 2.3."""
    assert child_coords(np.array([[10, 20]]), ratio=2, step_px_l0=(5, 7)).tolist() == [
        [10, 20], [10, 27], [15, 20], [15, 27]]
    nine = child_coords(np.array([[0, 0], [9, 9]]), ratio=3, step_px_l0=(1, 1))
    assert nine[:9].tolist() == [[x, y] for x in range(3) for y in range(3)]
    assert nine[9:].tolist() == [[9 + x, 9 + y] for x in range(3) for y in range(3)]


def test_a_child_of_a_child_has_the_child_for_parent() -> None:
    slide = pyramid(1, 4, 16)
    coarse = grid(slide, 2)
    middle = derive(slide, coarse, Child(level=1), parameters={})
    finest = derive(slide, middle, Child(level=0), parameters={})
    assert middle.descent is not None and finest.descent is not None
    assert (middle.descent.branching, finest.descent.branching) == (16, 16)
    assert finest.descent.parent_sha256 == coords_digest(middle.coords)
    assert (finest.descent.parent_index == np.repeat(np.arange(32), 16)).all()
    assert (middle.mpp_um, finest.mpp_um) == (2.0, 0.5)


def test_children_outside_the_slide_keep_their_rows() -> None:
    slide = pyramid(1, 2, 4)  # 8192 x 6144
    coarse = grid(slide, 2, corners=((8192 - 128, 0), (8192 - 100, 6144 - 200), (-200, 0)))
    fine = derive(slide, coarse, Child(level=1), parameters={})
    assert fine.descent is not None
    assert fine.descent.valid.reshape(3, 4).tolist() == [
        [True, True, False, False], [True, True, False, False], [False, False, True, True]]


# ---------------------------------------------------------------------------- refusals

@pytest.mark.parametrize(("downsamples", "level", "words"), [
    ((1, 4), 2, "has no level 2, only 0 to 1: choose other --child_levels"),
    ((1, 1.5, 4), 1, "2.667 x 2.667 times that of level 1.*give --child_mpp"),
    ((1, 4, 4), 1, "1 x 1 times that of level 1")])
def test_levels_that_cannot_be_children(downsamples: Any, level: int, words: str) -> None:
    slide = pyramid(*downsamples)
    coarse = grid(pyramid(1, 2, 4), 2)
    with pytest.raises(ItemFailed, match=words):
        derive(slide, coarse, Child(level=level), parameters={})


def test_patches_that_cannot_be_divided() -> None:
    slide = pyramid(1, 2.5, 5)
    with pytest.raises(ItemFailed, match="5 x 5 equal children: choose a --patch_size"):
        derive(slide, replace(grid(slide, 2), footprint_px_l0=(64, 64)), Child(level=0),
               parameters={})


def test_axes_of_different_scale() -> None:
    slide: Any = Pyramid(((1, 1), (2, 4), (4, 8)))
    coarse = replace(grid(pyramid(1, 2, 4), 2), level_downsample=(4, 8), footprint_px_l0=(256, 256))
    with pytest.raises(ItemFailed, match="axes of its levels differ"):
        derive(slide, coarse, Child(level=1), parameters={})
    with pytest.raises(ItemFailed, match="4 x 8 is 4 x 2 times that of level 1"):
        derive(Pyramid(((1, 1), (1, 4))), coarse, Child(level=1), parameters={})  # type: ignore


def test_a_ratio_that_is_nearly_whole_is_read_and_resized() -> None:
    """4.1 / 2.03 is 2.02: a child covers half a parent, 525 level-0 px or 258.6 of its level."""
    slide = pyramid(1, 2.03, 4.1)
    coarse = replace(grid(slide, 2, side=256), footprint_px_l0=(1050, 1050))
    fine = derive(slide, coarse, Child(level=1), parameters={})
    assert (fine.footprint_px_l0, fine.patch_size, fine.output_size) == ((525, 525), 259, 256)


def test_another_slide_under_the_same_name() -> None:
    slide = pyramid(1, 2, 4)
    coarse = replace(grid(slide, 2), slide_size=(100, 100), parameters={"stage": "patches"})
    with pytest.raises(ItemFailed, match="--no_auto_skip"):
        derive(slide, coarse, Child(level=1), parameters={})


# ---------------------------------------------------------------------------- um per pixel

@pytest.mark.parametrize(("mpp_um", "side", "level", "read"), [
    (1.0, 128, 1, 64),  # 2 um at level 2 of a 0.5 um slide: as --child_levels 1
    (0.5, 64, 0, 64), (0.67, 84, 0, 84), (0.51, 64, 0, 64)])
def test_mpp_gives_level_and_read_size(mpp_um: float, side: int, level: int, read: int) -> None:
    slide = pyramid(1, 2, 4)
    coarse = replace(grid(slide, 2, side=64), footprint_px_l0=(252, 252)) if mpp_um == 0.67 \
        else grid(slide, 2, side=64)
    fine = derive(slide, coarse, Child(mpp_um=mpp_um), parameters={})
    assert (fine.footprint_px_l0, fine.patch_level, fine.patch_size) == ((side, side), level, read)
    assert fine.output_size == 64 and fine.mpp_um == pytest.approx(mpp_um, rel=0.05)


def test_mpp_reads_the_coarsest_level_that_is_fine_enough() -> None:
    slide = pyramid(1, 3, 16)
    fine = derive(slide, grid(slide, 2), Child(mpp_um=2.0), parameters={})  # needs downsample 4
    assert (fine.patch_level, fine.patch_size, fine.output_size) == (1, 85, 64)


@pytest.mark.parametrize(("mpp_um", "known", "words"), [
    (1.0, None, "column 'mpp' of the process list"),
    (1.3, 0.5, "has 2 um per px, 1.538 times the 1.3 of.*choose such as 1"),
    (0.25, 0.5, "level 0 has pixels 2 times as large")])
def test_mpp_that_cannot_be(mpp_um: float, known: float | None, words: str) -> None:
    slide = pyramid(1, 2, 4)
    with pytest.raises(ItemFailed, match=words):
        derive(slide, grid(slide, 2, mpp_um=known), Child(mpp_um=mpp_um), parameters={})


# ---------------------------------------------------------------------------- over slides

@pytest.fixture
def plan(tmp_path: Path) -> DerivePlan:
    """Two slides of levels 1/2/4; coordinates of one of them at level 2."""
    (tmp_path / "slides").mkdir()
    for name in ("a", "b"):
        write_pyramid(tmp_path / "slides" / f"{name}.tif", tissue_image(512, 512))
    plan = DerivePlan(save_dir=tmp_path / "out_level_2", children=CHILDREN)
    for folder in (plan.save_dir, *map(plan.folder, CHILDREN)):
        (folder / "patches").mkdir(parents=True)
    write_coarse(plan, tmp_path / "slides" / "a.tif")
    return plan


def write_coarse(plan: DerivePlan, slide: Path, corners: Any = ((0, 0), (256, 256)), **changes: Any
                 ) -> None:
    coarse = grid(Pyramid(((1, 1), (2, 2), (4, 4)), (512, 512)), 2, corners=corners)
    write_coords(plan.h5_path(None, slide.stem), replace(
        coarse, slide_id=slide.stem, **{"parameters": {"stage": "patches", **fingerprint(slide)},
                                        **changes}))


def statuses(plan: DerivePlan, slide: Path) -> list[Status]:
    return [row.status for row in derive_slide(slide, plan=plan)]


def test_levels_are_made_once_and_remade_from_a_changed_parent(plan: DerivePlan, tmp_path: Path
                                                               ) -> None:
    slide = tmp_path / "slides" / "a.tif"
    assert statuses(plan, slide) == [Status.DONE, Status.DONE]
    assert statuses(plan, slide) == [Status.SKIPPED, Status.SKIPPED]
    assert statuses(replace(plan, redo=True), slide) == [Status.DONE, Status.DONE]
    write_coarse(plan, slide, corners=((0, 256),))
    assert statuses(plan, slide) == [Status.DONE, Status.DONE]
    fine = read_coords(plan.h5_path(CHILDREN[1], "a"))
    assert len(fine) == 16 and fine.coords.min(axis=0).tolist() == [0, 256]
    assert not list(tmp_path.rglob("*.lock"))


def test_a_damaged_level_is_made_anew_alone(plan: DerivePlan, tmp_path: Path) -> None:
    slide = tmp_path / "slides" / "a.tif"
    statuses(plan, slide)
    plan.h5_path(CHILDREN[1], "a").write_bytes(b"no h5")
    assert statuses(plan, slide) == [Status.SKIPPED, Status.DONE]


def test_a_level_of_other_settings_or_another_s_is_not_replaced(plan: DerivePlan, tmp_path: Path
                                                                ) -> None:
    slide = tmp_path / "slides" / "a.tif"
    statuses(plan, slide)
    write_coarse(plan, slide, background=(255, 255, 255))
    rows = derive_slide(slide, plan=plan)
    assert [row.status for row in rows] == [Status.FAILED, Status.FAILED]
    assert "made with other parameters" in rows[0].reason and "--no_auto_skip" in rows[0].reason
    assert rows[1].reason == "needs level_1, which was not made"
    fine = read_coords(plan.h5_path(CHILDREN[0], "a"))
    write_coords(plan.h5_path(CHILDREN[0], "a"), replace(fine, parameters={}))
    assert "was not made by this toolkit" in derive_slide(slide, plan=plan)[0].reason


def test_before_the_work_other_settings_are_refused(plan: DerivePlan, tmp_path: Path) -> None:
    statuses(plan, tmp_path / "slides" / "a.tif")
    same = PatchPlan(save_dir=plan.save_dir, patch_size=64, patch_level=2)
    prepare(plan, ["a.tif", "b.tif"], same)
    with pytest.raises(Refused, match="output_size: file has 64, you ask 32.*--no_auto_skip"):
        prepare(plan, ["a.tif"], replace(same, patch_size=32))
    prepare(replace(plan, redo=True), ["a.tif"], replace(same, patch_size=32))
    write_coarse(plan, tmp_path / "slides" / "a.tif", parameters={})  # CLAM's is kept as it is
    prepare(plan, ["a.tif"], replace(same, patch_size=32))


def test_a_held_level_is_busy(plan: DerivePlan, tmp_path: Path) -> None:
    with claim(plan.h5_path(CHILDREN[0], "a")):
        assert statuses(plan, tmp_path / "slides" / "a.tif") == [Status.BUSY, Status.BUSY]


def test_rows_and_lists_for_each_level(plan: DerivePlan, tmp_path: Path) -> None:
    """b has no coarse coordinates: it is in the lists, and has no rows of its own."""
    listing, report = new_list(["a.tif", "b.tif"], DEFAULTS), RunReport("patches")
    derive_slides(plan, listing, tmp_path / "slides", report, workers=0)
    assert [(row.item, row.numbers["n_patches"]) for row in report.rows] == [
        ("a.tif [level_1]", 8), ("a.tif [level_0]", 32)]
    for child, count in zip(CHILDREN, ("8", "32"), strict=True):
        table = read_table(plan.folder(child) / "process_list_autogen.csv")
        assert table["status"].tolist() == ["processed", "tbp"]
        assert table["n_patches"].tolist() == [count, ""]
        assert table["reason"].tolist() == ["", "no coordinates on the coarse level"]


def test_a_slide_without_tissue_has_empty_levels(plan: DerivePlan, tmp_path: Path) -> None:
    write_coarse(plan, tmp_path / "slides" / "a.tif", corners=np.empty((0, 2)))
    assert statuses(plan, tmp_path / "slides" / "a.tif") == [Status.EMPTY, Status.EMPTY]
    assert len(read_coords(plan.h5_path(CHILDREN[1], "a"))) == 0


def test_a_broken_coarse_file_or_slide_fails_its_levels(plan: DerivePlan, tmp_path: Path) -> None:
    listing = new_list(["a.tif", "b.tif"], DEFAULTS)
    plan.h5_path(None, "a").write_bytes(b"no h5")
    write_coarse(plan, tmp_path / "slides" / "b.tif")
    (tmp_path / "slides" / "b.tif").write_bytes(b"no slide")
    report = RunReport("patches")
    derive_slides(plan, listing, tmp_path / "slides", report, workers=0)
    assert [row.status for row in report.rows] == [Status.FAILED] * 4
    assert "cannot be read" in report.rows[0].reason and "b.tif" in report.rows[2].reason
