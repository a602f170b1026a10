"""Streaming models: an ordinary network over the whole image, in the memory of a tile.

Spec streaming.md 13: tests 3 and 4 (every parameter, one step and 20 with dropout), 5 (tile sizes),
6 (what is refused), 7 (glass); 7: what is trained, heads.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal, cast

import pytest
import torch
from timm.layers.drop import DropPath
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from models import streaming_cnn
from models.colour import change_colour
from models.e2e_encoders import build_encoder
from models.patch_network import PatchNetwork
from models.shared_masks import image_masks
from models.slide_models import SlideModelSpec, build_slide_model
from models.streaming_cnn import StreamingCNN, build_streaming, map_width
from models.streaming_heads import PooledHead
from tests.streaming import TensorImage, image_bag
from utils.contracts import Bag, SlideOutput
from utils.devices import autocast
from utils.errors import ItemFailed, Refused
from utils.optimisation import MeanModel

HEADS = ("max", "mean", "gated_attention")
# in several tiles, each group of steps in tiles of its own where "all" maps are held
TILES: dict[str, Any] = {"tile_size": 64, "store_maps": "all"}
LAYOUTS: tuple[dict[str, Any], ...] = (
    TILES, {"tile_size": 96, "store_maps": "all"}, {"stream_memory": 0.02},
    {"tile_size": 1, "store_maps": "none"}, {"tile_size": 4096}, {"cut": "layer2", **TILES},
    {"cut": "stem", **TILES})


def lively(network: nn.Module) -> None:
    """Norms and layer scales that do something; timm starts many branches at 0."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    for name, value in (*network.named_buffers(), *network.named_parameters()):
        if name.endswith("running_mean"):
            nn.init.uniform_(value, -0.3, 0.3)
        elif name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
        elif name.endswith("gamma"):
            nn.init.uniform_(value, 0.2, 0.4)


def streaming(network: str = "test_resnet", *, head: str = "max", dropout: float = 0.0,
              drop_path: float = 0.0, spec: dict[str, Any] | None = None, **options: Any
              ) -> StreamingCNN:
    """A small model in float64, always the same. drop_path: of every block that has a branch."""
    torch.manual_seed(0)
    model = build_slide_model(SlideModelSpec(
        model_type=f"streaming_{network}", embed_dim=map_width(network), dropout=dropout,
        options={"head": head, **options}, **(spec or {"n_classes": 2})))
    assert isinstance(model, StreamingCNN)
    lively(model.encoder)
    for block in model.encoder.modules():
        if drop_path and hasattr(block, "drop_path"):
            block.drop_path = DropPath(drop_path)
    return model.double().train()


class Ordinary(nn.Module):
    """The same parts, run once on the whole image with one graph."""

    def __init__(self, model: StreamingCNN) -> None:
        super().__init__()
        self.model = model

    def map_of(self, bag: Bag) -> torch.Tensor:
        network = self.model.encoder
        parts = [part for _, stage in network.stages() for _, part in stage]
        with image_masks(nn.ModuleList(parts), torch.device("cpu")):
            x = self.pixels(bag)
            for part in parts:
                x = part(x)
        return x

    def pixels(self, bag: Bag) -> torch.Tensor:
        assert isinstance(bag.image, TensorImage)
        network = self.model.encoder
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (
            network.mean, network.std))
        return (((bag.image.pixels.double() / 255) - mean) / std).permute(2, 0, 1)[None]

    def forward(self, bag: Bag) -> SlideOutput:
        rows = self.map_of(bag).flatten(2)[0].T
        output: SlideOutput = self.model.mil(replace(bag, features=rows, image=None))
        return output


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters()
            if one.grad is not None}


def loss_of(model: StreamingCNN | Ordinary, bag: Bag) -> torch.Tensor:
    objective = (model.model if isinstance(model, Ordinary) else model).objective
    return objective.loss(model(bag).logits, bag)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *,
         tolerance: float = 1e-10) -> None:
    """Each to ``tolerance`` of its own largest number, and no first layer without gradient."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=tolerance * float(value.abs().max()) + 1e-14,
            msg=f"{name}: {float((ours[name] - value).abs().max())} apart")


def both(bag: Bag, *, tolerance: float = 1e-10, **options: Any) -> StreamingCNN:
    """The model, its logits and gradients compared with the ordinary network's."""
    model = streaming(**options)
    twin = Ordinary(copy.deepcopy(model))
    torch.manual_seed(5)
    ours = gradients(model, loss_of(model, bag))
    torch.manual_seed(5)
    theirs = gradients(twin.model, loss_of(twin, bag))
    assert any(name.startswith("encoder") and value.any() for name, value in theirs.items())
    same(ours, theirs, tolerance=tolerance)
    return model


