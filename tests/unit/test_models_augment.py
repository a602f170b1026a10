"""What the encoder sees: windows, flips and shifts of each patch, found again in painted ramps."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.augment import Kind, PatchTransform, draw_windows, sample
from utils.resize import resize_patch

SIDE = 64
KINDS: tuple[Kind, ...] = get_args(Kind)
DRAWN = KINDS[1:]
FLIPPED: tuple[Kind, ...] = ("strong", "strong_v2")
SHIFTS: dict[Kind, float] = {"weak_strong": 100 / 256, "strong_v2": 0.5}


def transform(kind: Kind = "weak", *, img_size: int = 32, crop_scale: float = 0.08,
              **changes: Any) -> PatchTransform:
    """In training mode; values come out as 0..255 unless mean and std are given."""
    made = PatchTransform(img_size=img_size, img_transform=kind, crop_scale=crop_scale,
                          **{"channels": "RGB", "mean": (0.0,) * 3, "std": (1 / 255,) * 3,
                             **changes})
    return made.train()


def seeded(made: PatchTransform, patches: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    found: Tensor = made(patches)
    return found


def ramps(count: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Red says how far right a pixel is, green how far down, in px from the upper left one."""
    patch = torch.full((height, width, 3), 100, dtype=torch.uint8)
    patch[:, :, 0] = torch.arange(width)
    patch[:, :, 1] = torch.arange(height)[:, None]
    return patch.repeat(count, 1, 1, 1)


