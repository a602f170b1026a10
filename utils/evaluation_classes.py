"""Evaluation of models that tell classes apart, and of those that give each slide several labels.

The two ``TaskView``s differ in what a slide's truth is; both draw curves and list sure errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from utils.evaluation import (
    Evaluation,
    FoldPredictions,
    Measuring,
    Results,
    TaskView,
    average_folds,
)
from utils.html_report import Section, Table, format_estimate, format_number
from utils.metrics import slide_metrics
from utils.plots import Curve, draw_calibration, draw_confusion, draw_precision_recall, draw_roc
from utils.statistics import METRICS, Weigher, delong_interval, weighted_metrics
from utils.task_metrics import multilabel_metrics
from utils.task_statistics import of_each, weighted_multilabel

MOST_WRONG = 20  # rows of the table of wrong predictions
# A fold's scores of one class or label (m,), and which of these slides have it (m,)
Against = Callable[[FoldPredictions, int], tuple[np.ndarray, np.ndarray]]


# ---------------------------------------------------------------------------- one class of several

def true_classes(part: FoldPredictions) -> np.ndarray:
    """(n,) int64 class of each slide."""
    classes: np.ndarray = part.truths[:, 0].astype(np.int64)
    return classes


def predicted_classes(part: FoldPredictions) -> np.ndarray:
    """(n,) most probable class; ties go to the lower index."""
    best: np.ndarray = part.scores.argmax(axis=1)
    return best


def wrong_slides(part: FoldPredictions, *, most: int = MOST_WRONG) -> list[int]:
    """Rows of the wrong predictions, the surest first, at most ``most``."""
    wrong = np.flatnonzero(predicted_classes(part) != true_classes(part))
    sureness = part.scores.max(axis=1)[wrong]
    return [int(row) for row in wrong[np.argsort(-sureness, kind="stable")][:most]]


def _class_weigher(part: FoldPredictions, how: Measuring) -> Weigher:
    return partial(weighted_metrics, part.scores, true_classes(part),
                   micro_average=how.micro_average)


def _class_details(part: FoldPredictions) -> dict[str, Any]:
    labels, p = true_classes(part), part.scores
    plain = slide_metrics(p, labels)
    return {"class_counts": plain.class_counts,
            "auc_delong_over_slides": (delong_interval(p[:, 1], labels == 1) if p.shape[1] == 2
                                       else None),
            "class_auc": plain.class_auc, "class_accuracy": plain.class_accuracy,
            "confusion": plain.confusion}


def _class_columns(part: FoldPredictions) -> dict[str, Any]:
    """CLAM's: Y and Y_hat as 0.0, 1.0, then p_0, p_1, ..."""
    return {"Y": true_classes(part).astype(np.float64),
            "Y_hat": predicted_classes(part).astype(np.float64),
            **{f"p_{index}": column for index, column in enumerate(part.scores.T)}}


def _one_class(part: FoldPredictions, index: int) -> tuple[np.ndarray, np.ndarray]:
    return part.scores[:, index], true_classes(part) == index


def _draw_classes(results: Results) -> dict[str, bytes]:
    overall = results.overall
    labels, classes = true_classes(overall), len(overall.names)
    curves = _curves(results, _one_class, [1] if classes == 2 else range(classes))
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels, predicted_classes(overall)), 1)
    return {"roc.png": draw_roc(curves), "pr.png": draw_precision_recall(curves),
            "confusion.png": draw_confusion(confusion, overall.names),
            "calibration.png": draw_calibration(overall.scores, labels)}


def _curves(results: Results, against: Against, wanted: Sequence[int]) -> list[Curve]:
    """One curve wanted: a thin one a fold. More: one a class; folds alone if nothing is pooled."""
    single, pooled = len(wanted) == 1, results.pooled
    shown = ([item.predictions for item in results.folds.values()]
             if single or pooled is None else [])
    curves = [_curve(part, index, against, single=single, colour=number + 1 if single else index)
              for number, part in enumerate(shown) for index in wanted]
    if pooled is not None:
        curves += [_curve(pooled.predictions, index, against, single=single, bold=True,
                          colour=0 if single else index) for index in wanted]
    return curves


