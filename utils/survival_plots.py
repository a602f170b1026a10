"""Kaplan-Meier curves of groups with the number at risk below them, as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from utils.plots import COLOURS, literal, new_figure, to_png
from utils.survival import kaplan_meier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 6.4, 4.8
_CURVES_TO_ROW = 16.0  # heights of the curves and of a row of the table
_NAME_PAD = 16  # points between a group's name and its first number
_MOST_TICKS = 7
_FONT = 9


@dataclass(frozen=True, kw_only=True)
class Group:
    """Times (n,) and events (n,), 1 seen and 0 censored, of one group; n >= 1."""

    name: str
    times: np.ndarray
    events: np.ndarray


def draw_kaplan_meier(groups: Sequence[Group], *, time_name: str, test: str) -> bytes:
    """Share without an event over time, a step curve a group with its pointwise 95 % interval.

    Short vertical marks are censored patients. test: what to say of the groups' difference.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(_WIDTH, _HEIGHT)
    grid = figure.add_gridspec(2, 1, height_ratios=[_CURVES_TO_ROW, len(groups)])
    axes = figure.add_subplot(grid[0])
    for number, group in enumerate(groups):
        _curve(axes, group, COLOURS[number])
    end = max(float(group.times.max()) for group in groups)
    axes.set(xlim=(0, 1.02 * end or 1), ylim=(0, 1.03), ylabel="Share without an event",
             xlabel=literal(time_name))
    axes.xaxis.set_major_locator(MaxNLocator(_MOST_TICKS, steps=[1, 2, 2.5, 5, 10]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", fontsize=_FONT, frameon=False)
    axes.text(0.02, 0.04, literal(test), transform=axes.transAxes, fontsize=_FONT)
    _table(figure.add_subplot(grid[1], sharex=axes), groups,
           [tick for tick in axes.get_xticks() if 0 <= tick <= end])
    return to_png(figure)


def _curve(axes: Axes, group: Group, colour: str) -> None:
    found = kaplan_meier(group.times, group.events)
    steps = np.append(0, found.times)
    share, low, high = (np.append(1, part) for part in (found.survival, found.low, found.high))
    axes.fill_between(steps, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
    axes.step(steps, share, where="post", color=colour, linewidth=1.8,
              label=f"{literal(group.name)} ({found.n} patients, {found.n_events} events)")
    censored = np.sort(group.times[group.events != 1])
    axes.plot(censored, share[np.searchsorted(steps, censored, side="right") - 1], linestyle="",
              marker="|", markersize=7, markeredgewidth=1, color=colour)


def _table(axes: Axes, groups: Sequence[Group], ticks: Sequence[float]) -> None:
    """How many of each group are still observed, and without an event, just before each tick."""
    for number, group in enumerate(groups):
        for tick in ticks:
            axes.text(tick, -number, str(int((group.times >= tick).sum())), ha="center",
                      va="center", fontsize=_FONT)
    axes.set_yticks([-number for number in range(len(groups))],
                    [literal(group.name) for group in groups], fontsize=_FONT)
    for label, colour in zip(axes.get_yticklabels(), COLOURS, strict=False):
        label.set_color(colour)
    axes.set(ylim=(0.5 - len(groups), 0.5))
    axes.set_title("Number at risk", loc="left", fontsize=_FONT)
    axes.tick_params(length=0, labelbottom=False)
    axes.tick_params(axis="y", pad=_NAME_PAD)
    axes.spines[:].set_visible(False)
