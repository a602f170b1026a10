"""extract_features_fp.py with the encoders of end-to-end models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import extract_features_fp
from models.encoders import load_encoder
from tests.feature_inputs import Inputs, make_inputs
from tests.heatmap_project import write_described
from utils.errors import Refused
from utils.parallel import run_items
from utils.storage import file_sha256, read_h5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs") / "cohort", (5, 3))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child processes: it is the encoder that is tested."""
    def here(work: Any, items: Any, **settings: Any) -> Any:
        return run_items(work, items, workers=0, arguments=settings["arguments"])

    monkeypatch.setattr("datasets.extraction.run_items", here)


def extract(inputs: Inputs, feat_dir: Path, *flags: object) -> int:
    base = inputs.arguments(feat_dir)
    return extract_features_fp.main([*base[:base.index("--model_name")], *map(str, flags)])


def test_encoders_of_two_folds_and_the_slide_vectors_of_one(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"s_{fold}_checkpoint.pt" for fold in (0, 1)]
    for seed, path in enumerate(paths):
        write_described(path, "e2e_test_resnet_abmil", seed=seed, options={"img_size": 48})
    names = [f"e2e:{path}" for path in paths]
    assert extract(inputs, tmp_path / "f", "--model_name", *names) == 0
    folders = [tmp_path / "f" / f"e2e_e2e_test_resnet_abmil-{file_sha256(path)[:8]}"
               for path in paths]
    found = [sorted((folder / "h5_files").glob("*.h5")) for folder in folders]
    assert len(found[0]) == len(found[1]) == 2
    features = [read_h5(files[0]).arrays["features"] for files in found]
    assert features[0].shape == (5, 96) and np.abs(features[0] - features[1]).max() > 1e-3
    parameters = read_h5(found[0][0]).parameters
    assert parameters is not None
    assert parameters["encoder"] == load_encoder(names[0]).record()

    assert extract(inputs, tmp_path / "g", "--model_name", names[0], "--slide_encoder",
                   f"checkpoint:{paths[0]}") == 0
    assert np.array_equal(
        read_h5(tmp_path / "g/h5_files" / found[0][0].name).arrays["features"], features[0])
    assert len(list((tmp_path / "g/slide_features").rglob("*.h5"))) == 2
    capsys.readouterr()
    assert extract(inputs, tmp_path / "g", "--model_name", names[0]) == 0
    assert "0 slides to do" in capsys.readouterr().out


def test_what_is_no_end_to_end_model_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    write_described(tmp_path / "two.pt", "abmil")
    with pytest.raises(Refused, match="that is a abmil, which has no encoder"):
        extract(inputs, tmp_path / "f", "--model_name", f"e2e:{tmp_path / 'two.pt'}")
    with pytest.raises(Refused, match="there is no checkpoint .*one.pt"):
        extract(inputs, tmp_path / "f", "--model_name", f"e2e:{tmp_path / 'one.pt'}")
    assert not (tmp_path / "f").exists()
