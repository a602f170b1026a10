"""The transformer of one magnification: names, sizes of bags, and what each option does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.iat import IAT, Blocks
from utils.errors import Refused

D = 20
WIDTHS = (16, 24, 8)


def make(seed: int = 0, **options: Any) -> IAT:
    torch.manual_seed(seed)
    return IAT(**{"embed_dim": D, "hidden_dims": WIDTHS, "dropout": 0.0, "attention_dropout": 0.0,
                  **options})


def rows(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 50])
@pytest.mark.parametrize("legacy_padding", [False, True])
def test_bags_of_any_size(n: int, legacy_padding: bool) -> None:
    model = make(n_outputs=3, legacy_padding=legacy_padding)
    found = model(rows(n))
    shapes = [tuple(part.shape) for part in (
        found.logits, found.embedding, found.scores, found.instances)]
    assert shapes == [(1, 3), (1, 8), (1, n), (n, 512)]
    found.logits.sum().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("instance_classifiers"):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_default_size_is_the_published_one() -> None:
    with torch.device("meta"):
        model = IAT()
    assert sum(parameter.numel() for parameter in model.parameters()) == 30_201_903


@pytest.mark.parametrize("widths", [(8,), (16, 24, 8), (9, 17, 33, 65, 8)])
def test_any_number_of_blocks(widths: tuple[int, ...]) -> None:
    model = make(hidden_dims=widths)
    assert len(model.layers) == len(widths)
    assert model.weights.weight.shape == (1, len(widths))
    assert model(rows(12)).embedding.shape == (1, widths[-1])


@pytest.mark.parametrize("widths", [(), (16, 7)])
def test_impossible_widths_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(Refused, match="hidden_dims is .*, expected"):
        make(hidden_dims=widths)


def attention_names(model: IAT) -> set[str]:
    prefix = "layers.0.attention_net."
    return {name.removeprefix(prefix).removesuffix(".weight") for name in model.state_dict()
            if name.startswith(prefix) and name.endswith(".weight")}


def test_names_of_the_attention_follow_gate_and_dropout() -> None:
    gated = {"attention_a.0", "attention_b.0", "attention_c"}
    assert attention_names(make(dropout=0.25)) == {"0"} | {f"3.{name}" for name in gated}
    assert attention_names(make()) == {"0"} | {f"2.{name}" for name in gated}
    assert attention_names(make(gated=False, dropout=0.25, attention_dropout=0.25)) == \
        {"0", "3.module.0", "3.module.3"}


def test_residual_weight_is_constant_and_stored() -> None:
    model = make()
    omega = model.state_dict()["layers.1.layer.residual_attn.omega"]
    assert omega.tolist() == pytest.approx([1.759567141532898])
    assert "layers.1.layer.residual_attn.omega" not in dict(model.named_parameters())


@pytest.mark.parametrize(("option", "value"), [
    ("landmarks", 3), ("legacy_padding", True), ("gated", False)])
def test_options_change_the_result(option: str, value: Any) -> None:
    x = rows(25)
    assert not torch.allclose(make()(x).logits, make(**{option: value})(x).logits, atol=1e-6)


@pytest.mark.parametrize("option", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(option: str) -> None:
    model, x = make(**{option: 0.25}), rows(25)
    first, second = model(x).logits, model(x).logits
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x).logits, model(x).logits)


def test_no_dropout_means_none_anywhere() -> None:
    model, x = make(), rows(25)
    assert torch.equal(model(x).logits, model(x).logits)


def held_bytes(model: IAT, x: torch.Tensor) -> tuple[int, Blocks]:
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = model(x)
    return sum(sizes.values()), found


def test_checkpointing_holds_less_and_gives_the_same_gradients() -> None:
    x, results = rows(300), []
    for limit in (299, 300):
        model = make(dropout=0.25, checkpoint_above=limit)
        torch.manual_seed(3)
        held, found = held_bytes(model, x)
        (found.logits.sum() + found.scores.sum()).backward()
        results.append((held, found.logits, [p.grad for p in model.parameters()]))
    (less, one, grads), (more, two, others) = results
    assert less < more / 5
    torch.testing.assert_close(one, two)
    for found_grad, expected in zip(grads, others, strict=True):
        torch.testing.assert_close(found_grad, expected)


def test_order_of_the_rows_matters_only_through_the_landmarks() -> None:
    """With a landmark a row, and the convolution off, the transformer is a set function."""
    model, x = make(landmarks=40).eval(), rows(40)
    for block in model.layers:
        torch.nn.init.zeros_(block.layer.attn.res_conv.weight)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = model(x), model(x[order])
    torch.testing.assert_close(one.logits, two.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.scores[:, order], two.scores, atol=1e-4, rtol=1e-4)


def test_mixed_precision_stays_close() -> None:
    model, x = make().eval(), rows(60)
    with torch.no_grad():
        exact = model(x).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x).logits
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.1)