def n_tiles(model: StreamingCNN) -> list[int]:
    """Of each group of the only plan; 0 for one that is held."""
    (groups,) = model._plans.values()
    return [len(group.plan.tiles) if group.plan else 0 for group in groups]


# ------------------------------------------------------------------------- exact

@pytest.mark.parametrize("head", HEADS)
def test_steps_are_those_of_an_ordinary_network(head: str) -> None:
    """One and 20 (3), with dropout in the head and stochastic depth in the network."""
    model = streaming(head=head, dropout=0.25, drop_path=0.2, **TILES)
    twin = Ordinary(copy.deepcopy(model))
    bags = [image_bag(index, size_px=(110, 77 + index)) for index in range(4)]
    pairs: list[tuple[StreamingCNN | Ordinary, torch.optim.Optimizer]] = [
        (one, torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)) for one in (model, twin)]
    for step in range(20 if head == "max" else 3):
        for one, optimiser in pairs:
            torch.manual_seed(step)
            optimiser.zero_grad()
            loss_of(one, bags[step % 4]).backward()
            optimiser.step()
        if step in (0, 2, 19):
            same(model.state_dict(), twin.model.state_dict())
    assert all(len(group.plan.tiles) > 1 for groups in model._plans.values()
               for group in groups[:1] if group.plan)


def test_one_step_of_resnet34s_topology_in_tiles_of_the_whole_network() -> None:
    """All four stages in one group, up to layer4: borders of 15 and 14 positions (spec 3.2)."""
    torch.manual_seed(0)
    network = ResNet(cast(Any, BasicBlock), layers=(3, 4, 6, 3), num_classes=0,
                     channels=(4, 6, 8, 10))
    lively(network)
    model = StreamingCNN(
        PatchNetwork(network, dim=10, mean=(0.5,) * 3, std=(0.25,) * 3),
        PooledHead(pool="max", n_classes=2, embed_dim=10), train_part="all", cut=None,
        tile_size=960, store_maps="none", stream_memory=1.0, skip_constant=True).double()
    twin = Ordinary(copy.deepcopy(model))
    bag = image_bag(1, size_px=(990, 100))
    networks: tuple[StreamingCNN | Ordinary, ...] = (model, twin)
    for one in networks:
        optimiser = torch.optim.SGD(one.parameters(), lr=0.1)
        loss_of(one, bag).backward()
        optimiser.step()
    same(model.state_dict(), twin.model.state_dict())
    assert n_tiles(model) == [2]
    assert model.stride == 32


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_tiles_maps_and_cut_do_not_show(options: dict[str, Any]) -> None:
    both(image_bag(0, size_px=(203, 150)), **options)


@pytest.mark.parametrize("network", ["test_convnext", "efficientnet_lite0", "regnetx_002",
                                     "test_byobnet"])
def test_other_networks(network: str) -> None:
    """Norms per pixel, TensorFlow's padding (sides that no stride divides), grouped ones."""
    cut = "stem" if network == "test_byobnet" else None  # it has attention
    model = both(image_bag(0, size_px=(131, 99)), network=network, head="mean", cut=cut, **TILES)
    assert max(n_tiles(model)) > 1


def test_glass_does_not_show() -> None:
    bag = image_bag(0, size_px=(500, 260))
    assert isinstance(bag.image, TensorImage)
    bag.image.pixels[:, 100:] = 245
    both(bag, skip_constant=True, head="mean", **TILES)
    found = [streaming(skip_constant=skip, head="mean", **TILES) for skip in (True, False)]
    calls = [0, 0]
    for number, model in enumerate(found):
        def count(_: nn.Module, __: Any, found: torch.Tensor, number: int = number) -> None:
            calls[number] += not found.is_meta

        model._steps[0].module.register_forward_hook(count)
        with torch.no_grad():
            model(bag)
    assert calls[0] < calls[1]


