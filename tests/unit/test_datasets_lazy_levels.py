"""Finer levels that are encoded when a model asks: only that, only once, the same as beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets.bags import BagDataset
from datasets.extraction import Extraction, Shard, _extract_shard
from datasets.extraction_plan import list_levels, plan_works
from datasets.features import FeatureStore
from datasets.lazy_levels import LazyLevels, encode_with, lazy_levels
from datasets.levels import find_level_roots, level_stores
from datasets.patches import SlidePatches
from datasets.table import SlideTable
from tests.feature_inputs import CHILDREN, Inputs, MeanColour, make_levels
from utils.errors import BrokenFile, ItemFailed, SlideError
from utils.report import RunReport
from utils.storage import read_h5

ENCODER = {"name": "mean", "weights_sha256": "0" * 64, "precision": "fp32"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Slides 0 and 2 with 3 and 2 coarse patches, and stored features of all levels."""
    inputs = make_levels(tmp_path_factory.mktemp("lazy") / "cohort")
    levels = list_levels(inputs.patches_root, features(inputs), CHILDREN)
    for level in levels:
        for name in ("h5_files", "pt_files"):
            (level.feat_dir / name).mkdir(parents=True)
    works = plan_works({f"slide_{n}": inputs.slides / f"slide_{n}.tif" for n in (0, 2)}, levels,
                       RunReport("features"), encoders={"": ENCODER}, backend="auto", redo=False,
                       allow_dropped=False)
    _extract_shard(Shard(tuple(works), "cpu"), extraction=Extraction(
        load={"": lambda device: MeanColour()}, batch_size=8, workers=1, bad_tiles="fail",
        redo=False))
    return inputs


def features(inputs: Inputs) -> Path:
    return inputs.patches_root.parent / "features"


