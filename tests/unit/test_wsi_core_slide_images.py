"""Files of slide images: what is written, when it counts as done, what is noticed as damage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.slides import write_pyramid
from utils.errors import BrokenFile, ItemFailed, Refused, SlideError
from wsi_core import slide_images
from wsi_core.image_record import ImageRecord, read_record, write_record
from wsi_core.packing import PackedSlide
from wsi_core.slide import open_slide
from wsi_core.slide_images import ImagePlan, image_path, map_path, open_image, record_path
from wsi_core.tissue import Tissue

TISSUE = Tissue([np.array([[x, y], [x + 300, y], [x + 300, y + 400], [x, y + 400]], np.int32)
                 for x, y in ((200, 200), (1500, 1400))], [[], []])
PARAMETERS = {"image_mpp": 1.0, "a_t": 0.5}


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    noise = np.random.default_rng(0).integers(90, 240, (512, 512, 3), dtype=np.uint8)
    image = cv2.resize(noise, (2048, 2048), interpolation=cv2.INTER_CUBIC)
    return write_pyramid(tmp_path_factory.mktemp("s") / "a.tif", image, mpp=0.5, quality=95)


@pytest.fixture
def plan(tmp_path: Path) -> ImagePlan:
    return ImagePlan(folder=tmp_path, image_mpp=1.1)


def make(plan: ImagePlan, slide_path: Path, tissue: Tissue = TISSUE) -> ImageRecord | None:
    with open_slide(slide_path) as slide:
        return plan.make(slide, "a", tissue, slide_mpp=(0.5, 0.5), parameters=PARAMETERS)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_three_files_that_tell_all(plan: ImagePlan, slide_path: Path) -> None:
    plan = replace(plan, quality=None)
    record = make(plan, slide_path)
    assert record is not None and names(plan.folder) == {"a.tif", "a.json", "a_tissue.png"}
    assert read_record(record_path(plan.folder, "a")) == record == plan.found("a")
    assert len(record.boxes) == 2 and record.parameters == PARAMETERS
    assert record.slide == {"slide_name": "a.tif", "slide_bytes": slide_path.stat().st_size}
    with open_slide(plan.folder / "a.tif", backend="openslide") as slide:  # an ordinary slide
        assert slide.level_dimensions[0] == record.size_px
        assert slide.mpp_um == pytest.approx((record.mpp_um,) * 2, rel=1e-4)
    with open_slide(slide_path) as slide, open_image(plan.folder, "a") as written:
        packed = PackedSlide(slide, record, written.tissue_map)
        assert written.size_px == packed.size_px and written.mpp_um == packed.mpp_um
        assert written.boxes == packed.boxes
        point = np.array([[10, 10]])
        assert np.array_equal(written.to_level0(point), packed.to_level0(point))
        for window in ((0, 0, *record.size_px), (30, 50, 100, 200), (-5, -5, 20, 20)):
            assert np.array_equal(written.read(*window), packed.read(*window))
        assert written.tissue_map.max() == 255 and written.tissue_map.dtype == np.uint8


def test_jpeg_is_nearly_the_same_and_much_smaller(plan: ImagePlan, slide_path: Path) -> None:
    make(replace(plan, quality=None), slide_path)
    with open_image(plan.folder, "a") as exact:
        pixels = exact.read(0, 0, *exact.size_px).astype(int)
        n_bytes = exact.record.image_bytes
    make(plan, slide_path)
    with open_image(plan.folder, "a") as lossy:
        assert 0 < np.abs(lossy.read(0, 0, *lossy.size_px) - pixels).mean() < 4
        assert lossy.record.image_bytes < n_bytes / 2


def test_an_image_counts_when_its_record_and_files_are_there(plan: ImagePlan, slide_path: Path
                                                             ) -> None:
    assert plan.found("a") is None
    for path in (record_path, image_path, map_path):
        make(plan, slide_path)
        assert plan.found("a") is not None
        path(plan.folder, "a").unlink()
        assert plan.found("a") is None
        with pytest.raises(BrokenFile):
            open_image(plan.folder, "a")
    make(plan, slide_path)
    with image_path(plan.folder, "a").open("ab") as file:
        file.write(b"x")
    assert plan.found("a") is None
    with pytest.raises(BrokenFile, match=r"a\.tif is missing or not the image"):
        open_image(plan.folder, "a")


@pytest.mark.parametrize("path", [image_path, map_path])
def test_an_image_that_does_not_open_is_not_done(
        path: Callable[[Path, str], Path], plan: ImagePlan, slide_path: Path) -> None:
    """As a power cut may leave it: the size is right, the content gone."""
    make(plan, slide_path)
    file = path(plan.folder, "a")
    file.write_bytes(bytes(file.stat().st_size))
    assert plan.found("a") is None


def test_no_tissue_leaves_nothing_not_even_what_was_there(plan: ImagePlan, slide_path: Path
                                                          ) -> None:
    make(plan, slide_path)
    assert make(plan, slide_path, Tissue()) is None and names(plan.folder) == set()


def test_a_slide_too_coarse_leaves_what_was_there(plan: ImagePlan, slide_path: Path) -> None:
    make(plan, slide_path)
    with pytest.raises(ItemFailed, match="too coarse"):
        make(replace(plan, image_mpp=0.3), slide_path)
    assert plan.found("a") is not None


def test_a_slide_replaced_while_it_is_read_leaves_no_record(
        plan: ImagePlan, slide_path: Path, tmp_path_factory: pytest.TempPathFactory,
        monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path_factory.mktemp("mine") / "a.tif"
    mine.write_bytes(slide_path.read_bytes())
    plain = slide_images.write_image
    make(plan, mine)  # an older image does not count any more either

    def replaced(path: Path, image: np.ndarray) -> Path:
        mine.write_bytes(slide_path.read_bytes() + b"x")
        return plain(path, image)

    monkeypatch.setattr(slide_images, "write_image", replaced)
    with pytest.raises(SlideError, match="was replaced while it was read"):
        make(plan, mine)
    assert plan.found("a") is None and not record_path(plan.folder, "a").exists()


def test_names_stay_in_the_folder(plan: ImagePlan, slide_path: Path) -> None:
    make(plan, slide_path)
    (plan.folder / "in").mkdir()
    with pytest.raises(Refused, match="not a plain name"):
        open_image(plan.folder / "in", "../a")


@pytest.mark.parametrize(("change", "match"), [
    ({"schema": 9}, "schema 9"), ({"boxes": [[0, 0, 5]]}, "no record"),
    ({"boxes": [[0, 0, 10**6, 8, 0, 0, 1, 1]]}, "make no sense"),
    ({"size_px": [0, 8]}, "that cannot be"), ({"mpp_um": -1}, "that cannot be"),
    ({"mpp_um": math.nan}, "that cannot be"),
    ({"boxes": []}, "no piece"),
    ({"size_px": [math.inf, 8]}, "no record"),
    ({"boxes": [[0, 0, 8, 8, 0, math.nan, 1, 1]]}, "of the slide"),
    ({"boxes": [[0, 0, 8, 8, 0, 0, 0, 1]]}, "of the slide"),
    ({"mpp_um": "x"}, "no record"), ({"boxes": 3}, "no record"),
    ({"slide_mpp_um": [1]}, "no record")])
def test_records_that_cannot_be_true(change: dict[str, Any], match: str, plan: ImagePlan,
                                     slide_path: Path) -> None:
    make(plan, slide_path)
    path = record_path(plan.folder, "a")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BrokenFile, match=match):
        read_record(path)
    assert plan.found("a") is None  # made again


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_damaged_records(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BrokenFile, match=r"a\.json"):
        read_record(tmp_path / "a.json")


def test_files_that_do_not_belong_together(plan: ImagePlan, slide_path: Path) -> None:
    record = make(plan, slide_path)
    assert record is not None
    width, height = record.size_px
    write_record(record_path(plan.folder, "a"), replace(record, size_px=(width, height + 8)))
    with pytest.raises(BrokenFile, match=r"a\.tif has another size than its \.json says"):
        open_image(plan.folder, "a")
    cv2.imwrite(str(map_path(plan.folder, "a")), np.zeros((3, 3), np.uint8))
    with pytest.raises(BrokenFile, match=r"a_tissue\.png is missing, damaged or of another image"):
        open_image(plan.folder, "a")
