"""HAG-MIL: what is selected, what is read, what is learnt, and what each option does."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from models.hag_mil import HAGMIL
from models.iat import Blocks
from models.slide_models import SlideModelSpec, build_slide_model
from utils.contracts import Bag, SlideOutput
from utils.errors import ItemFailed, Refused
from utils.objectives import Classification, build_objective

D = 12


class Rows:
    """A finer level in memory that notes which of its rows were read."""

    coords: np.ndarray | None = None

    def __init__(self, n: int, branching: int = 4, valid: np.ndarray | None = None,
                 width: int = D) -> None:
        self.features = torch.randn(n, width, generator=torch.Generator().manual_seed(n))
        self.branching, self.valid = branching, valid
        self.reads: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.features)

    def read(self, rows: np.ndarray) -> torch.Tensor:
        self.reads.append(rows.tolist())
        return self.features[torch.from_numpy(rows)]


def make(n_levels: int = 3, seed: int = 0, **options: Any) -> HAGMIL:
    torch.manual_seed(seed)
    return HAGMIL(**{"embed_dim": D, "n_levels": n_levels, "hidden_dims": (16, 8), "dropout": 0.0,
                     "attention_dropout": 0.0, "t_patch": [5], "v_patch": [5], **options})


def make_bag(n: int = 10, *, n_levels: int = 3, branching: int = 4, label: int | None = 1,
             **more: Any) -> Bag:
    children = tuple(Rows(n * branching ** (depth + 1), branching)
                     for depth in range(n_levels - 1))
    coarse = torch.randn(n, D, generator=torch.Generator().manual_seed(99))
    return Bag(**{"slide_id": "s", "features": coarse, "label": label, "children": children,
                  **more})


def run(model: HAGMIL, bag: Bag) -> SlideOutput:
    with torch.no_grad():
        output: SlideOutput = model.eval()(bag)
    return output


# ---------------------------------------------------------------------------- selection

@pytest.mark.parametrize("branching", [1, 4, 16])
def test_children_of_the_selected_patches_are_read_and_nothing_else(branching: int) -> None:
    bag = make_bag(branching=branching)
    output = run(make(), bag)
    for above, level, rows in zip(output.levels, output.levels[1:], bag.children, strict=False):
        best = above.rows[above.attention[0].argsort(descending=True)[:5]]
        assert sorted(best.tolist()) == above.selected.tolist()  # in the order of the slide
        expected = [p * branching + c for p in above.selected.tolist() for c in range(branching)]
        assert level.rows.tolist() == expected
        assert rows.reads == [expected]  # type: ignore[attr-defined]


def test_legacy_order_is_that_of_the_attention() -> None:
    bag = make_bag()
    coarse, finer, _ = run(make(legacy_order=True), bag).levels
    ranked = coarse.attention[0].argsort(descending=True)[:5]
    assert coarse.selected.tolist() == ranked.tolist() != sorted(ranked.tolist())
    assert finer.rows.tolist() == [4 * int(p) + c for p in ranked for c in range(4)]


def test_rows_outside_the_slide_are_never_read() -> None:
    bag = make_bag()
    valid = np.random.default_rng(0).random(40) > 0.4
    children = (Rows(40, valid=valid), Rows(160))
    output = run(make(), make_bag(children=children))
    expected = [4 * p + c for p in output.levels[0].selected.tolist() for c in range(4)
                if valid[4 * p + c]]
    assert 0 < len(expected) < 20
    assert children[0].reads == [expected] == [output.levels[1].rows.tolist()]
    assert run(make(), bag).levels[1].rows.tolist() != expected


def test_a_slide_without_a_valid_child_fails_alone() -> None:
    children = (Rows(40, valid=np.zeros(40, bool)), Rows(160))
    with pytest.raises(ItemFailed, match="s: every child .* outside the slide at level 1"):
        run(make(), make_bag(children=children))


@pytest.mark.parametrize(("kept", "expected"), [
    ([3], (3, 3)), ([3, 7], (3, 7)), ([0.5], (5, 10)), ([0.25, 2], (3, 2)), ([0.001], (1, 1)),
    ([1000], (10, 40)), ([1], (1, 1))])
def test_number_of_parents(kept: list[float], expected: tuple[int, int]) -> None:
    """A count or a fraction, for all levels or each; t_patch in training, v_patch otherwise."""
    bag = make_bag()
    output = run(make(v_patch=kept, t_patch=[4]), bag)
    assert tuple(len(level.selected) for level in output.levels) == (*expected, 0)
    model = make(t_patch=kept, v_patch=[4]).train()
    assert tuple(len(level.selected) for level in model(bag).levels) == (*expected, 0)


@pytest.mark.parametrize("name", ["t_patch", "v_patch"])
@pytest.mark.parametrize("kept", [[0], [-1], [2.5], [1, 2, 3], []])
def test_impossible_numbers_of_parents_are_refused(name: str, kept: list[float]) -> None:
    with pytest.raises(Refused, match=f"model: {name} .*expected"):
        make(3, 0, **{name: kept})


# ---------------------------------------------------------------------------- bags

@pytest.mark.parametrize("n_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_small_bags_at_any_number_of_levels(n: int, n_levels: int) -> None:
    model = make(n_levels, n_classes=3, subtyping=True)
    bag = make_bag(n, n_levels=n_levels, branching=1)  # every level has n rows, or five
    steps = list(model.losses(bag))
    assert len(steps) == n_levels == len(model.names)
    assert model.names[-1] == "model0"
    for step in steps:
        assert torch.isfinite(step.value)
        step.value.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_evaluation_repeats_itself_needs_no_label_and_covers_the_bag() -> None:
    model, bag = make(dropout=0.25), make_bag(label=None)
    one, two = run(model, bag), run(model, bag)
    assert torch.equal(one.logits, two.logits)
    assert one.attention is not None
    assert one.attention.shape == (1, len(bag))
    assert torch.equal(one.attention, one.levels[0].attention)
    assert torch.equal(one.logits, one.levels[-1].logits)
    assert [level.attention.shape[1] for level in one.levels] == [10, 20, 20]


def test_prediction_does_not_depend_on_the_order_of_the_bag_when_all_is_kept() -> None:
    """Permuted parents with their children: with a landmark a row only the convolution sees it."""
    model, bag = make(2, v_patch=[100], landmarks=64), make_bag(n_levels=2)
    for name, weight in model.named_parameters():
        if "res_conv" in name:
            torch.nn.init.zeros_(weight)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    finer = Rows(40)
    finer.features = finer.features.view(10, 4, D)[order].flatten(0, 1)
    other = make_bag(features=bag.features[order], children=(finer,))
    torch.testing.assert_close(run(model, bag).logits, run(model, other).logits,
                               atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("bag", "reason"), [
    (make_bag(n_levels=2), "s: the bag has 2 magnifications, the model expects 3"),
    (make_bag(n_levels=1), "s: the bag has 1 magnifications, the model expects 3"),
    (make_bag(children=(Rows(40), Rows(159))), "s: level 0 has 159 rows, expected 40 x 4"),
    (make_bag(children=(Rows(41), Rows(164))), "s: level 1 has 41 rows, expected 10 x 4"),
    (make_bag(children=(Rows(40, width=D + 1), Rows(160))),
     r"s: features at level 1 have shape \(20, 13\), the model expects \(patches, 12\)"),
    (make_bag(features=torch.zeros(0, D), children=(Rows(0), Rows(0))),
     "s: the bag has no patches"),
])
def test_bags_that_do_not_fit_fail_with_one_line(bag: Bag, reason: str) -> None:
    with pytest.raises(ItemFailed, match=reason):
        run(make(), bag)


def test_instance_clustering_needs_a_class() -> None:
    with pytest.raises(ItemFailed, match="s: "):
        list(make().losses(make_bag(label=None)))


# ---------------------------------------------------------------------------- losses

def test_each_level_learns_from_its_own_loss() -> None:
    model, bag = make(), make_bag()
    for name, step in zip(model.names, model.losses(bag), strict=True):
        model.zero_grad(set_to_none=True)
        step.value.backward()
        touched = {key.split(".")[0] for key, weight in model.named_parameters()
                   if weight.grad is not None}
        assert touched == {name}
        assert (step.output is not None) == (name == "model0")


def test_only_one_level_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bag = make(), make_bag()
    alive: list[weakref.ref[torch.Tensor]] = []
    for name in model.names:
        network = getattr(model, name)

        def spied(features: torch.Tensor, forward: Any = network.forward) -> Blocks:
            gc.collect()
            assert not [ref for ref in alive if ref() is not None]
            blocks: Blocks = forward(features)
            alive.append(weakref.ref(blocks.instances))
            return blocks

        monkeypatch.setattr(network, "forward", spied)
    for step in model.losses(bag):
        step.value.backward()
        del step
    assert len(alive) == 3
    model(bag)


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    bag = make_bag()
    for step in make(bag_weight=0.3, inst_weight=0.9).losses(bag):
        expected = 0.3 * step.slide_loss + 0.9 * step.parts["instance_loss"]
        torch.testing.assert_close(step.value.detach(), expected)
    for step in make(instance_clustering=False, bag_weight=0.3).losses(bag):
        torch.testing.assert_close(step.value.detach(), step.slide_loss)
        assert not step.parts


@pytest.mark.parametrize(("given", "used"), [
    (None, (0.1, 0.1, 0.0)), ((0.2, 0.0), (0.2, 0.2, 0.0)), ((0.3, 0.2, 0.1), (0.3, 0.2, 0.1)),
    ((0.0, 0.0), (0.0, 0.0, 0.0))])
def test_smoothing_of_each_level(given: Any, used: tuple[float, ...]) -> None:
    model, bag = make(level_smoothing=given), make_bag()
    records = model(bag).levels
    for record, step, smoothing in zip(records, model.losses(bag), used, strict=True):
        expected = torch.nn.functional.cross_entropy(
            record.logits, torch.tensor([1]), label_smoothing=smoothing)
        torch.testing.assert_close(step.slide_loss, expected)


@pytest.mark.parametrize("given", [(0.1,), (0.1, 0.1, 0.1, 0.0)])
def test_smoothing_of_other_lengths_is_refused(given: tuple[float, ...]) -> None:
    with pytest.raises(Refused, match="level_smoothing has .* expected 2 or 3, one a level"):
        make(level_smoothing=given)


@pytest.mark.parametrize("objective", [
    Classification(n_classes=2, loss_name="svm"),
    build_objective(task_type="multilabel", n_outputs=2)])
def test_other_losses_have_no_smoothing(objective: Any) -> None:
    options = {"objective": objective,
               "instance_clustering": objective.task_type == "classification"}
    bag = make_bag(target=(1.0, 0.0), label=1 if options["instance_clustering"] else None)
    assert [bool(torch.isfinite(step.value)) for step in make(**options).losses(bag)] == [True] * 3
    with pytest.raises(Refused, match="level_smoothing goes with classes and bag_loss ce"):
        make(**options, level_smoothing=(0.1, 0.0))


@pytest.mark.parametrize("options", [
    {"k_sample": 3}, {"subtyping": True}, {"inst_loss": "svm"}, {"legacy_padding": True},
    {"gated": False}, {"landmarks": 2}, {"hidden_dims": (8, 8)}, {"dropout": 0.25},
    {"attention_dropout": 0.25}])
def test_options_change_the_loss(options: dict[str, Any]) -> None:
    bag = make_bag()

    def values(model: HAGMIL) -> list[float]:
        torch.manual_seed(1)
        return [float(step.value.detach()) for step in model.losses(bag)]

    assert values(make()) == values(make())
    assert values(make()) != values(make(**options))


def test_checkpointing_limit_reaches_every_level() -> None:
    model = make(checkpoint_above=7)
    assert {getattr(model, name).checkpoint_above for name in model.names} == {7}


# ---------------------------------------------------------------------------- the builder

def spec(**more: Any) -> SlideModelSpec:
    return SlideModelSpec(**{"model_type": "hag_mil", "embed_dim": D, "n_classes": 3,
                             "n_levels": 2, "options": {"hidden_dims": [16, 8]}, **more})


def test_builder_passes_everything_on() -> None:
    model: Any = build_slide_model(spec(
        gated=False, k_sample=3, subtyping=True, inst_loss="svm", bag_weight=0.4,
        options={"hidden_dims": [16, 8], "t_patch": [3], "v_patch": [0.5], "inst_weight": 0.2,
                 "level_smoothing": [0.3, 0.2], "landmarks": 4, "legacy_padding": True,
                 "legacy_order": True, "checkpoint_above": 5}))
    assert model.contextual
    assert (model.kept_in_training, model.kept_otherwise) == ([3], [0.5])
    assert (model.k_sample, model.subtyping, model.legacy_order) == (3, True, True)
    assert (model.bag_weight, model.inst_weight) == (0.4, 0.2)
    assert [one.label_smoothing for one in model.level_objectives] == [0.3, 0.2]
    attention = model.model1.layers[0].layer.attn
    assert (attention.landmarks, attention.legacy_padding) == (4, True)
    assert "model1.layers.0.attention_net.3.module.0.weight" in model.state_dict()
    assert model.model0.fc5.weight.shape == (3, 8)
    assert [c.weight.shape for c in model.model0.instance_classifiers] == [(2, 512)] * 3


def test_one_smoothing_too_many_is_refused() -> None:
    with pytest.raises(Refused, match="give --level_smoothing instead of --label_smoothing"):
        build_slide_model(spec(label_smoothing=0.1))


def test_clustering_without_classes_is_refused() -> None:
    with pytest.raises(Refused, match="--no_inst_cluster"):
        spec(task_type="regression", n_classes=1)
    model: Any = build_slide_model(spec(
        task_type="regression", n_classes=1, instance_clustering=False, target_mean=(0.0,),
        target_std=(1.0,)))
    steps = list(model.losses(make_bag(n_levels=2, label=None, target=(0.4,))))
    assert all(torch.isfinite(step.value) for step in steps)
