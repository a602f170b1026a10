"""What one pass over bags saw: losses and predictions, kept on the device until asked for."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.contracts import Bag, SlideOutput, StepLoss
from utils.distributed import Group
from utils.metrics import SlideMetrics
from utils.objectives import Objective, TaskMetrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """A pass in numbers.

    loss:       mean slide loss (what validation watches), or that of all slides together where
                the objective compares them
    parts:      means of the further losses by name, e.g. ``instance_loss``
    metrics:    of the slide predictions
    clustering: target (0, 1) -> share of instances that the clustering branch guessed right
    """

    loss: float
    parts: dict[str, float]
    metrics: TaskMetrics
    clustering: dict[int, float]

    @property
    def headline(self) -> tuple[str, float]:
        """Name and value of the task's first figure, higher is better; NaN where not defined."""
        return next(iter(self.metrics.headline().items()))

    def scalars(self, stage: str) -> dict[str, float | None]:
        """TensorBoard tags of this pass; ``stage`` is ``train`` or ``val``.

        CLAM's names for classification, ``<stage>/<figure>`` for other tasks.
        """
        values: dict[str, float | None] = {f"{stage}/loss": self.loss}
        if isinstance(self.metrics, SlideMetrics):
            values[f"{stage}/error"] = self.metrics.error
            if stage == "val":
                values["val/auc"] = self.metrics.auc
            if stage == "train" or "instance_loss" in self.parts:
                values.update((f"{stage}/class_{index}_acc", accuracy)
                              for index, accuracy in enumerate(self.metrics.class_accuracy))
        else:
            values.update((f"{stage}/{key}", value)
                          for key, value in self.metrics.headline().items())
        for name, value in self.parts.items():
            values[_PART_TAGS.get((stage, name), f"{stage}/{name}")] = value
        return values

    def line(self, stage: str) -> str:
        """The pass in words, e.g. ``val loss 0.5012 error 0.2500 auc 0.8125``."""
        text = f"{stage} loss {self.loss:.4f}"
        if isinstance(self.metrics, SlideMetrics):
            text += f" error {self.metrics.error:.4f}"
            text += f" auc {self.metrics.auc:.4f}" if stage == "val" else ""
        else:
            text += "".join(f" {key} {value:.4f}" for key, value in self.metrics.headline().items())
        if stage == "train":
            text += "".join(f" {name} {value:.4f}" for name, value in self.parts.items())
            if self.clustering:
                text += " clustering accuracy " + " ".join(
                    f"{target}: {share:.2f}" for target, share in self.clustering.items())
        return text


_PART_TAGS = {("train", "instance_loss"): "train/clustering_loss",
              ("val", "instance_loss"): "val/inst_loss"}


class _Seen(NamedTuple):
    """Plain numbers of one bag, for exchange between processes."""

    position: int
    truth: tuple[float, ...]
    slide_loss: float
    logits: list[float]
    parts: dict[str, float]