@pytest.mark.parametrize("spec", [
    {"task_type": "regression", "n_classes": 1, "target_mean": (2.0,), "target_std": (3.0,)},
    {"task_type": "multilabel", "n_classes": 2}, {"task_type": "survival", "n_classes": 1,
                                                  "bag_loss": "nll_surv", "bin_edges": (0, 9)}])
def test_any_objective(spec: dict[str, Any]) -> None:
    target = {"regression": (4.0,), "multilabel": (1.0, 0.0), "survival": (4.0, 1.0)}
    bag = replace(image_bag(0, size_px=(150, 99)), label=None, target=target[spec["task_type"]])
    model = both(bag, spec=spec, **TILES)
    (loss,) = model.losses(bag)
    assert loss.output is not None
    torch.testing.assert_close(loss.value, model.objective.loss(loss.output.logits, bag))


def test_losses_carry_the_gradient_of_the_whole() -> None:
    bag = image_bag(1, size_px=(150, 99))
    model = streaming(head="gated_attention", **TILES)
    expected = gradients(model, loss_of(model, bag))
    (loss,) = model.losses(bag)
    same(gradients(model, loss.value), expected, tolerance=0)


def test_half_precision_is_near() -> None:
    bag = image_bag(0, size_px=(203, 150))
    model = streaming(head="mean", **TILES).float()
    expected = gradients(model, loss_of(model, bag))
    with autocast("bf16", torch.device("cpu")):
        loss = loss_of(model, bag)
    found = gradients(model, loss)
    whole = [torch.cat([one.flatten() for one in some.values()]) for some in (found, expected)]
    assert float((whole[0] - whole[1]).norm() / whole[1].norm()) < 2e-2
    with autocast("bf16", torch.device("cpu")):
        assert bag.image is not None
        assert model.map_of(bag.image).dtype == torch.float32


# ------------------------------------------------------------------------- the map

def test_attention_is_in_the_order_of_the_map() -> None:
    model = streaming(head="gated_attention").eval()
    bag = image_bag(0, size_px=(203, 150))
    assert bag.image is not None
    with torch.no_grad():
        found, maps = model(bag).attention, model.map_of(bag.image)
        assert maps.shape == (1, 96, 5, 7)
        assert found.shape == (1, 35)
        for y, x in ((0, 0), (2, 5), (4, 6)):
            one = replace(bag, features=maps[:, :, y, x], image=None)
            torch.testing.assert_close(model.mil(one).attention[0, 0], found[0, y * 7 + x])
    assert model.stride == 32


@pytest.mark.parametrize("train_part", ["all", "head"])
def test_the_gradient_of_the_image_comes_in_windows(train_part: str) -> None:
    """Also where nothing of the network is trained."""
    bag = image_bag(0, size_px=(203, 150))
    model = streaming(train_part=train_part, **TILES).eval()
    found = torch.zeros(1, 3, 150, 203, dtype=torch.float64)

    def add(window: tuple[slice, slice], gradient: torch.Tensor) -> None:
        found[(..., *window)] += gradient

    assert bag.image is not None
    model.map_of(bag.image, gradient_sink=add).square().sum().backward()
    twin = Ordinary(copy.deepcopy(model))
    pixels = twin.pixels(bag).requires_grad_()
    twin.pixels = lambda bag: pixels  # type: ignore[method-assign]
    twin.map_of(bag).square().sum().backward()
    assert pixels.grad is not None
    torch.testing.assert_close(found, pixels.grad, rtol=0,
                               atol=1e-10 * float(pixels.grad.abs().max()))


