"""ABMILX's own settings files: every option of its program is kept, mapped or dropped, as said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from datasets.patch_sampling import scale_shares
from main import Options, main
from tests.conftest import ROOT
from tests.patch_cohort import LOW, database, write_patch_cohort
from utils.errors import Refused
from utils.legacy_abmilx_options import DROPPED, KEPT, MAPPED, MARKS
from utils.legacy_config import translate_config
from utils.options import build, from_mapping, load_yaml, parse

# Every option of the published program (spec abmilx.md 12); local-rank is written local_rank
PUBLISHED = set(re.findall(r"\w+", """
dataset_root dataset_sub_root csv_path h5_path h5_sub_path datasets val_ratio fold_start cv_fold
img_size val2test random_fold random_seed mul_scale_input mul_scale_ratio same_psize
same_psize_pad_type same_psize_ratio image_input num_workers num_workers_test lmdb pin_memory
no_prefetch no_prefetch_test prefetch_factor persistence img_transform img_trans_chunk crop_scale

main_alpha aux_alpha num_epoch epoch_start early_stopping max_epoch warmup_epochs patient input_dim
n_classes batch_size max_patch_train p_batch_size p_batch_size_v loss opt model seed lr warmup_lr
lr_sche lr_supi weight_decay accumulation_steps clip_grad always_test best_metric_index model_ema
no_determ no_deter_algo deter_algo channels_last sync_bn reduce_bn no_drop_last

num_bootstrap bootstrap_mode bin_metric

act dropout mil_norm no_mil_bias mil_bias inner_dim patch_shuffle da_act da_gated pos n_heads
n_layers pool attn_dropout ffn sdpa_type attn_type ffn_dp ffn_ratio

freeze_enc enc_init load_gpu_later load_gpu_later_train no_enc_pt pad_enc_bs sel_type num_group_1d
num_group_2d all_patch_train test_type

abx_D abx_attn_bias abx_attn_plus abx_pad_v abx_attn_plus_embed_new

epeg_k crmsa_k region_num rrt_n_heads rrt_n_layers rrt_pool

