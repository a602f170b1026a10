"""Curves for TensorBoard; training is never harmed by their absence."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tracker:
    """Takes scalars and does nothing with them."""

    def start(self, first_step: int) -> None:
        """Begin, or go on after an interruption: what was logged from ``first_step`` on is void."""

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Log ``values`` by tag at ``step``; None and NaN are left out."""

    def close(self) -> None:
        """Finish the log."""


class TensorBoardTracker(Tracker):
    """Event files in ``folder``. Missing TensorBoard or no space costs one warning, no training."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def start(self, first_step: int) -> None:
        """Open the event file; events of an earlier run from ``first_step`` on are void."""
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=first_step)
        except (ImportError, OSError) as error:
            self._give_up(error)

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Log finite ``values`` by tag at ``step`` and flush, so that a kill loses nothing."""
        if self._writer is None:
            return
        try:
            for tag, value in values.items():
                if value is not None and math.isfinite(value):
                    self._writer.add_scalar(tag, value, step)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        print(f"warning: no TensorBoard log in {self._folder} ({error}): training goes on",
              file=sys.stderr)
