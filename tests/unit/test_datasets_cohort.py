"""Splits and bags of a run, checked before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.cohort import Cohort, load_cohort
from datasets.split_folder import find_split_folder
from datasets.tasks import Task
from tests.training import WIDTH, write_cohort
from utils.errors import Refused
from utils.report import Status
from utils.storage import write_h5


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cohort(tmp_path)
    return tmp_path


def task_of(root: Path) -> Task:
    return Task(name="cohort", csv_path=root / "cohort.csv",
                label_dict={"class_0": 0, "class_1": 1})


def load(root: Path, **other: Any) -> Cohort:
    return load_cohort(task_of(root), **{
        "data_root_dir": root / "features", "split_folder": root / "splits" / "cohort_100",
        "folds": range(2), "embed_dim": WIDTH, **other})


def feature_file(root: Path, number: int) -> Path:
    return root / "features" / "pt_files" / f"slide_{number:02}.pt"


def test_parts_are_bags_in_table_order(root: Path) -> None:
    cohort = load(root)
    parts = cohort.parts(1)
    assert {part: len(bags) for part, bags in parts.items()} == {"train": 12, "val": 6, "test": 6}
    assert list(parts["train"].slide_ids) == sorted(parts["train"].slide_ids)
    assert parts["val"][0].slide_id == "slide_06"
    assert cohort.left_out == ()


def test_facts_change_with_slides_and_labels(root: Path) -> None:
    before = load(root).facts(0)
    assert before == load(root).facts(0)
    assert before["slides"] != load(root).facts(1)["slides"]
    table = (root / "cohort.csv").read_text()
    (root / "cohort.csv").write_text(table.replace("slide_20,class_0", "slide_20,class_1"))
    assert before["slides"] != load(root).facts(0)["slides"]


def test_facts_change_with_the_patches(root: Path) -> None:
    before = load(root).facts(0)["n_patches"]
    assert before == 24 * 20
    torch.save(torch.ones(25, WIDTH), feature_file(root, 7))
    assert load(root).facts(0)["n_patches"] == before + 5


def test_a_tenth_of_each_class_at_least_one(root: Path) -> None:
    cohort = load(root, testing=True)
    for bags in cohort.parts(0).values():
        assert sorted(bags.labels) == [0, 1]
    assert set(cohort.parts(0)["train"].slide_ids) == {"slide_12", "slide_13"}


def test_what_cannot_be_used_is_left_out_with_a_reason(root: Path) -> None:
    feature_file(root, 20).write_bytes(b"no torch file")
    torch.save(torch.zeros(0, WIDTH), feature_file(root, 21))
    feature_file(root, 22).unlink()
    with pytest.raises(Refused, match="slide_22.*--allow_missing"):
        load(root)
    cohort = load(root, allow_missing=True)
    assert {row.item: row.status for row in cohort.left_out} == {
        "slide_20": Status.FAILED, "slide_21": Status.EMPTY, "slide_22": Status.EMPTY}
    assert "slide_20" not in cohort.splits[0].train
    assert "slide_20" in cohort.asked[0].train
    assert cohort.facts(0)["left_out"] == ["slide_20", "slide_21", "slide_22"]


def test_other_width_is_refused_with_the_flag_to_give(root: Path) -> None:
    with pytest.raises(Refused, match=f"give --embed_dim {WIDTH}"):
        load(root, embed_dim=1024)


def test_features_of_two_encoders_are_refused(root: Path) -> None:
    (root / "features" / "h5_files").mkdir()
    for number in (0, 1):
        write_h5(root / "features" / "h5_files" / f"slide_{number:02}.h5",
                 {"features": np.ones((3, WIDTH), np.float32)},
                 parameters={"encoder": {"name": f"encoder_{number}"}})
    with pytest.raises(Refused, match="different encoders cannot be mixed"):
        load(root)


def test_a_class_without_usable_training_slides_is_refused(root: Path) -> None:
    for number in range(12, 24):
        if number % 2:
            feature_file(root, number).unlink()
    with pytest.raises(Refused, match="no training slide of class 'class_1'"):
        load(root, folds=[0], allow_missing=True)


def test_bags_that_cannot_be_read_are_told_apart(root: Path) -> None:
    cohort = load(root)
    torch.save(torch.full((3, WIDTH), float("nan")), feature_file(root, 3))
    assert cohort.can_read("slide_02")
    assert not cohort.can_read("slide_03")


def test_split_written_is_the_one_used(root: Path) -> None:
    feature_file(root, 20).unlink()
    cohort = load(root, allow_missing=True)
    cohort.write_split(root, 0)
    text = (root / "splits_0.csv").read_text()
    assert text.startswith(",train,val,test\n0,slide_12,slide_00,slide_06\n")
    assert "slide_20" not in text


def test_split_folder_by_name_or_path(root: Path) -> None:
    found = find_split_folder(root / "splits", "cohort_100", task=task_of(root))
    assert found == root / "splits" / "cohort_100"
    assert find_split_folder(root, str(found), task=task_of(root)) == found
    with pytest.raises(Refused, match="create_splits_seq.py --task cohort"):
        find_split_folder(root / "splits", "cohort_50", task=task_of(root))


def test_finer_levels_are_checked_counted_and_in_the_bags(root: Path) -> None:
    """Here of pt files, in the folder beside that of the coarse features."""
    finer = root / "features_level_0_corresponding" / "pt_files"
    finer.mkdir(parents=True)
    for number in range(24):
        torch.save(torch.ones(4 * 20, WIDTH), finer / f"slide_{number:02}.pt")
    cohort = load(root, child_levels=(0,))
    assert [len(level) for level in cohort.parts(0)["train"][0].children] == [80]
    assert cohort.facts(0)["n_patches_of_levels"] == [24 * 80]
    assert load(root, child_dirs=(finer.parent,)).facts(0) == cohort.facts(0)
    assert "n_patches_of_levels" not in load(root).facts(0)
    torch.save(torch.ones(4 * 20 + 4, WIDTH), finer / "slide_07.pt")
    assert load(root, child_levels=(0,)).facts(0) != cohort.facts(0)
    (finer / "slide_08.pt").write_bytes(b"no torch file")
    (row,) = load(root, child_levels=(0,)).left_out
    assert (row.item, row.status) == ("slide_08", Status.FAILED)
    with pytest.raises(Refused, match="--child_levels or --child_mpp"):
        load(root, child_levels=(1,))


def test_features_that_nobody_named_are_asked_for(root: Path) -> None:
    with pytest.raises(Refused, match="--data_root_dir is missing"):
        load(root, data_root_dir=None)
