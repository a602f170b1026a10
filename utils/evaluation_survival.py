"""Evaluation of survival models: concordance within folds, and groups of risk.

Risks of different folds come from different models (and bins of time), so they are on different
scales: slides are compared, and patients called high or low risk, within their fold only.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from utils.evaluation import FoldPredictions, Measuring, Results, TaskView, join_folds
from utils.html_report import Section, Table, format_number
from utils.statistics import Weigher
from utils.survival import LogRank, kaplan_meier, log_rank, risk_groups
from utils.survival_plots import Group, draw_kaplan_meier
from utils.task_statistics import concordant_pairs, weighted_concordance

MOST_WRONG = 20
GROUPS = ("Low risk", "High risk")


# ---------------------------------------------------------------------------- groups of patients

@dataclass(frozen=True, kw_only=True)
class PatientGroups:
    """Patients, each once, in two groups of risk.

    times, events: (P,) of the patients; high: (P,) bool
    """

    times: np.ndarray
    events: np.ndarray
    high: np.ndarray

    @cached_property
    def test(self) -> LogRank:
        """Do the groups differ?"""
        return log_rank(self.times, self.events, self.high.astype(np.int64))

    def groups(self) -> list[Group]:
        """The groups that have patients, low risk first."""
        return [Group(name=name, times=self.times[chosen], events=self.events[chosen])
                for name, chosen in zip(GROUPS, (~self.high, self.high), strict=True)
                if chosen.any()]


def group_patients(part: FoldPredictions) -> PatientGroups:
    """High risk: above the median of the fold's patients; a patient's risk is the mean of his
    slides'. One who was tested in several folds is where most of these put him (ties: low)."""
    votes: dict[str, list[int]] = defaultdict(list)
    cases = np.array(part.case_ids)
    for stratum in np.unique(part.strata):
        rows = part.strata == stratum
        names, patient = np.unique(cases[rows], return_inverse=True)
        risks = np.bincount(patient, part.scores[rows, 0]) / np.bincount(patient)
        for name, group in zip(names, risk_groups(risks), strict=True):
            votes[str(name)].append(int(group))
    first = {case: row for row, case in reversed(list(enumerate(part.case_ids)))}
    truths = part.truths[[first[case] for case in votes]].reshape(-1, 2)
    return PatientGroups(times=truths[:, 0], events=truths[:, 1],
                         high=np.array([np.mean(given) > 0.5 for given in votes.values()], bool))


def _median_time(group: Group) -> float:
    """Time at which half of the group have had the event; NaN when that is not reached."""
    found = kaplan_meier(group.times, group.events)
    reached = found.times[found.survival <= 0.5]
    return float(reached[0]) if reached.size else float("nan")


# ---------------------------------------------------------------------------- the view

def _weigher(part: FoldPredictions, how: Measuring) -> Weigher:
    return lambda weights: {"c_index": weighted_concordance(
        part.scores[:, 0], part.truths, weights, strata=part.strata)}


def _details(part: FoldPredictions) -> dict[str, Any]:
    patients = group_patients(part)
    return {"events": int((part.truths[:, 1:] == 1).sum()),
            "comparable_pairs": int(sum(pairs.sum() for _, _, pairs in _pairs(part))),
            "risk_groups": [
                {"name": group.name, "patients": len(group.times),
                 "events": int((group.events == 1).sum()), "median_time": _median_time(group)}
                for group in patients.groups()],
            "log_rank": {"statistic": patients.test.statistic, "p_value": patients.test.p_value,
                         "reason": patients.test.reason}}


def _pairs(part: FoldPredictions) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return list(concordant_pairs(part.scores[:, 0], part.truths, part.strata))


def _pool(folds: Any) -> tuple[FoldPredictions, str]:
    pooled = join_folds(folds, name="pooled")
    return pooled, (
        f"Pooled: the {pooled.n_slides} test slides of {len(folds)} folds, compared within each "
        "fold only: the risks of two folds come from two models and are not on one scale. So the "
        "pooled c-index is the share of right pairs among all pairs within folds.")


def _draw(results: Results) -> dict[str, bytes]:
    patients, test = (found := group_patients(results.overall)), found.test
    said = (f"Log-rank test: not defined ({test.reason})" if test.reason else
            f"Log-rank test: {_p_text(test.p_value)}")
    return {"kaplan_meier.png": draw_kaplan_meier(
        patients.groups(), time_name=f"Time ({results.overall.names[0]})", test=said)}


