"""End-to-end models: every way to hold the encoder's graph gives one gradient, in bounded memory.

Spec abmilx.md 17.3 (single-pass, chunked and gradient-cached gradients), 15.10 and 15.21 (memory).
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from models.e2e import EndToEnd
from models.e2e_encoders import encoder_width
from models.model_names import MIL_NAMES
from models.slide_models import SlideModelSpec, build_slide_model
from tests.end_to_end import DIM, Pixels, end_to_end, pixel_bag
from tests.training import COX
from utils.contracts import Bag
from utils.devices import autocast
from utils.distributed import ALONE
from utils.engine import predict
from utils.errors import ItemFailed, Refused
from utils.joint_loss import glimpse, joint_gradients, pass_again

CPU = torch.device("cpu")
MODES = ("graph", "cached", "checkpointed", "auto")
COX_SPEC = {"task_type": "survival", "n_classes": 1, "bag_loss": "cox"}


def bags_of(*counts: int) -> list[Bag]:
    """Slides of these numbers of patches, the last at two scales."""
    *most, last = counts
    return [*(pixel_bag(index, patches=count) for index, count in enumerate(most)),
            pixel_bag(len(most), patches=(last // 2, last - last // 2))]


def learn(model: EndToEnd, bags: list[Bag], *, precision: Any = "fp32", scale: float = 1.0
          ) -> dict[str, torch.Tensor | None]:
    """A step's gradients as the engine makes them, and the buffers afterwards."""
    torch.manual_seed(11)
    model.train().zero_grad()
    encoded = model.encode(bags)
    while True:
        with autocast(precision, CPU):
            bag = next(encoded, None)
        if bag is None:
            break
        losses = model.losses(bag)
        while True:
            with autocast(precision, CPU):
                loss = next(losses, None)
            if loss is None:
                break
            (loss.value * scale).backward()
    return outcome(model)


def outcome(model: EndToEnd) -> dict[str, torch.Tensor | None]:
    return {**{name: None if one.grad is None else one.grad.clone()
               for name, one in model.named_parameters()},
            **{f"buffer {name}": one.clone() for name, one in model.named_buffers()}}


def close(ours: dict[str, Any], theirs: dict[str, Any], *, tolerance: float = 1e-5,
          first: str = "encoder.model.0.0.weight") -> None:
    """Each to ``tolerance`` of its own largest number (and a breath of the largest of all: the
    bias of a softmax has none), and the encoder's are not all 0."""
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for name, value in theirs.items()
                  if value is not None and "buffer" not in name)
    for name, value in theirs.items():
        if value is None:
            assert ours[name] is None, name
            continue
        size = float(value.abs().max())
        torch.testing.assert_close(ours[name], value, rtol=tolerance,
                                   atol=tolerance * (size + 0.1 * largest),
                                   msg=lambda text, name=name: f"{name}: {text}")
    assert float(theirs[first].abs().max()) > 1e-6  # the first convolution