class Counting:
    """Encodes with the mean colour and notes how many patches of which level it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.loads = 0
        self._encode = encode_with(self.load, batch_size=4)

    def load(self) -> MeanColour:
        self.loads += 1
        return MeanColour()

    def __call__(self, patches: SlidePatches) -> np.ndarray:
        self.seen.append((patches.level, len(patches)))
        return self._encode(patches)


def lazy(inputs: Inputs, cache: Path, encode: Any, **changes: Any) -> LazyLevels:
    return LazyLevels(
        slides={f"slide_{n}": inputs.slides / f"slide_{n}.tif" for n in (0, 2)},
        coords_roots=find_level_roots(inputs.patches_root, (1, 0)), encode=encode,
        encoder={**ENCODER, **changes}, cache_root=cache)


def bags(inputs: Inputs, children: Any = None) -> BagDataset:
    store = FeatureStore(features(inputs))
    stored = () if children else level_stores(store, (1, 0))
    table = SlideTable(("slide_0", "slide_2"), ("p", "q"), np.array([0, 1]), ("x", "y"))
    return BagDataset(table, store, cache="none", level_stores=stored, children=children)


def test_lazy_rows_equal_stored_ones(cohort: Inputs, tmp_path: Path) -> None:
    for stored, computed in zip(bags(cohort), bags(cohort, lazy(cohort, tmp_path, Counting())),
                                strict=True):
        for one, other in zip(stored.children, computed.children, strict=True):
            assert (len(one), one.branching) == (len(other), other.branching)
            np.testing.assert_array_equal(one.coords, other.coords)
            np.testing.assert_array_equal(one.valid, other.valid)
            rows = np.random.default_rng(0).permutation(len(one))[:5]
            np.testing.assert_allclose(other.read(rows), one.read(rows), atol=1e-4)


def test_only_what_is_asked_for_is_encoded_and_only_once(cohort: Inputs, tmp_path: Path) -> None:
    encode = Counting()
    children = lazy(cohort, tmp_path, encode)
    first, second = bags(cohort, children)[0].children
    assert encode.seen == [] and encode.loads == 0  # no encoder before the first patch
    found = first.read(np.array([7, 4, 5, 6]))
    again = first.read(np.array([5, 0, 7]))
    second.read(np.array([40]))
    name = cohort.patches_root.name
    assert encode.seen == [(f"{name}_level_1_corresponding", 4),
                           (f"{name}_level_1_corresponding", 1),
                           (f"{name}_level_0_corresponding", 1)]
    assert encode.loads == 1
    np.testing.assert_array_equal(again[[0, 2]], found[[2, 0]])
    summary = children.summary()
    assert (summary.rows, summary.asked, summary.encoded) == (12 + 48, 6, 6)
    assert str(summary) == ("6 of 60 finer patches were looked at (10.0%): 6 encoded, 0 from the "
                            "cache")


def test_a_second_run_reads_the_cache(cohort: Inputs, tmp_path: Path) -> None:
    rows = np.array([3, 1, 2])
    first = bags(cohort, lazy(cohort, tmp_path, Counting()))[0].children[0].read(rows)
    encode = Counting()
    children = lazy(cohort, tmp_path, encode)
    np.testing.assert_array_equal(bags(cohort, children)[0].children[0].read(rows), first)
    assert encode.seen == [] and children.summary().encoded == 0 and children.summary().asked == 3
    (path,) = tmp_path.rglob("*.h5")
    assert path.stem == "slide_0" and read_h5(path).arrays["rows"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("change", ["encoder", "damage"])
def test_a_cache_of_something_else_is_made_anew(cohort: Inputs, tmp_path: Path, change: str
                                                ) -> None:
    rows = np.array([3, 1])
    bags(cohort, lazy(cohort, tmp_path, Counting()))[0].children[0].read(rows)
    encode = Counting()
    changes = {"precision": "bf16"} if change == "encoder" else {}
    if change == "damage":
        (path,) = tmp_path.rglob("*.h5")
        path.write_bytes(path.read_bytes()[:200])
    bags(cohort, lazy(cohort, tmp_path, encode, **changes))[0].children[0].read(rows[:1])
    assert [count for _, count in encode.seen] == [1]


def test_failures_name_the_slide(cohort: Inputs, tmp_path: Path) -> None:
    def broken(patches: SlidePatches) -> np.ndarray:
        raise SlideError(f"{patches.slide_path}: no pixels")

    def nan(patches: SlidePatches) -> np.ndarray:
        return np.full((len(patches), 3), np.nan, np.float32)

    for encode, words in ((broken, "slide_0.tif: no pixels"), (nan, "slide_0.tif.*not finite")):
        with pytest.raises(ItemFailed, match=words):
            bags(cohort, lazy(cohort, tmp_path, encode))[0].children[0].read(np.array([0]))
    assert not list(tmp_path.rglob("*.h5"))
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with pytest.raises(ItemFailed, match="slide_0.h5: "):
        bags(cohort, lazy(cohort, blocked, Counting()))[0].children[0].read(np.array([0]))


def test_coordinates_that_do_not_correspond(cohort: Inputs, tmp_path: Path) -> None:
    store = FeatureStore(features(cohort))
    _, coords = store.read("slide_0")
    assert coords is not None
    settings: dict[str, Any] = {
        "slide_path": cohort.slides / "slide_0.tif", "encode": Counting(), "encoder": ENCODER,
        "coords_roots": find_level_roots(cohort.patches_root, (1, 0)), "cache_root": tmp_path}
    with pytest.raises(ItemFailed, match="slide_0: .*does not correspond to the level above"):
        lazy_levels("slide_0", coords + 1, 3, **settings)
    with pytest.raises(BrokenFile, match="slide_9.h5 is missing"):
        lazy_levels("slide_9", coords, 3, **settings)
    with pytest.raises(ItemFailed, match="slide_1: no slide file is known"):
        lazy(cohort, tmp_path, Counting())("slide_1", coords, 3)
    kept = lazy_levels("slide_0", coords[1:], 2, **settings)  # a coarse patch was unreadable
    assert [len(level) for level in kept] == [8, 32]
    whole = lazy_levels("slide_0", coords, 3, **settings)
    np.testing.assert_array_equal(kept[1].read(np.array([0, 31])),
                                  whole[1].read(np.array([16, 47])))
