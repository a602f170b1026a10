"""One vector a slide from its patch features: ``slide_features/<name>/<slide>.h5`` and a table.

The vectors of a slide encoder lie in a folder of its name beside the features they come from
(where a layout puts several encoders into one folder, in ``slide_features/<encoder>/<name>``); a
file's record has the digest of those features, so it is made anew when they change.
``slide_features/<name>.csv`` has all slides of the run: slide_id, f0, f1 ...
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from datasets.extraction import labelled
from datasets.feature_files import h5_path
from datasets.feature_layouts import GROUP, FeatureFile, encoder_label, read_features
from datasets.patches import item_name
from utils.errors import BrokenFile, ItemFailed, Refused
from utils.locks import claim, holder
from utils.parallel import describe_os_error
from utils.report import Row, Status
from utils.storage import (
    RECORD_DIGEST,
    State,
    h5_state,
    read_h5,
    safe_id,
    write_h5,
    write_text,
)
from wsi_core.layouts import Layout

FOLDER = "slide_features"


class SlideEncoder(Protocol):
    """What is needed of ``models.slide_encoders.SlideEncoder``."""

    name: str

    def record(self) -> dict[str, Any]:
        """What identifies its vectors."""
        ...

    def encode(self, features: np.ndarray, coords: np.ndarray) -> np.ndarray:
        """(N, D) features, (N, 2) level-0 corners -> (H,) float32; ``ItemFailed``."""
        ...


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The patch features of one encoder on one level.

    feat_dir: where they are; encoder: its name in their record; label: the same where there are
    several, else ""; level: "" for the coarse or only one
    """

    feat_dir: Path
    encoder: str
    label: str = ""
    level: str = ""
    layout: Layout = "clam"

    def features(self, slide_id: str) -> FeatureFile:
        """The features of a slide."""
        path = h5_path(self.feat_dir, slide_id, layout=self.layout, encoder=self.encoder)
        dataset = f"{GROUP}/{encoder_label(self.encoder)}" if self.layout == "atlaspatch" else GROUP
        return FeatureFile(path, dataset)

    def folders(self) -> list[Path]:
        """The folders that features are written into, outermost first."""
        inner = [self.features("").path.parent]
        return [self.feat_dir, *inner, *([self.feat_dir / "pt_files"] if self.layout == "clam"
                                         else [])]

    def item(self, slide_id: str) -> str:
        """The slide's name in the report of the features."""
        return labelled(item_name(slide_id, self.level), self.label)

    def vector(self, slide_id: str, encoder: SlideEncoder) -> str:
        """The slide's name in the report of the vectors."""
        return f"{self.item(slide_id)} {encoder.name}"

    def folder(self, encoder: SlideEncoder) -> Path:
        """Where the vectors of a slide encoder go."""
        root = self.feat_dir / FOLDER
        return (root if self.layout == "clam" else root / encoder_label(self.encoder)
                ) / safe_id(encoder.name, what="slide encoder")


def check_slide_features(slides: Sequence[str], sets: Sequence[FeatureSet],
                         encoders: Sequence[SlideEncoder]) -> None:
    """``Refused`` when a folder has vectors of another slide encoder of the same name, or two of
    those given would share one."""
    names = [encoder.name for encoder in encoders]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Refused(f"--slide_encoder: two of them are called {', '.join(twice)}: rename the "
                      "file or give one after the other, with another --feat_dir")
    for one in sets:
        for encoder in encoders:
            for path in (one.folder(encoder) / f"{slide_id}.h5" for slide_id in slides):
                if (found := _recorded(path)) is not None and found != encoder.record():
                    raise Refused(f"{path} was made by another slide encoder {encoder.name} "
                                  f"({found}): delete its folder, give another --feat_dir, or "
                                  "--no_auto_skip to make them anew")


def _recorded(path: Path) -> dict[str, Any] | None:
    """The slide encoder of a file, None when there is none or it is broken (made anew then)."""
    try:
        parameters = read_h5(path).parameters if path.exists() else None
    except BrokenFile:
        return None
    return None if parameters is None else dict(parameters["slide_encoder"])


def encode_features(slides: Sequence[str], sets: Sequence[FeatureSet],
                    encoders: Sequence[SlideEncoder], *, missing: Mapping[str, Row], redo: bool
                    ) -> Iterator[Row]:
    """Make every vector that is not there already; one row a slide, level, encoder and vector.

    missing: rows of the features that were not made, by item: their vectors share their fate
    """
    for one in sets:
        for encoder in encoders:
            one.folder(encoder).mkdir(parents=True, exist_ok=True)
        for slide_id in slides:
            lost = missing.get(one.item(slide_id))
            for encoder in encoders:
                name = one.vector(slide_id, encoder)
                yield _encode(name, one, slide_id, encoder, redo=redo) if lost is None else Row(
                    item=name, status=lost.status, reason=f"has no features: {lost.reason}")


def _encode(name: str, one: FeatureSet, slide_id: str, encoder: SlideEncoder, *, redo: bool) -> Row:
    path = one.folder(encoder) / f"{slide_id}.h5"
    try:
        found = one.features(slide_id)
        parameters = {"slide_encoder": encoder.record(), "features_sha256": _digest(found)}
        if not redo and h5_state(path, parameters) is State.DONE:
            return Row(item=name, status=Status.SKIPPED)
        with claim(path) as mine:
            if not mine:
                return Row(item=name, status=Status.BUSY, reason=f"{holder(path)} works on it")
            data = read_features(found)
            if not len(data.arrays[GROUP]):
                return Row(item=name, status=Status.EMPTY, reason="no patches")
            vector = encoder.encode(data.arrays[GROUP], data.arrays["coords"])
            mine.confirm()
            write_h5(path, {"features": vector}, parameters=parameters, root={
                "slide_id": slide_id, "slide_encoder": encoder.name, "encoder": one.encoder})
    except ItemFailed as error:
        return Row(item=name, status=Status.FAILED, reason=str(error))
    except OSError as error:
        return Row(item=name, status=Status.FAILED, reason=describe_os_error(error))
    return Row(item=name, status=Status.DONE, numbers={"dim": len(vector)})


def _digest(found: FeatureFile) -> str:
    """Digest of features of ours as their record has it."""
    import h5py

    try:
        with h5py.File(found.path, "r", locking=False) as file:
            holds = file[found.dataset] if "/" in found.dataset else file
            return str(holds.attrs[RECORD_DIGEST])
    except (OSError, RuntimeError, KeyError) as error:
        raise BrokenFile(f"{found.path} cannot be read ({error})") from None


def write_tables(slides: Sequence[str], sets: Sequence[FeatureSet],
                 encoders: Sequence[SlideEncoder], rows: Sequence[Row]) -> None:
    """A csv of every slide encoder with the slides whose vector is there, as ``rows`` say.

    float32 values in full, so reading them back gives the same numbers.
    """
    complete = {row.item for row in rows if row.status in (Status.DONE, Status.SKIPPED)}
    for one in sets:
        for encoder in encoders:
            folder = one.folder(encoder)
            vectors = {slide_id: read_h5(folder / f"{slide_id}.h5").arrays["features"]
                       for slide_id in slides if one.vector(slide_id, encoder) in complete}
            width = max((len(vector) for vector in vectors.values()), default=0)
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["slide_id", *(f"f{index}" for index in range(width))])
            writer.writerows([slide_id, *map(str, vector)]
                             for slide_id, vector in vectors.items())
            write_text(folder.with_name(f"{folder.name}.csv"), text.getvalue())
