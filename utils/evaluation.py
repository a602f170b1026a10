"""What an evaluation is made of: predictions of folds, pooled over folds, and their figures.

What figures, pictures and tables there are depends on the task type; a ``TaskView`` holds these
differences, ``utils.evaluation_tasks`` has the table of views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.distributed import ALONE, Group
from utils.statistics import Estimate, Weigher, estimate_weighted

if TYPE_CHECKING:
    import torch

    from utils.contracts import Bag
    from utils.devices import Precision
    from utils.html_report import Section
    from utils.objectives import TaskType


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How figures are computed: resamples of patients for the intervals, their seed, which AUC."""

    resamples: int = 1000
    seed: int = 1
    micro_average: bool = False


@dataclass(frozen=True, kw_only=True)
class FoldPredictions:
    """Predictions for the slides of one fold, or pooled over folds.

    name: ``fold 0`` or ``pooled``; truths (n, T) float64 as ``Bag.truth``; scores (n, K) float32
    as the objective's ``scores``; names: of the classes, labels or values
    strata: (n,) rows of different strata have scores of different models, not to be compared
    folds: (n,) how many folds predicted each slide (1 in a fold)
    """

    name: str
    slide_ids: tuple[str, ...]
    case_ids: tuple[str, ...]
    truths: np.ndarray
    scores: np.ndarray
    names: tuple[str, ...]
    strata: np.ndarray
    folds: np.ndarray

    @property
    def n_slides(self) -> int:
        """Different slides."""
        return len(set(self.slide_ids))

    @property
    def n_patients(self) -> int:
        """Different patients."""
        return len(set(self.case_ids))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Predictions with what was computed of them: figures with intervals, and further details."""

    predictions: FoldPredictions
    estimates: Mapping[str, Estimate]
    details: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """Plain values for ``metrics.json``."""
        return {"name": self.predictions.name, "slides": self.predictions.n_slides,
                "patients": self.predictions.n_patients,
                "metrics": {name: asdict(item) for name, item in self.estimates.items()},
                **self.details}


@dataclass(frozen=True, kw_only=True)
class Results:
    """The evaluations of one run. pooled: over folds, or None; note: how it came about."""

    folds: Mapping[int, Evaluation]
    pooled: Evaluation | None
    note: str

    @property
    def shown(self) -> list[Evaluation]:
        """Every fold, and the pooled one if there is one."""
        return [*self.folds.values(), *([self.pooled] if self.pooled else [])]

    @cached_property
    def overall(self) -> FoldPredictions:
        """What a single picture shows: pooled predictions, else those of all folds one after
        another (a slide then counts once for each fold that predicted it)."""
        if self.pooled is not None:
            return self.pooled.predictions
        return join_folds([item.predictions for item in self.folds.values()], name="all folds")

    def across(self, figure: str) -> np.ndarray:
        """The figure of every fold in which it is defined."""
        values = np.array([item.estimates[figure].value for item in self.folds.values()])
        defined: np.ndarray = values[np.isfinite(values)]
        return defined


@dataclass(frozen=True, kw_only=True)
class TaskView:
    """How predictions of one task type are measured, drawn and told.

    titles:    figure -> its title, in the order of the tables
    headline:  the objective's headline (columns of ``summary.csv``, told on the terminal) -> figure
    large:     figures shown large on the page; the first decides on warnings
    meanings:  title and explanation of figures
    missing:   what ``summary.csv`` has for a headline that is not defined, if not an empty cell
    pictures:  file name -> title and text; gallery: what they are together
    weigher:   the figures for any weighting of the slides
    undefined: why figures of these predictions are not defined, or ""
    details:   further entries for ``metrics.json``
    pool:      the test predictions of several folds as one, and what to say of it
    columns:   what ``fold_{k}.csv`` has beside the slide
    draw:      PNG bytes by file name
    sections:  the page's tables of single classes, labels or slides
    further:   further columns of the page's table of figures
    """

    task_type: TaskType
    titles: Mapping[str, str]
    headline: Mapping[str, str]
    large: tuple[str, ...]
    meanings: Sequence[tuple[str, str]]
    pictures: Mapping[str, tuple[str, str]]
    gallery: str
    weigher: Callable[[FoldPredictions, Measuring], Weigher]
    undefined: Callable[[FoldPredictions], str]
    details: Callable[[FoldPredictions], dict[str, Any]]
    pool: Callable[[Sequence[FoldPredictions]], tuple[FoldPredictions, str]]
    columns: Callable[[FoldPredictions], dict[str, Any]]
    draw: Callable[[Results], dict[str, bytes]]
    sections: Callable[[Results], list[Section]]
    missing: Mapping[str, float] = field(default_factory=dict)
    further: Callable[[Evaluation], dict[str, str]] = lambda item: {}


def predict_fold(name: str, model: torch.nn.Module, bags: Sequence[Bag], *,
                 case_of: Mapping[str, str], names: Sequence[str], n_truths: int,
                 device: torch.device, precision: Precision, group: Group = ALONE
                 ) -> tuple[FoldPredictions, dict[str, str]]:
    """Predictions for the bags, and slide -> reason for those without one.

    case_of: slide -> patient; n_truths: T, numbers in a truth. A score that is not finite is a
    failure, never a figure.
    """
    from utils.engine import predict

    found = predict(model, bags, device=device, precision=precision, group=group)
    good = np.isfinite(found.scores).all(axis=1)
    failed = {row.item: row.reason for row in found.failures}
    failed.update({slide: f"{slide}: the prediction of {name} is not finite"
                   for slide, fine in zip(found.slide_ids, good, strict=True) if not fine})
    slides = tuple(slide for slide, fine in zip(found.slide_ids, good, strict=True) if fine)
    return FoldPredictions(
        name=name, slide_ids=slides, case_ids=tuple(case_of[slide] for slide in slides),
        truths=found.truths[good].reshape(-1, n_truths), scores=found.scores[good],
        names=tuple(names),
        strata=np.zeros(len(slides), np.int64), folds=np.ones(len(slides), np.int64)), failed


def evaluate_predictions(predictions: FoldPredictions, view: TaskView, how: Measuring
                         ) -> Evaluation:
    """All figures of one set of predictions, intervals by resampling its patients."""
    return Evaluation(
        predictions=predictions, details=view.details(predictions),
        estimates=estimate_weighted(
            view.weigher(predictions, how), predictions.case_ids, names=list(view.titles),
            resamples=how.resamples, seed=how.seed, undefined=view.undefined(predictions)))


# ---------------------------------------------------------------------------- several folds

def join_folds(folds: Sequence[FoldPredictions], *, name: str) -> FoldPredictions:
    """The rows of all folds, each fold a stratum of its own; a single fold as it is."""
    if len(folds) == 1:
        return folds[0]
    return replace(
        folds[0], name=name,
        slide_ids=tuple(slide for part in folds for slide in part.slide_ids),
        case_ids=tuple(case for part in folds for case in part.case_ids),
        truths=np.concatenate([part.truths for part in folds]),
        scores=np.concatenate([part.scores for part in folds]),
        strata=np.repeat(np.arange(len(folds)), [len(part.slide_ids) for part in folds]),
        folds=np.concatenate([part.folds for part in folds]))


def average_folds(folds: Sequence[FoldPredictions]) -> tuple[FoldPredictions, str]:
    """One row a slide, in order of first appearance, and a sentence on it; a slide's scores are
    averaged over the folds that predicted it (CLAM's splits test a slide several times or never).
    """
    joined = join_folds(folds, name="pooled")
    slides, first = list(dict.fromkeys(joined.slide_ids)), dict[str, int]()
    for row, slide in enumerate(joined.slide_ids):
        first.setdefault(slide, row)
    row_of = {slide: row for row, slide in enumerate(slides)}
    rows = np.array([row_of[slide] for slide in joined.slide_ids], np.int64)
    times = np.bincount(rows, minlength=len(slides))
    total = np.zeros((len(slides), joined.scores.shape[1]))
    np.add.at(total, rows, joined.scores)
    pick = [first[slide] for slide in slides]
    again = int((times > 1).sum())
    note = (f"Pooled: the {len(slides)} test slides of {len(folds)} folds. " + (
        f"{again} of them were tested in several folds; their predictions are averaged."
        if again else "Each was tested in one fold."))
    return replace(joined, name="pooled", slide_ids=tuple(slides),
                   case_ids=tuple(joined.case_ids[row] for row in pick),
                   truths=joined.truths[pick], scores=total / np.maximum(times, 1)[:, None],
                   strata=np.zeros(len(slides), np.int64), folds=times), note


def pool_tests(folds: Mapping[int, Evaluation], part: str, view: TaskView,
               how: Measuring) -> Results:
    """All folds, with figures over the test slides of all where there are several.

    part: the split that was evaluated; of others nothing is pooled (a fold's training slides are
    another fold's test slides).
    """
    if part != "test":
        return Results(folds=folds, pooled=None, note="Nothing is pooled over folds: only test "
                       f"slides are, this is '{part}'.")
    if len(folds) < 2:
        return Results(folds=folds, pooled=None, note="One fold, so there is nothing to pool.")
    pooled, note = view.pool([item.predictions for item in folds.values()])
    return Results(folds=folds, pooled=evaluate_predictions(pooled, view, how), note=note)
