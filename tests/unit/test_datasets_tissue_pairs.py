"""datasets/tissue_pairs.py and tissue_tiles.py: the table, the hold-out, what tiles look like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.tissue_pairs import Example, hold_out, load_example, overlap, read_pairs
from datasets.tissue_tiles import (
    TileSampler,
    blur_and_compress,
    change_light,
    change_stain,
    draw_pen,
    random_view,
    read_ahead,
)
from tests.slides import tissue_image, write_pyramid
from utils.errors import BrokenFile, ItemFailed, Refused


def example(seed: int = 0) -> Example:
    rgb = tissue_image(320, 240, seed=seed)
    return Example(rgb, np.ptp(rgb, axis=2) > 10)


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


# ---------------------------------------------------------------------------- pairs

def test_the_table(tmp_path: Path) -> None:
    path = table(tmp_path / "pairs.csv", "image,mask,mpp,patient", "a.png,a_mask.png,8,p1",
                 f"{tmp_path / 'elsewhere.svs'},b.geojson,,p1", "c.png,c.png,0.5,")
    pairs = read_pairs(path)
    assert [pair.image for pair in pairs] == [tmp_path / name for name in (
        "a.png", "elsewhere.svs", "c.png")]
    assert [pair.mpp_um for pair in pairs] == [8.0, None, 0.5]
    assert [pair.patient for pair in pairs] == ["p1", "p1", "c.png"]


@pytest.mark.parametrize(("lines", "message"), [
    (("image,truth", "a,b"), "no column 'mask'"), (("image,mask", "a,"), "line 2: image or mask"),
    (("image,mask,mpp", "a,b,8", "c,d,fine"), "line 3: mpp is 'fine'"),
    (("image,mask,mpp", "a,b,0"), "mpp is '0'"), (("image,mask", "a,b", "a,c"), "twice")])
def test_bad_tables(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(Refused, match=message):
        read_pairs(table(tmp_path / "pairs.csv", *lines))


def test_patients_are_held_out_whole(tmp_path: Path) -> None:
    path = table(tmp_path / "pairs.csv", "image,mask,patient",
                 *(f"{number}.png,m,p{number // 3}" for number in range(30)))
    pairs = read_pairs(path)
    train, held = hold_out(pairs, fraction=0.2, seed=1)
    assert len(held) == 6 and len(train) == 24
    assert not {pair.patient for pair in train} & {pair.patient for pair in held}
    assert hold_out(pairs, fraction=0.2, seed=1) == (train, held)
    assert hold_out(pairs, fraction=0.2, seed=2) != (train, held)
    assert len(hold_out(pairs, fraction=0.9, seed=1)[0]) == 3
    with pytest.raises(Refused, match=r"1 patient\(s\)"):
        hold_out(pairs[:3], fraction=0.2, seed=1)


def test_slides_and_pictures_come_at_one_scale(tmp_path: Path) -> None:
    image = tissue_image(1024, 768)
    truth = np.ptp(image, axis=2) > 10
    write_pyramid(tmp_path / "a.tif", image, mpp=2.0)
    Image.fromarray(image).save(tmp_path / "b.png")
    Image.fromarray(truth[::2, ::2]).save(tmp_path / "mask.png")
    rows = read_pairs(table(tmp_path / "pairs.csv", "image,mask,mpp", "a.tif,mask.png,",
                            "b.png,mask.png,2", "b.png/../b.png,mask.png,"))
    for pair in rows[:2]:
        found = load_example(pair, mpp_um=8.0)
        assert found.rgb.shape == (192, 256, 3) and found.mask.shape == (192, 256)
        assert overlap(found.mask, truth[2::4, 2::4])[0] > 0.97
    with pytest.raises(ItemFailed, match="column 'mpp' of --pairs"):
        load_example(read_pairs(table(tmp_path / "x.csv", "image,mask", "b.png,mask.png"))[0],
                     mpp_um=8.0)


def test_geojson_and_masks_of_another_shape(tmp_path: Path) -> None:
    Image.fromarray(tissue_image(400, 300)).save(tmp_path / "a.png")
    ring = [[0, 0], [200, 0], [200, 300], [0, 300], [0, 0]]
    (tmp_path / "a.geojson").write_text(json.dumps(
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}))
    Image.fromarray(np.zeros((400, 300), np.uint8)).save(tmp_path / "turned.png")
    good, bad = read_pairs(table(tmp_path / "p.csv", "image,mask,mpp", "a.png,a.geojson,8",
                                 f"{tmp_path}/./../{tmp_path.name}/a.png,turned.png,8"))
    mask = load_example(good, mpp_um=8.0).mask
    assert mask[:, :199].all() and not mask[:, 202:].any()
    with pytest.raises(BrokenFile, match="another shape"):
        load_example(bad, mpp_um=8.0)


def test_overlap() -> None:
    one, other = np.array([[1, 1, 0, 0]], bool), np.array([[0, 1, 1, 1]], bool)
    assert overlap(one, other) == (0.25, 0.4)
    assert overlap(~one & one, ~one & one) == (1.0, 1.0)


# ---------------------------------------------------------------------------- tiles

def test_batches_depend_on_seed_and_step_alone() -> None:
    examples = [example(0), example(1)]

    def batches(seed: int, epoch: int, workers: int) -> list[np.ndarray]:
        sampler = TileSampler(examples, tile_px=64, pen_frac=0.5, seed=seed)
        return [array for batch in read_ahead(sampler, epoch=epoch, steps=5, batch_size=3,
                                              workers=workers) for array in batch]

    first = batches(1, 0, 1)
    assert len(first) == 10 and first[0].shape == (3, 64, 64, 3) and first[0].dtype == np.uint8
    assert first[1].shape == (3, 64, 64) and set(np.unique(first[1])) == {0, 1}
    assert all(map(np.array_equal, first, batches(1, 0, 3)))
    for other in (batches(2, 0, 1), batches(1, 1, 1)):
        assert not any(map(np.array_equal, first[::2], other[::2]))
    assert not np.array_equal(first[0], first[2])


def test_views_turn_image_and_mask_alike() -> None:
    found = example()
    rng = np.random.default_rng(0)
    for _ in range(20):
        rgb, mask = random_view(found, np.array([160, 120]), 96, rng)
        assert overlap(np.ptp(rgb, axis=2) > 10, mask)[0] > 0.95
    rgb, mask = random_view(found, np.array([-500, -500]), 96, rng)
    assert (rgb == 255).all() and not mask.any()


@pytest.mark.parametrize("change", [change_stain, change_light, blur_and_compress])
def test_colours_change_within_reason(change: object) -> None:
    assert callable(change)
    rgb = example().rgb
    results = [change(rgb, np.random.default_rng(seed)) for seed in range(12)]
    for result in results:
        assert result.shape == rgb.shape and result.dtype == np.uint8
        assert result[:5, :5].mean() > 170  # glass stays light
        assert abs(result.astype(int) - rgb).mean() < 40
    assert any(not np.array_equal(result, rgb) for result in results)
    assert not all(np.array_equal(result, results[0]) for result in results)


def test_glass_takes_no_stain() -> None:
    white = np.full((4, 4, 3), 255, np.uint8)
    assert (change_stain(white, np.random.default_rng(0)) == 255).all()


def test_ink_is_no_tissue() -> None:
    rgb, mask = example().rgb[:96, :96], np.ones((96, 96), bool)
    inked, left = draw_pen(rgb, mask, np.random.default_rng(3))
    covered = ~left
    assert 20 < covered.sum() < mask.size
    changed = abs(inked.astype(int) - rgb).max(axis=2)
    assert changed[covered].mean() > 40 and (changed > 60)[left].mean() < 0.1


def test_share_of_pen_strokes() -> None:
    full = Example(example().rgb, np.ones((240, 320), bool))

    def inked(share: float) -> float:
        sampler = TileSampler([full], tile_px=64, pen_frac=share, seed=0)
        centre = np.array([160, 120])
        sampler._tissue = [centre[None]]
        return float((sampler.batch(0, 0, 40)[1] == 0).mean())

    assert inked(1.0) > inked(0.0) + 0.01


def test_slides_without_tissue_give_tiles_too() -> None:
    empty = Example(np.full((100, 80, 3), 240, np.uint8), np.zeros((100, 80), bool))
    tiles, truth = TileSampler([empty], tile_px=64, pen_frac=0.0, seed=0).batch(0, 0, 4)
    assert tiles.shape == (4, 64, 64, 3) and not truth.any()