def test_colours_change_after_reading() -> None:
    model = streaming().eval()
    bag = image_bag(0)
    assert isinstance(bag.image, TensorImage)
    colour = (0.97, 1.04, 0.1)
    with torch.no_grad():
        plain = model(bag).logits
        bag.image.colour = colour
        found = model(bag).logits
        changed = change_colour(bag.image.pixels.double() / 255, colour) * 255
        bag.image.pixels, bag.image.colour = changed, None
        wanted = model(bag).logits
    assert not torch.allclose(found, plain)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_bags_that_cannot_be_streamed_name_their_slide() -> None:
    model = streaming("test_convnext").eval()
    bag = image_bag(3)
    with pytest.raises(ItemFailed, match="slide_03: the bag has no image"):
        model(replace(bag, image=None))
    small = TensorImage(torch.zeros(80, 20, 3, dtype=torch.uint8))
    with pytest.raises(ItemFailed, match="slide_03: an image of 20 x 80 px is too small"):
        model(replace(bag, image=small))
    rows = Bag(slide_id="s", features=torch.rand(4, 64, dtype=torch.float64))
    assert model(rows).logits.shape == (1, 2)  # a map that was kept


# ------------------------------------------------------------------------- what is trained

@pytest.mark.parametrize(("train_part", "moving"), [
    ("head", ()), ("last_stage", ("layer4",)), ("all", ("conv1", "bn1", "layer"))])
