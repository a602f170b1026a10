"""One child's work on its slides, sharing out, and what is done after a crash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import datasets.extraction
import datasets.patch_readers
from datasets.extraction import (
    Extraction,
    Shard,
    Work,
    _after_crash,
    _extract_shard,
    cluster_tasks,
    extract,
    share_out,
)
from datasets.extraction_plan import list_levels, plan_works
from datasets.feature_files import (
    feature_parameters,
    inspect_features,
    mend_pt,
    needed_bytes,
    pt_path,
)
from datasets.patches import SlidePatches
from tests.feature_inputs import (
    CHILDREN,
    Inputs,
    MeanColour,
    grid_coords,
    load_mean_colour,
    make_inputs,
    make_levels,
    write_patches,
)
from utils.errors import Refused, SlideError
from utils.locks import claim, lock_path
from utils.parallel import run_items
from utils.report import Row, RunReport, Status
from utils.storage import State, read_h5
from wsi_core.coords import read_coords
from wsi_core.hierarchy import Child, level_folder
from wsi_core.slide import fingerprint

ENCODER = {"name": "mean", "weights_sha256": "0" * 64, "precision": "fp32"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs") / "cohort")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("h5_files", "pt_files"):
        (tmp_path / name).mkdir()
    return tmp_path


def works(inputs: Inputs, folder: Path, **changes: Any) -> list[Work]:
    found = []
    for number in range(3):
        slide_id, path = f"slide_{number}", inputs.slides / f"slide_{number}.tif"
        coords = read_coords(inputs.patches_root / "patches" / f"{slide_id}.h5")
        found.append(Work(
            patches=SlidePatches(slide_id=slide_id, slide_path=path, coords=coords.coords,
                                 patch_level=0, patch_size=64, output_size=64),
            feat_dir=folder, parameters=feature_parameters(coords, encoder={**ENCODER, **changes},
                                          slide=fingerprint(path)),
            mpp_um=0.5, footprint_px_l0=(64, 64)))
    return found


def extraction(**changes: Any) -> Extraction:
    settings: dict[str, Any] = {
        "load": lambda device: MeanColour(), "batch_size": 8, "workers": 1,
        "bad_tiles": "fail", "redo": False, **changes}
    if callable(settings["load"]):
        settings["load"] = {"": settings["load"]}
    return Extraction(**settings)


def run(todo: Sequence[Work], settings: Extraction) -> dict[str, Row]:
    result = _extract_shard(Shard(tuple(todo), "cpu"), extraction=settings)
    assert not result.refused
    return {row.item: row for row in result.rows}


def statuses(rows: dict[str, Row]) -> list[Status]:
    return [rows[f"slide_{number}"].status for number in range(3)]


def test_every_slide_has_its_files_and_its_row(inputs: Inputs, folder: Path) -> None:
    todo = works(inputs, folder)
    rows = run(todo, extraction())
    assert statuses(rows) == [Status.DONE, Status.EMPTY, Status.DONE]
    for work in todo:
        finding = inspect_features(folder, work.slide_id, work.parameters, allow_dropped=False)
        assert (finding.state, finding.rows, finding.pt_sound) == (
            State.DONE, len(work.patches), True)
    assert not list(folder.rglob("*.lock"))


def test_what_another_process_finished_is_skipped_unless_redone(inputs: Inputs, folder: Path
                                                                ) -> None:
    run(works(inputs, folder), extraction())
    again = run(works(inputs, folder), extraction())
    assert set(statuses(again)) == {Status.SKIPPED}
    assert statuses(run(works(inputs, folder), extraction(redo=True)))[0] is Status.DONE


def test_a_held_slide_is_busy(inputs: Inputs, folder: Path) -> None:
    with claim(folder / "h5_files" / "slide_2.h5"):
        rows = run(works(inputs, folder), extraction())
    assert rows["slide_2"].status is Status.BUSY
    assert not pt_path(folder, "slide_2").exists()


def test_a_slide_that_cannot_fit_is_not_begun(inputs: Inputs, folder: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A8"""
    free = needed_bytes(15, MeanColour.dim)  # enough for 13 patches, not for 20
    monkeypatch.setattr(datasets.extraction, "free_bytes", lambda path: free)
    rows = run(works(inputs, folder), extraction())
    assert statuses(rows) == [Status.FAILED, Status.EMPTY, Status.DONE]
    assert "no space" in rows["slide_0"].reason and "needs" in rows["slide_0"].reason


