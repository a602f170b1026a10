"""Bags that are drawn anew in each epoch of training, and their random numbers."""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import numpy as np

from datasets.bags import TableBags
from datasets.table import SlideTable
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


class DrawnBags(TableBags):
    """Bags that look different in each epoch of training, and always the same in evaluation."""

    def __init__(self, table: SlideTable) -> None:
        super().__init__(table)
        self._for_training = False
        self._random = EpochDraws()

    def subset(self, slide_ids: Iterable[str]) -> Self:
        """The bags of these slides for evaluation."""
        return self._part(slide_ids, for_training=False)

    def training(self, slide_ids: Iterable[str]) -> Self:
        """The bags of these slides for training."""
        return self._part(slide_ids, for_training=True)

    def _part(self, slide_ids: Iterable[str], *, for_training: bool) -> Self:
        part = copy.copy(self)
        part.table, part._for_training = self.table.subset(slide_ids), for_training
        part._random = EpochDraws()
        return part

    def begin_epoch(self, *, seed: int, epoch: int, turns: Mapping[int, Sequence[int]]) -> None:
        """Draw others from here on: those that belong to this epoch and, where a slide comes
        several times in it, to the turn; see ``utils.seeding.turns_of``."""
        self._random.begin(self.slide_ids, seed=seed, epoch=epoch, turns=turns)
