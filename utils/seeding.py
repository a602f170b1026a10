"""Every random number of a run comes from one seed.

An epoch is seeded anew from (seed, epoch, rank). So the order of bags and the dropout masks of
epoch 7 do not depend on how epochs 0 to 6 were reached: a resumed run needs no saved generator
state to give the numbers of an unbroken one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices), and make cuDNN deterministic."""
    import random

    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (models and libraries draw from the global one)
    torch.manual_seed(seed)  # seeds every CUDA device as well
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def derive_seed(seed: int, *parts: int) -> int:
    """A well-mixed non-negative 63-bit seed for e.g. (epoch, rank) of a run seeded ``seed``."""
    return int(np.random.SeedSequence([seed, *parts]).generate_state(1, np.uint64)[0] >> 1)


def class_balanced_weights(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """(N,) N / n_class of each bag: CLAM's ``--weighted_sample``. Absent classes play no part."""
    labels = np.asarray(labels, dtype=np.int64)
    weights: np.ndarray = len(labels) / np.bincount(labels)[labels]
    return weights


def epoch_order(
    count: int, *, seed: int, epoch: int, weights: np.ndarray | None = None
) -> list[int]:
    """Bags of one epoch: a permutation, or ``count`` weighted draws with replacement.

    weights: (count,) positive numbers, need not sum to one.
    """
    import torch

    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    if weights is None:
        return torch.randperm(count, generator=generator).tolist()
    chances = torch.as_tensor(weights, dtype=torch.float64)
    return torch.multinomial(chances, count, replacement=True, generator=generator).tolist()


def turns_of(order: Sequence[int], places: Iterable[int]) -> dict[int, list[int]]:
    """For how manieth time (from 0) the bags at some places of an epoch's order come in all of it.

    The turns of each bag are in the order of ``places``. So a slide that two processes draw gives
    each of them what it would give one process that reads the whole order.
    """
    seen: Counter[int] = Counter()
    every = []
    for index in order:
        every.append(seen[index])
        seen[index] += 1
    turns: defaultdict[int, list[int]] = defaultdict(list)
    for place in places:
        turns[order[place]].append(every[place])
    return dict(turns)
