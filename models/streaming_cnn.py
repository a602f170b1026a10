"""A convolutional network over a whole slide, trained from slide labels with exact gradients.

The slide is one image. The network is run over it tile by tile (``models.streaming``), which gives
the very map, and in the backward pass the very gradient, that the whole image would give; a head
sees the positions of the map as the rows of a bag. So there is nothing to choose but time and
memory: tiles, maps that are held, the cut.
State-dict keys: ``encoder.model...`` (timm's) and ``mil...``, as in end-to-end models.
Source: Pinckaers, van Ginneken, Litjens, "Streaming convolutional neural networks for end-to-end
learning with multi-megapixel images", IEEE TPAMI 2022; spec streaming.md 6 and 7. Other than there,
the whole network is trained unless asked otherwise, and the gradient of batch norms' weight and
bias is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from models.colour import change_colour
from models.e2e_encoders import build_encoder
from models.locality import Step, check_step, compose
from models.options import StreamingOptions
from models.patch_network import PatchNetwork
from models.shared_masks import image_masks
from models.stream_budget import Group, free_memory, graph_bytes, plan_groups, run_groups
from models.streaming_heads import PooledHead
from models.streaming_stages import (
    align_padding,
    crashes_on_cpu,
    ends,
    freeze_norms,
    map_size,
    modules_of,
    split_stages,
)
from models.two_pass import Replay
from utils.contracts import Bag, SlideImage, SlideModel, SlideOutput, StepLoss
from utils.errors import ItemFailed, Refused
from utils.replay import kept_random

if TYPE_CHECKING:
    from models.slide_models import SlideModelSpec
    from models.streaming import GradientSink

TrainPart = Literal["head", "last_stage", "all"]
_PROBE_PX = 64  # side of the image (map) that tells the width (stride) of what is made of it
_MOST_PLANS = 16  # remembered: slides of a cohort may all be of other sizes, and a plan has MBs
_GB = 10**9
_PROBED: set[tuple[str, str | None]] = set()  # networks, with their cut, found as local as said


@cache
def map_width(network: str) -> int:
    """Channels of the last map of a network, found without memory for its weights.

    ``Refused`` for an unknown network, and for one without maps.
    """
    with torch.device("meta"), torch.no_grad():
        x = torch.zeros(1, 3, _PROBE_PX, _PROBE_PX)
        for _, parts in build_encoder(network).eval().stages():
            for _, part in parts:
                x = part(x)
    return int(x.shape[1])


def build_streaming(network: str, spec: SlideModelSpec) -> StreamingCNN:
    """A fresh model; ``Refused`` where the options do not fit the network.

    The head ``gated_attention`` is the slide model ``abmil`` of the registry. ``spec.dropout``
    works in it as everywhere; before the linear layer of the others, where the published model has
    none (0).
    """
    from models.slide_models import SLIDE_MODELS

    if spec.embed_dim != map_width(network):
        raise Refused(f"model: the maps of {network} have {map_width(network)} channels, embed_dim "
                      f"is {spec.embed_dim}: leave it out")
    own = {item.name for item in fields(StreamingOptions)} - {"head"}
    options = {name: value for name, value in spec.options.items() if name in own}
    encoder, pool = build_encoder(network), spec.options["head"]
    head = (SLIDE_MODELS.get("abmil")(replace(spec, model_type="abmil", options={}))
            if pool == "gated_attention" else
            PooledHead(pool=pool, n_classes=spec.n_classes, embed_dim=spec.embed_dim,
                       dropout=spec.dropout, objective=spec.objective()))
    model = StreamingCNN(encoder, head, **options)
    if (network, model.cut) not in _PROBED and not next(model.parameters()).is_meta:
        model.probe()
        _PROBED.add((network, model.cut))
    return model


class StreamingCNN(nn.Module):
    """A slide model over whole images (``utils.contracts.SlideModel``).

    mil: a slide model for bags whose rows are the positions of the map. Options as in
    ``models.options.StreamingOptions``; ``Refused`` where they do not fit the network.
    stride: px of the image from one position of the map to the next; centre_px: (x, y), px of the
    image, of the middle of what the first one sees of it (stages after the cut are left out)
    Stages that are not trained run once, without a graph, in eval mode. Batch norms always keep
    their statistics; their weight and bias are trained with their stage.
    """

    def __init__(
        self, encoder: PatchNetwork, mil: nn.Module, *, train_part: TrainPart, cut: str | None,
        tile_size: int, store_maps: Literal["auto", "none", "all"], stream_memory: float,
        skip_constant: bool,
    ) -> None:
        super().__init__()
        self.embed_dim = cast(SlideModel, mil).embed_dim  # type: ignore[attr-defined]
        self.objective = cast(SlideModel, mil).objective
        self.contextual = cast(SlideModel, mil).contextual
        self.cut, self.tile_size, self.store_maps = cut, tile_size, store_maps
        self.stream_memory, self.skip_constant = stream_memory, skip_constant
        align_padding(encoder)
        self._layout = (torch.contiguous_format if crashes_on_cpu(encoder)
                        else torch.channels_last)
        self.encoder = encoder.to(memory_format=self._layout)
        self.mil = mil
        self.resting = False
        self._freeze(train_part)
        self._lay_out()
        self.train()

    def _freeze(self, train_part: TrainPart) -> None:
        """Only what is trained wants gradient."""
        stages = self.encoder.stages()
        first = {"all": 0, "last_stage": len(stages) - 1, "head": len(stages)}[train_part]
        self.encoder.requires_grad_(False)  # with what timm has after the last map: it never runs
        for module in modules_of(stages[first:]):
            module.requires_grad_(True)
        self._frozen = modules_of(stages[:first])
        self._n_frozen = len(self._frozen)

    def _lay_out(self) -> None:
        """The steps that are streamed, and the modules that see the whole map after them.

        In plain lists: the modules are the encoder's.
        """
        self.encoder.eval()
        streamed, held = split_stages(self.encoder.stages(), self.cut)
        self._steps = [step for stage in streamed for step in stage]
        self._boundaries = ends(streamed)
        self._held = modules_of(held)
        reach = compose(self._steps)
        self.centre_px = tuple((axis.reach_after - axis.reach_before + 1) / 2
                               for axis in (reach.columns, reach.rows))
        self.stride = reach.rows.stride * _PROBE_PX // map_size(
            self._held, (_PROBE_PX, _PROBE_PX), channels=reach.out_channels)[0]
        self._budgets_bytes: dict[torch.device, int] = {}
        self._plans: dict[tuple[Any, ...], list[Group]] = {}

    def probe(self) -> None:
        """Compute what has been concluded: ``Refused`` where a streamed step sees farther than its
        closed form says. A second or so; of the network, not of its weights."""
        for step in self._steps:
            check_step(step)

    # ------------------------------------------------------------------------ what is trained

    def rest(self, resting: bool) -> None:
        """From the next ``train()`` on: does the network stay as it is, without gradient?"""
        self.resting = resting

    def train(self, mode: bool = True) -> Self:
        """Training mode for all that is trained; see the class."""
        super().train(mode)
        for module in [self.encoder] if self.resting else self._frozen:
            module.eval()
        freeze_norms(self.encoder)
        return self

    # ------------------------------------------------------------------------ the slide model

    def forward(self, bag: Bag) -> SlideOutput:
        """What the head says of the bag's image, or of the features it has: logits (1, C).

        Attention, where there is one, is (1, h * w), the positions of the map row by row.
        ``ItemFailed`` when the bag has no image, or one that is too small.
        """
        return cast(SlideModel, self.mil)(self._as_rows(bag))

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """The head's losses; their gradient goes down to the network by itself."""
        yield from cast(SlideModel, self.mil).losses(self._as_rows(bag))

    def _as_rows(self, bag: Bag) -> Bag:
        """The bag with a row of features a position, (h * w, C), in the place of its image."""
        if bag.image is None:
            if bag.features.shape[1] == self.embed_dim:
                return bag
            raise ItemFailed(f"{bag.slide_id}: the bag has no image of the slide")
        found = self.map_of(bag.image, slide_id=bag.slide_id)
        rows = found.permute(0, 2, 3, 1).reshape(-1, found.shape[1])
        return replace(bag, features=rows, image=None)

    def map_of(self, image: SlideImage, *, slide_id: str = "a slide",
               gradient_sink: GradientSink | None = None) -> Tensor:
        """(1, C, h, w) map of an image, float32 (float64 of a model in that).

        slide_id: for messages; gradient_sink: is given, in the backward pass, (window, gradient)
        of the normalised image in windows that overlap and add up, see ``models.streaming``
        ``ItemFailed`` when the image is too small, or cannot be read.
        """
        n_frozen = 0 if gradient_sink else self._n_frozen
        learns = torch.is_grad_enabled() and (gradient_sink is not None or not self.resting)
        tiles = _SlideTiles(image, self.encoder, self._layout)
        groups = self._groups(tiles.size, slide_id, n_frozen if learns else None)
        with torch.set_grad_enabled(learns):
            found = run_groups(groups, tiles, skip_constant=self.skip_constant,
                               gradient_sink=gradient_sink)
            with image_masks(nn.ModuleList(self._held), found.device):  # as if streamed
                for module in self._held:
                    found = module(found)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _groups(self, size: tuple[int, int], slide_id: str, n_frozen: int | None) -> list[Group]:
        """How an image of (h, w) px goes through the streamed steps; the first ``n_frozen`` modules
        get no gradient, None = none does. Decided once for each of the latest sizes."""
        like = next(self.encoder.parameters())
        kind = like.device.type
        number = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        key = (size, n_frozen, number, like.device)
        if key in self._plans:
            return self._plans[key]
        modules = [step.module for step in self._steps]
        try:
            map_size([*modules, *self._held], size, channels=3)
        except ValueError as error:
            raise ItemFailed(f"{slide_id}: an image of {size[1]} x {size[0]} px is too small for "
                             f"the network ({error})") from None
        graph = n_frozen is not None and n_frozen < len(self._steps)
        held_learns = n_frozen is not None and n_frozen < len(self._steps) + len(self._held)
        beside = self._held_bytes(size, number.itemsize) if held_learns else 0
        while len(self._plans) >= _MOST_PLANS:
            self._plans.pop(next(iter(self._plans)))
        try:
            self._plans[key] = plan_groups(
                self._steps, size, budget_bytes=max(0, self._budget_bytes(like.device) - beside),
                tile_size=self.tile_size, store_maps=self.store_maps, grad=graph,
                n_frozen=min(n_frozen or 0, len(self._steps)), bytes_per_value=number.itemsize,
                map_bytes_per_value=self._map_value_bytes(), boundaries=self._boundaries)
        except Refused as error:  # of this image alone: smaller ones may do
            raise ItemFailed(f"{slide_id}: {error}") from None
        return self._plans[key]

    def _budget_bytes(self, device: torch.device) -> int:
        """For an image: what was asked for, or is free on ``device`` when its first image comes."""
        if device not in self._budgets_bytes:
            self._budgets_bytes[device] = round(self.stream_memory * _GB) or free_memory(device)
        return self._budgets_bytes[device]

    def _map_value_bytes(self) -> int:
        """Of a number of the maps. Under autocast too some are float32, a sum with what has gone
        through a layer scale for example: seen on an image of a few px."""
        like = next(self.encoder.parameters())
        if not torch.is_autocast_enabled(like.device.type):
            return like.element_size()
        x = like.new_zeros(1, 3, _PROBE_PX, _PROBE_PX)
        most = 0
        as_streamed = Replay(module=self.encoder, device=like.device).first()
        with torch.no_grad(), kept_random(like.device), as_streamed:
            for step in self._steps:
                x = step.module(x)
                most = max(most, x.element_size())
        return most

    def _held_bytes(self, size: tuple[int, int], bytes_per_value: int) -> int:
        """What the graph of the stages after the cut takes."""
        if not self._held:
            return 0
        last = self._steps[-1]
        modules = [step.module for step in self._steps]
        after = Step(name="after the cut", module=nn.Sequential(*self._held), locality=replace(
            last.locality, in_channels=last.locality.out_channels))
        return graph_bytes(after, map_size(modules, size, channels=3),
                           bytes_per_value=bytes_per_value)


