"""Slides held in memory as images, for tests of models that take slides whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tests.training import BagList
from utils.contracts import Bag


class TensorImage:
    """An (h, w, 3) uint8 tensor in the form of ``utils.contracts.SlideImage``.

    windows: (x, y, width, height) of every ``read``, in their order
    """

    def __init__(self, pixels: torch.Tensor, mpp_um: float | None = 1.0,
                 colour: tuple[float, float, float] | None = None) -> None:
        self.pixels, self.mpp_um, self.colour = pixels, mpp_um, colour
        self.size_px = (int(pixels.shape[1]), int(pixels.shape[0]))
        self.windows: list[tuple[int, int, int, int]] = []

    def read(self, x: int, y: int, width: int, height: int) -> torch.Tensor:
        window = self.pixels[y:y + height, x:x + width]
        assert x >= 0 and y >= 0 and window.shape[:2] == (height, width), "beyond the image"
        self.windows.append((x, y, width, height))
        return window


def image_bag(index: int, *, size_px: tuple[int, int] = (96, 80), n_classes: int = 2,
              turn: int = 0, margin_px: int = 0) -> Bag:
    """A bag of class ``index % n_classes``, which shows in the colour of a spot; its noise is the
    same at every call with the same ``turn``. margin_px: white all around."""
    width, height = size_px
    random = np.random.default_rng([index, turn])
    label = index % n_classes
    pixels = random.integers(90, 200, (height, width, 3), dtype=np.uint8)
    pixels[height // 4:height // 2, width // 4:width // 2, label % 3] = 255
    if margin_px:
        inner = pixels[margin_px:-margin_px, margin_px:-margin_px].copy()
        pixels[:] = 255
        pixels[margin_px:-margin_px, margin_px:-margin_px] = inner
    return Bag(slide_id=f"slide_{index:02}", features=torch.empty(1, 0), label=label,
               case_id=f"case_{index:02}", image=TensorImage(torch.from_numpy(pixels)))


class DrawnImages(BagList):
    """Images that are others in each epoch and, where one comes twice in it, in each turn.

    read: (epoch, index, turn) of every reading, in its order
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__([image_bag(number) for number in numbers])
        self.numbers = list(numbers)
        self.read: list[tuple[int, int, int]] = []

    def begin_epoch(self, *, seed: int, epoch: int, turns: Mapping[int, Sequence[int]]) -> None:
        """See ``datasets.image_bags.ImageBags``."""
        self.epoch, self.turns = epoch, {index: deque(some) for index, some in turns.items()}

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        turn = self.turns[index].popleft()
        self.read.append((self.epoch, index, turn))
        return image_bag(self.numbers[index], turn=100 * self.epoch + turn)
