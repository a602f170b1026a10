"""Images of whole slides, checked up front: ``FeatureStore`` for streaming models."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from datasets.features import StoreCheck
from datasets.image_sources import (
    DirectSlides,
    ImageFacts,
    ImageSource,
    Layout,
    PreparedImages,
)
from datasets.patch_store import SLIDE_EXT
from datasets.table import listed
from utils.errors import ItemFailed, Refused
from utils.parallel import describe_os_error
from utils.storage import canonical
from wsi_core.image_record import ImageRecord
from wsi_core.packing import SlidePicture
from wsi_core.scale import MPP_TOLERANCE
from wsi_core.slide import stamp
from wsi_core.slide_images import FOLDER

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
_MOST_OPEN = 3  # images of one thread: that in use and those that are read ahead


@dataclass(kw_only=True)
class ImageStore:
    """Where images are, and which part of them is seen.

    image_size: side in px of the square that is seen, 0 = everything; whole_images: everything in
    evaluation; num_workers: threads that read an image
    Images are opened in the threads that read them. Pickled without anything open.
    """

    source: ImageSource
    image_size: int = 0
    whole_images: bool = False
    num_workers: int = 1
    _seen: dict[str, ImageFacts] = field(default_factory=dict, repr=False)
    _layouts: dict[str, Layout] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="images")
        self._own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """What travels to a worker process."""
        return {name: value for name, value in self.__dict__.items()
                if name not in ("_pool", "_own")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @classmethod
    def open(cls, *, slide_images: Path | None = None, image_mpp: float | None = None,
             data_slide_dir: Path | None = None, slide_ext: str = SLIDE_EXT,
             image_size: int | None = None, whole_images: bool = False, num_workers: int = 1
             ) -> ImageStore:
        """The store that the flags of ``ImageSourceOptions`` name.

        ``Refused`` when a folder is not there or not what it should be, and for flags that do
        nothing.
        """
        source: ImageSource
        if slide_images is None:
            source = _slides(image_mpp, data_slide_dir, slide_ext)
        else:
            for flag, given in (("image_mpp", image_mpp is not None),
                                ("data_slide_dir", data_slide_dir is not None),
                                ("slide_ext", slide_ext != SLIDE_EXT)):
                if given:
                    raise Refused(f"--{flag} has no effect: the images in --slide_images hold the "
                                  "pixels; leave out one of the two")
            source = _prepared(slide_images)
        if whole_images and not image_size:
            raise Refused("--whole_images has no effect: without --image_size whole images are "
                          "seen anyway; leave it out")
        return cls(source=source, image_size=image_size or 0, whole_images=whole_images,
                   num_workers=num_workers)

    @property
    def root(self) -> Path:
        """The folder."""
        return self.source.root

    def stamps(self, slide_id: str) -> list[tuple[int, int]]:
        """(bytes, time of the newest change in ns) of each file that the image is made of."""
        return [(found.n_bytes, found.changed_ns)
                for found in map(stamp, self.source.files(slide_id))]

    def facts(self) -> dict[str, Any]:
        """What the images of the checked slides are: kind, um per px, what they were made with,
        and which part of them is seen."""
        made = {canonical(one.parameters): one.parameters for one in self._seen.values()}
        return {"kind": self.source.kind, "mpp_um": _scales(self._seen.values()),
                "image_size": self.image_size, "whole_images": self.whole_images,
                "channels": "RGB", "parameters": [made[key] for key in sorted(made)]}

    # ------------------------------------------------------------------------ up front

    def check(self, slide_ids: Sequence[str], *, allow_missing: bool = False,
              table_ids: Iterable[str] | None = None) -> StoreCheck:
        """Look at what there is of every slide, no pixel of it, before any work.

        As ``FeatureStore.check``: slides that are not there are ``Refused`` unless
        ``allow_missing``, images of different scales always; damaged ones are taken out and
        listed. rows: 1, the image.
        """
        missing, failures = [], {}
        self._seen = {}
        for slide_id in slide_ids:
            try:
                if self.source.files(slide_id)[0].exists():
                    self._seen[slide_id] = self.source.facts(slide_id)
                else:
                    missing.append(slide_id)
            except ItemFailed as error:
                failures[slide_id] = str(error)
        if missing and not allow_missing:
            raise Refused(f"{len(missing)} of {len(slide_ids)} slides have no image: "
                          f"{listed(missing)}; there is no {self.source.files(missing[0])[0]}: "
                          f"{self.source.remedy}, correct the flags that say where they are, or "
                          "go on without them with --allow_missing")
        if not self._seen:
            raise Refused(f"no slide has a usable image in {self.root}: "
                          f"{next(iter(failures.values()), 'all are missing')}")
        _check_scales(self._seen)
        return StoreCheck(
            usable=tuple(self._seen), empty=(), missing=tuple(missing), failures=failures,
            rows=dict.fromkeys(self._seen, 1), width=0, encoder=None, n_bytes=0,
            kind="image", notes=tuple(self._notes(missing, set(table_ids or slide_ids))))

    def _notes(self, missing: Sequence[str], known: set[str]) -> Iterator[str]:
        """One line for each thing that is allowed but worth knowing."""
        small = [slide for slide, one in self._seen.items()
                 if one.size_px and max(one.size_px) < self.image_size]
        extra = [slide for slide in self.source.slides() if slide not in known]
        for slides, what in (
                (missing, "slides without an image are left out"),
                (small, f"images are smaller than --image_size {self.image_size}: they lie in the "
                        "middle of a white square"),
                (extra, f"slides in {self.root} are not in the table")):
            if slides:
                yield f"{len(slides)} {what}: {listed(slides)}"
        ways = len({canonical(one.parameters) for one in self._seen.values()})
        if ways > 1:
            yield f"the images were made in {ways} ways, with different parameters"

    # ------------------------------------------------------------------------ pixels

    def open_image(self, slide_id: str) -> StoredImage:
        """The image of a slide, its layout read now; ``ItemFailed`` where it cannot be used."""
        layout = self._layouts.get(slide_id)
        if layout is None:
            layout = self._layouts[slide_id] = self.source.layout(slide_id)
        return StoredImage(store=self, slide_id=slide_id, layout=layout)

    def picture(self, slide_id: str, layout: Layout) -> SlidePicture:
        """The image, open in the thread that asks; it stays so while few others are used there."""
        opened: OrderedDict[str, SlidePicture] = self._own.__dict__.setdefault(
            "opened", OrderedDict())
        if slide_id not in opened:
            opened[slide_id] = self.source.open(slide_id, layout)
            if len(opened) > _MOST_OPEN:
                opened.popitem(last=False)[1].close()
        opened.move_to_end(slide_id)
        return opened[slide_id]

    def map(self, work: Callable[[Item], None], items: Iterable[Item]) -> Iterator[None]:
        """``map`` in the threads that read, which stay, with what they opened.

        Each takes a run of items: blocks that lie side by side share tiles of the file, which a
        thread decodes once.
        """
        items = list(items)
        length = max(1, -(-len(items) // self.num_workers))

        def run(first: int) -> None:
            for item in items[first:first + length]:
                work(item)

        return self._pool.map(run, range(0, len(items), length))


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """All of a slide's image: a ``SlideImage`` with where it is from."""

    store: ImageStore
    slide_id: str
    layout: Layout
    colour: None = None

    @property
    def record(self) -> ImageRecord:
        """What it was made of; ``to_level0`` maps its pixels onto the slide."""
        return self.layout.record

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height)."""
        return self.record.size_px

    @property
    def mpp_um(self) -> float:
        """um per px."""
        return self.record.mpp_um

    @property
    def cell_px(self) -> int:
        """Side of the cells of ``tissue``, px of the image."""
        return self.record.cell_px

    @property
    def tissue(self) -> np.ndarray:
        """(h, w) float32 share of tissue in each cell."""
        return self.layout.tissue.astype(np.float32) / 255

    def read(self, x: int, y: int, width: int, height: int) -> torch.Tensor:
        """See ``SlideImage``; in the thread of the caller."""
        import torch

        try:
            picture = self.store.picture(self.slide_id, self.layout)
            return torch.from_numpy(picture.read(x, y, width, height))
        except OSError as error:
            raise ItemFailed(f"{self.slide_id}: its image cannot be read: "
                             f"{describe_os_error(error)}") from None


# ---------------------------------------------------------------------------- opening

def _prepared(folder: Path) -> PreparedImages:
    """``Refused`` unless the folder has images."""
    inner = folder / FOLDER
    if inner.is_dir() or not any(folder.glob("*.json")):
        hint = f"did you mean {inner}?" if inner.is_dir() else (
            "make them with create_patches_fp.py --slide_images")
        raise Refused(f"--slide_images: {folder} holds no images of slides: {hint}")
    return PreparedImages(root=folder)


def _slides(image_mpp: float | None, slide_dir: Path | None, slide_ext: str) -> DirectSlides:
    """``Refused`` unless it is said which slides are read, and how fine."""
    for flag, value, other in (("image_mpp", image_mpp, "data_slide_dir"),
                               ("data_slide_dir", slide_dir, "image_mpp")):
        if value is None:
            raise Refused(f"--{flag} is missing: give --slide_images, or --{flag} with --{other} "
                          "to read slides themselves")
    assert image_mpp is not None and slide_dir is not None
    if not slide_dir.is_dir():
        raise Refused(f"--data_slide_dir: there is no folder {slide_dir}")
    dotted = slide_ext if slide_ext.startswith(".") or not slide_ext else f".{slide_ext}"
    return DirectSlides(root=slide_dir, slide_ext=dotted, image_mpp=image_mpp)


def _scales(found: Iterable[ImageFacts]) -> list[float]:
    """um per px as they were asked for: whole pixels, and levels that are taken as they are, meet
    them only about, and no rounding makes the same of all."""
    return sorted({float(one.parameters.get("image_mpp", one.mpp_um)) for one in found})


def _check_scales(seen: dict[str, ImageFacts]) -> None:
    """``Refused`` for images that show the same tissue in different sizes."""
    finest, coarsest = (pick(seen, key=lambda slide: seen[slide].mpp_um) for pick in (min, max))
    if seen[coarsest].mpp_um > seen[finest].mpp_um * (1 + MPP_TOLERANCE):
        raise Refused(f"the images are of different scales: {finest} has "
                      f"{seen[finest].mpp_um:.4g} um per px, {coarsest} "
                      f"{seen[coarsest].mpp_um:.4g}: make them all anew with one --slide_images")
