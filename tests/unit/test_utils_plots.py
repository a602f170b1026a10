"""Pictures: they show the figures they name, and never stop an evaluation."""

from __future__ import annotations

import subprocess
import sys
import warnings

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes
from sklearn.metrics import precision_recall_curve, roc_curve

from tests.conftest import ROOT
from utils.plots import (
    Curve,
    draw_calibration,
    draw_confusion,
    draw_precision_recall,
    draw_roc,
)
from utils.survival_plots import Group, draw_kaplan_meier
from utils.value_plots import draw_residuals, draw_scatter


def curve(n: int = 60, *, seed: int = 0, name: str = "fold 0", bold: bool = False) -> Curve:
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    return Curve(name=name, scores=np.round(rng.random(n) * 0.6 + 0.3 * positive, 2),
                 positive=positive, bold=bold)


def pixels(png: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None and min(image.shape[:2]) > 200
    return image


def test_curve_points_are_those_of_scikit_learn() -> None:
    one = curve()
    true, false = one.counts()
    fpr, tpr, _ = roc_curve(one.positive, one.scores, drop_intermediate=False)
    np.testing.assert_allclose(false / false[-1], fpr)
    np.testing.assert_allclose(true / true[-1], tpr)
    precision, recall, _ = precision_recall_curve(one.positive, one.scores)
    np.testing.assert_allclose((true / (true + false + 1e-300))[1:], precision[-2::-1][:len(true)])
    np.testing.assert_allclose((true / true[-1])[1:], recall[-2::-1][:len(true)])


@pytest.mark.parametrize("draw", [draw_roc, draw_precision_recall])
def test_curves_differ_by_data_and_boldness_and_repeat(draw: object) -> None:
    pictures = [draw([one]) for one in (curve(), curve(seed=1), curve(bold=True))]  # type: ignore
    assert len(set(pictures)) == 3
    assert pictures[0] == draw([curve()])  # type: ignore[operator]
    for png in pictures:
        assert (pixels(png) == 255).mean() < 0.995


@pytest.mark.parametrize("draw", [draw_roc, draw_precision_recall])
def test_a_curve_of_one_class_is_named_not_drawn(draw: object) -> None:
    lonely = Curve(name="fold 1", scores=np.array([0.2, 0.4]), positive=np.array([True, True]))
    assert not lonely.drawable
    assert draw([curve(), lonely]) != draw([curve()])  # type: ignore[operator]
    pixels(draw([lonely]))  # type: ignore[operator]
    pixels(draw([]))  # type: ignore[operator]


def test_many_folds_fit() -> None:
    pixels(draw_roc([curve(seed=seed, name=f"fold {seed}") for seed in range(30)]))


def test_confusion_with_hostile_and_foreign_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for names in (["$x", "a$b$"], ["<b>", "腫瘍"], [r"\frac{", "_^"]):
            image = pixels(draw_confusion(np.array([[3, 1], [0, 0]]), names))
            assert image.std() > 10
    assert draw_confusion(np.array([[3, 1], [0, 2]]), ["a", "b"]) != draw_confusion(
        np.array([[1, 3], [0, 2]]), ["a", "b"])


def test_calibration_of_sure_and_unsure_predictions() -> None:
    sure = np.array([[0.99, 0.01]] * 5 + [[0.0, 1.0]])
    unsure = np.array([[0.5, 0.5]] * 6)
    labels = np.array([0, 0, 0, 1, 1, 1])
    assert pixels(draw_calibration(sure, labels)).std() > 5
    assert draw_calibration(sure, labels) != draw_calibration(unsure, labels)
    pixels(draw_calibration(np.array([[0.2, 0.3, 0.5]]), np.array([2])))


# ---------------------------------------------------------------------------- values, survival

@pytest.mark.parametrize("draw", [draw_scatter, draw_residuals])
@pytest.mark.parametrize(("n", "values"), [(1, 1), (40, 2), (500, 5)])
def test_pictures_of_values(draw: object, n: int, values: int) -> None:
    rng = np.random.default_rng(0)
    truths = rng.normal(size=(n, values)) * 10.0 ** np.arange(values)
    names = ["$x", "腫瘍", "c", "d", "e"][:values]
    png = draw(truths + rng.normal(size=truths.shape), truths, names)  # type: ignore[operator]
    assert pixels(png).std() > 5
    assert png != draw(truths * 0, truths, names)  # type: ignore[operator]
    assert (pixels(png).shape[1] > pixels(draw(truths[:, :1], truths[:, :1], names[:1])  # type: ignore[operator]
                                          ).shape[1]) == (values > 1)


def group(n: int, *, scale: float, name: str = "Low risk", seed: int = 0) -> Group:
    rng = np.random.default_rng(seed)
    return Group(name=name, times=rng.exponential(scale, n), events=rng.random(n) < 0.5)


def test_the_table_below_the_curves_counts_who_is_at_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number in the picture's table, at its place and with its tick."""
    seen: dict[tuple[float, float], str] = {}
    written = Axes.text

    def text(self: Axes, x: float, y: float, s: str, **more: object) -> object:
        seen[x, y] = s
        return written(self, x, y, s, **more)

    monkeypatch.setattr(Axes, "text", text)
    groups = [group(30, scale=20), group(20, scale=8, name="High risk", seed=1)]
    draw_kaplan_meier(groups, time_name="Time (months)", test="Log-rank test: p = 0.01")
    assert "Log-rank test: p = 0.01" in seen.values()
    table = {place: number for place, number in seen.items() if number.isdigit()}
    assert len(table) >= 6 and {seen[0, 0], seen[0, -1]} == {"30", "20"}
    for (time, row), number in table.items():
        assert int(number) == (groups[int(-row)].times >= time).sum()


def test_kaplan_meier_of_few_and_of_one_group() -> None:
    png = draw_kaplan_meier([group(1, scale=5)], time_name="$t", test="none")
    two = draw_kaplan_meier([group(9, scale=5), group(9, scale=50, name="High risk")],
                            time_name="$t", test="none")
    assert pixels(png).std() > 3 and two != png
    pixels(two)
    zero = Group(name="all at once", times=np.zeros(3), events=np.ones(3))
    pixels(draw_kaplan_meier([zero], time_name="t", test=""))


def test_matplotlib_is_loaded_late_and_pyplot_never() -> None:
    code = ("import sys, numpy as np, utils.plots as plots\n"
            "assert 'matplotlib' not in sys.modules\n"
            "plots.draw_confusion(np.eye(2), ['a', 'b'])\n"
            "assert 'matplotlib.pyplot' not in sys.modules")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env={"PATH": "/usr/bin:/bin", "HOME": "/tmp"})
    assert run.returncode == 0, run.stderr
