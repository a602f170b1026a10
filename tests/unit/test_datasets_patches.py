"""Patches of many slides through one encoder: rows, batches, failures."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import datasets.patch_readers
from datasets.patch_readers import CHUNK, CHUNKS_AHEAD
from datasets.patches import (
    EncodedSlide,
    SlidePatches,
    encode_slide,
    encode_slides,
)
from tests.feature_inputs import PATCH_PX, MeanColour, grid_coords
from tests.slides import tissue_image, write_pyramid
from utils.errors import ItemFailed, SlideError
from wsi_core.slide import open_slide


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slides")
    for seed in range(3):
        write_pyramid(root / f"s{seed}.tif", tissue_image(1024, 768, seed=seed))
    return root


def slide(folder: Path, number: int, count: int = 20, **changes: Any) -> SlidePatches:
    given = {"slide_id": f"s{number}", "slide_path": folder / f"s{number}.tif",
             "coords": grid_coords(count), "patch_level": 0, "patch_size": PATCH_PX,
             "output_size": PATCH_PX, **changes}
    return SlidePatches(**given)


def by_hand(patches: SlidePatches) -> np.ndarray:
    with open_slide(patches.slide_path) as opened:
        side = (patches.patch_size, patches.patch_size)
        means = [opened.read_region((int(x), int(y)), patches.patch_level, side,
                                    background=patches.background).mean(axis=(0, 1))
                 for x, y in patches.coords]
    return np.asarray(means, np.float32)


def run(slides: list[SlidePatches], encoder: MeanColour | None = None, **settings: Any
        ) -> dict[str, EncodedSlide]:
    settings = {"batch_size": 16, "workers": 2, **settings}
    done = encode_slides(slides, encoders={"": encoder or MeanColour()}, **settings)
    return {one.patches.slide_id: one for one in done}


class Failing:
    """A slide that cannot read some places."""

    def __init__(self, path: Path, bad: set[tuple[int, int]]) -> None:
        self.slide = open_slide(path)
        self.bad = bad

    def read_region(self, location_l0: tuple[int, int], level: int, size: tuple[int, int],
                    **settings: Any) -> np.ndarray:
        if location_l0 in self.bad:
            raise SlideError(f"{self.slide.path}: damaged tile at {location_l0}")
        return self.slide.read_region(location_l0, level, size, **settings)

    def close(self) -> None:
        self.slide.close()


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[tuple[int, int]]]:
    """File name -> places that cannot be read."""
    bad: dict[str, set[tuple[int, int]]] = {}

    def opened(path: Path, **settings: Any) -> Any:
        return Failing(path, bad.get(path.name, set()))

    monkeypatch.setattr(datasets.patch_readers, "open_slide", opened)
    return bad


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_rows_are_in_the_order_of_the_coordinates(folder: Path, workers: int, batch_size: int
                                                  ) -> None:
    slides = [slide(folder, 0), slide(folder, 1, 33), slide(folder, 2, 5)]
    shuffled = np.random.default_rng(0).permutation(slides[1].coords)
    slides[1] = slide(folder, 1, coords=shuffled)
    done = run(slides, workers=workers, batch_size=batch_size)
    assert set(done) == {"s0", "s1", "s2"}
    for patches in slides:
        result = done[patches.slide_id]
        np.testing.assert_allclose(result.features, by_hand(patches), atol=1e-4)
        assert result.features.dtype == np.float32 and result.error == ""
        np.testing.assert_array_equal(result.rows, np.arange(len(patches)))


def test_batches_run_across_slides(folder: Path) -> None:
    encoder = MeanColour()
    run([slide(folder, 0, 20), slide(folder, 1, 3), slide(folder, 2, 19)], encoder, batch_size=8)
    assert encoder.batches == [8, 8, 8, 8, 8, 2]


def test_progress_counts_every_patch_once(folder: Path) -> None:
    seen: list[int] = []
    run([slide(folder, 0, 20), slide(folder, 1, 3)], progress=seen.append)
    assert sum(seen) == 23


def test_empty_slide_has_no_rows_but_a_width(folder: Path) -> None:
    done = run([slide(folder, 0, 0), slide(folder, 1, 2)])
    assert done["s0"].features.shape == (0, 3) and not done["s0"].error
    assert len(run([slide(folder, 0, 0)])) == 1


def test_levels_sizes_and_background(folder: Path) -> None:
    outside = slide(folder, 0, coords=np.array([[1000, 700]]), background=(255, 255, 255))
    assert run([outside])["s0"].features[0, 1] > run(
        [slide(folder, 0, coords=np.array([[1000, 700]]))])["s0"].features[0, 1]
    half = slide(folder, 0, patch_level=1, patch_size=32, output_size=32)
    np.testing.assert_allclose(run([half])["s0"].features, by_hand(half), atol=1e-4)


def test_custom_downsample_shrinks_before_encoding(folder: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    class Shapes(MeanColour):
        def launch(self, batch: np.ndarray) -> torch.Tensor:
            shapes.append(batch.shape)
            return super().launch(batch)

    run([slide(folder, 0, 4, patch_size=128, output_size=64)], Shapes())
    assert shapes == [(4, 64, 64, 3)]


def test_patches_of_different_sizes_do_not_share_a_batch(folder: Path) -> None:
    encoder = MeanColour()
    done = run([slide(folder, 0, 5), slide(folder, 1, 5, patch_size=32, output_size=32)], encoder)
    assert encoder.batches == [5, 5] and not any(one.error for one in done.values())


def test_a_slide_that_cannot_be_opened_fails_alone(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "s1.tif"
    broken.write_bytes(b"this is no slide")
    slides = [slide(folder, 0, 200 // 8), slide(folder, 1, slide_path=broken), slide(folder, 2)]
    done = run(slides)
    assert "s1.tif" in done["s1"].error
    for number in (0, 2):
        np.testing.assert_allclose(done[f"s{number}"].features, by_hand(slides[number]), atol=1e-4)


def test_an_unreadable_patch_fails_its_slide_alone(
        folder: Path, damage: dict[str, set[tuple[int, int]]]) -> None:
    slides = [slide(folder, number, 20) for number in range(3)]
    damage["s1.tif"] = {tuple(map(int, slides[1].coords[11]))}  # type: ignore[arg-type]
    done = run(slides)
    assert "damaged tile at" in done["s1"].error
    np.testing.assert_allclose(done["s2"].features, by_hand(slides[2]), atol=1e-4)


def test_drop_leaves_the_patch_out_of_both(folder: Path,
                                           damage: dict[str, set[tuple[int, int]]]) -> None:
    patches = slide(folder, 1, 20)
    damage["s1.tif"] = {tuple(map(int, patches.coords[row])) for row in (3, 11)}  # type: ignore
    done = run([patches], bad_tiles="drop")["s1"]
    kept = np.setdiff1d(np.arange(20), [3, 11])
    np.testing.assert_array_equal(done.rows, kept)
    np.testing.assert_allclose(done.features, by_hand(patches)[kept], atol=1e-4)
    assert list(done.unreadable) == [3, 11] and "damaged" in done.unreadable[3]


def test_drop_does_not_go_on_without_most_of_a_slide(
        folder: Path, damage: dict[str, set[tuple[int, int]]]) -> None:
    patches = slide(folder, 1, 20)
    damage["s1.tif"] = {tuple(map(int, xy)) for xy in patches.coords[:11]}  # type: ignore
    assert "11 of 20 patches cannot be read" in run([patches], bad_tiles="drop")["s1"].error


def test_slides_are_taken_only_as_they_are_needed(folder: Path) -> None:
    taken: list[int] = []

    def slides() -> Iterator[SlidePatches]:
        for number in range(50):
            taken.append(number)
            yield slide(folder, number % 3, CHUNK, slide_id=f"n{number}")

    done = encode_slides(slides(), encoders={"": MeanColour()}, batch_size=CHUNK, workers=1)
    next(done)
    assert len(taken) <= CHUNKS_AHEAD + 3
    done.close()


def test_an_encoder_that_fails_costs_the_slides_of_its_batch(folder: Path) -> None:
    class Once(MeanColour):
        def launch(self, batch: np.ndarray) -> torch.Tensor:
            if not self.batches:
                self.batches.append(0)
                raise RuntimeError("out of memory")
            return super().launch(batch)

    done = run([slide(folder, 0, 8), slide(folder, 1, 8)], Once(), batch_size=8)
    assert "smaller batch_size" in done["s0"].error and not done["s1"].error


def test_features_that_are_not_finite_are_an_error(folder: Path) -> None:
    class Overflow(MeanColour):
        def launch(self, batch: np.ndarray) -> torch.Tensor:
            features = super().launch(batch)
            features[3, 1] = torch.inf
            return features

    done = run([slide(folder, 0, 8)], Overflow())
    assert "not finite" in done["s0"].error and "--precision" in done["s0"].error


def test_encode_slide_gives_the_matrix_or_raises(folder: Path, tmp_path: Path) -> None:
    patches = slide(folder, 0)
    settings: dict[str, Any] = {"patch_level": 0, "patch_size": PATCH_PX, "output_size": PATCH_PX,
                                "encoder": MeanColour(), "batch_size": 6}
    features = encode_slide(patches.slide_path, patches.coords, **settings)
    np.testing.assert_allclose(features, by_hand(patches), atol=1e-4)
    with pytest.raises(SlideError, match="no such file"):
        encode_slide(tmp_path / "none.tif", patches.coords, **settings)


# ---------------------------------------------------------------------------- several encoders

class Watched:
    """Opens slides and notes every place that is read, and how often a slide was opened."""

    def __init__(self) -> None:
        self.places: list[tuple[str, int, int]] = []
        self.opened: list[Path] = []

    def __call__(self, path: Path, **settings: Any) -> Any:
        self.opened.append(path)
        slide, noted = open_slide(path, **settings), self.places
        original = slide.read_region

        def read(location_l0: tuple[int, int], *rest: Any, **more: Any) -> np.ndarray:
            noted.append((path.name, *location_l0))
            return original(location_l0, *rest, **more)

        slide.read_region = read  # type: ignore[method-assign]
        return slide


def together(slides: list[SlidePatches], encoders: dict[str, MeanColour], **settings: Any
             ) -> dict[tuple[str, str], EncodedSlide]:
    settings = {"batch_size": 16, "workers": 2, **settings}
    return {(one.patches.slide_id, one.encoder): one
            for one in encode_slides(slides, encoders=encoders, **settings)}


def test_several_encoders_read_every_patch_once(folder: Path, monkeypatch: pytest.MonkeyPatch
                                                ) -> None:
    watched = Watched()
    monkeypatch.setattr(datasets.patch_readers, "open_slide", watched)
    slides = [slide(folder, number, 20) for number in range(3)]
    encoders = {"whole": MeanColour(), "small": MeanColour(16)}
    done = together(slides, encoders)
    assert len(watched.places) == len(set(watched.places)) == 60
    assert encoders["whole"].batches == encoders["small"].batches == [16, 16, 16, 12]
    monkeypatch.undo()
    for name, side in (("whole", 0), ("small", 16)):
        alone = run(slides, MeanColour(side))
        for patches in slides:
            np.testing.assert_array_equal(done[patches.slide_id, name].features,
                                          alone[patches.slide_id].features)
    assert (done["s0", "whole"].features != done["s0", "small"].features).any()


def test_a_slide_may_want_some_encoders_only(folder: Path) -> None:
    encoders = {"a": MeanColour(), "b": MeanColour()}
    done = together([slide(folder, 0, 9, encoders=("b",)), slide(folder, 1, 5)], encoders)
    assert set(done) == {("s0", "b"), ("s1", "a"), ("s1", "b")}
    assert sum(encoders["a"].batches) == 5 and sum(encoders["b"].batches) == 14


def test_an_encoder_that_fails_costs_itself_alone(folder: Path) -> None:
    class Broken(MeanColour):
        def launch(self, batch: np.ndarray) -> torch.Tensor:
            raise RuntimeError("CUDA fault")

    class Picky(MeanColour):
        def prepare(self, patch: np.ndarray) -> np.ndarray:
            raise ItemFailed("preprocess failed")

    slides = [slide(folder, number, 8) for number in range(2)]
    done = together(slides, {"good": MeanColour(), "broken": Broken(), "picky": Picky()})
    assert all("CUDA fault" in done[f"s{number}", "broken"].error for number in range(2))
    assert done["s1", "picky"].error == "s1: preprocess failed"
    for patches in slides:
        np.testing.assert_allclose(done[patches.slide_id, "good"].features, by_hand(patches),
                                   atol=1e-4)


# ---------------------------------------------------------------------------- deadlines, handles

class Slow:
    """A slide whose reads of some files wait: for a moment, or until the test is over."""

    def __init__(self, path: Path, wait: Any) -> None:
        self.slide, self.wait = open_slide(path), wait

    def read_region(self, *given: Any, **settings: Any) -> np.ndarray:
        self.wait()
        return self.slide.read_region(*given, **settings)

    def close(self) -> None:
        self.slide.close()


@pytest.mark.parametrize("kind", ["hangs", "slow"])
def test_a_read_without_end_costs_its_slide(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                            capfd: pytest.CaptureFixture[str], kind: str) -> None:
    """A16: the slide fails, where its thread hangs is told, the others go on beside it."""
    over = threading.Event()

    def wait() -> None:
        if kind == "hangs":
            over.wait(60)
        else:
            time.sleep(0.06)

    def opened(path: Path, **settings: Any) -> Any:
        return Slow(path, wait) if path.name == "s1.tif" else open_slide(path, **settings)

    monkeypatch.setattr(datasets.patch_readers, "open_slide", opened)
    slides = [slide(folder, 0, 70), slide(folder, 1, 70), slide(folder, 2, 70)]
    start = time.monotonic()
    try:
        done = run(slides, workers=2, deadline_s=0.8)
    finally:
        over.set()
    assert time.monotonic() - start < 30
    assert done["s1"].error.startswith("timeout: reading ")
    assert "s1.tif took longer than 0.8 s" in done["s1"].error
    for number in (0, 2):
        np.testing.assert_allclose(done[f"s{number}"].features, by_hand(slides[number]), atol=1e-4)
    assert ("in wait" in capfd.readouterr().err) == (kind == "hangs")


def test_handles_and_memory_do_not_grow_with_the_slides(folder: Path, tmp_path: Path) -> None:
    """A17"""
    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    def slides() -> Iterator[SlidePatches]:
        for number in range(400):
            path = tmp_path / f"n{number}.tif"
            path.symlink_to(folder / "s0.tif")
            yield slide(folder, 0, 2, slide_id=path.stem, slide_path=path)

    before, seen, alive = handles(), [], []
    done = encode_slides(slides(), encoders={"": MeanColour()}, batch_size=4, workers=2)
    for number, one in enumerate(done):
        alive.append(weakref.ref(one.features.base if one.features.base is not None
                                 else one.features))
        if number % 100 == 50:
            del one
            seen.append((handles(), sum(ref() is not None for ref in alive)))
    assert len(alive) == 400 and max(count for count, _ in seen) <= before + 4
    assert max(kept for _, kept in seen) < 20
