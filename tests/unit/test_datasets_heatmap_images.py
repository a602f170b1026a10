"""The map of a streaming model: what its squares say, and where on the slide they lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datasets.heatmap_config import HeatmapArguments, StreamingArguments
from datasets.heatmap_images import (
    ImageMaps,
    ImageScores,
    ImageTools,
    Source,
    add_to_squares,
    centres_on_slide,
    direct_mpp,
    pick_source,
    score_image,
)
from datasets.heatmap_items import HeatmapItem
from datasets.heatmap_scores import Outputs
from models.locality import make_steps
from models.stream_tiles import plan_tiles
from models.streaming import stream
from tests.slides import write_pyramid
from tests.streaming import TensorImage
from tests.streaming_network import tiny_network
from utils.contracts import Bag, SlideImage, SlideOutput
from utils.errors import ItemFailed, Refused
from utils.objectives import Classification
from wsi_core.heatmap import View, patch_boxes
from wsi_core.image_record import Box, ImageRecord
from wsi_core.presets import HEATMAP_DEFAULTS
from wsi_core.slide import open_slide
from wsi_core.slide_images import ImagePlan
from wsi_core.tissue import Tissue

STRIDE = 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OUTPUTS = Outputs(task_type="classification", names=("pale", "dark"))
CPU = torch.device("cpu")
SLIDE_MPP, IMAGE_MPP = 0.5, 1.3
PIECES = ((200, 150, 900, 850), (2600, 1900, 3300, 2500))  # x, y, x, y of tissue, level-0 px


class Encoder(nn.Module):
    """A convolution and pooling; dark input gives much of channel 0, light of channel 1."""

    mean, std = MEAN, STD

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 2, 5, padding=2, stride=2)
        light = torch.rand(3, 5, 5) / 75
        self.conv.load_state_dict({"weight": torch.stack([-light, light]),
                                   "bias": torch.full((2,), 3.0)})
        self.pool = nn.AvgPool2d(STRIDE // 2, ceil_mode=False)


class Darkness(nn.Module):
    """Class 1 is said to be there where positions are dark; they have the attention."""

    objective, contextual = Classification(n_classes=2), False

    def forward(self, bag: Bag) -> SlideOutput:
        dark = bag.features[:, 0].square()
        logits = torch.stack([bag.features[:, 1].mean() * 0, dark.mean()])[None]
        return SlideOutput(logits=logits, attention=dark[None])


class Model(nn.Module):
    """As ``StreamingCNN``, streamed in tiles that overlap."""

    stride, centre_px = STRIDE, (STRIDE / 2 - 0.5, STRIDE / 2 - 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mil = Encoder(), Darkness()
        self.objective = self.mil.objective
        self.windows: list[tuple[slice, slice]] = []

    def prepare(self, raw: Tensor) -> Tensor:
        values = (raw / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        return values.permute(2, 0, 1)[None]

    def map_of(self, image: SlideImage, *, slide_id: str, gradient_sink: Any = None) -> Tensor:
        steps = make_steps([("conv", self.encoder.conv), ("pool", self.encoder.pool)])
        model = self

        class Tiles:
            size, channels = image.size_px[::-1], 3

            def read(self, window: tuple[slice, slice]) -> Tensor:
                rows, columns = window
                return image.read(columns.start, rows.start, columns.stop - columns.start,
                                  rows.stop - rows.start)

            def prepare(self, raw: Tensor) -> Tensor:
                return model.prepare(raw)

        def sink(window: tuple[slice, slice], gradient: Tensor) -> None:
            self.windows.append(window)
            gradient_sink(window, gradient)

        plan = plan_tiles(steps, Tiles.size, (5 * STRIDE, 7 * STRIDE))
        return stream(steps, Tiles(), plan, gradient_sink=gradient_sink and sink)


def picture(pixels: np.ndarray) -> TensorImage:
    return TensorImage(torch.from_numpy(pixels))


def score(model: Any, image: Any, source: Source = "gradient", outputs: Outputs = OUTPUTS
          ) -> ImageScores:
    return score_image("s", image, model=model, device=CPU,
                       precision="fp32", outputs=outputs, source=source)


# ---------------------------------------------------------------------------- scores

@pytest.mark.parametrize("size", [(96, 120), (91, 117)])  # h, w; the stride divides it, or not
def test_the_gradient_of_tiles_that_overlap_is_that_of_the_whole_image(size: tuple[int, int]
                                                                       ) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    model = Model()
    found = score(model, picture(pixels))
    touched = np.zeros(size, int)
    for window in model.windows:
        touched[window] += 1
    assert (touched[:88, :112] > 0).all() and touched.max() > 1  # some of it several times

    raw = torch.from_numpy(pixels).float()
    x = model.prepare(raw).requires_grad_()
    features = model.encoder.pool(model.encoder.conv(x))
    rows = features[0].flatten(1).T
    logits = model.mil(Bag(slide_id="s", features=rows)).logits
    (gradient,) = torch.autograd.grad(logits[0, 1], x)
    assert logits.argmax() == 1
    share = (gradient * (x - model.prepare(torch.full_like(raw, 255)))).detach().sum(1)[0]
    expected = np.add.reduceat(np.add.reduceat(
        share.double().numpy(), range(0, size[0], STRIDE), 0), range(0, size[1], STRIDE), 1)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-9)
    assert found.centre_px == (4.0, 4.0)
    np.testing.assert_allclose(found.prediction, logits.softmax(1)[0].detach().numpy(), atol=1e-6)


def test_the_gradient_does_not_depend_on_the_tiles() -> None:
    """Of the model itself, by either way of holding what is computed."""
    image = picture(np.random.default_rng(1).integers(0, 256, (150, 200, 3), dtype=np.uint8))
    networks = (tiny_network(tile_size=128, store_maps="none"), tiny_network(tile_size=0))
    one, other = (score(network.eval().requires_grad_(False), image).scores
                  for network in networks)
    assert one.shape == (5, 7) and np.abs(one).min() > 0
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_white_has_no_score_and_other_outputs_have_their_own() -> None:
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:32, 24:40] = (200, 30, 90)
    found = score(Model(), picture(pixels)).scores
    assert (found[2:4, 3:5] > 0).all()  # dark things raise the logit of class 1
    found[2:4, 3:5] = 0
    assert not found.any()
    survival = score(Model(), picture(pixels), outputs=Outputs(task_type="survival", names=()))
    assert (survival.scores[2:4, 3:5] < 0).all()  # and lower the first score, here of class 0


def test_a_map_without_gradient_is_nothing_everywhere() -> None:
    model = Model()
    for weights in model.parameters():
        nn.init.zeros_(weights)
    assert not score(model, picture(np.zeros((64, 64, 3), np.uint8))).scores.any()


def test_pieces_are_added_to_their_squares() -> None:
    sums = torch.zeros(2, 3)
    add_to_squares(sums, torch.ones(5, 4), (slice(3, 8), slice(6, 10)), stride_px=4)
    add_to_squares(sums, torch.ones(1, 12), (slice(0, 1), slice(0, 12)), stride_px=4)
    assert sums.tolist() == [[4, 4 + 2, 4 + 2], [0, 8, 8]]


# ---------------------------------------------------------------------------- places

def test_squares_between_pieces_are_left_out_and_others_led_back() -> None:
    record = ImageRecord(
        slide_id="s", slide={}, slide_size=(1000, 800), slide_mpp_um=(0.5, 0.5), mpp_um=1.0,
        size_px=(40, 16), frame_px=(500, 400), cell_px=64, parameters={}, boxes=(
            Box(0, 0, 20, 16, 100.0, 60.0, 40.0, 32.0),
            Box(28, 0, 12, 8, 700.0, 500.0, 24.0, 16.0)))
    scored = ImageScores(prediction=np.ones(2), scores=np.zeros((2, 5)), centre_px=(4.0, 4.0))
    found = centres_on_slide(record, scored, stride_px=8).reshape(2, 5, 2)
    assert found[0, 0].tolist() == [108, 68] and found[1, 2].tolist() == [140, 84]
    assert found[0, 4].tolist() == [716, 508]  # centre 36, 4 of the image: 8 px into the second
    assert found[0, 3].tolist() == [700, 508]  # centre 28: an edge belongs to its piece
    assert np.isnan(found[1, 3:]).all()  # below the second piece


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide with two pieces of tissue, a dark square in the second, and its packed image."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.full((2700, 3500, 3), 245, np.uint8)
    for left, top, right, bottom in PIECES:
        pixels[top:bottom, left:right] = (190, 150, 200)
    pixels[2201:2201 + 60, 2903:2903 + 60] = (20, 10, 30)
    write_pyramid(folder / "s.tif", pixels, mpp=SLIDE_MPP, quality=100)
    boxes = [np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
             for left, top, right, bottom in PIECES]
    plan = ImagePlan(folder=folder / "slide_images", image_mpp=IMAGE_MPP, quality=None)
    plan.folder.mkdir()
    with open_slide(folder / "s.tif") as slide:
        record = plan.make(slide, "s", Tissue([box[:, None] for box in boxes], [[], []]),
                           slide_mpp=(SLIDE_MPP, SLIDE_MPP), parameters={"made": "so"})
    assert record is not None and len(record.boxes) == 2
    return folder


Open = Callable[..., Any]


@pytest.fixture
def maps(images: Path, tmp_path: Path) -> Iterator[Open]:
    """Opens the slide's ``ImageMaps``."""
    with open_slide(images / "s.tif") as slide:
        def run(source: Source = "gradient", **other: Any) -> ImageMaps:
            model = Model()
            tools = ImageTools(
                score=lambda slide_id, image: score(model, image, source), source=source,
                model={"sha256": "a"}, outputs=OUTPUTS, stride_px=STRIDE, mpp_um=None,
                slide_images=images / "slide_images")
            item = HeatmapItem(slide_id="s", slide_path=images / "s.tif", label="x",
                               segmentation=replace(HEATMAP_DEFAULTS, a_t=0.1, a_h=0.01))
            return ImageMaps(item, slide, folder=tmp_path, heatmap=HeatmapArguments(),
                             tools=replace(tools, **other))

        yield run


