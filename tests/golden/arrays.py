"""Arrays of the golden files against ours (golden/README.md, section 1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def assert_values(found: torch.Tensor, golden: dict[str, Any], *, tolerance: float) -> None:
    """Size (the originals drop axes of 1), stored values, and both sums over the whole array."""
    flat = found.double().flatten().numpy()
    assert flat.size == np.prod(golden["shape"])
    stored = golden.get("values", golden.get("first"))
    np.testing.assert_allclose(flat[: len(stored)], stored, atol=tolerance)
    assert flat.sum() == pytest.approx(golden["sum"], abs=tolerance * flat.size)
    assert np.abs(flat).sum() == pytest.approx(golden["abs_sum"], abs=tolerance * flat.size)
