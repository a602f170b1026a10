"""Bags of patches: all for evaluation, drawn for training, anew in each epoch."""

from __future__ import annotations

import multiprocessing
import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.patch_bag_options import DrawOptions
from datasets.patch_bags import Draws, PatchBags
from datasets.patch_sources import open_source
from datasets.patch_store import PatchStore
from datasets.patch_streams import HeldPatches, StreamedPatches
from datasets.table import SlideTable
from tests.feature_inputs import make_inputs
from tests.patch_lmdbs import HIGH, places, store_patches
from tests.unit.test_datasets_bags import table_of
from tests.unit.test_datasets_patch_sources import read_all
from tests.unit.test_wsi_core_patch_lmdb import published
from utils.contracts import Bag
from utils.errors import ItemFailed, Refused
from utils.feeding import Missing, feed
from wsi_core.patch_lmdb_reader import PatchLmdbReader

COUNTS = {"a": 40, "b": 300, "c": 3, "d": 0}


def numbered(count: int, *, low: bool) -> np.ndarray:
    """Patch i is of the colour (i % 256, i // 256, 9 if low); low ones are half as wide."""
    side = 8 if low else 16
    pixels = np.empty((count, side, side, 3), np.uint8)
    index = np.arange(count)
    for channel, value in enumerate((index % 256, index // 256, np.full(count, 9 * low))):
        pixels[..., channel] = value[:, None, None]
    return pixels


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    path = tmp_path_factory.mktemp("bags") / "p.lmdb"
    store_patches(path, {name: numbered(count, low=False) for name, count in COUNTS.items()},
                  level=HIGH, footprint_px=16, finish=False)
    store_patches(path, {name: numbered(count // 4, low=True) for name, count in COUNTS.items()})
    low, high = (open_source(text, flag="--patches", slide_dir=None, slide_ext=".svs")
                 for text in (str(path), f"{path}#{HIGH}"))
    return PatchStore(high=high, low=low, num_workers=2)


def rows_of(bag: Bag, most: int = 64) -> tuple[list[int], list[int]]:
    """Rows of the low and of the high magnification, as the pixels tell them."""
    assert bag.patches is not None
    values = [value for chunk in bag.patches.stream(most) for value in chunk[:, 0, 0].tolist()]
    assert len(values) == len(bag) == len(bag.patches)
    numbers = [(blue == 9, red + 256 * green) for red, green, blue in values]
    assert numbers == sorted(numbers, key=lambda number: not number[0])  # low patches come first
    return ([row for low, row in numbers if low], [row for low, row in numbers if not low])


def only_high(store: PatchStore) -> PatchStore:
    return PatchStore(high=store.high, num_workers=2)


# ---------------------------------------------------------------------------- evaluation

def test_evaluation_streams_all_patches_of_the_high_magnification(store: PatchStore) -> None:
    bags = PatchBags(table_of("a", "b"), store, same_psize=8).subset(["a", "b"])
    assert bags.slide_ids == ("a", "b") and len(bags) == 2
    assert bags.labels.tolist() == [0, 1]
    bag = bags[1]
    assert bag.slide_id == "b" and bag.case_id == "case_b" and bag.label == 1
    assert isinstance(bag.patches, StreamedPatches)
    assert list(map(len, bag.patches.stream(128))) == [128, 128, 44]
    assert rows_of(bag) == rows_of(bag) == ([], list(range(300)))
    assert bag.features.shape == (300, 0) and bag.features.dtype == torch.float32
    assert bag.coords is not None
    assert np.array_equal(bag.coords, places(300, step_px_l0=16))
    assert len(bags[:]) == 2 and bag.to("cpu").patches is bag.patches


def test_evaluation_at_both_scales_has_the_low_one_first(store: PatchStore) -> None:
    both = PatchStore(high=store.high, low=store.low, test_scales="both")
    bag = PatchBags(table_of("a"), both)[0]
    assert rows_of(bag) == (list(range(10)), list(range(40)))
    assert bag.patches is not None
    assert list(map(len, bag.patches.stream(16))) == [10, 16, 16, 8]
    assert bag.coords is not None
    assert bag.coords.tolist() == [*places(10, step_px_l0=32).tolist(),
                                   *places(40, step_px_l0=16).tolist()]


def test_targets_of_other_tasks(store: PatchStore) -> None:
    table = SlideTable(("a",), ("x",), np.array([0]), ("s",), task_type="regression",
                       targets=np.array([[1.5]]), target_names=("v",))
    bag = PatchBags(table, store)[0]
    assert bag.target == (1.5,) and bag.label is None


# ---------------------------------------------------------------------------- training

def test_training_draws_the_shares_of_both_scales(store: PatchStore) -> None:
    bags = PatchBags(table_of("a", "b"), store, same_psize=32, mul_scale_ratio=4.0).training(
        ["a", "b"])
    for bag in bags:
        assert isinstance(bag.patches, HeldPatches)
        low, high = rows_of(bag)
        assert (len(low), len(high)) == (8, 24) == (len(set(low)), len(set(high)))
        assert bag.coords is not None and bag.coords.tolist() == [
            *places(100, step_px_l0=32)[low].tolist(), *places(300, step_px_l0=16)[high].tolist()]
        assert [tuple(chunk.shape) for chunk in bag.patches.stream(100)] == [
            (8, 8, 8, 3), (24, 16, 16, 3)]


def test_draws_belong_to_seed_epoch_slide_and_turn(store: PatchStore) -> None:
    bags = PatchBags(table_of("a", "b"), only_high(store), same_psize=16)
    train = bags.training(["a", "b"])
    twice = {0: [0], 1: [0, 1]}
    train.begin_epoch(seed=1, epoch=0, turns=twice)
    first, again = rows_of(train[1]), rows_of(train[1])
    assert first != again  # a slide that comes twice in an epoch
    train.begin_epoch(seed=1, epoch=1, turns=twice)
    assert rows_of(train[1]) not in (first, again)
    train.begin_epoch(seed=1, epoch=0, turns=twice)
    train[0]  # another slide before it changes nothing
    assert [rows_of(train[1]), rows_of(train[1])] == [first, again]
    train.begin_epoch(seed=2, epoch=0, turns=twice)
    assert rows_of(train[1]) not in (first, again)
    fresh = bags.training(["b"])
    fresh.begin_epoch(seed=1, epoch=0, turns={0: [1]})  # another process reads it the first time
    assert rows_of(fresh[0]) == again


def test_a_slide_draws_what_it_has_always_drawn(store: PatchStore) -> None:
    """The figures are of the time when each process counted its own readings of a slide."""
    train = PatchBags(table_of("a", "b"), only_high(store), same_psize=6).training(["a", "b"])
    train.begin_epoch(seed=1, epoch=2, turns={0: [0, 1], 1: [0]})
    assert [rows_of(train[row])[1] for row in (0, 0, 1)] == [
        [2, 3, 13, 23, 29, 32], [12, 15, 20, 24, 26, 37], [26, 103, 121, 153, 219, 267]]


def test_a_slide_with_few_patches_repeats_them_or_gives_what_it_has(store: PatchStore) -> None:
    for pad, expected in ((True, 16), (False, 3)):
        bags = PatchBags(table_of("c"), only_high(store), same_psize=16, pad_enc_bs=pad)
        rows = rows_of(bags.training(["c"])[0])[1]
        assert len(rows) == expected and set(rows) == {0, 1, 2}


def test_a_slide_without_low_patches_gives_high_ones(store: PatchStore) -> None:
    low, high = rows_of(PatchBags(table_of("c"), store, same_psize=8).training(["c"])[0])
    assert low == [] and len(high) == 8


def test_without_a_number_training_streams_all_of_both_scales(store: PatchStore) -> None:
    bag = PatchBags(table_of("a"), store).training(["a"])[0]
    assert isinstance(bag.patches, StreamedPatches)
    assert rows_of(bag) == (list(range(10)), list(range(40)))


@pytest.mark.parametrize("how", ["intervals", "grid"])
def test_other_ways_to_draw(store: PatchStore, how: str) -> None:
    """``places`` has rows of four: 2 x 2 cells of 2 columns and 37 or 38 rows."""
    options = {"sampling": how, **({"num_group_2d": 2} if how == "grid" else {})}
    bags = PatchBags(table_of("b"), only_high(store), same_psize=60, **options)  # type: ignore[arg-type]
    bag = bags.training(["b"])[0]
    rows = np.array(rows_of(bag)[1])
    if how == "intervals":
        assert (rows // 5).tolist() == list(range(60))
    else:
        assert bag.coords is not None
        cells = (bag.coords[:, 0] >= 32) * 2 + (bag.coords[:, 1] >= 37 * 16)
        assert np.bincount(cells).tolist() == [15] * 4


# ---------------------------------------------------------------------------- flags

def test_names_and_defaults_are_those_of_the_flags() -> None:
    assert {item.name: item.default for item in fields(Draws)} == {
        item.name: item.default for item in fields(DrawOptions)}


@pytest.mark.parametrize(("options", "reason"), [
    ({"sampling": "grid"}, "--sampling has no effect without --same_psize"),
    ({"pad_enc_bs": False}, "--no_pad_enc_bs has no effect without --same_psize"),
    ({"mul_scale_ratio": 4.0}, "--mul_scale_ratio has no effect without --same_psize"),
    ({"same_psize": 8, "num_group_2d": 4}, "--num_group_2d has no .* without --sampling grid"),
    ({"same_psize": 8, "mul_scale_ratio": 9.0}, "none is of --patches_low with .*ratio 9")])
def test_draws_that_do_nothing_are_refused(store: PatchStore, options: dict[str, object],
                                           reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        PatchBags(table_of("a"), store, **options)  # type: ignore[arg-type]


def test_a_ratio_needs_a_second_magnification_and_a_grid_coordinates(
        store: PatchStore, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--mul_scale_ratio has no effect without --patches_low"):
        PatchBags(table_of("a"), only_high(store), same_psize=8, mul_scale_ratio=4.0)
    foreign = PatchStore.open(str(published(tmp_path / "x.lmdb", {"s": 20})))
    with pytest.raises(Refused, match=r"grid needs .*x.lmdb \(ABMILX's layout\) holds no coord"):
        PatchBags(table_of("s"), foreign, same_psize=8, sampling="grid")
    bag = PatchBags(table_of("s"), foreign, same_psize=8).training(["s"])[0]
    assert bag.coords is None and len(bag) == 8
    assert PatchBags(table_of("s"), foreign)[0].coords is None


# ---------------------------------------------------------------------------- failures, processes

def test_a_bad_slide_costs_itself_only(store: PatchStore) -> None:
    bags = PatchBags(table_of("a", "d", "gone", "c"), store, same_psize=8)
    with pytest.raises(ItemFailed, match="d: no patches"):
        bags[1]
    problems = bags.verify()
    assert list(problems) == ["d", "gone"] and "no slide 'gone'" in problems["gone"]
    train = bags.training(bags.slide_ids)
    found = list(feed(train, range(4), device=torch.device("cpu")))
    assert [isinstance(item, Missing) for item in found] == [False, True, True, False]
    assert list(train.verify()) == ["d", "gone"]


def test_verify_reads_one_patch_a_slide_and_changes_no_draw(store: PatchStore,
                                                            monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
    train = PatchBags(table_of("a", "b"), store, same_psize=8).training(["a", "b"])
    train.begin_epoch(seed=0, epoch=0, turns={0: [0]})
    expected = rows_of(train[0])
    train.begin_epoch(seed=0, epoch=0, turns={0: [0]})
    read: list[int] = []
    original = PatchLmdbReader.encoded

    def counted(self: PatchLmdbReader, index: int) -> bytes:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(PatchLmdbReader, "encoded", counted)
    assert train.verify() == {} and len(read) == 4  # two magnifications
    read.clear()
    assert train.subset(["a", "b"]).verify() == {} and len(read) == 2
    assert rows_of(train[0]) == expected


def _rows(bags: PatchBags) -> tuple[list[int], list[int]]:
    return rows_of(bags[0])


def test_bags_travel_to_other_processes(store: PatchStore) -> None:
    train = PatchBags(table_of("b"), store, same_psize=16).training(["b"])
    train.begin_epoch(seed=3, epoch=5, turns={0: [0]})
    again = pickle.loads(pickle.dumps(train))  # noqa: S301
    with multiprocessing.get_context("fork").Pool(1) as pool:
        drawn = pool.apply(_rows, (train,))
    assert drawn == rows_of(again[0]) == rows_of(train[0])


def test_slides_read_directly(tmp_path: Path) -> None:
    """Drawn or streamed, pixels are those of the slide at the patch's place."""
    inputs = make_inputs(tmp_path, (20, 0, 13))
    store = PatchStore.open(str(inputs.patches_root), data_slide_dir=inputs.slides,
                            slide_ext=".tif", num_workers=2)
    check = store.check([f"slide_{number}" for number in range(3)])
    bags = PatchBags(table_of(*check.usable), store, same_psize=6, sampling="grid")
    expected = torch.from_numpy(read_all(store.high, "slide_2"))
    bag = bags[1]
    assert bag.patches is not None and bag.coords is not None
    assert torch.equal(torch.cat(list(bag.patches.stream(5))), expected)
    drawn = bags.training(["slide_2"])[0]
    assert drawn.patches is not None and drawn.coords is not None
    rows = [bag.coords.tolist().index(place) for place in drawn.coords.tolist()]
    assert torch.equal(next(iter(drawn.patches.stream(6))), expected[rows])
    assert bags.verify() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pixels_are_pinned_when_asked(store: PatchStore) -> None:
    bags = PatchBags(table_of("a"), store, pin=True, same_psize=8)
    for bag in (bags[0], bags.training(["a"])[0]):
        assert bag.patches is not None
        assert all(chunk.is_pinned() for chunk in bag.patches.stream(16))