def noise(count: int, height: int = SIDE, width: int = SIDE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def spans(found: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 2) first and last pixel centre that the results of ``ramps`` show, in x and y."""
    return (torch.stack((found[:, 0, 0, 0], found[:, 1, 0, 0]), dim=1),
            torch.stack((found[:, 0, 0, -1], found[:, 1, -1, 0]), dim=1))


# ---------------------------------------------------------------------------- form

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 13])
def test_any_number_of_patches_keeps_its_form(kind: Kind, count: int, training: bool) -> None:
    patches = noise(count, 40, 56)
    before = patches.clone()
    found = transform(kind).train(training)(patches)
    assert found.shape == (count, 3, 32, 32) and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(found).all()
    assert torch.equal(patches, before)


def test_a_checkpoint_holds_nothing_of_it() -> None:
    assert not transform().state_dict()


def test_half_precision_outside_changes_nothing() -> None:
    plain = seeded(transform("strong_v2"), noise(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seeded(transform("strong_v2"), noise(3)), plain)


def test_patches_that_lie_apart_in_memory_are_the_same_patches() -> None:
    wide = noise(4, SIDE, 2 * SIDE)
    part = wide[:, :, :SIDE]
    assert torch.equal(seeded(transform(), part), seeded(transform(), part.contiguous()))


# ---------------------------------------------------------------------------- evaluation

@pytest.mark.parametrize("height, width, img_size", [(64, 64, 32), (72, 48, 40), (32, 32, 48)])
def test_evaluation_is_pillow_s_resize(height: int, width: int, img_size: int) -> None:
    patches = noise(3, height, width)
    found = transform("strong_v2", img_size=img_size).eval()(patches)
    for image, patch in zip(found, patches.numpy(), strict=True):
        expected = resize_patch(patch, (img_size, img_size)).astype(np.float32)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() < 1.5  # which rounds twice


@pytest.mark.parametrize("training", [True, False])
def test_without_augmentation_a_patch_that_fits_is_only_normalised(training: bool) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    patches = noise(9)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = transform("none", img_size=SIDE, mean=mean, std=std).train(training)(patches)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    expected = (patches.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(found.permute(0, 2, 3, 1).double(), expected, atol=1e-5, rtol=0)


def test_bgr_turns_the_channels_around_before_the_statistics() -> None:
    """Spec 15.6: the first channel is blue, minus the mean of red."""
    patches = noise(2)
    changes: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    found = seeded(transform("strong", channels="BGR", **changes), patches)
    assert torch.equal(found, seeded(transform("strong", **changes), patches.flip(-1)))


# ---------------------------------------------------------------------------- randomness

@pytest.mark.parametrize("kind", DRAWN)
def test_the_same_generator_state_gives_the_same_patches(kind: Kind) -> None:
    made, patches = transform(kind), noise(9)
    first = seeded(made, patches)
    assert not torch.equal(made(patches), first)
    assert torch.equal(seeded(made, patches), first)


@pytest.mark.parametrize("kind", DRAWN)
def test_each_patch_has_its_own_window(kind: Kind) -> None:
    """Not one a quarter of the batch, as the published programs."""
    first, last = spans(seeded(transform(kind), ramps(16)))
    assert len(torch.unique(torch.cat((first, last), dim=1), dim=0)) == 16


@pytest.mark.parametrize("kind", DRAWN)
def test_evaluation_draws_nothing(kind: Kind) -> None:
    made, patches = transform(kind).eval(), noise(3)
    assert torch.equal(seeded(made, patches, 1), seeded(made, patches, 2))


def test_every_kind_is_another_augmentation() -> None:
    found = [seeded(transform(kind), noise(9)) for kind in KINDS]
    for number, one in enumerate(found):
        for other in found[:number]:
            assert (one - other).abs().mean() > 5


# ---------------------------------------------------------------------------- windows

@given(kind=st.sampled_from(DRAWN), seed=st.integers(0, 2**31), level=st.integers(0, 255),
       crop_scale=st.floats(0.001, 1), size=st.tuples(st.integers(17, 70), st.integers(17, 70)))
@settings(max_examples=40, deadline=None)
def test_nothing_comes_in_from_outside(kind: Kind, seed: int, level: int, crop_scale: float,
                                       size: tuple[int, int]) -> None:
    made = transform(kind, crop_scale=crop_scale, img_size=24)
    flat = seeded(made, torch.full((5, *size, 3), level, dtype=torch.uint8), seed)
    assert (flat - level).abs().max() < 0.01
    found = seeded(made, ramps(5, *size), seed)
    for channel, side in ((0, size[1]), (1, size[0])):
        assert found[:, channel].min() > -0.01 and found[:, channel].max() < side - 0.99


@pytest.mark.parametrize("kind", ["weak", "strong"])
@pytest.mark.parametrize("height, width", [(64, 64), (48, 64), (40, 200), (200, 40)])
def test_crops_have_the_area_and_the_aspect_asked_for(height: int, width: int, kind: Kind) -> None:
    torch.manual_seed(3)
    windows = draw_windows(4000, kind=kind, crop_scale=0.2, width_by_height=width / height,
                           device=torch.device("cpu"))
    centres, halves = windows[:, :, 0], windows[:, :, 1].abs()
    assert (centres.abs() + halves).max() <= 1 + 1e-6, "a crop stays within its patch"
    shares = halves.prod(1)
    assert 0.2 <= shares.min() < 0.21 and 0.99 < shares.max() <= 1
    assert abs(float(shares.mean()) - 0.6) < 0.02, "uniform"
    aspects = halves[:, 0] * width / (halves[:, 1] * height)
    small = shares < 0.3  # these fit with any aspect, unless the patch is a strip
    if max(height, width) < 100:
        assert 0.749 < aspects.min() < 0.76 and 1.31 < aspects.max() < 1.334
        assert abs(float(aspects[small].log().mean())) < 0.05
    room = (1 - halves).clamp(min=1e-3)
    assert (centres / room).abs().max() > 0.99
    assert (centres / room).mean(0).abs().max() < 0.05, "anywhere"


def test_a_crop_shows_what_its_window_says() -> None:
    """Pixel centres of a ramp, once nothing is enlarged beyond them."""
    made = transform("weak", crop_scale=0.3)
    first, last = spans(seeded(made, ramps(50)))
    torch.manual_seed(0)
    centres, halves = draw_windows(50, kind="weak", crop_scale=0.3, width_by_height=1,
                                   device=torch.device("cpu")).unbind(2)
    within = halves * (1 - 1 / 32)
    for found, expected in ((first, centres - within), (last, centres + within)):
        assert (found - ((expected + 1) / 2 * SIDE - 0.5).clamp(0, SIDE - 1)).abs().max() < 1.1


def test_crop_scale_1_is_the_plain_resize() -> None:
    smooth = ramps(3)
    found = seeded(transform("weak", crop_scale=1), smooth)
    assert (found - transform("none")(smooth)).abs().max() < 0.3


def test_larger_patches_are_averaged_not_skipped() -> None:
    """A checkerboard is grey from far away; two of three pixels left out would keep it."""
    board = (torch.arange(96)[:, None] + torch.arange(96)) % 2 * 255
    patches = board.to(torch.uint8)[None, :, :, None].repeat(4, 1, 1, 3)
    found = seeded(transform("strong", crop_scale=1), patches)
    assert (found - 127.5).abs().max() < 20
    images = patches.permute(0, 3, 1, 2).float()
    whole = torch.tensor([0.0, 1.0]).repeat(4, 2, 1)
    assert torch.allclose(sample(images, whole, side_px=96), images, atol=0.1)


# ---------------------------------------------------------------------------- flips and shifts

@pytest.mark.parametrize("kind", DRAWN)
def test_flips_come_in_half_of_the_patches_each_way_on_its_own(kind: Kind) -> None:
    torch.manual_seed(5)
    windows = draw_windows(4000, kind=kind, crop_scale=0.08, width_by_height=1,
                           device=torch.device("cpu"))
    flipped = windows[:, :, 1] < 0
    if kind not in FLIPPED:
        assert not flipped.any()
        return
    assert (flipped.float().mean(0) - 0.5).abs().max() < 0.04
    assert abs(float(flipped.all(1).float().mean()) - 0.25) < 0.04
    first, last = spans(seeded(transform("strong"), ramps(200), 5))
    torch.manual_seed(5)
    same = draw_windows(200, kind="strong", crop_scale=0.08, width_by_height=1,
                        device=torch.device("cpu"))
    assert torch.equal(last < first, same[:, :, 1] < 0), "red falls where x is flipped"


@pytest.mark.parametrize("kind", list(SHIFTS))
def test_shifts_reach_as_far_as_published_and_mirror_the_patch(kind: Kind) -> None:
    patches = noise(40)
    made = transform(kind, crop_scale=1, img_size=SIDE)
    found = seeded(made, patches, 2)
    torch.manual_seed(2)
    windows = draw_windows(40, kind=kind, crop_scale=1, width_by_height=1,
                           device=torch.device("cpu"))
    shifts = windows[:, :, 0] / 2  # of the side
    assert 0.9 * SHIFTS[kind] < shifts.abs().max() <= SHIFTS[kind]
    assert torch.unique(shifts.sign(), dim=0).shape[0] == 4, "in all four directions"
    steps = np.arange(SIDE)
    for image, patch, window in zip(found, patches.numpy(), windows.numpy(), strict=True):
        rows, columns = (interpolation((1 + centre) * SIDE / 2 + half * (steps + 0.5 - SIDE / 2))
                         for centre, half in window[::-1])
        for channel in range(3):
            expected = rows @ patch[:, :, channel].astype(float) @ columns.T
            assert np.abs(image[channel].numpy() - expected).max() < 0.1


def interpolation(positions: np.ndarray) -> np.ndarray:
    """(len, SIDE) weights of the pixels of a line that goes on mirrored, positions in px."""
    rows = np.zeros((len(positions), SIDE))
    for row, position in enumerate(positions):
        below = int(np.floor(position - 0.5))
        for pixel, weight in ((below, below + 1.5 - position), (below + 1, position - 0.5 - below)):
            mirrored = -1 - pixel if pixel < 0 else min(pixel, 2 * SIDE - 1 - pixel)
            rows[row, mirrored] += weight
    return rows
