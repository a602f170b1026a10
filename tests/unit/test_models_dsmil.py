"""DSMIL against its formulas written out, the published checkpoint, and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.dsmil import DSMIL
from models.slide_models import SlideModelSpec, build_slide_model
from models.trained import load_trained
from utils.contracts import Bag

WIDTH = 10


def make(n_classes: int = 2, **options: Any) -> DSMIL:
    torch.manual_seed(0)
    model = build_slide_model(SlideModelSpec(
        model_type="dsmil", embed_dim=WIDTH, n_classes=n_classes,
        options={"query_dim": 6, **options}))
    assert isinstance(model, DSMIL)
    return model


def bag(n: int, width: int = WIDTH, label: int = 1) -> Bag:
    features = torch.randn(n, width, generator=torch.Generator().manual_seed(n))
    return Bag(slide_id="s", features=features, label=label)


def written_out(state: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    """Li et al. 2021, eq. 5 to 8, one class after another."""
    def linear(name: str, rows: np.ndarray) -> np.ndarray:
        return rows @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    instances = linear("i_classifier.fc.0", x)
    if "b_classifier.q.weight" in state:
        queries = linear("b_classifier.q", x)
    else:
        queries = np.tanh(linear("b_classifier.q.2", np.maximum(linear("b_classifier.q.0", x), 0)))
    values = x
    if "b_classifier.v.1.weight" in state:
        values = np.maximum(linear("b_classifier.v.1", x), 0)
    scores, embeddings = [], []
    for c in range(instances.shape[1]):
        critical = queries[instances[:, c].argmax()]
        scores.append(queries @ critical / np.sqrt(queries.shape[1]))
        weights = np.exp(scores[-1] - scores[-1].max())
        embeddings.append(weights @ values / weights.sum())
    embedding = np.stack(embeddings)
    logits = np.einsum("ocd,cd->o", state["b_classifier.fcc.weight"], embedding)
    return {"logits": logits + state["b_classifier.fcc.bias"], "attention": np.stack(scores),
            "embedding": embedding, "highest": instances.max(axis=0)}


def numbers(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in state.items()}


@pytest.mark.parametrize("options", [{}, {"linear_query": True}, {"passing_v": True},
                                     {"query_dim": 3, "linear_query": True, "passing_v": True}])
@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 50])
def test_formulas(options: dict[str, Any], n_classes: int, n: int) -> None:
    model = make(n_classes, **options).eval()
    expected = written_out(numbers(model.state_dict()), bag(n).features.double().numpy())
    output = model(bag(n))
    for name, found in (("logits", output.logits[0]), ("attention", output.attention),
                        ("embedding", output.embedding)):
        assert found is not None
        np.testing.assert_allclose(found.detach().numpy(), expected[name], atol=2e-6)
    assert output.attention is not None and output.attention.shape == (n_classes, n)
    assert model.contextual and output.instances is None


def test_published_names() -> None:
    state = make(3, passing_v=True).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "i_classifier.fc.0.weight": (3, WIDTH), "i_classifier.fc.0.bias": (3,),
        "b_classifier.q.0.weight": (6, WIDTH), "b_classifier.q.0.bias": (6,),
        "b_classifier.q.2.weight": (6, 6), "b_classifier.q.2.bias": (6,),
        "b_classifier.v.1.weight": (WIDTH, WIDTH), "b_classifier.v.1.bias": (WIDTH,),
        "b_classifier.fcc.weight": (3, 3, WIDTH), "b_classifier.fcc.bias": (3,)}


def test_the_published_camelyon_checkpoint(shared: Path) -> None:
    path = shared / "data" / "checkpoints" / "dsmil_c16_aggregator.pth"
    trained = load_trained(path, class_names=("tumor",), task_type="multilabel")
    assert (trained.spec.model_type, trained.spec.embed_dim, trained.spec.n_classes) == (
        "dsmil", 512, 1)
    assert trained.spec.options["query_dim"] == 128 and not trained.spec.options["passing_v"]
    model, one = trained.build().eval(), bag(300, width=512)
    stored = torch.load(path, weights_only=True, map_location="cpu")
    expected = written_out(numbers(stored), one.features.double().numpy())
    output = model(one)
    np.testing.assert_allclose(output.logits[0].detach().numpy(), expected["logits"], atol=1e-5)
    np.testing.assert_allclose(output.attention.detach().numpy(), expected["attention"],
                               atol=1e-5)
    assert model.objective.scores(output.logits).shape == (1, 1)
    truth = Bag(slide_id="s", features=one.features, target=(1.0,))
    (step,) = model.losses(truth)
    loss = np.log1p(np.exp(-expected["logits"])) / 2 + np.log1p(np.exp(-expected["highest"])) / 2
    assert float(step.value.detach()) == pytest.approx(float(loss[0]), abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.8, 1.0])
def test_both_streams_learn_by_their_weights(weight: float) -> None:
    model = make(max_weight=weight)
    expected = written_out(numbers(model.state_dict()), bag(30).features.double().numpy())
    (step,) = model.losses(bag(30))
    slide, highest = (
        float(torch.nn.functional.cross_entropy(torch.from_numpy(expected[name])[None],
                                                torch.tensor([1])))
        for name in ("logits", "highest"))
    total = (1 - weight) * slide + weight * highest
    assert float(step.value.detach()) == pytest.approx(total, abs=1e-5)
    assert float(step.slide_loss) == pytest.approx(slide, abs=1e-5)
    assert float(step.parts["max_instance_loss"]) == pytest.approx(highest, abs=1e-5)
    step.value.backward()
    moved = {name.split(".")[0] for name, value in model.named_parameters()
             if value.grad is not None and bool(value.grad.abs().sum() > 0)}
    assert moved == ({"b_classifier"} if weight == 0 else {"i_classifier"} if weight == 1
                     else {"i_classifier", "b_classifier"})


def test_order_of_the_patches_does_not_matter() -> None:
    model, one = make(3).eval(), bag(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    first = model(one)
    second = model(Bag(slide_id="s", features=one.features[order]))
    torch.testing.assert_close(first.logits, second.logits)
    assert first.attention is not None and second.attention is not None
    torch.testing.assert_close(first.attention[:, order], second.attention)


@pytest.mark.parametrize("passing_v", [False, True])
def test_dropout_of_the_values(passing_v: bool) -> None:
    model = make(passing_v=passing_v, value_dropout=0.5).train()
    first, second = model(bag(20)), model(bag(20))
    assert not torch.equal(first.logits, second.logits)
    assert first.attention is not None and second.attention is not None
    assert torch.equal(first.attention, second.attention)  # the queries are whole
    plain = make(passing_v=passing_v).train()
    assert torch.equal(plain(bag(20)).logits, plain(bag(20)).logits)
