"""Where the attention of trained models falls, against places known from elsewhere.

Used by the demo (planted regions) and by ``benchmarks/colon.py`` (marked nuclei).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import ItemFailed
from utils.storage import load_torch, read_json


@dataclass(frozen=True)
class SlideAttention:
    """Attention of one slide by the model of the fold that tested it.

    coords: (N, 2) level-0 px; weights: (N,) softmax of the predicted class's scores, sum 1.
    """

    slide_id: str
    coords: np.ndarray
    weights: np.ndarray
    predicted: int


def attention_of_fold(
    run_folder: Path, feature_dir: Path, fold: int, slide_ids: list[str]
) -> Iterator[SlideAttention]:
    """Run fold ``fold``'s checkpoint on slides and yield their attention."""
    import torch

    from datasets.features import FeatureStore
    from models.slide_models import SlideModelSpec, build_slide_model
    from utils.contracts import Bag
    from utils.options import from_mapping

    record = read_json(run_folder / f"s_{fold}_checkpoint.json")
    spec = SlideModelSpec(**from_mapping(SlideModelSpec, record["spec"], source="spec"))
    model = build_slide_model(spec)
    model.load_state_dict(load_torch(run_folder / f"s_{fold}_checkpoint.pt"))
    model.eval()
    store = FeatureStore(feature_dir)
    for slide_id in slide_ids:
        features, coords = store.read(slide_id)
        with torch.inference_mode():
            output = model(Bag(slide_id=slide_id, features=features, coords=coords))
        scores = output.attention_of(output.predicted)
        if scores is None or coords is None:
            raise ItemFailed(f"{slide_id}: no attention or no coordinates to look at")
        weights = scores.float().softmax(dim=0).numpy()
        yield SlideAttention(slide_id, coords, weights, output.predicted)


def share_on_ellipse(
    attention: SlideAttention, *, centre: tuple[float, float], radii: tuple[float, float],
    patch_px_l0: int,
) -> tuple[float, float]:
    """(share of attention, share of patches) of the patches that show any of an ellipse.

    centre, radii: (x, y) in level-0 px
    """
    nearest = np.clip(np.asarray(centre), attention.coords, attention.coords + patch_px_l0)
    distance = (((nearest - np.asarray(centre)) / np.asarray(radii)) ** 2).sum(axis=1)
    showing = distance < 1
    return float(attention.weights[showing].sum()), float(showing.mean())
