"""Squares of images: where tissue is, also of maps that are not square."""

from __future__ import annotations

import numpy as np
import pytest

from datasets.image_crops import crop_shares, draw_crop, most_tissue


@pytest.mark.parametrize("side", [10, 33, 60, 200])
def test_shares_are_those_of_the_pixels(side: int) -> None:
    """Of a map of 20 x 7 cells whose last ones reach beyond the image; any side of the square."""
    tissue = np.random.default_rng(0).random((7, 20))
    width, height = 158, 55
    pixels = np.kron(tissue, np.ones((8, 8)))[:height, :width]
    found = crop_shares(tissue, cell_px=8, size_px=(width, height), side_px=side)
    for row in range(7):
        for column in range(20):
            x = int(np.clip(column * 8 + 4 - side / 2, 0, max(0, width - side)))
            y = int(np.clip(row * 8 + 4 - side / 2, 0, max(0, height - side)))
            expected = pixels[y:y + side, x:x + side].sum() / side**2
            assert found[row, column] == pytest.approx(expected)


def test_tissue_in_one_corner_of_a_long_map_is_found() -> None:
    """Defect 11: flat indices divided by the wrong side."""
    tissue = np.zeros((4, 50))
    tissue[1, 37] = 1
    where = {"cell_px": 16, "size_px": (800, 64), "side_px": 16}
    assert most_tissue(tissue, **where) == (592, 16)  # type: ignore[arg-type]
    for seed in range(10):
        x, y = draw_crop(tissue, **where, rng=np.random.default_rng(seed))  # type: ignore[arg-type]
        assert abs(x - 592) <= 8 and abs(y - 16) <= 8
    tall = {**where, "size_px": (64, 800)}
    assert most_tissue(tissue.T, **tall) == (16, 592)  # type: ignore[arg-type]


def test_the_square_lies_around_tissue_that_fits_into_it() -> None:
    tissue = np.zeros((40, 40))
    tissue[18:22, 10:14] = 1
    assert most_tissue(tissue, cell_px=10, size_px=(400, 400), side_px=100) == (65, 145)


def test_draws_go_with_the_square_of_the_share_and_stay_inside() -> None:
    """Two far pieces, one of half the tissue: four times as rare."""
    tissue = np.zeros((8, 64))
    tissue[3, 10], tissue[3, 50] = 1.0, 0.5
    rng = np.random.default_rng(0)
    drawn = np.array([draw_crop(tissue, cell_px=8, size_px=(512, 64), side_px=32, rng=rng)
                      for _ in range(2000)])
    assert (drawn >= 0).all() and (drawn <= (512 - 32, 64 - 32)).all()
    assert (drawn[:, 0] > 256).mean() == pytest.approx(0.2, abs=0.03)
    assert len(np.unique(drawn[:, 0] % 8)) == 8  # not on the cells' lattice only


def test_without_tissue_any_square_will_do() -> None:
    rng = np.random.default_rng(0)
    drawn = {draw_crop(np.zeros((4, 9)), cell_px=8, size_px=(72, 32), side_px=8, rng=rng)
             for _ in range(40)}
    assert len(drawn) > 20


def test_smaller_images_lie_in_the_middle() -> None:
    tissue = np.random.default_rng(0).random((5, 9))
    for draw in (most_tissue, lambda *a, **k: draw_crop(*a, **k, rng=np.random.default_rng(0))):
        x, y = draw(tissue, cell_px=8, size_px=(70, 35), side_px=50)
        assert 0 <= x <= 20 and y == -7
