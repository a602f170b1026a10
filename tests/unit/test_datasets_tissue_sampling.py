"""datasets/tissue_sampling.py: what tiles look like, and what they depend on."""

from __future__ import annotations

import numpy as np
import pytest

from datasets.tissue_pairs import Example, overlap
from datasets.tissue_sampling import (
    TileSampler,
    blur_and_compress,
    change_light,
    change_stain,
    draw_pen,
    random_view,
    read_ahead,
)
from tests.slides import tissue_image


def example(seed: int = 0) -> Example:
    rgb = tissue_image(320, 240, seed=seed)
    return Example(rgb, np.ptp(rgb, axis=2) > 10)


def test_batches_depend_on_seed_and_step_alone() -> None:
    examples = [example(0), example(1)]

    def batches(seed: int, epoch: int, workers: int) -> list[np.ndarray]:
        sampler = TileSampler(examples, tile_px=64, pen_frac=0.5, seed=seed)
        return [array for batch in read_ahead(sampler, epoch=epoch, steps=5, batch_size=3,
                                              workers=workers) for array in batch]

    first = batches(1, 0, 1)
    assert len(first) == 10 and first[0].shape == (3, 64, 64, 3) and first[0].dtype == np.uint8
    assert first[1].shape == (3, 64, 64) and set(np.unique(first[1])) == {0, 1}
    assert all(map(np.array_equal, first, batches(1, 0, 3)))
    for other in (batches(2, 0, 1), batches(1, 1, 1)):
        assert not any(map(np.array_equal, first[::2], other[::2]))
    assert not np.array_equal(first[0], first[2])


def test_views_turn_image_and_mask_alike() -> None:
    found = example()
    rng = np.random.default_rng(0)
    for _ in range(20):
        rgb, mask = random_view(found, np.array([160, 120]), 96, rng)
        assert overlap(np.ptp(rgb, axis=2) > 10, mask)[0] > 0.95
    rgb, mask = random_view(found, np.array([-500, -500]), 96, rng)
    assert (rgb == 255).all() and not mask.any()


@pytest.mark.parametrize("change", [change_stain, change_light, blur_and_compress])
def test_colours_change_within_reason(change: object) -> None:
    assert callable(change)
    rgb = example().rgb
    results = [change(rgb, np.random.default_rng(seed)) for seed in range(12)]
    for result in results:
        assert result.shape == rgb.shape and result.dtype == np.uint8
        assert result[:5, :5].mean() > 170  # glass stays light
        assert abs(result.astype(int) - rgb).mean() < 40
    assert any(not np.array_equal(result, rgb) for result in results)
    assert not all(np.array_equal(result, results[0]) for result in results)


def test_glass_takes_no_stain() -> None:
    white = np.full((4, 4, 3), 255, np.uint8)
    assert (change_stain(white, np.random.default_rng(0)) == 255).all()


def test_ink_is_no_tissue() -> None:
    rgb, mask = example().rgb[:96, :96], np.ones((96, 96), bool)
    inked, left = draw_pen(rgb, mask, np.random.default_rng(3))
    covered = ~left
    assert 20 < covered.sum() < mask.size
    changed = abs(inked.astype(int) - rgb).max(axis=2)
    assert changed[covered].mean() > 40 and (changed > 60)[left].mean() < 0.1


def test_share_of_pen_strokes() -> None:
    full = Example(example().rgb, np.ones((240, 320), bool))

    def inked(share: float) -> float:
        sampler = TileSampler([full], tile_px=64, pen_frac=share, seed=0)
        centre = np.array([160, 120])
        sampler._tissue = [centre[None]]
        return float((sampler.batch(0, 0, 40)[1] == 0).mean())

    assert inked(1.0) > inked(0.0) + 0.01


def test_slides_without_tissue_give_tiles_too() -> None:
    empty = Example(np.full((100, 80, 3), 240, np.uint8), np.zeros((100, 80), bool))
    tiles, truth = TileSampler([empty], tile_px=64, pen_frac=0.0, seed=0).batch(0, 0, 4)
    assert tiles.shape == (4, 64, 64, 3) and not truth.any()
