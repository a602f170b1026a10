"""What a data set yields and a slide model eats, and what it answers.

These shapes are the only thing the engine, the models and the data sets share.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from utils.objectives import Objective

Material = Literal["features", "patches", "images"]  # what a model learns from


class LevelRows(Protocol):
    """A finer level of a bag of several magnifications; its rows are read when asked for.

    branching: r * r; the children of row p of the level above are the rows p * branching to
               (p + 1) * branching - 1
    coords:    (N, 2) top-left x, y of each patch in level-0 pixels; None when unknown
    valid:     (N,) bool, False for patches outside the slide, never to be read; None = all valid
    """

    branching: int
    coords: np.ndarray | None
    valid: np.ndarray | None

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """(len(rows), D) float32 on the CPU; ``ItemFailed`` when damaged or not finite."""
        ...


class PatchImages(Protocol):
    """Pixels of a bag's patches, for models that encode them themselves; held or read when asked.

    Patches may differ in size between scales, never within a chunk.
    """

    def __len__(self) -> int: ...

    def stream(self, most: int) -> Iterator[torch.Tensor]:
        """All patches in order, as (n, h, w, 3) uint8 RGB tensors of at most ``most`` patches, on
        the CPU (pinned where a GPU follows). May be called any number of times, with the same
        answer. ``ItemFailed`` naming the slide when one cannot be read."""
        ...


class SlideImage(Protocol):
    """One image of a slide for models that take slides whole; read window by window.

    size_px: (width, height); all pixel quantities are px of this image
    mpp_um: um per px; None when unknown
    colour: what is done to the colours after reading, in CIE LCh of the pixels: lightness and
            chroma times the first two, the third added to the hue, in radians; None = nothing
    """

    @property
    def size_px(self) -> tuple[int, int]: ...
    @property
    def mpp_um(self) -> float | None: ...
    @property
    def colour(self) -> tuple[float, float, float] | None: ...

    def read(self, x: int, y: int, width: int, height: int) -> torch.Tensor:
        """(height, width, 3) uint8 RGB of a window inside the image, on the CPU (pinned where a
        GPU follows); glass and what lies beyond the tissue is white. May be called from any
        thread, always with the same answer. ``ItemFailed`` naming the slide."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bag:
    """One slide (or patient) as a bag of instances.

    features: (N, D) float tensor, rows in the order of ``coords``; of several magnifications the
              coarsest; (N, 0) where the model makes them of ``patches``, (1, 0) of ``image``
    coords:   (N, 2) integers, top-left x, y of each patch in level-0 pixels; None when unknown
    label:    class index; None when there is none (inference, or another task)
    target:   what other tasks predict: multi-label T of 0 and 1 (NaN = unknown), regression T
              values, survival (time, event) with event 1 = seen, 0 = censored
    children: the finer levels, coarse to fine; empty for one magnification
    patches:  pixels of the N patches, for end-to-end models; None for all others
    image:    the slide as one image, for streaming models; None for all others
    """

    slide_id: str
    features: torch.Tensor
    coords: np.ndarray | None = None
    label: int | None = None
    target: tuple[float, ...] | None = None
    case_id: str = ""
    children: tuple[LevelRows, ...] = ()
    patches: PatchImages | None = None
    image: SlideImage | None = None

    def __len__(self) -> int:
        return int(self.features.shape[0])

    @property
    def truth(self) -> tuple[float, ...] | None:
        """What a prediction is compared with: (label,), or the target; None when unknown."""
        return self.target if self.label is None else (float(self.label),)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Bag:
        """The same bag with its tensors on ``device``."""
        return replace(self, features=self.features.to(device, non_blocking=non_blocking))


@dataclass(kw_only=True)
class LevelOutput:
    """What a model of several magnifications saw at one of them.

    rows:      (n,) numbers of the level's rows that were fed
    attention: (1, n) raw scores before the softmax
    logits:    (1, C)
    selected:  (k,) numbers of the rows whose children went on; empty at the finest level
    """

    rows: torch.Tensor
    attention: torch.Tensor
    logits: torch.Tensor
    selected: torch.Tensor


