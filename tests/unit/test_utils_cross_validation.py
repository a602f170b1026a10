"""Folds side by side: what a failure costs. (The work on one fold: tests/cli/test_main.py.)"""

from __future__ import annotations

import errno

import pytest

from utils.cross_validation import run_folds
from utils.distributed import Group
from utils.engine import FitFailed
from utils.errors import BrokenFile, ItemFailed


def test_in_a_group_only_a_shared_failure_costs_just_the_fold() -> None:
    def work(fold: int, *, error: Exception) -> int:
        if fold == 1:
            raise error
        return fold

    def run(error: Exception) -> list[tuple[int | None, str | None]]:
        return [(one.result, one.error) for one in run_folds(
            work, [0, 1, 2], workers=1, group=Group(rank=0, size=2), arguments={"error": error})]

    assert run(FitFailed("diverged")) == [(0, None), (None, "diverged"), (2, None)]
    with pytest.raises(ItemFailed, match="fold 1: no space left"):
        run(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(BrokenFile):  # this process alone met it: the others wait elsewhere
        run(BrokenFile("damaged"))