# ------------------------------------------------------------------------- gradients

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_all_modes_give_one_gradient(mode: str, precision: str, tolerance: float) -> None:
    """With augmentation, and dropout in encoder and aggregator: all are drawn again."""
    theirs = learn(end_to_end("abmilx", enc_grad="graph"), bags_of(5, 6, 8), precision=precision)
    ours = learn(end_to_end("abmilx", enc_grad=mode), bags_of(5, 6, 8), precision=precision)
    close(ours, theirs, tolerance=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_chunks_do_not_show(mode: str) -> None:
    """Plain (one chunk) and chunked: without dropout and augmentation, whatever the chunks."""
    found = [learn(end_to_end("abmilx", enc_dropout=0, img_transform="none",
                              p_batch_size=most, enc_grad=how, spec={"dropout": 0.0}),
                   bags_of(5, 6, 8))
             for how, most in (("graph", 100), (mode, 4), (mode, 1))]
    for ours in found[1:]:
        close(ours, found[0])


@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_gradient_of_the_slides_together(mode: str) -> None:
    """Against autograd through encoder and aggregator in one graph, without any of our ways."""
    def make(**options: Any) -> EndToEnd:
        return end_to_end(enc_dropout=0, img_transform="none",
                          spec={"dropout": 0.0}, **options)

    model, bags = make(), bags_of(3, 7, 4)
    for bag in bags:
        patches = bag.patches
        assert isinstance(patches, Pixels)
        rows = torch.cat([model.encoder(model.transform(one)) for one in patches.scales])
        for loss in model.mil.losses(replace(bag, features=rows)):  # type: ignore[operator]
            loss.value.backward()
    close(learn(make(enc_grad=mode), bags), outcome(model))


@pytest.mark.parametrize("mode", MODES)
def test_scaled_losses_scale_the_gradient(mode: str) -> None:
    bags = bags_of(5, 6)
    once, much = (learn(end_to_end(enc_grad=mode), bags, scale=scale) for scale in (1.0, 1024.0))
    close({name: value if "buffer" in name else value / 1024 for name, value in much.items()
           if value is not None}, {name: value for name, value in once.items()
                                   if value is not None})


@pytest.mark.parametrize("mode", MODES)
def test_cox_compares_slides_in_two_passes_of_each(mode: str) -> None:
    """``utils.joint_loss`` passes a slide without gradient, then with it; a cached one, thrice."""
    def step(model: EndToEnd, bags: list[Bag]) -> dict[str, Any]:
        how: dict[str, Any] = {"precision": "fp32", "device": CPU}
        torch.manual_seed(11)
        seen = [glimpse(model, bag, **how)[0] for bag in bags]
        found = joint_gradients(model.objective, seen, ALONE)
        assert found
        for bag, one, gradient in zip(bags, seen, found, strict=True):
            pass_again(model, bag, one, gradient, **how).backward()
        return outcome(model)

    bags = [pixel_bag(index, patches=(3, 4 + index), target=(9.0 - index, float(index != 1)))
            for index in range(4)]
    options: dict[str, Any] = {"spec": COX_SPEC, "enc_bn": "batch"}
    ours = step(end_to_end(enc_grad=mode, **options), bags)
    plain = end_to_end(enc_grad="graph", **options)
    torch.manual_seed(11)
    logits = torch.cat([plain(bag).logits for bag in bags])
    loss, _ = COX.joint_gradient(logits.detach(), torch.tensor(  # type: ignore[attr-defined]
        [bag.target for bag in bags], dtype=torch.float64))
    from utils.survival import cox_loss

    truths = torch.tensor([bag.target for bag in bags])
    value = cox_loss(logits[:, 0], truths[:, 0], truths[:, 1])
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    (value * len(bags)).backward()
    close(ours, outcome(plain))


@pytest.mark.parametrize("mode", MODES)
def test_batch_statistics_are_those_of_the_slides_together(mode: str) -> None:
    options: dict[str, Any] = {"enc_bn": "batch", "p_batch_size": 100, "img_transform": "none"}
    bags = [pixel_bag(index, patches=3 + index) for index in range(3)]
    model = end_to_end(enc_grad=mode, **options)
    first = model.encoder.model[0][0]
    found = learn(model, bags)
    images = [model.transform(one) for bag in bags for one in bag.patches.scales]  # type: ignore
    with torch.no_grad():
        mean = first(torch.cat(images)).mean(dim=(0, 2, 3))
    before = end_to_end(**options).encoder.norms()[0].running_mean  # type: ignore[operator]
    torch.testing.assert_close(found["buffer encoder.model.0.1.running_mean"],
                               0.9 * before + 0.1 * mean, rtol=1e-5, atol=1e-6)
    assert int(found["buffer encoder.model.0.1.num_batches_tracked"]) == 1  # type: ignore[arg-type]
    close(found, learn(end_to_end(enc_grad="graph", **options), bags))


@pytest.mark.parametrize("mode", MODES)
def test_many_losses_cost_one_backward_through_the_encoder(mode: str) -> None:
    model, calls = end_to_end("hag_mil", enc_grad=mode), []
    weight = model.encoder.model[0][0].weight
    weight.register_post_accumulate_grad_hook(lambda weight: calls.append(1))
    model.mil.losses = several(model.mil.losses)  # type: ignore[assignment, arg-type]
    found = learn(model, bags_of(4, 4))
    assert found["encoder.model.0.0.weight"] is not None
    assert len(calls) == 1


def several(losses: Callable[[Bag], Any]) -> Callable[[Bag], Any]:
    def repeated(bag: Bag) -> Any:
        for _ in range(3):
            yield from losses(bag)
    return repeated


@pytest.mark.parametrize(("name", "first"), [
    ("r18", "conv1"), ("efficientnet_lite0", "conv_stem")])
def test_networks_of_timm_give_one_gradient_too(name: str, first: str) -> None:
    """They write over activations, and their norms hold more than a norm."""
    found = []
    for mode in ("graph", "cached", "checkpointed"):
        torch.manual_seed(0)
        model = build_slide_model(SlideModelSpec(
            model_type=f"e2e_{name}_abmilx", embed_dim=encoder_width(name), n_classes=2,
            options={"inner_dim": 16, "n_heads": 2, "enc_grad": mode, "enc_bn": "batch",
                     "p_batch_size": 4, "img_size": 48, "img_transform": "strong"}))
        assert isinstance(model, EndToEnd)
        found.append(learn(model, bags_of(3, 4)))
    for ours in found[1:]:
        close(ours, found[0], first=f"encoder.model.{first}.weight")


def test_chunks_go_across_slides_and_are_even() -> None:
    sizes: list[int] = []
    model = end_to_end(p_batch_size=8)
    model.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    learn(model, bags_of(5, 9, 7))  # 21 patches: three chunks, twice
    assert sizes == [7, 7, 7, 7, 7, 7]


# ------------------------------------------------------------------------- every aggregator

@pytest.mark.parametrize("patches", [1, 9])
@pytest.mark.parametrize("mil", MIL_NAMES)
def test_every_aggregator_learns_and_answers(mil: str, patches: int) -> None:
    model = end_to_end(mil, spec={"k_sample": 1})
    found = learn(model, [pixel_bag(0, patches=patches), pixel_bag(1, patches=patches)])
    for name, value in found.items():
        assert value is None or value.isfinite().all(), name
    if patches > 1:
        gradient = found["encoder.model.0.0.weight"]
        assert gradient is not None
        assert gradient.any()
    with torch.inference_mode():
        output = model.eval()(pixel_bag(1, patches=patches))
        *_, last = model.losses(pixel_bag(1, patches=patches))
    assert output.logits.shape == (1, 2)
    assert output.logits.isfinite().all()
    assert last.value.isfinite()
    torch.testing.assert_close(last.output.logits, output.logits)  # type: ignore[union-attr]
    assert model.contextual == model.mil.contextual
    assert model.objective is model.mil.objective
    if output.attention is not None:
        assert output.attention.shape[1] == patches


def test_losses_of_a_bag_with_pixels_is_encode_and_losses() -> None:
    model, bag = end_to_end(), pixel_bag(0, patches=6)
    expected = learn(model, [bag])
    model.zero_grad()
    torch.manual_seed(11)
    for loss in model.losses(bag):
        loss.value.backward()
    ours = outcome(model)
    close(ours, expected)


def test_a_toy_set_is_learnt() -> None:
    """Spec 17.3: two slides, two scales, B = 2, s = 8; the encoder alone can tell the colours."""
    torch.manual_seed(0)
    model = end_to_end("abmilx", batch_size=2, p_batch_size=8)
    model.mil.requires_grad_(False)
    bags = [pixel_bag(index, patches=(2, 6)) for index in range(2)]
    optimiser = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.01)
    losses = []
    for _ in range(30):
        model.train()
        optimiser.zero_grad()
        total = 0.0
        for bag in model.encode(bags):
            for loss in model.losses(bag):
                loss.value.backward()
                total += loss.value.item()
        optimiser.step()
        losses.append(total)
    assert losses[-1] < 0.5 * losses[0]
    answers = predict(model, [pixel_bag(index, patches=9) for index in range(8)], device=CPU)
    assert answers.labels.tolist() == answers.scores.argmax(axis=1).tolist()


