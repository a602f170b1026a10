"""datasets/tissue_pairs.py: the table, the hold-out, images and masks at one scale."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.tissue_pairs import hold_out, load_example, overlap, read_pairs
from tests.slides import tissue_image, write_pyramid
from utils.errors import BrokenFile, ItemFailed, Refused


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


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
