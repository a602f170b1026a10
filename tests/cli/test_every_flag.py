"""Every flag of every script, and every key of the heatmap YAML, is used by the script's tests."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from datasets.heatmap_config import SECTIONS, Sample, SampleArguments

HERE = Path(__file__).parent
SCRIPTS = ("create_patches_fp", "extract_features_fp", "create_splits_seq", "main", "eval",
           "create_heatmaps", "scripts.build_preset", "scripts.convert_slides")


def untested(kind: type, text: str, form: str) -> set[str]:
    """Fields of ``kind`` of which ``text`` nowhere has the ``form``."""
    return {item.name for item in dataclasses.fields(kind)
            if not re.search(form.format(item.name), text)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags(script: str) -> None:
    """As ``--name``, ``name=`` of a helper, or a parametrised ``"name"``; a script's tests may be
    spread over ``test_<script>.py`` and ``test_<script>_<part>.py``."""
    text = "".join(path.read_text(encoding="utf-8")
                   for path in sorted(HERE.glob(f"test_{script.split('.')[-1]}*.py")))
    options = importlib.import_module(script).Options
    assert untested(options, text, r'--(?:no_)?{0}\b|\b{0}=|"{0}"') == set()


@pytest.mark.parametrize("section", [*SECTIONS, "samples"])
def test_keys(section: str) -> None:
    """As ``"section.key"`` of the helper ``draw``, or a parametrised ``"key"``."""
    kind = {**SECTIONS, "samples": Sample}[section]
    text = "".join(path.read_text(encoding="utf-8")
                   for path in sorted(HERE.glob("test_create_heatmaps*.py")))
    form = rf'"{section}\.{{0}}"|"{{0}}"'
    assert kind is SampleArguments or untested(kind, text, form) == set()
