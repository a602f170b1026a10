from __future__ import annotations

import random

import numpy as np
import torch

from utils.distributed import Group
from utils.seeding import (
    class_balanced_weights,
    derive_seed,
    epoch_order,
    seed_everything,
    turns_of,
)


def test_seed_everything_repeats_all_three_generators() -> None:
    def draw() -> tuple[float, float, float]:
        seed_everything(derive_seed(7, 3))
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    assert draw() == draw()
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic


def test_derived_seeds_differ_by_every_part() -> None:
    assert len({derive_seed(seed, epoch, rank)
                for seed in range(3) for epoch in range(3) for rank in range(3)}) == 27


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    first = epoch_order(50, seed=1, epoch=0)
    assert sorted(first) == list(range(50))
    assert first == epoch_order(50, seed=1, epoch=0)
    assert first != epoch_order(50, seed=1, epoch=1)
    assert first != epoch_order(50, seed=2, epoch=0)


def test_weighted_order_balances_classes_and_an_absent_class_does_no_harm() -> None:
    labels = np.array([0] * 90 + [2] * 10)  # no slide of class 1
    weights = class_balanced_weights(labels)
    assert weights[0] == 100 / 90
    assert weights[-1] == 10
    drawn = [index for epoch in range(50)
             for index in epoch_order(100, seed=1, epoch=epoch, weights=weights)]
    assert len(drawn) == 5000
    assert 0.46 < (labels[drawn] == 2).mean() < 0.54


def test_turns_count_through_the_whole_order_whoever_reads() -> None:
    order = [4, 2, 4, 4, 2, 0, 4]
    assert turns_of(order, range(7)) == {4: [0, 1, 2, 3], 2: [0, 1], 0: [0]}
    assert turns_of(order, [6, 1, 0]) == {4: [3, 0], 2: [0]}  # in the order of reading
    assert turns_of(order, []) == {}


def test_processes_share_one_balanced_draw() -> None:
    """No slide's turn is read twice, none is left out, and each share is balanced too."""
    labels = np.array([0] * 1800 + [1] * 200)
    order = epoch_order(2000, seed=1, epoch=0, weights=class_balanced_weights(labels))
    shares = [Group(rank=rank, size=2).share(range(2000)) for rank in range(2)]
    read = [(index, turn) for share in shares
            for index, turns in turns_of(order, share).items() for turn in turns]
    assert len(set(read)) == 2000
    assert sorted(index for index, _ in read) == sorted(order)
    for share in shares:
        assert 0.46 < labels[[order[place] for place in share]].mean() < 0.54
