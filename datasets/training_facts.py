"""What a model's objective takes from the training slides of a fold, and from no others."""

from __future__ import annotations

import numpy as np

from datasets.table import SlideTable
from utils.errors import Refused
from utils.survival import survival_bins


def training_facts(
    train: SlideTable, *, n_bins: int, bag_loss: str, balanced: bool
) -> dict[str, tuple[float, ...]]:
    """Keywords of ``SlideModelSpec``: class weights, scale of the values, or edges of the bins.

    n_bins: bins of time, for ``bag_loss`` "nll_surv"
    balanced: classes weigh n / (C * n_c), so that all count the same and the mean weight of a
    slide is 1; the positives of a label weigh as its negatives do (negatives / positives)
    Raises ``Refused`` for weights where there are no labels, for values that are all the same, and
    for too few events.
    """
    if balanced and train.task_type in ("regression", "survival"):
        raise Refused(f"--class_weights balanced needs classes or labels, {train.task_type} has "
                      "none: leave it out")
    if train.targets is None:
        return {"class_weights": _class_weights(train.class_counts())} if balanced else {}
    if train.task_type == "multilabel":
        positives, negatives = ((train.targets == value).sum(axis=0) for value in (1, 0))
        if balanced and not (positives.all() and negatives.all()):
            raise Refused("a label has no positive or no negative training slide: make other "
                          "splits, or leave it out of --label_cols")
        return {"class_weights": tuple((negatives / positives).tolist())} if balanced else {}
    if train.task_type == "regression":
        deviation = train.targets.std(axis=0)
        if not (deviation > 0).all():
            raise Refused("all training slides have the same value: make other splits")
        return {"target_mean": tuple(train.targets.mean(axis=0).tolist()),
                "target_std": tuple(deviation.tolist())}
    if bag_loss != "nll_surv":
        return {}
    times, events = train.targets.T
    return {"bin_edges": survival_bins(times, events, n_bins)}


def _class_weights(counts: np.ndarray) -> tuple[float, ...]:
    if not counts.all():
        raise Refused("a class has no training slide: make other splits")
    return tuple((counts.sum() / (len(counts) * counts)).tolist())
