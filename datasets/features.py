"""Features on disk: found, checked up front without reading them, read with every check once.

A feature folder holds ``h5_files/<slide>.h5`` (``features`` (N, D), ``coords`` (N, 2)) and
``pt_files/<slide>.pt`` (one (N, D) tensor), ours or CLAM's; the h5 is preferred because it carries
coordinates, the encoder's record and, if ours, a checksum. Or it is one of TRIDENT's, AtlasPatch's
or STAMP's, see feature_layouts.py.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from datasets.feature_layouts import (
    READ_ERRORS,
    FeatureFile,
    encoder_label,
    list_slides,
    locate,
    read_features,
    stored_parameters,
)
from datasets.table import SlideTable, listed
from datasets.tasks import Task
from utils.errors import BrokenFile, ItemFailed, Refused
from utils.storage import canonical, differences, inside, load_torch, safe_id

if TYPE_CHECKING:
    import torch


class SlideInfo(NamedTuple):
    """Shape and origin of a slide's features; ``encoder`` and ``patch`` are None for a foreign
    file, ``located`` says whether there are coordinates, ``made_by`` what is known of the
    encoder's name, as a label."""

    rows: int
    width: int
    encoder: dict[str, Any] | None
    patch: dict[str, Any] | None = None  # level and sizes of the patches
    located: bool = False
    made_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class StoreCheck:
    """What ``FeatureStore.check``, or that of another store, found. Slides keep their order.

    usable: slides to work with; empty: no patches; missing: no file; failures: slide -> reason
    rows: patches of each usable slide; width: D; n_bytes: as float32
    encoder: the record that all share, None when unknown
    notes: one line each for the run's summary
    levels: the same of each finer level, coarse to fine, over the same slides
    kind: what bags are made of
    """

    usable: tuple[str, ...]
    empty: tuple[str, ...]
    missing: tuple[str, ...]
    failures: Mapping[str, str]
    rows: Mapping[str, int]
    width: int
    encoder: dict[str, Any] | None
    n_bytes: int
    notes: tuple[str, ...] = ()
    levels: tuple[StoreCheck, ...] = ()
    kind: Literal["features", "patches", "image"] = "features"

    def left_out(self) -> dict[str, str]:
        """Slides that a run goes on without, by permission or by nature, with the reason."""
        return {**dict.fromkeys(self.empty, "no patches"),
                **dict.fromkeys(self.missing, f"no {self.kind} (--allow_missing)")}


