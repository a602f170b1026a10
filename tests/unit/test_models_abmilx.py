"""ABMILX restated, on bags of any size, and what each of its options does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models.abmilx import ABMILX, BagNorm, attention_width
from models.options import AbmilxOptions, options_of
from models.slide_models import SlideModelSpec, build_slide_model
from tests.unit.test_models_spread import peak_bytes, plain
from utils.contracts import Bag, SlideOutput, StepLoss
from utils.errors import ItemFailed, Refused

D, C, H = 24, 64, 8


def make(seed: int = 0, **options: Any) -> ABMILX:
    torch.manual_seed(seed)
    return ABMILX(**{"embed_dim": D, "inner_dim": C, "n_heads": H, **options})


def make_bag(n: int = 40, label: int | None = 1, seed: int = 0, width: int = D) -> Bag:
    generator = torch.Generator().manual_seed(seed)
    return Bag(slide_id="s", features=torch.randn(n, width, generator=generator), label=label)


def one_step(model: ABMILX, bag: Bag) -> StepLoss:
    (step,) = model.losses(bag)
    return step


@torch.no_grad()
def look(model: ABMILX, bag: Bag) -> SlideOutput:
    return model.eval()(bag)


# ------------------------------------------------------------------------- the formula

@pytest.mark.parametrize("norm", ["none", "ln"])
@pytest.mark.parametrize("kernel", ["blocks", "fused"])
def test_equals_the_paper_restated_with_its_n_x_n(norm: str, kernel: str) -> None:
    model = make(mil_norm=norm, ffn=True, abx_alpha=-0.7, sdpa_type=kernel).eval().double()
    w = dict(model.named_parameters())
    x = torch.randn(2, 30, D, dtype=torch.float64)
    e = x if norm == "none" else F.layer_norm(x, (D,), w["feature.0.weight"])
    e = F.gelu(e @ w[f"feature.{int(norm == 'ln')}.weight"].T)
    h = e.view(2, 30, H, C // H).transpose(1, 2)
    a = (F.gelu(h @ w["attention.fc1.weight"].T) @ w["attention.fc2.weight"].T)[..., 0]
    seen = F.layer_norm(
        h, (C // H,), w["attn_plus_fn.norm_x.weight"], w["attn_plus_fn.norm_x.bias"])
    q, k = (seen @ half.T for half in w["attn_plus_fn.qk.weight"].chunk(2))
    a = a - 0.7 * plain(q, k, a)
    z = (a.softmax(dim=-1)[..., None] * h).sum(dim=2).flatten(1)
    p = z @ w["proj.weight"].T
    ffn = p if norm == "ln" else F.layer_norm(
        p, (C,), w["norm_ffn.weight"], w["norm_ffn.bias"])
    hidden = F.gelu(ffn @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
    p = p + hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    p = p if norm == "none" else F.layer_norm(p, (C,), w["norm1.weight"])
    found = model.batch(x)
    torch.testing.assert_close(found.embedding, p, atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(found.logits, p @ w["classifier.weight"].T, atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(found.log_weights, a.log_softmax(dim=-1), atol=1e-8, rtol=1e-7)


def test_output_keeps_the_contract_of_heat_maps() -> None:
    model, bag = make(n_classes=3, embed_dim=D), make_bag(50)
    found = look(model, bag)
    assert found.logits.shape == (1, 3)
    assert found.attention is not None and found.attention.shape == (1, 50)
    assert found.heads is not None and found.heads.shape == (H, 50)
    assert found.embedding is not None and found.embedding.shape == (1, C)
    torch.testing.assert_close(found.heads.sum(dim=1), torch.ones(H))
    torch.testing.assert_close(found.attention.softmax(dim=1)[0], found.heads.mean(dim=0))
    torch.testing.assert_close(model.classifier(found.embedding), found.logits)


@pytest.mark.parametrize("plus", [True, False])
def test_order_of_the_patches_is_free(plus: bool) -> None:
    model, bag = make(abx_attn_plus=plus), make_bag(60)
    order = torch.randperm(60)
    found = look(model, bag)
    other = look(model, Bag(slide_id="s", features=bag.features[order]))
    assert found.attention is not None and other.attention is not None
    torch.testing.assert_close(other.logits, found.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.attention, found.attention[:, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plus", [True, False])
def test_contextual_says_whether_patches_see_each_other(plus: bool) -> None:
    model, bag = make(abx_attn_plus=plus, n_heads=1), make_bag(20)
    changed = bag.features.clone()
    changed[10:] = torch.randn(10, D, generator=torch.Generator().manual_seed(9))
    one = look(model, bag).attention
    other = look(model, Bag(slide_id="s", features=changed)).attention
    assert one is not None and other is not None
    same = torch.allclose(one[0, :9] - one[0, 9], other[0, :9] - other[0, 9], atol=1e-5)
    assert model.contextual is plus
    assert same is not plus


def test_bags_of_a_batch_do_not_see_each_other() -> None:
    model = make(mil_norm="ln").eval()
    x = torch.stack([make_bag(30, seed=seed).features for seed in range(3)])
    together = model.batch(x)
    for index in range(3):
        alone = model.batch(x[index: index + 1])
        torch.testing.assert_close(together.logits[index], alone.logits[0])
        torch.testing.assert_close(together.log_weights[index], alone.log_weights[0])


# ------------------------------------------------------------------------- bags

@pytest.mark.parametrize("norm", ["none", "ln", "bn"])
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_small_bags_train(norm: str, n: int) -> None:
    model = make(mil_norm=norm).train()
    one_step(model, make_bag(n)).value.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.isfinite(look(model, make_bag(n)).logits).all()


def test_the_bag_stays_as_it_is() -> None:
    for act in ("gelu", "relu", "none"):
        bag = make_bag()
        before, shape = bag.features.clone(), bag.features.shape
        one_step(make(act=act, mil_norm="bn"), bag).value.backward()
        assert torch.equal(bag.features, before) and bag.features.shape == shape


def test_empty_and_foreign_bags_fail_by_name() -> None:
    with pytest.raises(ItemFailed, match="no patches"):
        make()(make_bag(0))
    with pytest.raises(ItemFailed, match="the model expects"):
        make()(make_bag(5, width=D + 1))


@pytest.mark.parametrize("norm", ["none", "ln", "bn"])
def test_learns_where_one_patch_decides(norm: str) -> None:
    model = make(mil_norm=norm, dropout=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    bags = [make_bag(20, label=seed % 2, seed=seed) for seed in range(8)]
    for bag in bags:
        bag.features[3] += 4.0 * (1 if bag.label else -1)
    losses: list[float] = []
    for _ in range(25):
        total = 0.0
        for bag in bags:
            step = one_step(model, bag)
            step.value.backward()
            total += float(step.slide_loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total / len(bags))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("norm", ["none", "ln", "bn"])
def test_autocast_is_close_and_weights_stay_float32(norm: str) -> None:
    model, bag = make(mil_norm=norm, dropout=0.0), make_bag(500)
    exact = look(model, bag)
    with torch.autocast("cpu", torch.bfloat16):
        found = look(model, bag)
        step = one_step(model.train(), bag)
    step.value.backward()
    assert exact.heads is not None and found.heads is not None
    assert found.heads.dtype == torch.float32
    torch.testing.assert_close(found.heads.sum(dim=1), torch.ones(H))
    assert (found.heads - exact.heads).norm() < 0.05 * exact.heads.norm()
    assert (found.logits - exact.logits).abs().max() < 0.1
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_memory_of_a_large_bag(mode: str) -> None:
    n, width = 20_000, 16
    model, bag = make(inner_dim=width, n_heads=1), make_bag(n)
    work = (lambda: one_step(model.train(), bag).value.backward()) if mode == "train" else (
        lambda: look(model, bag))
    assert peak_bytes(work) < 40e6  # N x N floats are 1,600e6 bytes; the features 2e6


# ------------------------------------------------------------------------- options

@pytest.mark.parametrize("changed", [
    {"inner_dim": 32}, {"n_heads": 4}, {"act": "relu"}, {"act": "none"}, {"mil_norm": "ln"},
    {"mil_norm": "bn"}, {"mil_bias": True}, {"abx_attn_bias": True}, {"abx_attn_plus": False},
    {"abx_attn_type": "mlp_gated"}, {"abx_D": 2}, {"abx_D": 16}, {"abx_embed_new": True},
    {"abx_alpha": 0.1}, {"legacy_alpha": True}, {"ffn": True}], ids=str)
def test_each_option_changes_parameters_or_output(changed: dict[str, Any]) -> None:
    before, after = make(), make(**changed)
    shapes = [{name: value.shape for name, value in model.named_parameters()}
              for model in (before, after)]
    if shapes[0] == shapes[1]:
        assert not torch.allclose(look(before, make_bag()).logits, look(after, make_bag()).logits)


@pytest.mark.parametrize("changed", [
    {"dropout": 0.5}, {"proj_drop": 0.5}, {"abx_attn_type": "mlp_gated", "attention_dropout": 0.5}],
    ids=str)
def test_dropout_acts_in_training_alone(changed: dict[str, Any]) -> None:
    model = make(**{"dropout": 0.0, "attention_dropout": 0.0, **changed}).train()
    bag = make_bag()
    one, other = model(bag).logits, model(bag).logits
    assert not torch.equal(one, other)
    calm = make(abx_attn_type="mlp_gated", dropout=0.0, attention_dropout=0.0).train()
    assert torch.equal(calm(bag).logits, calm(bag).logits)
    assert torch.equal(look(model, bag).logits, look(model, bag).logits)


@pytest.mark.parametrize("kernel", ["auto", "blocks", "fused"])
def test_sdpa_type_chooses_the_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[bool] = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **more: fused.append(True) or original(*args, **more))
    found, plainly = look(make(sdpa_type=kernel), make_bag()), look(make(), make_bag())
    assert fused == ([True] if kernel == "fused" else [])  # the tests' device is a CPU
    torch.testing.assert_close(found.logits, plainly.logits, atol=1e-5, rtol=1e-5)


def test_alpha_starts_at_one_or_as_told() -> None:
    def alpha(seed: int = 0, **options: Any) -> float:
        plus = make(seed, **options).attn_plus_fn
        assert plus is not None
        return plus.v.weight.item()

    assert {alpha(seed) for seed in range(5)} == {1.0}
    assert alpha(abx_alpha=0.1) == pytest.approx(0.1)
    drawn = torch.tensor([alpha(seed, legacy_alpha=True) for seed in range(200)])
    assert drawn.mean().abs() < 0.25
    assert 0.8 < drawn.std() < 1.2


def test_first_weights_are_xavier_normal_without_bias() -> None:
    model = make(mil_bias=True, inner_dim=512, embed_dim=1024)
    weight = model.feature[0].weight
    assert weight.std().item() == pytest.approx((2.0 / (1024 + 512)) ** 0.5, rel=0.02)
    assert model.feature[0].bias.abs().max() == 0


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(Refused, match="3 heads do not divide inner_dim 64: give --n_heads 1, 2, 4"):
        make(n_heads=3)


@pytest.mark.parametrize(("width", "value", "heads", "hidden"), [
    (64, None, 8, 64), (32, 10, 8, 3), (32, 64, 8, 8), (256, 64, 1, 64), (256, 2, 1, 128),
    (64, 11, 8, 1)])
def test_width_of_the_attention(width: int, value: int | None, heads: int, hidden: int) -> None:
    assert attention_width(width, value, heads=heads) == hidden


@pytest.mark.parametrize(("width", "value", "heads"), [(4, 8, 8), (64, 12, 16)])
def test_no_width_left_is_refused(width: int, value: int, heads: int) -> None:
    with pytest.raises(Refused, match="leaves no column"):
        attention_width(width, value, heads=heads)


def test_flags_reach_the_model() -> None:
    spec = SlideModelSpec(model_type="abmilx", embed_dim=D, n_classes=4, dropout=0.1,
                          options={"inner_dim": 32, "n_heads": 4, "abx_attn_plus": False})
    model = build_slide_model(spec)
    assert isinstance(model, ABMILX)
    assert (model.n_heads, model.contextual, model.feature[-1].drop) == (4, False, 0.1)
    assert model(make_bag()).logits.shape == (1, 4)
    assert spec.options == {**options_of("abmilx", {}, source="test"), "inner_dim": 32,
                            "n_heads": 4, "abx_attn_plus": False}
    assert AbmilxOptions().abx_attn_plus


# ------------------------------------------------------------------------- bag norm

def test_bag_norm_is_batch_norm_but_for_single_rows() -> None:
    torch.manual_seed(0)
    ours, theirs = BagNorm(5), torch.nn.BatchNorm1d(5)
    for _ in range(3):
        x = torch.randn(2, 7, 5) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))
    mean, var = ours.running_mean.clone(), ours.running_var.clone()
    row = torch.randn(1, 5)
    torch.testing.assert_close(ours(row), (row - mean) / (var + ours.eps).sqrt())
    torch.testing.assert_close(ours.running_mean, 0.9 * mean + 0.1 * row[0])
    torch.testing.assert_close(ours.running_var, 0.9 * var + 0.1 * (row[0] - mean) ** 2)


def test_bag_norm_learns_the_spread_of_single_rows() -> None:
    torch.manual_seed(0)
    norm = BagNorm(3)
    for _ in range(400):
        norm(torch.randn(1, 3) * 5 + 2)
    norm.eval()
    x = torch.randn(2000, 3) * 5 + 2
    assert norm(x).mean().abs() < 0.5
    assert 0.7 < norm(x).std() < 1.4
