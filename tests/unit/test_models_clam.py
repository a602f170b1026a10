"""Instance clustering on bags of any size, and what each constructor option does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.abmil import ABMIL
from models.clam import CLAM_MB, CLAM_SB
from models.mil_fc import MIL_fc, MIL_fc_mc
from utils.contracts import Bag, StepLoss
from utils.objectives import Classification

D = 24


def make_bag(n: int = 40, label: int | None = 1, seed: int = 0) -> Bag:
    generator = torch.Generator().manual_seed(seed)
    return Bag(slide_id="s", features=torch.randn(n, D, generator=generator), label=label)


def make(kind: Any = CLAM_SB, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(**{"embed_dim": D, "dropout": 0.0, "attention_dropout": 0.0, **options})


def one_step(model: Any, bag: Bag) -> StepLoss:
    (step,) = model.losses(bag)
    assert isinstance(step, StepLoss)
    return step


@pytest.mark.parametrize("kind", [CLAM_SB, CLAM_MB])
@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 15, 16, 17])
def test_small_bags_give_finite_losses_and_gradients(kind: Any, subtyping: bool, n: int) -> None:
    model = make(kind, n_classes=3, subtyping=subtyping)
    step = one_step(model, make_bag(n))
    step.value.backward()
    k = 8 if n >= 8 else n // 2
    groups = 4 if subtyping else 2
    assert len(step.targets) == len(step.predictions) == groups * k
    assert int(step.targets.sum()) == k
    assert torch.isfinite(step.value)
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_fewer_instances_than_k_never_lie_in_both_groups() -> None:
    model = make()
    h, scores = torch.randn(7, 512), torch.arange(7.0)[None]
    for n in range(2, 8):
        found = model.instance_loss(h[:n], scores[:, :n], 1)
        assert found.targets.tolist() == [1] * (n // 2) + [0] * (n // 2)


def test_bag_of_one_trains_on_the_slide_loss_alone() -> None:
    step = one_step(make(), make_bag(1))
    assert float(step.parts["instance_loss"]) == 0.0
    assert step.value.item() == pytest.approx(0.7 * float(step.slide_loss))


def test_bag_weight_shares_out_the_two_losses() -> None:
    step = one_step(make(bag_weight=0.2), make_bag())
    expected = 0.2 * float(step.slide_loss) + 0.8 * float(step.parts["instance_loss"])
    assert step.value.item() == pytest.approx(expected, rel=1e-6)


def test_without_clustering_only_the_slide_loss_remains() -> None:
    model = make(instance_clustering=False)
    step = one_step(model, make_bag())
    assert step.value.item() == step.slide_loss.item()
    assert step.parts == {}
    assert step.targets is None
    assert "instance_classifiers.0.weight" in model.state_dict()


@pytest.mark.parametrize("kind", [CLAM_SB, CLAM_MB])
def test_multi_branch_has_a_row_and_a_classifier_a_class(kind: Any) -> None:
    model = make(kind, n_classes=3)
    output = model(make_bag(11))
    rows = 3 if kind is CLAM_MB else 1
    assert output.attention.shape == (rows, 11)
    assert output.embedding.shape == (rows, 512)
    assert output.logits.shape == (1, 3)
    if kind is CLAM_MB:
        by_hand = [head(output.embedding[c]) for c, head in enumerate(model.classifiers)]
        torch.testing.assert_close(output.logits[0], torch.cat(by_hand))


def test_only_classifiers_in_use_get_a_gradient() -> None:
    for subtyping, used in ((False, {1}), (True, {0, 1, 2})):
        model = make(n_classes=3, subtyping=subtyping)
        one_step(model, make_bag()).value.backward()
        found = {c for c, layer in enumerate(model.instance_classifiers)
                 if layer.weight.grad is not None}
        assert found == used


def test_instances_are_picked_from_both_ends_of_the_attention() -> None:
    model = make(k_sample=3)
    scores = torch.randperm(20).float()[None]
    h = torch.zeros(20, 512)
    order = scores[0].argsort(descending=True)
    h[order[:3], 0], h[order[-3:], 0] = 1.0, -1.0
    with torch.no_grad():
        for layer in model.instance_classifiers:
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[1, 0] = 50.0  # class 1 exactly where h is positive
            layer.weight[0, 0] = -50.0
    found = model.instance_loss(h, scores, 0)
    assert found.predictions.tolist() == found.targets.tolist() == [1, 1, 1, 0, 0, 0]
    assert float(found.value.detach()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("option", [
    {"objective": Classification(n_classes=2, loss_name="svm")}, {"inst_loss": "svm"},
    {"k_sample": 3}, {"subtyping": True}, {"gated": False}, {"model_size": "big"}])
def test_every_option_changes_the_loss(option: dict[str, Any]) -> None:
    plain, changed = one_step(make(), make_bag()), one_step(make(**option), make_bag())
    assert float(plain.value) != pytest.approx(float(changed.value), abs=1e-6)


@pytest.mark.parametrize("option", [{"dropout": 0.25}, {"attention_dropout": 0.25}])
@pytest.mark.parametrize("kind", [CLAM_SB, CLAM_MB, ABMIL])
def test_dropout_acts_in_training_only_and_follows_the_seed(
    kind: Any, option: dict[str, float]
) -> None:
    model, bag = make(kind, **option), make_bag()
    torch.manual_seed(1)
    first = model.train()(bag).logits
    torch.manual_seed(1)
    assert torch.equal(first, model(bag).logits)
    assert not torch.equal(first, model(bag).logits)
    model.eval()
    torch.testing.assert_close(model(bag).logits, make(kind)(bag).logits)


def test_one_mask_on_the_gated_product_has_the_mean_of_two() -> None:
    """Two dropouts of p keep a product with (1 - p)^2; the expected score must not move."""
    model, bag = make(attention_dropout=0.25), make_bag(5)
    expected = model.eval()(bag).attention
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model(bag).attention for _ in range(4000)])
    error = draws.std(dim=0) / 4000**0.5
    assert ((draws.mean(dim=0) - expected).abs() < 5 * error).all()
    attention = model.attention_net[3]
    assert attention.dropout.drop == pytest.approx(1 - 0.75**2)


@pytest.mark.parametrize("kind", [CLAM_SB, CLAM_MB, ABMIL, MIL_fc, MIL_fc_mc])
def test_bfloat16_autocast_gives_close_answers(kind: Any) -> None:
    torch.manual_seed(0)
    options = {} if kind is MIL_fc else {"n_classes": 2}
    model, bag = kind(embed_dim=D, **options).eval(), make_bag()
    exact = model(bag).probabilities
    with torch.autocast("cpu", torch.bfloat16):
        step = one_step(model, bag)
        step.value.backward()
    assert step.output is not None
    torch.testing.assert_close(step.output.probabilities, exact, atol=0.02, rtol=0)
    assert step.slide_loss.dtype == torch.float32
    trunk = next(model.parameters())
    assert trunk.grad is not None
    assert float(trunk.grad.norm()) > 0.0


@pytest.mark.parametrize("kind", [MIL_fc, MIL_fc_mc])
def test_baseline_gradient_is_that_of_the_full_graph(kind: Any) -> None:
    """Only the chosen patch carries gradient, so redoing its row alone must change nothing."""
    torch.manual_seed(0)
    model = kind(embed_dim=D, **({} if kind is MIL_fc else {"n_classes": 3}))
    bag = make_bag(30)
    model.train()
    torch.manual_seed(5)
    step = one_step(model, bag)
    step.value.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(5)
    h = model.fc(bag.features)
    logits = getattr(model, model.head_name)(h)
    row = model.choose(logits.softmax(dim=1))
    loss = torch.nn.functional.cross_entropy(logits[row][None], torch.tensor([1]))
    loss.backward()
    assert float(step.slide_loss) == pytest.approx(float(loss), abs=1e-6)
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.grad, atol=1e-6, rtol=1e-5)


def test_baseline_of_two_classes_looks_for_class_one() -> None:
    torch.manual_seed(0)
    two, many = MIL_fc(embed_dim=D).eval(), MIL_fc_mc(embed_dim=D, n_classes=2).eval()
    many.load_state_dict({key.replace("classifier.", "classifiers."): value
                          for key, value in two.state_dict().items()})
    bag = make_bag(50)
    two.classifier.bias.data[0] = many.classifiers.bias.data[0] = 3.0
    with torch.no_grad():
        probabilities = two(bag).instances
        torch.testing.assert_close(two(bag).probabilities[0],
                                   probabilities[probabilities[:, 1].argmax()])
        torch.testing.assert_close(many(bag).probabilities[0],
                                   probabilities[probabilities[:, 0].argmax()])


@pytest.mark.parametrize("kind", [CLAM_SB, ABMIL, MIL_fc])
def test_sgd_learns_a_planted_signal(kind: Any) -> None:
    """Bags of class 1 hold three odd instances in thirty: a few epochs find them."""
    torch.manual_seed(0)
    bags = []
    for index in range(40):
        features = torch.randn(30, D)
        features[:3, 0] += 6.0 * (index % 2)
        bags.append(Bag(slide_id=str(index), features=features, label=index % 2))
    model = kind(embed_dim=D).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for bag in bags * 8:
        optimizer.zero_grad()
        for step in model.losses(bag):
            step.value.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum(model(bag).predicted == bag.label for bag in bags)
    assert right >= 37