@pytest.mark.parametrize("folder", [True, False], ids=["prepared", "direct"])
@pytest.mark.parametrize("source", ["attention", "gradient"])
def test_a_planted_square_has_the_highest_score_at_its_place(
    maps: Open, source: Source, folder: bool
) -> None:
    """Through the packed layout, at a scale that does not fit the slide's pixels."""
    found = maps(source, **({} if folder else {"slide_images": None, "mpp_um": IMAGE_MPP}))
    coarse = found.coarse
    assert coarse is not None and found.fine is coarse
    side = np.array(found.patch_px_l0)
    np.testing.assert_allclose(side, STRIDE * IMAGE_MPP / SLIDE_MPP, rtol=1e-3)
    centre = coarse.coords[coarse.scores.argmax()] + side / 2
    assert (np.abs(centre - (2933, 2231)) < 30).all()
    highest = coarse.coords[np.argsort(-coarse.scores)[:4]] + side / 2
    assert (np.abs(highest - (2933, 2231)) < 30 + side).all()
    for left, top, right, bottom in PIECES:  # both pieces, glass around them, and no more
        inside = ((coarse.coords > (left - 400, top - 400))
                  & (coarse.coords < (right + 400, bottom + 400))).all(axis=1)
        assert inside.sum() > (right - left) * (bottom - top) / side.prod() * 0.9
        coarse.coords[inside] = -1
    assert (coarse.coords == -1).all()


