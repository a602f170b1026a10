"""CLAM, single and multi branch: attention MIL with instance clustering.

Source: Lu, Williamson, Chen, Chen, Barbieri, Mahmood, "Data-efficient and weakly supervised
computational pathology on whole-slide images", Nature Biomedical Engineering 2021.
State-dict keys are the published ones: ``attention_net`` (see ``models.attention``),
``classifiers`` (C, 512) for one branch or ``classifiers.{c}`` (1, 512) for several, and
``instance_classifiers.{c}`` (2, 512).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import nn

from models.attention import HIDDEN, AttentionNet, pool
from models.instance_loss import InstanceLoss, class_of, cluster_instances
from models.layers import features_of, slide_step, stack_linears
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.losses import LOSSES
from utils.objectives import Classification, Objective


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
        instances = self.instance_loss(h, scores, class_of(bag))
        yield StepLoss(
            value=self.bag_weight * slide + (1.0 - self.bag_weight) * instances.value,
            slide_loss=slide.detach(), parts={"instance_loss": instances.value.detach()},
            output=output, targets=instances.targets, predictions=instances.predictions)

    def instance_loss(self, h: torch.Tensor, scores: torch.Tensor, label: int) -> InstanceLoss:
        """Clustering loss of instances (N, 512), see ``models.instance_loss``."""
        return cluster_instances(
            h, scores, label, self.instance_classifiers, k_sample=self.k_sample,
            subtyping=self.subtyping, loss=self.inst_loss)


class CLAM_MB(CLAM_SB):
    """Multi branch: an attention row and a linear classifier of its own for each class."""

    multi_branch = True

    def _classify(self, embedding: torch.Tensor) -> torch.Tensor:
        """Slide embeddings (C, 512), one a class, to logits (1, C)."""
        weight, bias = stack_linears(cast(nn.ModuleList, self.classifiers))  # (C, 1, 512), (C, 1)
        return ((embedding * weight[:, 0]).sum(dim=1) + bias[:, 0])[None]
