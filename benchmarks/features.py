"""Features per second from a slide on disk: read, transform, encode, on the CPU.

    python benchmarks/features.py                              # about two minutes
    python benchmarks/features.py --encoders efficientnet_lite0 --patches 512 --threads 1

"as CLAM" is the reference's way: the h5 opened for every patch, OpenSlide, Pillow, torchvision's
transform, the eager network in float32 and NCHW. ResNet-50 has random weights here, which cost
the same as trained ones. Each line runs in a process of its own; "forward alone" is the same
network on patches that are in memory already, measured in the same run: the floor of that line.
"ready" is loading and freezing, paid once a run and left out of the rate; "error" is relative to
the features of the first line.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks._measure import in_new_process, peak_mb
from benchmarks.reading import tissue_patches
from utils.errors import EXIT_OK, run_script
from utils.options import option, parse
from utils.parallel import available_cpus
from utils.storage import write_h5, write_json

READ_PX = 256
TARGET_PX = 224


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    encoders: tuple[str, ...] = option(
        ("efficientnet_lite0", "resnet50_trunc"), metavar="NAME", help="encoders to measure",
        choices=("efficientnet_lite0", "resnet50_trunc"))
    slide: Path | None = option(None, help="a slide instead of the synthetic one")
    patches: int = option(256, low=32, help="256-px patches of it, at most")
    batch_size: int = option(64, low=1, help="patches in a batch")
    threads: int = option(0, low=0, help="of torch; 0 = all cores")
    json: Path | None = option(None, help="write the figures to this file as well")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way of making features. ``floor_ms`` is NaN where no floor was measured."""

    ready_s: float
    wall_ms: float  # a patch
    cpu_ms: float
    floor_ms: float
    peak_mb: float
    features: np.ndarray


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table an encoder."""
    options = parse(Options, prog="benchmarks/features.py", argv=argv, config_flag=False,
                    description=__doc__ or "")
    threads = options.threads or available_cpus()
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        slide = options.slide
        if slide is None:
            from benchmarks._slides import make_slide

            slide = make_slide(Path(folder) / "synthetic.tif", side_px=8192)
        corners = tissue_patches(slide, options.patches)
        write_h5(Path(folder) / "coords.h5", {"coords": corners}, parameters={},
                 chunk_rows={"coords": 1})
        weights = in_new_process(save_random_resnet, Path(folder) / "resnet50.pth")
        print(f"{slide.name}: {len(corners)} patches of {READ_PX} px, resized to {TARGET_PX}; "
              f"{threads} threads, batches of {options.batch_size}")
        for name in options.encoders:
            checkpoint = weights if name == "resnet50_trunc" else None
            shared = (name, checkpoint, slide, corners, options.batch_size, threads)
            lines = {"as CLAM, fp32": in_new_process(measure_clam, Path(folder) / "coords.h5",
                                                     *shared)}
            for precision in ("fp32", "bf16"):
                lines[f"ours, {precision}"] = in_new_process(measure_ours, precision, *shared)
            figures += report(name, lines)
    if options.json:
        write_json(options.json, figures)
    return EXIT_OK


def report(name: str, lines: dict[str, Measured]) -> list[dict[str, Any]]:
    """Print the table of one encoder; returns its rows."""
    reference = next(iter(lines.values()))
    print(f"\n{name:20}{'features/s':>11}{'ms/patch':>10}{'CPU ms':>8}{'times':>7}"
          f"{'forward alone':>15}{'share':>7}{'ready s':>9}{'peak MB':>9}{'error':>9}")
    rows = []
    for line, found in lines.items():
        error = float(np.linalg.norm(found.features - reference.features)
                      / np.linalg.norm(reference.features))
        row = {"encoder": name, "line": line, "rate": 1000 / found.wall_ms,
               "wall_ms": found.wall_ms, "cpu_ms": found.cpu_ms,
               "times": reference.wall_ms / found.wall_ms, "floor_ms": found.floor_ms,
               "share": found.floor_ms / found.wall_ms, "ready_s": found.ready_s,
               "peak_mb": found.peak_mb, "error": error}
        rows.append(row)
        print(f"{line:20}{row['rate']:11.1f}{row['wall_ms']:10.2f}{row['cpu_ms']:8.1f}"
              f"{row['times']:7.1f}{row['floor_ms']:15.2f}{row['share']:7.0%}"
              f"{row['ready_s']:9.1f}{row['peak_mb']:9.0f}{row['error']:9.1e}")
    return rows


def save_random_resnet(path: Path) -> Path:
    """A ResNet-50 with random weights, as a checkpoint."""
    import timm
    import torch

    from utils.storage import save_torch

    torch.manual_seed(0)
    save_torch(path, timm.create_model("resnet50").state_dict())
    return path


def timed(work: Callable[[], Any], count: int) -> tuple[Any, float, float]:
    """What ``work`` returns, and wall and CPU milliseconds a patch."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return (result, 1000 * (time.perf_counter() - wall) / count,
            1000 * (time.process_time() - cpu) / count)


