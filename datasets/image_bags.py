"""Bags of whole slide images for streaming models: always the same for evaluation, another part
and another view of each slide in every epoch of training (spec streaming.md 10)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from datasets.epoch_draws import DrawnBags
from datasets.image_augment import Augmentation, ImageView
from datasets.image_crops import draw_crop, most_tissue
from datasets.image_options import ImageAugmentOptions
from datasets.image_store import ImageStore, StoredImage
from datasets.table import SlideTable
from utils.contracts import Bag, SlideImage
from utils.errors import ItemFailed, Refused
from utils.memory import available_memory_bytes

_MEMORY_SHARE = 0.25  # of what is free now, for one augmented image; feeding reads some ahead


class ImageBags(DrawnBags):
    """Bags of the slides of a table, in its order; ``bag.image`` has the pixels.

    Features are (1, 0). For evaluation the image is all of the slide's, or the square of
    ``store.image_size`` px with most tissue; for ``training`` a square drawn anew whenever it is
    read, augmented as ``ImageAugmentOptions`` say. Augmented images are made when a bag is read
    and held where they take less than a quarter of the free memory; all others are read, window by
    window, when they are asked for. The pixels are the same either way.
    pin: page-locked memory for pixels, for fast copies to a GPU; augmentation: see
    ``ImageAugmentOptions``, ``Refused`` for what does nothing. Pickles to worker processes.
    """

    def __init__(self, table: SlideTable, store: ImageStore, *, pin: bool = False,
                 image_augment: bool = False, **augmentation: Any) -> None:
        super().__init__(table)
        self.store, self.pin = store, pin
        self._augmentation = _augmentation(image_augment, augmentation)

    def verify(self) -> dict[str, str]:
        """Read a little tissue of each slide's image; slide -> reason for the bad ones."""
        failures = {}
        for slide_id in self.slide_ids:
            try:
                stored = self.store.open_image(slide_id)
                piece = stored.record.boxes[0]
                middle = (piece.x + piece.width // 2, piece.y + piece.height // 2)
                self._view(stored, middle, 1).read(0, 0, 1, 1)
            except (ItemFailed, OSError) as error:
                failures[slide_id] = str(error)
        return failures

    def read(self, slide_id: str) -> Bag:
        """See ``TableBags``."""
        import torch

        rng = self._random.generator(slide_id) if self._for_training else None
        stored = self.store.open_image(slide_id)
        image = self._same(stored) if rng is None else self._drawn(stored, rng)
        return Bag(slide_id=slide_id, features=torch.empty(1, 0), image=image,
                   **self.truth_of(slide_id))

    def _same(self, stored: StoredImage) -> SlideImage:
        """What evaluation sees."""
        side = 0 if self.store.whole_images else self.store.image_size
        origin = most_tissue(stored.tissue, cell_px=stored.cell_px, size_px=stored.size_px,
                             side_px=side) if side else (0, 0)
        return self._view(stored, origin, side)

    def _drawn(self, stored: StoredImage, rng: np.random.Generator) -> SlideImage:
        """What training sees this time."""
        side = self.store.image_size
        origin = draw_crop(stored.tissue, cell_px=stored.cell_px, size_px=stored.size_px,
                           side_px=side, rng=rng) if side else (0, 0)
        view = self._view(stored, origin, side)
        if self._augmentation is None:
            return view
        view = view.augmented(self._augmentation, rng, grow=not side)
        width, height = view.size_px
        fits = 3 * width * height <= _MEMORY_SHARE * available_memory_bytes()
        return view.held() if fits and view.turn is not None else view

    def _view(self, stored: StoredImage, origin_px: tuple[int, int], side_px: int) -> ImageView:
        """A square of the image; all of it for a side of 0."""
        return ImageView(image=stored, origin_px=origin_px, pin=self.pin, threads=self.store.map,
                         size_px=(side_px, side_px) if side_px else stored.size_px)


def _augmentation(wanted: bool, values: Mapping[str, Any]) -> Augmentation | None:
    """``Refused`` for values that do nothing."""
    defaults = {item.name: item.default for item in fields(ImageAugmentOptions)[1:]}
    for name, value in values.items():
        flag = f"no_{name}" if defaults[name] is True else name
        if not wanted and value != defaults[name]:
            raise Refused(f"--{flag} has no effect without --image_augment: give both or leave it "
                          "out")
    sigma = values.get("elastic_sigma", defaults["elastic_sigma"])
    if values.get("elastic_alpha") == 0 and sigma != defaults["elastic_sigma"]:
        raise Refused("--elastic_sigma has no effect with --elastic_alpha 0: leave it out")
    return Augmentation(**values) if wanted else None
