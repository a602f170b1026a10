"""The files of an evaluation: csv tables, ``metrics.json``, plots, ``report.html``.

For classes the two tables are CLAM's by its conventions: ``summary.csv`` calls its columns
``test_*`` whatever the split and has -1 for an AUC that is not defined. ``metrics.json`` has null
there, with a reason; it is written last and holds the sha256 of the other files: only with it an
evaluation is finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import __version__
from utils.errors import BrokenFile, Refused
from utils.evaluation import FoldPredictions, Results, TaskView
from utils.evaluation_report import build_page
from utils.evaluation_tasks import VIEWS
from utils.html_report import format_interval, library_versions, render_page
from utils.report import Row, RunReport, Status
from utils.storage import (
    differences,
    file_sha256,
    plain,
    read_json,
    write_bytes,
    write_json,
    write_table,
    write_text,
)

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationFiles:
    """Names of the files of one run in its folder.

    ``suffix`` is ``_partial_{first}_{last}`` (last inclusive) when only some folds are evaluated:
    several such runs share a folder. plots: names of the pictures.
    """

    folder: Path
    code: str
    folds: tuple[int, ...]
    suffix: str
    plots: tuple[str, ...]
    with_report: bool

    @property
    def metrics(self) -> Path:
        """The file that says that the run is finished."""
        return self.folder / f"metrics{self.suffix}.json"

    @property
    def page(self) -> Path:
        """The report for people."""
        return self.folder / f"report{self.suffix}.html"

    def advice(self) -> list[str]:
        """What to do next."""
        return [f"open {self.page}"] if self.with_report else []

    @property
    def experiment(self) -> str:
        """CLAM's record of the settings."""
        return f"eval_experiment_{self.code}.txt"

    def names(self) -> list[str]:
        """Every file beside ``metrics.json``."""
        plots = [self.page.name, *(f"plots{self.suffix}/{name}" for name in self.plots)]
        return [self.experiment, *(f"fold_{fold}.csv" for fold in self.folds),
                f"summary{self.suffix}.csv", f"report_eval{self.suffix}.csv",
                f"report_eval{self.suffix}.json", *(plots if self.with_report else [])]


def name_files(folder: Path, code: str, folds: Sequence[int], *, k: int,
               plots: Iterable[str], with_report: bool) -> EvaluationFiles:
    """The names for these folds out of ``k``."""
    suffix = "" if len(folds) == k else f"_partial_{folds[0]}_{folds[-1]}"
    return EvaluationFiles(folder=folder, code=code, folds=tuple(folds), suffix=suffix,
                           plots=tuple(plots), with_report=with_report)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that one run found out.

    view: how its task type is told; class_names: of the classes, labels or values
    warnings: what a reader must know before the figures
    left_out, failed: slide -> reason; lazy: what features computed on the way cost, or None:
    ``patches``, those ``looked_at``, those ``encoded`` and the ``seconds`` of that
    """

    view: TaskView
    class_names: tuple[str, ...]
    results: Results
    warnings: tuple[str, ...]
    left_out: Mapping[str, str]
    failed: Mapping[str, str]
    lazy: Mapping[str, float] | None = None

    def rows(self) -> list[Row]:
        """A report row for each slide that has no prediction."""
        return [Row(item=slide, status=status, reason=reason)
                for status, slides in ((Status.FAILED, self.failed), (Status.EMPTY, self.left_out))
                for slide, reason in slides.items()]


def write_evaluation(files: EvaluationFiles, findings: Findings, report: RunReport, *,
                     experiment: Mapping[str, Any], facts: Mapping[str, str],
                     settings: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Write every file, ``metrics.json`` last; returns its content.

    experiment: what CLAM writes down. facts, settings: for the page. identity: see
    ``find_finished``.
    """
    folder, view = files.folder, findings.view
    write_text(folder / files.experiment, f"{dict(experiment)!r}\n")
    for fold, item in findings.results.folds.items():
        write_fold_table(folder / f"fold_{fold}.csv", item.predictions, view)
    write_summary(folder / f"summary{files.suffix}.csv", findings.results, view)
    report.write(folder, options=dict(settings))
    if files.with_report:
        _write_page(files, findings, facts=facts, settings=settings)
    record = _record(findings, identity)
    record["files"] = {name: file_sha256(folder / name) for name in files.names()
                       if (folder / name).is_file()}
    write_json(files.metrics, record)
    return record


