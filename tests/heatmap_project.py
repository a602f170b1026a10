"""A folder with all that ``create_heatmaps.py`` needs: tiny slides, encoder, checkpoint, config."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.feature_inputs import save_network
from tests.slides import tissue_image, write_pyramid

EMBED_DIM = 96  # of the encoder test_resnet
CONFIG: dict[str, Any] = {
    "exp_arguments": {"n_classes": 2, "save_exp_code": "exp", "raw_save_dir": "raw",
                      "production_save_dir": "prod", "batch_size": 32},
    "data_arguments": {"data_dir": "slides", "process_list": "list.csv", "preset": "preset.csv",
                       "slide_ext": ".tif", "label_dict": {"normal": 0, "tumor": 1}},
    "patching_arguments": {"patch_size": 64, "overlap": 0.5, "patch_level": 0},
    "encoder_arguments": {"model_name": "timm:test_resnet", "ckpt_path": "encoder.pt",
                          "target_img_size": 64},
    "model_arguments": {"ckpt_path": "s_0_checkpoint.pt", "model_type": "clam_sb",
                        "embed_dim": EMBED_DIM},
    "heatmap_arguments": {"vis_level": 1},
    "sample_arguments": {"samples": [{"name": "top", "k": 2, "mode": "topk"}]},
}
PRODUCTION = "prod/exp/tumor/s_0_0.5_roi_0_blur_0_rs_1_bc_0_a_0.4_l_1_bi_0_-1.0.jpg"


def make_project(root: Path) -> Path:
    """Two slides of 1024 x 768 (levels 1, 2, 4), labels tumor and normal."""
    for seed in range(2):
        (root / "slides").mkdir(exist_ok=True, parents=True)
        write_pyramid(root / f"slides/s_{seed}.tif", tissue_image(1024, 768, seed=seed))
    save_network(root / "encoder.pt")
    write_checkpoint(root / "s_0_checkpoint.pt", "clam_sb")
    (root / "preset.csv").write_text("sthresh,mthresh,close,a_t,a_h\n15,11,2,0.1,0.01\n")
    (root / "list.csv").write_text("slide_id,label,x1,x2,y1,y2\n"
                                   "s_0,tumor,500,800,300,560\ns_1,0,200,500,300,560\n")
    write_config(root)
    return root


def write_checkpoint(path: Path, model_type: str, *, seed: int = 0, **fields: Any) -> None:
    """A state dict of random weights that are large enough to tell patches apart."""
    import torch

    from models.slide_models import SlideModelSpec, build_slide_model

    torch.manual_seed(seed)
    spec = {"embed_dim": EMBED_DIM, "n_classes": 2, "dropout": 0.0, **fields}
    model = build_slide_model(SlideModelSpec(model_type=model_type, **spec))
    torch.save({name: value * 3 for name, value in model.state_dict().items()}, path)


def write_described(
    path: Path, model_type: str, *, seed: int = 0, class_names: Sequence[str] = ("normal", "tumor"),
    target_names: Sequence[str] = (), child_levels: Sequence[int] = (), **fields: Any,
) -> None:
    """A checkpoint of random weights, and its json as main.py leaves it."""
    import torch

    from models.slide_models import SlideModelSpec, build_slide_model

    torch.manual_seed(seed)
    spec = SlideModelSpec(model_type=model_type, **{
        "embed_dim": EMBED_DIM, "n_classes": 2, "dropout": 0.0, "instance_clustering": False,
        **fields})
    torch.save(build_slide_model(spec).state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps({
        "spec": dataclasses.asdict(spec), "class_names": list(class_names), "encoder": None,
        "fold": 0, "target_names": list(target_names), "child_levels": list(child_levels)}))


def write_hierarchy(root: Path, *, kept: float = 0.4) -> dict[str, Any]:
    """A HAG-MIL of three levels; returns the changes of the config that draw it.

    kept: share of the patches of a level whose children are looked at
    """
    write_described(root / "hag.pt", "hag_mil", n_levels=3, child_levels=(1, 0),
                    options={"hidden_dims": (16, 16), "v_patch": (kept,)})
    return {"model_arguments.ckpt_path": "hag.pt", "model_arguments.model_type": None,
            "patching_arguments.patch_level": 2, "patching_arguments.patch_size": 32,
            "exp_arguments.save_exp_code": "hag"}


def write_config(root: Path, changes: dict[str, Any] | None = None) -> Path:
    """The config with ``{"section.key": value}`` changed."""
    tree = copy.deepcopy(CONFIG)
    for name, value in (changes or {}).items():
        section, key = name.split(".")
        tree.setdefault(section, {})[key] = value
    path = root / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def copy_project(source: Path, target: Path) -> Path:
    """A copy that a test may change; records hold relative paths, so results stay valid."""
    return Path(shutil.copytree(source, target))


def tree_of(root: Path) -> dict[str, int]:
    """Every file with the time of its last change."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns
            for path in sorted(root.rglob("*")) if path.is_file()}
