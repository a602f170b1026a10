"""The encoder of an end-to-end model as a patch encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.patch_streams import HeldPatches
from models.e2e_patches import aggregator, end_to_end_encoder
from models.encoder_choice import choose_encoders
from models.encoder_registry import ENCODERS, register
from models.encoders import encoder_record, load_encoder, matching_encoder
from models.slide_encoders import load_slide_encoder
from models.trained import load_as_described
from tests.heatmap_project import write_described
from utils.contracts import Bag
from utils.errors import Refused
from utils.storage import file_sha256

SIDE_PX = 64
MODEL = "e2e_test_resnet_abmil"



def bag_of(patches: torch.Tensor) -> Bag:
    return Bag(slide_id="s", features=torch.zeros(len(patches), 0), patches=HeldPatches((patches,)))


def noise(count: int, side_px: int) -> torch.Tensor:
    """Patches that differ in brightness and colour too."""
    rng = np.random.default_rng(side_px)
    tint = rng.integers(0, 180, (count, 1, 1, 3))
    grain = rng.integers(0, 70, (count, side_px, side_px, 3))
    return torch.from_numpy((tint + grain).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rgb.pt, other.pt (other weights), bgr.pt; plain.pt has no encoder."""
    root = tmp_path_factory.mktemp("models") / "exp_s1"
    root.mkdir()
    for seed, name in enumerate(("rgb", "other", "bgr")):
        write_described(root / f"{name}.pt", MODEL, seed=seed, options={
            "img_size": SIDE_PX, "p_batch_size_v": 7,
            "channels": "BGR" if name == "bgr" else "RGB"})
    write_described(root / "plain.pt", "abmil")
    return root


@pytest.mark.parametrize("name", ["rgb", "bgr"])
@pytest.mark.parametrize("side_px", [SIDE_PX, 96])
def test_features_and_scores_are_those_of_the_model(folder: Path, name: str, side_px: int) -> None:
    """Of the stored size as of another one, in whatever batches."""
    path, patches = folder / f"{name}.pt", noise(20, side_px)
    model: Any = load_as_described(path).build().eval()
    with torch.no_grad():
        expected, output = model.features(HeldPatches((patches,))), model(bag_of(patches))
    assert expected.std(dim=0).max() > 1e-3  # patches differ
    encoder = load_encoder(f"e2e:{path}")
    found = encoder.encode(patches)
    assert encoder.dim == found.shape[1] == 96 and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode(patches[:3]), found[:3], atol=1e-5, rtol=1e-5)
    turned = load_encoder(f"e2e:{path}").encode(patches.flip(-1))
    assert (turned - expected).abs().max() > 1e-3  # the order of the channels counts

    trained, mil = aggregator(load_as_described(path), model)
    with torch.no_grad():
        again = mil(Bag(slide_id="s", features=found))
    torch.testing.assert_close(again.logits, output.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.attention, output.attention, atol=1e-5, rtol=1e-5)


def test_a_built_model_lends_its_encoder(folder: Path) -> None:
    """The very module, in eval mode, with the record of the one that is loaded by name."""
    trained = load_as_described(folder / "rgb.pt")
    model: Any = trained.build().train()
    lent = end_to_end_encoder(trained, model, device=torch.device("cpu"), precision="fp32")
    loaded = load_encoder(f"e2e:{folder / 'rgb.pt'}")
    patches = noise(5, 80)
    torch.testing.assert_close(lent.encode(patches), loaded.encode(patches))
    assert lent.record() == loaded.record() and not model.encoder.training
    assert not any(value.requires_grad for value in model.encoder.parameters())


def test_record_says_what_decides_the_features(folder: Path) -> None:
    path = folder / "rgb.pt"
    record = encoder_record(f"e2e:{path}")
    sha256 = file_sha256(path)
    assert record == load_encoder(f"e2e:{path}").record()
    assert (record["name"], record["weights_sha256"]) == (f"e2e:{MODEL}-{sha256[:8]}", sha256)
    assert (record["target_px"], record["channels"], record["precision"]) == (
        SIDE_PX, "RGB", "fp32")
    assert encoder_record(f"e2e:{path}", precision="bf16")["precision"] == "bf16"
    assert encoder_record(f"e2e:{path}", target_px=SIDE_PX) == record
    turned = encoder_record(f"e2e:{folder / 'bgr.pt'}")
    assert turned["channels"] == "BGR"


