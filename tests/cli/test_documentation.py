"""Commands that we show are commands that work: README, docs and the numbered recipes."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "scripts").glob("*/[1-9]_*.sh"))
NOT_FIELDS = {"--config", "--version", "--help"}


def flags_of(script: str) -> set[str]:
    """All spellings of a script's flags, from its Options."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    found = set(NOT_FIELDS)
    for item in dataclasses.fields(module.Options):
        found |= {f"--{item.name}", f"--no_{item.name}", *item.metadata.get("aliases", ())}
    return found


def shown_commands(text: str) -> list[list[str]]:
    """Word lists of the ``python script.py ...`` lines in a page."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"(?:^|`|\$ |PYTHON )(?:python )?((?:\w+/)*\w+\.py [^\n`|]*)", joined, re.M)
    return [shlex.split(line.split(" #")[0].replace("…", "")) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_shown_flags_exist(page: Path) -> None:
    for script, *words in shown_commands(page.read_text(encoding="utf-8")):
        assert (ROOT / script).exists(), script
        flags = {word for word in words if word.startswith("--")}
        assert flags <= flags_of(script), f"{script}: {flags - flags_of(script)}"


def test_the_readme_shows_all_six_scripts() -> None:
    shown = {command[0] for command in shown_commands((ROOT / "README.md").read_text())}
    assert {"create_patches_fp.py", "extract_features_fp.py", "create_splits_seq.py", "main.py",
            "eval.py", "create_heatmaps.py"} <= shown


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes(recipe: Path) -> None:
    """Each recipe runs scripts with flags that exist, and hands further ones to one of them."""
    run = subprocess.run(["bash", str(recipe), "--extra"], cwd="/", capture_output=True, text=True,
                         env={**os.environ, "PYTHON": "echo"})
    assert run.returncode == 0, run.stderr
    commands = [line.split() for line in run.stdout.splitlines()]
    assert [words[-1] for words in commands].count("--extra") == 1
    for script, *words in commands:
        flags = {word for word in words if word.startswith("--")} - {"--extra"}
        assert flags and flags <= flags_of(script)


def test_links_in_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
