"""The random numbers of bags that are drawn anew in each epoch of training."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from utils.seeding import derive_seed


class EpochDraws:
    """A generator for each reading of a slide, by seed, epoch, slide and turn in the epoch.

    Which slides were read before, and by which process, changes nothing. Pickles.
    """

    def __init__(self) -> None:
        self._seed = 0
        self._turns: dict[str, deque[int]] = {}

    def begin(self, slide_ids: Sequence[str], *, seed: int, epoch: int,
              turns: Mapping[int, Sequence[int]]) -> None:
        """From here on draw for this epoch.

        turns: of indices into ``slide_ids``: for how manieth time (from 0) the slide comes in the
               epoch, at each reading of it to come; any further reading is like the first time
        """
        self._seed = derive_seed(seed, epoch)
        self._turns = {slide_ids[index]: deque(some) for index, some in turns.items()}

    def generator(self, slide_id: str) -> np.random.Generator:
        """What the next reading of the slide draws from."""
        left = self._turns.get(slide_id)
        turn = left.popleft() if left else 0
        key = int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:8])
        return np.random.default_rng(derive_seed(self._seed, key, 1 + turn))
