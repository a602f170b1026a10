"""Feature extraction of many slides in supervised processes that go on where they stopped.

One child process a device loads the encoders and works through its share of the slides. A child
that dies (out of memory, a crash in a C library) is started again; what it had finished stays,
the slides it had in hand are then tried alone, and only one that kills its process again fails.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets.feature_files import h5_path, inspect_features, needed_bytes, write_features
from datasets.patches import BadTiles, EncodedSlide, PatchEncoder, SlidePatches, encode_slides
from datasets.slide_copies import SlideCopies
from utils.errors import ItemFailed, Refused, SlideError
from utils.locks import Claim, claim, holder, lock_path
from utils.parallel import available_cpus, describe_os_error, run_items
from utils.report import Row, Status
from utils.storage import State, free_bytes
from wsi_core.coords import Descent
from wsi_core.layouts import Layout
from wsi_core.slide_files import Stamp, fingerprint, stamp

MAX_LISTED = 5  # coordinates of unreadable patches in a reason
TASK_PATCHES = 50_000  # of a task on a cluster: minutes of work, against seconds to load an encoder
LEAST_TASKS = 16  # on a cluster, where there are so many slides


@dataclass(frozen=True, kw_only=True)
class Work:
    """One slide (or a finer level of it) under one encoder, and what its features carry.

    encoder: its name where there are several, "" for the only one
    coords_path: the coordinates file; needed by the layouts trident and atlaspatch
    """

    patches: SlidePatches
    feat_dir: Path
    parameters: dict[str, Any]
    mpp_um: float | None
    footprint_px_l0: tuple[int, int]
    descent: Descent | None = None
    encoder: str = ""
    layout: Layout = "clam"
    coords_path: Path | None = None

    @property
    def slide_id(self) -> str:
        """The slide's id, the name of its files."""
        return self.patches.slide_id

    @property
    def name(self) -> str:
        """Slide, level and encoder, as in reports."""
        return labelled(self.patches.name, self.encoder)

    @property
    def path(self) -> Path:
        """Where the features go."""
        return h5_path(self.feat_dir, self.slide_id, layout=self.layout,
                       encoder=str(self.parameters["encoder"]["name"]))

    def needed_bytes(self, dim: int) -> int:
        """Disk space that ``dim`` features a patch take."""
        return needed_bytes(len(self.patches), dim, layout=self.layout,
                            storage_dtype=self.parameters.get("storage_dtype", "float32"))


