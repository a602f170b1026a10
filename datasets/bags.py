"""Bags for the training loop: features of a table's slides, kept in memory when they fit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import numpy as np

from datasets.features import FeatureStore
from datasets.levels import Children, StoredLevels
from datasets.table import SlideTable
from utils.contracts import Bag
from utils.errors import ItemFailed
from utils.memory import available_memory_bytes

CacheMode = Literal["auto", "ram", "none"]
_MEMORY_SHARE = 0.5  # of what is free now; the rest is for the model and for everybody else


class TableBags(Sequence[Bag]):
    """Bags of the slides of a table, in its order."""

    def __init__(self, table: SlideTable) -> None:
        self.table = table

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Slide ids in order."""
        return self.table.slide_ids

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64 class indices (strata of other task types)."""
        return self.table.labels

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Bag: ...
    @overload
    def __getitem__(self, index: slice) -> list[Bag]: ...

    def __getitem__(self, index: int | slice) -> Bag | list[Bag]:
        """The bag of a row; ``ItemFailed`` (``BrokenFile``) when it cannot be used."""
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return self.read(self.slide_ids[index])

    @abstractmethod
    def read(self, slide_id: str) -> Bag:
        """The bag of a slide of the table; errors as ``self[row]``."""

    def truth_of(self, slide_id: str) -> dict[str, Any]:
        """What the table knows of a slide, as keywords of ``Bag``."""
        row = self.table.row_of[slide_id]
        target = self.table.target_of(row)
        return {"label": int(self.table.labels[row]) if target is None else None,
                "target": target, "case_id": self.table.case_ids[row]}


class BagDataset(TableBags):
    """Bags of features.

    cache: "ram" keeps every bag that was read, "none" reads anew each time, "auto" keeps them when
    all fit in half of the free memory, shared by ``processes`` that do the same (folds, ranks).
    pin: page-locked memory for kept bags, for fast copies to a GPU. ``subset`` shares the cache,
    so one data set over all slides serves every fold.
    level_stores: finer levels, coarse to fine, whose rows are read when a model asks for them, or
    kept as well where all of them fit too ("auto"). children: any other source of finer levels.
    n_bytes, level_bytes: of the coarse features and of all finer ones, when known from a check.
    """

    def __init__(self, table: SlideTable, store: FeatureStore, *, cache: CacheMode = "auto",
                 n_bytes: int | None = None, processes: int = 1, pin: bool = False,
                 embed_dim: int | None = None, level_stores: Sequence[FeatureStore] = (),
                 level_bytes: int | None = None, children: Children | None = None) -> None:
        super().__init__(table)
        self.store = store
        self.embed_dim = embed_dim
        self.pin = pin
        self.keeps = keeps_levels = cache == "ram"
        if cache == "auto":
            budget = _MEMORY_SHARE * available_memory_bytes() / max(1, processes)
            coarse = self._measure(store) if n_bytes is None else n_bytes
            finer = sum(map(self._measure, level_stores)) if level_bytes is None else level_bytes
            self.keeps, keeps_levels = coarse <= budget, coarse + finer <= budget
        self._children = children
        if level_stores:
            self._children = StoredLevels(store, tuple(level_stores), keep=keeps_levels)
        self._kept: dict[str, Bag] = {}

    def __getstate__(self) -> dict[str, object]:
        """What travels to a worker process: everything but the bags kept here."""
        return {**self.__dict__, "_kept": {}}

    def _measure(self, store: FeatureStore) -> int:
        infos = [store.info(slide_id) for slide_id in self.table.slide_ids]
        return sum(4 * info.rows * info.width for info in infos)

    def subset(self, slide_ids: Iterable[str]) -> BagDataset:
        """The bags of these slides, sharing what is kept in memory."""
        part = BagDataset(self.table.subset(slide_ids), self.store, cache="none", pin=self.pin,
                          embed_dim=self.embed_dim, children=self._children)
        part.keeps, part._kept = self.keeps, self._kept
        return part

    def training(self, slide_ids: Iterable[str]) -> BagDataset:
        """The bags as training wants them: the same, where a data set of patches draws anew."""
        return self.subset(slide_ids)

    def verify(self) -> dict[str, str]:
        """Read every bag once (keeping it, if bags are kept); slide -> reason for the bad ones."""
        failures = {}
        for row, slide_id in enumerate(self.slide_ids):
            try:
                self[row]
            except ItemFailed as error:
                failures[slide_id] = str(error)
        return failures

    def read(self, slide_id: str) -> Bag:
        """See ``TableBags``; kept in memory where bags are."""
        bag = self._kept.get(slide_id)
        if bag is None:
            bag = self._read(slide_id)
            if self.keeps:
                self._kept[slide_id] = bag
        return bag

    def _read(self, slide_id: str) -> Bag:
        features, coords = self.store.read(slide_id)
        if len(features) == 0:
            raise ItemFailed(f"{slide_id}: no patches, so there is nothing to learn from")
        if self.embed_dim is not None and features.shape[1] != self.embed_dim:
            raise ItemFailed(f"{slide_id}: features have width {features.shape[1]}, expected "
                             f"{self.embed_dim}")
        children = self._children(slide_id, coords, len(features)) if self._children else ()
        return Bag(slide_id=slide_id, features=features.pin_memory() if self.pin else features,
                   coords=coords, children=children, **self.truth_of(slide_id))
