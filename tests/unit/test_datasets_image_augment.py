"""Views of images: what is cut, turned, mirrored and bent, exactly where, and reading how much."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets.image_augment import CELL_PX, FRAME_CELLS, Augmentation, ImageView
from utils.errors import ItemFailed, Refused


class Formula:
    """An image of any size whose pixels follow from their place, smoothly in three channels."""

    mpp_um, colour = 0.5, None

    def __init__(self, width: int, height: int) -> None:
        self.size_px = (width, height)
        self.windows: list[tuple[int, int]] = []

    def read(self, x: int, y: int, width: int, height: int) -> torch.Tensor:
        assert min(x, y) >= 0 and x + width <= self.size_px[0] and y + height <= self.size_px[1]
        self.windows.append((width, height))
        across, down = np.meshgrid(np.arange(x, x + width), np.arange(y, y + height))
        return torch.from_numpy(np.rint(value_at(across, down)).astype(np.uint8))


def value_at(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Channels that tell the place: waves of 400 px along x, y and both."""
    waves = np.stack([x, y, x + 2 * y], axis=-1) * (2 * math.pi / 400)
    value: np.ndarray = 120 + 100 * np.sin(waves)
    return value


class Noise:
    """An image in memory, every pixel of which differs."""

    mpp_um, colour = None, None

    def __init__(self, width: int, height: int) -> None:
        self.size_px = (width, height)
        self.pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)

    def read(self, x: int, y: int, width: int, height: int) -> torch.Tensor:
        return torch.from_numpy(self.pixels[y:y + height, x:x + width])


STILL = Augmentation(max_rotation=0, image_flips=False, elastic_alpha=0, colour_jitter=0)


def test_a_plain_view_copies_and_is_white_beyond() -> None:
    image = Noise(700, 900)
    view = ImageView(image=image, size_px=(1000, 600), origin_px=(-100, 500))
    found = view.read(0, 0, 1000, 600).numpy()
    assert (found[:400, 100:800] == image.pixels[500:]).all()
    assert (found[:, :100] == 255).all() and (found[:, 800:] == 255).all()
    assert (found[400:] == 255).all()
    assert (view.read(90, 380, 30, 40).numpy() == found[380:420, 90:120]).all()
    assert view.mpp_um is None and view.colour is None


@pytest.mark.parametrize(("turn", "expected"), [
    ([[0, -1], [1, 0]], lambda pixels: np.rot90(pixels)),
    ([[-1, 0], [0, 1]], lambda pixels: pixels[:, ::-1]),
    ([[1, 0], [0, -1]], lambda pixels: pixels[::-1]),
    ([[-1, 0], [0, -1]], lambda pixels: pixels[::-1, ::-1])])
def test_quarter_turns_and_mirrors_move_pixels_and_change_none(turn, expected) -> None:  # type: ignore[no-untyped-def]
    image = Noise(1200, 1000)
    view = ImageView(image=image, size_px=(700, 700), origin_px=(301, 200),
                     turn=np.array(turn, float))
    assert (view.read(0, 0, 700, 700).numpy() == expected(image.pixels[200:900, 301:1001])).all()


def test_no_change_is_drawn_where_none_is_allowed() -> None:
    view = ImageView(image=Noise(300, 200), size_px=(300, 200))
    still = view.augmented(STILL, np.random.default_rng(0), grow=True)
    assert still == view  # nothing to resample
    mirrored = {view.augmented(replace(STILL, image_flips=True), np.random.default_rng(seed),
                               grow=False).turn is None for seed in range(12)}
    assert mirrored == {True, False}


def test_every_pixel_comes_from_where_the_formula_says() -> None:
    """Turned and bent, at the far end of a view of 16,384 px in an image of 60,000."""
    image = Formula(60_000, 50_000)
    view = ImageView(image=image, size_px=(16_384, 16_384), origin_px=(30_000, 20_000)).augmented(
        Augmentation(), np.random.default_rng(3), grow=False)
    assert view.turn is not None and view.field is not None
    x, y = 15_000, 14_300
    found = view.read(x, y, 700, 300).numpy()
    across, down = np.meshgrid(np.arange(x, x + 700), np.arange(y, y + 300))
    shift = np.stack([_bilinear(view.field[..., axis], across / CELL_PX, down / CELL_PX)
                      for axis in (0, 1)])
    offsets = np.stack([across, down]) + 0.5 + shift - 16_384 / 2
    place = np.einsum("ij,jhw->ihw", view.turn, offsets)
    expected = value_at(place[0] + 30_000 + 8_192 - 0.5, place[1] + 20_000 + 8_192 - 0.5)
    assert np.abs(found - expected).max() < 1.6  # two roundings and interpolation
    assert np.abs(shift).max() > 5


