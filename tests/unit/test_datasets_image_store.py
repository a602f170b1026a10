"""Images of a cohort checked before any work, and their pixels: prepared ones and slides."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, current_thread
from typing import Any

import numpy as np
import pytest
import torch

from datasets.image_sources import open_direct
from datasets.image_store import ImageStore
from tests.slide_images import noise_image, store_image
from tests.slides import write_pyramid
from utils.errors import ItemFailed, Refused
from wsi_core.packing import PackedSlide
from wsi_core.slide_images import image_path, map_path, record_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "slide_images"
    for index, (name, width) in enumerate({"a": 300, "a-1": 500, "z": 90}.items()):
        store_image(folder, name, noise_image(width, 200, seed=index), quality=None)
    return folder


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of 0.5 um per px, and one that does not say."""
    folder = tmp_path_factory.mktemp("slides")
    for name, mpp in (("s", 0.5), ("t", 0.5), ("unknown", None)):
        image = np.full((1500, 2000, 3), 243, np.uint8)
        image[200:700, 300:900] = np.random.default_rng(0).integers(90, 200, (500, 600, 3))
        image[900:1300, 1500:1900] = (170, 80, 150)
        write_pyramid(folder / f"{name}.tif", image, mpp=mpp)
    (folder / "damaged.tif").write_bytes(b"II*\0" + bytes(99))
    return folder


def direct(folder: Path, **other: Any) -> ImageStore:
    return ImageStore.open(**{"image_mpp": 2.0, "data_slide_dir": folder, "slide_ext": "tif",
                              **other})


# ---------------------------------------------------------------------------- up front

def test_a_sound_cohort(folder: Path) -> None:
    store = ImageStore.open(slide_images=folder, image_size=256)
    found = store.check(["a-1", "a"], table_ids=["a", "a-1", "x"])
    assert found.usable == ("a-1", "a") and dict(found.rows) == {"a-1": 1, "a": 1}
    assert (found.width, found.encoder, found.n_bytes) == (0, None, 0)
    assert found.empty == found.missing == () and not found.failures
    assert found.notes == (f"1 slides in {folder} are not in the table: 'z'",)
    assert store.facts() == {
        "kind": "slide images", "mpp_um": [1.0], "image_size": 256, "whole_images": False,
        "channels": "RGB", "parameters": [{"image_mpp": 1.0, "quality": None}]}
    assert store.root == folder
    files = [path(folder, "a").stat() for path in (record_path, image_path, map_path)]
    assert store.stamps("a") == [(file.st_size, file.st_mtime_ns) for file in files]
    assert "1 images are smaller than --image_size 256" in store.check(["z"]).notes[0]


def test_missing_images_are_refused_or_left_out(folder: Path) -> None:
    store = ImageStore.open(slide_images=folder)
    with pytest.raises(Refused, match=r"2 of 3 slides have no image: 'b', '-1'; there is no "
                                      r".*b.json: run create_patches_fp.py --slide_images.*--all"):
        store.check(["b", "a", "-1"])
    found = store.check(["b", "a"], allow_missing=True)
    assert found.usable == ("a",) and found.missing == ("b",)
    assert found.left_out() == {"b": "no image (--allow_missing)"}
    assert "1 slides without an image are left out: 'b'" in found.notes[0]
    with pytest.raises(Refused, match="no slide has a usable image in .*: all are missing"):
        store.check(["b"], allow_missing=True)


def test_images_of_different_scales_are_refused(folder: Path) -> None:
    store = ImageStore.open(slide_images=folder)
    store_image(folder, "near", noise_image(), mpp_um=1.03, quality=80)
    assert any("made in 2 ways" in note for note in store.check(["a", "near"]).notes)
    assert store.facts()["mpp_um"] == [1.0, 1.03]
    store_image(folder, "far", noise_image(), mpp_um=1.2)
    with pytest.raises(Refused, match="different scales: a has 1 um per px, far 1.2: make them"):
        store.check(["a", "far"])


