from __future__ import annotations

import threading

import torch

from tests.training import BagList, make_bag
from utils.contracts import Bag
from utils.feeding import Missing, feed

CPU = torch.device("cpu")


def test_order_is_kept_and_a_broken_bag_is_missing() -> None:
    bags = BagList([make_bag(index) for index in range(5)], broken=["slide_03"])
    items = list(feed(bags, [4, 3, 0, 0], device=CPU))
    assert [item.slide_id for item in items] == ["slide_04", "slide_03", "slide_00", "slide_00"]
    assert [isinstance(item, Missing) for item in items] == [False, True, False, False]
    assert items[1] == Missing("slide_03", "slide_03 is damaged")


def test_the_next_bag_is_read_while_the_caller_works() -> None:
    ahead = threading.Event()

    class Watched(BagList):
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            if index == 1:
                ahead.set()
            return super().__getitem__(index)

    stream = feed(Watched([make_bag(index) for index in range(4)]), range(4), device=CPU)
    next(stream)
    assert ahead.wait(timeout=10)
    stream.close()


def test_a_list_without_ids_names_the_index() -> None:
    class Broken(list):  # type: ignore[type-arg]
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            raise OSError("disk gone")

    items: list[Bag | Missing] = list(feed(Broken([1]), [0], device=CPU))
    assert items == [Missing("bag 0", "disk gone")]