def _write_page(files: EvaluationFiles, findings: Findings, *, facts: Mapping[str, str],
                settings: Mapping[str, Any]) -> None:
    results, view = findings.results, findings.view
    plots = view.draw(results) if results.overall.slide_ids else {}
    folder = files.folder / f"plots{files.suffix}"
    folder.mkdir(exist_ok=True)
    for name, png in plots.items():
        write_bytes(folder / name, png)
    write_text(files.page, render_page(build_page(
        title=f"Evaluation {files.code}", facts=facts, view=view, results=results, plots=plots,
        warnings=findings.warnings, left_out=findings.left_out, failed=findings.failed,
        settings=settings, versions=library_versions())))


# ---------------------------------------------------------------------------- csv files

def write_fold_table(path: Path, fold: FoldPredictions, view: TaskView) -> None:
    """``fold_{k}.csv``: ``slide_id``, then truth and scores; of classes CLAM's
    ``slide_id,Y,Y_hat,p_0,...``, no index."""
    import pandas as pd

    columns = {name: np.asarray(column, np.float64)
               for name, column in view.columns(fold).items()}
    write_table(path, pd.DataFrame({"slide_id": list(fold.slide_ids), **columns}))


def write_summary(path: Path, results: Results, view: TaskView) -> None:
    """``summary.csv``: unnamed index, ``folds``, then ``test_<figure>`` of the task's headline."""
    import pandas as pd

    columns: dict[str, list[float]] = {}
    for key, figure in view.headline.items():
        values = [item.estimates[figure].value for item in results.folds.values()]
        columns[f"test_{key}"] = [value if np.isfinite(value) else
                                  view.missing.get(key, float("nan")) for value in values]
    write_table(path, pd.DataFrame({"folds": list(results.folds), **columns}), index=True)


# ---------------------------------------------------------------------------- metrics.json

def _record(findings: Findings, identity: Mapping[str, Any]) -> dict[str, Any]:
    results, across = findings.results, {}
    for name in findings.view.titles:
        values = results.across(name)
        across[name] = {"mean": float(values.mean()) if len(values) else float("nan"),
                        "std": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
                        "folds": len(values)}
    record: dict[str, Any] = plain({
        "schema": SCHEMA, "version": __version__, "task_type": findings.view.task_type,
        "class_names": findings.class_names, "warnings": findings.warnings,
        "folds": {fold: item.record() for fold, item in results.folds.items()},
        "across_folds": across, "pooled": results.pooled and results.pooled.record(),
        "pooled_note": results.note, "left_out": findings.left_out,
        "failed": findings.failed, "lazy_children": findings.lazy, "versions": library_versions(),
        "identity": identity})
    return record


def summary_lines(record: Mapping[str, Any]) -> list[str]:
    """Warnings, then the headline of every fold, pooled, and its mean, out of ``metrics.json``."""
    view = VIEWS[record["task_type"]]
    told = {figure: _in_a_line(view.titles[figure]) for figure in view.headline.values()}
    lines = [f"warning: {text}" for text in record["warnings"]]
    for item in [*record["folds"].values(), record["pooled"]]:
        if item is not None:
            figures = ", ".join(f"{title} {_text(item['metrics'][name])}"
                                for name, title in told.items())
            lines.append(f"{item['name']}: {item['slides']} slides, {figures}")
    across = {title: record["across_folds"][name] for name, title in told.items()}
    number = next(iter(across.values()))["folds"]
    if number > 1:
        lines.append(f"mean of {number} folds: " + ", ".join(
            f"{title} {item['mean']:.3f} +- {item['std']:.3f}" for title, item in across.items()))
    return [*lines, *_lazy_line(record["lazy_children"])]