def test_the_scale_is_that_asked_for(folder: Path) -> None:
    """A level within 1 % of it is taken as it is: 0.994 um are no other images than 1.003."""
    store = ImageStore.open(slide_images=folder)
    for name, mpp_um in (("fine", 0.994), ("coarse", 1.003)):
        store_image(folder, name, noise_image(), mpp_um=mpp_um, image_mpp=1.0)
        store.check([name])
        assert store.facts()["mpp_um"] == [1.0]


@pytest.mark.parametrize(("given", "message"), [
    ({}, "--image_mpp is missing: give --slide_images, or --image_mpp with --data_slide_dir"),
    ({"image_mpp": 1.0}, "--data_slide_dir is missing"),
    ({"data_slide_dir": Path()}, "--image_mpp is missing"),
    ({"image_mpp": 1.0, "data_slide_dir": Path("/nowhere")}, "there is no folder /nowhere"),
    ({"slide_images": Path("."), "image_mpp": 1.0}, "--image_mpp has no effect: the images in"),
    ({"slide_images": Path("."), "data_slide_dir": Path()}, "--data_slide_dir has no effect"),
    ({"slide_images": Path("."), "slide_ext": ".tif"}, "--slide_ext has no effect"),
    ({"slide_images": Path("."), "whole_images": True}, "--whole_images has no effect"),
    ({"slide_images": Path("/nowhere")},
     "holds no images of slides: make them with create_patches_fp.py"),
    ({"slide_images": Path("..")}, "did you mean .*slide_images?")])