def measure_ours(precision: Any, name: str, checkpoint: Path | None, slide: Path,
                 corners: np.ndarray, batch_size: int, threads: int) -> Measured:
    """``datasets.patches.encode_slide`` with two reading threads, as the script runs it."""
    import torch

    from datasets.patches import encode_slide
    from models.encoders import load_encoder

    torch.set_num_threads(threads)
    start = time.perf_counter()
    encoder = load_encoder(name, checkpoint=checkpoint, target_px=TARGET_PX, precision=precision)
    memory = np.random.default_rng(0).integers(0, 256, (64, TARGET_PX, TARGET_PX, 3), np.uint8)
    encoder.encode(memory[:16])
    ready_s = time.perf_counter() - start
    features, wall_ms, cpu_ms = timed(lambda: encode_slide(
        slide, corners, patch_level=0, patch_size=READ_PX, output_size=READ_PX, encoder=encoder,
        batch_size=batch_size, workers=2), len(corners))
    _, floor_ms, _ = timed(lambda: encoder.encode(memory), len(memory))
    return Measured(ready_s=ready_s, wall_ms=wall_ms, cpu_ms=cpu_ms, floor_ms=floor_ms,
                    peak_mb=peak_mb(), features=features)


def measure_clam(coords: Path, name: str, checkpoint: Path | None, slide: Path,
                 corners: np.ndarray, batch_size: int, threads: int) -> Measured:
    """Patch by patch in one process, as the reference does without a GPU."""
    import h5py
    import openslide
    import torch
    from torchvision import transforms

    from models.encoder_networks import encoder_spec
    from models.encoder_weights import find_weights

    torch.set_num_threads(threads)
    start = time.perf_counter()
    spec = encoder_spec(name)
    network = spec.build(find_weights(name, spec.weights, checkpoint)).eval()
    ready_s = time.perf_counter() - start
    transform = transforms.Compose([transforms.Resize(TARGET_PX), transforms.ToTensor(),
                                    transforms.Normalize(spec.mean, spec.std)])
    opened = openslide.OpenSlide(str(slide))

    def item(index: int) -> torch.Tensor:
        with h5py.File(coords, "r") as file:
            x, y = file["coords"][index]
        patch = opened.read_region((int(x), int(y)), 0, (READ_PX, READ_PX)).convert("RGB")
        return transform(patch)  # type: ignore[no-any-return]

    def run() -> np.ndarray:
        found = []
        with torch.inference_mode():
            for first in range(0, len(corners), batch_size):
                last = min(first + batch_size, len(corners))
                found.append(network(torch.stack([item(i) for i in range(first, last)])).numpy())
        return np.concatenate(found)

    features, wall_ms, cpu_ms = timed(run, len(corners))
    memory = torch.rand(min(64, batch_size), 3, TARGET_PX, TARGET_PX)
    with torch.inference_mode():
        _, floor_ms, _ = timed(lambda: network(memory), len(memory))
    return Measured(ready_s=ready_s, wall_ms=wall_ms, cpu_ms=cpu_ms, floor_ms=floor_ms,
                    peak_mb=peak_mb(), features=features)


if __name__ == "__main__":
    sys.exit(run_script(main))