title project log_iter amp amp_unscale no_log output_path model_path local_rank script_mode profile
debug save_iter mm torchcompile torchcompile_mode wandb wandb_watch no_ddp_broad_buf
"""))
GABMIL = {"model": "gabmil"}


def resolved(**options: Any) -> Options:
    """The options of main.py for a file of ABMILX; ``model`` marks it as one."""
    flags = translate_config({"model": "e2e_r18_abmilx", **options}, "a.yaml")
    return build(Options, from_mapping(Options, flags, source="a.yaml"))


def test_every_option_is_in_exactly_one_table() -> None:
    assert set(KEPT) | set(MAPPED) | set(DROPPED) == PUBLISHED
    assert len(KEPT) + len(MAPPED) + len(DROPPED) == len(PUBLISHED)


def test_the_marks_of_a_file_are_names_that_only_abmilx_has() -> None:
    assert MARKS <= PUBLISHED
    assert not MARKS.intersection(Options.__dataclass_fields__)


# option, its value, the flag it decides, what that becomes, what else the file says
EFFECTS: list[tuple[str, Any, str, Any, dict[str, Any]]] = [
    ("csv_path", "t.csv", "csv_path", Path("t.csv"), {}),
    ("early_stopping", False, "early_stopping", False, {}),
    ("warmup_epochs", 7, "warmup_epochs", 7, {}), ("opt", "adamw", "opt", "adamw", {}),
    ("seed", 5, "seed", 5, {}), ("lr", "1e-3", "lr", 1e-3, {}),
    ("warmup_lr", 1e-7, "warmup_lr", 1e-7, {}), ("clip_grad", 0.5, "clip_grad", 0.5, {}),
    ("test_type", "both_ema", "test_type", "both_ema", {}),
    ("mul_scale_ratio", 4, "mul_scale_ratio", 4.0, {"mul_scale_input": True}),
    ("num_workers", 3, "num_workers", 3, {}), ("p_batch_size", 9, "p_batch_size", 9, {}),
    ("p_batch_size_v", 9, "p_batch_size_v", 9, {}), ("enc_init", "w", "enc_init", Path("w"), {}),
    ("no_enc_pt", True, "no_enc_pt", True, {}), ("inner_dim", 64, "inner_dim", 64, {}),
    ("n_heads", 2, "n_heads", 2, {}), ("n_heads", 2, "n_heads", 2, {"model": "transmil"}),
    ("mil_norm", "ln", "mil_norm", "ln", {}), ("ffn", True, "ffn", True, {}),
    ("abx_D", 4, "abx_D", 4, {}), ("abx_attn_bias", True, "abx_attn_bias", True, {}),
    ("dataset_root", "/d/224.lmdb", "patches", "/d/224.lmdb", {}),
    ("dataset_root", "/d", "data_root_dir", Path("/d"), GABMIL),
    ("dataset_sub_root", "/d/l", "patches_low", "/d/l", {"mul_scale_input": True}),
    ("datasets", "panda", "label_dict", {str(grade): grade for grade in range(6)}, {}),
    ("datasets", "brca_resample", "label_dict", {"IDC": 0, "ILC": 1}, {}),
    ("datasets", "nsclc", "label_dict", {"LUAD": 0, "LUSC": 1}, {}),
    ("datasets", "call", "label_dict", {"normal": 0, "tumor": 1}, {}),
    ("datasets", "bio", "label_dict", None, {}),
    ("datasets", "surv_brca", "task_type", "survival", {}),
    ("datasets", "surv_brca", "time_col", "Event", {}),
    ("datasets", "surv_brca", "event_col", "Status", {}),
    ("fold_start", 2, "k_start", 2, {}), ("cv_fold", 3, "k", 3, {}),
    ("val2test", True, "val_is_test", True, {}),
    ("img_size", 256, "crop_scale", 0.08, {}),
    ("img_size", 224, "crop_scale", 1.0, {"crop_scale": 0.3}),
    ("img_size", 256, "patches", "/224/256_80.lmdb", {"dataset_root": "/224/224_80.lmdb"}),
    ("img_size", 256, "patches_low", "/l/256.lmdb",
     {"dataset_sub_root": "/l/224.lmdb", "mul_scale_input": True}),
    ("img_transform", "strong_v2", "img_transform", "strong_v2", {}),
    ("img_transform", "whatever", "img_transform", "weak", {}),
    ("crop_scale", 0.25, "crop_scale", 0.25, {"img_size": 256}),
    ("mul_scale_input", True, "patches_low", "/l", {"dataset_sub_root": "/l"}),
    ("mul_scale_input", False, "patches_low", None, {"dataset_sub_root": "/l"}),
    ("mul_scale_input", True, "mul_scale_ratio", 4.0, {"mul_scale_ratio": 4}),
    ("mul_scale_input", False, "mul_scale_ratio", 2.0, {"mul_scale_ratio": 4}),
    ("same_psize", 128, "same_psize", 128, {}),
    ("max_patch_train", 50, "same_psize", 50, {"same_psize": 9}),
    ("max_patch_train", 50, "same_psize", 9, {"same_psize": 9, "batch_size": 2}),
    ("pad_enc_bs", True, "pad_enc_bs", True, {"batch_size": 2, "same_psize": 9}),
    ("pad_enc_bs", False, "pad_enc_bs", False, {"batch_size": 2, "same_psize": 9}),
    ("pad_enc_bs", False, "pad_enc_bs", True, {}),  # all patches, so there is nothing to add
    ("all_patch_train", True, "pad_enc_bs", True, {"pad_enc_bs": True, "same_psize": 9}),
    ("all_patch_train", False, "pad_enc_bs", False, {"pad_enc_bs": True, "same_psize": 9}),
    ("num_group_1d", 16, "sampling", "intervals", {}), ("num_group_1d", 16, "same_psize", 16, {}),
    ("num_group_2d", 4, "sampling", "grid", {}), ("num_group_2d", 4, "num_group_2d", 4, {}),
    ("num_group_2d", 4, "same_psize", 16, {}),
    ("num_group_2d", 4, "same_psize", 128, {"same_psize": 128}),
    ("num_epoch", 30, "max_epochs", 30, {}), ("max_epoch", 20, "stop_epoch", 19, {}),
    ("max_epoch", 0, "stop_epoch", 0, {}), ("patient", 4, "patience", 4, {}),
    ("input_dim", 384, "embed_dim", 384, GABMIL), ("input_dim", 256, "embed_dim", None, {}),
    ("n_classes", 6, "n_bins", 6, {"loss": "nll_surv"}),
    ("batch_size", 3, "batch_size", 3, {}),
    ("batch_size", 3, "accumulate", 6, {"accumulation_steps": 2}),
    ("batch_size", 3, "accumulate", 3, GABMIL), ("accumulation_steps", 8, "accumulate", 8, {}),
    ("loss", "ce", "bag_loss", "ce", {}), ("loss", "bce", "bag_loss", "bce", {}),
    ("loss", "bce", "task_type", "multilabel", {}),
    ("loss", "nll_surv", "bag_loss", "nll_surv", {}),
    ("loss", "nll_surv", "task_type", "survival", {}),
    ("model", "e2e_r50v2_abmilx", "model_type", "e2e_r50v2_abmilx", {}),
    ("model", "e2e_r18_clam_sb", "model_type", "e2e_r18_clam_sb", {}),
    ("model", "e2e_gigap_abmil", "model_type", "e2e_prov_gigapath_abmil", {}),
    ("model", "e2e_r18_gabmil", "ungated", False, {}),
    ("model", "abmil", "ungated", True, {}), ("model", "gabmil", "model_type", "abmil", {}),
    ("model", "gabmil", "ungated", False, {}), ("model", "meanmil", "model_type", "mean", {}),
    ("da_gated", True, "ungated", False, {"model": "abmil"}),
    ("lr_sche", "step", "schedule", "step", {}), ("lr_sche", "const", "schedule", "constant", {}),
    ("weight_decay", 0, "reg", 0.0, {}),
    ("sync_bn", True, "enc_bn", "frozen", {"model": "e2e_uni_abmilx"}),  # there is none
    ("sync_bn", True, "enc_bn", "sync", {}), ("sync_bn", False, "enc_bn", "batch", {}),
    ("freeze_enc", True, "train_blocks", 0, {}),
    ("freeze_enc", True, "enc_bn", "frozen", {"sync_bn": True}),
    ("mm", 0.99, "ema", 0.99, {"test_type": "ema"}), ("mm", 0.99, "ema", None, {}),
    ("amp", True, "precision", "fp16", {}), ("act", "gelu", "act", "gelu", {}),
    ("act", "tanh", "act", "none", {}), ("dropout", 0.1, "drop_out", 0.1, {}),
    ("no_mil_bias", True, "mil_bias", False, {}),
    ("abx_attn_plus", True, "abx_attn_plus", True, {}),
    ("abx_attn_plus", False, "abx_attn_plus", False, {}),
    ("abx_attn_plus_embed_new", True, "abx_embed_new", True, {}),
    ("title", "run", "exp_code", "run", {}),
    ("project", "p", "results_dir", Path("out/p"), {"output_path": "out"}),
    ("output_path", "out", "results_dir", Path("out/mil_new_c16"), {}),
]


@pytest.mark.parametrize(("option", "value", "flag", "expected", "others"), EFFECTS)
def test_the_flag_that_an_option_becomes(option: str, value: Any, flag: str, expected: Any,
                                         others: dict[str, Any]) -> None:
    assert getattr(resolved(**{**others, option: value}), flag) == expected


def test_each_kept_and_mapped_option_has_its_effects_shown() -> None:
    """Each pair of option and flag above, and a value of it that makes a difference."""
    told = {(name, name) for name in KEPT} | {
        (name, flag) for name, row in MAPPED.items() for flag in row.flags}
    assert {(option, flag) for option, _, flag, _, _ in EFFECTS} == told
    differing = {(option, flag) for option, _, flag, expected, others in EFFECTS
                 if getattr(resolved(**others), flag) != expected}
    assert not told - differing


def test_what_a_file_leaves_out_has_the_published_default() -> None:
    found = resolved()
    assert (found.lr, found.seed, found.act, found.n_heads, found.inner_dim, found.k, found.reg,
            found.max_epochs, found.stop_epoch, found.schedule, found.p_batch_size_v) == (
        2e-4, 2021, "relu", 8, 512, 5, 1e-5, 200, 129, "cosine", 2048)
    assert found.early_stopping and found.mil_bias and found.enc_bn == "batch"
    assert found.img_size == resolved(img_size=256).img_size == 224  # whatever is stored


def test_null_and_none_are_the_default() -> None:
    found = resolved(clip_grad="none", mil_norm=None, num_epoch=None, abx_D="none", datasets=None)
    assert (found.clip_grad, found.mil_norm, found.max_epochs, found.abx_D) == (
        None, "none", 200, None)


def test_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "r18.yaml"
    file.write_text("model: e2e_r18_abmilx\nnum_epoch: 75\nlr: 8e-5\nlocal-rank: 1\n")
    found = parse(Options, prog="main.py", description="", translate=translate_config,
                  argv=["--config", str(file), "--max_epochs", "3"])
    assert (found.max_epochs, found.lr, found.model_type) == (3, 8e-5, "e2e_r18_abmilx")


@pytest.mark.parametrize(("options", "message"), [
    ({"num_epochs": 3}, "unknown key 'num_epochs', did you mean 'num_epoch'.*as it has 'model'"),
    ({"max_epochs": 3}, "unknown key 'max_epochs', did you mean 'max_epoch'"),
    ({"model": "rrtmil"}, "model is 'rrtmil', expected one of abmil"),
    ({"model": "e2e_abmilx"}, "e2e_<encoder>_<one of them>"),
    ({"model": "r18_abmilx"}, "e2e_<encoder>_<one of them>"),
    ({"loss": "asl"}, "asl failed in the original too"),
    ({"lr_sche": "poly"}, "expected cosine, step, const"),
    ({"datasets": "brca", "n_classes": 3}, "n_classes is 3, but brca has the classes IDC, ILC"),
    ({"num_group_1d": 4, "num_group_2d": 4}, "two ways to draw"),
    ({"same_psize": 0.5}, "same_psize is 0.5, expected int"),
    ({"opt": "lamb"}, "opt is 'lamb', expected one of adam, adamw, sgd")])
def test_what_cannot_be_done_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        resolved(**options)


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_option_never_goes_unnoticed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = DROPPED[name]
    resolved(**{name: row.default})
    assert name not in capsys.readouterr().out.replace("without val_ratio", "")
    if row.weight == "refused":
        with pytest.raises(Refused, match=re.escape(row.reason)):
            resolved(**{name: "changed"})
        return
    resolved(**{name: "changed"})
    told = f"{name} changed: {row.reason}" if row.weight == "said" else f"says why): {name}"
    assert told in capsys.readouterr().out


def test_what_differs_from_the_original_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    resolved(n_classes=6, num_group_1d=4, same_psize=8, enc_init="best.pt")
    said = capsys.readouterr().out
    for words in ("A+ is on", "--channels BGR", "--val_is_test repeats", "highest AUC",
                  "each of same_psize = 8 intervals"):
        assert words in said
    resolved(abx_attn_plus=True, val_ratio=0.125)
    said = capsys.readouterr().out
    assert "A+" not in said and "val_ratio 0.125: the files in --split_dir" in said


def test_options_of_other_models_are_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = resolved(model="abmil", inner_dim=64, ffn=True, p_batch_size=3)
    assert (found.inner_dim, found.ffn, found.p_batch_size) == (512, False, 128)
    assert "no options of abmil, left out: p_batch_size, inner_dim, ffn" in capsys.readouterr().out


# ---------------------------------------------------------------------------- presets

COMMON = {"seed": 2021, "img_size": 224, "act": "gelu", "mil_bias": False, "mil_norm": "ln",
          "abx_attn_plus": True, "precision": "fp16", "enc_bn": "sync", "pad_enc_bs": True,
          "val_is_test": False, "monitor": "metric", "early_stopping": True}
FIELDS = ("model_type", "max_epochs", "stop_epoch", "patience", "k", "batch_size", "accumulate",
          "same_psize", "mul_scale_ratio", "p_batch_size", "img_transform", "crop_scale",
          "inner_dim", "n_heads", "ffn", "abx_attn_bias", "opt", "lr", "reg", "warmup_epochs",
          "ema", "test_type")
RELEASED: dict[str, tuple[Any, ...]] = {  # spec abmilx.md 13.1
    "panda_r18": ("e2e_r18_abmilx", 200, 119, 20, 1, 8, 8, 128, 4.0, 2048, "strong", 0.08, 512, 4,
                  True, False, "adam", 2e-4, 1e-5, 0, 0.9999, "both_ema"),
    "panda_r50": ("e2e_r50v2_abmilx", 200, 199, 20, 1, 4, 4, 128, 4.0, 2048, "strong", 0.08, 256,
                  4, True, False, "adamw", 2e-4, 1e-2, 0, 0.9999, "both_ema"),
    "brca_r18": ("e2e_r18_abmilx", 75, 49, 10, 1, 3, 3, 512, 4.0, 512, "weak", 0.25, 256, 8,
                 False, False, "adamw", 8e-5, 0.0, 10, 0.9997, "both_ema"),
    "brca_r50": ("e2e_r50v2_abmilx", 125, 124, 10, 1, 4, 4, 128, 3.0, 512, "weak_strong", 0.08,
                 256, 8, False, False, "adamw", 8e-5, 0.0, 10, 0.9997, "both_ema"),
    "brca_survival_r18": ("e2e_r18_abmilx", 30, 19, 10, 3, 2, 2, 768, 10.0, 2048, "weak", 0.08,
                          256, 8, False, True, "adamw", 8e-5, 5e-2, 5, None, "main")}
SHARES = {"panda_r18": (32, 96), "panda_r50": (32, 96), "brca_r18": (128, 384),
          "brca_r50": (42, 86), "brca_survival_r18": (76, 692)}


@pytest.mark.parametrize("name", RELEASED)
def test_the_presets_have_the_released_values(name: str) -> None:
    path = ROOT / f"presets/abmilx_e2e_{name}.yaml"
    found = parse(Options, prog="main.py", description="", translate=translate_config,
                  argv=["--config", str(path)])
    assert tuple(getattr(found, one) for one in FIELDS) == RELEASED[name]
    assert {one: getattr(found, one) for one in COMMON} == COMMON
    assert scale_shares(found.same_psize, found.mul_scale_ratio) == SHARES[name]
    if "survival" in name:
        assert (found.task_type, found.bag_loss, found.n_bins) == ("survival", "nll_surv", 4)


def test_the_original_file_and_our_preset_ask_for_the_same() -> None:
    original = {
        "model": "e2e_r18_abmilx", "num_epoch": 75, "max_epoch": 50, "patient": 10, "cv_fold": 1,
        "val_ratio": 0.125, "batch_size": 3, "same_psize": 512, "mul_scale_ratio": 4,
        "mul_scale_input": True, "p_batch_size": 512, "img_transform": "weak", "crop_scale": 0.25,
        "input_dim": 256, "inner_dim": 256, "n_heads": 8, "opt": "adamw", "lr": 8e-5,
        "weight_decay": 0, "warmup_epochs": 10, "mm": 0.9997, "test_type": "both_ema",
        "sdpa_type": "torch", "num_workers": 6, "log_iter": 100, "seed": 2021, "img_size": 256,
        "act": "gelu", "no_mil_bias": True, "mil_norm": "ln", "abx_attn_plus": True, "amp": True,
        "sync_bn": True, "pad_enc_bs": True, "all_patch_train": True, "channels_last": True,
        "pin_memory": True, "lmdb": True, "image_input": True, "prefetch_factor": 3,
        "no_deter_algo": True}
    flags = {**translate_config(original, "a.yaml"), "num_workers": 2, "k_start": -1,
             "bag_loss": None}
    preset = load_yaml(ROOT / "presets/abmilx_e2e_brca_r18.yaml")
    ours, theirs = (build(Options, from_mapping(Options, keys, source=""))
                    for keys in (preset, flags))
    assert ours == theirs


def test_the_original_file_trains(tmp_path: Path) -> None:
    cohort = write_patch_cohort(tmp_path)
    file = tmp_path / "r18.yaml"
    file.write_text(
        "model: e2e_test_resnet_abmilx\nimage_input: true\nlmdb: true\nnum_epoch: 1\n"
        "max_epoch: 1\ncv_fold: 1\nval_ratio: 0.125\nbatch_size: 2\nsame_psize: 6\n"
        "mul_scale_input: true\nmul_scale_ratio: 3\nsync_bn: true\npad_enc_bs: true\n"
        "test_type: both_ema\nmil_norm: ln\nno_mil_bias: true\nimg_size: 256\n"
        f"img_transform: strong\nno_enc_pt: true\noutput_path: {tmp_path}\nproject: p\n"
        f"title: t\ndataset_root: {database(cohort)}\ndataset_sub_root: {database(cohort, LOW)}\n")
    assert main(["--config", str(file), "--csv_path", str(cohort / "cohort.csv"), "--label_dict",
                 "class_0:0,class_1:1", "--splits_root", str(cohort / "splits"), "--img_size", "32",
                 "--device", "cpu"]) == 0
    assert {path.name for path in (tmp_path / "p/t_s2021").glob("*.pt")} == {
        "s_0_checkpoint.pt", "s_0_ema_checkpoint.pt"}


# ---------------------------------------------------------------------------- the page

def test_the_page_has_the_same_three_tables() -> None:
    page = (ROOT / "docs/end_to_end.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (kept|mapped|dropped|refused) \| (.*) \|$", page, re.M)
    assert len(rows) == len({name for name, _, _ in rows}) == len(PUBLISHED)
    for name, kind, text in rows:
        if kind == "kept":
            assert name in KEPT, name
        elif kind == "mapped":
            assert set(re.findall(r"`--(?:no_)?(\w+)", text)) == set(MAPPED[name].flags), name
        else:
            assert (kind == "refused") == (DROPPED[name].weight == "refused"), name
            assert DROPPED[name].reason in text, name