# ------------------------------------------------------------------------- freezing

@pytest.mark.parametrize("mode", ["graph", "cached", "checkpointed"])
@pytest.mark.parametrize("train_blocks", [0, 1, 2])
def test_frozen_blocks_stay_as_they_are(train_blocks: int, mode: str) -> None:
    options = {"enc_grad": mode, "enc_bn": "batch"} if train_blocks else {}
    model = end_to_end(train_blocks=train_blocks, **options)
    before = copy.deepcopy(model.state_dict())
    graphs: list[bool] = []
    model.encoder.blocks()[0].register_forward_hook(
        lambda _, __, out: graphs.append(out.requires_grad))
    found = learn(model, bags_of(4, 4))
    torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0).step()
    for name, value in model.state_dict().items():
        block = int(name.split(".")[2]) if name.startswith("encoder") else 9
        unchanged = torch.equal(value, before[name])
        assert unchanged == (block < 3 - train_blocks), name
        if "running" not in name and "tracked" not in name:
            assert (found[name] is None) == (block < 3 - train_blocks)
    assert not any(graphs)
    assert len(graphs) == (4 if mode == "cached" and train_blocks else 2)  # no second pass without


@pytest.mark.parametrize("norms", ["frozen", "batch", "sync"])
def test_an_encoder_that_rests_stays_as_it_is(norms: str) -> None:
    model = end_to_end(enc_bn=norms)
    before = copy.deepcopy(model.encoder.state_dict())
    model.rest(True)
    model.train()
    found = learn(model, bags_of(4, 4))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(before[name], value)
               for name, value in model.encoder.state_dict().items())
    assert any(value is not None and value.any() for name, value in found.items()
               if name.startswith("mil."))
    model.rest(False)
    model.train()
    learn(model, bags_of(4, 4))
    assert all(one.grad is not None for one in model.encoder.parameters())