def test_flags_that_do_not_go_together(
        folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(Refused, match=message):
        ImageStore.open(**given)


# ---------------------------------------------------------------------------- pixels

def test_prepared_images_are_read_exactly(folder: Path) -> None:
    store = ImageStore.open(slide_images=folder)
    image = store.open_image("a-1")
    pixels = noise_image(500, 200, seed=1)
    assert (image.size_px, image.mpp_um, image.colour) == ((500, 200), 1.0, None)
    window = image.read(120, 30, 77, 140)
    assert window.dtype == torch.uint8 and np.array_equal(window.numpy(), pixels[30:170, 120:197])
    assert image.tissue.shape == (4, 8) and image.cell_px == 64 and (image.tissue == 1).all()
    assert image.record.to_level0(np.array([[10, 20]])).tolist() == [[1020, 540]]


def test_tissue_maps_are_shares(folder: Path) -> None:
    shares = np.linspace(0, 1, 4 * 5).reshape(4, 5)
    store_image(folder, "a", noise_image(), tissue=shares)
    image = ImageStore.open(slide_images=folder).open_image("a")
    assert image.tissue.dtype == np.float32
    np.testing.assert_allclose(image.tissue, shares, atol=0.5 / 255 + 1e-6)


def test_slides_are_packed_as_they_are_read(slides: Path) -> None:
    store = direct(slides)
    found = store.check(["s", "t"])
    assert found.usable == ("s", "t") and found.notes[0].startswith("2 slides in")
    assert store.facts()["kind"] == "slides" and store.facts()["mpp_um"] == [2.0]
    assert store.facts()["parameters"] == [{"image_mpp": 2.0}]
    image = store.open_image("s")
    with open_direct(slides / "s.tif", image_mpp=2.0) as packed:
        assert image.record == packed.record
        assert np.array_equal(image.read(5, 7, 90, 60).numpy(), packed.read(5, 7, 90, 60))
    assert 0 < image.tissue.mean() < 1 and image.tissue.max() == 1
    assert store.stamps("s") == [((slides / "s.tif").stat().st_size,
                                  (slides / "s.tif").stat().st_mtime_ns)]


def test_tissue_is_looked_for_once(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again in other threads, or when the image is opened again."""
    looked = []

    def look(path: Path, **how: Any) -> PackedSlide:
        looked.append(path)
        return open_direct(path, **how)

    monkeypatch.setattr("datasets.image_sources.open_direct", look)
    store = direct(slides, num_workers=3)
    first = store.open_image("s").read(0, 0, 40, 40)
    with ThreadPoolExecutor(3) as pool:
        for window in pool.map(lambda _: store.open_image("s").read(0, 0, 40, 40), range(6)):
            assert torch.equal(window, first)
    assert len(looked) == 1


def test_few_images_stay_open_and_each_thread_has_its_own(folder: Path) -> None:
    for name in "bcde":
        store_image(folder, name, noise_image())
    store = ImageStore.open(slide_images=folder)
    images = [store.open_image(name) for name in "abcde"]
    for image in images * 2:
        image.read(0, 0, 5, 5)
    assert list(store._own.opened) == ["c", "d", "e"]
    mine = store.picture("e", images[-1].layout)
    assert mine is store.picture("e", images[-1].layout)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(store.picture, "e", images[-1].layout).result() is not mine


def test_a_store_travels_to_other_processes(folder: Path, slides: Path) -> None:
    for store, name in ((ImageStore.open(slide_images=folder, image_size=64), "a"),
                        (direct(slides), "s")):
        before = store.open_image(name).read(3, 4, 50, 40)
        list(store.map(lambda item: None, [(0, 0)]))
        again = pickle.loads(pickle.dumps(store))  # noqa: S301
        assert torch.equal(again.open_image(name).read(3, 4, 50, 40), before)
        assert (again.image_size, again.root) == (store.image_size, store.root)


def test_slides_that_cannot_be_packed_are_listed(slides: Path) -> None:
    found = direct(slides).check(["s", "unknown", "damaged"])
    assert found.usable == ("s",) and set(found.failures) == {"unknown", "damaged"}
    assert "pixel size unknown" in found.failures["unknown"]
    assert "create_patches_fp.py --slide_images, which can be told" in found.failures["unknown"]
    with pytest.raises(Refused, match="no slide has a usable image .*too coarse"):
        direct(slides, image_mpp=0.2).check(["s"])
    with pytest.raises(Refused, match="'x'; there is no .*x.tif: copy it there"):
        direct(slides).check(["s", "x"])


def test_slides_and_images_replaced_after_their_layout_was_read(
        folder: Path, slides: Path, tmp_path: Path) -> None:
    """Else the pieces of one would be cut at the places of the other."""
    mine = tmp_path / "mine"
    mine.mkdir()
    path = mine / "s.tif"
    path.write_bytes((slides / "s.tif").read_bytes())
    image = direct(mine).open_image("s")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ItemFailed, match=r"s\.tif: was replaced while it was used"):
        image.read(0, 0, 9, 9)
    image = ImageStore.open(slide_images=folder).open_image("a")
    store_image(folder, "a", noise_image(400, 300))
    with pytest.raises(ItemFailed, match="^a: its image in .* was made anew while it was used"):
        image.read(0, 0, 9, 9)


def test_a_slide_without_tissue_fails_when_it_is_opened(slides: Path) -> None:
    write_pyramid(slides / "glass.tif", np.full((800, 900, 3), 243, np.uint8))
    with pytest.raises(ItemFailed, match="glass.tif: has no tissue"):
        direct(slides).open_image("glass")
    (slides / "glass.tif").unlink()


def test_runs_of_work_go_to_as_many_threads_as_were_asked_for(folder: Path) -> None:
    store = ImageStore.open(slide_images=folder, num_workers=3)
    together = Barrier(3, timeout=10)  # breaks unless three threads meet
    done: dict[int, str] = {}

    def work(item: int) -> None:
        if item in (0, 3, 6):
            together.wait()
        done[item] = current_thread().name

    list(store.map(work, range(8)))
    assert sorted(done) == list(range(8))
    assert [len({done[item] for item in run}) for run in ((0, 1, 2), (3, 4, 5), (6, 7))] == [1] * 3
    assert len(set(done.values())) == 3
