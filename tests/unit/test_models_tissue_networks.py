"""models/tissue_*.py: geometry, tiles, key names of SAM2, cards; what is refused."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.tissue_networks import (
    NetworkCard,
    NetworkPredictor,
    build_network,
    load_tissue_predictor,
    save_network,
)
from models.tissue_sam2 import cut_back, fitted_size, letterbox, to_transformers
from models.tissue_tiles import blend_window, predict_tiled, tile_starts
from tests.slides import tissue_image
from tests.tissue_models import SIDE, save_tiny_sam2
from utils.errors import Refused

CPU = torch.device("cpu")
CARD = NetworkCard(arch="unet", width=4, depth=3, mpp_um=8.0, tile_px=64)
SIZES = ((90, 70), (300, 40), (64, 64), (200, 150))  # width, height


def pictures() -> list[np.ndarray]:
    return [tissue_image(width, height, seed=width) for width, height in SIZES]


# ---------------------------------------------------------------------------- geometry

@given(st.integers(1, 3000), st.integers(1, 3000))
def test_letterboxing_keeps_the_aspect(width: int, height: int) -> None:
    w, h = fitted_size((width, height), 1024)
    assert max(w, h) == 1024 and min(w, h) >= 1
    if width >= height:
        assert abs(h - height * 1024 / width) <= 0.5 or h == 1
    else:
        assert abs(w - width * 1024 / height) <= 0.5 or w == 1


@pytest.mark.parametrize(("width", "height"), [(400, 100), (100, 400), (33, 50), (128, 128)])
def test_what_is_cut_back_lies_where_it_was(width: int, height: int) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 4] = 200  # any network that answers with the brightness
    square, content = letterbox(image, 128)
    assert square.shape == (128, 128, 3)
    assert (square[content[1]:] == 255).all() and (square[:, content[0]:] == 255).all()
    logits = torch.from_numpy(square[..., 0].astype(np.float32)) - 100
    logits = torch.nn.functional.avg_pool2d(logits[None], 2)[0]  # a network's coarser answer
    back = cut_back(logits, content, 128, (width, height)).numpy()
    assert back.shape == (height, width)
    wrong = (back > 0.5) != (image[..., 0] > 100)
    coarse = 2 * max(width, height) / 128  # px of the image in a px of the answer
    assert wrong.sum() <= 1.5 * coarse * (height / 2 + width / 4)


@given(st.integers(1, 500), st.integers(8, 100), st.data())
def test_tiles_cover_an_axis(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile // 2))
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert starts[-1] + tile == max(length, tile)
    assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))


@given(st.integers(2, 40), st.data())
def test_ramps_of_neighbours_add_up(half: int, data: st.DataObject) -> None:
    tile, overlap = 2 * half, data.draw(st.integers(1, half))
    edge = np.sqrt(np.diagonal(blend_window(tile, overlap)))
    assert (edge > 0).all()
    np.testing.assert_allclose(edge[tile - overlap:] + edge[:overlap], 1, atol=1e-6)


def test_blending_gives_back_what_depends_on_the_pixel_alone() -> None:
    sizes: list[int] = []

    def forward(tiles: np.ndarray) -> np.ndarray:
        sizes.append(len(tiles))
        return tiles[..., 1].astype(np.float32) / 255

    images = pictures()
    found = predict_tiled(images, forward, tile_px=64, overlap_px=16, batch_size=5)
    for image, answer in zip(images, found, strict=True):
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer, image[..., 1] / 255, atol=1e-6)
    assert max(sizes) == 5 and len(sizes) == -(-sum(sizes) // 5)  # images share batches


# ---------------------------------------------------------------------------- networks of ours

def trained_a_little(card: NetworkCard) -> torch.nn.Module:
    """Random weights whose batch norms have seen tissue, so that answers vary."""
    torch.manual_seed(0)
    network = build_network(card)
    network.train()
    pixels = np.stack([tissue_image(64, 64, seed=seed) for seed in range(4)])
    with torch.no_grad():
        for _ in range(20):
            network(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    return network


def test_a_saved_network_predicts_the_same(tmp_path: Path) -> None:
    network = trained_a_little(CARD)
    before = NetworkPredictor(network, CARD, sha256="", device=CPU, precision="fp32")
    save_network(tmp_path, network, CARD)
    for place in (tmp_path, tmp_path / "model.safetensors", tmp_path / "model.json"):
        after = load_tissue_predictor("network", place, device="cpu")
        for one, other in zip(before.predict(pictures()), after.predict(pictures()), strict=True):
            np.testing.assert_array_equal(one, other)
    record = after.record()
    assert record["mpp_um"] == 8.0 and record["threshold"] == 0.5 and len(record["sha256"]) == 64
    json.dumps(record)


def test_images_of_a_batch_do_not_touch_each_other(tmp_path: Path) -> None:
    save_network(tmp_path, trained_a_little(CARD), CARD)
    predictor = load_tissue_predictor("network", tmp_path, device="cpu")
    together = predictor.predict(pictures())
    for image, answer in zip(pictures(), together, strict=True):
        assert answer.shape == image.shape[:2] and np.ptp(answer) > 0.01
        np.testing.assert_allclose(predictor.predict([image])[0], answer, atol=1e-5)


def test_tiles_agree_with_the_whole_where_they_see_enough() -> None:
    network = trained_a_little(CARD)  # sees 20 px around a pixel
    image = tissue_image(256, 256, seed=1)
    whole, tiled = (
        NetworkPredictor(network, replace(CARD, tile_px=tile), sha256="", device=CPU,
                         precision="fp32").predict([image])[0] for tile in (256, 128))
    inner = (slice(32, 96), slice(32, 96))  # of the first tile alone, which ends at 128
    np.testing.assert_allclose(tiled[:72, :72], whole[:72, :72], atol=1e-5)
    assert abs(tiled - whole)[inner].mean() < 0.01 and abs(tiled - whole).mean() < 0.02


def test_threshold_and_scale_of_the_user(tmp_path: Path) -> None:
    save_network(tmp_path, build_network(CARD), CARD)
    predictor = load_tissue_predictor("network", tmp_path, device="cpu", threshold=0.3, mpp_um=4.0)
    assert (predictor.threshold, predictor.mpp_um) == (0.3, 4.0)
    assert (predictor.record()["threshold"], predictor.record()["mpp_um"]) == (0.3, 4.0)


def test_bf16_is_close(tmp_path: Path) -> None:
    save_network(tmp_path, trained_a_little(CARD), CARD)
    exact, rough = (load_tissue_predictor("network", tmp_path, device="cpu", precision=precision)
                    for precision in ("fp32", "bf16"))
    difference = abs(exact.predict(pictures())[0] - rough.predict(pictures())[0]).max()
    assert 0 < difference < 0.1
    assert exact.record() != rough.record()


def test_probabilities_of_tissue_classes_add_up(tmp_path: Path) -> None:
    card = replace(CARD, classes=("glass", "tissue", "fat", "pen"),
                   tissue_classes=("tissue", "fat"))
    network = build_network(card)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias = torch.nn.Parameter(torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1])))
    save_network(tmp_path, network, card)
    found = load_tissue_predictor("network", tmp_path, device="cpu").predict(pictures())
    np.testing.assert_allclose(found[0], 0.5, atol=1e-6)


def test_a_timm_encoder(tmp_path: Path) -> None:
    card = replace(CARD, arch="timm_unet", encoder="mobilenetv3_small_050")
    save_network(tmp_path, build_network(card), card)
    found = load_tissue_predictor("network", tmp_path, device="cpu").predict(pictures()[:1])
    assert found[0].shape == (70, 90)
    for name, message in (("vit_tiny_patch16_224", "reductions"), ("resnet1", "cannot be built")):
        with pytest.raises(Refused, match=message):
            build_network(replace(card, encoder=name))


def test_broken_checkpoints(tmp_path: Path) -> None:
    def load() -> None:
        load_tissue_predictor("network", tmp_path, device="cpu")

    with pytest.raises(Refused, match=r"model\.safetensors is missing"):
        load()
    save_network(tmp_path, build_network(CARD), CARD)
    card = json.loads((tmp_path / "model.json").read_text())
    for change, message in (
            ({"arch": "mlp"}, "expected one of unet, timm_unet"), ({"tile": 3}, "unknown key"),
            ({"tile_px": 100}, "multiple of 32"), ({"mpp_um": 0}, "mpp_um is 0"),
            ({"version": 2}, "version 2"), ({"tissue_classes": ["fat"]}, "tissue_classes fat"),
            ({"mean": [0.5]}, "three numbers"), ({"arch": "timm_unet"}, "without an encoder"),
            ({"width": 8, "weights_sha256": ""}, "belong to another network"),
            ({"weights_sha256": "0" * 64}, "do not belong together")):
        (tmp_path / "model.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(Refused, match=message):
            load()
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(Refused, match="json object"):
        load()
    (tmp_path / "model.json").write_text(json.dumps({**card, "weights_sha256": ""}))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(Refused, match="tissue network: .*no readable safetensors"):
        load()


def test_names_and_missing_checkpoints() -> None:
    with pytest.raises(Refused, match="known: network, sam2"):
        load_tissue_predictor("sam3", Path("x"), device="cpu")
    with pytest.raises(Refused, match=r"--seg_ckpt FOLDER.*train_tissue_network"):
        load_tissue_predictor("network", None, device="cpu")
    for checkpoint in (None, Path("/nowhere")):
        with pytest.raises(Refused, match=r"facebook/sam2\.1-hiera-tiny.*non-commercial"):
            load_tissue_predictor("sam2", checkpoint, device="cpu")
    with pytest.raises(Refused, match="fp16 needs CUDA"):
        load_tissue_predictor("network", None, device="cpu", precision="fp16")


# ---------------------------------------------------------------------------- SAM2

@pytest.fixture(scope="module")
def sam2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam2")
    save_tiny_sam2(folder)
    return folder


def metas_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' SAM2 names -> those of Meta's checkpoints, by a way of its own."""
    heads = {"proj_in": "layers.0", "layers.0": "layers.1", "proj_out": "layers.2"}
    plain = [
        ("vision_encoder.backbone.", "image_encoder.trunk."), ("prompt_encoder.", "sam_prompt_enco"
         "der."), ("mask_decoder.", "sam_mask_decoder."), ("patch_embed.projection", "patch_embed."
         "proj"), ("shared_embedding.positional_embedding", "pe_layer.positional_encoding_gaussian"
         "_matrix"), ("mask_embed.conv1", "mask_downscaling.0"), ("mask_embed.layer_norm1",
         "mask_downscaling.1"), ("mask_embed.conv2", "mask_downscaling.3"),
        ("mask_embed.layer_norm2", "mask_downscaling.4"), ("mask_embed.conv3",
         "mask_downscaling.6"), ("upscale_conv1", "output_upscaling.0"), ("upscale_layer_norm",
         "output_upscaling.1"), ("upscale_conv2", "output_upscaling.3"), ("layer_norm_final",
         "norm_final"), ("o_proj", "out_proj"), ("mlp.proj_in", "mlp.layers.0"),
        ("mlp.proj_out", "mlp.layers.1"), ("no_memory_embedding", "no_mem_embed")]
    original = {"memory_encoder.fuser.layers.0.gamma": torch.ones(2), "no_obj_ptr": torch.ones(2),
                "maskmem_tpos_enc": torch.ones(2), "obj_ptr_proj.layers.0.bias": torch.ones(2)}
    for name, value in state.items():
        if name == "shared_image_embedding.positional_embedding":
            continue
        if name == "prompt_encoder.point_embed.weight":
            original.update({f"sam_prompt_encoder.point_embeddings.{index}.weight": row[None]
                             for index, row in enumerate(value)})
            continue
        new = re.sub(r"neck\.convs\.(\d)", r"neck.convs.\1.conv", name)
        new = new.replace("vision_encoder.neck", "image_encoder.neck")
        if re.search(r"_head\.|_mlps\.", new):
            new = re.sub(r"proj_in|proj_out|layers\.0", lambda found: heads[found[0]], new)
        for ours, theirs in plain:
            new = new.replace(ours, theirs)
        if "mask_downscaling" not in new:
            new = re.sub(r"layer_norm(\d)", r"norm\1", new)
        original[new] = value
    return original


