"""Patches as pixels: read, filtered, encoded and saved in one pass over a slide.

Every patch is decoded once, whatever is made of it: ``keep_by_pixels`` filters and hands what it
keeps to any number of sinks (image files here, an LMDB in ``patch_lmdb.py``). Rows are read in
their own order, which runs along the lattice, so tiles that neighbours share are still in the
slide's cache; reading and encoding may be spread over threads, each with its own handle.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

from utils.resize import resize_shorter_side
from utils.storage import write_bytes
from utils.temporaries import sweep_temporaries
from wsi_core.coords import PatchCoords
from wsi_core.layouts import with_best_level
from wsi_core.pixel_filters import is_black, is_white
from wsi_core.slide import Slide, open_slide

Encoding = Literal["jpeg", "jpeg420", "png", "webp"]  # jpeg: full colours; webp without loss
ImageKind = Literal["png", "jpeg"]
T = TypeVar("T")

SUFFIXES = {"jpeg": ".jpg", "jpeg420": ".jpg", "png": ".png", "webp": ".webp"}
CACHE_MB = 256  # of decoded tiles, shared out over the threads
_CHUNK = 32  # patches of one thread's task
_NUMBERS = r"_x-?\d+_y-?\d+\.(?:png|jpg)"  # after the slide id in an image's name


class Sink(Protocol):
    """Where kept patches go."""

    def encode(self, patch: np.ndarray) -> bytes:
        """(h, w, 3) uint8 RGB as stored; called in any thread."""
        ...

    def put(self, x: int, y: int, data: bytes) -> None:
        """Store the patch at (x, y), level-0 px; called in one thread, in the order of rows."""
        ...


# ---------------------------------------------------------------------------- reading

def patch_reader(slide: Slide, patches: PatchCoords) -> Callable[[int], np.ndarray]:
    """A function that reads row i of ``patches`` as (h, w, 3) uint8 RGB at its output size.

    It raises SlideError for what cannot be read. Not for several threads: a handle is one's own.
    """
    patches = with_best_level(patches, slide)
    side = patches.patch_size

    def read(row: int) -> np.ndarray:
        x, y = patches.coords[row].tolist()
        patch = slide.read_region((x, y), patches.patch_level, (side, side),
                                  background=patches.background)
        return resize_shorter_side(patch, patches.output_size)

    return read


def map_patches(
    slide: Slide, patches: PatchCoords, work: Callable[[np.ndarray], T], *,
    rows: Sequence[int] | None = None, threads: int = 1,
) -> Iterator[tuple[int, T]]:
    """Yield (row, work(patch)) for the rows in their order; all rows when None are given.

    With several threads ``work`` runs in them, each with its own handle on the slide; at most
    3 x 32 results a thread are held. Raises SlideError, and whatever ``work`` raises.
    """
    rows = range(len(patches)) if rows is None else rows
    if threads <= 1:
        read = patch_reader(slide, patches)
        for row in rows:
            yield row, work(read(row))
        return
    handles = SlideHandles(slide.path, patches, cache_mb=max(64, CACHE_MB // threads))

    def chunk(part: Sequence[int]) -> list[tuple[int, T]]:
        read = handles.reader()
        return [(row, work(read(row))) for row in part]

    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[list[tuple[int, T]]]] = deque()
    try:
        for start in range(0, len(rows), _CHUNK):
            ahead.append(pool.submit(chunk, rows[start:start + _CHUNK]))
            if len(ahead) >= 3 * threads:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        handles.close()


class SlideHandles:
    """One open slide for each thread that asks. cache_mb: of decoded tiles, of each."""

    def __init__(self, slide_path: Path, patches: PatchCoords, *, cache_mb: int) -> None:
        self._path, self._patches, self._cache_mb = slide_path, patches, cache_mb
        self._own = threading.local()
        self._open: list[Slide] = []

    def reader(self) -> Callable[[int], np.ndarray]:
        """This thread's ``patch_reader``."""
        read: Callable[[int], np.ndarray] | None = getattr(self._own, "read", None)
        if read is None:
            slide = open_slide(self._path, cache_mb=self._cache_mb)
            self._open.append(slide)
            read = self._own.read = patch_reader(slide, self._patches)
        return read

    def close(self) -> None:
        """Give all of them back; no thread may read any more."""
        for slide in self._open:
            slide.close()


# ---------------------------------------------------------------------------- one pass