def _curve(part: FoldPredictions, index: int, against: Against, *, single: bool, colour: int,
           bold: bool = False) -> Curve:
    scores, positive = against(part, index)
    return Curve(name=part.name if single else f"{part.names[index]}, {part.name}",
                 scores=scores, positive=positive, colour=colour, bold=bold)


def _class_sections(results: Results) -> list[Section]:
    names = results.overall.names
    rows = []
    for item in [results.pooled] if results.pooled else results.folds.values():
        for index, name in enumerate(names):
            recall = item.details["class_accuracy"][index]
            rows.append((name, item.predictions.name, str(item.details["class_counts"][index]),
                         "—" if recall is None else format_number(recall),
                         format_number(item.details["class_auc"][index])))
    return [Section(title="Each class", tables=[Table(
                columns=["Class", "Predictions", "Slides", "Share that is right",
                         "AUC against the rest"], rows=rows)]),
            _wrong_class_section(results.overall)]


def _delong_column(item: Evaluation) -> dict[str, str]:
    interval = item.details["auc_delong_over_slides"]
    return ({} if interval is None else
            {"AUC, DeLong over slides": f"{interval[0]:.3f}–{interval[1]:.3f}"})


def _wrong_class_section(part: FoldPredictions) -> Section:
    labels, predicted, p = true_classes(part), predicted_classes(part), part.scores
    names = part.names
    rows = [(part.slide_ids[row], part.case_ids[row], names[labels[row]], names[predicted[row]],
             format_number(p[row].max()), format_number(p[row, labels[row]]))
            for row in wrong_slides(part)]
    return _errors(rows, int((predicted != labels).sum()), part.name, columns=[
        "True", "Predicted", "Probability of predicted", "Probability of true"])


def _errors(rows: Sequence[Sequence[str]], total: int, name: str, *,
            columns: Sequence[str]) -> Section:
    if not rows:
        return Section(title="Surest wrong predictions", paragraphs=["No prediction is wrong."])
    return Section(
        title="Surest wrong predictions",
        paragraphs=[f"{len(rows)} of {total} wrong predictions ({name}), the surest first: "
                    "look at these slides, their labels and their heatmaps."],
        tables=[Table(columns=["Slide", "Patient", *columns], rows=rows)])


_CURVES = {"roc.png": ("ROC", "True over false positive rate; dotted: a guess"),
           "pr.png": ("Precision and recall", "Dotted: the share of positives")}

CLASSIFICATION = TaskView(
    task_type="classification",
    titles=dict(zip(METRICS, ("AUC", "Accuracy", "Balanced accuracy", "F1 (macro)",
                              "Average precision", "Brier score", "Calibration error"),
                    strict=True)),
    headline={"auc": "auc", "acc": "accuracy"},
    large=("auc", "accuracy", "balanced_accuracy"),
    meanings=(
        ("AUC", "Area under the ROC curve: of class 1 with two classes, else the mean of one class "
                "against the rest. 0.5 is a guess, 1 is perfect."),
        ("Balanced accuracy", "Mean over the classes of the share of their slides that is right."),
        ("F1 (macro)", "Mean over the classes of the harmonic mean of precision and recall."),
        ("Average precision", "Area under the precision-recall curve, by steps."),
        ("Brier score", "Mean squared error of the probabilities. Lower is better."),
        ("Calibration error",
         "Mean distance between the probability of the predicted class and the share that is "
         "right, in 15 bins. Lower is better; small samples and resampling raise it, so its "
         "interval may lie above the figure."),
        ("DeLong's interval", "Of the AUC; it counts slides as independent.")),
    pictures={**_CURVES, "confusion.png": (
                  "Confusion", "Slides by true and predicted class, {name}"),
              "calibration.png": ("Calibration", "With the number of slides, {name}")},
    gallery="Curves, confusion, calibration",
    weigher=_class_weigher,
    undefined=lambda part: slide_metrics(part.scores, true_classes(part)).auc_reason,
    details=_class_details,
    pool=average_folds,
    columns=_class_columns,
    draw=_draw_classes,
    sections=_class_sections,
    missing={"auc": -1.0},  # as CLAM's eval writes it
    further=_delong_column)