def test_metas_checkpoint_gives_the_same_masks(sam2_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(sam2_folder / "model.safetensors")
    original = metas_names(state)
    for name in ("image_encoder.trunk.blocks.1.norm1.weight", "sam_mask_decoder.iou_token.weight",
                 "image_encoder.trunk.blocks.1.mlp.layers.1.bias", "no_mem_embed",
                 "image_encoder.neck.convs.0.conv.weight", "image_encoder.trunk.pos_embed_window",
                 "sam_mask_decoder.output_hypernetworks_mlps.3.layers.2.weight",
                 "sam_mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.bias",
                 "sam_mask_decoder.transformer.norm_final_attn.weight",
                 "sam_mask_decoder.pred_obj_score_head.layers.1.weight",
                 "sam_prompt_encoder.mask_downscaling.6.bias", "sam_mask_decoder.conv_s1.weight"):
        assert name in original  # as they stand in sam2.1_hiera_tiny.pt
    back = to_transformers(original)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    torch.save({"model": original}, tmp_path / "model.pth")
    (tmp_path / "config.json").write_bytes((sam2_folder / "config.json").read_bytes())
    wanted = load_tissue_predictor("sam2", sam2_folder, device="cpu").predict(pictures())
    for place in (tmp_path, tmp_path / "model.pth"):
        found = load_tissue_predictor("sam2", place, device="cpu").predict(pictures())
        for one, other in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_sam2_batches_and_elongated_images(sam2_folder: Path) -> None:
    predictor = load_tissue_predictor("sam2", sam2_folder, device="cpu")
    together = predictor.predict(pictures())
    assert predictor.predict([]) == []
    for image, answer in zip(pictures(), together, strict=True):
        assert answer.shape == image.shape[:2] and answer.dtype == np.float32
        assert 0 <= answer.min() < answer.max() <= 1
        np.testing.assert_allclose(predictor.predict([image])[0], answer, atol=1e-5)
    assert predictor.max_side_px == SIDE and predictor.mpp_um == 8.0
    assert {"name", "sha256", "mpp_um", "threshold", "input_px"} <= set(predictor.record())


def test_the_prompt_is_a_box_around_the_image(sam2_folder: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    predictor: Any = load_tissue_predictor("sam2", sam2_folder, device="cpu", threshold=0.7)
    seen: dict[str, Any] = {}
    inner: Callable[..., Any] = predictor._model.forward

    def forward(**inputs: Any) -> Any:
        seen.update(inputs)
        return inner(**inputs)

    monkeypatch.setattr(predictor._model, "forward", forward)
    predictor.predict(pictures()[:2])
    assert seen["input_boxes"].tolist() == [[[0, 0, 128, 100]], [[0, 0, 128, 17]]]
    assert seen["pixel_values"].shape == (2, 3, SIDE, SIDE) and not seen["multimask_output"]
    white = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(seen["pixel_values"][1, :, -1, -1], white, rtol=1e-5)
    assert predictor.threshold == 0.7


def test_sam2_in_bf16(sam2_folder: Path) -> None:
    exact, rough = (load_tissue_predictor("sam2", sam2_folder, device="cpu", precision=precision)
                    .predict(pictures()[:1])[0] for precision in ("fp32", "bf16"))
    assert 0 < abs(exact - rough).max() < 0.1


def test_sam2_files_that_are_refused(sam2_folder: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    config = (sam2_folder / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    torch.save({"model": {"weights": CARD}}, tmp_path / "model.pth")
    with pytest.raises(Refused, match="SAM2 weights: .*could run code"):
        load_tissue_predictor("sam2", tmp_path, device="cpu")
    torch.save({"model": {"image_encoder.trunk.pos_embed": torch.ones(1)}}, tmp_path / "model.pth")
    with pytest.raises(Refused, match="SAM2 weights .* another network"):
        load_tissue_predictor("sam2", tmp_path, device="cpu")
    for text in ("{", '{"model_type": "vit"}', '{"model_type": "sam2"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(Refused, match=r"config\.json is no SAM2 configuration"):
            load_tissue_predictor("sam2", tmp_path, device="cpu")
    inner = builtins.__import__

    def without(name: str, *others: Any, **more: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return inner(name, *others, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Refused, match="pip install 'transformers"):
        load_tissue_predictor("sam2", sam2_folder, device="cpu")


def test_without_a_config_it_is_hiera_tiny() -> None:
    from models.tissue_sam2 import _config

    config = _config(Path("/nowhere/config.json"))
    assert config.prompt_encoder_config.image_size == 1024
    assert config.vision_config.backbone_config.blocks_per_stage == [1, 2, 7, 2]