@pytest.mark.parametrize("cut", [None, "layer2"])
def test_train_part_says_what_moves(
    train_part: str, moving: tuple[str, ...], cut: str | None
) -> None:
    """Weights, and the weight and bias of batch norms, of the part; statistics never."""
    model = streaming(train_part=train_part, cut=cut, dropout=0.25, **TILES)
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
    loss_of(model, image_bag(0, size_px=(150, 99))).backward()
    optimiser.step()
    for name, value in model.state_dict().items():
        learns = not name.startswith("encoder.") or (
            name.removeprefix("encoder.model.").startswith(moving) if moving else False)
        kept = "running" in name or "tracked" in name
        assert torch.equal(value, before[name]) == (kept or not learns), name
    norms = [one for one in model.encoder.modules() if isinstance(one, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


@pytest.mark.parametrize(("train_part", "passes"), [("head", 1), ("last_stage", 1), ("all", 2)])
def test_what_is_not_trained_runs_once_without_a_graph(
    train_part: Literal["head", "last_stage", "all"], passes: int
) -> None:
    model = streaming(train_part=train_part, **TILES)
    graphs: list[bool] = []
    model._steps[0].module.register_forward_hook(
        lambda _, __, found: None if found.is_meta else graphs.append(found.requires_grad))
    loss_of(model, image_bag(0, size_px=(203, 150))).backward()
    tiles = n_tiles(model)[0]
    assert tiles > 1
    assert len(graphs) == passes * tiles
    assert any(graphs) == (passes == 2)


def test_a_network_that_rests_stays_as_it_is() -> None:
    model = streaming(drop_path=0.5, **TILES)
    model.rest(True)
    model.train()
    bag = image_bag(0, size_px=(150, 99))
    found = gradients(model, loss_of(model, bag))
    assert {name.split(".")[0] for name in found} == {"mil"}
    assert not model.encoder.training
    model.rest(False)
    model.train()
    assert any(name.startswith("encoder") for name in gradients(model, loss_of(model, bag)))


# ------------------------------------------------------------------------- what goes

def test_layers_that_see_everything_need_a_cut() -> None:
    """Squeeze-excite from the third stage on: before it the network can be streamed."""
    with pytest.raises(Refused, match=r"blocks\.\d.*--cut blocks\.\d"):
        streaming("mobilenetv3_large_100")
    with pytest.raises(Refused) as refused:
        streaming("mobilenetv3_large_100")
    cut = str(refused.value).rsplit("--cut ", 1)[1].split(",")[0]
    model = both(image_bag(0, size_px=(131, 99)), network="mobilenetv3_large_100", cut=cut,
                 head="mean", **TILES)
    assert model.embed_dim == 960
    assert model.stride == 32


@pytest.mark.parametrize(("network", "options", "words"), [
    ("test_resnet", {"cut": "layer9"}, "--cut layer9 is no stage.*stem, layer1, layer2"),
    ("vit_tiny_patch16_224", {}, "VisionTransformer is no network.*ResNet.*resnet34"),
    ("densenet121", {}, "DenseNet is no network of convolutions in stages"),
    ("resnet35", {}, "unknown timm model 'resnet35'"),
    ("regnety_002", {}, r"s1.*take a network without such layers$|s1.*--cut stem")])
def test_what_does_not_go_says_what_does(network: str, options: dict[str, Any], words: str
                                         ) -> None:
    with pytest.raises(Refused, match=words):
        streaming(network, **options)


def test_the_width_is_that_of_the_map() -> None:
    assert map_width("resnet34") == 512
    assert map_width("mobilenetv3_small_050") == 288
    with pytest.raises(Refused, match="maps of test_resnet have 96 channels, embed_dim is 95"):
        build_slide_model(SlideModelSpec(model_type="streaming_test_resnet", embed_dim=95,
                                         n_classes=2))


def test_padding_of_tensorflow_is_kept_where_it_is_defined_for_tiles() -> None:
    """timm's network on sides that its stride divides; on others the grid does not move."""
    network = build_encoder("efficientnet_lite0").eval()
    lively(network)
    plain = copy.deepcopy(network.model)
    model = StreamingCNN(network, PooledHead(pool="max", n_classes=2, embed_dim=1280),
                         train_part="all", cut=None, tile_size=0, store_maps="auto",
                         stream_memory=1.0, skip_constant=True).double().eval()
    bag = image_bag(0, size_px=(128, 96))
    whole = Ordinary(model)
    assert bag.image is not None
    with torch.no_grad():
        wanted: torch.Tensor = plain.double().forward_features(  # type: ignore[operator]
            whole.pixels(bag))
        found = model.map_of(bag.image)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        odd = TensorImage(bag.image.pixels[:77, :101])  # type: ignore[attr-defined]
        assert model.map_of(odd).shape == (1, 1280, 3, 4)
    assert {f"encoder.model.{name}" for name in plain.state_dict()} == {
        name for name in model.state_dict() if name.startswith("encoder.")}


# ------------------------------------------------------------------------- memory and time

def plan_of(**options: Any) -> list[int]:
    """Tiles of each group for an image of 1000 x 700 px; 0 = held."""
    model = streaming(**options)
    model._groups((700, 1000), "a slide", 0)
    return n_tiles(model)


def test_options_choose_the_plan() -> None:
    tiled = plan_of(tile_size=128, store_maps="all")
    assert tiled[0] > plan_of(tile_size=256, store_maps="all")[0] > 1
    assert len(tiled) > 1
    assert len(plan_of(tile_size=512, store_maps="none")) == 1
    assert plan_of(stream_memory=10.0) == [0]  # ordinary autograd, where there is room
    assert max(plan_of(stream_memory=0.1)) > 1
    with pytest.raises(ItemFailed, match="slide: an image of 1000 x 700 px .*--stream_memory"):
        plan_of(stream_memory=0.001)
    cut = sum(plan_of(stream_memory=0.2, cut="layer1"))  # what is after it has to be held
    assert cut > sum(plan_of(stream_memory=0.2))


def test_a_plan_is_made_once_a_size() -> None:
    model = streaming(**TILES)
    for bag in (image_bag(0), image_bag(1), image_bag(2, size_px=(120, 80))):
        loss_of(model, bag).backward()
    with torch.no_grad():
        model(image_bag(3))
    assert len(model._plans) == 3
    for width in range(40, 60):  # a cohort of as many sizes does not fill the memory
        model._groups((40, width), "a slide", 0)
    assert len(model._plans) == 16


def test_a_network_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    monkeypatch.setattr(streaming_cnn, "_PROBED", set())
    monkeypatch.setattr(streaming_cnn, "check_step", lambda step: probed.append(step.name))
    for _ in range(2):
        streaming()
    assert probed == ["stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    streaming(cut="stem")
    assert probed[5:] == ["stem"]


# ------------------------------------------------------------------------- state

def test_copies_are_models_of_their_own() -> None:
    model = streaming(drop_path=0.2, **TILES)
    bag = image_bag(0, size_px=(150, 99))
    with torch.no_grad():
        before = model.eval()(bag).logits
    twin = copy.deepcopy(model).train()
    gradients(twin, loss_of(twin, bag))
    with torch.no_grad():
        for one in twin.parameters():
            one.mul_(1.1)
        assert torch.equal(model(bag).logits, before)
        assert not torch.allclose(twin.eval()(bag).logits, before)
    assert all(one.grad is None for one in model.parameters())
    model.load_state_dict(twin.state_dict())
    with torch.no_grad():
        assert torch.equal(model(bag).logits, twin(bag).logits)


@pytest.mark.parametrize("options", [
    {"cut": "layer2", **TILES}, {"train_part": "last_stage", **TILES}, {"train_part": "head"}])
def test_a_mean_of_weights_runs_its_own_modules(options: dict[str, Any]) -> None:
    """What is held, frozen or planned is kept in plain lists, which are copied as well; plans of
    evaluation serve it too."""
    model, bag = streaming(**options), image_bag(0, size_px=(150, 99))
    with torch.inference_mode():
        model.eval()(bag)
    mean = MeanModel(model)
    gradients(model.train(), loss_of(model, bag))
    with torch.no_grad():
        before = mean.model.eval()(bag).logits
        for one in model.parameters():
            one.mul_(1.1)
        assert torch.equal(mean.model(bag).logits, before)
        mean.update(1.0)
        assert torch.equal(mean.model(bag).logits, model.eval()(bag).logits)
        assert not torch.allclose(mean.model(bag).logits, before)


def test_plans_and_memory_are_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may have been tried on a CPU before it is moved."""
    asked: list[str] = []

    def free(device: torch.device) -> int:
        asked.append(device.type)
        return 10**9

    monkeypatch.setattr(streaming_cnn, "free_memory", free)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    model = streaming()
    for device in ("cpu", "meta", "meta"):
        model.to(device)._groups((100, 90), "a slide", 0)
        model._groups((90, 100), "a slide", 0)
    assert asked == ["cpu", "meta"]
    assert len(model._plans) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_a_cpu_gives() -> None:
    """Weights, also of glass, and the image; moved after its first image, as plans are."""
    model, found = streaming(**TILES), list[dict[str, torch.Tensor]]()
    glass, noise = (image_bag(0, size_px=(300, 260), margin_px=px).image for px in (90, 0))
    assert glass is not None and noise is not None
    for device in ("cpu", "cuda"):
        model.to(device)
        image = torch.zeros(1, 3, 260, 300, dtype=torch.float64)

        def add(window: tuple[slice, slice], gradient: torch.Tensor,
                image: torch.Tensor = image) -> None:
            image[(..., *window)] += gradient.cpu()

        of_weights = gradients(model, model.map_of(glass).square().sum())
        model.map_of(noise, gradient_sink=add).square().sum().backward()
        found.append({name: one.cpu() for name, one in of_weights.items()} | {"image": image})
    same(found[1], found[0], tolerance=1e-9)


def test_maps_in_half_precision_are_seen_as_what_they_are() -> None:
    """A layer scale in float32 makes sums in float32."""
    for network, expected in (("test_resnet", 2), ("test_convnext", 4)):
        model = streaming(network).float()
        with autocast("bf16", torch.device("cpu")):
            assert model._map_value_bytes() == expected
        assert model._map_value_bytes() == 4


def test_it_can_be_described_without_memory() -> None:
    with torch.device("meta"):
        model = build_slide_model(SlideModelSpec(model_type="streaming_resnet18", embed_dim=512,
                                                 n_classes=2))
    assert all(one.is_meta for one in model.parameters())
    names = {".".join(name.split(".")[:2]) for name in model.state_dict()}
    assert names == {"encoder.model", "mil.linear"}


def test_equal_seeds_give_equal_models() -> None:
    one, other = streaming(), streaming(cut="layer1", tile_size=128)
    assert all(torch.equal(value, other.state_dict()[name])
               for name, value in one.state_dict().items())
    assert one.encoder.model.layer1[0].conv1.weight.is_contiguous(  # type: ignore
        memory_format=torch.channels_last)


def test_a_network_that_crashes_with_channels_last_is_laid_out_otherwise() -> None:
    """PyTorch 2.15 dies in the backward pass of RepVGG's first 1 x 1 convolution on a CPU."""
    name = "repvgg_a0"
    model = build_streaming(name, SlideModelSpec(
        model_type=f"streaming_{name}", embed_dim=map_width(name), n_classes=2,
        options={"tile_size": 256}))
    for loss in model.losses(image_bag(0, size_px=(300, 280))):
        loss.value.backward()
    stem = model.get_parameter("encoder.model.stem.conv_1x1.conv.weight")
    assert stem.grad is not None and stem.grad.isfinite().all()
