"""Are patches or images of a heatmap like those that an end-to-end model was trained on?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

TOLERANCE = 0.1  # of a patch's side in um: records hold um per px to two digits


class TrainedScale:
    """Size and scale of the patches in training, as the json of the checkpoint has them.

    facts: of the store of patches: lists ``px`` and ``mpp_um``, and ``low``, the same of the lower
    magnification; empty where nothing is known
    """

    remedy = "set patch_size and patch_mpp as in training"

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._kinds = [
            (part["px"], part.get("mpp_um") or []) for part in (facts, facts.get("low") or {})
            if part.get("px")]
        self._told: set[str] = set()

    def difference(self, patch_px: int, mpp_um: float | None) -> str:
        """"" or what differs, of patches of this side at ``mpp_um`` um per px (None = unknown).

        The model resizes its patches, so what counts is the side of the tissue that they show.
        """
        if not self._kinds or any(_fits(patch_px, mpp_um, *kind) for kind in self._kinds):
            return ""
        trained = " and ".join(f"{_text(px, 'px')} at {_text(mpp, 'um/px')}"
                               for px, mpp in self._kinds)
        return (f"the model was trained on patches of {trained}, these are {patch_px} px at "
                f"{_text([mpp_um] if mpp_um else [], 'um/px')}")

    def warn(self, slide_id: str, patch_px: int, mpp_um: float | None) -> None:
        """Print the difference on stderr, the same one once a run."""
        text = self.difference(patch_px, mpp_um)
        if text and text not in self._told:
            self._told.add(text)
            print(f"warning: {slide_id}: {text}: {self.remedy}", file=sys.stderr)


class ImageScale(TrainedScale):
    """The same of whole images, of which the scale alone counts. facts: has a list ``mpp_um``."""

    remedy = "give streaming_arguments the images, or the image_mpp, of the training"

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__({})
        self._mpp_um: list[float] = facts.get("mpp_um") or []

    def difference(self, patch_px: int, mpp_um: float | None) -> str:
        """"" or what differs, of an image at ``mpp_um`` um per px (None = unknown)."""
        if mpp_um is None or not self._mpp_um or _fits(1, mpp_um, [1], self._mpp_um):
            return ""
        return (f"the model was trained on images of {_text(self._mpp_um, 'um/px')}, this one has "
                f"{_text([mpp_um], 'um/px')}")


def _fits(patch_px: int, mpp_um: float | None, px: list[int], trained_mpp_um: list[float]) -> bool:
    if mpp_um is None or not trained_mpp_um:
        return patch_px in px
    return any(abs(patch_px * mpp_um - side * mpp) <= TOLERANCE * side * mpp
               for side in px for mpp in trained_mpp_um)


def _text(values: list[Any], unit: str) -> str:
    return f"{' or '.join(f'{value:.4g}' for value in values) or 'unknown'} {unit}"