class _SlideTiles:
    """An image of a slide as ``models.streaming.ImageTiles``: the one place where pixels change
    their colours and are normalised, on the device of the network."""

    channels = 3

    def __init__(self, image: SlideImage, encoder: PatchNetwork,
                 layout: torch.memory_format) -> None:
        self.size = (image.size_px[1], image.size_px[0])
        self._image = image
        self._layout = layout
        self._like = next(encoder.parameters())
        self._scale, self._shift = (torch.tensor(
            values, dtype=torch.float64).to(self._like) for values in (
                [1 / std for std in encoder.std],
                [-mean / std for mean, std in zip(encoder.mean, encoder.std, strict=True)]))

    def read(self, window: tuple[slice, slice]) -> Tensor:
        """(h, w, 3) uint8."""
        rows, columns = window
        return self._image.read(columns.start, rows.start, columns.stop - columns.start,
                                rows.stop - rows.start)

    def prepare(self, raw: Tensor) -> Tensor:
        """(h, w, 3) uint8 -> (1, 3, h, w), in the network's layout."""
        pixels = raw.to(self._like.device, non_blocking=True).to(self._like.dtype) / 255
        if self._image.colour is not None:
            pixels = change_colour(pixels, self._image.colour)
        # whole rows: three times as fast as pixel by pixel
        scale, shift = (one.repeat(pixels.shape[1]) for one in (self._scale, self._shift))
        rows = torch.addcmul(shift, pixels.flatten(1), scale)
        image = rows.view_as(pixels).permute(2, 0, 1)[None]
        return image.contiguous(memory_format=self._layout)
