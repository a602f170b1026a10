"""Which pixels a position of a network's map depends on: the closed form that streaming rests on.

A module is traced once on the meta device, where nothing is computed. Each function of torch that
it calls hands on how far the positions of its result reach into the image (``models.local_ops``);
at a join (residual sum, concatenation) the farther reach counts. What is not known to be local is
refused by the name of its layer. A second way, ``probe_locality``, computes and compares.
Source: spec streaming.md 3.2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from models.axis import Axis
from models.local_ops import NCHW, Call, Map, Window
from utils.errors import Refused

__all__ = ["Axis", "Locality", "Step", "check_step", "compose", "locality_of", "make_steps",
           "output_size", "probe_locality"]

_TRACE_PX = 20160  # a side with most small strides in it: 2^6 * 3^2 * 5 * 7


@dataclass(frozen=True)
class Locality:
    """Both axes of a module that makes (n, out_channels, h', w') of (n, in_channels, h, w)."""

    rows: Axis
    columns: Axis
    in_channels: int
    out_channels: int

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the map of an input of ``size`` (h, w)."""
        return self.rows.outputs(size[0]), self.columns.outputs(size[1])


@dataclass(frozen=True)
class Step:
    """A part of a network that is run on tiles, and what it needs around them."""

    name: str
    module: nn.Module
    locality: Locality


def make_steps(parts: Sequence[tuple[str, nn.Module]], *, channels: int = 3) -> list[Step]:
    """The parts of a network that run one after another, of an image of ``channels``.

    ``Refused`` for the first layer that is not local, by its name.
    """
    steps = []
    for name, module in parts:
        locality = locality_of(module, channels=channels, name=name)
        steps.append(Step(name, module, locality))
        channels = locality.out_channels
    return steps


def compose(steps: Sequence[Step]) -> Locality:
    """Several steps (at least one) as one module: ``locality_of`` of their ``nn.Sequential``."""
    first, *others = (step.locality for step in steps)
    rows, columns, last = first.rows, first.columns, first
    for last in others:
        rows, columns = rows.then(last.rows), columns.then(last.columns)
    return Locality(rows, columns, first.in_channels, last.out_channels)


def output_size(module: nn.Module, size: tuple[int, int], *, channels: int) -> tuple[int, int]:
    """(h, w) of the map of an image of ``size`` (h, w); nothing is computed."""
    return locality_of(module, channels=channels).output_size(size)


def locality_of(module: nn.Module, *, channels: int, name: str = "") -> Locality:
    """The closed form of ``module`` on maps of ``channels``, in milliseconds.

    name: of the module in its network, for messages. The module stays as it is, training flags and
    buffers too, and nothing random is drawn. ``Refused`` with the layer for what is not local.
    """
    # a window as long as the image changes with it; padding up to a multiple of something shows
    # when a map is longer or shorter by a position, for which strides round up or down
    sizes = [_TRACE_PX, 2 * _TRACE_PX + 1, 2 * _TRACE_PX - 1]
    first, *others = (_Trace(module, channels, size, name) for size in sizes)
    if any(window.function == "pad" for trace in (first, *others) for window in trace.windows):
        stride = math.lcm(first.found.rows.stride, first.found.columns.stride)
        others += [_Trace(module, channels, _TRACE_PX + part, name)
                   for part in range(1, stride + 1) if stride % part == 0]
    for other in others:
        for one, same in zip_longest(first.windows, other.windows):
            if one != same:
                (one or same).refuse(
                    "its window, padding or number depends on the size of the image")
    return Locality(first.found.rows, first.found.columns, channels, first.out_channels)


def probe_locality(module: nn.Module, *, channels: int, name: str = "",
                   closed: Locality | None = None, seed: int = 0) -> Locality:
    """Computes instead of following: what a crop of an image gives against the whole image.

    closed: what is expected (default ``locality_of``); its stride is taken, and the crop is a few
    times its reach. A position is lost if the two differ or if it depends on what lies outside of
    the crop: there the image is also not-a-number, which no rectifier and no weight of zero hides.
    float64 on the CPU, on a copy without dropout. Of the result, lost_start and lost_end are
    measured; those of what is not local are larger than any closed form.
    """
    closed = closed or locality_of(module, channels=channels, name=name)
    copied = copy.deepcopy(module).to("cpu", torch.float64)
    for part in copied.modules():
        part.training = part.training and isinstance(part, nn.modules.batchnorm._BatchNorm)
    rows, columns = (_probed(copied, closed, dim, seed) for dim in (-2, -1))
    return Locality(rows, columns, channels, closed.out_channels)


def check_step(step: Step) -> None:
    """``Refused`` if a step loses more than its closed form says, by ``probe_locality``."""
    closed = step.locality
    found = probe_locality(step.module, channels=closed.in_channels, closed=closed)
    for ours, theirs in ((closed.rows, found.rows), (closed.columns, found.columns)):
        if theirs.lost_start > ours.lost_start or theirs.lost_end > ours.lost_end:
            raise Refused(f"layer '{step.name}' cannot be streamed: a crop of an image loses "
                          f"{theirs.lost_start} and {theirs.lost_end} positions at its sides, "
                          f"where {ours.lost_start} and {ours.lost_end} were expected; cut the "
                          "network before it with --cut")


