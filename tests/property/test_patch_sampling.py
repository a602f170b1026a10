"""Draws of patches: how many, which, how often, for any slide and any wish."""

from __future__ import annotations

from typing import Literal

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.patch_sampling import draw_rows, scale_shares

KIND = st.sampled_from(["random", "intervals", "grid"])


@given(n_rows=st.integers(0, 400), count=st.integers(0, 500), pad=st.booleans(), kind=KIND,
       cells=st.integers(1, 12), seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_draws(n_rows: int, count: int, pad: bool, kind: Literal["random", "intervals", "grid"],
               cells: int, seed: int) -> None:
    coords = np.random.default_rng(seed).integers(-1000, 100_000, (n_rows, 2))
    rows = draw_rows(n_rows, count, rng=np.random.default_rng(seed), pad=pad, kind=kind,
                     coords=coords, cells=cells)
    assert rows.dtype == np.int64 and (np.diff(rows) >= 0).all()
    assert len(rows) == (count if n_rows and (pad or count <= n_rows) else min(n_rows, count))
    counts = np.bincount(rows, minlength=n_rows)
    assert len(counts) == n_rows  # no row that the slide does not have
    if len(rows):
        assert counts.max() - counts.min() <= 1  # each as often as any other


@given(same_psize=st.integers(1, 10_000), ratio=st.floats(1, 1000))
def test_shares(same_psize: int, ratio: float) -> None:
    low, high = scale_shares(same_psize, ratio)
    assert low + high == same_psize and low <= same_psize / ratio < low + 1