def test_a_slide_replaced_meanwhile_fails(inputs: Inputs, folder: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """B16"""
    todo = works(inputs, folder)
    monkeypatch.setattr(datasets.extraction, "fingerprint",
                        lambda path: {"slide_bytes": 1, "slide_name": path.name})
    rows = run(todo, extraction())
    assert "was replaced while it was read" in rows["slide_0"].reason
    assert not list(folder.glob("h5_files/*.h5"))


def test_settings_reach_the_encoder(inputs: Inputs, folder: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """--batch_size, --workers, --backend and --device do what they say."""
    encoder, seen = MeanColour(), {}
    original = datasets.extraction.encode_slides

    def spy(slides: Any, **settings: Any) -> Any:
        seen.update(settings)
        return original(slides, **settings)

    def load(device: str) -> MeanColour:
        seen["device"] = device
        return encoder

    monkeypatch.setattr(datasets.extraction, "encode_slides", spy)
    run(works(inputs, folder), extraction(load=load, batch_size=11, workers=3))
    assert encoder.batches == [11, 11, 11]
    assert seen["device"] == "cpu" and seen["workers"] == 3
    run(works(inputs, folder), extraction(load=load, workers=None, redo=True))
    assert seen["workers"] == 2


def test_an_encoder_that_is_refused_is_the_answer(inputs: Inputs, folder: Path) -> None:
    def load(device: str) -> MeanColour:
        raise Refused("no such device")

    result = _extract_shard(Shard(tuple(works(inputs, folder)), "cuda"),
                            extraction=extraction(load=load))
    assert result.refused == "no such device" and result.rows == []


def test_features_that_are_not_finite_are_not_written(inputs: Inputs, folder: Path) -> None:
    """D2"""
    class Nan(MeanColour):
        def launch(self, batch: np.ndarray) -> torch.Tensor:
            return super().launch(batch) * torch.nan

    rows = run(works(inputs, folder), extraction(load=lambda device: Nan()))
    assert statuses(rows) == [Status.FAILED, Status.EMPTY, Status.FAILED]
    assert "not finite" in rows["slide_0"].reason
    assert [path.stem for path in folder.glob("h5_files/*.h5")] == ["slide_1"]


def test_patches_that_overflowed_are_told(inputs: Inputs, folder: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    encoder = MeanColour()
    encoder.overflowed = 3  # type: ignore[attr-defined]
    run(works(inputs, folder), extraction(load=lambda device: encoder))
    assert "3 patches overflowed and were computed again in fp32" in capsys.readouterr().err


# ---------------------------------------------------------------------------- levels

@pytest.fixture(scope="module")
def leveled(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_levels(tmp_path_factory.mktemp("leveled") / "cohort")


def plan(leveled: Inputs, feat_dir: Path, report: RunReport | None = None, *,
         children: Sequence[Child] = CHILDREN, allow_dropped: bool = False) -> list[Work]:
    levels = list_levels(leveled.patches_root, feat_dir, children)
    for level in levels:
        for name in ("h5_files", "pt_files"):
            (level.feat_dir / name).mkdir(parents=True, exist_ok=True)
    slides = {f"slide_{number}": leveled.slides / f"slide_{number}.tif" for number in range(3)}
    return plan_works(slides, levels, report or RunReport("features"), encoders={"": ENCODER},
                      backend="auto", redo=False, allow_dropped=allow_dropped)


def test_all_levels_in_one_go_equal_each_alone(leveled: Inputs, tmp_path: Path) -> None:
    """One encoder, every level; a derived folder by itself gives the same files."""
    loads: list[str] = []

    def load(device: str) -> MeanColour:
        loads.append(device)
        return MeanColour()

    rows = run(plan(leveled, tmp_path / "f_level_2"), extraction(load=load))
    assert loads == ["cpu"] and len(rows) == 9
    assert {name: row.numbers["n_patches"] for name, row in rows.items() if "2" in name[:8]} == {
        "slide_2": 2, "slide_2 [level_1]": 8, "slide_2 [level_0]": 32}
    for child in CHILDREN:
        alone = tmp_path / "alone" / child.name
        derived = Inputs(leveled.slides, level_folder(leveled.patches_root, child), leveled.csv)
        run(plan(derived, alone, children=()), extraction())
        together = tmp_path / f"f_{child.name}_corresponding"
        for number in range(3):
            first, second = (read_h5(folder / "h5_files" / f"slide_{number}.h5")
                             for folder in (alone, together))
            assert first.parameters == second.parameters
            assert {*first.arrays} == {"features", "coords", "valid"}
            for name, array in first.arrays.items():
                np.testing.assert_array_equal(array, second.arrays[name])
            assert second.root["branching"] == 4 and len(second.root["parent_sha256"]) == 64
    report = RunReport("features")
    assert plan(leveled, tmp_path / "f_level_2", report) == []
    assert len(report.rows) == 9


def test_a_pixel_of_a_child_is_that_of_its_place(leveled: Inputs, tmp_path: Path) -> None:
    """The mean of the children's mean colours is about the parent's."""
    run(plan(leveled, tmp_path / "f_level_2"), extraction())
    coarse, fine = (read_h5(tmp_path / folder / "h5_files/slide_0.h5").arrays["features"]
                    for folder in ("f_level_2", "f_level_0_corresponding"))
    np.testing.assert_allclose(fine.reshape(3, 16, 3).mean(axis=1), coarse, atol=4)
    assert np.ptp(coarse, axis=0).max() > 8  # so the order matters


def test_an_unreadable_child_keeps_its_row(leveled: Inputs, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """--bad_tiles drop: the children of row p stay where they are looked for."""
    original = datasets.patch_readers._pixels

    def broken(slide: Any, patches: SlidePatches, row: int) -> np.ndarray:
        if patches.level == "level_1" and row == 5:
            raise SlideError("no pixels")
        return original(slide, patches, row)

    monkeypatch.setattr(datasets.patch_readers, "_pixels", broken)
    rows = run(plan(leveled, tmp_path / "f_level_2"), extraction(bad_tiles="drop"))
    assert rows["slide_2 [level_1]"].numbers == {"n_patches": 7, "n_dropped": 1}
    data = read_h5(tmp_path / "f_level_1_corresponding/h5_files/slide_2.h5")
    assert data.arrays["features"].shape == (8, 3) and not data.arrays["features"][5].any()
    assert data.arrays["valid"].tolist() == [True] * 5 + [False] + [True] * 2
    assert plan(leveled, tmp_path / "f_level_2", allow_dropped=True) == []
    assert len(plan(leveled, tmp_path / "f_level_2")) == 2  # both lost their child 5


def test_levels_that_are_missing_or_of_another_grid(leveled: Inputs, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="with --child_mpp 0.5"):
        list_levels(leveled.patches_root, tmp_path, [Child(mpp_um=0.5)])
    root = tmp_path / "cohort"
    shutil.copytree(leveled.patches_root.parent, root)
    moved = Inputs(root / "slides", root / "out", root / "out/process_list_autogen.csv")
    write_patches(moved.patches_root, "slide_0", grid_coords(2), patch_px=32, level=2)
    (level_folder(moved.patches_root, CHILDREN[1]) / "patches/slide_2.h5").unlink()
    report = RunReport("features")
    plan(moved, tmp_path / "f", report)
    reasons = {row.item: row.reason for row in report.rows if row.status is Status.FAILED}
    assert set(reasons) == {"slide_0 [level_1]", "slide_2 [level_0]"}
    assert "does not come from the coordinates of the level above" in reasons["slide_0 [level_1]"]
    assert "with the same finer levels" in reasons["slide_2 [level_0]"]


# ---------------------------------------------------------------------------- what is found

def test_findings(inputs: Inputs, folder: Path) -> None:
    first = works(inputs, folder)[0]
    assert inspect_features(folder, "slide_0", first.parameters,
                            allow_dropped=False).state is State.MISSING
    run([first], extraction())
    other = works(inputs, folder, precision="bf16")[0]
    finding = inspect_features(folder, "slide_0", other.parameters, allow_dropped=False)
    assert finding.state is State.OTHER and finding.other_settings
    assert (finding.found, finding.changed) == ({"encoder.precision": "fp32"},
                                                {"encoder.precision": "bf16"})
    moved = {**first.parameters, "coords_sha256": "1"}
    finding = inspect_features(folder, "slide_0", moved, allow_dropped=False)
    assert finding.state is State.OTHER and not finding.other_settings


@pytest.mark.parametrize("damage", ["missing", "0 bytes", "half", "zip", "other"])
def test_a_damaged_pt_is_seen_and_mended(inputs: Inputs, folder: Path, damage: str) -> None:
    """A2, A7"""
    import zipfile

    first = works(inputs, folder)[0]
    run([first], extraction())
    path = pt_path(folder, "slide_0")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello.txt", "no tensor")
    elif damage == "other":
        torch.save(torch.zeros(20, 3), path)
    else:
        path.write_bytes(data[:len(data) // 2] if damage == "half" else b"")
    assert not inspect_features(folder, "slide_0", first.parameters, allow_dropped=False).pt_sound
    mend_pt(folder, "slide_0")
    assert inspect_features(folder, "slide_0", first.parameters, allow_dropped=False).pt_sound
    np.testing.assert_array_equal(
        torch.load(path, weights_only=True).numpy(),
        read_h5(folder / "h5_files" / "slide_0.h5").arrays["features"])


# ---------------------------------------------------------------------------- shards

def test_sharing_out_is_even_and_complete(inputs: Inputs, folder: Path) -> None:
    todo = [replace(work, patches=replace(work.patches, slide_id=f"{work.slide_id}_{copy}"))
            for copy in range(4) for work in works(inputs, folder)]
    shards = share_out(todo, ["cuda:0", "cuda:1", "cuda:2"])
    assert [shard.device for shard in shards] == ["cuda:0", "cuda:1", "cuda:2"]
    loads = [sum(len(work.patches) for work in shard.works) for shard in shards]
    assert sum(loads) == 4 * 33 and max(loads) - min(loads) <= 20
    assert sum(len(shard.works) for shard in shards) == len(todo)
    assert share_out([], ["cpu"]) == []


def test_several_devices_work_at_the_same_time(inputs: Inputs, folder: Path) -> None:
    """--gpus: one child process a device; here the devices are all CPUs."""
    shards = share_out(works(inputs, folder), ["cpu", "cpu"])
    rows = {row.item: row for row in extract(shards, extraction(load=load_mean_colour))}
    assert len(shards) == 2 and statuses(rows) == [Status.DONE, Status.EMPTY, Status.DONE]
    with pytest.raises(Refused, match="no such device"):
        list(extract(share_out(works(inputs, folder), ["broken"]),
                     extraction(load=load_mean_colour)))


def test_after_a_crash_suspects_are_tried_alone(inputs: Inputs, folder: Path) -> None:
    todo = works(inputs, folder)
    run(todo[:1], extraction())
    (folder / "h5_files" / "slide_2.h5.lock").write_text("left by a dead process",
                                                         encoding="utf-8")
    rows, again = _after_crash(Shard(tuple(todo), "cpu"), "it died", extraction())
    assert [(row.item, row.status) for row in rows] == [("slide_0", Status.DONE)]
    assert [[work.slide_id for work in shard.works] for shard in again] == [
        ["slide_2"], ["slide_1"]]
    rows, again = _after_crash(again[0], "it died", extraction())
    assert [(row.item, row.status, row.reason) for row in rows] == [
        ("slide_2", Status.FAILED, "it died")] and again == []


# ---------------------------------------------------------------------------- several encoders

RECORDS = {name: {**ENCODER, "name": name} for name in ("whole", "timm:small")}


def plan_encoders(inputs: Inputs, feat_dir: Path, names: Sequence[str] = tuple(RECORDS),
                  report: RunReport | None = None, **settings: Any) -> list[Work]:
    levels = list_levels(inputs.patches_root, feat_dir, ())
    slides = {f"slide_{number}": inputs.slides / f"slide_{number}.tif" for number in range(3)}
    found = plan_works(slides, levels, report or RunReport("features"), backend="auto",
                       encoders={name: RECORDS[name] for name in names},
                       **{"redo": False, "allow_dropped": False, **settings})
    for work in found:
        for place in (work.path.parent, work.feat_dir / "pt_files"):
            place.mkdir(parents=True, exist_ok=True)
    return found


def two_encoders(**changes: Any) -> Extraction:
    return extraction(load={"whole": lambda device: MeanColour(),
                            "timm:small": lambda device: MeanColour(16)}, **changes)


def test_several_encoders_go_on_each_where_it_stopped(inputs: Inputs, tmp_path: Path) -> None:
    """AtlasPatch's defect 12: what one encoder lacks does not touch the files of another."""
    run(plan_encoders(inputs, tmp_path, ["whole"]), two_encoders())
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.h5")}
    assert {path.parent.parent.name for path in first} == {"whole"}
    report = RunReport("features")
    todo = plan_encoders(inputs, tmp_path, report=report)
    assert [work.name for work in todo] == [f"slide_{n} (timm:small)" for n in range(3)]
    assert [row.item for row in report.rows] == [f"slide_{n} (whole)" for n in range(3)]
    rows = run(todo, two_encoders())
    assert [row.status for row in rows.values()].count(Status.DONE) == 2
    assert {path: path.stat().st_mtime_ns for path in first} == first
    whole, small = (read_h5(tmp_path / name / "h5_files/slide_0.h5")
                    for name in ("whole", "timm_small"))
    assert small.root["encoder"] == "timm:small" and (tmp_path / "timm_small/pt_files").is_dir()
    assert np.abs(whole.arrays["features"] - small.arrays["features"]).max() < 2
    assert (whole.arrays["features"] != small.arrays["features"]).any()
    assert plan_encoders(inputs, tmp_path) == []


def test_atlaspatch_s_file_takes_both_encoders_of_one_run(inputs: Inputs, tmp_path: Path) -> None:
    """One lock, one file, two data sets; the next run finds both done."""
    rows = run(plan_encoders(inputs, tmp_path, layout="atlaspatch"), two_encoders())
    assert {row.status for row in rows.values()} == {Status.DONE, Status.EMPTY}
    with h5py.File(tmp_path / "patches/slide_0.h5") as file:
        assert sorted(file["features"]) == ["timm_small", "whole"]
        assert file["features/whole"].shape == (20, 3) and file["coords"].shape == (20, 5)
    assert plan_encoders(inputs, tmp_path, layout="atlaspatch") == []
    assert not list(tmp_path.rglob("*.lock"))


def test_storage_dtype_is_stored_and_compared(inputs: Inputs, tmp_path: Path) -> None:
    run(plan_encoders(inputs, tmp_path, ["whole"], storage_dtype="float16"), two_encoders())
    path = tmp_path / "whole/h5_files/slide_0.h5"
    assert read_h5(path).arrays["features"].dtype == np.float16
    assert plan_encoders(inputs, tmp_path, ["whole"], storage_dtype="float16") == []
    with pytest.raises(Refused, match="storage_dtype"):
        plan_encoders(inputs, tmp_path, ["whole"])


def test_coordinates_of_trident_get_a_level_to_read(inputs: Inputs, tmp_path: Path) -> None:
    """Its files name no level: 128 px of level 0 are read as 64 px of the level that has them."""
    root = tmp_path / "job"
    (root / "10x_64px_0px_overlap/patches").mkdir(parents=True)
    with h5py.File(root / "10x_64px_0px_overlap/patches/slide_0_patches.h5", "w") as file:
        file["coords"] = grid_coords(6)
        file["coords"].attrs.update(
            patch_size=64, patch_size_level0=128, level0_magnification=20, target_magnification=10,
            overlap=0, level0_width=1024, level0_height=768, name="slide_0")
    slides = {"slide_0": inputs.slides / "slide_0.tif", "slide_2": tmp_path / "gone.tif"}
    report = RunReport("features")
    (work,) = plan_works(slides, list_levels(root, tmp_path, ()), report,
                         encoders={"": ENCODER}, backend="auto", redo=False, allow_dropped=False)
    assert (work.patches.patch_level, work.patches.patch_size, work.patches.output_size) == (
        1, 64, 64)
    assert [row.item for row in report.rows] == ["slide_2"]


# ---------------------------------------------------------------------------- ways to the same

@pytest.fixture(scope="module")
def wanted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("wanted")
    run(plan_encoders(inputs, folder), two_encoders(workers=1))
    return matrices(folder)


def matrices(folder: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): read_h5(path).arrays["features"]
            for path in sorted(folder.rglob("*.h5"))}


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(array, second[name]) for name, array in first.items())


@pytest.mark.parametrize(("workers", "devices"), [(4, 1), (1, 2)])
def test_workers_and_processes_give_equal_bits(
        inputs: Inputs, wanted: dict[str, np.ndarray], tmp_path: Path, workers: int, devices: int
        ) -> None:
    """D17"""
    shards = share_out(plan_encoders(inputs, tmp_path), ["cpu"] * devices)
    assert len(shards) == devices
    for shard in shards:
        assert {len(group) for group in datasets.extraction._by_slide(shard.works).values()} == {2}
        run(shard.works, two_encoders(workers=workers))
    assert equal(matrices(tmp_path), wanted)


def test_cache_dir_is_read_instead_of_the_slides(
        inputs: Inputs, wanted: dict[str, np.ndarray], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    original = datasets.patch_readers.open_slide

    def spy(path: Path, **settings: Any) -> Any:
        opened.append(path)
        return original(path, **settings)

    monkeypatch.setattr(datasets.patch_readers, "open_slide", spy)
    cache = tmp_path / "cache"
    run(plan_encoders(inputs, tmp_path / "f"), two_encoders(cache_dir=cache, workers=2))
    assert equal(matrices(tmp_path / "f"), wanted)
    assert opened and all(cache in path.parents for path in opened)
    assert list(cache.iterdir()) == []


def test_slides_in_other_hands_are_looked_at_again(inputs: Inputs, folder: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Spec, defect 13. Held at first: one is free at the end, one was finished, one still held."""
    todo = works(inputs, folder)
    original, calls = datasets.extraction._extract, []

    def first_time(shards: Any, settings: Any, scheduler: Any) -> Any:
        calls.append([work.slide_id for shard in shards for work in shard.works])
        if len(calls) == 1:
            run(todo[1:2], extraction())
            return iter([Row(item=work.name, status=Status.BUSY) for work in todo])
        return original(shards, settings, scheduler)

    monkeypatch.setattr(datasets.extraction, "_extract", first_time)
    monkeypatch.setattr(datasets.extraction, "run_items", in_this_process)
    with claim(todo[2].path):
        rows = {row.item: row for row in extract([Shard(tuple(todo), "cpu")], extraction())}
    assert statuses(rows) == [Status.DONE, Status.SKIPPED, Status.BUSY]
    assert calls == [["slide_0", "slide_1", "slide_2"], ["slide_0"]]


def in_this_process(work: Any, items: Any, *, arguments: Any, **settings: Any) -> Any:
    return run_items(work, items, workers=0, arguments=arguments)


def test_tasks_for_a_cluster(inputs: Inputs, folder: Path) -> None:
    """At most one a slide; many small slides share tasks of 50,000 patches."""
    todo = works(inputs, folder)
    assert cluster_tasks(todo) == 3
    patches = replace(todo[0].patches, coords=np.zeros((1000, 2), np.int64))
    many = [replace(todo[0], patches=replace(patches, slide_id=f"s{number}"))
            for number in range(2000)]
    assert cluster_tasks(many) == 40 and cluster_tasks([]) == 1


# ---------------------------------------------------------------------------- while it runs

def meddling(at_launch: Callable[[], object]) -> Extraction:
    """An extraction during which something happens to the files."""
    class Meddler(MeanColour):
        def launch(self, batch: np.ndarray) -> torch.Tensor:
            at_launch()
            return super().launch(batch)

    return extraction(load=lambda device: Meddler(), batch_size=64)


def test_a_lock_deleted_by_hand_is_noticed_before_writing(inputs: Inputs, folder: Path) -> None:
    """A12"""
    first = works(inputs, folder)[0]
    rows = run([first], meddling(lambda: lock_path(first.path).unlink()))
    assert "was deleted while we worked" in rows["slide_0"].reason
    assert rows["slide_0"].status is Status.FAILED and not first.path.exists()


def test_a_slide_touched_meanwhile_fails(inputs: Inputs, tmp_path: Path) -> None:
    """B16: the same name and size, another time."""
    moved = Inputs(tmp_path / "slides", inputs.patches_root, inputs.csv)
    shutil.copytree(inputs.slides, moved.slides)
    for name in ("h5_files", "pt_files"):
        (tmp_path / name).mkdir()
    first = works(moved, tmp_path)[0]
    rows = run([first], meddling(lambda: os.utime(first.patches.slide_path, ns=(1, 1))))
    assert "was replaced while it was read" in rows["slide_0"].reason and not first.path.exists()
