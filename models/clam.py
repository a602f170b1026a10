"""CLAM, single and multi branch: attention MIL with instance clustering.

Source: Lu, Williamson, Chen, Chen, Barbieri, Mahmood, "Data-efficient and weakly supervised
computational pathology on whole-slide images", Nature Biomedical Engineering 2021.
State-dict keys are the published ones: ``attention_net`` (see ``models.attention``),
``classifiers`` (C, 512) for one branch or ``classifiers.{c}`` (1, 512) for several, and
``instance_classifiers.{c}`` (2, 512).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from models.attention import HIDDEN, AttentionNet, pool
from models.layers import features_of, slide_step, stack_linears
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.errors import ItemFailed
from utils.losses import LOSSES
from utils.objectives import Classification, Objective


@dataclass(frozen=True, kw_only=True)
class InstanceLoss:
    """The clustering branch on one bag.

    value:       scalar with graph; 0 when the bag is too small to sample from
    targets:     (M,) 1 = evidence of the class, 0 = none; classes in index order, within the
                 slide's own class first the highest attention, then the lowest
    predictions: (M,) argmax of the instance classifiers
    """

    value: torch.Tensor
    targets: torch.Tensor
    predictions: torch.Tensor


class CLAM_SB(nn.Module):
    """Single branch: one attention row for all classes, one linear classifier.

    dropout: after the trunk. attention_dropout: in the attention (CLAM's is 0.25 or none).
    k_sample: instances taken from each end of the attention.
    subtyping: classes exclude each other, so the top instances of the others are negatives.
    bag_weight: share of the slide loss in the total, the rest is the instance loss's.
    instance_clustering: False trains on the slide loss alone (the keys stay).
    """

    multi_branch: ClassVar[bool] = False
    contextual: ClassVar[bool] = False

    def __init__(
        self,
        *,
        n_classes: int = 2,
        embed_dim: int = 1024,
        model_size: str = "small",
        gated: bool = True,
        dropout: float = 0.25,
        attention_dropout: float = 0.25,
        k_sample: int = 8,
        subtyping: bool = False,
        objective: Objective | None = None,
        inst_loss: str = "ce",
        bag_weight: float = 0.7,
        instance_clustering: bool = True,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.n_classes = n_classes
        self.k_sample = k_sample
        self.subtyping = subtyping
        self.objective = objective or Classification(n_classes=n_classes)
        self.inst_loss = LOSSES.get(inst_loss)
        self.bag_weight = bag_weight
        self.instance_clustering = instance_clustering
        self.attention_net = AttentionNet(
            embed_dim=embed_dim, model_size=model_size, gated=gated,
            rows=n_classes if self.multi_branch else 1,
            dropout=dropout, attention_dropout=attention_dropout)
        self.classifiers: nn.Module = (
            nn.ModuleList(nn.Linear(HIDDEN, 1) for _ in range(n_classes))
            if self.multi_branch else nn.Linear(HIDDEN, n_classes))
        self.instance_classifiers = nn.ModuleList(
            nn.Linear(HIDDEN, 2) for _ in range(n_classes))

    def _classify(self, embedding: torch.Tensor) -> torch.Tensor:
        """Slide embedding (1, 512) to logits (1, C)."""
        logits: torch.Tensor = self.classifiers(embedding)
        return logits

    def forward(self, bag: Bag) -> SlideOutput:
        """Logits (1, C), attention (K, N) before the softmax, embedding (K, 512)."""
        return self._output(*self.attention_net(features_of(bag, self.embed_dim)))

    def _output(self, h: torch.Tensor, scores: torch.Tensor) -> SlideOutput:
        embedding = pool(h, scores)
        return SlideOutput(
            logits=self._classify(embedding), attention=scores, embedding=embedding)

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """One loss: bag_weight * slide + (1 - bag_weight) * instance.

        Without instance clustering it is the slide's alone, whatever the task.
        """
        if not self.instance_clustering:
            yield slide_step(self(bag), bag, self.objective)
            return
        h, scores = self.attention_net(features_of(bag, self.embed_dim))
        output = self._output(h, scores)
        slide = self.objective.loss(output.logits, bag)
        if bag.label is None:
            raise ItemFailed(f"{bag.slide_id}: instance clustering needs a class")
        instances = self.instance_loss(h, scores, bag.label)
        yield StepLoss(
            value=self.bag_weight * slide + (1.0 - self.bag_weight) * instances.value,
            slide_loss=slide.detach(), parts={"instance_loss": instances.value.detach()},
            output=output, targets=instances.targets, predictions=instances.predictions)

    def instance_loss(self, h: torch.Tensor, scores: torch.Tensor, label: int) -> InstanceLoss:
        """Clustering loss of instances (N, 512) with raw scores (K, N) for a slide of class label.

        The k highest-attention instances of the slide's class are its evidence, the k lowest are
        not; with ``subtyping`` the k highest of every other class are no evidence of that class,
        and the sum over classes is divided by C. k is ``k_sample``; a bag of fewer instances
        gives half of them to each end (k = N // 2, so a bag of one has no instance loss).
        """
        n = scores.shape[1]
        k = self.k_sample if n >= self.k_sample else n // 2
        if k == 0:
            none = torch.zeros(0, dtype=torch.long, device=h.device)
            return InstanceLoss(value=h.new_zeros(()), targets=none, predictions=none)
        groups = self._groups(label)
        rows = scores.detach().expand(self.n_classes, -1)
        picked = torch.stack([
            (rows[c] if highest else -rows[c]).topk(k).indices for c, highest in groups])
        # only the classifiers in use: the others keep no gradient and so no weight decay
        weight, bias = stack_linears(self.instance_classifiers[c] for c, _ in groups)
        logits = torch.baddbmm(bias[:, None], h[picked], weight.transpose(1, 2))  # (G, k, 2)
        targets = torch.tensor([int(c == label and highest) for c, highest in groups],
                               device=h.device).repeat_interleave(k)
        by_row = self.inst_loss(logits.flatten(0, 1), targets, reduction="none")
        by_group = by_row.view(len(groups), k).mean(dim=1)
        share = by_group.new_tensor([0.5 if c == label else 1.0 for c, _ in groups])
        value = (by_group * share).sum() / (self.n_classes if self.subtyping else 1)
        return InstanceLoss(
            value=value, targets=targets, predictions=logits.detach().argmax(dim=2).flatten())

    def _groups(self, label: int) -> list[tuple[int, bool]]:
        """The (class, highest or lowest attention) groups to sample for a slide of class label."""
        classes = range(self.n_classes) if self.subtyping else (label,)
        return [(c, highest) for c in classes for highest in (True, False)
                if highest or c == label]


class CLAM_MB(CLAM_SB):
    """Multi branch: an attention row and a linear classifier of its own for each class."""

    multi_branch = True

    def _classify(self, embedding: torch.Tensor) -> torch.Tensor:
        """Slide embeddings (C, 512), one a class, to logits (1, C)."""
        weight, bias = stack_linears(cast(nn.ModuleList, self.classifiers))  # (C, 1, 512), (C, 1)
        return ((embedding * weight[:, 0]).sum(dim=1) + bias[:, 0])[None]
