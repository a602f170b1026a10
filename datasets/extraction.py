"""Feature extraction of many slides in supervised processes that go on where they stopped.

One child process a device loads the encoder and works through its share of the slides. A child
that dies (out of memory, a crash in a C library) is started again; what it had finished stays,
the slides it had in hand are then tried alone, and only one that kills its process again fails.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from datasets.feature_files import h5_path, inspect_features, needed_bytes, write_features
from datasets.patches import BadTiles, EncodedSlide, PatchEncoder, SlidePatches, encode_slides
from utils.errors import Refused, SlideError, Terminated
from utils.locks import claim
from utils.parallel import available_cpus, describe_os_error, run_items
from utils.report import Row, Status
from utils.storage import State, free_bytes
from wsi_core.coords import Descent
from wsi_core.slide import fingerprint

MAX_LISTED = 5  # coordinates of unreadable patches in a reason


@dataclass(frozen=True, kw_only=True)
class Work:
    """One slide (or a finer level of it) to encode: its patches, and what its features carry."""

    patches: SlidePatches
    feat_dir: Path
    parameters: dict[str, Any]
    mpp_um: float | None
    footprint_px_l0: tuple[int, int]
    descent: Descent | None = None

    @property
    def slide_id(self) -> str:
        """The slide's id, the name of its files."""
        return self.patches.slide_id

    @property
    def path(self) -> Path:
        """Where the features go."""
        return h5_path(self.feat_dir, self.slide_id)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What holds for every slide of a run; travels to the child processes.

    load: called with ``device=``, gives the encoder or raises Refused; redo: also when the
    features are there already
    workers: reading threads a child; None = 2 on a CPU, up to 8 on a GPU
    """

    load: Callable[..., PatchEncoder]
    batch_size: int
    workers: int | None
    bad_tiles: BadTiles
    redo: bool


@dataclass(frozen=True)
class Shard:
    """Slides for one child process and the device it uses."""

    works: tuple[Work, ...]
    device: str


def share_out(works: Sequence[Work], devices: Sequence[str]) -> list[Shard]:
    """A shard a device with about equal numbers of patches; the order of slides is kept."""
    shares: list[list[int]] = [[] for _ in devices]
    loads = [0] * len(devices)
    for index in sorted(range(len(works)), key=lambda i: -len(works[i].patches)):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += len(works[index].patches) + 1
    return [Shard(tuple(works[index] for index in sorted(share)), device)
            for share, device in zip(shares, devices, strict=True) if share]


def extract(shards: Sequence[Shard], extraction: Extraction) -> Iterator[Row]:
    """Encode all slides of all shards in child processes; one row a slide.

    Raises Refused when the encoder cannot be loaded (nothing has been done then).
    """
    waiting = list(shards)
    while waiting:
        batch, waiting = waiting, []
        # shards that follow a crash run one by one: whatever dies, dies alone
        workers = len(batch) if batch == list(shards) else 1
        for outcome in run_items(_extract_shard, batch, workers=workers,
                                 arguments={"extraction": extraction}):
            if outcome.result is not None:
                yield from outcome.result.rows
                if outcome.result.refused:
                    raise Refused(outcome.result.refused)
                continue
            rows, again = _after_crash(outcome.item, outcome.error or "", extraction)
            yield from rows
            waiting.extend(again)


def _after_crash(shard: Shard, error: str, extraction: Extraction) -> tuple[list[Row], list[Shard]]:
    """Rows for what is settled now, and shards to try again: suspects alone, then the others."""
    rows, suspects, others = [], [], []
    for work in shard.works:
        if _finished(work, extraction):
            rows.append(_row(work, Status.DONE))
        elif Path(f"{work.path}.lock").exists():
            suspects.append(work)
        else:
            others.append(work)
    if len(shard.works) == 1 or not suspects:
        for work in suspects + others:
            rows.append(_row(work, Status.FAILED, error))
            with claim(work.path):
                pass  # takes the dead process's lock over and gives it back
        return rows, []
    again = [Shard((work,), shard.device) for work in suspects]
    return rows, again + ([Shard(tuple(others), shard.device)] if others else [])


def _finished(work: Work, extraction: Extraction) -> bool:
    finding = inspect_features(work.feat_dir, work.slide_id, work.parameters,
                               allow_dropped=extraction.bad_tiles == "drop")
    return finding.state is State.DONE and finding.pt_sound


# ---------------------------------------------------------------------------- in the child

@dataclass(frozen=True)
class _ShardResult:
    rows: list[Row]
    refused: str = ""


def _extract_shard(shard: Shard, *, extraction: Extraction) -> _ShardResult:
    with _signals_of_a_child():
        try:
            encoder = extraction.load(device=shard.device)
        except Refused as error:
            return _ShardResult([], str(error))
        return _ShardResult(_Child(shard, extraction, encoder).run())


class _Child:
    """The work of one child process on its shard."""

    def __init__(self, shard: Shard, extraction: Extraction, encoder: PatchEncoder) -> None:
        self._works = {work.patches.name: work for work in shard.works}
        self._todo = extraction
        self._encoder = encoder
        self._held: dict[str, tuple[contextlib.ExitStack, float]] = {}
        self._rows: list[Row] = []

    def run(self) -> list[Row]:
        """Claim, read, encode, write; one row a slide."""
        from tqdm import tqdm

        todo = self._todo
        workers = todo.workers or (2 if self._encoder.device.type == "cpu"
                                   else min(8, available_cpus()))
        total = sum(len(work.patches) for work in self._works.values())
        try:
            with tqdm(total=total, unit="patch", smoothing=0.05, disable=None) as bar:
                for done in encode_slides(
                        self._claimed(), encoder=self._encoder, batch_size=todo.batch_size,
                        workers=workers, bad_tiles=todo.bad_tiles, progress=bar.update):
                    self._settle(done)
        finally:
            for held, _ in self._held.values():
                held.close()
        return self._rows

    def _claimed(self) -> Iterator[SlidePatches]:
        """The slides nobody else works on, each locked until its files are written."""
        for name, work in self._works.items():
            held = contextlib.ExitStack()
            if not held.enter_context(claim(work.path)):
                self._rows.append(_row(work, Status.BUSY, "another process works on it"))
            elif not self._todo.redo and work.path.exists() and _finished(work, self._todo):
                held.close()  # by another process, since the plan was made
                self._rows.append(_row(work, Status.SKIPPED))
            elif (need := needed_bytes(len(work.patches), self._encoder.dim)) > free_bytes(
                    work.feat_dir):
                held.close()
                self._rows.append(_row(work, Status.FAILED, f"no space in {work.feat_dir} "
                                       f"(needs {need / 1e6:.0f} MB): free some and run again"))
            else:
                self._held[name] = held, time.monotonic()
                yield work.patches

    def _settle(self, done: EncodedSlide) -> None:
        work = self._works[done.patches.name]
        held, start = self._held.pop(done.patches.name)
        with held:
            try:
                row = self._commit(work, done)
            except SlideError as error:
                row = _row(work, Status.FAILED, str(error))
            except OSError as error:
                row = _row(work, Status.FAILED, describe_os_error(error))
        self._rows.append(Row(item=row.item, status=row.status, reason=row.reason,
                              seconds=time.monotonic() - start, numbers=row.numbers))

    def _commit(self, work: Work, done: EncodedSlide) -> Row:
        if not done.error and fingerprint(work.patches.slide_path) != work.parameters["slide"]:
            raise SlideError(f"{work.patches.slide_path}: was replaced while it was read: run the "
                             "same command again")
        if done.error:
            raise SlideError(done.error)
        write_features(work.feat_dir, done, parameters=work.parameters, mpp_um=work.mpp_um,
                       footprint_px_l0=work.footprint_px_l0, descent=work.descent)
        return _row(work, Status.DONE if len(work.patches) else Status.EMPTY,
                    describe_dropped(done) if len(work.patches) else "no patches",
                    dropped=len(done.unreadable))


def describe_dropped(done: EncodedSlide) -> str:
    """"" or how many patches were left out, and where the first of them lie."""
    if not done.unreadable:
        return ""
    rows = list(done.unreadable)
    places = [str(tuple(done.patches.coords[row].tolist())) for row in rows[:MAX_LISTED]]
    return (f"{len(rows)} unreadable patches left out, at level-0 {', '.join(places)}"
            + (", ..." if len(rows) > MAX_LISTED else ""))


def _row(work: Work, status: Status, reason: str = "", dropped: int = 0) -> Row:
    return Row(item=work.patches.name, status=status, reason=reason,
               numbers={"n_patches": len(work.patches) - dropped, "n_dropped": dropped})


@contextlib.contextmanager
def _signals_of_a_child() -> Iterator[None]:
    """Ctrl-C is the parent's business; its SIGTERM unwinds us, so locks and temporaries go."""

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = (signal.signal(signal.SIGINT, signal.SIG_IGN),
              signal.signal(signal.SIGTERM, on_sigterm))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
