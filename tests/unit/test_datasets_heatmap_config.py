"""The YAML tree of heatmaps, and the list of slides."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from datasets.heatmap_config import (
    SECTIONS,
    DataArguments,
    PatchingArguments,
    StreamingArguments,
    as_yaml,
    find_config,
    load_config,
)
from datasets.heatmap_items import list_items
from tests.conftest import ROOT
from utils.errors import Refused

# CLAM's template, key by key (spec 7.1)
CLAM = {
    "exp_arguments": {"n_classes": 2, "save_exp_code": "HEATMAP_OUTPUT",
                      "raw_save_dir": "heatmaps/heatmap_raw_results",
                      "production_save_dir": "heatmaps/heatmap_production_results",
                      "batch_size": 256},
    "data_arguments": {"data_dir": "heatmaps/demo/slides/", "data_dir_key": "source",
                       "process_list": "heatmap_demo_dataset.csv",
                       "preset": "presets/bwh_biopsy.csv", "slide_ext": ".svs",
                       "label_dict": {"LUAD": 0, "LSCC": 1}},
    "patching_arguments": {"patch_size": 256, "overlap": 0.5, "patch_level": 0,
                           "custom_downsample": 1},
    "encoder_arguments": {"model_name": "resnet50_trunc", "target_img_size": 224},
    "model_arguments": {"ckpt_path": "heatmaps/demo/ckpts/s_0_checkpoint.pt",
                        "model_type": "clam_sb", "initiate_fn": "initiate_model",
                        "model_size": "small", "drop_out": 0.0, "embed_dim": 1024},
    "heatmap_arguments": {"vis_level": 1, "alpha": 0.4, "blank_canvas": False, "save_orig": True,
                          "save_ext": "jpg", "use_ref_scores": True, "blur": False,
                          "use_center_shift": True, "use_roi": False, "calc_heatmap": True,
                          "binarize": False, "binary_thresh": -1, "custom_downsample": 1,
                          "cmap": "jet"},
    "sample_arguments": {"samples": [{"name": "topk_high_attention", "sample": True, "seed": 1,
                                      "k": 15, "mode": "topk"}]},
}


def load(tmp_path: Path, text: str, **flags: Any) -> Any:
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml", **flags)


def test_the_shipped_template_is_clams_with_our_keys() -> None:
    path = ROOT / "heatmaps/configs/config_template.yaml"
    tree = yaml.safe_load(path.read_text())
    for section, keys in CLAM.items():
        for key, value in keys.items():
            assert tree[section][key] == value, (section, key)
    config = load_config(path)
    for name, kind in SECTIONS.items():  # every key of ours stands in the template
        if name != "sample_arguments":
            assert set(tree[name]) == {item.name for item in dataclasses.fields(kind)}
    assert config.class_names == ("LUAD", "LSCC")


@pytest.mark.parametrize("path", sorted((ROOT / "heatmaps/configs").glob("demo_*.yaml")),
                         ids=lambda path: path.name)
def test_the_demos_load(path: Path) -> None:
    config = load_config(path)
    streaming = config.streaming_arguments != StreamingArguments()
    assert streaming == ("streaming" in path.name)
    assert config.class_names == ("skin", "colon")


def test_clams_own_yaml_loads_and_the_resolved_one_loads_back(tmp_path: Path) -> None:
    config = load(tmp_path, yaml.safe_dump(CLAM))
    assert load(tmp_path, as_yaml(config)) == config


def test_defaults_and_flags(tmp_path: Path) -> None:
    config = load(tmp_path, "", save_exp_code="x", overlap=0.8)
    assert config.exp_arguments.save_exp_code == "x"
    assert config.patching_arguments.overlap == 0.8
    assert config.class_names is None and config.sample_arguments.samples == ()


def test_values_are_read_by_declared_type(tmp_path: Path) -> None:
    config = load(tmp_path, "heatmap_arguments: {alpha: 5e-1, blur: yes, vis_level: '2'}\n"
                            "data_arguments: {data_dir: [a, b]}")
    assert config.heatmap_arguments.alpha == 0.5 and config.heatmap_arguments.blur is True
    assert config.heatmap_arguments.vis_level == 2
    assert config.data_arguments.data_dir == ("a", "b")


@pytest.mark.parametrize(("text", "message"), [
    ("heatmap_argument: {}", "unknown section 'heatmap_argument', did you mean 'heatmap_arg"),
    ("heatmap_arguments: {alhpa: 1}", "unknown key 'alhpa', did you mean 'alpha'"),
    ("heatmap_arguments: {blur: perhaps}", "blur is 'perhaps', expected bool"),
    ("heatmap_arguments: {alpha: [1]}", "alpha is .*, expected float"),
    ("heatmap_arguments: {cmap: jett}", "unknown colour map 'jett': did you mean 'jet'"),
    ("heatmap_arguments: {save_ext: gif}", "save_ext is 'gif', expected one of jpg, png"),
    ("heatmap_arguments: 7", "expected 'key: value' lines"),
    ("patching_arguments: {overlap: 1.0}", "overlap is 1.0, expected from 0 to 0.99"),
    ("patching_arguments: {patch_size: 0}", "patch_size is 0, expected at least 1"),
    ("exp_arguments: {save_exp_code: ../x}", "save_exp_code .* is not a plain name"),
    ("exp_arguments: {raw_save_dir: ../../x}", "raw_save_dir '../../x' climbs"),
    ("exp_arguments: {production_save_dir: a/../../x}", "production_save_dir .* climbs"),
    ("data_arguments: {label_dict: {a: 0, b: 2}}", r"numbers its classes \[0, 2\]"),
    ("data_arguments: {label_dict: {a/b: 0, b: 1}}", "label .* is not a plain name"),
    ("data_arguments: {slide_ext: svs}", "slide_ext is 'svs', expected it with its dot"),
    ("model_arguments: {initiate_fn: other}", "expected one of initiate_model"),
    ("sample_arguments: {samples: [{name: a}, {name: a}]}", "two samples are called 'a'"),
    ("sample_arguments: {samples: [{k: 2}]}", "name is required"),
    ("sample_arguments: {samples: [{name: a, mode: best}]}", "expected one of topk"),
    ("sample_arguments: {samples: [7]}", r"samples\[0\] is 7"),
    ("sample_arguments: {sample: []}", "expected one list 'samples'"),
    ("streaming_arguments: {source: both}", "source is 'both', expected one of attention, gradi"),
    ("streaming_arguments: {image_mpp: 0}", "image_mpp is 0.0, expected from 0.05 to 100"),
    ("streaming_arguments: {image_mpp: 1, slide_images: x}", "their own um per px, .* give one"),
    ("a: &x [1]\nb: *x", "uses YAML aliases"),
    ("exp_arguments: !!python/object:os.system {}", "is not plain YAML"),
])
def test_bad_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize(("text", "message"), [
    ("", ""), ("{model_name: null}", ""), ("{model_name: resnet50_trunc}", ""),
    ("{model_name: resnet50_trunc, target_img_size: 224}", ""),  # CLAM's template
    ("{model_name: r18, target_img_size: 96}", ""), ("{model_name: e2e:x-1}", ""),
    ("{model_name: uni_v1}", r"model_name is uni_v1, .* own encoder \(r18, 96 px\); leave the key"),
    ("{target_img_size: 256}", "target_img_size is 256, but the checkpoint is an end-to-end"),
    ("{ckpt_path: w.pt}", "ckpt_path is w.pt, but the checkpoint is an end-to-end model")])
def test_the_encoder_of_an_end_to_end_model_is_its_own(
    tmp_path: Path, text: str, message: str
) -> None:
    asked = load(tmp_path, f"encoder_arguments: {text}").encoder_arguments
    with pytest.raises(Refused, match=message) if message else nullcontext():
        asked.refuse_others(("r18", "e2e:x-1"), side_px=96)


def test_step_of_the_fine_map() -> None:
    def step(**values: Any) -> int:
        return PatchingArguments(**values).scale().step_px

    assert step(patch_size=256, overlap=0.5) == 128
    assert step(patch_size=10, overlap=0.9) == 1  # 10 * (1 - 0.9) is 0.9999...
    assert step(patch_size=100, overlap=0.7, custom_downsample=2) == 30  # before the downsample


def test_configs_are_found_by_name_or_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "heatmaps/configs"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text("")
    (tmp_path / "b.yaml").write_text("")
    assert find_config("a.yaml") == Path("heatmaps/configs/a.yaml")
    assert find_config("b.yaml") == Path("b.yaml")
    with pytest.raises(Refused, match="no config 'c.yaml'.*there: a.yaml"):
        find_config("c.yaml")


# ---------------------------------------------------------------------------- the list

def items_of(tmp_path: Path, text: str, *, use_roi: bool = False, **fields: Any) -> Any:
    (tmp_path / "list.csv").write_text(text)
    data = DataArguments(**{"data_dir": str(tmp_path), "process_list": str(tmp_path / "list.csv"),
                            "preset": None, "slide_ext": ".svs",
                            "label_dict": {"a": 0, "b": 1}, **fields})
    return list_items(data, use_roi=use_roi)[1]


def test_ids_labels_parameters_and_process(tmp_path: Path) -> None:
    first, second, third = items_of(
        tmp_path, "slide_id,label,process,sthresh,keep_ids\n007,a,,20,\"0,2\"\nx.svs,1,1.0,,none\n"
        "y,,0,,\n")
    assert (first.slide_id, first.slide_path.name, first.label) == ("007", "007.svs", "a")
    assert first.segmentation.sthresh == 20 and first.segmentation.keep_ids == (0, 2)
    assert (second.slide_id, second.slide_path.name, second.label) == ("x", "x.svs", "b")
    assert second.segmentation.sthresh == 15  # the default for heatmaps
    assert (third.label, third.process) == ("Unspecified", False)


def test_preset_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("sthresh,a_t\n33,1.5\n")
    (item,) = items_of(tmp_path, "slide_id\nx\n", preset=tmp_path / "p.csv")
    assert item.segmentation.sthresh == 33 and item.segmentation.a_t == 1.5


def test_region(tmp_path: Path) -> None:
    text = "slide_id,x1,x2,y1,y2\nx,10,500,20.0,600\n"
    assert items_of(tmp_path, text, use_roi=True)[0].roi_l0 == (10, 20, 500, 600)
    assert items_of(tmp_path, text)[0].roi_l0 is None
    for bad in ("slide_id\nx\n", "slide_id,x1,x2,y1,y2\nx,10,,0,9\n"):
        with pytest.raises(Refused, match=r"line 2 \(x\): use_roi needs numbers"):
            items_of(tmp_path, bad, use_roi=True)
    with pytest.raises(Refused, match="x 9-5, y 0-9 is empty"):
        items_of(tmp_path, "slide_id,x1,x2,y1,y2\nx,9,5,0,9\n", use_roi=True)


@pytest.mark.parametrize(("text", "message"), [
    ("slide\nx\n", "no column 'slide_id'"),
    ("slide_id\n", "has no rows"),
    ("slide_id\n../x\n", "not a plain name"),
    ("slide_id\nx\nx\n", "twice"),
    ("slide_id\nx\nx.svs\n", "'x' is there 2 times"),
    ("slide_id,label\nx,aa\n", "unknown label 'aa', did you mean 'a'"),
    ("slide_id,process\nx,perhaps\n", "process is 'perhaps'"),
    ("slide_id,sthresh\nx,1000\n", "sthresh is"),
])
def test_bad_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        items_of(tmp_path, text)


def test_folders_by_key_as_list_and_without_a_list(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, name in ((one, "a.svs"), (two, "b.svs")):
        folder.mkdir()
        (folder / name).write_bytes(b"x")
    (one / "notes.txt").write_bytes(b"x")
    keyed: dict[str, Any] = {"data_dir": {"first": str(one), "second": str(two)},
                             "data_dir_key": "from"}
    (item,) = items_of(tmp_path, "slide_id,from\nz,second\n", **keyed)
    assert item.slide_path == two / "z.svs"
    with pytest.raises(Refused, match="from is 'third', data_dir has: first, second"):
        items_of(tmp_path, "slide_id,from\nz,third\n", **keyed)
    with pytest.raises(Refused, match="no column 'from'"):
        items_of(tmp_path, "slide_id\nz\n", **keyed)

    listed = items_of(tmp_path, "slide_id\na\nb\n", data_dir=(str(one), str(two)))
    assert [item.slide_path for item in listed] == [one / "a.svs", two / "b.svs"]
    for data_dir in (keyed["data_dir"], (str(one), str(two))):
        found = items_of(tmp_path, "", data_dir=data_dir, process_list=None)
        assert [item.slide_path for item in found] == [one / "a.svs", two / "b.svs"]
    assert [item.slide_id for item in items_of(tmp_path, "", data_dir=str(one),
                                               process_list=None)] == ["a"]
    with pytest.raises(Refused, match="no file ends with '.ndpi'"):
        items_of(tmp_path, "", data_dir=str(one), process_list=None, slide_ext=".ndpi")

    (two / "a.svs").write_bytes(b"y")
    with pytest.raises(Refused, match="in several folders"):
        items_of(tmp_path, "slide_id\na\n", data_dir=(str(one), str(two)))
    with pytest.raises(Refused, match="'a.svs' is in several folders"):
        items_of(tmp_path, "", data_dir=(str(one), str(two)), process_list=None)


def test_shipped_example_list_is_a_list() -> None:
    data = DataArguments(process_list=str(ROOT / "heatmaps/process_lists/heatmap_demo_dataset.csv"),
                         preset=None, label_dict={"normal": 0, "tumor": 1})
    assert len(list_items(data)[1]) == 2
