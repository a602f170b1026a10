"""Physical scale: level, size read, footprint, and the refusals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from utils.errors import ItemFailed
from wsi_core.scale import PatchScale, Reading, objective_mpp, plan_reading
from wsi_core.slide import Slide


@dataclass
class Geometry:
    """What is looked at of a slide."""

    factors: tuple[float, ...] = (1, 4, 16)
    mpp_problem: str = ""
    objective_power: float | None = None
    path: Path = Path("a.svs")

    @property
    def level_dimensions(self) -> list[tuple[int, int]]:
        return [(round(65536 / factor), round(65536 / factor)) for factor in self.factors]

    @property
    def level_downsamples(self) -> list[tuple[float, float]]:
        return [(factor, factor) for factor in self.factors]


def plan(own_mpp: float | None, *, factors: tuple[float, ...] = (1, 4, 16), **wanted: Any
         ) -> Reading:
    slide = cast(Slide, Geometry(factors))
    return plan_reading(slide, PatchScale(**wanted), own_mpp and (own_mpp, own_mpp))


@pytest.mark.parametrize("own_mpp", [0.2, 0.2525, 0.25, 0.274, 0.5, 0.4877, 0.2277])
@pytest.mark.parametrize("wanted_mpp", [0.5, 1.0, 0.88, 2.0, 8.0])
def test_the_physical_side_is_that_asked_for(own_mpp: float, wanted_mpp: float) -> None:
    """Spec B, section 13, test 1: within 1 % on slides of every scanner."""
    reading = plan(own_mpp, patch_px=256, step_px=256, mpp_um=wanted_mpp)
    side_um = reading.footprint_px_l0[0] * own_mpp
    assert side_um == pytest.approx(256 * wanted_mpp, rel=0.01)
    assert reading.mpp_um == pytest.approx(side_um / 256)
    assert reading.step_px_l0[0] * own_mpp == pytest.approx(256 * wanted_mpp)  # not rounded


@pytest.mark.parametrize(("own_mpp", "wanted_mpp", "level", "read_px"), [
    (0.25, 0.25, 0, 256),  # as it is
    (0.25, 0.5, 0, 512),  # shrunk from the level below
    (0.25, 1.0, 1, 256),
    (0.2525, 1.0, 1, 253),  # a level up to 5 % too coarse is enlarged
    (0.262, 1.0, 1, 244),
    (0.264, 1.0, 0, 970),  # 5.6 %: from level 0
    (0.26, 0.25, 0, 246),
    (0.5, 8.0, 2, 256),
    (0.25, 100.0, 2, 6400)])
def test_level_and_size_read(own_mpp: float, wanted_mpp: float, level: int, read_px: int) -> None:
    reading = plan(own_mpp, patch_px=256, step_px=256, mpp_um=wanted_mpp)
    assert (reading.level, reading.read_px, reading.output_px) == (level, read_px, 256)


def test_a_slide_too_coarse_is_refused_not_enlarged() -> None:
    with pytest.raises(ItemFailed, match="a.svs: has 0.5 um.*too coarse for patches of 0.25"):
        plan(0.5, mpp_um=0.25)
    assert plan(0.26, mpp_um=0.25).read_px == 246


def test_an_unknown_pixel_size_names_the_remedies() -> None:
    with pytest.raises(ItemFailed, match=r"pixel size unknown.*'mpp'.*--mpp_csv$"):
        plan(None, mpp_um=0.5)
    slide = cast(Slide, Geometry(objective_power=20.0, mpp_problem="the file gives 0 x 0 um"))
    with pytest.raises(ItemFailed, match=r"gives 0 x 0 um.*--mpp_from_objective \(20x\)"):
        plan_reading(slide, PatchScale(mpp_um=0.5), None)
    assert objective_mpp(20) == 0.5 and objective_mpp(40) == 0.25


def test_levels_that_are_nearly_whole_count_as_whole() -> None:
    reading = plan(0.25, factors=(1, 3.9998, 16.003), patch_px=256, step_px=256, mpp_um=1.0)
    assert (reading.level, reading.read_px, reading.footprint_px_l0) == (1, 256, (1024, 1024))


@pytest.mark.parametrize("own_mpp", [0.2505, 0.2499, 0.274])
@pytest.mark.parametrize("divide_by", [2, 4, 12])
def test_a_footprint_that_finer_levels_can_tile(own_mpp: float, divide_by: int) -> None:
    reading = plan(own_mpp, patch_px=256, step_px=256, mpp_um=0.5, divide_by=divide_by)
    assert reading.footprint_px_l0[0] % divide_by == 0
    assert reading.footprint_px_l0[0] * own_mpp == pytest.approx(128, rel=divide_by / 900)
    coarse = plan(own_mpp, patch_px=256, step_px=256, mpp_um=4.0, divide_by=divide_by)
    assert coarse.footprint_px_l0[0] % divide_by == 0


def test_by_level_as_clam_reads() -> None:
    reading = plan(0.25, patch_px=256, step_px=128, patch_level=1, custom_downsample=2)
    assert reading == Reading(level=1, read_px=512, output_px=256, footprint_px_l0=(2048, 2048),
                              step_px_l0=(1024, 1024), mpp_um=2.0)
    assert plan(None, patch_level=1).mpp_um is None
    with pytest.raises(ItemFailed, match="has no level 3 to take patches from, only 0 to 2"):
        plan(0.25, patch_level=3)
