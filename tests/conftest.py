"""Fixtures every test may use. Fast by default; real files, real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slides import tissue_image, write_pyramid

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; the test is skipped where it is not there."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data (real slides)")
    return SHARED


@pytest.fixture
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script of ours as a process: ``run_script("main.py", "--k", 2, env={...})``."""

    def run(script: str, *args: object, cwd: Path | None = None, timeout: float = 300,
            env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd or ROOT,
            capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **(env or {})})

    return run


@pytest.fixture(scope="session")
def slide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small JPEG pyramids ``slide_0.tif`` ... (2048 x 1536, levels 1/2/4); do not change."""
    folder = tmp_path_factory.mktemp("slides")
    for seed in range(3):
        write_pyramid(folder / f"slide_{seed}.tif", tissue_image(2048, 1536, seed=seed))
    return folder
