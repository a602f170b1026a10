"""Tissue by SAM2.1 Hiera-tiny (Ravi et al. 2024, arXiv 2408.00714) through transformers.

The recipe is AtlasPatch's (one box around the whole overview, one mask), with the aspect kept:
the overview's longer side becomes the network's 1024 px and the rest is glass, where AtlasPatch
stretches it to a square. A slide of 8.2 mm or less is therefore seen at 8 um per px, a longer one
at its length / 1024 (25 mm: 24 um per px).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.encoder_weights import Weights, load_strictly
from utils.devices import Precision, autocast
from utils.errors import Refused
from utils.storage import file_sha256

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "sam2.1_hiera_tiny.pt")
GET_ONE = ("--seg_ckpt takes the folder of facebook/sam2.1-hiera-tiny (model.safetensors and "
           "config.json, from https://huggingface.co/facebook/sam2.1-hiera-tiny), Meta's "
           "sam2.1_hiera_tiny.pt, or a fine-tuned model.pth of that layout, such as AtlasPatch's "
           "(AtlasAnalyticsLab/AtlasPatch: non-commercial, you must hold them yourself)")
WHAT = "SAM2 weights"
SAM2_MPP_UM = 8.0
GLASS = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as SAM2 was trained

Size = tuple[int, int]  # width, height


# ---------------------------------------------------------------------------- geometry

def fitted_size(size: Size, side_px: int) -> Size:
    """(w, h) scaled so that the longer one is ``side_px``; neither below 1."""
    longer = max(size)
    return (max(1, round(size[0] * side_px / longer)), max(1, round(size[1] * side_px / longer)))


def letterbox(image: np.ndarray, side_px: int) -> tuple[np.ndarray, Size]:
    """An (h, w, 3) uint8 image at the top left of a square of glass, its aspect kept.

    Returns the (side, side, 3) square and the (w, h) that the image takes of it.
    """
    import cv2

    height, width = image.shape[:2]
    content = fitted_size((width, height), side_px)
    shrinks = content[0] < width
    square = np.full((side_px, side_px, 3), GLASS, np.uint8)
    square[:content[1], :content[0]] = cv2.resize(
        image, content, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return square, content


def cut_back(logits: torch.Tensor, content: Size, side_px: int, size: Size) -> torch.Tensor:
    """Probabilities (h, w) of the image from (h', w') logits of its letterboxed square.

    content: (w, h) of the image in the square of ``side_px``; size: (w, h) of the image
    """
    square = F.interpolate(logits[None, None], (side_px, side_px), mode="bilinear",
                           align_corners=False)
    inner = square[..., :content[1], :content[0]]
    whole = F.interpolate(inner, (size[1], size[0]), mode="bilinear", align_corners=False)
    return whole[0, 0].sigmoid()


# ---------------------------------------------------------------------------- key names

_THREE_LAYERS = {"0": "proj_in", "1": "layers.0", "2": "proj_out"}
_RENAMES: tuple[tuple[str, str], ...] = (  # Meta's name -> transformers'
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
     "prompt_encoder.shared_embedding.positional_embedding"),
    (r"^sam_prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^sam_mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^sam_mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^sam_mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
)
_HEADS = re.compile(r"\.(iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d+)"
                    r"\.layers\.([012])\.")
_POINTS = re.compile(r"^sam_prompt_encoder\.point_embeddings\.(\d+)\.weight$")
# Of video tracking, which a still picture does not need: Meta's and transformers' names
_VIDEO = re.compile(r"^(maskmem_|memory_|mask_downsample\.|obj_ptr_|object_pointer_|no_obj|no_mem_"
                    r"pos|no_memory_pos|temporal_positional_|occlusion_spatial_)")
_IMAGE_PE, _PROMPT_PE = ("shared_image_embedding.positional_embedding",
                         "prompt_encoder.shared_embedding.positional_embedding")


def to_transformers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A SAM2 state in transformers' names, whether it comes in those or in Meta's.

    Weights of the video memory are left out; the four point embeddings become one table.
    """
    renamed: dict[str, torch.Tensor] = {}
    points: dict[int, torch.Tensor] = {}
    for key, value in state.items():
        point = _POINTS.match(key)
        if point:
            points[int(point[1])] = value
        elif not _VIDEO.match(key):
            renamed[_new_name(key)] = value
    if points:
        renamed["prompt_encoder.point_embed.weight"] = torch.cat(
            [points[index] for index in sorted(points)])
    for name, twin in ((_IMAGE_PE, _PROMPT_PE), (_PROMPT_PE, _IMAGE_PE)):
        if name not in renamed and twin in renamed:  # one matrix, which transformers holds twice
            renamed[name] = renamed[twin]
    return renamed


