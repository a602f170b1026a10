"""An evaluation as pictures and as a page that a person opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.evaluation import Evaluation, FoldPredictions, wrong_slides
from utils.html_report import (
    Headline,
    Page,
    Picture,
    Section,
    Table,
    format_interval,
    format_number,
)
from utils.plots import Curve, draw_calibration, draw_confusion, draw_precision_recall, draw_roc
from utils.statistics import METRICS, Estimate

TITLES = {"auc": "AUC", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy",
          "macro_f1": "F1 (macro)", "average_precision": "Average precision",
          "brier": "Brier score", "ece": "Calibration error"}
PLOTS = ("roc.png", "pr.png", "confusion.png", "calibration.png")

_WORD_JOINER = "\u2060"
_FEW_VALID = 0.9  # below this share of usable resamples an interval deserves a warning
_EXPLANATIONS = (
    ("AUC", "Area under the ROC curve: of class 1 with two classes, else the mean of one class "
            "against the rest. 0.5 is a guess, 1 is perfect."),
    ("Balanced accuracy", "Mean over the classes of the share of their slides that is right."),
    ("F1 (macro)", "Mean over the classes of the harmonic mean of precision and recall."),
    ("Average precision", "Area under the precision-recall curve, by steps."),
    ("Brier score", "Mean squared error of the probabilities. Lower is better."),
    ("Calibration error", "Mean distance between the probability of the predicted class and the "
                          "share that is right, in 15 bins. Lower is better; small samples and "
                          "resampling raise it, so its interval may lie above the figure."),
    ("Interval", "95 % of bootstrap resamples, in which patients (all their slides together) are "
                 "drawn with replacement. DeLong's interval counts slides as independent."),
)


# ---------------------------------------------------------------------------- pictures

def draw_plots(folds: Mapping[int, Evaluation], pooled: Evaluation | None,
               class_names: Sequence[str]) -> dict[str, bytes]:
    """PNG bytes by file name (``PLOTS``); none when there is no prediction at all."""
    overall = _overall(folds, pooled)
    if not len(overall.labels):
        return {}
    curves = _curves(folds, pooled, class_names)
    confusion = np.zeros((len(class_names), len(class_names)))
    np.add.at(confusion, (overall.labels, overall.predicted), 1)
    pictures = (draw_roc(curves), draw_precision_recall(curves),
                draw_confusion(confusion, class_names),
                draw_calibration(overall.probabilities, overall.labels))
    return dict(zip(PLOTS, pictures, strict=True))


def _overall(folds: Mapping[int, Evaluation], pooled: Evaluation | None) -> FoldPredictions:
    """What a single picture shows: pooled predictions, else those of all folds one after another
    (a slide then counts once for each fold that predicted it)."""
    if pooled is not None:
        return pooled.predictions
    parts = [item.predictions for item in folds.values()]
    return FoldPredictions(
        name="all folds" if len(parts) > 1 else parts[0].name,
        slide_ids=tuple(slide for part in parts for slide in part.slide_ids),
        case_ids=tuple(case for part in parts for case in part.case_ids),
        labels=np.concatenate([part.labels for part in parts]),
        probabilities=np.concatenate([part.probabilities for part in parts]),
        folds=np.concatenate([part.folds for part in parts]))


def _curves(folds: Mapping[int, Evaluation], pooled: Evaluation | None,
            class_names: Sequence[str]) -> list[Curve]:
    """Two classes: a thin curve a fold. More: a curve a class; folds alone if nothing is pooled."""
    two = len(class_names) == 2
    shown = [item.predictions for item in folds.values()] if two or pooled is None else []
    curves = [_curve(part, index, class_names, colour=number + 1 if two else index)
              for number, part in enumerate(shown)
              for index in ([1] if two else range(len(class_names)))]
    if pooled is not None:
        curves += [_curve(pooled.predictions, index, class_names, colour=0 if two else index,
                          bold=True) for index in ([1] if two else range(len(class_names)))]
    return curves


def _curve(part: FoldPredictions, index: int, class_names: Sequence[str], *, colour: int,
           bold: bool = False) -> Curve:
    name = part.name if len(class_names) == 2 else f"{class_names[index]}, {part.name}"
    return Curve(name=name, scores=part.probabilities[:, index], positive=part.labels == index,
                 colour=colour, bold=bold)


# ---------------------------------------------------------------------------- the page

def build_page(
    *,
    title: str,
    facts: Mapping[str, str],
    class_names: Sequence[str],
    folds: Mapping[int, Evaluation],
    pooled: Evaluation | None,
    pooled_note: str,
    plots: Mapping[str, bytes],
    left_out: Mapping[str, str],
    failed: Mapping[str, str],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Page:
    """The whole report of an evaluation.

    facts: what was evaluated, name -> text. left_out, failed: slide -> reason.
    """
    overall = _overall(folds, pooled)
    sections = [
        Section(title="What was evaluated", tables=[Table(columns=["", ""], rows=[
            *facts.items(), ("Classes", ", ".join(f"{index}: {name}" for index, name
                                                  in enumerate(class_names)))])]),
        Section(title="Figures with 95 % intervals over patients", paragraphs=[pooled_note],
                tables=[_figures_table(folds, pooled)]),
        Section(title="Curves, confusion, calibration", pictures=_pictures(plots, overall.name)),
        Section(title="Each class", tables=[_class_table(folds, pooled, class_names)]),
        _wrong_section(overall, class_names),
        _problem_section(left_out, failed),
        Section(title="What the figures mean", folded=True,
                tables=[Table(columns=["Figure", "Meaning"], rows=_EXPLANATIONS)]),
        Section(title="Settings and versions", folded=True, tables=[
            _pairs("Setting", settings), _pairs("Software", versions)]),
    ]
    return Page(title=title, lead=", ".join((
                    _count(len(folds), "fold"), _count(len(set(overall.slide_ids)), "slide"),
                    _count(len(set(overall.case_ids)), "patient"))),
                headlines=_headlines(folds, pooled),
                warnings=_warnings(folds, pooled, left_out, failed), sections=sections)


def _interval(item: Estimate) -> str:
    """The interval on an unbroken line of its own: seven figures fit side by side."""
    text = format_interval(item.value, item.low, item.high)
    return text.replace(" ", "\n").replace("–", f"{_WORD_JOINER}–{_WORD_JOINER}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _pairs(name: str, values: Mapping[str, Any]) -> Table:
    return Table(columns=[name, "Value"], rows=[(key, str(value)) for key, value in values.items()])


def _headlines(folds: Mapping[int, Evaluation], pooled: Evaluation | None) -> list[Headline]:
    single = pooled or (next(iter(folds.values())) if len(folds) == 1 else None)
    found = []
    for name in ("auc", "accuracy", "balanced_accuracy"):
        values = np.array([item.estimates[name].value for item in folds.values()])
        values = values[np.isfinite(values)]
        if single is not None:
            item = single.estimates[name]
            span = (f"95 % interval {item.low:.3f}–{item.high:.3f}" if np.isfinite(item.low)
                    else item.reason)
            found.append(Headline(label=f"{TITLES[name]}, {single.predictions.name}",
                                  value=format_number(item.value), detail=span))
        if len(folds) > 1 and len(values) > 1 and (single is None or name == "auc"):
            found.append(Headline(label=f"{TITLES[name]}, mean of folds",
                                  value=format_number(float(values.mean())),
                                  detail=f"standard deviation {values.std(ddof=1):.3f}, "
                                  f"{len(values)} folds"))
    return found


def _warnings(folds: Mapping[int, Evaluation], pooled: Evaluation | None,
              left_out: Mapping[str, str], failed: Mapping[str, str]) -> list[str]:
    found = []
    if failed:
        found.append(f"{_count(len(failed), 'slide')} failed and in no figure: see below.")
    if left_out:
        found.append(f"{_count(len(left_out), 'slide')} left out: see below.")
    for item in [*folds.values(), *([pooled] if pooled else [])]:
        auc = item.estimates["auc"]
        name = item.predictions.name.capitalize()
        if auc.reason and not np.isfinite(auc.value):
            found.append(f"{name}: the AUC is not defined ({auc.reason}).")
        elif np.isfinite(auc.low) and auc.valid < _FEW_VALID * auc.resamples:
            found.append(f"{name}: only {auc.valid} of {auc.resamples} resamples have an AUC, the "
                         "others hold one class; its interval is too narrow.")
        if np.isfinite(auc.low) and auc.low == auc.high:
            found.append(f"{name}: every resample has the AUC {auc.value:.3f}. So narrow an "
                         "interval comes from few slides, not from certainty.")
    return found


def _figures_table(folds: Mapping[int, Evaluation], pooled: Evaluation | None) -> Table:
    shown = [*folds.values(), *([pooled] if pooled else [])]
    columns = ["", "Slides", "Patients", *(TITLES[name] for name in METRICS), "Valid resamples"]
    delong = any(item.delong for item in shown)
    if delong:
        columns.append("AUC, DeLong over slides")
    rows = []
    for item in shown:
        row = [item.predictions.name, str(item.plain.n), str(len(set(item.predictions.case_ids))),
               *(_interval(item.estimates[name]) for name in METRICS),
               f"{item.estimates['auc'].valid} of {item.estimates['auc'].resamples}"]
        if delong:
            row.append("—" if item.delong is None else
                       f"{item.delong[0]:.3f}–{item.delong[1]:.3f}")
        rows.append(row)
    return Table(columns=columns, rows=rows)


def _pictures(plots: Mapping[str, bytes], name: str) -> list[Picture]:
    texts = {"roc.png": ("ROC", "True over false positive rate; dotted: a guess"),
             "pr.png": ("Precision and recall", "Dotted: the share of positives"),
             "confusion.png": ("Confusion", f"Slides by true and predicted class, {name}"),
             "calibration.png": ("Calibration", f"With the number of slides, {name}")}
    return [Picture(title=texts[file][0], png=png, text=texts[file][1] + ".")
            for file, png in plots.items()]


def _class_table(folds: Mapping[int, Evaluation], pooled: Evaluation | None,
                 class_names: Sequence[str]) -> Table:
    rows = []
    for item in [pooled] if pooled else folds.values():
        for index, name in enumerate(class_names):
            recall = item.plain.class_accuracy[index]
            rows.append((name, item.predictions.name, str(item.plain.class_counts[index]),
                         "—" if recall is None else format_number(recall),
                         format_number(item.plain.class_auc[index])))
    return Table(columns=["Class", "Predictions", "Slides", "Share that is right",
                          "AUC against the rest"], rows=rows)


def _wrong_section(part: FoldPredictions, class_names: Sequence[str]) -> Section:
    rows = [(part.slide_ids[row], part.case_ids[row], class_names[part.labels[row]],
             class_names[part.predicted[row]], format_number(part.probabilities[row].max()),
             format_number(part.probabilities[row, part.labels[row]]))
            for row in wrong_slides(part)]
    if not rows:
        return Section(title="Surest wrong predictions", paragraphs=["No prediction is wrong."])
    wrong = int((part.predicted != part.labels).sum())
    return Section(
        title="Surest wrong predictions",
        paragraphs=[f"{len(rows)} of {wrong} wrong predictions ({part.name}), the surest first: "
                    "look at these slides, their labels and their heatmaps."],
        tables=[Table(columns=["Slide", "Patient", "True", "Predicted", "Probability of predicted",
                               "Probability of true"], rows=rows)])


def _problem_section(left_out: Mapping[str, str], failed: Mapping[str, str]) -> Section:
    rows = [(slide, kind, reason) for kind, slides in (("failed", failed), ("left out", left_out))
            for slide, reason in slides.items()]
    if not rows:
        return Section(title="Slides left out or failed", paragraphs=["None."])
    return Section(title="Slides left out or failed",
                   tables=[Table(columns=["Slide", "", "Reason"], rows=rows)])
