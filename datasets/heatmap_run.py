"""The slides of a heatmap run, one after another, and what becomes of them in the process list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from datasets.heatmap_config import HeatmapConfig
from datasets.heatmap_images import ImageTools
from datasets.heatmap_items import HeatmapItem
from datasets.heatmap_pictures import process_slide
from datasets.heatmap_scores import Tools
from utils.parallel import run_items
from utils.report import Row, RunReport, Status, outcome_row
from utils.storage import plain
from wsi_core.process_list import ProcessList

STATUS_CELLS = {Status.DONE: "processed", Status.SKIPPED: "processed"}


def fill_row(table: ProcessList, row: dict[str, str], result: Row) -> None:
    """What became of a slide, in its row; ``process`` 0 where nothing is left to do."""
    cells = {name: str(plain(value)) for name, value in result.numbers.items()}
    row.update(cells, status=STATUS_CELLS.get(result.status, result.status.value),
               reason=result.reason)
    if result.status not in (Status.FAILED, Status.BUSY):
        row["process"] = "0"
    table.columns += [name for name in row if name not in table.columns]


def draw_slides(table: ProcessList, items: Sequence[HeatmapItem], *, config: HeatmapConfig,
                tools: Tools | ImageTools, results: Path) -> RunReport:
    """Every slide in turn; its row is saved as soon as it ends."""
    report = RunReport("heatmaps")
    rows: Mapping[str, dict[str, str]] = {
        item.slide_id: row for item, row in zip(items, table.rows.values(), strict=True)}
    todo = [item for item in items if item.process]
    outcomes = run_items(process_slide, todo, workers=0,
                         arguments={"config": config, "tools": tools})
    for outcome in tqdm(outcomes, total=len(todo), desc="heatmaps", disable=None):
        result = outcome_row(name := outcome.item.slide_id, outcome)
        report.add(result)
        fill_row(table, rows[name], result)
        table.save(results)
    return report
