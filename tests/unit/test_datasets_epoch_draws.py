"""What bags draw from: one generator for each seed, epoch, slide and turn."""

from __future__ import annotations

import pickle

from datasets.epoch_draws import EpochDraws

SLIDES = ("a", "b")


def drawn(draws: EpochDraws, *slide_ids: str) -> list[int]:
    return [int(draws.generator(slide_id).integers(2**62)) for slide_id in slide_ids]


def begun(seed: int = 1, epoch: int = 0, **turns: list[int]) -> EpochDraws:
    draws = EpochDraws()
    draws.begin(SLIDES, seed=seed, epoch=epoch,
                turns={SLIDES.index(name): some for name, some in turns.items()})
    return draws


def test_every_part_counts() -> None:
    found = [number for seed in (1, 2) for epoch in (0, 1)
             for number in drawn(begun(seed, epoch, a=[0, 1, 2], b=[0, 1, 2]), *"abbaab")]
    assert len(set(found)) == len(found) == 24


def test_only_these_count_not_who_reads_what_before() -> None:
    one = drawn(begun(a=[0, 1], b=[0]), "a", "b", "a")
    assert drawn(begun(b=[0]), "b") == one[1:2]
    assert drawn(begun(a=[1]), "a") == one[2:]
    assert drawn(begun(a=[1, 0]), "a", "a") == [one[2], one[0]]


def test_a_reading_that_was_not_announced_is_like_the_first() -> None:
    draws = begun(a=[0, 1])
    assert drawn(draws, "a", "a", "a")[::2] == drawn(begun(), "a") * 2
    draws.begin(SLIDES, seed=1, epoch=0, turns={0: [1]})  # nothing is left of what was
    assert drawn(draws, "a") == drawn(begun(a=[1]), "a")


def test_turns_travel_to_other_processes() -> None:
    draws = begun(a=[0, 1])
    drawn(draws, "a")
    again = pickle.loads(pickle.dumps(draws))  # noqa: S301
    assert drawn(again, "a") == drawn(draws, "a") == drawn(begun(a=[1]), "a")