def test_precision_is_that_of_the_network(folder: Path) -> None:
    patches, name = noise(6, SIDE_PX), f"e2e:{folder / 'rgb.pt'}"
    exact, short = (load_encoder(name, precision=kind).encode(patches)
                    for kind in ("fp32", "bf16"))
    assert 0 < (exact - short).abs().max() < 0.1 * exact.abs().max()


def test_folds_are_encoders_of_different_names(folder: Path) -> None:
    names = [f"e2e:{folder / name}.pt" for name in ("rgb", "other")]
    chosen = choose_encoders(names, (), target_px=None, precision="fp32", device="cpu", plugins=(),
                             trust_remote_code=False)
    assert len(chosen) == 2 and all(name.startswith(f"e2e:{MODEL}-") for name in chosen)
    first, second = (one.load(device="cpu").encode(noise(4, SIDE_PX)) for one in chosen.values())
    assert (first - second).abs().max() > 1e-3


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(Refused, match=r"there is no checkpoint none.pt: give the s_k_checkpoint"):
        load_encoder("e2e:none.pt")
    with pytest.raises(Refused, match="plain.pt': that is a abmil, which has no encoder"):
        load_encoder(f"e2e:{folder / 'plain.pt'}")
    (folder / "bare.pt").write_bytes((folder / "rgb.pt").read_bytes())
    with pytest.raises(Refused, match="bare.json is missing beside it"):
        load_encoder(f"e2e:{folder / 'bare.pt'}")
    with pytest.raises(Refused, match="sees its patches at 64 px, as in its training, not at 224"):
        load_encoder(f"e2e:{folder / 'rgb.pt'}", target_px=224)
    with pytest.raises(Refused, match="comes with its weights .*: leave --encoder_ckpt out"):
        load_encoder(f"e2e:{folder / 'rgb.pt'}", checkpoint=folder / "other.pt")
    with pytest.raises(Refused, match="do not begin with timm: or e2e:"):
        register(replace(ENCODERS.get("uni_v1"), name="e2e:mine", aliases=()))


def test_features_are_matched_with_their_encoder(folder: Path) -> None:
    """Their record holds no place, so the checkpoint is given; another one is refused."""
    path = folder / "rgb.pt"
    record = load_encoder(f"e2e:{path}").record()
    again = matching_encoder(record, checkpoint=path)()
    assert again.record() == record
    with pytest.raises(Refused, match="is not the one that made the features"):
        matching_encoder(record, checkpoint=folder / "other.pt")
    with pytest.raises(Refused, match="--encoder_ckpt PATH"):
        matching_encoder(record)


def test_an_aggregator_takes_the_features_of_its_own_encoder(folder: Path) -> None:
    own, other = (load_encoder(f"e2e:{folder / name}.pt") for name in ("rgb", "other"))
    trained = load_as_described(folder / "rgb.pt")
    described, _ = aggregator(trained, trained.build())
    described.check_features(96, own.record())
    with pytest.raises(Refused, match="was trained on features of encoder name e2e:"):
        described.check_features(96, other.record())
    plain = load_as_described(folder / "plain.pt")
    model = plain.build()
    assert aggregator(plain, model) == (plain, model)


def test_slide_vectors_of_an_end_to_end_model(folder: Path) -> None:
    path, patches = folder / "rgb.pt", noise(9, SIDE_PX)
    vectors = load_slide_encoder(f"checkpoint:{path}")
    encoder = load_encoder(f"e2e:{path}")
    vectors.check(encoder.dim, encoder.record())
    with pytest.raises(Refused, match="encoder name"):
        vectors.check(encoder.dim, {"name": "resnet50_trunc"})
    model = load_as_described(path).build().eval()
    with torch.no_grad():
        expected = model(bag_of(patches)).embedding[0]
    found = vectors.encode(encoder.encode(patches).numpy(), np.zeros((9, 2), np.int64))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
