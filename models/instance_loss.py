"""The clustering branch of CLAM: what the attention calls important is evidence of the class.

Source: Lu, Williamson, Chen, Chen, Barbieri, Mahmood, "Data-efficient and weakly supervised
computational pathology on whole-slide images", Nature Biomedical Engineering 2021. HAG-MIL uses
the same on the last block of each of its models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from models.layers import stack_linears
from utils.contracts import Bag
from utils.errors import ItemFailed


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


def class_of(bag: Bag) -> int:
    """The class of a bag; ``ItemFailed`` when it has none."""
    if bag.label is None:
        raise ItemFailed(f"{bag.slide_id}: instance clustering needs a class")
    return bag.label


def cluster_instances(
    h: torch.Tensor,
    scores: torch.Tensor,
    label: int,
    classifiers: nn.ModuleList,
    *,
    k_sample: int,
    subtyping: bool,
    loss: Callable[..., torch.Tensor],
) -> InstanceLoss:
    """Clustering loss of instances (N, H) with raw scores (K, N) for a slide of class label.

    classifiers: a ``nn.Linear(H, 2)`` for each of C classes; K is 1, or C for a row a class.
    The k highest-attention instances of the slide's class are its evidence, the k lowest are
    not; with ``subtyping`` the k highest of every other class are no evidence of that class,
    and the sum over classes is divided by C. k is ``k_sample``; a bag of fewer instances
    gives half of them to each end (k = N // 2, so a bag of one has no instance loss).
    """
    n_classes, n = len(classifiers), scores.shape[1]
    k = k_sample if n >= k_sample else n // 2
    if k == 0:
        none = torch.zeros(0, dtype=torch.long, device=h.device)
        return InstanceLoss(value=h.new_zeros(()), targets=none, predictions=none)
    groups = _groups(label, n_classes if subtyping else None)
    rows = scores.detach().expand(n_classes, -1)
    picked = torch.stack([
        (rows[c] if highest else -rows[c]).topk(k).indices for c, highest in groups])
    # only the classifiers in use: the others keep no gradient and so no weight decay
    weight, bias = stack_linears(classifiers[c] for c, _ in groups)
    logits = torch.baddbmm(bias[:, None], h[picked], weight.transpose(1, 2))  # (G, k, 2)
    targets = torch.tensor([int(c == label and highest) for c, highest in groups],
                           device=h.device).repeat_interleave(k)
    by_row = loss(logits.flatten(0, 1), targets, reduction="none")
    by_group = by_row.view(len(groups), k).mean(dim=1)
    share = by_group.new_tensor([0.5 if c == label else 1.0 for c, _ in groups])
    return InstanceLoss(
        value=(by_group * share).sum() / (n_classes if subtyping else 1), targets=targets,
        predictions=logits.detach().argmax(dim=2).flatten())


def _groups(label: int, n_classes: int | None) -> list[tuple[int, bool]]:
    """The (class, highest or lowest attention) groups to sample, of the label's class or of all."""
    classes = (label,) if n_classes is None else range(n_classes)
    return [(c, highest) for c in classes for highest in (True, False) if highest or c == label]
