"""OME-Zarr folders of both versions of NGFF that are in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.slides import tissue_image
from utils.errors import SlideError
from wsi_core.slide import fingerprint, open_slide, read_overview

WHITE = (255, 255, 255)
IMAGE = tissue_image(523, 411)


def ome_zarr(path: Path, image: np.ndarray = IMAGE, *, version: str = "0.4", axes: str = "cyx",
             unit: str | None = "micrometer", scale: float = 0.5, inside: str = "",
             **how: Any) -> Path:
    """``image`` (h, w[, c]) as a multiscale of three levels, in the order of ``axes``."""
    import zarr

    zarr_format = 3 if version == "0.5" else 2
    root = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    group = root.create_group(inside) if inside else root
    datasets = []
    for level in range(3):
        step = 2**level
        pixels = image[::step, ::step].reshape(*image[::step, ::step].shape[:2], -1)
        stored = np.moveaxis(pixels, 2, 0) if "c" in axes else pixels[..., 0]
        stored = stored.reshape((1,) * (len(axes) - stored.ndim) + stored.shape)
        if axes == "tczyx":
            stored = stored.reshape(1, stored.shape[2], 1, *stored.shape[3:])
        chunks = tuple(128 if name in "yx" else 1 for name in axes)
        array = group.create_array(str(level), shape=stored.shape, dtype=stored.dtype,
                                   chunks=chunks, **how)
        array[:] = stored
        sizes = [scale * step if name in "yx" else 1.0 for name in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [
            {"type": "scale", "scale": sizes}]})
    kinds = {"c": "channel", "t": "time"}
    listed = [{"name": name, "type": kinds.get(name, "space"),
               **({"unit": unit} if unit and name in "yx" else {})} for name in axes]
    multiscales = [{"version": version, "axes": listed, "datasets": datasets}]
    if version == "0.5":
        group.attrs["ome"] = {"version": version, "multiscales": multiscales}
    else:
        group.attrs["multiscales"] = multiscales
    if inside:
        root.attrs["bioformats2raw.layout"] = 3
    return path


@pytest.mark.parametrize("how", [
    {}, {"version": "0.5"}, {"version": "0.5", "shards": (3, 256, 256)}, {"axes": "tczyx"},
    {"inside": "0"}, {"scale": 500.0, "unit": "nanometer"}], ids=str)
def test_levels_pixels_and_pixel_size(tmp_path: Path, how: dict[str, Any]) -> None:
    with open_slide(ome_zarr(tmp_path / "a.zarr", **how)) as slide:
        assert slide.backend == "zarr"
        assert slide.level_dimensions == ((523, 411), (262, 206), (131, 103))
        assert (slide.mpp_um, slide.mpp_source) == ((0.5, 0.5), "ome-zarr")
        for level, step in enumerate((1, 2, 4)):
            image = slide.read_region((0, 0), level, slide.level_dimensions[level])
            assert np.array_equal(image, IMAGE[::step, ::step])
        region = slide.read_region((-10, 400), 0, (40, 40), background=WHITE)
        assert np.array_equal(region[:11, 10:], IMAGE[400:, :30])
        assert (region[11:] == 255).all() and (region[:, :10] == 255).all()
        assert read_overview(slide, 4)[0].shape == (103, 131, 3)


def test_grey_becomes_rgb(tmp_path: Path) -> None:
    grey = np.ascontiguousarray(IMAGE[..., 1])
    with open_slide(ome_zarr(tmp_path / "a.zarr", grey, axes="yx")) as slide:
        assert np.array_equal(slide.read_region((0, 0), 0, (523, 411)), np.dstack([grey] * 3))


def test_a_scale_of_the_whole_picture_counts_too(tmp_path: Path) -> None:
    import zarr

    path = ome_zarr(tmp_path / "a.zarr", scale=1.0)
    group = zarr.open_group(path, mode="a")
    picture = group.attrs["multiscales"][0]  # type: ignore[index,call-overload]
    picture["coordinateTransformations"] = [{"type": "scale", "scale": [1, 0.25, 0.25]}]
    group.attrs["multiscales"] = [picture]
    with open_slide(path) as slide:
        assert slide.mpp_um == (0.25, 0.25)


def test_a_scale_without_a_unit_is_no_pixel_size(tmp_path: Path) -> None:
    with open_slide(ome_zarr(tmp_path / "a.zarr", unit=None)) as slide:
        assert slide.mpp_um is None


@pytest.mark.parametrize("how", [{}, {"version": "0.5", "shards": (3, 128, 128)}], ids=str)
def test_chunks_that_are_not_stored(tmp_path: Path, how: dict[str, Any]) -> None:
    """As what a scanner left out: the background, unless the file says which colour they have."""
    for fill, colour in ((0, 255), (243, 243)):
        path = ome_zarr(tmp_path / f"{fill}.zarr", fill_value=fill, **how)
        files = list(path.glob("0/0.0.1")) + list(path.glob("0/1.0.1")) + list(
            path.glob("0/2.0.1")) + list(path.glob("0/c/0/0/1"))
        assert files
        for file in files:
            file.unlink()
        with open_slide(path) as slide:
            image = slide.read_region((0, 0), 0, (523, 411), background=WHITE)
        assert (image[:128, 128:256] == colour).all()
        assert np.array_equal(image[:, :128], IMAGE[:, :128])


def test_a_damaged_chunk_fails_alone(tmp_path: Path) -> None:
    path = ome_zarr(tmp_path / "a.zarr")
    chunk = path / "0/1.0.1"
    before = fingerprint(path)
    chunk.write_bytes(chunk.read_bytes()[:20])
    assert fingerprint(path) != before
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(SlideError, match=r"a\.zarr.*\(130, 0\) of level 0") as caught:
                slide.read_region((130, 0), 0, (64, 64))
            assert "\n" not in str(caught.value)
            slide.read_region((0, 0), 0, (128, 128))


@pytest.mark.parametrize(("image", "how", "words"), [
    (IMAGE.astype(np.uint16), {}, "uint8"), (np.dstack([IMAGE] * 2), {}, "1 or 3 channels"),
    (IMAGE, {"axes": "zyx"}, "")])
def test_pixels_of_other_kinds(tmp_path: Path, image: np.ndarray, how: dict[str, Any], words: str
                               ) -> None:
    path = ome_zarr(tmp_path / "a.zarr", image, **how)
    if not words:  # one z plane is a picture
        open_slide(path).close()
        return
    with pytest.raises(SlideError, match=words):
        open_slide(path)


def test_what_is_no_ome_zarr(tmp_path: Path) -> None:
    import zarr

    (tmp_path / "empty.zarr").mkdir()
    zarr.open_group(tmp_path / "bare.zarr", mode="w")
    zarr.open_group(tmp_path / "odd.zarr", mode="w").attrs["multiscales"] = [{"axes": 3}]
    for name in ("empty.zarr", "bare.zarr", "odd.zarr"):
        with pytest.raises(SlideError, match=name) as caught:
            open_slide(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(SlideError, match="use 'auto'"):
        open_slide(tmp_path / "bare.zarr", backend="openslide")


def test_an_array_that_announces_an_absurd_size(tmp_path: Path) -> None:
    """B15."""
    import zarr

    path = ome_zarr(tmp_path / "a.zarr")
    zarr.open_group(path, mode="a").create_array(
        "0", shape=(3, 2**31, 2**31), chunks=(1, 128, 128), dtype="u1", overwrite=True)
    with pytest.raises(SlideError, match="announces"):
        open_slide(path)
    zarr.open_group(path, mode="a").create_array(
        "0", shape=(3, 60_000, 60_000), chunks=(1, 60_000, 60_000), dtype="u1", overwrite=True)
    with pytest.raises(SlideError, match="over the ceiling"):
        open_slide(path)
