"""HAG-MIL: a transformer a magnification; each looks where the coarser one paid attention.

Level L-1 is the coarsest, level 0 the finest; ``model{level}`` has its own weights. The patches
of highest attention at one level are kept, and the next model sees their children. The finest
model's prediction is the slide's.
Source: Xiong et al., "Diagnose Like a Pathologist: Transformer-Enabled Hierarchical
Attention-Guided Multiple Instance Learning for Whole Slide Image Classification", IJCAI 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import ClassVar, cast

import torch
from torch import nn

from models.iat import IAT, Blocks
from models.instance_loss import class_of, cluster_instances
from models.layers import features_of
from utils.contracts import Bag, LevelOutput, SlideOutput, StepLoss
from utils.errors import ItemFailed, Refused
from utils.losses import LOSSES
from utils.objectives import Classification, Objective

PUBLISHED_SMOOTHING = (0.1, 0.0)  # all levels but the finest, the finest


class HAGMIL(nn.Module):
    """n_levels instances of ``models.iat.IAT`` and the selection between them.

    t_patch, v_patch: parents kept in training and otherwise: a number, or (below 1) a fraction of
    the patches fed; one value, or one for each level but the finest, coarse to fine.
    level_smoothing: label smoothing of each level, coarse to fine; two values: all but the
    finest, the finest. None = 0.1, 0 for cross entropy.
    A level's loss is bag_weight * slide loss + inst_weight * instance loss of its last block
    (``models.instance_loss``), or the slide loss alone without instance_clustering.
    legacy_order: children in the order of their parents' attention, as published; otherwise in
    that of their row numbers, which follows the slide.
    hidden_dims to checkpoint_above: see ``models.iat.IAT``.
    """

    contextual: ClassVar[bool] = True

    def __init__(
        self, *, embed_dim: int = 1024, n_classes: int = 2, n_levels: int = 1,
        objective: Objective | None = None, hidden_dims: Sequence[int] = (1024, 1536, 512, 1024),
        gated: bool = True, dropout: float = 0.25, attention_dropout: float = 0.25,
        k_sample: int = 8, subtyping: bool = False, inst_loss: str = "ce",
        instance_clustering: bool = True, bag_weight: float = 0.5, inst_weight: float = 0.5,
        level_smoothing: Sequence[float] | None = None, t_patch: Sequence[float] = (7000,),
        v_patch: Sequence[float] = (10000,), landmarks: int | None = None,
        legacy_padding: bool = False, legacy_order: bool = False, checkpoint_above: int = 4096,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.objective = objective or Classification(n_classes=n_classes)
        self.level_objectives = _level_objectives(self.objective, level_smoothing, n_levels)
        self.kept_in_training = _one_a_level("t_patch", t_patch, n_levels - 1)
        self.kept_otherwise = _one_a_level("v_patch", v_patch, n_levels - 1)
        self.k_sample, self.subtyping = k_sample, subtyping
        self.inst_loss = LOSSES.get(inst_loss)
        self.instance_clustering = instance_clustering
        self.bag_weight, self.inst_weight = bag_weight, inst_weight
        self.legacy_order = legacy_order
        self.names = [f"model{level}" for level in reversed(range(n_levels))]
        for name in self.names:
            self.add_module(name, IAT(
                embed_dim=embed_dim, n_outputs=n_classes, hidden_dims=hidden_dims, gated=gated,
                dropout=dropout, attention_dropout=attention_dropout, landmarks=landmarks,
                legacy_padding=legacy_padding, checkpoint_above=checkpoint_above))

    def forward(self, bag: Bag) -> SlideOutput:
        """Logits (1, C) of the finest level; every level's part is in ``levels``.

        ``attention`` (1, N) is that of the coarsest level, which covers the whole bag.
        """
        walk = self._walk(bag)
        for _ in self.names[:-1]:
            next(walk)
        records, _, blocks = next(walk)
        return _output(records, blocks)

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """The loss of each level, coarse to fine; the last carries the prediction.

        A level is computed when its loss is asked for, and by then nothing holds the one before.
        """
        for records, model, blocks in self._walk(bag):
            step = self._step(bag, model, blocks, self.level_objectives[len(records) - 1])
            if len(records) == len(self.names):
                step.output = _output(records, blocks)
            del blocks
            yield step
            del step

    def _step(self, bag: Bag, model: IAT, blocks: Blocks, objective: Objective) -> StepLoss:
        slide = objective.loss(blocks.logits, bag)
        if not self.instance_clustering:
            return StepLoss(value=slide, slide_loss=slide.detach())
        instances = cluster_instances(
            blocks.instances, blocks.scores, class_of(bag), model.instance_classifiers,
            k_sample=self.k_sample, subtyping=self.subtyping, loss=self.inst_loss)
        return StepLoss(
            value=self.bag_weight * slide + self.inst_weight * instances.value,
            slide_loss=slide.detach(), parts={"instance_loss": instances.value.detach()},
            targets=instances.targets, predictions=instances.predictions)

    def _walk(self, bag: Bag) -> Iterator[tuple[list[LevelOutput], IAT, Blocks]]:
        """The levels of a bag, coarse to fine: the records of all so far, the model, its result."""
        features = features_of(bag, self.embed_dim)
        _check_levels(bag, len(self.names))
        rows = torch.arange(len(features), device=features.device)
        records: list[LevelOutput] = []
        for depth, name in enumerate(self.names):
            if depth:
                rows = _children(bag, depth, records[-1].selected)
                features = _read(bag, depth, rows, self.embed_dim)
            model = cast(IAT, getattr(self, name))
            blocks = model(features)
            scores = blocks.scores.detach()
            selected = rows[:0] if depth == len(bag.children) else self._select(scores, rows, depth)
            records.append(LevelOutput(
                rows=rows, attention=scores, logits=blocks.logits.detach(), selected=selected))
            yield records, model, blocks
            del blocks  # the consumer is done with the graph: free it before the next level

    def _select(self, scores: torch.Tensor, rows: torch.Tensor, depth: int) -> torch.Tensor:
        """The rows (k,) of highest score (1, n), by rank (legacy) or by row number."""
        kept = (self.kept_in_training if self.training else self.kept_otherwise)[depth]
        n = len(rows)
        k = min(n, int(kept) if kept >= 1 else ceil(kept * n))
        selected = rows[scores[0].topk(k).indices]
        return selected if self.legacy_order else selected.sort().values


def _output(records: list[LevelOutput], finest: Blocks) -> SlideOutput:
    return SlideOutput(logits=finest.logits, attention=records[0].attention,
                       embedding=finest.embedding, levels=tuple(records))


def _check_levels(bag: Bag, n_levels: int) -> None:
    """``ItemFailed`` unless the bag has the model's levels and their rows correspond."""
    if len(bag.children) != n_levels - 1:
        raise ItemFailed(f"{bag.slide_id}: the bag has {len(bag.children) + 1} magnifications, "
                         f"the model expects {n_levels}")
    n = len(bag)
    for depth, finer in enumerate(bag.children):
        if len(finer) != n * finer.branching:
            raise ItemFailed(f"{bag.slide_id}: level {n_levels - depth - 2} has {len(finer)} rows, "
                             f"expected {n} x {finer.branching}, the children of the level above")
        n = len(finer)


