"""The slides of an evaluation: the part of each fold, their features, checked up front."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from datasets.bag_sources import PixelSource, pixel_bags
from datasets.bags import BagDataset
from datasets.cohort import Bags, feature_store
from datasets.features import FeatureStore, StoreCheck
from datasets.image_store import ImageStore
from datasets.levels import find_level_roots, level_stores
from datasets.patch_store import PatchStore
from datasets.patches import PatchEncoder, SlidePatches
from datasets.splits import read_split
from datasets.table import SlideTable, listed, load_table
from datasets.tasks import Task
from utils.distributed import Group
from utils.errors import Refused
from utils.options import option

LAZY_BATCH = 256  # patches in one batch of the encoder


class EncoderOf(Protocol):
    """What loads the encoder that made features with this record; ``Refused`` for other weights."""

    def __call__(self, record: Mapping[str, Any], /, *, checkpoint: Path | None
                 ) -> Callable[[], PatchEncoder]: ...


@dataclass(frozen=True, kw_only=True)
class SlideOptions:
    """The flags that say where splits and features lie, those of finer levels too."""

    data_root_dir: Path | None = option(None, help="folder with the feature folders (all models "
                                        "but e2e and streaming)")
    splits_dir: Path | None = option(None, help="folder with splits_{k}.csv (default: the models')")
    feature_encoder: str | None = option(None, help="which features, where a folder holds those "
                                         "of several encoders")
    allow_missing: bool = option(False, help="go on without slides that have no features (or "
                                 "patches, or image)")
    allow_shared_patients: bool = option(False, help="accept splits that divide a patient's slides")
    child_levels: tuple[int, ...] = option(
        (), low=0, high=127, help="finer levels of hag_mil, coarse to fine (default: those of the "
        "training): features in <folder>_level_<n>_corresponding")
    child_dirs: tuple[Path, ...] = option((), help="feature folders of the finer levels, instead "
                                          "of --child_levels")
    lazy_children: bool = option(False, help="compute features of finer levels only where the "
                                 "model looks; needs --data_h5_dir and --data_slide_dir")
    data_h5_dir: Path | None = option(None, help="coarse folder of create_patches_fp.py (with "
                                      "--lazy_children, as the next three)")
    data_slide_dir: Path | None = option(None, help="folder with the slides")
    slide_ext: str = option(".svs", help="extension of the slide files")
    encoder_ckpt: Path | None = option(None, help="weight file of the encoder of the features")


@dataclass(frozen=True, kw_only=True)
class EvaluatedSlides:
    """What is evaluated. parts: slide ids of each fold; check: which of them can be used.

    store: of the features, the patches or the images
    finer: stores of the finer levels, coarse to fine; lazy: what computes them instead
    """

    table: SlideTable
    parts: Mapping[int, tuple[str, ...]]
    store: FeatureStore | PatchStore | ImageStore
    check: StoreCheck
    finer: tuple[FeatureStore, ...] = ()
    lazy: LazyChildren | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes; of other task types, of the numbers in a slide's truth."""
        return self.table.output_names

    @property
    def n_truths(self) -> int:
        """Numbers in a slide's truth."""
        return len(self.table.target_names) or 1

    @property
    def case_of(self) -> dict[str, str]:
        """Slide -> patient."""
        return dict(zip(self.table.slide_ids, self.table.case_ids, strict=True))

    @property
    def pixel_facts(self) -> dict[str, Any] | None:
        """What the pixels of patches or images are; None where bags hold features."""
        return None if isinstance(self.store, FeatureStore) else self.store.facts()

    @property
    def origin(self) -> str:
        """Where the bags come from, for a reader."""
        if not isinstance(self.store, FeatureStore):
            kind = "images" if isinstance(self.store, ImageStore) else "patches"
            return f"{self.store.root} ({kind})"
        encoder = (self.check.encoder or {}).get("name", "unknown encoder")
        return f"{self.store.root} (width {self.check.width}, {encoder})"

    def bags(self) -> Bags:
        """Bags of the slides that can be used."""
        table = self.table.subset(self.check.usable)
        if not isinstance(self.store, FeatureStore):
            return pixel_bags(table, self.store)
        return BagDataset(
            table, self.store, n_bytes=self.check.n_bytes,
            level_stores=self.finer, level_bytes=sum(one.n_bytes for one in self.check.levels),
            children=self.lazy.levels if self.lazy else None)

    def usable(self, fold: int) -> list[str]:
        """The slides of a fold that can be used."""
        known = set(self.check.usable)
        return [slide for slide in self.parts[fold] if slide in known]

    def digests(self) -> dict[str, str]:
        """One checksum a fold: slides, patients, truths, and size and date of their files."""
        stamps = {}
        for slide in self.check.usable:
            row = self.table.row_of[slide]
            truth = self.table.target_of(row) or int(self.table.labels[row])
            stamps[slide] = (slide, self.table.case_ids[row], truth, self._stamps(slide))
        return {str(fold): hashlib.sha256(repr(
            [stamps.get(slide, slide) for slide in part]).encode()).hexdigest()
            for fold, part in self.parts.items()}

    def _stamps(self, slide: str) -> list[tuple[int, int]]:
        """Size and date of the files of a slide."""
        if not isinstance(self.store, FeatureStore):
            return self.store.stamps(slide)
        files = [*(store.find(slide) for store in (self.store, *self.finer)),
                 *(self.lazy.files(slide) if self.lazy else ())]
        return [(stamp.st_size, stamp.st_mtime_ns) for stamp in map(Path.stat, files)]