def _bilinear(values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """At fractional places, written out for the test."""
    left, top = x.astype(int), y.astype(int)
    right, below = x - left, y - top
    value: np.ndarray = ((values[top, left] * (1 - right) + values[top, left + 1] * right)
                         * (1 - below) + (values[top + 1, left] * (1 - right)
                                          + values[top + 1, left + 1] * right) * below)
    return value


def test_windows_agree_wherever_they_overlap_and_whoever_reads() -> None:
    image = Noise(1300, 1100)
    view = ImageView(image=image, size_px=(1250, 1190), origin_px=(-20, 30)).augmented(
        Augmentation(), np.random.default_rng(5), grow=False)
    held = view.held()
    assert held.size_px == view.size_px and held.colour == view.colour is not None
    whole = view.read(0, 0, *view.size_px)
    assert torch.equal(held.pixels, whole)
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(3) as pool:
        threaded = replace(view, threads=pool.map)
        for _ in range(8):
            x, y = rng.integers(0, (1249, 1189)).tolist()
            width, height = rng.integers(1, (1251 - x, 1191 - y)).tolist()
            window = whole[y:y + height, x:x + width]
            for one in (view, threaded, held):
                assert torch.equal(one.read(x, y, width, height), window)


def test_the_centre_stays_and_only_what_is_seen_is_read() -> None:
    """Defects 11 and 20: augmenting moves no crop off the tissue, and costs no whole image."""
    image = Formula(40_000, 40_000)
    for seed in range(3):
        image.windows.clear()
        view = ImageView(image=image, size_px=(2048, 2048), origin_px=(9000, 17_000)).augmented(
            replace(Augmentation(), elastic_alpha=0), np.random.default_rng(seed), grow=False)
        pixels = view.read(0, 0, 2048, 2048).numpy()
        middle = value_at(np.array(9000 + 1023.5), np.array(17_000 + 1023.5))
        assert np.abs(pixels[1023:1025, 1023:1025].mean((0, 1)) - middle).max() < 2
        assert sum(width * height for width, height in image.windows) < 2.1 * 2048 * 2048
        assert max(max(window) for window in image.windows) < 512 * 1.5


@pytest.mark.parametrize("seed", range(4))
def test_whole_images_lose_no_corner_when_they_are_turned(seed: int) -> None:
    image = Noise(600, 200)
    image.pixels[:] = 0
    view = ImageView(image=image, size_px=(600, 200)).augmented(
        replace(Augmentation(), elastic_alpha=0), np.random.default_rng(seed), grow=True)
    ink = (255 - view.read(0, 0, *view.size_px).numpy().astype(float)).sum() / 255 / 3
    assert ink == pytest.approx(600 * 200, rel=0.01)


def test_the_deformation_is_smooth_and_fades_to_nothing() -> None:
    how = Augmentation(elastic_alpha=1000, elastic_sigma=150)
    field = how.bend(np.random.default_rng(1), (8192, 6000))
    assert field is not None and field.shape == (12 * 32 + 1, 16 * 32 + 1, 2)
    inside = field[FRAME_CELLS:376 - FRAME_CELLS, FRAME_CELLS:513 - FRAME_CELLS]
    assert inside.std() == pytest.approx(1000 * 2.6 / 150, rel=0.2)  # of smoothed noise
    edge = math.ceil(6000 / CELL_PX)
    assert not field[[0, edge]].any() and not field[edge:].any() and not field[:, [0, 512]].any()
    assert np.abs(np.diff(field, axis=0)).max() < CELL_PX / 2  # nothing folds
    again = how.bend(np.random.default_rng(1), (8192, 6000))
    assert np.array_equal(field, again)  # type: ignore[arg-type]
    small = how.bend(np.random.default_rng(1), (300, 300))
    assert small is not None and np.abs(small).max() > 1  # also where the frame would be all
    assert replace(how, elastic_alpha=0).bend(np.random.default_rng(1), (300, 300)) is None
    fine = replace(how, elastic_alpha=0.2, elastic_sigma=1).bend(np.random.default_rng(1), (90, 90))
    assert fine is not None and 0 < np.abs(fine).max() <= 0.2


def test_a_deformation_that_folds_is_refused() -> None:
    with pytest.raises(Refused, match="--elastic_alpha 1000 with --elastic_sigma 20 folds .*at "
                                      r"most 100"):
        Augmentation(elastic_sigma=20)


def test_turns_and_colours_stay_within_their_limits() -> None:
    how = Augmentation(max_rotation=10, image_flips=False, colour_jitter=0.1)
    rng = np.random.default_rng(0)
    turns = [how.turn(rng) for _ in range(50)]
    angles = np.degrees([math.atan2(turn[1, 0], turn[0, 0]) for turn in turns])
    assert 8 < np.abs(angles).max() <= 10 and angles.min() < 0 < angles.max()
    assert all(np.allclose(turn @ turn.T, np.eye(2)) for turn in turns)
    colours = np.array([how.colour(rng) for _ in range(50)])
    assert (np.abs(colours - (1, 1, 0)) <= 0.1).all()
    assert (np.abs(colours - (1, 1, 0)).max(axis=0) > 0.08).all()  # hue is added to: defect 24
    assert replace(how, colour_jitter=0).colour(rng) is None


def test_what_cannot_be_read_fails_in_any_thread() -> None:
    class Broken(Noise):
        def read(self, x: int, y: int, width: int, height: int) -> torch.Tensor:
            raise ItemFailed("slide a: damaged")

    with ThreadPoolExecutor(2) as pool:
        view = ImageView(image=Broken(900, 900), size_px=(900, 900), threads=pool.map)
        with pytest.raises(ItemFailed, match="slide a"):
            view.read(0, 0, 900, 900)
