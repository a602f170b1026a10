"""Training tiles of overviews, changed as scanners, stains and pens would change them.

A batch depends on (seed, epoch, step) alone, so the number of threads changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np

from datasets.tissue_pairs import Example
from utils.seeding import derive_seed

Tiles = tuple[np.ndarray, np.ndarray]  # (B, t, t, 3) uint8 and (B, t, t) float32, 1 = tissue

GLASS = (255, 255, 255)
TISSUE_CHANCE = 0.6  # of a tile to be centred on tissue; the others lie anywhere
POINTS_A_SLIDE = 4096
# Optical densities of haematoxylin, eosin and the rest in RGB (Ruifrok & Johnston 2001)
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
INKS = ((20, 20, 25), (20, 40, 160), (0, 110, 60), (190, 20, 40))  # black, blue, green, red


class TileSampler:
    """Random changed tiles of examples. pen_frac: share of tiles with a pen stroke."""

    def __init__(self, examples: Sequence[Example], *, tile_px: int, pen_frac: float, seed: int
                 ) -> None:
        self._examples, self._tile_px, self._pen_frac = examples, tile_px, pen_frac
        self._seed = seed
        self._tissue = [_some_tissue(example.mask, derive_seed(seed, index))
                        for index, example in enumerate(examples)]

    def batch(self, epoch: int, step: int, size: int) -> Tiles:
        """``size`` tiles of this step."""
        rng = np.random.default_rng(derive_seed(self._seed, epoch, step))
        tiles = [self._tile(rng) for _ in range(size)]
        return (np.stack([rgb for rgb, _ in tiles]),
                np.stack([mask for _, mask in tiles]).astype(np.float32))

    def _tile(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        index = int(rng.integers(len(self._examples)))
        example, tissue = self._examples[index], self._tissue[index]
        if len(tissue) and rng.random() < TISSUE_CHANCE:
            centre = tissue[rng.integers(len(tissue))]
        else:
            centre = rng.random(2) * example.mask.shape[::-1]
        rgb, mask = random_view(example, centre, self._tile_px, rng)
        rgb = change_light(change_stain(rgb, rng), rng)
        if rng.random() < self._pen_frac:
            rgb, mask = draw_pen(rgb, mask, rng)
        return blur_and_compress(rgb, rng), mask


def read_ahead(sampler: TileSampler, *, epoch: int, steps: int, batch_size: int, workers: int
               ) -> Iterator[Tiles]:
    """The batches of an epoch, made ahead by threads."""
    make = partial(sampler.batch, epoch, size=batch_size)
    waiting: deque[Future[Tiles]] = deque()
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="tiles") as pool:
        for step in range(steps):
            waiting.append(pool.submit(make, step))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _some_tissue(mask: np.ndarray, seed: int) -> np.ndarray:
    """(n, 2) x, y of some pixels of tissue."""
    found = np.flatnonzero(mask)
    chosen = np.random.default_rng(seed).choice(found, min(len(found), POINTS_A_SLIDE),
                                                replace=False)
    return np.stack(np.unravel_index(chosen, mask.shape), axis=1)[:, ::-1]


# ---------------------------------------------------------------------------- changes

def random_view(example: Example, centre: np.ndarray, tile_px: int, rng: np.random.Generator
                ) -> tuple[np.ndarray, np.ndarray]:
    """A tile around ``centre`` (x, y), turned, mirrored and scaled by up to 20 %; glass outside.

    Returns (t, t, 3) uint8 and (t, t) bool.
    """
    import cv2

    angle, scale = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.25)
    mirror = 1 if rng.random() < 0.5 else -1
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cos * mirror, -sin], [sin * mirror, cos]])
    aim = np.asarray(centre) + rng.uniform(-0.25, 0.25, 2) * tile_px
    matrix = np.column_stack([turn, tile_px / 2 - turn @ aim])
    rgb = cv2.warpAffine(example.rgb, matrix, (tile_px, tile_px), flags=cv2.INTER_LINEAR,
                         borderMode=cv2.BORDER_CONSTANT, borderValue=GLASS)
    mask = cv2.warpAffine(example.mask.astype(np.uint8), matrix, (tile_px, tile_px),
                          flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(rgb), np.asarray(mask) > 0


def change_stain(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another strength of each stain, by up to 35 %: what Beer's law adds up is scaled."""
    unit = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    density = -np.log((np.arange(256) + 1) / 256)
    mix = np.linalg.inv(unit) @ np.diag(rng.uniform(0.65, 1.35, 3)) @ unit
    changed = density[rgb].reshape(-1, 3) @ mix
    out = 256 * np.exp(-changed) - 1
    return np.asarray(np.clip(np.rint(out), 0, 255).astype(np.uint8).reshape(rgb.shape))


def change_light(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another lamp and camera: a gain of each colour, and a gamma."""
    import cv2

    gain, gamma = rng.uniform(0.88, 1.04, 3) * rng.uniform(0.95, 1.02), rng.uniform(0.8, 1.25)
    levels = np.linspace(0, 1, 256) ** gamma
    table = np.clip(np.rint(255 * levels[:, None] * gain), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(rgb, np.ascontiguousarray(table[None])))


def draw_pen(rgb: np.ndarray, mask: np.ndarray, rng: np.random.Generator
             ) -> tuple[np.ndarray, np.ndarray]:
    """A pen stroke over the tile; what it covers is no tissue any more."""
    import cv2

    side = rgb.shape[0]
    corners = np.cumsum(np.vstack([rng.uniform(0, side, 2),
                                   rng.normal(0, side / 4, (int(rng.integers(2, 6)), 2))]), axis=0)
    stroke = np.zeros(mask.shape, np.uint8)
    cv2.polylines(stroke, [corners.astype(np.int32)], bool(rng.random() < 0.3), 255,
                  int(rng.integers(2, max(3, side // 20))), cv2.LINE_AA)
    cover = stroke[..., None] / 255 * rng.uniform(0.6, 1.0)
    ink = np.clip(INKS[rng.integers(len(INKS))] + rng.normal(0, 15, 3), 0, 255)
    return ((rgb * (1 - cover) + ink * cover).astype(np.uint8), mask & (stroke < 128))


def blur_and_compress(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sometimes out of focus, often through JPEG."""
    import cv2

    if rng.random() < 0.3:
        rgb = np.asarray(cv2.GaussianBlur(rgb, (0, 0), rng.uniform(0.4, 1.6)))
    if rng.random() < 0.5:
        quality = int(rng.integers(40, 96))
        _, data = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, quality])
        rgb = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return rgb