@dataclass
class FeatureStore:
    """A feature folder. ``folders`` sends single slides elsewhere (cohorts kept apart).

    encoder: whose features, where a folder has those of several (TRIDENT, AtlasPatch)
    """

    root: Path
    folders: Mapping[str, Path] = field(default_factory=dict)
    encoder: str | None = None
    _sound: dict[FeatureFile, tuple[int, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def for_task(cls, data_root: Path, task: Task, table: SlideTable, *,
                 encoder: str | None = None) -> FeatureStore:
        """The store of a task: ``data_root/feature_dir``, or one folder for each source.

        Raises ``Refused`` when a folder does not exist or a source has none.
        """
        root = inside(data_root, task.feature_dir)
        folders = {}
        if task.source_dirs:
            sources = table.sources or ("",) * len(table)
            unknown = sorted(set(sources) - set(task.source_dirs))
            if unknown:
                raise Refused(f"source_dirs of task '{task.name}' has no folder for the sources "
                              f"{listed(unknown)} of {task.csv_path}: add them")
            places = {source: inside(data_root, place)
                      for source, place in task.source_dirs.items()}
            folders = {slide_id: places[source]
                       for slide_id, source in zip(table.slide_ids, sources, strict=True)}
        for folder in sorted({*folders.values()} or {root}):
            if not folder.is_dir():
                raise Refused(f"feature folder {folder} does not exist: make it with "
                              "extract_features_fp.py, or correct --data_root_dir")
        return cls(root, folders, encoder)

    def locate(self, slide_id: str) -> FeatureFile:
        """Where the slide's features are, in any layout; ``BrokenFile`` when there are none.

        ``Refused`` when there are those of several encoders, and ``encoder`` names none.
        """
        folder = self.folders.get(slide_id, self.root)
        found = locate(folder, safe_id(slide_id), self.encoder)
        if found is None:
            whose = f" of {self.encoder}" if self.encoder else ""
            raise BrokenFile(f"{slide_id}: no features{whose} in {folder} (neither "
                             f"h5_files/{slide_id}.h5 nor pt_files/{slide_id}.pt, nor TRIDENT's or "
                             "AtlasPatch's): run extract_features_fp.py")
        return found

    def find(self, slide_id: str) -> Path:
        """The slide's feature file, the h5 before the pt; errors as ``locate``."""
        return self.locate(slide_id).path

    def info(self, slide_id: str) -> SlideInfo:
        """Rows, width and encoder without reading the features; ``BrokenFile`` if unreadable."""
        found = self.locate(slide_id)
        info = _h5_info(found) if found.path.suffix == ".h5" else _pt_info(found.path)
        if self.encoder and info.made_by not in (None, encoder_label(self.encoder)):
            raise BrokenFile(f"{found.path} has features of {info.made_by}, not of {self.encoder}: "
                             "give another --feature_encoder or folder")
        return info

    def read(self, slide_id: str) -> tuple[torch.Tensor, np.ndarray | None]:
        """Features (N, D) float32 in memory, and coords (N, 2) int64 level-0 px or None.

        The checksum (files of ours) and finiteness are checked the first time a file is read, and
        again when it has changed since. Raises ``BrokenFile`` or ``ItemFailed`` naming the slide.
        """
        found = self.locate(slide_id)
        stamp = found.path.stat()
        unseen = self._sound.get(found) != (stamp.st_mtime_ns, stamp.st_size)
        features, coords = (_read_h5(found, verify=unseen) if found.path.suffix == ".h5"
                            else (_read_pt(found.path), None))
        if unseen:
            _check_finite(features, slide_id, found.path)
            self._sound[found] = (stamp.st_mtime_ns, stamp.st_size)
        return features, coords

    def extra(self, slide_ids: Iterable[str]) -> list[str]:
        """Slides with features that are not among ``slide_ids``, sorted."""
        known = set(slide_ids)
        return sorted({slide_id for folder in {self.root, *self.folders.values()}
                       for slide_id in list_slides(folder, but=known, encoder=self.encoder)})

    def check(self, slide_ids: Sequence[str], *, embed_dim: int | None = None,
              allow_missing: bool = False, table_ids: Iterable[str] | None = None,
              levels: Sequence[FeatureStore] = ()) -> StoreCheck:
        """Look at every slide's shapes before any work.

        table_ids: ids of the whole table when ``slide_ids`` are a part; files beyond are noted.
        levels: stores of finer levels; a slide is usable when it is so in each.

        Missing files are ``Refused`` unless ``allow_missing``; slides of another width than
        ``embed_dim`` (None = that of the first slide), or made by different encoders, always.
        Unreadable files and slides without patches are taken out and listed.
        """
        infos: dict[str, SlideInfo] = {}
        missing, failures = [], {}
        for slide_id in slide_ids:
            try:
                self.find(slide_id)
            except BrokenFile:
                missing.append(slide_id)
                continue
            try:
                infos[slide_id] = self.info(slide_id)
            except ItemFailed as error:
                failures[slide_id] = str(error)
        if missing and not allow_missing:
            raise Refused(f"{len(missing)} of {len(slide_ids)} slides have no features in "
                          f"{self.root}: {listed(missing)}; run extract_features_fp.py, or go on "
                          "without them with --allow_missing")
        usable = [slide_id for slide_id, info in infos.items() if info.rows > 0]
        if not usable:
            first = next(iter(failures.values()), "all are empty")
            raise Refused(f"no slide has usable features in {self.root}: {first}")
        width = _common_width({slide_id: infos[slide_id] for slide_id in usable}, embed_dim)
        encoder = _common_encoder({slide_id: infos[slide_id] for slide_id in usable})
        empty = [slide_id for slide_id, info in infos.items() if info.rows == 0]
        found = StoreCheck(
            usable=tuple(usable), empty=tuple(empty), missing=tuple(missing), failures=failures,
            rows={slide_id: infos[slide_id].rows for slide_id in usable},
            width=width, encoder=encoder,
            n_bytes=4 * width * sum(infos[slide_id].rows for slide_id in usable),
            notes=_notes(self.root, empty, missing, self.extra(table_ids or slide_ids),
                         infos))
        for store in levels:
            found = _with_level(found, store, allow_missing=allow_missing,
                                table_ids=table_ids or slide_ids)
        return found


def _with_level(above: StoreCheck, store: FeatureStore, *, allow_missing: bool,
                table_ids: Iterable[str]) -> StoreCheck:
    """A check narrowed to the slides that a finer level has as well."""
    finer = store.check(above.usable, embed_dim=above.width, allow_missing=allow_missing,
                        table_ids=table_ids)
    if above.encoder is not None and finer.encoder is not None and (
            canonical(above.encoder) != canonical(finer.encoder)):
        what = differences(finer.encoder, above.encoder).replace("you ask", "the coarse level has")
        raise Refused(f"{store.root} was made with another encoder than the coarse level ({what}): "
                      "extract all levels with one")
    bare = [slide for slide in finer.usable if not store.info(slide).located]
    notes = (f"{len(bare)} feature files in {store.root} have no coordinates, so only their "
             f"numbers of rows are compared with the level above: {listed(bare)}",) if bare else ()
    kept = frozenset(finer.usable)
    levels = tuple(_narrowed(level, kept) for level in (*above.levels, finer))
    return replace(_narrowed(above, kept), levels=levels,
                   empty=(*above.empty, *finer.empty), missing=(*above.missing, *finer.missing),
                   failures={**above.failures, **finer.failures},
                   notes=(*above.notes, *finer.notes, *notes))


def _narrowed(check: StoreCheck, kept: frozenset[str]) -> StoreCheck:
    rows = {slide: number for slide, number in check.rows.items() if slide in kept}
    return replace(check, usable=tuple(rows), rows=rows,
                   n_bytes=4 * check.width * sum(rows.values()))


def _notes(root: Path, empty: Sequence[str], missing: Sequence[str], extra: Sequence[str],
           infos: Mapping[str, SlideInfo]) -> tuple[str, ...]:
    notes = []
    if missing:
        notes.append(f"{len(missing)} slides without features are left out: {listed(missing)}")
    if empty:
        notes.append(f"{len(empty)} slides without patches are left out: {listed(empty)}")
    if extra:
        notes.append(f"{len(extra)} feature files in {root} are not in the table: {listed(extra)}")
    unknown = [slide_id for slide_id, info in infos.items() if info.encoder is None]
    if unknown and len(unknown) < len(infos):
        notes.append(f"{len(unknown)} feature files do not say which encoder made them: "
                     f"{listed(unknown)}")
    kinds = Counter(f"{info.patch['patch_size']} px of level {info.patch['patch_level']}"
                    for info in infos.values() if info.patch is not None)
    if len(kinds) > 1:  # right for slides of mixed magnification, so no refusal
        notes.append("the slides have patches of different sizes, which is meant only where their "
                     "levels differ: " + ", ".join(f"{kind} on {number} slides"
                                                   for kind, number in kinds.most_common(4)))
    return tuple(notes)


def _common_width(infos: Mapping[str, SlideInfo], embed_dim: int | None) -> int:
    first, info = next(iter(infos.items()))
    width = info.width if embed_dim is None else embed_dim
    others = [slide_id for slide_id, info in infos.items() if info.width != width]
    if others:
        expected = f"as {first}" if embed_dim is None else "--embed_dim"
        found = infos[others[0]].width
        remedy = (f"give --embed_dim {found}" if len(others) == len(infos) else
                  "extract all slides with one encoder")
        raise Refused(f"{len(others)} slides have features of another width than {width} "
                      f"({expected}): {listed(others)}; {others[0]} has {found}: {remedy}")
    return width


def _common_encoder(infos: Mapping[str, SlideInfo]) -> dict[str, Any] | None:
    known = {slide_id: info.encoder for slide_id, info in infos.items() if info.encoder is not None}
    named = {info.made_by: slide_id for slide_id, info in infos.items() if info.encoder is None}
    if len(labels := [name for name in named if name is not None]) > 1:
        raise Refused(f"features of different encoders cannot be mixed ({named[labels[0]]}: "
                      f"{labels[0]}, {named[labels[1]]}: {labels[1]}): give --feature_encoder")
    if not known:
        return None
    first, record = next(iter(known.items()))
    for slide_id, other in known.items():
        if canonical(other) != canonical(record):
            what = differences(other, record).replace("you ask", f"{first} has")
            raise Refused(f"features of different encoders cannot be mixed ({slide_id}: {what}): "
                          "extract all slides with one encoder")
    return record


# ---------------------------------------------------------------------------- the two formats

def _h5_info(found: FeatureFile) -> SlideInfo:
    import h5py

    path = found.path
    try:
        with h5py.File(path, "r", locking=False) as file:
            shapes = {name: file[name].shape for name in (found.dataset, "coords")
                      if isinstance(file.get(name), h5py.Dataset)}
            names = [str(name) for name in file]
            parameters = stored_parameters(file, found.dataset)
    except READ_ERRORS as error:
        raise BrokenFile(f"{path} cannot be read ({error}): it is truncated, damaged or no h5 file"
                         ) from None
    rows, width = _checked_shapes(found, shapes, names)
    encoder, patch = (dict(part) if isinstance(part := parameters.get(name), dict) else None
                      for name in ("encoder", "patch"))
    return SlideInfo(rows, width, encoder, patch, located="coords" in shapes and found.located,
                     made_by=encoder_label(str(encoder["name"])) if encoder else found.encoder)


def _checked_shapes(found: FeatureFile, shapes: Mapping[str, tuple[int, ...]],
                    names: Sequence[str]) -> tuple[int, int]:
    path = found.path
    if found.dataset not in shapes:
        raise BrokenFile(f"{path} has no data set 'features' (found: {', '.join(names) or 'none'})"
                         ": it is no feature file of extract_features_fp.py or CLAM")
    shape, placed = (shapes.get(name, ()) for name in (found.dataset, "coords"))
    if len(shape) == 3 and shape[0] == 1:  # TRIDENT's, with an axis of one in front
        shape, placed = shape[1:], placed[1:] if len(placed) == 3 else placed
    if len(shape) != 2:
        raise BrokenFile(f"{path}: 'features' has the shape {shape}, expected (patches, width)")
    if "coords" in shapes and placed != (shape[0], found.columns):
        raise BrokenFile(f"{path}: {shape[0]} rows of features, but coords of shape "
                         f"{placed}: delete it and run extract_features_fp.py again")
    return shape[0], shape[1]


def _read_h5(found: FeatureFile, *, verify: bool) -> tuple[torch.Tensor, np.ndarray | None]:
    import torch

    if verify:
        _h5_info(found)  # for its checks of the shapes
    arrays = read_features(found, verify=verify).arrays
    features = arrays["features"]
    if features.dtype.kind != "f":
        raise BrokenFile(f"{found.path}: 'features' holds {features.dtype}, expected real numbers")
    coords = arrays.get("coords")
    return (torch.from_numpy(features.astype(np.float32, copy=False)),
            None if coords is None else coords.astype(np.int64))


def load_pt(path: Path) -> torch.Tensor:
    """The (N, D) tensor of a pt file, mapped and not yet read; ``BrokenFile`` when it is none."""
    import torch

    value = load_torch(path, mmap=zipfile.is_zipfile(path))
    if not isinstance(value, torch.Tensor):
        raise BrokenFile(f"{path} holds a {type(value).__name__}, expected one tensor "
                         "(patches, width)")
    if value.ndim != 2 or not value.is_floating_point():
        raise BrokenFile(f"{path} holds a tensor of {value.dtype}, shape {tuple(value.shape)}; "
                         "expected real numbers (patches, width)")
    return value


def _pt_info(path: Path) -> SlideInfo:
    rows, width = load_pt(path).shape
    return SlideInfo(rows, width, None)


def _read_pt(path: Path) -> torch.Tensor:
    import torch

    return load_pt(path).to(torch.float32, copy=True)  # a copy: the file may change under the map


def _check_finite(features: torch.Tensor, slide_id: str, path: Path) -> None:
    import torch

    if torch.isfinite(features).all():
        return
    rows = torch.nonzero(~torch.isfinite(features).all(dim=1)).flatten()
    raise ItemFailed(f"{slide_id}: row {int(rows[0])} of {path} is not finite (NaN or infinity; "
                     f"{len(rows)} of {len(features)} rows): delete it and run "
                     "extract_features_fp.py again")
