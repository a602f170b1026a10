"""An evaluation as a page that a person opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.evaluation import Results, TaskView
from utils.html_report import (
    Headline,
    Page,
    Picture,
    Section,
    Table,
    format_estimate,
    format_number,
    format_span,
)

_FEW_VALID = 0.9  # below this share of usable resamples an interval deserves a warning
_INTERVAL = ("Interval", "95 % of bootstrap resamples, in which patients (all their slides "
             "together) are drawn with replacement.")


def build_page(
    *,
    title: str,
    facts: Mapping[str, str],
    view: TaskView,
    results: Results,
    plots: Mapping[str, bytes],
    warnings: Sequence[str],
    left_out: Mapping[str, str],
    failed: Mapping[str, str],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Page:
    """The whole report of an evaluation.

    facts: what was evaluated, name -> text. plots: by file name. warnings: to stand first.
    left_out, failed: slide -> reason.
    """
    overall = results.overall
    sections = [
        Section(title="What was evaluated", tables=[Table(columns=["", ""],
                                                          rows=list(facts.items()))]),
        Section(title="Figures with 95 % intervals over patients", paragraphs=[results.note],
                tables=[_figures_table(view, results)]),
        Section(title=view.gallery, pictures=[
            Picture(title=view.pictures[file][0], png=png,
                    text=view.pictures[file][1].format(name=overall.name) + ".")
            for file, png in plots.items()]),
        *(view.sections(results) if overall.slide_ids else []),
        _problem_section(left_out, failed),
        Section(title="What the figures mean", folded=True, tables=[
            Table(columns=["Figure", "Meaning"], rows=[*view.meanings, _INTERVAL])]),
        Section(title="Settings and versions", folded=True, tables=[
            _pairs("Setting", settings), _pairs("Software", versions)]),
    ]
    return Page(title=title, lead=", ".join((
                    _count(len(results.folds), "fold"), _count(overall.n_slides, "slide"),
                    _count(overall.n_patients, "patient"))),
                headlines=_headlines(view, results),
                warnings=[*warnings, *_warnings(view, results, left_out, failed)],
                sections=sections)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _pairs(name: str, values: Mapping[str, Any]) -> Table:
    return Table(columns=[name, "Value"], rows=[(key, str(value)) for key, value in values.items()])


def _headlines(view: TaskView, results: Results) -> list[Headline]:
    single = results.pooled or (results.shown[0] if len(results.folds) == 1 else None)
    found = []
    for name in view.large:
        values = results.across(name)
        if single is not None:
            item = single.estimates[name]
            span = (f"95 % interval {format_span(item.low, item.high)}" if np.isfinite(item.low)
                    else item.reason)
            found.append(Headline(label=f"{view.titles[name]}, {single.predictions.name}",
                                  value=format_number(item.value), detail=span))
        if len(values) > 1 and (single is None or name == view.large[0]):
            found.append(Headline(label=f"{view.titles[name]}, mean of folds",
                                  value=format_number(float(values.mean())),
                                  detail=f"standard deviation {values.std(ddof=1):.3f}, "
                                  f"{len(values)} folds"))
    return found


def _warnings(view: TaskView, results: Results, left_out: Mapping[str, str],
              failed: Mapping[str, str]) -> list[str]:
    found = []
    if failed:
        found.append(f"{_count(len(failed), 'slide')} failed and in no figure: see below.")
    if left_out:
        found.append(f"{_count(len(left_out), 'slide')} left out: see below.")
    first = view.large[0]
    title = view.titles[first]
    for item in results.shown:
        main, name = item.estimates[first], item.predictions.name.capitalize()
        if main.reason and not np.isfinite(main.value):
            found.append(f"{name}: the {title} is not defined ({main.reason}).")
        elif np.isfinite(main.low) and main.valid < _FEW_VALID * main.resamples:
            found.append(f"{name}: only {main.valid} of {main.resamples} resamples have a defined "
                         f"{title}; its interval is too narrow.")
        if np.isfinite(main.low) and main.low == main.high:
            found.append(f"{name}: every resample has the {title} {main.value:.3f}. So narrow an "
                         "interval comes from few slides, not from certainty.")
    return found


def _figures_table(view: TaskView, results: Results) -> Table:
    columns = ["", "Slides", "Patients", *view.titles.values(), "Valid resamples"]
    further = dict.fromkeys(title for item in results.shown for title in view.further(item))
    rows = []
    for item in results.shown:
        main, told = item.estimates[view.large[0]], view.further(item)
        rows.append([item.predictions.name, str(item.predictions.n_slides),
                     str(item.predictions.n_patients),
                     *(format_estimate(item.estimates[name]) for name in view.titles),
                     f"{main.valid} of {main.resamples}",
                     *(told.get(title, "—") for title in further)])
    return Table(columns=[*columns, *further], rows=rows)


def _problem_section(left_out: Mapping[str, str], failed: Mapping[str, str]) -> Section:
    rows = [(slide, kind, reason) for kind, slides in (("failed", failed), ("left out", left_out))
            for slide, reason in slides.items()]
    if not rows:
        return Section(title="Slides left out or failed", paragraphs=["None."])
    return Section(title="Slides left out or failed",
                   tables=[Table(columns=["Slide", "", "Reason"], rows=rows)])