@torch.no_grad()
def _probed(module: nn.Module, closed: Locality, dim: int, seed: int) -> Axis:
    """The axis of ``dim``; the other one is left whole, and short."""
    axis, other = (closed.rows, closed.columns) if dim == -2 else (closed.columns, closed.rows)
    reach = axis.smallest_tile
    size = [other.smallest_tile, other.smallest_tile]
    size[dim] = 5 * reach
    image = torch.rand(1, closed.in_channels, *size, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed)) - 0.25
    crop = image.narrow(dim, reach, 3 * reach)
    marked = torch.full_like(image, torch.nan)
    marked.narrow(dim, reach, 3 * reach).copy_(crop)
    part = module(crop)
    whole, depends = (module(one).narrow(dim, reach // axis.stride, part.shape[dim])
                      for one in (image, marked))
    differs = (part - whole).abs() > 1e-9 * whole.abs().max()
    wrong = (differs | depends.isnan()).movedim(dim, 0).flatten(1).any(1)
    middle = len(wrong) // 2
    start, end = wrong[:middle].nonzero(), wrong[middle:].flip(0).nonzero()
    lost = [int(found.max()) + 1 if len(found) else 0 for found in (start, end)]
    extra = len(wrong) - 3 * reach // axis.stride
    return Axis(axis.stride, lost[0] * axis.stride, (lost[1] - extra) * axis.stride,
                extra * axis.stride)


class _Trace(TorchFunctionMode):
    """One pass of meta tensors through a module; ``found`` is what its result is."""

    def __init__(self, module: nn.Module, channels: int, size: int, name: str) -> None:
        super().__init__()
        self.size = size
        self.windows: list[Window] = []
        self.layers = [name or type(module).__name__]
        self._maps: dict[int, tuple[Tensor, Map]] = {}  # tensors are held, so that ids stay theirs
        weights = {key: value.detach().to("meta") for key, value in
                   (*module.named_parameters(), *module.named_buffers())}
        kinds = [value.dtype for value in weights.values() if value.is_floating_point()]
        image = torch.empty(1, channels, size, size, device="meta",
                            dtype=kinds[0] if kinds else None)
        self._maps[id(image)] = (image, Map())
        try:
            with torch.no_grad(), self._named(module, name), self:
                result = functional_call(module, weights, (image,))
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            self._call("forward", (), {}).refuse(
                f"it fails on {self.size} x {self.size} px: {_line(error)}")
        held = self._maps.get(id(result))
        self.layers = self.layers[:1]
        if held is None or held[1].order != NCHW or any(held[1].mirrored):
            self._call("forward", (), {}).refuse(
                "its result is not a map (batch, channels, rows, columns) that could be followed")
        self.found, self.out_channels = held[1], int(result.shape[1])

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        """What ``func`` gives; notes what is known of it."""
        kwargs = kwargs or {}
        call = self._call(func.__name__, args, kwargs)
        if not call.maps:
            return func(*args, **kwargs)
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError) as error:
            call.require(not call.known,
                         f"it fails on {self.size} x {self.size} px: {_line(error)}")
            call.apply()
        tensors = list(_tensors(result))
        if tensors or (result is None and call.function != "__get__"):
            found = call.apply()
            if found is not None:
                self._hold(call, found, tensors)
        return result

    def _hold(self, call: Call, found: Map, tensors: list[Tensor]) -> None:
        """Notes what tensors are; the closed form of their sizes must be torch's own."""
        sizes = {"h": found.rows.outputs(self.size), "w": found.columns.outputs(self.size)}
        for tensor in tensors:
            call.require(tensor.ndim == len(found.order) and all(
                size == sizes.get(name, size)
                for name, size in zip(found.order, tensor.shape, strict=True)),
                "the size of its result is not understood")
            before = self._maps.get(id(tensor), (tensor, found))[1]
            call.require(found == before or not self._shown_elsewhere(tensor),
                         "it changes in place what another tensor shows too")
            self._maps[id(tensor)] = (tensor, found)

    def _shown_elsewhere(self, tensor: Tensor) -> bool:
        """Is there another map in the memory of this one, a view for example?"""
        own = tensor.untyped_storage()._cdata
        return any(other is not tensor and other.untyped_storage()._cdata == own
                   for other, _ in self._maps.values())

    def _call(self, function: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        tensors = [*_tensors(args), *_tensors(kwargs)]
        held = [self._maps[id(one)][1] for one in tensors if id(one) in self._maps]
        others = [one for one in tensors if id(one) not in self._maps]
        return Call(self.layers[-1], function, args, kwargs, held, others, self.windows)

    @contextmanager
    def _named(self, module: nn.Module, name: str) -> Iterator[None]:
        """``layers`` holds the names of the modules that run, the innermost last."""
        with ExitStack() as stack:
            for key, inner in module.named_modules():
                own = ".".join(filter(None, (name, key))) or type(module).__name__
                stack.callback(inner.register_forward_pre_hook(
                    lambda *_, own=own: self.layers.append(own)).remove)
                stack.callback(inner.register_forward_hook(
                    lambda *_: self.layers.pop() and None).remove)
            yield


def _line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in an argument or a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