# ---------------------------------------------------------------------------- several labels

def _label_details(part: FoldPredictions) -> dict[str, Any]:
    plain = multilabel_metrics(part.scores, part.truths)
    return {"label_positives": plain.label_positives, "label_known": plain.label_known}


def _one_label(part: FoldPredictions, index: int) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(part.truths[:, index])
    return part.scores[known, index], part.truths[known, index] == 1


def _draw_labels(results: Results) -> dict[str, bytes]:
    curves = _curves(results, _one_label, range(len(results.overall.names)))
    return {"roc.png": draw_roc(curves), "pr.png": draw_precision_recall(curves)}


def _label_sections(results: Results) -> list[Section]:
    figures = ("auc", "average_precision", "accuracy")
    rows = []
    for item in [results.pooled] if results.pooled else results.folds.values():
        for index, name in enumerate(names := item.predictions.names):
            each = [item.estimates[of_each(figure, name) if len(names) > 1 else figure]
                    for figure in figures]
            rows.append((name, item.predictions.name, str(item.details["label_known"][index]),
                         str(item.details["label_positives"][index]),
                         *(format_estimate(estimate) for estimate in each)))
    return [Section(title="Each label", tables=[Table(
                columns=["Label", "Predictions", "Slides of which it is known", "Slides with it",
                         "AUC", "Average precision", "Share that is right"], rows=rows)]),
            _wrong_label_section(results.overall)]


def _wrong_label_section(part: FoldPredictions) -> Section:
    wrong = ~np.isnan(part.truths) & ((part.scores > 0.5) != (part.truths == 1))
    row, label = np.nonzero(wrong)
    surest = np.argsort(-np.abs(part.scores[row, label] - 0.5), kind="stable")[:MOST_WRONG]
    rows = [(part.slide_ids[row[place]], part.case_ids[row[place]], part.names[label[place]],
             "yes" if part.truths[row[place], label[place]] == 1 else "no",
             format_number(part.scores[row[place], label[place]])) for place in surest]
    return _errors(rows, int(wrong.sum()), part.name, columns=["Label", "True", "Probability"])


MULTILABEL = TaskView(
    task_type="multilabel",
    titles={"auc": "Mean AUC", "average_precision": "Mean average precision",
            "accuracy": "Accuracy"},
    headline={"auc": "auc", "acc": "accuracy"},
    large=("auc", "average_precision", "accuracy"),
    meanings=(
        ("Mean AUC", "Area under the ROC curve of each label, the mean over the labels that have "
                     "slides with and without them. 0.5 is a guess, 1 is perfect."),
        ("Mean average precision", "Area under the precision-recall curve, by steps, the mean over "
                                   "the same labels."),
        ("Accuracy", "Share of right answers over all known labels of all slides; a label is "
                     "predicted when its probability is above 0.5.")),
    pictures=_CURVES,
    gallery="Curves",
    weigher=lambda part, how: partial(weighted_multilabel, part.scores, part.truths,
                                      names=part.names),
    undefined=lambda part: multilabel_metrics(part.scores, part.truths).auc_reason,
    details=_label_details,
    pool=average_folds,
    columns=lambda part: {
        **{f"y_{name}": column for name, column in zip(part.names, part.truths.T, strict=True)},
        **{f"p_{index}": column for index, column in enumerate(part.scores.T)}},
    draw=_draw_labels,
    sections=_label_sections)