@dataclass(kw_only=True)
class SlideOutput:
    """What a slide model says of one bag.

    logits:    (1, C), from which the model's objective makes scores
    attention: (K, N) raw scores before the softmax; K = 1, or C for one row a class; None
               for models without attention
    embedding: (K, H) slide representation; None when there is none
    instances: (N, C) probabilities of each instance; None for attention models
    heads:     (H, N) attention of each head, rows sum to 1; None for models with one
    levels:    one entry a magnification, coarse to fine; empty for models of one
    """

    logits: torch.Tensor
    attention: torch.Tensor | None = None
    embedding: torch.Tensor | None = None
    instances: torch.Tensor | None = None
    heads: torch.Tensor | None = None
    levels: tuple[LevelOutput, ...] = ()

    @property
    def probabilities(self) -> torch.Tensor:
        """(1, C) softmax of the logits, in float32."""
        return self.logits.float().softmax(dim=1)

    @property
    def predicted(self) -> int:
        """Index of the most probable class; ties go to the lower index."""
        return int(self.probabilities.argmax(dim=1).item())

    def attention_of(self, class_index: int) -> torch.Tensor | None:
        """(N,) raw scores of one class; models with a single row give that row for every class."""
        if self.attention is None:
            return None
        return self.attention[class_index if self.attention.shape[0] > 1 else 0]


@dataclass(kw_only=True)
class StepLoss:
    """One scalar to back-propagate, and what the log wants to know about it.

    value:      scalar tensor with graph; what the optimiser sees
    slide_loss: detached scalar, the slide-level part alone (validation watches its mean)
    parts:      further detached scalars by name, e.g. ``instance_loss``
    output:     the slide's prediction; set on the last loss that a model yields for a bag
    targets, predictions: (M,) instance labels and guesses of the clustering branch, or None
    """

    value: torch.Tensor
    slide_loss: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    output: SlideOutput | None = None
    targets: torch.Tensor | None = None
    predictions: torch.Tensor | None = None


class SlideModel(Protocol):
    """A torch module with these two methods; ``state_dict`` keys are the published ones.

    objective:  what it learns, and what its logits mean
    contextual: does the attention of a patch depend on the other patches of the bag?
    """

    objective: Objective
    contextual: bool

    def __call__(self, bag: Bag) -> SlideOutput: ...

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """Yield scalar losses one at a time; the engine back-propagates each as it comes."""
        ...

    def state_dict(self) -> dict[str, Any]: ...


class JointEncoder(SlideModel, Protocol):
    """A slide model that makes the features of several bags at once, with gradient.

    batch_size: bags encoded at once; their patches share the statistics of a batch
    """

    batch_size: int

    def rest(self, resting: bool) -> None:
        """From the next ``train()`` on: does the encoder stay as it is, without gradient?"""
        ...

    def encode(self, bags: Sequence[Bag]) -> Generator[Bag, None, None]:
        """The bags in order, with ``features`` (leaves that collect gradient) and no ``patches``.

        The caller back-propagates its losses of each bag before it asks for the next; when it asks
        after the last, what the features collected goes back through the encoder. Closed before,
        nothing does. With statistics shared by all processes every one must call this equally
        often, if need be with no bags.
        """
        ...


class TissuePredictor(Protocol):
    """A learned segmenter of slide overviews (models make it, data sets feed it).

    mpp_um: um per px that it wants; max_side_px: longest side that it can use, an overview that
        would be longer is wanted that much coarser; None = any
    threshold: probability from which on a pixel is tissue
    """

    mpp_um: float
    threshold: float
    max_side_px: int | None

    def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(h, w, 3) uint8 RGB images of any sizes -> (h, w) float32 in 0..1 each."""
        ...

    def record(self) -> dict[str, Any]:
        """What decides the masks, for the parameters of results."""
        ...