def keep_by_pixels(
    slide: Slide, patches: PatchCoords, *, white_thresh: int | None = None,
    black_thresh: int | None = None, sinks: Sequence[Sink] = (), threads: int = 1,
) -> np.ndarray:
    """(N,) bool: which patches are neither white nor black; those go to all ``sinks``.

    Thresholds as in ``pixel_filters``, at the output size; None leaves a filter out. Raises
    SlideError when a patch cannot be read, OSError when a sink cannot write.
    """
    def look(patch: np.ndarray) -> list[bytes] | None:
        if white_thresh is not None and is_white(patch, white_thresh):
            return None
        if black_thresh is not None and is_black(patch, black_thresh):
            return None
        return [sink.encode(patch) for sink in sinks]

    kept = np.ones(len(patches), bool)
    if white_thresh is None and black_thresh is None and not sinks:
        return kept
    for row, encoded in map_patches(slide, patches, look, threads=threads):
        if encoded is None:
            kept[row] = False
            continue
        x, y = patches.coords[row].tolist()
        for sink, data in zip(sinks, encoded, strict=True):
            sink.put(x, y, data)
    return kept


def encode_image(rgb: np.ndarray, kind: Encoding, *, quality: int = 90) -> bytes:
    """(h, w, 3) uint8 RGB as a JPEG of ``quality`` 1..100, or without loss as PNG or WebP.

    jpeg: colours at full resolution (4:4:4), as stains are read from them; jpeg420: at half of it,
    smaller by a third
    """
    import cv2

    jpeg = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR]
    settings = {"jpeg": [*jpeg, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
                "jpeg420": [*jpeg, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420], "png": [],
                "webp": [cv2.IMWRITE_WEBP_QUALITY, 101]}  # above 100: without loss
    done, data = cv2.imencode(SUFFIXES[kind], cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), settings[kind])
    if not done:
        raise OSError(f"a patch could not be encoded as {kind}")
    return bytes(data)


# ---------------------------------------------------------------------------- image files

class ImageFolder:
    """A sink of one image file a patch, ``<slide>_x<X>_y<Y>.png`` or ``.jpg``, each written whole.

    Made again when it is there; ``remove_others`` afterwards takes away what is no patch any more.
    """

    def __init__(self, folder: Path, slide_id: str, *, kind: ImageKind, quality: int = 90) -> None:
        self.folder, self.slide_id, self.kind, self.quality = folder, slide_id, kind, quality
        self.names: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(folder)

    def encode(self, patch: np.ndarray) -> bytes:
        """See ``Sink``."""
        return encode_image(patch, self.kind, quality=self.quality)

    def put(self, x: int, y: int, data: bytes) -> None:
        """See ``Sink``."""
        name = _image_name(self.slide_id, x, y, self.kind)
        write_bytes(self.folder / name, data, durable=False)  # 10 ms each; images_done sees a loss
        self.names.add(name)

    def remove_others(self) -> None:
        """Take away images of this slide that were not put; other files stay."""
        for name in _images_in(self.folder, self.slide_id) - self.names:
            (self.folder / name).unlink(missing_ok=True)


def save_patch_images(
    slide: Slide, patches: PatchCoords, folder: Path, *, kind: ImageKind, quality: int = 90,
    most: int | None = None, threads: int = 1,
) -> int:
    """Write the patches into ``folder`` (``images/<slide>``) and return how many images it holds.

    At most ``most``, spread evenly over the rows, always the same ones. Images of the slide that
    are none of these are removed. Raises SlideError, OSError.
    """
    sink = ImageFolder(folder, patches.slide_id, kind=kind, quality=quality)
    for row, data in map_patches(slide, patches, sink.encode, rows=spread(len(patches), most),
                                 threads=threads):
        x, y = patches.coords[row].tolist()
        sink.put(x, y, data)
    sink.remove_others()
    return len(sink.names)


def images_done(folder: Path, patches: PatchCoords, *, kind: ImageKind, most: int | None) -> bool:
    """Does the folder hold just the images that ``save_patch_images`` would leave, none empty?"""
    wanted = {_image_name(patches.slide_id, x, y, kind)
              for x, y in patches.coords[spread(len(patches), most)].tolist()}
    return wanted == _images_in(folder, patches.slide_id, filled=True)


def remove_images(folder: Path) -> None:
    """Take away the images of the slide that ``folder`` is named after, and the folder if empty."""
    for name in _images_in(folder, folder.name):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def spread(count: int, most: int | None) -> list[int]:
    """Rows 0 .. count - 1, or ``most`` of them at equal distances."""
    if most is None or most >= count:
        return list(range(count))
    return [(2 * number + 1) * count // (2 * most) for number in range(most)]


def _image_name(slide_id: str, x: int, y: int, kind: ImageKind) -> str:
    return f"{slide_id}_x{x}_y{y}{SUFFIXES[kind]}"


def _images_in(folder: Path, slide_id: str, *, filled: bool = False) -> set[str]:
    """Names of the slide's images in a folder; ``filled``: only those with something in them."""
    if not folder.is_dir():
        return set()
    ours = re.compile(re.escape(slide_id) + _NUMBERS).fullmatch
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries
                if ours(entry.name) and entry.is_file() and (not filled or entry.stat().st_size)}
