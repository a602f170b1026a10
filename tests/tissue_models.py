"""Tiny tissue networks with random weights, as their tools save them."""

from __future__ import annotations

from pathlib import Path

import torch

SIDE = 128  # of the images that the tiny SAM2 takes


def save_tiny_sam2(folder: Path) -> None:
    """A SAM2 for images of 128 px, as transformers saves it."""
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(0)
    maps = [[SIDE // step] * 2 for step in (4, 8, 16)]
    config = Sam2Config(
        vision_config={
            "model_type": "sam2_vision_model", "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": maps, "fpn_hidden_size": 32,
            "backbone_config": {
                "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [SIDE, SIDE],
                "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2], "global_attention_blocks": [3],
                "window_size_per_stage": [8, 4, 4, 2]}},
        prompt_encoder_config={"hidden_size": 32, "image_size": SIDE},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 32})
    model = Sam2Model(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1 or "embed" in name:  # what starts as a constant tells keys apart
                value.add_(0.1 * torch.randn_like(value))
        model.shared_image_embedding.positional_embedding.copy_(
            model.prompt_encoder.shared_embedding.positional_embedding)  # one matrix in SAM2
    model.save_pretrained(folder)
