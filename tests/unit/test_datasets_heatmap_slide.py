"""The fine map: in which bags its patches are scored, and what their scores mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets.heatmap_config import HeatmapArguments, PatchingArguments
from datasets.heatmap_files import AttentionMap
from datasets.heatmap_items import HeatmapItem
from datasets.heatmap_scores import Outputs, Scored, Tools
from datasets.heatmap_slide import SlideMaps
from tests.slides import tissue_image, write_pyramid
from wsi_core.presets import HEATMAP_DEFAULTS
from wsi_core.slide import Slide, open_slide

PATCH_PX = 64


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slide]:
    """1024 x 768 with two pieces of tissue."""
    path = tmp_path_factory.mktemp("slides") / "s.tif"
    with open_slide(write_pyramid(path, tissue_image(1024, 768, seed=0))) as found:
        yield found


Answer = Callable[[np.ndarray], np.ndarray]  # (N, 2) coords of a bag -> (N,) attention


def own_place(bag: np.ndarray) -> np.ndarray:
    """Depends on the patch alone."""
    scores: np.ndarray = np.sin(bag[:, 0] / 70.0) + bag[:, 1] / 500.0
    return scores


def equal_shares(bag: np.ndarray) -> np.ndarray:
    """Every patch has the same weight."""
    return np.full(len(bag), -np.log(len(bag)))


class Watched:
    """Tools whose features are the coordinates; notes what was encoded and each bag scored."""

    def __init__(self, answer: Answer, *, in_bags: bool, log_weights: bool = False) -> None:
        self.encoded: list[np.ndarray] = []
        self.bags: list[np.ndarray] = []
        self.answer, self.log_weights = answer, log_weights
        self.tools = Tools(
            encode=self.encode, score=self.score, encoder={"name": "coords"},
            model={"name": f"{answer.__name__}"}, in_bags=in_bags,
            outputs=Outputs(task_type="classification", names=("a", "b")))

    def encode(self, slide_path: Path, coords: np.ndarray, **geometry: Any) -> np.ndarray:
        self.encoded.append(coords)
        return coords.astype(np.float32)

    def score(self, slide_id: str, features: np.ndarray, children: Any = ()) -> Scored:
        self.bags.append(features.astype(np.int64))
        return Scored(prediction=np.array([0.4, 0.6]), log_weights=self.log_weights,
                      attention=self.answer(features.astype(np.float64))[None])


def maps_of(slide: Slide, folder: Path, watched: Watched, *, overlap: float = 0.5,
            roi: tuple[int, int, int, int] | None = None) -> SlideMaps:
    segmentation = replace(HEATMAP_DEFAULTS, a_t=0.1, a_h=0.01)
    item = HeatmapItem(slide_id="s", slide_path=slide.path, label="x", roi_l0=roi,
                       segmentation=segmentation)
    folder.mkdir(exist_ok=True)
    return SlideMaps(item, slide, folder=folder, tools=watched.tools,
                     patching=PatchingArguments(patch_size=PATCH_PX, overlap=overlap),
                     heatmap=HeatmapArguments())


def both(maps: SlideMaps) -> tuple[AttentionMap, AttentionMap]:
    coarse, fine = maps.coarse, maps.fine
    assert coarse is not None and fine is not None
    return coarse, fine


def scores_at(found: AttentionMap) -> dict[tuple[int, ...], float]:
    return dict(zip(map(tuple, found.coords.tolist()), found.scores.tolist(), strict=True))


def overlaps(bag: np.ndarray) -> bool:
    near = np.abs(bag[:, None] - bag[None]).max(axis=2) < PATCH_PX
    return bool((near.sum(axis=1) > 1).any())


@pytest.mark.parametrize("overlap", [0.5, 0.4, 0.75])
def test_bags_are_shifted_copies_of_the_coarse_grid(
    slide: Slide, tmp_path: Path, overlap: float
) -> None:
    """As dense as that, without overlap (also where the step is no divisor), in the same order."""
    watched = Watched(own_place, in_bags=True)
    coarse, fine = both(maps_of(slide, tmp_path / "m", watched, overlap=overlap))
    first, *bags = watched.bags
    assert np.array_equal(first, coarse.coords)
    steps = int(np.ceil(1 / (1 - overlap)))
    assert len(bags) in (steps**2 - 1, steps**2)  # the unshifted one may be known already
    assert not any(overlaps(bag) for bag in bags)
    assert all(0.5 < len(bag) / len(coarse.coords) < 1.6 for bag in bags)
    scored = {tuple(place) for bag in watched.bags for place in bag.tolist()}
    assert {tuple(place) for place in fine.coords.tolist()} <= scored
    for bag in bags:  # contour after contour, columns from left to right, each from top to bottom
        back = np.flatnonzero(np.diff(bag[:, 0]) < 0)
        assert len(back) < 2
        same = np.diff(bag[:, 0]) == 0
        assert (np.diff(bag[:, 1])[same] > 0).all()


def test_coarse_places_are_neither_encoded_nor_scored_again(slide: Slide, tmp_path: Path) -> None:
    watched = Watched(equal_shares, in_bags=True)  # raw: other bags give other scores
    coarse, fine = both(maps_of(slide, tmp_path / "m", watched))
    known, found = scores_at(coarse), scores_at(fine)
    shared = known.keys() & found.keys()
    assert len(shared) > 5 and all(found[place] == known[place] for place in shared)
    encoded = {tuple(place) for coords in watched.encoded[1:] for place in coords.tolist()}
    assert encoded == found.keys() - known.keys()


@pytest.mark.parametrize("roi", [None, (400, 250, 800, 560)])
def test_log_weights_of_larger_and_smaller_bags_are_comparable(
    slide: Slide, tmp_path: Path, roi: tuple[int, int, int, int] | None
) -> None:
    """Where every patch weighs the same, the fine map has one value, that of the coarse map."""
    watched = Watched(equal_shares, in_bags=True, log_weights=True)
    coarse, fine = both(maps_of(slide, tmp_path / "m", watched, roi=roi))
    assert len({len(bag) for bag in watched.bags}) > 1
    np.testing.assert_allclose(fine.scores, coarse.scores[0], atol=1e-6)


@pytest.mark.parametrize("roi", [None, (400, 250, 800, 560)])
def test_both_ways_agree_where_attention_is_the_patchs_own(
    slide: Slide, tmp_path: Path, roi: tuple[int, int, int, int] | None
) -> None:
    found = []
    for in_bags in (False, True):
        _, fine = both(maps_of(slide, tmp_path / str(in_bags), Watched(own_place, in_bags=in_bags),
                               roi=roi))
        found.append(fine)
    one, other = found
    assert np.array_equal(one.coords, other.coords) and np.array_equal(one.scores, other.scores)
    assert (one.parameters["scored"], other.parameters["scored"]) == ("one by one", "in bags")


def test_a_region_is_scored_among_the_coarse_patches_outside(slide: Slide, tmp_path: Path) -> None:
    region = (400, 250, 800, 560)
    watched = Watched(own_place, in_bags=True)
    coarse, fine = both(maps_of(slide, tmp_path / "m", watched, roi=region))
    first, *bags = watched.bags

    def in_region(coords: np.ndarray) -> np.ndarray:
        return np.asarray(((coords >= region[:2]) & (coords < region[2:])).all(axis=1))

    around = {tuple(place) for place in first[~in_region(first)].tolist()}
    assert around and len(bags) == 4  # none coincides: the fine grid starts at the region
    for bag in bags:
        assert {tuple(place) for place in bag[~in_region(bag)].tolist()} == around
        assert not overlaps(bag[in_region(bag)]) and in_region(bag).any()
    assert in_region(fine.coords).all() and len(coarse.coords) == len(first)


def test_the_way_of_scoring_is_among_the_parameters(slide: Slide, tmp_path: Path) -> None:
    """A map of the other way is not reused; one of the same way is."""
    folder = tmp_path / "m"
    both(maps_of(slide, folder, Watched(own_place, in_bags=False)))
    other = Watched(own_place, in_bags=True)
    both(maps_of(slide, folder, other))
    assert len(other.bags) >= 3  # the coarse map was kept
    again = Watched(own_place, in_bags=True)
    both(maps_of(slide, folder, again))
    assert not again.bags and not again.encoded
