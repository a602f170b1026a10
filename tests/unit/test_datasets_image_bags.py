"""Bags of slide images: one answer in evaluation, another view in every epoch of training."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets import image_bags
from datasets.image_augment import HeldImage, ImageView
from datasets.image_bags import ImageBags
from datasets.image_options import ImageAugmentOptions
from datasets.image_store import ImageStore, StoredImage
from datasets.table import SlideTable
from tests.slide_images import noise_image, store_image
from utils.contracts import Bag, SlideImage
from utils.errors import ItemFailed, Refused
from utils.options import pick
from utils.seeding import turns_of

SIZES = {"a": (900, 500), "b": (500, 900), "small": (150, 100)}
EVERYTHING: dict[str, Any] = {"image_augment": True, "elastic_alpha": 300.0, "elastic_sigma": 50.0}


def table(*slides: str) -> SlideTable:
    return SlideTable(slides, slides, np.arange(len(slides)) % 2, ("no", "yes"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with tissue in one corner: lower right of a, upper right of b."""
    folder = tmp_path_factory.mktemp("images")
    for index, (name, (width, height)) in enumerate(SIZES.items()):
        tissue = np.zeros((-(-height // 64), -(-width // 64)))
        tissue[{"a": np.s_[5:7, 11:13], "b": np.s_[0:2, 5:7]}.get(name, np.s_[:])] = 1
        store_image(folder, name, noise_image(width, height, seed=index), tissue=tissue)
    return folder


def bags_of(folder: Path, size: int, *, whole: bool = False, **options: Any) -> ImageBags:
    store = ImageStore.open(slide_images=folder, image_size=size, whole_images=whole,
                            num_workers=2)
    return ImageBags(table(*SIZES), store, **options)


def image_of(bag: Bag) -> SlideImage:
    assert bag.image is not None
    return bag.image


def pixels(bag: Bag) -> np.ndarray:
    image = image_of(bag)
    found: np.ndarray = image.read(0, 0, *image.size_px).numpy()
    return found


def epoch(bags: ImageBags, number: int = 0, *, seed: int = 1, order: Sequence[int] = (0, 1, 2),
          places: Sequence[int] | None = None) -> list[np.ndarray]:
    """What one process reads in an epoch."""
    places = range(len(order)) if places is None else places
    bags.begin_epoch(seed=seed, epoch=number, turns=turns_of(order, places))
    return [pixels(bags[order[place]]) for place in places]


def same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> list[bool]:
    return [np.array_equal(one, other) for one, other in zip(first, second, strict=True)]


# ---------------------------------------------------------------------------- evaluation

def test_whole_images(folder: Path) -> None:
    for bags in (bags_of(folder, 0), bags_of(folder, 200, whole=True)):
        for index, bag in enumerate(bags.subset(SIZES)):
            assert bag.features.shape == (1, 0) and bag.coords is None and bag.label == index % 2
            assert image_of(bag).size_px == SIZES[bag.slide_id]
            assert (image_of(bag).mpp_um, image_of(bag).colour) == (1.0, None)
            assert np.array_equal(pixels(bag), noise_image(*SIZES[bag.slide_id], seed=index))


def test_evaluation_sees_the_square_with_most_tissue_and_always_the_same(folder: Path) -> None:
    bags = bags_of(folder, 200, **EVERYTHING).subset(SIZES)
    first = epoch(bags, 0)
    assert all(same(first, epoch(bags, 1, seed=5))) and image_of(bags[0]).colour is None
    whole = [noise_image(*size, seed=index) for index, size in enumerate(SIZES.values())]
    assert [one.shape for one in first] == [(200, 200, 3)] * 3
    assert np.array_equal(first[0], whole[0][252:452, 636:836])  # all of it inside
    assert np.array_equal(first[1], whole[1][:200, 252:452])
    framed = np.full((200, 200, 3), 255, np.uint8)
    framed[50:150, 25:175] = whole[2]
    assert np.array_equal(first[2], framed)


# ---------------------------------------------------------------------------- training

def test_training_squares_lie_where_the_tissue_is(folder: Path) -> None:
    """Drawn anew each time; cut from the image as it is when nothing is augmented."""
    bags = bags_of(folder, 200).training(SIZES)
    whole = noise_image(900, 500, seed=0)
    seen = set()
    for number in range(8):
        bags.begin_epoch(seed=0, epoch=number, turns={0: [0]})
        view = image_of(bags[0])
        assert isinstance(view, ImageView) and view.turn is None
        x, y = view.origin_px
        seen.add((x, y))
        assert np.array_equal(view.read(0, 0, 200, 200).numpy(), whole[y:y + 200, x:x + 200])
        assert x + 200 > 11 * 64 and y + 200 > 5 * 64
    assert len(seen) > 5


def test_an_epoch_depends_on_seed_epoch_slide_and_turn_alone(folder: Path) -> None:
    bags = bags_of(folder, 160, **EVERYTHING).training(SIZES)
    first = epoch(bags, 3)
    assert not any(same(first, epoch(bags, 4))) and not any(same(first, epoch(bags, 3, seed=2)))
    assert all(same(first, epoch(bags, 3)))
    backwards = epoch(bags, 3, order=(2, 1, 0))
    assert all(same(first, backwards[::-1]))
    alone = bags_of(folder, 160, **EVERYTHING).training(["b"])
    assert all(same(first[1:2], epoch(alone, 3, order=(0,))))


def test_slides_drawn_several_times_differ_and_two_processes_see_what_one_would(
        folder: Path) -> None:
    order = (1, 1, 0, 1, 0, 2)
    both = bags_of(folder, 160, **EVERYTHING)
    one = epoch(both.training(SIZES), order=order)
    assert not any(same([one[0], one[0], one[1], one[2]], [one[1], one[3], one[3], one[4]]))
    for rank in (0, 1):
        places = range(rank, 6, 2)
        theirs = epoch(both.training(SIZES), order=order, places=places)
        assert all(same(theirs, [one[place] for place in places]))


def test_a_reading_that_fails_takes_its_turn_with_it(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slide's later turns in the epoch are what they would have been."""
    bags = bags_of(folder, 160, **EVERYTHING).training(SIZES)
    expected = epoch(bags, order=(1, 1))[1]
    bags.begin_epoch(seed=1, epoch=0, turns={1: [0, 1]})

    def gone(slide_id: str) -> StoredImage:
        raise ItemFailed("b: gone for a moment")

    with monkeypatch.context() as patch:
        patch.setattr(bags.store, "open_image", gone)
        with pytest.raises(ItemFailed):
            bags[1]
    assert np.array_equal(pixels(bags[1]), expected)


@pytest.mark.parametrize("size", [0, 160])
def test_held_and_lazy_images_have_the_same_pixels(
        folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Whether one is held is a question of memory alone: a quarter of what is free."""
    bags = bags_of(folder, size, **EVERYTHING).training(SIZES)
    kinds, found = [], []
    for free in (2**40, 4 * 3 * 160 * 160, 100):
        monkeypatch.setattr(image_bags, "available_memory_bytes", lambda free=free: free)
        bags.begin_epoch(seed=0, epoch=0, turns={0: [0]})
        bag = bags[0]
        kinds.append(type(image_of(bag)))
        found.append(pixels(bag))
        image = image_of(bag)
        assert np.array_equal(image.read(20, 30, 90, 70).numpy(), found[0][30:100, 20:110])
        assert image.colour is not None and image.mpp_um == 1.0
    assert kinds == [HeldImage, HeldImage if size else ImageView, ImageView]
    assert all(same(found[:1] * 2, found[1:]))


@pytest.mark.parametrize("change", [
    {"max_rotation": 0.0}, {"image_flips": False}, {"colour_jitter": 0.0}, {"elastic_alpha": 0.0},
    {"elastic_alpha": 600.0}, {"elastic_sigma": 100.0}, {"max_rotation": 5.0}])
def test_every_flag_has_an_effect(folder: Path, change: dict[str, Any]) -> None:
    defaults = pick(ImageAugmentOptions, ImageAugmentOptions(image_augment=True))
    views = []
    for options in (defaults, {**defaults, **change}):
        bags = bags_of(folder, 300, **options).training(["a"])
        results = []
        for number in range(4):
            bags.begin_epoch(seed=0, epoch=number, turns={0: [0]})
            results.append((image_of(bags[0]).colour, pixels(bags[0])))
        views.append(results)
    assert any(before[0] != after[0] or not np.array_equal(before[1], after[1])
               for before, after in zip(*views, strict=True))


def test_augmenting_whole_images_keeps_all_of_them(folder: Path) -> None:
    bags = bags_of(folder, 0, image_augment=True, elastic_alpha=0.0).training(["a"])
    bags.begin_epoch(seed=0, epoch=0, turns={0: [0]})
    view = image_of(bags[0])
    assert view.size_px[0] * view.size_px[1] > 900 * 500
    ink = (pixels(bags[0]) < 250).any(axis=2).sum()
    assert ink == pytest.approx(900 * 500, rel=0.01)


@pytest.mark.parametrize(("options", "message"), [
    ({"max_rotation": 10.0}, "--max_rotation has no effect without --image_augment"),
    ({"image_flips": False}, "--no_image_flips has no effect without"),
    ({"elastic_sigma": 9.0}, "--elastic_sigma has no effect without"),
    ({"image_augment": True, "elastic_sigma": 90.0, "elastic_alpha": 0.0},
     "--elastic_sigma has no effect with --elastic_alpha 0"),
    ({"image_augment": True, "elastic_sigma": 9.0}, "folds the image over itself")])
def test_what_does_nothing_or_too_much_is_refused(
        folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        bags_of(folder, 0, **options)


def test_bags_travel_to_other_processes(folder: Path) -> None:
    bags = bags_of(folder, 160, **EVERYTHING).training(SIZES)
    bags.begin_epoch(seed=0, epoch=0, turns={0: [0], 1: [0]})
    pixels(bags[0])
    again = pickle.loads(pickle.dumps(bags))  # noqa: S301
    assert np.array_equal(pixels(again[1]), pixels(bags[1])) and len(again) == 3


def test_sound_images_verify(folder: Path) -> None:
    assert bags_of(folder, 0).verify() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pixels_are_pinned_for_a_gpu(folder: Path) -> None:
    bags = bags_of(folder, 160, **EVERYTHING, pin=True)
    for part in (bags.subset(SIZES), bags.training(SIZES)):
        assert image_of(part[0]).read(1, 2, 50, 60).is_pinned()
