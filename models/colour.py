"""Colours of pixels changed in CIE LCh: lightness and chroma by factors, hue by an angle.

LCh are the cylinder coordinates of CIELAB, whose distances are about those that an eye sees. The
same change of every pixel, wherever it is: the tiles of an image stay tiles of one image, and glass
of one colour stays of one colour. Source: CIE 15:2018 (CIELAB, white D65), IEC 61966-2-1 (sRGB).
The hue is shifted, not multiplied: a factor would turn red hardly and blue much (spec streaming.md
14, defect 24).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750),
        (0.0193339, 0.1191920, 0.9503041))  # of linear sRGB
_TO_LAB = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))  # L + 16, a, b
_EDGE = 6 / 29  # below it CIELAB is linear


def change_colour(rgb: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """(..., 3) sRGB values from 0 to 1 -> the same shape and type, cut to 0 to 1.

    colour: lightness and chroma are multiplied by the first two, the third is added to the hue, in
    radians. White and every grey stay as they are where the lightness does.
    """
    xyz = np.array(_XYZ)
    xyz /= xyz.sum(axis=1, keepdims=True)  # in shares of the white point
    turn, shift = _in_cube_roots(colour)
    roots = _mixed(_cube_root(_mixed(_linear(rgb), xyz)), turn, shift)
    return _gamma(_mixed(_cube(roots), np.linalg.inv(xyz)).clamp(0, 1))


def _in_cube_roots(colour: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The change as a matrix and a shift of f(X), f(Y), f(Z), of which L, a and b are sums."""
    lightness, chroma, hue = colour
    cos, sin = chroma * math.cos(hue), chroma * math.sin(hue)
    change = np.array(((lightness, 0, 0), (0, cos, -sin), (0, sin, cos)))
    back = np.linalg.inv(_TO_LAB)
    return back @ change @ np.array(_TO_LAB), back[:, 0] * 16 * (1 - lightness)


def _mixed(values: Tensor, matrix: np.ndarray, shift: Sequence[float] | np.ndarray = (0, 0, 0)
           ) -> Tensor:
    """matrix v + shift of each (..., 3) v. No matrix product: those may run in lower precision."""
    one, two, three = values.unbind(-1)
    return torch.stack([one * float(row[0]) + two * float(row[1]) + three * float(row[2])
                        + float(more) for row, more in zip(matrix, shift, strict=True)], dim=-1)


def _linear(rgb: Tensor) -> Tensor:
    """sRGB values to amounts of light."""
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _gamma(light: Tensor) -> Tensor:
    """Amounts of light to sRGB values."""
    bright = 1.055 * light.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(light <= 0.0031308, light * 12.92, bright)


def _cube_root(share: Tensor) -> Tensor:
    """CIELAB's f of X, Y and Z in shares of white."""
    dark = share / (3 * _EDGE**2) + 4 / 29
    return torch.where(share > _EDGE**3, share.clamp(min=_EDGE**3) ** (1 / 3), dark)


def _cube(root: Tensor) -> Tensor:
    """The inverse of ``_cube_root``."""
    return torch.where(root > _EDGE, root**3, 3 * _EDGE**2 * (root - 4 / 29))
