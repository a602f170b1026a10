"""Images that are damaged, half written, mixed up or gone: each costs its own slide, one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.image_bags import ImageBags
from datasets.image_store import ImageStore
from datasets.table import SlideTable
from tests.slide_images import noise_image, store_image
from utils.errors import ItemFailed, Refused
from utils.feeding import Missing, feed
from wsi_core.slide_images import image_path, map_path, record_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate("abc"):
        store_image(tmp_path, name, noise_image(600, 500, seed=index))
    return tmp_path


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tiff": (lambda folder: image_path(folder, "b").unlink(), "b.tif or b_tissue.png .* is mis"),
    "half a tiff": (lambda folder: cut(image_path(folder, "b")), "not what b.json tells of"),
    "another tiff": (lambda folder: store_image(folder, "b", noise_image(90, 90)) and shutil.copy(
        image_path(folder, "a"), image_path(folder, "b")), "--slide_images again"),
    "no map": (lambda folder: map_path(folder, "b").unlink(), "b_tissue.png in .* is missing"),
    "half a record": (lambda folder: cut(record_path(folder, "b")), "b.json is not readable json"),
    "no record": (lambda folder: record_path(folder, "b").write_text("[1]"), "b.json"),
    "another schema": (lambda folder: change(record_path(folder, "b"), schema=99), "schema 99"),
    "an odd scale": (lambda folder: change(record_path(folder, "b"), mpp_um=0), "make no sense"),
    "renamed": (lambda folder: change(record_path(folder, "b"), slide_id="x"),
                "b.json is of the slide 'x'")}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_that_shows_up_front_costs_one_slide(folder: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(folder)
    found = ImageStore.open(slide_images=folder).check(["a", "b", "c"])
    assert found.usable == ("a", "c") and list(found.failures) == ["b"]
    with pytest.raises(ItemFailed, match=message) as caught:
        ImageStore.open(slide_images=folder).open_image("b")
    assert str(caught.value) == found.failures["b"] and "\n" not in found.failures["b"]


def test_a_half_written_image_is_none(folder: Path) -> None:
    """The record comes last, so without one there is no image, whatever else lies there."""
    record_path(folder, "b").unlink()
    with pytest.raises(Refused, match=r"1 of 3 slides have no image: 'b'; there is no .*b.json"):
        ImageStore.open(slide_images=folder).check(["a", "b", "c"])


@pytest.mark.parametrize("damaged", ["tiles", "header", "map", "gone"])
def test_damage_that_shows_in_reading_costs_one_bag(folder: Path, damaged: str) -> None:
    """Sizes are right, contents are not: slides before and after are read as ever."""
    store = ImageStore.open(slide_images=folder, num_workers=2)
    assert store.check(["a", "b", "c"]).usable == ("a", "b", "c")
    path = (map_path if damaged == "map" else image_path)(folder, "b")
    data = bytearray(path.read_bytes())
    if damaged == "gone":
        path.unlink()
    else:
        where = {"tiles": slice(2000, 500_000), "header": slice(0, 999), "map": slice(8, 99)}
        data[where[damaged]] = bytes(len(data[where[damaged]]))
        path.write_bytes(bytes(data))
    bags = ImageBags(SlideTable(tuple("abc"), tuple("abc"), np.array([0, 1, 0]), ("no", "yes")),
                     store, image_augment=True).training("abc")
    assert list(bags.verify()) == ["b"]
    bags.begin_epoch(seed=0, epoch=0, turns={0: [0], 1: [0], 2: [0]})
    fed = list(feed(bags, [0, 1, 2], device=torch.device("cpu")))
    assert [type(one) is Missing for one in fed] == [False, True, False]
    assert isinstance(fed[1], Missing) and fed[1].slide_id == "b" and "b" in fed[1].reason
    for bag in (fed[0], fed[2]):
        assert not isinstance(bag, Missing) and bag.image is not None
        assert (bag.image.read(0, 0, *bag.image.size_px) < 250).any()


def test_an_image_that_breaks_while_it_is_used_names_its_slide(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are read long after the bag: a network drive may be gone by then."""
    store = ImageStore.open(slide_images=folder)
    bag = ImageBags(SlideTable(("a",), ("a",), np.array([0]), ("no", "yes")), store).subset("a")[0]
    assert bag.image is not None
    bag.image.read(0, 0, 9, 9)

    def unplugged(self: object, *window: int) -> np.ndarray:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("wsi_core.slide_images.WrittenImage.read", unplugged)
    with pytest.raises(ItemFailed, match="^a: its image cannot be read: Input/output error"):
        bag.image.read(0, 0, 9, 9)
