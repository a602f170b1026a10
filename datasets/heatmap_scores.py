"""What a slide model says of one slide, as arrays: what it predicts, and where it looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from datasets.heatmap_scale import TrainedScale
from utils.contracts import Bag, LevelRows, SlideModel
from utils.errors import ItemFailed
from utils.objectives import TaskType
from wsi_core.hierarchy import Child


@dataclass(frozen=True, kw_only=True)
class LevelScores:
    """One magnification of a hierarchy.

    rows: (n,) numbers of the level's rows that were fed; attention: (n,) raw, float64
    selected: (n,) bool, those whose children went on; none at the finest level
    """

    rows: np.ndarray
    attention: np.ndarray
    selected: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One inference.

    prediction:  (K,) scores of the model's objective (``Objective.scores``), float64
    attention:   (R, N) raw, float64: one row, or one an output
    log_weights: attention is the logarithm of weights that sum to 1 over the bag, so it is lower
                 in a larger bag
    levels:      of a hierarchy, coarse to fine; else empty
    """

    prediction: np.ndarray
    attention: np.ndarray
    log_weights: bool = False
    levels: tuple[LevelScores, ...] = ()


class Score(Protocol):
    """Slide id, (N, D) features and the finer levels, if any -> what the model says."""

    def __call__(self, slide_id: str, features: np.ndarray,
                 children: tuple[LevelRows, ...] = ()) -> Scored: ...


def score_bag(
    slide_id: str, features: np.ndarray, children: tuple[LevelRows, ...] = (), *,
    model: SlideModel, device: Any,
) -> Scored:
    """Run a model (in eval mode) on one slide.

    Raises ``ItemFailed`` for a model without attention.
    """
    import torch

    with torch.inference_mode():
        output = model(Bag(slide_id=slide_id, features=torch.from_numpy(features),
                           children=children).to(device))
        prediction = model.objective.scores(output.logits)[0]
    if output.attention is None:
        raise ItemFailed(f"{slide_id}: this model has no attention to draw")
    levels = [(level.rows.cpu().numpy(), level.attention[0].double().cpu().numpy(),
               level.selected.cpu().numpy()) for level in output.levels]
    return Scored(
        prediction=prediction.double().cpu().numpy(),
        attention=output.attention.double().cpu().numpy(), log_weights=output.heads is not None,
        levels=tuple(LevelScores(rows=rows, attention=attention, selected=np.isin(rows, selected))
                     for rows, attention, selected in levels))


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model predicts. names: of the classes, labels or values; empty for survival."""

    task_type: TaskType
    names: tuple[str, ...]

    def predicted(self, prediction: np.ndarray) -> int | None:
        """The most probable class or label, the lower index of equals; None where there are none.
        """
        has_classes = self.task_type in ("classification", "multilabel")
        return int(prediction.argmax()) if has_classes else None

    def cells(self, prediction: np.ndarray) -> dict[str, Any]:
        """Columns for a csv.

        Classes ranked as CLAM does (``Pred_0, p_0`` ...) and ``p_class_<name>``; ``p_<label>``;
        ``yhat_<value>``; ``risk, S_1`` ... as in main.py's csv.
        """
        scores = [round(float(score), 6) for score in prediction]
        if self.task_type == "survival":
            return {"risk" if index == 0 else f"S_{index}": score
                    for index, score in enumerate(scores)}
        if self.task_type != "classification":
            stem = "yhat" if self.task_type == "regression" else "p"
            return {f"{stem}_{name}": score
                    for name, score in zip(self.names, scores, strict=True)}
        cells: dict[str, Any] = {}
        for rank, index in enumerate(np.argsort(-prediction, kind="stable")):
            cells.update({f"Pred_{rank}": self.names[index], f"p_{rank}": scores[index]})
        return cells | {f"p_class_{name}": score
                        for name, score in zip(self.names, scores, strict=True)}


class Encode(Protocol):
    """(N, D) float32 features of (N, 2) level-0 places of a slide.

    patch_size: px of ``patch_level`` to read; output_size: px to shrink to before anything else
    """

    def __call__(self, slide_path: Path, coords: np.ndarray, *, patch_level: int, patch_size: int,
                 output_size: int) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class ModelTools:
    """A slide model, loaded once a run.

    model: what it is (hash of its weights included), for the files' records
    children: the finer levels of a hierarchy, coarse to fine
    scale: of what it was trained on
    """

    model: Mapping[str, Any]
    outputs: Outputs
    children: tuple[Child, ...] = ()
    scale: TrainedScale = field(default_factory=lambda: TrainedScale({}))


@dataclass(frozen=True, kw_only=True)
class Tools(ModelTools):
    """A slide model of patches, and their encoder.

    encoder: what it is, for the files' records
    in_bags: a patch's raw attention depends on the bag it is in, so patches of the fine map are
        scored in bags like the coarse one
    """

    encode: Encode
    score: Score
    encoder: Mapping[str, Any]
    in_bags: bool = False