def test_frozen_norms_keep_their_statistics_and_learn_weights() -> None:
    model = end_to_end(p_batch_size=100)
    before = copy.deepcopy(model.state_dict())
    found = learn(model, bags_of(4, 4))
    name = "encoder.model.1.1"
    assert torch.equal(found[f"buffer {name}.running_mean"],  # type: ignore[arg-type]
                       before[f"{name}.running_mean"])
    assert found[f"{name}.weight"].any()  # type: ignore[union-attr]
    assert [norm.training for norm in model.encoder.norms()] == [False] * 3  # type: ignore
    dropout = model.encoder.model[2][3]
    assert dropout.training
    assert not model.eval().encoder.model[2][3].training


@pytest.mark.parametrize(("options", "message"), [
    ({"train_blocks": 4}, "--train_blocks is 4, but the encoder has 3 blocks"),
    ({"train_blocks": 0, "enc_bn": "batch"}, "--enc_bn batch: no batch norm of the encoder"),
    ({"train_blocks": 0, "enc_grad": "cached"}, "--enc_grad cached: nothing of the encoder"),
    ({"enc_bn": "sync", "spec": COX_SPEC}, "--enc_bn sync .* Cox passes each slide alone")])
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        end_to_end(**options)


# ------------------------------------------------------------------------- memory and streams

class Saved:
    """What autograd holds for the way back; counts its bytes, now and at their peak."""

    alive = peak = 0

    def __init__(self, value: torch.Tensor) -> None:
        self.value, self.size = value, value.numel() * value.element_size()
        Saved.alive += self.size
        Saved.peak = max(Saved.peak, Saved.alive)

    def __del__(self) -> None:
        Saved.alive -= self.size


def peak_of_training(mode: str, patches: int) -> int:
    model = end_to_end("max", enc_grad=mode)
    Saved.alive = Saved.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
        learn(model, [pixel_bag(0, patches=patches)])
    gc.collect()
    assert Saved.alive == 0
    return Saved.peak


def test_memory_of_training_is_that_of_a_chunk() -> None:
    rows = 4 * DIM * 4 * 32  # what holding the features of 32 patches more may cost
    assert peak_of_training("cached", 40) - peak_of_training("cached", 8) < rows
    graph, held = peak_of_training("graph", 40), peak_of_training("checkpointed", 40)
    assert peak_of_training("cached", 40) < held < graph
    assert graph > 3.5 * peak_of_training("graph", 8)
    assert peak_of_training("auto", 40) == peak_of_training("cached", 40)
    assert peak_of_training("auto", 4) == peak_of_training("graph", 4)


def test_evaluation_streams() -> None:
    model = end_to_end().eval()
    sizes: list[int] = []
    model.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    bag = pixel_bag(0, patches=10)
    with torch.inference_mode():
        model(bag)
    assert sizes == [2, 3, 2, 3]  # p_batch_size_v is 3
    assert isinstance(bag.patches, Pixels)
    assert max(bag.patches.log) <= 3
    features = model.features(bag.patches)
    assert features.shape == (10, DIM)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    whole = model.encoder(model.transform(bag.patches.scales[0]))
    torch.testing.assert_close(features, whole.detach(), rtol=1e-5, atol=1e-6)