def _children(bag: Bag, depth: int, parents: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows at ``depth`` (0 = coarsest) that are children of rows of the level above.

    Children of a parent follow each other, parents keep their order; rows outside the slide are
    left out. ``ItemFailed`` when none is left.
    """
    finer = bag.children[depth - 1]
    steps = torch.arange(finer.branching, device=parents.device)
    rows = (parents[:, None] * finer.branching + steps).flatten()
    if finer.valid is not None:
        rows = rows[torch.from_numpy(finer.valid).to(rows.device)[rows]]
    if len(rows) == 0:
        raise ItemFailed(f"{bag.slide_id}: every child of the selected patches lies outside the "
                         f"slide at level {len(bag.children) - depth}")
    return rows


def _read(bag: Bag, depth: int, rows: torch.Tensor, width: int) -> torch.Tensor:
    """Features (n, width) of rows (n,) at ``depth``, on their device."""
    features = bag.children[depth - 1].read(rows.cpu().numpy())
    if tuple(features.shape) != (len(rows), width):
        raise ItemFailed(f"{bag.slide_id}: features at level {len(bag.children) - depth} have "
                         f"shape {tuple(features.shape)}, the model expects (patches, {width})")
    return features.to(rows.device)


def _one_a_level(name: str, values: Sequence[float], n: int) -> list[float]:
    """n numbers of parents to keep from one or n; ``Refused`` for what is no number of parents."""
    if any(value <= 0 or (value > 1 and value != int(value)) for value in values):
        raise Refused(f"model: {name} is {list(values)}, expected whole numbers, or fractions "
                      "between 0 and 1")
    if len(values) not in (1, n):
        raise Refused(f"model: {name} has {len(values)} values, expected 1"
                      + (f" or {n}, one for each level but the finest" if n > 1 else ""))
    return list(values) * n if len(values) == 1 else list(values)


def _level_objectives(
    objective: Objective, smoothing: Sequence[float] | None, n_levels: int
) -> list[Objective]:
    """The objective of each level, coarse to fine; ``Refused`` for smoothing of another task."""
    smoothable = isinstance(objective, Classification) and objective.loss_name == "ce"
    if smoothing is None:
        smoothing = PUBLISHED_SMOOTHING if smoothable else (0.0, 0.0)
    elif any(smoothing) and not smoothable:
        raise Refused("model: level_smoothing goes with classes and bag_loss ce: leave it out")
    if len(smoothing) == 2 != n_levels:
        smoothing = [smoothing[0]] * (n_levels - 1) + [smoothing[1]]
    if len(smoothing) != n_levels:
        raise Refused(f"model: level_smoothing has {len(smoothing)} values, expected 2 or "
                      f"{n_levels}, one a level")
    return [objective.with_smoothing(value) if value else objective for value in smoothing]
