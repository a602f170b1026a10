"""Where a streaming model looks: the attention of its map, or what its input gradient says.

A slide is one image, its tissue packed (``wsi_core.packing``), and each position of the network's
map stands for a square of ``stride`` x ``stride`` px of it. The image's record leads these back to
level 0; those whose centre lies in no box, on the white between pieces of tissue, are left out.
What is left is drawn like any patches.

Attention: the square lies around the centre of what the position sees.
Gradient: squares from the image's corner on. With f the logit of the predicted class (or label;
else the first score), x the normalised image and w the same of white, the score of a square is the
sum of df/dx (x - w) over its px and channels: to first order, by how much f rises because there is
tissue and not glass; below 0 it falls. That is linear in the gradient, so what tiles say of px that
they share is added as it comes, and memory is that of the map; absolute values could only be taken
of the gradient of the whole image.
Source: gradient x input (Shrikumar et al. 2016, arXiv 1605.01713), measured from white.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from datasets.heatmap_config import HeatmapArguments, PatchingArguments, StreamingArguments
from datasets.heatmap_files import AttentionMap, SlideFiles, read_map
from datasets.heatmap_items import HeatmapItem
from datasets.heatmap_scores import ModelTools, Outputs
from datasets.image_sources import open_direct
from utils.contracts import Bag, SlideImage, SlideModel
from utils.devices import Precision, autocast
from utils.errors import ItemFailed, Refused
from utils.storage import State, h5_state
from wsi_core.image_layout import Frame, image_frame
from wsi_core.image_record import ImageRecord, read_record
from wsi_core.packing import SlidePicture
from wsi_core.slide import WHITE, Slide, fingerprint
from wsi_core.slide_images import open_image, record_path
from wsi_core.tissue import Tissue

if TYPE_CHECKING:
    import torch

Source = Literal["attention", "gradient"]
Window = tuple[slice, slice]  # rows, columns of an image
_MAKE_AGAIN = "make it again with create_patches_fp.py --slide_images --no_auto_skip"


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """What a streaming model says of one image.

    prediction: (K,) scores of the model's objective, float64
    scores:     (h, w), raw, float64, of squares that are as far apart as positions of the map
    centre_px:  x, y of the middle of the first square, px of the image
    """

    prediction: np.ndarray
    scores: np.ndarray
    centre_px: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ImageTools(ModelTools):
    """A streaming model, and what of a slide it is shown.

    score: slide id and image -> its scores, by ``source``
    stride_px: side in px of the image of the square that a position stands for
    slide_images: folder with images; None = slides are read themselves, at ``mpp_um`` um per px
    """

    score: Callable[[str, SlideImage], ImageScores]
    source: Source
    stride_px: int
    slide_images: Path | None
    mpp_um: float | None


class Network(Protocol):
    """Of a streaming model. std: by which the pixels of each channel, of 0..1, are divided."""

    std: tuple[float, float, float]


class StreamedModel(SlideModel, Protocol):
    """A network over the image and a slide model over the positions of its map, see
    ``models.streaming_cnn``."""

    encoder: Network
    mil: SlideModel
    stride: int
    centre_px: tuple[float, float]

    def map_of(self, image: SlideImage, *, slide_id: str, gradient_sink: Callable[
        [Window, torch.Tensor], None] | None = None) -> torch.Tensor: ...


def pick_source(asked: Source | None, *, has_attention: bool) -> Source:
    """What the map shows; ``Refused`` when the attention is asked for and there is none."""
    if asked == "attention" and not has_attention:
        raise Refused("streaming_arguments: source is attention, but the head of this model has "
                      "none (gated_attention does): leave it out, or take gradient")
    return asked or ("attention" if has_attention else "gradient")


def direct_mpp(asked: StreamingArguments, trained: Mapping[str, Any]) -> float | None:
    """um per px at which slides are read themselves; None where images are given.

    trained: facts of the training's images. ``Refused`` where neither tells.
    """
    if asked.slide_images is not None:
        return None
    scales = [asked.image_mpp] if asked.image_mpp is not None else trained.get("mpp_um") or []
    if len(scales) != 1:
        raise Refused("streaming_arguments: give slide_images, or image_mpp: the checkpoint does "
                      "not tell one scale of its images "
                      f"({' and '.join(map(str, scales)) or 'nothing known'})")
    return float(scales[0])


class ImageMaps(SlideFiles):
    """The map of one open slide; its patches are what the positions of the map stand for."""

    tools: ImageTools

    def __init__(self, item: HeatmapItem, slide: Slide, *, folder: Path, tools: ImageTools,
                 heatmap: HeatmapArguments) -> None:
        """``ItemFailed`` when the slide has no image, or its image is of another slide."""
        self._prepared = record = self._read_record(item, slide, tools.slide_images)
        if record is not None:  # what the slide's pixel size was taken for
            item = replace(item, mpp_um=sum(record.slide_mpp_um) / 2)
        mpp_um = tools.mpp_um if record is None else record.mpp_um
        super().__init__(
            item, slide, folder=folder, tools=tools, heatmap=heatmap,
            patching=PatchingArguments(patch_size=tools.stride_px, patch_mpp=mpp_um, overlap=0.0))
        frame = self._frame(record)
        self.mpp_um = frame.mpp_um
        x, y = frame.downsample
        self.patch_px_l0 = tools.stride_px * x, tools.stride_px * y

    def _read_record(self, item: HeatmapItem, slide: Slide, folder: Path | None
                     ) -> ImageRecord | None:
        """Of the image in ``folder``."""
        if folder is None:
            return None
        path = record_path(folder, item.slide_id)
        if not path.is_file():
            raise ItemFailed(f"{item.slide_id}: has no image in {folder} ({path.name}): make it "
                             "with create_patches_fp.py --slide_images, or leave slide_images out")
        record, size = read_record(path), slide.level_dimensions[0]
        if record.slide_size != size:
            raise ItemFailed(f"{item.slide_id}: its image in {folder} is one of a slide of "
                             f"{record.slide_size[0]} x {record.slide_size[1]} px, "
                             f"{item.slide_path} has {size[0]} x {size[1]}: {_MAKE_AGAIN}")
        n_bytes = fingerprint(item.slide_path)["slide_bytes"]
        if (known := record.slide.get("slide_bytes")) != n_bytes:
            raise ItemFailed(f"{item.slide_id}: its image in {folder} is one of a slide of {known} "
                             f"bytes, {item.slide_path} has {n_bytes}: {_MAKE_AGAIN}")
        return record

    def _frame(self, record: ImageRecord | None) -> Frame:
        """The whole slide at the scale of its image."""
        if record is None:
            assert self.patching.patch_mpp is not None and self.slide_mpp is not None
            return image_frame(self.slide, self.patching.patch_mpp, self.slide_mpp)
        x, y = (full / side for full, side in
                zip(record.slide_size, record.frame_px, strict=True))
        return Frame(size_px=record.frame_px, downsample=(x, y), mpp_um=record.mpp_um)

    def _picture(self) -> SlidePicture:
        """The image, open; packed as main.py and eval.py do it when there is no folder."""
        if self.tools.slide_images is not None:
            return open_image(self.tools.slide_images, self.item.slide_id)
        assert self.tools.mpp_um is not None
        return open_direct(self.item.slide_path, image_mpp=self.tools.mpp_um,
                           mpp_um=self.item.mpp_um)

    def find_tissue(self, seg_level: int) -> Tissue:
        """As for any slide; where these settings find none, the pieces of its image."""
        found = super().find_tissue(seg_level)
        if found or self._prepared is None:
            return found
        outlines = []
        for box in self._prepared.boxes:
            right, bottom = box.x_l0 + box.width_l0, box.y_l0 + box.height_l0
            outlines.append(np.rint([(box.x_l0, box.y_l0), (right, box.y_l0), (right, bottom),
                                     (box.x_l0, bottom)]).astype(np.int32))
        return Tissue(contours=outlines, holes=[[] for _ in outlines])

    @cached_property
    def _made_of(self) -> dict[str, Any]:
        """What decides the map."""
        image = {"image_mpp": self.tools.mpp_um, "mpp_override": self.item.mpp_um} \
            if self._prepared is None else self._prepared.parameters
        return {**fingerprint(self.item.slide_path), "image": image, "source": self.tools.source,
                "model": dict(self.tools.model)}

    @cached_property
    def coarse(self) -> AttentionMap | None:
        """The map on the slide (``_blockmap.h5``); None when no square is on a piece of it.

        Corners are not rounded, so that squares touch wherever they are drawn.
        """
        path = self.file("_blockmap.h5")
        if h5_state(path, self._made_of) is State.DONE:
            found = read_map(path, self._made_of)
        else:
            scored, centres = self._scored()
            there = np.isfinite(centres).all(axis=1)
            if not there.any():
                return None
            found = self.save_map(path, centres[there] - np.divide(self.patch_px_l0, 2),
                                  scored.scores.reshape(-1)[there], scored.prediction,
                                  self._made_of)
        return replace(found, parameters={**self._made_of, "tissue": self.tissue_parameters})

    def _scored(self) -> tuple[ImageScores, np.ndarray]:
        """What the model says, and where on the slide, see ``centres_on_slide``."""
        slide_id = self.item.slide_id
        with self._picture() as picture:
            try:
                scored = self.tools.score(slide_id, Shown(picture))
            except Refused as error:  # too little memory for this one
                raise ItemFailed(f"{slide_id}: {error}") from None
            return scored, centres_on_slide(picture.record, scored, stride_px=self.tools.stride_px)

    @property
    def fine(self) -> AttentionMap | None:
        """The same: positions that overlap would be another image."""
        return self.coarse


class Shown:
    """An open image of a slide as models take it."""

    colour: tuple[float, float, float] | None = None

    def __init__(self, picture: SlidePicture) -> None:
        self.size_px, self._picture = picture.size_px, picture
        self.mpp_um: float | None = picture.mpp_um

    def read(self, x: int, y: int, width: int, height: int) -> torch.Tensor:
        """See ``SlideImage``."""
        import torch

        return torch.from_numpy(self._picture.read(x, y, width, height))


def centres_on_slide(record: ImageRecord, scored: ImageScores, *, stride_px: int) -> np.ndarray:
    """(h * w, 2) x, y of the centre of each square, row by row, in level-0 px; NaN where it lies
    on no piece of the slide."""
    rows, columns = np.indices(scored.scores.shape).reshape(2, -1)
    return record.to_level0(np.stack([columns, rows], axis=1) * stride_px + scored.centre_px)


def score_image(
    slide_id: str, image: SlideImage, *, model: StreamedModel, device: torch.device,
    precision: Precision, outputs: Outputs, source: Source,
) -> ImageScores:
    """Run a streaming model (in eval mode) on one slide, and back for the gradient.

    Raises ``ItemFailed`` for an image that cannot be read, or is too small for the network.
    """
    import torch

    width, height = image.size_px
    sums = torch.zeros(ceil(height / model.stride), ceil(width / model.stride),
                       dtype=torch.float64, device=device)

    def add(window: Window, gradient: torch.Tensor) -> None:
        add_to_squares(sums, against_white(image, window, gradient, std=model.encoder.std), window,
                       stride_px=model.stride)

    wants_gradient = source == "gradient"
    with torch.set_grad_enabled(wants_gradient), autocast(precision, device):
        found = model.map_of(image, slide_id=slide_id,
                             gradient_sink=add if wants_gradient else None)
        output = model.mil(Bag(slide_id=slide_id, features=found[0].flatten(1).T))
        values = model.objective.scores(output.logits)[0]
    prediction = values.detach().double().cpu().numpy()
    if not wants_gradient:
        assert output.attention is not None
        return ImageScores(
            prediction=prediction, centre_px=model.centre_px,
            scores=output.attention[0].reshape(found.shape[-2:]).double().cpu().numpy())
    predicted = outputs.predicted(prediction)
    drawn = values[0] if predicted is None else output.logits[0, predicted]
    (gradient,) = torch.autograd.grad(drawn, found)
    largest = gradient.abs().max()
    if largest > 0:  # goes back as numbers up to 1, which half precision can hold
        found.backward(gradient / largest)
    return ImageScores(prediction=prediction, scores=(sums * largest).cpu().numpy(),
                       centre_px=(model.stride / 2, model.stride / 2))


def against_white(image: SlideImage, window: Window, gradient: torch.Tensor, *,
                  std: Sequence[float]) -> torch.Tensor:
    """(h, w) gradient x (input - white) of a window of the image, summed over the channels.

    gradient: (1, 3, h, w) of the normalised input; std: of the three channels, of pixels of 0..1
    """
    rows, columns = window
    pixels = image.read(columns.start, rows.start, columns.stop - columns.start,
                        rows.stop - rows.start).to(gradient.device)
    total = gradient.new_zeros(pixels.shape[:2]).float()
    for channel, deviation in enumerate(std):
        total += gradient[0, channel] * (pixels[..., channel].float() - WHITE[channel]) / (
            255 * deviation)
    return total


def add_to_squares(sums: torch.Tensor, values: torch.Tensor, window: Window, *, stride_px: int
                   ) -> None:
    """Add the values (h, w) of a window of the image to the sums (H, W) of its squares."""
    import torch

    rows, columns = (torch.arange(part.start, part.stop, device=sums.device) // stride_px
                     for part in window)
    bands = sums.new_zeros(len(sums), values.shape[1]).index_add_(0, rows, values.to(sums))
    sums.index_add_(1, columns, bands)