def find_slides(
    task: Task, folds: Sequence[int], *, part: str, splits_dir: Path,
    allow_missing: bool, allow_shared_patients: bool, data_root_dir: Path | None = None,
    pixels: PixelSource | None = None, feature_encoder: str | None = None,
    child_levels: Sequence[int] = (), child_dirs: Sequence[Path] = (),
    lazy_children: bool = False, cache_root: Path | None = None,
    encoder_of: EncoderOf | None = None, encoder_ckpt: Path | None = None, **places: Any,
) -> EvaluatedSlides:
    """Read and check table, splits and features before any work, or ``Refused``.

    splits_dir to encoder_ckpt: see ``SlideOptions``; places: its other flags
    pixels: where those of patches or images are, for models that take them
    cache_root: folder for lazy features; encoder_of: loads the encoder of features
    """
    table = load_table(task)
    parts = _read_parts(part, splits_dir, folds, table, allow_shared=allow_shared_patients)
    slides = list(dict.fromkeys(slide for ids in parts.values() for slide in ids))
    if pixels is not None:
        source = pixels.open()
        return EvaluatedSlides(table=table, parts=parts, store=source, check=source.check(
            slides, allow_missing=allow_missing, table_ids=table.slide_ids))
    store = feature_store(task, table, data_root_dir, encoder=feature_encoder)
    finer = () if lazy_children else level_stores(store, child_levels, child_dirs=child_dirs)
    check = store.check(slides, allow_missing=allow_missing, table_ids=table.slide_ids,
                        levels=finer)
    found = EvaluatedSlides(table=table, parts=parts, store=store, check=check, finer=finer)
    if not lazy_children:
        _refuse_idle({**places, "encoder_ckpt": encoder_ckpt})
        return found
    if not child_levels or cache_root is None or encoder_of is None:
        raise Refused("--lazy_children needs a model of several levels and their --child_levels")
    if check.encoder is None:
        raise Refused(f"--lazy_children: the features in {store.root} do not say which encoder "
                      "made them: make them with extract_features_fp.py")
    return replace(found, lazy=_lazy_children(
        check, child_levels, cache_root=cache_root, **places,
        load=encoder_of(check.encoder, checkpoint=encoder_ckpt)))


def _refuse_idle(flags: Mapping[str, Any]) -> None:
    """``Refused`` for a flag that has an effect with --lazy_children only."""
    defaults = {item.name: item.default for item in fields(SlideOptions)}
    for name, value in flags.items():
        if value != defaults[name]:
            raise Refused(f"--{name} goes with --lazy_children: give both or leave it out")


def _read_parts(part: str, folder: Path, folds: Sequence[int], table: SlideTable, *,
                allow_shared: bool) -> dict[int, tuple[str, ...]]:
    """Slide ids to evaluate in each fold; ``Refused`` when there are none in any."""
    if part == "all":
        return dict.fromkeys(folds, table.slide_ids)
    found = {fold: read_split(folder / f"splits_{fold}.csv", table,
                              allow_shared_patients=allow_shared).parts()[part]
             for fold in folds}
    if not any(found.values()):
        raise Refused(f"the split files in {folder} have no {part} slides: choose another --split")
    return found


# ---------------------------------------------------------------------------- lazy levels

@dataclass(kw_only=True)
class LazyChildren:
    """Finer levels that are encoded where a model looks, and what that costs."""

    slides: Mapping[str, Path]
    coords_roots: Sequence[Path]
    encoder: Mapping[str, Any]
    load: Callable[[], PatchEncoder]
    cache_root: Path
    seconds: float = 0.0
    levels: Any = field(init=False)

    def __post_init__(self) -> None:
        from datasets.lazy_levels import LazyLevels, encode_with

        encode = encode_with(self.load, batch_size=LAZY_BATCH)

        def timed(patches: SlidePatches) -> np.ndarray:
            start = time.monotonic()
            try:
                return encode(patches)
            finally:
                self.seconds += time.monotonic() - start

        self.levels = LazyLevels(slides=self.slides, coords_roots=self.coords_roots, encode=timed,
                                 encoder=self.encoder, cache_root=self.cache_root)

    def files(self, slide_id: str) -> list[Path]:
        """The slide and the coordinates of its finer levels."""
        return [self.slides[slide_id],
                *(root / "patches" / f"{slide_id}.h5" for root in self.coords_roots)]

    def cost(self, group: Group) -> dict[str, float]:
        """Over all processes: finer patches there are, looked at and encoded; seconds of that."""
        mine = self.levels.summary()
        every = group.gather((mine.rows, mine.asked, mine.encoded, self.seconds))
        return dict(zip(("patches", "looked_at", "encoded", "seconds"),
                        np.sum(every, axis=0).tolist(), strict=True))


def _lazy_children(check: StoreCheck, child_levels: Sequence[int], *, data_h5_dir: Path | None,
                   data_slide_dir: Path | None, slide_ext: str, load: Callable[[], PatchEncoder],
                   cache_root: Path) -> LazyChildren:
    """``Refused`` when folders are not given, or slides or coordinates are missing."""
    if data_h5_dir is None or data_slide_dir is None:
        raise Refused("--lazy_children computes features from slides: give --data_h5_dir and "
                      "--data_slide_dir")
    extension = slide_ext if slide_ext.startswith(".") or not slide_ext else f".{slide_ext}"
    lazy = LazyChildren(
        slides={slide: data_slide_dir / f"{slide}{extension}" for slide in check.usable},
        coords_roots=find_level_roots(data_h5_dir, child_levels), encoder=check.encoder or {},
        load=load, cache_root=cache_root)
    missing = [path for slide in check.usable for path in lazy.files(slide) if not path.exists()]
    if missing:
        raise Refused(f"--lazy_children: {len(missing)} files are missing: "
                      f"{listed(map(str, missing))}; correct --data_slide_dir, --slide_ext or "
                      "--data_h5_dir, or run create_patches_fp.py with --child_levels")
    return lazy
