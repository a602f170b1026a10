"""Pictures of predicted values: against the true ones, and what is left over; as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils.plots import COLOURS, literal, new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_PANEL_INCHES = 4.2
_LIMITS_SD = 1.96  # of agreement: 95 % of residuals, if they are normal
_FONT = 8


def draw_scatter(values: np.ndarray, truths: np.ndarray, names: Sequence[str]) -> bytes:
    """Predicted over true values, a panel a value, with the line of equality.

    values, truths (n, T), n >= 1; names: T, the axes' labels.
    """
    figure, panels = _panels(len(names))
    for axes, found, true, name in zip(panels, values.T, truths.T, names, strict=True):
        both = np.concatenate([found, true])
        margin = 0.05 * (np.ptp(both) or 1.0)
        span = (both.min() - margin, both.max() + margin)
        axes.plot(span, span, color="0.4", linewidth=1, linestyle=":", label="equal")
        _dots(axes, true, found)
        axes.set(xlim=span, ylim=span, aspect="equal", xlabel=f"True {literal(name)}",
                 ylabel=f"Predicted {literal(name)}")
        axes.legend(loc="upper left", fontsize=_FONT, frameon=False)
    return to_png(figure)


def draw_residuals(values: np.ndarray, truths: np.ndarray, names: Sequence[str]) -> bytes:
    """Predicted less true over predicted values, with mean and 95 % limits; see
    ``draw_scatter``."""
    figure, panels = _panels(len(names))
    for axes, found, true, name in zip(panels, values.T, truths.T, names, strict=True):
        left = found - true
        mean, spread = left.mean(), left.std(ddof=1) if len(left) > 1 else 0.0
        axes.axhline(0, color="0.4", linewidth=1, linestyle=":")
        axes.axhline(mean, color=COLOURS[1], linewidth=1.4, label=f"mean {mean:.3g}")
        for sign in (-1, 1):
            axes.axhline(mean + sign * _LIMITS_SD * spread, color=COLOURS[1], linewidth=1,
                         linestyle="--", label=f"mean ± {_LIMITS_SD} SD ({spread:.3g})"
                         if sign > 0 else None)
        _dots(axes, found, left)
        axes.set(xlabel=f"Predicted {literal(name)}", ylabel="Predicted less true")
        axes.legend(loc="best", fontsize=_FONT, framealpha=0.8)
    return to_png(figure)


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """One panel a value, in rows of three."""
    columns = min(number, _COLUMNS)
    rows = -(-number // columns)
    figure = new_figure(_PANEL_INCHES * columns, _PANEL_INCHES * rows)
    panels = [figure.add_subplot(rows, columns, 1 + place) for place in range(number)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _dots(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Points that show where they lie densely."""
    axes.scatter(x, y, s=16, color=COLOURS[0], alpha=0.9 if len(x) < 100 else 0.4,
                 linewidths=0, zorder=3)