def test_the_pieces_of_the_image_stand_in_for_tissue_that_is_not_found(maps: Open) -> None:
    """The image may have been made with other settings than those of the heatmap's list."""
    found = maps()
    assert len(found.tissue.contours) == 2 and len(found.tissue.contours[0]) > 4
    blind = maps()
    blind.item = replace(blind.item, segmentation=replace(HEATMAP_DEFAULTS, a_t=1e6))
    assert [len(outline) for outline in blind.tissue.contours] == [4, 4]
    assert blind.coarse is not None


@pytest.mark.parametrize("downsample", [1.0, 1.7, 2.0])
def test_squares_touch_in_every_picture(maps: Open, downsample: float) -> None:
    """Their sides are no whole pixels of the slide; none overlaps its neighbour either."""
    found = maps()
    view = View((0.0, 0.0), (downsample, downsample), (3500, 2700))
    boxes = patch_boxes(view, found.coarse.coords, found.patch_px_l0)
    drawn = np.zeros((2700, 3500), int)
    for left, top, right, bottom in boxes.tolist():
        drawn[top:bottom, left:right] += 1
    assert drawn.max() == 1 and len({int(width) for width in boxes[:, 2] - boxes[:, 0]}) > 1
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    assert (np.diff(rows) > 1).sum() <= 1 and (np.diff(columns) > 1).sum() <= 1  # two pieces