def labelled(item: str, encoder: str) -> str:
    """``slide``, or ``slide (encoder)`` where there are several."""
    return f"{item} ({encoder})" if encoder else item


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What holds for every slide of a run; travels to the child processes.

    load: by the name of the encoder: called with ``device=``, gives it or raises Refused
    redo: also when the features are there already
    workers: reading threads a child; None = 2 on a CPU, up to 8 on a GPU
    deadline_s: seconds that a thread may spend reading one slide; None = any
    """

    load: Mapping[str, Callable[..., PatchEncoder]]
    batch_size: int
    workers: int | None
    bad_tiles: BadTiles
    redo: bool
    deadline_s: float | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Shard:
    """Works for one child process and the device it uses; those of a slide are together."""

    works: tuple[Work, ...]
    device: str


def share_out(works: Sequence[Work], devices: Sequence[str]) -> list[Shard]:
    """A shard a device with about equal numbers of patches; the order of slides is kept."""
    slides = list(_by_slide(works).values())
    sizes = [sum(len(work.patches) for work in group) for group in slides]
    shares: list[list[int]] = [[] for _ in devices]
    loads = [0] * len(devices)
    for index in sorted(range(len(slides)), key=lambda i: -sizes[i]):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += sizes[index] + 1
    return [Shard(tuple(work for index in sorted(share) for work in slides[index]), device)
            for share, device in zip(shares, devices, strict=True) if share]


def _by_slide(works: Sequence[Work]) -> dict[str, list[Work]]:
    """The works of each slide and level: the encoders that its pixels are read for."""
    slides: dict[str, list[Work]] = {}
    for work in works:
        slides.setdefault(work.patches.name, []).append(work)
    return slides


def cluster_tasks(works: Sequence[Work]) -> int:
    """Into how many shards to cut the work for a cluster."""
    slides, patches = len(_by_slide(works)), sum(len(work.patches) for work in works)
    return max(1, min(slides, max(LEAST_TASKS, patches // TASK_PATCHES)))


def extract(shards: Sequence[Shard], extraction: Extraction, *, scheduler: str | None = None
            ) -> Iterator[Row]:
    """Encode all slides of all shards in child processes; one row a slide and encoder.

    scheduler: address of a Dask scheduler whose workers run the children.
    Slides that another process had in hand are looked at again at the end: it may have died.
    Raises Refused when an encoder cannot be loaded (nothing has been done then).
    """
    works = {work.name: (work, shard.device) for shard in shards for work in shard.works}
    free: dict[str, list[Work]] = {}
    held = []
    for row in _extract(shards, extraction, scheduler):
        if row.status is Status.BUSY:
            held.append(row)
        else:
            yield row
    for row in held:
        work, device = works[row.item]
        with claim(work.path) as mine:
            is_free = bool(mine)
        if not is_free:
            yield row
        elif not extraction.redo and _finished(work, extraction):
            yield _row(work, Status.SKIPPED)
        else:
            free.setdefault(device, []).append(work)
    again = [Shard(tuple(group), device) for device, group in free.items()]
    yield from _extract(again, extraction, scheduler)


def _extract(shards: Sequence[Shard], extraction: Extraction, scheduler: str | None
             ) -> Iterator[Row]:
    waiting = list(shards)
    while waiting:
        batch, waiting = waiting, []
        # shards that follow a crash run one by one: whatever dies, dies alone
        workers = len(batch) if batch == list(shards) else 1
        for outcome in run_items(_extract_shard, batch, workers=workers, scheduler=scheduler,
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
        elif lock_path(work.path).exists():
            suspects.append(work)
        else:
            others.append(work)
    if len(_by_slide(shard.works)) == 1 or not suspects:
        for work in suspects + others:
            rows.append(_row(work, Status.FAILED, error))
            with claim(work.path):
                pass  # takes the dead process's lock over and gives it back
        return rows, []
    again = [Shard(tuple(group), shard.device) for group in _by_slide(suspects).values()]
    return rows, again + ([Shard(tuple(others), shard.device)] if others else [])


def _finished(work: Work, extraction: Extraction) -> bool:
    finding = inspect_features(work.feat_dir, work.slide_id, work.parameters,
                               allow_dropped=extraction.bad_tiles == "drop", layout=work.layout)
    return finding.state is State.DONE and finding.pt_sound


# ---------------------------------------------------------------------------- in the child

@dataclass(frozen=True)
class _ShardResult:
    rows: list[Row]
    refused: str = ""


def _extract_shard(shard: Shard, *, extraction: Extraction) -> _ShardResult:
    names = {work.encoder: None for work in shard.works}
    try:
        encoders = {name: extraction.load[name](device=shard.device) for name in names}
    except Refused as error:
        return _ShardResult([], str(error))
    return _ShardResult(_Child(shard, extraction, encoders).run())


@dataclass(kw_only=True)
class _Held:
    """A slide in hand.

    claims: on the files it will have, released by ``locks`` once none of ``works``, by encoder, is
    left; stamp: how the slide lay on the disk before it was read
    """

    stamp: Stamp | None
    locks: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    claims: dict[Path, Claim] = field(default_factory=dict)
    works: dict[str, Work] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)


class _Child:
    """The work of one child process on its shard."""

    def __init__(self, shard: Shard, extraction: Extraction,
                 encoders: Mapping[str, PatchEncoder]) -> None:
        self._works = shard.works
        self._todo = extraction
        self._encoders = encoders
        self._held: dict[str, _Held] = {}
        self._rows: list[Row] = []

    def run(self) -> list[Row]:
        """Claim, read, encode, write; one row a work."""
        from tqdm import tqdm

        todo = self._todo
        on_cpu = all(one.device.type == "cpu" for one in self._encoders.values())
        workers = todo.workers or (2 if on_cpu else min(8, available_cpus()))
        total = sum(len(work.patches) for work in self._works)
        uses = Counter(group[0].patches.slide_path for group in _by_slide(self._works).values())
        with SlideCopies(todo.cache_dir, uses, deadline_s=todo.deadline_s) as self._copies:
            try:
                with tqdm(total=total, unit="patch", smoothing=0.05, disable=None) as bar:
                    for done in encode_slides(
                            self._claimed(), encoders=self._encoders, workers=workers,
                            batch_size=todo.batch_size, bad_tiles=todo.bad_tiles,
                            deadline_s=todo.deadline_s, fetch=self._copies.fetch,
                            progress=bar.update):
                        self._settle(done)
            finally:
                for held in self._held.values():
                    held.locks.close()
        for name, encoder in self._encoders.items():
            if again := getattr(encoder, "overflowed", 0):
                print(f"warning: {name or 'the encoder'}: {again} patches overflowed and were "
                      "computed again in fp32", file=sys.stderr)
        return self._rows

    def _claimed(self) -> Iterator[SlidePatches]:
        """The slides nobody else works on, each locked until its files are written."""
        for name, works in _by_slide(self._works).items():
            held = _Held(stamp=_stamp(works[0]))
            for work in works:
                if (row := self._take(work, held)) is None:
                    held.works[work.encoder] = work
                else:
                    self._rows.append(row)
            if held.works:
                self._held[name] = held
                yield replace(works[0].patches, encoders=tuple(held.works))
            else:
                self._let_go(held, works[0])

    def _take(self, work: Work, held: _Held) -> Row | None:
        """None: it is ours to do; else what became of it."""
        if work.path not in held.claims:  # AtlasPatch's file is that of several encoders
            held.claims[work.path] = held.locks.enter_context(claim(work.path))
        if not held.claims[work.path]:
            return _row(work, Status.BUSY, f"{holder(work.path)} works on it")
        if not self._todo.redo and work.path.exists() and _finished(work, self._todo):
            return _row(work, Status.SKIPPED)  # by another process, since the plan was made
        if (need := work.needed_bytes(self._encoders[work.encoder].dim)) > free_bytes(
                work.feat_dir):
            return _row(work, Status.FAILED, f"no space in {work.feat_dir} (needs "
                        f"{need / 1e6:.0f} MB): free some and run again")
        return None

    def _settle(self, done: EncodedSlide) -> None:
        held = self._held[done.patches.name]
        work = held.works.pop(done.encoder)
        try:
            row = _commit(work, done, held)
        except ItemFailed as error:
            row = _row(work, Status.FAILED, str(error))
        except OSError as error:
            row = _row(work, Status.FAILED, describe_os_error(error))
        self._rows.append(replace(row, seconds=time.monotonic() - held.start))
        if not held.works:
            self._let_go(self._held.pop(done.patches.name), work)

    def _let_go(self, held: _Held, work: Work) -> None:
        held.locks.close()
        self._copies.done(work.patches.slide_path)


def _stamp(work: Work) -> Stamp | None:
    """None for a slide that is not there: opening it says so."""
    with contextlib.suppress(SlideError):
        return stamp(work.patches.slide_path)
    return None


def _commit(work: Work, done: EncodedSlide, held: _Held) -> Row:
    if done.error:
        raise SlideError(done.error)
    path = work.patches.slide_path
    if stamp(path) != held.stamp or fingerprint(path) != work.parameters["slide"]:
        raise SlideError(f"{path}: was replaced while it was read: run the same command again")
    held.claims[work.path].confirm()
    write_features(work.feat_dir, done, parameters=work.parameters, mpp_um=work.mpp_um,
                   footprint_px_l0=work.footprint_px_l0, descent=work.descent,
                   layout=work.layout, coords_path=work.coords_path)
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
    return Row(item=work.name, status=status, reason=reason,
               numbers={"n_patches": len(work.patches) - dropped, "n_dropped": dropped})
