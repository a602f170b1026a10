"""How far the positions of a map reach into the image, along its rows or its columns.

Source: spec streaming.md 3.2. Its recursion of lost borders L and R, layer by layer, is the rounded
form of the reach that is carried here in input px, so that parts compose exactly.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Rows or columns of a module: output ``o`` depends on inputs ``o * stride - reach_before`` to
    ``o * stride + reach_after``; ``n`` inputs give ``(n + room) // stride`` outputs.

    lost_start, lost_end, extra are of a tile inside of an image that starts at a multiple of
    ``stride`` and is ``m * stride`` long.
    """

    stride: int
    reach_before: int
    reach_after: int
    room: int

    @property
    def lost_start(self) -> int:
        """L: how many outputs at the start of a tile are not those of the image."""
        return -(-self.reach_before // self.stride)

    @property
    def lost_end(self) -> int:
        """R: how many at its end."""
        return self.extra + self.reach_after // self.stride

    @property
    def extra(self) -> int:
        """A tile has ``m + extra`` outputs: 0 for 'same' padding, fewer without padding."""
        return self.room // self.stride

    @property
    def smallest_tile(self) -> int:
        """Length in inputs of the shortest tile that has an output of the image inside of it."""
        return self.stride * (self.lost_start + self.reach_after // self.stride + 1)

    def outputs(self, inputs: int) -> int:
        """How many outputs so many inputs give; 0 if the window is longer."""
        return max(0, (inputs + self.room) // self.stride)

    def then(self, after: Axis) -> Axis:
        """This one, and ``after`` on its result."""
        return Axis(self.stride * after.stride,
                    self.reach_before + self.stride * after.reach_before,
                    self.reach_after + self.stride * after.reach_after,
                    self.room + self.stride * after.room)

    def beside(self, other: Axis) -> Axis:
        """Both joined (they are of one stride): what depends on either."""
        return Axis(self.stride, max(self.reach_before, other.reach_before),
                    max(self.reach_after, other.reach_after), min(self.room, other.room))


SAME = Axis(1, 0, 0, 0)  # every position by itself


def window_axis(size: int, stride: int, before: int, after: int, *, dilation: int = 1,
                ceil: bool = False) -> Axis:
    """Of a window of ``size`` on an input padded by ``before`` and ``after`` positions.

    ceil: torch's ``ceil_mode``, a last window that hangs over the end, if it starts before it
    """
    span = dilation * (size - 1)
    room = before + after - span - 1 + stride
    if ceil:
        room = min(room + stride - 1, before - 1 + stride)
    return Axis(stride, before, span - before, room)
