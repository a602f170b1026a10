"""What torch's functions do to the reach of a map: one rule per kind of function.

A function without a rule is not known to be local and is refused, never guessed: means over space,
statistics of a batch or group, attention, interpolation and the like belong to no tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from torch import Size, Tensor

from models.axis import SAME, Axis, window_axis
from utils.errors import Refused

NCHW = ("n", "c", "h", "w")


@dataclass(frozen=True)
class Map:
    """What is known of a tensor: its axes, and what its dimensions are.

    mirrored: padding (rows, columns) by pixels of the image itself, which the next window sees
    """

    rows: Axis = SAME
    columns: Axis = SAME
    order: tuple[str, ...] = NCHW
    mirrored: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Window:
    """A call that looks beyond single positions, or takes numbers; none may depend on the size of
    the image."""

    layer: str
    function: str
    rows: Axis = SAME
    columns: Axis = SAME
    numbers: tuple[float, ...] = ()

    def refuse(self, reason: str) -> NoReturn:
        """``Refused`` by the name of the layer."""
        raise Refused(f"layer '{self.layer}' cannot be streamed: {reason} ({self.function}); cut "
                      "the network before it with --cut, or take one without such layers")


@dataclass
class Call:
    """A function of torch that is given maps. layer: the module that runs, by its qualified name;
    others: the tensors it is given that are no maps; windows: what it saw is noted here."""

    layer: str
    function: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    maps: list[Map]
    others: list[Tensor]
    windows: list[Window] = field(default_factory=list)

    @property
    def known(self) -> bool:
        """Is there a rule for this function?"""
        return plain_name(self.function) in _RULES

    def apply(self) -> Map | None:
        """What its results are; None for tensors that are no maps. ``Refused`` if not local."""
        self.require(self.known, "it is not known to give a tile what it gives the whole image")
        return _RULES[plain_name(self.function)](self)

    def refuse(self, reason: str) -> NoReturn:
        """``Refused`` by the name of the layer."""
        Window(self.layer, self.function).refuse(reason)

    def require(self, fine: bool, reason: str) -> None:
        """``refuse`` unless fine."""
        if not fine:
            self.refuse(reason)

    def named(self, names: str, **defaults: Any) -> dict[str, Any]:
        """The arguments by name. The first, and no other, must be a map."""
        found = defaults | dict(zip(names.split(), self.args, strict=False)) | self.kwargs
        first = found[names.split()[0]]
        self.require(len(self.maps) == 1 and not any(first is one for one in self.others),
                     "its weights depend on the image")
        return found

    def window(self, rows: Axis, columns: Axis, mirrored: tuple[int, int] = (0, 0)) -> Map:
        """The map that a window over the positions of the only map makes."""
        before = self.maps[0]
        self.require(before.order == NCHW, "its input is not (batch, channels, rows, columns)")
        self.windows.append(Window(self.layer, self.function, rows, columns))
        rows, columns = (_over_mirrored(axis, padding) for axis, padding in
                         zip((rows, columns), before.mirrored, strict=True))
        return Map(before.rows.then(rows), before.columns.then(columns), NCHW, mirrored)


def plain_name(function: str) -> str:
    """Of in-place and operator forms too: "relu" of ``relu_``, "add" of ``__iadd__``."""
    return function.strip("_")


def _over_mirrored(axis: Axis, padding: int) -> Axis:
    """A window over padding by the image's own pixels: near an edge it sees as far inwards."""
    return replace(axis, reach_before=axis.reach_before + max(0, 2 * padding - axis.reach_after),
                   reach_after=max(axis.reach_after, 2 * padding)) if padding else axis


def _pair(value: Any) -> tuple[int, int]:
    """One number for both axes, or one each."""
    values = tuple(value) if isinstance(value, list | tuple | Size) else (value,)
    return (values[0], values[-1])


def _convolution(call: Call) -> Map:
    given = call.named("input weight bias stride padding dilation groups", stride=1, padding=0,
                       dilation=1)

    def axis(number: int) -> Axis:
        size, dilation = given["weight"].shape[2 + number], _pair(given["dilation"])[number]
        if isinstance(given["padding"], str):  # "same" or "valid"
            total = dilation * (size - 1) * (given["padding"] == "same")
            before, after = total // 2, total - total // 2
        else:
            before = after = _pair(given["padding"])[number]
        return window_axis(size, _pair(given["stride"])[number], before, after, dilation=dilation)

    return call.window(axis(0), axis(1))


def _pool(call: Call, names: str) -> Map:
    given = call.named(names, stride=None, padding=0, dilation=1, ceil_mode=False)
    size, padding = _pair(given["kernel_size"]), _pair(given["padding"])
    stride = _pair(given["stride"]) if given["stride"] else size
    dilation = _pair(given["dilation"])
    rows, columns = (window_axis(
        size[axis], stride[axis], padding[axis], padding[axis], dilation=dilation[axis],
        ceil=given["ceil_mode"]) for axis in (0, 1))
    return call.window(rows, columns)


def _max_pool(call: Call) -> Map:
    return _pool(call, "input kernel_size stride padding dilation ceil_mode")


def _mean_pool(call: Call) -> Map:
    return _pool(call, "input kernel_size stride padding ceil_mode count_include_pad")


def _power_pool(call: Call) -> Map:
    return _pool(call, "input norm_type kernel_size stride ceil_mode")


