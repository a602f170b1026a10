"""wsi_core/mask_files.py: what is written is read back; masks of others; damaged files."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.errors import BrokenFile
from utils.storage import State
from wsi_core.mask_files import (
    draw_tissue,
    find_mask,
    mask_state,
    read_mask,
    resample_mask,
    write_mask,
)
from wsi_core.tissue import Tissue

PARAMETERS = {"segmenter": {"name": "sam2", "threshold": 0.5}, "slide_name": "größe.svs"}


def half() -> np.ndarray:
    """(30, 40), tissue in the left half."""
    mask = np.zeros((30, 40), bool)
    mask[:, :20] = True
    return mask


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_mask(path, half(), parameters=PARAMETERS)
    found = read_mask(path, slide_size=(4000, 3000))
    assert (found.mask == half()).all() and found.parameters == PARAMETERS
    assert set(np.unique(np.asarray(Image.open(path)))) == {0, 255}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_probabilities_are_cut_at_a_half(tmp_path: Path) -> None:
    write_mask(tmp_path / "a.png", np.array([[0.49, 0.5], [0.0, 1.0]], np.float32), parameters={})
    assert read_mask(tmp_path / "a.png").mask.tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA"])
@pytest.mark.parametrize("value", [1, 255])
def test_masks_of_others(tmp_path: Path, mode: str, value: int) -> None:
    image = Image.fromarray(half().astype(np.uint8) * value)
    if mode == "1":
        image = image.point(lambda level: 255 if level else 0)
    image.convert(mode).save(tmp_path / "a.png")
    found = read_mask(tmp_path / "a.png")
    assert (found.mask == half()).all() and found.parameters is None


def test_transparent_pixels_are_no_tissue(tmp_path: Path) -> None:
    pixels = np.full((4, 4, 4), 255, np.uint8)
    pixels[:2, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").mask.sum() == 8


def test_shape_of_the_slide(tmp_path: Path) -> None:
    write_mask(tmp_path / "a.png", half(), parameters={})
    read_mask(tmp_path / "a.png", slide_size=(40_400, 30_000))  # 1 % off
    with pytest.raises(BrokenFile, match="40 x 30 px, another shape than the slide's 30000 x"):
        read_mask(tmp_path / "a.png", slide_size=(30_000, 40_000))


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_mask(path, np.random.default_rng(0).random((200, 200)) > 0.5, parameters=PARAMETERS)
    whole = path.read_bytes()
    for data in (whole[:len(whole) // 2], whole[:20], b"", b"no picture", flipped(whole)):
        path.write_bytes(data)
        with pytest.raises(BrokenFile, match=r"a\.png cannot be read as a PNG mask"):
            read_mask(path)
        assert mask_state(path, PARAMETERS) is State.BROKEN
    with pytest.raises(BrokenFile, match="missing"):
        read_mask(tmp_path / "b.png")
    Image.fromarray(np.zeros((3, 3), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(BrokenFile, match="8 bits"):
        read_mask(tmp_path / "deep.png")


def flipped(data: bytes) -> bytes:
    """One bit in the middle of the pixels is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


@pytest.mark.parametrize("side", [14_000, 30_000])  # below and above Pillow's own limit
def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (len(data).to_bytes(4, "big") + kind + data
                + zlib.crc32(kind + data).to_bytes(4, "big"))

    size = side.to_bytes(4, "big") * 2
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([8, 0, 0, 0, 0]))
        + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(BrokenFile, match="ceiling"):
        read_mask(tmp_path / "a.png")


def test_state_compares_parameters(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert mask_state(path, PARAMETERS) is State.MISSING
    write_mask(path, half(), parameters=PARAMETERS)
    assert mask_state(path, PARAMETERS) is State.DONE
    assert mask_state(path, {**PARAMETERS, "mpp": 0.5}) is State.OTHER
    Image.open(path).copy().save(path)  # as an editor does, without the record
    assert mask_state(path, PARAMETERS) is State.FOREIGN


@pytest.mark.parametrize("size", [(20, 15), (80, 60), (40, 30), (57, 11)])
def test_resampling_keeps_the_tissue_where_it_is(size: tuple[int, int]) -> None:
    found = resample_mask(half(), size)
    assert found.shape == size[::-1] and found.dtype == bool
    columns = (np.arange(size[0]) + 0.5) / size[0]
    sure = abs(columns - 0.5) > 0.5 / size[0]
    assert (found == (columns < 0.5))[:, sure].all()


def test_names_in_use(tmp_path: Path) -> None:
    assert find_mask(tmp_path, "a") == tmp_path / "a.png"
    for name in ("a.geojson", "a_mask_bw.png", "a_mask.png", "a.png"):
        (tmp_path / name).touch()
        assert find_mask(tmp_path, "a").name == name


def square(low: int, high: int) -> list[list[int]]:
    return [[low, low], [high, low], [high, high], [low, high], [low, low]]


def drawn(path: Path, *rings: list[list[int]], kind: str) -> None:
    """A GeoJSON of polygons: tissue with a hole, and the last ring of class ``kind``."""
    geometries = [(rings[:-1], "Tissue"), (rings[-1:], kind)]
    path.write_text(json.dumps([{"type": "Feature", "geometry": {
        "type": "Polygon", "coordinates": found}, "properties": {"classification": {"name": name}}}
        for found, name in geometries if found]))


def test_polygons_become_a_mask(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    drawn(path, square(0, 500), square(100, 200), square(400, 900), kind="Ignore*")
    mask = read_mask(path, slide_size=(1000, 2000)).mask
    assert mask.shape == (2000, 1000) and mask[300, 300] and not mask[600, 300]
    assert not mask[150, 150] and not mask[450, 450]
    assert abs(mask.sum() - (500**2 - 100**2 - 100**2)) < 3000
    with pytest.raises(BrokenFile, match="size is known"):
        read_mask(path)
    drawn(path, square(0, 500), kind="Region*")
    with pytest.raises(BrokenFile, match="no tissue"):
        read_mask(path, slide_size=(1000, 2000))


def test_a_piece_inside_a_hole_is_kept() -> None:
    inner, hole, outer = (np.array(square(*span)[:4], np.int32)
                          for span in ((400, 600), (200, 800), (0, 999)))
    tissue = Tissue([inner, outer], [[], [hole]])
    mask = draw_tissue(tissue, (1000, 1000), (100, 100))
    assert mask[50, 50] and not mask[30, 30] and mask[10, 10]
