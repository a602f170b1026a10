"""TransMIL: published names and shape, its steps written out, attention, options, small bags."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from models.slide_models import SlideModelSpec, build_slide_model
from models.transmil import TransMIL, _of_patches
from utils.contracts import Bag
from utils.errors import Refused

WIDTH = 20
SMALL = {"inner_dim": 16, "n_heads": 4}


def make(*, dropout: float = 0.25, attention_dropout: float | None = None,
         **options: Any) -> TransMIL:
    torch.manual_seed(0)
    model = build_slide_model(SlideModelSpec(
        model_type="transmil", embed_dim=WIDTH, n_classes=3, dropout=dropout,
        attention_dropout=attention_dropout, options={**SMALL, **options}))
    assert isinstance(model, TransMIL)
    return model


def bag(n: int) -> Bag:
    features = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n))
    return Bag(slide_id="s", features=features, label=2)


def written_out(model: TransMIL, features: torch.Tensor) -> torch.Tensor:
    """The published forward pass, its three convolutions and its identity one by one."""
    rows = model._fc1(features)
    side = math.ceil(math.sqrt(len(rows)))
    rows = torch.cat([rows, rows[: side**2 - len(rows)]])
    tokens = torch.cat([model.cls_token[0], rows])[None]
    tokens = tokens + model.layer1.attn(model.layer1.norm(tokens))
    image = tokens[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
    position = model.pos_layer
    image = (position.proj(image) + image + position.proj1(image) + position.proj2(image))
    tokens = torch.cat([tokens[:, :1], image.flatten(2).transpose(1, 2)], dim=1)
    tokens = tokens + model.layer2.attn(model.layer2.norm(tokens))
    logits: torch.Tensor = model._fc2(model.norm(tokens)[:, 0])
    return logits


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 7, 8, 9, 10, 200])
def test_steps_and_attention_on_any_bag(n: int, legacy: bool) -> None:
    model = make(legacy_padding=legacy).eval()
    output = model(bag(n))
    torch.testing.assert_close(output.logits, written_out(model, bag(n).features))
    assert output.heads is not None and output.attention is not None
    assert output.heads.shape == (4, n) and output.attention.shape == (1, n)
    assert bool((output.heads > 0).all())
    torch.testing.assert_close(output.heads.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(output.attention.softmax(dim=1)[0], output.heads.mean(dim=0))
    assert model.contextual


def test_published_names_and_size() -> None:
    model = build_slide_model(SlideModelSpec(model_type="transmil", embed_dim=1024, n_classes=2))
    layer = [f"{part}.{end}" for part, ends in (
        ("norm", ("weight", "bias")), ("attn.to_qkv", ("weight",)),
        ("attn.to_out.0", ("weight", "bias")), ("attn.res_conv", ("weight",))) for end in ends]
    both = ("weight", "bias")
    assert set(model.state_dict()) == {
        "cls_token", *(f"pos_layer.proj{i}.{end}" for i in ("", "1", "2") for end in both),
        *(f"layer{i}.{name}" for i in (1, 2) for name in layer),
        *(f"{name}.{end}" for name in ("_fc1.0", "norm", "_fc2") for end in both)}
    assert sum(value.numel() for value in model.parameters()) == 2_672_146
    assert model.layer1.attn.landmarks == 256  # type: ignore[union-attr]


def test_attention_counts_copies_with_their_patch() -> None:
    weights = torch.tensor([[0.1, 0.2, -0.05, 0.4, 0.2]])  # the last two repeat the first two
    found = _of_patches(weights, 3)
    floor = 1e-4 / 3
    expected = torch.tensor([[0.5, 0.4, floor]])
    torch.testing.assert_close(found, expected / expected.sum())
    torch.testing.assert_close(_of_patches(-weights, 5).sum(), torch.tensor(1.0))


def test_attention_is_the_class_tokens_in_the_last_layer() -> None:
    """With a landmark a token and a pseudo-inverse that has converged next to nothing is lost."""
    model = make(landmarks=64).eval()
    model.layer2.attn.iterations = 10
    seen: list[torch.Tensor] = []
    model.layer2.attn.to_qkv.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    found = model(bag(6)).heads
    assert found is not None
    q, k, _ = seen[0].view(10, 3, 4, 4).permute(1, 2, 0, 3)  # (heads, tokens, 4)
    exact = (q[:, :1] @ k.mT / 2).softmax(dim=2)[:, 0, 1:]  # the class token to 3 x 3 patches
    expected = exact[:, :6] + torch.cat([exact[:, 6:], torch.zeros(4, 3)], dim=1)
    torch.testing.assert_close(found, expected / expected.sum(dim=1, keepdim=True),
                               atol=2e-3, rtol=0.0)


@pytest.mark.parametrize(("options", "changed"), [
    ({"inner_dim": 32}, True), ({"n_heads": 2}, True), ({"landmarks": 4}, True),
    ({"legacy_padding": True}, True), ({"landmarks": 8}, False)])  # half of 16 is the default
def test_options_have_an_effect(options: dict[str, Any], changed: bool) -> None:
    first, second = make().eval()(bag(70)).logits, make(**options).eval()(bag(70)).logits
    assert torch.allclose(first, second) is not changed


@pytest.mark.parametrize(("changes", "random"), [
    ({}, True), ({"dropout": 0.0}, False), ({"attention_dropout": 0.0}, False),
    ({"dropout": 0.0, "attention_dropout": 0.3}, True)])
def test_dropout_after_the_attention(changes: dict[str, float], random: bool) -> None:
    model = make(**changes).train()
    assert torch.equal(model(bag(30)).logits, model(bag(30)).logits) is not random
    rates = {"dropout": 0.25, "attention_dropout": 0.1, **changes}
    expected = changes.get("attention_dropout", 0.1 if rates["dropout"] else 0.0)
    assert model.layer2.attn.to_out[1].drop == expected


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(Refused, match=r"inner_dim is 18, expected a multiple of n_heads \(4\)"):
        make(inner_dim=18)


@pytest.mark.parametrize("n", [1, 7, 40])
def test_every_weight_learns(n: int) -> None:
    model = make().train()
    (step,) = model.losses(bag(n))
    assert step.output is not None and step.output.attention is None  # not looked at in training
    step.value.backward()
    still = [name for name, value in model.named_parameters()
             if value.grad is None or not bool(value.grad.abs().sum() > 0)]
    assert still == []


def test_memory_of_a_step_grows_with_the_patches_not_with_their_square() -> None:
    def held(n: int) -> int:
        sizes: dict[int, int] = {}

        def note(value: torch.Tensor) -> torch.Tensor:
            sizes[value.data_ptr()] = value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            next(model.losses(bag(n)))
        return sum(sizes.values())

    model = make().train()
    assert held(4000) < 4.5 * held(1000)
