"""Pictures of class predictions: ROC, precision-recall, confusion, calibration; each as PNG bytes.

Figures are drawn on Agg canvases of their own: no display, no global state, and matplotlib is
imported only when a picture is drawn. Equal input gives equal bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from utils.metrics import (
    CALIBRATION_BINS,
    average_precision,
    binary_auc,
    calibration_bin,
    tie_groups,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
Corner = Literal["lower right", "lower left", "upper left"]

_LEGEND_MAX = 14
_DPI = 110


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Scores of one group of slides against one class.

    scores (n,) probabilities of the class, positive (n,) bool. ``bold`` for the curve that counts
    (pooled); the others are drawn thin. Curves of equal ``colour`` (an index) share a colour.
    """

    name: str
    scores: np.ndarray
    positive: np.ndarray
    colour: int = 0
    bold: bool = False

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(G + 1,) true and false positives at thresholds from above the highest score down."""
        groups = tie_groups(self.scores, self.positive, np.ones(len(self.scores)))
        true, false = (np.append(0, part[::-1].cumsum()) for part in groups)
        return true, false

    @property
    def drawable(self) -> bool:
        """Both classes are there."""
        return bool(self.positive.any() and not self.positive.all())


def draw_roc(curves: Sequence[Curve]) -> bytes:
    """ROC curves; the legend gives each area. A curve of one class is named, not drawn."""
    figure, axes = _square("False positive rate", "True positive rate")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle=":")
    for curve in curves:
        if not curve.drawable:
            axes.plot([], [], linestyle="", label=f"{literal(curve.name)}: one class only")
            continue
        true, false = curve.counts()
        area = binary_auc(curve.scores, curve.positive)
        axes.plot(false / false[-1], true / true[-1], **_look(curve),
                  label=f"{literal(curve.name)}: AUC {area:.3f}")
    _legend(axes, len(curves), "lower right")
    return to_png(figure)


def draw_precision_recall(curves: Sequence[Curve]) -> bytes:
    """Precision over recall as steps; dotted: the share of positives (a guess's precision)."""
    figure, axes = _square("Recall", "Precision")
    for curve in curves:
        if not curve.drawable:
            axes.plot([], [], linestyle="", label=f"{literal(curve.name)}: one class only")
            continue
        true, false = curve.counts()
        precision = true[1:] / (true + false)[1:]
        area = average_precision(curve.scores, curve.positive)
        axes.step(true / true[-1], np.append(precision[0], precision), where="pre",
                  **_look(curve), label=f"{literal(curve.name)}: AP {area:.3f}")
        if curve.bold or len(curves) == 1:
            axes.axhline(curve.positive.mean(), color=COLOURS[curve.colour % len(COLOURS)],
                         linewidth=1, linestyle=":")
    _legend(axes, len(curves), "lower left")
    return to_png(figure)


def draw_confusion(counts: np.ndarray, class_names: Sequence[str]) -> bytes:
    """Counts (C, C), row = truth, column = prediction; the colour is the share of the row."""
    classes = len(class_names)
    figure = new_figure(3.2 + 0.55 * classes, 2.8 + 0.5 * classes)
    axes = figure.add_subplot()
    rows = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(rows, 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(classes, classes):
        text = f"{counts[row, column]:.0f}\n{share[row, column]:.0%}"
        axes.text(column, row, text if rows[row, 0] else "–", ha="center", va="center", fontsize=9,
                  color="white" if share[row, column] > 0.55 else "black")
    names = [literal(name) for name in class_names]
    axes.set_xticks(range(classes), names, rotation=30 if classes > 2 else 0, fontsize=9)
    axes.set_yticks(range(classes), names, fontsize=9)
    axes.set_xlabel("Predicted")
    axes.set_ylabel("True")
    return to_png(figure)


def draw_calibration(probabilities: np.ndarray, labels: np.ndarray) -> bytes:
    """Accuracy over the predicted class's probability in equal bins, with the number of slides.

    probabilities (n, C), labels (n,). Bars below the diagonal: more sure than right.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bins = calibration_bin(confidence)
    number = np.bincount(bins, minlength=CALIBRATION_BINS)
    filled = np.flatnonzero(number)
    accuracy = np.bincount(bins, weights=right, minlength=CALIBRATION_BINS)[filled] / number[filled]
    mean = np.bincount(bins, weights=confidence, minlength=CALIBRATION_BINS)[filled]
    figure, axes = _square("Probability of the predicted class", "Share that is right")
    axes.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle=":", label="calibrated", zorder=3)
    axes.bar((filled + 0.5) / CALIBRATION_BINS, accuracy, width=0.9 / CALIBRATION_BINS,
             color=COLOURS[5], label="share that is right")
    axes.plot(mean / number[filled], accuracy, "o", color=COLOURS[0], markersize=4,
              label="at the mean probability")
    for index, height in zip(filled, accuracy, strict=True):
        axes.text((index + 0.5) / CALIBRATION_BINS, min(height + 0.015, 0.97), str(number[index]),
                  ha="center", fontsize=8)
    _legend(axes, 3, "upper left")
    return to_png(figure)


# ---------------------------------------------------------------------------- shared parts

def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this many inches, on a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _square(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = new_figure(4.6, 4.6)
    axes = figure.add_subplot()
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x_label, ylabel=y_label, aspect="equal")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _look(curve: Curve) -> dict[str, Any]:
    return {"color": COLOURS[curve.colour % len(COLOURS)], "linewidth": 2.4 if curve.bold else 1.0,
            "alpha": 1.0 if curve.bold else 0.6, "zorder": 3 if curve.bold else 2}


def _legend(axes: Axes, entries: int, place: Corner) -> None:
    if entries:
        axes.legend(loc=place, fontsize=7 if entries <= _LEGEND_MAX else 5, framealpha=0.8,
                    ncols=1 if entries <= _LEGEND_MAX else 2)


def literal(text: str) -> str:
    """Text that matplotlib draws as it is: ``$`` would start a formula."""
    return text.replace("$", r"\$")


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes, the same for the same figure."""
    data = BytesIO()
    with warnings.catch_warnings():  # a class name in a script the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(data, format="png", bbox_inches="tight",
                       metadata={"Software": None})
    return data.getvalue()
