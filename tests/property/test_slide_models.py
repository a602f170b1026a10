"""What holds for every bag: order does not matter, attention is a distribution, labels are kept."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.slide_models import SLIDE_MODELS, SlideModelSpec, build_slide_model
from utils.contracts import Bag
from utils.metrics import binary_auc, slide_metrics


def make(model_type: str, n_classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_slide_model(SlideModelSpec(
        model_type=model_type, embed_dim=6, n_classes=n_classes)).eval()


ORDERED = ("transmil", "hag_mil")  # they see the patches as a sequence, as published
MODELS = {(name, c): make(name, c) for name in SLIDE_MODELS if name not in ORDERED
          for c in (2, 3)}


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from(sorted(MODELS)), n=st.integers(1, 40), seed=st.integers(0, 999))
def test_permuting_a_bag_permutes_its_scores(key: tuple[str, int], n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(n, 6)).astype(np.float32))
    order = torch.from_numpy(rng.permutation(n))
    with torch.no_grad():
        one = MODELS[key](Bag(slide_id="a", features=features))
        two = MODELS[key](Bag(slide_id="a", features=features[order]))
    torch.testing.assert_close(one.logits, two.logits, atol=1e-5, rtol=1e-4)
    if one.attention is not None:
        torch.testing.assert_close(one.attention[:, order], two.attention, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.attention.softmax(dim=1).sum(dim=1),
                                   torch.ones(len(one.attention)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_auc_counts_pairs(items: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in items], float)
    labels = np.array([label for _, label in items])
    gaps = scores[labels][:, None] - scores[~labels][None]
    expected = ((gaps > 0) + (gaps == 0) / 2).mean() if gaps.size else np.nan
    found = binary_auc(scores, labels)
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(binary_auc(-scores, labels), 1 - found)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 20), n_classes=st.integers(2, 4), seed=st.integers(0, 999))
def test_metrics_never_raise(n: int, n_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(n_classes), n)
    found = slide_metrics(probabilities, rng.integers(0, n_classes, n))
    assert np.isnan(found.auc) == bool(found.auc_reason)
    assert sum(map(sum, found.confusion)) == n
