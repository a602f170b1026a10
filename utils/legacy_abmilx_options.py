"""The options of ABMILX's own program (E2E-WSI-ABMILX), and what each became here.

Each stands in exactly one of three tables: KEPT under its name, MAPPED to other flags, DROPPED
with the reason. Names and defaults: spec abmilx.md 12. ``docs/end_to_end.md`` shows all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

E2E = "e2e"  # stands for all end-to-end models

# Any of these, which no flag of main.py is called, makes a flat file one of ABMILX's
MARKS = frozenset({"num_epoch", "max_epoch", "patient", "cv_fold", "datasets", "dataset_root",
                   "image_input", "lr_sche", "mul_scale_input", "model"})


@dataclass(frozen=True)
class Kept:
    """An option that has our name and meaning.

    of: what has it, slide models by name or "e2e"; () = all
    """

    default: Any
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mapped:
    """An option that decides flags of other names, or of another meaning.

    kind: its type, None = the default's
    """

    default: Any
    flags: tuple[str, ...]
    kind: Any = None


@dataclass(frozen=True)
class Dropped:
    """An option that has no counterpart.

    weight: a value other than the default is harmless, said (with the reason), or refused,
    since leaving it out would train something else
    """

    default: Any
    reason: str
    weight: Literal["harmless", "said", "refused"] = "harmless"


_WIDE = ("abmilx", "transmil")
KEPT: dict[str, Kept] = {
    "csv_path": Kept(None), "early_stopping": Kept(True), "warmup_epochs": Kept(0),
    "opt": Kept("adam"), "seed": Kept(2021), "lr": Kept(2e-4), "warmup_lr": Kept(1e-6),
    "clip_grad": Kept(None), "test_type": Kept("main"),
    "mul_scale_ratio": Kept(2.0, (E2E,)), "num_workers": Kept(6, (E2E,)),
    "p_batch_size": Kept(512, (E2E,)), "p_batch_size_v": Kept(2048, (E2E,)),
    "enc_init": Kept(None, (E2E,)), "no_enc_pt": Kept(False, (E2E,)),
    "inner_dim": Kept(512, _WIDE), "n_heads": Kept(8, _WIDE),
    "mil_norm": Kept("none", ("abmilx",)), "ffn": Kept(False, ("abmilx",)),
    "abx_D": Kept(None, ("abmilx",)), "abx_attn_bias": Kept(False, ("abmilx",)),
}
MAPPED: dict[str, Mapped] = {
    "dataset_root": Mapped(None, ("patches", "data_root_dir"), str),
    "dataset_sub_root": Mapped(None, ("patches_low",), str),
    "datasets": Mapped("", ("label_dict", "task_type", "time_col", "event_col")),
    "fold_start": Mapped(0, ("k_start",)), "cv_fold": Mapped(5, ("k",)),
    "val2test": Mapped(False, ("val_is_test",)),
    "img_size": Mapped(224, ("crop_scale", "patches", "patches_low")),
    "img_transform": Mapped("none", ("img_transform",)),
    "crop_scale": Mapped(0.08, ("crop_scale",)),
    "mul_scale_input": Mapped(False, ("patches_low", "mul_scale_ratio")),
    "same_psize": Mapped(0, ("same_psize",)),
    "max_patch_train": Mapped(None, ("same_psize",), int),
    "pad_enc_bs": Mapped(False, ("pad_enc_bs",)),
    "all_patch_train": Mapped(False, ("pad_enc_bs",)),
    "num_group_1d": Mapped(None, ("sampling", "same_psize"), int),
    "num_group_2d": Mapped(None, ("sampling", "num_group_2d", "same_psize"), int),
    "num_epoch": Mapped(200, ("max_epochs",)), "max_epoch": Mapped(130, ("stop_epoch",)),
    "patient": Mapped(20, ("patience",)),
    "input_dim": Mapped(1024, ("embed_dim",)), "n_classes": Mapped(2, ("n_bins",)),
    "batch_size": Mapped(1, ("batch_size", "accumulate")),
    "accumulation_steps": Mapped(1, ("accumulate",)),
    "loss": Mapped("ce", ("bag_loss", "task_type")),
    "model": Mapped("e2e_r18_abmilx", ("model_type", "ungated")),
    "lr_sche": Mapped("cosine", ("schedule",)), "weight_decay": Mapped(1e-5, ("reg",)),
    "sync_bn": Mapped(False, ("enc_bn",)), "freeze_enc": Mapped(False, ("train_blocks", "enc_bn")),
    "mm": Mapped(0.9997, ("ema",)), "amp": Mapped(False, ("precision",)),
    "act": Mapped("relu", ("act",)), "dropout": Mapped(0.25, ("drop_out",)),
    "no_mil_bias": Mapped(False, ("mil_bias",)),
    "da_gated": Mapped(False, ("ungated",)),
    "abx_attn_plus": Mapped(None, ("abx_attn_plus",), bool),
    "abx_attn_plus_embed_new": Mapped(False, ("abx_embed_new",)),
    "title": Mapped("default", ("exp_code",)), "project": Mapped("mil_new_c16", ("results_dir",)),
    "output_path": Mapped(None, ("results_dir",), str),
}
_ALWAYS_READ_AHEAD = "slides are read ahead, into pinned memory where a GPU follows"
_COORDS_KNOWN = "coordinates come with the features and the patches"
_PATHS_TELL = "what --patches or --data_root_dir names says what is read"
_DETERMINED = "a run on a CPU repeats to the bit; CUDA picks its kernels"
_ON_CPU = "pixels stay on the CPU until their chunk is encoded"
_AT_EVALUATION = "of evaluation: eval.py --n_bootstrap, --split, --micro_average"
_NO_RRT = "of RRT-MIL, which is none of the slide models"
_NO_VIT = "of ViT-MIL and RRT-MIL, which are none of the slide models"
_SPLIT_FILES = "the files in --split_dir say which slides train, validate and test"
_BOTH_PARTS = ("the parts of a loss have one weight each: --bag_weight (CLAM), --max_weight "
               "(DSMIL)")
DROPPED: dict[str, Dropped] = {
    "h5_path": Dropped(None, _COORDS_KNOWN), "h5_sub_path": Dropped(None, _COORDS_KNOWN),
    "val_ratio": Dropped(0.0, _SPLIT_FILES + " (create_splits_seq.py --val_frac)", "said"),
    "random_fold": Dropped(False, _SPLIT_FILES + "; for another draw of the same split, --seed",
                           "said"),
    "random_seed": Dropped(False, "every fold starts from --seed", "said"),
    "same_psize_pad_type": Dropped("zero", "a short slide gives random repeats (pad_enc_bs) or "
                                   "what it has: rows of zeros would take part in attention"),
    "same_psize_ratio": Dropped(0.0, "every epoch draws anew", "refused"),
    "image_input": Dropped(False, "e2e models read patches, all others features"),
    "num_workers_test": Dropped(None, "one number, --num_workers"),
    "lmdb": Dropped(False, _PATHS_TELL), "persistence": Dropped(False, "--cache auto decides"),
    "pin_memory": Dropped(False, _ALWAYS_READ_AHEAD),
    "no_prefetch": Dropped(False, _ALWAYS_READ_AHEAD),
    "no_prefetch_test": Dropped(False, _ALWAYS_READ_AHEAD),
    "prefetch_factor": Dropped(2, _ALWAYS_READ_AHEAD),
    "img_trans_chunk": Dropped(4, "each patch has its own crop"),
    "main_alpha": Dropped(1.0, _BOTH_PARTS, "refused"),
    "aux_alpha": Dropped(0.0, _BOTH_PARTS, "refused"),
    "epoch_start": Dropped(0, "the same command goes on where a run stopped", "refused"),
    "lr_supi": Dropped(False, "the learning rate changes once an epoch", "refused"),
    "best_metric_index": Dropped(-1, "the best epoch has the highest AUC, c-index or R2",
                                 "refused"),
    "always_test": Dropped(False, "the test slides are looked at once, at the end"),
    "model_ema": Dropped(False, "it failed; test_type and mm give a running mean", "refused"),
    "no_determ": Dropped(False, _DETERMINED), "no_deter_algo": Dropped(False, _DETERMINED),
    "deter_algo": Dropped(False, _DETERMINED),
    "channels_last": Dropped(False, "always so"),
    "reduce_bn": Dropped(False, "statistics are averaged at each step (sync_bn), or not",
                         "refused"),
    "no_drop_last": Dropped(False, "every slide of an epoch is trained on, the last ones too"),
    "num_bootstrap": Dropped(1000, _AT_EVALUATION),
    "bootstrap_mode": Dropped("test", _AT_EVALUATION), "bin_metric": Dropped(False, _AT_EVALUATION),
    "patch_shuffle": Dropped(False, "patches of a slide keep their order; that of the draw is "
                             "random", "refused"),
    "mil_bias": Dropped(False, "biases are there unless no_mil_bias is given"),
    "da_act": Dropped("relu", "never read"), "pos": Dropped("none", _NO_VIT),
    "n_layers": Dropped(2, _NO_VIT), "pool": Dropped("cls_token", _NO_VIT),
    "attn_dropout": Dropped(0.0, _NO_VIT), "attn_type": Dropped("sa", _NO_VIT),
    "ffn_dp": Dropped(0.0, "the feed-forward layer has no dropout", "refused"),
    "ffn_ratio": Dropped(4.0, "the feed-forward layer is 4 times as wide", "refused"),
    "load_gpu_later": Dropped(False, _ON_CPU), "load_gpu_later_train": Dropped(False, _ON_CPU),
    "sel_type": Dropped("random", "patches are drawn at random; the paper found choosing by "
                        "attention worse and seven times slower", "refused"),
    "sdpa_type": Dropped("torch", "--sdpa_type auto suits the device; no number depends on it"),
    "abx_pad_v": Dropped(False, "A+ never forms the N x N matrix that this avoids"),
    "epeg_k": Dropped(15, _NO_RRT), "crmsa_k": Dropped(3, _NO_RRT),
    "region_num": Dropped(8, _NO_RRT), "rrt_n_heads": Dropped(8, _NO_RRT),
    "rrt_n_layers": Dropped(2, _NO_RRT), "rrt_pool": Dropped("attn", "never read"),
    "log_iter": Dropped(100, "one line an epoch"),
    "amp_unscale": Dropped(False, "gradients are unscaled before they are clipped"),
    "no_log": Dropped(False, "TensorBoard logs are written with --log_data only"),
    "model_path": Dropped(None, "never read"),
    "local_rank": Dropped(None, "torchrun tells each process its rank"),
    "script_mode": Dropped("all", "main.py trains and tests, eval.py evaluates", "refused"),
    "profile": Dropped(False, "benchmarks/e2e.py measures"),
    "debug": Dropped(False, "--testing tries out on a tenth of the slides"),
    "save_iter": Dropped(-1, "--save_top_k keeps the best epochs", "said"),
    "torchcompile": Dropped(False, "nothing is compiled: the numbers stay the same"),
    "torchcompile_mode": Dropped("default", "nothing is compiled"),
    "wandb": Dropped(False, "TensorBoard instead: --log_data", "said"),
    "wandb_watch": Dropped(False, "TensorBoard instead: --log_data"),
    "no_ddp_broad_buf": Dropped(False, "batch norms are equal in all processes with enc_bn sync"),
}
DEFAULTS: dict[str, Any] = {name: row.default for table in (KEPT, MAPPED, DROPPED)
                            for name, row in table.items()}
