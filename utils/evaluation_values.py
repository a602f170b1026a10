"""Evaluation of models that predict values: errors, correlations, scatter plots."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from utils.evaluation import FoldPredictions, Results, TaskView, average_folds
from utils.html_report import Section, Table, format_estimate
from utils.task_metrics import regression_metrics
from utils.task_statistics import of_each, weighted_regression
from utils.value_plots import draw_residuals, draw_scatter

MOST_WRONG = 20
_TITLES = {"r2": "R²", "mae": "Mean absolute error", "rmse": "Root mean squared error",
           "pearson": "Correlation (Pearson)", "spearman": "Rank correlation (Spearman)"}


def _details(part: FoldPredictions) -> dict[str, Any]:
    """Mean and spread of the true values, without which an error says little."""
    some = len(part.truths) > 0
    return {"true_mean": [float(column.mean()) for column in part.truths.T] if some else [],
            "true_sd": [float(column.std()) for column in part.truths.T] if some else []}


def _draw(results: Results) -> dict[str, bytes]:
    part = results.overall
    return {"scatter.png": draw_scatter(part.scores, part.truths, part.names),
            "residuals.png": draw_residuals(part.scores, part.truths, part.names)}


def largest_errors(part: FoldPredictions) -> list[tuple[int, int, float]]:
    """(row, value, error in standard deviations of the true values), the largest first."""
    spread = part.truths.std(axis=0)
    error = (part.scores - part.truths) / np.where(spread > 0, spread, 1.0)
    order = np.argsort(-np.abs(error), axis=None, kind="stable")[:MOST_WRONG]
    return [(int(row), int(value), float(error[row, value]))
            for row, value in zip(*np.unravel_index(order, error.shape), strict=True)]


def _sections(results: Results) -> list[Section]:
    part, found = results.overall, []
    if len(part.names) > 1:
        rows = [(name, item.predictions.name,
                 *(format_estimate(item.estimates[of_each(figure, name)]) for figure in _TITLES))
                for item in ([results.pooled] if results.pooled else results.folds.values())
                for name in part.names]
        found.append(Section(title="Each value", tables=[Table(
            columns=["Value", "Predictions", *_TITLES.values()], rows=rows)]))
    worst = [(part.slide_ids[row], part.case_ids[row], part.names[value],
              f"{part.truths[row, value]:.4g}", f"{part.scores[row, value]:.4g}", f"{error:+.2f}")
             for row, value, error in largest_errors(part)]
    return [*found, Section(
        title="Largest errors",
        paragraphs=[f"The {len(worst)} predictions ({part.name}) that are farthest from the truth: "
                    "look at these slides, their values and their heatmaps."],
        tables=[Table(columns=["Slide", "Patient", "Value", "True", "Predicted",
                               "Error in SD of the true values"], rows=worst)])]


REGRESSION = TaskView(
    task_type="regression",
    titles=_TITLES,
    headline={"r2": "r2", "mae": "mae"},
    large=("r2", "mae", "pearson"),
    meanings=(
        ("R²", "Share of the variance that is explained: 1 is perfect, 0 no better than the mean "
               "of these slides, below 0 worse."),
        ("Mean absolute error", "In the units of the value, as the root mean squared error. Of "
                                "several values all figures are means over the values."),
        ("Correlation", "Of predicted and true values (Pearson) and of their ranks (Spearman); "
                        "blind to a shift or a wrong scale.")),
    pictures={"scatter.png": ("Predicted and true", "Each dot a slide, {name}; dotted: equal"),
              "residuals.png": ("Residuals", "Predicted less true over predicted, {name}; "
                                "dashed: 95 % of them, if they are normal")},
    gallery="Predictions and what is left over",
    weigher=lambda part, how: partial(weighted_regression, part.scores, part.truths,
                                      names=part.names),
    undefined=lambda part: (regression_metrics(part.scores, part.truths).r2_reason
                            or "all predictions are equal"),
    details=_details,
    pool=average_folds,
    columns=lambda part: {
        **{f"y_{index}": column for index, column in enumerate(part.truths.T)},
        **{f"yhat_{index}": column for index, column in enumerate(part.scores.T)}},
    draw=_draw,
    sections=_sections)