def _pad(call: Call) -> Map:
    given = call.named("input pad mode value", mode="constant")
    sides = [*given["pad"], *[0] * 8]
    (left, right), (above, below) = sides[0:2], sides[2:4]
    own = given["mode"] != "constant"
    call.require(given["mode"] != "circular" and min(sides) >= 0 and not any(sides[6:8]),
                 "padding from the other side of the image, or by less than nothing")
    call.require(not own or (left == right and above == below),
                 "unequal padding by the image's own pixels")
    call.require(not (own and any(call.maps[0].mirrored)),
                 "padding by the image's own pixels, twice")
    return call.window(Axis(1, above, -above, above + below), Axis(1, left, -left, left + right),
                       (above, left) if own else call.maps[0].mirrored)


def _pointwise(call: Call) -> Map:
    """Joins its maps; other tensors must be the same at every position."""
    numbers = tuple(one for one in (*call.args, *call.kwargs.values())
                    if isinstance(one, int | float) and not isinstance(one, bool))
    if numbers:
        call.windows.append(Window(call.layer, call.function, numbers=numbers))
    joined = call.maps[0]
    for other in call.maps[1:]:
        call.require(joined.order == other.order and joined.rows.stride == other.rows.stride
                     and joined.columns.stride == other.columns.stride,
                     "it joins maps of different strides")
        joined = replace(joined, rows=joined.rows.beside(other.rows),
                         columns=joined.columns.beside(other.columns),
                         mirrored=(max(joined.mirrored[0], other.mirrored[0]),
                                   max(joined.mirrored[1], other.mirrored[1])))
    for tensor in call.others:
        shape = [1] * (len(joined.order) - tensor.ndim) + list(tensor.shape)
        uniform = len(shape) == len(joined.order) and all(
            size == 1 for name, size in zip(joined.order, shape, strict=True) if name in "hw")
        call.require(uniform, "it takes values that differ from position to position")
    return joined


def _per_channel(call: Call) -> Map:
    call.require(len(call.maps) == 1, "its weights depend on the image")
    return call.maps[0]


def _concatenation(call: Call) -> Map:
    given = dict(zip(("tensors", "dim"), call.args, strict=False)) | call.kwargs
    dim = given.get("dim", given.get("axis", 0))
    call.require(call.maps[0].order[dim] == "c" and not call.others,
                 "it puts maps together otherwise than by their channels")
    return _pointwise(call)


def _batch_norm(call: Call) -> Map:
    given = call.named("input running_mean running_var weight bias training", training=False)
    call.require(not given["training"] and given["running_mean"] is not None,
                 "its statistics are of the batch; put it into evaluation mode (fixed statistics)")
    return call.maps[0]


def _over_channels(call: Call) -> Map:
    given = call.named("input normalized_shape weight bias eps")
    call.require(call.maps[0].order[-1] == "c" and len(given["normalized_shape"]) == 1,
                 "its statistics are over positions")
    return call.maps[0]


def _linear(call: Call) -> Map:
    call.named("input weight bias")
    call.require(call.maps[0].order[-1] == "c", "it mixes positions")
    return call.maps[0]


def _permutation(call: Call) -> Map:
    dims = call.args[1] if len(call.args) == 2 and not isinstance(call.args[1], int) \
        else call.kwargs.get("dims", call.args[1:])
    return replace(call.maps[0], order=tuple(call.maps[0].order[dim] for dim in dims))


def _transposition(call: Call) -> Map:
    given = call.named("input dim0 dim1")
    order = list(call.maps[0].order)
    one, other = given["dim0"], given["dim1"]
    order[one], order[other] = order[other], order[one]
    return replace(call.maps[0], order=tuple(order))


def _pieces(call: Call) -> Map:
    given = call.named("input number dim", dim=0)
    call.require(call.maps[0].order[given["dim"]] == "c", "it cuts the map by positions")
    return call.maps[0]


def _selection(call: Call) -> Map:
    key = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    order = call.maps[0].order
    fine = len(key) <= len(order) and all(
        isinstance(one, slice) and (name == "c" or one == slice(None))
        for name, one in zip(order, key, strict=False))
    call.require(fine, "it picks positions of the map")
    return call.maps[0]


def _constant(call: Call) -> None:
    """A new tensor; what differs from position to position is found where it meets a map."""


_POINTWISE = """
    abs add iadd radd sub isub rsub mul imul rmul div truediv itruediv rtruediv rdiv neg pos pow
    rpow square sqrt rsqrt reciprocal exp expm1 log log1p sin cos tanh sigmoid logsigmoid erf
    relu relu6 leaky_relu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid
    hardshrink softshrink tanhshrink softplus softsign threshold clamp clamp_min clamp_max clip
    minimum maximum lerp addcmul addcdiv dropout dropout2d alpha_dropout feature_alpha_dropout
    to type float double half bfloat16 contiguous clone detach"""
_RULES: dict[str, Callable[[Call], Map | None]] = {
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"), _constant),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenation),
    **dict.fromkeys(("chunk", "split", "tensor_split", "split_with_sizes"), _pieces),
    **dict.fromkeys(("layer_norm", "rms_norm"), _over_channels),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transposition),
    "avg_pool2d": _mean_pool, "batch_norm": _batch_norm, "conv2d": _convolution,
    "getitem": _selection, "linear": _linear, "lp_pool2d": _power_pool, "max_pool2d": _max_pool,
    "pad": _pad, "permute": _permutation, "prelu": _per_channel}
