"""The files of an evaluation: CLAM's csv tables, ``metrics.json``, plots, ``report.html``.

CLAM's two tables keep CLAM's conventions: ``summary.csv`` calls its columns ``test_*`` whatever
the split and has -1 for an AUC that is not defined. ``metrics.json`` has null there, with a reason;
it is written last and holds the sha256 of the other files: only with it an evaluation is finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import __version__
from utils.errors import BrokenFile, Refused
from utils.evaluation import Evaluation, FoldPredictions
from utils.evaluation_report import PLOTS, build_page, draw_plots
from utils.html_report import format_interval, library_versions, render_page
from utils.report import Row, RunReport, Status
from utils.statistics import METRICS
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
UNDEFINED_AUC = -1.0  # in summary.csv, as CLAM's eval writes it


@dataclass(frozen=True, kw_only=True)
class EvaluationFiles:
    """Names of the files of one run in its folder.

    ``suffix`` is ``_partial_{first}_{last}`` (last inclusive) when only some folds are evaluated:
    several such runs share a folder.
    """

    folder: Path
    code: str
    folds: tuple[int, ...]
    suffix: str
    with_report: bool

    @property
    def metrics(self) -> Path:
        """The file that says that the run is finished."""
        return self.folder / f"metrics{self.suffix}.json"

    @property
    def page(self) -> Path:
        """The report for people."""
        return self.folder / f"report{self.suffix}.html"

    @property
    def experiment(self) -> str:
        """CLAM's record of the settings."""
        return f"eval_experiment_{self.code}.txt"

    def names(self) -> list[str]:
        """Every file beside ``metrics.json``."""
        plots = [self.page.name, *(f"plots{self.suffix}/{name}" for name in PLOTS)]
        return [self.experiment, *(f"fold_{fold}.csv" for fold in self.folds),
                f"summary{self.suffix}.csv", f"report_eval{self.suffix}.csv",
                f"report_eval{self.suffix}.json", *(plots if self.with_report else [])]


def name_files(folder: Path, code: str, folds: Sequence[int], *, k: int,
               with_report: bool) -> EvaluationFiles:
    """The names for these folds out of ``k``."""
    suffix = "" if len(folds) == k else f"_partial_{folds[0]}_{folds[-1]}"
    return EvaluationFiles(folder=folder, code=code, folds=tuple(folds), suffix=suffix,
                           with_report=with_report)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that one run found out.

    pooled: figures over folds (or None), and a sentence that says how they came about.
    left_out, failed: slide -> reason.
    """

    class_names: tuple[str, ...]
    folds: Mapping[int, Evaluation]
    pooled: tuple[Evaluation | None, str]
    left_out: Mapping[str, str]
    failed: Mapping[str, str]

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
    folder = files.folder
    write_text(folder / files.experiment, f"{dict(experiment)!r}\n")
    for fold, item in findings.folds.items():
        write_fold_table(folder / f"fold_{fold}.csv", item.predictions)
    write_summary(folder / f"summary{files.suffix}.csv", findings.folds)
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
    plots = draw_plots(findings.folds, findings.pooled[0], findings.class_names)
    folder = files.folder / f"plots{files.suffix}"
    folder.mkdir(exist_ok=True)
    for name, png in plots.items():
        write_bytes(folder / name, png)
    write_text(files.page, render_page(build_page(
        title=f"Evaluation {files.code}", facts=facts, class_names=findings.class_names,
        folds=findings.folds, pooled=findings.pooled[0], pooled_note=findings.pooled[1],
        plots=plots, left_out=findings.left_out, failed=findings.failed, settings=settings,
        versions=library_versions())))


# ---------------------------------------------------------------------------- CLAM's csv files

def write_fold_table(path: Path, fold: FoldPredictions) -> None:
    """``fold_{k}.csv``: ``slide_id,Y,Y_hat,p_0,...``; Y and Y_hat as 0.0, 1.0, no index."""
    import pandas as pd

    columns: dict[str, Any] = {"slide_id": list(fold.slide_ids),
                               "Y": fold.labels.astype(np.float64),
                               "Y_hat": fold.predicted.astype(np.float64)}
    for index in range(fold.probabilities.shape[1]):
        columns[f"p_{index}"] = fold.probabilities[:, index].astype(np.float64)
    write_table(path, pd.DataFrame(columns))


def write_summary(path: Path, folds: Mapping[int, Evaluation]) -> None:
    """``summary.csv``: unnamed index, ``folds,test_auc,test_acc``."""
    import pandas as pd

    aucs = [item.plain.auc if np.isfinite(item.plain.auc) else UNDEFINED_AUC
            for item in folds.values()]
    write_table(path, pd.DataFrame({"folds": list(folds), "test_auc": aucs,
                                    "test_acc": [item.plain.accuracy for item in folds.values()]}),
                index=True)


# ---------------------------------------------------------------------------- metrics.json

def _record(findings: Findings, identity: Mapping[str, Any]) -> dict[str, Any]:
    across = {}
    for name in METRICS:
        values = np.array([item.estimates[name].value for item in findings.folds.values()])
        values = values[np.isfinite(values)]
        across[name] = {"mean": float(values.mean()) if len(values) else float("nan"),
                        "std": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
                        "folds": len(values)}
    pooled, pooled_note = findings.pooled
    record: dict[str, Any] = plain({
        "schema": SCHEMA, "version": __version__, "class_names": findings.class_names,
        "folds": {fold: item.record() for fold, item in findings.folds.items()},
        "across_folds": across, "pooled": None if pooled is None else pooled.record(),
        "pooled_note": pooled_note, "left_out": findings.left_out,
        "failed": findings.failed, "versions": library_versions(), "identity": identity})
    return record


def summary_lines(record: Mapping[str, Any]) -> list[str]:
    """AUC and accuracy of every fold, pooled, and their mean, out of ``metrics.json``."""
    lines = []
    for item in [*record["folds"].values(), record["pooled"]]:
        if item is not None:
            figures = ", ".join(f"{title} {_text(item['metrics'][name])}" for name, title in
                                (("auc", "AUC"), ("accuracy", "accuracy")))
            lines.append(f"{item['name']}: {item['slides']} slides, {figures}")
    auc, accuracy = (record["across_folds"][name] for name in ("auc", "accuracy"))
    if auc["folds"] > 1:
        lines.append(f"mean of {auc['folds']} folds: AUC {auc['mean']:.3f} +- {auc['std']:.3f}, "
                     f"accuracy {accuracy['mean']:.3f} +- {accuracy['std']:.3f}")
    return lines


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
    other settings or models is ``Refused``, or its files are removed when ``overwrite``. Changed
    inputs and failed slides are evaluated again.
    """
    for path in sorted(files.folder.glob("metrics*.json")):
        clash = _clash(_identity_of(path), identity)
        if clash and not overwrite:
            raise Refused(f"{files.folder} holds another evaluation ({path.name}: {clash}): "
                          "choose another --save_exp_code, or replace it with --overwrite")
        if overwrite and (clash or path == files.metrics):
            remove_run(path)
    try:
        record = read_json(files.metrics)
        same = (record["identity"] == plain(identity) and not record["failed"]
                and set(files.names()) <= set(record["files"]))
        intact = same and all(file_sha256(files.folder / name) == total
                              for name, total in record["files"].items())
    except (BrokenFile, OSError, KeyError, TypeError):
        return None
    return dict(record) if intact else None


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