@dataclass
class EpochLog:
    """Collects references to small device tensors; nothing waits for the device until ``result``.

    objective: what the logits mean
    """

    objective: Objective
    slide_ids: list[str] = field(default_factory=list)
    _values: list[torch.Tensor] = field(default_factory=list)
    _slide_losses: list[torch.Tensor] = field(default_factory=list)
    _logits: list[torch.Tensor] = field(default_factory=list)
    _truths: list[tuple[float, ...]] = field(default_factory=list)
    _positions: list[int] = field(default_factory=list)
    _parts: list[dict[str, torch.Tensor]] = field(default_factory=list)
    _targets: list[torch.Tensor] = field(default_factory=list)
    _predictions: list[torch.Tensor] = field(default_factory=list)
    _checked: int = 0

    def add(self, bag: Bag, value: torch.Tensor, last: StepLoss, *, position: int) -> None:
        """Note a bag: ``value`` is the sum of its losses, ``last`` the last of them.

        position: place of the bag in the epoch, the same whatever the number of processes
        """
        if last.output is None or bag.truth is None:
            raise ValueError(f"{bag.slide_id}: a model sets 'output' on the last loss of a "
                             "labelled bag")
        self.slide_ids.append(bag.slide_id)
        self._values.append(value.detach())
        self._slide_losses.append(last.slide_loss.detach())
        self._logits.append(last.output.logits.detach())
        self._truths.append(bag.truth)
        self._positions.append(position)
        self._parts.append(last.parts)
        if last.targets is not None and last.predictions is not None:
            self._targets.append(last.targets)
            self._predictions.append(last.predictions)

    def add_prediction(self, bag: Bag, output: SlideOutput, *, position: int) -> None:
        """Note a bag that has no loss of its own, because its objective compares the slides."""
        logits = output.logits.detach()
        none = logits.new_zeros(())
        self.add(bag, logits.sum(), StepLoss(value=none, slide_loss=none, output=output),
                 position=position)

    def __len__(self) -> int:
        return len(self.slide_ids)

    def running_loss(self) -> float:
        """The loss of this process's slides so far; waits for the device."""
        if self.objective.needs_batch or not self.slide_ids:
            return self._loss(self._plain())
        return float(_stack(self._slide_losses).mean())

    def not_finite(self) -> list[str]:
        """Slides with a NaN or infinite loss since the last call, each with the one before it."""
        start, self._checked = self._checked, len(self)
        if start == len(self):
            return []
        finite = _stack(self._values[start:]).isfinite().tolist()
        return [self.slide_ids[index] + (f" (after {self.slide_ids[index - 1]})" if index else "")
                for index, good in enumerate(finite, start) if not good]

    def result(self, group: Group) -> EpochResult | None:
        """The numbers over all ranks, equal on every rank; None when no bag was seen."""
        import torch

        seen = sorted(one for part in group.gather(self._plain()) for one in part)
        instances = np.concatenate(group.gather(self._instances()), axis=1)
        if not seen:
            return None
        parts: dict[str, list[float]] = defaultdict(list)
        for one in seen:
            for name, value in one.parts.items():
                parts[name].append(value)
        targets, predictions = instances
        scores = self.objective.scores(torch.tensor([one.logits for one in seen]))
        return EpochResult(
            loss=self._loss(seen),
            parts={name: float(np.mean(values)) for name, values in parts.items()},
            metrics=self.objective.metrics(scores.numpy(), np.array([one.truth for one in seen])),
            clustering={int(target): float((predictions[targets == target] == target).mean())
                        for target in np.unique(targets)})

    def _loss(self, seen: list[_Seen]) -> float:
        if not seen:
            return float("nan")
        if self.objective.needs_batch:
            from utils.joint_loss import joint_loss

            return joint_loss(self.objective, [one.logits[0] for one in seen],
                              [one.truth for one in seen])
        return float(np.mean([one.slide_loss for one in seen]))

    def _plain(self) -> list[_Seen]:
        if not self.slide_ids:
            return []
        import torch

        names = sorted({name for parts in self._parts for name in parts})
        columns: dict[str, list[Any]] = {
            name: _stack([parts.get(name, self._values[0].new_tensor(float("nan")))
                          for parts in self._parts]).tolist() for name in names}
        logits = torch.cat(self._logits).float().tolist()
        losses = _stack(self._slide_losses).tolist()
        return [_Seen(position, truth, loss, row,
                      {name: columns[name][index] for name in names
                       if name in self._parts[index]})
                for index, (position, truth, loss, row) in enumerate(
                    zip(self._positions, self._truths, losses, logits, strict=True))]

    def _instances(self) -> np.ndarray:
        """(2, M) targets and predictions of the clustering branch."""
        import torch

        if not self._targets:
            return np.zeros((2, 0), np.int64)
        return torch.stack([torch.cat(self._targets), torch.cat(self._predictions)]).cpu().numpy()


def _stack(scalars: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack([value.reshape(()) for value in scalars]).float()