def test_encoded_bags_keep_all_but_the_pixels() -> None:
    model, bags = end_to_end(), bags_of(3, 5)
    for bag, encoded in zip(bags, model.encode(bags), strict=True):
        assert encoded.patches is None
        assert encoded.features.shape == (len(bag), DIM)
        assert encoded.features.is_leaf
        assert encoded.features.requires_grad
        assert encoded.coords is bag.coords
        assert (encoded.slide_id, encoded.label) == (bag.slide_id, bag.label)


@pytest.mark.parametrize("mode", MODES)
def test_closed_early_nothing_goes_back(mode: str) -> None:
    model = end_to_end(enc_grad=mode)
    encoded = model.encode(bags_of(4, 4))
    for loss in model.losses(next(encoded)):
        loss.value.backward()
    encoded.close()
    assert all(one.grad is None for one in model.encoder.parameters())
    assert next(model.mil.parameters()).grad is not None


def test_bags_without_losses_give_no_gradient() -> None:
    model = end_to_end()
    assert len(list(model.encode(bags_of(4, 4)))) == 2
    assert all(one.grad is None for one in model.encoder.parameters())
    assert list(model.encode([])) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_damaged_patch_names_its_slide(mode: str) -> None:
    model, bags = end_to_end(enc_grad=mode), [pixel_bag(0), pixel_bag(1, broken=3)]
    with pytest.raises(ItemFailed, match="slide_x: a patch is damaged"):
        next(model.encode(bags))
    with pytest.raises(ItemFailed, match="slide_x"), torch.no_grad():
        model.eval()(bags[1])
    assert all(one.grad is None for one in model.parameters())


def test_bags_that_do_not_fit_say_so() -> None:
    model = end_to_end()
    empty = pixel_bag(0, patches=0)
    with pytest.raises(ItemFailed, match="slide_00: the bag has no patches"):
        list(model.losses(empty))
    with pytest.raises(ItemFailed, match="slide_00: the bag has no pixels"):
        list(model.encode([replace(empty, patches=None)]))
    short = Pixels(torch.zeros(3, 16, 16, 3, dtype=torch.uint8))
    short.__class__ = type("Short", (Pixels,), {"__len__": lambda self: 5})
    with pytest.raises(ItemFailed, match="slide_00: 5 patches were to be read, 3 came"):
        next(model.encode([replace(empty, patches=short)]))


def test_one_patch_has_no_batch_statistics() -> None:
    model = end_to_end(enc_bn="batch", img_size=1)
    with pytest.raises(ItemFailed, match="slide_00: one patch alone.*--enc_bn frozen"):
        list(model.losses(pixel_bag(0, patches=1)))


# ------------------------------------------------------------------------- state

def test_keys_are_the_published_ones() -> None:
    model = end_to_end("abmilx")
    kinds = {".".join(name.split(".")[:2]) for name in model.state_dict()
             if name.startswith("encoder")}
    assert kinds == {"encoder.model"}
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "mil"}
    other = end_to_end("abmilx", seed=1)
    other.load_state_dict(model.state_dict())
    bag = pixel_bag(0)
    with torch.no_grad():
        assert torch.equal(model.eval()(bag).logits, other.eval()(bag).logits)


def test_copies_are_models_of_their_own() -> None:
    model = end_to_end(train_blocks=2)
    twin = copy.deepcopy(model)
    found = learn(twin, bags_of(4, 4))
    assert found["encoder.model.2.0.weight"] is not None
    assert all(one.grad is None for one in model.parameters())


def test_each_option_of_the_pixels_matters() -> None:
    bag = pixel_bag(0, patches=6)

    def logits(training: bool, **options: Any) -> torch.Tensor:
        model = end_to_end(enc_dropout=0, spec={"dropout": 0.0}, **options)
        torch.manual_seed(3)
        with torch.no_grad():
            return model.train(training)(bag).logits

    variants = [logits(True), logits(True, crop_scale=0.9), logits(True, img_transform="weak"),
                logits(True, img_size=24), logits(True, channels="BGR"), logits(False)]
    assert all(not torch.equal(one, two) for one, two in pairwise(variants))
    assert torch.equal(logits(False), logits(False, img_transform="weak"))


def test_the_encoder_is_laid_out_for_images() -> None:
    weight = end_to_end().encoder.model[1][0].weight
    assert isinstance(weight, nn.Parameter)
    assert weight.is_contiguous(memory_format=torch.channels_last)