def _p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _sections(results: Results) -> list[Section]:
    rows = []
    for item in results.shown:
        test = item.details["log_rank"]
        for group in item.details["risk_groups"]:
            median = group["median_time"]
            rows.append((item.predictions.name, group["name"], str(group["patients"]),
                         str(group["events"]), "not reached" if np.isnan(median) else
                         f"{median:.4g}", test["reason"] or _p_text(test["p_value"])))
    return [Section(
        title="Groups of risk",
        paragraphs=["High risk: above the median risk of the fold's patients. The median time is "
                    "that at which half of a group have had the event."],
        tables=[Table(columns=["Predictions", "Group", "Patients", "Events", "Median time",
                               "Log-rank test"], rows=rows)]), _wrong_section(results.overall)]


def most_discordant(part: FoldPredictions) -> list[tuple[int, float, int]]:
    """(row, share of wrong pairs, pairs) of slides, the most often wrong first.

    Only slides with at least half as many pairs as the slides have on average: of fewer, a share
    says little.
    """
    wrong, total = np.zeros(len(part.slide_ids)), np.zeros(len(part.slide_ids))
    for rows, right, pairs in _pairs(part):
        wrong[rows] += (pairs - right).sum(axis=1)
        total[rows] += pairs.sum(axis=1)
        wrong += (pairs - right).sum(axis=0)
        total += pairs.sum(axis=0)
    share = wrong / np.maximum(total, 1)
    some = (total >= max(1.0, total.mean() / 2)) & (wrong > 0)
    order = [row for row in np.argsort(-share, kind="stable") if some[row]]
    return [(int(row), float(share[row]), int(total[row])) for row in order[:MOST_WRONG]]


def _wrong_section(part: FoldPredictions) -> Section:
    rows = [(part.slide_ids[row], part.case_ids[row], f"{part.truths[row, 0]:.4g}",
             "event" if part.truths[row, 1] == 1 else "censored", f"{part.scores[row, 0]:.3f}",
             format_number(share), str(pairs)) for row, share, pairs in most_discordant(part)]
    if not rows:
        return Section(title="Most discordant slides", paragraphs=["No pair of slides is wrong."])
    return Section(
        title="Most discordant slides",
        paragraphs=[f"Slides ({part.name}) that are most often on the wrong side of a pair: a high "
                    "risk but a long time, or an early event at a low risk. Look at these slides "
                    "and their heatmaps."],
        tables=[Table(columns=["Slide", "Patient", "Time", "", "Risk", "Share of wrong pairs",
                               "Pairs"], rows=rows)])


def _columns(part: FoldPredictions) -> dict[str, Any]:
    curve = part.scores[:, 1:].T
    return {"time": part.truths[:, 0], "event": part.truths[:, 1], "risk": part.scores[:, 0],
            **{f"S_{index}": column for index, column in enumerate(curve, start=1)}}


SURVIVAL = TaskView(
    task_type="survival",
    titles={"c_index": "C-index"},
    headline={"c_index": "c_index"},
    large=("c_index",),
    meanings=(
        ("C-index", "Harrell's: of all pairs of slides in which one is known to have had its event "
                    "first, the share in which that one has the higher risk (equal risks count "
                    "half). 0.5 is a guess, 1 is perfect. Slides of one fold only are compared."),
        ("Kaplan-Meier", "Share of a group's patients without an event over time, while censored "
                         "patients leave the group; the band is the pointwise 95 % interval."),
        ("Log-rank test", "How often groups of equal risk would differ at least so much. Each "
                          "patient counts once.")),
    pictures={"kaplan_meier.png": (
        "Kaplan-Meier", "Patients above and below the median risk of their fold, {name}; bands: "
        "pointwise 95 % intervals; vertical marks: censored")},
    gallery="Groups of risk over time",
    weigher=_weigher,
    undefined=lambda part: ("no two slides of a fold can be compared"
                            if (part.truths[:, 1] == 1).any() else "no slide has an event"),
    details=_details,
    pool=_pool,
    columns=_columns,
    draw=_draw,
    sections=_sections)