def _new_name(key: str) -> str:
    if key.startswith(("image_encoder.", "sam_", "no_mem_embed")):
        key = _HEADS.sub(lambda found: f".{found[1]}.{_THREE_LAYERS[found[2]]}.", key)
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
    return key


# ---------------------------------------------------------------------------- the predictor

class Sam2Predictor:
    """Tissue probability of overviews; see ``utils.contracts.TissuePredictor``."""

    def __init__(self, model: nn.Module, *, sha256: str, device: torch.device,
                 precision: Precision, threshold: float, mpp_um: float, side_px: int) -> None:
        self.mpp_um, self.threshold = mpp_um, threshold
        self.max_side_px: int | None = side_px
        self._side = side_px
        self._model = model.eval().to(device)
        self._sha256, self._device, self._precision = sha256, device, precision
        self._mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(STD, device=device).view(1, 3, 1, 1)

    def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(h, w, 3) uint8 images of any sizes, one batch -> (h, w) float32 each."""
        if not images:
            return []
        squares, contents = zip(*(letterbox(image, self._side) for image in images),
                                strict=True)
        pixels = torch.from_numpy(np.stack(squares)).to(self._device).permute(0, 3, 1, 2)
        boxes = torch.tensor([[[0.0, 0.0, w, h]] for w, h in contents], device=self._device)
        with torch.inference_mode(), autocast(self._precision, self._device):
            answer = self._model(pixel_values=(pixels / 255 - self._mean) / self._std,
                                 input_boxes=boxes, multimask_output=False)
            logits = answer.pred_masks[:, 0, 0].float()  # (B, prompts, masks, h', w')
            whole = [cut_back(one, content, self._side, (image.shape[1], image.shape[0]))
                     for one, content, image in zip(logits, contents, images, strict=True)]
        return [probability.cpu().numpy() for probability in whole]

    def record(self) -> dict[str, Any]:
        """What decides the masks, for the parameters of results."""
        return {"name": "sam2", "sha256": self._sha256, "mpp_um": self.mpp_um,
                "threshold": self.threshold, "input_px": self._side,
                "precision": self._precision}


def load_sam2(
    checkpoint: Path, *, device: torch.device, precision: Precision, threshold: float | None,
    mpp_um: float | None,
) -> Sam2Predictor:
    """SAM2 from a folder of transformers, or from a weight file in its names or in Meta's.

    A ``config.json`` beside the weights says the architecture; without one it is Hiera-tiny.
    Raises Refused: no such file, pickled objects, another network, transformers missing.
    """
    path = _weight_file(Path(checkpoint))
    config = _config(path.parent / "config.json")
    weights = Weights(path, file_sha256(path), WHAT)
    state = to_transformers(weights.state())
    from transformers import Sam2Model

    model = Sam2Model(config)
    load_strictly(model, state, where=path, what=WHAT)
    return Sam2Predictor(
        model, sha256=weights.sha256, device=device, precision=precision,
        threshold=0.5 if threshold is None else threshold,
        mpp_um=SAM2_MPP_UM if mpp_um is None else mpp_um,
        side_px=int(config.prompt_encoder_config.image_size))


def _weight_file(checkpoint: Path) -> Path:
    if checkpoint.is_file():
        return checkpoint
    for name in WEIGHT_FILES:
        if (checkpoint / name).is_file():
            return checkpoint / name
    raise Refused(f"no SAM2 weights at {checkpoint}: {GET_ONE}")


def _config(path: Path) -> Any:
    """A ``Sam2Config`` of the file, or that of Hiera-tiny when there is none."""
    try:
        from transformers import Sam2Config
    except ImportError:
        raise Refused("--segmenter sam2 needs the package transformers: pip install "
                      "'transformers>=4.56'") from None
    if not path.is_file():
        return Sam2Config()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("model_type") not in ("sam2", "sam2_video"):
            raise ValueError(f"its model_type is {found.get('model_type')!r}, not sam2")
        return Sam2Config(**{part: found[part] for part in (
            "vision_config", "prompt_encoder_config", "mask_decoder_config")})
    except Exception as error:  # transformers checks the values with errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Refused(f"{path} is no SAM2 configuration ({reason})") from None
