"""What a run did: one row an item, one table at the end, one exit code that tells the truth."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import __version__
from utils.errors import EXIT_FAILED, EXIT_OK
from utils.storage import plain, write_json, write_text

if TYPE_CHECKING:
    from utils.parallel import Outcome


class Status(str, Enum):
    """How an item ended."""

    DONE = "done"
    SKIPPED = "already done"
    EMPTY = "empty"  # nothing to do on it, e.g. no tissue: no failure
    FAILED = "failed"
    BUSY = "busy"  # another process holds it


@dataclass(frozen=True, kw_only=True)
class Row:
    """One item of a run. ``numbers`` are further columns, e.g. ``n_patches``."""

    item: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)


def outcome_row(item: str, outcome: Outcome[Any, Row]) -> Row:
    """The row of an item that ``run_items`` worked on: its worker's with the time, or a failure."""
    if outcome.result is not None:
        return replace(outcome.result, seconds=outcome.seconds)
    return Row(item=item, status=Status.FAILED, reason=outcome.error or "",
               seconds=outcome.seconds)


class RunReport:
    """Collects rows, writes ``report_<stage>.csv`` and ``.json``, and knows the exit code."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.rows: list[Row] = []
        self._start = time.monotonic()

    def add(self, row: Row) -> None:
        """Take one row."""
        self.rows.append(row)

    def extend(self, rows: Iterable[Row]) -> None:
        """Take several rows."""
        self.rows.extend(rows)

    @property
    def exit_code(self) -> int:
        """0, or 3 when any item failed."""
        return EXIT_FAILED if any(row.status is Status.FAILED for row in self.rows) else EXIT_OK

    def write(self, folder: Path, *, options: dict[str, Any] | None = None) -> None:
        """Write ``report_<stage>.csv`` (a row an item) and ``.json`` (with options, versions)."""
        import csv
        import io

        columns = list(dict.fromkeys(key for row in self.rows for key in row.numbers))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["item", "status", "reason", "seconds", *columns])
        for row in self.rows:
            writer.writerow([harmless(row.item), row.status.value, harmless(row.reason),
                             f"{row.seconds:.2f}",
                             *(plain(row.numbers.get(column, "")) for column in columns)])
        write_text(folder / f"report_{self.stage}.csv", text.getvalue())
        write_json(folder / f"report_{self.stage}.json", {
            "stage": self.stage, "version": __version__,
            "seconds": round(time.monotonic() - self._start, 2),
            "counts": self.counts(), "options": options or {},
            "items": [{"item": row.item, "status": row.status.value, "reason": row.reason,
                       "seconds": round(row.seconds, 3), **row.numbers} for row in self.rows]})

    def counts(self) -> dict[str, int]:
        """Number of items by status."""
        return dict(Counter(row.status.value for row in self.rows))

    def print_summary(self, folder: Path | None = None) -> None:
        """One line of counts, then every item that is not simply done, with its reason."""
        counts = ", ".join(f"{number} {name}" for name, number in self.counts().items())
        seconds = time.monotonic() - self._start
        where = f"; report: {folder / f'report_{self.stage}.csv'}" if folder else ""
        print(f"{self.stage}: {counts or 'nothing to do'} in {seconds:.1f} s{where}")
        for row in self.rows:
            if row.status in (Status.FAILED, Status.EMPTY, Status.BUSY):
                print(f"  {row.status.value:>7}  {row.item}: {row.reason}")


def harmless(text: str) -> str:
    """Text that a spreadsheet will not run as a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text