def test_nothing_is_scored_twice_and_other_sources_images_models_are(maps: Open) -> None:
    assert maps().coarse is not None

    def never(slide_id: str, image: SlideImage) -> ImageScores:
        raise AssertionError("scored again")

    again = maps(score=never)
    assert again.coarse is not None and again.coarse.parameters["tissue"]["a_t"] == 0.1
    assert again.made == 0
    others: list[dict[str, Any]] = [{"source": "attention"}, {"model": {"sha256": "b"}},
                                    {"slide_images": None, "mpp_um": IMAGE_MPP}]
    for other in others:
        with pytest.raises(AssertionError, match="scored again"):
            _ = maps(**{"score": never, **other}).coarse


def test_a_slide_that_takes_too_much_memory_fails_alone(maps: Open) -> None:
    def refuse(slide_id: str, image: SlideImage) -> ImageScores:
        raise Refused("an image of 9 x 9 px takes 9 GB at least")

    with pytest.raises(ItemFailed, match="^s: an image of 9 x 9 px takes 9 GB at least$"):
        _ = maps(score=refuse).coarse


def test_images_that_are_missing_or_of_another_slide(
    maps: Open, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ItemFailed, match=r"s: has no image in .* \(s.json\): make it with"):
        maps(slide_images=tmp_path)
    text = (images / "slide_images/s.json").read_text()
    (tmp_path / "s.json").write_text(text.replace("3500", "3400"))
    with pytest.raises(ItemFailed, match="one of a slide of 3400 x 2700 px, .* has 3500 x 2700"):
        maps(slide_images=tmp_path)
    found = json.loads(text)
    found["slide"]["slide_bytes"] += 1
    (tmp_path / "s.json").write_text(json.dumps(found))
    with pytest.raises(ItemFailed, match="one of a slide of .* bytes, .* has .*: make it again"):
        maps(slide_images=tmp_path)


# ---------------------------------------------------------------------------- what is asked for

def test_the_source() -> None:
    assert pick_source(None, has_attention=True) == "attention"
    assert pick_source(None, has_attention=False) == "gradient"
    assert pick_source("gradient", has_attention=True) == "gradient"
    with pytest.raises(Refused, match="source is attention, but the head of this model has none"):
        pick_source("attention", has_attention=False)


@pytest.mark.parametrize(("asked", "trained", "expected"), [
    ({"image_mpp": 2.0}, {"mpp_um": [4.0]}, 2.0), ({}, {"mpp_um": [4.0]}, 4.0),
    ({"slide_images": Path("x")}, {"mpp_um": [4.0]}, None), ({}, {}, "nothing known"),
    ({}, {"mpp_um": [1.0, 4.0]}, "1.0 and 4.0")])
def test_the_scale_of_slides_that_are_read_themselves(
    asked: dict[str, Any], trained: dict[str, Any], expected: float | str | None
) -> None:
    wrong = isinstance(expected, str)
    refused = pytest.raises(Refused, match=f"one scale of its images .{expected}")
    with refused if wrong else nullcontext():
        assert direct_mpp(StreamingArguments(**asked), trained) == expected
