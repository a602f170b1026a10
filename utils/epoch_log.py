"""What one pass over bags saw: losses and predictions, kept on the device until asked for."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.contracts import Bag, StepLoss
from utils.distributed import Group
from utils.metrics import SlideMetrics, slide_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """A pass in numbers.

    loss:       mean slide loss (what validation watches)
    parts:      means of the further losses by name, e.g. ``instance_loss``
    metrics:    of the slide predictions
    clustering: target (0, 1) -> share of instances that the clustering branch guessed right
    """

    loss: float
    parts: dict[str, float]
    metrics: SlideMetrics
    clustering: dict[int, float]

    def scalars(self, stage: str) -> dict[str, float | None]:
        """TensorBoard tags of this pass, CLAM's names; ``stage`` is ``train`` or ``val``."""
        values: dict[str, float | None] = {
            f"{stage}/loss": self.loss, f"{stage}/error": self.metrics.error}
        if stage == "val":
            values["val/auc"] = self.metrics.auc
        for name, value in self.parts.items():
            values[_PART_TAGS.get((stage, name), f"{stage}/{name}")] = value
        if stage == "train" or "instance_loss" in self.parts:
            for index, accuracy in enumerate(self.metrics.class_accuracy):
                values[f"{stage}/class_{index}_acc"] = accuracy
        return values


_PART_TAGS = {("train", "instance_loss"): "train/clustering_loss",
              ("val", "instance_loss"): "val/inst_loss"}


class _Seen(NamedTuple):
    """Plain numbers of one bag, for exchange between processes."""

    position: int
    label: int
    slide_loss: float
    probabilities: list[float]
    parts: dict[str, float]


@dataclass
class EpochLog:
    """Collects references to small device tensors; nothing waits for the device until ``result``.

    position: place of the bag in the epoch, the same whatever the number of processes
    """

    slide_ids: list[str] = field(default_factory=list)
    _values: list[torch.Tensor] = field(default_factory=list)
    _slide_losses: list[torch.Tensor] = field(default_factory=list)
    _logits: list[torch.Tensor] = field(default_factory=list)
    _labels: list[int] = field(default_factory=list)
    _positions: list[int] = field(default_factory=list)
    _parts: list[dict[str, torch.Tensor]] = field(default_factory=list)
    _targets: list[torch.Tensor] = field(default_factory=list)
    _predictions: list[torch.Tensor] = field(default_factory=list)
    _checked: int = 0

    def add(self, bag: Bag, value: torch.Tensor, last: StepLoss, *, position: int) -> None:
        """Note a bag: ``value`` is the sum of its losses, ``last`` the last of them."""
        if last.output is None or bag.label is None:
            raise ValueError(f"{bag.slide_id}: a model sets 'output' on the last loss of a "
                             "labelled bag")
        self.slide_ids.append(bag.slide_id)
        self._values.append(value.detach())
        self._slide_losses.append(last.slide_loss.detach())
        self._logits.append(last.output.logits.detach())
        self._labels.append(bag.label)
        self._positions.append(position)
        self._parts.append(last.parts)
        if last.targets is not None and last.predictions is not None:
            self._targets.append(last.targets)
            self._predictions.append(last.predictions)

    def __len__(self) -> int:
        return len(self.slide_ids)

    def running_loss(self) -> float:
        """Mean slide loss so far; waits for the device."""
        return float(_stack(self._slide_losses).mean()) if self.slide_ids else float("nan")

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
        seen = sorted(one for part in group.gather(self._plain()) for one in part)
        instances = np.concatenate(group.gather(self._instances()), axis=1)
        if not seen:
            return None
        parts: dict[str, list[float]] = defaultdict(list)
        for one in seen:
            for name, value in one.parts.items():
                parts[name].append(value)
        targets, predictions = instances
        return EpochResult(
            loss=float(np.mean([one.slide_loss for one in seen])),
            parts={name: float(np.mean(values)) for name, values in parts.items()},
            metrics=slide_metrics(np.array([one.probabilities for one in seen]),
                                  np.array([one.label for one in seen])),
            clustering={int(target): float((predictions[targets == target] == target).mean())
                        for target in np.unique(targets)})

    def _plain(self) -> list[_Seen]:
        if not self.slide_ids:
            return []
        names = sorted({name for parts in self._parts for name in parts})
        columns: dict[str, list[Any]] = {
            name: _stack([parts.get(name, self._values[0].new_tensor(float("nan")))
                          for parts in self._parts]).tolist() for name in names}
        import torch

        probabilities = torch.cat(self._logits).float().softmax(dim=1).tolist()
        losses = _stack(self._slide_losses).tolist()
        return [_Seen(position, label, loss, row,
                      {name: columns[name][index] for name in names
                       if name in self._parts[index]})
                for index, (position, label, loss, row) in enumerate(
                    zip(self._positions, self._labels, losses, probabilities, strict=True))]

    def _instances(self) -> np.ndarray:
        """(2, M) targets and predictions of the clustering branch."""
        import torch

        if not self._targets:
            return np.zeros((2, 0), np.int64)
        return torch.stack([torch.cat(self._targets), torch.cat(self._predictions)]).cpu().numpy()


def _stack(scalars: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack([value.reshape(()) for value in scalars]).float()