def _lazy_line(lazy: Mapping[str, float] | None) -> list[str]:
    """How much of the finer levels was needed."""
    if lazy is None:
        return []
    share = lazy["looked_at"] / max(1, lazy["patches"])
    cached = lazy["looked_at"] - lazy["encoded"]
    return [f"finer levels: {lazy['looked_at']:,.0f} of {lazy['patches']:,.0f} patches looked at "
            f"({share:.1%}), {lazy['encoded']:,.0f} encoded in {lazy['seconds']:.1f} s, "
            f"{cached:,.0f} from an earlier run"]


def _in_a_line(title: str) -> str:
    """``accuracy`` of ``Accuracy``, but ``AUC`` as it is."""
    return title[:1].lower() + title[1:] if title[1:2].islower() else title


def _text(item: Mapping[str, Any]) -> str:
    value, low, high = (float("nan") if item[key] is None else item[key]
                        for key in ("value", "low", "high"))
    return format_interval(value, low, high)


# ---------------------------------------------------------------------------- a folder used before

def find_finished(files: EvaluationFiles, identity: Mapping[str, Any], *,
                  overwrite: bool) -> dict[str, Any] | None:
    """The record of this very evaluation when it is finished and intact, else None.

    ``identity`` has ``settings`` (equal for every run in one folder), ``models`` (by fold) and
    ``inputs`` (a digest of slides, labels and feature files by fold). A run in the folder with
    other settings or models is ``Refused`` unless ``overwrite``, which also does finished ones
    anew. Changed inputs and failed slides are evaluated again.
    """
    for path, clash in _clashes(files, identity).items():
        if clash and not overwrite:
            raise Refused(f"{files.folder} holds another evaluation ({path.name}: {clash}): "
                          "choose another --save_exp_code, or replace it with --overwrite")
    if overwrite:
        return None
    try:
        record = read_json(files.metrics)
        same = (record["identity"] == plain(identity) and not record["failed"]
                and set(files.names()) <= set(record["files"]))
        intact = same and all(file_sha256(files.folder / name) == total
                              for name, total in record["files"].items())
    except (BrokenFile, OSError, KeyError, TypeError):
        return None
    return dict(record) if intact else None


def remove_replaced(files: EvaluationFiles, identity: Mapping[str, Any]) -> None:
    """Remove the files of runs that this one replaces: of other settings or models, or its own."""
    for path, clash in _clashes(files, identity).items():
        if clash or path == files.metrics:
            remove_run(path)


def _clashes(files: EvaluationFiles, identity: Mapping[str, Any]) -> dict[Path, str]:
    """Each record in the folder and what speaks against it beside this run, "" for nothing."""
    return {path: _clash(_identity_of(path), identity)
            for path in sorted(files.folder.glob("metrics*.json"))}


def _identity_of(path: Path) -> dict[str, Any]:
    try:
        identity = read_json(path)["identity"]
        return {"settings": dict(identity["settings"]), "models": dict(identity["models"])}
    except (BrokenFile, KeyError, TypeError, ValueError):
        return {}


def _clash(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What speaks against both in one folder; empty when nothing does."""
    if not found:
        return ""
    settings = differences(found["settings"], wanted["settings"])
    folds = [fold for fold in wanted["models"] if fold in found["models"]]
    models = differences({fold: found["models"][fold] for fold in folds},
                         {fold: plain(wanted["models"][fold]) for fold in folds})
    return settings or (f"other checkpoints: fold {models}" if models else "")


def remove_run(path: Path) -> None:
    """Remove a ``metrics*.json`` and then the files that it lists; nothing else in the folder."""
    try:
        names = list(read_json(path)["files"])
    except (BrokenFile, KeyError, TypeError):
        names = []
    path.unlink(missing_ok=True)
    for name in names:
        target = path.parent / name
        if target.resolve().is_relative_to(path.parent.resolve()):
            target.unlink(missing_ok=True)
