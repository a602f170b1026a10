"""What the tests of feature extraction start from: slides, coordinates, a csv, a tiny encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.slides import tissue_image, write_pyramid
from utils.errors import Refused
from utils.report import Status
from utils.resize import resize_shorter_side
from wsi_core.coords import PatchCoords, write_coords
from wsi_core.deriving import DerivePlan, derive_slide
from wsi_core.hierarchy import Child

PATCH_PX = 64


class MeanColour:
    """An "encoder" of three features: the mean colour of a patch. Remembers its batches."""

    dim = 3
    device = torch.device("cpu")

    def __init__(self, side_px: int = 0) -> None:
        self.side_px = side_px
        self.batches: list[int] = []

    def prepare(self, patch: np.ndarray) -> np.ndarray:
        return resize_shorter_side(patch, self.side_px) if self.side_px else patch

    def launch(self, batch: np.ndarray) -> torch.Tensor:
        self.batches.append(len(batch))
        return torch.from_numpy(batch.mean(axis=(1, 2), dtype=np.float64).astype(np.float32))


def load_mean_colour(device: str) -> MeanColour:
    """Loads in a child process; "broken" refuses."""
    if device == "broken":
        raise Refused("no such device")
    return MeanColour()


@dataclass(frozen=True)
class Inputs:
    """Folders as create_patches_fp.py leaves them."""

    slides: Path
    patches_root: Path
    csv: Path

    def arguments(self, feat_dir: Path) -> list[str]:
        """Command line of a short run: 64-px patches through EfficientNet-Lite0."""
        return ["--data_h5_dir", str(self.patches_root), "--data_slide_dir", str(self.slides),
                "--csv_path", str(self.csv), "--feat_dir", str(feat_dir), "--slide_ext", ".tif",
                "--model_name", "efficientnet_lite0", "--target_patch_size", "64"]


def save_network(path: Path, name: str = "test_resnet") -> Path:
    """A checkpoint of a network of timm's: seeded random weights, classifier included."""
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model(name).state_dict(), path)
    return path


def write_tiny_encoder(path: Path) -> list[str]:
    """Weights of timm's smallest network, and the flags that use them."""
    save_network(path)
    return ["--model_name", "timm:test_resnet", "--encoder_ckpt", str(path)]


def grid_coords(count: int, *, columns: int = 5, offset: int = 261, step: int = 96) -> np.ndarray:
    """(count, 2) level-0 corners in CLAM's order (column after column), about the tissue."""
    index = np.arange(count)
    return np.stack([offset + step * (index // columns), offset + step * (index % columns)], 1)


def write_patches(folder: Path, slide_id: str, coords: np.ndarray, *, patch_px: int = PATCH_PX,
                  output_px: int | None = None, level: int = 0) -> Path:
    """``patches/<slide>.h5`` under ``folder``."""
    (folder / "patches").mkdir(parents=True, exist_ok=True)
    path = folder / "patches" / f"{slide_id}.h5"
    scale = 2**level
    write_coords(path, PatchCoords(
        slide_id=slide_id, coords=coords, patch_size=patch_px, patch_level=level,
        output_size=output_px or patch_px, level_downsample=(scale, scale),
        level_size=(1024 // scale, 768 // scale), slide_size=(1024, 768),
        footprint_px_l0=(patch_px * scale, patch_px * scale),
        step_px_l0=(patch_px * scale, patch_px * scale), mpp_um=0.5,
        parameters={"patch_size": patch_px}))
    return path


CHILDREN = (Child(level=1), Child(level=0))


def make_levels(root: Path, counts: Sequence[int] = (3, 0, 2)) -> Inputs:
    """As ``make_inputs`` at level 2 with patches of 32 px, and levels 1 and 0 that tile them."""
    inputs = make_inputs(root, counts)
    plan = DerivePlan(save_dir=inputs.patches_root, children=CHILDREN)
    for child in CHILDREN:
        (plan.folder(child) / "patches").mkdir(parents=True)
    for number, count in enumerate(counts):
        write_patches(inputs.patches_root, f"slide_{number}",
                      grid_coords(count, columns=1, step=160), patch_px=32, level=2)
        rows = derive_slide(inputs.slides / f"slide_{number}.tif", plan=plan)
        assert {row.status for row in rows} <= {Status.DONE, Status.EMPTY}
    return inputs


def make_inputs(root: Path, counts: Sequence[int] = (20, 0, 13)) -> Inputs:
    """Slides ``slide_0.tif`` ... with so many patches each; a process list names them all."""
    (root / "slides").mkdir(parents=True)
    rows = ["slide_id,process,status"]
    for number, count in enumerate(counts):
        name = f"slide_{number}"
        write_pyramid(root / "slides" / f"{name}.tif", tissue_image(1024, 768, seed=number))
        write_patches(root / "out", name, grid_coords(count))
        rows.append(f"{name}.tif,0,processed")
    csv = root / "out" / "process_list_autogen.csv"
    csv.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return Inputs(root / "slides", root / "out", csv)
