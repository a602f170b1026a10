"""datasets/tissue_masks.py: batches, resume, failures of single slides, locks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets import tissue_masks
from datasets.tissue_masks import TissueSlide, mask_parameters, predict_masks, read_scaled
from models.tissue_networks import NetworkCard, NetworkPredictor, build_network
from tests.slides import tissue_image, write_pyramid
from utils import faults
from utils.errors import Refused
from utils.locks import claim
from utils.report import Row, Status
from utils.staging import Staging
from wsi_core.mask_files import read_mask, resample_mask
from wsi_core.slide import Slide, open_slide


class Colours:
    """A segmenter that takes for tissue what is not grey; it notes what it was given."""

    def __init__(self, *, mpp_um: float = 4.0, max_side_px: int | None = None,
                 threshold: float = 0.5) -> None:
        self.mpp_um, self.max_side_px, self.threshold = mpp_um, max_side_px, threshold
        self.batches: list[list[tuple[int, ...]]] = []

    def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.batches.append([image.shape for image in images])
        return [np.clip((np.ptp(image, axis=2).astype(np.float32) - 10) / 40, 0, 1)
                for image in images]

    def record(self) -> dict[str, Any]:
        return {"name": "colours", "mpp_um": self.mpp_um, "threshold": self.threshold}


@pytest.fixture
def slides(slide_folder: Path) -> list[TissueSlide]:
    """Three slides of 2048 x 1536 px at 0.5 um."""
    return [TissueSlide(slide_id=f"slide_{number}", slide_path=slide_folder / f"slide_{number}.tif")
            for number in range(3)]


def run(slides: Sequence[TissueSlide], predictor: Any, folder: Path, **options: Any
        ) -> dict[str, Row]:
    return {row.item: row for row in predict_masks(slides, predictor, folder=folder, **options)}


def statuses(rows: dict[str, Row]) -> list[Status]:
    return [rows[name].status for name in sorted(rows)]


def test_masks_lie_where_the_tissue_is(slides: list[TissueSlide], tmp_path: Path) -> None:
    predictor = Colours()
    rows = run(slides, predictor, tmp_path / "masks", batch_size=2)
    assert statuses(rows) == [Status.DONE] * 3
    assert predictor.batches == [[(192, 256, 3)] * 2, [(192, 256, 3)]]  # 4 um: 8 times smaller
    for number, slide in enumerate(slides):
        found = read_mask(tmp_path / "masks" / f"{slide.slide_id}.png", slide_size=(2048, 1536))
        truth = np.ptp(tissue_image(2048, 1536, seed=number), axis=2) > 10
        truth = resample_mask(truth, (256, 192))
        assert (found.mask & truth).sum() / (found.mask | truth).sum() > 0.95
        assert found.parameters == mask_parameters(slide, predictor)
        assert rows[slide.slide_id].numbers["tissue_frac"] == pytest.approx(found.mask.mean(),
                                                                            abs=1e-4)
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [
        f"slide_{number}.png" for number in range(3)]  # no lock, no temporary


def test_batches_do_not_change_masks(slides: list[TissueSlide], tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    card = NetworkCard(arch="unet", width=4, depth=2, mpp_um=8.0, tile_px=64)
    network = build_network(card).train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.from_numpy(tissue_image(64, 64)).permute(2, 0, 1)[None] / 255)
    predictor = NetworkPredictor(network, card, sha256="", device=torch.device("cpu"),
                                 precision="fp32")
    probability = predictor.predict([tissue_image(128, 96)])[0]
    predictor.threshold = float(np.median(probability))
    masks = []
    for size in (1, 3):
        run(slides, predictor, tmp_path / str(size), batch_size=size, reading_threads=size)
        masks.append([(tmp_path / str(size) / f"slide_{number}.png").read_bytes()
                      for number in range(3)])
    assert masks[0] == masks[1]
    assert 0.05 < read_mask(tmp_path / "1" / "slide_0.png").mask.mean() < 0.95


def test_a_second_run_keeps_what_is_there(slides: list[TissueSlide], tmp_path: Path) -> None:
    run(slides[:2], Colours(), tmp_path)
    (tmp_path / "slide_0.png").write_bytes((tmp_path / "slide_0.png").read_bytes()[:100])
    predictor = Colours()
    rows = run(slides, predictor, tmp_path)
    assert statuses(rows) == [Status.DONE, Status.SKIPPED, Status.DONE]
    assert len(predictor.batches) == 2
    redone = run(slides, predictor, tmp_path, redo=True)
    assert statuses(redone) == [Status.DONE] * 3


def test_masks_of_others_are_not_replaced(slides: list[TissueSlide], tmp_path: Path) -> None:
    run(slides[:2], Colours(), tmp_path)
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / "slide_1.png")
    predictor = Colours(threshold=0.7)
    rows = run(slides, predictor, tmp_path)
    assert statuses(rows) == [Status.FAILED, Status.FAILED, Status.DONE]
    assert "other parameters (segmenter: file has" in rows["slide_0"].reason
    assert "not one of ours" in rows["slide_1"].reason
    moved = [replace(slide, mpp_um=0.25) for slide in slides[2:]]
    assert "mpp_override: file has None" in run(moved, predictor, tmp_path)["slide_2"].reason
    assert statuses(run(slides, predictor, tmp_path, redo=True)) == [Status.DONE] * 3


def test_bad_slides_cost_themselves_alone(slides: list[TissueSlide], tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    bad = [TissueSlide(slide_id="a_text", slide_path=tmp_path / "text.svs"),
           TissueSlide(slide_id="b_gone", slide_path=tmp_path / "gone.svs")]
    rows = run([bad[0], slides[0], bad[1], *slides[1:]], Colours(), tmp_path / "masks",
               batch_size=4)
    assert statuses(rows) == [Status.FAILED, Status.FAILED, *[Status.DONE] * 3]
    assert "text.svs" in rows["a_text"].reason and "gone.svs" in rows["b_gone"].reason
    assert not list((tmp_path / "masks").glob("*.lock"))


def test_a_batch_that_fails_is_tried_one_by_one(slides: list[TissueSlide], tmp_path: Path) -> None:
    class Small(Colours):
        """Runs out of memory on two images, and always on the one that is not 256 px wide."""

        def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
            if len(images) > 1 or images[0].shape[1] != 256:
                raise RuntimeError("CUDA out of memory.\nTried to allocate")
            return super().predict(images)

    odd = replace(slides[1], mpp_um=0.25)
    rows = run([slides[0], odd, slides[2]], Small(), tmp_path, batch_size=3)
    assert statuses(rows) == [Status.DONE, Status.FAILED, Status.DONE]
    assert "out of memory" in rows["slide_1"].reason
    assert "--seg_batch_size" in rows["slide_1"].reason


def test_answers_that_are_not_finite_fail(slides: list[TissueSlide], tmp_path: Path) -> None:
    class Overflow(Colours):
        def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [np.full(image.shape[:2], np.nan, np.float32) for image in images]

    assert "not finite" in run(slides[:1], Overflow(), tmp_path)["slide_0"].reason
    assert not (tmp_path / "slide_0.png").exists()


def test_a_full_disk_costs_the_slide_that_was_written(
        slides: list[TissueSlide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_passed", Counter())
    monkeypatch.setenv("MILWRIGHT_FAULT", "storage.replace:enospc:2")
    rows = run(slides, Colours(), tmp_path, batch_size=3)
    assert statuses(rows) == [Status.DONE, Status.FAILED, Status.DONE]
    assert "no space left" in rows["slide_1"].reason
    monkeypatch.delenv("MILWRIGHT_FAULT")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slide_0.png", "slide_2.png"]
    rows = run(slides, Colours(), tmp_path)
    assert statuses(rows) == [Status.SKIPPED, Status.DONE, Status.SKIPPED]


def test_a_slide_that_another_process_holds(slides: list[TissueSlide], tmp_path: Path) -> None:
    with claim(tmp_path / "slide_1.png") as mine:
        assert mine
        rows = run(slides, Colours(), tmp_path)
    assert statuses(rows) == [Status.DONE, Status.BUSY, Status.DONE]
    assert not (tmp_path / "slide_1.png").exists()


def test_locks_are_given_back_when_nobody_waits_for_rows(slides: list[TissueSlide],
                                                         tmp_path: Path) -> None:
    rows = predict_masks(slides, Colours(), folder=tmp_path)
    next(rows)
    assert list(tmp_path.glob("*.lock"))
    rows.close()  # type: ignore[attr-defined]
    assert not list(tmp_path.glob("*.lock"))


def test_copies_are_read_and_given_back(slides: list[TissueSlide], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def opened(path: Path) -> Slide:
        read.append(path)
        return open_slide(path)

    monkeypatch.setattr(tissue_masks, "open_slide", opened)
    run(slides[:1], Colours(), tmp_path / "masks")
    with Staging(tmp_path / "cache", [slide.slide_path for slide in slides]) as staging:
        rows = run(slides, Colours(), tmp_path / "masks", staging=staging)
        assert not list((tmp_path / "cache").rglob("*.tif"))
    assert statuses(rows) == [Status.SKIPPED, Status.DONE, Status.DONE]
    copies = [path for path in read if (tmp_path / "cache") in path.parents]
    assert sorted(path.name for path in copies) == ["slide_1.tif", "slide_2.tif"]
    found = read_mask(tmp_path / "masks" / "slide_1.png").parameters
    assert found == mask_parameters(slides[1], Colours())


def test_a_folder_that_cannot_be_written_is_refused(slides: list[TissueSlide],
                                                    tmp_path: Path) -> None:
    (tmp_path / "masks").touch()
    with pytest.raises(Refused, match="folder of tissue masks"):
        predict_masks(slides, Colours(), folder=tmp_path / "masks")


@pytest.mark.parametrize(("mpp_um", "limits", "size"), [
    (0.25, {}, (32, 24)),  # 8 um wanted
    (None, {}, (32, 24)),  # unknown: taken for 0.25
    (16.0, {}, (2048, 1536)),  # coarser: enlarged
    (8.2, {}, (1024, 768)),  # within 5 %
    (0.25, {"max_side_px": 16}, (16, 12)),
    (16.0, {"max_side_px": 512}, (512, 384)),
    (16.0, {"max_side_px": 4096}, (1024, 768))])
def test_scale_of_overviews(tmp_path: Path, mpp_um: float | None, limits: dict[str, int],
                            size: tuple[int, int]) -> None:
    write_pyramid(tmp_path / "a.tif", tissue_image(1024, 768), mpp=None)
    with open_slide(tmp_path / "a.tif") as slide:
        rgb = read_scaled(slide, 8.0, slide_mpp=mpp_um, **limits)
    assert (rgb.shape[1], rgb.shape[0]) == size
    whole = cv2.resize(tissue_image(1024, 768), size, interpolation=cv2.INTER_AREA)
    assert abs(rgb.astype(int) - whole).mean() < 6


def test_the_files_own_pixel_size_counts(slides: list[TissueSlide]) -> None:
    with open_slide(slides[0].slide_path) as slide:
        assert read_scaled(slide, 2.0).shape == (384, 512, 3)
